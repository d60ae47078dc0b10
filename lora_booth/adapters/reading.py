"""Reading adapter files, which may come from anyone: everything is checked before a tensor is handed out."""

from __future__ import annotations

import math
import os
import string
import warnings
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from .. import files
from ..base.families import labels
from ..base.weight_files import DTYPES, FACTOR_DTYPES, Header, parse_json, read_header
from ..errors import (
    AdapterBaseMismatch,
    AdapterDtypeError,
    AdapterError,
    AdapterFormatError,
    AdapterIncomplete,
    AdapterScaleError,
    AdapterTargetError,
    AdapterTooLarge,
    LeftOutWarning,
    UnsafeFormat,
    UnsafePath,
    one_line,
    shown,
)
from .contents import MAX_RANK, AdapterContents, LoraFactors, check_scale, check_shapes, check_values
from .foreign import refusal
from .layouts import FORMS, LOHA, LOKR, PEFT_PREFIX, RARE, SDXL_KEYS, Role, are_pair, component_of, understood
from .lycoris import as_lora
from .metadata import PEFT_KEY, card_from

ALPHA_DTYPES = (*FACTOR_DTYPES, "F64", "I64", "I32")  # some tools save alpha as one of the last
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
CONFIG_FILE = "adapter_config.json"  # PEFT's, beside the first of them
MAX_CONFIG = 2**20  # bytes of it; chosen
MAX_BYTES = 2**30  # of the tensors; chosen: far above every good file known


class FactorPlan(NamedTuple):
    """What the factors of one module will be, as known from the header."""

    kind: str | None  # of LyCORIS; None: plain LoRA
    down: tuple[int, ...]  # shape
    up: tuple[int, ...]
    rank: int | None  # of alpha / rank; None: the scale is 1 whatever alpha is


def load(path: Path, *, allow: Collection[str] = ()) -> AdapterContents:
    """The adapter in a file or folder; see `Adapter.load`."""
    file, config = find(path)
    with open_regular(file) as handle:
        return read(handle, os.fstat(handle.fileno()).st_size, file, config=config, allow=allow)


def read(
    handle: BinaryIO, size: int, path: Path, *, config: Path | None = None, allow: Collection[str] = ()
) -> AdapterContents:
    """The adapter in `size` bytes, read once from start to end. path: for messages and the adapter's name."""
    header = read_header(handle, size, path)
    named = _named(header, allow, path)
    plans = {module: _plan(module, keys, header, path) for module, keys in named.items()}
    expanded = sum(4 * (math.prod(plan.down) + math.prod(plan.up)) for plan in plans.values() if plan.kind)
    if max(size, expanded) > MAX_BYTES:
        raise AdapterTooLarge(f"{max(size, expanded)} bytes{' as LoRA' if expanded > size else ''}; allowed: {MAX_BYTES}", path)
    if path.name != FOLDER_FILES[0] and not any(key.startswith(PEFT_PREFIX) for key in header.tensors):
        config = None  # of another file
    peft = _peft_config(header.metadata.get(PEFT_KEY), config, path)
    modules = {}
    for module, keys in sorted(named.items()):
        tensors = {role: _tensor(header, key, handle, path) for role, key in keys.items()}
        modules[module] = _factors(module, tensors, plans[module], peft, path)
    stem, sgm = one_line(path.stem), any(key.startswith(SDXL_KEYS) for key in header.tensors)
    return AdapterContents(modules, card_from(header.metadata, modules, sgm=sgm, stem=stem), stem)


