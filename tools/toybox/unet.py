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
from .text import NOTHING_STATED, TEXT_WIDTH, TextReader, reading_loss, stated, token_ids, training_wording
from .vae import encode_renders, scaling_factor

UNET_STAGE = Stage("unet", steps=9500, batch=32, rate=1e-3, ema=0.9985)
SCHEDULE: dict[str, Any] = {
    "num_train_timesteps": 1000,
    "beta_start": 0.00085,
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
}
PREDICTION = "v_prediction"
NO_PROMPT_SHARE = 0.1  # for classifier-free guidance
HIDDEN_WEIGHT = 0.5  # of the error in nothing but noise; min-SNR alone has .005 there
READING_WEIGHT = 0.1  # without it the text encoder forgets what it has learnt to tell apart


def new_unet() -> Any:
    from diffusers import UNet2DConditionModel

    return UNet2DConditionModel(
        sample_size=SIZE // 4,
        in_channels=8,
        out_channels=8,
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

    def __init__(self, reader: TextReader, unet: Any) -> None:
        super().__init__()
        self.reader, self.unet = reader, unet

    def forward(self, latents: Tensor, timesteps: Tensor, ids: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction, and the loss of reading the captions."""
        states, answers = self.reader(ids, targets)
        return self.unet(latents, timesteps, states).sample, reading_loss(answers)


def train_text_to_image(
    vae: Any, reader: TextReader, tokenizer: Any, work: Path, device: torch.device, log: dict[str, Any]
) -> tuple[Any, float]:
    """TextToImage, and the VAE's scaling factor."""
    from diffusers.models.attention_processor import AttnProcessor

    plain, named = (encode_renders(vae, work, device, renders) for renders in (pictures.PLAIN, pictures.NAMED))
    mean, std = (torch.cat(parts) for parts in zip(plain, named, strict=True))
    factor = scaling_factor(mean, std)
    scenes = pictures.PLAIN.scenes() + pictures.NAMED.scenes()
    betas = torch.linspace(SCHEDULE["beta_start"] ** 0.5, SCHEDULE["beta_end"] ** 0.5, 1000) ** 2
    alphas = torch.cumprod(1 - betas, 0)

    def loss_of(model: nn.Module, step: int, generator: torch.Generator) -> Tensor:
        index = torch.randint(len(scenes), (UNET_STAGE.batch,), generator=generator)
        rng, prompts, targets = random.Random(step), [], []
        for i in index.tolist():
            wording, told = training_wording(scenes[i], rng), rng.random() >= NO_PROMPT_SHARE
            prompts.append(wording.caption(scenes[i]) if told else "")
            targets.append(stated(scenes[i], wording) if told else NOTHING_STATED)
        ids, answers = token_ids(tokenizer, prompts).to(device), torch.tensor(targets, device=device)
        noise = torch.randn((2, *mean[index].shape), generator=generator)
        latents = factor * (mean[index].float() + std[index].float() * noise[0])
        t = torch.randint(1000, (len(index),), generator=generator)
        a, s = alphas[t].sqrt().view(-1, 1, 1, 1), (1 - alphas[t]).sqrt().view(-1, 1, 1, 1)
        noisy, velocity = a * latents + s * noise[1], a * noise[1] - s * latents
        snr = alphas[t] / (1 - alphas[t])
        # min-SNR for v-prediction (arXiv 2303.09556), and more where noise hides all: there the prompt decides on the look
        weight = (snr + HIDDEN_WEIGHT).clamp(max=5) / (snr + 1)
        with torch.autocast(device.type, torch.bfloat16):
            prediction, reading = model(noisy.to(device, memory_format=torch.channels_last), t.to(device), ids, answers)
        error = (prediction.float() - velocity.to(device)).square().mean((1, 2, 3))
        return (error * weight.to(device)).mean() + READING_WEIGHT * reading

    model: Any = TextToImage(reader, new_unet()).to(device)
    model.unet.to(memory_format=torch.channels_last)
    if device.type == "cpu":  # the fused attention's backward pass took a third of the step on a CPU
        model.unet.set_attn_processor(AttnProcessor())
    return run_stage(UNET_STAGE, model, loss_of, work, log), factor
