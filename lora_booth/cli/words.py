"""What words on the command line mean: files with weights, seeds, bases."""

from __future__ import annotations

import math
from pathlib import Path
from typing import TYPE_CHECKING

from ..errors import SettingsError

if TYPE_CHECKING:
    from ..adapters import Adapter
    from ..base_model import BaseModel


def load_base(source: str, *, exact: bool = False) -> BaseModel:
    """Without the bars that diffusers and transformers show while loading; those of a download stay.

    exact: in fp32 on the CPU, for sums and differences of weights
    """
    import torch
    from diffusers.utils.logging import disable_progress_bar as quiet_diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, enable_progress_bars
    from transformers.utils.logging import disable_progress_bar as quiet_transformers

    from ..base_model import BaseModel

    no_bars = are_progress_bars_disabled()
    quiet_diffusers()
    quiet_transformers()  # also turns off the Hub's
    if not no_bars:
        enable_progress_bars()
    return BaseModel.load(source, dtype=torch.float32, device="cpu") if exact else BaseModel.load(source)


def check_layout(layout: str) -> None:
    if layout not in ("kohya", "peft"):
        raise SettingsError(f"layout {layout!r} is unknown; allowed: kohya, peft")


def check_dtype(dtype: str) -> None:
    if dtype not in ("fp16", "bf16", "fp32"):
        raise SettingsError(f"dtype {dtype!r} is unknown; allowed: fp16, bf16, fp32")


def check_adapter_file(out: Path) -> None:
    """Before the work, not after it."""
    if out.suffix.lower() != ".safetensors":
        raise SettingsError(f"{out}: adapters are written as .safetensors; give --out {out.name}.safetensors")
    if out.is_dir():
        raise SettingsError(f"{out}: is a folder; give --out the name of a file")


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
        raise SettingsError(f"{text}: {weight!r} is no weight; write FILE:0.6")
    return Path(path), number


def weighted(texts: list[str]) -> list[tuple[Adapter, float]]:
    """The adapters of such words, with their weights."""
    from ..adapters import Adapter

    files = [file_and_weight(text) for text in texts]
    loaded = [(Adapter.load(path), weight) for path, weight in files]
    return [(adapter, adapter.card.weight if weight is None else weight) for adapter, weight in loaded]


MOST_SEEDS = 10_000


def parse_seeds(text: str) -> list[int]:
    """ "0-3" or "1,5,8" -> seeds, each once."""
    seeds: dict[int, None] = {}
    try:
        for part in text.split(","):
            first, dash, last = part.strip().partition("-")
            span = range(int(first), int(last) + 1) if dash else range(int(first), int(first) + 1)
            if not 0 < len(span) <= MOST_SEEDS or len(seeds) + len(span) > MOST_SEEDS:
                raise SettingsError(f"seeds {text!r} are {len(span)} pictures; allowed: 1 to {MOST_SEEDS}, as 0-3")
            seeds.update(dict.fromkeys(span))
    except (ValueError, OverflowError):
        raise SettingsError(f"seeds {text!r}; write them as 0-3 or 1,5,8") from None
    return list(seeds)


def region_words(text: str) -> tuple[str, tuple[float, float, float, float], str | None]:
    """ "rex:0,0,0.5,1:a dog" -> name, box, prompt; without a prompt None."""
    name, _, rest = text.partition(":")
    numbers, colon, prompt = rest.partition(":")
    try:
        x0, y0, x1, y1 = (float(number) for number in numbers.split(","))
    except ValueError:
        raise SettingsError(f"region {text!r}; write it as NAME:0,0,0.5,1 or NAME:0,0,0.5,1:PROMPT") from None
    return name, (x0, y0, x1, y1), prompt.strip('"') if colon else None
