"""train(): photos in, one small adapter out. The loop itself is `training_steps`."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

from PIL import Image

from .adapters.adapter import Adapter
from .adapters.contents import LoraFactors
from .base.base_model import BaseModel
from .config import LoraSpec, TrainingConfig, check
from .errors import AdapterError, SettingsError, TrainingError
from .planning.planning import fitted
from .subject.subject import Subject
from .training.card import make_card
from .training.checkpoint import SAMPLES, STATE, Checkpoint, unpacked_state
from .training.distributed import Ranks, joined
from .training.identity import hash_of_latents, identity_of, run_facts, surroundings
from .training.latents import LatentCache
from .training.loop import TrainingRun
from .training.memory_ladder import rungs_between, says_out_of_memory
from .training.modes import check_feasible
from .training.preparation import prepare, token_notes
from .training.progress import Display, Step, display
from .training.run_folder import RunFolder, why
from .training.samples import keep, rows_of, sample
from .training.settings import settled
from .training.stopping import TIME_UP, Stopping, leave, stop_words
from .training.tracking import Track, Tracking, trackers_of


@dataclass(frozen=True)
class Job:
    """What a run shall compute."""

    base: BaseModel
    subjects: Sequence[Subject]
    lora: LoraSpec
    config: TrainingConfig  # settled

    @property
    def total(self) -> int:
        return self.config.steps or 0

    def facts(self) -> dict[str, Any]:
        return run_facts(self.base, self.subjects, self.lora, self.config)

    def adapter(self, state: dict[str, Any]) -> Adapter:
        """The adapter of a `TrainingRun.state()`."""
        tensors = {name: tensor.detach().float().cpu() for name, tensor in state["lora"].items()}
        paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        factors = {p: LoraFactors(tensors[f"{p}.down"], tensors[f"{p}.up"], self.lora.scale_alpha) for p in paths}
        return self.adapter_of(factors, int(state["step"]))

    def adapter_of(self, factors: dict[str, LoraFactors], step: int) -> Adapter:
        return Adapter(factors, make_card(self.base, self.subjects, self.lora, replace(self.config, steps=step)))


def train(
    base: BaseModel,
    subject: Subject | Sequence[Subject],
    *,
    lora: LoraSpec | None = None,
    config: TrainingConfig | None = None,
    out: str | Path | None = None,
    mirror: str | Path | None = None,
    time_limit: float | None = None,
    restart: bool = False,
    track: Track = (),
    on_step: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Adapter:
    """Teach `base` one subject, or several; `base` comes back bit-identical, also after an exception.

    out         a folder for the run: its record, checkpoints, samples, report, `adapter.safetensors`. The same call on an
                interrupted run continues it and ends with the same tensors as one that was never interrupted; on a
                finished one it returns the adapter. Ctrl-C, SIGTERM and SIGHUP then save before they end the program.
    mirror      a folder on other storage, where each checkpoint is copied to and read back, and from which a run continues
                whose own folder is lost
    time_limit  minutes for this call: it saves and returns the adapter so far before they are over
    restart     forget what `out` and `mirror` hold of an earlier run
    track       "tensorboard", "wandb" or another tracker of accelerate, or several: losses, rates, settings, samples
    on_step     called after every optimizer update
    progress    show step, loss, rate and time left: a live bar in a terminal or notebook, else plain lines
    Under `accelerate launch` or `torchrun` each process takes its share of every batch, and all return the same adapter.
    Raises SettingsError, TrainingError, PhotoError.
    """
    began = time.monotonic()
    subjects = [subject] if isinstance(subject, Subject) else list(subject)
    if not subjects:
        raise SettingsError("no subject to train on; give one, as Subject.from_folder(...)")
    if out is None and (mirror is not None or restart):
        raise SettingsError("mirror and restart are for a run with a folder; give out= one")
    out, mirror = (None if place is None else Path(os.path.expanduser(place)) for place in (out, mirror))
    check(time_limit is None or time_limit > 0, f"time_limit {time_limit}", "above 0 (minutes)")
    lora = lora or LoraSpec()
    config = settled(config or TrainingConfig(), base, sum(len(s.photos) for s in subjects))
    check_feasible(base, lora, config)
    trackers = trackers_of(track, out)
    job, ranks = Job(base, subjects, lora, config), joined(base.device)
    with ExitStack() as stack:
        stack.enter_context(ranks.watched())
        shown = stack.enter_context(display(progress and ranks.main))
        folder: RunFolder | None = None  # the main process's
        if out is not None and ranks.main:
            folder = RunFolder(out, mirror=mirror, say=shown.say)
            stack.callback(leave_report, folder)  # below all that holds the folder: its last word is in it
        tell = shown.say if folder is None else folder.event

        def opened() -> tuple[str, bytes | None, Adapter | None]:
            checkpoint, done = (None, None) if folder is None else open_folder(folder, job, restart, stack)
            return identity_of(job.facts()), None if checkpoint is None else checkpoint.contents[STATE], done

        identity, kept, done = ranks.from_main(opened)
        if identity != identity_of(job.facts()):
            raise TrainingError("this process has other photos, settings or another base than the main one")
        if done is not None:
            shown.say(f"finished already, {job.total} steps")
            return done
        for note in token_notes(base, subjects):
            shown.say(f"note: {note}")
        square = partial(try_crop, folder)
        planned = config  # a run that goes on does so with the savings that it began with
        if kept is None:
            planned = fitted(base, lora, config, photos=sum(len(s.photos) for s in subjects), say=shown.say)
        cache = ranks.main_first(lambda: prepare(base, subjects, lora=lora, config=config, shown=shown, on_square=square))
        if folder is not None:
            where = surroundings(base, config, ranks.count) | {"latents": hash_of_latents(cache)}
            folder.begin(job.facts(), where, job.total)
            folder.timing("preparing", time.monotonic() - began)
        if not lora.text_encoder:
            stack.enter_context(base.only_unet_on_device())
        state = None if kept is None else unpacked_state(kept, base.device)
        savings = rungs_between(config, planned)
        steps = TrainingRun(base, cache, lora, config, resume=state, savings=savings, say=tell, ranks=ranks)
        stack.callback(steps.close)
        del kept, state
        tracking = Tracking(trackers if ranks.main else (), tell=tell)
        tracking.begin({**asdict(config), **asdict(lora), "base": base.name})
        stack.callback(tracking.close)
        stopping = Stopping(began=began, time_limit=time_limit)
        if out is not None:
            stack.enter_context(stopping)
        stop = loop(job, steps, folder, tracking, stopping=stopping, ranks=ranks, shown=shown, on_step=on_step)
        adapter = job.adapter(steps.state())
        if folder is not None:
            folder.end(adapter, stop)
        elif steps.step < job.total:
            tell(f"{stop_words(stop)} at step {steps.step} of {job.total}; without out= it cannot be continued")
        ranks.highest(0)  # nobody leaves while another still needs it
        stop = stopping.signal or stop
        if stop not in (0, TIME_UP):
            leave(stop)
        return adapter


def open_folder(folder: RunFolder, job: Job, restart: bool, stack: ExitStack) -> tuple[Checkpoint | None, Adapter | None]:
    """What it holds of this run: the checkpoint to go on from, or the adapter when it is finished."""
    stack.enter_context(folder.held())
    if restart:
        folder.clear()
    checkpoint, file = folder.find(job.facts()), folder.finished()
    if checkpoint is None or checkpoint.step < job.total:
        if file is not None:
            folder.say("the last checkpoint is gone: the adapter is that of the file, in half precision")
        return checkpoint, None if file is None else Adapter.load(file)
    done = job.adapter(unpacked_state(checkpoint.contents[STATE], job.base.device))
    if file is None:
        folder.begin(job.facts(), checkpoint.record()["surroundings"], job.total)
        folder.end(done, 0)
    return checkpoint, done


def loop(
    job: Job,
    steps: TrainingRun,
    folder: RunFolder | None,
    tracking: Tracking,
    *,
    stopping: Stopping,
    ranks: Ranks,
    shown: Display,
    on_step: Callable[[Step], None] | None,
) -> int:
    """Every update, with its savings and samples. Why it stopped: 0 for the end, TIME_UP or a signal's number."""
    config, began = job.config, time.monotonic()
    shown.start(job.total)
    try:
        if folder is not None and config.sample_every and steps.step == 0:
            try_samples(job, folder, tracking, 0, None)
        for step in steps:
            copying = 0.0 if folder is None or folder.mirror is None else folder.mirror.seconds
            stop, last = ranks.highest(stopping.asked(copying=copying)), step.index == job.total
            if folder is not None:
                folder.note(step)
                if stop or last or folder.due(step.index, every=config.checkpoint_every, minutes=config.checkpoint_minutes):
                    state = steps.state()
                    folder.save(state, job.adapter(state))
            shown.update(step)
            tracking.update(step)
            if on_step is not None:
                on_step(step)
            if stop and not last:
                return stop
            if folder is not None and config.sample_every and step.index % config.sample_every == 0:
                try_samples(job, folder, tracking, step.index, None if last else steps.factors)
        return 0
    except TrainingError as error:
        if folder is not None:
            state = steps.state()
            folder.give_up(error, state, job.adapter(state))
        raise
    finally:
        if folder is not None:
            folder.timing("training", time.monotonic() - began)


