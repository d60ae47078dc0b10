"""Which square of a photo is trained on: the one that keeps the subject, without black bars."""

from __future__ import annotations

from typing import Literal, get_args

import numpy as np
from PIL import Image

from ..errors import PhotoError, shown
from .faces import check_faces
from .photo import Point, Region, box
from .saliency import LONG_SIDE, Values, saliency, small_copy

Cropping = Literal["smart", "face", "center"]

AROUND_FACE = 0.3  # of a face's side: what is kept around it, as hair and chin
CENTRE_PREFERENCE = 0.05  # how much of all saliency a square at the edge must win to be taken for the middle one
BAR_LEVEL = 16  # of 255; darker than this is black, with the noise of a JPEG
BAR_COPY = 512  # pixels; the long side of the copy that bars are looked for in
LEAST_BAR = 0.02  # of the side
EDGE_SHARE = 0.75  # of the first line after a bar that is not black


def check_cropping(crop: str) -> None:
    if crop not in get_args(Cropping):
        raise PhotoError(f"crop {shown(crop)!r} is unknown; allowed: {', '.join(get_args(Cropping))}")
    if crop == "face":
        check_faces()


def focus_of(image: Image.Image, crop: Region | None, mask: Image.Image | None, face: Region | None = None) -> Point | None:
    """The centre of the square that keeps most of the subject: of its mask, else of what is salient.

    The square slides along the long side; near ties go to the middle. None: the photo (or its crop) is a square already,
    or there is nothing to see.

    image  the upright photo
    mask   greys in the photo's shape, of any size
    face   fractions 0..1 of the photo; the square keeps it whole, with something around it, before all else
    """
    x0, y0, x1, y1 = box(image.width, image.height, crop)
    if x1 - x0 == y1 - y0:
        return None
    if mask is not None:
        found = np.asarray(small_copy(mask, LONG_SIDE, box(mask.width, mask.height, crop)), dtype=np.float32)
    else:
        found = saliency(image, (x0, y0, x1, y1))
    place = _best_place(found, _along(face, (x0, y0, x1, y1), image.size))
    if place is None:
        return None
    side = min(x1 - x0, y1 - y0)
    if x1 - x0 > side:
        return ((x0 + place * (x1 - x0 - side) + side / 2) / image.width, (y0 + y1) / 2 / image.height)
    return ((x0 + x1) / 2 / image.width, (y0 + place * (y1 - y0 - side) + side / 2) / image.height)


def _along(face: Region | None, part: tuple[int, int, int, int], size: tuple[int, int]) -> tuple[float, float] | None:
    """Where along the long side of a picture's part (pixels) a face lies, with something around it: from, to, 0..1."""
    if face is None:
        return None
    axis = 0 if part[2] - part[0] >= part[3] - part[1] else 1
    low, high = face[axis] * size[axis], face[axis + 2] * size[axis]
    around = AROUND_FACE * (high - low)
    start, length = part[axis], part[axis + 2] - part[axis]
    return max(0.0, (low - around - start) / length), min(1.0, (high + around - start) / length)


def _best_place(found: Values, keep: tuple[float, float] | None = None) -> float | None:
    """Where along the long side, 0..1, the square holds most; None: everywhere alike.

    keep  from, to along the long side, 0..1: what it must hold, or as much as goes in
    """
    height, width = found.shape
    side = min(height, width)
    along = found.sum(axis=0 if width >= height else 1)
    total = float(along.sum())
    if len(along) == side or (total <= 0 and keep is None):
        return None
    sums = np.concatenate([[0.0], np.cumsum(along)])
    held = (sums[side:] - sums[:-side]) / max(total, 1e-6)
    places = np.arange(len(held))
    middle = (len(held) - 1) / 2
    held = held - CENTRE_PREFERENCE * np.abs(places - middle) / middle
    if keep is not None:
        low, high = (place * len(along) for place in keep)
        held -= 2 * (np.maximum(places - low, 0) + np.maximum(high - places - side, 0))  # more than all that is salient
    return float(np.argmax(held)) / (len(held) - 1)


def without_black_bars(image: Image.Image) -> Region | None:
    """What lies between two black bars of about equal width, left and right or above and below; None: there are none.

    A dark scene has no straight bright edge, and an object before black has no two bars of one width.
    """
    light = np.asarray(small_copy(image, BAR_COPY).convert("L"))
    for axis in (0, 1):
        lines = light if axis == 0 else light.T  # (lines, places along a line)
        count = len(lines)
        black = np.percentile(lines, 99, axis=1) <= BAR_LEVEL
        if black.all() or not (black[0] and black[-1]):
            continue
        first, last = int(np.argmin(black)), count - int(np.argmin(black[::-1]))
        before, after = first, count - last
        if min(before, after) < LEAST_BAR * count or abs(before - after) > max(3, 0.15 * max(before, after)):
            continue
        edges = lines[[min(first + 2, count - 1), max(last - 3, 0)]]
        if (edges > BAR_LEVEL).mean(axis=1).min() < EDGE_SHARE:
            continue
        low, high = (first + 1) / count, (last - 1) / count  # the line at the edge is mixed with the bar
        return (0.0, low, 1.0, high) if axis == 0 else (low, 0.0, high, 1.0)
    return None
