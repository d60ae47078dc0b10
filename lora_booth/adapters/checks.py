"""The limits of an adapter: what no file may go beyond, ours or a stranger's."""

from __future__ import annotations

import math
from pathlib import Path

import torch
from torch import Tensor

from ..errors import AdapterIncomplete, AdapterNonFinite, AdapterScaleError, AdapterTooLarge

MAX_RANK = 512
MAX_SCALE = 16.0  # of alpha / rank
MAX_VALUE = 1e4  # of a factor's elements


def check_shapes(module: str, down: tuple[int, ...], up: tuple[int, ...], path: Path | None) -> None:
    """The two factors fit together and the rank is one that an adapter has."""
    fit = len(down) in (2, 4) and len(up) in (2, 4) and down[0] == up[1] and up[2:] in ((), (1, 1))
    # 1x1 convolutions and linear layers are written for each other; a larger kernel needs its own shape
    if not fit or (len(up) != len(down) and down[2:] not in ((), (1, 1))):
        raise AdapterIncomplete(f"{module}: factors {list(down)} and {list(up)} do not fit together", path)
    rank, limit = down[0], min(MAX_RANK, up[0], math.prod(down[1:]))
    if rank > limit:
        raise AdapterTooLarge(f"{module}: rank {rank}; allowed here: {limit}", path)


def check_values(module: str, tensor: Tensor, path: Path | None) -> None:
    low, high = torch.aminmax(tensor)
    if not (low.item() >= -MAX_VALUE and high.item() <= MAX_VALUE):  # NaN compares false
        raise AdapterNonFinite(f"{module}: values from {low.item():g} to {high.item():g}; allowed: +-{MAX_VALUE:g}", path)


def check_scale(module: str, alpha: float, rank: int, path: Path | None) -> None:
    if not math.isfinite(alpha) or abs(alpha / rank) > MAX_SCALE:
        raise AdapterScaleError(f"{module}: alpha {alpha:g} with rank {rank}; allowed: up to {MAX_SCALE:g} x rank", path)
