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
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext
from functools import partial
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from ..base.base_model import BaseModel, TextConditions
from ..base.generation import generate_images, pictures_at_a_time
from ..base.sizes import side_multiple
from ..base.weight_files import LazyModule
from ..cache import bytes_of, cached, checksum, key_of, prune_cache, read_entry, write_entry
from ..config import LoraSpec, SettledConfig, TrainingConfig, settled, typed, written
from ..errors import SettingsError, TrainingError, setting, shown
from ..photos.cropping import Crop, Cropped, WidthHeight, crop_photo, picture_sizes, size_for, to_tensor
from ..photos.photo import Photo
from ..subject.subject import Subject
from ..subject.wording import subject_pattern
from .latents import Bucket, LatentCache, LatentSet, conditions

Pictures = dict[WidthHeight, list[tuple[Cropped, str]]]  # of each size, with their prompts

# in a config, without effect on what is computed
NO_EFFECT = ("architectures", "dtype", "name_or_path", "torch_dtype", "transformers_version")

CLASS_IMAGE_STEPS = 20  # this and the guidance were chosen: class images need variety rather than polish
GUIDANCE = 5.0
TRIALS = 4  # of a picture that comes out black
SEEDS = 2**63  # what PyTorch's generators take
OTHER_SEED = 500_000_000_003  # added to the seed for each trial: beyond the seeds of all class images


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
    sizes = picture_sizes(config.resolution, config.shape, multiple=side_multiple(base))
    photos: Pictures = {}
    class_prompts: dict[WidthHeight, list[str]] = {}  # one for each of these photos
    every = [(one, photo) for one in subjects for photo in one.photos]
    for number, (one, photo) in enumerate(every):
        cropped = crop_photo(photo, sizes)
        on_crop(number, cropped.image)
        prompt = prompt_read(base, one, photo, f"photo {number + 1}", warn)
        photos.setdefault(cropped.image.size, []).append((cropped, prompt))
        class_prompts.setdefault(cropped.image.size, []).append(one.class_prompt)
    if say is not None:
        each = ", ".join(f"{len(part)} at {written(size)}" for size, part in photos.items())
        say(f"{len(every)} photos at {config.resolution} px" + (f": {each}" if config.shape == "buckets" else ""))
    of_class: Pictures = {}
    if config.prior_loss_weight > 0:
        of_class = class_pictures(base, subjects, sizes, config, warn, partial(on_progress, "class images"))
    elif any(one.class_images for one in subjects):
        warn(f"your class images are not used, with {setting('prior_loss_weight', 0)}")
    by_predictions = config.prior_loss_weight > 0 and not of_class
    total = (2 if config.flip else 1) * sum(len(part) for part in (*photos.values(), *of_class.values()))
    done = itertools.count()

    def on_picture() -> None:
        on_progress("encoding", next(done), total)

    on_picture()
    buckets = []
    for size, part in photos.items():
        encoded = encode(base, part, flip=config.flip, on_picture=on_picture)
        prior = encode(base, of_class[size], flip=config.flip, on_picture=on_picture) if of_class else None
        buckets.append(Bucket(encoded, prior, tuple(class_prompts[size]) if by_predictions else ()))
    of_photos = [prompt for part in photos.values() for _, prompt in part]
    drawn_by = [prompt for part in of_class.values() for _, prompt in part]
    class_text = encode_prompts(base, list(itertools.chain(*class_prompts.values())) if by_predictions else drawn_by)
    text = {} if lora is not None and lora.text_encoder else encode_prompts(base, of_photos) | class_text
    prune_cache()
    return LatentCache(tuple(buckets), base.scaling_factor, text, class_text if by_predictions else {})


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


# --- class images for prior preservation: your own, or drawn by the base itself, once, and cached --------------------


