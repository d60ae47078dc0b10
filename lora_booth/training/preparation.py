"""Photos, class images and prompts, encoded once: the `LatentCache` that the loop reads."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace

from ..base_model import BaseModel, rare_tokens
from ..config import LoraSpec, TrainingConfig
from ..latents import LatentCache, encode, encode_prompts
from ..photos import crop_and_resize, open_photo
from ..prior import class_images
from ..progress import Display
from ..subject import Subject, check_token
from .settings import settled


def token_notes(base: BaseModel, subjects: Sequence[Subject]) -> Iterator[str]:
    """What speaks against the chosen tokens, in the words of the base's own tokenizer."""
    for subject in subjects:
        report = check_token(subject.token, base.tokenizer, known_rare=rare_tokens(base))
        yield from (*report.problems, *report.warnings)


def prepare(
    base: BaseModel,
    subjects: Sequence[Subject],
    *,
    lora: LoraSpec,
    config: TrainingConfig,
    shown: Display | None = None,
) -> LatentCache:
    """Photos, class images and prompts -> LatentCache. The last time that the VAE and the text encoders are needed."""
    config = settled(config, base, sum(len(s.photos) for s in subjects))
    assert config.resolution and config.class_images
    said = shown or Display()
    images, crops, prompts = [], [], []
    for subject in subjects:
        for photo in subject.photos:
            image, crop = crop_and_resize(open_photo(photo), config.resolution, photo.crop)
            images.append(image)
            crops.append(crop)
            prompts.append(subject.prompt_for(photo))
    said.say(f"{len(images)} photos at {config.resolution} px")
    photos = encode(base, images, crops, prompts, flip=config.flip)
    prior = None
    if config.prior_loss_weight > 0:
        whole = replace(crops[0], top=0, left=0, original_size=(config.resolution, config.resolution))
        pictures, class_prompts = [], []
        for prompt in dict.fromkeys(s.class_prompt for s in subjects):
            pictures += class_images(
                base, prompt, config.class_images, resolution=config.resolution, seed=config.seed, on_progress=said.class_images
            )
            class_prompts += [prompt] * config.class_images
        prior = encode(base, pictures, [whole] * len(pictures), class_prompts, flip=config.flip)
    every_prompt = [*photos.prompts, *(prior.prompts if prior is not None else ())]
    text = {} if lora.text_encoder else encode_prompts(base, every_prompt)
    return LatentCache(photos, prior, base.scaling_factor, text)
