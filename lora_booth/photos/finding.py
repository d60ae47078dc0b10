"""Finding photos, with the captions and crops beside them.

What a photo can do wrong is found here, before any training: `find_photos` decodes every file with the very code
that training uses, so a photo that passes will also load.
"""

from __future__ import annotations

import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from PIL import Image

from ..errors import PhotoError, shown
from .opening import FORMATS, Unusable, begins_like_a_photo, opened, row_strips, upright_rgb
from .photo import Photo, PhotoSet, Region, Skipped, box

MAX_ASPECT = 4.0  # long side / short side
MAX_TEXT_BYTES = 2**20  # of crops.json
MAX_CAPTION = 2000  # characters; the text encoder reads about the first 300
CROPS_FILE = "crops.json"
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}


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
        _check_not_too_many(where, sum(begins_like_a_photo(path) for path in candidates), maximum)
    photos: list[Photo] = []
    first_with: dict[str, str] = {}  # digest of file or pixels, and crop -> the first photo that has it
    for path in candidates:
        try:
            photos.append(_check(path, regions.get(path.name), min_side, first_with))
        except Unusable as error:
            skipped.append(Skipped(path, str(error)))
        _check_not_too_many(where, len(photos), maximum)
    if len(photos) < minimum:
        raise PhotoError(_too_few(where, len(photos), minimum, skipped))
    return PhotoSet(tuple(photos), tuple(skipped))


def note_enlarged(photo: Photo, resolution: int) -> Photo:
    """`photo`, with a note if its short side (or that of its crop) is below the training resolution (pixels)."""
    x0, y0, x1, y1 = box(photo.width, photo.height, photo.crop)
    short = min(x1 - x0, y1 - y0)
    if short >= resolution:
        return photo
    note = f"small: {short} px, enlarged to {resolution}"
    return replace(photo, note=f"{photo.note}; {note}" if photo.note else note)


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
    """Decode the whole photo. Raises Unusable with the reason, PhotoError for a crop or caption that cannot be right."""
    with opened(path) as (image, kind, digest):
        # Two crops of one picture are two photos; the same picture with the same crop is one.
        file_key = f"{digest} {region}"
        if file_key in first_with:
            raise Unusable(f"the same file as {first_with[file_key]}")
        several = bool(getattr(image, "is_animated", False)) and kind != "JPEG"  # JPEG: a preview or a second lens
        rgb = upright_rgb(image)
    width, height = rgb.size
    crop = None if region is None else _fractions(path, region, width, height)
    x0, y0, x1, y1 = box(width, height, crop)
    short, long = sorted((x1 - x0, y1 - y0))
    unfit = None
    if short < min_side:
        unfit = f"{x1 - x0}x{y1 - y0} px; the short side needs {min_side}"
    elif long > MAX_ASPECT * short:
        unfit = f"{x1 - x0}x{y1 - y0} px is longer than {MAX_ASPECT:g}:1"
    if unfit is not None and crop is not None:
        raise PhotoError(f"crop of {shown(path.name)}: {unfit}; choose a larger region")
    if unfit is not None:
        raise Unusable(unfit)
    pixel_key = f"{_pixel_digest(rgb)} {crop}"  # finds copies saved anew without loss, too
    if pixel_key in first_with:
        raise Unusable(f"the same picture as {first_with[pixel_key]}")
    caption = _caption(path)
    first_with[file_key] = first_with[pixel_key] = shown(path.name)
    pages = "several pages: first one only" if kind in ("TIFF", "HEIC") else "animated: first frame only"
    return Photo(path, width, height, caption, crop, digest, pages if several else None)


def _pixel_digest(rgb: Image.Image) -> str:
    digest = hashlib.sha256(repr(rgb.size).encode())
    for rows in row_strips(rgb):
        digest.update(rows.tobytes())
    return digest.hexdigest()


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
