"""Which base a command takes when `--base` is left out: the one that its adapters were made for, as far as this machine has it.

A card names its base, and holds no path. So `train` remembers in the cache where a local base lies, by its fingerprint. Nothing
is downloaded because an adapter's file says so.
"""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import TYPE_CHECKING

from ..base.families import is_hub_id
from ..cache import key_of, read_entry, write_entry
from ..errors import SettingsError, shown

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..base.base_model import BaseModel

KIND = "bases"  # of cache entries


def remember(base: BaseModel, source: str) -> None:
    """Where a local base lies, for `base_of`."""
    import torch

    place = os.path.abspath(os.path.expanduser(source))
    if os.path.exists(place) and source != "toybox":
        path = torch.tensor(list(os.fsencode(place)), dtype=torch.uint8)
        write_entry(KIND, key_of(base=base.fingerprint), {"path": path})


def base_of(adapters: Sequence[Adapter]) -> str:
    """What `BaseModel.load` takes. Raises SettingsError where only the user can know."""
    made_for = {adapter.card.base_model: adapter for adapter in adapters}
    found = [place for adapter in adapters if (place := place_of(adapter)) is not None]
    if len(made_for) == 1 and found:
        return found[0]
    names = [(one.stem or one.name, one.card.base_model or "a base it does not name") for one in made_for.values()]
    stated = " and ".join(f"{file}.safetensors was made for {name}" for file, name in names)
    one = adapters[0].card.base_model
    hub = one if len(made_for) == 1 and is_hub_id(one) else None
    remedy = f"pass --base {hub} to download it" if hub else "pass --base FOLDER, FILE or HUB-ID"
    raise SettingsError(f"which base? {shown(stated)}{', which is not on this machine' if hub else ''}; {remedy}")


def place_of(adapter: Adapter) -> str | None:
    from huggingface_hub import try_to_load_from_cache

    card = adapter.card
    entry = read_entry(KIND, key_of(base=card.base_hash))
    if entry is not None and os.path.exists(path := os.fsdecode(bytes(entry["path"].tolist()))):
        return path
    cached = is_hub_id(card.base_model) and isinstance(try_to_load_from_cache(str(card.base_model), "model_index.json"), str)
    return card.base_model if cached or card.base_model == "toybox" else None
