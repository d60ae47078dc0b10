"""What is trained (`LoraSpec`) and how (`TrainingConfig`). Frozen; `dataclasses.replace` makes a variant."""

from __future__ import annotations

import inspect
import math
import os
import re
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass, is_dataclass
from functools import cache
from numbers import Real
from pathlib import Path
from types import NoneType, UnionType
from typing import Any, Literal, Union, get_args, get_origin, get_type_hints

from .errors import SettingsError, setting, shown

ATTENTION_TARGETS = ("to_q", "to_k", "to_v", "to_out.0")
STEPS, GUIDANCE = 25, 5.0  # denoising steps and guidance scale of a picture; chosen
Size = int | tuple[int, ...] | str  # side of a square, width and height, or either in words: 768, (832, 1216), "832x1216"
Optimizer = Literal["adamw", "adamw8bit", "prodigy", "schedulefree"]
PhotoShape = Literal["square", "buckets"]
Quantization = Literal["int8", "nf4"]  # of the base; the least rounding first
TEXT_TARGETS = ("q_proj", "k_proj", "v_proj", "out_proj")


# The comments beside the fields of LoraSpec and TrainingConfig are also the help of the command line and of the studio.


@dataclass(frozen=True)
class LoraSpec:
    """The shape of the adapter: which modules get a low-rank update, and its rank. In brackets: what `None` stands for."""

    rank: int = 8  # LoRA rank, e.g. 16; 4 to 32 is usual
    alpha: float | None = None  # scales the change by alpha / rank, e.g. 16 [rank]
    dropout: float = 0.0  # share of the adapter's inputs to drop in training, e.g. 0.1
    target_modules: tuple[str, ...] = ATTENTION_TARGETS  # U-Net modules to train, by the end of their path
    text_encoder: bool = False  # also train the text encoders
    text_target_modules: tuple[str, ...] = TEXT_TARGETS  # their modules to train

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self)
        check(self.alpha is None or 0 < self.alpha <= 16 * self.rank, f"alpha {self.alpha}", "above 0, at most 16 x rank")
        check(bool(self.target_modules), "target_modules ()", f"at least one, as in {ATTENTION_TARGETS}")
        text_targets = not self.text_encoder or bool(self.text_target_modules)
        check(text_targets, "text_target_modules ()", f"at least one, as in {TEXT_TARGETS}")

    @property
    def scale_alpha(self) -> float:
        return float(self.rank if self.alpha is None else self.alpha)


