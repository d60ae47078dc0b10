"""Picture: one generated picture, what made it, and how it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..base.ai_mark import AI_MARK, save_marked
from .making import Making

__all__ = ["AI_MARK", "Picture"]


@dataclass(frozen=True)
class Picture:
    """One picture and what made it."""

    image: Image.Image
    prompt: str
    seed: int
    adapters: tuple[tuple[str, float], ...] = ()  # name, weight
    base: str = ""
    negative_prompt: str | None = None
    steps: int = 0
    guidance: float = 0.0
    making: Making | None = None  # None: not known

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.image._repr_png_()

    def save(self, path: str | Path) -> Path:
        """PNG or, by its ending, JPEG or WebP; marked as made by a model (IPTC), without anything else."""
        return save_marked(self.image, Path(path))
