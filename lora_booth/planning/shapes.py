"""A base without weights: modules on the "meta" device, built from configurations alone."""

from __future__ import annotations

from collections.abc import Mapping
from inspect import signature
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import nn

from ..base.base_model import BaseModel, located
from ..base.diffusers_folder import limited, read_config, read_index
from ..base.families import FAMILIES, check_trainable, recognise
from ..base.single_file import CONFIGS, family_of
from ..base.weight_files import WeightFile
from ..errors import BaseModelError, reason_of

MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")


def without_weights(source: BaseModel | str | Path, dtype: torch.dtype) -> BaseModel:
    """The structure of a loaded base, of a family ("sd1", "sd2", "sdxl") or of what `BaseModel.load` takes, of which only
    configuration files are read. Raises BaseModelError."""
    if isinstance(source, BaseModel):
        components = {"vae": source.shell.vae, **source.structure, "scheduler": source.scheduler}
        parts = {name: plain(component.config) for name, component in components.items()}
        parts["model_index"] = {name: ["", type(component).__name__] for name, component in components.items()}
        return built(source.name, parts, dtype)
    if str(source) in FAMILIES:
        return built(FAMILIES[str(source)].label, configured(CONFIGS / str(source)), dtype)
    name, place = located(source, or_else=f"a family ({', '.join(FAMILIES)}), ")
    if isinstance(place, Path) and place.is_file():
        place = CONFIGS / family_of(WeightFile(place)).name
    return built(name, configured(place), dtype)


def configured(place: Path | str) -> dict[str, dict[str, Any]]:
    """The configurations in a diffusers folder or of a Hub id, for `built`."""
    index = read_index(place)
    parts = {
        part: read_config(place, f"{part}/config.json")
        for part in MODULES
        if isinstance(index.get(part), list) and index[part][-1]
    }
    return parts | {"model_index": index, "scheduler": read_config(place, "scheduler/scheduler_config.json")}


def plain(config: Any) -> dict[str, Any]:
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


class StandIn:
    """Replaces a tokenizer: gives every prompt the full number of tokens, without meaning."""

    all_special_tokens: tuple[str, ...] = ()
    pad_token = ""

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __len__(self) -> int:
        return 2

    def __call__(self, prompts: str | list[str], **_: Any) -> Any:
        rows = 1 if isinstance(prompts, str) else len(prompts)
        return SimpleNamespace(input_ids=torch.zeros(rows, self.model_max_length, dtype=torch.long))

    def tokenize(self, prompt: str) -> list[str]:
        return []


def built(name: str, parts: Mapping[str, Mapping[str, Any]], dtype: torch.dtype) -> BaseModel:
    """A base on the "meta" device. Raises BaseModelError.

    parts  module or "scheduler" -> its configuration; "model_index" -> each one's [library, class]
    """
    import diffusers
    import transformers

    classes = parts["model_index"]
    modules: dict[str, Any] = {}
    with torch.device("meta"), limited(name):
        for part in (part for part in MODULES if part in parts):
            config, cls = parts[part], classes[part][-1]
            try:
                if part in ("unet", "vae"):
                    module: nn.Module = getattr(diffusers, cls).from_config(dict(config))
                else:
                    module = getattr(transformers, cls)(transformers.CLIPTextConfig(**config))
            except BaseModelError:
                raise
            except Exception as error:  # what the libraries raise for a wrong configuration has no bounds
                raise BaseModelError(f"{name}: no {part} can be built from its configuration ({reason_of(error)})") from error
            modules[part] = nn.Module.to(module, dtype).eval()
    others: dict[str, Any] = {"requires_safety_checker": False, "add_watermarker": False}
    try:
        others["scheduler"] = getattr(diffusers, classes["scheduler"][-1]).from_config(dict(parts["scheduler"]))
    except Exception as error:
        raise BaseModelError(f"{name}: no scheduler can be built from its configuration ({reason_of(error)})") from error
    for encoder, tokenizer in (("text_encoder", "tokenizer"), ("text_encoder_2", "tokenizer_2")):
        if encoder in modules:
            others[tokenizer] = StandIn(modules[encoder].config.max_position_embeddings)
    family = recognise(SimpleNamespace(**modules))
    kind = getattr(diffusers, family.pipeline)
    pipeline = kind(**{argument: (modules | others).get(argument) for argument in signature(kind).parameters})
    check_trainable(pipeline, family)
    return BaseModel(pipeline, family, name)
