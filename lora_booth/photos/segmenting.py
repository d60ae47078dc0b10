"""Make masks for photos that have none, with rembg or a segmenter of your own."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..config import typed
from ..errors import PhotoError, shown
from ..files import replacing
from .finding import MANY, MASK_ENDING, find_photos
from .masks import Segmenter, rembg_segmenter, segmented
from .opening import open_photo
from .photo import Photo

MASK_SIDE = 1024  # pixels, at most, of a written mask's long side; chosen


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
    photos = find_photos(folder, minimum=1, maximum=MANY).photos
    stems = Counter(photo.path.stem for photo in photos)
    made = []
    for photo in photos:
        one = _make_mask(photo, segmenter, alone=stems[photo.path.stem] == 1)
        made.append(one)
        if say is not None:
            say(f"{photo.name}: {one.reason}" if one.path is None else f"{photo.name}: wrote {shown(one.path.name)}")
    return made


def _make_mask(photo: Photo, segmenter: Segmenter, *, alone: bool) -> MadeMask:
    path = photo.path.with_name(photo.path.stem + MASK_ENDING)
    if photo.mask is not None or os.path.lexists(path):
        return MadeMask(photo, None, "has a mask already")
    if not alone:
        return MadeMask(photo, None, f"another photo would have the same mask, {shown(path.name)}; rename one")
    image = open_photo(photo)
    greys = segmented(image, photo.crop, segmenter, photo.name)
    if isinstance(greys, str):
        return MadeMask(photo, None, greys)
    scale = min(1.0, MASK_SIDE / max(image.size))
    mask = greys.resize((max(1, round(image.width * scale)), max(1, round(image.height * scale))), Image.Resampling.BILINEAR)
    try:
        with replacing(path) as temporary:
            mask.save(temporary, "PNG")
    except OSError as error:
        why = error.strerror or type(error).__name__
        raise PhotoError(f"{shown(path)}: cannot be written ({why}); make the photos' folder writable") from None
    return MadeMask(photo, path, None)
