"""Photos: find, check, orient, crop, resize. The only home of the pixel range (-1..1).

What a photo can do wrong is found here, before any training: `find_photos` decodes every file with the very code
that training uses, so a photo that passes will also load. Nothing private leaves this file: `open_photo` rebuilds the
pixels, so that place, camera, comments and colour profile stay behind.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import math
import re
import stat
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from PIL import Image, ImageCms, ImageDraw, ImageFile, ImageFont

from .errors import PhotoError

if TYPE_CHECKING:
    from torch import Tensor

Region = tuple[float, float, float, float]  # x0, y0, x1, y1 as fractions 0..1 of the oriented photo

# What a file begins with decides what it is, never its name: Pillow is then allowed that one decoder only.
DECODERS = {"JPEG": "JPEG", "PNG": "PNG", "WEBP": "WEBP", "AVIF": "AVIF", "HEIC": "HEIF", "TIFF": "TIFF", "BMP": "BMP"}
FORMATS = ", ".join(DECODERS)
MAX_PIXELS = 50_000_000  # width x height; asked of the header, before anything is decoded
MAX_BYTES = 512 * 2**20  # of a photo's file
MAX_ASPECT = 4.0  # long side / short side
MAX_TEXT_BYTES = 2**20  # of crops.json
MAX_CAPTION = 2000  # characters; the text encoder reads about the first 300
CROPS_FILE = "crops.json"
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}
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


@dataclass(frozen=True)
class Photo:
    """A photo that was decoded once from end to end."""

    path: Path
    width: int  # pixels, after EXIF orientation
    height: int
    caption: str | None  # from photo.txt beside photo.jpg
    crop: Region | None  # chosen by the user
    sha256: str  # of the file's bytes
    note: str | None = None  # what the user should know, as "animated: first frame only"

    @property
    def name(self) -> str:
        """The file name, safe to show."""
        return shown(self.path.name)


@dataclass(frozen=True)
class Skipped:
    """A file that is not used, and why."""

    path: Path
    reason: str

    @property
    def name(self) -> str:
        """The file name, safe to show."""
        return shown(self.path.name)


@dataclass(frozen=True)
class PhotoSet:
    """What a folder holds: every file is in one of the two lists (captions and crops.json belong to their photos)."""

    photos: tuple[Photo, ...]
    skipped: tuple[Skipped, ...]


@dataclass(frozen=True)
class Crop:
    """Where a training square comes from, in the words of SDXL's micro-conditioning. All in pixels."""

    top: int  # of the square, in the picture resized so that its short side is the training resolution
    left: int
    original_size: tuple[int, int]  # height, width of the picture (or of the user's crop) before resizing


class _Unusable(Exception):
    """One file cannot be used; the message is the reason."""


# --- finding and checking -------------------------------------------------------------------------------------------


def find_photos(
    source: Path | str | Sequence[Path | str],
    *,
    crops: Mapping[str, Region] | None = None,
    minimum: int = 3,
    maximum: int = 100,
    min_side: int = 64,
) -> PhotoSet:
    """Find the usable photos of a folder (or of a list of files), and say of every other file why it is not used.

    source     a folder: its files in natural order (img2 before img10), subfolders not entered; or files, in their order
    crops      file name -> (x0, y0, x1, y1), fractions 0..1 of the upright photo, or pixels if any value is above 1.
               They come before those of a `crops.json` in the folder, which has the same form.
    minimum    usable photos needed
    maximum    usable photos accepted, so that a whole camera roll is not taken by mistake
    min_side   pixels; the short side of a photo (or of its crop) may not be smaller
    raises     PhotoError: no such folder, too few or too many photos, a crop or caption that cannot be right
    """
    if minimum < 1 or maximum < minimum:
        raise PhotoError(f"minimum {minimum}, maximum {maximum}; needed: 1 <= minimum <= maximum")
    where, candidates, skipped, regions = _listing(source)
    regions.update(crops or {})
    _check_crop_names(where, regions, candidates)
    if len(candidates) > maximum:  # a glance at each file, so that 10,000 photos are not decoded first
        _check_not_too_many(where, sum(_begins_like_a_photo(path) for path in candidates), maximum)
    photos: list[Photo] = []
    first_with: dict[str, str] = {}  # digest of file or pixels, and crop -> the first photo that has it
    for path in candidates:
        try:
            photos.append(_check(path, regions.get(path.name), min_side, first_with))
        except _Unusable as error:
            skipped.append(Skipped(path, str(error)))
        _check_not_too_many(where, len(photos), maximum)
    if len(photos) < minimum:
        raise PhotoError(_too_few(where, len(photos), minimum, skipped))
    return PhotoSet(tuple(photos), tuple(skipped))


