"""The command and the Python lines that draw a picture again, safe to paste into a shell whatever its prompt holds."""

from __future__ import annotations

import re
import shlex

from ..adapters.contents import file_stem
from .making import Making
from .picture import Picture

PLAIN = re.compile(r"[A-Za-z0-9_@%+=:,./-]+")  # needs no quotes in any shell
DOUBLE = re.compile(r"[^\"$`\\!%“”„]*")  # means the same between double quotes in any shell; PowerShell ends a string at “


def command_of(picture: Picture) -> str | None:
    """`lora-booth generate ...`; None where the command line cannot say it.

    Neither is a command given whose words hold control characters: pasted into a terminal, those are keys.
    """
    making = making_known(picture)
    if making is None or not picture.adapters:
        return None
    words = ["lora-booth", "generate"]
    files = [file_name(stem) for stem in making.files]
    words += [f"{file}:{number(weight)}" for file, (_, weight) in zip(files, picture.adapters, strict=True)]
    words += ["--base", picture.base, "--prompt", picture.prompt, "--seeds", str(picture.seed)]
    words += ["--steps", str(picture.steps), "--guidance", number(picture.guidance), *size_words(picture)]
    if picture.negative_prompt is not None:
        words += ["--negative-prompt", picture.negative_prompt]
    if making.method == "regions":
        placed = making.files[len(making.files) - len(making.boxes) :]
        if (
            making.background is not None
            or making.start != (0.3 if making.auto else 0.0)
            or len(set(making.files)) < len(files)
        ):
            return None
        if any(feather != 0.04 for feather in making.feathers) or any(":" in stem for stem in placed):
            return None
        for stem, (box, prompt) in zip(placed, making.boxes, strict=True):
            words += ["--region", f"{stem}:{','.join(map(number, box))}" + ("" if prompt is None else f":{prompt}")]
        words += ["--auto-regions"] * making.auto + (["--isolate", making.isolate] if making.isolate != "noise" else [])
    elif making.method != "sum":
        words += ["--method", making.method]
    return " ".join(map(quoted, words)) if all(word.isprintable() for word in words) else None


def python_of(picture: Picture) -> str | None:
    """The same in Python, ASCII but for printable letters; None where a few lines cannot say it."""
    making = making_known(picture)
    if making is None:
        return None
    loaded = [
        (f"lb.Adapter.load({file_name(stem)!r})", number(weight))
        for stem, (_, weight) in zip(making.files, picture.adapters, strict=True)
    ]
    everywhere = loaded[: len(loaded) - len(making.boxes)]
    arguments = ["base", f"[{', '.join(f'({adapter}, {weight})' for adapter, weight in everywhere)}]"]
    if making.boxes:
        placed = zip(loaded[len(everywhere) :], making.boxes, making.feathers, strict=True)
        regions = [
            f"lb.Region({adapter}, box={box}, prompt={prompt!r}, weight={weight}, feather={number(feather)})"
            for (adapter, weight), (box, prompt), feather in placed
        ]
        arguments.append(f"regions=[{', '.join(regions)}]")
    if making.auto:
        arguments.append('regions="auto"')
    if making.method == "regions":
        arguments += [f"isolate={making.isolate!r}", f"start={number(making.start)}", f"background={making.background!r}"]
    elif making.method != "sum":
        arguments.append(f"method={making.method!r}")
    settings = [f"seeds=[{picture.seed}]", f"steps={picture.steps}", f"guidance={number(picture.guidance)}"]
    if size_words(picture):
        settings.append(f"size={picture.image.width}")
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


def making_known(picture: Picture) -> Making | None:
    """None for what no pipeline drew, and for what only a recipe can say."""
    if not (picture.steps and picture.base):
        return None
    making = picture.making or Making(files=tuple(file_stem(name) for name, _ in picture.adapters))
    return making if making.beyond is None and len(making.files) == len(picture.adapters) else None


def file_name(stem: str) -> str:
    return f"{'./' if stem.startswith('-') else ''}{stem}.safetensors"


def size_words(picture: Picture) -> list[str]:
    width, height = picture.image.size
    return ["--size", str(width)] if width == height and width % 8 == 0 else []


def number(value: float) -> str:
    """As short as it can be without another value: 1, 0.6."""
    return repr(float(value)).removesuffix(".0")


def quoted(word: str) -> str:
    if PLAIN.fullmatch(word):
        return word
    return f'"{word}"' if DOUBLE.fullmatch(word) else shlex.quote(word)
