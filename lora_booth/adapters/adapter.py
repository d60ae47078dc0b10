"""Adapter: the low-rank changes that training found, and how they are loaded, saved and shared."""

from __future__ import annotations

import os
from collections.abc import Collection, Iterable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..config import check, typed
from ..errors import SettingsError, shown
from .contents import AdapterContents, Dtype, Layout

if TYPE_CHECKING:
    from PIL import Image

MOST_WEIGHT = 100.0  # either sign; chosen: 1 is usual, and sliders go to 10


class Adapter(AdapterContents):
    """LoRA factors by canonical module path (`unet.down_blocks.0...to_q`), and a card."""

    @classmethod
    def load(cls, path: str | Path, *, allow: Collection[str] = ()) -> Adapter:
        """Read a .safetensors file, or a folder with one, in any common naming, after checking everything in it.

        allow  modules that adapters rarely change, e.g. ["unet.conv_in"]; others of them are left out with a LeftOutWarning
        Raises a kind of AdapterError that says what is wrong with the file.
        """
        from .reading import load

        found = load(Path(typed("path", path, str | os.PathLike)), allow=allow)
        return cls(found.modules, found.card, found.stem)

    def save(
        self,
        path: str | Path,
        *,
        layout: Layout = "kohya",
        dtype: Dtype = "fp16",
        thumbnail: Image.Image | str | Path | None = None,
    ) -> Path:
        """Write one .safetensors file, completely or not at all. Equal adapters give equal bytes.

        layout     "kohya" for diffusers, ComfyUI, A1111 and sd-scripts; "peft" for diffusers, PEFT and InvokeAI
        dtype      of the factors in the file
        thumbnail  a picture or its path; a small square of it goes into the header, where other programs look for it
        Raises AdapterError, and leaves an existing file alone, if the adapter cannot be written or another program would
        not read all of it.
        """
        from .writing import save

        return save(self._with(thumbnail), typed("path", path, Path), layout=layout, dtype=dtype)

    def save_folder(
        self,
        folder: str | Path,
        *,
        pictures: Sequence[Any] = (),
        layout: Layout = "kohya",
        dtype: Dtype = "fp16",
        thumbnail: Image.Image | str | Path | None = None,
        license: str | None = None,
    ) -> Path:
        """Write a folder for the Hub: the file, sample pictures, and a README.md that explains how to use it.

        pictures  from `Composition.generate`; the page shows them with prompt and seed
        license   e.g. "cc-by-4.0"; None: the card's
        The folder is written completely or not at all. It replaces one from an earlier call in which nothing was changed;
        raises AdapterError if any other folder is in the way.
        """
        from .sharing import save_folder

        return save_folder(self._with(thumbnail, license), typed("folder", folder, Path), pictures, layout=layout, dtype=dtype)

    def push_to_hub(
        self,
        repo_id: str,
        *,
        private: bool = False,
        token: str | None = None,
        pictures: Sequence[Any] = (),
        layout: Layout = "kohya",
        dtype: Dtype = "fp16",
        thumbnail: Image.Image | str | Path | None = None,
        license: str | None = None,
    ) -> str:
        """Upload what `save_folder` writes, creating the repository if needed. Returns its address.

        private  whether a new repository is private
        token    None: the one from `hf auth login`
        Raises AdapterError if the Hub cannot be reached or refuses the upload.
        """
        from .sharing import push_to_hub

        adapter = self._with(thumbnail, license)
        return push_to_hub(adapter, repo_id, pictures, private=private, token=token, layout=layout, dtype=dtype)

    def _with(self, thumbnail: Image.Image | str | Path | None, license: str | None = None) -> Adapter:
        adapter = self if license is None else self.with_card(license=license)
        if thumbnail is None:
            return adapter
        from .sharing import thumbnail_url

        return replace(adapter, thumbnail=thumbnail_url(thumbnail))

    def with_card(self, **facts: Any) -> Adapter:
        """Return the same adapter with other facts on its card, e.g. author=, license=, consent=, tags=, date=.

        Raises SettingsError for an unknown fact or a value that does not fit it.
        """
        known = vars(self.card)
        for name in facts:
            if name not in known:
                raise SettingsError(f"a card has no {name!r}; it has {', '.join(known)}")
        return replace(self, card=replace(self.card, **facts))

    def scaled(self, weight: float) -> Adapter:
        """Return the same adapter with its change multiplied by `weight`."""
        [(_, weight)] = weighted([(self, weight)])
        return replace(self, modules={name: replace(f, alpha=f.alpha * weight) for name, f in self.modules.items()})


def weighted(adapters: Any, kind: Any = float) -> list[tuple[Adapter, Any]]:
    """Adapters and their weights, from what a user passes: one or several, each an Adapter or the path of its file, alone or in
    a pair with a weight. Alone, or with None, it gets the weight of its card.

    kind  of a weight: float, or a union with another class
    Raises SettingsError.
    """
    single, several = AdapterContents | str | Path, isinstance(adapters, Iterable) and not isinstance(adapters, str)
    pair = isinstance(adapters, tuple) and len(adapters) == 2 and isinstance(adapters[0], single)
    if not several or (pair and not isinstance(adapters[1], single | tuple | list)):
        adapters = [adapters]
    found = []
    for item in adapters:
        first, *rest = item if isinstance(item, tuple | list) and item else (item,)
        if not isinstance(first, single) or len(rest) > 1:
            raise SettingsError(f"{shown(repr(item))[:80]} is not an adapter; pass an Adapter or the path of its file")
        adapter = first if isinstance(first, Adapter) else Adapter.load(typed("adapter", first, Path))
        weight = typed("weight", adapter.card.weight if rest in ([], [None]) else rest[0], kind)
        usual = f"from -{MOST_WEIGHT:g} to {MOST_WEIGHT:g}; 0 to 1 is usual"
        check(not isinstance(weight, float) or abs(weight) <= MOST_WEIGHT, f"weight {weight}", usual)
        found.append((adapter, weight))
    return found