def note_enlarged(photo: Photo, resolution: int) -> Photo:
    """`photo`, with a note if its short side (or that of its crop) is below the training resolution (pixels)."""
    x0, y0, x1, y1 = _box(photo.width, photo.height, photo.crop)
    short = min(x1 - x0, y1 - y0)
    if short >= resolution:
        return photo
    note = f"small: {short} px, enlarged to {resolution}"
    return replace(photo, note=f"{photo.note}; {note}" if photo.note else note)


def shown(name: object) -> str:
    """`name` safe to print: line breaks, escape codes, direction marks and stray bytes become backslash escapes."""

    def escaped(character: str) -> str:
        if character.isprintable():
            return character
        code = ord(character)
        if 0xDC80 <= code <= 0xDCFF:  # how Python keeps a byte of a file name that is not UTF-8
            return f"\\x{code - 0xDC00:02x}"
        return character.encode("unicode_escape").decode("ascii")

    return "".join(escaped(character) for character in str(name))


def _natural(path: Path) -> tuple[list[tuple[int, int, str]], str]:
    """A sort key in which numbers count as numbers: img2 before img10."""
    # [0-9], not \d: int() refuses some characters that \d matches.
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [(0, int(part[:300]), "") if part.isdecimal() and part.isascii() else (1, 0, part) for part in parts], path.name


def _listing(source: Path | str | Sequence[Path | str]) -> tuple[str, list[Path], list[Skipped], dict[str, Region]]:
    """What to call the source, the files worth opening, the others with reasons, and the crops that lie beside them."""
    if isinstance(source, (str, Path)):
        if not str(source):
            raise PhotoError("no photos: the folder's name is empty; name a folder with photos")
        folder = Path(source)
        if not folder.exists():
            raise PhotoError(f"{shown(source)}: no such folder; name a folder with photos")
        if folder.is_dir():
            return _folder_listing(folder)
        source = [folder]
    candidates, skipped = [], []
    for path in map(Path, source):
        if not path.exists():
            raise PhotoError(f"{shown(path)}: no such file")
        if path.is_dir():
            skipped.append(Skipped(path, "a folder"))
        else:
            candidates.append(path)
    return f"{len(candidates)} files", candidates, skipped, {}


def _folder_listing(folder: Path) -> tuple[str, list[Path], list[Skipped], dict[str, Region]]:
    where = shown(folder)
    try:
        root = folder.resolve(strict=True)
        files = sorted(folder.iterdir(), key=_natural)
    except (OSError, RuntimeError) as error:
        raise PhotoError(f"{where}: the folder cannot be read ({type(error).__name__}); check its permissions") from None
    stems = {path.stem for path in files if path.suffix.lower() != ".txt"}
    candidates: list[Path] = []
    skipped: list[Skipped] = []
    regions: dict[str, Region] = {}
    for path in files:
        if (reason := _unfit_entry(path, root)) is not None:
            skipped.append(Skipped(path, reason))
        elif path.name == CROPS_FILE:
            regions = _read_crops(path)
        elif path.suffix.lower() != ".txt":
            candidates.append(path)
        elif path.stem not in stems:
            skipped.append(Skipped(path, "a caption without a photo of that name"))
    return where, candidates, skipped, regions


def _unfit_entry(path: Path, root: Path) -> str | None:
    """Why an entry of the folder `root` (resolved) is not even opened; None: it may be."""
    if path.name.startswith("."):
        return "hidden"
    if path.name.lower() in SYSTEM_FILES:
        return "a system file"
    if path.is_symlink():
        try:
            if root not in path.resolve(strict=True).parents:
                return "a link that leaves the folder"
        except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
            return "a broken link"
    if path.is_dir():
        return "a folder"
    return None


