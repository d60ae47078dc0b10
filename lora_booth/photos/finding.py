"""Find the usable photos of a folder, with their captions, crops and masks.

Every file is decoded here by the code that training uses, so a photo that passes also loads later.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal, get_args

from ..config import as_type, typed
from ..errors import PhotoError, listed, one_line, setting, shown
from ..files import read_json
from .captioning import Captioner
from .cropping import BAR_COPY, MAX_ASPECT, Cropping, box, focus_of, without_black_bars
from .masks import MaskSource, Segmenter, given_mask, own_mask, rembg_segmenter, sure_mask
from .opening import FORMATS, begins_like_a_photo, opacity, opened, upright_copy, upright_size
from .photo import CropRegion, Photo, PhotoSet, Skipped, Unusable

MANY = 1000  # photos that may be looked at, as opposed to trained on; chosen
MIN_SIDE = 64  # pixels of the short side of a photo or its crop; chosen: an eighth of SD 1.x's resolution
MAX_TEXT_BYTES = 2**20  # of a caption or crops.json; chosen
MAX_CAPTION = 2000  # characters; chosen; the text encoder reads about the first 300
CROPS_FILE = "crops.json"
CAPTION_ENDING = ".txt"
CAPTIONS_ELSEWHERE = (".caption", ".captions", ".cap", ".tag", ".tags", ".json", ".jsonl", ".csv", ".tsv")  # of other trainers
MASK_ENDING = ".mask.png"
ENOUGH = 2 * BAR_COPY  # pixels, at least, of the long side of the copy that is searched for bars and salient places
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}


def find_photos(
    source: Path | str | Sequence[Path | str],
    *,
    crop: Cropping = "smart",
    crops: Mapping[str, CropRegion] | None = None,
    masks: Mapping[str, MaskSource] | Segmenter | Literal["auto"] | None = None,
    captioner: Captioner | None = None,
    minimum: int = 3,
    maximum: int = 100,
) -> PhotoSet:
    """Find the usable photos of a folder (or of a list of files), and why each of the other files is skipped.

    source     a folder: its files in natural order (img2 before img10), without subfolders; or files, in their order
    the rest   as for `Subject.from_folder`; a photo with an entry in `crops` is cut there, in the middle
    raises     PhotoError: no such folder, too few or too many photos, an invalid crop, mask or caption
    """
    if crop not in get_args(Cropping):
        own = "for squares of your own, e.g. of faces, write crops.json or masks beside the photos"
        raise PhotoError(f"crop {shown(crop)!r} is unknown; allowed: {', '.join(get_args(Cropping))}; {own}")
    minimum, maximum = typed("minimum", minimum, int), typed("maximum", maximum, int)
    kinds: Any = Mapping | Literal["auto"] | Callable
    crops, masks = typed("crops", crops or {}, Mapping), typed("masks", masks or {}, kinds)
    captioner = typed("captioner", captioner, Callable | None)
    if minimum < 1 or maximum < minimum:
        raise PhotoError(f"minimum {minimum}, maximum {maximum}; needed: 1 <= minimum <= maximum")
    where, candidates, skipped, regions = _listing(source)
    regions.update(crops)
    given: Mapping[str, MaskSource] = masks if isinstance(masks, Mapping) else {}
    _check_names(where, "crop", regions, candidates)
    _check_names(where, "mask", given, candidates)
    if len(candidates) > maximum:  # by their first bytes, so that 10,000 photos are not decoded first
        _check_not_too_many(where, sum(begins_like_a_photo(path) for path in candidates), maximum)
    segmenter: Any = None if isinstance(masks, Mapping) else rembg_segmenter() if masks == "auto" else masks
    photos: list[Photo] = []
    first_with: dict[str, str] = {}  # digest of file or pixels, and crop -> the first photo that has it
    for path in candidates:
        try:
            photos.append(_check(path, regions.get(path.name), given.get(path.name), crop, first_with, segmenter, captioner))
        except Unusable as error:
            captions = "; captions belong in photo.txt beside photo.jpg" if path.suffix.lower() in CAPTIONS_ELSEWHERE else ""
            skipped.append(Skipped(path, f"{error}{captions}"))
        _check_not_too_many(where, len(photos), maximum)
    if len(photos) < minimum:
        raise PhotoError(_too_few(where, len(photos), minimum, skipped))
    return PhotoSet(tuple(photos), tuple(skipped))


def _natural(path: Path) -> tuple[list[str], str]:
    """A sort key in which numbers count as numbers: img2 before img10."""
    parts = re.split(r"([0-9]+)", path.name.lower())
    return [part.zfill(300) if part.isdecimal() else part for part in parts], path.name


def _listing(source: Path | str | Sequence[Path | str]) -> tuple[str, list[Path], list[Skipped], dict[str, CropRegion]]:
    """The source's name for messages, the files worth opening, the others with reasons, and the crops of crops.json."""
    if not str(source):
        raise PhotoError("no photos: the folder's name is empty; pass a folder with photos")
    given = typed("photos", source, Path | tuple[Path, ...])  # type: ignore[arg-type]
    where = shown(given) if isinstance(given, Path) else f"{len(given)} files"
    files, root = [given] if isinstance(given, Path) else list(given), None
    for path in files:
        if not os.path.exists(path):  # Path.exists raises where the name is too long
            raise PhotoError(f"{shown(path)}: no such folder or file; check the name")
    if isinstance(given, Path) and given.is_dir():
        try:
            files, root = sorted(given.iterdir(), key=_natural), given.resolve(strict=True)
        except (OSError, RuntimeError) as error:
            raise PhotoError(f"{where}: the folder cannot be read ({type(error).__name__}); check its permissions") from None
    photos = [path for path in files if not is_sidecar(path)]
    used = {sidecar(path, ending) for path in photos for ending in (CAPTION_ENDING, MASK_ENDING)}
    candidates: list[Path] = []
    skipped: list[Skipped] = []
    regions: dict[str, CropRegion] = {}
    for path in files:
        if (reason := _unfit_entry(path, root)) is not None:
            skipped.append(Skipped(path, reason))
        elif root is not None and path.name.lower() == CROPS_FILE:
            regions = read_crops(path)
        elif not is_sidecar(path):
            candidates.append(path)
        elif path not in used and not any(os.path.samefile(path, one) for one in used if one):  # names differ in case only
            what, ending = ("caption", CAPTION_ENDING) if path.suffix.lower() == CAPTION_ENDING else ("mask", MASK_ENDING)
            skipped.append(Skipped(path, f"a {what} without a photo of that name (photo{ending} is for photo.jpg)"))
    return where, candidates, skipped, regions


