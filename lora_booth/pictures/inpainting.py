"""Draw into a photo: what is under the white of a mask is drawn anew, and everything else stays as it is, bit for bit."""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageChops, ImageFilter

from ..base.base_model import BaseModel
from ..base.sizes import nearest
from ..errors import PhotoError
from ..photos.cropping import to_tensor
from ..photos.masks import WHITE

Box = tuple[int, int, int, int]  # left, top, right, bottom in pixels

MARGIN = 0.5  # of the mask's sides, seen around it on each side: the base draws to match it; chosen
LONGEST = 2.0  # longer side of what is seen, to its shorter; chosen
SOFTNESS = 1 / 128  # of what is seen; how far the inner edge of the mask blends into the photo; chosen


def part_around(mask: Image.Image) -> Box:
    """What the base sees of the photo: the mask's white, and a margin around it inside the photo. Raises PhotoError."""
    found = mask.point(lambda level: 255 if level >= WHITE else 0).getbbox()
    if found is None:
        raise PhotoError("the mask has no white; make what is to be drawn anew white (255) and the rest black")
    left, top, right, bottom = found
    width, height = ((1 + 2 * MARGIN) * side for side in (right - left, bottom - top))
    x0, x1 = span(left, right, max(width, height / LONGEST), mask.width)
    y0, y1 = span(top, bottom, max(height, width / LONGEST), mask.height)
    return x0, y0, x1, y1


def span(low: int, high: int, length: float, limit: int) -> tuple[int, int]:
    """`low` to `high` widened to `length`, within 0 to `limit`."""
    length = min(length, limit)
    start = min(max((low + high - length) / 2, 0), limit - length)
    return round(start), round(start + length)


def drawn_size(base: BaseModel, part: Box) -> tuple[int, int]:
    """In pixels: the part's shape, with the area that the base was trained for."""
    left, top, right, bottom = part
    scale, multiple = base.resolution / math.sqrt((right - left) * (bottom - top)), base.side_multiple
    return nearest((right - left) * scale, multiple), nearest((bottom - top) * scale, multiple)


def inpaints(pipeline: Any) -> bool:
    return "mask_image" in inspect.signature(pipeline.__call__).parameters


@torch.no_grad()
def draw_into(
    base: BaseModel, pipeline: Any, seed: int, *, piece: Image.Image, mask: Image.Image, **options: Any
) -> Image.Image:
    """`piece` with new content where `mask` is white, by an inpainting pipeline or any that draws from text.

    options  of the pipeline: its prompts and steps
    The latter is led as diffusers' inpainting pipelines lead a plain U-Net: after every step, the latents outside the mask are
    the photo's, with the noise of the next step.
    """
    generator = torch.Generator().manual_seed(seed)
    options |= {"width": piece.width, "height": piece.height, "generator": generator}
    if inpaints(base.shell):
        return pipeline(image=piece, mask_image=mask, strength=1.0, **options).images[0]
    mean, std = base.encode_images(to_tensor(piece))  # (1, C, h, w)
    noise = torch.randn(mean.shape, generator=generator).to(mean)
    photo = (mean + std * torch.randn(mean.shape, generator=generator).to(mean)) * base.scaling_factor
    white = torch.from_numpy(np.array(mask) >= WHITE)[None, None].float()  # (1, 1, H, W)
    anew = F.interpolate(white, size=mean.shape[-2:]).to(mean).bool()

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        times, latents = pipeline.scheduler.timesteps, tensors["latents"]
        around = photo if step + 1 == len(times) else pipeline.scheduler.add_noise(photo, noise, times[step + 1 : step + 2])
        return {"latents": torch.where(anew, latents, around.to(latents))}

    return pipeline(latents=noise.to(base.dtype), callback_on_step_end=keep, **options).images[0]


def pasted(photo: Image.Image, part: Box, drawn: Image.Image, mask: Image.Image) -> Image.Image:
    """The photo with `drawn` in its `part`, where the mask is white; the mask's edge blends inwards."""
    left, top, right, bottom = part
    inside = mask.crop(part)
    soft = ImageChops.darker(inside, inside.filter(ImageFilter.GaussianBlur(SOFTNESS * max(inside.size))))
    result = photo.copy()
    result.paste(drawn.resize(inside.size, Image.Resampling.LANCZOS), (left, top), soft)
    return result
