"""Masks: where the subject is in a photo. By the user, by the photo's own transparency, or by a segmenter."""

from __future__ import annotations

from collections.abc import Callable
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from ..errors import MissingExtraError, PhotoError, reason_of, shown
from .cropping import box
from .opening import read_mask
from .photo import CropRegion, Mask

MaskSource = Path | str | Image.Image
Segmenter = Callable[[Image.Image], Image.Image | None]  # RGB -> greys of its shape, white on the subject; None: unsure

WHITE = 128  # of 255; chosen; a mask without a pixel this bright is refused
SHAPE_TOLERANCE = 0.01  # of a side, at least a pixel, for masks of another size than their photo; chosen
LEAST_SHARE, MOST_SHARE = 0.005, 0.95  # white part of a mask that nobody looked at; one of less or more is useless; chosen
MOST_GREY = 0.5  # pixels between a quarter and three quarters for each brighter one, where a segmenter is sure; chosen
# rembg's own default (bria-rmbg) is 1 GB and not free for commercial use; U2-Net is 176 MB under Apache 2.0.
REMBG_MODEL = "u2net"


def given_mask(source: MaskSource, photo: Path, width: int, height: int, crop: CropRegion | None) -> tuple[Mask, Image.Image]:
    """The user's mask of `photo`, checked, and its greys (L).

    width, height  of the upright photo, in pixels
    Raises PhotoError for a mask without white, or of another shape than the photo.
    """
    source = Path(source) if isinstance(source, str) else source
    if not isinstance(source, (Path, Image.Image)):
        raise PhotoError(f"mask of {shown(photo.name)}: a value of type {type(source).__name__}; pass a file or a PIL image")
    name = shown(source.name) if isinstance(source, Path) else f"of {shown(photo.name)}"
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


def useless(greys: Image.Image) -> str | None:
    """Why greys that nobody looked at are no mask; None: they may be one."""
    share = float((np.asarray(greys) >= WHITE).mean())
    return None if LEAST_SHARE <= share <= MOST_SHARE else f"took {share:.1%} of the photo for the subject"


def own_mask(opacity: Image.Image | None, crop: CropRegion | None) -> tuple[Mask, Image.Image] | None:
    """The mask of a photo whose background is transparent. opacity: greys (L) of the upright photo"""
    if opacity is None or useless(opacity.crop(box(opacity.width, opacity.height, crop))) is not None:
        return None
    greys, digest = read_mask(opacity, "of the photo itself")
    return Mask(greys, digest), greys


def segmented(image: Image.Image, crop: CropRegion | None, segmenter: Segmenter, name: str) -> Image.Image | str:
    """Greys (L) of the upright picture, black outside its crop, by a segmenter; or why it gives none.

    Raises PhotoError for anything but greys in the shape of the part that it saw.
    """
    inside = box(image.width, image.height, crop)
    part = image.crop(inside)
    found = segmenter(part)
    if found is None:
        return "the segmenter found no clear subject"
    if not isinstance(found, Image.Image):
        raise PhotoError(f"mask of {name}: the segmenter returned {type(found).__name__}; needed: a PIL image or None")
    greys, _ = read_mask(found, f"of {name}")
    check_shape(greys, f"of {name}", *part.size, "the segmenter's input")
    if reason := useless(greys):
        return f"the segmenter {reason}"
    mask = Image.new("L", image.size)
    mask.paste(greys.resize(part.size, Image.Resampling.BILINEAR), inside[:2])
    return mask


def sure_mask(image: Image.Image, crop: CropRegion | None, segmenter: Segmenter, name: str) -> tuple[Mask, Image.Image] | str:
    """What `segmented` finds, if there is little grey in it: nobody looks at it before the training."""
    greys = segmented(image, crop, segmenter, name)
    if isinstance(greys, str):
        return greys
    levels = np.asarray(greys)
    if ((levels >= 64) & (levels < 192)).sum() > MOST_GREY * (levels >= 192).sum():
        return "the segmenter is unsure of the subject"
    greys, digest = read_mask(greys, f"of {name}")
    return Mask(greys, digest), greys


def rembg_segmenter() -> Segmenter:
    """U2-Net through rembg (Qin et al., "U2-Net", Pattern Recognition 2020), loaded for the first picture, if there is one."""
    loaded = cache(_load_rembg)
    return lambda image: loaded()(image)


def _load_rembg() -> Segmenter:
    """Raises MissingExtraError, PhotoError."""
    try:
        import onnxruntime  # noqa: F401  # without it, importing rembg ends the program
        import rembg
    except ImportError:
        raise MissingExtraError("making masks", "masks") from None
    try:
        session = rembg.new_session(REMBG_MODEL)
    except Exception as error:  # of requests, pooch or onnxruntime
        raise PhotoError(
            f"rembg's model {REMBG_MODEL} cannot be downloaded or loaded ({reason_of(error)[:120]}); "
            "connect to the internet for the first use, or pass a segmenter of your own"
        ) from None
    return lambda image: rembg.remove(image, session=session, only_mask=True)
