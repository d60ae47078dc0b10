"""Training squares and tensors. The only home of the pixel range (-1..1)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

import numpy as np
from PIL import Image

from ..errors import PhotoError
from .photo import Point, Region, box, square_box

if TYPE_CHECKING:
    from torch import Tensor

AREA_FIRST = 2.0  # times the resolution: how far a large square is averaged before it is resampled


@dataclass(frozen=True)
class Crop:
    """Where a training square comes from, in the words of SDXL's micro-conditioning. All in pixels."""

    top: int  # of the square, in the picture resized so that its short side is the training resolution
    left: int
    original_size: tuple[int, int]  # height, width of the picture (or of the user's crop) before resizing


def crop_and_resize(
    image: Image.Image, resolution: int, crop: Region | None = None, *, focus: Point | None = None
) -> tuple[Image.Image, Crop]:
    """A square of the picture (or of its `crop`, fractions 0..1), resolution x resolution pixels.

    It is the one in the middle, or the one whose centre is nearest to `focus` (x, y as fractions of the picture).

    A large photo is first averaged over whole pixels (area) and then resampled with Lanczos, so that fine patterns
    fade instead of turning into false ones; a small one is enlarged with Lanczos; one of the right size is unchanged.

    SDXL is told how a training picture was cut, as diffusers' SDXL DreamBooth script tells it with a centre crop:
    `original_size` is (height, width) before resizing; (`top`, `left`) is the square's corner in the picture resized
    so that its short side is `resolution`. So a 1000 x 800 (w x h) photo at 512 is 640 x 512 when resized, and its
    square begins at (0, 64). With a crop, the crop is the picture: what lies outside was never shown.
    """
    left, top, side = square_box(image.width, image.height, crop, focus)
    # Cut first: resampling inside a larger picture would let pixels from outside the square bleed in at its edge.
    square = image.crop((left, top, left + side, top + side))
    if side != resolution:
        square = square.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=AREA_FIRST)
    return square, crop_of(image.width, image.height, resolution, crop, focus)


def crop_of(width: int, height: int, resolution: int, crop: Region | None, focus: Point | None) -> Crop:
    """What `crop_and_resize` says of a picture of this width and height (pixels)."""
    x0, y0, x1, y1 = box(width, height, crop)
    left, top, side = square_box(width, height, crop, focus)
    if focus is not None:
        corner = round((top - y0) * resolution / side), round((left - x0) * resolution / side)
    else:
        resized_width = resolution * (x1 - x0) // side
        resized_height = resolution * (y1 - y0) // side
        corner = round((resized_height - resolution) / 2), round((resized_width - resolution) / 2)
    return Crop(top=corner[0], left=corner[1], original_size=(y1 - y0, x1 - x0))


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size (W x H) -> (N, 3, H, W) float32 in -1..1, on the CPU. Raises PhotoError."""
    import torch

    if not images:
        raise PhotoError("no pictures to make a tensor of; pass at least one")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise PhotoError(f"pictures of different sizes, as {sizes[0]} and {sizes[1]}; crop_and_resize them first")
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (N, H, W, 3) uint8
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) floats in -1..1 (clamped) -> N RGB pictures; the exact inverse of `to_tensor`.

    Raises PhotoError on NaN or infinite values, which would come out black.
    """
    pixels = pixels.detach().float().cpu()
    if not bool(pixels.isfinite().all()):
        raise PhotoError("the picture holds NaN or infinite values; decode it in fp32 or bf16 instead of fp16")
    bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(one) for one in bytes_]
