"""Gallery: pictures and how they were made, as one HTML page or a contact sheet. Album: a folder of pictures that grows, each
under its own name, with one gallery of all."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.contents import file_stem
from ..base.ai_mark import KINDS, LOSSLESS, data_url, picture_bytes
from ..config import typed
from ..errors import PhotoError, SettingsError
from ..files import add_lines, json_lines, make_folder, page, remove, write_file
from ..photos.opening import read_picture
from ..photos.sheet import contact_sheet
from .picture import Making, Picture, command_of, number, python_of

PAGE = (".html", ".htm")
# chosen
SHEET_SIDE = 256  # pixels of a picture on a sheet, at most
THUMBNAIL = 384  # pixels of a picture on the page, at most
THUMBNAIL_QUALITY, FULL_QUALITY = 78, 92  # WebP
LONGEST = 40  # characters of the prompt in the name of an album's file

RECORD = "lora_booth_pictures.jsonl"  # of an album: the name of its page, and how each picture was made; the newest last
ALBUM_PAGE = re.compile(r"gallery(-\d+)?\.html")


def check_output(path: Path) -> None:
    """Raises SettingsError if a gallery or grid cannot be saved under this name; called before the work."""
    if path.suffix.lower() not in (*PAGE, *KINDS):
        raise SettingsError(f"{path}: a gallery or grid is saved as .html, .png, .jpg or .webp")


class Gallery:
    """Pictures and how they were made. `save` writes a page (.html) or a contact sheet (.png, .jpg, .webp)."""

    def __init__(self, pictures: Sequence[Picture], *, title: str = "lora_booth") -> None:
        if not pictures:
            raise SettingsError("a gallery needs pictures; pass at least one")
        self.pictures, self.title = list(typed("pictures", pictures, tuple[Picture, ...])), typed("title", title, str)

    def __repr__(self) -> str:
        return f"Gallery({self.title!r}: {len(self.pictures)} pictures)"

    def save(self, path: str | Path) -> Path:
        path = Path(typed("path", path, Path))
        check_output(path)
        if path.suffix.lower() in PAGE:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_file(path, self.html().encode("utf-8", "replace"))
            return path
        return self.sheet(path)

    def sheet(self, path: Path, *, columns: int = 4) -> Path:
        """A contact sheet with seed and prompt under each picture; a long prompt is cut at three lines."""
        labels = [f"seed {p.seed}: {p.prompt}" for p in self.pictures]
        images = [p.image for p in self.pictures]
        side = max(128, min(SHEET_SIDE, images[0].width))
        grid = contact_sheet(images, labels=labels, columns=columns, side=side)
        return Picture(grid, self.title, 0).save(path)

    def html(self) -> str:
        """One self-contained page; all text is escaped.

        It contains each picture as WebP, as a thumbnail and in full, and works without JavaScript.
        """
        return html_of([(record_of(picture), picture.image) for picture in self.pictures], title=self.title)


def html_of(items: Sequence[tuple[dict[str, Any], Image.Image]], *, title: str) -> str:
    """A page of records and their pictures."""
    adapters = list(dict.fromkeys(name for record, _ in items for name in record["adapters"]))
    several_bases = len({dict(record["facts"]).get("base") for record, _ in items}) > 1
    entries = []
    for index, (record, image) in enumerate(items, 1):
        small, facts = image.copy(), dict(record["facts"])
        small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=2.0)
        summary = (f"seed {record['seed']}", facts.get("adapters"), facts.get("base") if several_bases else None)
        more = {
            "file": f"picture-{index:03d}-seed-{record['seed']}.webp",  # the name under which a browser saves it
            "full": data_url(image, FULL_QUALITY),
            "thumbnail": data_url(small, THUMBNAIL_QUALITY),
            "width": small.width,  # of the thumbnail
            "height": small.height,
            "adapters": [adapters.index(name) for name in record["adapters"]],  # places in the page's list
            "summary": " · ".join(filter(None, summary)),
        }
        entries.append(record | more)
    pixelated = max((image.width for _, image in items), default=0) <= LOSSLESS
    return page(__package__, title=title, pixelated=pixelated, adapters=adapters, entries=entries)


def record_of(picture: Picture) -> dict[str, Any]:
    """What a page says of a picture, in strings alone; an empty one says nothing."""
    making = picture.making or Making()
    facts = {
        "seed": str(picture.seed),
        "adapters": ", ".join(f"{name} {number(weight)}" for name, weight in picture.adapters),
        "negative": picture.negative_prompt,
        "base": picture.base,
        "steps": str(picture.steps) if picture.steps else "",
        "guidance": number(picture.guidance) if picture.steps else "",
        "sampler": picture.sampler,
        "size": f"{picture.image.width} x {picture.image.height}",
        "method": making.method if making.method != "sum" else "",
        "prompt read by": making.compel and f"compel {making.compel}",
        "note": note_of(making),
    }
    return {
        "prompt": picture.prompt,
        "seed": facts["seed"],
        "adapters": [name for name, _ in picture.adapters],
        "files": list(making.files),
        "facts": [(name, value) for name, value in facts.items() if value],
        "command": command_of(picture) or "",
        "python": python_of(picture) or "",
    }


def note_of(making: Making) -> str:
    if making.photo:
        return "drawn into a photo, which is not recorded"
    return f"made with {making.recipe_only}, which only a recipe records" if making.recipe_only else ""


class Album:
    """A folder of pictures. Nothing in it is ever overwritten but its record and the gallery that goes with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / RECORD
        known = [name for line in json_lines(self.record) if ALBUM_PAGE.fullmatch(name := str(line.get("page")))]
        self.page = folder / known[0] if known else first_free(folder / "gallery.html")

    def save(self, pictures: Sequence[Picture]) -> list[Path]:
        """Add pictures under names that tell prompt and seed. One that is there already, to the byte, keeps its file."""
        files: list[Path] = []
        lines = [] if self.record.exists() else [{"page": self.page.name}]
        make_folder(self.folder)
        for picture in pictures:
            name = f"{file_stem(picture.prompt)[:LONGEST].strip('_')}-{picture.seed:06d}.png"
            path = write_new(self.folder / name, picture_bytes(picture.image))
            files.append(path)
            lines.append({"file": path.name, **record_of(picture)})
        add_lines(self.record, lines)
        return files

    def gallery(self) -> Path:
        """Write the page of all pictures that are still there: the newest prompt first, and its pictures together."""
        rows = list(self._rows())
        newest = list(dict.fromkeys(record["prompt"] for record, _ in reversed(rows)))
        rows.sort(key=lambda row: newest.index(row[0]["prompt"]))
        title = newest[0] if len(newest) == 1 else f"{len(newest)} prompts"
        write_file(self.page, html_of(rows, title=title).encode("utf-8", "replace"))
        return self.page

    def records(self) -> dict[str, dict[str, Any]]:
        """The newest line on each file, the newest last. Anyone may have edited them."""
        newest: dict[str, dict[str, Any]] = {}
        for line in json_lines(self.record):
            name = Path(str(line.get("file"))).name
            newest.pop(name, None)
            newest[name] = line
        return newest

    def _rows(self) -> Iterator[tuple[dict[str, Any], Image.Image]]:
        """Each picture that is still there, with its newest record; a line of another making is left out."""
        for name, line in self.records().items():
            try:
                image = read_picture(self.folder / name, inside=self.folder)
                facts = [(str(name), str(value)) for name, value in line["facts"]]
                names = [str(name) for name in line["adapters"]]
                texts = {key: str(line[key]) for key in ("prompt", "seed", "command", "python")}
                yield texts | {"facts": facts, "adapters": names}, image
            except (PhotoError, KeyError, TypeError, ValueError):
                continue


def write_new(path: Path, content: bytes) -> Path:
    """Write a file under a name that nothing has, this one or the next with a number; if it is there, leave it as it is."""
    for found in names(path):
        try:
            found.open("xb").close()  # the name is ours, whatever other processes do
        except FileExistsError:
            if found.is_file() and not found.is_symlink() and found.read_bytes() == content:
                return found
            continue
        try:
            write_file(found, content)
        except BaseException:
            remove(found)
            raise
        return found
    raise AssertionError("names do not end")


def names(path: Path) -> Iterator[Path]:
    """a.png, a-2.png, a-3.png, ..."""
    yield path
    yield from (path.with_stem(f"{path.stem}-{number}") for number in count(2))


def first_free(path: Path) -> Path:
    return next(found for found in names(path) if not (found.exists() or found.is_symlink()))
