"""Album: a folder of pictures that grows: each under its own name, and one gallery of all, the newest prompt first."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Sequence
from itertools import count
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.contents import file_stem
from ..base.ai_mark import picture_bytes
from ..errors import PhotoError
from ..files import json_lines, make_folder, remove, write_file
from ..photos.opening import read_picture
from .gallery import html_of, record_of
from .picture import Picture

RECORD = "lora_booth_pictures.jsonl"  # the page's name, and how each picture was made; the newest last
PAGE = re.compile(r"gallery(-\d+)?\.html")
TEXTS = ("prompt", "seed", "base", "used", "command", "python")
LONGEST = 40  # characters of the prompt in a file's name; chosen


class Album:
    """A folder of pictures. Nothing in it is ever overwritten but its record and the gallery that goes with it."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.record = folder, folder / RECORD
        known = [name for line in json_lines(self.record) if PAGE.fullmatch(name := str(line.get("page")))]
        self.page = folder / known[0] if known else first_free(folder / "gallery.html")

    def save(self, pictures: Sequence[Picture]) -> list[Path]:
        """Add pictures under names that tell prompt and seed. One that is there already, to the byte, keeps its file."""
        files: list[Path] = []
        lines = {str(line.get("file", "")): line for line in json_lines(self.record)} or {"": {"page": self.page.name}}
        make_folder(self.folder)
        for picture in pictures:
            name = f"{file_stem(picture.prompt)[:LONGEST].strip('_')}-{picture.seed:06d}.png"
            path = write_new(self.folder / name, picture_bytes(picture.image))
            files.append(path)
            lines.pop(path.name, None)  # so that the newest stands last
            lines[path.name] = {"file": path.name, **record_of(picture)}
        write_file(self.record, "".join(json.dumps(line) + "\n" for line in lines.values()).encode())
        return files

    def gallery(self) -> Path:
        """Write the page of all pictures that are still there: the newest prompt first, and its pictures together."""
        rows = list(self._rows())
        newest = list(dict.fromkeys(record["prompt"] for record, _ in reversed(rows)))
        rows.sort(key=lambda row: newest.index(row[0]["prompt"]))
        title = newest[0] if len(newest) == 1 else f"{len(newest)} prompts"
        write_file(self.page, html_of(rows, title=title).encode("utf-8", "replace"))
        return self.page

    def _rows(self) -> Iterator[tuple[dict[str, Any], Image.Image]]:
        """Records and their pictures; a line of another making, or a picture that is gone, is left out."""
        for line in json_lines(self.record):
            try:
                image = read_picture(self.folder / Path(str(line["file"])).name, inside=self.folder)
                facts = [(str(name), str(value)) for name, value in line["facts"]]
                names = [str(name) for name in line["adapters"]]
                yield {key: str(line[key]) for key in TEXTS} | {"facts": facts, "adapters": names}, image
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
