"""Samples: pictures drawn as training goes, with the same prompts and seeds each time, and the adapter that drew them."""

from __future__ import annotations

import json
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path

import torch
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.writing import packed
from ..base.ai_mark import picture_bytes
from ..base.base_model import BaseModel
from ..base.generation import generate_images
from ..config import SettledConfig
from ..errors import AdapterError
from ..files import Owned, json_lines
from ..subject.subject import Subject
from .checkpoint import SAMPLES
from .memory import is_out_of_memory
from .progress import Step
from .run_folder import RunFolder, why
from .tracking import Row, Tracking
from .training_mode import modes_restored

SAMPLE_STEPS = 15  # denoising steps of a sample: chosen, enough to compare rounds
SAMPLE_LIST = "samples.jsonl"  # a line for each picture: step, prompt, seed, file


def draw_samples(folder: RunFolder, tracking: Tracking | None, index: int, step: Step | None) -> None:
    """Draw a round of samples after `index` updates into the folder, and with `step` the adapter that drew them.

    A failure is an event.
    """
    began, job = time.monotonic(), folder.job
    rows = rows_of(job.subjects[0], job.config)
    try:
        images = sample(job.base, rows, job.config)
        adapter = None if step is None else Adapter(step.factors(), job.card(index))
        keep(folder.owned, index, rows, images, adapter)
        if tracking is not None:
            tracking.samples(index, rows, images)
    except (OSError, RuntimeError, AdapterError) as error:
        if isinstance(error, RuntimeError) and not is_out_of_memory(error):
            raise
        reason = "out of memory" if isinstance(error, RuntimeError) else why(error)
        folder.event(f"no samples of step {index}: {reason}", step=index)
    folder.record.timing("sampling", time.monotonic() - began)


def rows_of(subject: Subject, config: SettledConfig) -> list[Row]:
    """What is drawn each time. By default the subject, the subject elsewhere, and the plain class, which should not change."""
    usual = (subject.instance_prompt, f"{subject.instance_prompt} in the snow", subject.class_prompt)
    prompts = config.sample_prompt or usual
    several = (prompts,) if isinstance(prompts, str) else prompts
    return [(prompt, config.seed + i) for prompt in dict.fromkeys(several) for i in range(config.sample_seeds)]


def sample(base: BaseModel, rows: Sequence[Row], config: SettledConfig) -> list[Image.Image]:
    """A picture for each row, by the U-Net under training without dropout."""
    with base.all_on_device() as pipeline, modes_restored(base):
        for model in base.structure.values():
            model.eval()
        draw = partial(generate_images, pipeline, steps=SAMPLE_STEPS, size=config.sample_size or config.resolution)
        return [draw(prompt, [seed])[0] for prompt, seed in rows]


def keep(folder: Owned, step: int, rows: Sequence[Row], images: Sequence[Image.Image], adapter: Adapter | None) -> None:
    """Into the run's samples folder: 000100.png, 000100-1.png, ... and 000100.safetensors."""
    listed = f"{SAMPLES}/{SAMPLE_LIST}"
    folder.check(listed)
    lines = [json.dumps(line) for line in json_lines(folder.folder / listed) if line.get("step") != step]
    for number, ((prompt, seed), image) in enumerate(zip(rows, images, strict=True)):
        name = f"{step:06d}{f'-{number}' if number else ''}.png"
        folder.write(f"{SAMPLES}/{name}", picture_bytes(image, "PNG"))
        lines.append(json.dumps({"step": step, "prompt": prompt, "seed": seed, "file": name}))
    folder.write(listed, "".join(f"{line}\n" for line in lines).encode())
    if adapter is not None:
        content, _ = packed(adapter, "kohya", torch.float16, Path(f"{step:06d}.safetensors"))
        folder.write(f"{SAMPLES}/{step:06d}.safetensors", content)
