"""Photo, Mask and Skipped: plain values, without pixels."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path

from PIL import Image

from ..errors import shown

CropRegion = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions 0..1 of the upright photo
Point = tuple[float, float]  # x, y, likewise


@dataclass(frozen=True)
class Mask:
    """Where the subject is in a photo: white on the subject, black elsewhere, grey in between."""

    source: Path | Image.Image = field(compare=False)  # a file, or a picture passed in code
    sha256: str  # of the file's bytes or the picture's values


@dataclass(frozen=True)
class Photo:
    """A photo that has been decoded completely once."""

    path: Path
    width: int  # pixels, after EXIF orientation
    height: int
    caption: str | None  # from photo.txt beside photo.jpg
    crop: CropRegion | None  # the part in use: the user's choice, or all but black bars; None: all of it
    sha256: str  # of the file's bytes
    note: str | None = None  # what the user should know, e.g. "animated: first frame only"
    focus: Point | None = None  # what the crop is centred on, as far as the edges allow; None: the middle
    mask: Mask | None = None  # from photo.mask.png beside photo.jpg, or passed in code

    @property
    def name(self) -> str:
        """The file name, safe to print."""
        return shown(self.path.name)


class Unusable(Exception):
    """A file cannot be used; the message is the reason."""


@dataclass(frozen=True)
class Skipped:
    """A file that was skipped, and why."""

    path: Path
    reason: str

    @property
    def name(self) -> str:
        """The file name, safe to print."""
        return shown(self.path.name)


@dataclass(frozen=True)
class PhotoSet:
    """The photos of a folder. Every file is in one of the two tuples, except captions, masks and crops.json."""

    photos: tuple[Photo, ...]
    skipped: tuple[Skipped, ...]
