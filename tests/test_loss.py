"""The loss and its gradients against an independent computation with stock diffusers and PEFT, as the peer's script does it."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import DDPMScheduler
from diffusers.training_utils import compute_snr
from peft import LoraConfig
from pipelines import KINDS, make_pipeline, random_adapter
from torch import Tensor

from lora_booth.base_model import BaseModel, TextConditions
from lora_booth.config import LoraSpec
from lora_booth.injection import trainable
from lora_booth.latents import Batch
from lora_booth.loss import dreambooth_loss, min_snr_weight

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
    batch = Batch(given["latents"], ("a dog",) * len(given["latents"]), given["time_ids"], photos)
    with trainable(base, LoraSpec(rank=4)) as lora:
        parameters = lora.named_parameters()
        with torch.no_grad():
            for key, factors in start.items():
                parameters[f"{key}.down"].copy_(factors.down)
                parameters[f"{key}.up"].copy_(factors.up)
        text = TextConditions(given["states"], given["pooled"])
        loss = dreambooth_loss(base, batch, text, given["noise"], given["timesteps"], **settings)
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
def test_as_the_peer(kind: str) -> None:
    given = inputs(kind, 3, [0, 500, 999])
    same(ours(kind, given, 3, prior_loss_weight=1.0), stock(kind, given, None))


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_peer_with_prior_preservation(kind: str) -> None:
    given = inputs(kind, 4, [20, 999, 300, 999])
    same(ours(kind, given, 2, prior_loss_weight=0.4), stock(kind, given, 0.4))


@pytest.mark.parametrize("kind", KINDS)
def test_as_the_peer_with_min_snr(kind: str) -> None:
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
