"""Which square of a photo to train on: the one that keeps the subject, without black bars."""

from __future__ import annotations

from typing import Any, Literal, get_args

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..errors import PhotoError, shown
from .photo import Point, Region
from .square import box

Cropping = Literal["smart", "center"]
Values = npt.NDArray[np.float32]

CENTRE_PREFERENCE = 0.05  # share of all saliency that a square at the edge must gain over the middle one; chosen
# Black bars. The limits were chosen on letterboxed and dark photos.
BAR_LEVEL = 16  # of 255; darker counts as black, so that the noise of a JPEG does
BAR_COPY = 512  # pixels; the long side of the copy that is searched for bars
LEAST_BAR = 0.02  # of the side
EDGE_SHARE = 0.75  # of the first line after a bar that is not black

LONG_SIDE = 64  # pixels of the small copy that saliency is measured on; chosen
EDGE = 0.1  # of the short side: how wide the strips along the edges are; chosen
WHITE = np.array([0.95047, 1.0, 1.08883], dtype=np.float32)  # D65
RGB_TO_XYZ = np.array(  # IEC 61966-2-1
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], dtype=np.float32
)


def check_cropping(crop: str) -> None:
    if crop == "face":
        raise PhotoError(
            'crop "face" was removed (no maintained detector works offline); write a crops.json beside the photos, '
            'e.g. {"photo.jpg": [0.2, 0, 0.8, 0.6]}, or masks of the faces'
        )
    if crop not in get_args(Cropping):
        raise PhotoError(f"crop {shown(crop)!r} is unknown; allowed: {', '.join(get_args(Cropping))}")


def focus_of(image: Image.Image, crop: Region | None, mask: Image.Image | None) -> Point | None:
    """The centre of the square that keeps most of the subject: of its mask or, without one, of what is salient.

    The square slides along the long side; near ties go to the middle. None: the photo (or its crop) is square already,
    or no place stands out.

    image  the upright photo
    mask   greys in the photo's shape, of any size
    """
    x0, y0, x1, y1 = box(image.width, image.height, crop)
    if x1 - x0 == y1 - y0:
        return None
    if mask is not None:
        found = np.asarray(small_copy(mask, LONG_SIDE, box(mask.width, mask.height, crop)), dtype=np.float32)
    else:
        found = saliency(image, (x0, y0, x1, y1))
    place = _best_place(found)
    if place is None:
        return None
    side = min(x1 - x0, y1 - y0)
    if x1 - x0 > side:
        return ((x0 + place * (x1 - x0 - side) + side / 2) / image.width, (y0 + y1) / 2 / image.height)
    return ((x0 + x1) / 2 / image.width, (y0 + place * (y1 - y0 - side) + side / 2) / image.height)


def _best_place(found: Values) -> float | None:
    """Where along the long side, 0..1, the square holds most; None: everywhere the same."""
    height, width = found.shape
    side = min(height, width)
    along = found.sum(axis=0 if width >= height else 1)
    total = float(along.sum())
    if len(along) == side or total <= 0:
        return None
    sums = np.concatenate([[0.0], np.cumsum(along)])
    held = (sums[side:] - sums[:-side]) / max(total, 1e-6)
    middle = (len(held) - 1) / 2
    held = held - CENTRE_PREFERENCE * np.abs(np.arange(len(held)) - middle) / middle
    return float(np.argmax(held)) / (len(held) - 1)


def without_black_bars(image: Image.Image) -> Region | None:
    """The part between two black bars of about equal width, left and right or above and below; None: there are none.

    A dark scene has no straight bright edge, and an object on black has no two bars of equal width.
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
        low, high = (first + 1) / count, (last - 1) / count  # the line at the edge blends into the bar
        return (0.0, low, 1.0, high) if axis == 0 else (low, 0.0, high, 1.0)
    return None


# --- saliency -------------------------------------------------------------------------------------------------------


def saliency(image: Image.Image, part: tuple[int, int, int, int] | None = None) -> Values:
    """(h, w) in 0..1, 64 long: how much each place differs from the four edges, which are mostly background.

    part  x0, y0, x1, y1 in pixels; None: all of the picture

    The distance to an edge's colours is Mahalanobis'; the edge that differs most is left out, since it may cut the subject
    (the backgroundness of Zhang et al., "Minimum Barrier Salient Object Detection at 80 FPS", ICCV 2015).
    """
    colours = lab(small_copy(image, LONG_SIDE, part))
    wide = max(2, round(EDGE * min(colours.shape[:2])))
    distances = []
    for strip in (colours[:wide], colours[-wide:], colours[:, :wide], colours[:, -wide:]):
        samples = strip.reshape(-1, 3)
        inverse = np.linalg.inv(np.cov(samples.T) + 10 * np.eye(3))  # 10, chosen: noise on a plain edge counts for little
        away = colours - samples.mean(axis=0)
        distance = np.sqrt(np.einsum("hwi,ij,hwj->hw", away, inverse, away))
        distances.append(distance / max(float(distance.max()), 1e-6))
    found = np.sum(distances, axis=0) - np.max(distances, axis=0)
    low, high = float(found.min()), float(found.max())
    return ((found - low) / max(high - low, 1e-6)).astype(np.float32)


def small_copy(image: Image.Image, long_side: int, part: tuple[int, int, int, int] | None = None) -> Image.Image:
    """The picture (or its part x0, y0, x1, y1) with its long side at most `long_side` pixels, its short one at least 8."""
    x0, y0, x1, y1 = part or (0, 0, *image.size)
    scale = min(1.0, long_side / max(x1 - x0, y1 - y0))
    size = max(8, round((x1 - x0) * scale)), max(8, round((y1 - y0) * scale))
    return image.resize(size, Image.Resampling.LANCZOS, box=(x0, y0, x1, y1), reducing_gap=2.0)


def lab(image: Image.Image) -> Values:
    """(H, W, 3) CIE L*a*b* of an sRGB picture: equal distances look about equally different. L 0..100."""
    values = np.asarray(image.convert("RGB"), dtype=np.float32) / 255
    linear = np.where(values <= 0.04045, values / 12.92, ((values + 0.055) / 1.055) ** 2.4)
    xyz = linear @ RGB_TO_XYZ.T / WHITE
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    stacked: Any = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
    return stacked.astype(np.float32)
