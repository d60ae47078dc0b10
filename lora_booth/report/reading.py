"""Read a run's folder, and what its figures suggest. Missing or damaged parts are left out."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

from ..errors import SettingsError, counted, setting, shown
from ..files import json_lines, number, read_table
from ..training.checkpoint import CROPS, METRICS, RECORD, SAMPLES, SCORES, read_record, saved_adapters
from ..training.samples import SAMPLE_LIST

# chosen, not measured: thresholds of the advice
FEW_PHOTOS = 4
FEW_STEPS, MANY_STEPS = 50, 250  # times that each photo was seen
DRIFTED = 2.0  # times the loss of the first tenth


class Update(NamedTuple):
    step: int  # from 1
    loss: float | None  # None: not finite
    rate: float
    seconds: float  # since the run began


class Sample(NamedTuple):
    step: int
    prompt: str
    seed: int
    file: Path


class Event(NamedTuple):
    at: str  # UTC
    step: int
    what: str


@dataclass(frozen=True)
class Run:
    """A run's folder, as read; what is missing or damaged is empty."""

    path: Path
    record: Mapping[str, Any]
    finished: bool
    step: int
    total: int
    config: Mapping[str, Any]
    subjects: Sequence[Mapping[str, Any]]
    photos: int
    events: Sequence[Event]
    updates: Sequence[Update]
    samples: Sequence[Sample]  # by step
    crops: Sequence[Path]
    scores: Mapping[str, Any]  # empty where they are of another run
    adapters: Mapping[int, str]  # names of files in the folder, by step


def read_run(path: Path) -> Run:
    """Raises SettingsError if the folder is not that of a run."""
    record = read_record(path)
    if not record:
        raise SettingsError(f"{shown(path)}: no readable {RECORD}; pass the folder of a run, e.g. runs/rex")
    subjects, scores = dicts(part(record, "facts").get("subjects")), read_table(path / SCORES)
    return Run(
        path=path,
        record=record,
        finished=record.get("status") == "finished",
        step=integer(record.get("step")),
        total=integer(record.get("steps")),
        config=part(record, "facts", "config"),
        subjects=subjects,
        photos=sum(len(dicts(one.get("photos"))) for one in subjects),
        events=list(events(record)),
        updates=list(updates(path / METRICS)),
        samples=sorted(samples(path / SAMPLES), key=lambda sample: sample.step),
        crops=sorted((path / CROPS).glob("*.webp")),
        scores=scores if scores.get("identity") == record.get("identity") else {},
        adapters={step: file.relative_to(path).as_posix() for step, file in saved_adapters(path).items()},
    )


def events(record: Mapping[str, Any]) -> Iterator[Event]:
    for one in dicts(record.get("events")):
        at = str(one.get("at", "")).replace("T", " ").removesuffix("+00:00")
        yield Event(at, integer(one.get("step")), str(one.get("what", "")))


def updates(path: Path) -> Iterator[Update]:
    for line in json_lines(path):
        loss, rate, seconds = number(line.get("loss"), 0), number(line.get("rate"), 0), number(line.get("seconds"), 0)
        yield Update(integer(line.get("step")), loss, rate or 0.0, seconds or 0.0)


def samples(folder: Path) -> list[Sample]:
    """The samples in the folder; of several lines for one file, the last counts."""
    found = {}
    for line in json_lines(folder / SAMPLE_LIST):
        file = folder / Path(str(line.get("file"))).name
        if os.path.isfile(file):
            found[file] = Sample(integer(line.get("step")), str(line.get("prompt")), integer(line.get("seed")), file)
    return list(found.values())


def part(record: Mapping[str, Any], *names: str) -> dict[str, Any]:
    for name in names:
        found = record.get(name)
        record = found if isinstance(found, dict) else {}
    return dict(record)


def dicts(value: Any) -> list[dict[str, Any]]:
    return [one for one in value if isinstance(one, dict)] if isinstance(value, list) else []


def integer(value: Any) -> int:
    return int(number(value, 0) or 0)


# --- advice


class Advice(NamedTuple):
    """One sentence about what the run's figures suggest."""

    kind: Literal["good", "note", "warning"]
    text: str


OF_EVENTS = {  # words of an event -> advice; the first that an event contains counts
    "not finite": Advice("warning", "The loss was not finite for a while: use a lower learning rate, or the base in fp32."),
    "learning rate is halved": Advice("warning", "The loss jumped and the learning rate was halved: start with a lower one."),
    "out of memory": Advice("note", "Memory ran out: start with the setting that was switched on then (see the events)."),
    "no checkpoint": Advice("warning", "A checkpoint could not be written (see the events): free disk space before the next."),
}


def advice(run: Run) -> Iterator[Advice]:
    if run.finished:
        yield Advice("good", f"Finished: {run.step} steps on {counted(run.photos, 'photo')}.")
    elif run.total:
        words = f"{run.step} of {run.total} steps so far ({run.record.get('status', 'running')})."
        yield Advice("warning", f"{words} Run the same call or command again to continue.")
    found = {next((words for words in OF_EVENTS if words in event.what), "") for event in run.events}
    yield from (one for words, one in OF_EVENTS.items() if words in found)
    scores = run.scores.get("advice")
    for text in scores if isinstance(scores, list) else ():
        yield Advice("good" if "learnt well" in str(text) else "note", str(text))
    if run.photos:
        yield from of_exposure(run)
    yield from of_losses(run)
    if not run.samples:
        yield Advice("note", f"No samples were drawn: {setting('sample_every', 100)} shows how the subject develops.")
    elif not scores:
        yield Advice("note", "Compare the samples: the best step shows the subject and still follows the prompt.")
    if run.config.get("prior_loss_weight") == 0:
        yield Advice("note", "Without prior preservation, the plain class may come to look like the subject.")


def of_exposure(run: Run) -> Iterator[Advice]:
    if run.photos < FEW_PHOTOS:
        few = counted(run.photos, "photo")
        yield Advice("note", f"{few}: a few more, in other places and light, help the subject appear in new scenes.")
    batch, accumulated = (number(run.config.get(name)) or 1 for name in ("batch_size", "gradient_accumulation"))
    seen = run.step * batch * accumulated / run.photos
    words = f"Each photo was seen {seen:.0f} times"
    if run.finished and seen < FEW_STEPS:
        again = f"run the same again with more steps, e.g. {setting('steps', 2 * run.step)}, which continues this run"
        yield Advice("note", f"{words}, which is few. If pictures do not look like the subject yet, {again}.")
    elif seen > MANY_STEPS:
        more = "If pictures repeat the photos or ignore the prompt, use fewer steps or a lower weight."
        yield Advice("note", f"{words}, which is many. {more}")


def of_losses(run: Run) -> Iterator[Advice]:
    losses = [update.loss for update in run.updates if update.loss is not None]
    tenth = len(losses) // 10
    if tenth < 10:
        return
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    if last > DRIFTED * first:
        yield Advice("warning", f"The loss rose from {first:.3f} to {last:.3f}: the learning rate is too high.")
