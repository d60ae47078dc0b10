"""Tiny runs for the tests and benchmarks of faults, in processes that begin with everything imported."""

from __future__ import annotations

import errno
import json
import math
import multiprocessing
import multiprocessing.forkserver
import os
import re
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

warnings.filterwarnings("ignore")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ["OMP_NUM_THREADS"] = "1"

import torch  # noqa: E402
from pipelines import make_pipeline  # noqa: E402

from lora_booth.adapters.adapter import Adapter  # noqa: E402
from lora_booth.base.base_model import BaseModel  # noqa: E402
from lora_booth.config import LoraSpec, TrainingConfig, settled  # noqa: E402
from lora_booth.errors import TrainingError  # noqa: E402
from lora_booth.runs.one import train  # noqa: E402,F401
from lora_booth.subject.subject import Subject  # noqa: E402
from lora_booth.training.checkpoint import ADAPTER, STATE, newest, read_back, unpacked_state  # noqa: E402
from lora_booth.training.health import RAISED, RECENT  # noqa: E402
from lora_booth.training.loop import learning_rate  # noqa: E402
from lora_booth.training.training_run import LEVELS  # noqa: E402

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(steps=12, checkpoint_every=3, prior_loss_weight=0.0, warmup_steps=0, batch_size=2, sample_every=0)

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


def lack_of_memory(output: Any) -> Any:
    raise RuntimeError(NO_MEMORY)


def lack_for_two(output: Any) -> Any:
    return output if len(output.sample) == 1 else lack_of_memory(output)


def times(factor: float) -> Callable[[Any], Any]:
    return lambda output: type(output)(sample=output.sample * factor)


@dataclass(frozen=True)
class Outcome:
    """What must come of a fault that begins at a step."""

    events: list[str]  # regular expressions, one for each line of run.json
    halved_after: int | None = None  # the step from which on the rate is half of what was asked for
    left_out: tuple[int, ...] = ()  # the updates without a loss
    good: int | None = None  # it ends with an error, and this step is saved; None: it comes to its end


@dataclass(frozen=True)
class Fault:
    """spoil gets what the U-Net says, in so many forward passes (None: in all from the first one on)."""

    spoil: Callable[[Any], Any]
    passes: int | None
    begins: range  # at which step it may
    outcome: Callable[[int], Outcome]


FAULTY = replace(CONFIG, steps=120, checkpoint_every=10)
NOT_FINITE = "the loss or its gradients were not finite"
HALVED = "the learning rate is halved; continuing from step"
HALF = RECENT // 2  # so many high losses raise the median


def good_before(step: int) -> int:
    """The state to go back to: the last one on the grid of checkpoints."""
    return (step - 1) // FAULTY.checkpoint_every * FAULTY.checkpoint_every


def memory(at: int) -> Outcome:
    return Outcome([f"out of memory at step {at}: continuing with pictures_at_a_time=1"])


def memory_for_good(at: int) -> Outcome:
    rungs = [f"out of memory at step {at}: continuing with {name}={value}" for name, value in LEVELS]
    stopped = f"stopped: out of memory at step {at} at every level .*; try a smaller resolution or rank.*"
    unsaved = [] if at - 1 == good_before(at) else [f"the last good state, of step {at - 1}, is saved"]
    return Outcome([*rungs, stopped, *unsaved], good=at - 1)


def nan_twice(at: int) -> Outcome:
    left_out = f"{NOT_FINITE} at step {at}: the update is skipped"
    again = rf"{NOT_FINITE} at step {at + 1}: the update is skipped \(2 so far\)"
    return Outcome([left_out, again], left_out=(at, at + 1))


def nan_burst(at: int) -> Outcome:
    good = good_before(at)
    back = f"{NOT_FINITE} 3 times in a row, at step {at + 2}: {HALVED} {good}"
    return Outcome([*nan_twice(at).events, back], halved_after=good)


def nan_for_good(at: int) -> Outcome:
    good, every = good_before(at), FAULTY.checkpoint_every
    again = rf"{NOT_FINITE} at step {good + 1}: the update is skipped \(4 so far\)"
    stopped = f"stopped: {NOT_FINITE} 3 times in a row, at step {good + 3}, with half the rate as well; lower learning_rate .*"
    later = any(step % every == 0 for step in (at, at + 1))  # a checkpoint of the bad steps
    unsaved = [f"the last good state, of step {good}, is saved"] if good and later else []
    return Outcome([*nan_burst(at).events, again, stopped, *unsaved], good=good)


def spike(at: int) -> Outcome:
    back = rf"the loss is \d+ times what it was, at step {at + HALF - 1}: {HALVED} {good_in_spike(at)}"
    return Outcome([back], halved_after=good_in_spike(at))


def spike_for_good(at: int) -> Outcome:
    good = good_in_spike(at)
    high = max(0, good - at + 1)
    told = rf"the loss is \d+ times what it was, at step {good + HALF - high}"
    return Outcome([*spike(at).events, told], halved_after=good)


def good_in_spike(at: int) -> int:
    return good_before(at + RAISED - 1)  # a few high losses spoil no state yet


