"""Open pictures: tell the format by content, decode strictly, return upright 8-bit sRGB (or grey) pixels.

Every picture that the package reads comes in here, not photos and masks alone: those in run folders and recipes too.
Nothing private gets through: the pixels are copied to a new image, without location, camera, comments or colour profile.
They are copied in strips of rows, since a second copy of 50 megapixels would take up to 200 MB.
"""

from __future__ import annotations

import hashlib
import importlib
import math
import stat
import threading
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import BinaryIO, Literal

import numpy as np
from PIL import Image, ImageCms, ImageFile, ImageOps, UnidentifiedImageError

from ..errors import MissingExtraError, PhotoError, reason_of, shown
from .photo import Photo, Unusable

DECODERS = ("JPEG", "PNG", "WEBP", "AVIF", "HEIF", "TIFF", "BMP")  # of Pillow, which goes by content: no other sees a file
FORMATS = ", ".join(DECODERS).replace("HEIF", "HEIC")  # as people know them
HEIC_BRANDS = (b"heic", b"heix", b"hevc", b"hevx", b"heim", b"heis", b"hevm", b"hevs", b"mif1", b"msf1")
RAW_SUFFIXES = {".dng", ".cr2", ".nef", ".nrw", ".arw", ".sr2", ".pef", ".srw", ".rw2", ".orf", ".3fr", ".iiq"}
MAX_PIXELS = 50_000_000  # width x height, read from the header before anything is decoded; chosen
MAX_BYTES = 512 * 2**20  # of a photo's file; chosen
TOO_LARGE = f"more than {MAX_PIXELS // 10**6} megapixels; make it smaller"

STRIP = 64  # rows; chosen
DECODING = threading.RLock()  # how Pillow decodes, and which warnings are shown, is set for all threads
ORIENTATION = 0x0112  # EXIF tag; from 5 on, width and height are swapped
COLOURS = ("1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX", "CMYK", "YCbCr")  # modes besides large greys
MEANS = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr", "F")  # modes that Pillow can average, weighted by alpha if there is one
Mode = Literal["RGB", "L"]
Convert = Callable[[Image.Image], Image.Image]  # makes a strip 8-bit sRGB or grey


def open_photo(photo: Photo, *, smaller: int = 1) -> Image.Image:
    """The photo as an upright sRGB picture of photo.width x photo.height pixels, without metadata.

    smaller  divides each side, rounded up: every pixel is the mean of a square of `smaller` x `smaller`

    A colour profile is converted to sRGB, transparency is blended with white, 16-bit and float greys are scaled to 8 bits.
    Raises PhotoError if the file is gone, can no longer be read, or changed since it was found.
    """
    return _copied(photo.path, shown(photo.path), sha256=photo.sha256, smaller=smaller)[0]


def read_mask(source: Path | Image.Image, name: str, *, sha256: str | None = None) -> tuple[Image.Image, str]:
    """A mask as greys (L), in its own size, and its digest. Raises PhotoError, also if that is not `sha256`."""
    return _copied(source, f"mask {name}", mode="L", sha256=sha256)


def read_picture(source: Path | bytes | Image.Image, *, mode: Mode = "RGB", inside: Path | None = None) -> Image.Image:
    """A picture that nobody vouches for, upright and without metadata.

    source  a file, what a file contains, or a picture in memory
    mode    "RGB": sRGB; "L": the greys of a mask
    inside  the folder that the file must be in, links resolved
    raises  PhotoError
    """
    return _copied(source, shown(source) if isinstance(source, Path) else "the picture", mode=mode, inside=inside)[0]


def _copied(
    source: Path | bytes | Image.Image,
    name: str,
    *,
    mode: Mode = "RGB",
    sha256: str | None = None,
    inside: Path | None = None,
    smaller: int = 1,
) -> tuple[Image.Image, str]:
    try:
        with opened(source, inside=inside) as (image, _, digest):
            if sha256 not in (None, digest):
                raise Unusable("it changed since it was checked; find the photos again")
            return upright_copy(image, mode, smaller=smaller), digest
    except Unusable as error:
        raise PhotoError(f"{name}: {error}") from None


# --- the file -------------------------------------------------------------------------------------------------------


