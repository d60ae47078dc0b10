"""Regions: each adapter is active in its part of the picture.

delta   one pass: every adapter's change is multiplied by its mask at each layer's resolution, and every pixel reads the prompt
        of its region
noise   one row for each region and one for the background: each predicts the full picture with only its adapter and
        prompt, and the masks mix the predictions
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils._pytree import tree_map

from ..base.base_model import BaseModel, TextConditions
from ..base.changes import undone
from ..errors import AdapterBaseMismatch
from ..kernels.attention import split_heads
from ..kernels.attention_maps import SOFTNESS, AttentionMaps, blurred
from .regions import Masks
from .unet_hook import Gate, UNetCall, UNetHook

Isolation = Literal["delta", "noise"]
EMPTY = 1 / 255  # a background mask nowhere above this needs no row


@dataclass
class Regional:
    """Answers the U-Net's calls region by region.

    members     index of each region's adapter among the attached ones; the others are active everywhere
    masks       None: read from the attention of the steps before `start`
    texts       each region's prompt, (1, tokens, d)
    background  the prompt outside the regions, (1, tokens, d)
    start       share of the denoising steps before which all adapters are active everywhere
    """

    isolate: Isolation
    members: Sequence[int]
    masks: Masks | None
    texts: Sequence[TextConditions]
    background: TextConditions
    start: float = 0.0
    together: bool = True
    maps: AttentionMaps | None = None
    draws_rest: ClassVar[bool] = True  # predicts what no region covers

    def __call__(self, hook: UNetHook, call: UNetCall) -> Any:
        if call.progress < self.start:
            hook.gates = [None] * len(hook.attached)
            if self.maps is None:
                return call.run()
            if call.step == 0:
                self.maps.total = self.masks = None
            with self.maps.collecting(hook.unet, call.size, call.pictures):
                return call.run()
        if self.masks is None:
            assert self.maps is not None
            self.masks = masks_by_attention(self.maps.found())
        return self._noise(hook, call, self.masks) if self.isolate == "noise" else self._delta(hook, call, self.masks)

    # --- noise

    def _noise(self, hook: UNetHook, call: UNetCall, masks: Masks) -> Any:
        """The mean of the predictions of each region and of the background, weighted by their masks."""
        everywhere = set(range(len(hook.attached))) - set(self.members)
        branches = [(everywhere | {i}, text) for i, text in zip(self.members, self.texts, strict=True)]
        shares = with_rest(masks.at(*call.size))  # (N + 1, P, h, w)
        if self.draws_rest and shares[-1].max() > EMPTY:
            branches.append((everywhere, self.background))
        else:
            shares = shares[:-1]
        predictions: list[Tensor] = []
        for part in [branches] if self.together else [[branch] for branch in branches]:
            for index in range(len(hook.attached)):
                active = torch.tensor([float(index in adapters) for adapters, _ in part]).repeat_interleave(call.rows)
                hook.gates[index] = None if active.all() else Gate(rows=active.to(hook.unet.device))
            answer = call.given(**joined([call.prompted(text).arguments for _, text in part], call.rows)).run()
            predictions += torch.split(answer[0] if isinstance(answer, tuple) else answer.sample, call.rows)
        mixed = torch.zeros_like(predictions[0])
        for share, prediction in zip(normalized(shares).to(mixed), predictions, strict=True):  # (P or 1, h, w)
            mixed += share.repeat(call.rows // len(share) if len(share) > 1 else 1, 1, 1)[:, None] * prediction
        return (mixed, *answer[1:]) if isinstance(answer, tuple) else type(answer)(sample=mixed)

    # --- delta

    def _delta(self, hook: UNetHook, call: UNetCall, masks: Masks) -> Any:
        states = [call.prompted(text).states for text in (self.background, *self.texts)]
        tokens = call.states.shape[1]
        for n, member in enumerate(self.members):
            words = word_gates(n, masks.full).repeat_interleave(tokens, dim=1)
            hook.gates[member] = Gate(masks=masks, subject=n, words=words.repeat(call.rows // len(words), 1))
        with attention_by_region(hook, masks, tokens):
            return call.given(encoder_hidden_states=torch.cat(states, dim=1)).run()


def word_gates(n: int, masks: Tensor) -> Tensor:
    """How much of adapter n is active in the words of each prompt: that of the background 0, its own 1, that of another
    region the share of it that region n covers. masks: (N, P, H, W) -> (P, 1 + N)"""
    areas = masks.sum((2, 3))  # (N, P)
    shares = (masks * masks[n]).sum((2, 3)) / areas.clamp(min=1e-6)
    shares[n] = 1
    return torch.cat([torch.zeros_like(shares[:1]), shares]).T


def with_rest(masks: Tensor) -> Tensor:
    """Masks (N, ...) followed by what they leave of 1. (N + 1, ...)"""
    return torch.cat([masks, (1 - masks.sum(0, keepdim=True)).clamp(0, 1)])


def normalized(shares: Tensor) -> Tensor:
    """The shares, scaled to add up to 1 at every pixel."""
    return shares / shares.sum(0, keepdim=True).clamp(min=1e-6)


def joined(calls: Sequence[Mapping[str, Any]], rows: int) -> Any:
    """Several calls' arguments as one: every tensor with `rows` rows end to end, everything else as in the first."""

    def join(first: Any, *others: Any) -> Any:
        together = isinstance(first, Tensor) and first.ndim and len(first) == rows
        return torch.cat([first, *others]) if together else first

    return tree_map(join, *calls)  # also within lists: the residuals of a ControlNet