@dataclass(frozen=True)
class TrainingConfig:
    """How to train. In brackets: what `None` stands for (`docs/defaults.md` gives the reasons)."""

    steps: int | None = None  # optimizer updates, e.g. 800 [from the number of photos]
    learning_rate: float | None = None  # learning rate at its highest, e.g. 1e-4 [from the base]
    text_encoder_learning_rate: float | None = None  # of trained text encoders, e.g. 5e-5 [as learning_rate]
    batch_size: int = 1  # photos in a forward pass, e.g. 2; as many of the class are added
    gradient_accumulation: int = 1  # forward passes for one optimizer update, e.g. 4
    pictures_at_a_time: int | None = None  # pictures of a batch in memory at a time, e.g. 1 [all]
    lr_schedule: Literal["constant", "cosine"] | None = None  # rate after the warm-up: cosine (falls to 0) or constant [cosine]
    warmup_steps: int | None = None  # updates over which the rate rises from 0, e.g. 50 [a twentieth of the steps, at most 50]
    weight_decay: float = 1e-2  # weight decay of AdamW, e.g. 0.01
    max_grad_norm: float = 1.0  # norm at which gradients are clipped, e.g. 1; inf: never
    prior_loss_weight: float = 1.0  # weight of keeping the plain class as it is, e.g. 0.5; 0: none
    class_images: int = 16  # pictures of the class beside something, drawn to keep both as they are, e.g. 32; 0: none
    min_snr_gamma: float | None = None  # gamma of min-SNR loss weighting, e.g. 5 [off]
    flip: bool = False  # also train on mirrored photos (not for text or faces)
    resolution: int | None = None  # side in pixels, e.g. 512 [the base's own]
    shape: PhotoShape = "square"  # of the photos: square (cut), or buckets (near their own, each about as large as the square)
    seed: int = 0  # seed of every random draw, e.g. 7; the same seed gives the same adapter
    attention: Literal["sdpa", "xformers"] = "sdpa"  # attention kernel: sdpa (PyTorch's) or xformers (its package, GPU)
    gradient_checkpointing: bool = False  # recompute activations: less memory, about a third slower
    lean: bool = True  # store less for the backward pass; the numbers stay the same up to rounding
    capture: bool = True  # on a CUDA GPU, record the step once and replay it where possible
    optimizer: Optimizer = "adamw"  # adamw, adamw8bit (lora-booth[quant], GPU), prodigy, schedulefree (lora-booth[optimizers])
    checkpoint_every: int = 50  # updates between two checkpoints, e.g. 50
    checkpoint_minutes: float = 2.0  # minutes between two checkpoints, if that is sooner, e.g. 2
    sample_every: int | None = None  # updates between sample pictures, e.g. 100; 0: none [three rounds]
    sample_prompt: str | tuple[str, ...] | None = None  # sample prompt, e.g. 'zwx dog at sea' [subject, subject in snow, class]
    sample_size: Size | None = None  # size of a sample picture, e.g. 768 or 832x1216 [the resolution]
    sample_seeds: int = 1  # sample pictures of each prompt, e.g. 2

    def __post_init__(self) -> None:
        check_types(self)
        check_ranges(self)
        most, usual = MOST_RATE.get(self.optimizer, (0.1, "1e-4 to 2e-3 is usual for LoRA"))
        for name in ("learning_rate", "text_encoder_learning_rate"):
            rate = getattr(self, name)
            check(rate is None or 0 < rate <= most, f"{name} {rate}", f"above 0, at most {most:g}; {usual}")
        check(0 <= self.seed <= MOST - self.sample_seeds, f"seed {self.seed}", "0 to 2**63 - 1, also of the last sample")
        sides(self.sample_size, "sample_size")


@cache
def comments(thing: Any) -> dict[str, str]:
    """The comments beside the parameters of a function, or beside the fields of a dataclass and those that it extends.

    Empty where Python has no source, as in a program frozen into one file: then the help has no explanations.
    """
    parts = [one for one in inspect.getmro(thing) if is_dataclass(one)] if inspect.isclass(thing) else [thing]
    try:
        source = "".join(map(inspect.getsource, reversed(parts)))
    except OSError:
        return {}
    return dict(re.findall(r"^    (\w+): .*  # (.+)$", source, re.MULTILINE))


COUNTS = ("steps", "batch_size", "gradient_accumulation", "pictures_at_a_time", "checkpoint_every", "sample_seeds")
MOST_RATE = {"prodigy": (2.0, "Prodigy expects 1")}  # chosen
RANGES: dict[str, tuple[Callable[[Any], bool], str]] = {  # setting -> whether a value that is given is allowed
    **dict.fromkeys(COUNTS, (lambda count: count >= 1, "at least 1")),
    "rank": (lambda rank: 1 <= rank <= 512, "a whole number from 1 to 512; 4 to 32 is usual"),
    "dropout": (lambda share: 0 <= share < 1, "at least 0 and below 1"),
    "warmup_steps": (lambda steps: steps >= 0, "at least 0"),
    "weight_decay": (lambda decay: 0 <= decay <= 1, "from 0 to 1"),
    "max_grad_norm": (lambda norm: norm > 0, "above 0 (infinity: no clipping)"),
    "prior_loss_weight": (lambda weight: 0 <= weight < math.inf, "at least 0 (0: no prior preservation)"),
    "class_images": (lambda count: count >= 0, "at least 0 (0: the class is kept by its prompt alone)"),
    "min_snr_gamma": (lambda gamma: gamma > 0, "above 0"),
    "resolution": (lambda pixels: pixels >= 8, "a multiple of 8"),
    "checkpoint_minutes": (lambda minutes: minutes > 0, "above 0 (infinity: by steps alone)"),
    "sample_every": (lambda steps: steps >= 0, "at least 0 (0: no samples)"),
}


