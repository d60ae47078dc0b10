"""Sidecars, the files beside a photo: a caption (photo.txt), a mask (photo.mask.png), and crops.json for all of them.

Masks and crops passed in code are checked here as well.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..config import as_type
from ..errors import PhotoError, shown
from ..files import read_json
from .opening import read_mask
from .photo import Mask, Region
from .square import box

MAX_TEXT_BYTES = 2**20  # of a caption or crops.json; chosen
MAX_CAPTION = 2000  # characters; chosen; the text encoder reads about the first 300
CROPS_FILE = "crops.json"
CAPTION_ENDING = ".txt"
CAPTIONS_ELSEWHERE = (".caption", ".captions", ".cap", ".tag", ".tags", ".json", ".jsonl", ".csv", ".tsv")  # of other trainers
MASK_ENDING = ".mask.png"
WHITE = 128  # of 255; chosen; a mask without a pixel this bright is refused
SHAPE_TOLERANCE = 0.01  # of a side, at least a pixel, for masks of another size than their photo; chosen

MaskSource = Path | str | Image.Image


def sidecar(path: Path, ending: str) -> Path | None:
    """The file photo`ending` beside photo.jpg; None if there is none, or only a link out of the folder."""
    for beside in (path.with_name(path.stem + ending), path.with_name(path.stem + ending.upper())):
        if os.path.isfile(beside):  # Path.is_file raises where the name is too long for the file system
            inside = not beside.is_symlink() or path.parent.resolve() in beside.resolve().parents
            return beside if inside else None  # a link is already in the list of skipped files
    return None


def is_sidecar(path: Path) -> bool:
    """A caption or a mask by its name: also photo.mask.jpg, which nothing uses, but which is no photo either."""
    return path.suffix.lower() == CAPTION_ENDING or path.stem.lower().endswith(".mask")


# --- captions -------------------------------------------------------------------------------------------------------


def caption_of(path: Path) -> str | None:
    """The text of photo.txt beside photo.jpg, in one line; None without one or when it is empty."""
    beside = sidecar(path, CAPTION_ENDING)
    if beside is None:
        return None
    name = shown(beside.name)
    try:
        with beside.open("rb") as file:
            text = file.read(MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PhotoError(f"caption {name}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise PhotoError(f"caption {name}: cannot be read ({type(error).__name__}); check its permissions") from None
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) > MAX_CAPTION:
        raise PhotoError(
            f"caption {name}: {len(text)} characters; shorten it to at most {MAX_CAPTION} (only about the first 300 are read)"
        )
    return text or None


# --- crops ----------------------------------------------------------------------------------------------------------


def read_crops(path: Path) -> dict[str, Region]:
    """crops.json: {"name.jpg": [x0, y0, x1, y1]}; the numbers are checked once the photo's size is known."""
    form = 'needed: {"name.jpg": [x0, y0, x1, y1]}'
    try:
        crops = read_json(path, most=MAX_TEXT_BYTES)
    except (OSError, ValueError) as error:
        raise PhotoError(f"{shown(path)}: not JSON ({shown(error)[:80]}); {form}") from None
    if not isinstance(crops, dict):
        raise PhotoError(f"{shown(path)}: {form}")
    return crops


def fractions(path: Path, region: Any, width: int, height: int) -> Region:
    """A user's crop as fractions 0..1 of the upright photo. Pixels if any value is above 1. Raises PhotoError."""
    cause = f"crop of {shown(path.name)}: {shown(region)[:80]}"
    remedy = f"needed: x0, y0, x1, y1 with x0 < x1 and y0 < y1, as fractions 0..1 or as pixels of {width}x{height}"
    numbers = as_type(region, tuple[float, ...])
    if numbers is None or len(numbers) != 4:
        raise PhotoError(f"{cause} is not four numbers; {remedy}")
    x0, y0, x1, y1 = numbers
    if max(numbers) > 1:
        x0, y0, x1, y1 = x0 / width, y0 / height, x1 / width, y1 / height
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise PhotoError(f"{cause} is outside the photo or empty; {remedy}")
    return x0, y0, x1, y1


# --- masks ----------------------------------------------------------------------------------------------------------


def find_mask(
    path: Path, given: MaskSource | None, width: int, height: int, crop: Region | None
) -> tuple[Mask, Image.Image] | None:
    """The mask of the photo `path`, checked, and its greys (L): the `given` one, else the file beside the photo.

    width, height  of the upright photo, in pixels
    Raises PhotoError for a mask without white, or of another shape than the photo.
    """
    source = given or sidecar(path, MASK_ENDING)
    if source is None:
        return None
    source = Path(source) if isinstance(source, str) else source
    if not isinstance(source, (Path, Image.Image)):
        raise PhotoError(f"mask of {shown(path.name)}: a {type(source).__name__}; pass a file or a PIL image")
    name = shown(source.name) if isinstance(source, Path) else f"of {shown(path.name)}"
    greys, digest = read_mask(source, name)
    check_shape(greys, name, width, height, "the upright photo")
    part = greys.crop(box(greys.width, greys.height, crop))
    if not (np.asarray(part) >= WHITE).any():
        where = "no white" if crop is None else "no white inside the photo's crop"
        raise PhotoError(f"mask {name}: {where}; make the subject white (255) and the rest black")
    return Mask(source, digest), greys


def check_shape(greys: Image.Image, name: str, width: int, height: int, of: str) -> None:
    """Raises PhotoError if a mask does not have the shape of a picture of this size (pixels)."""
    fits = greys.width * height / width
    if abs(greys.height - fits) > max(1, SHAPE_TOLERANCE * fits):
        raise PhotoError(f"mask {name}: {greys.width}x{greys.height} px for {width}x{height}; it must have the shape of {of}")