def _check(path: Path, region: Region | None, min_side: int, first_with: dict[str, str]) -> Photo:
    """Decode the whole photo. Raises _Unusable with the reason, PhotoError for a crop or caption that cannot be right."""
    with _opened(path) as (image, kind, digest):
        # Two crops of one picture are two photos; the same picture with the same crop is one.
        file_key = f"{digest} {region}"
        if file_key in first_with:
            raise _Unusable(f"the same file as {first_with[file_key]}")
        several = bool(getattr(image, "is_animated", False)) and kind != "JPEG"  # JPEG: a preview or a second lens
        rgb = _upright_rgb(image)
    width, height = rgb.size
    crop = None if region is None else _fractions(path, region, width, height)
    x0, y0, x1, y1 = _box(width, height, crop)
    short, long = sorted((x1 - x0, y1 - y0))
    unfit = None
    if short < min_side:
        unfit = f"{x1 - x0}x{y1 - y0} px; the short side needs {min_side}"
    elif long > MAX_ASPECT * short:
        unfit = f"{x1 - x0}x{y1 - y0} px is longer than {MAX_ASPECT:g}:1"
    if unfit is not None and crop is not None:
        raise PhotoError(f"crop of {shown(path.name)}: {unfit}; choose a larger region")
    if unfit is not None:
        raise _Unusable(unfit)
    pixel_key = f"{_pixel_digest(rgb)} {crop}"  # finds copies saved anew without loss, too
    if pixel_key in first_with:
        raise _Unusable(f"the same picture as {first_with[pixel_key]}")
    caption = _caption(path)
    first_with[file_key] = first_with[pixel_key] = shown(path.name)
    pages = "several pages: first one only" if kind in ("TIFF", "HEIC") else "animated: first frame only"
    return Photo(path, width, height, caption, crop, digest, pages if several else None)


def _pixel_digest(rgb: Image.Image) -> str:
    digest = hashlib.sha256(repr(rgb.size).encode())
    for rows in _strips(rgb):
        digest.update(rows.tobytes())
    return digest.hexdigest()


def _strips(image: Image.Image) -> Iterator[Image.Image]:
    """The picture in strips of 256 rows, top to bottom: a whole copy of 50 megapixels costs up to 200 MB."""
    for top in range(0, image.height, 256):
        yield image.crop((0, top, image.width, min(top + 256, image.height)))


def _check_not_too_many(where: str, count: int, maximum: int) -> None:
    if count > maximum:
        raise PhotoError(
            f"{where}: more than {maximum} photos; 5 to 30 good ones teach a subject better, so choose some, "
            f"or insist with maximum=N (--max-photos N)"
        )


def _too_few(where: str, count: int, minimum: int, skipped: Sequence[Skipped]) -> str:
    by_reason: dict[str, list[str]] = {}
    for one in skipped:
        by_reason.setdefault(one.reason, []).append(one.name)

    def weight(group: tuple[str, list[str]]) -> int:
        """A remedy comes first; hidden and system files explain nothing, so they come last and drop off first."""
        return 0 if "pip install" in group[0] else 2 if group[0] in ("hidden", "a system file") else 1

    groups = sorted(by_reason.items(), key=weight)
    told = []
    for reason, names in groups[:6]:
        more = f" and {len(names) - 2} more" if len(names) > 2 else ""
        told.append(f"{', '.join(names[:2])}{more}: {reason}")
    if len(groups) > 6:
        told.append(f"and {sum(len(names) for _, names in groups[6:])} more")
    usable = "no usable photo" if count == 0 else f"{count} usable photo{'s' if count > 1 else ''}"
    message = f"{where}: {usable}, {minimum} needed"
    if told:
        message += f"; skipped: {'; '.join(told)}"
    insist = "" if count == 0 else f", or insist with minimum={count} (--min-photos {count})"
    return f"{message}; add photos ({FORMATS}){insist}"


# --- captions and crops beside the photos ---------------------------------------------------------------------------


