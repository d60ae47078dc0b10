"""The whole job on the embedded base, offline: two subjects that it never saw, learnt from five pictures each."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..adapters.adapter import Adapter
from ..base.base_model import BaseModel
from ..evaluation.toybox import Evaluation, evaluate_subject
from ..photos.sheet import contact_sheet
from ..pictures.composition import Composition
from ..pictures.gallery import Gallery
from ..pictures.picture import Picture
from ..run import train
from ..subject.subject import Subject
from ..subject.wording import with_article
from ..toybox.world import HELD_OUT, Identity, photos_of

PHOTOS = 5
CONTEXTS = ("in a meadow", "in the kitchen", "on the beach")  # the photos' contexts; scores are for the seven others
SUBJECTS = {"olga": "sks", "brew": "zwx"}  # name in toybox/world.py -> token
SHOWN = ("on the moon", "underwater", "in the snow", "in the jungle")
STEPS, GUIDANCE = 20, 4.0  # of the sampler


@dataclass(frozen=True)
class DemoSubject:
    name: str
    identity: Identity
    adapter: Adapter
    file: Path
    evaluation: Evaluation


def write_photos(name: str, folder: Path, *, count: int = PHOTOS, contexts: Sequence[str] = CONTEXTS) -> Path:
    """Draw a held-out subject as a user's photos would be: PNG files of 256 x 256."""
    folder.mkdir(parents=True, exist_ok=True)
    for i, render in enumerate(photos_of(HELD_OUT[name], count, contexts, seed=500)):
        render.image.save(folder / f"{name}{i + 1}.png")
    return folder


def run_demo(base: BaseModel, out: Path, *, say: Callable[[str], None] = print) -> list[DemoSubject]:
    """Photos, training, files, before and after, scores, a picture of both. Everything is written under `out`.

    base  the toybox: the subjects are of its world
    """
    done: list[DemoSubject] = []
    for name, token in SUBJECTS.items():
        identity = HELD_OUT[name]
        folder = write_photos(name, out / "photos" / name)
        say(f"{name}: {PHOTOS} pictures of {with_article(identity.class_noun)} that the base never saw; its token is {token!r}")
        subject = Subject.from_folder(folder, token=token, class_noun=identity.class_noun)
        adapter = train(base, subject, out=out / "runs" / name)
        file = adapter.save(out / f"{name}.safetensors")
        say(f"{file} ({file.stat().st_size / 1e6:.2f} MB); drawing and judging pictures")
        photos = [render.image for render in photos_of(identity, PHOTOS, CONTEXTS, seed=500)]
        evaluation = evaluate_subject(base, adapter, identity, photos, trained_contexts=CONTEXTS, seeds=range(2))
        done.append(DemoSubject(name, identity, adapter, file, evaluation))
    before_after(base, done, out)
    together(base, done, out)
    Gallery([p for subject in done for p in subject.evaluation.pictures], title="lora_booth demo").save(out / "gallery.html")
    for line in table(done):
        say(line)
    return done


def before_after(base: BaseModel, subjects: Sequence[DemoSubject], out: Path) -> Path:
    """A row of photos, a row without and a row with the adapter, for each subject."""
    images, labels = [], []
    for subject in subjects:
        card = subject.adapter.card
        shown = photos_of(subject.identity, len(SHOWN), CONTEXTS, seed=500)
        images += [render.image for render in shown]
        labels += [f"photo {i + 1} of {subject.name}" for i in range(len(shown))]
        for title, adapters in (("before", []), ("after", [(subject.adapter, 1.0)])):
            for context in SHOWN:
                prompt = f"a photo of {card.token} {card.class_noun} {context}"
                made = Composition(base, adapters).generate(prompt, seeds=[1], steps=STEPS, guidance=GUIDANCE)
                images.append(made[0].image)
                labels.append(f"{title}: {prompt}")
    sheet = contact_sheet(images, labels=labels, columns=len(SHOWN), side=192)
    return Picture(sheet, "", 0).save(out / "before_after.png")


def together(base: BaseModel, subjects: Sequence[DemoSubject], out: Path) -> Path:
    """Both subjects in one picture, each adapter where the U-Net looks for its words."""
    names = " and ".join(f"{s.adapter.card.token} {s.adapter.card.class_noun}" for s in subjects)
    studio = Composition(base, [(s.adapter, 1.0) for s in subjects], regions="auto")
    pictures = studio.generate(f"a photo of {names} in the snow", seeds=range(4), steps=STEPS, guidance=GUIDANCE)
    return Gallery(pictures, title="together").save(out / "together.png")


def table(subjects: Sequence[DemoSubject]) -> list[str]:
    """The scores as text lines: floor (the base alone), adapter, ceiling (real renders)."""
    rows = [
        ("subject fidelity: identity attributes right", "identity"),
        ("whole identity right", "code"),
        ("prompt fidelity: context right (untrained contexts)", "context"),
        ("prior: bare class shows the subject (lower is better)", "leak"),
        ("prior: diversity of the bare class", "diversity"),
        ("copies of training photos (lower is better)", "copies"),
    ]
    lines = [f"{'':54}{'base':>8}{'adapter':>9}{'renders':>9}"]
    for subject in subjects:
        e = subject.evaluation
        lines.append(f"{subject.name} ({subject.identity.class_noun})")
        for label, key in rows:
            values = (getattr(e.floor, key), getattr(e.adapter, key), getattr(e.ceiling, key))
            lines.append(f"  {label:52}{values[0]:8.2f}{values[1]:9.2f}{values[2]:9.2f}")
    share = float(np.mean([s.evaluation.identity_of_ceiling for s in subjects]))
    lines.append(f"identity right, of the ceiling: {share:.2f}")
    return lines
