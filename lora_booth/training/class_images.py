"""Class images: your own pictures of the plain class, or the base's, drawn once and cached.

The base draws the class beside another thing, and its attention says where the thing is. There an adapter must predict what
the base does, so that what is asked for beside the subject is there and keeps its own look.
"""

from __future__ import annotations

import itertools
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from PIL import Image

from ..base.base_model import BaseModel
from ..base.generation import generate_images, pictures_at_a_time
from ..cache import key_of, read_entry, write_entry
from ..config import SettledConfig
from ..errors import TrainingError, setting
from ..kernels.attention_maps import AttentionMaps, subject_masks
from ..photos.cropping import Crop, Cropped, WidthHeight, crop_photo, size_for
from ..subject.subject import Subject
from ..subject.wording import with_article

THINGS = ("cat", "mug", "car", "fish", "dog")  # chosen: any base can draw them, the toybox too
KINDS = 4  # of things beside one class; chosen
CLASS_IMAGE_STEPS = 20  # this and the guidance were chosen: class images need variety rather than polish
GUIDANCE = 5.0
TRIALS = 4  # of a picture that comes out black
SEEDS = 2**63  # what PyTorch's generators take
OTHER_SEED = 500_000_000_003  # added to the seed for each trial: beyond the seeds of all class images


class TrainingPicture(NamedTuple):
    """What training sees, with its words."""

    cropped: Cropped
    prompt: str
    class_prompt: str | None = None  # by which the base's prediction is the target; None: it is the noise


Pictures = dict[WidthHeight, list[TrainingPicture]]  # of each size


@dataclass(frozen=True)
class ClassImage:
    """A picture of the class beside a thing."""

    image: Image.Image  # RGB
    mask: Image.Image  # greys, as large; white is the thing
    thing: str


def own_class_images(subjects: Sequence[Subject], sizes: Sequence[WidthHeight]) -> Pictures:
    """Your own, each cropped to the one of `sizes` that keeps most of it; a size that is the best of none gets them all."""
    found: Pictures = {}
    for one in subjects:
        used = list(dict.fromkeys(size_for(photo, sizes) for photo in one.photos))
        for size in used:
            fitting = [picture for picture in one.class_images if size_for(picture, used) == size]
            for picture in fitting or one.class_images:
                cropped = crop_photo(picture, [size])
                found.setdefault(cropped.image.size, []).append(TrainingPicture(cropped, one.class_prompt_for(picture)))
    return found