def _named(header: Header, allow: Collection[str], path: Path) -> dict[str, dict[Role, str]]:
    """Canonical module -> role -> key; no tensor is named twice, every dtype is allowed."""
    named: dict[str, dict[Role, str]] = {}
    left_out: dict[str, None] = {}
    known = {key: found for key in header.tensors if (found := understood(key))}
    if unknown := header.tensors.keys() - known.keys():
        raise refusal([key for key in header.tensors if key in unknown], alone=not known, path=path)
    for key, (module, role) in known.items():
        entry = header.tensors[key]
        if module in RARE and module not in allow:
            left_out[module] = None
            continue
        roles = named.setdefault(module, {})
        if role in roles:
            raise AdapterFormatError(f"{key} and {roles[role]} name the same tensor", path)
        roles[role] = key
        if entry.dtype not in (ALPHA_DTYPES if role == "alpha" else FACTOR_DTYPES):
            raise AdapterDtypeError(f"{key}: dtype {entry.dtype}; allowed: {', '.join(FACTOR_DTYPES)}", path)
        if role == "alpha" and math.prod(entry.shape) != 1:
            raise AdapterFormatError(f"{key} is not a single number", path)
    if left_out:
        message = f"changes {', '.join(left_out)}, which adapters rarely do"
        remedy = f"Adapter.load(path, allow={list(left_out)}) reads it"
        if not named:
            raise AdapterTargetError(f"{message}, and nothing else; {remedy}", path)
        warnings.warn(f"{shown(path)}: {message}; that is left out ({remedy})", LeftOutWarning, stacklevel=2)
    if not named:
        raise AdapterBaseMismatch(f"no LoRA tensors in it: not made for {labels()}", path)
    return named


def _plan(module: str, keys: Mapping[Role, str], header: Header, path: Path) -> FactorPlan:
    """What the module's factors will be. Every pair is complete, and no rank too large."""
    if "down" in keys and "up" in keys and not are_pair(keys["down"], keys["up"]):
        raise AdapterIncomplete(f"{keys['down']} and {keys['up']} are named differently, so they are not a pair", path)
    shapes = {role: header.tensors[key].shape for role, key in keys.items() if role != "alpha"}
    if shapes.keys() == {"down", "up"}:
        down, up = shapes["down"], shapes["up"]
        plan = FactorPlan(None, down, up, up[1] if len(up) > 1 else 1)
    else:
        plan = _lycoris_plan(module, shapes, path)
    check_shapes(f"{module} is {plan.kind}, as LoRA" if plan.kind else module, plan.down, plan.up, path)
    return plan


def _lycoris_plan(module: str, shapes: Mapping[Role, tuple[int, ...]], path: Path) -> FactorPlan:
    kind = FORMS.get(frozenset(shapes))
    if kind is None:
        raise AdapterIncomplete(f"{module}: {', '.join(sorted(shapes))} are not a complete LoRA, LoHa or LoKr", path)
    try:
        parts = {role: torch.empty(shape, device="meta") for role, shape in shapes.items()}
        down, up, rank = as_lora(module, parts)
    except (ValueError, RuntimeError, IndexError):
        listed = ", ".join(f"{role} {list(shape)}" for role, shape in sorted(shapes.items()))
        raise AdapterIncomplete(f"{module}: the parts of its {kind} do not fit together: {listed}", path) from None
    return FactorPlan(kind, tuple(down.shape), tuple(up.shape), rank)


def _factors(module: str, tensors: dict[Role, Tensor], plan: FactorPlan, peft: PeftConfig, path: Path) -> LoraFactors:
    given = tensors.pop("alpha", None)
    field = "alpha" if plan.kind in (LOHA, LOKR) else "lora_alpha"  # as PEFT calls it
    alpha = peft.alpha(module, plan.rank, field) if given is None else float(given.item())
    if plan.rank is None and given is not None and math.isfinite(alpha):
        alpha = 1.0  # LyCORIS and programs that read its files scale only low-rank parts
    check_scale(module, alpha, plan.rank or 1, path)
    for tensor in tensors.values():
        check_values(module, tensor, path)
    if plan.kind is None:
        down, up = tensors["down"], tensors["up"]
        if up.ndim != down.ndim:
            up = up.flatten(1) if down.ndim == 2 else up[:, :, None, None]
        return LoraFactors(down, up, alpha)
    down, up, _ = as_lora(module, {role: tensor.float() for role, tensor in tensors.items()})
    for tensor in (down, up):
        check_values(module, tensor, path)
    rank = down.shape[0]
    return LoraFactors(down, up, alpha if plan.rank == rank else alpha / (plan.rank or 1) * rank)


