"""A run's folder: what it holds of a run, its checkpoints, and its end. docs/runs.md lists its files."""

from __future__ import annotations

import errno
import json
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress
from hashlib import sha256
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.writing import packed
from ..base.ai_mark import LOSSLESS, picture_bytes
from ..errors import AdapterError, LoraBoothError, TrainingError, same_again, setting, shown
from ..files import Owned
from .checkpoint import (
    ADAPTER,
    CROPS,
    FILES,
    METRICS,
    RECORD,
    STATE,
    Checkpoint,
    checkpoints_in,
    discard,
    identity_in,
    newest,
    packed_state,
    publish,
    read_record,
    unpacked_state,
)
from .job import Job, changes, differences, only_steps_differ
from .lock import locked
from .loop import learning_rate
from .mirror import Mirror
from .progress import Step
from .record import Record
from .remote import Place

CHECKPOINTS = "checkpoints"
CROP_SIDE = 256  # pixels of a crop for the report, at most; chosen

State = dict[str, Any]  # of a TrainingRun


class RunFolder:
    """The folder of one run, held by this process. A failure in here never ends a training: it is reported and recorded.

    path    created if missing
    mirror  a folder on other storage for copies of the checkpoints
    say     called with one line for each event
    """

    def __init__(self, path: Path, job: Job, *, mirror: Place | None = None, say: Callable[[str], None]) -> None:
        self.path, self.job, self.say = path, job, say
        self.owned = Owned(path)
        self.record = Record(self.owned, say=say)
        self.mirror: Mirror | None = None
        self.number = 0  # of checkpoints so far, including those of earlier runs
        self.saved: int | None = None  # the step of the last checkpoint
        self._opened = self._saved_at = time.monotonic()
        self._found: Checkpoint | None = None
        self._damaged: dict[Place, int] = {}
        self._held = ExitStack()
        self._copies = mirror

    def __enter__(self) -> RunFolder:
        return self

    def __exit__(self, kind: type[BaseException] | None, *rest: object) -> None:
        with self._held:
            if kind is not None and self.record.content.get("status") == "running":
                self.record.content["status"] = f"interrupted by {kind.__name__}"
                self.record.write()

    @property
    def copying_seconds(self) -> float:
        """That the mirror will take at the end of the run."""
        return 0.0 if self.mirror is None else self.mirror.seconds

    # --- what is there

    @property
    def checkpoints(self) -> list[Place]:
        return [self.path / CHECKPOINTS, *([] if self.mirror is None else [self.mirror.folder])]

    def open(self, *, restart: bool) -> tuple[State | None, Adapter | None]:
        """What is there of this run: a state to continue from, or the finished adapter.

        Raises TrainingError if another process has the folder, it holds another run, or cannot be written.
        """
        if not self._held.enter_context(locked(self.path)):
            self.say(f"note: {shown(self.path.name)} is on storage without locks; never start a second run in it")
        if self._copies is not None:
            self.mirror = Mirror(self._copies / CHECKPOINTS)
            with suppress(OSError):
                there = self.mirror.folder
                if isinstance(there, Path) and self.path.stat().st_dev == there.stat().st_dev:
                    self.say("note: the mirror is on the same storage as the run folder, and is lost with it")
        if restart:
            self.clear()
        self.check_names()
        checkpoint, file, total = self.find(), self.finished(), self.job.config.steps
        if file is not None and (checkpoint is None or checkpoint.step < total):
            self.say("the last checkpoint is gone: continuing with the adapter file, which is in half precision")
            return None, Adapter.load(file)
        if checkpoint is None:
            return None, None
        try:
            state = unpacked_state(checkpoint.contents[STATE])
            if state["step"] != checkpoint.step:
                raise ValueError("its state is of another step")
            adapter = self.job.adapter(state) if checkpoint.step >= total else None
        except (ValueError, KeyError, TypeError, AttributeError, LoraBoothError) as error:
            raise TrainingError(
                f"{shown(checkpoint.folder)}: is not a checkpoint of this run ({why(error)}); remove it, or discard the run "
                f"with {setting('restart', True)}"
            ) from error
        if adapter is None:
            return state, None
        self.complete_mirror(checkpoint)
        if file is None:
            self.begin(checkpoint.record().get("surroundings", {}))
            self.end(adapter, "")
        return None, adapter

    def complete_mirror(self, checkpoint: Checkpoint) -> None:
        """The last checkpoint of a finished run, for a mirror that failed then."""
        if self.mirror is not None and all(
            one["number"] != checkpoint.number for one in checkpoints_in(self.mirror.folder).values()
        ):
            self.mirror.copy(checkpoint)
            self.mirror.finish()
            while self.mirror.news:
                self.say(self.mirror.news.pop(0))

    def check_names(self) -> None:
        """Raises TrainingError if something that this library did not write has a name that the run needs."""
        try:
            for name in (RECORD, METRICS, ADAPTER):
                self.owned.check(name)
            if (self.path / CHECKPOINTS).is_symlink():
                raise FileExistsError(errno.EEXIST, f"{CHECKPOINTS} is a link")
        except OSError as error:
            raise TrainingError(
                f"{shown(self.path)}: {why(error)}, or was changed since; move it away, or use another folder"
            ) from error

    def clear(self) -> None:
        """Discard the run, also in the mirror: only files that are ours, and copies of this run. Raises TrainingError."""
        here = checkpoints_in(self.path / CHECKPOINTS)
        runs = {self.job.identity, read_record(self.path).get("identity"), *map(identity_in, here)}
        copies = {} if self.mirror is None else checkpoints_in(self.mirror.folder)
        try:
            for checkpoint, manifest in (here | copies).items():
                if checkpoint in here or identity_in(checkpoint) in runs:
                    discard(checkpoint, manifest)
            self.owned.clear()
        except OSError as error:
            raise TrainingError(
                f"{shown(self.path)}: the earlier run cannot be removed ({why(error)}); use another folder"
            ) from error

    def find(self) -> Checkpoint | None:
        """The newest intact checkpoint, here or in the mirror. Raises TrainingError if it is of another run."""
        self._found = found = newest(self.checkpoints, damaged=self._damaged)
        self.number = max([0, *self._damaged.values()])
        place: Place = self.path
        if found is None:
            there = read_record(self.path)
            record, step = there if there.get("status") == "finished" else {}, 0
        else:
            record, step, place = found.record(), found.step, found.folder.parent.parent
            self.saved, self.number = step, max(found.number, self.number)
        facts, ours = record.get("facts", {}), record.get("identity") == self.job.identity
        more = found is not None and step < self.job.config.steps and only_steps_differ(facts, self.job.facts)
        if (found is not None or record) and not ours and not more:
            raise TrainingError(
                f"{shown(place)}: holds a run with other photos, settings or base (step {step}): "
                f"{'; '.join(differences(facts, self.job.facts)) or 'made by another version'}; "
                f"use another folder, or discard that run with {setting('restart', True)}"
            )
        if self.mirror is not None:
            self.mirror.runs = {self.job.identity, record.get("identity")}
        return found

    def finished(self) -> Path | None:
        """The adapter's file, if the run is finished. `check_names` has seen that it is unchanged."""
        record, file = read_record(self.path), self.path / ADAPTER
        made = record.get("identity") == self.job.identity and "adapter" in record
        return file if made and file.is_file() else None

    # --- while it runs

    def begin(self, surroundings: dict[str, Any]) -> None:
        """The run begins, or continues: record and metrics of the checkpoint that `find` found become the folder's again."""
        record, found = self.record, self._found
        record.content = {"step": 0, "events": []}
        if found is not None:
            record.go_on(found.record(), found.contents.get(METRICS, b""))
            there = read_record(self.path)
            if there.get("identity") == self.job.identity:  # with the events after the checkpoint
                record.content["events"] = max(record.content["events"], there.get("events", []), key=len)
        for folder in self._damaged:
            where = "" if folder.parent == self.checkpoints[0] else " in the mirror"
            record.event(f"checkpoint {folder.name}{where} is damaged: skipped")
        steps = self.job.config.steps
        if found is not None:
            earlier = record.content.get("surroundings", {})
            both = [name for name in surroundings if name in earlier]  # an earlier version had other settings
            others = changes({name: earlier[name] for name in both}, {name: surroundings[name] for name in both})
            more = f", computed differently ({'; '.join(others)}): equal up to rounding" if others else ""
            record.event(f"continued at step {found.step}{more}", step=found.step)
            before = record.content.get("steps")
            if before != steps:
                rate = f"{learning_rate(self.job.config, found.step):.1e}"
                record.event(f"steps {before} -> {steps}: the learning rate is {rate} now, as in a run of {steps} steps")
                record.content.pop("adapter", None)
        record.content |= {
            "status": "running",
            "steps": steps,
            "facts": self.job.facts,
            "identity": self.job.identity,
            "surroundings": surroundings,
        }
        record.timing("preparing", time.monotonic() - self._opened)
        record.write(metrics=True)

    def event(self, text: str, *, step: int | None = None) -> None:
        """Report one line to the user and to the record."""
        self.record.event(text, step=step)
        self.record.write()

    def save_crop(self, number: int, image: Image.Image) -> None:
        """Save a small copy of a training picture for the report."""
        small = image.copy()
        small.thumbnail((CROP_SIDE, CROP_SIDE), Image.Resampling.LANCZOS)
        content = picture_bytes(small, "WEBP", generated=False, quality=80, lossless=small.width <= LOSSLESS)
        with suppress(OSError):  # the report then shows none
            self.owned.write(f"{CROPS}/{number:04d}.webp", content)

    def update(self, step: Step, state_of: Callable[[], State], *, save: bool) -> None:
        """Record an update. Save a checkpoint if one is due, or with `save`."""
        self.record.update(step)
        config, waited = self.job.config, time.monotonic() - self._saved_at
        if save or step.index % config.checkpoint_every == 0 or waited >= 60 * config.checkpoint_minutes:
            self.save(state_of)

    def save(self, state_of: Callable[[], State]) -> None:
        """Save a checkpoint. A failure is an event, and leaves the last good one."""
        started, state = time.monotonic(), state_of()
        step = int(state["step"])
        try:
            self.record.read_losses()
            # as `adapter.save` writes it, without a check of every reader each time; raises if it is not finite
            file, _ = packed(self.job.adapter(state), "kohya", torch.float16, Path(ADAPTER))
            contents = {
                STATE: packed_state(state),
                ADAPTER: file,
                METRICS: self.record.metrics(step),
                RECORD: self.record.packed(step=step),
            }
            checkpoint = publish(self.path / CHECKPOINTS, step, self.number + 1, contents)
        except (OSError, AdapterError, MemoryError) as error:
            self._saved_at = time.monotonic()
            earlier = "there is no earlier one" if self.saved is None else f"that of step {self.saved} stays"
            self.event(f"no checkpoint of step {step} ({why(error)}); {earlier}", step=step)
            return
        self.number, self.saved, self._saved_at = self.number + 1, step, time.monotonic()
        self.record.timing("saving", self._saved_at - started)
        self.record.write(metrics=True)
        if self.mirror is not None:
            self.mirror.copy(checkpoint)
            self.report_mirror()

    def report_mirror(self) -> None:
        while self.mirror is not None and self.mirror.news:
            self.event(self.mirror.news.pop(0))

    def close(self, status: str) -> None:
        """The run is over: wait for its last copy, and record its status."""
        self.record.content["status"] = status
        if self.mirror is not None:
            self.mirror.finish()
        self.report_mirror()
        self.record.write()

    # --- its end

    def end(self, adapter: Adapter, stopped: str) -> None:
        """The loop is over, finished or `stopped` by something: write the adapter of a finished run, and its hash."""
        step, total = adapter.card.steps, self.job.config.steps
        if step == total:
            try:
                with TemporaryDirectory() as scratch:
                    content = adapter.save(Path(scratch) / ADAPTER).read_bytes()
                self.owned.write(ADAPTER, content)
                self.record.content["adapter"] = {"sha256": sha256(content).hexdigest(), "digest": adapter.digest()}
                status = "finished"
            except (OSError, AdapterError) as error:
                self.event(f"{ADAPTER} cannot be written ({why(error)}); {same_again()} to retry", step=step)
                status = f"trained, without {ADAPTER}"
        else:
            saved = "saved" if self.saved == step else f"not saved, the last checkpoint is of step {self.saved}"
            self.event(f"{stopped} at step {step} of {total}: {saved}; {same_again()} to continue", step=step)
            status = stopped
        self.close(status)

    def give_up(self, error: LoraBoothError, state_of: Callable[[], State]) -> None:
        """Save the last good state of a run that cannot continue."""
        self.event(f"stopped: {error}")
        state = state_of()
        if state["step"] and state["step"] != self.saved:
            self.save(lambda: state)
            if self.saved == state["step"]:
                self.event(f"the last good state, of step {state['step']}, is saved")
        self.close("stopped by an error")


