"""The loss and its gradients against an independent computation with stock diffusers and PEFT, as diffusers' script does it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from PIL import Image
from pipelines import KINDS, make_pipeline, random_adapter
from torch import Tensor

from lora_booth.base.base_model import BaseModel, TextConditions
from lora_booth.config import LoraSpec, TrainingConfig, settled
from lora_booth.injection.attached import attached
from lora_booth.injection.trainable import trainable
from lora_booth.subject.subject import Subject
from lora_booth.training.encoding import error_weights, mask_latents, prepare
from lora_booth.training.latents import Batch, Bucket, Inputs, LatentCache, LatentSet, draw
from lora_booth.training.loop import LoopState, backward, dreambooth_loss, min_snr_weight, predict

TARGETS = ["to_q", "to_k", "to_v", "to_out.0"]


def inputs(kind: str, count: int, timesteps: list[int]) -> dict[str, Any]:
    unet = make_pipeline(kind).unet.config
    generator = torch.Generator().manual_seed(11)
    extra = kind == "sdxl"
    return {
        "latents": torch.randn(count, 4, 8, 8, generator=generator) * 0.9,
        "noise": torch.randn(count, 4, 8, 8, generator=generator),
        "states": torch.randn(count, 16, unet.cross_attention_dim, generator=generator),
        "pooled": torch.randn(count, 24, generator=generator) if extra else None,
        "time_ids": torch.tensor([[300.0, 260, 12, 7, 64, 64]] * count) if extra else None,
        "timesteps": torch.tensor(timesteps),
    }


LossAndGradients = tuple[Tensor, dict[str, Tensor]]


def stock(kind: str, given: dict[str, Any], prior_loss_weight: float | None, gamma: float | None = None) -> LossAndGradients:
    """As train_dreambooth_lora.py computes it; gradients by the adapter's own module names."""
    pipeline = make_pipeline(kind)
    unet = pipeline.unet
    unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    start = random_adapter(BaseModel.from_pipeline(make_pipeline(kind))).modules
    with torch.no_grad():
        for key, factors in start.items():
            layer = unet.get_submodule(key.removeprefix("unet."))
            layer.lora_A["default"].weight.copy_(factors.down)
            layer.lora_B["default"].weight.copy_(factors.up)
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    noise, timesteps = given["noise"], given["timesteps"]
    noisy = scheduler.add_noise(given["latents"], noise, timesteps)
    extra = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if kind == "sdxl" else None
    predicted = unet(noisy, timesteps, given["states"], added_cond_kwargs=extra, return_dict=False)[0]
    if scheduler.config.prediction_type == "epsilon":
        target = noise
    else:
        target = scheduler.get_velocity(given["latents"], noise, timesteps)
    if gamma is not None:
        snr = compute_snr(scheduler, timesteps)
        weights = torch.stack([snr, gamma * torch.ones_like(snr)], dim=1).min(dim=1)[0]
        weights = weights / snr if scheduler.config.prediction_type == "epsilon" else weights / (snr + 1)
        loss = (F.mse_loss(predicted, target, reduction="none").mean(dim=[1, 2, 3]) * weights).mean()
    elif prior_loss_weight is None:
        loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
    else:
        predicted, predicted_prior = torch.chunk(predicted, 2, dim=0)
        target, target_prior = torch.chunk(target, 2, dim=0)
        loss = F.mse_loss(predicted.float(), target.float(), reduction="mean")
        loss = loss + prior_loss_weight * F.mse_loss(predicted_prior.float(), target_prior.float(), reduction="mean")
    loss.backward()
    gradients = {}
    for key in start:
        layer = unet.get_submodule(key.removeprefix("unet."))
        gradients[f"{key}.down"] = layer.lora_A["default"].weight.grad
        gradients[f"{key}.up"] = layer.lora_B["default"].weight.grad
    return loss.detach(), gradients


def ours(kind: str, given: dict[str, Any], photos: int, **settings: Any) -> LossAndGradients:
    base = BaseModel.from_pipeline(make_pipeline(kind))
    start = random_adapter(base).modules
    drawn = given["latents"], given["noise"], given["timesteps"]
    batch = Batch(*drawn, ("a dog",) * len(given["latents"]), given["time_ids"], photos)
    with trainable(base, LoraSpec(rank=4)) as lora:
        parameters = lora.parameters
        with torch.no_grad():
            for key, factors in start.items():
                parameters[f"{key}.down"].copy_(factors.down)
                parameters[f"{key}.up"].copy_(factors.up)
        text = TextConditions(given["states"], given["pooled"])
        loss = dreambooth_loss(base, batch, predict(base, batch, text), **settings)
        loss.backward()
        assert loss.shape == () and loss.dtype == torch.float32
        assert not any(p.grad is not None for p in base.unet.parameters() if not p.requires_grad)
        return loss.detach(), {name: p.grad for name, p in parameters.items() if p.grad is not None}


