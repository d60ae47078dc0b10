"""What a photo is, and where a region of it lies."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from ..errors import shown

Region = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions 0..1 of the oriented photo


@dataclass(frozen=True)
class Photo:
    """A photo that was decoded once from end to end."""

    path: Path
    width: int  # pixels, after EXIF orientation
    height: int
    caption: str | None  # from photo.txt beside photo.jpg
    crop: Region | None  # chosen by the user
    sha256: str  # of the file's bytes
    note: str | None = None  # what the user should know, as "animated: first frame only"

    @property
    def name(self) -> str:
        """The file name, safe to show."""
        return shown(self.path.name)


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why."""

    path: Path
    reason: str

    @property
    def name(self) -> str:
        """The file name, safe to show."""
        return shown(self.path.name)


@dataclass(frozen=True)
class PhotoSet:
    """What a folder holds: every file is in one of the two lists (captions and crops.json belong to their photos)."""

    photos: tuple[Photo, ...]
    skipped: tuple[Skipped, ...]


def box(width: int, height: int, crop: Region | None) -> tuple[int, int, int, int]:
    """The crop's x0, y0, x1, y1 in pixels, at least one pixel wide and high; the whole picture without a crop."""
    if crop is None:
        return (0, 0, width, height)
    x0, y0 = min(round(crop[0] * width), width - 1), min(round(crop[1] * height), height - 1)
    return (x0, y0, max(round(crop[2] * width), x0 + 1), max(round(crop[3] * height), y0 + 1))