def _tensor(header: Header, key: str, handle: BinaryIO, path: Path) -> Tensor:
    entry = header.tensors[key]
    content = bytearray(entry.end - entry.start)
    handle.seek(header.data_start + entry.start)
    if handle.readinto(content) != len(content):  # type: ignore[attr-defined]  # of a buffered reader
        raise AdapterFormatError("became shorter while it was being read", path)
    return torch.frombuffer(content, dtype=DTYPES[entry.dtype]).reshape(entry.shape)


# --- PEFT's configuration of an adapter, which gives its scale -------------------------------------------------------

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
    """The fields of a PEFT file's header entry or adapter_config.json; without any, alpha = rank.

    Their text is compared, never evaluated.
    """

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

    def alpha(self, module: str, rank: int | None, field: str = "lora_alpha") -> float:
        """PEFT's scale for the module as the alpha of a plain alpha / rank; without any entry alpha = rank.

        rank  None: of a LoKr without low-rank parts; it is in the configuration or does not matter
        """
        alpha = self.value(module, "alpha_pattern", field)
        if alpha is None:
            return float(rank or 1)
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or abs(alpha) > 1e300:
            given = ascii(alpha)[:NUMBER_LENGTH]
            raise AdapterScaleError(f"{module}: alpha {given} in its metadata is not a usable number", self.path)
        if rank is None:
            configured = self.value(module, "rank_pattern", "r")
            return float(alpha) / (configured if isinstance(configured, int) else 1)
        return float(alpha) * (math.sqrt(rank) if self._field(component_of(module), "use_rslora") is True else 1.0)


def _peft_config(entry: str | None, config: Path | None, path: Path) -> PeftConfig:
    """From the header's entry, else from the file beside the tensors."""
    if entry is not None:
        if not entry.isascii():
            raise AdapterFormatError("PEFT's metadata are not ASCII", path)
        return PeftConfig(parse_json(entry.encode("ascii"), path), path)
    if config is None:
        return PeftConfig({})
    with open_regular(_inside(config)) as handle:
        content = handle.read(MAX_CONFIG + 1)
    if len(content) > MAX_CONFIG:
        raise AdapterTooLarge(f"more than {MAX_CONFIG} bytes", config)
    return PeftConfig(parse_json(content, config), config)


# --- which file, and only a regular one ---------------------------------------------------------------------------


def find(path: Path) -> tuple[Path, Path | None]:
    """The tensors' file, and a configuration of PEFT beside it. A file that is named itself may be a link."""
    try:
        if not path.is_dir():
            config = path.with_name(CONFIG_FILE)
            return path, config if os.path.lexists(config) else None
        names = {child.name for child in path.iterdir()}
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from None
    own = [name for name in sorted(names) if name.endswith(".safetensors") and not name.startswith(".")]
    usual = [name for name in FOLDER_FILES if name in names]
    if usual or len(own) == 1:  # as `Adapter.save_folder` and many repositories on the Hub have it
        return _inside(path / (*usual, *own)[0]), path / CONFIG_FILE if CONFIG_FILE in names else None
    if own:
        raise AdapterError(f"{len(own)} .safetensors files in this folder; name the adapter's file", path)
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        raise UnsafeFormat("only pickles in this folder, and those could run their code; ask for a .safetensors file", path)
    raise AdapterError(f"no {' or '.join(FOLDER_FILES)} in this folder; name the adapter's file", path)


def _inside(path: Path) -> Path:
    """A file of its folder; a link only within it or, as the Hub's cache is built, to the `blobs` of a folder above it."""
    try:
        home, target = path.parent.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise _cannot_open(path, error) from None
    blob = target.parent.name == "blobs" and target.parent.parent in home.parents
    if target != home / path.name and not blob and not target.is_relative_to(home):
        raise UnsafePath("a link out of its folder; pass the path of the file itself", path)
    return path


def open_regular(path: Path) -> BinaryIO:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsafeFormat(f"a {path.suffix} file is a pickle and could run its code; ask for a .safetensors file", path)
    try:
        return files.open_regular(path)
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from None


def _cannot_open(path: Path, error: Exception) -> AdapterError:
    reason = error.strerror if isinstance(error, OSError) else error
    return AdapterError(f"cannot be opened: {reason}; check the name", path)