def same(a: LossAndGradients, b: LossAndGradients) -> None:
    assert abs(float(a[0] - b[0])) <= 1e-6 * max(1.0, abs(float(b[0])))
    assert a[1].keys() == b[1].keys()
    largest = max(float(g.abs().max()) for g in b[1].values())
    assert largest > 0
    for name in a[1]:
        assert (a[1][name] - b[1][name]).abs().max() <= 1e-6 * max(1.0, largest), name


@pytest.mark.parametrize("kind", KINDS)
def test_the_class_is_kept_by_what_the_base_predicts(kind: str) -> None:
    """Against stock U-Nets: one with the adapter in PEFT's layers, one without any."""
    given = inputs(kind, 4, [100, 700, 100, 700])
    photos, weight = 2, 0.7
    base = BaseModel.from_pipeline(make_pipeline(kind))
    of_class = TextConditions(given["states"][photos:], None if given["pooled"] is None else given["pooled"][photos:])
    batch = Batch(given["latents"], given["noise"], given["timesteps"], ("a",) * 4, given["time_ids"], photos)
    text = TextConditions(given["states"], given["pooled"])
    start = random_adapter(base).modules
    with trainable(base, LoraSpec(rank=4)) as lora:
        with torch.no_grad():
            for key, factors in start.items():
                lora.parameters[f"{key}.down"].copy_(factors.down)
                lora.parameters[f"{key}.up"].copy_(factors.up)
        before = [p.requires_grad for p in base.unet.parameters()]
        config = settled(TrainingConfig(prior_loss_weight=weight), base, photos)
        optimizer, scaler = torch.optim.AdamW([lora.flat.values]), torch.amp.GradScaler("cpu", enabled=False)
        state = LoopState(base, LatentCache((), 1.0, {}), config, lora, optimizer, scaler)  # type: ignore[arg-type]
        loss = backward(state, Inputs(batch, text, of_class))
        assert before == [p.requires_grad for p in base.unet.parameters()]
        gradients = {name: p.grad.clone() for name, p in lora.parameters.items() if p.grad is not None}

    def predicted(pipeline: Any) -> Tensor:
        noisy = DDPMScheduler.from_config(pipeline.scheduler.config).add_noise(
            given["latents"], given["noise"], given["timesteps"]
        )
        extra = {"text_embeds": given["pooled"], "time_ids": given["time_ids"]} if kind == "sdxl" else None
        return pipeline.unet(noisy, given["timesteps"], given["states"], added_cond_kwargs=extra, return_dict=False)[0]

    pipeline = make_pipeline(kind)
    target = predicted(pipeline).detach()
    scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
    if scheduler.config.prediction_type == "epsilon":
        target[:photos] = given["noise"][:photos]
    else:
        target[:photos] = scheduler.get_velocity(given["latents"], given["noise"], given["timesteps"])[:photos]
    unet = pipeline.unet.requires_grad_(False)
    unet.add_adapter(LoraConfig(r=4, lora_alpha=4, target_modules=TARGETS))
    layers = {key: unet.get_submodule(key.removeprefix("unet.")) for key in start}
    with torch.no_grad():
        for key, factors in start.items():
            layers[key].lora_A["default"].weight.copy_(factors.down)
            layers[key].lora_B["default"].weight.copy_(factors.up)
    error = (predicted(pipeline) - target).square().mean(dim=(1, 2, 3))
    wanted = error[:photos].mean() + weight * error[photos:].mean()
    wanted.backward()
    stock = {f"{key}.down": layer.lora_A["default"].weight.grad for key, layer in layers.items()}
    stock |= {f"{key}.up": layer.lora_B["default"].weight.grad for key, layer in layers.items()}
    same((loss, gradients), (wanted.detach(), stock))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_as_diffusers_script(kind: str) -> None:
    given = inputs(kind, 3, [0, 500, 999])
    same(ours(kind, given, 3, prior_loss_weight=1.0), stock(kind, given, None))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_as_diffusers_script_with_prior_preservation(kind: str) -> None:
    given = inputs(kind, 4, [20, 999, 300, 999])
    same(ours(kind, given, 2, prior_loss_weight=0.4), stock(kind, given, 0.4))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_as_diffusers_script_with_min_snr(kind: str) -> None:
    timesteps = [3, 400, 999]
    given = inputs(kind, 3, timesteps)
    same(ours(kind, given, 3, prior_loss_weight=1.0, min_snr_gamma=5.0), stock(kind, given, None, gamma=5.0))


