"""train(): photos in, one small adapter out. A run from start to finish, in order."""

from __future__ import annotations

import re
import signal
import threading
import time
from collections.abc import Callable, Generator, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing, nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any, Literal, NoReturn

from .adapters.adapter import Adapter
from .adapters.contents import LoraFactors
from .base.base_model import BaseModel
from .base.sizes import drawable, size_note
from .config import LoraSpec, TrainingConfig, check, settled, typed
from .errors import LoraBoothError, SettingsError, TrainingError, setting, shown
from .planning.budget import is_ample, subjects_at_once
from .planning.planning import levels_that_fit
from .subject.subject import Subject
from .subject.tokens import check_token
from .training.checkpoint import REPORT, saved_adapters
from .training.distributed import ALONE, Processes, joined, started
from .training.encoding import encoded_text, prepare, subjects_of
from .training.job import Job
from .training.lock import locked
from .training.progress import Display, Labelled, Step, display
from .training.run_folder import RunFolder
from .training.samples import draw_samples
from .training.together import MOST, Together, obstacle
from .training.tracking import Track, Tracking, trackers_of
from .training.training_mode import check_feasible
from .training.training_run import TrainingRun, beginning_with

SIGNALS = tuple(getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP", "SIGBREAK") if hasattr(signal, name))
TIME_UP = 1000  # above every signal's number
MARGIN = 2.0  # a time limit must leave room for so many of the longest update, with its checkpoint: chosen
NAME = re.compile(r"\w([\w .-]{0,98}[\w-])?")  # of a subject's folder
GIVING_UP = 60.0  # seconds in which a process that is being ended may still hold a run's folder: chosen
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
    mirror      a folder on other storage: each checkpoint is copied there and read back, and a run whose own folder is lost
                continues from it
    time_limit  minutes for this call: before they are over, it saves and returns the adapter learnt so far
    restart     discard what `out` and `mirror` hold of an earlier run
    track       "tensorboard", "wandb" or another tracker of accelerate, or several: losses, rates, settings, samples
    on_step     called after every optimizer update
    progress    show step, loss, rate and time left: a live bar in a terminal or notebook, plain lines elsewhere
    Under `accelerate launch` or `torchrun` each process takes its share of every batch, and all return the same adapter.
    Raises SettingsError, TrainingError, PhotoError, AdapterError.
    """
    began = time.monotonic()
    base = BaseModel.load(base) if isinstance(base, str | Path) else typed("base", base, BaseModel)
    subjects = subjects_of(subject)
    if out is None and (mirror is not None or restart):
        raise SettingsError(f"mirror and restart need a run folder; pass {setting('out')}=")
    time_limit = typed("time_limit", time_limit, float | None)
    check(time_limit is None or time_limit > 0, f"time_limit {time_limit}", "above 0 (minutes)")
    place: Path | None = typed("out", out, Path | None)
    copies: Path | None = typed("mirror", mirror, Path | None)
    if place is not None:
        check_place(place, copies, subjects)
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


def train_many(
    base: BaseModel | str | Path | Callable[[], BaseModel],
    subjects: Mapping[str, Subject | Sequence[Subject]],
    *,
    lora: LoraSpec | None = None,
    config: TrainingConfig | None = None,
    init: Adapter | str | Path | None = None,
    out: str | Path | None = None,
    together: int | None = None,
    engine: Literal["ray"] | None = None,
    time_limit: float | None = None,
    restart: bool = False,
    on_change: Callable[[str, str | LoraBoothError], None] | None = None,
    progress: bool = True,
) -> tuple[Mapping[str, Adapter], dict[str, LoraBoothError]]:
    """Teach `base` many subjects, each its own adapter: several share every forward pass. Returns the adapters by name, and
    the errors of the subjects that have none. With `out`, an adapter is read from its file when you ask for it, so that memory
    does not hold all of them.

    Each subject learns what it learns in `train` with these settings, up to rounding, and what goes wrong with one harms no
    other. All that can be checked before the first one starts is.

    base        may be a function that loads it
    subjects    by name
    out         a folder for the runs: each is `out/NAME`, as in `train`. The same call on interrupted runs continues them
    together    subjects that share a pass; None: on a CPU up to 8, as many as memory is ample for, and one on a GPU, where what
                sharing gains was not measured yet. Where memory runs out, fewer do
    engine      "ray": the workers of a Ray cluster train, each one subject at a time on a GPU or, without any, on a core. It is
                the cluster that `ray.init` has joined, or joins by itself. Needs `out`, on storage that all nodes share, and a
                base that is not loaded yet: each worker loads it. A subject whose worker or node dies is tried again
    time_limit  minutes for this call: before they are over, all that are in training are saved, and returned as learnt so far
    on_change   called with a subject's name and "training", "finished", "stopped", or the error that ended it
    Other arguments are as in `train`.
    Raises SettingsError, and what is wrong with all subjects alike.
    """
    began = time.monotonic()
    if out is None and restart:
        raise SettingsError(f"restart needs a run folder; pass {setting('out')}=")
    place: Path | None = typed("out", out, Path | None)
    time_limit = typed("time_limit", time_limit, float | None)
    check(time_limit is None or time_limit > 0, f"time_limit {time_limit}", "above 0 (minutes)")
    together = typed("together", together, int | None)
    check(together is None or together >= 1, f"together {together}", "at least 1")
    base = typed("base", base, BaseModel | str | Path | Callable)
    engine = typed("engine", engine, Literal["ray"] | None)
    listed = named_subjects(subjects)
    for name, several in listed.items() if place is not None else ():
        check_place(place / name, None, several)  # type: ignore[operator]
    if started():
        raise SettingsError("train_many does not share its work among processes; start one process")
    what: dict[str, Any] = {"lora": lora, "config": config, "init": init}
    if engine is not None:
        asked = setting("engine", engine, option="--ray")
        if place is None:
            raise SettingsError(f"{asked} needs a folder for the runs; pass {setting('out')}=")
        if together not in (None, 1):
            raise SettingsError(f"{setting('together', together)} is not possible with {asked}; pass {setting('together', 1)}")
        if isinstance(base, BaseModel):
            raise SettingsError(f"base is loaded, and with {asked} each worker loads it; pass its name, path or a function")

    adapters = Adapters(place)
    errors: dict[str, LoraBoothError] = {}
    stop, waiting, runs = 0, list(listed), dict[str, Course]()
    stopping = Stopping(began=began, time_limit=time_limit)
    with ExitStack() as stack:
        screen = stack.enter_context(display(progress))

        def tell(name: str, state: str | LoraBoothError) -> None:
            if isinstance(state, LoraBoothError):
                errors[name] = state
                screen.say(f"{name}: {state}")
            if on_change is not None:
                on_change(name, state)

        if engine is not None:
            from .training.ray_workers import train_on_workers

            def tell_of_worker(name: str, state: str | LoraBoothError) -> None:
                if state in ("finished", "stopped") and not adapters.find(name):
                    state = TrainingError(
                        f"{shown(place)}: its worker saved no adapter here; pass a folder that all nodes share"
                    )
                tell(name, state)

            ends = None if time_limit is None else time.time() + 60 * time_limit
            train_on_workers(
                listed,
                load=partial(loaded, base),
                check=partial(checked_jobs, subjects=listed, **what),
                train=partial(train_one, out=Path(place or "").absolute(), ends=ends, **what),
                restart=restart,
                tell=tell_of_worker,
                screen=screen,
            )
            return adapters, errors

        base = loaded(base)
        jobs, first = checked_jobs(base, listed, **what)
        most, job = in_a_pass(list(jobs.values()), together), jobs[waiting[0]]
        shared = None
        if most > 1:
            shared = Together(base, job.lora, job.config, first=first, most=most, say=screen.say)
            stack.callback(shared.leave)
        if place is not None:
            stack.enter_context(stopping)

        def begun_run(name: str) -> Course:
            options: dict[str, Any] = {"place": None if place is None else place / name, "restart": restart}
            return course(jobs[name], first, **options, stopping=stopping, screen=Labelled(screen, name), together=shared)

        def advance(name: str) -> None:
            """One update of this run, or its preparation."""
            nonlocal stop
            try:
                next(runs[name])
                return
            except StopIteration as end:
                adapter, stopped = end.value
                adapters.add(name, adapter)
                stop = stop or stopped
                tell(name, "stopped" if stopped else "finished")
            except LoraBoothError as error:
                tell(name, error)
            del runs[name]

        try:
            while runs or (waiting and not stop):
                while waiting and len(runs) < most and not stop:
                    if shared is not None:
                        shared.leave()  # class images are drawn by the base alone
                    name = waiting.pop(0)
                    runs[name] = begun_run(name)
                    tell(name, "training")
                    advance(name)
                    stop = stop or stopping.signal
                for name in list(runs):
                    advance(name)
        except BaseException as error:
            for run in runs.values():
                with suppress(BaseException):
                    run.throw(error)
            raise
    stop = stopping.signal or stop
    if stop not in (0, TIME_UP):
        leave(stop)
    return adapters, errors


def loaded(base: BaseModel | str | Path | Callable[[], BaseModel]) -> BaseModel:
    found = base() if callable(base) else base
    return BaseModel.load(found) if isinstance(found, str | Path) else typed("base", found, BaseModel)


def checked_jobs(
    base: BaseModel,
    subjects: Mapping[str, Sequence[Subject]],
    *,
    lora: LoraSpec | None,
    config: TrainingConfig | None,
    init: Adapter | str | Path | None,
) -> tuple[dict[str, Job], dict[str, LoraFactors] | None]:
    """What each run computes, and the factors that it begins with. Raises what is wrong with all of them alike."""
    lora, begun, first = beginning_with(init, base, typed("lora", lora, LoraSpec | None))
    jobs = {}
    for name, several in subjects.items():
        settings = settled(config, base, sum(len(one.photos) for one in several))
        jobs[name] = Job(base, several, lora, settings, begun)
    usual = next(iter(jobs.values())).config
    drawable(base, usual.sample_size, "sample_size")
    check_feasible(base, lora, usual)
    return jobs, first


def train_one(
    base: BaseModel,
    name: str,
    subject: Sequence[Subject],
    *,
    out: Path,
    ends: float | None,
    restart: bool,
    **what: Any,
) -> str | LoraBoothError:
    """What a worker of a cluster does: train one subject, until it is done or it is `ends` (a time.time())."""
    states: list[str | LoraBoothError] = []
    how: dict[str, Any] = {"out": out, "restart": restart, "together": 1, "progress": False}
    if ends is not None:
        how["time_limit"] = max(ends - time.time(), 1e-3) / 60
    with suppress(TrainingError), locked(out / name, wait=GIVING_UP):
        pass
    train_many(base, {name: subject}, **how, **what, on_change=lambda _, state: states.append(state))
    return states[-1]


class Adapters(Mapping[str, Adapter]):
    """Adapters by name. Those in the runs of `out` are read when asked for; the others are held."""

    def __init__(self, out: Path | None) -> None:
        self._out = out
        self._held: dict[str, Adapter | None] = {}

    def add(self, name: str, adapter: Adapter) -> None:
        self._held[name] = None if adapter.card.steps in self._saved(name) else adapter

    def find(self, name: str) -> bool:
        """Add the one that another process has saved; False if there is none."""
        found = bool(self._saved(name))
        if found:
            self._held[name] = None
        return found

    def _saved(self, name: str) -> dict[int, Path]:
        return {} if self._out is None else saved_adapters(self._out / name)

    def __getitem__(self, name: str) -> Adapter:
        held = self._held[name]
        if held is not None:
            return held
        files = self._saved(name)
        if not files:
            raise TrainingError(f"{name}: its adapter is gone from {shown(self._out)}; make the same call again")
        return replace(Adapter.load(files[max(files)]), stem=name)

    def __iter__(self) -> Iterator[str]:
        return iter(self._held)

    def __len__(self) -> int:
        return len(self._held)


def in_a_pass(jobs: Sequence[Job], asked: int | None) -> int:
    """How many of these runs share a pass. Raises SettingsError where so many as `asked` cannot."""
    base, lora, config = jobs[0].base, jobs[0].lora, jobs[0].config
    reason = obstacle(base, lora, config)
    if reason is not None and asked not in (None, 1):
        raise SettingsError(f"{setting('together', asked)} is not possible: {reason}; pass {setting('together', 1)}")
    most = min(asked or MOST, len(jobs)) if reason is None else 1
    if asked is None and most > 1:
        photos = most * max(job.photos for job in jobs)
        return subjects_at_once(base, lora, config, photos=photos, most=most)
    return most


def named_subjects(subjects: Mapping[str, Subject | Sequence[Subject]]) -> dict[str, list[Subject]]:
    """Raises SettingsError unless there are subjects, each by a name that can be a folder's and differs in more than case."""
    if not isinstance(subjects, Mapping) or not subjects:
        raise SettingsError('subjects: pass them by name, e.g. {"rex": rex, "brew": brew}')
    found: dict[str, list[Subject]] = {}
    for name, subject in subjects.items():
        check_name(name, found)
        found[name] = subjects_of(subject)
    return found


def check_name(name: str, others: Iterable[str]) -> None:
    """Raises SettingsError unless it can be a folder's, beside those of these others."""
    if not isinstance(name, str) or not NAME.fullmatch(name):
        raise SettingsError(f"name {shown(repr(name))[:80]}; needed: up to 100 letters, digits, spaces, and . _ - within")
    if name.casefold() in {other.casefold() for other in others}:
        raise SettingsError(f"name {name!r} is taken, or differs from another one in case only; choose another name")


def course(
    job: Job,
    first: Mapping[str, LoraFactors] | None,
    *,
    place: Path | None,
    mirror: Path | None = None,
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
            read: dict[str, Any] = {"known_rare": base.rare_tokens, "encode": partial(encoded_text, base)}
            read |= {"prompt": one.instance_prompt, "class_noun": one.class_noun}
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


def check_place(place: Path, copies: Path | None, subjects: Sequence[Subject]) -> None:
    """Raises SettingsError for a run folder that holds the photos, or is the mirror too."""
    if place.resolve() in {photo.path.resolve().parent for one in subjects for photo in (*one.photos, *one.class_images)}:
        raise SettingsError(f"{shown(place)}: holds the photos; use another folder for the run")
    if copies is not None and copies.resolve() == place.resolve():
        raise SettingsError(f"{shown(copies)}: is the run folder itself; pass a folder on other storage as {setting('mirror')}")


def leave_report(folder: RunFolder) -> None:
    """A page on what this process did in the folder, however it ended."""
    if folder.record.content:
        from .report.report import write_report

        try:
            write_report(folder.path)
        except Exception as error:  # which must not break the end of a run
            folder.say(f"no {REPORT} ({type(error).__name__})")


# --- stopping before the end: Ctrl-C and similar signals, and a time limit ------------------------------------------


class Stopping:
    """Asked after every update. Inside `with`, the first signal waits until then, and the second acts at once.

    time_limit  minutes from `began` (a time.monotonic())
    """

    def __init__(self, *, began: float, time_limit: float | None = None) -> None:
        self.ends = None if time_limit is None else began + 60 * time_limit
        self.signal = 0
        self.longest, self._last = 0.0, time.monotonic()
        self._before: dict[int, Any] = {}

    def begin(self) -> None:
        """The time until now was no update."""
        self._last = time.monotonic()

    def __enter__(self) -> Stopping:
        if threading.current_thread() is threading.main_thread():  # Python gives signals to no other
            for number in SIGNALS:
                before = signal.getsignal(number)
                if before not in (None, signal.SIG_IGN):  # nohup stays nohup
                    self._before[number] = signal.signal(number, self._keep)
        return self

    def __exit__(self, *error: object) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        self._before = {}

    def _keep(self, number: int, frame: FrameType | None) -> None:
        if self.signal:
            leave(number)
        self.signal = number

    def asked(self, *, copying: float = 0.0) -> int:
        """After an update: 0, TIME_UP or a signal's number. copying: seconds that the end also takes, for the mirror."""
        now = time.monotonic()
        self.longest, self._last = max(self.longest, now - self._last), now
        if self.signal:
            return self.signal
        return TIME_UP if self.ends is not None and now + MARGIN * (self.longest + copying) >= self.ends else 0


def leave(number: int) -> NoReturn:
    """End as Python does at Ctrl-C, or with the exit code of a process that a signal ended."""
    if number == signal.SIGINT:
        raise KeyboardInterrupt("reported")  # the run has said what to do next
    raise SystemExit(128 + number)


def words_of(stop: int) -> str:
    if stop == TIME_UP:
        return "time is up"
    return "interrupted" if stop == signal.SIGINT else f"stopped by {signal.Signals(stop).name}"