# --- prompts of regions within one pass ----------------------------------------------------------------------------


@contextmanager
def attention_by_region(hook: UNetHook, masks: Masks, tokens: int) -> Iterator[None]:
    """Let attn2 of every transformer read, at each pixel, the prompts of the regions that the pixel belongs to."""
    before = hook.unet.attn_processors
    regional = RegionalAttention(hook, masks, tokens)
    with undone(lambda: hook.unet.set_attn_processor(dict(before))):
        hook.unet.set_attn_processor({name: regional if ".attn2." in name else p for name, p in before.items()})
        yield


class RegionalAttention:
    """Cross-attention to concatenated prompts, that of the background and each region's, mixed by masks."""

    def __init__(self, hook: UNetHook, masks: Masks, tokens: int) -> None:
        self.hook, self.masks, self.tokens = hook, masks, tokens

    def __call__(
        self, attn: Any, hidden_states: Tensor, encoder_hidden_states: Tensor, attention_mask: Tensor | None = None, **_: Any
    ) -> Tensor:
        rows, pixels, _width = hidden_states.shape
        query = split_heads(attn.to_q(hidden_states), attn.heads)
        key, value = (split_heads(layer(encoder_hidden_states), attn.heads) for layer in (attn.to_k, attn.to_v))
        mixed = torch.zeros_like(hidden_states)
        for part, share in enumerate(self._shares(rows).to(query.dtype)):
            span = slice(part * self.tokens, (part + 1) * self.tokens)
            read = F.scaled_dot_product_attention(query, key[:, :, span], value[:, :, span], scale=attn.scale)
            mixed = mixed + share[:, :, None] * read.transpose(1, 2).reshape(rows, pixels, -1)
        return attn.to_out[1](attn.to_out[0](mixed))

    def _shares(self, rows: int) -> Tensor:
        """Of each prompt at each pixel, (1 + N, rows, pixels)."""
        masks = self.masks.at(*self.hook.size).flatten(2)  # (N, P, pixels)
        shares = normalized(with_rest(masks).roll(1, 0))
        return shares.repeat(1, rows // shares.shape[1], 1)


def masks_by_attention(maps: Tensor) -> Masks:
    """Give each pixel to the subject whose words it attends to most, with soft edges. maps: (N, P, H, W)"""
    side = max(maps.shape[-2:])
    winner = blurred(maps, SOFTNESS * side).argmax(0)  # (P, H, W)
    won = torch.stack([(winner == n).float() for n in range(len(maps))])
    return Masks(blurred(won, SOFTNESS * side / 2).clamp(0, 1))


def refuse_hidden_adapters(base: BaseModel) -> None:
    """Raise AdapterBaseMismatch for adapters that no region can confine: fused into the weights, or rescaling them (DoRA)."""
    for component, model in base.components.items():
        for name, module in model.named_modules():
            where = f"{component}.{name} of {base.name}"
            if getattr(module, "merged_adapters", None):
                raise AdapterBaseMismatch(f"no region can confine an adapter fused into {where}; call unfuse_lora() first")
            if any(dict(getattr(module, "use_dora", None) or {}).values()):
                raise AdapterBaseMismatch(f"a DoRA adapter on {where} rescales the others; call unload_lora_weights() first")
