"""Opening a photo: the format by its content, and strict decoding."""

from __future__ import annotations

import hashlib
import importlib
import stat
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from PIL import Image, ImageFile

from ..errors import PhotoError, shown
from .photo import Photo, Unusable
from .to_srgb import rgb_copy

# What a file begins with decides what it is, never its name: Pillow is then allowed that one decoder only.
DECODERS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WEBP", "AVIF": "AVIF", "HEIC": "HEIF", "TIFF": "TIFF", "BMP": "BMP"}
FORMATS = ", ".join(DECODERS)
MAX_PIXELS = 50_000_000  # width x height; asked of the header, before anything is decoded
MAX_BYTES = 512 * 2**20  # of a photo's file
RAW_SUFFIXES = {".dng", ".cr2", ".nef", ".nrw", ".arw", ".sr2", ".pef", ".srw", ".rw2", ".orf", ".3fr", ".iiq"}


def open_photo(photo: Photo, *, smaller: int = 1) -> Image.Image:
    """The photo as an upright RGB picture in sRGB, (width, height) = (photo.width, photo.height), nothing but pixels.

    smaller  each side is that many times smaller, rounded up: every pixel the mean of a square of them

    A colour profile is converted to sRGB, transparency is laid on white, 16-bit and float greys are scaled to 8 bits.
    Raises PhotoError if the file is gone, cannot be read any more, or changed since it was found.
    """
    try:
        with opened(photo.path) as (image, _, digest):
            if digest != photo.sha256:
                raise Unusable("the file changed since it was checked; start again")
            return rgb_copy(image, smaller)
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
