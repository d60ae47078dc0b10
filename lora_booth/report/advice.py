"""What a run's figures speak for, in plain sentences: did it work, and what to do now."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from .reading import Run, number, part

FEW_PHOTOS = 4
FEW_STEPS, MANY_STEPS = 50, 250  # times that each photo was seen
DRIFTED = 2.0  # times the loss of the first tenth


@dataclass(frozen=True)
class Advice:
    kind: Literal["good", "note", "warning"]
    text: str


def advice(run: Run) -> Iterator[Advice]:
    yield from of_status(run)
    yield from of_events(run)
    scores = run.scores.get("advice")
    for text in scores if isinstance(scores, list) else ():
        yield Advice("good" if "learnt well" in str(text) else "note", str(text))
    yield from of_exposure(run)
    yield from of_losses(run)
    if not run.samples:
        yield Advice("note", "No samples were drawn: sample_every=100 (--sample-every 100) shows how the subject comes in.")
    elif not scores:
        yield Advice("note", "Look along the samples: the best step shows the subject and still follows the prompt.")
    if run.config.get("prior_loss_weight") == 0:
        yield Advice("note", "Without prior preservation the bare class may come to look like the subject.")


def of_status(run: Run) -> Iterator[Advice]:
    if run.finished:
        yield Advice("good", f"Finished: {run.step} steps on {counted(run.photos, 'photo')}.")
    elif run.total:
        words = f"So far {run.step} of {run.total} steps ({run.record.get('status', 'running')})."
        yield Advice("warning", f"{words} The same call or command continues where it stopped.")


def of_events(run: Run) -> Iterator[Advice]:
    said = [str(event.get("what", "")) for event in run.events]
    if any("not finite" in text for text in said):
        yield Advice("warning", "The loss was not finite for a while: a lower learning rate, or the base in fp32, is safer.")
    elif any("learning rate is halved" in text for text in said):
        yield Advice("warning", "The loss jumped and the learning rate was halved: begin lower the next time.")
    if any("out of memory" in text for text in said):
        yield Advice("note", "Memory ran out and a saving was taken: set it from the start (see the events) to lose no time.")
    if any(text.startswith("no checkpoint") for text in said):
        yield Advice("warning", "A checkpoint could not be written (see the events): make room before the next run.")


def of_exposure(run: Run) -> Iterator[Advice]:
    photos = run.photos
    if not photos:
        return
    if photos < FEW_PHOTOS:
        yield Advice("note", f"{counted(photos, 'photo')}: some more, in other places and lights, make the subject freer.")
    batch = number(run.config.get("batch_size")) or 1
    seen = run.step * batch * (number(run.config.get("gradient_accumulation")) or 1) / photos
    words = f"Each photo was seen {seen:.0f} times"
    if run.finished and seen < FEW_STEPS:
        yield Advice("note", f"{words}: few. If the subject is not itself yet, train with more steps.")
    elif seen > MANY_STEPS:
        yield Advice(
            "note", f"{words}: many. If pictures repeat the photos or ignore the prompt, use fewer steps or a lower weight."
        )


def of_losses(run: Run) -> Iterator[Advice]:
    losses = [update.loss for update in run.updates if update.loss is not None]
    tenth = len(losses) // 10
    if tenth < 10:
        return
    first, last = sum(losses[:tenth]) / tenth, sum(losses[-tenth:]) / tenth
    if last > DRIFTED * first:
        yield Advice("warning", f"The loss rose from {first:.3f} to {last:.3f}: the learning rate is too high.")


def memory_of(run: Run) -> list[tuple[str, str]]:
    places = {"host": "memory of the process", "device": "memory of the GPU"}
    peaks = part(run.record, "peak_memory")
    return [(f"{text}, at most", f"{peaks[name] / 2**30:.1f} GiB") for name, text in places.items() if number(peaks.get(name))]


def counted(count: int, noun: str) -> str:
    return f"{count} {noun}{'' if count == 1 else 's'}"