@pytest.mark.parametrize("kind", KINDS)
def test_min_snr_weight_at_every_timestep(kind: str) -> None:
    pipeline = make_pipeline(kind)
    base = BaseModel.from_pipeline(pipeline)
    snr = compute_snr(DDPMScheduler.from_config(pipeline.scheduler.config), torch.arange(1000))
    smaller = torch.minimum(snr, torch.tensor(5.0))
    expected = smaller / (snr if base.prediction_type == "epsilon" else snr + 1)
    weight = min_snr_weight(base.alphas_cumprod, 5.0, base.prediction_type)
    assert weight.shape == (1000,) and weight.isfinite().all()
    assert torch.allclose(weight, expected, rtol=1e-4, atol=1e-6)


def test_min_snr_weight_without_any_signal() -> None:
    nothing = torch.zeros(1)
    assert min_snr_weight(nothing, 5.0, "epsilon").item() == 1.0
    assert min_snr_weight(nothing, 5.0, "v_prediction").item() == 0.0


def test_prior_loss_weight_zero_is_the_photos_alone() -> None:
    given = inputs("sd1", 4, [20, 700, 300, 999])
    alone = {key: value[:2] if isinstance(value, Tensor) else value for key, value in given.items()}
    same(ours("sd1", given, 2, prior_loss_weight=0.0), ours("sd1", alone, 2, prior_loss_weight=1.0))


# --- masks ------------------------------------------------------------------------------------------------------------


def masks(count: int) -> Tensor:
    """(N, 1, 8, 8): soft, and other in each picture."""
    return torch.rand(count, 1, 8, 8, generator=torch.Generator().manual_seed(3)) ** 2


def loss_with(given: dict[str, Any], mask: Tensor | None, **settings: Any) -> LossAndGradients:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    start = random_adapter(base).modules
    drawn = given["latents"], given["noise"], given["timesteps"]
    batch = Batch(*drawn, ("a dog",) * len(given["latents"]), None, 2, weights=mask)
    with trainable(base, LoraSpec(rank=4)) as lora:
        parameters = lora.parameters
        with torch.no_grad():
            for key, factors in start.items():
                parameters[f"{key}.down"].copy_(factors.down)
                parameters[f"{key}.up"].copy_(factors.up)
        text = TextConditions(given["states"])
        loss = dreambooth_loss(base, batch, predict(base, batch, text), prior_loss_weight=0.5, **settings)
        loss.backward()
        return loss.detach(), {name: p.grad for name, p in parameters.items() if p.grad is not None}


def test_a_mask_weighs_the_error() -> None:
    """Against the formula, written out: of each picture the weighted mean, then the means of photos and class images."""
    given, mask = inputs("sd1", 3, [20, 500, 999]), masks(3)
    mask[2] = 1  # a class image
    for floor in (0.0, 0.1, 0.5):
        loss, _ = loss_with(given, error_weights(mask, floor))
        pipeline = make_pipeline("sd1")
        scheduler = DDPMScheduler.from_config(pipeline.scheduler.config)
        noisy = scheduler.add_noise(given["latents"], given["noise"], given["timesteps"])
        base = BaseModel.from_pipeline(pipeline)
        with attached(pipeline, [(random_adapter(base), 1.0)]), torch.no_grad():
            predicted = pipeline.unet(noisy, given["timesteps"], given["states"]).sample
        errors = []
        for i in range(3):
            weight = (floor + (1 - floor) * mask[i]).expand(4, 8, 8)
            errors.append(float((weight * (predicted[i] - given["noise"][i]) ** 2).sum() / weight.sum()))
        assert float(loss) == pytest.approx((errors[0] + errors[1]) / 2 + 0.5 * errors[2], rel=2e-5)