@contextmanager
def opened(source: Path | bytes | Image.Image, *, inside: Path | None = None) -> Iterator[tuple[Image.Image, str, str]]:
    """The picture (header read, not decoded), its format and the file's sha256. Raises Unusable, whatever is wrong.

    Of a picture in memory, the format is "" and the sha256 that of its values.
    """
    try:
        with _strict_decoding():
            if isinstance(source, Image.Image):
                _check_size(source)
                yield source, "", hashlib.sha256(f"{source.mode} {source.size}".encode() + source.tobytes()).hexdigest()
                return
            with _readable(source, inside) as file:
                digest = hashlib.sha256()
                while block := file.read(2**20):
                    digest.update(block)
                with _identified(file) as image:
                    kind = str(image.format)
                    if kind == "TIFF" and isinstance(source, Path) and source.suffix.lower() in RAW_SUFFIXES:
                        # A raw file is a TIFF whose first page is a thumbnail, which would be used in place of the photo.
                        raise Unusable("camera raw; export it as JPEG or PNG")
                    _check_size(image)
                    yield image, kind, digest.hexdigest()
    except (Unusable, PhotoError):
        raise
    except Image.DecompressionBombError:
        raise Unusable(TOO_LARGE) from None
    except UnidentifiedImageError:
        raise Unusable(f"not a photo, or damaged or truncated; accepted are {FORMATS}") from None
    except PermissionError:
        raise Unusable("no permission to read it") from None
    except (FileNotFoundError, NotADirectoryError):
        raise Unusable("no such file") from None
    # On untrusted files, decoders raise nearly anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
    except Exception as error:
        raise Unusable(f"damaged or truncated ({reason_of(error)[:80]})") from None


def begins_like_a_photo(path: Path) -> bool:
    try:
        with _strict_decoding(), _readable(path, None) as file, _identified(file):
            return True
    except Exception:  # as in `opened`
        return False


def _readable(source: Path | bytes, inside: Path | None) -> BinaryIO:
    """The file, opened. Raises Unusable."""
    if isinstance(source, bytes):
        return BytesIO(source)
    if "\0" in str(source):
        raise Unusable("no such file")
    if inside is not None and inside.resolve() not in source.resolve().parents:
        raise Unusable("a link that leaves the folder")
    status = source.stat()
    if not stat.S_ISREG(status.st_mode):  # opening a FIFO or a device could block forever
        raise Unusable("not a regular file")
    if status.st_size == 0:
        raise Unusable("empty (0 bytes)")
    if status.st_size > MAX_BYTES:
        raise Unusable(f"larger than {MAX_BYTES // 2**20} MB")
    return source.open("rb")


def _identified(file: BinaryIO) -> Image.Image:
    """Let one of DECODERS read the header. Raises Unusable where an optional package would be needed."""
    file.seek(0)
    head = file.read(64)
    if head[4:8] == b"ftyp" and head[8:12] in HEIC_BRANDS and b"avif" not in head:
        try:
            importlib.import_module("pillow_heif").register_heif_opener()
        except ImportError:
            raise Unusable(str(MissingExtraError("HEIC", "heic"))) from None
    Image.init()
    return Image.open(file, formats=[name for name in DECODERS if name in Image.OPEN])


def _check_size(image: Image.Image) -> None:
    if image.width * image.height > MAX_PIXELS:
        raise Unusable(f"{image.width}x{image.height} is {TOO_LARGE}")


@contextmanager
def _strict_decoding() -> Iterator[None]:
    """Refuse truncated photos, even where a program has set Pillow to fill them with grey."""
    with DECODING, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # minor faults, e.g. a bad EXIF tag, do not concern the user
        before = ImageFile.LOAD_TRUNCATED_IMAGES
        ImageFile.LOAD_TRUNCATED_IMAGES = False
        try:
            yield
        finally:
            ImageFile.LOAD_TRUNCATED_IMAGES = before


# --- its pixels -----------------------------------------------------------------------------------------------------


