"""Preflight: the conflicts of a composition, its cost and a better choice, before the first step."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

from ..adapters.adapter import Adapter
from ..adapters.tools.inspection import Difference, difference
from ..base.base_model import BaseModel
from ..errors import AdapterBaseMismatch, setting
from ..injection.attached import other_weights, placed
from .weights import Weight


@dataclass(frozen=True)
class Overlap:
    """Two of the adapters, by name, and what they have in common."""

    first: str
    second: str
    difference: Difference


@dataclass(frozen=True)
class Preflight:
    """The report of `Composition.preflight`; `str()` gives it as lines.

    seconds     for one picture, from a trial of a few steps; None: not tried
    peak_bytes  peak memory on the GPU in the trial; None: not tried, or no GPU
    """

    method: str
    adapter_bytes: int
    overlaps: tuple[Overlap, ...]
    warnings: tuple[str, ...]
    recommended: str
    refused: tuple[str, ...] = ()  # why adapters cannot be attached to this base
    seconds: float | None = None
    peak_bytes: int | None = None

    def __str__(self) -> str:
        cost = f"adapters {self.adapter_bytes / 1e6:.1f} MB"
        if self.seconds is not None:
            cost += f", about {self.seconds:.1f} s a picture"
        if self.peak_bytes is not None:
            cost += f", {self.peak_bytes / 1e9:.1f} GB on the GPU"
        lines = [f"method {self.method}: {cost}"]
        lines += [f"{o.first} and {o.second}: {o.difference}" for o in self.overlaps]
        lines += [f"cannot be attached: {text}" for text in self.refused]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*lines, *([] if self.refused else [f"recommended: {self.recommended}"])])


def overlaps_of(adapters: Sequence[tuple[Adapter, Weight]]) -> tuple[Overlap, ...]:
    found = []
    for a, b in combinations([adapter for adapter, _ in adapters], 2):
        with suppress(AdapterBaseMismatch):  # adapters of two bases; `misfits` reports which one is wrong here
            found.append(Overlap(a.name, b.name, difference(a, b)))
    return tuple(found)


def misfits(base: BaseModel, adapters: Sequence[tuple[Adapter, Weight]]) -> tuple[list[str], list[str]]:
    """Messages about adapters that do not fit this base, and notes about those that fit but were trained on another."""
    refused, notes = [], []
    for adapter, weight in adapters:
        try:
            placed(adapter, base)
            notes.append(other_weights(adapter, base) if weight.value else None)
        except AdapterBaseMismatch as error:
            refused.append(str(error))
    return refused, [note for note in notes if note is not None]


def ways_to_place() -> str:
    """The settings that say where each subject goes."""
    auto = setting("regions", "auto", option="--auto-regions")
    return f"{auto}, or {setting('regions=[Region(...)]', option='--region NAME:0,0,0.5,1')} if you know the places"
