"""A run's folder: its lock, its record (run.json, metrics.jsonl), its checkpoints. docs/runs.md says what is in it."""

from __future__ import annotations

import json
import math
import re
import shutil
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch

from ..adapters.adapter import Adapter
from ..adapters.writing import packed
from ..errors import AdapterError, LoraBoothError, TrainingError, shown
from ..files import write_file
from .checkpoint import (
    ADAPTER,
    CROPS,
    METRICS,
    OURS,
    RECORD,
    REPORT,
    SAMPLES,
    SCORES,
    STATE,
    Checkpoint,
    newest,
    number_of,
    packed_state,
    prune,
    publish,
    read_record,
)
from .identity import changes, differences, identity_of
from .lock import locked
from .mirror import Mirror
from .progress import Step
from .stopping import stop_words

CHECKPOINTS = "checkpoints"
OWN = {  # the names that `clear` may remove
    CHECKPOINTS: OURS,
    SAMPLES: re.compile(r"\d{6,}(-\d+)?\.(png|safetensors)|samples\.jsonl|\..+\.tmp"),
    CROPS: re.compile(r"\d{4,}\.webp"),
}
PATHS = re.compile(r"'[^']*[/\\][^']*'|\"[^\"]*[/\\][^\"]*\"|(?<!\w)(?:[A-Za-z]:)?[/\\][^\s'\"]+")  # in what others say


