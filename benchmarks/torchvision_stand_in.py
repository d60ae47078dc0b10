"""The few picture transforms that diffusers' DreamBooth scripts take from torchvision, for machines without it.

As torchvision does them on Pillow pictures: Pillow resizes and cuts, one division makes the tensor.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Sequence
from enum import Enum
from importlib.machinery import ModuleSpec
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import torch
from PIL import Image


class InterpolationMode(Enum):
    NEAREST = Image.Resampling.NEAREST
    BILINEAR = Image.Resampling.BILINEAR
    BICUBIC = Image.Resampling.BICUBIC
    LANCZOS = Image.Resampling.LANCZOS


class Compose:
    def __init__(self, steps: Sequence[Callable[[Any], Any]]) -> None:
        self.steps = steps

    def __call__(self, value: Any) -> Any:
        for step in self.steps:
            value = step(value)
        return value


class Resize:
    """The short side to `size` pixels."""

    def __init__(self, size: int, interpolation: InterpolationMode = InterpolationMode.BILINEAR) -> None:
        self.size, self.filter = size, interpolation.value

    def __call__(self, image: Image.Image) -> Image.Image:
        width, height = image.size
        short = min(width, height)
        size = (int(self.size * width / short), int(self.size * height / short))
        return image if size == image.size else image.resize(size, self.filter)


def crop(image: Image.Image, top: int, left: int, height: int, width: int) -> Image.Image:
    return image.crop((left, top, left + width, top + height))


class CenterCrop:
    def __init__(self, size: int | tuple[int, int]) -> None:
        self.height, self.width = (size, size) if isinstance(size, int) else size

    def __call__(self, image: Image.Image) -> Image.Image:
        left, top = round((image.width - self.width) / 2), round((image.height - self.height) / 2)
        return crop(image, top, left, self.height, self.width)


class RandomCrop(CenterCrop):
    @staticmethod
    def get_params(image: Image.Image, size: tuple[int, int]) -> tuple[int, int, int, int]:
        height, width = size
        top = int(torch.randint(0, image.height - height + 1, (1,)))
        return top, int(torch.randint(0, image.width - width + 1, (1,))), height, width

    def __call__(self, image: Image.Image) -> Image.Image:
        return crop(image, *self.get_params(image, (self.height, self.width)))


class RandomHorizontalFlip:
    def __init__(self, p: float = 0.5) -> None:
        self.p = p

    def __call__(self, image: Image.Image) -> Image.Image:
        return image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if random.random() < self.p else image


class ToTensor:
    """(H, W, 3) bytes -> (3, H, W) float32 in 0..1."""

    def __call__(self, image: Image.Image) -> torch.Tensor:
        return torch.from_numpy(np.array(image)).permute(2, 0, 1).contiguous().float().div(255)


class Normalize:
    def __init__(self, mean: Sequence[float], std: Sequence[float]) -> None:
        self.mean, self.std = (torch.tensor(values).view(-1, 1, 1) for values in (mean, std))

    def __call__(self, pixels: torch.Tensor) -> torch.Tensor:
        return (pixels - self.mean) / self.std


def put_in_place() -> None:
    """As `torchvision` for what is imported from now on; transformers and diffusers have asked before, and go without it."""
    import diffusers  # noqa: F401
    from transformers.utils import is_torchvision_available

    assert not is_torchvision_available()  # it remembers the answer
    names = (InterpolationMode, Compose, Resize, CenterCrop, RandomCrop, RandomHorizontalFlip, ToTensor, Normalize)
    transforms = ModuleType("torchvision.transforms")
    for one in names:
        setattr(transforms, one.__name__, one)
    functional = ModuleType("torchvision.transforms.functional")
    functional.crop = crop  # type: ignore[attr-defined]
    transforms.functional = functional  # type: ignore[attr-defined]
    package = ModuleType("torchvision")
    package.transforms, package.version = transforms, SimpleNamespace()  # type: ignore[attr-defined]
    for module in (package, transforms, functional):
        module.__spec__ = ModuleSpec(module.__name__, None)
        sys.modules[module.__name__] = module
