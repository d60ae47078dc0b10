"""Grids: prompts and seeds by weights on one labelled sheet; strips without and with an adapter."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image, ImageDraw, ImageFont

from ..base.base_model import BaseModel
from ..config import check, typed
from ..errors import SettingsError, shown
from ..photos.sheet import contact_sheet, wrapped_lines
from .composition import Composition, Method, Weighted, checked, everyone_of
from .gallery import PAGE, Gallery
from .picture import Picture

# chosen
MOST = 1_000  # pictures
WEIGHTS = (0, 0.4, 0.8, 1)  # default columns of a grid
SHEET_PIXELS = 80e6  # of a sheet, about
SIDE = (128, 512)  # pixels of a picture on it, at least and at most
GAP, FONT, ROW_LABEL = 8, 14, 150  # pixels; the gap is that of a contact sheet


@dataclass(frozen=True)
class Grid:
    """Pictures by row and column. `save` writes by the path's ending: a sheet (.png, .jpg, .webp) or a page (.html)."""

    rows: tuple[str, ...]
    columns: tuple[str, ...]
    cells: tuple[tuple[Picture | None, ...], ...]  # cells[row][column]; None: not drawn (yet)
    title: str = ""

    def __repr__(self) -> str:
        return f"Grid({self.title!r}: {len(self.pictures)} of {self.total} pictures)"

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.sheet()._repr_png_()

    @property
    def pictures(self) -> list[Picture]:
        """The pictures drawn so far, row by row."""
        return [picture for picture in chain(*self.cells) if picture is not None]

    @property
    def total(self) -> int:
        return len(self.rows) * len(self.columns)

    def transposed(self) -> Grid:
        return Grid(self.columns, self.rows, tuple(zip(*self.cells, strict=True)), self.title)

    def sheet(self, *, side: int | None = None) -> Image.Image:
        """All pictures, labelled by row and column; a cell not drawn yet stays grey. side: of a picture, in pixels."""
        if side is None:
            longest = max((max(picture.image.size) for picture in self.pictures), default=SIDE[0])
            side = min(SIDE[1], max(SIDE[0], longest), math.isqrt(int(SHEET_PIXELS / self.total)))
        empty = Image.new("RGB", (side, side), (232, 232, 232))
        images = [empty if picture is None else picture.image for picture in chain(*self.cells)]
        drawn = contact_sheet(images, columns=len(self.columns), side=side)
        font, line = ImageFont.load_default(FONT), FONT + 4
        top = wrapped_lines(shown(self.title), font, drawn.width) if self.title else []
        heads = [wrapped_lines(shown(text), font, side) for text in self.columns]
        above = GAP + (len(top) * line + GAP if top else 0) + max(map(len, heads)) * line
        sheet = Image.new("RGB", (ROW_LABEL + drawn.width, above + drawn.height), "white")
        sheet.paste(drawn, (ROW_LABEL, above))
        draw = ImageDraw.Draw(sheet)

        def write(x: int, y: int, lines: Sequence[str]) -> None:
            for i, text in enumerate(lines):
                draw.text((x, y + i * line), text, fill=(30, 30, 30), font=font)

        write(GAP, GAP, top)
        for column, head in enumerate(heads):
            write(ROW_LABEL + GAP + column * (side + GAP), above - len(head) * line, head)
        for row, label in enumerate(self.rows):
            lines = wrapped_lines(shown(label), font, ROW_LABEL - 2 * GAP, most=max(1, side // line))
            write(GAP, above + GAP + row * (side + GAP) + (side - len(lines) * line) // 2, lines)
        return sheet

    def save(self, path: str | Path) -> Path:
        path = Path(typed("path", path, Path))
        if path.suffix.lower() in PAGE:
            return Gallery(self.pictures, title=self.title or "grid").save(path)
        return Picture(self.sheet(), self.title, 0).save(path)


def grid(base: BaseModel | Any, adapters: Weighted | Sequence[Weighted], prompt: str | Sequence[str], **settings: Any) -> Grid:
    """Every prompt and seed (rows) at every weight (columns); see `grid_steps` for the settings."""
    *_, made = grid_steps(base, adapters, prompt, **settings)
    return made


def grid_steps(
    base: BaseModel | Any,
    adapters: Weighted | Sequence[Weighted],
    prompt: str | Sequence[str],
    *,
    weights: Sequence[float] = WEIGHTS,
    seeds: Sequence[int] = range(4),
    method: Method | None = None,
    batch_size: int = 1,
    **settings: Any,
) -> Iterator[Grid]:
    """Yield the grid so far after every `batch_size` pictures, so stopping early loses nothing.

    weights   factors on the weight of each adapter; 0 is the base alone
    method    see `Composition`
    settings  see `Composition.generate`: negative_prompt, steps, guidance, size, sampler, on_step
    """
    prompts, everyone = typed("prompt", prompt, tuple[str, ...]), everyone_of(adapters)
    if not everyone:
        raise SettingsError("a grid without adapters; pass at least one")
    seeds, batch_size = checked(seeds=seeds, batch_size=batch_size).values()
    rows, title = labels_of(prompts, seeds)
    weights = typed("weights", list(weights) if isinstance(weights, Iterable) else weights, tuple[float, ...])
    total = len(rows) * len(weights)
    check(1 <= total <= MOST, f"a grid of {total} pictures", f"1 to {MOST}; at least one prompt, seed and weight")
    alone = everyone[0][1].value if len(everyone) == 1 else None
    columns = tuple(f"weights x {factor:.3g}" if alone is None else f"weight {alone * factor:.3g}" for factor in weights)
    cells: list[list[Picture | None]] = [[None] * len(columns) for _ in rows]
    for column, factor in enumerate(weights):
        studio = Composition(base, [(a, replace(w, value=w.value * factor)) for a, w in everyone], method=method)
        for start, text, part in batches(prompts, seeds, batch_size):
            made = studio.generate(text, seeds=part, batch_size=batch_size, **settings)
            for row, picture in enumerate(made, start):
                cells[row][column] = picture
            yield Grid(rows, columns, tuple(map(tuple, cells)), title)


def before_after(
    base: BaseModel | Any,
    adapters: Weighted | Sequence[Weighted],
    prompt: str | Sequence[str],
    *,
    seeds: Sequence[int] = (0,),
    **settings: Any,
) -> Grid:
    """Two rows: the base alone, and the same prompts and seeds with the adapters; see `grid_steps` for the settings."""
    return before_after_of(grid(base, adapters, prompt, weights=(0, 1), seeds=seeds, **settings))


def before_after_of(made: Grid) -> Grid:
    """A grid of the weights 0 and 1, as a strip."""
    return replace(made.transposed(), rows=("without", "with"))


def labels_of(prompts: Sequence[str], seeds: Sequence[int]) -> tuple[tuple[str, ...], str]:
    """Labels of the rows, and as title what they have in common."""
    if len(prompts) == 1:
        return tuple(f"seed {seed}" for seed in seeds), prompts[0]
    if len(seeds) == 1:
        return tuple(prompts), f"seed {seeds[0]}"
    return tuple(f"{text}, seed {seed}" for text in prompts for seed in seeds), ""


def batches(prompts: Sequence[str], seeds: Sequence[int], size: int) -> Iterator[tuple[int, str, list[int]]]:
    """For each call: the index of its first picture, its prompt and its seeds."""
    check(size >= 1, f"batch_size {size}", "at least 1")
    for i, text in enumerate(prompts):
        for first in range(0, len(seeds), size):
            yield i * len(seeds) + first, text, list(seeds[first : first + size])