def _caption(path: Path) -> str | None:
    """The text of photo.txt beside photo.jpg, in one line; None without one or when it is empty."""
    beside = path.with_suffix(".txt")
    if not beside.is_file():
        return None
    if beside.is_symlink() and path.parent.resolve() not in beside.resolve().parents:
        return None  # a link that leaves the folder; listed as skipped
    name = shown(beside.name)
    try:
        with beside.open("rb") as file:
            text = file.read(MAX_TEXT_BYTES).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise PhotoError(f"caption {name}: not UTF-8 text; save it as UTF-8") from None
    except OSError as error:
        raise PhotoError(f"caption {name}: cannot be read ({type(error).__name__})") from None
    text = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    if len(text) > MAX_CAPTION:
        raise PhotoError(f"caption {name}: {len(text)} characters; at most {MAX_CAPTION}, the first 300 matter")
    return text or None


def _read_crops(path: Path) -> dict[str, Region]:
    """crops.json: {"name.jpg": [x0, y0, x1, y1]}; the numbers are checked when the photo's size is known."""
    form = 'needed: {"name.jpg": [x0, y0, x1, y1]}'
    if not path.is_file() or path.stat().st_size > MAX_TEXT_BYTES:
        raise PhotoError(f"{shown(path)}: not a file of at most {MAX_TEXT_BYTES // 2**20} MB; {form}")
    try:
        crops = json.loads(path.read_text(encoding="utf-8-sig"))
    except (OSError, ValueError, RecursionError) as error:
        raise PhotoError(f"{shown(path)}: not JSON ({shown(error)[:80]}); {form}") from None
    if not isinstance(crops, dict):
        raise PhotoError(f"{shown(path)}: {form}")
    return crops


def _check_crop_names(where: str, regions: Mapping[str, Region], candidates: Sequence[Path]) -> None:
    unknown = sorted(set(regions) - {path.name for path in candidates})
    if unknown:
        raise PhotoError(f"{where}: a crop for {shown(unknown[0])!r}, but there is no such photo; mend the name")


def _fractions(path: Path, region: Any, width: int, height: int) -> Region:
    """A user's crop as fractions 0..1 of the upright photo. Pixels if any value is above 1. Raises PhotoError."""
    cause = f"crop of {shown(path.name)}: {shown(region)[:80]}"
    remedy = f"needed: x0, y0, x1, y1 with x0 < x1 and y0 < y1, as fractions 0..1 or as pixels of {width}x{height}"
    if not isinstance(region, (list, tuple)) or len(region) != 4:
        raise PhotoError(f"{cause} is not four numbers; {remedy}")
    if not all(isinstance(v, (int, float)) and not isinstance(v, bool) and math.isfinite(v) for v in region):
        raise PhotoError(f"{cause} is not four numbers; {remedy}")
    x0, y0, x1, y1 = region
    if max(region) > 1:
        x0, y0, x1, y1 = x0 / width, y0 / height, x1 / width, y1 / height
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise PhotoError(f"{cause} is outside the photo or empty; {remedy}")
    return (float(x0), float(y0), float(x1), float(y1))


def _box(width: int, height: int, crop: Region | None) -> tuple[int, int, int, int]:
    """The crop's x0, y0, x1, y1 in pixels, at least one pixel wide and high; the whole picture without a crop."""
    if crop is None:
        return (0, 0, width, height)
    x0, y0 = min(round(crop[0] * width), width - 1), min(round(crop[1] * height), height - 1)
    return (x0, y0, max(round(crop[2] * width), x0 + 1), max(round(crop[3] * height), y0 + 1))


# --- opening --------------------------------------------------------------------------------------------------------


def open_photo(photo: Photo) -> Image.Image:
    """The photo as an upright RGB picture in sRGB, (width, height) = (photo.width, photo.height), nothing but pixels.

    A colour profile is converted to sRGB, transparency is laid on white, 16-bit and float greys are scaled to 8 bits.
    Raises PhotoError if the file is gone, cannot be read any more, or changed since it was found.
    """
    try:
        with _opened(photo.path) as (image, _, digest):
            if digest != photo.sha256:
                raise _Unusable("the file changed since it was checked; start again")
            return _upright_rgb(image)
    except _Unusable as error:
        raise PhotoError(f"{shown(photo.path)}: {error}") from None


