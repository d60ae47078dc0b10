"""Adapter: the low-rank changes that training found, and the card that says what they are."""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from datetime import datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from ..errors import SettingsError

if TYPE_CHECKING:  # torch takes seconds to import, and this file only calls methods of its tensors
    from PIL import Image
    from torch import Tensor

    from ..pictures.picture import Picture

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

    def __repr__(self) -> str:
        return f"LoraFactors(rank {self.rank}, alpha {self.alpha:g}, {tuple(self.down.shape)} and {tuple(self.up.shape)})"

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
    description: str | None = None
    author: str | None = None
    license: str | None = None
    tags: str | None = None  # as "dog, pet"; the class noun if there are none
    date: str | None = None  # ISO 8601; only as given by the user, since equal adapters give equal bytes
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


def file_stem(name: str) -> str:
    """`name` as a file's name, a module's name and A1111's <lora:…> can have it: letters, digits, - and _, up to 60."""
    kept = "".join(c if c.isascii() and (c.isalnum() or c == "-") else "_" for c in name)
    return "_".join(filter(None, kept.split("_")))[:60] or "adapter"


@dataclass(frozen=True, eq=False)
class Adapter:
    """LoRA factors by canonical module path (`unet.down_blocks.0...to_q`), and a card."""

    modules: Mapping[str, LoraFactors]
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

    @classmethod
    def load(cls, path: str | Path, *, allow: Collection[str] = ()) -> Adapter:
        """Read a .safetensors file, or a folder with one, in any common naming, after checking everything in it.

        `allow` names modules that adapters rarely change and that are refused otherwise, as "unet.conv_in".
        """
        from . import reading

        return reading.load(Path(path), allow=allow)

    def save(
        self,
        path: str | Path,
        *,
        layout: Layout = "kohya",
        dtype: Dtype = "fp16",
        thumbnail: Image.Image | str | Path | None = None,
    ) -> Path:
        """Write one .safetensors file, whole or not at all; equal adapters give equal bytes.

        thumbnail  a picture or its file, for the lists of other programs: a small square of its pixels goes into the header
        """
        from . import writing

        adapter = self
        if thumbnail is not None:
            from .sharing import thumbnail_url

            adapter = replace(self, thumbnail=thumbnail_url(thumbnail))
        return writing.save(adapter, Path(path), layout=layout, dtype=dtype)

    def save_folder(
        self,
        folder: str | Path,
        *,
        pictures: Sequence[Picture] = (),
        layout: Layout = "kohya",
        dtype: Dtype = "fp16",
        thumbnail: Image.Image | str | Path | None = None,
        license: str | None = None,
    ) -> Path:
        """Write a folder for the Hub: the file, a README.md that says how to use it, and sample pictures. Whole or not at all.

        pictures  of `Composition.generate`; they are shown with prompt and seed
        license   as "cc-by-4.0"; None: the card's
        A folder from an earlier call is replaced if nothing in it was changed; raises AdapterError for any other that is there.
        """
        from . import sharing

        adapter = self if license is None else self.with_card(license=license)
        return sharing.save_folder(adapter, Path(folder), pictures, layout=layout, dtype=dtype, thumbnail=thumbnail)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        pictures: Sequence[Picture] = (),
        layout: Layout = "kohya",
        dtype: Dtype = "fp16",
        thumbnail: Image.Image | str | Path | None = None,
        license: str | None = None,
    ) -> str:
        """Upload what `save_folder` writes, to a repository that is made if there is none; returns its address.

        private  of a new repository
        token    None: that of `hf auth login`
        Raises AdapterError, with the remedy, where the Hub cannot be reached or does not let you.
        """
        from . import sharing

        adapter = self if license is None else self.with_card(license=license)
        return sharing.push_to_hub(
            adapter, repo_id, pictures, private=private, token=token, layout=layout, dtype=dtype, thumbnail=thumbnail
        )

    def with_card(self, **facts: Any) -> Adapter:
        """The same adapter with other facts on its card, as author=, license=, consent=, tags=, date=.

        Raises SettingsError for a fact that a card does not have, or a value that it cannot be.
        """
        kinds = {f.name: str(f.type) for f in fields(Card)}
        for name, value in facts.items():
            if name not in kinds:
                raise SettingsError(f"a card has no {name!r}; it has {', '.join(kinds)}")
            if kinds[name].startswith("str") and not isinstance(value, str | None):
                raise SettingsError(f"{name} {value!r} is no text")
        if facts.get("date") is not None:
            try:
                datetime.fromisoformat(facts["date"])
            except ValueError:
                raise SettingsError(f"date {facts['date']!r}; write it as 2026-07-01") from None
        return replace(self, card=replace(self.card, **facts))

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
