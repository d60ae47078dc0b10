"""Measures of a photo that need no model. Each threshold has its source beside it.

"Real photos" are 31 of the DreamBooth data set (six subjects, 687 to 1024 px),
unchanged, and degraded by benchmarks/photo_audit.py.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt
from PIL import Image, ImageOps

from .cropping import Values, lab, saliency

JUDGED_SIDE = 512  # pixels; sharpness and light are judged on crops as large as squares of this side, or on smaller ones

# Variance of the Laplacian in the third sharpest of 8 x 8 tiles, so that soft backgrounds and small subjects do not count.
# Measured by benchmarks/photo_audit.py: all real photos are above it, all blurred by a Gaussian of 2 px (of 512) below.
BLURRED = 120.0
# 99th percentile of the light, of 255. Real photos 153 to 255; three stops darker at most 92.
DARK = 110.0
# Clipped shares. White, of the mask or of the square: real photos at most 0.03; two stops brighter, 29 of 31 more than 0.2.
# A bright colour is lost when one of its channels is clipped; a pure colour that is not bright, e.g. drawn red, is not.
# In a square with a white frame (a subject on white, or formerly transparent), only the likely subject counts.
# Black, on the likely subject: at most 0.13.
WHITE_CLIPPED, BLACK_CLIPPED, WHITE_FRAME = 0.2, 0.35, 0.7
CLIPPED, BRIGHT, WHITE_LEVEL, BLACK_LEVEL = 254, 150, 250, 8  # of 255, the first of a channel, the others of light; chosen
# Difference of the 99th and 1st percentile. Real photos 153 to 237.
LITTLE_CONTRAST = 40.0

# Two photos are nearly the same when they are below both. Real photos of one subject: bits from 0.36, colours from 19 (L*a*b*).
# The same photo compressed, brighter, smaller, noisy, turned by 2 degrees or cropped by 6 %: bits to 0.28, colours to 13.
ALIKE_BITS, ALIKE_COLOURS = 0.30, 14.0
LIGHT_FORGIVEN = 15.0  # L*; how much lighter one of the two may be; chosen

# Backgrounds are alike when they share colours (1: all of them) in the same places (L*a*b*). Measured by
# benchmarks/photo_audit.py on real photos and on subjects in front of one wall.
ALIKE_SPREAD, ALIKE_PLACES = 0.65, 24.0
SMALL_SUBJECT = 0.05  # of the picture; chosen
CUT_SUBJECT = 0.8  # of the subject, inside the crop; chosen


@dataclass(frozen=True)
class Measures:
    """Measures of one training picture."""

    sharpness: float  # variance of the Laplacian where it is sharpest; below 120 is blurred
    brightest: float  # 0..255, 99th percentile
    contrast: float  # 0..255, 99th less 1st percentile
    white: float  # clipped share of the mask, else of the picture; on white, of the likely subject
    black: float  # clipped share of the subject, or of what is likely to be it
    subject: float | None  # share of the picture; None: without a mask


@dataclass(frozen=True, eq=False)
class Likeness:
    """The features by which two photos are compared."""

    bits: npt.NDArray[np.bool_]  # lighter to the right, and below? (2 x 16 x 16,)
    mirrored: npt.NDArray[np.bool_]  # the same for the mirrored picture
    colours: Values  # (32, 32, 3) L*a*b*
    spread: Values  # (8, 8, 8) shares of L*a*b* colours at the border
    places: Values  # (12, 3) mean colours around the border


def measure(image: Image.Image, mask: Image.Image | None) -> Measures:
    light = np.asarray(image.convert("L"), dtype=np.float32)
    clipped = (np.asarray(image).max(axis=-1) >= CLIPPED) & (light >= BRIGHT)
    if mask is not None:
        where = np.asarray(mask, dtype=np.float32) / 255
        subject: float | None = float(where.mean())
    else:
        subject = None
        where = np.asarray(Image.fromarray(saliency(image)).resize(image.size))
    where = where / max(float(where.sum()), 1e-6)
    of_subject = mask is not None or _frame(light >= WHITE_LEVEL).mean() >= WHITE_FRAME
    low, high = (float(value) for value in np.percentile(light, (1, 99)))
    return Measures(
        sharpness=_sharpness(light),
        brightest=high,
        contrast=high - low,
        white=float((where * clipped).sum() if of_subject else clipped.mean()),
        black=float((where * (light <= BLACK_LEVEL)).sum()),
        subject=subject,
    )


def _frame(values: npt.NDArray[np.bool_]) -> npt.NDArray[np.bool_]:
    """The values of the outermost sixteenth, in one row."""
    wide = max(1, min(values.shape) // 16)
    return np.concatenate([part.ravel() for part in (values[:wide], values[-wide:], values[:, :wide], values[:, -wide:])])


def _sharpness(light: Values, tiles: int = 8) -> float:
    change = light[:-2, 1:-1] + light[2:, 1:-1] + light[1:-1, :-2] + light[1:-1, 2:] - 4 * light[1:-1, 1:-1]
    tiles = min(tiles, *change.shape)
    height, width = (side // tiles for side in change.shape)
    parts = change[: height * tiles, : width * tiles].reshape(tiles, height, tiles, width)
    return float(np.sort(parts.var(axis=(1, 3)), axis=None)[-3])


def likeness(image: Image.Image, mask: Image.Image | None) -> Likeness:
    small = image.resize((64, 64), Image.Resampling.LANCZOS, reducing_gap=2.0)
    colours = lab(small)
    at_border = np.ones((64, 64), dtype=bool)
    at_border[10:-10, 10:-10] = False
    if mask is not None:  # leave out the subject
        outside = at_border & (np.asarray(mask.resize((64, 64))) < 128)
        at_border = outside if outside.sum() >= 64 else at_border
    cells = colours.reshape(4, 16, 4, 16, 3).mean(axis=(1, 3))
    return Likeness(
        bits=_bits(small),
        mirrored=_bits(ImageOps.mirror(small)),
        colours=lab(small.resize((32, 32), Image.Resampling.BOX)),
        spread=_spread(colours[at_border]),
        places=np.array([cells[y, x] for y in range(4) for x in range(4) if y in (0, 3) or x in (0, 3)]),
    )


def _bits(small: Image.Image) -> npt.NDArray[np.bool_]:
    """The difference hash, across and down."""
    grey = small.convert("L")
    across = np.asarray(grey.resize((17, 16), Image.Resampling.LANCZOS), dtype=np.int16)
    down = np.asarray(grey.resize((16, 17), Image.Resampling.LANCZOS), dtype=np.int16)
    return np.concatenate([(across[:, 1:] > across[:, :-1]).ravel(), (down[1:] > down[:-1]).ravel()])


def _spread(colours: Values) -> Values:
    """(N, 3) -> (8, 8, 8): the share of each kind of colour, smoothed so that neighbours count."""
    place = np.stack([colours[:, 0] / 12.5, (colours[:, 1] + 64) / 16, (colours[:, 2] + 64) / 16], axis=-1)
    counts = np.histogramdd(place.clip(0, 7.999), bins=(8, 8, 8), range=((0, 8),) * 3)[0]
    for axis in range(3):
        counts = np.apply_along_axis(np.convolve, axis, counts, [0.25, 0.5, 0.25], "same")
    return (counts / counts.sum()).astype(np.float32)


def nearly_the_same(a: Likeness, b: Likeness) -> bool:
    """One picture twice, perhaps mirrored or slightly cropped, turned, brighter or compressed."""
    for bits, colours in ((b.bits, b.colours), (b.mirrored, b.colours[:, ::-1])):
        if (a.bits != bits).mean() <= ALIKE_BITS:
            difference = a.colours - colours
            lighter = float(difference[..., 0].mean())
            difference[..., 0] -= min(max(lighter, -LIGHT_FORGIVEN), LIGHT_FORGIVEN)
            if np.sqrt((difference**2).sum(axis=-1)).mean() <= ALIKE_COLOURS:
                return True
    return False


def alike_behind(a: Likeness, b: Likeness) -> bool:
    """The same background, judging by the borders."""
    shared = np.minimum(a.spread, b.spread).sum()
    apart = np.sqrt(((a.places - b.places) ** 2).sum(axis=-1)).mean()
    return bool(shared >= ALIKE_SPREAD and apart <= ALIKE_PLACES)
