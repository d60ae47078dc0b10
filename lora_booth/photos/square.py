"""The training square: what training sees of one photo, and what the contact sheet of an audit shows."""

from __future__ import annotations

from dataclasses import dataclass

from PIL import Image

from .masks import square_mask
from .opening import open_photo
from .photo import Photo, square_box
from .pixels import AREA_FIRST, Crop, crop_and_resize, crop_of


@dataclass(frozen=True)
class Square:
    """One photo, cropped and resized."""

    image: Image.Image  # RGB, resolution x resolution
    crop: Crop  # where in the photo it lies
    mask: Image.Image | None  # greys, as large; white is the subject


def training_square(photo: Photo, resolution: int) -> Square:
    """Open a photo, crop it to its square and resize it to `resolution` pixels; likewise its mask. Raises PhotoError."""
    _, _, side = square_box(photo.width, photo.height, photo.crop, photo.focus)
    smaller = max(1, int(side / (AREA_FIRST * resolution)))  # averaged while it is opened, in less memory
    image, _ = crop_and_resize(open_photo(photo, smaller=smaller), resolution, photo.crop, focus=photo.focus)
    crop = crop_of(photo.width, photo.height, resolution, photo.crop, photo.focus)
    return Square(image, crop, square_mask(photo, resolution))
