"""prepare(): photos, class images and prompts -> `LatentCache`, encoded once and cached on disk.

Pictures and prompts are encoded one at a time, so that an entry of the cache does not depend on what it was encoded with: a
run with the cache computes bit for bit what it computes without. If everything is cached, the VAE and the text encoders are
not even read. A key covers the picture's pixels or the prompt's tokens, every weight of the module, its settings, precision
and device, and the versions of the libraries.
"""

from __future__ import annotations

import hashlib
import itertools
import re
import warnings
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..base.base_model import BaseModel, TextConditions
from ..base.weight_files import LazyModule
from ..cache import bytes_of, cached, checksum, key_of, prune_cache
from ..config import LoraSpec, TrainingConfig, settled, typed, written
from ..errors import SettingsError, setting, shown
from ..photos.cropping import crop_photo, picture_sizes, to_tensor
from ..photos.photo import Photo
from ..subject.subject import Subject
from ..subject.wording import subject_pattern
from .class_images import Pictures, TrainingPicture, drawn_class_images, own_class_images
from .latents import Bucket, LatentCache, LatentSet, conditions

# of the error where a photo's mask is black: chosen; at 0 the adapter is free to draw anything behind the subject
BACKGROUND_WEIGHT = 0.1
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
    on_crop: Callable[[int, Image.Image], None] = lambda number, image: None,
) -> LatentCache:
    """Encode the photos, class images and prompts of one subject or several, for `training_steps`.

    Afterwards the VAE is no longer needed, nor the text encoders unless `lora` trains them. Whatever an earlier call left in
    the cache on disk is not computed again, even if that call was interrupted.
    say          called with one line of news; without it, a caption that is too long is a warning
    on_progress  called with what is made ("class images", "encoding"), how many are done, and their total
    on_crop      called with each photo's number, from 0, and its training picture
    """
    base, subjects, warn = typed("base", base, BaseModel), subjects_of(subject), say or warnings.warn
    lora = typed("lora", lora, LoraSpec | None)
    config = settled(config, base, sum(len(one.photos) for one in subjects))
    sizes = picture_sizes(config.resolution, config.shape, multiple=base.side_multiple)
    keeping = config.prior_loss_weight > 0
    with_own = [one for one in subjects if one.class_images]
    if with_own and not keeping:
        warn(f"your class images are not used, with {setting('prior_loss_weight', 0)}")
    elif with_own and len(with_own) < len(subjects):
        raise SettingsError("one subject has class images, and another has none; pass some for each, or for none")
    by_predictions = keeping and not with_own
    photos: Pictures = {}
    every = [(one, photo) for one in subjects for photo in one.photos]
    for number, (one, photo) in enumerate(every):
        cropped = crop_photo(photo, sizes)
        on_crop(number, cropped.image)
        prompt = prompt_read(base, one, photo, f"photo {number + 1}", warn)
        photos.setdefault(cropped.image.size, []).append(
            TrainingPicture(cropped, prompt, one.class_prompt if by_predictions else None)
        )
    if say is not None:
        each = ", ".join(f"{len(part)} at {written(size)}" for size, part in photos.items())
        say(f"{len(every)} photos at {config.resolution} px" + (f": {each}" if config.shape == "buckets" else ""))
    of_class: Pictures = {}
    if by_predictions and config.class_images:
        of_class = drawn_class_images(base, subjects, sizes, config, partial(on_progress, "class images"))
    elif keeping:
        of_class = own_class_images(subjects, sizes)
    pictures = [one for part in (*photos.values(), *of_class.values()) for one in part]
    plain = [one.class_prompt for part in photos.values() for one in part]
    plain += [one.class_prompt or one.prompt for part in of_class.values() for one in part]  # your own have one prompt
    for prompt in filter(None, dict.fromkeys(plain)):
        warned_if_cut(base, prompt, "class prompt", warn)
    done, total = itertools.count(), (2 if config.flip else 1) * len(pictures)

    def on_picture() -> None:
        on_progress("encoding", next(done), total)

    on_picture()
    read: dict[str, Any] = {"flip": config.flip, "on_picture": on_picture}
    buckets = []
    for size, part in photos.items():
        kept = encode(base, of_class[size], background=0.0, **read) if of_class else None
        buckets.append(Bucket(encode(base, part, background=BACKGROUND_WEIGHT, **read), kept))
    class_text = encode_prompts(base, [one.class_prompt for one in pictures if one.class_prompt is not None])
    text = {} if lora is not None and lora.text_encoder else encode_prompts(base, [one.prompt for one in pictures]) | class_text
    prune_cache()
    return LatentCache(tuple(buckets), base.scaling_factor, text, class_text)


