"""Where a picture shows what its prompt names: read from the U-Net's attention while it is drawn."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.changes import hooked
from ..errors import SettingsError
from .attention import split_heads

MOST_PIXELS = 1024  # of a layer whose attention is read; chosen: finer layers show little of objects and cost much
COARSE = 16  # latents per pixel of a layer that is always read: as in SDXL's coarsest
SOFTNESS = 0.06  # of the masks' edges, as a share of the longer side; chosen
FLOOR = 0.4  # of the highest attention to a noun, from which on a pixel may belong to its object; chosen
GROWTH = 0.12  # of the longer side, by which a mask is wider than its object: room for a hat; chosen


class AttentionMaps:
    """Mean attention to each subject's words, over heads, layers and steps.

    words   token positions of each subject in the picture's prompt
    remedy  what to do where no attention can be read
    """

    def __init__(self, words: Sequence[Sequence[int]], *, remedy: str) -> None:
        self.words, self.remedy = words, remedy
        self.total: Tensor | None = None  # (N, P, H, W), of the latents
        self.size = (0, 0)  # height and width of the hidden states that pass through the current transformer
        self.query: Tensor | None = None  # of the layer whose keys come next

    @contextmanager
    def collecting(self, unet: nn.Module, size: tuple[int, int], pictures: int) -> Iterator[None]:
        """Add what the U-Net's calls attend to within the context.

        size      height and width of the latents
        pictures  in each call; rows of a negative prompt come before them
        """
        hooks: list[tuple[nn.Module, Callable[..., None]]] = []
        for name, module in unet.named_modules():
            if type(module).__name__ == "Transformer2DModel":
                hooks.append((module.norm, self._note_size))
            if name.endswith(".attn2"):
                add = partial(self._add, size, pictures, module)
                hooks += [(module.to_q, partial(self._keep, size)), (module.to_k, add)]
        with hooked(hooks):
            yield

    def _note_size(self, norm: nn.Module, args: Any, states: Tensor) -> None:
        self.size = (states.shape[-2], states.shape[-1])

    def _keep(self, size: tuple[int, int], to_q: nn.Module, args: Any, query: Tensor) -> None:
        height, width = size
        self.query = query if query.shape[1] <= max(MOST_PIXELS, height * width // COARSE) else None

    def _add(self, size: tuple[int, int], pictures: int, attention: Any, to_k: nn.Module, args: Any, key: Tensor) -> None:
        if self.query is None:
            return
        q, k = (split_heads(t[-pictures:].float(), attention.heads) for t in (self.query, key))
        weights = (q @ k.transpose(-1, -2) * attention.scale).softmax(-1).mean(1)  # (P, pixels, tokens)
        found = torch.stack([weights[..., list(positions)].mean(-1) for positions in self.words])  # (N, P, pixels)
        maps = found.reshape(*found.shape[:2], *self.size)
        maps = maps / maps.mean((2, 3), keepdim=True).clamp(min=1e-8)
        maps = F.interpolate(maps, size, mode="bilinear")
        self.total = maps if self.total is None else self.total + maps

    def found(self) -> Tensor:
        """The maps, (N, P, H, W). Raises SettingsError."""
        if self.total is None:  # fused projections, or another kind of attention
            raise SettingsError(f"no attention could be read to find where each subject is; {self.remedy}")
        return self.total


def blurred(maps: Tensor, sigma: float) -> Tensor:
    """A Gaussian blur, truncated at two sigmas, with repeated edges. (N, P, H, W); sigma in pixels"""
    reach = max(1, round(2 * sigma))
    grid = torch.arange(-reach, reach + 1, device=maps.device, dtype=torch.float32)
    kernel = torch.exp(-0.5 * (grid / max(sigma, 1e-3)) ** 2)
    kernel /= kernel.sum()
    flat = F.pad(maps.flatten(0, 1)[:, None], [reach] * 4, mode="replicate")
    return F.conv2d(F.conv2d(flat, kernel[None, None, None]), kernel[None, None, :, None]).reshape(maps.shape)


def subject_masks(maps: Tensor) -> Tensor:
    """Disjoint masks, 0 or 1, from the attention to the noun of each subject. (N, P, H, W) -> the same

    Each map is scaled to 0..1, so that none outweighs another, and a pixel goes to the highest above FLOOR. A mask is what is
    connected to the map's peak, and grows by GROWTH.
    """
    side = max(maps.shape[-2:])
    maps = blurred(maps, SOFTNESS / 2 * side)
    low, high = maps.amin((2, 3), keepdim=True), maps.amax((2, 3), keepdim=True)
    maps = (maps - low) / (high - low).clamp(min=1e-8)
    winner = maps.argmax(0)  # (P, H, W)
    masks = torch.zeros_like(maps)
    for n, scaled in enumerate(maps):
        won = (scaled > FLOOR) & (winner == n) & (free := masks.sum(0) == 0)
        peaks = (scaled + won.float()).masked_fill(~free, -1)  # where nothing is won, the best that is left
        masks[n] = torch.stack([connected(one, int(peak.argmax())) for one, peak in zip(won, peaks, strict=True)])
    for _ in range(round(GROWTH * side)):
        wider = F.max_pool2d(masks, 3, 1, 1) * (masks.sum(0) == 0)
        masks = masks + wider * (wider.cumsum(0) == 1)  # what two of them reach goes to the first
    return masks


def connected(allowed: Tensor, peak: int) -> Tensor:
    """The part of `allowed`, (H, W), that is connected to the pixel with this index, 0 or 1. (H, W)"""
    allowed = allowed.float()
    found = torch.zeros_like(allowed)
    found.view(-1)[peak] = allowed.view(-1)[peak] = 1
    while not torch.equal(found, wider := F.max_pool2d(found[None], 3, 1, 1)[0] * allowed):
        found = wider
    return found
