"""What a photo is, and where a region of it lies."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..errors import shown

Region = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions 0..1 of the oriented photo
Point = tuple[float, float]  # x, y, likewise


@dataclass(frozen=True)
class Mask:
    """Where the subject is in a photo: white the subject, black the rest, grey in between."""

    source: Path | Image.Image = field(compare=False)  # a file, or a picture given in code
    sha256: str  # of the file's bytes or the picture's values


@dataclass(frozen=True)
class Photo:
    """A photo that was decoded once from end to end."""

    path: Path
    width: int  # pixels, after EXIF orientation
    height: int
    caption: str | None  # from photo.txt beside photo.jpg
    crop: Region | None  # what of it is used: chosen by the user, or all but black bars; None: all
    sha256: str  # of the file's bytes
    note: str | None = None  # what the user should know, as "animated: first frame only"
    focus: Point | None = None  # the training square's centre, as near to it as the square can be; None: the middle
    mask: Mask | None = None  # from photo.mask.png beside photo.jpg, or given in code

    @property
    def name(self) -> str:
        """The file name, safe to show."""
        return shown(self.path.name)


class Unusable(Exception):
    """One file cannot be used; the message is the reason."""


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
    """What a folder holds: every file is in one of the two lists (captions, masks, crops.json belong to their photos)."""

    photos: tuple[Photo, ...]
    skipped: tuple[Skipped, ...]


def box(width: int, height: int, crop: Region | None) -> tuple[int, int, int, int]:
    """The crop's x0, y0, x1, y1 in pixels, at least one pixel wide and high; the whole picture without a crop."""
    if crop is None:
        return (0, 0, width, height)
    x0, y0 = min(round(crop[0] * width), width - 1), min(round(crop[1] * height), height - 1)
    return (x0, y0, max(round(crop[2] * width), x0 + 1), max(round(crop[3] * height), y0 + 1))


def square_box(width: int, height: int, crop: Region | None, focus: Point | None) -> tuple[int, int, int]:
    """left, top and side in pixels of the largest square of the picture (or of its crop) with its centre near `focus`."""
    x0, y0, x1, y1 = box(width, height, crop)
    side = min(x1 - x0, y1 - y0)
    if focus is None:
        return x0 + (x1 - x0 - side) // 2, y0 + (y1 - y0 - side) // 2, side
    left, top = round(focus[0] * width - side / 2), round(focus[1] * height - side / 2)
    return min(max(left, x0), x1 - side), min(max(top, y0), y1 - side), side
