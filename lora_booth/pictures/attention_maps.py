"""Automatic regions: masks from the cross-attention of the first steps to each subject's words."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.changes import hooked
from ..errors import SettingsError, setting
from ..kernels.attention import split_heads
from .regions import Masks, blurred
from .unet_hook import UNetHook

MOST_PIXELS = 1024  # of a layer whose attention is read; chosen: finer layers show little of objects and cost much
COARSE = 16  # latents per pixel of a layer that is always read: as in SDXL's coarsest
SOFTNESS = 0.06  # of the masks' edges, as a share of the side; chosen


class AttentionMaps:
    """Mean attention to each subject's words, over heads, layers and steps.

    words  token positions of each subject in the picture's prompt
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.words = words
        self.clear()

    def clear(self) -> None:
        self.total: Tensor | None = None  # (N, P, side, side)
        self.queries: dict[int, Tensor] = {}

    @contextmanager
    def collecting(self, hook: UNetHook) -> Iterator[None]:
        read = [module for name, module in hook.unet.named_modules() if name.endswith(".attn2")]
        queries = [(module.to_q, self._store_query(module, hook)) for module in read]
        with hooked([*queries, *((module.to_k, self._add(module, hook)) for module in read)]):
            yield

    def _store_query(self, attention: nn.Module, hook: UNetHook) -> Callable[..., None]:
        def store(module: nn.Module, args: Any, output: Tensor) -> None:
            height, width = hook.current.size
            if output.shape[1] <= max(MOST_PIXELS, height * width // COARSE):
                self.queries[id(attention)] = output

        return store

    def _add(self, attention: Any, hook: UNetHook) -> Callable[..., None]:
        def add(module: nn.Module, args: Any, output: Tensor) -> None:
            query = self.queries.pop(id(attention), None)
            if query is None:
                return
            call = hook.current
            q, k = (split_heads(t[call.first :].float(), attention.heads) for t in (query, output))
            weights = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1).mean(1)  # (P, pixels, tokens)
            found = torch.stack([weights[..., list(positions)].mean(-1) for positions in self.words])  # (N, P, pixels)
            maps = found.reshape(*found.shape[:2], *hook.size)
            maps = maps / maps.mean((2, 3), keepdim=True).clamp(min=1e-8)
            side = max(call.size)
            maps = F.interpolate(maps, (side, side), mode="bilinear")
            self.total = maps if self.total is None else self.total + maps

        return add

    def masks(self) -> Masks:
        """Give each pixel to the subject whose words it attends to most, with soft edges. Raises SettingsError."""
        if self.total is None:  # fused projections, or another kind of attention
            boxes = setting("regions=[Region(...)]", option="--region NAME:0,0,0.5,1")
            raise SettingsError(f"no attention could be read to find regions; pass {boxes}")
        side = self.total.shape[-1]
        winner = blurred(self.total, SOFTNESS * side).argmax(0)  # (P, side, side)
        won = torch.stack([(winner == n).float() for n in range(len(self.total))])
        return Masks(blurred(won, SOFTNESS * side / 2).clamp(0, 1))
