"""train(): photos in, one small adapter out. A run from start to finish, in order."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

from . import __version__
from .adapters.adapter import Adapter
from .adapters.contents import Card, LoraFactors, card_facts
from .base.base_model import BaseModel
from .config import LoraSpec, TrainingConfig, check
from .errors import SettingsError, TrainingError
from .planning.planning import fitted
from .subject.subject import Subject
from .subject.tokens import check_token
from .training.checkpoint import unpacked_state
from .training.distributed import joined
from .training.encoding import prepare
from .training.identity import identity_of, run_facts
from .training.memory_ladder import levels_between
from .training.progress import Step, display
from .training.run_folder import NoFolder, RunFolder
from .training.samples import draw_samples
from .training.settings import SettledConfig, settled
from .training.stopping import TIME_UP, Stopping, leave
from .training.tracking import Track, Tracking, trackers_of
from .training.training_mode import check_feasible
from .training.training_run import TrainingRun


@dataclass(frozen=True)
class Job:
    """What a run computes."""

    base: BaseModel
    subjects: Sequence[Subject]
    lora: LoraSpec
    config: SettledConfig

    @property
    def photos(self) -> int:
        return sum(len(subject.photos) for subject in self.subjects)

    def facts(self) -> dict[str, Any]:
        return run_facts(self.base, self.subjects, self.lora, self.config)

    def adapter(self, state: dict[str, Any]) -> Adapter:
        """The adapter of a `TrainingRun.state()`."""
        tensors = {name: tensor.detach().float().cpu() for name, tensor in state["lora"].items()}
        paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
        factors = {p: LoraFactors(tensors[f"{p}.down"], tensors[f"{p}.up"], self.lora.scale_alpha) for p in paths}
        return Adapter(factors, self.card(int(state["step"])))

    def adapter_of(self, step: Step) -> Adapter:
        """The adapter learnt up to `step`, which must be the last one."""
        return Adapter(step.factors(), self.card(step.index))

    def card(self, steps: int) -> Card:
        first = self.subjects[0]
        return Card(
            **card_facts(self.base),
            resolution=self.config.resolution,
            token=first.token,
            class_noun=first.class_noun,
            prompt=first.card_prompt,
            rank=self.lora.rank,
            alpha=self.lora.scale_alpha,
            steps=steps,
            photos=self.photos,
            library_version=__version__,
            title=" and ".join(f"{s.token} {s.class_noun}" for s in self.subjects),
        )


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
    """Teach `base` one subject, or several. The base is restored bit for bit, also after an exception.

    out         a folder for the run: its record, checkpoints, samples, report and `adapter.safetensors`. The same call on an
                interrupted run continues it, and ends with the same tensors as one that was never interrupted; on a finished
                run it returns the adapter. Ctrl-C, SIGTERM and SIGHUP save a checkpoint before they end the program.
    mirror      a folder on other storage: each checkpoint is copied there and read back, and a run whose own folder is lost
                continues from it
    time_limit  minutes for this call: before they are over, it saves and returns the adapter learnt so far
    restart     discard what `out` and `mirror` hold of an earlier run
    track       "tensorboard", "wandb" or another tracker of accelerate, or several: losses, rates, settings, samples
    on_step     called after every optimizer update
    progress    show step, loss, rate and time left: a live bar in a terminal or notebook, plain lines elsewhere
    Under `accelerate launch` or `torchrun` each process takes its share of every batch, and all return the same adapter.
    Raises SettingsError, TrainingError, PhotoError.
    """
    began = time.monotonic()
    subjects = [subject] if isinstance(subject, Subject) else list(subject)
    if not subjects:
        raise SettingsError("no subject to train on; pass one, e.g. Subject.from_folder('photos/rex', ...)")
    if out is None and (mirror is not None or restart):
        raise SettingsError("mirror and restart need a run folder; pass out=")
    check(time_limit is None or time_limit > 0, f"time_limit {time_limit}", "above 0 (minutes)")
    out, mirror = (None if place is None else Path(os.path.expanduser(place)) for place in (out, mirror))
    lora = lora or LoraSpec()
    config = settled(config or TrainingConfig(), base, sum(len(s.photos) for s in subjects))
    check_feasible(base, lora, config)
    trackers = trackers_of(track, out) if track else []
    job, processes = Job(base, subjects, lora, config), joined(base.device)

    with ExitStack() as stack:
        stack.enter_context(processes.watched())
        shown = stack.enter_context(display(progress and processes.main))
        folder = NoFolder(say=shown.say)
        if out is not None and processes.main:
            folder = RunFolder(out, mirror=mirror, say=shown.say)
        stack.callback(leave_report, folder)  # before all that holds the folder: its last entry is in the report

        # what the folder holds of this run: nothing, a state to continue from, or the finished adapter
        def opened() -> tuple[bytes | None, Adapter | None]:
            stack.enter_context(folder.held())
            return folder.open(job.facts, job.adapter, config.steps, restart=restart)

        state, done = processes.from_main(opened)
        if processes.count > 1:
            processes.check_same(identity_of(job.facts()), "photos, settings or base")
        if done is not None:
            shown.say(f"finished already, {config.steps} steps")
            return done

        # photos -> latents, with settings that fit into memory; a resumed run keeps those that it started with
        for note in token_notes(base, subjects):
            shown.say(f"note: {note}")
        planned = config if state is not None else fitted(base, lora, config, photos=job.photos, say=shown.say)
        cache = processes.main_first(
            lambda: prepare(base, subjects, lora=lora, config=config, display=shown, on_square=folder.save_crop)
        )
        folder.begin(job.facts, base, config, cache, processes=processes.count)
        folder.timing("preparing", time.monotonic() - began)
        if not lora.text_encoder:
            stack.enter_context(base.only_unet_on_device())

        # latents -> adapter
        steps = TrainingRun(
            base,
            cache,
            lora,
            config,
            resume=None if state is None else unpacked_state(state, base.device),
            levels=levels_between(config, planned),
            say=folder.event,
            processes=processes,
        )
        stack.callback(steps.close)
        del state
        tracking = None
        if trackers and processes.main:
            tracking = Tracking(trackers, say=folder.event)
            tracking.begin({**asdict(config), **asdict(lora), "base": base.name})
            stack.callback(tracking.close)
        stopping = Stopping(began=began, time_limit=time_limit)
        if out is not None:
            stack.enter_context(stopping)
        observers = [shown.update, *([tracking.update] if tracking else []), *([on_step] if on_step else [])]
        shown.start(config.steps)
        stop = follow(job, steps, folder, stopping, tracking, observers)
        adapter = job.adapter(steps.state())
        folder.end(adapter, stop)
        processes.maximum(0)  # no process leaves while another still needs it
        if (stop := stopping.signal or stop) not in (0, TIME_UP):
            leave(stop)
        return adapter


def follow(
    job: Job,
    steps: TrainingRun,
    folder: NoFolder,
    stopping: Stopping,
    tracking: Tracking | None,
    observers: Sequence[Callable[[Step], None]],
) -> int:
    """Every update, with its checkpoints and samples. Returns why it stopped: 0 for the end, TIME_UP or a signal's number."""
    config, began = job.config, time.monotonic()
    try:
        if config.sample_every and steps.step == 0:
            draw_samples(folder, tracking, job.base, job.subjects[0], config, 0, None)
        for step in steps:
            asked = stopping.asked(copying=folder.copying_seconds)
            stop, last = steps.processes.maximum(asked), step.index == config.steps
            folder.record_step(step)
            if stop or last or folder.due(step.index, every=config.checkpoint_every, minutes=config.checkpoint_minutes):
                folder.save(steps.state, job.adapter)
            for observe in observers:
                observe(step)
            if stop and not last:
                return stop
            if config.sample_every and step.index % config.sample_every == 0:
                adapter = None if last else partial(job.adapter_of, step)
                draw_samples(folder, tracking, job.base, job.subjects[0], config, step.index, adapter)
        return 0
    except TrainingError as error:
        folder.give_up(error, steps.state, job.adapter)
        raise
    finally:
        folder.timing("training", time.monotonic() - began)


def token_notes(base: BaseModel, subjects: Sequence[Subject]) -> Iterator[str]:
    """Problems of the chosen tokens, by the base's tokenizer."""
    for subject in subjects:
        report = check_token(subject.token, base.tokenizer, known_rare=base.rare_tokens)
        yield from (*report.problems, *report.warnings)


def leave_report(folder: NoFolder) -> None:
    """A page on what this process did in the folder, however it ended."""
    if folder.path is not None and folder.record:
        from .report.report import try_report

        try_report(folder.path, folder.say)