def prompt_read(base: BaseModel, subject: Subject, photo: Photo, name: str, warn: Callable[[str], None]) -> str:
    """The photo's prompt; with the subject first if the text encoders would stop reading before they get to its token."""
    prompt = subject.prompt_for(photo)
    named = re.search(subject_pattern(subject.token, None), prompt, re.IGNORECASE)
    if base.cut_off(prompt if named is None else prompt[: named.end()]):
        prompt = f"{subject.token} {subject.class_noun}, {prompt}"
    return warned_if_cut(base, prompt, name, warn)


def warned_if_cut(base: BaseModel, prompt: str, what: str, warn: Callable[[str], None]) -> str:
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


# --- encoding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(
    base: BaseModel, pictures: Sequence[TrainingPicture], *, background: float, flip: bool, on_picture: Callable[[], None]
) -> LatentSet:
    """Pictures of one size -> LatentSet on the base's device, through the cache on disk.

    background  weight of the error where a mask is black
    on_picture  called after each view of a picture
    """
    depends_on = dependencies(base, "vae")
    means, stds = [], []  # of each view
    for mirrored in (False, True) if flip else (False,):
        encoded = []
        for one, *_ in pictures:
            image = one.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else one.image
            encoded.append(latents_of(base, to_tensor(image), depends_on))
            on_picture()
        means.append(torch.cat([mean for mean, _ in encoded]))
        stds.append(torch.cat([std for _, std in encoded]))
    crops = [(one.crop, one.image.size[::-1]) for one, *_ in pictures]
    ids = [base.time_ids(crop.original_size, (crop.top, crop.left), height_and_width) for crop, height_and_width in crops]
    masks, weights = [one.mask for one, *_ in pictures], None
    if any(masks):
        weights = error_weights(mask_latents(masks, base.pixels_per_latent, views=len(means)), background).to(base.device)
    by_predictions = tuple(one.class_prompt for one in pictures if one.class_prompt is not None)
    return LatentSet(
        mean=torch.stack(means).to(base.device),
        std=torch.stack(stds).to(base.device),
        prompts=tuple(one.prompt for one in pictures),
        time_ids=torch.stack([row for row in ids if row is not None]) if base.family.time_ids else None,
        weights=weights,
        class_prompts=by_predictions,
    )


def latents_of(base: BaseModel, pixels: Tensor, depends_on: Mapping[str, Any] | None) -> tuple[Tensor, Tensor]:
    """A picture (1, 3, H, W) in -1..1 -> mean and standard deviation of its latents, each (1, C, H/f, W/f) float32."""
    if depends_on is None:
        return base.encode_images(pixels)
    picture = hashlib.sha256(bytes_of(pixels)).hexdigest()
    key = key_of(of="latents", picture=picture, shape=tuple(pixels.shape), **depends_on)
    found = cached("latents", key, lambda: dict(zip(("mean", "std"), base.encode_images(pixels), strict=True)))
    return found["mean"].to(base.device), found["std"].to(base.device)


