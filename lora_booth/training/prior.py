"""Class images for prior preservation: pictures of the plain class by the base itself, drawn once and cached."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import nullcontext
from typing import Any

import numpy as np
import torch
from PIL import Image

from ..base.base_model import BaseModel
from ..base.generation import generate_images, pictures_at_a_time
from ..cache import key_of, read_entry, write_entry
from ..errors import TrainingError, setting

CLASS_IMAGE_STEPS = 20  # this and the guidance were chosen: class images need variety rather than polish
GUIDANCE = 5.0
TRIALS = 4  # of a picture that comes out black
SEEDS = 2**63  # what PyTorch's generators take
OTHER_SEED = 500_000_000_003  # added to the seed for each trial: beyond the seeds of all class images


def class_images(
    base: BaseModel,
    prompt: str,
    count: int,
    *,
    resolution: int,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[Image.Image]:
    """`count` pictures of `prompt` by `base`, from the cache or drawn now.

    They are cached under all that decides how they look (base, prompt, sampler, size, seed). Image i has its own seed, so a
    larger count only adds images. A disk that is full or read-only does no harm.
    """
    seeds = [(seed * 1_000_003 + i) % SEEDS for i in range(count)]
    keys = {one: image_key(base, prompt, resolution=resolution, seed=one) for one in seeds}
    images = {one: image for one in seeds if (image := read_image(keys[one], resolution)) is not None}
    missing = [one for one in seeds if one not in images]
    at_a_time = pictures_at_a_time(resolution)
    if missing:
        on_progress(len(images), count)
    with base.all_on_device() if missing else nullcontext() as pipeline:
        for first in range(0, len(missing), at_a_time):
            part = missing[first : first + at_a_time]
            for one, image in zip(part, drawn(pipeline, prompt, part, resolution), strict=True):
                images[one] = image.convert("RGB")
                write_entry("class_images", keys[one], {"pixels": torch.from_numpy(np.array(images[one]))})
            on_progress(len(images), count)
    return [images[one] for one in seeds]


def drawn(pipeline: Any, prompt: str, seeds: Sequence[int], resolution: int) -> list[Image.Image]:
    """A picture for each seed. One that a safety checker blacked out is drawn again: black would be learnt."""
    options: dict[str, Any] = {"steps": CLASS_IMAGE_STEPS, "guidance": GUIDANCE, "size": resolution}
    images = generate_images(pipeline, prompt, seeds, batch_size=len(seeds), **options)
    for n, seed in enumerate(seeds):
        for trial in range(1, TRIALS):
            if is_black(images[n]):
                images[n] = generate_images(pipeline, prompt, [(seed + trial * OTHER_SEED) % SEEDS], **options)[0]
    if any(map(is_black, images)):
        raise TrainingError(
            f"class images of {prompt!r} stay black, by the pipeline's safety checker or numbers that are not finite; "
            f"choose another class noun, {setting('dtype=torch.float32', option='--dtype fp32')}, "
            f"or {setting('prior_loss_weight', 0)}"
        )
    return images


def is_black(image: Image.Image) -> bool:
    return image.convert("RGB").getbbox() is None


def image_key(base: BaseModel, prompt: str, *, resolution: int, seed: int) -> str:
    """Of all that decides how a class image looks."""
    return key_of(
        of="class image",
        base=base.fingerprint,
        dtype=f"{base.dtype} {base.quantized}",
        prompt=prompt,
        scheduler=[type(base.scheduler).__name__, dict(base.scheduler.config)],
        sampler=[CLASS_IMAGE_STEPS, GUIDANCE],
        resolution=resolution,
        seed=seed,
    )


def read_image(key: str, resolution: int) -> Image.Image | None:
    """A cached picture; None if it is missing or damaged, or black or of another size after all."""
    pixels = (read_entry("class_images", key) or {}).get("pixels")
    if pixels is None or pixels.shape != (resolution, resolution, 3) or pixels.dtype != torch.uint8 or not pixels.any():
        return None
    return Image.fromarray(pixels.numpy())
