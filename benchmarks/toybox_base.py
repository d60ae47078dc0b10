"""How good the embedded base is: pictures of objects by colour, by a full description and by name, read by the judge.

python -m benchmarks.toybox_base --pictures 250
"""

from __future__ import annotations

import argparse
import json
import random
import time
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import generate_images, quiet
from lora_booth.photos.sheet import contact_sheet
from lora_booth.toybox.judge import judge
from lora_booth.toybox.scenery import CONTEXTS
from lora_booth.toybox.world import CLASSES, COLORS, Identity, Scene, draw
from tools.toybox.scenes import DETAILS, caption, named_looks, random_identity

from .composition import outcome

TOLD = {"colour": ("color",), "description": DETAILS, "name": ("name",)}


def prompts(count: int, objects: int, by: str) -> list[Scene]:
    """Scenes whose caption is the prompt; looks and classes of a pair are different, as a person would ask."""
    rng = random.Random(objects)
    scenes = []
    for i in range(count):
        nouns = rng.sample(CLASSES, objects)
        if by == "name":
            looks = rng.sample(list(named_looks().values()), objects)
            chosen = [Identity(noun, *look) for noun, look in zip(nouns, looks, strict=True)]
        else:
            chosen = [random_identity(rng, noun) for noun in nouns]
            if objects == 2 and chosen[0].color == chosen[1].color:
                first = chosen[0]
                color = rng.choice([c for c in COLORS if c not in (first.color, first.second, first.third)])
                chosen[0] = replace(first, color=color)
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


def score(scenes: list[Scene], images: list[Image.Image], by: str) -> dict[str, float]:
    """Shares over pictures; of a look, shares over objects. "both" means both classes, in any order."""
    verdicts = judge(images)
    pairs = list(zip(scenes, verdicts, strict=True))
    result: dict[str, Any] = {"context": [v.context == s.context for s, v in pairs]}
    if len(scenes[0].objects) == 1:
        result["class"] = [bool(v.objects) and v.objects[0].class_noun == s.objects[0].class_noun for s, v in pairs]
        result["color"] = [bool(v.objects) and v.objects[0].color == s.objects[0].color for s, v in pairs]
    else:
        result["both"] = [{o.class_noun for o in v.objects} == {o.class_noun for o in s.objects} for s, v in pairs]
        colors = [[{(o.class_noun, o.color) for o in shown.objects} for shown in pair] for pair in pairs]
        result["both with their colours"] = [wanted == found for wanted, found in colors]
        result["bound"] = [outcome(v, s.objects) == "bound" for s, v in pairs]
    if by != "colour":
        asked = [(o, [x for x in v.objects if x.class_noun == o.class_noun]) for s, v in pairs for o in s.objects]
        for part in ("second", "third", "pattern", "accessory"):
            result[part] = [bool(found) and getattr(found[0], part) == getattr(o, part) for o, found in asked]
        result["whole look"] = [o in found for o, found in asked]
    return {key: round(float(np.mean(value)), 3) for key, value in result.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--base", default="toybox")
    parser.add_argument("--pictures", type=int, default=250, help="of each kind")
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
    for objects, by in product((1, 2), TOLD):
        scenes = prompts(arguments.pictures, objects, by)
        captions = [caption(scene, [TOLD[by]] * objects) for scene in scenes]
        images = generate(base, captions, arguments.steps, arguments.guidance)
        renders = [draw(scene) for scene in scenes]
        of = {"objects": objects, "by": by, "pictures": len(images)}
        print(json.dumps(of | {"base": score(scenes, images, by)}), flush=True)
        print(json.dumps(of | {"renders": score(scenes, renders, by)}), flush=True)
        for pair in zip(renders[:10], images[:10], strict=True):
            sheets += pair
        labels += [text for words in captions[:10] for text in ("render", words)]
    print(json.dumps({"seconds for one picture": round(one, 2), "steps": arguments.steps, "guidance": arguments.guidance}))
    if arguments.sheet:
        contact_sheet(sheets, labels=labels, columns=8, side=128).save(arguments.sheet)


if __name__ == "__main__":
    main()
