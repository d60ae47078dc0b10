"""train_many(): many subjects, an adapter each. In this process they share every forward pass; or a Ray cluster trains them."""

from __future__ import annotations

import re
import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any, Literal

from ..adapters.adapter import Adapter
from ..adapters.contents import LoraFactors
from ..base.base_model import BaseModel
from ..base.sizes import drawable
from ..config import LoraSpec, TrainingConfig, check, settled, typed
from ..errors import LoraBoothError, SettingsError, TrainingError, same_again, setting, shown
from ..planning.budget import subjects_at_once
from ..subject.subject import Subject
from ..training.checkpoint import read_record, saved_adapters
from ..training.distributed import started
from ..training.encoding import subjects_of
from ..training.job import Job
from ..training.lock import locked
from ..training.progress import Display, Labelled, display
from ..training.remote import Place
from ..training.run_folder import fetch, why
from ..training.together import MOST, Together, obstacle
from ..training.training_mode import check_feasible
from ..training.training_run import beginning_with
from .one import Course, check_place, checked_places, course
from .stopping import TIME_UP, Stopping, leave

NAME = re.compile(r"\w([\w .-]{0,98}[\w-])?")  # of a subject's folder
GIVING_UP = 60.0  # seconds in which a process that is being ended may still hold a run's folder: chosen
Tell = Callable[[str, str | LoraBoothError], None]


