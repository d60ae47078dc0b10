"""Adapters attached to a pipeline by forward hooks, to draw with them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter, weighted
from ..adapters.contents import LoraFactors
from ..base.base_model import FINGERPRINT_LENGTH, TOYBOX, BaseModel
from ..base.changes import claimed, hooked, undone, unhook
from ..base.families import FAMILIES
from ..base.quantization import weight_dtype, weight_shape
from ..errors import AdapterBaseMismatch, OtherBaseWarning, setting
from .paths import adaptable, base_layer, local_path

Places = dict[str, tuple[nn.Module, LoraFactors]]  # path in adapter files -> the plain layer there, and its factors


def placed(adapter: Adapter, base: BaseModel) -> Places:
    """Where the adapter's factors go. Raises AdapterBaseMismatch if one does not fit."""
    if adapter.card.family not in (None, base.family.name):
        raise unfit(adapter, f"{base.name} is {base.family.label}")
    places: Places = {}
    components = base.structure
    for key, factors in adapter.modules.items():
        component, _, path = key.partition(".")
        if component not in components:
            raise unfit(adapter, f"{base.name} has no {component}")
        model = components[component]
        try:
            layer = base_layer(model.get_submodule(local_path(model, path)))
        except AttributeError:
            raise unfit(adapter, f"{base.name} has no module {key}") from None
        if not adaptable(layer):
            raise unfit(adapter, f"{key} of {base.name} is not a linear or convolution layer")
        wanted = weight_shape(layer)
        if (fitted := factors.fitted(wanted)) is None:
            raise unfit(adapter, f"{key} is {factors.shape} in the file and {wanted} in {base.name}")
        places[key] = layer, fitted
    return places


def unfit(adapter: Adapter, why: str) -> AdapterBaseMismatch:
    own = setting("the base that it was made for", option=f"--base {adapter.card.base_model or 'MODEL'}")
    return AdapterBaseMismatch(f"{made_for(adapter)}; {why}; use {own}")


def made_for(adapter: Adapter) -> str:
    card = adapter.card
    label = FAMILIES[card.family].label if card.family in FAMILIES else "another base"
    name = f"{adapter.stem}.safetensors" if adapter.stem else adapter.name
    return f"{name} was made for {card.base_model or label}" + (f" ({label})" if card.base_model else "")


class AttachedLayer:
    """One adapter's change of one layer, added by a forward hook of the plain layer: below whatever PEFT or accelerate put
    around it, so that no call of theirs changes it.

    scale  alpha / rank times the adapter's weight; 0: off
    gate   multiplies the change, e.g. by a mask; None: active everywhere
    """

    def __init__(self, layer: nn.Module, factors: LoraFactors, weight: float) -> None:
        self.layer, self.scale = layer, factors.scale * weight
        self.gate: Callable[[Tensor], Tensor] | None = None
        self.down, self.up = (factor.to(weight_dtype(layer)) for factor in (factors.down, factors.up))

    def __call__(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.scale == 0:
            return None
        if self.down.device != output.device:  # at the first call, and when the pipeline was moved
            self.down, self.up = self.down.to(output.device), self.up.to(output.device)
        x = args[0].to(self.down)
        if isinstance(layer, nn.Conv2d):
            change = F.conv2d(F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation), self.up)
        else:
            change = F.linear(F.linear(x, self.down), self.up)
        if self.gate is not None:
            change = self.gate(change)
        return (output + change * self.scale).to(output.dtype)


@dataclass
class AttachedAdapter:
    """One adapter on a pipeline: its layers by their path in adapter files, and its weight."""

    adapter: Adapter
    weight: float
    layers: dict[str, AttachedLayer]
    models: Sequence[nn.Module]  # that hold them
    even: bool = False  # all layers are known to have the weight

    def attach(self) -> None:
        for layer in self.layers.values():
            layer.layer.register_forward_hook(layer)
        forget_compiled(self.models)

    def detach(self) -> None:
        for layer in self.layers.values():
            unhook(layer.layer, layer)
        forget_compiled(self.models)

    def scale(self, path: str, weight: float) -> None:
        """Set the weight of one layer."""
        self.even = False
        self.layers[path].scale = self.adapter.modules[path].scale * weight

    def use(self, weight: float) -> None:
        """Set the weight of all layers; with 0 they cost nothing."""
        if self.even and self.weight == weight:
            return
        self.even = False  # an interrupt may come before all layers have it
        self.weight = weight
        for path in self.layers:
            self.scale(path, weight)
        self.even = True


