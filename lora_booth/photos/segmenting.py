"""Masks made for photos that have none: by OpenCV's GrabCut where it is sure, or by a segmenter of the user's."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import PhotoError, shown
from ..files import replacing
from .finding import find_photos
from .masks import WHITE, check_shape, mask_path, read_mask
from .opencv import load_opencv
from .opening import open_photo
from .photo import Photo, box
from .saliency import small_copy

Segmenter = Callable[[Image.Image], Image.Image | None]  # a photo (RGB) -> greys of its shape, white the subject; None: unsure
Shape = npt.NDArray[np.bool_]  # (H, W): where the subject is

MASK_SIDE = 1024  # pixels; the long side of a mask that is written, if its photo is not smaller
LEAST_SHARE, MOST_SHARE = 0.005, 0.95  # of the photo; a mask of less or more says nothing

CUT_SIDE = 256  # pixels; the long side of what GrabCut works on
MARGINS = (0.04, 0.08, 0.12, 0.17)  # of each side: the frames outside which there is background for certain
# How alike the least alike of the four cuts is to what most of them say (intersection over union). Measured by
# benchmarks/photo_audit.py on real photos: 12 of 31 are above, all of them right to the eye; wrong ones begin little below.
SURE = 0.82
MOST_HOLE = 0.1  # of the subject; smaller holes in it are filled


@dataclass(frozen=True)
class MadeMask:
    """What became of one photo."""

    photo: Photo
    path: Path | None  # the mask that was written
    reason: str | None  # why none was


def make_masks(
    folder: Path | str | Sequence[Path | str],
    *,
    segmenter: Segmenter | None = None,
    say: Callable[[str], None] | None = None,
) -> list[MadeMask]:
    """Write `photo.mask.png` beside every usable photo that has none, for the masked loss. Look at them before you train.

    A mask that is there is never touched, and one that is written is whole. They hold nothing but greys.

    folder     a folder of photos, or files, as for `find_photos`
    segmenter  gets the upright photo (or the part that its crop shows) as an RGB picture and returns greys of its shape,
               white the subject, or None if it cannot tell. Without one GrabCut cuts out what lies in the middle (Rother
               et al., "GrabCut", SIGGRAPH 2004), four times with other frames; only where the four agree a mask is written.
    say        gets a line for every photo
    raises     PhotoError: no usable photo, no OpenCV for GrabCut, a segmenter's picture of another shape, a folder that
               cannot be written
    """
    if segmenter is None:
        load_opencv("making masks")
        segmenter = grabcut
    photos = find_photos(folder, minimum=1, maximum=1000).photos
    stems = Counter(photo.path.stem for photo in photos)
    made = []
    for photo in photos:
        one = _make_mask(photo, segmenter, alone=stems[photo.path.stem] == 1)
        made.append(one)
        if say is not None:
            say(f"{photo.name}: {one.reason}" if one.path is None else f"{photo.name}: wrote {shown(one.path.name)}")
    return made


def _make_mask(photo: Photo, segmenter: Segmenter, *, alone: bool) -> MadeMask:
    path = mask_path(photo.path)
    if photo.mask is not None or os.path.lexists(path):
        return MadeMask(photo, None, "has a mask already")
    if not alone:
        return MadeMask(photo, None, f"another photo would have the same mask, {shown(path.name)}; rename one")
    image = open_photo(photo)
    shape = image.crop(box(image.width, image.height, photo.crop))
    found = segmenter(shape)
    if found is None:
        return MadeMask(photo, None, "not sure enough what the subject is")
    name = f"of {photo.name}"
    greys, _ = read_mask(found, name)
    check_shape(greys, name, *shape.size, "what the segmenter was given")
    share = float((np.asarray(greys) >= WHITE).mean())
    if not LEAST_SHARE <= share <= MOST_SHARE:
        return MadeMask(photo, None, f"{share:.1%} of it would be the subject")
    scale = min(1.0, MASK_SIDE / max(image.size))
    mask = Image.new("L", (max(1, round(image.width * scale)), max(1, round(image.height * scale))))
    inside = box(mask.width, mask.height, photo.crop)
    mask.paste(greys.resize((inside[2] - inside[0], inside[3] - inside[1]), Image.Resampling.BILINEAR), inside[:2])
    _write(mask, path)
    return MadeMask(photo, path, None)


def _write(mask: Image.Image, path: Path) -> None:
    try:
        with replacing(path) as temporary:
            mask.save(temporary, "PNG")
    except OSError as error:
        raise PhotoError(
            f"{shown(path)}: cannot be written ({error.strerror or type(error).__name__}); masks lie beside their photos"
        ) from None


# --- GrabCut --------------------------------------------------------------------------------------------------------


def grabcut(image: Image.Image) -> Image.Image | None:
    """The subject in the middle of an RGB picture as greys of its size, white the subject; None: not sure enough."""
    cv2 = load_opencv("making masks")
    pixels = np.ascontiguousarray(np.asarray(small_copy(image, CUT_SIDE))[..., ::-1])  # OpenCV's order of colours
    height, width = pixels.shape[:2]
    cuts = []
    for margin in MARGINS:
        start = np.full((height, width), cv2.GC_BGD, np.uint8)
        down, across = round(margin * height), round(margin * width)
        start[down : height - down, across : width - across] = cv2.GC_PR_FGD
        cuts.append(_cut(cv2, pixels, start, rounds=6))
    most = _largest_piece(cv2, np.sum(cuts, axis=0) > len(cuts) / 2)
    if not most.any() or min(_alike(cut, most) for cut in cuts) < SURE:
        return None
    shape = _cut(cv2, pixels, _around(cv2, most), rounds=4)
    soft = Image.fromarray(shape.astype(np.uint8) * 255).resize(image.size, Image.Resampling.BICUBIC)
    return soft.point(lambda level: min(255, max(0, round((level - 128) * 2 + 128))))  # soft edges of a pixel of the small copy


def _cut(cv2: Any, pixels: npt.NDArray[np.uint8], start: npt.NDArray[np.uint8], rounds: int) -> Shape:
    state = start.copy()
    cv2.setRNGSeed(0)  # it draws where its colour clusters begin
    cv2.grabCut(pixels, state, None, np.zeros((1, 65)), np.zeros((1, 65)), rounds, cv2.GC_INIT_WITH_MASK)
    return _largest_piece(cv2, (state == cv2.GC_FGD) | (state == cv2.GC_PR_FGD))


def _around(cv2: Any, shape: Shape) -> npt.NDArray[np.uint8]:
    """Where to look again: the inside is the subject for certain, a seam around its edge is not, the rest is background.

    The frames of the first cuts may have cut off what reaches the picture's edge.
    """
    seam = max(3, round(0.04 * max(shape.shape))) | 1
    inner = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (seam, seam))
    outer = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (2 * seam + 1, 2 * seam + 1))
    whole = shape.astype(np.uint8)
    start = np.full(shape.shape, cv2.GC_BGD, np.uint8)
    start[cv2.dilate(whole, outer) > 0] = cv2.GC_PR_BGD
    start[shape] = cv2.GC_PR_FGD
    start[cv2.erode(whole, inner) > 0] = cv2.GC_FGD
    return start


def _largest_piece(cv2: Any, shape: Shape) -> Shape:
    """The largest piece of a shape, without frays, its small holes filled."""
    brush = cv2.getStructuringElement(cv2.MORPH_ELLIPSE, (5, 5))
    smooth = cv2.morphologyEx(cv2.morphologyEx(shape.astype(np.uint8), cv2.MORPH_OPEN, brush), cv2.MORPH_CLOSE, brush)
    count, labels, facts, _ = cv2.connectedComponentsWithStats(smooth)
    if count < 2:
        return np.zeros_like(shape)
    piece: Shape = labels == 1 + int(facts[1:, cv2.CC_STAT_AREA].argmax())
    count, labels, facts, _ = cv2.connectedComponentsWithStats((~piece).astype(np.uint8))
    height, width = piece.shape
    whole = int(piece.sum())
    for number in range(1, count):
        x, y, w, h, area = (int(value) for value in facts[number])
        if x > 0 and y > 0 and x + w < width and y + h < height and area < MOST_HOLE * whole:
            piece |= labels == number
    return piece


def _alike(a: Shape, b: Shape) -> float:
    return float((a & b).sum() / max(1, int((a | b).sum())))