def train_many(
    base: BaseModel | str | Path | Callable[[], BaseModel],
    subjects: Mapping[str, Subject | Sequence[Subject]],
    *,
    lora: LoraSpec | None = None,
    config: TrainingConfig | None = None,
    init: Adapter | str | Path | None = None,
    out: str | Path | None = None,
    mirror: str | Path | None = None,
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
    mirror      as in `train`; that of a subject is `mirror/NAME`. Where the nodes of a cluster share no storage, `out` is a
                folder on each of them: subjects continue from the mirror, and adapters are copied from it to `out` here
    together    subjects that share a pass; None: on a CPU up to 8, as many as memory is ample for, and one on a GPU, where what
                sharing gains was not measured yet. Where memory runs out, fewer do
    engine      "ray": the workers of a Ray cluster train, each one subject at a time on a GPU or, without any, on a core. It is
                the cluster that `ray.init` has joined, or joins by itself. Needs `out` (or `mirror`) on storage that all nodes
                share, and a base that is not loaded yet: each worker loads it. A subject whose worker or node dies is tried
                again
    time_limit  minutes for this call: before they are over, all that are in training are saved, and returned as learnt so far
    on_change   called with a subject's name and "training", "finished", "stopped", or the error that ended it
    Other arguments are as in `train`.
    Raises SettingsError, and what is wrong with all subjects alike.
    """
    began = time.monotonic()
    place, copies, time_limit = checked_places(out, mirror, restart, time_limit)
    together = typed("together", together, int | None)
    check(together is None or together >= 1, f"together {together}", "at least 1")
    base = typed("base", base, BaseModel | str | Path | Callable)
    engine = typed("engine", engine, Literal["ray"] | None)
    listed = named_subjects(subjects)
    for name, several in listed.items() if place is not None else ():
        check_place(place / name, copies and copies / name, several)  # type: ignore[operator]
    if started():
        raise SettingsError("train_many does not share its work among processes; start one process")
    if engine is not None:
        asked = setting("engine", engine, option="--ray")
        if place is None:
            raise SettingsError(f"{asked} needs a folder for the runs; pass {setting('out')}=")
        if together not in (None, 1):
            raise SettingsError(f"{setting('together', together)} is not possible with {asked}; pass {setting('together', 1)}")
        if isinstance(base, BaseModel):
            raise SettingsError(f"base is loaded, and with {asked} each worker loads it; pass its name, path or a function")

    adapters = Adapters(place, copies)
    errors: dict[str, LoraBoothError] = {}
    with display(progress) as screen:

        def tell(name: str, state: str | LoraBoothError) -> None:
            if isinstance(state, LoraBoothError):
                errors[name] = state
                screen.say(f"{name}: {state}")
            if on_change is not None:
                on_change(name, state)

        how: dict[str, Any] = {"adapters": adapters, "restart": restart, "tell": tell, "screen": screen}
        what: dict[str, Any] = {"lora": lora, "config": config, "init": init}
        if engine is not None:
            ends = None if time_limit is None else time.time() + 60 * time_limit
            train_in_a_cluster(partial(loaded, base), listed, what, ends=ends, **how)
            return adapters, errors
        base = loaded(base)
        jobs, first = checked_jobs(base, listed, **what)
        stopping = Stopping(began=began, time_limit=time_limit)
        stop = train_here(jobs, first, most=in_a_pass(list(jobs.values()), together), stopping=stopping, **how)
    if stop not in (0, TIME_UP):
        leave(stop)
    return adapters, errors


def train_here(
    jobs: Mapping[str, Job],
    first: Mapping[str, LoraFactors] | None,
    *,
    most: int,
    adapters: Adapters,
    restart: bool,
    stopping: Stopping,
    tell: Tell,
    screen: Display,
) -> int:
    """Train `most` subjects at a time, an update of each in turn. Returns why it stopped: 0 (done), TIME_UP or a signal."""
    stop, waiting, runs = 0, list(jobs), dict[str, Course]()
    with ExitStack() as stack:
        shared = None
        if most > 1:
            job = jobs[waiting[0]]
            shared = Together(job.base, job.lora, job.config, first=first, most=most, say=screen.say)
            stack.callback(shared.leave)
        if adapters.out is not None:
            stack.enter_context(stopping)

        def begun_run(name: str) -> Course:
            place = None if adapters.out is None else adapters.out / name
            options: dict[str, Any] = {"place": place, "restart": restart, "stopping": stopping, "together": shared}
            options["mirror"] = adapters.mirror and adapters.mirror / name
            return course(jobs[name], first, **options, screen=Labelled(screen, name))

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
    return stopping.signal or stop


def train_in_a_cluster(
    load: Callable[[], BaseModel],
    subjects: Mapping[str, Sequence[Subject]],
    what: Mapping[str, Any],
    *,
    adapters: Adapters,
    restart: bool,
    ends: float | None,
    tell: Tell,
    screen: Display,
) -> None:
    """Let the workers of a Ray cluster train. what: lora, config and init; ends: a time.time()"""
    from .ray_workers import train_on_workers

    def tell_if_saved(name: str, state: str | LoraBoothError) -> None:
        try:
            if state in ("finished", "stopped") and not adapters.find(name, finished=state == "finished", replace=restart):
                where = f"{shown(adapters.out)}: its worker saved no adapter here"
                share = f"pass a folder that all nodes share, or a {setting('mirror')} that they share"
                state = TrainingError(
                    f"{where}; {share}" if adapters.mirror is None else f"its adapter did not reach the mirror; {same_again()}"
                )
        except TrainingError as error:
            state = error
        except OSError as error:
            state = TrainingError(f"its adapter cannot be copied from the mirror ({why(error)}); {same_again()}")
        tell(name, state)

    copies = adapters.mirror.absolute() if isinstance(adapters.mirror, Path) else adapters.mirror
    train_on_workers(
        subjects,
        load=load,
        check=partial(checked_jobs, subjects=subjects, **what),
        train=partial(train_one, mirror=copies and str(copies), out=Path(adapters.out or "").absolute(), ends=ends, **what),
        restart=restart,
        tell=tell_if_saved,
        screen=screen,
    )


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

    def __init__(self, out: Path | None, mirror: Place | None) -> None:
        self.out, self.mirror = out, mirror
        self._held: dict[str, Adapter | None] = {}

    def add(self, name: str, adapter: Adapter) -> None:
        self._held[name] = None if adapter.card.steps in self._saved(name) else adapter

    def find(self, name: str, *, finished: bool, replace: bool) -> bool:
        """Add the one that another process has saved, here or in the mirror. False if there is none, or, of a run that is
        `finished`, only an earlier one. replace: as for `fetch`. Raises TrainingError, OSError."""
        assert self.out is not None  # which a cluster needs
        if self.mirror is not None:
            fetch(self.out / name, self.mirror / name, replace=replace)
        steps = self._saved(name)
        found = bool(steps) and (not finished or max(steps) == read_record(self.out / name).get("steps"))
        if found:
            self._held[name] = None
        return found

    def _saved(self, name: str) -> dict[int, Path]:
        return {} if self.out is None else saved_adapters(self.out / name)

    def __getitem__(self, name: str) -> Adapter:
        held = self._held[name]
        if held is not None:
            return held
        files = self._saved(name)
        if not files:
            raise TrainingError(f"{name}: its adapter is gone from {shown(self.out)}; make the same call again")
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
