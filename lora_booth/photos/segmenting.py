"""Make masks for photos that have none, with rembg or a segmenter of your own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from ..config import typed
from ..errors import MissingExtraError, PhotoError, reason_of, shown
from ..files import replacing
from .cropping import box
from .finding import MASK_ENDING, WHITE, check_shape, find_photos
from .opening import open_photo, read_mask
from .photo import Photo

Segmenter = Callable[[Image.Image], Image.Image | None]  # RGB -> greys of its shape, white on the subject; None: unsure

# rembg's own default (bria-rmbg) is 1 GB and not free for commercial use; U2-Net is 176 MB under Apache 2.0.
REMBG_MODEL = "u2net"
MASK_SIDE = 1024  # pixels, at most, of a written mask's long side; chosen
LEAST_SHARE, MOST_SHARE = 0.005, 0.95  # of the photo; a mask of less or more is useless; chosen


@dataclass(frozen=True)
class MadeMask:
    """The result for one photo."""

    photo: Photo
    path: Path | None  # the mask written; None: none
    reason: str | None  # why none was written


def make_masks(
    folder: Path | str | Sequence[Path | str],
    *,
    segmenter: Segmenter | None = None,
    say: Callable[[str], None] | None = None,
) -> list[MadeMask]:
    """Write `photo.mask.png` beside every usable photo that has none, for the masked loss. Look at them before you train.

    An existing mask is never touched, and a new one is written completely or not at all, without metadata.

    folder     a folder of photos, or files, as for `find_photos`
    segmenter  gets the upright photo (or the part inside its crop) as an RGB picture and returns greys of its shape, white
               on the subject, or None if it is unsure. The default is rembg's U2-Net, which needs `lora-booth[masks]` and
               downloads its model (176 MB) on first use.
    say        gets a line for every photo
    raises     PhotoError: no usable photo, a model that cannot be downloaded, a mask of another shape than its picture, a
               folder that cannot be written to. MissingExtraError: no segmenter, and rembg is not installed.
    """
    segmenter = typed("segmenter", segmenter, Callable | None) or rembg_segmenter()
    photos = find_photos(folder, minimum=1, maximum=1000).photos
    stems = Counter(photo.path.stem for photo in photos)
    made = []
    for photo in photos:
        one = _make_mask(photo, segmenter, alone=stems[photo.path.stem] == 1)
        made.append(one)
        if say is not None:
            say(f"{photo.name}: {one.reason}" if one.path is None else f"{photo.name}: wrote {shown(one.path.name)}")
    return made


def rembg_segmenter() -> Segmenter:
    """U2-Net through rembg (Qin et al., "U2-Net", Pattern Recognition 2020). Raises MissingExtraError, PhotoError."""
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


def _make_mask(photo: Photo, segmenter: Segmenter, *, alone: bool) -> MadeMask:
    path = photo.path.with_name(photo.path.stem + MASK_ENDING)
    if photo.mask is not None or os.path.lexists(path):
        return MadeMask(photo, None, "has a mask already")
    if not alone:
        return MadeMask(photo, None, f"another photo would have the same mask, {shown(path.name)}; rename one")
    image = open_photo(photo)
    shape = image.crop(box(image.width, image.height, photo.crop))
    found = segmenter(shape)
    if found is None:
        return MadeMask(photo, None, "the segmenter found no clear subject")
    name = f"of {photo.name}"
    greys, _ = read_mask(found, name)
    check_shape(greys, name, *shape.size, "the segmenter's input")
    share = float((np.asarray(greys) >= WHITE).mean())
    if not LEAST_SHARE <= share <= MOST_SHARE:
        return MadeMask(photo, None, f"the segmenter took {share:.1%} of the photo for the subject")
    scale = min(1.0, MASK_SIDE / max(image.size))
    mask = Image.new("L", (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    inside = box(mask.width, mask.height, photo.crop)
    mask.paste(greys.resize((inside[2] - inside[0], inside[3] - inside[1]), Image.Resampling.BILINEAR), inside[:2])
    try:
        with replacing(path) as temporary:
            mask.save(temporary, "PNG")
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise PhotoError(f"{shown(path)}: cannot be written ({why}); make the photos' folder writable") from None
    return MadeMask(photo, path, None)