def drawn_class_images(
    base: BaseModel,
    subjects: Sequence[Subject],
    sizes: Sequence[WidthHeight],
    config: SettledConfig,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> Pictures:
    """For each subject `config.class_images` in all, shared among the sizes of its photos as these are."""
    used = [(one, Counter(size_for(photo, sizes) for photo in one.photos)) for one in subjects]
    asked = [
        (one.class_noun, size, -(-config.class_images * count // len(one.photos)))
        for one, counts in used
        for size, count in counts.items()
    ]
    found: Pictures = {}
    drawn = iter(class_images(base, asked, seed=config.seed, on_progress=on_progress))
    for one, counts in used:
        for size in counts:
            for made in next(drawn):
                cropped = Cropped(made.image, Crop(0, 0, size[::-1]), made.mask)
                named, plain = f"{one.token} {one.class_noun}", with_article(one.class_noun)
                prompts = (prompt_beside(words, made.thing) for words in (named, plain))
                found.setdefault(size, []).append(TrainingPicture(cropped, *prompts))
    return found


def prompt_beside(subject: str, thing: str) -> str:
    return f"a photo of {subject} and {with_article(thing)}"


def class_images(
    base: BaseModel,
    wanted: Sequence[tuple[str, WidthHeight, int]],
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[ClassImage]]:
    """For each class noun, size (width, height in pixels) and count: so many by `base`, from the cache or drawn now.

    They are cached under all that decides how they look (base, prompt, sampler, size, seed). Image i has its own seed and
    thing, so a larger count only adds images. A disk that is full or read-only does no harm. Raises SettingsError where no
    attention can be read.
    """

    def places(noun: str, size: WidthHeight, count: int) -> list[tuple[str, str, WidthHeight, int]]:
        return [(noun, thing_beside(noun, i), size, (seed * 1_000_003 + i) % SEEDS) for i in range(count)]

    keys = {place: image_key(base, *place) for one in wanted for place in places(*one)}
    images = {place: image for place, key in keys.items() if (image := read_image(key, *place)) is not None}
    missing = sorted(place for place in keys if place not in images)
    if missing:
        on_progress(len(images), len(keys))
    with base.all_on_device() if missing else nullcontext() as pipeline:
        for (noun, thing, size), alike in itertools.groupby(missing, key=lambda place: place[:3]):
            several, at_a_time = list(alike), pictures_at_a_time(*size)
            for first in range(0, len(several), at_a_time):
                part = several[first : first + at_a_time]
                drawn = drawn_beside(base, pipeline, noun, thing, size, [one for *_, one in part])
                for place, image in zip(part, drawn, strict=True):
                    images[place] = image
                    pixels, mask = (torch.from_numpy(np.array(one)) for one in (image.image, image.mask))
                    write_entry("class_images", keys[place], {"pixels": pixels, "mask": mask})
                on_progress(len(images), len(keys))
    return [[images[place] for place in places(*one)] for one in wanted]


def thing_beside(noun: str, number: int) -> str:
    """Of picture `number` of a class."""
    others = [thing for thing in THINGS if thing not in noun.split()][:KINDS]
    return others[number % len(others)]


def drawn_beside(
    base: BaseModel, pipeline: Any, noun: str, thing: str, size: WidthHeight, seeds: Sequence[int], trial: int = 1
) -> list[ClassImage]:
    """A picture for each seed. One that a safety checker blacked out is drawn again: black would be learnt."""
    prompt = prompt_beside(with_article(noun), thing)
    words = [positions(base, prompt[: prompt.index(f" and {with_article(thing)}")], noun), positions(base, prompt, thing)]
    maps = AttentionMaps(words, remedy=f"pass {setting('class_images', 0)}")
    width, height = (side // base.pixels_per_latent for side in size)
    options: dict[str, Any] = {"steps": CLASS_IMAGE_STEPS, "guidance": GUIDANCE, "size": size}
    with maps.collecting(pipeline.unet, (height, width), len(seeds)):
        images = generate_images(pipeline, prompt, seeds, batch_size=len(seeds), **options)
    masks = (subject_masks(maps.found().cpu())[1] * 255).byte().numpy()  # (P, H, W)
    found = []
    for image, mask, seed in zip(images, masks, seeds, strict=True):
        if not is_black(image):
            large = Image.fromarray(mask).resize(image.size, Image.Resampling.NEAREST)
            found.append(ClassImage(image.convert("RGB"), large, thing))
        elif trial < TRIALS:
            found += drawn_beside(base, pipeline, noun, thing, size, [(seed + OTHER_SEED) % SEEDS], trial + 1)
        else:
            raise TrainingError(
                f"class images of {prompt!r} stay black, by the pipeline's safety checker or numbers that are not finite; "
                f"choose another class noun, {setting('dtype=torch.float32', option='--dtype fp32')}, "
                f"or {setting('class_images', 0)}"
            )
    return found


def positions(base: BaseModel, before: str, noun: str) -> range:
    """Of the tokens of the noun with which `before` ends; if the text encoder does not read so far, the last that it reads."""
    count = len(base.tokenizer(noun, add_special_tokens=False).input_ids)
    end = min(len(base.tokenizer(before, verbose=False).input_ids), base.tokenizer.model_max_length) - 1
    return range(max(1, end - count), end)


def is_black(image: Image.Image) -> bool:
    return image.convert("RGB").getbbox() is None


def image_key(base: BaseModel, noun: str, thing: str, size: WidthHeight, seed: int) -> str:
    """Of all that decides how a class image looks."""
    return key_of(
        of="class image with a mask of the thing",
        base=base.fingerprint,
        dtype=f"{base.dtype} {base.quantized}",
        prompt=prompt_beside(with_article(noun), thing),
        scheduler=[type(base.scheduler).__name__, dict(base.scheduler.config)],
        sampler=[CLASS_IMAGE_STEPS, GUIDANCE],
        size=size,
        seed=seed,
    )


def read_image(key: str, noun: str, thing: str, size: WidthHeight, seed: int) -> ClassImage | None:
    """A cached picture; None if it is missing or damaged, or black or of another size after all."""
    entry: Mapping[str, torch.Tensor] = read_entry("class_images", key) or {}
    pixels, mask = entry.get("pixels"), entry.get("mask")
    if pixels is None or mask is None or (pixels.shape, mask.shape) != ((*size[::-1], 3), size[::-1]):
        return None
    if {pixels.dtype, mask.dtype} != {torch.uint8} or not pixels.any():
        return None
    return ClassImage(Image.fromarray(pixels.numpy()), Image.fromarray(mask.numpy()), thing)