def test_masks_of_ones_are_the_plain_loss_bit_for_bit() -> None:
    given = inputs("sd1", 3, [20, 500, 999])
    plain, ones = loss_with(given, None), loss_with(given, error_weights(torch.ones(3, 1, 8, 8), 0.1))
    assert torch.equal(plain[0], ones[0])
    assert all(torch.equal(plain[1][name], ones[1][name]) for name in plain[1])
    assert not torch.equal(plain[0], loss_with(given, error_weights(masks(3), 0.1))[0])


def test_parts_of_a_masked_batch_add_up() -> None:
    given, mask = inputs("sd1", 3, [20, 500, 999]), masks(3)
    batch = Batch(given["latents"], given["noise"], given["timesteps"], ("a dog",) * 3, None, 2, weights=mask)
    assert torch.equal(torch.cat([batch[slice(0, 1)].weights, batch[slice(1, 3)].weights]), mask)  # type: ignore[list-item]


def test_masks_at_latent_size() -> None:
    left = Image.new("L", (16, 16))
    left.paste(255, (0, 0, 4, 16))
    found = mask_latents([left, None], 8, views=2)
    assert found.shape == (2, 2, 1, 2, 2)
    assert found[0, 0, 0].tolist() == [[0.5, 0.0], [0.5, 0.0]]
    assert found[1, 0, 0].tolist() == [[0.0, 0.5], [0.0, 0.5]]  # mirrored, as the pictures of that view
    assert (found[:, 1] == 1).all()


def test_batches_draw_the_same_with_and_without_masks() -> None:
    mean = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(2, 3, 4, 2, 2)
    mask = torch.arange(6.0).view(2, 3, 1, 1, 1).expand(2, 3, 1, 2, 2) / 6
    prompts = ("a", "b", "c")
    prior = LatentSet(mean, torch.zeros_like(mean), prompts, None)
    plain = LatentCache((Bucket(LatentSet(mean, torch.ones_like(mean), prompts, None), prior),), 1.0, {})
    masked = LatentCache((Bucket(LatentSet(mean, torch.ones_like(mean), prompts, None, mask), prior),), 1.0, {})
    for step in range(6):
        a, b = (draw(cache, seed=3, step=step, batch_size=2) for cache in (plain, masked))
        assert torch.equal(a.latents, b.latents) and a.prompts == b.prompts
        assert torch.equal(a.noise, b.noise) and torch.equal(a.timesteps, b.timesteps)
        assert a.weights is None and b.weights is not None and b.weights.shape == (4, 1, 2, 2)
        assert (b.weights[2:] == 1).all()  # of class images
        for row, prompt in zip(b.weights[:2], b.prompts[:2], strict=True):
            photo = prompts.index(prompt)
            assert float(row[0, 0, 0]) in (float(mask[0, photo, 0, 0, 0]), float(mask[1, photo, 0, 0, 0]))


def test_masks_reach_the_training(tmp_path: Path) -> None:
    for index in range(3):
        values = np.random.default_rng(index).integers(0, 256, (80, 96, 3), dtype=np.uint8)
        Image.fromarray(values).save(tmp_path / f"{index}.png")
    half = Image.new("L", (96, 80))
    half.paste(255, (0, 0, 48, 80))
    half.save(tmp_path / "1.mask.png")
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    config = TrainingConfig(steps=1, class_images=1, resolution=64, flip=True)
    rex = Subject.from_folder(tmp_path, token="sks", class_noun="dog", crop="center")
    (bucket,) = prepare(base, [rex], lora=LoraSpec(rank=2), config=config).buckets
    weights = bucket.photos.weights
    assert weights is not None and weights.shape == (2, 3, 1, 8, 8) and (weights[:, [0, 2]] == 1).all()
    row = weights[0, 1, 0, 0]
    assert row[:4].tolist() == pytest.approx([1 / 0.55] * 4) and row[4:].tolist() == pytest.approx([0.1 / 0.55] * 4)
    assert torch.allclose(weights[1, 1], weights[0, 1].flip(-1))
    assert bucket.class_images is not None and bucket.class_images.weights is not None
    assert torch.allclose(bucket.class_images.weights[1], bucket.class_images.weights[0].flip(-1))  # as the mirrored pictures
    (tmp_path / "1.mask.png").unlink()
    plain = Subject.from_folder(tmp_path, token="sks", class_noun="dog", crop="center")
    assert prepare(base, [plain], lora=LoraSpec(rank=2), config=config).buckets[0].photos.weights is None
