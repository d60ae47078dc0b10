"""Sample pictures of a training as it goes: the same prompts and seeds every time, and the adapter that drew them."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import torch
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.writing import packed
from ..base.ai_mark import save_marked
from ..base.base_model import BaseModel
from ..base.generation import generate_images
from ..config import TrainingConfig
from ..files import write_file
from ..subject.subject import Subject
from .modes import modes_kept

SAMPLE_LIST = "samples.jsonl"  # a line for each picture: step, prompt, seed, file

Row = tuple[str, int]  # prompt, seed


def rows_of(subject: Subject, config: TrainingConfig) -> list[Row]:
    """What is drawn each time. By default the subject, the subject elsewhere, and the bare class, which shall stay as it is."""
    prompts = config.sample_prompt or (
        subject.instance_prompt,
        f"{subject.instance_prompt} in the snow",
        subject.class_prompt,
    )
    several = (prompts,) if isinstance(prompts, str) else prompts
    return [(prompt, config.seed + i) for prompt in dict.fromkeys(several) for i in range(config.sample_seeds)]


def sample(base: BaseModel, rows: Sequence[Row], config: TrainingConfig) -> list[Image.Image]:
    """A picture for each row by the U-Net under training, without dropout."""
    with base.all_on_device() as pipeline, modes_kept(base):
        for model in base.structure.values():
            model.eval()
        return [generate_images(pipeline, prompt, [seed], size=config.resolution)[0] for prompt, seed in rows]


def keep(folder: Path, step: int, rows: Sequence[Row], images: Sequence[Image.Image], adapter: Adapter | None) -> None:
    """Into the run's folder of samples: 000100.png, 000100-1.png, ... and 000100.safetensors."""
    lines = []
    for number, ((prompt, seed), image) in enumerate(zip(rows, images, strict=True)):
        file = folder / f"{step:06d}{f'-{number}' if number else ''}.png"
        save_marked(image, file)
        lines.append(json.dumps({"step": step, "prompt": prompt, "seed": seed, "file": file.name}) + "\n")
    with open(folder / SAMPLE_LIST, "a", encoding="utf-8") as written:
        written.writelines(lines)
    if adapter is not None:
        content, _ = packed(adapter, "kohya", torch.float16, Path(f"{step:06d}.safetensors"))
        write_file(folder / f"{step:06d}.safetensors", content)
