"""What an adapter is made of: the low-rank factors of each module, the card that describes them, and their limits."""

from __future__ import annotations

import hashlib
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..base.families import is_hub_id
from ..cache import bytes_of
from ..config import check_types
from ..errors import AdapterIncomplete, AdapterNonFinite, AdapterScaleError, AdapterTooLarge, SettingsError, one_line

if TYPE_CHECKING:  # torch takes seconds to import, and this file only calls methods of its tensors
    from torch import Tensor

    from ..base.base_model import BaseModel

Layout = Literal["kohya", "peft"]
Dtype = Literal["fp16", "bf16", "fp32"]

FamilyName = Literal["sd1", "sd2", "sdxl"]  # the keys of FAMILIES
Consent = Literal["not stated", "self", "consenting person", "object", "own art", "licensed art"]


@dataclass(frozen=True, eq=False)
class LoraFactors:
    """The change of one module: weight + alpha / rank * up @ down."""

    down: Tensor  # (r, in), or (r, in, kh, kw) for a convolution
    up: Tensor  # (out, r), or (out, r, 1, 1)
    alpha: float

    @property
    def rank(self) -> int:
        return int(self.down.shape[0])

    @property
    def scale(self) -> float:
        return self.alpha / self.rank

    def __repr__(self) -> str:
        return f"LoraFactors(rank {self.rank}, alpha {self.alpha:g}, {tuple(self.down.shape)} and {tuple(self.up.shape)})"

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight that is changed: (out, in) or (out, in, kh, kw)."""
        return (int(self.up.shape[0]), *self.down.shape[1:])

    def fitted(self, shape: tuple[int, ...]) -> LoraFactors | None:
        """The same change for a weight of `shape`; None if it does not fit. The 1x1 convolutions of some tools are linear
        layers of others (proj_in of SD 2.x): the same numbers."""
        if self.shape == shape:
            return self
        if self.shape[:2] != shape[:2] or {*self.shape[2:], *shape[2:]} != {1}:
            return None
        down, up = (factor.reshape(*factor.shape[:2], *shape[2:]) for factor in (self.down, self.up))
        return replace(self, down=down, up=up)

    def delta(self) -> Tensor:
        """The change of the weight, float32: (out, in) or (out, in, kh, kw)."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.scale).reshape(self.shape)


@dataclass(frozen=True)
class Card:
    """What an adapter says about itself. Nothing private: no path, no caption, no photo metadata. None: unknown.

    Raises SettingsError for a value that does not fit its fact.
    """

    family: FamilyName | None = None
    prediction_type: Literal["epsilon", "v_prediction"] | None = None
    base_model: str | None = None  # a Hub id or a name; a path is cut to its last part
    base_hash: str | None = None
    resolution: int | None = None  # pixels
    token: str | None = None
    class_noun: str | None = None
    prompt: str | None = None  # a suggestion
    weight: float = 1.0  # a suggestion
    rank: int | None = None
    alpha: float | None = None
    steps: int | None = None  # optimizer updates
    photos: int | None = None  # how many
    library_version: str | None = None
    init: str | None = None  # digest of the adapter that training began with; None: with a new one
    title: str | None = None
    description: str | None = None
    author: str | None = None
    license: str | None = None
    tags: str | None = None  # e.g. "dog, pet"; None: the class noun
    date: str | None = None  # ISO 8601; never set by itself, since equal adapters give equal bytes
    consent: Consent = "not stated"  # a declaration, not a proof

    def __post_init__(self) -> None:
        check_types(self)
        try:
            datetime.fromisoformat(self.date or "2026-07-01")
        except ValueError:
            raise SettingsError(f"date {self.date!r}; write it as 2026-07-01") from None
        if self.base_model is not None and not is_hub_id(self.base_model):  # a path holds people's names
            object.__setattr__(self, "base_model", self.base_model.replace("\\", "/").rstrip("/").rpartition("/")[2])

    @property
    def words(self) -> str:
        """What stands for the subject in a prompt: token and class noun."""
        return " ".join(filter(None, (self.token, self.class_noun)))


# --- text that may come from an untrusted file ----------------------------------------------------------------------


def quoted(text: str) -> str:
    """A string literal of Python and of JSON."""
    return json.dumps(one_line(text), ensure_ascii=False)


