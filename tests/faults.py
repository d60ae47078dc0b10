"""Tiny runs for the tests and benchmarks of faults, in processes that begin with everything imported."""

from __future__ import annotations

import errno
import json
import multiprocessing
import multiprocessing.forkserver
import os
import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from pipelines import make_pipeline  # noqa: E402

from lora_booth.base_model import BaseModel  # noqa: E402
from lora_booth.config import LoraSpec, TrainingConfig  # noqa: E402
from lora_booth.subject import Subject  # noqa: E402
from lora_booth.training import loop, train  # noqa: E402,F401

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(steps=12, checkpoint_every=3, prior_loss_weight=0.0, warmup_steps=0, batch_size=2, attention="sdpa")

HERE = Path(__file__).parent
FORKS = multiprocessing.get_context("forkserver")  # its processes have imported this module already, and have trained nothing
FORKS.set_forkserver_preload(["faults"])


def tiny() -> BaseModel:
    torch.set_num_threads(1)
    return BaseModel.from_pipeline(make_pipeline("sd1"), name="tiny")


def subject(photos: Path) -> Subject:
    return Subject.from_folder(photos, token="sks", class_noun="dog")


def tiny_run(photos: Path, out: Path | None, *, config: TrainingConfig = CONFIG, **options: Any) -> str:
    """Train; the adapter's digest."""
    return train(tiny(), subject(photos), lora=LORA, config=config, out=out, progress=False, **options).digest()


def in_process(target: Callable[..., Any], *words: Any, environment: dict[str, str] | None = None) -> Any:
    """Start `target(*words)` in a new process; `.kill()`, `.join()` and `.exitcode` are its."""
    with forkserver_paths():
        process = FORKS.Process(target=entered, args=(target, words, environment or {}))
        process.start()
    return process


@contextmanager
def forkserver_paths() -> Iterator[None]:
    """Where the server that the processes are forked from finds this module: it starts with the first of them, and before
    Python 3.12 it is not told."""
    before = os.environ.get("PYTHONPATH")
    os.environ["PYTHONPATH"] = os.pathsep.join([str(HERE), str(HERE.parent), *([before] if before else [])])
    try:
        multiprocessing.forkserver.ensure_running()
        yield
    finally:
        if before is None:
            del os.environ["PYTHONPATH"]
        else:
            os.environ["PYTHONPATH"] = before


def entered(target: Callable[..., Any], words: tuple[Any, ...], environment: dict[str, str]) -> None:
    os.environ.update(environment)
    target(*words)


def run_and_tell(photos: Path, out: Path, report: Path, options: dict[str, Any]) -> None:
    """A line for each update into `report`, and the digest at the end: what a test knows of a process that it kills."""
    with open(report, "a", buffering=1, encoding="utf-8") as file:
        digest = tiny_run(photos, out, on_step=lambda step: print(step.index, file=file), **options)
        print(json.dumps(digest), file=file)


def told(report: Path) -> list[Any]:
    """The whole lines of such a report."""
    if not report.exists():
        return []
    *lines, _ = report.read_text(encoding="utf-8").split("\n")
    return [json.loads(line) for line in lines]


# --- faults of the disk ------------------------------------------------------------------------------------------------

_broken: dict[str, Any] = {"folder": None, "at": 0, "count": 0, "error": errno.ENOSPC}


def _audit(event: str, words: tuple[Any, ...]) -> None:
    """Python tells of every file that it opens, makes, renames or removes: the n-th of them in a folder can be made to fail."""
    if _broken["folder"] is None or event not in ("open", "os.mkdir", "os.rename"):
        return
    path = str(words[0])
    if not path.startswith(_broken["folder"]):
        return
    if event == "open" and not words[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT):
        return
    _broken["count"] += 1
    if _broken["at"] <= _broken["count"] < _broken["at"] + _broken["times"]:
        raise OSError(_broken["error"], os.strerror(_broken["error"]))


_listening = False


@contextmanager
def failing_disk(folder: Path, at: int, *, times: int = 1, error: int = errno.ENOSPC) -> Iterator[dict[str, Any]]:
    """Of all writes under `folder` (opening, making and renaming files) `times` fail, from number `at` on (from 1)."""
    global _listening
    if not _listening:
        sys.addaudithook(_audit)
        _listening = True
    _broken.update(folder=str(folder), at=at, count=0, times=times, error=error)
    try:
        yield _broken
    finally:
        _broken["folder"] = None


@contextmanager
def largest_file(size: int) -> Iterator[None]:
    """No file can grow beyond `size` bytes: a write stops in its middle, as on a full disk (POSIX)."""
    import resource

    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


# --- faults of a step --------------------------------------------------------------------------------------------------


@contextmanager
def failing_forward(base: BaseModel, fault: Callable[[int, Any], Any]) -> Iterator[list[int]]:
    """`fault(n, output)` gets what the U-Net says in its n-th forward pass (from 1): it may change it, or raise."""
    passes: list[int] = []

    def hook(module: Any, inputs: Any, output: Any) -> Any:
        passes.append(1)
        return fault(len(passes), output)

    handle = base.unet.register_forward_hook(hook)
    try:
        yield passes
    finally:
        handle.remove()


NO_MEMORY = "[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory: you tried to allocate 9 bytes."
