"""Paths of modules: `unet.down_blocks.0…` in adapters, and which modules a training adapts."""

from __future__ import annotations

import math

from torch import nn

from ..base.base_model import BaseModel
from ..base.quantization import weight_shape
from ..config import LoraSpec
from ..errors import SettingsError

TEXT_LEVEL = "text_model."  # transformers 5 dropped this level from CLIPTextModel; adapter files keep it


def module_path(component: str, path: str) -> str:
    """The adapter's path of a submodule; those of text encoders always have `text_model.`."""
    if component != "unet" and not path.startswith(TEXT_LEVEL):
        path = TEXT_LEVEL + path
    return f"{component}.{path}"


def local_path(module: nn.Module, path: str) -> str:
    """Inverse of `module_path`, below the component."""
    if path.startswith(TEXT_LEVEL) and not hasattr(module, "text_model"):
        return path.removeprefix(TEXT_LEVEL)
    return path


def adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def base_layer(module: nn.Module) -> nn.Module:
    """The plain layer inside PEFT layers, or the layer itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def target_paths(base: BaseModel, lora: LoraSpec) -> dict[str, list[str]]:
    """For every component, the modules that `lora` adapts. Raises SettingsError for an impossible target or rank."""
    wanted = {"unet": lora.target_modules}
    if lora.text_encoder:
        wanted |= {name: lora.text_target_modules for name in base.structure if name != "unet"}
    chosen: dict[str, list[str]] = {}
    for component, suffixes in wanted.items():
        model = base.structure[component]
        unread = unread_layers(base, component)
        layers = [n for n, m in model.named_modules() if adaptable(base_layer(m)) and not any(f".{i}." in n for i in unread)]
        for suffix in suffixes:
            matching = [name for name in layers if name == suffix or name.endswith("." + suffix)]
            if not matching:
                raise SettingsError(f"no linear or convolution layer of the {component} ends in {suffix!r}; try 'to_q'")
            for path in matching:
                outer, *inner = weight_shape(base_layer(model.get_submodule(path)))
                limit = min(outer, math.prod(inner))
                if lora.rank > limit:
                    raise SettingsError(f"rank {lora.rank} is more than {path} can have; at most {limit} for this base")
            chosen.setdefault(component, []).extend(matching)
    return chosen


def unread_layers(base: BaseModel, component: str) -> list[str]:
    """Final text encoder layers without effect, e.g. "layers.11": an adapter there would learn nothing."""
    if component == "unet":
        return []
    depth = base.structure[component].config.num_hidden_layers
    count = base.family.unread_text_layers[base.family.text_encoders.index(component)]
    return [f"layers.{i}" for i in range(depth - count, depth)]
