"""What only a CUDA GPU can tell: that nobody waits for it, that a run goes on as it was, that nothing stays on it."""

from __future__ import annotations

import gc
import importlib.util
from collections.abc import Iterator
from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import make_pipeline

from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training.encoding import prepare
from lora_booth.training.latents import LatentCache
from lora_booth.training.training_run import LOOK_EVERY, TrainingRun

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")

CONFIG = TrainingConfig(steps=3 * LOOK_EVERY, class_images=2, warmup_steps=0, learning_rate=1e-3, resolution=64)
LORA = LoraSpec(rank=4)
EIGHT = pytest.param(
    "adamw8bit", marks=pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="needs bitsandbytes")
)


def base_of(kind: str, dtype: torch.dtype) -> BaseModel:
    return BaseModel.from_pipeline(make_pipeline(kind).to("cuda", dtype), name="tiny")


@pytest.fixture(params=[torch.bfloat16, torch.float16])
def prepared(request: pytest.FixtureRequest, rex: Subject) -> Iterator[tuple[BaseModel, LatentCache]]:
    base = base_of("sd1", request.param)
    yield base, prepare(base, [rex], lora=LORA, config=CONFIG)


@pytest.mark.parametrize("capture", [True, False])
def test_between_two_looks_at_the_losses_the_host_waits_for_nothing(
    prepared: tuple[BaseModel, LatentCache], capture: bool
) -> None:
    base, cache = prepared
    with closing(TrainingRun(base, cache, LORA, replace(CONFIG, capture=capture))) as run:
        for _ in range(LOOK_EVERY):  # kernels are compiled, the step is recorded
            next(run)
        scaled = run.loop.scaler.is_enabled()  # its step asks whether there were infinite values
        torch.cuda.set_sync_debug_mode("default" if scaled else "error")
        try:
            for _ in range(LOOK_EVERY - 1):
                next(run)
        finally:
            torch.cuda.set_sync_debug_mode("default")
        assert len(list(run)) == LOOK_EVERY + 1


@pytest.mark.parametrize("optimizer", ["adamw", EIGHT])
def test_a_run_goes_on_as_it_was(prepared: tuple[BaseModel, LatentCache], optimizer: Any) -> None:
    base, cache = prepared
    config = replace(CONFIG, steps=12, optimizer=optimizer)
    with closing(TrainingRun(base, cache, LORA, config)) as run:
        for _ in range(6):
            next(run)
        state = run.state()
        assert all(not tensor.is_cuda for tensor in state["lora"].values())
        expected = [step.loss for step in run]
        learnt = run.lora.factors()
    for _ in range(2):  # what is kept stays as it was
        with closing(TrainingRun(base, cache, LORA, config, resume=state)) as run:
            assert [step.loss for step in run] == pytest.approx(expected, rel=1e-2)
            for key, factors in run.lora.factors().items():
                assert (factors.delta() - learnt[key].delta()).norm() <= 0.05 * learnt[key].delta().norm()


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_a_whole_run_with_samples_leaves_nothing_on_the_gpu(
    kind: str, dtype: torch.dtype, rex: Subject, tmp_path: Path
) -> None:
    config = replace(CONFIG, steps=6, checkpoint_every=2, sample_every=3)
    train(base_of(kind, dtype), rex, lora=LORA, config=config, out=tmp_path / "first", progress=False)  # what libraries keep
    gc.collect()
    torch.cuda.empty_cache()
    base = base_of(kind, dtype)
    before = torch.cuda.memory_allocated()
    adapter = train(base, rex, lora=LORA, config=config, out=tmp_path / "run", progress=False)
    gc.collect()
    assert torch.cuda.memory_allocated() <= before + 2**20
    assert len(list((tmp_path / "run" / "samples").rglob("*.png"))) >= 2
    assert all(bool(factors.up.isfinite().all()) and bool(factors.up.any()) for factors in adapter.modules.values())


def test_scarce_memory_is_saved(rex: Subject) -> None:
    """A real error of the GPU's allocator, not a made-up one."""
    base = base_of("sd1", torch.float16)
    config = replace(CONFIG, steps=3, resolution=512, batch_size=4, capture=False)
    cache = prepare(base, [rex], lora=LORA, config=config)
    said: list[str] = []
    with closing(TrainingRun(base, cache, LORA, config, say=said.append)) as run:
        torch.cuda.reset_peak_memory_stats()
        next(run)
        most, least = torch.cuda.max_memory_reserved(), torch.cuda.memory_allocated()
    del run
    gc.collect()
    torch.cuda.empty_cache()
    total = torch.cuda.get_device_properties(0).total_memory
    torch.cuda.set_per_process_memory_fraction((least + 0.6 * (most - least)) / total)
    try:
        with closing(TrainingRun(base, cache, LORA, config, say=said.append)) as run:
            assert len(list(run)) == 3 and run.levels
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert any("out of memory at step 1: continuing with" in line for line in said)