class RunFolder:
    """The folder of one run, held by this process. Nothing that fails in here ends a training: it is told and recorded.

    path    is made
    mirror  a folder on mounted storage for copies of the checkpoints
    say     told one line of every event
    """

    def __init__(self, path: Path, *, mirror: Path | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        self.path, self.say = path, say
        self.mirror = None if mirror is None else Mirror(mirror / CHECKPOINTS)
        self.record: dict[str, Any] = {}
        self.number = 0  # of checkpoints, also of those that this run has forgotten
        self.saved: int | None = None  # the step of the last checkpoint
        self.save_seconds = 0.0
        self._saved_at = time.monotonic()
        self._lines: list[str] = []  # of metrics.jsonl
        self._written = 0  # how many of them are in the file; -1: it holds others
        self._steps: list[Step] = []  # whose losses nobody has read yet
        self._seconds = 0.0  # of the run before this process
        self._found: Checkpoint | None = None
        self._damaged: list[Path] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises TrainingError when another run has it, or it cannot be written."""
        with locked(self.path) as is_locked:
            if not is_locked:
                self.say(f"note: no locks can be had where {shown(self.path.name)} is; let no second run into it")
            self.tidy()
            if self.mirror is not None:
                self.mirror.begin()
                if same_storage(self.path, self.mirror.folder):
                    self.say("note: the mirror is on the same storage as the run's folder, and is lost with it")
            try:
                yield
            except BaseException as error:
                if self.record.get("status") == "running":
                    self.record["status"] = f"broken off by {type(error).__name__}"
                    self._write_record()
                raise

    # --- what is there

    @property
    def checkpoints(self) -> list[Path]:
        return [self.path / CHECKPOINTS, *([] if self.mirror is None else [self.mirror.folder])]

    def tidy(self) -> None:
        """Remove what dead processes left half-written."""
        try:
            for folder in self.checkpoints:
                if folder.is_dir():
                    prune(folder)
            for litter in self.path.glob(".*.tmp"):
                litter.unlink()
        except OSError:
            pass  # it is only litter

    def clear(self) -> None:
        """Forget the run, also in the mirror; what is not of a run stays. Raises TrainingError."""
        files = [self.path / name for name in (RECORD, METRICS, ADAPTER, SCORES, REPORT)]
        try:
            for folder in (*self.checkpoints, self.path / SAMPLES, self.path / CROPS):
                if folder.is_dir():
                    files += [path for path in folder.iterdir() if OWN[folder.name].fullmatch(path.name)]
            for path in files:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise TrainingError(
                f"{shown(self.path)}: the earlier run cannot be removed ({why(error)}); give out= another folder"
            ) from error

    def find(self, facts: dict[str, Any]) -> Checkpoint | None:
        """The newest whole checkpoint, here or in the mirror. Raises TrainingError when it is of another run."""
        found = newest(self.checkpoints, damaged=self._damaged)
        there = read_record(self.path)
        record = found.record() if found is not None else there if there.get("status") == "finished" else {}
        if record and record.get("identity") != identity_of(facts):
            step = found.step if found is not None else 0
            place = self.path if found is None else found.folder.parent.parent
            raise TrainingError(
                f"{shown(place)}: holds a run with other photos, settings or base (step {step}): "
                f"{'; '.join(differences_in(record, facts)) or 'made by another version'}; "
                "use another folder, or begin anew with restart=True (--restart)"
            )
        if found is not None:
            self.saved = found.step
        self.number = max(0 if found is None else found.number, *map(number_of, self._damaged), 0)
        self._found = found
        return found

    def finished(self) -> Path | None:
        """The adapter's file when the run is at its end and the file is as it was written."""
        made, file = read_record(self.path).get("adapter"), self.path / ADAPTER
        try:
            whole = made is not None and sha256(file.read_bytes()).hexdigest() == made["sha256"]
        except (OSError, TypeError, KeyError):
            whole = False
        return file if whole else None

    # --- the record

    def begin(self, facts: dict[str, Any], where: dict[str, Any], total: int) -> None:
        """The run begins, or goes on from what `find` found: the checkpoint's record and metrics become the folder's again."""
        found, self._found = self._found, None
        if found is None:
            self.record = {"status": "running", "step": 0, "steps": total, "events": []}
            self._tell_damage()
        else:
            self.record, there = found.record(), read_record(self.path)
            events = there.get("events", [])
            if there.get("identity") == identity_of(facts) and len(events) > len(self.record["events"]):
                self.record["events"] = events  # also of what came after the checkpoint
            self._lines = found.contents[METRICS].decode().splitlines()
            self._seconds = json.loads(self._lines[-1])["seconds"] if self._lines else 0.0
            self._written = -1
            others = changes(self.record["surroundings"], where)
            more = f", computed otherwise ({'; '.join(others)}): equal but for rounding" if others else ""
            self._tell_damage()
            self.event(f"continued at step {found.step}{more}", step=found.step, write=False)
        if self._lines == []:
            self._written = -1  # of a run before this one
        self.record |= {"status": "running", "facts": facts, "identity": identity_of(facts), "surroundings": where}
        self._write_metrics()
        self._write_record()

    def _tell_damage(self) -> None:
        for folder in self._damaged:
            there = "" if folder.parent == self.checkpoints[0] else " in the mirror"
            self.event(f"checkpoint {folder.name}{there} is damaged: passed over", write=False)
        self._damaged = []

    def event(self, text: str, *, step: int | None = None, write: bool = True) -> None:
        """One line for the user and for run.json; into that without the paths that another library may have put in it."""
        self.say(shown(text))
        text = PATHS.sub("(a path)", shown(text))
        at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        happened = {"at": at, "step": self.record.get("step", 0) if step is None else step, "what": text}
        self.record.setdefault("events", []).append(happened)
        if write:
            self._write_record()

    def timing(self, name: str, seconds: float) -> None:
        """Add to the seconds that this part of the run has taken."""
        timings = self.record.setdefault("seconds", {})
        timings[name] = round(timings.get(name, 0.0) + seconds, 3)

    def note(self, step: Step) -> None:
        """An update is done: a line of metrics.jsonl, written with the next checkpoint. After a rollback it takes the place of
        the lines that no longer count."""
        if self._steps and step.index <= self._steps[-1].index:
            self._steps = [s for s in self._steps if s.index < step.index]
        if step.index <= len(self._lines):
            self._lines, self._written = self._lines[: step.index - 1], -1
        self._steps.append(step)
        self.record["step"] = step.index

    def _read_steps(self) -> None:
        """The losses of all noted steps in one look at the device."""
        if not self._steps:
            return
        losses = torch.stack([step.loss_tensor for step in self._steps]).tolist()
        for step, loss in zip(self._steps, losses, strict=True):
            line = {"step": step.index, "loss": loss if math.isfinite(loss) else None, "rate": step.learning_rate}
            self._lines.append(json.dumps(line | {"seconds": round(self._seconds + step.seconds, 3)}))
        self._steps = []

    def _metrics(self, first: int = 0) -> bytes:
        return "".join(f"{line}\n" for line in self._lines[first:]).encode()

    def _write_metrics(self) -> None:
        try:
            if self._written < 0:
                write_file(self.path / METRICS, self._metrics())
            elif self._written < len(self._lines):
                with open(self.path / METRICS, "ab") as file:
                    file.write(self._metrics(self._written))
            self._written = len(self._lines)
        except OSError:
            self._written = -1  # perhaps half of it is there: the whole next time

    def _write_record(self) -> None:
        self.record["peak_memory"] = peak_memory()
        try:
            write_file(self.path / RECORD, json.dumps(self.record, indent=1).encode())
        except OSError:
            pass  # the event itself has been told, and the next checkpoint holds the record

    # --- checkpoints

    def due(self, step: int, *, every: int, minutes: float) -> bool:
        return step % every == 0 or time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, state: dict[str, Any], adapter: Adapter) -> bool:
        """Publish a checkpoint; a failure is an event, and the last good one stays."""
        started, step = time.monotonic(), int(state["step"])
        try:
            self._read_steps()
            # as `adapter.save` writes it, without asking every reader each time; raises when it is not finite
            file, _ = packed(adapter, "kohya", torch.float16, Path(ADAPTER))
            record = json.dumps(self.record | {"step": step}, indent=1).encode()
            lines = "".join(f"{line}\n" for line in self._lines[:step]).encode()
            contents = {STATE: packed_state(state), ADAPTER: file, METRICS: lines, RECORD: record}
            checkpoint = publish(self.path / CHECKPOINTS, step, self.number + 1, contents)
        except (OSError, AdapterError, MemoryError) as error:
            self._saved_at = time.monotonic()
            kept = "no earlier one is there" if self.saved is None else f"that of step {self.saved} stays"
            self.event(f"no checkpoint of step {step} ({why(error)}); {kept}", step=step)
            return False
        self.number, self.saved, self._saved_at = self.number + 1, step, time.monotonic()
        self.save_seconds = time.monotonic() - started
        self.timing("saving", self.save_seconds)
        self._write_metrics()
        self._write_record()
        if self.mirror is not None:
            self.mirror.copy(checkpoint)
            self.hear_mirror()
        return True

    def hear_mirror(self, *, wait: bool = False) -> None:
        if self.mirror is None:
            return
        if wait:
            self.mirror.finish()
        for line in self.mirror.news():
            self.event(line)

    # --- the end

    def end(self, adapter: Adapter, stop: int) -> None:
        """The run is done (stop 0: its adapter's file, and its hash in the record), or ends before that."""
        step, total = adapter.card.steps, self.record["steps"]
        if step == total:
            try:
                file = adapter.save(self.path / ADAPTER)
                self.record["adapter"] = {"sha256": sha256(file.read_bytes()).hexdigest(), "digest": adapter.digest()}
                self.record["status"] = "finished"
            except (OSError, AdapterError) as error:
                self.event(f"{ADAPTER} cannot be written ({why(error)}); the same call tries again", step=step)
                self.record["status"] = f"trained, but for {ADAPTER}"
        else:
            saved = "saved" if self.saved == step else f"not saved, the last checkpoint is of step {self.saved}"
            self.event(f"{stop_words(stop)} at step {step} of {total}: {saved}; the same call continues", step=step)
            self.record["status"] = stop_words(stop)
        self.hear_mirror(wait=True)
        self._write_record()

    def give_up(self, error: LoraBoothError, state: dict[str, Any], adapter: Adapter) -> None:
        """The run cannot go on: its last good state is saved."""
        self.event(f"stopped: {error}")
        self.record["status"] = "stopped by an error"
        if state["step"] and state["step"] != self.saved and self.save(state, adapter):
            self.event(f"the last good state, of step {state['step']}, is saved")
        self.hear_mirror(wait=True)
        self._write_record()


def differences_in(record: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """None where the record is not as this version writes it."""
    try:
        return differences(record["facts"], facts)
    except (KeyError, TypeError, AttributeError):
        return []


def same_storage(one: Path, other: Path) -> bool:
    try:
        return one.stat().st_dev == other.stat().st_dev
    except OSError:
        return False


def why(error: BaseException) -> str:
    """Without paths, which hold people's names."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, AdapterError) and error.path is not None:
        return str(error).removeprefix(f"{shown(error.path)}: ")
    if isinstance(error, LoraBoothError):
        return str(error)
    return type(error).__name__


def peak_memory() -> dict[str, int]:
    """Bytes that this process has held at most, by place."""
    peaks = {}
    try:
        import resource

        peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        pass
    if torch.cuda.is_available():
        peaks["device"] = torch.cuda.max_memory_allocated()
    return peaks