def check_ranges(settings: LoraSpec | TrainingConfig) -> None:
    for name, (allows, allowed) in RANGES.items():
        value = getattr(settings, name, None)
        check(value is None or allows(value), f"{name} {value}", allowed)


# 400 to 1,500 steps, as in diffusers' DreamBooth examples for 3 to 30 photos
STEPS_PER_PHOTO = 100
FEWEST_STEPS, MOST_STEPS = 400, 1500
WARMUP_SHARE, MOST_WARMUP = 20, 50  # one update in 20, at most 50: chosen
SAMPLE_ROUNDS, STEPS_FOR_SAMPLES = 3, 100  # of a run with at least so many steps: chosen
CUSTOMARY_RATE, CUSTOMARY_WIDTH = 1e-4, 1280  # of LoRA on SD 1.x, 2.x and SDXL, whose widest layers have 1280 channels
RATE_POWER = 1.2  # a narrower U-Net bears a higher rate: 1.6e-3 measured at 128 channels (the toybox)


@dataclass(frozen=True)
class SettledConfig(TrainingConfig):
    """A TrainingConfig with a value for everything that training needs."""

    steps: int = 0
    learning_rate: float = 0.0
    warmup_steps: int = 0
    resolution: int = 0
    sample_every: int = 0


def defaults(photos: int, steps: int | None) -> dict[str, int]:
    """What is chosen from the number of photos, and of steps if that is given."""
    steps = steps or min(MOST_STEPS, max(FEWEST_STEPS, STEPS_PER_PHOTO * photos))
    return {
        "steps": steps,
        "warmup_steps": min(steps // WARMUP_SHARE, MOST_WARMUP),
        "sample_every": steps // SAMPLE_ROUNDS if steps >= STEPS_FOR_SAMPLES else 0,
    }


def settled(config: TrainingConfig | None, base: Any, photos: int) -> SettledConfig:
    """Choose what `config` leaves open, from the BaseModel and the number of photos. Settling twice changes nothing."""
    config = typed("config", config, TrainingConfig | None) or TrainingConfig()
    width = max(base.shell.unet.config.block_out_channels)
    resolution = config.resolution or base.resolution
    multiple = base.side_multiple
    one_pixel = base.pixels_per_latent * 2 ** (len(base.shell.unet.config.block_out_channels) - 1)  # in the middle of the U-Net
    least = (one_pixel // multiple + 1) * multiple  # attention to a single pixel has no gradients
    allowed = f"multiples of {multiple} from {least}"
    check(resolution % multiple == 0 and resolution >= least, f"resolution {resolution}", allowed)
    rate = 1.0 if config.optimizer == "prodigy" else CUSTOMARY_RATE * (CUSTOMARY_WIDTH / width) ** RATE_POWER
    chosen: dict[str, Any] = {**defaults(photos, config.steps), "learning_rate": rate, "resolution": resolution}
    chosen["lr_schedule"] = "constant" if config.optimizer == "schedulefree" else "cosine"
    return SettledConfig(**chosen | {name: value for name, value in vars(config).items() if value is not None})


def check(ok: bool, value: str, allowed: str) -> None:
    if not ok:
        name, space, number = value.partition(" ")
        raise SettingsError(f"{named(name)}{space}{number} is out of range; allowed: {allowed}")


def named(name: str) -> str:
    return setting(name) if "_" in name else name  # a plain word is the same in Python and on the command line


# --- sizes of pictures -----------------------------------------------------------------------------------------------

WRITTEN = re.compile(r"\s*(\d{1,9})(?:\s*[xX\u00d7]\s*(\d{1,9}))?\s*")
MOST_SIDE = 16_384  # pixels; chosen: far above what any of these bases can draw


def sides(size: Size | None, name: str = "size") -> tuple[int, int] | None:
    """Width and height in pixels; None: the base's own. Raises SettingsError."""
    if isinstance(size, str):
        if (match := WRITTEN.fullmatch(size)) is None:
            text = shown(repr(size[:40]))
            raise SettingsError(f"{named(name)} {text} cannot be read; write a side like 768, or width x height like 832x1216")
        size = tuple(int(number) for number in match.groups() if number)
    given = typed(name, size, int | tuple[int, ...] | None)
    if given is None:
        return None
    pair = tuple(given) if isinstance(given, tuple) else (given,)
    check(len(pair) in (1, 2), f"{name} {pair}", "one side of a square, or width and height")
    check(all(1 <= side <= MOST_SIDE for side in pair), f"{name} {written(pair)}", f"sides from 1 to {MOST_SIDE} pixels")
    return pair[0], pair[-1]


def written(pair: tuple[int, ...]) -> str:
    """(832, 1216) -> "832x1216"; (768, 768) -> "768"."""
    return str(pair[0]) if pair[0] == pair[-1] else "x".join(map(str, pair))


# --- types -----------------------------------------------------------------------------------------------------------

MOST = 2**63  # whole numbers are below it, as PyTorch's are
NEEDED: dict[Any, str] = {
    int: "a whole number",
    float: "a number",
    bool: "True or False",
    str: "a string",
    Path: "a path",
    NoneType: "None",
    Mapping: "a mapping",
    Mapping[str, float]: "a mapping of names to numbers",
    Callable: "a function",
}


def check_types(settings: Any) -> None:
    """Give each field of a frozen dataclass the type that it is declared with, by `typed`. Raises SettingsError."""
    declared: Any = type(settings)
    for name, kind in hints(declared).items():
        object.__setattr__(settings, name, typed(name, getattr(settings, name), kind))


hints = cache(get_type_hints)


def typed(name: str, value: Any, kind: Any) -> Any:
    """`value` as a `kind`: int, float, bool, str, Path, a class, Literal["a", "b"], tuple[str, ...],
    Mapping[str, float] or a union of these.

    Whole floats become ints, ints floats, lists tuples, a single string a tuple of one, strings paths. Raises SettingsError.
    """
    kinds = get_args(kind) if get_origin(kind) in (Union, UnionType) else (kind,)
    for one in kinds:
        found = as_type(value, one)
        if found is not None or (value is None and one is NoneType):
            return found
    try:
        text = shown(repr(os.fspath(value) if isinstance(value, os.PathLike) else value))
    except ValueError:  # more digits than Python prints
        text = "with thousands of digits"
    text = text if len(text) <= 80 else f"{text[:40]}...{text[-37:]}"
    if Path in kinds and isinstance(value, str | os.PathLike):
        text += " has a null byte, or a ~ although you have no home folder"
    raise SettingsError(f"{named(name)} {text}; needed: {' or '.join(map(needed, kinds))}")


def as_type(value: Any, kind: Any) -> Any:
    """None for a value that cannot be taken for this kind."""
    number = isinstance(value, Real) and not isinstance(value, bool) and value == value
    if get_origin(kind) is Literal:
        return value if isinstance(value, str) and value in get_args(kind) else None
    if get_origin(kind) is tuple:
        several = value if isinstance(value, list | tuple) else [value]
        found = [as_type(one, get_args(kind)[0]) for one in several]
        return None if None in found else tuple(found)
    if get_origin(kind) is Mapping:
        values = isinstance(value, Mapping) and {key: as_type(one, get_args(kind)[1]) for key, one in value.items()}
        return None if values is False or None in values.values() else values
    if kind is int:
        return int(value) if number and abs(value) < MOST and value == int(value) else None
    if kind is float:
        return float(value) if number and (abs(value) < sys.float_info.max or abs(value) == math.inf) else None
    if kind is Path:
        named = isinstance(value, str | os.PathLike) and "\0" not in os.fsdecode(value)
        path = Path(os.path.expanduser(value)) if named else None
        return None if path is None or path.parts[:1] == ("~",) else path  # "~" stays for a user without a home folder
    return value if isinstance(value, kind) else None


def needed(kind: Any) -> str:
    if get_origin(kind) is Literal:
        return " or ".join(map(repr, get_args(kind)))
    if get_origin(kind) is tuple:
        return f"a tuple of {needed(get_args(kind)[0]).removeprefix('a ')}s"
    return NEEDED.get(kind) or str(kind.__name__)
