"""Making: how a composition drew a picture, from which the gallery derives facts, command and Python lines."""

from __future__ import annotations

from dataclasses import dataclass

AUTO_START = 0.3  # share of the steps, before automatic regions start, whose attention is read; chosen on the toybox
FEATHER = 0.04  # softness of a region's edge, as a share of the picture's side; chosen


@dataclass(frozen=True)
class Place:
    """A region without its adapter."""

    box: tuple[float, float, float, float] | None  # None: a mask
    prompt: str | None = None
    feather: float = FEATHER


@dataclass(frozen=True)
class Making:
    """What it takes to draw a picture again, beyond the fields of Picture."""

    files: tuple[str, ...] = ()  # of the picture's adapters, in their order; without folders, which may contain people's names
    method: str = "sum"
    auto: bool = False  # automatic regions
    places: tuple[Place, ...] = ()  # of the last adapters
    isolate: str = "noise"
    start: float = 0.0
    background: str | None = None
    recipe_only: str | None = None  # what only a recipe can express, e.g. "a mask"


def default_start(*, auto: bool) -> float:
    return AUTO_START if auto else 0.0