def try_samples(job: Job, folder: RunFolder, tracking: Tracking, step: int, factors: dict[str, LoraFactors] | None) -> None:
    """A round of samples, and the adapter that drew them (None: it is kept elsewhere). They are no reason to lose a run."""
    began, rows = time.monotonic(), rows_of(job.subjects[0], job.config)
    try:
        images = sample(job.base, rows, job.config)
        adapter = None if factors is None else job.adapter_of(factors, step)
        keep(folder.path / SAMPLES, step, rows, images, adapter)
        tracking.samples(step, rows, images)
    except (OSError, RuntimeError, AdapterError) as error:
        if isinstance(error, RuntimeError) and not says_out_of_memory(error):
            raise
        reason = "out of memory" if isinstance(error, RuntimeError) else why(error)
        folder.event(f"no samples of step {step}: {reason}", step=step)
    folder.timing("sampling", time.monotonic() - began)


def try_crop(folder: RunFolder | None, number: int, square: Image.Image) -> None:
    """A small copy of a training square for the report; without a folder, or room in it, none."""
    from .report.report import keep_crop

    if folder is None:
        return
    try:
        keep_crop(folder.path, number, square)
    except OSError:
        pass


def leave_report(folder: RunFolder) -> None:
    """Of what this process has done in the folder, however it ended."""
    from .report.report import try_report

    if folder.record:
        try_report(folder.path, folder.say)


def training_steps(
    base: BaseModel, cache: LatentCache, *, lora: LoraSpec | None = None, config: TrainingConfig | None = None
) -> Iterator[Step]:
    """Yield after each optimizer update, so stopping early loses nothing: `step.factors()` is what is learnt so far."""
    lora = lora or LoraSpec()
    config = settled(config or TrainingConfig(), base, len(cache.photos))
    run = TrainingRun(base, cache, lora, config)
    try:
        yield from run
    finally:
        run.close()
