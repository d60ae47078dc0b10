"""What a run is settled to before it starts: steps, rate, class images, resolution (`docs/defaults.md` gives each reason)."""

from __future__ import annotations

import math
from dataclasses import replace

from ..base.base_model import BaseModel
from ..config import TrainingConfig
from ..errors import SettingsError

STEPS_PER_PHOTO = 100
FEWEST_STEPS, MOST_STEPS = 400, 1500
CUSTOMARY_RATE, CUSTOMARY_WIDTH = 1e-4, 1280  # of LoRA on SD 1.x, 2.x and SDXL, whose widest layers have 1280 channels
RATE_POWER = 1.5  # a narrower U-Net bears a higher rate: 3e-3 measured at 128 channels (the toybox)
CLASS_IMAGES_PER_PHOTO = 10


def settled(config: TrainingConfig, base: BaseModel, photos: int) -> TrainingConfig:
    """`config` without a None where training needs a value; `docs/defaults.md` gives each reason."""
    steps = config.steps or min(MOST_STEPS, max(FEWEST_STEPS, STEPS_PER_PHOTO * photos))
    width = max(base.shell.unet.config.block_out_channels)
    resolution = config.resolution or base.resolution
    if resolution % base.pixels_per_latent:
        raise SettingsError(f"resolution {resolution} is out of range; allowed: multiples of {base.pixels_per_latent}")
    return replace(
        config,
        steps=steps,
        learning_rate=config.learning_rate or CUSTOMARY_RATE * (CUSTOMARY_WIDTH / width) ** RATE_POWER,
        warmup_steps=min(steps // 20, 50) if config.warmup_steps is None else config.warmup_steps,
        class_images=config.class_images or min(100, CLASS_IMAGES_PER_PHOTO * photos),
        resolution=resolution,
    )


def learning_rate(config: TrainingConfig, step: int) -> float:
    """The rate of update `step` (from 0): linear warm-up, then constant or a half cosine to 0."""
    assert config.steps and config.learning_rate is not None and config.warmup_steps is not None
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))
