"""Audit: what a subject's photos will teach, and what to change."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from PIL import Image

from ..config import PhotoShape, typed, written
from ..errors import PhotoError, listed
from . import measures as m
from .cropping import WidthHeight, crop_box, crop_photo, picture_sizes
from .measures import Likeness, Measures, likeness, measure
from .photo import Photo, Skipped
from .sheet import contact_sheet

SHEET_SIDE = 160  # pixels of the long side of a crop on the contact sheet
PALE = 0.7  # share of white, on the sheet, over what a mask leaves out; chosen
FEW, MANY = 5, 30  # photos; chosen: fewer repeat themselves, more add little
MOST = 0.6  # share of the photos with one background that is worth a line of advice; chosen
MOST_COMPARED = 300  # photos, since each is compared with every other; chosen


@dataclass(frozen=True)
class PhotoReport:
    """One photo as training sees it."""

    photo: Photo
    notes: tuple[str, ...]
    measures: Measures
    size: WidthHeight  # that it is cropped and resized to
    kept: float | None  # share of the mask that is inside the crop; None without a mask
    thumbnail: Image.Image = field(compare=False, repr=False)  # the training picture, small; pale outside its mask


@dataclass(frozen=True)
class Audit:
    """Which photos are used, which are not and why, and what might be wrong with them. Nothing here stops training."""

    resolution: int  # pixels
    shape: PhotoShape
    photos: tuple[PhotoReport, ...]
    skipped: tuple[Skipped, ...]
    near_duplicates: tuple[tuple[str, ...], ...]  # file names, in groups
    alike_backgrounds: tuple[str, ...]  # file names of the largest group with one background, if that is most photos
    advice: tuple[str, ...]

    def __str__(self) -> str:
        """A line for each photo, skipped file and piece of advice, as `lora-booth photos` prints it."""
        lines = []
        for report in self.photos:
            photo = report.photo
            remarks = f"  ({'; '.join(report.notes)})" if report.notes else ""
            size = "" if self.shape == "square" else f"  at {written(report.size)}"
            lines.append(f"used     {photo.name}  {photo.width} x {photo.height}{size}{remarks}")
        lines += [f"skipped  {one.name}  {one.reason}" for one in self.skipped]
        lines += [f"advice   {line}" for line in self.advice]
        lines += [f"judged   at {self.resolution} px", f"{len(self.photos)} used, {len(self.skipped)} skipped"]
        return "\n".join(lines)

    def __repr__(self) -> str:
        counts = f"{len(self.photos)} photos at {self.resolution} px, {len(self.skipped)} files skipped"
        return f"Audit({counts}, {len(self.advice)} lines of advice; print it)"

    def sheet(self, *, columns: int = 5) -> Image.Image:
        """A contact sheet of the training pictures."""
        labels = ["; ".join([report.photo.name, *report.notes]) for report in self.photos]
        return contact_sheet([r.thumbnail for r in self.photos], labels=labels, columns=columns, side=SHEET_SIDE)

    def as_dict(self) -> dict[str, Any]:
        """Everything as numbers, lists and file names without folders, ready for JSON."""
        return {
            "resolution": self.resolution,
            "shape": self.shape,
            "photos": [_facts_of(report) for report in self.photos],
            "skipped": [{"name": one.name, "reason": one.reason} for one in self.skipped],
            "near_duplicates": [list(group) for group in self.near_duplicates],
            "alike_backgrounds": list(self.alike_backgrounds),
            "advice": list(self.advice),
        }


def audit_photos(
    photos: Sequence[Photo], skipped: Sequence[Skipped] = (), *, resolution: int = 512, shape: PhotoShape = "square"
) -> Audit:
    """Look at every photo as training sees it. Raises PhotoError if one can no longer be opened.

    resolution, shape  as in the TrainingConfig
    """
    if not photos:
        raise PhotoError("no photos to audit; pass at least one, from find_photos")
    resolution = typed("resolution", resolution, int)
    if resolution < 8:
        raise PhotoError(f"resolution {resolution} is out of range; allowed: at least 8 pixels")
    sizes = picture_sizes(resolution, typed("shape", shape, PhotoShape))
    reports, likenesses = zip(*(_look(photo, sizes, resolution) for photo in photos), strict=True)
    names = [photo.name for photo in photos]
    if len(photos) > MOST_COMPARED:
        likenesses = ()
    near = tuple(tuple(names[i] for i in group) for group in _groups(likenesses, m.nearly_the_same))
    behind = _groups(likenesses, m.alike_behind, share=MOST)
    largest = max(behind, key=len, default=())
    alike = tuple(names[i] for i in largest) if len(largest) >= max(3, MOST * len(photos)) else ()
    advice = tuple(_advice(reports, skipped, near, alike))
    return Audit(resolution, shape, reports, tuple(skipped), near, alike, advice)


# --- one photo -----------------------------------------------------------------------------------------------------


def _look(photo: Photo, sizes: Sequence[WidthHeight], resolution: int) -> tuple[PhotoReport, Likeness]:
    cropped = crop_photo(photo, sizes)
    size = cropped.image.size
    across, down = crop_box(photo.width, photo.height, size, photo.crop, photo.focus)[2:]
    enlarged = max(size[0] / across, size[1] / down)
    image, mask = cropped.image, cropped.mask
    # an enlarged photo does not count as blurred; a large crop is judged at the size the limits were found at
    scale = min(1.0, m.JUDGED_SIDE / resolution, 1 / enlarged)
    if scale < 1:
        judged = round(size[0] * scale), round(size[1] * scale)
        image = image.resize(judged, Image.Resampling.LANCZOS, reducing_gap=2.0)
        mask = None if mask is None else mask.resize(judged)
    found = measure(image, mask)
    notes = [photo.note] if photo.note else []
    if enlarged > 1:
        notes.append(f"small: {min(across, down)} px, enlarged to {min(size)}")
    notes += _notes(found, cropped.kept)
    small = round(size[0] * SHEET_SIDE / max(size)), round(size[1] * SHEET_SIDE / max(size))
    thumbnail = cropped.image.resize(small, Image.Resampling.LANCZOS, reducing_gap=2.0)
    if cropped.mask is not None:
        pale = Image.blend(thumbnail, Image.new("RGB", small, "white"), PALE)
        thumbnail = Image.composite(thumbnail, pale, cropped.mask.resize(small))
    return PhotoReport(photo, tuple(notes), found, size, cropped.kept, thumbnail), likeness(image, mask)


BLURRED, DARK, BRIGHT, FLAT = "blurred", "too dark", "too bright", "hardly any contrast"
SMALL, CUT, UNSEEN = "the subject is small", "the crop cuts the subject", "the subject is outside the crop"
REMEDIES = {
    BLURRED: "leave them out: blur is learned too",
    DARK: "brighten them, or leave them out",
    BRIGHT: "leave them out: clipped areas have no detail to learn",
    FLAT: "leave them out: there is nothing to see",
    SMALL: "crop closer (crops.json)",
    CUT: "choose the crop yourself (crops.json)",
    UNSEEN: "choose the crop yourself (crops.json)",
}


def _notes(found: Measures, kept: float | None) -> list[str]:
    if found.contrast < m.LITTLE_CONTRAST:
        return [DARK if found.brightest < m.DARK else FLAT]  # the other measures mean nothing here
    notes = []
    if found.sharpness < m.BLURRED:
        notes.append(BLURRED)
    if found.brightest < m.DARK or found.black > m.BLACK_CLIPPED:
        notes.append(DARK)
    elif found.white > m.WHITE_CLIPPED:
        notes.append(BRIGHT)
    if kept is not None and kept < m.CUT_SUBJECT:
        notes.append(CUT if kept > 0 else UNSEEN)
    elif found.subject is not None and found.subject < m.SMALL_SUBJECT:
        notes.append(SMALL)
    return notes


def _facts_of(report: PhotoReport) -> dict[str, Any]:
    photo, found = report.photo, report.measures
    left, top, width, height = crop_box(photo.width, photo.height, report.size, photo.crop, photo.focus)
    return {
        "name": photo.name,
        "width": photo.width,
        "height": photo.height,
        "crop": [left, top, left + width, top + height],  # pixels of the upright photo
        "size": list(report.size),
        "mask": photo.mask is not None,
        **{name: None if value is None else round(value, 3) for name, value in asdict(found).items()},
        "kept": None if report.kept is None else round(report.kept, 3),
        "notes": list(report.notes),
    }


# --- all together --------------------------------------------------------------------------------------------------


def _groups(
    likenesses: Sequence[Likeness], alike: Callable[[Likeness, Likeness], bool], *, share: float = 0.0
) -> list[tuple[int, ...]]:
    """Groups of two or more indices. A photo joins the first group where it is like this share, at least one."""
    groups: list[list[int]] = []
    for i, one in enumerate(likenesses):
        for group in groups:
            count = sum(alike(likenesses[j], one) for j in group)
            if count >= max(1, share * len(group)):
                group.append(i)
                break
        else:
            groups.append([i])
    return [tuple(group) for group in groups if len(group) > 1]


def _advice(
    reports: Sequence[PhotoReport], skipped: Sequence[Skipped], near: Sequence[Sequence[str]], alike: Sequence[str]
) -> Iterator[str]:
    """near, alike: as in `Audit`"""
    for group in near:
        yield f"{len(group)} photos are nearly the same: {listed(group)}; keep the best one"
    if alike:
        which = "all photos have" if len(alike) == len(reports) else f"{len(alike)} of {len(reports)} photos have"
        behind = f"{which} much the same background: {listed(alike)}"
        yield f"{behind}; it is learned with the subject: add photos in other places, or masks"
    distinct = len(reports) - sum(len(group) - 1 for group in near)
    if distinct < FEW:
        yield f"{distinct} different photo{'s are' if distinct > 1 else ' is'} few; {FEW} to {MANY} teach a subject better"
    if distinct > MANY:
        yield f"{distinct} photos are many; the best {MANY} teach as much in less time"
    for note, remedy in REMEDIES.items():
        if concerned := [report.photo.name for report in reports if note in report.notes]:
            yield f"{note}: {listed(concerned)}; {remedy}"
    if copies := [one.name for one in skipped if one.reason.startswith(("the same file", "the same picture"))]:
        yield f"copies are not used: {listed(copies)}"
