"""How often the audit of photos is right, and what smart crops keep, on real photos.

    python benchmarks/photo_audit.py --photos FOLDER_OF_FOLDERS [--masks] [--sheets OUT]

Every folder is one subject. The photos as they are count false alarms; spoilt by this script they count what is found.
Crops are judged where somebody drew a box around the subject (BOXES, for six subjects of the DreamBooth data set): from
each photo 18 windows are cut, wide and tall, with the subject in the middle or at one end; the share of the box that a
crop keeps is counted against the best square there is.

--masks: rembg makes a mask for every photo (needs `lora-booth[masks]`, and the internet on first use); the box around each
is compared with the box drawn by hand, and --sheets draws them.
"""

from __future__ import annotations

import argparse
import io
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
from PIL import Image, ImageFilter

from lora_booth.photos.audit import audit_photos
from lora_booth.photos.cropping import crop_box, focus_of
from lora_booth.photos.finding import find_photos
from lora_booth.photos.masks import rembg_segmenter
from lora_booth.photos.measures import alike_behind, likeness, nearly_the_same
from lora_booth.photos.opening import open_photo
from lora_booth.photos.sheet import contact_sheet

BOXES = {  # folder -> photo -> x0, y0, x1, y1 of the subject in percent of the photo, by eye
    "backpack_dog": {
        "00": (31, 20, 74, 79), "01": (7, 14, 60, 87), "02": (20, 16, 75, 85),
        "03": (36, 20, 80, 72), "04": (17, 15, 72, 80),
    },
    "cat2": {
        "02": (0, 10, 100, 95), "03": (27, 2, 85, 97),
    },
    "dog": {
        "00": (15, 20, 88, 100), "01": (22, 12, 87, 97), "02": (25, 20, 100, 93),
        "03": (25, 18, 93, 93), "04": (25, 2, 95, 100),
    },
    "fancy_boot": {
        "00": (12, 12, 70, 86), "01": (32, 18, 77, 78), "02": (26, 4, 82, 86),
        "03": (28, 13, 63, 93), "04": (7, 12, 68, 82), "05": (17, 17, 68, 72),
    },
    "robot_toy": {
        "00": (28, 10, 80, 88), "01": (25, 10, 78, 88), "02": (27, 15, 70, 85),
        "03": (25, 13, 78, 75), "04": (28, 25, 66, 82),
    },
    "teapot": {
        "00": (33, 10, 86, 62), "01": (27, 42, 65, 68), "02": (4, 27, 55, 75),
        "03": (35, 45, 68, 63), "04": (20, 34, 60, 65),
    },
}  # fmt: skip
SIDE = 512  # pixels; photos are made this small first


def stops(image: Image.Image, count: float) -> Image.Image:
    """Lighter or darker by so many stops, clipped as a camera clips."""
    linear = (np.asarray(image, dtype=np.float32) / 255) ** 2.2 * 2.0**count
    return Image.fromarray(np.rint(linear.clip(0, 1) ** (1 / 2.2) * 255).astype(np.uint8))


def jpeg(image: Image.Image, quality: int) -> Image.Image:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG", quality=quality)
    return Image.open(buffer).convert("RGB")


def cut(image: Image.Image, low: float, high: float) -> Image.Image:
    width, height = image.size
    return image.crop((round(low * width), round(low * height), round(high * width), round(high * height)))


