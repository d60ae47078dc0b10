"""The settings of a run, settled before it starts: steps, rate, class images, resolution (reasons: `docs/defaults.md`)."""

from __future__ import annotations

from dataclasses import dataclass, fields

from ..base.base_model import BaseModel
from ..config import TrainingConfig
from ..errors import SettingsError

# 400 to 1,500 steps and 50 to 100 class images, as in diffusers' DreamBooth examples for 3 to 30 photos
STEPS_PER_PHOTO = 100
FEWEST_STEPS, MOST_STEPS = 400, 1500
CLASS_IMAGES_PER_PHOTO, MOST_CLASS_IMAGES = 10, 100
WARMUP_SHARE, MOST_WARMUP = 20, 50  # one update in 20, at most 50: chosen
CUSTOMARY_RATE, CUSTOMARY_WIDTH = 1e-4, 1280  # of LoRA on SD 1.x, 2.x and SDXL, whose widest layers have 1280 channels
RATE_POWER = 1.5  # a narrower U-Net bears a higher rate: 3e-3 measured at 128 channels (the toybox)


@dataclass(frozen=True)
class SettledConfig(TrainingConfig):
    """A TrainingConfig with a value for everything that training needs."""

    steps: int = 0
    learning_rate: float = 0.0
    warmup_steps: int = 0
    class_images: int = 0
    resolution: int = 0


def plain(config: TrainingConfig) -> TrainingConfig:
    """The same settings as a TrainingConfig, e.g. for the user to make variants of."""
    return TrainingConfig(**{field.name: getattr(config, field.name) for field in fields(config)})


def settled(config: TrainingConfig, base: BaseModel, photos: int) -> SettledConfig:
    """Choose what `config` leaves open, from the base and the number of photos. Settling twice changes nothing."""
    steps = config.steps or min(MOST_STEPS, max(FEWEST_STEPS, STEPS_PER_PHOTO * photos))
    width = max(base.shell.unet.config.block_out_channels)
    resolution = config.resolution or base.resolution
    if resolution % base.pixels_per_latent:
        raise SettingsError(f"resolution {resolution} is out of range; allowed: multiples of {base.pixels_per_latent}")
    chosen = {field.name: getattr(config, field.name) for field in fields(config)}
    chosen |= {
        "steps": steps,
        "learning_rate": config.learning_rate or CUSTOMARY_RATE * (CUSTOMARY_WIDTH / width) ** RATE_POWER,
        "warmup_steps": min(steps // WARMUP_SHARE, MOST_WARMUP) if config.warmup_steps is None else config.warmup_steps,
        "class_images": config.class_images or min(MOST_CLASS_IMAGES, CLASS_IMAGES_PER_PHOTO * photos),
        "resolution": resolution,
    }
    return SettledConfig(**chosen)