def class_pictures(
    base: BaseModel,
    subjects: Sequence[Subject],
    sizes: Sequence[WidthHeight],
    config: SettledConfig,
    warn: Callable[[str], None],
    on_progress: Callable[[int, int], None],
) -> Pictures:
    """Class images for each size of the photos: a subject's own, or drawn, `config.class_images` for each class prompt in all,
    shared among the sizes as the photos are. {} where the base's predictions keep the class."""
    found: Pictures = {}
    to_draw: list[tuple[WidthHeight, str]] = []  # for each photo, its size and class prompt
    for one in subjects:
        used = [size_for(photo, sizes) for photo in one.photos]
        to_draw += [] if one.class_images else [(size, one.class_prompt) for size in used]
        for cropped, prompt in own_class_images(one, list(dict.fromkeys(used))):
            found.setdefault(cropped.image.size, []).append((cropped, prompt))
    totals = Counter(prompt for _, prompt in to_draw)
    for prompt in dict.fromkeys([*(prompt for part in found.values() for _, prompt in part), *totals]):
        told_if_cut(base, prompt, "class prompt", warn)
    if not config.class_images:
        if found and to_draw:
            predicted = f"{setting('class_images', 0)} keeps the class by predictions"
            raise SettingsError(f"{predicted}, but a subject has class images; pass some for each")
        return found
    asked = [
        (prompt, size, -(-config.class_images * count // totals[prompt])) for (size, prompt), count in Counter(to_draw).items()
    ]
    drawn = class_images(base, asked, seed=config.seed, on_progress=on_progress)
    for (prompt, size, _), images in zip(asked, drawn, strict=True):
        found.setdefault(size, []).extend((Cropped(image, Crop(0, 0, size[::-1])), prompt) for image in images)
    return found


def own_class_images(subject: Subject, sizes: Sequence[WidthHeight]) -> Iterator[tuple[Cropped, str]]:
    """Cropped, with their prompts: each to that of `sizes` in which most of it is seen; and all to one that none fits best."""
    for size in sizes:
        fitting = [picture for picture in subject.class_images if size_for(picture, sizes) == size]
        for picture in fitting or subject.class_images:
            yield crop_photo(picture, [size]), subject.class_prompt_for(picture)


def class_images(
    base: BaseModel,
    wanted: Sequence[tuple[str, WidthHeight, int]],
    *,
    seed: int = 0,
    on_progress: Callable[[int, int], None] = lambda done, total: None,
) -> list[list[Image.Image]]:
    """For each prompt, size (width, height in pixels) and count: so many pictures by `base`, from the cache or drawn now.

    They are cached under all that decides how they look (base, prompt, sampler, size, seed). Image i has its own seed, so a
    larger count only adds images. A disk that is full or read-only does no harm.
    """

    def seeds(count: int) -> list[int]:
        return [(seed * 1_000_003 + i) % SEEDS for i in range(count)]

    keys = {
        (prompt, size, one): image_key(base, prompt, size=size, seed=one)
        for prompt, size, count in wanted
        for one in seeds(count)
    }
    images = {place: image for place, key in keys.items() if (image := read_image(key, place[1])) is not None}
    missing = [place for place in keys if place not in images]
    if missing:
        on_progress(len(images), len(keys))
    with base.all_on_device() if missing else nullcontext() as pipeline:
        for (prompt, size), places in itertools.groupby(missing, key=lambda place: place[:2]):
            several, at_a_time = [one for *_, one in places], pictures_at_a_time(*size)
            for first in range(0, len(several), at_a_time):
                part = several[first : first + at_a_time]
                for one, image in zip(part, pictures_of(pipeline, prompt, part, size), strict=True):
                    images[prompt, size, one] = image = image.convert("RGB")
                    entry = {"pixels": torch.from_numpy(np.array(image))}
                    write_entry("class_images", keys[prompt, size, one], entry)
                on_progress(len(images), len(keys))
    return [[images[prompt, size, one] for one in seeds(count)] for prompt, size, count in wanted]


def pictures_of(pipeline: Any, prompt: str, seeds: Sequence[int], size: WidthHeight) -> list[Image.Image]:
    """A picture for each seed. One that a safety checker blacked out is drawn again: black would be learnt."""
    options: dict[str, Any] = {"steps": CLASS_IMAGE_STEPS, "guidance": GUIDANCE, "size": size}
    images = generate_images(pipeline, prompt, seeds, batch_size=len(seeds), **options)
    for n, seed in enumerate(seeds):
        for trial in range(1, TRIALS):
            if is_black(images[n]):
                images[n] = generate_images(pipeline, prompt, [(seed + trial * OTHER_SEED) % SEEDS], **options)[0]
    if any(map(is_black, images)):
        raise TrainingError(
            f"class images of {prompt!r} stay black, by the pipeline's safety checker or numbers that are not finite; "
            f"choose another class noun, {setting('dtype=torch.float32', option='--dtype fp32')}, "
            f"or {setting('prior_loss_weight', 0)}"
        )
    return images


def is_black(image: Image.Image) -> bool:
    return image.convert("RGB").getbbox() is None


def image_key(base: BaseModel, prompt: str, *, size: WidthHeight, seed: int) -> str:
    """Of all that decides how a class image looks."""
    return key_of(
        of="class image",
        base=base.fingerprint,
        dtype=f"{base.dtype} {base.quantized}",
        prompt=prompt,
        scheduler=[type(base.scheduler).__name__, dict(base.scheduler.config)],
        sampler=[CLASS_IMAGE_STEPS, GUIDANCE],
        size=size,
        seed=seed,
    )


def read_image(key: str, size: WidthHeight) -> Image.Image | None:
    """A cached picture; None if it is missing or damaged, or black or of another size after all."""
    pixels = (read_entry("class_images", key) or {}).get("pixels")
    if pixels is None or pixels.shape != (*size[::-1], 3) or pixels.dtype != torch.uint8 or not pixels.any():
        return None
    return Image.fromarray(pixels.numpy())


# --- encoding --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def encode(
    base: BaseModel, pictures: Sequence[tuple[Cropped, str]], *, flip: bool, on_picture: Callable[[], None]
) -> LatentSet:
    """Pictures of one size, with their prompts -> LatentSet on the base's device, through the cache on disk.

    on_picture  called after each view of a picture
    """
    depends_on = dependencies(base, "vae")
    means, stds = [], []  # of each view
    for mirrored in (False, True) if flip else (False,):
        encoded = []
        for one, _ in pictures:
            image = one.image.transpose(Image.Transpose.FLIP_LEFT_RIGHT) if mirrored else one.image
            encoded.append(latents_of(base, to_tensor(image), depends_on))
            on_picture()
        means.append(torch.cat([mean for mean, _ in encoded]))
        stds.append(torch.cat([std for _, std in encoded]))
    crops = [(one.crop, one.image.size[::-1]) for one, _ in pictures]
    ids = [base.time_ids(crop.original_size, (crop.top, crop.left), height_and_width) for crop, height_and_width in crops]
    masks = [one.mask for one, _ in pictures]
    return LatentSet(
        mean=torch.stack(means).to(base.device),
        std=torch.stack(stds).to(base.device),
        prompts=tuple(prompt for _, prompt in pictures),
        time_ids=torch.stack([row for row in ids if row is not None]) if base.family.time_ids else None,
        masks=mask_latents(masks, base.pixels_per_latent, views=len(means)).to(base.device) if any(masks) else None,
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


@torch.no_grad()
def encode_prompts(base: BaseModel, prompts: Sequence[str]) -> dict[str, TextConditions]:
    """Text conditions of each distinct prompt, through the cache on disk."""
    depends_on = text_dependencies(base)
    return {prompt: conditions_of(base, prompt, depends_on) for prompt in dict.fromkeys(prompts)}


def encoded_text(base: BaseModel, prompts: Sequence[str]) -> TextConditions:
    """Those of these prompts, in order."""
    return conditions(base, encode_prompts(base, prompts), prompts)


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
