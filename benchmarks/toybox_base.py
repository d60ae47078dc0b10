"""How good the embedded base is: pictures of random prompts, read by the judge.

python -m benchmarks.toybox_base --pictures 500
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
from PIL import Image

from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import generate_images, quiet
from lora_booth.photos.sheet import contact_sheet
from lora_booth.toybox.judge import judge
from lora_booth.toybox.scenery import CONTEXTS
from lora_booth.toybox.world import CLASSES, COLORS, Scene, draw
from tools.toybox.scenes import caption, random_identity


def prompts(count: int, objects: int) -> list[Scene]:
    """Scenes whose caption is the prompt; colours and classes of a pair are different, as a person would ask."""
    rng = random.Random(objects)
    scenes = []
    for i in range(count):
        words = zip(rng.sample(CLASSES, objects), rng.sample(list(COLORS), objects), strict=True)
        chosen = [replace(random_identity(rng, noun), color=color) for noun, color in words]
        scenes.append(Scene(tuple(chosen), rng.choice(CONTEXTS), "photo", i))
    return scenes


def generate(base: BaseModel, captions: list[str], steps: int, guidance: float) -> list[Image.Image]:
    import torch

    made = []
    with quiet(base.pipeline), torch.no_grad():
        for first in range(0, len(captions), 10):
            part = captions[first : first + 10]
            seeds = [torch.Generator().manual_seed(first + i) for i in range(len(part))]
            made += base.pipeline(part, num_inference_steps=steps, guidance_scale=guidance, generator=seeds).images
    return made


def score(scenes: list[Scene], images: list[Image.Image]) -> dict[str, float]:
    """Shares over pictures; "both" wants both classes, in any order."""
    verdicts = judge(images)
    pairs = list(zip(scenes, verdicts, strict=True))
    result = {"context": np.mean([v.context == s.context for s, v in pairs])}
    if len(scenes[0].objects) == 1:
        result["class"] = np.mean([bool(v.objects) and v.objects[0].class_noun == s.objects[0].class_noun for s, v in pairs])
        result["color"] = np.mean([bool(v.objects) and v.objects[0].color == s.objects[0].color for s, v in pairs])
    else:
        result["both"] = np.mean([{o.class_noun for o in v.objects} == {o.class_noun for o in s.objects} for s, v in pairs])
        wanted = [{(o.class_noun, o.color) for o in s.objects} for s in scenes]
        found = [{(o.class_noun, o.color) for o in v.objects} for v in verdicts]
        result["both with their colours"] = np.mean([w == f for w, f in zip(wanted, found, strict=True)])
    return {key: round(float(value), 3) for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="toybox")
    parser.add_argument("--pictures", type=int, default=500)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--guidance", type=float, default=4.0)
    parser.add_argument("--sheet", type=Path, help="where to write a contact sheet of the first pictures")
    arguments = parser.parse_args()
    base = BaseModel.load(arguments.base)
    started = time.perf_counter()
    generate_images(base.pipeline, "a photo of a dog", [0, 1], steps=arguments.steps, guidance=arguments.guidance)
    one = (time.perf_counter() - started) / 2
    sheets: list[Image.Image] = []
    labels: list[str] = []
    for objects in (1, 2):
        scenes = prompts(arguments.pictures // 2, objects)
        captions = [caption(scene) for scene in scenes]
        images = generate(base, captions, arguments.steps, arguments.guidance)
        ceiling = score(scenes, [draw(scene) for scene in scenes])
        print(
            json.dumps({"objects": objects, "pictures": len(images), "base": score(scenes, images), "renders": ceiling}),
            flush=True,
        )
        sheets += images[:20]
        labels += captions[:20]
    print(json.dumps({"seconds for one picture": round(one, 2), "steps": arguments.steps, "guidance": arguments.guidance}))
    if arguments.sheet:
        contact_sheet(sheets, labels=labels, columns=8, side=128).save(arguments.sheet)


if __name__ == "__main__":
    main()
