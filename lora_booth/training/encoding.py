"""prepare(): photos, class images and prompts -> `LatentCache`, encoded once and cached on disk.

Pictures and prompts are encoded one at a time, so that an entry of the cache does not depend on what it was encoded with: a
run with the cache computes bit for bit what it computes without. If everything is cached, the VAE and the text encoders are
not even read. A key covers the picture's pixels or the prompt's tokens, every weight of the module, its settings, precision
and device, and the versions of the libraries.
"""

from __future__ import annotations

import hashlib
import re
import warnings
from collections.abc import Callable, Iterable, Sequence
from functools import cached_property, partial
from itertools import count
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..base.base_model import BaseModel, TextConditions
from ..base.weight_files import LazyModule
from ..cache import bytes_of, cached, key_of, prune_cache
from ..config import LoraSpec, TrainingConfig, settled, typed
from ..errors import SettingsError, shown
from ..photos.photo import Photo
from ..photos.square import Crop, to_tensor, training_square
from ..subject.subject import Subject
from ..subject.wording import subject_pattern
from .latents import LatentCache, LatentSet
from .prior import class_images

# in a config, without effect on what is computed
NO_EFFECT = ("architectures", "dtype", "name_or_path", "torch_dtype", "transformers_version")


def prepare(
    base: BaseModel,
    subject: Subject | Sequence[Subject],
    *,
    lora: LoraSpec | None = None,
    config: TrainingConfig | None = None,
    say: Callable[[str], None] | None = None,
    on_progress: Callable[[str, int, int], None] = lambda what, done, total: None,
    on_square: Callable[[int, Image.Image], None] = lambda number, square: None,
) -> LatentCache:
    """Encode the photos, class images and prompts of one subject or several, for `training_steps`.

    Afterwards the VAE is no longer needed, nor the text encoders unless `lora` trains them. Whatever an earlier call left in
    the cache on disk is not computed again, even if that call was interrupted.
    say          called with one line of news; without it, a caption that is too long is a warning
    on_progress  called with what is made ("class images", "encoding"), how many are done, and their total
    on_square    called with each photo's number, from 0, and its training square
    """
    base, subjects = typed("base", base, BaseModel), subjects_of(subject)
    config = settled(
        typed("config", config, TrainingConfig | None) or TrainingConfig(), base, sum(len(s.photos) for s in subjects)
    )
    squares, prompts = [], []
    for one in subjects:
        for photo in one.photos:
            squares.append(training_square(photo, config.resolution))
            on_square(len(squares) - 1, squares[-1].image)
            prompts.append(prompt_read(base, one, photo, f"photo {len(squares)}", say or warnings.warn))
    if say is not None:
        say(f"{len(squares)} photos at {config.resolution} px")
    pictures, class_prompts = [], []
    if config.prior_loss_weight > 0:
        for prompt in dict.fromkeys(s.class_prompt for s in subjects):
            pictures += class_images(
                base,
                told_if_cut(base, prompt, "class images", say or warnings.warn),
                config.class_images,
                resolution=config.resolution,
                seed=config.seed,
                on_progress=partial(on_progress, "class images"),
            )
            class_prompts += [prompt] * config.class_images
    views = 2 if config.flip else 1
    total, done = views * (len(squares) + len(pictures)), count()

    def on_picture() -> None:
        on_progress("encoding", next(done), total)

    on_picture()
    photos = encode(
        base,
        [s.image for s in squares],
        [s.crop for s in squares],
        prompts,
        flip=config.flip,
        masks=[s.mask for s in squares],
        on_picture=on_picture,
    )
    prior = None
    if pictures:
        crops = [Crop(0, 0, (config.resolution, config.resolution))] * len(pictures)
        prior = encode(base, pictures, crops, class_prompts, flip=config.flip, on_picture=on_picture)
    text = {} if lora is not None and lora.text_encoder else encode_prompts(base, [*prompts, *class_prompts])
    prune_cache()
    return LatentCache(photos, prior, base.scaling_factor, text)


