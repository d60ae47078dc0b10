"""Preflight: the conflicts of a composition, its cost and a better choice, before the first step."""

from __future__ import annotations

import re
import warnings
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import combinations

from ..adapters.adapter import Adapter
from ..adapters.tools.difference import Difference, difference
from ..base.base_model import BaseModel
from ..errors import AdapterBaseMismatch, OtherBaseWarning, setting, shown
from ..injection import placements
from ..subject.wording import with_article
from .subjects import find_phrase
from .weights import Weight

SYNTAX = (  # of AUTOMATIC1111 and others
    (re.compile(r"<(?:lora|lyco|hypernet)\w*:[^<>]*>", re.IGNORECASE), "pass the adapter's file with its weight instead"),
    (re.compile(r"\(+[^()]*:\s*[-+]?[\d.]+\s*\)+|\({2,}[^()]+\){2,}"), "prompts have no weights here: leave the brackets out"),
    (re.compile(r"\[[^\[\]]*[:|][^\[\]]*\]"), "prompts do not change between steps here: leave the brackets out"),
)


@dataclass(frozen=True)
class Overlap:
    """Two of the adapters, by name, and what they have in common."""

    first: str
    second: str
    difference: Difference


@dataclass(frozen=True)
class Preflight:
    """The report of `Composition.preflight`; `str()` gives it as lines.

    passes      U-Net passes per denoising step; 1 for a plain picture
    seconds     for one picture, from a trial of a few steps; None: not tried
    peak_bytes  peak memory on the GPU in the trial; None: not tried, or no GPU
    """

    method: str
    passes: int
    adapter_bytes: int
    overlaps: tuple[Overlap, ...]
    warnings: tuple[str, ...]
    recommended: str
    refused: tuple[str, ...] = ()  # why adapters cannot be attached to this base
    seconds: float | None = None
    peak_bytes: int | None = None

    def __str__(self) -> str:
        cost = f"{self.passes} pass{'es' if self.passes > 1 else ''} a step"
        if self.seconds is not None:
            cost += f", about {self.seconds:.1f} s a picture"
        if self.peak_bytes is not None:
            cost += f", {self.peak_bytes / 1e9:.1f} GB on the GPU"
        lines = [f"method {self.method}: {cost}; adapters {self.adapter_bytes / 1e6:.1f} MB"]
        lines += [f"{o.first} and {o.second}: {o.difference}" for o in self.overlaps]
        lines += [f"cannot be attached: {text}" for text in self.refused]
        lines += [f"warning: {text}" for text in self.warnings]
        return "\n".join([*lines, *([] if self.refused else [f"recommended: {self.recommended}"])])


def subjects_of(adapters: Sequence[tuple[Adapter, Weight]]) -> list[Adapter]:
    """The adapters with a token: a style has none."""
    return [adapter for adapter, weight in adapters if adapter.card.token and weight.value]


def clashes(adapters: Sequence[tuple[Adapter, Weight]], method: str, isolate: str) -> list[str]:
    """Warnings about subjects that will blend, one line each."""
    subjects = subjects_of(adapters)
    found = []
    for a, b in combinations(subjects, 2):
        if a.card.token == b.card.token:
            found.append(
                f"two adapters share the token {a.card.token!r}: the prompt cannot tell them apart; "
                "pass a region with a prompt for each, or retrain one of them with another token"
            )
        elif a.card.class_noun and a.card.class_noun == b.card.class_noun and (method, isolate) != ("regions", "noise"):
            found.append(
                f"{a.card.words!r} and {b.card.words!r} are both {with_article(a.card.class_noun)}: they will blend; "
                f"use regions with {setting('isolate', 'noise')}"
            )
    if len(subjects) > 1 and method == "sum":
        found.append(f"method sum blends {len(subjects)} subjects; use regions, which separate them")
    return found


def unnamed(adapters: Sequence[tuple[Adapter, Weight]], prompts: Sequence[str]) -> list[str]:
    """Warnings about subjects that their prompt leaves out: "a dog" draws any dog."""
    found = []
    for (adapter, weight), prompt in zip(adapters, prompts, strict=True):
        if adapter.card.token and weight.value and prompt and find_phrase(prompt, adapter) is None:
            found.append(f"the prompt does not name {adapter.card.words!r}; add it, or you get any {adapter.card.class_noun}")
    return found


def other_syntax(prompt: str) -> list[str]:
    """Warnings about what other programs read as instructions."""
    return [
        f"{found.group()!r} is read as plain words; {remedy}"
        for pattern, remedy in SYNTAX
        for found in pattern.finditer(prompt)
    ]


def unread(base: BaseModel, adapters: Sequence[tuple[Adapter, Weight]], *prompts: str | None) -> list[str]:
    """Warnings about prompts whose end the text encoders do not read, and the subjects that are lost with it."""
    found = []
    for prompt in prompts:
        if not prompt or not (rest := base.cut_off(prompt)):
            continue
        places = [(subject, find_phrase(prompt, subject)) for subject in subjects_of(adapters)]
        lost = [one.card.words for one, place in places if place is not None and base.cut_off(prompt[: place.end()])]
        remedy = (
            f"move {' and '.join(map(repr, lost))} forward, or shorten it" if lost else "shorten it to have all of it drawn"
        )
        found.append(f"the base does not read the end of a prompt this long ({shown(rest)!r}); {remedy}")
    return found


def overlaps_of(adapters: Sequence[tuple[Adapter, Weight]]) -> tuple[Overlap, ...]:
    found = []
    for a, b in combinations([adapter for adapter, _ in adapters], 2):
        with suppress(AdapterBaseMismatch):  # adapters of two bases; `misfits` reports which one is wrong here
            found.append(Overlap(a.name, b.name, difference(a, b)))
    return tuple(found)


def misfits(base: BaseModel, adapters: Sequence[tuple[Adapter, Weight]]) -> tuple[list[str], list[str]]:
    """Messages about adapters that do not fit this base, and about those that fit but were trained on another."""
    refused = []
    with warnings.catch_warnings(record=True) as noted:
        warnings.simplefilter("always", OtherBaseWarning)
        for adapter, weight in adapters:
            try:
                placements(base, [(adapter, weight.value)])
            except AdapterBaseMismatch as error:
                refused.append(str(error))
    return refused, [str(note.message) for note in noted if issubclass(note.category, OtherBaseWarning)]


def recommendation(adapters: Sequence[tuple[Adapter, Weight]]) -> str:
    if len(subjects_of(adapters)) < 2:
        return 'method "sum": one subject, and styles'
    return "{}, or {} if you know the places".format(*ways_to_place())


def ways_to_place() -> tuple[str, str]:
    """The settings that say where each subject goes."""
    auto = setting("regions", "auto", option="--auto-regions")
    return auto, setting("regions=[Region(...)]", option="--region NAME:0,0,0.5,1")