def ways(adapter: AdapterContents, file: str, source: str, *, new_name: str = "") -> Iterator[tuple[str, str, str]]:
    """How to use a file with kohya's names: program, sentence (none for diffusers), and what to write there.

    source    what diffusers' load_lora_weights gets: a Hub id or a folder
    new_name  the file's name in the folders of the other programs; "": as it is
    """
    card, weight, name = adapter.card, f"{adapter.card.weight:g}", file_stem(adapter.name)
    prompt, base = one_line(card.prompt or card.words or "a photo"), quoted(card.base_model or "the base")
    if is_hub_id(card.base_model):
        load = f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({base})"
    else:
        load = f"import lora_booth as lb\n\npipe = lb.BaseModel.load({base}).pipeline  # or where you have this base"
    lines = (
        load,
        f"pipe.load_lora_weights({quoted(source)}, weight_name={quoted(file)}, adapter_name={quoted(name)})",
        f"pipe.set_adapters({quoted(name)}, {weight})",
        f"image = pipe({quoted(prompt)}).images[0]",
    )
    yield "diffusers", "", "\n".join(lines)
    put = f"Put {file} into models/{{}}/{f' as {new_name}' if new_name else ''}"
    node = f"add a Load LoRA node between the checkpoint and the prompts, set both strengths to {weight}"
    yield "ComfyUI", f"{put.format('loras')}, {node}, and write", prompt
    stem = (new_name or file).removesuffix(".safetensors")
    yield "A1111", f"{put.format('Lora')} and write", f"{prompt} <lora:{stem}:{weight}>"


def file_stem(name: str) -> str:
    """Turn `name` into something valid in file names, module names and A1111's <lora:…>: letters, digits, - and _, up to 60."""
    plain = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "_" for c in name)
    return "_".join(filter(None, plain.split("_")))[:60] or "adapter"


@dataclass(frozen=True, eq=False)
class AdapterContents:
    """What an adapter's file holds; `Adapter` adds how it is loaded, saved and shared."""

    modules: Mapping[str, LoraFactors]  # canonical module path (`unet.down_blocks.0...to_q`) -> factors
    card: Card = field(default_factory=Card)
    stem: str = ""  # of the file it came from
    thumbnail: str | None = None  # for the file: a small picture as a data URL; `load` does not read one

    def __repr__(self) -> str:
        ranks = "/".join(map(str, sorted({factors.rank for factors in self.modules.values()})))
        base = self.card.base_model or self.card.family or "an unknown base"
        return f"Adapter({self.name!r} for {base}: rank {ranks}, {len(self.modules)} modules, {self.nbytes / 1e6:.1f} MB)"

    @property
    def name(self) -> str:
        return self.card.title or self.card.token or self.stem or "adapter"

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for f in self.modules.values() for t in (f.down, f.up))

    def digest(self) -> str:
        """sha256 of the factors in canonical order, whatever the card says and the file calls them."""
        sha = hashlib.sha256()
        for name in sorted(self.modules):
            factors = self.modules[name]
            sha.update(f"{name} {factors.alpha!r}\n".encode())
            for tensor in (factors.down, factors.up):
                sha.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
                sha.update(bytes_of(tensor))
        return sha.hexdigest()


# --- the limits of every adapter, yours or an untrusted file's ------------------------------------------------------

# chosen: well above what training gives
MAX_RANK = 512
MAX_SCALE = 16.0  # of alpha / rank
MAX_VALUE = 1e4  # of a factor's elements


def check_shapes(module: str, down: tuple[int, ...], up: tuple[int, ...], path: Path | None) -> None:
    """Raise unless the two factors fit together and their rank is allowed."""
    fit = len(down) in (2, 4) and len(up) in (2, 4) and down[0] == up[1] and up[2:] in ((), (1, 1))
    # files write 1x1 convolutions as linear layers and vice versa; a larger kernel needs its exact shape
    if not fit or (len(up) != len(down) and down[2:] not in ((), (1, 1))):
        raise AdapterIncomplete(f"{module}: factors {list(down)} and {list(up)} do not fit together", path)
    rank, limit = down[0], min(MAX_RANK, up[0], math.prod(down[1:]))
    if rank > limit:
        raise AdapterTooLarge(f"{module}: rank {rank}; allowed here: {limit}", path)


def check_values(module: str, tensor: Tensor, path: Path | None) -> None:
    low, high = tensor.aminmax()
    if not (low.item() >= -MAX_VALUE and high.item() <= MAX_VALUE):  # NaN compares false
        raise AdapterNonFinite(f"{module}: values from {low.item():g} to {high.item():g}; allowed: +-{MAX_VALUE:g}", path)


def check_scale(module: str, alpha: float, rank: int, path: Path | None) -> None:
    if not math.isfinite(alpha) or abs(alpha / rank) > MAX_SCALE:
        raise AdapterScaleError(f"{module}: alpha {alpha:g} with rank {rank}; allowed: up to {MAX_SCALE:g} x rank", path)


def one_rank(modules: Mapping[str, LoraFactors]) -> int | None:
    """The rank of all modules; None where they differ."""
    ranks = {factors.rank for factors in modules.values()}
    return ranks.pop() if len(ranks) == 1 else None


def card_facts(base: BaseModel) -> dict[str, Any]:
    """What a card says about the base that the adapter is for."""
    return {
        "family": base.family.name,
        "prediction_type": base.prediction_type,
        "base_model": base.name,
        "base_hash": base.fingerprint,
    }
