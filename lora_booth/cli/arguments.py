"""Options that commands share, and parsers for adapters with weights, seeds, regions and bases."""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..errors import SettingsError

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..base.base_model import BaseModel
    from ..pictures.composition import Composition

Adapters = Annotated[list[str], typer.Argument(help="adapter files, each with an optional weight, e.g. ink.safetensors:0.6")]
Prompt = Annotated[str | None, typer.Option(help='what to draw, e.g. "a photo of sks dog at sea", with the adapter\'s token')]
Prompts = Annotated[Path | None, typer.Option(help="instead of --prompt: a text file, one prompt a line, e.g. prompts.txt")]
PromptSet = Annotated[
    str | None, typer.Option(help="instead of --prompt: the DreamBooth paper's 25, object (things) or live (animals)")
]
Contexts = Annotated[
    list[str] | None, typer.Option(help='what {context} in a prompt stands for, e.g. "in the snow"; repeat for several')
]
NegativePrompt = Annotated[str | None, typer.Option(help='what to avoid, e.g. "blurry, text"')]
Steps = Annotated[int, typer.Option(help="denoising steps; 20 to 50 is usual")]
Guidance = Annotated[float, typer.Option(help="guidance scale: how closely to follow the prompt; 4 to 8 is usual")]
Size = Annotated[int | None, typer.Option(help="side in pixels, e.g. 768 [the base's own]")]
BatchSize = Annotated[int, typer.Option(help="pictures at a time, e.g. 4: faster, but takes more memory")]
Method = Annotated[str | None, typer.Option(help="how adapters combine: sum or regions [regions for several subjects]")]
Places = Annotated[
    list[str] | None,
    typer.Option(
        help="where an adapter is active, and optionally a prompt, e.g. rex:0,0,0.5,1 or 'rex:0,0,0.5,1:sks dog'; "
        "repeat for several"
    ),
]
AutoRegions = Annotated[bool, typer.Option(help="find the place of each subject that the prompt names")]
Quantize = Annotated[str | None, typer.Option(help="nf4 loads the U-Net in 4 bits (bitsandbytes): less memory, less exact")]
Isolate = Annotated[str, typer.Option(help="how regions are kept apart: noise (a pass for each) or delta (about one pass)")]


def load_base(source: str, *, exact: bool = False, quantize: str | None = None) -> BaseModel:
    """The base of a command. exact: in fp32 on the CPU, to add and subtract weights."""
    import torch

    from ..base.base_model import BaseModel

    if exact:
        return BaseModel.load(source, dtype=torch.float32, device="cpu")
    return BaseModel.load(source, quantize=quantize)  # type: ignore[arg-type]  # checked by it


def check_layout(layout: str) -> None:
    if layout not in ("kohya", "peft"):
        raise SettingsError(f"layout {layout!r} is unknown; allowed: kohya, peft")


def check_dtype(dtype: str) -> None:
    if dtype not in ("fp16", "bf16", "fp32"):
        raise SettingsError(f"dtype {dtype!r} is unknown; allowed: fp16, bf16, fp32")


def check_adapter_file(out: Path) -> None:
    """Called before the work, not after it."""
    if out.suffix.lower() != ".safetensors":
        raise SettingsError(f"{out}: adapters are written as .safetensors; pass --out {out.name}.safetensors")
    if out.is_dir():
        raise SettingsError(f"{out}: is a folder; pass --out a file name")


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


def weighted(texts: list[str]) -> list[tuple[Adapter, float]]:
    """The adapters of FILE or FILE:WEIGHT arguments, with their weights."""
    from ..adapters.adapter import Adapter

    files = [file_and_weight(text) for text in texts]
    loaded = [(Adapter.load(path), weight) for path, weight in files]
    return [(adapter, adapter.card.weight if weight is None else weight) for adapter, weight in loaded]


def prompts_asked_for(prompt: str | None, file: Path | None, prompt_set: str | None) -> Sequence[str]:
    """The one prompt, those of the file, or a known set; with their placeholders."""
    from ..pictures.prompts import PROMPT_SETS, read_prompts

    if sum(given is not None for given in (prompt, file, prompt_set)) != 1:
        raise SettingsError("which prompts? pass exactly one of --prompt TEXT, --prompts FILE and --prompt-set object or live")
    if prompt_set is not None:
        if prompt_set not in PROMPT_SETS:
            raise SettingsError(f"prompt set {prompt_set!r} is unknown; allowed: {', '.join(PROMPT_SETS)}")
        return PROMPT_SETS[prompt_set]
    return [prompt] if prompt is not None else read_prompts(file or "")


def by_file(texts: list[str]) -> list[tuple[str, tuple[Adapter, float]]]:
    """The same, each with its file's name, which `--region` uses."""
    return list(zip([file_and_weight(text)[0].stem for text in texts], weighted(texts), strict=True))


def composition_of(
    adapters: Sequence[tuple[str, tuple[Adapter, float]]],
    base: str,
    *,
    method: str | None,
    region: Sequence[str] | None = None,
    auto_regions: bool = False,
    isolate: str = "noise",
    quantize: str | None = None,
) -> Composition:
    """The composition of a command; everything else is checked before the base is loaded."""
    from ..pictures.composition import Composition
    from ..pictures.regions import Region

    if region and auto_regions:
        raise SettingsError("--region and --auto-regions exclude each other; pass one of them")
    names = [name for name, _ in adapters]
    if region and len(set(names)) < len(names):
        raise SettingsError("two adapter files have the same name; rename one, so that --region can name either")
    places: dict[str, Region] = {}
    for text in region or []:
        name, box, words = region_words(text)
        if name not in names:
            raise SettingsError(f"region {text!r}: no adapter {name!r}; use one of: {', '.join(names)}")
        adapter, weight = dict(adapters)[name]
        places[name] = Region(adapter, box=box, prompt=words, weight=weight)
    return Composition(
        load_base(base, quantize=quantize),
        [item for name, item in adapters if name not in places],
        method=method,  # type: ignore[arg-type]  # checked by Composition
        regions="auto" if auto_regions else list(places.values()) or None,
        isolate=isolate,  # type: ignore[arg-type]
    )


MOST_SEEDS = 10_000  # chosen


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
        weights = []
    if not weights or not all(math.isfinite(weight) for weight in weights):
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
