"""Gallery: pictures and how they were made, as one HTML page or a contact sheet."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..base.ai_mark import KINDS, LOSSLESS, data_url
from ..config import typed
from ..errors import SettingsError
from ..files import page, write_file
from ..photos.sheet import contact_sheet
from .picture import Picture, command_of, number, python_of

PAGE = (".html", ".htm")
# chosen
SHEET_SIDE = 256  # pixels of a picture on a sheet, at most
THUMBNAIL = 384  # pixels of a picture on the page, at most
THUMBNAIL_QUALITY, FULL_QUALITY = 78, 92  # WebP


def check_output(path: Path) -> None:
    """Raises SettingsError if a gallery or grid cannot be saved under this name; called before the work."""
    if path.suffix.lower() not in (*PAGE, *KINDS):
        raise SettingsError(f"{path}: a gallery or grid is saved as .html, .png, .jpg or .webp")


class Gallery:
    """Pictures and how they were made. `save` writes a page (.html) or a contact sheet (.png, .jpg, .webp)."""

    def __init__(self, pictures: Sequence[Picture], *, title: str = "lora_booth") -> None:
        if not pictures:
            raise SettingsError("a gallery needs pictures; pass at least one")
        self.pictures, self.title = list(pictures), title

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
        grid = contact_sheet(
            images, labels=labels, columns=min(columns, len(images)), side=max(128, min(SHEET_SIDE, images[0].width))
        )
        return Picture(grid, self.title, 0).save(path)

    def html(self) -> str:
        """One self-contained page; all text is escaped.

        It contains each picture as WebP, as a thumbnail and in full, and works without JavaScript.
        """
        return html_of([(record_of(picture), picture.image) for picture in self.pictures], title=self.title)


def html_of(items: Sequence[tuple[dict[str, Any], Image.Image]], *, title: str) -> str:
    """A page of records and their pictures."""
    adapters = list(dict.fromkeys(name for record, _ in items for name in record["adapters"]))
    bases = {record["base"] for record, _ in items}
    return page(
        __package__,
        title=title,
        pixelated=max((image.width for _, image in items), default=0) <= LOSSLESS,
        adapters=adapters,
        entries=[entry(i, record, image, adapters, bases) for i, (record, image) in enumerate(items, 1)],
    )


def record_of(picture: Picture) -> dict[str, Any]:
    """What a page says of a picture, in strings alone; an empty one says nothing."""
    used = ", ".join(f"{name} {number(weight)}" for name, weight in picture.adapters)
    return {
        "prompt": picture.prompt,
        "seed": str(picture.seed),
        "base": picture.base,
        "used": used,
        "adapters": [name for name, _ in picture.adapters],
        "facts": list(facts_of(picture, used)),
        "command": command_of(picture) or "",
        "python": python_of(picture) or "",
    }


def entry(
    index: int, record: dict[str, Any], image: Image.Image, adapters: Sequence[str], bases: Collection[str]
) -> dict[str, Any]:
    """One picture as the page shows it."""
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=2.0)
    seed, base = f"seed {record['seed']}", record["base"] if len(bases) > 1 else ""
    return record | {
        "file": f"picture-{index:03d}-seed-{record['seed']}.webp",  # the name under which a browser saves it
        "full": data_url(image, FULL_QUALITY),
        "thumbnail": data_url(small, THUMBNAIL_QUALITY),
        "width": small.width,  # of the thumbnail
        "height": small.height,
        "adapters": [adapters.index(name) for name in record["adapters"]],  # places in the page's list
        "summary": " · ".join(filter(None, (seed, record["used"], base))),
    }


def facts_of(picture: Picture, used: str) -> Iterator[tuple[str, str]]:
    yield "seed", str(picture.seed)
    if used:
        yield "adapters", used
    if picture.negative_prompt:
        yield "negative", picture.negative_prompt
    if picture.base:
        yield "base", picture.base
    if picture.steps:
        yield "steps", str(picture.steps)
        yield "guidance", number(picture.guidance)
    yield "size", f"{picture.image.width} x {picture.image.height}"
    if picture.making is not None and picture.making.method != "sum":
        yield "method", picture.making.method
    if picture.making is not None and picture.making.recipe_only is not None:
        yield "note", f"made with {picture.making.recipe_only}, which only a recipe records"