FAULTS: Mapping[str, Fault] = {
    "memory": Fault(lack_for_two, None, range(1, 110), memory),
    "memory for good": Fault(lack_of_memory, None, range(1, 110), memory_for_good),
    "nan twice": Fault(times(math.nan), 2, range(1, 110), nan_twice),
    "nan burst": Fault(times(math.nan), 3, range(1, 110), nan_burst),
    "nan for good": Fault(times(math.nan), None, range(12, 110), nan_for_good),  # before that nothing is saved
    "spike": Fault(times(300.0), HALF, range(60, 100), spike),  # before that there is nothing to compare it with
    "spike for good": Fault(times(300.0), None, range(60, 100), spike_for_good),
}


def undisturbed(photos: Path) -> dict[int, dict[str, Any]]:
    """The adapter's factors after each step of a run without a fault."""
    seen: dict[int, dict[str, Any]] = {}
    tiny_run(photos, None, config=FAULTY, on_step=lambda step: seen.update({step.index: step.factors()}))
    return seen


def wrong_with(kind: str, at: int, photos: Path, run: Path, reference: Mapping[int, Mapping[str, Any]]) -> list[str]:
    """Train with a fault from step `at` on into the folder `run`; what is not as it must be. reference: of `undisturbed`"""
    fault, base, wrong = FAULTS[kind], tiny(), []
    expected, end = fault.outcome(at), math.inf if fault.passes is None else at + fault.passes
    error = adapter = None
    with failing_forward(base, lambda n, output: fault.spoil(output) if at <= n < end else output):
        try:
            adapter = train(base, subject(photos), lora=LORA, config=FAULTY, out=run, progress=False)
        except TrainingError as caught:
            error = caught
    record = json.loads((run / "run.json").read_text())
    said = [event["what"] for event in record["events"]]
    if len(said) != len(expected.events) or not all(map(re.fullmatch, expected.events, said)):
        wrong.append(f"events {said} instead of {expected.events}")
    status = "finished" if expected.good is None else "stopped by an error"
    if (error is None) != (expected.good is None) or record["status"] != status:
        wrong.append(f"{record['status']} ({error}) instead of {status}")
    for checkpoint in (run / "checkpoints").glob("[0-9]*"):
        wrong += wrong_in(checkpoint)
    found = newest([run / "checkpoints"])
    last = FAULTY.steps if expected.good is None else expected.good
    if (0 if found is None else found.step) != last:
        wrong.append(f"the newest checkpoint is {found and found.step} instead of {last}")
    elif found is not None and error is not None and expected.good:
        lora, good = unpacked_state(found.contents[STATE])["lora"], reference[expected.good]
        if not all(torch.equal(lora[f"{key}.{half}"], getattr(f, half)) for key, f in good.items() for half in ("down", "up")):
            wrong.append(f"the saved state is not that of step {expected.good}")
    if record["facts"]["lora"]["rank"] != LORA.rank or record["facts"]["config"]["resolution"] != 64:
        wrong.append("another rank or resolution")
    if adapter is not None:
        wrong += wrong_adapter(adapter)
        wrong += wrong_adapter(Adapter.load(run / ADAPTER))  # refuses what is not finite
        wrong += wrong_metrics(run, expected, settled(FAULTY, base, 3))
    return wrong


def wrong_in(checkpoint: Path) -> list[str]:
    whole = read_back(checkpoint)
    if whole is None:
        return [f"{checkpoint.name} is torn"]
    state = unpacked_state(whole.contents[STATE])
    wrong = wrong_adapter(Adapter.load(checkpoint / ADAPTER))
    parts = {name: part for name, part in (("state", state), ("good", state["good"])) if part is not None}
    for name, part in parts.items():
        values = [part["lora"], *part["optimizer"]["state"].values()]
        if not all(bool(torch.as_tensor(value).isfinite().all()) for each in values for value in each.values()):
            wrong.append(f"{checkpoint.name}: {name} is not finite")
    return wrong


def wrong_adapter(adapter: Adapter) -> list[str]:
    ranks = {factors.down.shape[0] for factors in adapter.modules.values()}
    same = ranks == {LORA.rank} == {adapter.card.rank} and adapter.card.resolution == 64
    return [] if same else [f"an adapter of rank {ranks}, resolution {adapter.card.resolution}"]


def wrong_metrics(run: Path, expected: Outcome, config: TrainingConfig) -> list[str]:
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    halved_after, wrong = (config.steps or 0) if expected.halved_after is None else expected.halved_after, []
    if [line["step"] for line in lines] != list(range(1, (config.steps or 0) + 1)):
        wrong.append("steps are missing in the metrics")
    if tuple(line["step"] for line in lines if line["loss"] is None) != expected.left_out:
        wrong.append("other losses are missing")
    for line in lines:
        share = 0.5 if line["step"] > halved_after else 1.0
        if not math.isclose(line["rate"], share * learning_rate(config, line["step"] - 1)):
            wrong.append(f"rate {line['rate']} at step {line['step']}")
            break
    return wrong
