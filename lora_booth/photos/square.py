"""The training square: the pixels of a photo that training uses, resized, and as a tensor in -1..1."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from .opening import open_mask, open_photo
from .photo import Photo, Point, Region

if TYPE_CHECKING:
    from torch import Tensor

AREA_FIRST = 2.0  # large squares are averaged over whole pixels down to this many times the resolution; chosen


@dataclass(frozen=True)
class Crop:
    """Where a training square comes from, as SDXL's micro-conditioning expects it. All in pixels."""

    top: int  # of the square, in the picture resized so that its short side is the training resolution
    left: int
    original_size: tuple[int, int]  # height, width of the picture (or of the user's crop) before resizing


@dataclass(frozen=True)
class Square:
    """One photo, cropped and resized."""

    image: Image.Image  # RGB, resolution x resolution
    crop: Crop
    mask: Image.Image | None = None  # greys, as large; white is the subject
    kept: float | None = None  # share of the mask that is inside the square; None without a mask


def training_square(photo: Photo, resolution: int) -> Square:
    """Open a photo, crop it to its square and resize it to `resolution` pixels; likewise its mask. Raises PhotoError."""
    left, top, side = square_box(photo.width, photo.height, photo.crop, photo.focus)
    smaller = max(1, int(side / (AREA_FIRST * resolution)))  # averaged while it is opened, to save memory
    image = crop_and_resize(open_photo(photo, smaller=smaller), resolution, photo.crop, focus=photo.focus)
    crop = crop_of(photo.width, photo.height, resolution, photo.crop, photo.focus)
    if photo.mask is None:
        return Square(image, crop)
    greys = open_mask(photo.mask, photo.name)
    across, down = greys.width / photo.width, greys.height / photo.height
    region = (left * across, top * down, (left + side) * across, (top + side) * down)
    # not Lanczos: it overshoots at a mask's hard edge
    method = Image.Resampling.BOX if region[2] - region[0] >= resolution else Image.Resampling.BILINEAR
    mask = greys.resize((resolution, resolution), method, box=region)
    inside = np.asarray(greys.crop(region)).sum()
    return Square(image, crop, mask, float(inside / max(1, np.asarray(greys).sum())))


def crop_and_resize(
    image: Image.Image, resolution: int, crop: Region | None = None, *, focus: Point | None = None
) -> Image.Image:
    """The square in the middle of a picture (or of its `crop`), or the one centred on `focus`, resolution x resolution pixels.

    Large squares are first averaged over whole pixels (area) and then resampled with Lanczos, so that fine patterns fade
    instead of turning into false ones; small ones are enlarged with Lanczos; one of the right size is unchanged.
    """
    left, top, side = square_box(image.width, image.height, crop, focus)
    # Crop first: resampling inside a larger picture would let pixels from outside the square bleed in at its edge.
    square = image.crop((left, top, left + side, top + side))
    if side == resolution:
        return square
    return square.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=AREA_FIRST)


def crop_of(width: int, height: int, resolution: int, crop: Region | None, focus: Point | None) -> Crop:
    """The micro-conditioning of SDXL for the square of a picture of this width and height (pixels).

    As in diffusers' SDXL DreamBooth script with a centre crop: a 1000 x 800 (w x h) photo at 512 is 640 x 512 when
    resized, so its square begins at (0, 64). A `crop` counts as the picture, since nothing outside it is used.
    """
    x0, y0, x1, y1 = box(width, height, crop)
    left, top, side = square_box(width, height, crop, focus)
    if focus is not None:
        corner = round((top - y0) * resolution / side), round((left - x0) * resolution / side)
    else:
        resized_width = resolution * (x1 - x0) // side
        resized_height = resolution * (y1 - y0) // side
        corner = round((resized_height - resolution) / 2), round((resized_width - resolution) / 2)
    return Crop(top=corner[0], left=corner[1], original_size=(y1 - y0, x1 - x0))


def box(width: int, height: int, crop: Region | None) -> tuple[int, int, int, int]:
    """The crop's x0, y0, x1, y1 in pixels, at least one pixel wide and high; all of the picture without a crop."""
    if crop is None:
        return (0, 0, width, height)
    x0, y0 = min(round(crop[0] * width), width - 1), min(round(crop[1] * height), height - 1)
    return (x0, y0, max(round(crop[2] * width), x0 + 1), max(round(crop[3] * height), y0 + 1))


def square_box(width: int, height: int, crop: Region | None, focus: Point | None) -> tuple[int, int, int]:
    """left, top and side in pixels of the largest square of the picture (or of its crop), centred on `focus` if possible."""
    x0, y0, x1, y1 = box(width, height, crop)
    side = min(x1 - x0, y1 - y0)
    if focus is None:
        return x0 + (x1 - x0 - side) // 2, y0 + (y1 - y0 - side) // 2, side
    left, top = round(focus[0] * width - side / 2), round(focus[1] * height - side / 2)
    return min(max(left, x0), x1 - side), min(max(top, y0), y1 - side), side


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture (W x H) -> (1, 3, H, W) float32 in -1..1, on the CPU."""
    import torch

    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1)[None].contiguous().float() / 127.5 - 1.0
