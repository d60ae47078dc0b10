"""Workers on a Ray cluster: actors that keep the base loaded, and train one subject at a time."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from functools import cached_property
from typing import Any

from .. import __version__
from ..base.base_model import BaseModel
from ..errors import LoraBoothError, MissingExtraError, SettingsError, TrainingError, in_command, reason_of, same_again, setting
from ..subject.subject import Subject
from ..training.progress import Display

RETRIES = 3  # of a subject whose worker was lost, also with its node; chosen
LOOK = 10.0  # seconds after which nodes that joined are seen, at most; chosen

Ended = str | LoraBoothError  # "finished", "stopped", or the error that ended a run


def connected(address: str | None = None) -> Any:
    """Ray, in a cluster: the one that it is in already or, with Ray's rules, that of `address`. Raises LoraBoothError."""
    try:
        import ray
    except ImportError as error:
        raise MissingExtraError(setting("engine", "ray", option="--ray"), "ray") from error
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # a cluster that starts here reports nothing
    if not ray.is_initialized():
        try:
            ray.init(address, log_to_driver=False, logging_level="warning")
        except (ConnectionError, ValueError, RuntimeError) as error:
            raise SettingsError(
                f"no Ray cluster at {address or 'hand'} ({reason_of(error)}); start one with ray start"
            ) from error
    return ray


class Worker:
    """An actor."""

    def __init__(self, load: Callable[[], BaseModel], check: Callable[..., Any], train: Callable[..., Ended], **caller: Any):
        self._load, self._check, self._train = load, check, train
        in_command.set(caller["in_command"])
        with suppress(OSError):  # relative paths, where the node has that folder
            os.chdir(caller["folder"])

    @cached_property
    def base(self) -> BaseModel:
        return self._load()

    def ready(self) -> tuple[str, ...]:
        """The base is loaded and the jobs are checked by it; returns what must be the same on all nodes."""
        self._check(self.base)
        return f"lora_booth {__version__}", f"base {self.base.fingerprint}", str(self.base.dtype).removeprefix("torch.")

    def train(self, name: str, subject: Sequence[Subject], restart: bool) -> Ended:
        return self._train(self.base, name, subject, restart=restart)


def train_on_workers(
    subjects: Mapping[str, Sequence[Subject]],
    *,
    load: Callable[[], BaseModel],
    check: Callable[[BaseModel], Any],
    train: Callable[..., Ended],
    restart: bool,
    tell: Callable[[str, Ended], None],
    screen: Display,
) -> None:
    """Train each subject on one of as many workers as the cluster has GPUs or, without any, cores.

    load, check, train  done by the workers: load the base, check the jobs with it, train a subject
    restart             passed to `train`, but not when a subject is tried again
    tell                called with a name and "training" or how its run ended
    """
    ray = connected()
    unit = "GPU" if ray.cluster_resources().get("GPU", 0) >= 1 else "CPU"
    actor = ray.remote(**({"num_gpus": 1, "num_cpus": 0} if unit == "GPU" else {"num_cpus": 1}))(Worker)
    caller = {"in_command": in_command.get(), "folder": os.getcwd()}
    waiting, kinds, lost = list(subjects), set[tuple[str, ...]](), Counter[str | None]()
    busy: dict[Any, tuple[Any, str | None]] = {}  # a call -> its worker and subject; None: the worker gets ready
    screen.progress("subjects", 0, len(subjects))
    try:
        while waiting or busy:
            coming = sum(name is None for _, name in busy.values())
            for _ in range(min(int(ray.cluster_resources().get(unit, 0)) - len(busy), len(waiting) - coming)):
                worker = actor.remote(load, check, train, **caller)
                busy[worker.ready.remote()] = worker, None
            if not busy:
                raise TrainingError(f"the Ray cluster has no {unit} now; start a node, and {same_again()}")
            done, _ = ray.wait(list(busy), timeout=LOOK)
            for call in done:
                worker, name = busy.pop(call)
                try:
                    result = ray.get(call)
                except ray.exceptions.RayError as error:  # the worker died, or raised what nobody foresaw
                    cause = getattr(error, "cause", None) or error
                    if isinstance(cause, LoraBoothError):  # about the base, or all jobs alike
                        raise cause from None
                    ray.kill(worker)
                    lost[name] += 1
                    result = TrainingError(f"its worker was lost ({type(cause).__name__}: {reason_of(cause)})")
                    worker = None
                    if lost[name] <= RETRIES:
                        screen.say(f"{name or 'a new worker'}: {result}; trying again")
                        waiting[:0] = [] if name is None else [name]
                        continue
                    if name is None:
                        raise result from error
                if name is None:
                    lost[None] = 0
                    kinds.add(result)
                    if len(kinds) > 1:
                        raise TrainingError(f"the nodes differ: {' and '.join(map(', '.join, sorted(kinds)))}; make them alike")
                else:
                    tell(name, result)
                    ended = len(subjects) - len(waiting) - sum(other is not None for _, other in busy.values())
                    screen.progress("subjects", ended, len(subjects))
                    if result == "stopped":
                        waiting.clear()
                if waiting and worker is not None:
                    name = waiting.pop(0)
                    busy[worker.train.remote(name, subjects[name], restart and not lost[name])] = worker, name
                    tell(name, "training")
                elif worker is not None:
                    ray.kill(worker)
    finally:
        for worker, _ in busy.values():
            with suppress(Exception):  # the cluster may be gone
                ray.kill(worker)
