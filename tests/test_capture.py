"""A recorded step, a CUDA graph or a trace: what prevents it, its buffers, and the same training with and without."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from pipelines import make_pipeline

from lora_booth.base.base_model import BaseModel, TextConditions
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import SettingsError
from lora_booth.kernels.capture import WORTH_A_TRACE, StepGraph, copied, fill, layout_of, obstacle, tensors_of
from lora_booth.subject.subject import Subject
from lora_booth.training.encoding import prepare
from lora_booth.training.latents import Batch, Inputs
from lora_booth.training.training_run import TrainingRun

CONFIG = TrainingConfig(steps=6, class_images=2, warmup_steps=0, learning_rate=1e-3)
needs_cuda = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")


def some_inputs(seed: int, rows: int = 2) -> Inputs:
    torch.manual_seed(seed)
    latents, noise = torch.randn(2, rows, 4, 2, 2)
    text = TextConditions(torch.randn(rows, 3, 5), torch.randn(rows, 6))
    return Inputs(Batch(latents, ("a", "b")[:rows], torch.randn(rows, 6), photos=1), text, noise, torch.randint(9, (rows,)))


def test_what_stands_in_the_way_is_named() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"), name="tiny")
    assert obstacle(base, LoraSpec(), TrainingConfig()) is None
    reason = obstacle(base, LoraSpec(), TrainingConfig(compile=True))
    with pytest.raises(SettingsError, match='capture="on" is not possible: compile=True'):
        StepGraph(lambda inputs: inputs, torch.zeros(1), reason=reason, wanted="on")
    assert "text encoders" in str(obstacle(base, LoraSpec(text_encoder=True), TrainingConfig()))
    assert "dropout" in str(obstacle(base, LoraSpec(dropout=0.1), TrainingConfig()))
    assert obstacle(base, LoraSpec(), TrainingConfig(gradient_checkpointing=True)) is None
    hook = base.unet.mid_block.register_forward_hook(lambda *_: None)
    assert "hooks" in str(obstacle(base, LoraSpec(), TrainingConfig()))
    hook.remove()
    assert obstacle(base, LoraSpec(), TrainingConfig()) is None


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


@pytest.mark.parametrize("trouble", ["", "the host reads a value", "it is another one each time"])
def test_nothing_is_added_twice_and_what_cannot_be_recorded_is_computed_and_told_once(trouble: str) -> None:
    parameter = torch.zeros(3, requires_grad=True)
    said: list[str] = []

    def work(inputs: Inputs) -> torch.Tensor:
        loss = ((parameter - inputs.noise.mean()) ** 2).sum()
        if trouble == "the host reads a value":
            assert loss.item() >= 0
        torch.autograd.backward(loss)
        drawn = torch.rand(()) * 1e-3 if trouble == "it is another one each time" else 0
        return loss.detach() + drawn

    parameter.grad = torch.zeros(3)
    step = StepGraph(work, parameter.grad, reason=None, say=said.append)
    total = torch.zeros(3)
    for seed in range(5):
        inputs = some_inputs(seed)
        assert torch.allclose(step(inputs), 3 * inputs.noise.mean() ** 2, atol=2e-3)
        total -= 2 * inputs.noise.mean()
    assert parameter.grad is not None and torch.allclose(parameter.grad, total)
    assert step.on == (trouble == "") and len(said) == (trouble != "") and all("not recorded (" in line for line in said)
    assert len(step._recordings) == (trouble == "")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "how"),
    [
        ("sd1", "fp32"),
        ("sd2-v", "bf16"),
        ("sdxl", "bf16, checkpointed, in parts"),
        ("sdxl", "fp32, stock layers, masks"),
    ],
)
def test_a_trace_is_the_same_training_bit_for_bit(kind: str, how: str, photos: Path) -> None:
    dtype = torch.bfloat16 if "bf16" in how else torch.float32
    more = {"gradient_checkpointing": True, "pictures_at_a_time": 1} if "checkpointed" in how else {"lean": "stock" not in how}
    found = {}
    for capture in ("off", "on"):
        base = BaseModel.from_pipeline(make_pipeline(kind).to(dtype), name="tiny")
        config = replace(CONFIG, capture=capture, gradient_accumulation=2, resolution=64, attention="sdpa", **more)  # type: ignore[arg-type]
        masks = (
            {path.name: Image.new("L", Image.open(path).size, 200) for path in photos.glob("*.png")} if "masks" in how else {}
        )
        subject = Subject.from_folder(photos, token="sks", class_noun="dog", masks=masks)
        cache = prepare(base, [subject], lora=LoraSpec(rank=2), config=config)
        run = TrainingRun(base, cache, LoraSpec(rank=2), config)
        losses = [step.loss for step in run]
        assert bool(run.graph._recordings) == (capture == "on")
        found[capture] = losses, run.lora.copied()
        run.close()
        assert not run.graph._recordings
    assert found["on"][0] == found["off"][0]
    assert all(torch.equal(value, found["on"][1][name]) for name, value in found["off"][1].items())


def test_a_trace_is_made_where_it_pays(photos: Path) -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"), name="tiny")
    config = replace(CONFIG, steps=WORTH_A_TRACE, prior_loss_weight=0.0, resolution=64)
    cache = prepare(base, [Subject.from_folder(photos, token="sks", class_noun="dog")], lora=LoraSpec(rank=2), config=config)
    for steps, recorded in ((WORTH_A_TRACE - 1, False), (WORTH_A_TRACE, True)):
        with closing(TrainingRun(base, cache, LoraSpec(rank=2), replace(config, steps=steps))) as run:
            for _ in range(3):
                next(run)
            assert bool(run.graph._recordings) == recorded


@needs_cuda
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_recorded_and_not_recorded_are_the_same_training(kind: str, dtype: torch.dtype, photos: Path) -> None:
    found = {}
    for capture in ("off", "on"):  # on a GPU nearly so
        base = BaseModel.from_pipeline(make_pipeline(kind).to("cuda", dtype), name="tiny")
        config = replace(CONFIG, capture=capture, gradient_accumulation=2)  # type: ignore[arg-type]
        subject = Subject.from_folder(photos, token="sks", class_noun="dog")
        cache = prepare(base, [subject], lora=LoraSpec(rank=2), config=config)
        run = TrainingRun(base, cache, LoraSpec(rank=2), replace(config, resolution=64))
        losses = [step.loss for step in run]
        assert bool(run.graph._recordings) == (capture == "on")
        found[capture] = losses, run.lora.factors()
        run.close()
        assert not run.graph._recordings
    assert found["on"][0] == pytest.approx(found["off"][0], rel=1e-2)
    for key, factors in found["off"][1].items():
        other = found["on"][1][key]
        assert (factors.delta() - other.delta()).norm() <= 0.05 * factors.delta().norm()
