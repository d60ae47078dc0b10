"""The record of a run in its folder: what was computed and what happened (run.json), and every update (metrics.jsonl)."""

from __future__ import annotations

import json
import math
import re
import sys
from collections.abc import Callable
from contextlib import suppress
from datetime import datetime, timezone
from typing import Any

import torch

from ..errors import shown
from ..files import Owned, parse_json
from .checkpoint import METRICS, RECORD
from .progress import Step

PATHS = re.compile(
    r"'[^']*[/\\][^']*'|\"[^\"]*[/\\][^\"]*\"|(?<!\w)(?:[A-Za-z]:)?[/\\][^\s'\"]+"
)  # in messages of other libraries


class Record:
    """content: of run.json. say: called with one line for each event"""

    def __init__(self, folder: Owned, *, say: Callable[[str], None]) -> None:
        self.folder, self.say = folder, say
        self.content: dict[str, Any] = {}
        self._lines: list[str] = []  # of metrics.jsonl
        self._steps: list[Step] = []  # whose losses have not been read yet
        self._seconds = 0.0  # of the run before this process

    def go_on(self, content: dict[str, Any], metrics: bytes) -> None:
        """Continue those of a checkpoint."""
        self.content = {"events": [], **content}
        with suppress(ValueError, KeyError, TypeError):  # the lines before one that somebody spoilt
            for line in metrics.splitlines():
                self._seconds = float(parse_json(line)["seconds"])
                self._lines.append(line.decode())

    def event(self, text: str, *, step: int | None = None) -> None:
        """Report and record an event, the latter without paths, which another library may have put into the text."""
        self.say(shown(text))
        at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        happened = {"at": at, "step": self.content.get("step", 0) if step is None else step}
        self.content.setdefault("events", []).append(happened | {"what": PATHS.sub("(a path)", shown(text))})

    def timing(self, name: str, seconds: float) -> None:
        """Add to the seconds that this part of the run took."""
        timings = self.content.setdefault("seconds", {})
        timings[name] = round(timings.get(name, 0.0) + seconds, 3)

    def update(self, step: Step) -> None:
        """A line of metrics.jsonl. After a rollback it replaces the obsolete lines."""
        self._steps = [s for s in self._steps if s.index < step.index]
        del self._lines[step.index - 1 :]
        self._steps.append(step)
        self.content["step"] = step.index
        self.content["seconds"]["training"] = round(self._seconds + step.seconds, 3)

    def read_losses(self) -> None:
        """Read the losses of all recorded steps from the device at once."""
        losses = torch.stack([step.loss_tensor for step in self._steps]).tolist() if self._steps else []
        for step, loss in zip(self._steps, losses, strict=True):
            line = {"step": step.index, "loss": loss if math.isfinite(loss) else None, "rate": step.learning_rate}
            self._lines.append(json.dumps(line | {"seconds": round(self._seconds + step.seconds, 3)}))
        self._steps = []

    def metrics(self, end: int | None = None) -> bytes:
        """metrics.jsonl, up to step `end`."""
        return "".join(f"{line}\n" for line in self._lines[:end]).encode()

    def packed(self, **more: Any) -> bytes:
        """run.json, with `more` in it."""
        return json.dumps(self.content | more, indent=1).encode()

    def write(self, *, metrics: bool = False) -> None:
        self.content["peak_memory"] = peak_memory()
        with suppress(OSError):  # the events were reported, and the next checkpoint has the record
            self.folder.write(RECORD, self.packed())
            if metrics:
                self.folder.write(METRICS, self.metrics())


def peak_memory() -> dict[str, int]:
    """The peak memory of this process in bytes, by place."""
    peaks = {}
    with suppress(ImportError):  # Windows
        import resource

        peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    if torch.cuda.is_available():
        peaks["device"] = torch.cuda.max_memory_allocated()
    return peaks
