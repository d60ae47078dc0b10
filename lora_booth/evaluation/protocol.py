"""evaluate(): draw, measure, compare."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image

from ..adapters.adapter import Adapter
from ..base.base_model import TOYBOX, BaseModel
from ..base.memory import pictures_at_a_time
from ..config import check
from ..errors import EvaluationError
from ..photos.finding import find_photos
from ..photos.square import training_square
from ..pictures.composition import Composition
from ..pictures.picture import Picture
from ..pictures.prompts import SHARED
from ..toybox.scenery import CONTEXTS
from .cases import TEMPLATE, Case, cases_of, class_prompt
from .encoders import CLIP, DINO, Clip, Dino
from .measures import Measure, PhotoMeasure, ToyboxMeasure, contexts_shown, drawn_subject
from .results import Comparison, Row

PHOTO_SIDE = 512  # pixels of the photos' squares; every encoder takes less


@dataclass(frozen=True)
class Candidate:
    """One adapter to score."""

    adapter: Adapter
    name: str = ""  # of the row; "": the adapter's own
    weight: float | None = None  # None: the one that its card suggests
    step: int | None = None  # of a run


def evaluate(
    base: BaseModel,
    adapters: Adapter | Sequence[Adapter | Candidate],
    photos: str | Path | Sequence[Image.Image],
    *,
    prompts: Sequence[str] = (TEMPLATE,),
    contexts: Sequence[str] | None = None,
    seeds: Sequence[int] = range(4),
    class_seeds: Sequence[int] = range(16),
    steps: int = 25,
    guidance: float = 5.0,
    size: int | None = None,
    batch_size: int | None = None,
    dino: str | Path = DINO,
    clip: str | Path = CLIP,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Score adapters of one class by DreamBooth's protocol, on the same prompts and seeds as the base alone.

    photos       of the subject: a folder, or pictures
    prompts      with {token} and {class_noun}, and with {context} for each of `contexts`
    contexts     None: the ten that both prompt sets of the paper have; of the toybox, its own that the photos do not show
    class_seeds  of pictures of the bare class, for PRES
    batch_size   pictures at a time; None: as many as a usual GPU bears
    dino, clip   Hub ids or folders; not used on the toybox, whose judge needs nothing
    on_progress  pictures done, pictures in all
    Raises EvaluationError, SettingsError, PhotoError.
    """
    candidates = [
        a if isinstance(a, Candidate) else Candidate(a) for a in ([adapters] if isinstance(adapters, Adapter) else adapters)
    ]
    nouns = {candidate.adapter.card.class_noun for candidate in candidates}
    if len(nouns) != 1:
        raise EvaluationError(f"adapters of {len(nouns)} classes; give one adapter at least, and those of one class at a time")
    check(len(seeds) > 0 and len(class_seeds) > 0, "no seeds", "at least one of each, as seeds=range(4)")
    images = opened(photos)
    card = candidates[0].adapter.card
    if contexts is None:
        contexts = unseen_contexts(images) if base.name == TOYBOX else SHARED
    cases = cases_of(card, prompts, contexts)
    measure = measure_for(base, images, dino, clip)
    many = pictures_at_a_time(size or base.resolution) if batch_size is None else batch_size
    drawing = Drawing(base, seeds, class_seeds, steps, guidance, size, many, on_progress)
    drawing.total = (len(cases) * len(seeds) + len(class_seeds)) * (1 + len(candidates))
    bare = class_prompt(str(card.class_noun))
    floor = drawing.row(measure, "base alone", None, cases, bare)
    rows = [
        drawing.row(measure, name, candidate, cases, bare)
        for candidate, name in zip(candidates, names_of(candidates), strict=True)
    ]
    return Comparison(
        metrics=measure.metrics,
        adapters=tuple(rows),
        floor=floor,
        ceiling=Row("photos", measure.of_photos(cases, len(seeds))),
        prompt_chance=measure.prompt_chance(cases, drawing.by_case(floor.pictures)),
        described=measure.described,
        photos=len(images),
        prompts=tuple(case.prompt_for(card) for case in cases),
        seeds=len(seeds),
        class_prompt=bare,
        class_pictures=len(class_seeds),
        settings={"base": base.name, "steps": steps, "guidance": guidance, "size": size or base.resolution},
    )


@dataclass
class Drawing:
    """Draws the pictures of a row, and counts them."""

    base: BaseModel
    seeds: Sequence[int]
    class_seeds: Sequence[int]
    steps: int
    guidance: float
    size: int | None
    batch_size: int
    on_progress: Callable[[int, int], None] | None
    done: int = 0
    total: int = 0

    def row(self, measure: Measure, name: str, candidate: Candidate | None, cases: Sequence[Case], bare: str) -> Row:
        """candidate: None is the base alone."""
        pictures = []
        for case in cases:
            prompt = case.bare if candidate is None else case.prompt_for(candidate.adapter.card)
            pictures += self.pictures(candidate, prompt, self.seeds)
        plain = self.pictures(candidate, bare, self.class_seeds)
        values = measure.of_drawn(cases, self.by_case(pictures))
        values |= measure.of_class([picture.image for picture in plain])
        adapter = None if candidate is None else candidate.adapter
        step = None if candidate is None else candidate.step
        return Row(name, values, step, None if adapter is None else adapter.digest(), tuple(pictures))

    def pictures(self, candidate: Candidate | None, prompt: str, seeds: Sequence[int]) -> list[Picture]:
        adapters = [] if candidate is None else [weighted(candidate)]
        before = self.done

        def told(count: int) -> None:
            self.done = before + count
            if self.on_progress is not None:
                self.on_progress(self.done, self.total)

        return Composition(self.base, adapters).generate(
            prompt,
            seeds=seeds,
            steps=self.steps,
            guidance=self.guidance,
            size=self.size,
            batch_size=self.batch_size,
            on_image=told,
        )

    def by_case(self, pictures: Sequence[Picture]) -> list[list[Image.Image]]:
        count, images = len(self.seeds), [picture.image for picture in pictures]
        return [images[first : first + count] for first in range(0, len(images), count)]


def weighted(candidate: Candidate) -> tuple[Adapter, float]:
    weight = candidate.weight
    return candidate.adapter, candidate.adapter.card.weight if weight is None else weight


def names_of(candidates: Sequence[Candidate]) -> list[str]:
    """Each another: equal ones are numbered."""
    names: list[str] = []
    for candidate in candidates:
        name = candidate.name or candidate.adapter.stem or candidate.adapter.name
        number = sum(other == name or other.startswith(f"{name} #") for other in names)
        names.append(f"{name} #{number + 1}" if number else name)
    return names


def opened(photos: str | Path | Sequence[Image.Image]) -> list[Image.Image]:
    """The squares that training would see."""
    if not isinstance(photos, str | Path):
        images = list(photos)
    else:
        images = [training_square(photo, PHOTO_SIDE).image for photo in find_photos(photos, minimum=1).photos]
    if len(images) < 2:
        raise EvaluationError(f"{len(images)} photo; at least 2 are needed, since photos against each other are the ceiling")
    return images


def measure_for(base: BaseModel, photos: Sequence[Image.Image], dino: str | Path, clip: str | Path) -> Measure:
    if base.name == TOYBOX:
        name, identity = drawn_subject(photos) or ("", None)
        return ToyboxMeasure(photos, identity, name)
    return PhotoMeasure(photos, Dino(dino, device=base.device), Clip(clip, device=base.device))


def unseen_contexts(photos: Sequence[Image.Image]) -> list[str]:
    seen = contexts_shown(photos)
    return [context for context in CONTEXTS if context not in seen] or list(CONTEXTS)
