"""Extracting an adapter: the difference of a fine-tuned model and its base, truncated to a rank."""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
from torch import Tensor

from ... import __version__
from ...base.base_model import BaseModel
from ...base.quantization import refuse_quantized
from ...config import typed
from ...errors import BaseModelError
from ...injection.paths import adaptable, module_path, unread_layers
from ..adapter import Adapter
from ..contents import Card, LoraFactors, card_facts, one_rank
from ..layouts import RARE, understood
from .spectrum import Truncation, Truncations, keep, spectrum_of, truncated


@dataclass(frozen=True)
class Extraction:
    """What part of a fine-tuned model the adapter holds."""

    truncations: Truncations  # of the layers that the adapter changes
    left_out: dict[str, float]  # other fine-tuned tensors (biases, norms, ...) -> Frobenius norm of their change

    @property
    def error(self) -> float:
        """Relative Frobenius error with respect to everything that was fine-tuned in the compared models."""
        norm, others = self.truncations.norm, self.left_out.values()
        whole = math.hypot(norm, *others)
        return math.hypot(self.truncations.error * norm, *others) / whole if whole else 0.0


@torch.no_grad()
def extract(
    tuned: BaseModel, base: BaseModel, *, rank: int | None = None, energy: float | None = None, text_encoder: bool = False
) -> tuple[Adapter, Extraction]:
    """Return the adapter of at most `rank` that brings `base` closest to `tuned`, and what is lost. alpha = rank.

    tuned, base   of the same architecture, best loaded in fp32: half precision rounds by as much as a weak change
    rank, energy  as in `resize`
    text_encoder  also compare the text encoders
    Every linear layer and convolution that adapters change is compared; layers that are equal in both are left out.
    """
    tuned, base, chosen = typed("tuned", tuned, BaseModel), typed("base", base, BaseModel), keep(rank, energy)
    if tuned.family != base.family:
        raise BaseModelError(
            f"{tuned.name} is {tuned.family.label} and {base.name} is {base.family.label}; pass the base that it was tuned from"
        )
    for one in (tuned, base):
        refuse_quantized(one.structure["unet"], one.name, "extraction")
    modules: dict[str, LoraFactors] = {}
    lost: list[Truncation] = []
    left_out: dict[str, float] = {}
    for component in ("unet", *(base.text_encoders if text_encoder else ())):
        model, unread = base.read(component)[component], unread_layers(base, component)  # which condition nothing
        changes = changed_weights(tuned, base, component)
        changes = {key: change for key, change in changes.items() if not any(f".{layer}." in key for layer in unread)}
        for name, layer in model.named_modules():
            path = module_path(component, name)
            if f"{name}.weight" not in changes or not adaptable(layer):
                continue
            if path in RARE or understood(f"{path}.alpha") != (path, "alpha"):
                continue  # not every program reads it
            change = changes.pop(f"{name}.weight")
            modules[path], loss = truncated(path, spectrum_of(change), tuple(change.shape), chosen)
            lost.append(loss)
        left_out |= {f"{component}.{key}": float(change.norm()) for key, change in changes.items()}
    if not modules:
        raise BaseModelError(f"{tuned.name} and {base.name} are equal in every layer that adapters change; nothing to extract")
    modules = {path: modules[path] for path in sorted(modules)}
    common = one_rank(modules)
    card = Card(
        **card_facts(base),
        rank=common,
        alpha=common,
        library_version=__version__,
        title=f"{tuned.name} minus {base.name}",
    )
    return Adapter(modules, card), Extraction(Truncations(tuple(lost)), left_out)


def changed_weights(tuned: BaseModel, base: BaseModel, component: str) -> dict[str, Tensor]:
    """tuned - base for every tensor that differs, float32, on the base's device."""
    one, other = (model.read(component)[component].state_dict() for model in (tuned, base))
    shapes = [{key: tuple(value.shape) for key, value in weights.items()} for weights in (one, other)]
    if shapes[0] != shapes[1]:
        key = next(k for k in sorted({*shapes[0], *shapes[1]}) if shapes[0].get(k) != shapes[1].get(k))
        raise BaseModelError(
            f"{component}.{key} is {shapes[0].get(key, 'not there')} in {tuned.name} and "
            f"{shapes[1].get(key, 'not there')} in {base.name}; neither was made from the other"
        )
    changes = {}
    for key, value in other.items():
        if value.is_floating_point():
            change = one[key].to(value.device).float() - value.float()
            if not change.isfinite().all():
                raise BaseModelError(f"{component}.{key} is not finite in {tuned.name} or {base.name}")
            if change.any():
                changes[key] = change
    return changes
