"""Sizes of pictures: how they are written, what a base can draw, and what it was made for."""

from __future__ import annotations

from ..config import Size, named, sides, written
from ..errors import SettingsError
from .base_model import BaseModel
from .families import check_drawable

AREAS = (0.5, 2.0)  # of the base's own; chosen: below them details are lost, above them subjects repeat
ELONGATED = 2.4  # longer side to shorter, at most; the most of SDXL's usual sizes


def as_arguments(pair: tuple[int, int] | None) -> dict[str, int]:
    """Arguments of a pipeline call; without them the pipeline draws its default size."""
    return {} if pair is None else {"width": pair[0], "height": pair[1]}


def usual_sizes(base: BaseModel) -> list[tuple[int, int]]:
    """Those of its family, scaled to its resolution; its own square first."""
    multiple, family = base.side_multiple, base.family
    scale = base.resolution / family.sizes[0][0]
    return [(nearest(width * scale, multiple), nearest(height * scale, multiple)) for width, height in family.sizes]


def nearest(side: float, multiple: int) -> int:
    return max(1, round(side / multiple)) * multiple


def drawable(base: BaseModel, size: Size | None, name: str = "size") -> tuple[int, int] | None:
    """`sides`, for pictures that this base draws from text. Raises BaseModelError if it draws none, and SettingsError, which
    names sizes that it can draw."""
    pair = sides(size, name)
    check_drawable(base.shell, base.family)
    multiple = base.side_multiple
    if pair is None or all(side % multiple == 0 for side in pair):
        return pair
    smaller = tuple(max(1, side // multiple) * multiple for side in pair)
    larger = tuple(-(-side // multiple) * multiple for side in pair)
    raise SettingsError(
        f"{named(name)} {written(pair)}: this base draws sides that are multiples of {multiple}; "
        f"pass {' or '.join(dict.fromkeys(map(written, (smaller, larger))))} ({usual(base)})"
    )


def size_note(base: BaseModel, size: tuple[int, int] | None) -> list[str]:
    """A line about a size that the base was not made for."""
    if size is None or size in usual_sizes(base):
        return []
    area = size[0] * size[1] / base.resolution**2
    if area < AREAS[0]:
        problem = "details get lost in pictures this small"
    elif area > AREAS[1]:
        problem = "subjects repeat in pictures this large"
    elif max(size) > ELONGATED * min(size):
        problem = "subjects repeat in pictures this elongated"
    else:
        return []
    return [f"{base.name} was not made for size {written(size)}: {problem} ({usual(base)})"]


def usual(base: BaseModel) -> str:
    return f"usual for it: {', '.join(map(written, usual_sizes(base)))}"