@contextmanager
def _opened(path: Path) -> Iterator[tuple[Image.Image, str, str]]:
    """The picture (header read, not decoded), its format and the file's sha256. Raises _Unusable, whatever is wrong."""
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a FIFO or a device could block for ever
            raise _Unusable("not a regular file")
        if status.st_size == 0:
            raise _Unusable("empty (0 bytes)")
        if status.st_size > MAX_BYTES:
            raise _Unusable(f"larger than {MAX_BYTES // 2**20} MB")
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
                    raise _Unusable(_too_many_pixels(image.width, image.height))
                yield image, kind, digest.hexdigest()
    except (_Unusable, PhotoError):
        raise
    except Image.DecompressionBombError:
        raise _Unusable(f"more than {MAX_PIXELS // 10**6} megapixels; make it smaller") from None
    except PermissionError:
        raise _Unusable("no permission to read it") from None
    except FileNotFoundError:
        raise _Unusable("no such file") from None
    # Decoders of strangers' files raise nearly anything: OSError, SyntaxError, ValueError, struct.error, zlib.error ...
    except Exception as error:
        raise _Unusable(f"damaged or truncated ({_short(error)})") from None


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


def _begins_like_a_photo(path: Path) -> bool:
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
    """The one Pillow decoder that may read the file. Raises _Unusable."""
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
    raise _Unusable(reason)


# --- to upright 8-bit sRGB ------------------------------------------------------------------------------------------


def _upright_rgb(image: Image.Image) -> Image.Image:
    """Decode; orientation, colour profile, transparency and bit depth resolved; only pixels are left."""
    image.load()
    # Asked for after decoding: Pillow's TIFF and HEIC decoders turn the picture themselves and drop the tag then.
    try:
        turn = UPRIGHT.get(image.getexif().get(0x0112, 1))
    except Exception:  # a broken EXIF block says nothing about the pixels
        turn = None
    rgb = _srgb_on_white(image)
    if turn is not None:
        rgb = rgb.transpose(turn)
    clean = Image.new("RGB", rgb.size)
    clean.paste(rgb)  # pixels only: what Pillow carries along in info and EXIF stays behind
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
        raise _Unusable(f"colour mode {shown(image.mode)}; save it as RGB")
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
    extremes = np.array([(rows.min(), rows.max()) for rows in map(np.asarray, _strips(image))], dtype=np.float64)
    low, high = float(extremes[:, 0].min()), float(extremes[:, 1].max())
    if not (math.isfinite(low) and math.isfinite(high)):
        raise _Unusable("holds NaN or infinite values; save it as an 8-bit picture")
    if low < 0:
        raise _Unusable("holds negative values; save it as an 8-bit picture")
    if image.mode.startswith("I;16"):
        full = 65535.0
    elif image.mode == "F" and high <= 1:
        full = 1.0
    else:  # the depth is not written anywhere: the usual depth that holds the maximum, else the maximum itself
        full = next(depth for depth in (255.0, 65535.0, high) if high <= depth)
    strips = (np.asarray(rows).astype(np.float32) * np.float32(255.0 / full) for rows in _strips(image))
    return Image.fromarray(np.concatenate([np.rint(rows).astype(np.uint8) for rows in strips]))


# --- to training squares --------------------------------------------------------------------------------------------


