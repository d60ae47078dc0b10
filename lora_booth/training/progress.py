"""`Step`, and its display as a live bar or as plain lines."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from torch import Tensor

    from ..adapters.contents import LoraFactors
    from ..injection import TrainableLora


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

    def class_images(self, done: int, total: int) -> None:
        """`done` of `total` class images exist."""

    def encoded(self, done: int, total: int) -> None:
        """`done` of `total` pictures are encoded."""

    def start(self, total: int) -> None:
        """The loop starts; it makes `total` updates."""

    def update(self, step: Step) -> None:
        """An update is done."""


class Lines(Display):
    """About 20 lines for a run, for logs and pipes."""

    def say(self, text: str) -> None:
        print(text, file=sys.stderr, flush=True)

    def class_images(self, done: int, total: int) -> None:
        self.say(f"class images {done}/{total}")

    def encoded(self, done: int, total: int) -> None:
        if done == total:
            self.say(f"{total} pictures encoded")

    def update(self, step: Step) -> None:
        if step.index % max(1, step.total // 20) == 0 or step.index == step.total:
            self.say(f"step {step.index}/{step.total}  {described(step)}  {clock(step.seconds_left)} left")


class Bar(Display):
    """A live bar, in a terminal or a notebook."""

    def __init__(self, progress: Any) -> None:
        self.progress = progress
        self.images: Any = None
        self.encodings: Any = None
        self.steps: Any = None

    def say(self, text: str) -> None:
        self.progress.console.print(text, highlight=False, markup=False)

    def class_images(self, done: int, total: int) -> None:
        if self.images is None:
            self.images = self.progress.add_task("class images", total=total, note="")
        self.progress.update(self.images, completed=done, total=total)

    def encoded(self, done: int, total: int) -> None:
        if self.encodings is None:
            self.encodings = self.progress.add_task("encoding", total=total, note="")
        self.progress.update(self.encodings, completed=done, total=total)

    def start(self, total: int) -> None:
        self.steps = self.progress.add_task("training", total=total, note="")

    def update(self, step: Step) -> None:
        self.progress.update(self.steps, completed=step.index, note=described(step))


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
    with Progress(*columns, console=console) as progress:
        yield Bar(progress)
