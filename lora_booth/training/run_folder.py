"""A run's folder: its lock, its record (run.json, metrics.jsonl) and its checkpoints. docs/runs.md lists its files."""

from __future__ import annotations

import json
import math
import os
import re
import shutil
import socket
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from datetime import datetime, timezone
from hashlib import sha256
from pathlib import Path
from typing import Any

import torch
from filelock import FileLock, Timeout
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.writing import packed
from ..base.base_model import BaseModel
from ..errors import AdapterError, LoraBoothError, TrainingError, setting, shown
from ..files import make_folder, write_file
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
    unpacked_state,
)
from .identity import changes, differences, hash_of_latents, identity_of, surroundings
from .latents import LatentCache
from .mirror import Mirror
from .progress import Step
from .settings import SettledConfig
from .stopping import stop_words

CHECKPOINTS, LOCK = "checkpoints", "lock"
REMOVABLE = {  # the names that `clear` may remove
    CHECKPOINTS: OURS,
    SAMPLES: re.compile(r"\d{6,}(-\d+)?\.(png|safetensors)|samples\.jsonl|\..+\.tmp"),
    CROPS: re.compile(r"\d{4,}\.webp"),
}
PATHS = re.compile(
    r"'[^']*[/\\][^']*'|\"[^\"]*[/\\][^\"]*\"|(?<!\w)(?:[A-Za-z]:)?[/\\][^\s'\"]+"
)  # in messages of other libraries
CROP_SIDE = 256  # pixels of a crop for the report, at most; chosen
LOSSLESS_UP_TO = 128  # pixels; crops up to this are saved without loss; chosen

State = dict[str, Any]  # of a TrainingRun
Facts = dict[str, Any]  # of `run_facts`


class NoFolder:
    """The record of a run without a folder: events are printed, and nothing is saved."""

    path: Path | None = None
    copying_seconds = 0.0  # that the mirror will take at the end of the run

    def __init__(self, *, say: Callable[[str], None] = lambda text: None) -> None:
        self.say = say
        self.record: dict[str, Any] = {}

    @contextmanager
    def held(self) -> Iterator[None]:
        yield

    def open(
        self, facts: Callable[[], Facts], adapter_of: Callable[[State], Adapter], total: int, *, restart: bool
    ) -> tuple[bytes | None, Adapter | None]:
        """What the folder holds of this run: the state to continue from, or the finished adapter."""
        return None, None

    def begin(
        self, facts: Callable[[], Facts], base: BaseModel, config: SettledConfig, cache: LatentCache, *, processes: int
    ) -> None:
        """The run begins, or continues from what `open` found."""

    def event(self, text: str, *, step: int | None = None) -> None:
        """Report one line to the user and to the record."""
        self.say(shown(text))

    def timing(self, name: str, seconds: float) -> None:
        """Add to the seconds that this part of the run took."""

    def save_crop(self, number: int, square: Image.Image) -> None:
        """Save a small copy of a training square for the report."""

    def record_step(self, step: Step) -> None:
        """Record an update."""

    def due(self, step: int, *, every: int, minutes: float) -> bool:
        """Whether to save a checkpoint now."""
        return False

    def save(self, state_of: Callable[[], State], adapter_of: Callable[[State], Adapter]) -> None:
        """Save a checkpoint. A failure is an event, and leaves the last good one."""

    def end(self, adapter: Adapter, stop: int) -> None:
        """End the run, finished (stop 0) or not."""
        if stop:
            self.say(f"{stop_words(stop)} at step {adapter.card.steps}; without out= the run cannot be continued")

    def give_up(self, error: LoraBoothError, state_of: Callable[[], State], adapter_of: Callable[[State], Adapter]) -> None:
        """Save the last good state of a run that cannot continue."""


