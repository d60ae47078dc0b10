"""Count the memory of each phase of a training on a base without weights."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from typing import Any

import diffusers
import torch
from torch import nn

from .. import __version__
from ..base.base_model import BaseModel, TextConditions
from ..base.quantization import quantized_bytes, storage_bytes, tensors_of
from ..cache import cached, key_of
from ..config import LoraSpec, TrainingConfig
from ..injection import trainable
from ..training.latents import Batch
from ..training.loop import dreambooth_loss
from ..training.training_mode import training_mode
from .meter import Meter, fused_attention, saved_for_backward
from .shapes import plain


@dataclass(frozen=True)
class Count:
    """One forward pass, or one forward and backward pass."""

    peak: int  # bytes at once, beyond those before
    peak_on_cpu: int  # the same, with the copies that convolutions on a CPU use
    saved: int  # bytes that the forward pass saves for the backward pass
    flops: int


@dataclass(frozen=True)
class Weights:
    """Bytes."""

    unet: int
    vae: int
    text_encoders: int
    lora: int  # float32
    widest: int  # the largest linear layer of the U-Net
    packed: int  # the U-Net with its linear layers in 4 bits


KIND = "counts"  # of entries in the cache


class Counter:
    """Counts for a base without weights and an adapter, each cached on disk."""

    def __init__(self, base: BaseModel, lora: LoraSpec) -> None:
        self.base, self.lora = base, lora
        configs = {name: plain(module.config) for name, module in {"vae": base.shell.vae, **base.structure}.items()}
        facts = [torch.__version__, diffusers.__version__, __version__, str(base.dtype), asdict(lora), configs]
        facts.append(plain(base.scheduler.config))
        self._about = json.dumps(facts, sort_keys=True, default=str)

    def step(self, config: TrainingConfig, *, pictures: int, resolution: int) -> Count:
        """Forward and backward pass over `pictures` of a batch; beyond two, extrapolated linearly."""
        if pictures > 2:
            one, two = (asdict(self.step(config, pictures=few, resolution=resolution)) for few in (1, 2))
            return Count(**{name: one[name] + (two[name] - one[name]) * (pictures - 1) for name in one})
        kernel = counted_attention(config)
        about = ["step", config.gradient_checkpointing, config.lean, config.min_snr_gamma, kernel, pictures, resolution]
        return self._counted(about, lambda: count_step(self.base, self.lora, config, pictures, resolution))

    def encode(self, *, pictures: int, resolution: int) -> Count:
        """Photos through the VAE's encoder."""
        size = (pictures, 3, resolution, resolution)
        return self._counted(
            ["encode", pictures, resolution], lambda: count(lambda: self.base.encode_images(torch.empty(size, device="meta")))
        )

    def sample(self, *, pictures: int, resolution: int) -> Count:
        """One denoising step with classifier-free guidance."""
        return self._counted(
            ["sample", pictures, resolution, "unet"], lambda: count(lambda: self._denoise(2 * pictures, resolution))
        )

    def decode(self, *, pictures: int, resolution: int) -> Count:
        """Latents through the VAE's decoder."""
        return self._counted(["decode", pictures, resolution], lambda: count(lambda: self._decode(pictures, resolution)))

    def _denoise(self, rows: int, resolution: int) -> Any:
        latents, text, time_ids = inputs(self.base, rows, resolution)
        extra = None if time_ids is None else {"text_embeds": text.pooled, "time_ids": time_ids}
        times = torch.zeros(rows, dtype=torch.long, device="meta")
        return self.base.unet(latents.to(self.base.dtype), times, text.states, added_cond_kwargs=extra).sample

    def _decode(self, rows: int, resolution: int) -> Any:
        latents, _, _ = inputs(self.base, rows, resolution)
        with self.base.upcast_vae() as vae:
            return vae.decode(latents.to(vae.dtype)).sample

    @cached_property
    def weights(self) -> Weights:
        return count_weights(self.base, self.lora)

    def _counted(self, about: list[Any], work: Callable[[], Count]) -> Count:
        key = key_of(of="count", base=self._about, about=about)
        found = cached(KIND, key, lambda: {name: torch.tensor(value) for name, value in asdict(work()).items()})
        return Count(**{name: int(value) for name, value in found.items()})


def counted_attention(config: TrainingConfig) -> str:
    """Kernels without a matrix of all scores save the same, so they count as one. "auto" must be settled first."""
    return "plain" if config.attention == "plain" else "sdpa"


def count(work: Callable[[], Any]) -> Count:
    """Count a computation without gradients."""
    with torch.no_grad(), fused_attention(), Meter() as meter:
        work()
    return Count(meter.peak, meter.peak_on_cpu, 0, meter.flops)


def count_weights(base: BaseModel, lora: LoraSpec) -> Weights:
    with trainable(base, lora) as adapter:
        factors = storage_bytes(adapter.parameters.values())
    unet, vae = (storage_bytes(tensors_of(module)) for module in (base.unet, base.vae))
    text = sum(storage_bytes(tensors_of(module)) for module in base.text_encoders.values())
    linear = [module.weight.nbytes for module in base.unet.modules() if type(module) is nn.Linear]
    return Weights(unet, vae, text, factors, max(linear), quantized_bytes(base.unet))


def inputs(base: BaseModel, rows: int, resolution: int) -> tuple[torch.Tensor, TextConditions, torch.Tensor | None]:
    """Latents (N, C, H/f, W/f) float32, text conditions and time_ids (N, 6), all zeros, on the base's device."""
    side, unet, device = resolution // base.pixels_per_latent, base.unet.config, base.device
    latents = torch.zeros(rows, unet.in_channels, side, side, device=device)
    tokens = base.tokenizer.model_max_length
    states = torch.zeros(rows, tokens, unet.cross_attention_dim, dtype=base.dtype, device=device)
    if not base.family.time_ids:
        return latents, TextConditions(states), None
    width = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    pooled = torch.zeros(rows, width, dtype=base.dtype, device=device)
    return latents, TextConditions(states, pooled), torch.zeros(rows, 6, device=device)


def count_step(base: BaseModel, lora: LoraSpec, config: TrainingConfig, pictures: int, resolution: int) -> Count:
    """One forward and backward pass as in training, on any device; the gradients exist before."""
    config = replace(config, attention=counted_attention(config), compile=False)  # type: ignore[arg-type]
    with trainable(base, lora) as adapter, training_mode(base, adapter, config):
        latents, text, time_ids = inputs(base, pictures, resolution)
        times = torch.zeros(pictures, dtype=torch.long, device=base.device)
        _ = base.alphas_cumprod  # made once per base, so not counted
        with fused_attention(), Meter() as meter:
            with saved_for_backward(*base.structure.values()) as saved:
                adapter.flat.refresh()
                batch = Batch(latents, torch.zeros_like(latents), times, ("",) * pictures, time_ids, photos=pictures)
                if lora.text_encoder:
                    text = base.encode_text(batch.prompts)
                loss = dreambooth_loss(base, batch, text, prior_loss_weight=1.0, min_snr_gamma=config.min_snr_gamma)
                for_backward = saved()
            torch.autograd.backward(loss)
        return Count(meter.peak, meter.peak_on_cpu, for_backward, meter.flops)