def fetch(run: Path, copies: Place, *, replace: bool) -> None:
    """Give the folder of a run that another machine trained what the mirror `copies` holds of it, unless the folder is as far.

    replace  also another run that is in the folder
    Raises TrainingError, OSError.
    """
    found, here = newest([copies / CHECKPOINTS]), newest([run / CHECKPOINTS])
    if found is None or not FILES <= found.contents.keys():
        return
    record, before = found.record(), read_record(run).get("identity")
    same = before == record.get("identity")
    if same and here is not None and here.number >= found.number:
        return
    if not (same or before is None or replace):
        raise TrainingError(f"{shown(run)}: holds another run than its mirror; use another folder")
    for old, manifest in checkpoints_in(run / CHECKPOINTS).items():
        discard(old, manifest)
    owned = Owned(run)
    owned.clear()
    contents = {name: found.contents[name] for name in FILES}
    publish(run / CHECKPOINTS, found.step, found.number, contents)
    record["status"] = "stopped"
    if found.step == record.get("steps"):
        owned.write(ADAPTER, contents[ADAPTER])
        record |= {"status": "finished", "adapter": {"sha256": sha256(contents[ADAPTER]).hexdigest()}}
    owned.write(METRICS, contents[METRICS])
    owned.write(RECORD, json.dumps(record, indent=1).encode())


def why(error: BaseException) -> str:
    """The reason without paths, which may contain people's names."""
    if isinstance(error, OSError):
        return error.strerror or type(error).__name__
    if isinstance(error, AdapterError) and error.path is not None:
        return str(error).removeprefix(f"{shown(error.path)}: ")
    if isinstance(error, LoraBoothError):
        return str(error)
    return type(error).__name__
