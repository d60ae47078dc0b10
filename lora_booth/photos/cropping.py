"""Crops: the pixels of a photo that training uses, resized to one of a few sizes, and as a tensor in -1..1; where they lie."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

import numpy as np
import numpy.typing as npt
from PIL import Image

from ..config import PhotoShape
from .opening import open_photo, read_mask
from .photo import CropRegion, Photo, Point

if TYPE_CHECKING:
    from torch import Tensor

Cropping = Literal["smart", "center"]
Values = npt.NDArray[np.float32]
WidthHeight = tuple[int, int]  # pixels

MAX_ASPECT = 4.0  # long side / short side of a photo; chosen, and the most of SDXL's own sizes
SIDES_PER_RESOLUTION = 8  # sides of buckets differ by an eighth of the resolution; chosen
LARGEST_MULTIPLE = 64  # or by 64 pixels, as SDXL's own sizes do (arXiv 2307.01952, appendix I); SD 1.x and 2.x halve 64 evenly
AREA_FIRST = 2.0  # large crops are averaged over whole pixels down to this many times the size; chosen
CENTRE_PREFERENCE = 0.05  # share of all saliency that a square at the edge must gain over the middle one; chosen
# Black bars. The limits were chosen on letterboxed and dark photos.
BAR_LEVEL = 16  # of 255; darker counts as black, so that the noise of a JPEG does
BAR_COPY = 512  # pixels; the long side of the copy that is searched for bars
LEAST_BAR = 0.02  # of the side
EDGE_SHARE = 0.75  # of the first line after a bar that is not black

LONG_SIDE = 64  # pixels of the small copy that saliency is measured on; chosen
EDGE = 0.1  # of the short side: how wide the strips along the edges are; chosen
D65 = np.array([0.95047, 1.0, 1.08883], dtype=np.float32)  # white
RGB_TO_XYZ = np.array(  # IEC 61966-2-1
    [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]], dtype=np.float32
)


@dataclass(frozen=True)
class Crop:
    """Where a training picture comes from, as SDXL's micro-conditioning expects it. All in pixels."""

    top: int  # of the crop, in the photo resized so that the crop has its final size
    left: int
    original_size: tuple[int, int]  # height, width of the photo (or of the user's crop) before resizing


@dataclass(frozen=True)
class Cropped:
    """One photo, cropped and resized."""

    image: Image.Image  # RGB
    crop: Crop
    mask: Image.Image | None = None  # greys, as large; white is the subject
    kept: float | None = None  # share of the mask that is inside the crop; None without a mask


# --- sizes ----------------------------------------------------------------------------------------------------------


