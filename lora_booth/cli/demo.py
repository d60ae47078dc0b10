"""The demo: four subjects that the embedded base has never seen, learnt offline from five pictures each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..adapters.adapter import Adapter
from ..base.ai_mark import save_picture
from ..base.base_model import BaseModel
from ..evaluation.protocol import evaluate
from ..evaluation.results import Comparison
from ..photos.sheet import contact_sheet
from ..pictures.composition import Composition
from ..pictures.gallery import Gallery
from ..pictures.grids import before_after
from ..runs.many import train_many
from ..subject.subject import Subject
from ..subject.wording import with_article
from ..toybox.scenery import CONTEXTS as EVERY_CONTEXT
from ..toybox.world import HELD_OUT, photos_of
from ..training.progress import display

PHOTOS = 5
CONTEXTS = ("in a meadow", "in the kitchen", "on the beach")  # of the photos
NEW_CONTEXTS = tuple(context for context in EVERY_CONTEXT if context not in CONTEXTS)  # of the scores
TOKENS = {"olga": "ohwx", "brew": "zwx", "rex": "sks", "stomp": "vrn"}  # of subjects in toybox/world.py; the last are hard
TOGETHER = ("olga", "brew")
SHOWN = ("on the moon", "underwater")
SAMPLER: dict[str, Any] = {"steps": 20, "guidance": 4.0}


def drawn_photos(name: str, count: int = PHOTOS) -> list[Image.Image]:
    """A held-out subject as a user's photos would show it, 256 x 256 pixels."""
    return photos_of(HELD_OUT[name], count, CONTEXTS, seed=500)


def write_photos(name: str, folder: Path, *, count: int = PHOTOS) -> Path:
    """`drawn_photos` as PNG files in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, image in enumerate(drawn_photos(name, count)):
        image.save(folder / f"{name}{i + 1}.png")
    return folder


def score(base: BaseModel, adapter: Adapter, name: str, *, seeds: Sequence[int] = range(4), **more: Any) -> Comparison:
    """The adapter of a held-out subject in the contexts that its photos do not show. more: for `evaluate`"""
    return evaluate(base, adapter, drawn_photos(name), contexts=NEW_CONTEXTS, seeds=seeds, batch_size=8, **SAMPLER, **more)


def run_demo(base: BaseModel, out: Path, *, say: Callable[[str], None] = print) -> None:
    """Photos, training, files, before and after, scores, two in one picture. Everything is written to `out`.

    base  the toybox: the subjects are from its world
    """
    subjects = {}
    for name, token in TOKENS.items():
        noun = HELD_OUT[name].class_noun
        say(f"{name}: {PHOTOS} pictures of {with_article(noun)} that the base has never seen; its token is {token!r}")
        subjects[name] = Subject.from_folder(write_photos(name, out / "photos" / name), token=token, class_noun=noun)
    adapters, errors = train_many(base, subjects, out=out / "runs")
    for error in errors.values():
        raise error
    scores: list[Comparison] = []
    rows: list[list[tuple[Image.Image, str]]] = [[], [], []]  # of photos, without the adapters, and with them
    for name, adapter in adapters.items():
        file = adapter.save(out / f"{name}.safetensors")
        say(f"{file} ({file.stat().st_size / 1e6:.2f} MB); drawing and scoring pictures")
        with display(True) as shown:
            count = partial(shown.progress, f"pictures of {name}")
            scores.append(score(base, adapter, name, seeds=range(2), on_progress=count))
        prompts = [f"{adapter.card.prompt} {context}" for context in SHOWN]
        rows[0] += [(image, f"photo {i + 1} of {name}") for i, image in enumerate(drawn_photos(name, len(SHOWN)))]
        made = before_after(base, adapter, prompts, seeds=[1], **SAMPLER).pictures
        rows[1] += [(picture.image, f"before: {picture.prompt}") for picture in made[: len(SHOWN)]]
        rows[2] += [(picture.image, f"after: {picture.prompt}") for picture in made[len(SHOWN) :]]
    images, labels = zip(*(cell for row in rows for cell in row), strict=True)
    save_picture(contact_sheet(images, labels=labels, columns=len(rows[0]), side=144), out / "before_after.png")
    Gallery([p for one in scores for p in one.best.pictures], title="lora_booth demo").save(out / "gallery.html")
    # two subjects in one picture, each adapter where the U-Net attends to its words
    both = [adapters[name] for name in TOGETHER]
    prompt = f"a photo of {' and '.join(adapter.card.words for adapter in both)} in the snow"
    seeds = range(4)
    with display(True) as shown:
        count = partial(shown.progress, "pictures of both", total=len(seeds))
        together = Composition(base, both, regions="auto").generate(prompt, seeds=seeds, on_image=count, **SAMPLER)
    Gallery(together, title="together").save(out / "together.png")
    for one in scores:
        say("\n".join(["", *one.lines()]))
    share = np.mean([(one.best.mean("identity") or 0.0) / (one.ceiling.mean("identity") or 1.0) for one in scores])
    say(f"\nidentity attributes right, as a share of those in real renders: {share:.2f}")
