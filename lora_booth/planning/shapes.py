"""A base without weights: modules of the right shapes on the "meta" device, built from configurations alone."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch
from torch import Tensor, nn

from ..base.base_model import TOYBOX, TOYBOX_FOLDER, BaseModel, is_hub_id, recognise
from ..base.diffusers_folder import read_model_index
from ..base.families import FAMILIES
from ..base.single_file import CONFIGS, inspect_checkpoint
from ..errors import BaseModelError, first_line

MODULES = ("unet", "vae", "text_encoder", "text_encoder_2")


@dataclass(frozen=True)
class Shapes:
    """What a base's configuration files say."""

    name: str  # for people
    parts: Mapping[str, Mapping[str, Any]]  # module -> its configuration; `classes`: module -> [library, class]
    tokenizers: tuple[Any, ...] = ()  # of a base in memory; () for stand-ins


def shapes_of(source: BaseModel | str | Path, *, revision: str | None = None) -> Shapes:
    """Of a base in memory; a family ("sd1", "sd2", "sdxl"); or whatever `BaseModel.load` takes, of which only configuration
    files are read. Raises BaseModelError."""
    if isinstance(source, BaseModel):
        return shapes_in_memory(source)
    if str(source) in FAMILIES:
        return built_in(str(source), FAMILIES[str(source)].label)
    folder = TOYBOX_FOLDER if str(source) == TOYBOX else Path(source).expanduser()
    if folder.is_file():
        return built_in(inspect_checkpoint(folder)[0].name, folder.stem)
    if folder.is_dir() or is_hub_id(str(source)):
        place: str | Path = folder if folder.is_dir() else str(source)
        index = read_model_index(place, revision)
        parts = {name: read_config(place, name, revision) for name in MODULES if present(index, name)}
        scheduler = read_config(place, "scheduler", revision)
        name = folder.resolve().name if folder.is_dir() and str(source) != TOYBOX else str(source)
        return Shapes(name, {**parts, "scheduler": scheduler, "classes": index})
    raise BaseModelError(
        f"{source}: no such folder or file; give a family ({', '.join(FAMILIES)}), 'toybox', a Hub id (owner/name), "
        "a diffusers folder or a .safetensors checkpoint"
    )


def built_in(family: str, name: str) -> Shapes:
    parts = json.loads((CONFIGS / f"{family}.json").read_text(encoding="utf-8"))
    return Shapes(name, {**parts, "classes": parts.pop("model_index")})


def shapes_in_memory(base: BaseModel) -> Shapes:
    modules = {"vae": base.shell.vae, **base.structure}
    parts: dict[str, Any] = {name: plain(module.config) for name, module in modules.items()}
    classes = {name: ["", type(module).__name__] for name, module in {**modules, "scheduler": base.scheduler}.items()}
    index = {"_class_name": base.family.pipeline, **classes}
    return Shapes(base.name, {**parts, "scheduler": plain(base.scheduler.config), "classes": index}, tuple(base.tokenizers))


def plain(config: Any) -> dict[str, Any]:
    return dict(config.to_dict() if hasattr(config, "to_dict") else config)


def present(index: Mapping[str, Any], name: str) -> bool:
    entry = index.get(name)
    return isinstance(entry, list) and bool(entry[-1])


def read_config(source: str | Path, part: str, revision: str | None) -> dict[str, Any]:
    """One configuration file of a diffusers folder or, from its cache or itself, of the Hub."""
    file = f"{part}/scheduler_config.json" if part == "scheduler" else f"{part}/config.json"
    try:
        if isinstance(source, Path):
            path = source / file
        else:
            from huggingface_hub import hf_hub_download

            path = Path(hf_hub_download(source, file, revision=revision))
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{source}: cannot read {file} ({first_line(error)}); is the folder complete?") from error
    return config if isinstance(config, dict) else {}


class StandIn:
    """In place of a tokenizer: as many tokens for every prompt, whatever they mean."""

    all_special_tokens: tuple[str, ...] = ()

    def __init__(self, length: int) -> None:
        self.model_max_length = length

    def __len__(self) -> int:
        return 2

    def __call__(self, prompts: str | list[str], **_: Any) -> Any:
        rows = 1 if isinstance(prompts, str) else len(prompts)
        return SimpleNamespace(input_ids=torch.zeros(rows, self.model_max_length, dtype=torch.long))

    def tokenize(self, prompt: str) -> list[str]:
        return []

    def batch_decode(self, ids: Tensor) -> list[str]:
        return [""] * len(ids)


def without_weights(shapes: Shapes, dtype: torch.dtype) -> BaseModel:
    """A base on the "meta" device: all of its structure, none of its memory. Raises BaseModelError."""
    import diffusers
    import transformers

    classes = shapes.parts["classes"]
    modules: dict[str, Any] = {}
    with torch.device("meta"):
        for name in (name for name in MODULES if name in shapes.parts):
            config, cls = shapes.parts[name], classes[name][-1]
            try:
                if name in ("unet", "vae"):
                    module: nn.Module = getattr(diffusers, cls).from_config(dict(config))
                else:
                    module = getattr(transformers, cls)(transformers.CLIPTextConfig(**config))
            except (AttributeError, TypeError, ValueError, KeyError) as error:
                raise BaseModelError(
                    f"{shapes.name}: no {name} can be made of its configuration ({first_line(error)})"
                ) from error
            modules[name] = nn.Module.to(module, dtype).eval()
    encoders = [modules[name] for name in ("text_encoder", "text_encoder_2") if name in modules]
    tokenizers = shapes.tokenizers or tuple(StandIn(encoder.config.max_position_embeddings) for encoder in encoders)
    scheduler = getattr(diffusers, classes["scheduler"][-1]).from_config(dict(shapes.parts["scheduler"]))
    others: dict[str, Any] = {"scheduler": scheduler}
    others |= dict(zip(("tokenizer", "tokenizer_2"), tokenizers, strict=False))
    family = recognise(SimpleNamespace(**modules, **others))
    more = {"add_watermarker": False} if family.time_ids else dict.fromkeys(("safety_checker", "feature_extractor"))
    if not family.time_ids:
        more["requires_safety_checker"] = False
    return BaseModel(getattr(diffusers, family.pipeline)(**modules, **others, **more), family, shapes.name)