def picture_sizes(resolution: int, shape: PhotoShape, *, multiple: int = 8) -> list[WidthHeight]:
    """The sizes that photos are cropped to: the square with this side or, for buckets, also other shapes up to 4:1, of its area
    or a little less. So no bucket takes more memory or time than the square.

    multiple  pixels that the base needs both sides to be a multiple of
    """
    sizes = [(resolution, resolution)]
    if shape == "square":
        return sizes
    step = max(multiple, min(LARGEST_MULTIPLE, resolution // SIDES_PER_RESOLUTION) // multiple * multiple)
    for short in range(resolution // step * step, 0, -step):
        long = resolution**2 // short // step * step
        if short < long <= MAX_ASPECT * short:
            sizes += [(short, long), (long, short)]
    return sizes


def size_for(photo: Photo, sizes: Sequence[WidthHeight]) -> WidthHeight:
    """That of `sizes` in which most of the photo (or of its crop) is seen."""
    x0, y0, x1, y1 = box(photo.width, photo.height, photo.crop)
    aspect = (x1 - x0) / (y1 - y0)
    return max(sizes, key=lambda size: min(aspect * size[1] / size[0], size[0] / size[1] / aspect))


# --- the crop -------------------------------------------------------------------------------------------------------


def crop_photo(photo: Photo, sizes: Sequence[WidthHeight]) -> Cropped:
    """Open a photo, crop it to the shape of one of `sizes`, that in which most of it is seen, and resize it to that size;
    likewise its mask. Raises PhotoError."""
    size = size_for(photo, sizes)
    left, top, width, height = crop_box(photo.width, photo.height, size, photo.crop, photo.focus)
    smaller = max(1, int(min(width / size[0], height / size[1]) / AREA_FIRST))  # averaged while it is opened, to save memory
    image = crop_and_resize(open_photo(photo, smaller=smaller), size, photo.crop, focus=photo.focus)
    crop = crop_of(photo.width, photo.height, size, photo.crop, photo.focus)
    if photo.mask is None:
        return Cropped(image, crop)
    greys, _ = read_mask(photo.mask.source, photo.name, sha256=photo.mask.sha256)
    across, down = greys.width / photo.width, greys.height / photo.height
    region = (left * across, top * down, (left + width) * across, (top + height) * down)
    # not Lanczos: it overshoots at a mask's hard edge
    method = Image.Resampling.BOX if region[2] - region[0] >= size[0] else Image.Resampling.BILINEAR
    mask = greys.resize(size, method, box=region)
    inside = np.asarray(greys.crop(region)).sum()
    return Cropped(image, crop, mask, float(inside / max(1, np.asarray(greys).sum())))


def crop_and_resize(
    image: Image.Image, size: WidthHeight, crop: CropRegion | None = None, *, focus: Point | None = None
) -> Image.Image:
    """The part of a picture (or of its `crop`) in the shape of `size`, in the middle or centred on `focus`, resized to it.

    Large parts are first averaged over whole pixels (area) and then resampled with Lanczos, so that fine patterns fade
    instead of turning into false ones; small ones are enlarged with Lanczos; one of the right size is unchanged.
    """
    left, top, width, height = crop_box(image.width, image.height, size, crop, focus)
    # Crop first: resampling inside a larger picture would let pixels from outside the crop bleed in at its edge.
    part = image.crop((left, top, left + width, top + height))
    if (width, height) == size:
        return part
    return part.resize(size, Image.Resampling.LANCZOS, reducing_gap=AREA_FIRST)


def crop_of(width: int, height: int, size: WidthHeight, crop: CropRegion | None, focus: Point | None) -> Crop:
    """The micro-conditioning of SDXL for a picture of this width and height (pixels), cropped to the shape of `size`.

    As in diffusers' SDXL DreamBooth script with a centre crop: a 1000 x 800 (w x h) photo at 512 x 512 is 640 x 512 when
    resized, so its square begins at (0, 64). A `crop` counts as the picture, since nothing outside it is used.
    """
    x0, y0, x1, y1 = box(width, height, crop)
    left, top, across, down = crop_box(width, height, size, crop, focus)
    if focus is not None:
        corner = round((top - y0) * size[1] / down), round((left - x0) * size[0] / across)
    else:
        resized_width = size[0] * (x1 - x0) // across
        resized_height = size[1] * (y1 - y0) // down
        corner = round((resized_height - size[1]) / 2), round((resized_width - size[0]) / 2)
    return Crop(top=corner[0], left=corner[1], original_size=(y1 - y0, x1 - x0))


def box(width: int, height: int, crop: CropRegion | None) -> tuple[int, int, int, int]:
    """The crop's x0, y0, x1, y1 in pixels, at least one pixel wide and high; all of the picture without a crop."""
    if crop is None:
        return (0, 0, width, height)
    x0, y0 = min(round(crop[0] * width), width - 1), min(round(crop[1] * height), height - 1)
    return (x0, y0, max(round(crop[2] * width), x0 + 1), max(round(crop[3] * height), y0 + 1))


def crop_box(
    width: int, height: int, size: WidthHeight, crop: CropRegion | None, focus: Point | None
) -> tuple[int, int, int, int]:
    """left, top, width and height in pixels of the largest part of the picture (or of its crop) in the shape of `size`,
    centred on `focus` if possible."""
    x0, y0, x1, y1 = box(width, height, crop)
    across = min(x1 - x0, max(1, round((y1 - y0) * size[0] / size[1])))
    down = min(y1 - y0, max(1, round((x1 - x0) * size[1] / size[0])))
    if focus is None:
        return x0 + (x1 - x0 - across) // 2, y0 + (y1 - y0 - down) // 2, across, down
    left, top = round(focus[0] * width - across / 2), round(focus[1] * height - down / 2)
    return min(max(left, x0), x1 - across), min(max(top, y0), y1 - down), across, down


def to_tensor(image: Image.Image) -> Tensor:
    """An RGB picture (W x H) -> (1, 3, H, W) float32 in -1..1, on the CPU."""
    import torch

    pixels = torch.from_numpy(np.array(image.convert("RGB")))  # (H, W, 3) uint8
    return pixels.permute(2, 0, 1)[None].contiguous().float() / 127.5 - 1.0


# --- where the crop lies: around the subject, without black bars ------------------------------------------------------


def focus_of(image: Image.Image, crop: CropRegion | None, mask: Image.Image | None) -> Point | None:
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
    left, top = x0 + place * (x1 - x0 - side), y0 + place * (y1 - y0 - side)
    return (left + side / 2) / image.width, (top + side / 2) / image.height


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


def without_black_bars(image: Image.Image) -> CropRegion | None:
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
    xyz = linear @ RGB_TO_XYZ.T / D65
    f = np.where(xyz > 0.008856, np.cbrt(xyz), 7.787 * xyz + 16 / 116)
    stacked: Any = np.stack([116 * f[..., 1] - 16, 500 * (f[..., 0] - f[..., 1]), 200 * (f[..., 1] - f[..., 2])], axis=-1)
    return stacked.astype(np.float32)
