"""The renders that every stage learns from, drawn once and kept as files."""

from __future__ import annotations

import os
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from lora_booth.toybox import world

from .scenes import random_scene

SIZE = 64  # pixels


@dataclass(frozen=True)
class Renders:
    """`count` pictures of random scenes, from `first_seed` on."""

    count: int
    first_seed: int
    pair_share: float = 0.4
    named_share: float = 0.0

    @property
    def name(self) -> str:
        return f"{self.first_seed}_{self.count}"

    def scenes(self) -> list[world.Scene]:
        seeds = range(self.first_seed, self.first_seed + self.count)
        return [random_scene(s, pair_share=self.pair_share, named_share=self.named_share) for s in seeds]

    def pictures(self, work: Path) -> np.ndarray:
        """(count, SIZE, SIZE, 3) uint8, drawn once and kept as a file in `work`."""
        path = work / f"renders_{self.name}.npy"
        if not path.exists():
            pictures = np.stack([np.asarray(world.draw(scene, SIZE)) for scene in self.scenes()])
            np.save(path.with_suffix(".tmp.npy"), pictures)
            os.replace(path.with_suffix(".tmp.npy"), path)
        return np.load(path, mmap_mode="r")


PLAIN = Renders(40_000, first_seed=0)  # for every stage
NAMED = Renders(30_000, first_seed=30_000_000, pair_share=0.5, named_share=0.8)  # for text and U-Net: looks with names
HELD_OUT = Renders(500, first_seed=10_000_000)  # for the figures in the log


def to_tensor(pictures: np.ndarray) -> Tensor:
    """uint8 (N, H, W, 3) -> float (N, 3, H, W) in -1..1."""
    return torch.from_numpy(np.array(pictures)).permute(0, 3, 1, 2).float() / 127.5 - 1