def crop_and_resize(image: Image.Image, resolution: int, crop: Region | None = None) -> tuple[Image.Image, Crop]:
    """The centre square of the picture (or of the user's `crop`, fractions 0..1), resolution x resolution pixels.

    A large photo is first averaged over whole pixels (area) and then resampled with Lanczos, so that fine patterns
    fade instead of turning into false ones; a small one is enlarged with Lanczos; one of the right size is unchanged.

    SDXL is told how a training picture was cut, as diffusers' SDXL DreamBooth script tells it with a centre crop:
    `original_size` is (height, width) before resizing; (`top`, `left`) is the square's corner in the picture resized
    so that its short side is `resolution`. So a 1000 x 800 (w x h) photo at 512 is 640 x 512 when resized, and its
    square begins at (0, 64). With a user's crop, the crop is the picture: what lies outside was never shown.
    """
    x0, y0, x1, y1 = _box(image.width, image.height, crop)
    width, height = x1 - x0, y1 - y0
    side = min(width, height)
    left, top = x0 + (width - side) // 2, y0 + (height - side) // 2
    # Cut first: resampling inside a larger picture would let pixels from outside the square bleed in at its edge.
    square = image.crop((left, top, left + side, top + side))
    if side != resolution:
        square = square.resize((resolution, resolution), Image.Resampling.LANCZOS, reducing_gap=2.0)
    resized_width = resolution * width // side
    resized_height = resolution * height // side
    return square, Crop(
        top=round((resized_height - resolution) / 2),
        left=round((resized_width - resolution) / 2),
        original_size=(height, width),
    )


def to_tensor(images: Sequence[Image.Image]) -> Tensor:
    """RGB pictures of one size (W x H) -> (N, 3, H, W) float32 in -1..1, on the CPU. Raises PhotoError."""
    import torch

    if not images:
        raise PhotoError("no pictures to make a tensor of; pass at least one")
    sizes = sorted({image.size for image in images})
    if len(sizes) > 1:
        raise PhotoError(f"pictures of different sizes, as {sizes[0]} and {sizes[1]}; crop_and_resize them first")
    pixels = np.stack([np.asarray(image.convert("RGB")) for image in images])  # (N, H, W, 3) uint8
    return torch.from_numpy(pixels).permute(0, 3, 1, 2).contiguous().float() / 127.5 - 1.0


def to_images(pixels: Tensor) -> list[Image.Image]:
    """(N, 3, H, W) floats in -1..1 (clamped) -> N RGB pictures; the exact inverse of `to_tensor`.

    Raises PhotoError on NaN or infinite values, which would come out black.
    """
    pixels = pixels.detach().float().cpu()
    if not bool(pixels.isfinite().all()):
        raise PhotoError("the picture holds NaN or infinite values; decode it in fp32 or bf16 instead of fp16")
    bytes_ = ((pixels.clamp(-1, 1) + 1) * 127.5).round().byte().permute(0, 2, 3, 1).contiguous().numpy()
    return [Image.fromarray(one) for one in bytes_]


# --- contact sheet --------------------------------------------------------------------------------------------------


def contact_sheet(
    images: Sequence[Image.Image], *, labels: Sequence[str] | None = None, columns: int = 5, side: int = 160
) -> Image.Image:
    """A grid of pictures, each fitted into side x side pixels, with a wrapped label (at most 3 lines) below it."""
    if not images:
        raise PhotoError("no pictures for a contact sheet; pass at least one")
    if labels is not None and len(labels) != len(images):
        raise PhotoError(f"{len(labels)} labels for {len(images)} pictures; pass one label a picture")
    gap, size = 8, 12  # pixels
    line = size + 3
    font = ImageFont.load_default(size)
    wrapped = [_wrap(shown(label), font, side) for label in labels] if labels is not None else [[] for _ in images]
    columns = max(1, min(columns, len(images)))
    text_height = line * max(len(lines) for lines in wrapped)
    cell = (side + gap, side + text_height + gap)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = gap + index % columns * cell[0], gap + index // columns * cell[1]
        scale = side / max(image.size)
        fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.convert("RGB")
        if fitted != small.size:
            small = small.resize(fitted, Image.Resampling.LANCZOS, reducing_gap=2.0)
        sheet.paste(small, (left + (side - fitted[0]) // 2, top + (side - fitted[1]) // 2))
        for row, text in enumerate(lines):
            draw.text((left, top + side + 2 + row * line), text, fill=(30, 30, 30), font=font)
    return sheet


def _wrap(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3) -> list[str]:
    """`text` in lines of at most `width` pixels, broken at spaces where there are any; at most `most` lines."""
    lines: list[str] = []
    rest = " ".join(text.split())[:500]
    while rest and len(lines) < most:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > width:
            end -= 1
        if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
            end = space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines[-1] = f"{last}..."
    return lines
