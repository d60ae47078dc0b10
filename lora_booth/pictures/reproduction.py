"""The command and the Python lines that draw a picture again, safe to paste into a shell whatever the prompt contains."""

from __future__ import annotations

import re

from ..adapters.contents import file_stem
from .picture import Making, Picture, Place, default_start

# the same to bash, zsh, cmd and PowerShell
PLAIN = re.compile(r"[A-Za-z0-9_+:./-]+")
QUOTED = re.compile(r"[^\"$`\\!%“”„]+")  # between double quotes; PowerShell ends a string at “


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
    words += ["--steps", str(picture.steps), "--guidance", number(picture.guidance)]
    if (side := side_of(picture)) is not None:
        words += ["--size", str(side)]
    if picture.negative_prompt is not None:
        words += ["--negative-prompt", picture.negative_prompt]
    if making.method == "regions":
        files = making.files[len(making.files) - len(making.places) :]
        if making.background is not None or making.start != default_start(auto=making.auto):
            return None  # there are no options for these
        if len(set(making.files)) < len(making.files) or any(":" in stem for stem in files):
            return None  # `--region` could not name the adapter
        for stem, place in zip(files, making.places, strict=True):
            if place.box is None or place != Place(place.box, place.prompt):  # a mask, or another feather
                return None
            prompt = "" if place.prompt is None else f":{place.prompt}"
            words += ["--region", f"{stem}:{','.join(map(number, place.box))}{prompt}"]
        words += ["--auto-regions"] * making.auto + ["--isolate", making.isolate] * (making.isolate != Making.isolate)
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
    loaded = [
        (f"lb.Adapter.load({file_name(stem)!r})", number(weight))
        for stem, (_, weight) in zip(making.files, picture.adapters, strict=True)
    ]
    everywhere = loaded[: len(loaded) - len(making.places)]
    arguments = ["base", f"[{', '.join(f'({adapter}, {weight})' for adapter, weight in everywhere)}]"]
    if making.method == "regions":
        regions = [
            f"lb.Region({adapter}, box={place.box}, prompt={place.prompt!r}, weight={weight}, feather={number(place.feather)})"
            for (adapter, weight), place in zip(loaded[len(everywhere) :], making.places, strict=True)
        ]
        arguments.append('regions="auto"' if making.auto else f"regions=[{', '.join(regions)}]")
        arguments += [f"isolate={making.isolate!r}", f"start={number(making.start)}", f"background={making.background!r}"]
    else:
        arguments.append(f"method={making.method!r}")
    settings = [f"seeds=[{picture.seed}]", f"steps={picture.steps}", f"guidance={number(picture.guidance)}"]
    if (side := side_of(picture)) is not None:
        settings.append(f"size={side}")
    if picture.negative_prompt is not None:
        settings.append(f"negative_prompt={picture.negative_prompt!r}")
    return "\n".join(
        [
            "import lora_booth as lb",
            "",
            f"base = lb.BaseModel.load({picture.base!r})",
            f"studio = lb.Composition({', '.join(arguments)})",
            f"[picture] = studio.generate({picture.prompt!r}, {', '.join(settings)})",
        ]
    )


def known_making(picture: Picture) -> Making | None:
    """None for what no pipeline drew, and for what only a recipe can express."""
    if not (picture.steps and picture.base):
        return None
    making = picture.making or Making(files=tuple(file_stem(name) for name, _ in picture.adapters))
    return making if making.recipe_only is None and len(making.files) == len(picture.adapters) else None


def file_name(stem: str) -> str:
    return f"{'./' if stem.startswith('-') else ''}{stem}.safetensors"


def side_of(picture: Picture) -> int | None:
    """The argument `size`; None for a picture that `generate` would not draw."""
    width, height = picture.image.size
    return width if width == height and width % 8 == 0 else None


def number(value: float) -> str:
    """The shortest text of exactly this value: 1, 0.6."""
    return repr(float(value)).removesuffix(".0")
