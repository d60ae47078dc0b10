"""Picture: one generated picture, how it was made, and how it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..base.ai_mark import save_picture
from ..config import typed

AUTO_START = 0.3  # share of the steps, before automatic regions start, whose attention is read; chosen on the toybox
FEATHER = 0.04  # softness of a region's edge, as a share of the picture's side; chosen


@dataclass(frozen=True)
class Place:
    """A region without its adapter."""

    box: tuple[float, float, float, float] | None  # None: a mask
    prompt: str | None = None
    feather: float = FEATHER


@dataclass(frozen=True)
class Making:
    """What it takes to draw a picture again, beyond the fields of Picture."""

    files: tuple[str, ...] = ()  # of the picture's adapters, in their order; without folders, which may contain people's names
    method: str = "sum"
    auto: bool = False  # automatic regions
    places: tuple[Place, ...] = ()  # of the last adapters
    isolate: str = "noise"
    start: float = 0.0
    background: str | None = None
    recipe_only: str | None = None  # what only a recipe can express, e.g. "a mask"


def default_start(*, auto: bool) -> float:
    return AUTO_START if auto else 0.0


@dataclass(frozen=True)
class Picture:
    """One picture and how it was made."""

    image: Image.Image
    prompt: str
    seed: int
    adapters: tuple[tuple[str, float], ...] = ()  # name, weight
    base: str = ""
    negative_prompt: str | None = None
    steps: int = 0  # denoising steps
    guidance: float = 0.0
    making: Making | None = None  # None: unknown

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.image._repr_png_()

    def save(self, path: str | Path) -> Path:
        """Save as PNG, JPEG or WebP by the path's ending, with an IPTC mark that a model made it and no other metadata."""
        return save_picture(self.image, typed("path", path, Path))