def forget_compiled(models: Sequence[nn.Module]) -> None:
    """Compiled modules do not notice hooks that come or go: they are compiled again at their next call."""
    modules = [module for model in models for module in model.modules()]
    if any(m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule" for m in modules):
        torch._dynamo.reset()


def placements(base: BaseModel, adapters: Sequence[tuple[Adapter, float]]) -> list[tuple[Adapter, float, Places]]:
    """Each adapter, its weight and its places. Raises AdapterBaseMismatch if one was made for another base."""
    plan = [(adapter, weight, placed(adapter, base)) for adapter, weight in adapters]
    for adapter, weight, _ in plan:
        if weight and (note := other_weights(adapter, base)) is not None:
            warnings.warn(note, OtherBaseWarning, stacklevel=2)
    return plan


def other_weights(adapter: Adapter, base: BaseModel) -> str | None:
    """Family and shapes fit: a note if the adapter was trained for another prediction or on other weights.

    Raises AdapterBaseMismatch for one of an earlier version's toybox, of which it could draw nothing here.
    """
    trained, given, known = adapter.card.prediction_type, base.prediction_type, adapter.card.base_hash or ""
    if given in base.family.modelspec and trained not in (None, given):
        difference = f", which predicts {trained}; {base.name} predicts {given}, so its pictures will look wrong"
    elif len(known) != FINGERPRINT_LENGTH or any(hasattr(module, "base_layer") for module in base.unet.modules()):
        return None  # other tools' hashes are of files, not of weights; the user's own adapters may be fused
    elif base.fingerprint == known or len(base.fingerprint) != FINGERPRINT_LENGTH:  # longer: quantized by the user
        return None
    elif adapter.card.base_model == base.name == TOYBOX:
        raise AdapterBaseMismatch(f"{made_for(adapter)} of an earlier version of lora_booth; train it again on this one")
    else:
        difference = f"; {base.name} has other weights of the same shapes, so it may look different"
    return made_for(adapter) + difference


@contextmanager
def attached(base: BaseModel | Any, adapters: Sequence[tuple[Adapter, float]]) -> Iterator[Any]:
    """Adapters with their weights on a base or on any compatible diffusers pipeline; yields the pipeline.

    Each layer computes W x + sum of weight x (alpha / rank) x up(down(x)), exactly the sum of the adapters. Every
    check comes before the first change, and leaving restores the pipeline bit for bit, also after an exception.
    Raises AdapterBaseMismatch when an adapter was made for another base.
    """
    with attached_layers(base, weighted(adapters)):
        yield BaseModel.of(base).pipeline


@contextmanager
def attached_layers(base: BaseModel | Any, adapters: Sequence[tuple[Adapter, float]]) -> Iterator[list[AttachedAdapter]]:
    """Like `attached`, for code that changes weights while the adapters are on: yields an AttachedAdapter for each."""
    base = BaseModel.of(base, name="this pipeline")
    with claimed(base.shell.unet):
        on = attachable(base, adapters)
        with undone(*(one.detach for one in on)), hooked([(base.shell.unet, refuse_fused)]):
            for one in on:
                one.attach()
            yield on


def refuse_fused(unet: nn.Module, *_: Any) -> None:
    """A forward hook of the U-Net. Raises AdapterBaseMismatch where the layers that adapters change are not called."""
    if any("Fused" in type(getattr(module, "processor", None)).__name__ for module in unet.modules()):
        raise AdapterBaseMismatch("with fused projections adapters have no effect; call unfuse_qkv_projections() first")


def attachable(base: BaseModel, adapters: Sequence[tuple[Adapter, float]]) -> list[AttachedAdapter]:
    """The adapters, checked and ready to `attach`; those of weight 0 have no layers."""
    models = list(base.components.values())
    refuse_fused(base.unet)
    on = []
    for adapter, weight, places in placements(base, adapters):
        layers = {key: AttachedLayer(layer, factors, weight) for key, (layer, factors) in places.items() if weight}
        on.append(AttachedAdapter(adapter, weight, layers, models))
    return on
