"""Class images for prior preservation: pictures of the bare class from the base itself, made once and kept."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from pathlib import Path

from PIL import Image

from .base_model import BaseModel
from .generation import generate_images
from .memory import pictures_at_a_time

SAMPLER_STEPS = 20
GUIDANCE = 5.0


def cache_folder() -> Path:
    """Where class images are kept: $LORA_BOOTH_CACHE, else `lora_booth` in the user's cache folder."""
    chosen = os.environ.get("LORA_BOOTH_CACHE")
    return Path(chosen) if chosen else Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "lora_booth"


def class_images(
    base: BaseModel,
    prompt: str,
    count: int,
    *,
    resolution: int,
    seed: int = 0,
    on_progress: Callable[[int, int], None] | None = None,
) -> list[Image.Image]:
    """`count` pictures of `prompt` drawn by `base`, from the cache or made now.

    Kept by everything that decides how they look (base, prompt, sampler, size, seed), never by how many files are
    there; image i has its own seed, so a larger count only adds images.
    """
    key = {
        "base": base.fingerprint,
        "dtype": str(base.dtype),
        "prompt": prompt,
        "scheduler": dict(base.pipeline.scheduler.config),
        "class": type(base.pipeline.scheduler).__name__,
        "steps": SAMPLER_STEPS,
        "guidance": GUIDANCE,
        "resolution": resolution,
        "seed": seed,
    }
    digest = hashlib.sha256(json.dumps(key, sort_keys=True, default=str).encode()).hexdigest()[:24]
    folder = cache_folder() / "class_images" / digest
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{i:04d}.png" for i in range(count)]
    missing = [i for i, path in enumerate(paths) if not readable(path)]
    if missing and shutil.disk_usage(folder).free < len(missing) * resolution * resolution * 3:
        raise OSError(f"{folder}: no room for {len(missing)} class images; free some, or set LORA_BOOTH_CACHE")
    at_a_time = pictures_at_a_time(resolution)
    for first in range(0, len(missing), at_a_time):
        part = missing[first : first + at_a_time]
        seeds = [seed * 1_000_003 + i for i in part]
        images = generate_images(
            base.pipeline, prompt, seeds, steps=SAMPLER_STEPS, guidance=GUIDANCE, size=resolution, batch_size=len(part)
        )
        for i, image in zip(part, images, strict=True):
            temporary = paths[i].with_suffix(f".{os.getpid()}.tmp")
            image.save(temporary, format="PNG")
            os.replace(temporary, paths[i])
        if on_progress is not None:
            on_progress(count - len(missing) + first + len(part), count)
    return [Image.open(path).convert("RGB") for path in paths]


def readable(path: Path) -> bool:
    try:
        with Image.open(path) as image:
            image.load()
    except OSError:
        return False
    return True
