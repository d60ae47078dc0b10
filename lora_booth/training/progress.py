"""`Step`, and its display as a live bar or as plain lines."""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.contents import LoraFactors
    from ..injection.trainable import TrainableLora

EVERY = 5.0  # seconds between two lines on something that takes long: chosen
PATIENCE = 30.0  # seconds between two lines on updates, at most: chosen


@dataclass(frozen=True)
class Step:
    """One optimizer update, just done. On a GPU it may still be computing; reading a loss waits for it."""

    index: int  # from 1
    total: int
    learning_rate: float
    seconds: float  # since the loop started
    seconds_left: float
    loss_tensor: Tensor = field(repr=False, compare=False)  # ()
    smoothed_tensor: Tensor = field(repr=False, compare=False)  # ()
    lora: TrainableLora = field(repr=False, compare=False)

    @property
    def loss(self) -> float:
        return float(self.loss_tensor)

    @property
    def smoothed_loss(self) -> float:
        """Exponential mean over about 20 updates."""
        return float(self.smoothed_tensor)

    def factors(self) -> dict[str, LoraFactors]:
        """A copy of what was learnt so far, by module path."""
        return self.lora.factors()


class Display:
    """Shows nothing; the base of `Lines` and `Bar`."""

    def say(self, text: str) -> None:
        """One line of news."""

    def progress(self, what: str, done: int, total: int) -> None:
        """`done` of `total`, e.g. of the class images. The first call is the start."""

    def update(self, step: Step) -> None:
        """An optimizer update is done."""


class Labelled(Display):
    """One of several runs on one display: its lines begin with its name, its updates are one line or bar."""

    def __init__(self, whole: Display, name: str) -> None:
        self.whole, self.name = whole, name

    def say(self, text: str) -> None:
        self.whole.say(f"{self.name}: {text}")

    def progress(self, what: str, done: int, total: int) -> None:
        self.whole.progress(f"{self.name}: {what}", done, total)

    def update(self, step: Step) -> None:
        self.progress("training", step.index, step.total)


class Lines(Display):
    """About 20 lines for the updates of a run, or one every half minute if that is more, and one every few seconds before
    them; for logs and pipes."""

    def __init__(self) -> None:
        self.starts: dict[str, tuple[int, float]] = {}  # what was done then, and when
        self.said = time.monotonic()

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def progress(self, what: str, done: int, total: int) -> None:
        now = time.monotonic()
        first, began = self.starts.setdefault(what, (done, now))
        if done == first:
            self.said = now
            self.say(f"{what} {done}/{total}")
        elif done == total or now - self.said > EVERY:
            self.said = now
            self.say(f"{what} {done}/{total}  {clock((now - began) / (done - first) * (total - done))} left")

    def update(self, step: Step) -> None:
        now = time.monotonic()
        if step.index % max(1, step.total // 20) == 0 or step.index == step.total or now - self.said > PATIENCE:
            self.said = now
            self.say(f"step {step.index}/{step.total}  {described(step)}  {clock(step.seconds_left)} left")


class Bar(Display):
    """Live bars, in a terminal or a notebook."""

    def __init__(self, bars: Any) -> None:
        self.bars = bars
        self.tasks: dict[str, Any] = {}

    def say(self, text: str) -> None:
        self.bars.console.print(text, highlight=False, markup=False)

    def progress(self, what: str, done: int, total: int, note: str = "") -> None:
        if what not in self.tasks:
            self.tasks[what] = self.bars.add_task(what, total=total, completed=done, note=note)
        self.bars.update(self.tasks[what], completed=done, note=note)

    def update(self, step: Step) -> None:
        self.progress("training", step.index, step.total, described(step))


def described(step: Step) -> str:
    return f"loss {step.smoothed_loss:.4f}  rate {step.learning_rate:.1e}"


def clock(seconds: float) -> str:
    minutes, rest = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{rest:02d}" if minutes >= 60 else f"{minutes}:{rest:02d}"


@contextmanager
def display(wanted: bool) -> Iterator[Display]:
    """A bar in a terminal or notebook, lines elsewhere; nothing unless `wanted`."""
    if not wanted:
        yield Display()
        return
    from rich.console import Console

    console = Console(stderr=True)
    if not (console.is_terminal or (console.is_jupyter and find_spec("ipywidgets"))):  # without it, rich shows no bar there
        yield Lines()
        return
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("{task.fields[note]}"),
        TimeRemainingColumn(),
    )
    with Progress(*columns, console=console) as bars:
        yield Bar(bars)
