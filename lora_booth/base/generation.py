"""Draw pictures with a stock pipeline, one seed for each."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from PIL import Image

from ..config import GUIDANCE, STEPS, Size, sides
from .changes import claimed, undone
from .families import recognise
from .library_logging import quiet_about_long_prompts
from .prompt_weights import embedded
from .samplers import sampling
from .sizes import as_arguments
from .weight_files import return_to_system

PIXELS_AT_A_TIME = 4 * 512 * 512  # through the VAE or the sampler; chosen to fit a GPU of 15 GB in fp32
MOST_AT_A_TIME = 8  # chosen: more gains little speed


def pictures_at_a_time(width: int, height: int | None = None) -> int:
    """How many pictures of this size (pixels) go through the VAE or the sampler together: 4 at 512, 1 at 1024.

    height  None: square
    """
    return max(1, min(MOST_AT_A_TIME, PIXELS_AT_A_TIME // (width * (height or width))))


@torch.no_grad()
def generate_images(
    pipeline: Any,
    prompt: str,
    seeds: Sequence[int],
    *,
    negative_prompt: str | None = None,
    steps: int = STEPS,
    guidance: float = GUIDANCE,
    size: Size | None = None,
    sampler: str | None = None,
    batch_size: int = 1,
    weights: bool = False,
    before: Callable[[dict[str, Any]], None] | None = None,
    on_image: Callable[[int], None] | None = None,
    on_step: Callable[[int], None] | None = None,
) -> list[Image.Image]:
    """One picture for each seed, whatever the other seeds are.

    steps       denoising steps
    guidance    classifier-free guidance scale
    size        in pixels: 768, (width, height) or "832x1216"; None: the resolution that the base was trained for
    sampler     its name in `samplers`; None: the base's own
    batch_size  pictures at a time; more than one is faster and may differ by rounding
    weights     read weights in the prompts, and long prompts to their end, by compel
    before      called with the arguments of each call of the pipeline, before it
    """
    images: list[Image.Image] = []

    def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        if on_step is not None:
            on_step(len(part))
        if step + 1 == pipeline.num_timesteps and pipeline.device.type == "cpu":
            return_to_system()  # the U-Net's freed memory, before the VAE needs some
        return tensors

    with claimed(pipeline.unet), sampling(pipeline, sampler, steps), quiet(pipeline):
        for first in range(0, len(seeds), batch_size):
            part = list(seeds[first : first + batch_size])
            arguments = texts_of(pipeline, prompt, negative_prompt, len(part), weights=weights) | as_arguments(sides(size))
            arguments |= {"num_inference_steps": steps, "guidance_scale": guidance}
            if before is not None:
                before(arguments | {"generator": [torch.Generator().manual_seed(seed) for seed in part]})
            generator = [torch.Generator().manual_seed(seed) for seed in part]
            images += pipeline(**arguments, generator=generator, callback_on_step_end=step_done).images
            if on_image is not None:
                on_image(len(images))
    return images


def texts_of(pipeline: Any, prompt: str, negative_prompt: str | None, count: int, *, weights: bool) -> dict[str, Any]:
    """The prompts as arguments of a pipeline that draws `count` pictures."""
    if weights:
        return embedded(pipeline, recognise(pipeline), prompt, negative_prompt, count)
    return {"prompt": [prompt] * count, "negative_prompt": None if negative_prompt is None else [negative_prompt] * count}


@contextmanager
def quiet(pipeline: Any) -> Iterator[None]:
    """Hide diffusers' progress bar and its words about long prompts."""
    before = dict(getattr(pipeline, "_progress_bar_config", {}))
    with undone(partial(pipeline.set_progress_bar_config, **before)), quiet_about_long_prompts(pipeline):
        pipeline.set_progress_bar_config(**before | {"disable": True})
        yield
