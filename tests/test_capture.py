"""One CUDA graph for a step: what stands in its way is told; the buffers; and on a GPU, the same training with and without."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from pipelines import make_pipeline

from lora_booth.base_model import BaseModel, TextConditions
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import SettingsError
from lora_booth.latents import Batch
from lora_booth.subject import Subject
from lora_booth.training import prepare
from lora_booth.training.capture import StepGraph, copied, fill, layout_of, obstacle, tensors_of
from lora_booth.training.loop import Inputs, TrainingRun

CONFIG = TrainingConfig(steps=6, class_images=2, warmup_steps=0, learning_rate=1e-3)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def some_inputs(seed: int, rows: int = 2) -> Inputs:
    torch.manual_seed(seed)
    latents, noise = torch.randn(2, rows, 4, 2, 2)
    text = TextConditions(torch.randn(rows, 3, 5), torch.randn(rows, 6))
    return Inputs(Batch(latents, ("a", "b")[:rows], torch.randn(rows, 6), photos=1), text, noise, torch.randint(9, (rows,)))


def test_what_stands_in_the_way_is_named() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"), name="tiny")
    reason = obstacle(base, LoraSpec(), TrainingConfig())
    assert reason == "the base is on cpu"
    with pytest.raises(SettingsError, match='capture="on" is not possible: the base is on cpu'):
        StepGraph(lambda inputs: inputs, torch.zeros(1), reason=reason, wanted="on")


@needs_cuda
def test_what_stands_in_the_way_on_a_gpu() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1").to("cuda"), name="tiny")
    assert obstacle(base, LoraSpec(), TrainingConfig()) is None
    assert "text encoders" in str(obstacle(base, LoraSpec(text_encoder=True), TrainingConfig()))
    assert "dropout" in str(obstacle(base, LoraSpec(dropout=0.1), TrainingConfig()))
    assert obstacle(base, LoraSpec(), TrainingConfig(gradient_checkpointing=True)) is None
    hook = base.unet.mid_block.register_forward_hook(lambda *_: None)
    assert "hooks" in str(obstacle(base, LoraSpec(), TrainingConfig()))
    hook.remove()


def test_buffers_take_in_every_tensor() -> None:
    one, other = some_inputs(1), some_inputs(2)
    buffers = copied(one)
    assert len(tensors_of(one)) == 6  # latents, time_ids, states, pooled, noise, timesteps
    places = [tensor.data_ptr() for tensor in tensors_of(buffers)]
    assert not set(places) & {tensor.data_ptr() for tensor in tensors_of(one)}
    fill(buffers, other)
    assert all(torch.equal(a, b) for a, b in zip(tensors_of(buffers), tensors_of(other), strict=True))
    assert [tensor.data_ptr() for tensor in tensors_of(buffers)] == places
    assert not any(torch.equal(a, b) for a, b in zip(tensors_of(one), tensors_of(other), strict=True))


def test_each_layout_has_a_recording_of_its_own() -> None:
    one = some_inputs(1)
    assert layout_of(one) == layout_of(some_inputs(2))
    assert layout_of(one) == layout_of(replace(one, batch=replace(one.batch, prompts=("c", "d"))))  # words are in the text
    others = [
        some_inputs(1, rows=1),
        replace(one, batch=replace(one.batch, photos=2)),
        replace(one, batch=replace(one.batch, whole=(3, 3))),
        replace(one, noise=one.noise.half()),
        replace(one, text=TextConditions(one.text.states)),
    ]
    assert len({layout_of(inputs) for inputs in (one, *others)}) == 6


@pytest.mark.skipif(torch.cuda.is_available(), reason="here it can be recorded")
def test_what_cannot_be_recorded_is_computed_and_told_once() -> None:
    parameter = torch.zeros(3, requires_grad=True)
    said: list[str] = []

    def work(inputs: Inputs) -> torch.Tensor:
        loss = ((parameter - inputs.noise.mean()) ** 2).sum()
        torch.autograd.backward(loss)
        return loss.detach()

    parameter.grad = torch.zeros(3)
    step = StepGraph(work, parameter.grad, reason=None, say=said.append)
    total = torch.zeros(3)
    for seed in range(4):  # nothing is added twice
        inputs = some_inputs(seed)
        assert step(inputs) == 3 * inputs.noise.mean() ** 2
        total -= 2 * inputs.noise.mean()
    assert parameter.grad is not None and torch.allclose(parameter.grad, total)
    assert len(said) == 1 and "not recorded as a CUDA graph" in said[0] and not step.on


@needs_cuda
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_recorded_and_not_recorded_are_the_same_training(kind: str, dtype: torch.dtype, photos: Path) -> None:
    found = {}
    for capture in ("off", "on"):
        base = BaseModel.from_pipeline(make_pipeline(kind).to("cuda", dtype), name="tiny")
        config = replace(CONFIG, capture=capture, gradient_accumulation=2)  # type: ignore[arg-type]
        subject = Subject.from_folder(photos, token="sks", class_noun="dog")
        cache = prepare(base, [subject], lora=LoraSpec(rank=2), config=config)
        run = TrainingRun(base, cache, LoraSpec(rank=2), replace(config, resolution=64))
        losses = [step.loss for step in run]
        assert bool(run.graph._recordings) == (capture == "on")
        found[capture] = losses, run.factors
        run.close()
        assert not run.graph._recordings
    assert found["on"][0] == pytest.approx(found["off"][0], rel=1e-2)
    for key, factors in found["off"][1].items():
        other = found["on"][1][key]
        assert (factors.delta() - other.delta()).norm() <= 0.05 * factors.delta().norm()
