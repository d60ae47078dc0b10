"""Weight: an adapter's strength, uniform or by block and by denoising step."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field

from ..adapters.adapter import MOST_WEIGHT
from ..config import check, typed
from ..errors import SettingsError

BLOCK = re.compile(r"(down|up)(\.\d+)?|mid|text")


@dataclass(frozen=True)
class Weight:
    """A weight that differs by block or by step: `Weight(0.8, blocks={"down": 0.5, "up.1": 0}, end=0.6)`.

    value   of the adapter
    blocks  factors on it for "down", "mid", "up" (or one block, e.g. "up.1") of the U-Net and for "text"; others: 1
    start   share of the denoising steps, 0 to 1, from which on the adapter is active
    end     share until which it is active (in the text encoders: always, if start is 0)
    """

    value: float = 1.0
    blocks: Mapping[str, float] = field(default_factory=dict)
    start: float = 0.0
    end: float = 1.0

    def __post_init__(self) -> None:
        typed("blocks", self.blocks, Mapping)
        for name, value in {"weight": self.value, "start": self.start, "end": self.end, **self.blocks}.items():
            usual = f"-{MOST_WEIGHT:g} to {MOST_WEIGHT:g}; 0 to 1 is usual"
            check(abs(typed(name, value, float)) <= MOST_WEIGHT, f"weight {value}", usual)
        check(0 <= self.start < self.end <= 1, f"start {self.start:g}, end {self.end:g}", "0 <= start < end <= 1")
        for name in self.blocks:
            if not BLOCK.fullmatch(str(name)):
                raise SettingsError(f"block {name!r} is unknown; allowed: down, mid, up, text, and one block, e.g. 'up.1'")

    def of(self, path: str) -> float:
        """For a module of an adapter file, e.g. `unet.up_blocks.1.…`, while it is active."""
        component, block, index = (*path.split("."), "", "")[:3]
        kind = block.partition("_")[0] if component == "unet" else "text"  # of down_blocks, mid_block and up_blocks
        return self.value * self.blocks.get(f"{kind}.{index}", self.blocks.get(kind, 1.0))

    def active(self, progress: float) -> bool:
        """Whether the adapter is active at this share of the denoising steps."""
        return self.start <= progress < self.end

    @property
    def timed(self) -> bool:
        return (self.start, self.end) != (0.0, 1.0)

    def __str__(self) -> str:
        parts = [f"{self.value:g}", *(f"{name} {factor:g}" for name, factor in self.blocks.items())]
        if self.timed:
            parts.append(f"steps {self.start:g} to {self.end:g}")
        return ", ".join(parts)
