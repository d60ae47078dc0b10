"""Finding photos, with the captions, crops and masks beside them.

What a photo can do wrong is found here, before any training: `find_photos` decodes every file with the very code
that training uses, so a photo that passes will also load.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from PIL import Image

from ..errors import PhotoError, shown
from .cropping import BAR_COPY, Cropping, check_cropping, focus_of, without_black_bars
from .faces import face_of
from .masks import MASK_ENDING, MaskSource, find_mask, is_mask_name, mask_greys
from .opening import FORMATS, begins_like_a_photo, opened
from .photo import Photo, PhotoSet, Region, Skipped, Unusable, box
from .sidecars import CROPS_FILE, caption_of, fractions, read_crops
from .to_srgb import rgb_copy, row_strips, upright_size

MAX_ASPECT = 4.0  # long side / short side
ENOUGH = 2 * BAR_COPY  # pixels of the long side of the copy that is looked at, at least; the whole photo was decoded for it
SYSTEM_FILES = {"thumbs.db", "desktop.ini", "ehthumbs.db"}
LONELY_MASK = f"a mask without a photo of that name (photo{MASK_ENDING} is for photo.jpg)"


@dataclass(frozen=True)
class Told:
    """What the user says of photos."""

    regions: Mapping[str, Region]  # by file name
    masks: Mapping[str, MaskSource]
    crop: Cropping
    min_side: int  # pixels


def find_photos(
    source: Path | str | Sequence[Path | str],
    *,
    crop: Cropping = "smart",
    crops: Mapping[str, Region] | None = None,
    masks: Mapping[str, MaskSource] | None = None,
    minimum: int = 3,
    maximum: int = 100,
    min_side: int = 64,
) -> PhotoSet:
    """Find the usable photos of a folder (or of a list of files), and say of every other file why it is not used.

    source     a folder: its files in natural order (img2 before img10), subfolders not entered; or files, in their order
    crop       "smart": the square that keeps the subject, black bars cut away; "face": likewise, and the largest face of
               a person whole in it (needs OpenCV: `lora-booth[vision]`); "center": the one in the middle.
               A photo with a crop of its own (below) is cut there, in the middle.
    crops      file name -> (x0, y0, x1, y1), fractions 0..1 of the upright photo, or pixels if any value is above 1.
               They come before those of a `crops.json` in the folder, which has the same form.
    masks      file name -> a file or a PIL image of the upright photo's shape, white where the subject is.
               They come before a `photo.mask.png` beside photo.jpg.
    minimum    usable photos needed
    maximum    usable photos accepted, so that a whole camera roll is not taken by mistake
    min_side   pixels; the short side of a photo (or of its crop) may not be smaller
    raises     PhotoError: no such folder, too few or too many photos, a crop, mask or caption that cannot be right
    """
    check_cropping(crop)
    if minimum < 1 or maximum < minimum:
        raise PhotoError(f"minimum {minimum}, maximum {maximum}; needed: 1 <= minimum <= maximum")
    where, candidates, skipped, regions = _listing(source)
    regions.update(crops or {})
    _check_names(where, "crop", regions, candidates)
    _check_names(where, "mask", masks or {}, candidates)
    told = Told(regions, masks or {}, crop, min_side)
    if len(candidates) > maximum:  # a glance at each file, so that 10,000 photos are not decoded first
        _check_not_too_many(where, sum(begins_like_a_photo(path) for path in candidates), maximum)
    photos: list[Photo] = []
    first_with: dict[str, str] = {}  # digest of file or pixels, and crop -> the first photo that has it
    for path in candidates:
        try:
            photos.append(_check(path, told, first_with))
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
    files = [Path(path) for path in source]
    stems = _photo_stems(files)
    candidates, skipped = [], []
    for path in files:
        if not path.exists():
            raise PhotoError(f"{shown(path)}: no such file")
        if path.is_dir():
            skipped.append(Skipped(path, "a folder"))
        elif not is_mask_name(path):
            candidates.append(path)
        elif path.name[: -len(MASK_ENDING)] not in stems:
            skipped.append(Skipped(path, LONELY_MASK))
    return f"{len(candidates)} files", candidates, skipped, {}


def _folder_listing(folder: Path) -> tuple[str, list[Path], list[Skipped], dict[str, Region]]:
    where = shown(folder)
    try:
        root = folder.resolve(strict=True)
        files = sorted(folder.iterdir(), key=_natural)
    except (OSError, RuntimeError) as error:
        raise PhotoError(f"{where}: the folder cannot be read ({type(error).__name__}); check its permissions") from None
    stems = _photo_stems(files)
    candidates: list[Path] = []
    skipped: list[Skipped] = []
    regions: dict[str, Region] = {}
    for path in files:
        if (reason := _unfit_entry(path, root)) is not None:
            skipped.append(Skipped(path, reason))
        elif path.name == CROPS_FILE:
            regions = read_crops(path)
        elif is_mask_name(path):
            if not path.name.endswith(MASK_ENDING) or path.name[: -len(MASK_ENDING)] not in stems:
                skipped.append(Skipped(path, LONELY_MASK))
        elif path.suffix.lower() != ".txt":
            candidates.append(path)
        elif path.stem not in stems:
            skipped.append(Skipped(path, "a caption without a photo of that name"))
    return where, candidates, skipped, regions


def _photo_stems(files: Iterable[Path]) -> set[str]:
    """Names without ending of what captions and masks can belong to."""
    return {path.stem for path in files if path.suffix.lower() != ".txt" and not is_mask_name(path)}


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


def _check(path: Path, told: Told, first_with: dict[str, str]) -> Photo:
    """Decode the whole photo. Raises Unusable with the reason, PhotoError for what beside it cannot be right."""
    region = told.regions.get(path.name)
    with opened(path) as (image, kind, digest):
        # Two crops of one picture are two photos; the same picture with the same crop is one.
        file_key = f"{digest} {region}"
        if file_key in first_with:
            raise Unusable(f"the same file as {first_with[file_key]}")
        several = bool(getattr(image, "is_animated", False)) and kind != "JPEG"  # JPEG: a preview or a second lens
        rgb = rgb_copy(image, max(1, max(image.size) // ENOUGH))
        width, height = upright_size(image)
    crop = None if region is None else fractions(path, region, width, height)
    unfit = _unfit_size(width, height, crop, told.min_side)
    if unfit is not None and crop is not None:
        raise PhotoError(f"crop of {shown(path.name)}: {unfit}; choose a larger region")
    if unfit is not None:
        raise Unusable(unfit)
    pixel_key = f"{_pixel_digest(rgb)} {crop}"  # finds copies saved anew without loss, too
    if pixel_key in first_with:
        raise Unusable(f"the same picture as {first_with[pixel_key]}")
    caption, notes = caption_of(path), []
    if several:
        notes.append("several pages: first one only" if kind in ("TIFF", "HEIC") else "animated: first frame only")
    if told.crop != "center" and crop is None and (inner := without_black_bars(rgb)) is not None:
        if _unfit_size(width, height, inner, told.min_side) is None:
            crop = inner
            notes.append("black bars cut away")
    mask = find_mask(path, told.masks, width, height, crop)
    focus = face = None
    if told.crop == "face" and region is None and mask is None and (face := face_of(rgb, crop)) is None:
        notes.append("no face found")
    if told.crop != "center" and region is None:
        focus = focus_of(rgb, crop, None if mask is None else mask_greys(mask, shown(path.name)), face)
    first_with[file_key] = first_with[pixel_key] = shown(path.name)
    return Photo(path, width, height, caption, crop, digest, "; ".join(notes) or None, focus, mask)


def _unfit_size(width: int, height: int, crop: Region | None, min_side: int) -> str | None:
    """What is wrong with the size of a photo or of its crop, in pixels; None: nothing."""
    x0, y0, x1, y1 = box(width, height, crop)
    short, long = sorted((x1 - x0, y1 - y0))
    if short < min_side:
        return f"{x1 - x0}x{y1 - y0} px; the short side needs {min_side}"
    return f"{x1 - x0}x{y1 - y0} px is longer than {MAX_ASPECT:g}:1" if long > MAX_ASPECT * short else None


def _check_names(where: str, what: str, given: Mapping[str, object], candidates: Sequence[Path]) -> None:
    unknown = sorted(set(given) - {path.name for path in candidates})
    if unknown:
        raise PhotoError(f"{where}: a {what} for {shown(unknown[0])!r}, but there is no such photo; mend the name")


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
