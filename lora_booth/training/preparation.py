"""Photos, class images and prompts, encoded once: the `LatentCache` that the loop reads."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace

from PIL import Image

from ..base.base_model import BaseModel
from ..cache import prune_cache
from ..config import LoraSpec, TrainingConfig
from ..photos.square import training_square
from ..subject.subject import Subject
from ..subject.tokens import check_token
from .latents import LatentCache, encode, encode_prompts
from .prior import class_images
from .progress import Display
from .settings import settled


def token_notes(base: BaseModel, subjects: Sequence[Subject]) -> Iterator[str]:
    """What speaks against the chosen tokens, in the words of the base's own tokenizer."""
    for subject in subjects:
        report = check_token(subject.token, base.tokenizer, known_rare=base.rare_tokens)
        yield from (*report.problems, *report.warnings)


def prepare(
    base: BaseModel,
    subjects: Sequence[Subject],
    *,
    lora: LoraSpec,
    config: TrainingConfig,
    shown: Display | None = None,
    on_square: Callable[[int, Image.Image], None] = lambda number, square: None,
) -> LatentCache:
    """Photos, class images and prompts -> LatentCache. The last time that the VAE and the text encoders are needed.

    What an earlier run has left on disk is not computed again, also when that run was interrupted here.
    on_square  told each photo's place, from 0, and its training square
    """
    config = settled(config, base, sum(len(s.photos) for s in subjects))
    assert config.resolution and config.class_images
    said = shown or Display()
    squares, prompts = [], []
    for subject in subjects:
        for photo in subject.photos:
            squares.append(training_square(photo, config.resolution))
            on_square(len(squares) - 1, squares[-1].image)
            prompts.append(subject.prompt_for(photo))
    said.say(f"{len(squares)} photos at {config.resolution} px")
    images, crops, masks = [s.image for s in squares], [s.crop for s in squares], [s.mask for s in squares]
    prior, pictures = None, []
    if config.prior_loss_weight > 0:
        whole = replace(crops[0], top=0, left=0, original_size=(config.resolution, config.resolution))
        class_prompts = []
        for prompt in dict.fromkeys(s.class_prompt for s in subjects):
            pictures += class_images(
                base, prompt, config.class_images, resolution=config.resolution, seed=config.seed, on_progress=said.class_images
            )
            class_prompts += [prompt] * config.class_images
    views = 2 if config.flip else 1
    total, done = views * (len(images) + len(pictures)), views * len(images)
    photos = encode(base, images, crops, prompts, flip=config.flip, masks=masks, on_picture=lambda n: said.encoded(n, total))
    if pictures:
        wholes = [whole] * len(pictures)
        told = lambda n: said.encoded(done + n, total)  # noqa: E731
        prior = encode(base, pictures, wholes, class_prompts, flip=config.flip, on_picture=told)
    every_prompt = [*photos.prompts, *(prior.prompts if prior is not None else ())]
    text = {} if lora.text_encoder else encode_prompts(base, every_prompt)
    prune_cache()
    return LatentCache(photos, prior, base.scaling_factor, text)
