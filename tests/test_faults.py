"""What goes wrong while a run is at work: memory, disk, numbers, power. It goes on, or stops with a whole checkpoint."""

from __future__ import annotations

import errno
import json
import math
import os
import shutil
from contextlib import AbstractContextManager
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import (
    CONFIG,
    FAULTS,
    LORA,
    NO_MEMORY,
    failing_disk,
    failing_forward,
    in_process,
    largest_file,
    run_and_tell,
    subject,
    tiny,
    tiny_run,
    told,
    undisturbed,
    wrong_with,
)

from lora_booth.adapters.adapter import Adapter
from lora_booth.config import TrainingConfig
from lora_booth.errors import LoraBoothError, TrainingError
from lora_booth.runs.one import train
from lora_booth.training.checkpoint import newest, read_back
from lora_booth.training.memory import is_out_of_memory
from lora_booth.training.training_run import LEVELS, next_level

QUICK = replace(CONFIG, steps=6, checkpoint_every=2)


def events(folder: Path) -> list[str]:
    return [event["what"] for event in json.loads((folder / "run.json").read_text())["events"]]


@pytest.fixture(scope="module")
def digests(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[str, str]:
    """Of the adapter, and of what its file in half precision holds."""
    adapter = train(tiny(), subject(photos), lora=LORA, config=QUICK, progress=False)
    return adapter.digest(), Adapter.load(adapter.save(tmp_path_factory.mktemp("adapters") / "a.safetensors")).digest()


# --- memory --------------------------------------------------------------------------------------------------------------


def test_which_errors_say_out_of_memory() -> None:
    with pytest.raises(RuntimeError) as caught:
        torch.empty(2**60, dtype=torch.uint8)
    assert is_out_of_memory(caught.value)
    assert is_out_of_memory(torch.OutOfMemoryError("CUDA out of memory.")) and is_out_of_memory(MemoryError())
    assert is_out_of_memory(RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"))
    assert not is_out_of_memory(RuntimeError("mat1 and mat2 shapes cannot be multiplied"))
    assert not is_out_of_memory(ValueError("out of memory"))


def test_the_ladder_never_touches_what_is_learnt() -> None:
    config = TrainingConfig(batch_size=2)
    for level in LEVELS:
        assert next_level(config, pictures=4) == level
        changed = replace(config, **{level[0]: level[1]})
        assert [f for f in vars(config) if getattr(config, f) != getattr(changed, f)] == [level[0]]
        config = changed
    assert next_level(config, pictures=4) is None
    assert next_level(TrainingConfig(), pictures=1) == ("gradient_checkpointing", True)


@pytest.mark.slow
@pytest.mark.parametrize("index", [1, 4])
def test_out_of_memory_takes_less_at_a_time(index: int, photos: Path, tmp_path: Path) -> None:
    """The step is made again in parts, and the adapter is that of all at once but for rounding."""
    base = tiny()

    def fault(n: int, output: Any) -> Any:
        if len(output.sample) > 1 and n >= index:
            raise RuntimeError(NO_MEMORY)
        return output

    with failing_forward(base, fault):
        adapter = train(base, subject(photos), lora=LORA, config=QUICK, out=tmp_path / "run", progress=False)
    assert events(tmp_path / "run") == [f"out of memory at step {index}: continuing with pictures_at_a_time=1"]
    plain = train(tiny(), subject(photos), lora=LORA, config=QUICK, progress=False)
    for key, factors in adapter.modules.items():
        assert (factors.delta() - plain.modules[key].delta()).norm() <= 0.01 * plain.modules[key].delta().norm()


@pytest.mark.slow
def test_a_run_that_saved_memory_is_continued_in_the_same_way(photos: Path, tmp_path: Path) -> None:
    def limited(n: int, output: Any) -> Any:
        if len(output.sample) > 1 and n >= 2:
            raise RuntimeError(NO_MEMORY)
        return output

    def call(out: Path, stop: int | None) -> str:
        base = tiny()

        def on_step(step: Any) -> None:
            if step.index == stop:
                raise KeyboardInterrupt

        with failing_forward(base, limited):
            return train(base, subject(photos), lora=LORA, config=QUICK, out=out, on_step=on_step, progress=False).digest()

    expected = call(tmp_path / "whole", None)
    with pytest.raises(KeyboardInterrupt):
        call(tmp_path / "run", 3)
    assert call(tmp_path / "run", None) == expected
    assert [line for line in events(tmp_path / "run") if "memory" in line] == [
        "out of memory at step 2: continuing with pictures_at_a_time=1"
    ]


def test_the_end_of_the_ladder_names_what_is_left(photos: Path, tmp_path: Path) -> None:
    base = tiny()

    def fault(n: int, output: Any) -> Any:
        if n >= 4:
            raise RuntimeError(NO_MEMORY)
        return output

    with (
        failing_forward(base, fault),
        pytest.raises(TrainingError, match="every level .*; try a smaller resolution or rank"),
    ):
        train(base, subject(photos), lora=LORA, config=QUICK, out=tmp_path, progress=False)
    *levels, stopped, saved = events(tmp_path)
    assert levels == [f"out of memory at step 4: continuing with {name}={value}" for name, value in LEVELS]
    assert stopped.startswith("stopped: out of memory at step 4") and saved == "the last good state, of step 3, is saved"
    assert not base.unet.is_gradient_checkpointing


# --- numbers -------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "at"), [(kind, fault.begins[9]) for kind, fault in FAULTS.items()])
def test_a_fault_ends_as_it_must(kind: str, at: int, photos: Path, tmp_path: Path, reference: dict[int, Any]) -> None:
    """Outcome, events, rates, checkpoints, rank; benchmarks/reliability.py begins it at 42 points."""
    assert wrong_with(kind, at, photos, tmp_path / "run", reference) == []


@pytest.fixture(scope="module")
def reference(photos: Path) -> dict[int, Any]:
    return undisturbed(photos)


def test_gradients_that_are_not_finite_are_told_as_a_loss_is(photos: Path, tmp_path: Path) -> None:
    """A kernel that fails in the backward pass only: else every update would be left out without a word."""
    base, passes = tiny(), []

    def hook(module: Any, inputs: Any, output: Any) -> None:
        passes.append(1)
        if len(passes) in (3, 4):
            output.sample.register_hook(lambda gradient: gradient * math.nan)

    handle = base.unet.register_forward_hook(hook)
    train(base, subject(photos), lora=LORA, config=QUICK, out=tmp_path, progress=False)
    handle.remove()
    left_out = "the loss or its gradients were not finite at step"
    assert events(tmp_path) == [
        f"{left_out} 3: the update is skipped",
        f"{left_out} 4: the update is skipped (2 so far)",
    ]


def test_an_adapter_that_is_not_finite_is_no_checkpoint(photos: Path, tmp_path: Path) -> None:
    def spoil(step: Any) -> None:
        if step.index == 3:
            with torch.no_grad():
                next(iter(step.lora.parameters.values())).fill_(math.nan)
        if step.index == 4:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        tiny_run(photos, tmp_path, config=QUICK, on_step=spoil)
    left_out, said = events(tmp_path)
    assert left_out.endswith("not finite at step 4: the update is skipped")
    assert said.startswith("no checkpoint of step 4 (") and said.endswith("that of step 2 stays")
    found = newest([tmp_path / "checkpoints"])
    assert found is not None and found.step == 2


# --- the disk ------------------------------------------------------------------------------------------------------------


def survives(photos: Path, folder: Path, digests: tuple[str, str], fault: AbstractContextManager[Any], expect: str) -> None:
    """Under `fault` a run comes to its end, or says in its own words why it cannot begin; then the same call gives the adapter:
    that of its file, rounded to half precision, where there was room for that but for no checkpoint."""
    shutil.rmtree(folder, ignore_errors=True)
    with fault:
        try:
            assert tiny_run(photos, folder, config=QUICK) == digests[0]
        except LoraBoothError as error:
            assert expect in str(error)
    for checkpoint in (folder / "checkpoints").glob("[0-9]*"):
        assert read_back(checkpoint) is not None
    found = newest([folder / "checkpoints"])
    rounded = (folder / "adapter.safetensors").is_file() and (found is None or found.step < QUICK.steps)
    assert tiny_run(photos, folder, config=QUICK) == digests[rounded]
    assert Adapter.load(folder / "adapter.safetensors").digest() == digests[1]
    assert json.loads((folder / "run.json").read_text())["status"] == "finished"
    assert not list(folder.rglob("*.tmp"))


@pytest.mark.slow
def test_a_full_disk_at_any_write(digests: tuple[str, str], photos: Path, tmp_path: Path) -> None:
    """At a few of all its writes; benchmarks/reliability.py takes every one."""
    with failing_disk(tmp_path, at=10**9) as disk:
        tiny_run(photos, tmp_path / "count", config=QUICK)
    writes = disk["count"]
    assert writes > 25
    for at in range(2, writes + 1, writes // 3):
        fault = failing_disk(tmp_path / "run", at, times=3)
        survives(photos, tmp_path / "run", digests, fault, os.strerror(errno.ENOSPC))


@pytest.mark.slow
@pytest.mark.skipif(os.name != "posix", reason="the limit is of POSIX")
@pytest.mark.parametrize("size", [100, 30_000])
def test_a_write_that_stops_in_its_middle(size: int, digests: tuple[str, str], photos: Path, tmp_path: Path) -> None:
    survives(photos, tmp_path / "run", digests, largest_file(size), os.strerror(errno.EFBIG))


def test_a_save_that_fails_keeps_the_last_good_one(digests: tuple[str, str], photos: Path, tmp_path: Path) -> None:
    disk = failing_disk(tmp_path / "checkpoints", at=1, times=10**6, error=errno.EIO)
    entered: list[Any] = []

    def on_step(step: Any) -> None:
        if step.index == 3:
            entered.append(disk.__enter__())

    assert tiny_run(photos, tmp_path, config=QUICK, on_step=on_step) == digests[0]
    disk.__exit__(None, None, None)
    why = os.strerror(errno.EIO)
    assert events(tmp_path) == [f"no checkpoint of step {step} ({why}); that of step 2 stays" for step in (4, 6)]
    found = newest([tmp_path / "checkpoints"])
    assert found is not None and found.step == 2


# --- power ---------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_killed_run_is_continued_exactly(digests: tuple[str, str], photos: Path, tmp_path: Path) -> None:
    """kill -9 at some moments; benchmarks/reliability.py takes 200."""
    run, killed, often = tmp_path / "run", 0, replace(QUICK, checkpoint_every=1)
    for attempt in range(30):
        report = tmp_path / f"report{attempt}"
        process = in_process(run_and_tell, photos, run, report, {"config": often})
        while process.is_alive() and len(told(report)) < 2:
            process.join(0.01)
        lines, alive = told(report), process.is_alive()
        process.kill()
        process.join()
        if not alive or digests[0] in lines:
            break
        killed += 1
        found = newest([run / "checkpoints"])
        last = [line for line in lines if isinstance(line, int)][-1]
        assert (0 if found is None else found.step) >= last - 1
        for checkpoint in (run / "checkpoints").glob("[0-9]*"):
            assert read_back(checkpoint) is not None
    assert killed >= 2 and lines[-1] == digests[0]
    assert not list((run / "checkpoints").glob(".*"))  # what the dead ones left half-written is gone
