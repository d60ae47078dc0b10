"""How to use the adapter's file elsewhere: a paragraph or a script for each program."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from ..adapters.adapter import Adapter, file_stem
from ..adapters.model_card import on_hub, one_line, quoted, words
from ..pictures.reproduction import quoted as shell


@dataclass(frozen=True)
class Way:
    program: str
    steps: tuple[str, ...]  # sentences
    code: str


def ways(adapter: Adapter, file: Path, run: Path) -> Iterator[Way]:
    """file: in the run's folder; of that folder only the last name is told."""
    card = adapter.card
    prompt, weight = one_line(card.prompt or words(card) or "a photo"), f"{card.weight:g}"
    base = card.base_model or "the base"
    folder, stem = one_line(run.resolve().name), file_stem(adapter.name)
    name = file.relative_to(run).as_posix()
    copy = f"Copy {name} to {{place}} under a name that says what it is, as {stem}.safetensors."
    load = (
        f"from diffusers import DiffusionPipeline\n\npipe = DiffusionPipeline.from_pretrained({quoted(base)})"
        if on_hub(card.base_model) and card.base_model != "toybox"
        else f"import lora_booth as lb\n\npipe = lb.BaseModel.load({quoted(base)}).pipeline  # or where you have this base"
    )
    yield Way(
        "diffusers",
        (f"From the folder above {folder}:",),
        f"{load}\npipe.load_lora_weights({quoted(folder)}, weight_name={quoted(name)})\n"
        f"image = pipe({quoted(prompt)}).images[0]",
    )
    yield Way(
        "ComfyUI",
        (
            copy.format(place="models/loras/"),
            f"Add a Load LoRA node between the checkpoint and the prompts, both strengths {weight}, and write:",
        ),
        prompt,
    )
    yield Way("A1111", (copy.format(place="models/Lora/"), "Then write:"), f"{prompt} <lora:{stem}:{weight}>")
    source = f"{folder}/{name}"
    yield Way(
        "lora_booth",
        ("More pictures, and the scores of what the run has kept:",),
        f"lora-booth generate {shell(source)} --base {shell(base)} --prompt {shell(prompt + ' in the snow')} --seeds 0-3\n"
        f"lora-booth evaluate {shell(folder)} --base {shell(base)} --photos PHOTOS",
    )
