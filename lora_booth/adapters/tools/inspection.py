"""What is in an adapter: its ranks, how large its change is in each block, and which modules change nothing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import dataclass

from ..adapter import Adapter
from ..contents import Card
from .spectrum import norm

BLOCKS = {  # how a module's path begins -> what the block is called
    "unet.down_blocks.": "down",
    "unet.mid_block.": "mid",
    "unet.up_blocks.": "up",
    "unet.": "unet, other",
    "text_encoder.": "text encoder",
    "text_encoder_2.": "text encoder 2",
}


@dataclass(frozen=True)
class ModuleInspection:
    module: str
    shape: tuple[int, ...]  # of the weight that it changes
    rank: int
    alpha: float
    norm: float  # Frobenius, of the change


@dataclass(frozen=True)
class Inspection:
    """An overview of an adapter."""

    card: Card
    modules: tuple[ModuleInspection, ...]
    nbytes: int  # of the tensors
    digest: str  # sha256 of the factors
    ranks: dict[int, int]  # rank -> how many modules have it
    alphas: dict[float, int]  # the same for alpha
    norms: dict[str, float]  # block -> Frobenius norm of all its changes together
    dead: tuple[str, ...]  # modules whose change is zero


def inspect_adapter(adapter: Adapter) -> Inspection:
    """Inspect an adapter. Norms are computed from the factors, in float64."""
    modules = [ModuleInspection(name, f.shape, f.rank, f.alpha, norm(f)) for name, f in sorted(adapter.modules.items())]
    norms: dict[str, list[float]] = {block: [] for block in BLOCKS.values()}
    for m in modules:
        norms[next(block for start, block in BLOCKS.items() if m.module.startswith(start))].append(m.norm)
    return Inspection(
        card=adapter.card,
        modules=tuple(modules),
        nbytes=adapter.nbytes,
        digest=adapter.digest(),
        ranks=dict(sorted(Counter(m.rank for m in modules).items())),
        alphas=dict(sorted(Counter(m.alpha for m in modules).items())),
        norms={block: math.hypot(*parts) for block, parts in norms.items() if parts},
        dead=tuple(m.module for m in modules if m.norm == 0),
    )