def prompt_read(base: BaseModel, subject: Subject, photo: Photo, name: str, warn: Callable[[str], None]) -> str:
    """The photo's prompt; with the subject first if the text encoders would stop reading before they get to its token."""
    prompt = subject.prompt_for(photo)
    named = re.search(subject_pattern(subject.token, None), prompt, re.IGNORECASE)
    if base.cut_off(prompt if named is None else prompt[: named.end()]):
        prompt = f"{subject.token} {subject.class_noun}, {prompt}"
    return told_if_cut(base, prompt, name, warn)


def told_if_cut(base: BaseModel, prompt: str, what: str, warn: Callable[[str], None]) -> str:
    """The prompt. What is said of it has none of its words, nor the photo's name: output is shared more freely than photos."""
    if end := base.cut_off(prompt):
        warn(f"{what}: the text encoder does not read the end of the prompt ({len(end.split())} words); shorten it")
    return prompt


def subjects_of(subject: Subject | Sequence[Subject]) -> list[Subject]:
    """Raises SettingsError unless there is one, and only subjects."""
    subjects = [subject] if isinstance(subject, Subject) or not isinstance(subject, Iterable) else list(subject)
    if not subjects or not all(isinstance(one, Subject) for one in subjects):
        what = f"{shown(repr(subject))[:80]} is not a subject" if subjects else "no subject to train on"
        raise SettingsError(f"{what}; pass one, e.g. Subject.from_folder('photos/rex', token='ohwx', class_noun='dog')")
    return subjects


def encode(
    base: BaseModel,
    images: Sequence[Image.Image],
    crops: Sequence[Crop],
    prompts: Sequence[str],
    *,
    flip: bool,
    masks: Sequence[Image.Image | None] = (),
    on_picture: Callable[[], None] = lambda: None,
) -> LatentSet:
    """Pictures of one size -> LatentSet on the base's device, through the cache on disk.

    masks       grey pictures of the same size, one for each picture; None for a picture without a mask
    on_picture  called after each picture
    """
    cache = VaeCache(base)
    views: list[tuple[Tensor, Tensor]] = []
    for mirrored in (False, True)[: 2 if flip else 1]:
        encoded = []
        for image in images:
            encoded.append(cache.encode(image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else image))
            on_picture()
        views.append((torch.cat([mean for mean, _ in encoded]), torch.cat([std for _, std in encoded])))
    ids = [base.time_ids(crop.original_size, (crop.top, crop.left), images[0].width) for crop in crops]
    return LatentSet(
        mean=torch.stack([mean for mean, _ in views]).to(base.device),
        std=torch.stack([std for _, std in views]).to(base.device),
        prompts=tuple(prompts),
        time_ids=torch.stack([row for row in ids if row is not None]) if base.family.time_ids else None,
        masks=mask_latents(masks, base.pixels_per_latent, views=len(views)).to(base.device) if any(masks) else None,
    )


def mask_latents(masks: Sequence[Image.Image | None], factor: int, *, views: int) -> Tensor:
    """N masks of H x W pixels -> (V, N, 1, H/f, W/f) float32 in 0..1: each latent gets the mean of its f x f pixels."""
    size = next(mask.size for mask in masks if mask is not None)
    greys = [np.full(size[::-1], 255, np.uint8) if mask is None else np.asarray(mask) for mask in masks]
    pixels = torch.from_numpy(np.stack(greys))[:, None].float() / 255  # (N, 1, H, W)
    means = torch.nn.functional.avg_pool2d(pixels, factor)
    return torch.stack([means, means.flip(-1)][:views])


@torch.no_grad()
def encode_prompts(base: BaseModel, prompts: Sequence[str]) -> dict[str, TextConditions]:
    """Text conditions of each distinct prompt, through the cache on disk."""
    cache = TextCache(base)
    return {prompt: cache.encode(prompt) for prompt in dict.fromkeys(prompts)}


