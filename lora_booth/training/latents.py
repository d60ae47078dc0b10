"""LatentCache: everything the training loop reads, encoded once; and the batch of every step, drawn from (seed, step)."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..base.base_model import BaseModel, TextConditions
from ..photos.square import Crop
from .encoding_cache import TextCache, VaeCache


@dataclass(frozen=True)
class LatentSet:
    """N pictures with their prompts. V = 2 with mirrored pictures, else 1."""

    mean: Tensor  # (V, N, C, H/f, W/f) float32, of the VAE's posterior, unscaled
    std: Tensor  # the same
    prompts: tuple[str, ...]  # N
    time_ids: Tensor | None  # (N, 6), SDXL
    masks: Tensor | None = None  # (V, N, 1, H/f, W/f) float32 in 0..1, 1 the subject; None: nobody has one

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class LatentCache:
    """Photos and class images as latents, and each different prompt as text conditions."""

    photos: LatentSet
    class_images: LatentSet | None
    scaling_factor: float
    text: dict[str, TextConditions]  # prompt -> one row; empty when the text encoders are trained too


@dataclass(frozen=True)
class Batch:
    """Inputs of one forward pass: photos first, then class images."""

    latents: Tensor  # (N, C, H/f, W/f) float32, scaled
    prompts: tuple[str, ...]
    time_ids: Tensor | None  # (N, 6)
    photos: int  # how many of the N are photos
    whole: tuple[int, int] | None = None  # photos and class images of the batch that this is a part of; None: it is all
    masks: Tensor | None = None  # (N, 1, H/f, W/f) float32 in 0..1, 1 the subject, and 1 all over without a mask

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, part: slice) -> Batch:
        """Some of the rows."""
        photos = sum(row < self.photos for row in range(*part.indices(len(self))))
        ids = None if self.time_ids is None else self.time_ids[part]
        masks = None if self.masks is None else self.masks[part]
        return Batch(self.latents[part], self.prompts[part], ids, photos, self.of, masks)

    @property
    def of(self) -> tuple[int, int]:
        """Photos and class images of the whole batch."""
        return self.whole or (self.photos, len(self) - self.photos)


def encode(
    base: BaseModel,
    images: Sequence[Image.Image],
    crops: Sequence[Crop],
    prompts: Sequence[str],
    *,
    flip: bool,
    masks: Sequence[Image.Image | None] = (),
    on_picture: Callable[[int], None] = lambda done: None,
) -> LatentSet:
    """Pictures of one size -> LatentSet on the base's device. What the cache on disk has is not computed again.

    masks       greys of the same size, one for each picture; None for a picture that counts all over
    on_picture  told how many are done, after each
    """
    kept = VaeCache(base)
    views: list[tuple[Tensor, Tensor]] = []
    for mirrored in (False, True)[: 2 if flip else 1]:
        encoded = []
        for image in images:
            encoded.append(kept.encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image))
            on_picture(len(views) * len(images) + len(encoded))
        views.append((torch.cat([mean for mean, _ in encoded]), torch.cat([std for _, std in encoded])))
    ids = [base.time_ids(crop.original_size, (crop.top, crop.left), images[0].width) for crop in crops]
    return LatentSet(
        mean=torch.stack([mean for mean, _ in views]).to(base.device),
        std=torch.stack([std for _, std in views]).to(base.device),
        prompts=tuple(prompts),
        time_ids=torch.stack([row for row in ids if row is not None]) if base.family.time_ids else None,
        masks=mask_latents(masks, base.pixels_per_latent, views=len(views)).to(base.device) if any(masks) else None,
    )


def mask_latents(masks: Sequence[Image.Image | None], factor: int, *, views: int) -> Tensor:
    """N masks of H x W pixels -> (V, N, 1, H/f, W/f) float32 in 0..1: each latent gets the mean of its f x f pixels."""
    size = next(mask.size for mask in masks if mask is not None)
    greys = [np.full(size[::-1], 255, np.uint8) if mask is None else np.asarray(mask) for mask in masks]
    pixels = torch.from_numpy(np.stack(greys))[:, None].float() / 255  # (N, 1, H, W)
    means = torch.nn.functional.avg_pool2d(pixels, factor)
    return torch.stack([means, means.flip(-1)][:views])


@torch.no_grad()
def encode_prompts(base: BaseModel, prompts: Sequence[str]) -> dict[str, TextConditions]:
    """Every different prompt, alone. What the cache on disk has is not computed again."""
    kept = TextCache(base)
    return {prompt: kept.encode(prompt) for prompt in dict.fromkeys(prompts)}


def conditions(base: BaseModel, cache: LatentCache, prompts: Sequence[str]) -> TextConditions:
    """Text conditions of a batch: cached rows, or encoded now when the text encoders are being trained."""
    if not cache.text:
        return base.encode_text(prompts)
    rows = [cache.text[prompt] for prompt in prompts]
    pooled = [row.pooled for row in rows if row.pooled is not None]
    return TextConditions(torch.cat([row.states for row in rows]), torch.cat(pooled) if pooled else None)


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """A generator for this step alone: what is drawn does not depend on the steps before, so resuming is exact."""
    return torch.Generator(device).manual_seed(step_seed(seed, step))


def step_seed(seed: int, step: int) -> int:
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


def draw(cache: LatentCache, *, seed: int, step: int, batch_size: int) -> tuple[Batch, Tensor, Tensor]:
    """The batch of forward pass `step`, its noise (like latents) and its timesteps (N,) int64.

    Every photo comes once before any comes twice. The VAE's posterior is sampled anew each time.
    """
    device = cache.photos.mean.device
    generator = step_generator(seed, step, device)
    parts = [(cache.photos, rows(len(cache.photos), seed, step, batch_size))]
    if cache.class_images is not None:
        parts.append((cache.class_images, rows(len(cache.class_images), seed + 1, step, batch_size)))
    latents, prompts, ids, masks = [], [], [], []
    for items, index in parts:
        view = torch.randint(items.mean.shape[0], (len(index),), generator=generator, device=device)
        where = numbers_on(device, index)
        mean, std = items.mean[view, where], items.std[view, where]
        sample = torch.randn(mean.shape, generator=generator, device=device)
        latents.append((mean + std * sample) * cache.scaling_factor)
        prompts += [items.prompts[i] for i in index]
        if items.time_ids is not None:
            ids.append(items.time_ids[where])
        if cache.photos.masks is not None:
            plain = torch.ones_like(mean[:, :1])
            masks.append(plain if items.masks is None else items.masks[view, where])
    stacked = torch.cat(latents)
    noise = torch.randn(stacked.shape, generator=generator, device=device)
    timesteps = torch.randint(1000, (len(stacked),), generator=generator, device=device)
    batch = Batch(
        stacked,
        tuple(prompts),
        torch.cat(ids) if ids else None,
        photos=len(parts[0][1]),
        masks=torch.cat(masks) if masks else None,
    )
    return batch, noise, timesteps


def numbers_on(device: torch.device, values: Sequence[int]) -> Tensor:
    """(n,) int64. To a GPU from pinned memory: any other copy makes the host wait until all work before it is done."""
    numbers = torch.tensor(values)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def rows(count: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Indices of this step: a new order for every pass through the pictures."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        order = torch.randperm(count, generator=step_generator(seed, -1 - epoch, torch.device("cpu")))
        chosen.append(int(order[place]))
    return chosen
