"""Several processes at one run, over gloo on the CPU: the same adapter as one process makes, and none waits for a dead one."""

from __future__ import annotations

import os
import signal
import socket
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import LORA, in_process, subject, tiny

from lora_booth.adapters.adapter import Adapter
from lora_booth.config import TrainingConfig
from lora_booth.errors import LoraBoothError
from lora_booth.runs.one import train
from lora_booth.training.checkpoint import newest, read_back
from lora_booth.training.distributed import is_main
from lora_booth.training.progress import Step

pytestmark = pytest.mark.slow

CONFIG = TrainingConfig(
    steps=4,
    learning_rate=1e-3,
    batch_size=2,
    class_images=2,
    gradient_accumulation=2,
    warmup_steps=0,
    checkpoint_every=2,
    sample_every=0,
)


def one_of(photos: Path, results: Path, out: Path, config: TrainingConfig, seed: int) -> None:
    """A process of a run: its result or its error goes into a file."""
    rank = os.environ["RANK"]

    def on_step(step: Step) -> None:
        (results / f"step{rank}").write_text(str(step.index))

    try:
        chosen = replace(config, seed=seed if is_main() else config.seed)
        adapter = train(tiny(), subject(photos), lora=LORA, config=chosen, out=out, on_step=on_step, progress=False)
        adapter.save(results / f"{rank}.safetensors", dtype="fp32")
    except LoraBoothError as error:
        (results / f"error{rank}").write_text(str(error))
        raise SystemExit(2) from error


def several(count: int, photos: Path, results: Path, out: Path, config: TrainingConfig, *, seed: int = 0) -> list[Any]:
    """seed: of the main process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {"WORLD_SIZE": str(count), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
    environment["LORA_BOOTH_CACHE"] = os.environ["LORA_BOOTH_CACHE"]
    results.mkdir()
    places = [environment | {"RANK": str(rank), "LOCAL_RANK": str(rank)} for rank in range(count)]
    return [in_process(one_of, photos, results, out, config, seed, environment=place) for place in places]


def ended(processes: list[Any], seconds: float = 120) -> list[int | None]:
    for process in processes:
        process.join(seconds)
    codes = [process.exitcode for process in processes]
    for process in processes:
        process.kill()
    return codes


def difference(a: Adapter, b: Adapter) -> float:
    """The largest of any factor's element."""
    return max(
        float((getattr(f, side) - getattr(b.modules[key], side)).abs().max())
        for key, f in a.modules.items()
        for side in ("down", "up")
    )


def wait_for_step(results: Path, rank: int, step: int) -> None:
    file, ends = results / f"step{rank}", time.monotonic() + 120
    while not (file.exists() and int(file.read_text() or 0) >= step):
        assert time.monotonic() < ends
        time.sleep(0.02)


@pytest.mark.parametrize(("count", "batch_size"), [(2, 2), (3, 1)])  # of three, one gets no picture of 1 photo + 1 class image
def test_they_learn_what_one_learns(count: int, batch_size: int, photos: Path, tmp_path: Path) -> None:
    config = replace(CONFIG, batch_size=batch_size)
    alone = train(tiny(), subject(photos), lora=LORA, config=config, progress=False)
    assert ended(several(count, photos, tmp_path / "results", tmp_path / "run", config)) == [0] * count
    adapters = [Adapter.load(tmp_path / "results" / f"{rank}.safetensors") for rank in range(count)]
    assert len({adapter.digest() for adapter in adapters}) == 1
    assert difference(adapters[0], alone) <= 1e-5
    assert max(float(f.up.abs().max()) for f in alone.modules.values()) > 1e-3  # which is something to compare
    found = newest([tmp_path / "run" / "checkpoints"])
    assert found is not None and found.step == 4 and found.record()["surroundings"]["processes"] == count


@pytest.mark.parametrize("lost", [0, 1])
def test_when_one_is_killed_the_other_ends_and_the_checkpoint_is_whole(lost: int, photos: Path, tmp_path: Path) -> None:
    """Also when it was the one that writes. benchmarks/reliability.py stops them as well, without a word to the other."""
    config, run, results = replace(CONFIG, steps=1000), tmp_path / "run", tmp_path / "results"
    pair = several(2, photos, results, run, config)
    other = pair[1 - lost]
    wait_for_step(results, 1, 5)
    pair[lost].kill()
    other.join(60)
    assert other.exitcode not in (None, 0)
    assert (
        "another process of this run was lost; run the same command again to continue"
        in (results / f"error{1 - lost}").read_text()
    )
    assert all(read_back(folder) is not None for folder in (run / "checkpoints").glob("[0-9]*"))
    found = newest([run / "checkpoints"])
    assert found is not None and found.step >= 4

    class Enough(Exception):
        pass

    def on_step(step: Step) -> None:
        assert step.index == found.step + 1
        raise Enough

    with pytest.raises(Enough):  # one process goes on with it
        train(tiny(), subject(photos), lora=LORA, config=config, out=run, progress=False, on_step=on_step)


def test_a_signal_to_one_stops_all_at_the_same_step(photos: Path, tmp_path: Path) -> None:
    config, run, results = replace(CONFIG, steps=1000), tmp_path / "run", tmp_path / "results"
    first, second = several(2, photos, results, run, config)
    wait_for_step(results, 1, 3)
    os.kill(second.pid, signal.SIGTERM)
    assert ended([first, second]) == [143, 143]
    assert (results / "step0").read_text() == (results / "step1").read_text()
    found = newest([run / "checkpoints"])
    assert found is not None and str(found.step) == (results / "step0").read_text()


def test_an_error_of_one_is_an_error_of_all(photos: Path, tmp_path: Path) -> None:
    results, run = tmp_path / "results", tmp_path / "run"
    assert ended(several(2, photos, results, run, CONFIG, seed=1)) != [0, 0]  # the main one has another seed
    assert "other photos, settings" in (results / "error1").read_text()
    (tmp_path / "file").write_text("")
    results = tmp_path / "more"
    assert ended(several(2, photos, results, tmp_path / "file", CONFIG)) == [2, 2]
    assert "the main process stopped" in (results / "error1").read_text()
    assert torch.distributed.is_initialized() is False  # all of it was in other processes
