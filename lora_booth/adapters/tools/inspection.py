"""What is in an adapter: its ranks, how large its change is in each block, and which modules change nothing."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ..adapter import Adapter
from ..contents import Card
from .difference import norm

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

    @property
    def ranks(self) -> dict[int, int]:
        """rank -> how many modules have it"""
        return dict(sorted(Counter(m.rank for m in self.modules).items()))

    @property
    def alphas(self) -> dict[float, int]:
        """alpha -> how many modules have it"""
        return dict(sorted(Counter(m.alpha for m in self.modules).items()))

    @property
    def norms(self) -> dict[str, float]:
        """block -> Frobenius norm of all its changes together"""
        parts = {block: [m.norm for m in self.modules if block_of(m.module) == block] for block in BLOCKS.values()}
        return {block: math.hypot(*norms) for block, norms in parts.items() if norms}

    @property
    def dead(self) -> tuple[str, ...]:
        """Modules whose change is zero."""
        return tuple(m.module for m in self.modules if m.norm == 0)

    def as_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("ranks", "alphas", "norms", "dead")}
        return asdict(self) | derived


def inspect_adapter(adapter: Adapter) -> Inspection:
    """Inspect an adapter. Norms are computed from the factors, in float64."""
    modules = [ModuleInspection(name, f.shape, f.rank, f.alpha, norm(f)) for name, f in sorted(adapter.modules.items())]
    return Inspection(adapter.card, tuple(modules), adapter.nbytes, adapter.digest())


def block_of(module: str) -> str:
    return next(block for start, block in BLOCKS.items() if module.startswith(start))
