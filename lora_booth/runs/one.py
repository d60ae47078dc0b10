"""train(): photos in, one small adapter out. A run from start to finish, in order."""

from __future__ import annotations

import time
from collections.abc import Callable, Generator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from ..adapters.adapter import Adapter
from ..adapters.contents import LoraFactors
from ..base.base_model import BaseModel
from ..base.sizes import drawable, size_note
from ..config import LoraSpec, TrainingConfig, check, settled, typed
from ..errors import SettingsError, TrainingError, setting, shown
from ..planning.budget import is_ample
from ..planning.planning import levels_that_fit
from ..subject.subject import Subject
from ..subject.tokens import check_token
from ..training.checkpoint import REPORT
from ..training.distributed import ALONE, Processes, joined
from ..training.encoding import prepare, subjects_of, token_reading
from ..training.job import Job
from ..training.progress import Display, Step, display
from ..training.remote import Place, Remote, mirror_at
from ..training.run_folder import RunFolder
from ..training.samples import draw_samples
from ..training.together import Together
from ..training.tracking import Track, Tracking, trackers_of
from ..training.training_mode import check_feasible
from ..training.training_run import TrainingRun, beginning_with
from .stopping import TIME_UP, Stopping, leave, words_of

Course = Generator[None, None, tuple[Adapter, int]]


def train(
    base: BaseModel | str | Path,
    subject: Subject | Sequence[Subject],
    *,
    lora: LoraSpec | None = None,
    config: TrainingConfig | None = None,
    init: Adapter | str | Path | None = None,
    out: str | Path | None = None,
    mirror: str | Path | None = None,
    time_limit: float | None = None,
    restart: bool = False,
    track: Track = (),
    on_step: Callable[[Step], None] | None = None,
    progress: bool = True,
) -> Adapter:
    """Teach `base` one subject, or several. The base is restored bit for bit, also after an exception.

    init        an adapter or its file to begin with, instead of a new one; `lora` is then what it has, and may have a higher
                rank. Optimizer and learning rate begin anew
    out         a folder for the run: its record, checkpoints, samples, report and `adapter.safetensors`. The same call on an
                interrupted run continues it, and ends with the same tensors as one that was never interrupted; on a finished
                run it returns the adapter, or goes on if there are more `steps` now. Ctrl-C, SIGTERM and SIGHUP save a
                checkpoint before they end the program.
    mirror      a folder on other storage, or its URL ("s3://bucket/rex"): each checkpoint is copied there and read back, and
                a run whose own folder is lost continues from it
    time_limit  minutes for this call: before they are over, it saves and returns the adapter learnt so far
    restart     discard what `out` and `mirror` hold of an earlier run
    track       "tensorboard", "wandb" or another tracker of accelerate, or several: losses, rates, settings, samples
    on_step     called after every optimizer update
    progress    show step, loss, rate and time left: a live bar in a terminal or notebook, plain lines elsewhere
    Under `accelerate launch` or `torchrun` each process takes its share of every batch, and all return the same adapter.
    Raises SettingsError, TrainingError, PhotoError, AdapterError.
    """
    began = time.monotonic()
    subjects = subjects_of(subject)
    place, copies, time_limit = checked_places(out, mirror, restart, time_limit)
    if place is not None:
        check_place(place, copies, subjects)
    base = BaseModel.load(base) if isinstance(base, str | Path) else typed("base", base, BaseModel)
    lora, begun, first = beginning_with(init, base, typed("lora", lora, LoraSpec | None))
    config = settled(config, base, sum(len(one.photos) for one in subjects))
    drawable(base, config.sample_size, "sample_size")
    check_feasible(base, lora, config)
    trackers = trackers_of(track, place) if track else []
    job = Job(base, subjects, lora, config, begun)

    stopping = Stopping(began=began, time_limit=time_limit)
    with joined(base.device) as processes, display(progress and processes.main) as screen:
        run = course(
            job,
            first,
            place=place,
            mirror=copies,
            restart=restart,
            trackers=trackers,
            on_step=on_step,
            stopping=stopping,
            screen=screen,
            processes=processes,
        )
        with closing(run):
            try:
                next(run)  # prepared
                with nullcontext() if place is None else stopping:
                    while True:
                        next(run)  # an update
            except StopIteration as end:
                adapter, stop = end.value
    if stop not in (0, TIME_UP):
        leave(stop)
    return adapter  # type: ignore[no-any-return]


