"""Copies of decoded pictures: upright 8-bit sRGB or greys, nothing but pixels.

Nothing private gets through: the pixels are rebuilt, so that place, camera, comments and colour profile stay behind.
They are rebuilt in strips of rows, since one whole copy of 50 megapixels would take up to 200 MB.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from io import BytesIO

import numpy as np
from PIL import Image, ImageCms

from ..errors import shown
from .photo import Unusable

STRIP = 64  # rows
UPRIGHT = {  # EXIF orientation -> what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}

SIDEWAYS = [UPRIGHT[orientation] for orientation in (5, 6, 7, 8)]  # what makes width of height
COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # the modes, but for large greys
MEANS = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "F")  # of which Pillow takes means, weighted by alpha where there is one
Convert = Callable[[Image.Image], Image.Image]


def rgb_copy(image: Image.Image, smaller: int = 1) -> Image.Image:
    """Decode; orientation, colour profile, transparency and bit depth resolved.

    smaller  each side is that many times smaller, rounded up: every pixel the mean of a square of them
    """
    image.load()
    turn = _turn(image)
    return _upright(_rebuilt(image, "RGB", _srgb_on_white(image), smaller), turn)


def grey_copy(image: Image.Image) -> Image.Image:
    """Decode a mask: upright 8-bit greys without a colour profile; what is transparent becomes black."""
    image.load()
    turn = _turn(image)
    return _upright(_rebuilt(image, "L", _grey_on_black(image)), turn)


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels of a decoded picture's upright copy, if no smaller one."""
    return (image.height, image.width) if _turn(image) in SIDEWAYS else (image.width, image.height)


def row_strips(image: Image.Image, rows: int = STRIP) -> Iterator[Image.Image]:
    """The picture in strips, top to bottom."""
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _rebuilt(image: Image.Image, mode: str, convert: Convert, smaller: int = 1) -> Image.Image:
    copy, top = Image.new(mode, (-(-image.width // smaller), -(-image.height // smaller))), 0
    first = image.mode in MEANS and "transparency" not in image.info
    for rows in row_strips(image, smaller * max(1, STRIP // smaller)):
        part = convert(rows.reduce(smaller)) if first else convert(rows).reduce(smaller)
        copy.paste(part, (0, top))
        top += part.height
    return copy


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Asked for after decoding: Pillow's TIFF and HEIC decoders turn the picture themselves and drop the tag then."""
    try:
        return UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return None


def _upright(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    return image if turn is None else image.transpose(turn)


# --- what makes a strip 8-bit sRGB or grey --------------------------------------------------------------------------


def _srgb_on_white(image: Image.Image) -> Convert:
    """Raises Unusable for colours that cannot be told."""
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        return _large_greys_on_white(image, profile)
    if image.mode not in COLOURS:
        raise Unusable(f"colour mode {shown(image.mode)}; save it as RGB")
    if not image.has_transparency_data:
        opaque = _opaque_mode(image.mode)
        to_srgb = _to_srgb(opaque, profile)
        return lambda rows: to_srgb(rows if rows.mode == opaque else rows.convert(opaque))
    grey = image.mode in ("LA", "La")
    to_srgb = _to_srgb("L" if grey else "RGB", profile)

    def on_white(rows: Image.Image) -> Image.Image:
        if rows.mode == "La":
            rows = rows.convert("LA")
        rgba = rows.convert("RGBA")
        rgb = to_srgb(rows.convert("L") if grey else rgba.convert("RGB"))
        white = Image.new("RGB", rgb.size, (255, 255, 255))
        white.paste(rgb, mask=rgba.getchannel("A"))
        return white

    return on_white


def _large_greys_on_white(image: Image.Image, profile: bytes | None) -> Convert:
    to_grey8, to_srgb = _grey8(image), _to_srgb("L", profile)
    transparent = image.info.get("transparency")
    if not isinstance(transparent, int):  # PNG: one grey value stands for "nothing here"
        return lambda rows: to_srgb(to_grey8(rows))

    def on_white(rows: Image.Image) -> Image.Image:
        rgb = to_srgb(to_grey8(rows))
        rgb.paste((255, 255, 255), mask=Image.fromarray(np.asarray(rows) == transparent))
        return rgb

    return on_white


def _opaque_mode(mode: str) -> str:
    return mode if mode in ("L", "RGB", "CMYK") else "L" if mode == "1" else "RGB"


def _to_srgb(mode: str, profile: bytes | None) -> Convert:
    """RGB in sRGB from opaque L, RGB or CMYK; without a valid profile for its kind of colour it is taken as sRGB."""
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            if source.profile.xcolor_space.strip() == {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[mode]:
                transform = ImageCms.buildTransform(
                    source,
                    ImageCms.createProfile("sRGB"),
                    mode,
                    "RGB",
                    renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                    # white stays white and near-blacks are not clipped: what photo programs do
                    flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
                )
                return transform.apply
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a broken profile: sRGB is the best guess
    return lambda rows: rows.convert("RGB")


def _grey_on_black(image: Image.Image) -> Convert:
    if image.mode.startswith(("I", "F")):
        return _grey8(image)
    if not image.has_transparency_data:
        return lambda rows: rows.convert("L")

    def on_black(rows: Image.Image) -> Image.Image:
        grey = rows.convert("RGBA").convert("LA")
        black = Image.new("L", grey.size)
        black.paste(grey.getchannel("L"), mask=grey.getchannel("A"))
        return black

    return on_black


def _grey8(image: Image.Image) -> Convert:
    """8-bit grey from 16-bit, 32-bit or float grey. Pillow itself would clip at 255, so nearly all becomes white."""
    extremes = np.array([(rows.min(), rows.max()) for rows in map(np.asarray, row_strips(image))], dtype=np.float64)
    low, high = float(extremes[:, 0].min()), float(extremes[:, 1].max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise Unusable("holds NaN or infinite values; save it as an 8-bit picture")
    if low < 0:
        raise Unusable("holds negative values; save it as an 8-bit picture")
    if image.mode.startswith("I;16"):
        full = 65535.0
    elif image.mode == "F" and high <= 1:
        full = 1.0
    else:  # the depth is not written anywhere: the usual depth that holds the maximum, else the maximum itself
        full = next(depth for depth in (255.0, 65535.0, high) if high <= depth)

    def to_grey8(rows: Image.Image) -> Image.Image:
        values = np.asarray(rows).astype(np.float32)
        values *= np.float32(255.0 / full)
        return Image.fromarray(np.rint(values, out=values).astype(np.uint8))

    return to_grey8
