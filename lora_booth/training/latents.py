"""LatentCache: all that the training loop reads; and the batch of every step, drawn from (seed, step)."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from ..base.base_model import BaseModel, TextConditions
from ..base.families import TIMESTEPS


@dataclass(frozen=True)
class LatentSet:
    """N pictures of one size with their prompts. V = 2 with mirrored pictures, else 1."""

    mean: Tensor  # (V, N, C, H/f, W/f) float32, of the VAE's posterior, unscaled
    std: Tensor  # the same
    prompts: tuple[str, ...]  # N
    time_ids: Tensor | None  # (N, 6), SDXL
    weights: Tensor | None = None  # of the error, (V, N, 1, H/f, W/f) float32, with mean 1 in each picture; None: 1 everywhere
    class_prompts: tuple[str, ...] = ()  # N, by which the base's predictions keep the class; () if the pictures themselves do

    def __len__(self) -> int:
        return len(self.prompts)


@dataclass(frozen=True)
class Bucket:
    """The photos of one size, and what keeps the class in pictures of that size.

    Where the base's predictions keep it, photos have class prompts, and a batch has the class images or the photos again.
    """

    photos: LatentSet
    class_images: LatentSet | None = None


@dataclass(frozen=True)
class LatentCache:
    """Photos and class images as latents, and each distinct prompt as text conditions."""

    buckets: tuple[Bucket, ...]  # one for each size; a single one of squares
    scaling_factor: float
    text: dict[str, TextConditions]  # prompt -> one row; empty when the text encoders are trained too
    class_text: dict[str, TextConditions] = field(default_factory=dict)  # of class prompts, by the base's own text encoders

    @property
    def photos(self) -> int:
        return sum(len(bucket.photos) for bucket in self.buckets)

    @property
    def rows_per_photo(self) -> int:
        """Of a batch: each photo, and a class image or the photo again by its class prompt."""
        first = self.buckets[0]
        return 1 if first.class_images is None and not first.photos.class_prompts else 2


@dataclass(frozen=True)
class Batch:
    """What is drawn for one forward pass: photos, then the class: its images, or the same noisy photos by its prompt."""

    latents: Tensor  # (N, C, H/f, W/f) float32, scaled
    noise: Tensor  # like latents, standard normal
    timesteps: Tensor  # (N,) int64, in [0, 1000)
    prompts: tuple[str, ...]
    time_ids: Tensor | None  # (N, 6)
    photos: int  # how many of the N are photos
    part_of: tuple[int, int] | None = None  # photos and rows of the class of the full batch; None: this is the full batch
    weights: Tensor | None = None  # of the error, (N, 1, H/f, W/f) float32; None: 1 everywhere
    class_prompts: tuple[str, ...] = ()  # of the class's rows, by which the base predicts their target; () if that is the noise

    def __len__(self) -> int:
        return len(self.latents)

    def __getitem__(self, part: slice) -> Batch:
        """Some of the rows."""
        rows = range(*part.indices(len(self)))
        photos = sum(row < self.photos for row in rows)
        ids = None if self.time_ids is None else self.time_ids[part]
        weights = None if self.weights is None else self.weights[part]
        class_prompts = tuple(self.class_prompts[row - self.photos] for row in rows[photos:] if self.class_prompts)
        drawn = self.latents[part], self.noise[part], self.timesteps[part], self.prompts[part]
        return Batch(*drawn, ids, photos, self.totals, weights, class_prompts)

    @property
    def totals(self) -> tuple[int, int]:
        """Photos and rows of the class of the full batch."""
        return self.part_of or (self.photos, len(self) - self.photos)


@dataclass(frozen=True)
class Inputs:
    """All that one forward pass reads, on the device."""

    batch: Batch
    text: TextConditions
    class_text: TextConditions | None = None  # of the class's rows, as the base reads them; None: it has images, or no rows


def joined(inputs: Sequence[Inputs]) -> Inputs:
    """The rows of all, in order, to predict in one forward pass; of a single one, itself. All have the same layout."""
    if len(inputs) == 1:
        return inputs[0]
    batches = [one.batch for one in inputs]
    names = ("latents", "noise", "timesteps")
    latents, noise, timesteps = (torch.cat([getattr(batch, name) for batch in batches]) for name in names)
    prompts = tuple(prompt for batch in batches for prompt in batch.prompts)
    ids = [batch.time_ids for batch in batches if batch.time_ids is not None]
    photos = sum(batch.photos for batch in batches)
    batch = Batch(latents, noise, timesteps, prompts, torch.cat(ids) if ids else None, photos)
    of_class = [one.class_text for one in inputs if one.class_text is not None]
    return Inputs(batch, rows_of([one.text for one in inputs]), rows_of(of_class) if of_class else None)


def rows_of(texts: Sequence[TextConditions]) -> TextConditions:
    """The rows of all, in order."""
    pooled = [text.pooled for text in texts if text.pooled is not None]
    return TextConditions(torch.cat([text.states for text in texts]), torch.cat(pooled) if pooled else None)


def conditions(base: BaseModel, text: Mapping[str, TextConditions], prompts: Sequence[str]) -> TextConditions:
    """Text conditions of a batch: cached rows of `text`, or encoded now if it is empty."""
    if not text:
        return base.encode_text(prompts)
    return rows_of([text[prompt] for prompt in prompts])


def step_generator(seed: int, step: int, device: torch.device) -> torch.Generator:
    """A generator for this step alone: no draw depends on the steps before it, so resuming is exact."""
    return torch.Generator(device).manual_seed(step_seed(seed, step))


def step_seed(seed: int, step: int) -> int:
    """Neighbouring seeds and steps give unrelated generators; the multipliers are those of SplitMix64 (Steele et al., 2014)."""
    return (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + 0x94D049BB133111EB) % 2**63


def draw(cache: LatentCache, *, seed: int, step: int, batch_size: int) -> Batch:
    """The batch of forward pass `step`, of pictures of one size.

    Every photo of that size is drawn once before any is drawn twice. The VAE's posterior is sampled again each time. Where
    the base's predictions keep the class, its rows are by turns the noisy photos again, at the same timesteps, and the images.
    """
    number, earlier = turn(tuple(len(bucket.photos) for bucket in cache.buckets), seed, step)
    bucket = cache.buckets[number]
    device = bucket.photos.mean.device
    generator = step_generator(seed, step, device)
    predicted = bool(bucket.photos.class_prompts)
    parts = [(bucket.photos, rows(len(bucket.photos), seed, earlier, batch_size))]
    if bucket.class_images is not None and (earlier % 2 or not predicted):
        passes = earlier // 2 if predicted else earlier
        parts.append((bucket.class_images, rows(len(bucket.class_images), seed + 1, passes, batch_size)))
    weighted = any(items is not None and items.weights is not None for items in (bucket.photos, bucket.class_images))
    latents, prompts, ids, weights = [], [], [], []
    for items, index in parts:
        view = torch.randint(items.mean.shape[0], (len(index),), generator=generator, device=device)
        where = numbers_on(device, index)
        mean, std = items.mean[view, where], items.std[view, where]
        sample = torch.randn(mean.shape, generator=generator, device=device)
        latents.append((mean + std * sample) * cache.scaling_factor)
        prompts += [items.prompts[i] for i in index]
        if items.time_ids is not None:
            ids.append(items.time_ids[where])
        if weighted:
            plain = torch.ones_like(mean[:, :1])
            weights.append(plain if items.weights is None else items.weights[view, where])
    stacked = torch.cat(latents)
    noise = torch.randn(stacked.shape, generator=generator, device=device)
    timesteps = torch.randint(TIMESTEPS, (len(stacked),), generator=generator, device=device)
    class_prompts = [items.class_prompts[i] for items, index in parts[-1:] for i in index] if predicted else []
    if predicted and len(parts) == 1:  # the photos again
        stacked, noise, timesteps = (torch.cat([drawn, drawn]) for drawn in (stacked, noise, timesteps))
        prompts += class_prompts
        ids, weights = 2 * ids, [*weights, *map(torch.ones_like, weights)]
    return Batch(
        stacked,
        noise,
        timesteps,
        tuple(prompts),
        torch.cat(ids) if ids else None,
        photos=len(parts[0][1]),
        weights=torch.cat(weights) if weights else None,
        class_prompts=tuple(class_prompts),
    )


def numbers_on(device: torch.device, values: Sequence[int]) -> Tensor:
    """(n,) int64. To a GPU from pinned memory: any other copy makes the host wait for all earlier work."""
    numbers = torch.tensor(values)
    return numbers.pin_memory().to(device, non_blocking=True) if device.type == "cuda" else numbers.to(device)


def turn(photos: tuple[int, ...], seed: int, step: int) -> tuple[int, int]:
    """The number of the bucket that this step draws from, and how many earlier steps did. photos: in each bucket

    In as many steps as there are photos, each bucket has a turn for each of its photos: all are drawn equally often.
    """
    buckets = [number for number, count in enumerate(photos) for _ in range(count)]
    passes, place = divmod(step, len(buckets))
    order = torch.randperm(len(buckets), generator=step_generator(seed + 2, -1 - passes, torch.device("cpu"))).tolist()
    turns = [buckets[i] for i in order]
    return turns[place], passes * photos[turns[place]] + turns[:place].count(turns[place])


def rows(count: int, seed: int, step: int, batch_size: int) -> list[int]:
    """Indices of the batch that `step` batches of these pictures precede: a new order for every pass through them."""
    chosen = []
    for position in range(step * batch_size, (step + 1) * batch_size):
        epoch, place = divmod(position, count)
        order = torch.randperm(count, generator=step_generator(seed, -1 - epoch, torch.device("cpu")))
        chosen.append(int(order[place]))
    return chosen
