"""Making: what it takes to draw a picture of a composition again, beyond what the picture itself says."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from ..adapters.contents import file_stem

if TYPE_CHECKING:
    from .composition import Composition

Box = tuple[float, float, float, float]


@dataclass(frozen=True)
class Making:
    """How a composition made a picture. Names of files are without folder and ending: places hold people's names."""

    files: tuple[str, ...] = ()  # of the picture's adapters, in their order
    method: str = "sum"
    auto: bool = False  # automatic regions
    boxes: tuple[tuple[Box, str | None], ...] = ()  # place and prompt of the last adapters, as many as there are regions
    feathers: tuple[float, ...] = ()  # of the boxes
    isolate: str = "noise"
    start: float = 0.0
    background: str | None = None
    beyond: str | None = None  # what these facts cannot say, as "a mask": only a recipe can


def making_of(studio: Composition, prompt: str) -> Making:
    """Of a picture that `studio.generate(prompt)` draws."""
    everyone = studio.everyone(prompt)
    regions = () if isinstance(studio.regions, str) else tuple(studio.regions)
    beyond = [
        *(["a mask"] if any(region.mask is not None for region in regions) else []),
        *(["weights by block or step"] if any(weight.blocks or weight.timed for _, weight in everyone) else []),
    ]
    return Making(
        files=tuple(adapter.stem or file_stem(adapter.name) for adapter, _ in everyone),
        method=studio.method,
        auto=studio.regions == "auto",
        boxes=tuple((region.box, region.prompt) for region in regions if region.box is not None),
        feathers=tuple(region.feather for region in regions if region.box is not None),
        isolate=studio.isolate,
        start=studio.start,
        background=studio.background,
        beyond=" and ".join(beyond) or None,
    )
