"""Picture: one generated picture, how it was made and saved, and the command and Python lines that draw it again."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from PIL import Image

from ..adapters.contents import file_stem
from ..base.ai_mark import save_picture
from ..config import typed, written
from .regions import FEATHER, Region

AUTO_START = 0.3  # share of the steps whose attention is read for automatic regions; chosen on the toybox
# words that are the same to bash, zsh, cmd and PowerShell
PLAIN = re.compile(r"[A-Za-z0-9_+:./-]+")
QUOTED = re.compile(r"[^\"$`\\!%“”„]+")  # between double quotes; PowerShell ends a string at “


@dataclass(frozen=True)
class Making:
    """What it takes to draw a picture again, beyond the fields of Picture."""

    files: tuple[str, ...] = ()  # of the picture's adapters, in their order; without folders, which may contain people's names
    method: str = "sum"
    regions: Sequence[Region] | Literal["auto"] = ()  # of the last adapters
    start: float = 0.0
    background: str | None = None
    recipe_only: str | None = None  # what only a recipe can express, e.g. "a mask"
    photo: bool = False  # drawn into a photo, which nothing records
    compel: str | None = None  # its version, if it encoded the prompts


@dataclass(frozen=True)
class Picture:
    """One picture and how it was made."""

    image: Image.Image
    prompt: str
    seed: int
    adapters: tuple[tuple[str, float], ...] = ()  # name, weight
    base: str = ""
    negative_prompt: str | None = None
    steps: int = 0  # denoising steps
    guidance: float = 0.0
    making: Making | None = None  # None: unknown
    sampler: str | None = None  # None: the base's own

    def _repr_png_(self) -> bytes | None:
        """What a notebook shows."""
        return self.image._repr_png_()

    def save(self, path: str | Path) -> Path:
        """Save as PNG, JPEG or WebP by the path's ending, with an IPTC mark that a model made it and no other metadata."""
        return save_picture(self.image, typed("path", path, Path))


def command_of(picture: Picture) -> str | None:
    """`lora-booth generate ...`; None if the command line cannot express the picture.

    Also None if an argument cannot be quoted in a way that all shells read alike, or has control characters: pasted into a
    terminal, those act as keys.
    """
    making = known_making(picture)
    if making is None or not picture.adapters:
        return None
    words = ["lora-booth", "generate"]
    words += [f"{file_name(stem)}:{number(w)}" for stem, (_, w) in zip(making.files, picture.adapters, strict=True)]
    words += ["--base", picture.base, "--prompt", picture.prompt, "--seeds", str(picture.seed)]
    for name, value in settings_of(picture).items():
        text = written(value) if isinstance(value, tuple) else number(value) if isinstance(value, float) else str(value)
        words += [f"--{name.replace('_', '-')}", text]
    auto = making.regions == "auto"
    if making.method == "regions":
        regions = [] if isinstance(making.regions, str) else making.regions
        files = making.files[len(making.files) - len(regions) :]
        if making.background is not None or making.start != (AUTO_START if auto else 0.0):
            return None  # there are no options for these
        if len(set(making.files)) < len(making.files) or any(":" in stem for stem in files):
            return None  # `--region` could not name the adapter
        for stem, region in zip(files, regions, strict=True):
            if region.box is None or region.feather != FEATHER:
                return None
            prompt = "" if region.prompt is None else f":{region.prompt}"
            words += ["--region", f"{stem}:{','.join(map(number, region.box))}{prompt}"]
        words += ["--auto-regions"] * auto
    elif len(making.files) > 1:  # several subjects would get regions
        words += ["--method", making.method]
    if not all(word.isprintable() and QUOTED.fullmatch(word) for word in words):
        return None
    return " ".join(word if PLAIN.fullmatch(word) else f'"{word}"' for word in words)


def python_of(picture: Picture) -> str | None:
    """The same in Python, with escapes for unprintable characters; None if a few lines cannot express the picture."""
    making = known_making(picture)
    if making is None:
        return None
    regions = [] if isinstance(making.regions, str) else making.regions
    loaded = [
        (f"lb.Adapter.load({file_name(stem)!r})", number(weight))
        for stem, (_, weight) in zip(making.files, picture.adapters, strict=True)
    ]
    everywhere = loaded[: len(loaded) - len(regions)]
    arguments = ["base", f"[{', '.join(f'({adapter}, {weight})' for adapter, weight in everywhere)}]"]
    if making.method == "regions":
        places = [
            f"lb.Region({adapter}, box={one.box}, prompt={one.prompt!r}, weight={weight}, feather={number(one.feather)})"
            for (adapter, weight), one in zip(loaded[len(everywhere) :], regions, strict=True)
        ]
        arguments.append(f"regions=[{', '.join(places)}]" if places else 'regions="auto"')
        arguments += [f"start={number(making.start)}", f"background={making.background!r}"]
    else:
        arguments.append(f"method={making.method!r}")
    settings = [f"seeds=[{picture.seed}]", *(f"{name}={value!r}" for name, value in settings_of(picture).items())]
    return (
        "import lora_booth as lb\n\n"
        f"base = lb.BaseModel.load({picture.base!r})\n"
        f"studio = lb.Composition({', '.join(arguments)})\n"
        f"[picture] = studio.generate({picture.prompt!r}, {', '.join(settings)})"
    )


def known_making(picture: Picture) -> Making | None:
    """None for what no pipeline drew, and for what only a recipe can express, or nothing can."""
    if not (picture.steps and picture.base):
        return None
    making = picture.making or Making(files=tuple(file_stem(name) for name, _ in picture.adapters))
    known = making.recipe_only is None and not making.photo and len(making.files) == len(picture.adapters)
    return making if known else None


def settings_of(picture: Picture) -> dict[str, Any]:
    """Arguments of `generate` and options of the command; without a size that `generate` would not draw."""
    width, height = picture.image.size
    size = None if width % 8 or height % 8 else width if width == height else (width, height)
    given = {
        "steps": picture.steps,
        "guidance": float(picture.guidance),
        "size": size,
        "sampler": picture.sampler,
        "negative_prompt": picture.negative_prompt,
    }
    return {name: value for name, value in given.items() if value is not None}


def file_name(stem: str) -> str:
    return f"{'./' if stem.startswith('-') else ''}{stem}.safetensors"


def number(value: float) -> str:
    """The shortest text of exactly this value: 1, 0.6."""
    return repr(float(value)).removesuffix(".0")
