"""Masks of subjects: `rex.mask.png` beside `rex.jpg`, or given in code. White is the subject, black the rest."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Mapping
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import PhotoError, shown
from .opening import opened
from .photo import Mask, Photo, Region, Unusable, box, square_box
from .to_srgb import grey_copy

MASK_ENDING = ".mask.png"
WHITE = 128  # of 255; a mask that has nothing as bright is no mask
SHAPE_TOLERANCE = 0.01  # of a side, for masks of another size than their photo; at least a pixel

MaskSource = Path | str | Image.Image


def is_mask_name(path: Path) -> bool:
    return path.name.lower().endswith(MASK_ENDING)


def mask_path(path: Path) -> Path:
    """Where the mask of a photo lies, if it has one."""
    return path.with_name(path.stem + MASK_ENDING)


def mask_beside(path: Path) -> Path | None:
    """The mask file of a photo; None without one."""
    beside = mask_path(path)
    if not os.path.isfile(beside):  # Path.is_file raises where the name is too long for the file system
        return None
    if beside.is_symlink() and path.parent.resolve() not in beside.resolve().parents:
        return None  # a link that leaves the folder; listed as skipped
    return beside


def find_mask(path: Path, given: Mapping[str, MaskSource], width: int, height: int, crop: Region | None) -> Mask | None:
    """The mask of the photo `path`, checked; `given` (file name -> mask) comes before the one beside the photo.

    width, height  of the upright photo
    Raises PhotoError for a mask that cannot be right.
    """
    source = given.get(path.name) or mask_beside(path)
    if source is None:
        return None
    if isinstance(source, str):
        source = Path(source)
    if not isinstance(source, (Path, Image.Image)):
        raise PhotoError(f"mask of {shown(path.name)}: a {type(source).__name__}; give a file or a PIL image")
    name = shown(source.name) if isinstance(source, Path) else f"of {shown(path.name)}"
    greys, digest = read_mask(source, name)
    check_shape(greys, name, width, height, "the upright photo")
    part = greys.crop(box(greys.width, greys.height, crop))
    if not (np.asarray(part) >= WHITE).any():
        where = "no white" if crop is None else "no white inside the photo's crop"
        raise PhotoError(f"mask {name}: {where}; white (255) is the subject, black the rest")
    return Mask(source, digest)


def mask_greys(mask: Mask, name: str) -> Image.Image:
    """The mask as greys (L), of its own size. Raises PhotoError if it is gone or changed since it was found."""
    greys, digest = read_mask(mask.source, name)
    if digest != mask.sha256:
        raise PhotoError(f"mask {name}: it changed since it was checked; start again")
    return greys


def square_mask(photo: Photo, resolution: int) -> Image.Image | None:
    """The mask of the photo's training square, greys (L), resolution x resolution pixels; None without a mask."""
    if photo.mask is None:
        return None
    greys = mask_greys(photo.mask, photo.name)
    left, top, side = square_box(photo.width, photo.height, photo.crop, photo.focus)
    across, down = greys.width / photo.width, greys.height / photo.height
    region = (left * across, top * down, (left + side) * across, (top + side) * down)
    # no Lanczos: it overshoots at a mask's hard edge
    method = Image.Resampling.BOX if region[2] - region[0] >= resolution else Image.Resampling.BILINEAR
    return greys.resize((resolution, resolution), method, box=region)


def check_shape(greys: Image.Image, name: str, width: int, height: int, of: str) -> None:
    """Raises PhotoError if a mask has not the shape of a picture of this size (pixels)."""
    fits = greys.width * height / width
    if abs(greys.height - fits) > max(1, SHAPE_TOLERANCE * fits):
        raise PhotoError(f"mask {name}: {greys.width}x{greys.height} px for {width}x{height}; it must have the shape of {of}")


def read_mask(source: Path | Image.Image, name: str) -> tuple[Image.Image, str]:
    """A mask as greys (L), and its digest. Raises PhotoError."""
    try:
        if isinstance(source, Path):
            with opened(source) as (image, _, digest):
                return grey_copy(image), digest
        greys = grey_copy(source)
    except Unusable as error:
        raise PhotoError(f"mask {name}: {error}") from None
    return greys, hashlib.sha256(repr(greys.size).encode() + np.asarray(greys).tobytes()).hexdigest()