class VaeCache:
    """Latents of pictures by the base's VAE."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    @cached_property
    def depends_on(self) -> dict[str, Any] | None:
        return dependencies(self.base, "vae")

    def encode(self, image: Image.Image) -> tuple[Tensor, Tensor]:
        """A picture -> mean and standard deviation of its latents, each (1, C, H/f, W/f) float32."""
        pixels = to_tensor(image)
        if self.depends_on is None:
            return self.base.encode_images(pixels)
        picture = hashlib.sha256(bytes_of(pixels)).hexdigest()
        key = key_of(of="latents", picture=picture, shape=tuple(pixels.shape), **self.depends_on)
        found = cached("latents", key, lambda: dict(zip(("mean", "std"), self.base.encode_images(pixels), strict=True)))
        return found["mean"].to(self.base.device), found["std"].to(self.base.device)


class TextCache:
    """Text conditions of prompts by the base's text encoders."""

    def __init__(self, base: BaseModel) -> None:
        self.base = base

    @cached_property
    def depends_on(self) -> dict[str, Any] | None:
        each = [dependencies(self.base, name) for name in self.base.family.text_encoders]
        return None if None in each else {"encoders": each, "pipeline": type(self.base.shell).__name__}

    def encode(self, prompt: str) -> TextConditions:
        def made() -> dict[str, Tensor]:
            text = self.base.encode_text([prompt])
            return {"states": text.states} | ({} if text.pooled is None else {"pooled": text.pooled})

        if self.depends_on is None:
            return TextConditions(**made())
        tokens = [words([prompt], padding="max_length", truncation=True).input_ids for words in self.base.tokenizers]
        found = cached("text", key_of(of="text", prompt=prompt, tokens=tokens, **self.depends_on), made)
        return TextConditions(**{name: tensor.to(self.base.device) for name, tensor in found.items()})


def dependencies(base: BaseModel, name: str) -> dict[str, Any] | None:
    """All that a module's outputs depend on besides its inputs; None if that is unknown, because it has adapters in it."""
    import diffusers
    import transformers

    module, place = getattr(base.shell, name), base.device
    unread = base.unread(name)
    if any("lora_" in key for key in module.state_dict()):
        return None
    config = module.config if isinstance(module.config, dict) else module.config.to_dict()
    return {
        "class": type(module).__name__,
        "config": {key: value for key, value in sorted(config.items()) if key[0] != "_" and key not in NO_EFFECT},
        "weights": digest_of(module) if unread is None else digest_on_disk(unread),
        "dtype": str(next(module.parameters()).dtype),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else [place.type, torch.get_num_threads()],
        "modes": {mode: getattr(module, mode, None) for mode in ("training", "use_tiling", "use_slicing")},
        "attention": sorted({type(one).__name__ for one in getattr(module, "attn_processors", {}).values()})
        or getattr(module.config, "_attn_implementation", None),
        "versions": [torch.__version__, diffusers.__version__, transformers.__version__],
    }


def digest_of(module: Any) -> str:
    """sha256 of every weight, as held in memory."""
    digest = hashlib.sha256()
    for name, value in sorted(module.state_dict().items()):
        digest.update(f"{name} {tuple(value.shape)}".encode())
        digest.update(bytes_of(value))
    return digest.hexdigest()


def digest_on_disk(unread: LazyModule) -> str:
    """The same for a module that is not loaded yet; computed once for each state of its files."""

    def computed() -> dict[str, Tensor]:
        digest = hashlib.sha256()
        for name, place in sorted(unread.places.items()):
            digest.update(f"{name} {tuple(unread.module.state_dict()[name].shape)}".encode())
            digest.update(bytes_of(place.read(unread.dtype, torch.device("cpu"))))
        return {"sha256": torch.tensor(list(digest.digest()), dtype=torch.uint8)}

    found = cached("digests", key_of(of="digest", files=unread.stamp(), dtype=unread.dtype), computed)
    return bytes(found["sha256"].tolist()).hex()
