"""How well an adapter knows its subject, on the drawn world: scores by the toybox's judge, between a floor and a ceiling.

The protocol is DreamBooth's (arXiv 2208.12242, sec. 4.2: subject fidelity, prompt fidelity, PRES, DIV), with the
judge in place of DINO and CLIP, so the figures are not comparable with a paper's.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import combinations

import numpy as np
from PIL import Image

from ..adapters.adapter import Adapter
from ..base.base_model import BaseModel
from ..pictures.composition import Composition
from ..pictures.picture import Picture
from ..toybox.judge import IDENTITY_PARTS, Verdict, judge, to_pixels
from ..toybox.scenery import CONTEXTS
from ..toybox.world import Identity, Scene, draw

Report = Callable[[int, int], None]  # pictures done, pictures in all


@dataclass(frozen=True)
class Scores:
    """Shares in 0..1 unless a unit is given."""

    identity: float  # identity attributes right, mean over pictures and attributes
    code: float  # pictures with the whole identity right
    cosine: float  # judge features against renders of the subject
    context: float  # the prompt's context shown
    leak: float  # pictures of the bare class that show the subject's colours and pattern (PRES; lower is better)
    diversity: float  # mean feature distance between pictures of the bare class (DIV)
    copies: float  # pictures closer to a training photo than photos of different scenes are to each other


@dataclass(frozen=True)
class Evaluation:
    """The adapter's scores beside the base's own ("a CLASS", no adapter) and the ceiling (real renders)."""

    adapter: Scores
    floor: Scores
    ceiling: Scores
    pictures: tuple[Picture, ...]  # with the adapter
    before: tuple[Picture, ...]  # the same prompts and seeds without it

    @property
    def identity_of_ceiling(self) -> float:
        """Identity attributes right, as a share of what the judge gives real renders."""
        return self.adapter.identity / max(1e-9, self.ceiling.identity)


def evaluate_subject(
    base: BaseModel,
    adapter: Adapter,
    identity: Identity,
    photos: Sequence[Image.Image],
    *,
    trained_contexts: Sequence[str],
    seeds: Sequence[int] = range(4),
    class_seeds: Sequence[int] = range(16),
    steps: int = 20,
    guidance: float = 4.0,
    batch_size: int = 8,
    on_progress: Report | None = None,
) -> Evaluation:
    """Score `adapter` on every context that it was not trained in, `seeds` pictures each."""
    contexts = [c for c in CONTEXTS if c not in trained_contexts]
    card = adapter.card
    subject = f"a photo of {card.token} {card.class_noun}"
    bare = Scene((identity,), "", "photo").caption(colors=False, context=False)
    total, done = 2 * (len(contexts) * len(seeds) + len(class_seeds)), 0

    def pictures(adapters: list[tuple[Adapter, float]], prompt: str, wanted: Sequence[int]) -> list[Picture]:
        nonlocal done
        made = Composition(base, adapters).generate(prompt, seeds=wanted, steps=steps, guidance=guidance, batch_size=batch_size)
        done += len(made)
        if on_progress is not None:
            on_progress(done, total)
        return made

    with_adapter, before, expected = [], [], []
    for context in contexts:
        with_adapter += pictures([(adapter, 1.0)], f"{subject} {context}", seeds)
        before += pictures([], f"{bare} {context}", seeds)
        expected += [context] * len(seeds)
    class_with = pictures([(adapter, 1.0)], bare, class_seeds)
    class_before = pictures([], bare, class_seeds)
    renders = [
        draw(Scene((identity,), context, "photo", 77_000 + 100 * i + seed)).image
        for i, context in enumerate(contexts)
        for seed in seeds
    ]
    reference = np.mean([v.feature for v in judge(renders)], axis=0)

    def scores(made: Sequence[Image.Image], bare_class: Sequence[Image.Image]) -> Scores:
        verdicts, class_verdicts = judge(made), judge(bare_class)
        attributes = [attributes_right(v, identity) for v in verdicts]
        return Scores(
            identity=float(np.mean(attributes)),
            code=float(np.mean([a == 1.0 for a in attributes])),
            cosine=float(np.mean([cosine(v.feature, reference) for v in verdicts])),
            context=float(np.mean([v.context == c for v, c in zip(verdicts, expected, strict=True)])),
            leak=float(np.mean([shows(v, identity) for v in class_verdicts])),
            diversity=diversity(class_verdicts),
            copies=copies(made, photos),
        )

    other_renders = [
        draw(Scene((o,), c, "photo", 88_000 + i)).image for i, (o, c) in enumerate(others(identity, len(class_seeds)))
    ]
    return Evaluation(
        adapter=scores([p.image for p in with_adapter], [p.image for p in class_with]),
        floor=scores([p.image for p in before], [p.image for p in class_before]),
        ceiling=scores(renders, other_renders),
        pictures=tuple(with_adapter),
        before=tuple(before),
    )


def others(identity: Identity, count: int) -> list[tuple[Identity, str]]:
    """Other objects of the same class in random contexts: what the bare class should look like."""
    import random

    from ..toybox.world import random_identity

    rng = random.Random(5)
    return [(random_identity(rng, identity.class_noun), rng.choice(CONTEXTS)) for _ in range(count)]


def attributes_right(verdict: Verdict, identity: Identity) -> float:
    """Share of the identity's attributes that the first object has; 0 when there is no object."""
    if not verdict.objects:
        return 0.0
    return float(np.mean([getattr(verdict.objects[0], part) == getattr(identity, part) for part in IDENTITY_PARTS]))


def shows(verdict: Verdict, identity: Identity) -> bool:
    """The subject itself: its two body colours and its pattern."""
    return bool(verdict.objects) and all(
        getattr(verdict.objects[0], part) == getattr(identity, part) for part in ("class_noun", "color", "second", "pattern")
    )


def cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float(a @ b / (np.linalg.norm(a) * np.linalg.norm(b)))


def diversity(verdicts: Sequence[Verdict]) -> float:
    """Mean cosine distance of the judge's features over all pairs."""
    distances = [1 - cosine(a.feature, b.feature) for a, b in combinations(verdicts, 2)]
    return float(np.mean(distances)) if distances else 0.0


def copies(images: Sequence[Image.Image], photos: Sequence[Image.Image]) -> float:
    """Share of images whose nearest photo is closer, in pixels, than any two photos are to each other."""
    made, real = to_pixels(images).flatten(1), to_pixels(photos).flatten(1)
    between = [float((a - b).abs().mean()) for a, b in combinations(real, 2)]
    if not between:
        return 0.0
    nearest = [min(float((image - photo).abs().mean()) for photo in real) for image in made]
    return float(np.mean([distance < min(between) for distance in nearest]))
