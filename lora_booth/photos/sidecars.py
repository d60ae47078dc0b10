"""What lies beside the photos: captions (photo.txt) and crops (crops.json). Masks are in masks.py."""

from __future__ import annotations

import json
import math
import os
from pathlib import Path
from typing import Any

from ..errors import PhotoError, shown
from .photo import Region

MAX_TEXT_BYTES = 2**20  # of crops.json
MAX_CAPTION = 2000  # characters; the text encoder reads about the first 300
CROPS_FILE = "crops.json"


def caption_of(path: Path) -> str | None:
    """The text of photo.txt beside photo.jpg, in one line; None without one or when it is empty."""
    beside = path.with_suffix(".txt")
    if not os.path.isfile(beside):  # Path.is_file raises where the name is too long for the file system
        return None
    if beside.is_symlink() and path.parent.resolve() not in beside.resolve().parents:
        return None  # a link that leaves the folder; listed as skipped
    name = shown(beside.name)
    try:
        with beside.open("rb") as file:
            text = file.read(MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PhotoError(f"caption {name}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise PhotoError(f"caption {name}: cannot be read ({type(error).__name__})") from None
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) > MAX_CAPTION:
        raise PhotoError(f"caption {name}: {len(text)} characters; at most {MAX_CAPTION}, the first 300 matter")
    return text or None


def read_crops(path: Path) -> dict[str, Region]:
    """crops.json: {"name.jpg": [x0, y0, x1, y1]}; the numbers are checked when the photo's size is known."""
    form = 'needed: {"name.jpg": [x0, y0, x1, y1]}'
    if not path.is_file() or path.stat().st_size > MAX_TEXT_BYTES:
        raise PhotoError(f"{shown(path)}: not a file of at most {MAX_TEXT_BYTES // 2**20} MB; {form}")
    try:
        crops = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise PhotoError(f"{shown(path)}: not JSON ({shown(error)[:80]}); {form}") from None
    if not isinstance(crops, dict):
        raise PhotoError(f"{shown(path)}: {form}")
    return crops


def fractions(path: Path, region: Any, width: int, height: int) -> Region:
    """A user's crop as fractions 0..1 of the upright photo. Pixels if any value is above 1. Raises PhotoError."""
    cause = f"crop of {shown(path.name)}: {shown(region)[:80]}"
    remedy = f"needed: x0, y0, x1, y1 with x0 < x1 and y0 < y1, as fractions 0..1 or as pixels of {width}x{height}"
    if not isinstance(region, (list, tuple)) or len(region) != 4:
        raise PhotoError(f"{cause} is not four numbers; {remedy}")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in region):
        raise PhotoError(f"{cause} is not four numbers; {remedy}")
    x0, y0, x1, y1 = region
    if max(region) > 1:
        x0, y0, x1, y1 = x0 / width, y0 / height, x1 / width, y1 / height
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise PhotoError(f"{cause} is outside the photo or empty; {remedy}")
    return (float(x0), float(y0), float(x1), float(y1))