SPOILT: dict[str, tuple[str, Callable[[Image.Image], Image.Image]]] = {
    "blurred by 1.5 px": ("blurred", lambda i: i.filter(ImageFilter.GaussianBlur(1.5))),
    "blurred by 2 px": ("blurred", lambda i: i.filter(ImageFilter.GaussianBlur(2))),
    "3 stops darker": ("too dark", lambda i: stops(i, -3)),
    "2 stops brighter": ("too bright", lambda i: stops(i, 2)),
    "3 stops brighter": ("too bright", lambda i: stops(i, 3)),
}
TWINS: dict[str, Callable[[Image.Image], Image.Image]] = {
    "JPEG of quality 30": lambda i: jpeg(i, 30),
    "half the size": lambda i: i.resize((i.width // 2, i.height // 2), Image.Resampling.LANCZOS),
    "brighter": lambda i: i.point(lambda v: min(255, round(v * 1.25))),
    "mirrored": lambda i: i.transpose(Image.Transpose.FLIP_LEFT_RIGHT),
    "cut by 3 % each side": lambda i: cut(i, 0.03, 0.97),
    "the next shot (turned 2 degrees)": lambda i: cut(i.rotate(2, Image.Resampling.BICUBIC), 0.04, 0.96),
}


def small(image: Image.Image) -> Image.Image:
    side = min(image.size)
    return image.crop((0, 0, side, side)).resize((SIDE, SIDE), Image.Resampling.LANCZOS, reducing_gap=2.0)


def windows(image: Image.Image, box: tuple[float, ...]) -> Iterator[tuple[Image.Image, tuple[float, ...], bool]]:
    """Wide and tall parts of a square picture, the box inside each, and whether the subject is at one end."""
    for aspect in (4 / 3, 3 / 2, 16 / 9):
        for tall in (False, True):
            x0, y0, x1, y1 = (box[1], box[0], box[3], box[2]) if tall else box
            for low, high in ((0.0, 1.0), (max(0.0, x0 - 0.03), 1.0), (0.0, min(1.0, x1 + 0.03))):
                height = (high - low) / aspect
                middle = min(max((y0 + y1) / 2, height / 2), 1 - height / 2)
                part = (low, middle - height / 2, high, middle + height / 2)
                part = (part[1], part[0], part[3], part[2]) if tall else part
                left, top, right, bottom = (round(v * SIDE) for v in part)
                inside = (
                    *(max(0.0, box[0] * SIDE - left), max(0.0, box[1] * SIDE - top)),
                    *(min(right - left, box[2] * SIDE - left), min(bottom - top, box[3] * SIDE - top)),
                )
                yield image.crop((left, top, right, bottom)), inside, (low, high) != (0.0, 1.0)


def kept(image: Image.Image, inside: tuple[float, ...], focus: tuple[float, float] | None) -> float:
    def share(left: float, top: float) -> float:
        across = min(inside[2], left + side) - max(inside[0], left)
        return max(0.0, across) * max(0.0, min(inside[3], top + side) - max(inside[1], top))

    left, top, side, _ = crop_box(*image.size, (1, 1), None, focus)
    best = max(share(x, y) for x in range(image.width - side + 1) for y in range(image.height - side + 1))
    return share(left, top) / best


def before_one_wall(wall: Image.Image, seed: int) -> Image.Image:
    """A round subject before another part of the wall, in other light."""
    rng = np.random.default_rng(seed)
    part = rng.uniform(0.7, 0.95) * SIDE
    left, top = rng.uniform(0, SIDE - part, 2)
    picture = wall.resize((SIDE, SIDE), Image.Resampling.LANCZOS, box=(left, top, left + part, top + part))
    values = np.asarray(picture, dtype=np.float32) * rng.uniform(0.9, 1.1)
    down, right = np.mgrid[0:SIDE, 0:SIDE]
    middle = rng.uniform(0.35, 0.65, 2) * SIDE
    values[(down - middle[0]) ** 2 + (right - middle[1]) ** 2 < (0.25 * SIDE) ** 2] = rng.uniform(0, 255, 3)
    return Image.fromarray(values.clip(0, 255).astype(np.uint8))


def in_common(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """Intersection over union of two boxes."""
    across, down = min(a[2], b[2]) - max(a[0], b[0]), min(a[3], b[3]) - max(a[1], b[1])
    shared = max(0.0, across) * max(0.0, down)
    return shared / ((a[2] - a[0]) * (a[3] - a[1]) + (b[2] - b[0]) * (b[3] - b[1]) - shared)


def judge_masks(subjects: dict[str, dict[str, Image.Image]], sheets: Path | None) -> None:
    made: dict[str, Image.Image] = {}
    agreements, seconds, count = [], 0.0, 0
    segmenter = rembg_segmenter()
    for subject, photos in subjects.items():
        for stem, image in photos.items():
            started = time.process_time()
            mask = segmenter(image)
            seconds, count = seconds + time.process_time() - started, count + 1
            if mask is None:
                continue
            made[f"{subject} {stem}"] = Image.composite(image, Image.new("RGB", image.size, (160, 0, 160)), mask)
            bounds = mask.point(lambda level: 255 if level >= 128 else 0).getbbox()
            if bounds is not None and (drawn := BOXES.get(subject, {}).get(stem)) is not None:
                agreements.append(in_common(tuple(100 * v / SIDE for v in bounds), drawn))
    print(f"masks: made for {len(made)} of {count} photos, {seconds / count:.1f} s each: {', '.join(made)}")
    if agreements:
        print(
            f"  their boxes and those drawn by hand: {np.mean(agreements):.2f} in common, at least {min(agreements):.2f} "
            f"({len(agreements)} photos)"
        )
    if sheets is not None and made:
        contact_sheet(list(made.values()), labels=list(made), columns=5, side=256).save(sheets / "masks.png")


def notes_of(image: Image.Image, folder: Path) -> tuple[str, ...]:
    path = folder / "one.png"
    image.save(path)
    return audit_photos(find_photos([path], minimum=1).photos).photos[0].notes


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--photos", type=Path, required=True)
    parser.add_argument("--sheets", type=Path, help="folder for the contact sheets")
    parser.add_argument("--masks", action="store_true", help="also make masks with rembg")
    arguments = parser.parse_args()
    subjects = {}
    print("as they are:")
    for folder in sorted(f for f in arguments.photos.iterdir() if f.is_dir()):
        started = time.process_time()
        found = find_photos(folder, minimum=1)
        audit = audit_photos(found.photos, found.skipped)
        seconds = (time.process_time() - started) / len(found.photos)
        notes = [f"{r.photo.name}: {'; '.join(r.notes)}" for r in audit.photos if r.notes]
        print(
            f"  {folder.name}: {len(notes)} of {len(found.photos)} with notes; advice: {audit.advice}; {seconds:.2f} s a photo"
        )
        for note in notes:
            print(f"    {note}")
        if arguments.sheets is not None:
            arguments.sheets.mkdir(parents=True, exist_ok=True)
            audit.sheet().save(arguments.sheets / f"{folder.name}.png")
        subjects[folder.name] = {p.path.stem: small(open_photo(p)) for p in found.photos}
    images = [image for photos in subjects.values() for image in photos.values()]

    print("spoilt, and noted:")
    with tempfile.TemporaryDirectory() as scratch:
        for name, (note, spoil) in SPOILT.items():
            noted = sum(note in notes_of(spoil(image), Path(scratch)) for image in images)
            print(f"  {name}: {noted} of {len(images)}")

    likes = [likeness(image, None) for image in images]
    print("nearly the same, and noted:")
    for name, change in TWINS.items():
        noted = sum(nearly_the_same(a, likeness(change(i), None)) for a, i in zip(likes, images, strict=True))
        print(f"  {name}: {noted} of {len(images)}")
    pairs = [(i, j) for i in range(len(likes)) for j in range(i)]
    print(f"  different photos: {sum(nearly_the_same(likes[i], likes[j]) for i, j in pairs)} of {len(pairs)} pairs")

    print("alike backgrounds:")
    for name, photos in subjects.items():
        own = [likeness(image, None) for image in photos.values()]
        alike = [alike_behind(own[i], own[j]) for i in range(len(own)) for j in range(i)]
        print(f"  {name}: {sum(alike)} of {len(alike)} pairs")
    noted = []
    with tempfile.TemporaryDirectory() as scratch:
        for wall in images:
            for seed in range(5):
                before_one_wall(wall, seed).save(Path(scratch) / f"{seed}.png")
            noted.append(bool(audit_photos(find_photos(scratch).photos).alike_backgrounds))
    print(f"  five pictures before one wall (each photo in turn), noted: {sum(noted)} of {len(noted)}")

    shares: dict[tuple[str, bool], list[float]] = {}
    for subject, boxes in BOXES.items():
        for stem, box in boxes.items():
            if (whole := subjects.get(subject, {}).get(stem)) is None:
                continue
            for image, inside, at_end in windows(whole, tuple(v / 100 for v in box)):
                for crop, focus in (("center", None), ("smart", focus_of(image, None, None))):
                    shares.setdefault((crop, at_end), []).append(kept(image, inside, focus))
    for crop in ("center", "smart") if shares else ():
        both = shares[crop, False] + shares[crop, True]
        print(
            f"crop {crop}: keeps {np.mean(both):.3f} of the subject ({np.mean(shares[crop, False]):.3f} in the middle, "
            f"{np.mean(shares[crop, True]):.3f} at one end); less than 0.7 of it in {np.mean(np.array(both) < 0.7):.3f} "
            f"of {len(both)} crops"
        )
    if arguments.masks:
        judge_masks(subjects, arguments.sheets)


if __name__ == "__main__":
    main()
