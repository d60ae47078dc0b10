"""What a run's folder tells. Whatever is missing or torn is left out: a report says what there is."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import AdapterError, SettingsError, shown
from ..training.checkpoint import ADAPTER, CROPS, METRICS, RECORD, SAMPLES, SCORES, number_of
from ..training.samples import SAMPLE_LIST


@dataclass(frozen=True)
class Update:
    step: int  # from 1
    loss: float | None  # None: not finite
    rate: float
    seconds: float  # since the run began


@dataclass(frozen=True)
class Sample:
    step: int
    prompt: str
    seed: int
    file: Path


@dataclass(frozen=True)
class Run:
    """A run's folder as it was read."""

    path: Path
    record: Mapping[str, Any]
    updates: tuple[Update, ...]
    samples: tuple[Sample, ...]  # by step
    crops: tuple[Path, ...]
    scores: Mapping[str, Any] = field(default_factory=dict)  # of this very run
    adapter_file: Path | None = None

    @cached_property
    def adapter(self) -> Adapter | None:
        try:
            return None if self.adapter_file is None else Adapter.load(self.adapter_file)
        except (AdapterError, OSError):
            return None

    @property
    def config(self) -> dict[str, Any]:
        return part(self.record, "facts", "config")

    @property
    def lora(self) -> dict[str, Any]:
        return part(self.record, "facts", "lora")

    @property
    def subjects(self) -> list[dict[str, Any]]:
        found = part(self.record, "facts").get("subjects")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []

    @property
    def photos(self) -> int:
        return sum(len(one.get("photos") or ()) for one in self.subjects)

    @property
    def step(self) -> int:
        return whole(self.record.get("step"))

    @property
    def total(self) -> int:
        return whole(self.record.get("steps"))

    @property
    def finished(self) -> bool:
        return self.record.get("status") == "finished"

    @property
    def events(self) -> list[dict[str, Any]]:
        found = self.record.get("events")
        return [one for one in found if isinstance(one, dict)] if isinstance(found, list) else []


def read_run(path: Path) -> Run:
    """Raises SettingsError for a folder that is not of a run."""
    try:
        record = json.loads((path / RECORD).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        record = None
    if not isinstance(record, dict):
        raise SettingsError(
            f"{shown(path)}: no {RECORD} that can be read, so not the folder of a run; give that of train(out=...)"
        )
    return Run(
        path,
        record,
        tuple(updates(path / METRICS)),
        tuple(sorted(samples(path / SAMPLES), key=lambda sample: sample.step)),
        tuple(sorted((path / CROPS).glob("*.webp"))),
        scores_of(path / SCORES, record.get("identity")),
        adapter_in(path, record),
    )


def lines_of(path: Path) -> Iterator[dict[str, Any]]:
    try:
        text = path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError):
        return
    for line in text.splitlines():
        try:
            found = json.loads(line)
        except ValueError:  # half of a line, by a power cut
            continue
        if isinstance(found, dict):
            yield found


def updates(path: Path) -> Iterator[Update]:
    for line in lines_of(path):
        loss = number(line.get("loss"))
        yield Update(whole(line.get("step")), loss, number(line.get("rate")) or 0.0, number(line.get("seconds")) or 0.0)


def samples(folder: Path) -> list[Sample]:
    """The last of those that went into one file."""
    found = {}
    for line in lines_of(folder / SAMPLE_LIST):
        file = folder / Path(str(line.get("file"))).name
        if file.is_file():
            found[file] = Sample(whole(line.get("step")), str(line.get("prompt")), whole(line.get("seed")), file)
    return list(found.values())


def scores_of(path: Path, identity: Any) -> dict[str, Any]:
    try:
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) and found.get("identity") == identity else {}


def adapter_in(path: Path, record: Mapping[str, Any]) -> Path | None:
    """The run's own, or the newest checkpoint's."""
    if record.get("status") == "finished" and (path / ADAPTER).is_file():
        return path / ADAPTER
    return max(path.glob(f"checkpoints/[0-9]*/{ADAPTER}"), key=lambda file: number_of(file.parent), default=None)


def part(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        found = record.get(name)
        record = found if isinstance(found, dict) else {}
    return dict(record)


def number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def whole(value: Any) -> int:
    return int(number(value) or 0)