def upright_copy(image: Image.Image, mode: Mode = "RGB", *, smaller: int = 1) -> Image.Image:
    """Decode; resolve orientation, colour profile, transparency and bit depth. Raises Unusable.

    mode     "RGB": sRGB, on white; "L": 8-bit greys without a colour profile, on black, for masks
    smaller  as for `open_photo`
    """
    image.load()
    convert = _converter(image, mode)
    copy, top = Image.new(mode, (-(-image.width // smaller), -(-image.height // smaller))), 0
    first = image.mode in MEANS and "transparency" not in image.info
    for rows in row_strips(image, smaller * max(1, STRIP // smaller)):
        part = convert(rows.reduce(smaller)) if first else convert(rows).reduce(smaller)
        copy.paste(part, (0, top))
        top += part.height
    return _upright(copy, image)


def opacity(image: Image.Image, *, smaller: int = 1) -> Image.Image | None:
    """Of a decoded picture: greys (L) as large as its upright copy, white where it is opaque; None: it has no transparency."""
    if image.mode not in COLOURS or not image.has_transparency_data:
        return None
    copy, top = Image.new("L", (-(-image.width // smaller), -(-image.height // smaller))), 0
    for rows in row_strips(image, smaller * max(1, STRIP // smaller)):
        rows = rows.convert("LA") if rows.mode == "La" else rows
        part = rows.convert("RGBA").getchannel("A").reduce(smaller)
        copy.paste(part, (0, top))
        top += part.height
    return _upright(copy, image)


def _upright(copy: Image.Image, image: Image.Image) -> Image.Image:
    """`copy`, turned as the decoded picture says."""
    if (orientation := _orientation(image)) > 1:
        copy.getexif()[ORIENTATION] = orientation
        ImageOps.exif_transpose(copy, in_place=True)
    return copy


def upright_size(image: Image.Image) -> tuple[int, int]:
    """Width and height in pixels of a decoded picture's upright copy."""
    return (image.height, image.width) if _orientation(image) >= 5 else (image.width, image.height)


def row_strips(image: Image.Image, rows: int = STRIP) -> Iterator[Image.Image]:
    """The picture in strips, top to bottom."""
    for top in range(0, image.height, rows):
        yield image.crop((0, top, image.width, min(top + rows, image.height)))


def _orientation(image: Image.Image) -> int:
    """1 to 8, of a decoded picture: Pillow's TIFF and HEIC decoders turn it upright themselves and then drop the tag."""
    try:
        found = int(image.getexif().get(ORIENTATION, 1))
        return found if found in range(1, 9) else 1
    except Exception:  # a broken EXIF block does not mean broken pixels
        return 1


def _converter(image: Image.Image, mode: Mode) -> Convert:
    """For the strips of `image`. Raises Unusable for colours that cannot be interpreted."""
    large = image.mode.startswith(("I", "F"))
    if not large and image.mode not in COLOURS:
        raise Unusable(f"colour mode {shown(image.mode)}; save it as RGB")
    grey = large or image.mode in ("1", "L", "LA", "La")
    opaque = "L" if grey else "CMYK" if image.mode == "CMYK" else "RGB"
    to_grey8 = _grey8(image) if large else None
    to_mode = _to_srgb(opaque, image.info.get("icc_profile")) if mode == "RGB" else lambda rows: rows.convert("L")
    transparent = image.info.get("transparency")

    def convert(rows: Image.Image) -> Image.Image:
        alpha = None
        if to_grey8 is not None:
            if isinstance(transparent, int):  # PNG: one grey value means transparent
                alpha = Image.fromarray(np.asarray(rows) != transparent)
            rows = to_grey8(rows)
        elif image.has_transparency_data:
            rows = (rows.convert("LA") if rows.mode == "La" else rows).convert("RGBA")
            alpha = rows.getchannel("A")
        copy = to_mode(rows.convert(opaque))
        if alpha is None:
            return copy
        behind = Image.new(mode, copy.size, "white" if mode == "RGB" else "black")
        behind.paste(copy, mask=alpha)
        return behind

    return convert


def _to_srgb(mode: str, profile: bytes | None) -> Convert:
    """From opaque L, RGB or CMYK to RGB in sRGB; colours without a valid profile of their kind are taken as sRGB."""
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
                    # white stays white and near-blacks are not clipped, as in photo programs
                    flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
                )
                return transform.apply
        except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
            pass  # a broken profile: sRGB is the best guess
    return lambda rows: rows.convert("RGB")


def _grey8(image: Image.Image) -> Convert:
    """8-bit grey from 16-bit, 32-bit or float grey. Pillow itself would clip at 255, turning nearly everything white."""
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
    else:  # the file does not give the depth: take the usual one that holds the maximum, else the maximum
        full = next(depth for depth in (255.0, 65535.0, high) if high <= depth)

    def to_grey8(rows: Image.Image) -> Image.Image:
        values = np.asarray(rows).astype(np.float32)
        values *= np.float32(255.0 / full)
        return Image.fromarray(np.rint(values, out=values).astype(np.uint8))

    return to_grey8
