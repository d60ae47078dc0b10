"""Class images for prior preservation: pictures of the plain class by the base itself, drawn once and cached."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..base.ai_mark import save_marked
from ..base.base_model import BaseModel
from ..base.generation import generate_images, pictures_at_a_time
from ..cache import cache_folder, own_folder
from ..errors import TrainingError

SAMPLER_STEPS = 20  # this and the guidance were chosen: class images need variety rather than polish
GUIDANCE = 5.0
TRIALS = 4  # of a picture that comes out black
OTHER_SEED = 500_000_000_003  # added to the seed for each trial: beyond the seeds of all class images


def class_images(
    base: BaseModel,
    prompt: str,
    count: int,
    *,
    resolution: int,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """`count` pictures of `prompt` by `base`, from the cache or drawn now.

    They are cached under all that decides how they look (base, prompt, sampler, size, seed). Image i has its own seed, so a
    larger count only adds images. A disk that is full or read-only does no harm.
    """
    folder = class_image_folder(base, prompt, resolution=resolution, seed=seed)
    paths = [folder / f"{i:04d}.png" for i in range(count)]
    images = {i: image for i, path in enumerate(paths) if (image := opened(path)) is not None}
    missing = [i for i in range(count) if i not in images]
    if not missing:
        return [images[i] for i in range(count)]
    at_a_time = pictures_at_a_time(resolution)
    with base.all_on_device() as pipeline:
        for first in range(0, len(missing), at_a_time):
            part = missing[first : first + at_a_time]
            for i, image in zip(part, drawn(pipeline, prompt, [seed * 1_000_003 + i for i in part], resolution), strict=True):
                images[i] = image.convert("RGB")
                keep(image, paths[i])
            if on_progress is not None:
                on_progress(len(images), count)
    return [images[i] for i in range(count)]


def drawn(pipeline: Any, prompt: str, seeds: Sequence[int], resolution: int) -> list[Image.Image]:
    """A picture for each seed. One that a safety checker blacked out is drawn again: black would be learnt."""
    options: dict[str, Any] = {"steps": SAMPLER_STEPS, "guidance": GUIDANCE, "size": resolution}
    images = generate_images(pipeline, prompt, seeds, batch_size=len(seeds), **options)
    for trial in range(1, TRIALS):
        black = [n for n, image in enumerate(images) if image.convert("RGB").getbbox() is None]
        others = [seeds[n] + trial * OTHER_SEED for n in black]
        for n, image in zip(black, generate_images(pipeline, prompt, others, **options) if black else (), strict=True):
            images[n] = image
    if any(image.convert("RGB").getbbox() is None for image in images):
        raise TrainingError(
            f"class images of {prompt!r} stay black, by the pipeline's safety checker or numbers that are not finite; "
            "choose another class noun, dtype=torch.float32, or prior_loss_weight=0"
        )
    return images


def class_image_folder(base: BaseModel, prompt: str, *, resolution: int, seed: int = 0) -> Path:
    """Where the class images of these facts are cached, as 0000.png, 0001.png, ..."""
    key = {
        "base": base.fingerprint,
        "dtype": str(base.dtype) + (f" {base.quantized}" if base.quantized else ""),
        "prompt": prompt,
        "scheduler": dict(base.scheduler.config),
        "class": type(base.scheduler).__name__,
        "steps": SAMPLER_STEPS,
        "guidance": GUIDANCE,
        "resolution": resolution,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
    return cache_folder() / "class_images" / digest


def opened(path: Path) -> Image.Image | None:
    """The picture; None if it is missing or damaged."""
    try:
        with Image.open(path) as image:
            picture = image.convert("RGB")
        os.utime(path)  # when it was last used
    except OSError:
        return None
    return picture


def keep(image: Image.Image, path: Path) -> None:
    """Save the picture. On a full or read-only disk, the next run draws it again."""
    try:
        own_folder("class_images")
        path.parent.mkdir(exist_ok=True, mode=0o700)
        save_marked(image, path)
    except OSError:
        pass
