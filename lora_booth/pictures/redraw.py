"""Redraw: the base alone draws the picture with the plain class of every subject, then each adapter draws its part anew.

As OMG (arXiv 2403.10983) and Concept Weaver (arXiv 2404.03913) do it: a finished picture says where each object is, and both
objects are already there before an adapter changes one of them.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import KW_ONLY, dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from ..base.base_model import BaseModel
from ..kernels.attention_maps import SOFTNESS, blurred, subject_masks
from .regional import Regional, with_rest
from .regions import Masks
from .unet_hook import Gate, UNetCall, UNetHook


@dataclass
class Redrawing(Regional):
    """Answers the calls of two pictures: first those of the base alone, then those of the adapters on what it drew.

    background  the prompt with the plain class of every subject
    nouns       the class noun of each subject
    share       of the denoising steps, that the adapters draw; what no region covers stays as the base drew it
    drawn       the latents of the first picture, (P, C, h, w); None: not drawn yet
    """

    _: KW_ONLY
    base: BaseModel
    nouns: Sequence[str]
    share: float
    drawn: Tensor | None = None
    draws_rest = False

    def __call__(self, hook: UNetHook, call: UNetCall) -> Any:
        if self.drawn is None:
            off = Gate(rows=torch.zeros(call.rows, device=hook.unet.device))
            hook.gates = [off if index in self.members else None for index in range(len(hook.attached))]
            with nullcontext() if self.maps is None else self.maps.collecting(hook.unet, call.size, call.pictures):
                return call.prompted(self.background).run()
        towards = leading_to(self.drawn, call, self.base)
        if call.progress + self.share < 1:
            return answered(call, towards)
        answer = super().__call__(hook, call)
        assert self.masks is not None
        kept = with_rest(self.masks.at(*call.size))[-1]  # (P or 1, h, w)
        kept = kept.repeat(call.rows // len(kept), 1, 1)[:, None].to(towards)
        predicted = answer[0] if isinstance(answer, tuple) else answer.sample
        return answered(call, torch.lerp(predicted, towards, kept))


class TwoStages:
    """A pipeline each of whose calls draws two pictures from the same noise: the base's, then the adapters' on it."""

    def __init__(self, pipeline: Any, regional: Redrawing) -> None:
        vars(self).update(pipeline=pipeline, regional=regional)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.pipeline, name)

    def __setattr__(self, name: str, value: Any) -> None:
        setattr(self.pipeline, name, value)

    def __call__(self, *args: Any, **options: Any) -> Any:
        self.draw_plain(*args, **tree_map(twin, options))
        return self.pipeline(*args, **options)

    def draw_plain(self, *args: Any, **options: Any) -> None:
        """The first of the two, which gives automatic regions their masks."""
        regional, maps = self.regional, self.regional.maps
        regional.drawn = None
        if maps is not None:
            maps.total = None
        regional.drawn = self.pipeline(*args, **options | {"output_type": "latent", "return_dict": True}).images
        if maps is not None:
            found = maps.found()
            masks = subject_masks(found.cpu(), regional.nouns).to(found)
            regional.masks = Masks(blurred(masks, SOFTNESS / 2 * max(found.shape[-2:])).clamp(0, 1))


def twin(option: Any) -> Any:
    return option.clone_state() if isinstance(option, torch.Generator) else option


def answered(call: UNetCall, prediction: Tensor) -> Any:
    """What the U-Net returns."""
    from diffusers.models.unets.unet_2d_condition import UNet2DConditionOutput

    return UNet2DConditionOutput(sample=prediction) if call.arguments.get("return_dict", True) else (prediction,)


def leading_to(drawn: Tensor, call: UNetCall, base: BaseModel) -> Tensor:
    """The prediction that lets the sampler arrive at `drawn`, (P, C, h, w). (rows, C, h, w)

    With latents = a drawn + s noise, it is the noise, or v = a noise - s drawn (arXiv 2202.00512).
    """
    latents = call.arguments["sample"][:, : drawn.shape[1]].float()  # an inpainting U-Net's other channels follow
    drawn = drawn.float().repeat(len(latents) // len(drawn), 1, 1, 1)
    before, signals = int(call.time), base.alphas_cumprod
    signal = torch.lerp(signals[before], signals[min(before + 1, len(signals) - 1)], call.time - before)
    a, s = signal.sqrt(), (1 - signal).sqrt()
    noise = (latents - a * drawn) / s
    predictions = {"v_prediction": a * noise - s * drawn, "sample": drawn}
    return predictions.get(base.prediction_type, noise).to(call.arguments["sample"])
