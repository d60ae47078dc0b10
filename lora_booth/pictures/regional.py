"""Regions: each adapter is active in its part of the picture.

Every adapter's change is multiplied by its mask at each layer's resolution, and every pixel reads the prompt of its region.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.base_model import BaseModel, TextConditions
from ..base.changes import undone
from ..errors import AdapterBaseMismatch
from ..kernels.attention import split_heads
from ..kernels.attention_maps import SOFTNESS, AttentionMaps, blurred
from .regions import Masks
from .unet_hook import Gate, UNetCall, UNetHook


@dataclass
class Regional:
    """Answers the U-Net's calls region by region.

    members     index of each region's adapter among the attached ones; the others are active everywhere
    masks       None: read from the attention of the steps before `start`
    texts       each region's prompt, (1, tokens, d)
    background  the prompt outside the regions, (1, tokens, d)
    start       share of the denoising steps before which all adapters are active everywhere
    """

    members: Sequence[int]
    masks: Masks | None
    texts: Sequence[TextConditions]
    background: TextConditions
    start: float = 0.0
    maps: AttentionMaps | None = None

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
        states = [call.states_of(text) for text in (self.background, *self.texts)]
        tokens = states[0].shape[1]
        for n, member in enumerate(self.members):
            words = word_gates(n, self.masks.full).repeat_interleave(tokens, dim=1)
            hook.gates[member] = Gate(masks=self.masks, subject=n, words=words.repeat(call.rows // len(words), 1))
        with attention_by_region(hook, self.masks, tokens):
            return call.run(encoder_hidden_states=torch.cat(states, dim=1))


def word_gates(n: int, masks: Tensor) -> Tensor:
    """How much of adapter n is active in the words of each prompt: that of the background 0, its own 1, that of another
    region the share of it that region n covers. masks: (N, P, H, W) -> (P, 1 + N)"""
    areas = masks.sum((2, 3))  # (N, P)
    shares = (masks * masks[n]).sum((2, 3)) / areas.clamp(min=1e-6)
    shares[n] = 1
    return torch.cat([torch.zeros_like(shares[:1]), shares]).T


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
        shares = torch.cat([(1 - masks.sum(0, keepdim=True)).clamp(0, 1), masks])
        shares = shares / shares.sum(0, keepdim=True).clamp(min=1e-6)
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
