"""The DreamBooth loss (arXiv 2208.12242, eq. 2) for every prediction type."""

from __future__ import annotations

import torch
from torch import Tensor

from ..base.base_model import BaseModel, TextConditions
from .latents import Batch

# of the error where a mask is black: chosen; at 0 the adapter is free to draw anything behind the subject
BACKGROUND_WEIGHT = 0.1


def dreambooth_loss(
    base: BaseModel,
    batch: Batch,
    text: TextConditions,
    *,
    prior_loss_weight: float,
    min_snr_gamma: float | None = None,
    background_weight: float = BACKGROUND_WEIGHT,
) -> Tensor:
    """Mean squared error of the prediction on the photos, plus the weighted one on the class images, in one forward pass.

    batch.latents  (N, C, H/f, W/f)  times the scaling_factor; H, W in pixels, f pixels a latent; photos before class images
    text.states    (N, tokens, d)    d = cross_attention_dim; SDXL adds text.pooled (N, p) and batch.time_ids (N, 6)
    batch.masks    (N, 1, H/f, W/f)  1 where the error counts fully, 0 where it counts `background_weight`; None: 1 everywhere
    batch.totals   photos and class images of the full batch: the losses of its parts sum to that of the batch
    returns        () float32
    """
    alphas = base.alphas_cumprod[batch.timesteps]
    signal, spread = (a.view(-1, 1, 1, 1) for a in (alphas.sqrt(), (1 - alphas).sqrt()))
    noisy = signal * batch.latents + spread * batch.noise
    extra = None if batch.time_ids is None else {"text_embeds": text.pooled, "time_ids": batch.time_ids}
    predicted = base.unet(noisy.to(base.dtype), batch.timesteps, text.states.to(base.dtype), added_cond_kwargs=extra).sample
    if base.prediction_type == "v_prediction":
        target = signal * batch.noise - spread * batch.latents
    else:
        target = batch.noise
    squared = (predicted.float() - target).square()
    if batch.masks is not None:
        squared = squared * mask_weight(batch.masks, background_weight)
    error = squared.mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        error = error * min_snr_weight(alphas, min_snr_gamma, base.prediction_type)
    photos, class_images = batch.totals
    loss = error[: batch.photos].sum() / photos
    if class_images:
        loss = loss + prior_loss_weight * error[batch.photos :].sum() / class_images
    return loss


def mask_weight(masks: Tensor, background_weight: float) -> Tensor:
    """Weights with mean 1 in each picture, so that a small subject counts as much as a large one. (N, 1, h, w) -> the same.

    A mask of ones gives exactly 1: the plain loss, bit for bit.
    """
    weight = background_weight + (1 - background_weight) * masks
    return weight / weight.mean(dim=(1, 2, 3), keepdim=True)


def min_snr_weight(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon and / (SNR + 1) for velocity (arXiv 2303.09556, sec. 3.4). (N,) -> (N,).

    At zero terminal SNR the epsilon weight is its limit, 1.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))
