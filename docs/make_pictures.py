"""Draw the pictures of the pages on preservation, fitting, grids and several subjects: `python docs/make_pictures.py WORK`.

WORK keeps the adapters, so that a second call only draws. A few minutes on two CPU cores.
"""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

from PIL import Image

import lora_booth as lb
from lora_booth.base.ai_mark import save_picture
from lora_booth.cli.demo import write_photos
from lora_booth.photos.sheet import contact_sheet

IMAGES = Path(__file__).parent / "images"
TOKEN, NOUN = "sks", "owl"
CONTEXTS = ("in a meadow", "on the moon", "underwater", "in the snow")  # the photos are in the first and two others
RUNS = {
    "40 updates": lb.TrainingConfig(steps=40),
    "500 updates": lb.TrainingConfig(),
    "500 updates, no class pictures": lb.TrainingConfig(prior_loss_weight=0),
    "the same at 6 x the rate": lb.TrainingConfig(learning_rate=1e-2, prior_loss_weight=0),
}
SAMPLER: dict[str, Any] = {"steps": 20, "guidance": 4.0}


def main(work: Path) -> None:
    base = lb.BaseModel.load("toybox")
    owl = lb.Subject.from_folder(write_photos("olga", work / "photos" / "olga"), token=TOKEN, class_noun=NOUN)
    mug = lb.Subject.from_folder(write_photos("brew", work / "photos" / "brew"), token="zwx", class_noun="mug")

    def trained(name: str, subject: Any, config: lb.TrainingConfig) -> lb.Adapter:
        file = work / f"{name.replace(', ', '_').replace(' ', '_')}.safetensors"
        if not file.exists():
            lb.train(base, subject, config=config).save(file)
        return lb.Adapter.load(file)

    adapters: dict[str, lb.Adapter | None] = {"the base": None}
    adapters |= {name: trained(name, owl, config) for name, config in RUNS.items()}

    def drawn(name: str, prompt: str, seed: int) -> lb.Picture:
        adapter = adapters[name]
        studio = lb.Composition(base, [] if adapter is None else [(adapter, 1.0)])
        return studio.generate(prompt, seeds=[seed], **SAMPLER)[0]

    def save(grid: lb.Grid, name: str) -> None:
        """In 256 colours, which the toybox's pictures hardly exceed."""
        save_picture(grid.sheet().quantize(256, dither=Image.Dither.NONE), IMAGES / f"{name}.png")

    base_, under, good, bare, over = adapters
    stages = (base_, under, good, over)
    prompts = [f"a photo of {TOKEN} {NOUN} {context}" for context in CONTEXTS]
    save(lb.Grid(tuple(prompts), stages, tuple(tuple(drawn(s, p, 1) for s in stages) for p in prompts)), "fit")
    rows, seeds = (base_, good, bare, over), range(5)
    cells = tuple(tuple(drawn(name, f"a photo of an {NOUN}", seed) for seed in seeds) for name in rows)
    save(lb.Grid(rows, tuple(f"seed {seed}" for seed in seeds), cells), "prior")
    owl_, mug_ = trained(good, owl, lb.TrainingConfig()), trained("mug", mug, lb.TrainingConfig())
    halves = [lb.Region(owl_, box=(0, 0, 0.5, 1)), lb.Region(mug_, box=(0.5, 0, 1, 1))]
    ways = {
        "a sum": lb.Composition(base, [owl_, mug_], method="sum"),
        "automatic regions": lb.Composition(base, [owl_, mug_]),
        "left and right half": lb.Composition(base, regions=halves),
        "one adapter for both": lb.Composition(base, trained("both", [owl, mug], lb.TrainingConfig())),
    }
    prompt = f"a photo of {TOKEN} {NOUN} and zwx mug in the snow"
    cells = tuple(tuple(studio.generate(prompt, seeds=seeds, **SAMPLER)) for studio in ways.values())
    save(lb.Grid(tuple(ways), tuple(f"seed {seed}" for seed in seeds), cells), "together")
    places = [ways["automatic regions"].find_regions(prompt, seed=seed, **SAMPLER) for seed in seeds]
    previews = [lb.preview(one, picture.image, side=192) for one, picture in zip(places, cells[1], strict=True)]
    save_picture(contact_sheet(previews, labels=[f"seed {seed}" for seed in seeds], columns=5), IMAGES / "regions.png")
    weights = {"weights": (0, 0.4, 0.8, 1), "seeds": range(2)}
    save(lb.grid(base, (adapters[good], 1.0), f"a photo of {TOKEN} {NOUN} on the moon", **weights, **SAMPLER), "grid")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
