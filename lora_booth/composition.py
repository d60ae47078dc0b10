"""Composition: a base, weighted adapters, and the pictures that they make together."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from .adapters import Adapter
from .base_model import BaseModel
from .config import check
from .errors import SettingsError
from .generation import generate_images
from .injection import attached

# IPTC's mark for pictures made by a trained model, which picture agencies and platforms read
AI_MARK = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)


@dataclass(frozen=True)
class Picture:
    """One picture and what made it."""

    image: Image.Image
    prompt: str
    seed: int
    adapters: tuple[tuple[str, float], ...] = ()  # name, weight
    base: str = ""
    negative_prompt: str | None = None
    steps: int = 0
    guidance: float = 0.0

    def save(self, path: str | Path) -> Path:
        """PNG or, by its ending, JPEG or WebP; marked as made by a model (IPTC), without anything else."""
        path = Path(path)
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise SettingsError(f"{path}: pictures are saved as .png, .jpg or .webp")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            info = PngImagePlugin.PngInfo()
            info.add_itxt("XML:com.adobe.xmp", AI_MARK)
            self.image.save(path, pnginfo=info)
        else:
            self.image.save(path, xmp=AI_MARK.encode(), quality=95)
        return path


class Composition:
    """A base (or any SD 1.x / 2.x / SDXL pipeline) with weighted adapters.

    adapters  each an Adapter, or (Adapter, weight); every layer gets the exact weighted sum of their changes
    The pipeline is as it was after every call.
    """

    def __init__(self, base: BaseModel | Any, adapters: Iterable[Adapter | tuple[Adapter, float]] = ()) -> None:
        self.base = base if isinstance(base, BaseModel) else BaseModel.from_pipeline(base)
        self.adapters = tuple((a, a.card.weight) if isinstance(a, Adapter) else (a[0], float(a[1])) for a in adapters)
        for adapter, weight in self.adapters:
            check(math.isfinite(weight), f"weight {weight} of {adapter.name}", "any finite number; 0 to 1 is usual")

    def generate(
        self,
        prompt: str,
        *,
        seeds: Sequence[int] = (0,),
        negative_prompt: str | None = None,
        steps: int = 25,
        guidance: float = 5.0,
        size: int | None = None,
        batch_size: int = 1,
        on_image: Callable[[int], None] | None = None,
    ) -> list[Picture]:
        """One picture for each seed; a seed gives the same picture whichever others are asked for with it.

        steps       denoising steps
        guidance    classifier-free guidance scale
        size        side in pixels; None: what the base was made for
        batch_size  pictures at a time; more than one is faster and may differ by rounding
        """
        if not len(seeds):
            raise SettingsError("no seeds; give one for each picture, as seeds=range(4)")
        for seed in seeds:
            check(0 <= seed < 2**63, f"seed {seed}", "0 to 2**63 - 1")
        check(steps >= 1, f"steps {steps}", "at least 1; 20 to 50 is usual")
        check(batch_size >= 1, f"batch_size {batch_size}", "at least 1")
        check(math.isfinite(guidance) and guidance >= 0, f"guidance {guidance}", "at least 0; 4 to 8 is usual")
        check(size is None or (size >= 8 and size % 8 == 0), f"size {size}", "multiples of 8 pixels")
        with attached(self.base, self.adapters) as pipeline:
            images = generate_images(
                pipeline,
                prompt,
                list(seeds),
                negative_prompt=negative_prompt,
                steps=steps,
                guidance=guidance,
                size=size,
                batch_size=batch_size,
                on_image=on_image,
            )
        used = tuple((adapter.name, weight) for adapter, weight in self.adapters)
        return [
            Picture(image, prompt, seed, used, self.base.name, negative_prompt, steps, guidance)
            for image, seed in zip(images, seeds, strict=True)
        ]
