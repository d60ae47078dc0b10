"""A recorded step: what prevents it, its buffers, and the same training with and without."""

from __future__ import annotations

import copy
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import make_pipeline

from lora_booth.base.base_model import BaseModel, TextConditions
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.kernels.capture import StepGraph, layout_of, obstacle, tensors_in
from lora_booth.subject.subject import Subject
from lora_booth.training import training_run
from lora_booth.training.encoding import prepare
from lora_booth.training.latents import Batch, Inputs
from lora_booth.training.training_run import TrainingRun

CONFIG = TrainingConfig(steps=6, class_images=2, warmup_steps=0, learning_rate=1e-3)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def some_inputs(seed: int, rows: int = 2) -> Inputs:
    torch.manual_seed(seed)
    latents, noise = torch.randn(2, rows, 4, 2, 2)
    text = TextConditions(torch.randn(rows, 3, 5), torch.randn(rows, 6))
    return Inputs(Batch(latents, noise, torch.randint(9, (rows,)), ("a", "b")[:rows], torch.randn(rows, 6), photos=1), text)


def test_what_stands_in_the_way_is_named() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"), name="tiny")
    assert obstacle(base, LoraSpec()) is None
    assert "text encoders" in str(obstacle(base, LoraSpec(text_encoder=True)))
    assert "dropout" in str(obstacle(base, LoraSpec(dropout=0.1)))
    hook = base.unet.mid_block.register_forward_hook(lambda *_: None)
    assert "hooks" in str(obstacle(base, LoraSpec()))
    hook.remove()
    assert obstacle(base, LoraSpec()) is None


def test_a_run_on_a_gpu_asks_before_it_injects_hooks_of_its_own(photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stopped at the first use of the GPU that is not there: so far a recording is what it had decided for."""
    base = BaseModel.from_pipeline(make_pipeline("sd1"), name="tiny")
    subject = Subject.from_folder(photos, token="sks", class_noun="dog")
    cache = prepare(base, [subject], lora=LoraSpec(rank=2), config=replace(CONFIG, class_images=0))
    monkeypatch.setattr(BaseModel, "device", torch.device("cuda"))
    said: list[str] = []

    def begun(work: Any, gradient: torch.Tensor, *, say: Any) -> None:
        raise InterruptedError("recorded")

    def begun_without(*_: Any) -> None:
        raise InterruptedError("not recorded")

    monkeypatch.setattr(training_run, "StepGraph", begun)
    monkeypatch.setattr(training_run, "make_optimizer", lambda *_: None)
    monkeypatch.setattr(training_run, "averaged", lambda *_: None)
    config = replace(CONFIG, resolution=64)
    with pytest.raises(InterruptedError, match="recorded"):
        TrainingRun(base, cache, LoraSpec(rank=2), config, say=said.append)
    assert not any("not recorded" in line for line in said)
    hook = base.unet.mid_block.register_forward_hook(lambda *_: None)
    monkeypatch.setattr(training_run, "StepGraph", None)
    monkeypatch.setattr(training_run, "LoopState", begun_without)
    with pytest.raises(InterruptedError, match="not recorded"):
        TrainingRun(base, cache, LoraSpec(rank=2), config, say=said.append)
    hook.remove()
    assert said == ["note: the step is not recorded, since the U-Net has hooks, which a replay would not call"]


def test_buffers_take_in_every_tensor() -> None:
    one, other = some_inputs(1), some_inputs(2)
    buffers = copy.deepcopy(one)
    assert len(tensors_in(one)) == 6  # latents, time_ids, states, pooled, noise, timesteps
    places = [tensor.data_ptr() for tensor in tensors_in(buffers)]
    assert not set(places) & {tensor.data_ptr() for tensor in tensors_in(one)}
    torch._foreach_copy_(tensors_in(buffers), tensors_in(other))
    assert all(torch.equal(a, b) for a, b in zip(tensors_in(buffers), tensors_in(other), strict=True))
    assert [tensor.data_ptr() for tensor in tensors_in(buffers)] == places
    assert not any(torch.equal(a, b) for a, b in zip(tensors_in(one), tensors_in(other), strict=True))


def test_each_layout_has_a_recording_of_its_own() -> None:
    one = some_inputs(1)
    assert layout_of(one) == layout_of(some_inputs(2))
    assert layout_of(one) == layout_of(replace(one, batch=replace(one.batch, prompts=("c", "d"))))  # words are in the text
    others = [
        some_inputs(1, rows=1),
        replace(one, batch=replace(one.batch, photos=2)),
        replace(one, batch=replace(one.batch, part_of=(3, 3))),
        replace(one, batch=replace(one.batch, noise=one.batch.noise.half())),
        replace(one, text=TextConditions(one.text.states)),
    ]
    assert len({layout_of(inputs) for inputs in (one, *others)}) == 6


def test_nothing_is_added_twice_and_what_cannot_be_recorded_runs_as_usual_and_says_so_once() -> None:
    """On a CPU, where no CUDA graph can be recorded."""
    parameter = torch.zeros(3, requires_grad=True)
    said: list[str] = []

    def work(inputs: Inputs) -> torch.Tensor:
        loss = ((parameter - inputs.batch.noise.mean()) ** 2).sum()
        torch.autograd.backward(loss)
        return loss.detach()

    parameter.grad = torch.zeros(3)
    step = StepGraph(work, parameter.grad, say=said.append)
    total = torch.zeros(3)
    for seed in range(5):
        inputs = some_inputs(seed)
        assert torch.allclose(step(inputs), 3 * inputs.batch.noise.mean() ** 2)
        total -= 2 * inputs.batch.noise.mean()
    assert parameter.grad is not None and torch.allclose(parameter.grad, total)
    assert not step.on and len(said) == 1 and "cannot be recorded (" in said[0]


@needs_cuda
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize(("shape", "sizes"), [("square", 1), ("buckets", 2)])
def test_recorded_and_not_recorded_are_the_same_training(
    kind: str, dtype: torch.dtype, shape: Any, sizes: int, photos: Path
) -> None:
    found = {}
    for capture in (False, True):  # on a GPU nearly so
        base = BaseModel.from_pipeline(make_pipeline(kind).to("cuda", dtype), name="tiny")
        config = replace(CONFIG, capture=capture, gradient_accumulation=2, shape=shape)
        subject = Subject.from_folder(photos, token="sks", class_noun="dog", crops={"1.jpg": (0, 0, 1, 0.5)})
        cache = prepare(base, [subject], lora=LoraSpec(rank=2), config=config)
        run = TrainingRun(base, cache, LoraSpec(rank=2), replace(config, resolution=64))
        losses = [step.loss for step in run]
        assert len(getattr(run.backward, "_recordings", {})) == (sizes if capture else 0)
        found[capture] = losses, run.lora.factors()
        run.close()
        assert not getattr(run.backward, "_recordings", {})
    assert found[True][0] == pytest.approx(found[False][0], rel=1e-2)
    for key, factors in found[False][1].items():
        other = found[True][1][key]
        assert (factors.delta() - other.delta()).norm() <= 0.05 * factors.delta().norm()
