"""Opening a photo: the format by its content, strict decoding, and upright 8-bit sRGB pixels.

Nothing private leaves this file: `open_photo` rebuilds the pixels, so that place, camera, comments and colour profile
stay behind.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path

import numpy as np
from PIL import Image, ImageCms, ImageFile

from ..errors import PhotoError, shown
from .photo import Photo

# What a file begins with decides what it is, never its name: Pillow is then allowed that one decoder only.
DECODERS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WEBP", "AVIF": "AVIF", "HEIC": "HEIF", "TIFF": "TIFF", "BMP": "BMP"}
FORMATS = ", ".join(DECODERS)
MAX_PIXELS = 50_000_000  # width x height; asked of the header, before anything is decoded
MAX_BYTES = 512 * 2**20  # of a photo's file
RAW_SUFFIXES = {".dng", ".cr2", ".nef", ".nrw", ".arw", ".sr2", ".pef", ".srw", ".rw2", ".orf", ".3fr", ".iiq"}
UPRIGHT = {  # EXIF orientation -> what sets the picture upright
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}


class Unusable(Exception):
    """One file cannot be used; the message is the reason."""


def open_photo(photo: Photo) -> Image.Image:
    """The photo as an upright RGB picture in sRGB, (width, height) = (photo.width, photo.height), nothing but pixels.

    A colour profile is converted to sRGB, transparency is laid on white, 16-bit and float greys are scaled to 8 bits.
    Raises PhotoError if the file is gone, cannot be read any more, or changed since it was found.
    """
    try:
        with opened(photo.path) as (image, _, digest):
            if digest != photo.sha256:
                raise Unusable("the file changed since it was checked; start again")
            return upright_rgb(image)
    except Unusable as error:
        raise PhotoError(f"{shown(photo.path)}: {error}") from None


@contextmanager
def opened(path: Path) -> Iterator[tuple[Image.Image, str, str]]:
    """The picture (header read, not decoded), its format and the file's sha256. Raises Unusable, whatever is wrong."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO or a device could block for ever
            raise Unusable("not a regular file")
        if status.st_size == 0:
            raise Unusable("empty (0 bytes)")
        if status.st_size > MAX_BYTES:
            raise Unusable(f"larger than {MAX_BYTES // 2**20} MB")
        with path.open("rb") as file, warnings.catch_warnings(), _strict_decoding():
            warnings.simplefilter("ignore")  # a photo's small faults (a bad EXIF tag) are not the user's concern
            kind = _kind(file.read(64))
            decoder = _decoder(path, kind)
            file.seek(0)
            digest = hashlib.sha256()
            while block := file.read(2**20):
                digest.update(block)
            file.seek(0)
            with Image.open(file, formats=[decoder]) as image:
                if image.width * image.height > MAX_PIXELS:
                    raise Unusable(_too_many_pixels(image.width, image.height))
                yield image, kind, digest.hexdigest()
    except (Unusable, PhotoError):
        raise
    except Image.DecompressionBombError:
        raise Unusable(f"more than {MAX_PIXELS // 10**6} megapixels; make it smaller") from None
    except PermissionError:
        raise Unusable("no permission to read it") from None
    except FileNotFoundError:
        raise Unusable("no such file") from None
    # Decoders of strangers' files raise nearly anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
    except Exception as error:
        raise Unusable(f"damaged or truncated ({_short(error)})") from None


def _short(error: Exception) -> str:
    text = str(error)
    # Pillow's "cannot identify image file <_io.BufferedReader name='/home/...'>" would tell a path and nothing else.
    return "not readable" if "cannot identify" in text or not text else shown(text)[:80]


