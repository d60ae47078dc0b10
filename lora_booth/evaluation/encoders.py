"""DINO and CLIP: pictures and prompts to vectors of length 1."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from ..base.library_logging import without_bars
from ..errors import EvaluationError, reason_of, shown

DINO = "facebook/dino-vits16"  # ViT-S/16, as in arXiv 2208.12242
CLIP = "openai/clip-vit-base-patch32"
WITH_CLASS_TOKEN = ("vit", "dinov2", "dinov2_with_registers", "dinov3_vit")  # model types with a token for the picture, first
AT_A_TIME = 16  # pictures; chosen: 10 MB of pixels at 224 px


@dataclass(frozen=True)
class Preparation:
    """What an encoder expects: the short side resized (bicubic), the centre square, normalised by mean and deviation."""

    larger: float  # the short side, as a multiple of the square's side
    mean: tuple[float, float, float]  # of red, green, blue in 0..1
    deviation: tuple[float, float, float]

    def pixels(self, images: Sequence[Image.Image], side: int) -> Tensor:
        """(N, 3, side, side) float32."""
        squares = np.stack([np.asarray(self.square(image.convert("RGB"), side)) for image in images])
        scaled = torch.from_numpy(squares).permute(0, 3, 1, 2).float() / 255
        mean, deviation = (torch.tensor(values).view(3, 1, 1) for values in (self.mean, self.deviation))
        return (scaled - mean) / deviation

    def square(self, image: Image.Image, side: int) -> Image.Image:
        short, goal = min(image.size), round(self.larger * side)
        width, height = (int(length * goal / short) for length in image.size)
        left, top = (width - side) // 2, (height - side) // 2
        return image.resize((width, height), Image.Resampling.BICUBIC).crop((left, top, left + side, top + side))


FOR_DINO = Preparation(256 / 224, (0.485, 0.456, 0.406), (0.229, 0.224, 0.225))  # ImageNet, as in DINO's eval_knn.py
FOR_CLIP = Preparation(1.0, (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711))


class Dino:
    """A self-supervised vision transformer. Raises EvaluationError where `source` (a Hub id or a folder) cannot be loaded."""

    def __init__(self, source: str | Path = DINO, *, device: torch.device | str = "cpu") -> None:
        from transformers import AutoModel

        self.device = torch.device(device)
        [model] = loaded("DINO", source, WITH_CLASS_TOKEN, AutoModel)
        self.model = model.float().eval().to(self.device)
        self.side = side_of(self.model.config.image_size)

    @torch.no_grad()
    def of_images(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, d) float32 on the CPU: the class token's last state."""
        parts = in_parts(images, FOR_DINO, self.side, self.device)
        return joined([self.model(pixel_values=part).last_hidden_state[:, 0] for part in parts])


class Clip:
    """CLIP's two encoders. Raises EvaluationError where `source` (a Hub id or a folder) cannot be loaded."""

    def __init__(self, source: str | Path = CLIP, *, device: torch.device | str = "cpu") -> None:
        from transformers import CLIPModel, CLIPTokenizer

        self.device = torch.device(device)
        self.tokenizer, model = loaded("CLIP", source, ("clip",), CLIPTokenizer, CLIPModel)
        self.model = model.float().eval().to(self.device)
        self.side = side_of(self.model.config.vision_config.image_size)

    @torch.no_grad()
    def of_images(self, images: Sequence[Image.Image]) -> Tensor:
        """(N, d) float32 on the CPU: the projected picture."""
        parts = in_parts(images, FOR_CLIP, self.side, self.device)
        return joined([self.model.visual_projection(self.model.vision_model(part).pooler_output) for part in parts])

    @torch.no_grad()
    def of_texts(self, prompts: Sequence[str]) -> Tensor:
        """(N, d) float32 on the CPU: the projected prompt."""
        length = self.model.config.text_config.max_position_embeddings
        words = self.tokenizer(list(prompts), padding=True, truncation=True, max_length=length, return_tensors="pt")
        read = self.model.text_model(**words.to(self.device)).pooler_output
        return joined([self.model.text_projection(read)])


def in_parts(images: Sequence[Image.Image], expected: Preparation, side: int, device: torch.device) -> Iterator[Tensor]:
    for first in range(0, len(images), AT_A_TIME):
        yield expected.pixels(images[first : first + AT_A_TIME], side).to(device)


def joined(parts: Sequence[Tensor]) -> Tensor:
    """(N, d) float32 on the CPU, each of length 1."""
    return F.normalize(torch.cat(list(parts)), dim=1).cpu()


def side_of(size: Any) -> int:
    return int(size if isinstance(size, int) else size[0])


def loaded(what: str, source: str | Path, kinds: Sequence[str], *classes: Any) -> list[Any]:
    """One of each class from a folder, the Hub or its cache. Raises EvaluationError with a remedy.

    kinds  model types that will do
    """
    from transformers import AutoConfig
    from transformers.utils import logging

    verbosity = logging.get_verbosity()
    logging.set_verbosity_error()  # no list of unused weights
    try:
        with without_bars():
            kind = AutoConfig.from_pretrained(source).model_type
            if kind not in kinds:
                raise ValueError(f"it is a {kind}; allowed: {', '.join(kinds)}")
            return [one.from_pretrained(source) for one in classes]
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        name = shown(source)
        how = "check that the folder is complete" if Path(source).is_dir() else f"run once while online: hf download {name}"
        raise EvaluationError(f"{what} ({name}) cannot be loaded: {reason_of(error)}; {how}") from error
    finally:
        logging.set_verbosity(verbosity)
