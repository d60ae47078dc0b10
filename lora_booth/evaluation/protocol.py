"""evaluate(): draw, measure, compare."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.adapter import Adapter
from ..base.base_model import TOYBOX_FOLDER, BaseModel
from ..base.generation import pictures_at_a_time
from ..base.sizes import drawable
from ..config import Size, typed, written
from ..errors import CompositionWarning, EvaluationError, shown
from ..photos.cropping import crop_photo
from ..photos.finding import MANY, find_photos
from ..pictures.composition import Composition, checked
from ..pictures.picture import Picture
from ..pictures.prompts import PAPER, fill_prompts
from ..subject.subject import CLASS_TEMPLATE
from ..training.checkpoint import RECORD, saved_adapters
from .encoders import CLIP, DINO
from .measures import TEMPLATE, PhotoMeasure, ToyboxMeasure, cases_of, unseen_contexts
from .results import Comparison, Row

PHOTO_SIZE = (512, 512)  # pixels of the photos' squares; chosen: the encoders take less


@dataclass(frozen=True)
class Candidate:
    """One adapter to score."""

    adapter: Adapter
    name: str = ""  # of the row; "": the adapter's name
    weight: float | None = None  # None: what its card suggests
    step: int | None = None  # optimizer updates, of an adapter of a run


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
    size: Size | None = None,
    sampler: str | None = None,
    batch_size: int | None = None,
    dino: str | Path = DINO,
    clip: str | Path = CLIP,
    on_progress: Callable[[int, int], None] | None = None,
) -> Comparison:
    """Score adapters of one class by DreamBooth's protocol, with the same prompts and seeds as the base alone.

    photos       photos of the subject: a folder, or two or more pictures
    prompts      with {token} and {class_noun}, and with {context} for each of `contexts`
    contexts     None: the ten that both prompt sets of the paper share; on the toybox, those that the photos do not show
    seeds        one picture each of every prompt
    class_seeds  one picture each of the plain class ("a photo of a dog"), for PRES
    steps        denoising steps
    guidance     classifier-free guidance scale
    size         in pixels: 768, (width, height) or "832x1216"; None: the base's resolution
    sampler      as for `Composition.generate`
    batch_size   pictures at a time; None: as many as fit on a usual GPU
    dino, clip   Hub ids or folders; not used on the toybox, which has a judge
    on_progress  called with the number of pictures drawn and the total
    Raises EvaluationError, SettingsError, PhotoError.
    """
    base, dino, clip = typed("base", base, BaseModel), typed("dino", dino, str | Path), typed("clip", clip, str | Path)
    prompts, contexts = typed("prompts", prompts, tuple[str, ...]), typed("contexts", contexts, tuple[str, ...] | None)
    several: Iterable[Any] = adapters if isinstance(adapters, Iterable) else [adapters]
    candidates = [one if isinstance(one, Candidate) else Candidate(typed("adapters", one, Adapter)) for one in several]
    nouns = {candidate.adapter.card.class_noun for candidate in candidates}
    if len(nouns) != 1:
        raise EvaluationError(f"adapters of {len(nouns)} classes; pass at least one adapter, all of the same class")
    seeds, class_seeds = checked(seeds=seeds)["seeds"], checked(seeds=class_seeds)["seeds"]
    pair = drawable(base, size)
    drawn_at = pair or (base.resolution, base.resolution)
    batch_size = pictures_at_a_time(*drawn_at) if batch_size is None else batch_size
    how = checked(steps=steps, guidance=guidance, size=pair, sampler=sampler, batch_size=batch_size)
    images, toybox = opened(photos), is_toybox(base)
    card = candidates[0].adapter.card
    if contexts is None:
        contexts = unseen_contexts(images) if toybox else PAPER["shared"]
    cases = cases_of(card, prompts, contexts)
    measure = ToyboxMeasure(images) if toybox else PhotoMeasure(images, dino, clip, base.device)
    plain = fill_prompts([CLASS_TEMPLATE], class_noun=card.class_noun)[0]
    total = (len(cases) * len(seeds) + len(class_seeds)) * (1 + len(candidates))
    done = 0

    def draw(studio: Composition, prompt: str, seeds: Sequence[int]) -> list[Picture]:
        nonlocal done
        count = None if on_progress is None else lambda drawn: on_progress(done + drawn, total)
        made = studio.generate(prompt, seeds=seeds, on_image=count, **how)
        done += len(made)
        return made

    def row(name: str, weighted: Sequence[Any], prompts: Sequence[str], **facts: Any) -> Row:
        studio = Composition(base, weighted)
        groups = [draw(studio, prompt, seeds) for prompt in prompts]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CompositionWarning)  # the class is drawn without the token on purpose
            of_class = draw(studio, plain, class_seeds)
        values = measure.of_subject(cases, [[picture.image for picture in group] for group in groups])
        values |= measure.of_class([picture.image for picture in of_class])
        return Row(name, values, pictures=tuple(chain(*groups)), **facts)

    floor = row("base alone", [], [case.plain for case in cases])
    rows = []
    for candidate, name in zip(candidates, names_of(candidates), strict=True):
        adapter, prompts = candidate.adapter, [case.prompt_for(candidate.adapter.card) for case in cases]
        facts = {"step": candidate.step, "digest": adapter.digest()}
        rows.append(row(name, [(adapter, candidate.weight)], prompts, **facts))
    return Comparison(
        metrics=measure.metrics,
        adapters=tuple(rows),
        floor=floor,
        ceiling=Row("photos", measure.of_photos(cases, len(seeds))),
        described=measure.described,
        photos=len(images),
        prompts=tuple(case.prompt_for(card) for case in cases),
        seeds=len(seeds),
        class_prompt=plain,
        class_pictures=len(class_seeds),
        settings={
            "base": base.name,
            "size": written(drawn_at),
            **{name: how[name] for name in ("steps", "guidance", "sampler")},
        },
    )


def is_run(path: str | Path) -> bool:
    return (Path(path) / RECORD).is_file()


def candidates_of(run: str | Path) -> list[Candidate]:
    """The adapters that a run has saved, by step: next to its samples, in its checkpoints, and the finished one.

    Raises EvaluationError if there is none.
    """
    files = saved_adapters(Path(run))
    if not files:
        raise EvaluationError(f"{shown(run)}: no adapter in this run's folder yet; train longer, or pass adapter files")
    return [Candidate(Adapter.load(file), name=f"step {step}", step=step) for step, file in files.items()]


def names_of(candidates: Sequence[Candidate]) -> list[str]:
    """A different name for each: equal ones are numbered."""
    names: list[str] = []
    for candidate in candidates:
        name = candidate.name or candidate.adapter.stem or candidate.adapter.name
        number = sum(other == name or other.startswith(f"{name} #") for other in names)
        names.append(f"{name} #{number + 1}" if number else name)
    return names


def opened(photos: str | Path | Sequence[Image.Image]) -> list[Image.Image]:
    """The photos, as squares: the encoders see no more."""
    given = typed("photos", photos, Path | tuple[Image.Image, ...])
    if isinstance(given, tuple):
        images = list(given)
    else:
        images = [crop_photo(photo, [PHOTO_SIZE]).image for photo in find_photos(given, minimum=1, maximum=MANY).photos]
    if len(images) < 2:
        raise EvaluationError(f"{len(images)} photo; pass at least 2: photos compared with each other are the ceiling")
    return images


def is_toybox(base: BaseModel) -> bool:
    """Whether the base has the toybox's weights, whatever its name: the judge reads only their pictures."""
    return base.fingerprint == toybox_fingerprint()


@cache
def toybox_fingerprint() -> str:
    return BaseModel.load(TOYBOX_FOLDER, device="cpu").fingerprint
