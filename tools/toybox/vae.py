"""The first stage: AutoencoderKL, pictures <-> latents."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from . import pictures
from .pictures import SIZE, Renders, to_tensor
from .stages import Stage, run_stage, save

VAE_STAGE = Stage("vae", steps=12_000, batch=4, rate=2e-3)  # larger batches learn less in the same time


def new_vae() -> Any:
    from diffusers import AutoencoderKL

    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        block_out_channels=(24, 48, 72),
        layers_per_block=1,
        latent_channels=8,
        norm_num_groups=8,
        sample_size=SIZE,
        mid_block_add_attention=False,
    )


def vae_loss(vae: Any, x: Tensor, generator: torch.Generator) -> Tensor:
    """L1 + 0.5 x L1 of the image gradients + 1e-3 x KL."""
    with torch.autocast(x.device.type, torch.bfloat16):
        posterior = vae.encode(x).latent_dist
        noise = torch.randn(posterior.mean.shape, generator=generator).to(x)
        y = vae.decode(posterior.mean + posterior.std * noise).sample
    y = y.float()
    d = y - x
    edges = (d[..., 1:] - d[..., :-1]).abs().mean() + (d[..., 1:, :] - d[..., :-1, :]).abs().mean()
    mean, logvar = posterior.mean.float(), posterior.logvar.float()
    kl = 0.5 * (mean**2 + logvar.exp() - 1 - logvar).mean()
    return d.abs().mean() + 0.5 * edges + 1e-3 * kl


def train_vae(work: Path, device: torch.device, log: dict[str, Any]) -> nn.Module:
    drawn, held_out = pictures.PLAIN.pictures(work), pictures.HELD_OUT.pictures(work)

    def loss_of(vae: Any, step: int, generator: torch.Generator) -> Tensor:
        x = to_tensor(drawn[torch.randint(len(drawn), (VAE_STAGE.batch,), generator=generator).sort().values.numpy()])
        return vae_loss(vae, x.to(device, memory_format=torch.channels_last), generator)

    def evaluate(vae: Any) -> dict[str, float]:
        with torch.no_grad():
            x = to_tensor(held_out).to(device)
            errors = [
                (vae.decode(vae.encode(b).latent_dist.mean).sample.clamp(-1, 1) - b).abs().mean() for b in torch.split(x, 50)
            ]
        return {"mean_absolute_error": torch.stack(errors).mean().item()}

    vae = new_vae().to(device, memory_format=torch.channels_last)
    return run_stage(VAE_STAGE, vae, loss_of, work, log, evaluate=evaluate)


@torch.no_grad()
def encode_renders(vae: Any, work: Path, device: torch.device, renders: Renders) -> tuple[Tensor, Tensor]:
    """Mean and standard deviation of every render's latents: two (count, 8, 16, 16) float16 tensors."""
    path = work / f"latents_{renders.name}.pt"
    if not path.exists():
        drawn, means, deviations = renders.pictures(work), [], []
        for first in range(0, renders.count, 100):
            x = to_tensor(drawn[first : first + 100]).to(device, memory_format=torch.channels_last)
            with torch.autocast(device.type, torch.bfloat16):
                posterior = vae.encode(x).latent_dist
            means.append(posterior.mean.half().cpu())
            deviations.append(posterior.std.half().cpu())
        save({"mean": torch.cat(means), "std": torch.cat(deviations)}, path)
    state = torch.load(path, weights_only=True)
    return state["mean"], state["std"]


def scaling_factor(mean: Tensor, std: Tensor) -> float:
    """1 / standard deviation of sampled latents, so that the U-Net sees unit variance."""
    return round(1 / (mean.float().var() + std.float().square().mean()).sqrt().item(), 5)
