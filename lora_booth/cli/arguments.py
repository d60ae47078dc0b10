"""Parsers of what options and arguments hold: adapters with weights, seeds, regions."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingsError
from ..files import check_writable

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter

    Named = Sequence[tuple[str, tuple[Adapter, float]]]  # file name without its ending; adapter and weight

MOST_SEEDS = 10_000  # chosen


def check_adapter_file(out: Path) -> None:
    """Called before the work, not after it."""
    if out.suffix != ".safetensors":
        raise SettingsError(f"{out}: adapters are written as .safetensors; pass --out {out.name}.safetensors")
    if out.is_dir():
        raise SettingsError(f"{out}: is a folder; pass --out a file name")
    try:
        check_writable(out)
    except OSError as error:
        raise SettingsError(f"{out}: cannot be written ({error.strerror}); pass --out another place") from error


def file_and_weight(text: str) -> tuple[Path, float | None]:
    """ "ink.safetensors:0.6" -> path and weight; without a weight None, for the one that the adapter's card suggests."""
    path, colon, weight = text.rpartition(":")
    drive = len(path) == 1 and weight[:1] in ("\\", "/")  # C:\ink.safetensors
    if not colon or drive or Path(text).exists():
        return Path(text), None
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise SettingsError(f"{text}: {weight!r} is not a weight; write FILE:WEIGHT, e.g. ink.safetensors:0.6")
    return Path(path), number


def by_file(texts: Sequence[str]) -> Named:
    """The adapters of FILE or FILE:WEIGHT arguments, with their file's name (for `--region`) and weight."""
    from ..adapters.adapter import Adapter

    files = [file_and_weight(text) for text in texts]
    loaded = [(path.stem, Adapter.load(path), weight) for path, weight in files]
    return [(name, (adapter, adapter.card.weight if weight is None else weight)) for name, adapter, weight in loaded]


def weighted(texts: Sequence[str]) -> list[tuple[Adapter, float]]:
    return [item for _, item in by_file(texts)]


def parse_seeds(text: str) -> list[int]:
    """ "0-3" or "1,5,8" -> seeds, each once."""
    seeds: dict[int, None] = {}
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last) + 1) if dash else range(int(first), int(first) + 1)
            if not 0 < len(span) <= MOST_SEEDS or len(seeds) + len(span) > MOST_SEEDS:
                raise SettingsError(f"seeds {text!r} are {len(span)} pictures; allowed: 1 to {MOST_SEEDS}, e.g. 0-3")
            seeds.update(dict.fromkeys(span))
    except (ValueError, OverflowError):
        raise SettingsError(f"seeds {text!r} cannot be read; write them like 0-3 or 1,5,8") from None
    return list(seeds)


def parse_weights(text: str) -> list[float]:
    """ "0,0.4,1" -> factors."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = []
    if not weights or not all(math.isfinite(weight) for weight in weights):
        raise SettingsError(f"weights {text!r} cannot be read; write them like 0,0.4,0.8,1")
    return weights


def region_words(text: str) -> tuple[str, tuple[float, float, float, float], str | None]:
    """ "rex:0,0,0.5,1:a dog" -> name, box, prompt; without a prompt None."""
    name, _, rest = text.partition(":")
    numbers, colon, prompt = rest.partition(":")
    try:
        x0, y0, x1, y1 = (float(number) for number in numbers.split(","))
    except ValueError:
        raise SettingsError(f"region {text!r} cannot be read; write it like NAME:0,0,0.5,1 or NAME:0,0,0.5,1:PROMPT") from None
    return name, (x0, y0, x1, y1), prompt.strip('"') if colon else None
