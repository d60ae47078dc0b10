"""PEFT's configuration of an adapter, which gives its scale. Its text is compared, never evaluated."""

from __future__ import annotations

import math
import string
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import AdapterFormatError, AdapterScaleError, AdapterTargetError, AdapterTooLarge
from .contents import MAX_RANK
from .layouts import component_of

NAME_CHARACTERS = frozenset(string.ascii_letters + string.digits + "_.")
NUMBER_LENGTH = 40  # characters of a wrong number that a message quotes

# Fields that make something else of the same tensors (peft/tuners/lora/config.py and variants.py); False, None and [] do not.
VARIANTS = {
    "use_dora": "DoRA",
    "use_qalora": "QALoRA",
    "use_bdlora": "BD-LoRA",
    "kasa_config": "KaSA",
    "alora_invocation_tokens": "activated LoRA",
    "layer_replication": "LoRA on replicated layers",
}
# Initialisations that first change the base, so that the tensors alone are not the change (peft/tuners/lora/layer.py).
BASE_CHANGING = {"pissa": "PiSSA", "olora": "OLoRA", "corda": "CorDA", "loftq": "LoftQ", "lora_ga": "LoRA-GA"}


class PeftConfig:
    """The fields of a PEFT file's header entry or adapter_config.json; without any, alpha = rank."""

    def __init__(self, fields: Mapping[str, Any], path: Path | None = None) -> None:
        self.path = path
        self.fields = fields
        self._patterns: dict[tuple[str, str], dict[str, tuple[int, Any]]] = {}
        for name, value in fields.items():
            field = name.rsplit(".", 1)[-1]
            if field in ("r", "rank_pattern"):
                for rank in value.values() if isinstance(value, dict) else [value]:
                    self._check_rank(rank)
            if field in VARIANTS and value:
                raise AdapterTargetError(f"is {VARIANTS[field]}; only plain LoRA, LoHa and LoKr can be read", path)
            if field == "init_lora_weights" and isinstance(value, str):
                kind = next((kind for start, kind in BASE_CHANGING.items() if value.lower().startswith(start)), None)
                if kind is not None:
                    raise AdapterTargetError(
                        f"is {kind}, whose base was changed before training; have it converted to LoRA "
                        "(PEFT: save_pretrained with path_initial_model_for_weight_conversion)",
                        path,
                    )

    def _check_rank(self, rank: Any) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            raise AdapterFormatError(f"rank {ascii(rank)[:NUMBER_LENGTH]} in its metadata", self.path)
        if rank > MAX_RANK:
            raise AdapterTooLarge(f"rank {ascii(rank)[:NUMBER_LENGTH]} in its metadata; allowed: {MAX_RANK}", self.path)

    def _field(self, component: str, name: str) -> Any:
        return self.fields.get(f"{component}.{name}", self.fields.get(name))

    def _pattern(self, component: str, name: str) -> Mapping[str, tuple[int, Any]]:
        """The texts of a pattern with their position and value. PEFT runs them as regular expressions; we never do."""
        known = self._patterns.get((component, name))
        if known is not None:
            return known
        pattern = self._field(component, name) or {}
        if not isinstance(pattern, dict):
            raise AdapterFormatError(f"{name} is not a table in its metadata", self.path)
        texts: dict[str, tuple[int, Any]] = {}
        for place, (text, value) in enumerate(pattern.items()):
            plain = text.replace("\\.", ".").removesuffix("$")
            if not NAME_CHARACTERS.issuperset(plain.removeprefix("^")):
                raise AdapterScaleError(
                    f"{name} in its metadata holds {ascii(text[:NUMBER_LENGTH])}, a regular expression, which is never run; "
                    "ask for a file with complete module names",
                    self.path,
                )
            texts.setdefault(plain, (place, value))
        self._patterns[component, name] = texts
        return texts

    def value(self, module: str, pattern: str, field: str) -> Any:
        """The pattern's value for the module, else the field's. As in PEFT, the first text that fits counts."""
        component, _, path = module.partition(".")
        texts = self._pattern(component, pattern)
        if texts:
            parts = path.split(".")
            ends = [".".join(parts[i:]) for i in range(len(parts))]  # a text names a module by its path or the end of it
            whole = [f"^{path}", f"^{path.removeprefix('text_model.')}"]  # transformers 5 dropped that level
            fitting = [texts[name] for name in (*whole, *ends) if name in texts]
            if fitting:
                return min(fitting, key=lambda found: found[0])[1]
        return self._field(component, field)

    def alpha(self, module: str, rank: int | None) -> float:
        """PEFT's scale for the module as the alpha of a plain alpha / rank; without any entry alpha = rank.

        rank  None: of a LoKr without low-rank parts; it is in the configuration or does not matter
        """
        alpha = self.value(module, "alpha_pattern", "lora_alpha")
        if alpha is None:  # PEFT calls it so in LoHa and LoKr
            alpha = self.value(module, "alpha_pattern", "alpha")
        if alpha is None:
            return float(rank or 1)
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or abs(alpha) > 1e300:
            shown = ascii(alpha)[:NUMBER_LENGTH]
            raise AdapterScaleError(f"{module}: alpha {shown} in its metadata is not a usable number", self.path)
        if rank is None:
            configured = self.value(module, "rank_pattern", "r")
            return float(alpha) / (configured if isinstance(configured, int) else 1)
        return float(alpha) * (math.sqrt(rank) if self._field(component_of(module), "use_rslora") is True else 1.0)