def _too_many_pixels(width: int, height: int) -> str:
    return f"{width}x{height} is more than {MAX_PIXELS // 10**6} megapixels; make it smaller"


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Some programs tell Pillow to fill up truncated photos with grey; such photos must not be learnt."""
    before = ImageFile.LOAD_TRUNCATED_IMAGES
    ImageFile.LOAD_TRUNCATED_IMAGES = False
    try:
        yield
    finally:
        ImageFile.LOAD_TRUNCATED_IMAGES = before


def begins_like_a_photo(path: Path) -> bool:
    try:
        if not stat.S_ISREG(path.stat().st_mode):
            return False
        with path.open("rb") as file:
            return _kind(file.read(64)) in DECODERS
    except OSError:
        return False


def _kind(head: bytes) -> str:
    """The format by a file's first bytes; a key of DECODERS, or a plain word for what is not accepted."""
    for magic, kind in (
        (b"\xff\xd8\xff", "JPEG"),
        (b"\x89PNG\r\n\x1a\n", "PNG"),
        (b"BM", "BMP"),
        (b"II*\0", "TIFF"),
        (b"MM\0*", "TIFF"),
        (b"II+\0", "TIFF"),
        (b"MM\0+", "TIFF"),
        (b"GIF8", "GIF"),
        (b"%!PS", "PostScript"),
        (b"\xc5\xd0\xd3\xc6", "PostScript"),
        (b"%PDF", "PDF"),
        (b"8BPS", "Photoshop"),
    ):
        if head.startswith(magic):
            return kind
    if head[:4] == b"RIFF" and head[8:12] == b"WEBP":
        return "WEBP"
    if head[4:8] == b"ftyp":  # a family of containers: the brands say what is inside
        brand = head[8:12]
        if brand in (b"avif", b"avis") or (brand in (b"mif1", b"msf1") and b"avif" in head):
            return "AVIF"
        if brand in (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1"):
            return "HEIC"
        return "video"
    return "unknown"


def _decoder(path: Path, kind: str) -> str:
    """The one Pillow decoder that may read the file. Raises Unusable."""
    if kind == "unknown":
        return _refuse(f"not a photo (none of {FORMATS})")
    if kind not in DECODERS:
        return _refuse(f"{kind}; accepted are {FORMATS}")
    if kind == "TIFF" and path.suffix.lower() in RAW_SUFFIXES:
        # A raw file is a TIFF whose first page is a thumbnail, which would be learnt in place of the photo.
        return _refuse("camera raw; export it as JPEG or PNG")
    if kind == "HEIC":
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError:
            return _refuse("HEIC needs an optional package; pip install 'lora-booth[heic]'")
    Image.init()
    if DECODERS[kind] not in Image.OPEN:
        return _refuse(f"this Pillow cannot read {kind}; pip install -U pillow")
    return DECODERS[kind]


def _refuse(reason: str) -> str:
    raise Unusable(reason)


# --- to upright 8-bit sRGB ------------------------------------------------------------------------------------------


def upright_rgb(image: Image.Image) -> Image.Image:
    """Decode; orientation, colour profile, transparency and bit depth resolved; only pixels are left."""
    image.load()
    turn = _turn(image)
    return _clean(_srgb_on_white(image), turn)


def grey_on_black(image: Image.Image) -> Image.Image:
    """Decode a mask: upright 8-bit greys without a colour profile; what is transparent becomes black."""
    image.load()
    turn = _turn(image)
    if image.mode.startswith(("I", "F")):
        return _clean(_grey8(image), turn)
    if not image.has_transparency_data:
        return _clean(image.convert("L"), turn)
    grey = image.convert("RGBA").convert("LA")
    black = Image.new("L", grey.size)
    black.paste(grey.getchannel("L"), mask=grey.getchannel("A"))
    return _clean(black, turn)


def _turn(image: Image.Image) -> Image.Transpose | None:
    """Asked for after decoding: Pillow's TIFF and HEIC decoders turn the picture themselves and drop the tag then."""
    try:
        return UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        return None


def _clean(image: Image.Image, turn: Image.Transpose | None) -> Image.Image:
    """Upright, and pixels only: what Pillow carries along in info and EXIF stays behind."""
    if turn is not None:
        image = image.transpose(turn)
    clean = Image.new(image.mode, image.size)
    clean.paste(image)
    return clean


def _srgb_on_white(image: Image.Image) -> Image.Image:
    profile = image.info.get("icc_profile")
    if image.mode.startswith(("I", "F")):
        transparent = image.info.get("transparency")
        grey = _grey8(image)
        rgb = _to_srgb(grey, profile)
        if isinstance(transparent, int):  # PNG: one grey value stands for "nothing here"
            hole = Image.fromarray(np.asarray(image) == transparent)
            rgb.paste((255, 255, 255), mask=hole)
        return rgb
    if image.mode not in ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr"):
        raise Unusable(f"colour mode {shown(image.mode)}; save it as RGB")
    if not image.has_transparency_data:
        return _to_srgb(image, profile)
    if image.mode == "La":
        image = image.convert("LA")
    rgba = image.convert("RGBA")
    rgb = _to_srgb(image.convert("L") if image.mode == "LA" else rgba.convert("RGB"), profile)
    white = Image.new("RGB", rgb.size, (255, 255, 255))
    white.paste(rgb, mask=rgba.getchannel("A"))
    return white


def _to_srgb(image: Image.Image, profile: bytes | None) -> Image.Image:
    """RGB in sRGB from an opaque picture; without a valid profile for its kind of colour it is taken as sRGB."""
    if image.mode not in ("L", "RGB", "CMYK"):
        image = image.convert("L" if image.mode == "1" else "RGB")
    if profile:
        try:
            source = ImageCms.ImageCmsProfile(BytesIO(profile))
            if source.profile.xcolor_space.strip() == {"L": "GRAY", "RGB": "RGB", "CMYK": "CMYK"}[image.mode]:
                converted = ImageCms.profileToProfile(
                    image,
                    source,
                    ImageCms.createProfile("sRGB"),
                    renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
                    outputMode="RGB",
                    # white stays white and near-blacks are not clipped: what photo programs do
                    flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
                )
                if converted is not None:
                    return converted
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a broken profile: sRGB is the best guess
    return image.convert("RGB")


def _grey8(image: Image.Image) -> Image.Image:
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
    strips = (np.asarray(rows).astype(np.float32) * np.float32(255.0 / full) for rows in row_strips(image))
    return Image.fromarray(np.concatenate([np.rint(rows).astype(np.uint8) for rows in strips]))


def row_strips(image: Image.Image) -> Iterator[Image.Image]:
    """The picture in strips of 256 rows, top to bottom: a whole copy of 50 megapixels costs up to 200 MB."""
    for top in range(0, image.height, 256):
        yield image.crop((0, top, image.width, min(top + 256, image.height)))
