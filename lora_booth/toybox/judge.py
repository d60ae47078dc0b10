"""The toybox's judge: a small network that reads from a 64 x 64 picture what `world.py` would have drawn.

It is trained on worn renders only and never seen by the generator. Its accuracy on held-out renders is the ceiling of
each of its scores (`benchmarks/RESULTS.md`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageOps
from safetensors.torch import load_file
from torch import Tensor, nn

from .scenery import CONTEXTS
from .world import ACCESSORIES, CLASSES, COLORS, PATTERNS, STYLES, Identity

NONE = "none"
# read for each object, left to right; a single object is the first
OBJECT_HEADS: dict[str, tuple[str, ...]] = {
    "class_noun": (*CLASSES, NONE),
    "color": tuple(COLORS),
    "second": tuple(COLORS),
    "third": (*COLORS, NONE),
    "pattern": PATTERNS,
    "accessory": ACCESSORIES,
}
SCENE_HEADS: dict[str, tuple[str, ...]] = {"context": CONTEXTS, "style": STYLES}
OBJECTS = 2


@dataclass(frozen=True)
class Verdict:
    """What one picture shows, according to the judge."""

    objects: tuple[Identity, ...]  # none, one or two; left to right
    context: str
    style: str
    feature: np.ndarray  # (FEATURES,) float32, unit length: for cosine similarity of contents


class JudgeNet(nn.Module):
    FEATURES = 192

    def __init__(self) -> None:
        super().__init__()

        def block(inputs: int, outputs: int, stride: int) -> nn.Module:
            conv = nn.Conv2d(inputs, outputs, 3, stride, 1)
            return nn.Sequential(conv, nn.GroupNorm(8, outputs), nn.SiLU())

        self.body = nn.Sequential(
            block(3, 32, 2),
            block(32, 32, 1),
            block(32, 64, 2),
            block(64, 96, 1),
            block(96, 112, 2),
            block(112, 112, 1),
            block(112, 48, 2),
        )
        self.feature = nn.Linear(48 * 16, self.FEATURES)
        self.sizes = [len(v) for _ in range(OBJECTS) for v in OBJECT_HEADS.values()] + [len(v) for v in SCENE_HEADS.values()]
        self.heads = nn.Linear(self.FEATURES, sum(self.sizes))

    def forward(self, pixels: Tensor) -> tuple[tuple[Tensor, ...], Tensor]:
        """(N, 3, 64, 64) in -1..1 -> logits of every head (objects first, then the scene), and features (N, FEATURES)."""
        feature = F.silu(self.feature(self.body(pixels).flatten(1)))
        return self.heads(feature).split(self.sizes, dim=1), feature


def to_pixels(images: Sequence[Image.Image]) -> Tensor:
    """Pictures of any size -> (N, 3, 64, 64) in -1..1, of their central square."""
    small = [ImageOps.fit(image.convert("RGB"), (64, 64), Image.Resampling.BOX) for image in images]
    return torch.from_numpy(np.stack([np.asarray(image) for image in small])).permute(0, 3, 1, 2).float() / 127.5 - 1


@cache
def load_judge() -> JudgeNet:
    net = JudgeNet()
    weights = load_file(Path(__file__).parent / "model" / "judge" / "judge.safetensors")
    net.load_state_dict({k: v.float() for k, v in weights.items()})
    return net.eval()


@torch.no_grad()
def judge(images: Sequence[Image.Image], net: JudgeNet | None = None) -> list[Verdict]:
    """Read every picture (any size; judged at 64 x 64)."""
    if not images:
        return []
    logits, features = (net or load_judge())(to_pixels(images))
    choices = torch.stack([head.argmax(1) for head in logits], dim=1).tolist()
    return [read(row, feature) for row, feature in zip(choices, F.normalize(features, dim=1).numpy(), strict=True)]


def read(choices: Sequence[int], feature: np.ndarray) -> Verdict:
    objects = []
    for slot in range(OBJECTS):
        row = choices[slot * len(OBJECT_HEADS) : (slot + 1) * len(OBJECT_HEADS)]
        values = {name: options[i] for (name, options), i in zip(OBJECT_HEADS.items(), row, strict=True)}
        if values["accessory"] == NONE:
            values["third"] = NONE
        if values["class_noun"] != NONE:
            objects.append(Identity(**values))
    context, style = choices[-2:]
    return Verdict(tuple(objects), CONTEXTS[context], STYLES[style], feature)
