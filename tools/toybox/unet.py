"""The main stage: text encoder and U-Net together, text -> latents."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import pictures
from .pictures import SIZE
from .stages import Stage, run_stage
from .text import TEXT_WIDTH, token_ids, training_caption
from .vae import encode_renders, scaling_factor

UNET_STAGE = Stage("unet", steps=9000, batch=32, rate=1e-3, ema=0.9985)
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PREDICTION = "v_prediction"


def new_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=6,
        out_channels=6,
        block_out_channels=(64, 128, 128),
        down_block_types=("CrossAttnDownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "CrossAttnUpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=TEXT_WIDTH,
        attention_head_dim=4,  # heads, as in SD 1.x
        norm_num_groups=16,
    )


class TextToImage(nn.Module):
    """Text encoder and U-Net, trained together."""

    def __init__(self, text_encoder: Any, unet: Any) -> None:
        super().__init__()
        self.text_encoder, self.unet = text_encoder, unet

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor) -> Tensor:
        return self.unet(latents, timesteps, self.text_encoder(ids).last_hidden_state).sample


def train_text_to_image(
    vae: Any, text_encoder: Any, tokenizer: Any, work: Path, device: torch.device, log: dict[str, Any]
) -> tuple[Any, float]:
    """TextToImage (text encoder and U-Net), and the VAE's scaling factor."""
    from diffusers.models.attention_processor import AttnProcessor

    plain, named = (encode_renders(vae, work, device, renders) for renders in (pictures.PLAIN, pictures.NAMED))
    mean, std = (torch.cat(parts) for parts in zip(plain, named, strict=True))
    factor = scaling_factor(mean, std)
    scenes = pictures.PLAIN.scenes() + pictures.NAMED.scenes()
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)

    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(scenes), (UNET_STAGE.batch,), generator=generator)
        rng = random.Random(step)
        ids = token_ids(tokenizer, [training_caption(scenes[i], rng) for i in index.tolist()])
        noise = torch.randn((2, *mean[index].shape), generator=generator)
        latents = factor * (mean[index].float() + std[index].float() * noise[0])
        t = torch.randint(1000, (len(index),), generator=generator)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        noisy, velocity = a * latents + s * noise[1], a * noise[1] - s * latents
        snr = alphas[t] / (1 - alphas[t])
        weight = snr.clamp(max=5) / (snr + 1)  # min-SNR for v-prediction (arXiv 2303.09556)
        with torch.autocast(device.type, torch.bfloat16):
            prediction = model(noisy.to(device, memory_format=torch.channels_last), t.to(device), ids.to(device))
        error = (prediction.float() - velocity.to(device)).square().mean((1, 2, 3))
        return (error * weight.to(device)).mean()

    model: Any = TextToImage(text_encoder, new_unet()).to(device)
    model.unet.to(memory_format=torch.channels_last)
    if device.type == "cpu":  # the fused attention's backward pass took a third of the step on a CPU
        model.unet.set_attn_processor(AttnProcessor())
    return run_stage(UNET_STAGE, model, loss_of, work, log), factor
