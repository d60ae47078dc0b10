"""Picture: one generated picture, how it was made, and how it is saved."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..base.ai_mark import save_marked
from .making import Making


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
        return save_marked(self.image, Path(path))