class RunFolder(NoFolder):
    """The folder of one run, held by this process. A failure in here never ends a training: it is reported and recorded.

    path    created if missing
    mirror  a folder on mounted storage for copies of the checkpoints
    say     called with one line for each event
    """

    def __init__(self, path: Path, *, mirror: Path | None = None, say: Callable[[str], None] = lambda text: None) -> None:
        super().__init__(say=say)
        self.path: Path = path
        self.mirror = None if mirror is None else Mirror(mirror / CHECKPOINTS)
        self.number = 0  # of checkpoints so far, including those of earlier runs
        self.saved: int | None = None  # the step of the last checkpoint
        self.save_seconds = 0.0
        self._saved_at = time.monotonic()
        self._lines: list[str] = []  # of metrics.jsonl
        self._written = 0  # how many of them are in the file; -1: the file has others
        self._steps: list[Step] = []  # whose losses have not been read yet
        self._seconds = 0.0  # of the run before this process
        self._found: Checkpoint | None = None
        self._damaged: list[Path] = []

    @contextmanager
    def held(self) -> Iterator[None]:
        """Raises TrainingError if another run has the folder, or it cannot be written."""
        with locked(self.path) as is_locked:
            if not is_locked:
                self.say(f"note: {shown(self.path.name)} is on storage without locks; never start a second run in it")
            self.tidy()
            if self.mirror is not None:
                self.mirror.begin()
                if same_storage(self.path, self.mirror.folder):
                    self.say("note: the mirror is on the same storage as the run folder, and is lost with it")
            try:
                yield
            except BaseException as error:
                if self.record.get("status") == "running":
                    self.record["status"] = f"interrupted by {type(error).__name__}"
                    self._write_record()
                raise

    @property
    def copying_seconds(self) -> float:  # type: ignore[override]
        return 0.0 if self.mirror is None else self.mirror.seconds

    # --- what is there

    @property
    def checkpoints(self) -> list[Path]:
        return [self.path / CHECKPOINTS, *([] if self.mirror is None else [self.mirror.folder])]

    def tidy(self) -> None:
        """Remove files that dead processes left unfinished."""
        with suppress(OSError):  # harmless leftovers
            for folder in self.checkpoints:
                if folder.is_dir():
                    prune(folder)
            for leftover in self.path.glob(".*.tmp"):
                leftover.unlink()

    def clear(self) -> None:
        """Discard the run, also in the mirror; other files stay. Raises TrainingError."""
        files = [self.path / name for name in (RECORD, METRICS, ADAPTER, SCORES, REPORT)]
        try:
            for folder in (*self.checkpoints, self.path / SAMPLES, self.path / CROPS):
                if folder.is_dir():
                    files += [path for path in folder.iterdir() if REMOVABLE[folder.name].fullmatch(path.name)]
            for path in files:
                if path.is_dir():
                    shutil.rmtree(path)
                else:
                    path.unlink(missing_ok=True)
        except OSError as error:
            raise TrainingError(
                f"{shown(self.path)}: the earlier run cannot be removed ({why(error)}); pass another "
                f"folder as {setting('out', option='--run')}"
            ) from error

    def open(
        self, facts: Callable[[], Facts], adapter_of: Callable[[State], Adapter], total: int, *, restart: bool
    ) -> tuple[bytes | None, Adapter | None]:
        """Raises TrainingError if the folder holds another run."""
        if restart:
            self.clear()
        checkpoint, file = self.find(facts()), self.finished()
        if checkpoint is None or checkpoint.step < total:
            if file is not None:
                self.say("the last checkpoint is gone: continuing with the adapter file, which is in half precision")
                return None, Adapter.load(file)
            return None if checkpoint is None else checkpoint.contents[STATE], None
        adapter = adapter_of(unpacked_state(checkpoint.contents[STATE], torch.device("cpu")))
        if file is None:
            self._begin(facts(), checkpoint.record()["surroundings"], total)
            self.end(adapter, 0)
        return None, adapter

    def find(self, facts: dict[str, Any]) -> Checkpoint | None:
        """The newest intact checkpoint, here or in the mirror. Raises TrainingError if it is of another run."""
        found = newest(self.checkpoints, damaged=self._damaged)
        there = read_record(self.path)
        record = found.record() if found is not None else there if there.get("status") == "finished" else {}
        if record and record.get("identity") != identity_of(facts):
            step = found.step if found is not None else 0
            place = self.path if found is None else found.folder.parent.parent
            raise TrainingError(
                f"{shown(place)}: holds a run with other photos, settings or base (step {step}): "
                f"{'; '.join(differences_in(record, facts)) or 'made by another version'}; "
                f"use another folder, or discard that run with {setting('restart', True)}"
            )
        if found is not None:
            self.saved = found.step
        self.number = max(0 if found is None else found.number, *map(number_of, self._damaged), 0)
        self._found = found
        return found

    def finished(self) -> Path | None:
        """The adapter's file, if the run is finished and the file unchanged."""
        made, file = read_record(self.path).get("adapter"), self.path / ADAPTER
        try:
            intact = made is not None and sha256(file.read_bytes()).hexdigest() == made["sha256"]
        except (OSError, TypeError, KeyError):
            intact = False
        return file if intact else None

    # --- the record

    def begin(
        self, facts: Callable[[], Facts], base: BaseModel, config: SettledConfig, cache: LatentCache, *, processes: int
    ) -> None:
        self._begin(facts(), surroundings(base, config, processes) | {"latents": hash_of_latents(cache)}, config.steps)

    def _begin(self, facts: dict[str, Any], where: dict[str, Any], total: int) -> None:
        """Begin, or continue from the checkpoint of `find`, whose record and metrics become the folder's again."""
        found, self._found = self._found, None
        if found is None:
            self.record = {"status": "running", "step": 0, "steps": total, "events": []}
            self._report_damage()
        else:
            self.record, there = found.record(), read_record(self.path)
            events = there.get("events", [])
            if there.get("identity") == identity_of(facts) and len(events) > len(self.record["events"]):
                self.record["events"] = events  # including those after the checkpoint
            self._lines = found.contents[METRICS].decode().splitlines()
            self._seconds = json.loads(self._lines[-1])["seconds"] if self._lines else 0.0
            self._written = -1
            others = changes(self.record["surroundings"], where)
            more = f", computed differently ({'; '.join(others)}): equal up to rounding" if others else ""
            self._report_damage()
            self._record_event(f"continued at step {found.step}{more}", step=found.step)
        if self._lines == []:
            self._written = -1  # those of an earlier run
        self.record |= {"status": "running", "facts": facts, "identity": identity_of(facts), "surroundings": where}
        self._write_metrics()
        self._write_record()

    def _report_damage(self) -> None:
        for folder in self._damaged:
            there = "" if folder.parent == self.checkpoints[0] else " in the mirror"
            self._record_event(f"checkpoint {folder.name}{there} is damaged: skipped")
        self._damaged = []

    def event(self, text: str, *, step: int | None = None) -> None:
        self._record_event(text, step=step)
        self._write_record()

    def _record_event(self, text: str, *, step: int | None = None) -> None:
        """Report and record an event, the latter without paths, which another library may have put into the text."""
        self.say(shown(text))
        at = datetime.now(timezone.utc).isoformat(timespec="seconds")
        happened = {"at": at, "step": self.record.get("step", 0) if step is None else step}
        self.record.setdefault("events", []).append(happened | {"what": PATHS.sub("(a path)", shown(text))})

    def timing(self, name: str, seconds: float) -> None:
        timings = self.record.setdefault("seconds", {})
        timings[name] = round(timings.get(name, 0.0) + seconds, 3)

    def save_crop(self, number: int, square: Image.Image) -> None:
        small = square.copy()
        small.info = {}
        small.thumbnail((CROP_SIDE, CROP_SIDE), Image.Resampling.LANCZOS)
        with suppress(OSError):  # the report then shows none
            folder = self.path / CROPS
            folder.mkdir(parents=True, exist_ok=True)
            small.save(folder / f"{number:04d}.webp", quality=80, lossless=small.width <= LOSSLESS_UP_TO)

    def record_step(self, step: Step) -> None:
        """Add a line to metrics.jsonl, written with the next checkpoint. After a rollback it replaces the obsolete lines."""
        if self._steps and step.index <= self._steps[-1].index:
            self._steps = [s for s in self._steps if s.index < step.index]
        if step.index <= len(self._lines):
            self._lines, self._written = self._lines[: step.index - 1], -1
        self._steps.append(step)
        self.record["step"] = step.index

    def _read_steps(self) -> None:
        """Read the losses of all recorded steps from the device at once."""
        if not self._steps:
            return
        losses = torch.stack([step.loss_tensor for step in self._steps]).tolist()
        for step, loss in zip(self._steps, losses, strict=True):
            line = {"step": step.index, "loss": loss if math.isfinite(loss) else None, "rate": step.learning_rate}
            self._lines.append(json.dumps(line | {"seconds": round(self._seconds + step.seconds, 3)}))
        self._steps = []

    def _metrics(self, first: int = 0, end: int | None = None) -> bytes:
        return "".join(f"{line}\n" for line in self._lines[first:end]).encode()

    def _write_metrics(self) -> None:
        try:
            if self._written < 0:
                write_file(self.path / METRICS, self._metrics())
            elif self._written < len(self._lines):
                with open(self.path / METRICS, "ab") as file:
                    file.write(self._metrics(self._written))
            self._written = len(self._lines)
        except OSError:
            self._written = -1  # it may be half written: rewrite the file next time

    def _write_record(self) -> None:
        self.record["peak_memory"] = peak_memory()
        with suppress(OSError):  # the event was reported, and the next checkpoint has the record
            write_file(self.path / RECORD, json.dumps(self.record, indent=1).encode())

    # --- checkpoints

    def due(self, step: int, *, every: int, minutes: float) -> bool:
        return step % every == 0 or time.monotonic() - self._saved_at >= 60 * minutes

    def save(self, state_of: Callable[[], State], adapter_of: Callable[[State], Adapter]) -> None:
        started, state = time.monotonic(), state_of()
        step = int(state["step"])
        try:
            self._read_steps()
            # as `adapter.save` writes it, without a check of every reader each time; raises if it is not finite
            file, _ = packed(adapter_of(state), "kohya", torch.float16, Path(ADAPTER))
            record = json.dumps(self.record | {"step": step}, indent=1).encode()
            contents = {STATE: packed_state(state), ADAPTER: file, METRICS: self._metrics(end=step), RECORD: record}
            checkpoint = publish(self.path / CHECKPOINTS, step, self.number + 1, contents)
        except (OSError, AdapterError, MemoryError) as error:
            self._saved_at = time.monotonic()
            earlier = "there is no earlier one" if self.saved is None else f"that of step {self.saved} stays"
            self.event(f"no checkpoint of step {step} ({why(error)}); {earlier}", step=step)
            return
        self.number, self.saved, self._saved_at = self.number + 1, step, time.monotonic()
        self.save_seconds = time.monotonic() - started
        self.timing("saving", self.save_seconds)
        self._write_metrics()
        self._write_record()
        if self.mirror is not None:
            self.mirror.copy(checkpoint)
            self._report_mirror()

    def _report_mirror(self, *, wait: bool = False) -> None:
        if self.mirror is None:
            return
        if wait:
            self.mirror.finish()
        for line in self.mirror.news():
            self.event(line)

    # --- the end

    def end(self, adapter: Adapter, stop: int) -> None:
        """Write the adapter of a finished run, and its hash to the record."""
        step, total = adapter.card.steps, self.record["steps"]
        if step == total:
            try:
                file = adapter.save(self.path / ADAPTER)
                self.record["adapter"] = {"sha256": sha256(file.read_bytes()).hexdigest(), "digest": adapter.digest()}
                self.record["status"] = "finished"
            except (OSError, AdapterError) as error:
                self.event(f"{ADAPTER} cannot be written ({why(error)}); run the same call again to retry", step=step)
                self.record["status"] = f"trained, without {ADAPTER}"
        else:
            saved = "saved" if self.saved == step else f"not saved, the last checkpoint is of step {self.saved}"
            self.event(f"{stop_words(stop)} at step {step} of {total}: {saved}; run the same call again to continue", step=step)
            self.record["status"] = stop_words(stop)
        self._report_mirror(wait=True)
        self._write_record()

    def give_up(self, error: LoraBoothError, state_of: Callable[[], State], adapter_of: Callable[[State], Adapter]) -> None:
        self.event(f"stopped: {error}")
        self.record["status"] = "stopped by an error"
        state = state_of()
        if state["step"] and state["step"] != self.saved:
            self.save(lambda: state, adapter_of)
            if self.saved == state["step"]:
                self.event(f"the last good state, of step {state['step']}, is saved")
        self._report_mirror(wait=True)
        self._write_record()


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of `folder`, created if missing. False: the storage has no locks. Raises TrainingError.

    The lock ends with its process, however that ends; `lock.txt` names the process for the error of a second run.
    """
    holder = folder / f"{LOCK}.txt"
    try:
        make_folder(folder)
        (folder / LOCK).touch()
    except (OSError, ValueError) as error:  # the second: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        place = setting("out", option="--run")
        raise TrainingError(f"{shown(folder)}: cannot be written ({reason}); pass another folder as {place}") from error
    # no lock file without flock: after a crash of the machine it would remain, and block the run
    lock = FileLock(folder / LOCK, timeout=0, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        by = "another process"
        with suppress(OSError):
            by = shown(holder.read_text("utf-8", "replace").strip()[:200]) or by
        raise TrainingError(
            f"{shown(folder)}: another run is using it ({by}); wait until it ends, "
            f"or pass another folder as {setting('out', option='--run')}"
        ) from None
    except (OSError, NotImplementedError):
        pass
    try:
        with suppress(OSError):  # a full disk does not matter here
            holder.unlink(missing_ok=True)  # of a process that was killed
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield lock.is_locked
    finally:
        with suppress(OSError):  # the storage is gone
            holder.unlink(missing_ok=True)
        with suppress(OSError):
            lock.release()


def differences_in(record: dict[str, Any], facts: dict[str, Any]) -> list[str]:
    """Empty if another version wrote the record."""
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
    """The reason without paths, which may contain people's names."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, AdapterError) and error.path is not None:
        return str(error).removeprefix(f"{shown(error.path)}: ")
    if isinstance(error, LoraBoothError):
        return str(error)
    return type(error).__name__


def peak_memory() -> dict[str, int]:
    """The peak memory of this process in bytes, by place."""
    peaks = {}
    try:
        import resource

        peaks["host"] = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024)
    except ImportError:  # Windows
        pass
    if torch.cuda.is_available():
        peaks["device"] = torch.cuda.max_memory_allocated()
    return peaks
