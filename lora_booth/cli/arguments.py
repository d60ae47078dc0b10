"""What options and arguments hold: adapters with weights, seeds, regions; and the base that is meant without `--base`."""

from __future__ import annotations

import math
import os
import re
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from ..base.families import is_hub_id
from ..cache import key_of, read_entry, write_entry
from ..errors import SettingsError, shown
from ..files import check_writable

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..base.base_model import BaseModel

    Named = Sequence[tuple[str, tuple[Adapter, float]]]  # file name without its ending; adapter and weight

MOST_SEEDS = 10_000  # chosen
KIND = "bases"  # of cache entries


def check_adapter_file(out: Path) -> None:
    """As `check_place`."""
    if out.suffix != ".safetensors":
        stem = out.with_suffix("") if out.suffix[1:].isalpha() else out  # of rex.png, but not of rex-v1.5
        raise SettingsError(f"{out}: adapters are written as .safetensors; pass --out {stem}.safetensors")
    if out.is_dir():
        raise SettingsError(f"{out}: is a folder; pass --out a file name")
    check_place(out)


def check_place(file: Path, option: str = "--out") -> None:
    """Raise SettingsError if the file that an option names cannot be written: called before the work, not after it."""
    check_written(file, file, option)


def check_folder(folder: Path, option: str = "--out") -> None:
    """The same for a folder that gets files."""
    if folder.exists() and not folder.is_dir():
        raise SettingsError(f"{folder}: is a file; pass {option} a folder")
    check_written(folder, folder / "file", option)


def check_written(named: Path, file: Path, option: str) -> None:
    try:
        check_writable(file)
    except OSError as error:
        raise SettingsError(f"{named}: cannot be written ({error.strerror}); pass {option} another place") from error


def file_and_weight(text: str) -> tuple[Path, float | None]:
    """ "ink.safetensors:0.6" -> path and weight; without a weight None, for the one that the adapter's card suggests."""
    path, colon, weight = text.rpartition(":")
    drive = len(path) == 1 and weight[:1] in ("\\", "/")  # C:\ink.safetensors
    if not colon or drive or Path(text).exists():
        return Path(text), None
    try:
        number = float(weight)
    except ValueError:
        number = math.nan
    if not path or not math.isfinite(number):
        raise SettingsError(f"{text}: {weight!r} is not a weight; write FILE:WEIGHT, e.g. ink.safetensors:0.6")
    return Path(path), number


def by_file(texts: Sequence[str]) -> Named:
    """The adapters of FILE or FILE:WEIGHT arguments, with their file's name (for `--region`) and weight."""
    from ..adapters.adapter import Adapter

    files = [file_and_weight(text) for text in texts]
    loaded = [(path.stem, Adapter.load(path), weight) for path, weight in files]
    return [(name, (adapter, adapter.card.weight if weight is None else weight)) for name, adapter, weight in loaded]


TAG = re.compile(r"\s*<lora:([^<>:]+)(?::([^<>]*))?>", re.IGNORECASE)


def with_tags(texts: Sequence[str] | None, prompts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Adapter arguments with those that the prompts name as <lora:ink:0.6>, and the prompts without such tags.

    A tag names the file of an argument, or one beside it or in the current folder. Its weight replaces the argument's.
    """
    tags = [{name.strip(): weight for name, weight in TAG.findall(prompt)} for prompt in prompts]
    if any(found != tags[0] for found in tags):
        raise SettingsError("the prompts have different <lora:...> tags; draw them one by one, or pass the adapters' files")
    chosen = list(texts or ())
    for name, weight in tags[0].items():
        files = [file_and_weight(text)[0] for text in chosen]
        beside = [folder / f"{name}.safetensors" for folder in dict.fromkeys([*(file.parent for file in files), Path()])]
        file = next((one for one in [*(one for one in files if one.stem == name), *beside] if one.exists()), None)
        if file is None:
            places = ", ".join(str(one) for one in beside)
            raise SettingsError(f"<lora:{name}> names no adapter file ({places}); pass its file")
        place = files.index(file) if file in files else len(files)
        if weight or file not in files:
            chosen[place : place + 1] = [f"{file}:{weight}" if weight else str(file)]
    if not chosen:
        raise SettingsError("no adapter; pass its file, or name it in the prompt, e.g. <lora:rex:0.8>")
    return chosen, [TAG.sub("", prompt).strip() for prompt in prompts]


def weighted(texts: Sequence[str]) -> list[tuple[Adapter, float]]:
    return [item for _, item in by_file(texts)]


def parse_seeds(text: str) -> list[int]:
    """ "0-3" or "1,5,8" -> seeds, each once."""
    seeds: dict[int, None] = {}
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last) + 1) if dash else range(int(first), int(first) + 1)
            if not 0 < len(span) <= MOST_SEEDS or len(seeds) + len(span) > MOST_SEEDS:
                raise SettingsError(f"seeds {text!r} are {len(span)} pictures; allowed: 1 to {MOST_SEEDS}, e.g. 0-3")
            seeds.update(dict.fromkeys(span))
    except (ValueError, OverflowError):
        raise SettingsError(f"seeds {text!r} cannot be read; write them like 0-3 or 1,5,8") from None
    return list(seeds)


def parse_weights(text: str) -> list[float]:
    """ "0,0.4,1" -> factors."""
    try:
        weights = [float(part) for part in text.split(",")]
    except ValueError:
        weights = [math.nan]
    if not all(map(math.isfinite, weights)):
        raise SettingsError(f"weights {text!r} cannot be read; write them like 0,0.4,0.8,1")
    return weights


def region_words(text: str) -> tuple[str, tuple[float, float, float, float], str | None]:
    """ "rex:0,0,0.5,1:a dog" -> name, box, prompt; without a prompt None."""
    name, _, rest = text.partition(":")
    numbers, colon, prompt = rest.partition(":")
    try:
        x0, y0, x1, y1 = (float(number) for number in numbers.split(","))
    except ValueError:
        raise SettingsError(f"region {text!r} cannot be read; write it like NAME:0,0,0.5,1 or NAME:0,0,0.5,1:PROMPT") from None
    return name, (x0, y0, x1, y1), prompt.strip('"') if colon else None


# --- the base that adapters were made for, as far as this machine has it -----------------------------------------------

# A card names its base, and holds no path. So `train` remembers in the cache where a local base lies, by its fingerprint.
# Nothing is downloaded because an adapter's file says so.


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
