"""Adapter: the low-rank changes that training found, and the card that says what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Literal

from ..errors import SettingsError

if TYPE_CHECKING:  # torch takes seconds to import, and this file only calls methods of its tensors
    from torch import Tensor

Layout = Literal["kohya", "peft"]
Dtype = Literal["fp16", "bf16", "fp32"]

CONSENT = ("not stated", "self", "consenting person", "object", "own art", "licensed art")


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

    def delta(self) -> Tensor:
        """The change of the weight, float32: (out, in) or (out, in, kh, kw)."""
        product = self.up.float().flatten(1) @ self.down.float().flatten(1)
        return (product * self.scale).reshape(self.up.shape[0], *self.down.shape[1:])


@dataclass(frozen=True)
class Card:
    """What an adapter says of itself. Nothing private: no path, no caption, no photo metadata. None: not known."""

    family: str | None = None  # a key of FAMILIES
    prediction_type: str | None = None  # epsilon or v_prediction
    base_model: str | None = None  # a Hub id or a bare name; of a path only the last part is kept
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
    title: str | None = None
    license: str | None = None
    consent: str = CONSENT[0]  # a declaration, not a proof

    def __post_init__(self) -> None:
        if self.base_model is not None:
            object.__setattr__(self, "base_model", bare_name(self.base_model))
        if self.consent not in CONSENT:
            raise SettingsError(f"consent {self.consent!r} is unknown; allowed: {', '.join(CONSENT)}")


def bare_name(base_model: str) -> str:
    """A Hub id as it is; of anything that can only be a path, the last part, since paths hold people's names."""
    slashed = base_model.replace("\\", "/")
    hub_id = (
        slashed == base_model and slashed.count("/") <= 1 and not slashed.startswith(("/", ".", "~")) and ":" not in slashed
    )
    return base_model if hub_id else slashed.rstrip("/").rsplit("/", 1)[-1]


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA factors by canonical module path (`unet.down_blocks.0...to_q`), and a card."""

    modules: Mapping[str, LoraFactors]
    card: Card = field(default_factory=Card)
    stem: str = ""  # of the file it came from

    @property
    def name(self) -> str:
        return self.card.title or self.card.token or self.stem or "adapter"

    @property
    def nbytes(self) -> int:
        return sum(t.numel() * t.element_size() for f in self.modules.values() for t in (f.down, f.up))

    @classmethod
    def load(cls, path: str | Path, *, allow: Collection[str] = ()) -> Adapter:
        """Read a .safetensors file, or a folder with one, in any common naming, after checking everything in it.

        `allow` names modules that adapters rarely change and that are refused otherwise, as "unet.conv_in".
        """
        from . import reading

        return reading.load(Path(path), allow=allow)

    def save(self, path: str | Path, *, layout: Layout = "kohya", dtype: Dtype = "fp16") -> Path:
        """Write one .safetensors file, whole or not at all; equal adapters give equal bytes."""
        from . import writing

        return writing.save(self, Path(path), layout=layout, dtype=dtype)

    def scaled(self, weight: float) -> Adapter:
        """The same adapter with its change multiplied by `weight`."""
        return replace(self, modules={name: replace(f, alpha=f.alpha * weight) for name, f in self.modules.items()})

    def digest(self) -> str:
        """sha256 over the factors in canonical order; the card and the file's naming do not matter."""
        from .writing import tensor_bytes

        sha = hashlib.sha256()
        for name in sorted(self.modules):
            factors = self.modules[name]
            sha.update(f"{name} {factors.alpha!r}\n".encode())
            for tensor in (factors.down, factors.up):
                sha.update(f"{tensor.dtype} {tuple(tensor.shape)}\n".encode())
                sha.update(tensor_bytes(tensor))
        return sha.hexdigest()