def mask_latents(masks: Sequence[Image.Image | None], factor: int, *, views: int) -> Tensor:
    """N masks of H x W pixels -> (V, N, 1, H/f, W/f) float32 in 0..1: each latent gets the mean of its f x f pixels."""
    size = next(mask.size for mask in masks if mask is not None)
    greys = [np.full(size[::-1], 255, np.uint8) if mask is None else np.asarray(mask) for mask in masks]
    pixels = torch.from_numpy(np.stack(greys))[:, None].float() / 255  # (N, 1, H, W)
    means = torch.nn.functional.avg_pool2d(pixels, factor)
    return torch.stack([means, means.flip(-1)][:views])


def error_weights(masks: Tensor, background: float) -> Tensor:
    """Masks in 0..1 -> weights of the same shape, with mean 1 in each picture: a small subject counts as much as a large one.

    A mask of ones gives exactly 1: the plain loss, bit for bit.
    """
    weights = background + (1 - background) * masks
    return weights / weights.mean(dim=(-3, -2, -1), keepdim=True).clamp(min=1e-6)


@torch.no_grad()
def encode_prompts(base: BaseModel, prompts: Sequence[str]) -> dict[str, TextConditions]:
    """Text conditions of each distinct prompt, through the cache on disk."""
    depends_on = text_dependencies(base)
    return {prompt: conditions_of(base, prompt, depends_on) for prompt in dict.fromkeys(prompts)}


def token_reading(base: BaseModel) -> dict[str, Any]:
    """How this base reads tokens, for `check_token` and `propose_tokens`."""

    def encode(prompts: Sequence[str]) -> TextConditions:
        return conditions(base, encode_prompts(base, prompts), prompts)

    return {"known_rare": base.rare_tokens, "encode": encode}


def conditions_of(base: BaseModel, prompt: str, depends_on: Mapping[str, Any] | None) -> TextConditions:
    def made() -> dict[str, Tensor]:
        text = base.encode_text([prompt])
        return {"states": text.states} | ({} if text.pooled is None else {"pooled": text.pooled})

    if depends_on is None:
        return TextConditions(**made())
    tokens = [words([prompt], padding="max_length", truncation=True).input_ids for words in base.tokenizers]
    found = cached("text", key_of(of="text", prompt=prompt, tokens=tokens, **depends_on), made)
    return TextConditions(**{name: tensor.to(base.device) for name, tensor in found.items()})


def text_dependencies(base: BaseModel) -> dict[str, Any] | None:
    each = [dependencies(base, name) for name in base.family.text_encoders]
    return None if None in each else {"encoders": each, "pipeline": type(base.shell).__name__}


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
        "weights": digest_on_disk(unread) if unread else checksum(sorted(module.state_dict().items())),
        "dtype": str(next(module.parameters()).dtype),
        "device": torch.cuda.get_device_name(place) if place.type == "cuda" else [place.type, torch.get_num_threads()],
        "modes": {mode: getattr(module, mode, None) for mode in ("training", "use_tiling", "use_slicing")},
        "attention": sorted({type(one).__name__ for one in getattr(module, "attn_processors", {}).values()})
        or getattr(module.config, "_attn_implementation", None),
        "versions": [torch.__version__, diffusers.__version__, transformers.__version__],
    }


def digest_on_disk(unread: LazyModule) -> str:
    """The checksum of a module that is not loaded yet; computed once for each state of its files."""

    def computed() -> dict[str, Tensor]:
        shapes = {name: value.shape for name, value in unread.module.state_dict().items()}
        places = sorted(unread.places.items())
        weights = ((name, place.read(unread.dtype, torch.device("cpu")).view(shapes[name])) for name, place in places)
        return {"sha256": torch.tensor(list(bytes.fromhex(checksum(weights))), dtype=torch.uint8)}

    found = cached("digests", key_of(of="digest", files=unread.stamp(), dtype=unread.dtype), computed)
    return bytes(found["sha256"].tolist()).hex()