def _unfit_entry(path: Path, root: Path | None) -> str | None:
    """Why a file is skipped; None: it is worth opening. root: the folder that was listed, without links; None: files were"""
    if root is not None and path.name.startswith("."):
        return "hidden"
    if root is not None and path.name.lower() in SYSTEM_FILES:
        return "a system file"
    if root is not None and path.is_symlink():
        try:
            if root not in path.resolve(strict=True).parents:
                return "a link that leaves the folder"
        except (OSError, RuntimeError):  # RuntimeError: a loop, before Python 3.13
            return "a broken link"
    return "a folder" if path.is_dir() else None


def _check(
    path: Path,
    region: CropRegion | None,
    mask_source: MaskSource | None,
    cropping: Cropping,
    first_with: dict[str, str],
    segmenter: Segmenter | None,
    captioner: Captioner | None,
) -> Photo:
    """Decode all of the photo. Raises Unusable with the reason, PhotoError for an invalid crop, mask or caption."""
    with opened(path) as (image, kind, digest):
        # Two crops of one picture are two photos; the same picture with the same crop is one.
        file_key = f"{digest} {region}"
        if file_key in first_with:
            raise Unusable(f"the same file as {first_with[file_key]}")
        # an MPO is a JPEG with a preview or the picture of a second lens
        several = bool(getattr(image, "is_animated", False)) and kind not in ("JPEG", "MPO")
        smaller = max(1, max(image.size) // ENOUGH)
        rgb, opaque = upright_copy(image, smaller=smaller), opacity(image, smaller=smaller)
        width, height = upright_size(image)
    crop = None if region is None else fractions(path, region, width, height)
    unfit = _unfit_size(width, height, crop)
    if unfit is not None and crop is not None:
        raise PhotoError(f"crop of {shown(path.name)}: {unfit}; choose a larger region")
    if unfit is not None:
        raise Unusable(unfit)
    pixels = hashlib.sha256(rgb.tobytes()).hexdigest()
    pixel_key = f"{width}x{height} {pixels} {crop}"  # also finds copies that were saved again without loss
    if pixel_key in first_with:
        raise Unusable(f"the same picture as {first_with[pixel_key]}")
    caption, notes = caption_of(path), []
    if several:
        notes.append("several pages: first one only" if kind in ("TIFF", "HEIF") else "animated: first frame only")
    if cropping == "smart" and crop is None and (inner := without_black_bars(rgb)) is not None:
        if _unfit_size(width, height, inner) is None:
            crop = inner
            notes.append("black bars cut away")
    source = mask_source or sidecar(path, MASK_ENDING)
    if source is not None:
        found: Any = given_mask(source, path, width, height, crop)
    elif (found := own_mask(opaque, crop)) is not None:
        notes.append("mask: its transparency")
    elif segmenter is not None:
        found = sure_mask(rgb, crop, segmenter, shown(path.name))
        notes.append(f"no mask: {found}" if isinstance(found, str) else "mask: by the segmenter")
    mask, greys = (None, None) if found is None or isinstance(found, str) else found
    if caption is None and captioner is not None:
        caption = checked_caption(captioner(rgb), f"by the captioner for {shown(path.name)}")
    focus = focus_of(rgb, crop, greys) if cropping == "smart" and region is None else None
    first_with[file_key] = first_with[pixel_key] = shown(path.name)
    return Photo(path, width, height, caption, crop, digest, "; ".join(notes) or None, focus, mask)


def _unfit_size(width: int, height: int, crop: CropRegion | None) -> str | None:
    """What is wrong with the size of a photo (pixels) or of its crop; None: nothing."""
    x0, y0, x1, y1 = box(width, height, crop)
    short, long = sorted((x1 - x0, y1 - y0))
    if short < MIN_SIDE:
        return f"{x1 - x0}x{y1 - y0} px; the short side needs {MIN_SIDE}"
    return f"{x1 - x0}x{y1 - y0} px is longer than {MAX_ASPECT:g}:1" if long > MAX_ASPECT * short else None


def _check_names(where: str, what: str, given: Mapping[str, object], candidates: Sequence[Path]) -> None:
    unknown = sorted(set(given) - {path.name for path in candidates})
    if unknown:
        raise PhotoError(f"{where}: a {what} for {shown(unknown[0])!r}, but there is no such photo; check the name")


def _check_not_too_many(where: str, count: int, maximum: int) -> None:
    if count > maximum:
        remedy = f"choose the best 5 to 30, or pass {setting('maximum=N', option='--max-photos N')}"
        raise PhotoError(f"{where}: more than {maximum} photos; {remedy}")


def _too_few(where: str, count: int, minimum: int, skipped: Sequence[Skipped]) -> str:
    by_reason: dict[str, list[str]] = {}
    for one in skipped:
        by_reason.setdefault(one.reason, []).append(one.name)

    # remedies first; hidden and system files explain nothing, so they come last and are the first to be left out
    groups = sorted(by_reason.items(), key=lambda one: ("pip install" not in one[0], one[0] in ("hidden", "a system file")))
    reasons = [f"{listed(names, 2)}: {reason}" for reason, names in groups[:6]]
    if len(groups) > 6:
        reasons.append(f"and {sum(len(names) for _, names in groups[6:])} more")
    usable = "no usable photo" if count == 0 else f"{count} usable photo{'s' if count > 1 else ''}"
    why = f"; skipped: {'; '.join(reasons)}" if reasons else ""
    anyway = "" if count == 0 else f", or pass {setting('minimum', count, option=f'--min-photos {count}')}"
    return f"{where}: {usable}, {minimum} needed{why}; add photos ({FORMATS}){anyway}"


# --- sidecars: a caption (photo.txt), a mask (photo.mask.png), and crops.json for all photos ---------------------------


def sidecar(path: Path, ending: str) -> Path | None:
    """The file photo`ending` beside photo.jpg; None if there is none, or only a link out of the folder."""
    for beside in (path.with_name(path.stem + ending), path.with_name(path.stem + ending.upper())):
        if os.path.isfile(beside):  # Path.is_file raises where the name is too long for the file system
            inside = not beside.is_symlink() or path.parent.resolve() in beside.resolve().parents
            return beside if inside else None  # a link is already in the list of skipped files
    return None


def is_sidecar(path: Path) -> bool:
    """A caption or a mask by its name: also photo.mask.jpg, which nothing uses, but which is no photo either."""
    return path.suffix.lower() == CAPTION_ENDING or path.stem.lower().endswith(".mask")


# --- captions -------------------------------------------------------------------------------------------------------


def caption_of(path: Path) -> str | None:
    """The text of photo.txt beside photo.jpg, in one line; None without one or when it is empty."""
    beside = sidecar(path, CAPTION_ENDING)
    if beside is None:
        return None
    name = shown(beside.name)
    try:
        with beside.open("rb") as file:
            text = file.read(MAX_TEXT_BYTES).decode("utf-8-sig")
    except (OSError, UnicodeDecodeError) as error:
        what = f"cannot be read as UTF-8 text ({type(error).__name__})"
        raise PhotoError(f"caption {name}: {what}; save it as UTF-8, or check its permissions") from None
    return checked_caption(text, name)


def checked_caption(text: Any, name: str) -> str | None:
    """A caption without line ends and control characters; None if nothing is left. Raises PhotoError."""
    if not isinstance(text, str):
        raise PhotoError(f"caption {name}: {type(text).__name__}; needed: a string")
    text = one_line(text, MAX_TEXT_BYTES)
    if len(text) > MAX_CAPTION:
        raise PhotoError(f"caption {name}: {len(text)} characters; at most {MAX_CAPTION}, of which about 300 are read")
    return text or None


# --- crops ----------------------------------------------------------------------------------------------------------


def read_crops(path: Path) -> dict[str, CropRegion]:
    """crops.json: {"name.jpg": [x0, y0, x1, y1]}; the numbers are checked once the photo's size is known."""
    form = 'needed: {"name.jpg": [x0, y0, x1, y1]}'
    try:
        crops = read_json(path, most=MAX_TEXT_BYTES)
    except (OSError, ValueError) as error:
        raise PhotoError(f"{shown(path)}: not JSON ({shown(error)[:80]}); {form}") from None
    if not isinstance(crops, dict):
        raise PhotoError(f"{shown(path)}: {form}")
    return crops


def fractions(path: Path, region: Any, width: int, height: int) -> CropRegion:
    """A user's crop as fractions 0..1 of the upright photo. Pixels if any value is above 1. Raises PhotoError."""
    cause = f"crop of {shown(path.name)}: {shown(region)[:80]}"
    remedy = f"needed: x0, y0, x1, y1 with x0 < x1 and y0 < y1, as fractions 0..1 or as pixels of {width}x{height}"
    numbers = as_type(region, tuple[float, ...])
    if numbers is None or len(numbers) != 4:
        raise PhotoError(f"{cause} is not four numbers; {remedy}")
    x0, y0, x1, y1 = numbers
    if max(numbers) > 1:
        x0, y0, x1, y1 = x0 / width, y0 / height, x1 / width, y1 / height
    if not (0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1):
        raise PhotoError(f"{cause} is outside the photo or empty; {remedy}")
    return x0, y0, x1, y1