def course(
    job: Job,
    first: Mapping[str, LoraFactors] | None,
    *,
    place: Path | None,
    mirror: Place | None = None,
    restart: bool = False,
    trackers: Sequence[Any] = (),
    on_step: Callable[[Step], None] | None = None,
    stopping: Stopping,
    screen: Display,
    processes: Processes = ALONE,
    together: Together | None = None,
) -> Course:
    """One run from photos to file. Yields once when it is prepared and after every update but the last; returns its adapter
    and why it stopped: 0 for the end, TIME_UP or a signal's number."""
    base, subjects, lora, config = job.base, job.subjects, job.lora, job.config
    with ExitStack() as stack:
        folder, say = None, screen.say
        if place is not None and processes.main:
            folder = RunFolder(place, job, mirror=mirror, say=screen.say)
            stack.callback(leave_report, folder)  # runs after everything entered below, so that the report has the last entry
            stack.enter_context(folder)
            say = folder.event
        screen.say(f"training on {base.name}: {config.steps} steps at {config.resolution} px, rank {lora.rank}")
        if job.init is not None:
            screen.say(f"beginning with {job.init.name} ({len(job.init.modules)} modules)")

        # what the folder holds of this run: nothing, a state to continue from, or the finished adapter
        state, done = processes.from_main(lambda: folder.open(restart=restart) if folder else (None, None))
        if processes.count > 1:
            processes.check_same(job.identity, "photos, settings or base")
        if done is not None:
            screen.say(f"finished already, {config.steps} steps")
            return done, 0

        # photos -> latents, with settings that fit into memory; a resumed run keeps those that it started with
        for note in size_note(base, drawable(base, config.sample_size, "sample_size")):
            screen.say(f"note: {note}")
        levels = {}
        pictures, drawn = job.photos + sum(len(one.class_images) for one in subjects), config
        if all(one.class_images for one in subjects):
            drawn = replace(config, class_images=0)
        if together is None and state is None and not is_ample(base, lora, drawn, photos=pictures):
            levels = levels_that_fit(base, lora, drawn, photos=pictures, say=screen.say)
        for one in subjects:  # before class images are drawn
            read = token_reading(base) | {"prompt": one.instance_prompt, "class_noun": one.class_noun}
            report = check_token(one.token, base.tokenizer, **read)
            for note in (*report.problems, *report.warnings):
                screen.say(f"note: {one.token}: {note}")
        encode = partial(prepare, base, subjects, lora=lora, config=config, say=screen.say, on_progress=screen.progress)
        if folder is not None:
            encode = partial(encode, on_crop=folder.save_crop)
        cache = processes.main_first(encode)
        if folder is not None:
            folder.begin(job.surroundings(cache, processes.count))
        if together is None and not lora.text_encoder:
            stack.enter_context(base.only_unet_on_device())

        # latents -> adapter
        how: dict[str, Any] = {"levels": levels, "say": say, "processes": processes, "together": together}
        run = TrainingRun(base, cache, lora, config, first=first, resume=state, **how)
        stack.callback(run.close)
        del state  # the run has taken it over, and its bytes are free
        tracking = None
        observers: list[Callable[[Step], None]] = [screen.update]
        if trackers and processes.main:
            settings = {**asdict(config), **asdict(lora), "base": base.name}
            tracking = Tracking(trackers, settings, say=say)
            stack.callback(tracking.close)
            observers.append(tracking.update)
        if on_step is not None:
            observers.append(on_step)
        stopping.begin()
        yield
        stop = yield from follow(run, folder, stopping, tracking, observers)
        adapter = job.adapter(run.state())
        if folder is not None:
            folder.end(adapter, words_of(stop) if stop else "")
        elif stop:
            screen.say(f"{words_of(stop)} at step {adapter.card.steps}; without out= the run cannot be continued")
        processes.wait_for_all()
        return adapter, stopping.signal or stop  # a signal may have come since


def follow(
    run: TrainingRun,
    folder: RunFolder | None,
    stopping: Stopping,
    tracking: Tracking | None,
    observers: Sequence[Callable[[Step], None]],
) -> Generator[None, None, int]:
    """Every update, with its checkpoints and samples. Returns why it stopped."""
    every = 0 if folder is None else folder.job.config.sample_every
    try:
        if folder is not None and every and run.step == 0:
            with run.drawing():
                draw_samples(folder, tracking, 0, None)  # nothing is learnt yet
        for step in run:
            last, copying = step.index == step.total, folder.copying_seconds if folder else 0.0
            stop = run.processes.maximum(stopping.asked(copying=copying))
            if folder is not None:
                folder.update(step, run.state, save=bool(stop) or last)
            for observe in observers:
                observe(step)
            if stop and not last:
                return stop
            if folder is not None and every and step.index % every == 0:
                with run.drawing():
                    draw_samples(folder, tracking, step.index, None if last else step)
            if not last:
                yield
        return 0
    except TrainingError as error:
        if folder is not None:
            folder.give_up(error, run.state)
        raise


def checked_places(out: Any, mirror: Any, restart: bool, time_limit: Any) -> tuple[Path | None, Place | None, float | None]:
    """The run folder, the mirror and the time limit of a call, checked before anything is loaded. Raises SettingsError."""
    if out is None and (mirror is not None or restart):
        raise SettingsError(f"mirror and restart need a run folder; pass {setting('out')}=")
    time_limit = typed("time_limit", time_limit, float | None)
    check(time_limit is None or time_limit > 0, f"time_limit {time_limit}", "above 0 (minutes)")
    return typed("out", out, Path | None), mirror_at(mirror), time_limit  # type: ignore[operator]


def check_place(place: Path, copies: Place | None, subjects: Sequence[Subject]) -> None:
    """Raises SettingsError for a run folder that holds the photos, or is the mirror too."""
    if place.resolve() in {photo.path.resolve().parent for one in subjects for photo in (*one.photos, *one.class_images)}:
        raise SettingsError(f"{shown(place)}: holds the photos; use another folder for the run")
    there = copies.resolve() if isinstance(copies, Path) else copies
    if there in (place.resolve(), Remote(f"file://{place.resolve().as_posix()}")):
        raise SettingsError(f"{shown(copies)}: is the run folder itself; pass a folder on other storage as {setting('mirror')}")


def leave_report(folder: RunFolder) -> None:
    """A page on what this process did in the folder, however it ended."""
    if folder.record.content:
        from ..report.report import write_report

        try:
            write_report(folder.path)
        except Exception as error:  # which must not break the end of a run
            folder.say(f"no {REPORT} ({type(error).__name__})")
