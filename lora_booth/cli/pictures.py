"""Commands from adapters to pictures."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Any

import typer

from ..config import STEPS
from ..errors import AdapterBaseMismatch, SettingsError
from .app import say
from .arguments import by_file, check_folder, check_place, parse_seeds, parse_weights, with_tags
from .options import Drawing, Loading, Method, Named, OwnBase, Placement, Prompting, Sampling, Size, Steps, command

PATIENCE = 2.0  # seconds without a bar; chosen
Out = Annotated[Path, typer.Option(help="folder for the pictures and their gallery, e.g. beach")]


@command
def generate(
    adapters: Named = None,
    *,
    prompting: Prompting,
    base: OwnBase = None,
    loading: Loading,
    placement: Placement,
    drawing: Drawing,
    seeds: str = "0",  # seeds, a picture of every prompt for each, e.g. 0-3 or 1,5,8
    out: Out = Path("pictures"),
    preview: Path | None = None,  # write a picture of the regions here, e.g. regions.png
    recipe: Path | None = None,  # write a recipe of these pictures here, for replay, e.g. pair.json
) -> None:
    """Draw pictures with one or several adapters, and a gallery page of them."""
    from ..base.ai_mark import kind_of, save_picture
    from ..pictures.gallery import Album
    from ..pictures.grids import batches
    from ..pictures.recipe import Recipe
    from ..pictures.regions import preview as drawn

    wanted = parse_seeds(seeds)
    if preview is not None:
        kind_of(preview)
        if not (placement.region or placement.auto_regions):
            raise SettingsError("--preview shows regions; pass --region or --auto-regions")
    check_folder(out)
    for option, file in (("--preview", preview), ("--recipe", recipe)):
        if file is not None:
            check_place(file, option)
    chosen, texts = prompting.read(adapters)
    prompt, several = texts[0], len(texts) > 1
    if several and (preview is not None or recipe is not None):
        raise SettingsError(f"--preview and --recipe are for one prompt, and there are {len(texts)}; pass one with --prompt")
    studio = placement.composition(chosen, base, loading)
    settings = asdict(drawing)
    batch_size = settings.pop("batch_size")
    album, pictures, files = Album(out), [], []
    try:
        with progress(len(texts) * len(wanted), drawing.steps) as (on_image, on_step):
            for _, text, part in batches(texts, wanted, batch_size):
                made = studio.generate(text, seeds=part, **settings, batch_size=batch_size, on_step=on_step)
                files += album.save(made)
                pictures += made
                on_image(len(pictures))
    except KeyboardInterrupt:
        if pictures:
            say(album.gallery())
        raise
    if preview is not None:
        found = studio.find_regions(prompt, seed=wanted[0], **settings) if isinstance(studio.regions, str) else studio.regions
        save_picture(drawn(found, pictures[0].image), preview)
        say(preview)
    if recipe is not None:
        say(Recipe.of(studio, prompt, seeds=wanted, **settings).save(recipe))
    for file in (*files, album.gallery()):
        say(file)


@command
def inpaint(
    photo: Path,  # photo to draw into, e.g. beach.jpg
    mask: Path,  # picture of its shape, white where to draw, e.g. here.png
    adapters: Named = None,
    *,
    prompt: str,  # what is there, with its surroundings, e.g. "a photo of ohwx dog on a beach"
    negative_prompt: str | None = None,  # what to avoid, e.g. "blurry, text"
    base: OwnBase = None,
    loading: Loading,
    placement: Placement,
    sampling: Sampling,
    seeds: str = "0",  # seeds, a picture for each, e.g. 0-3 or 1,5,8
    out: Out = Path("pictures"),
) -> None:
    """Draw a subject into a photo, where a mask is white; every other pixel stays as it is."""
    from ..pictures.gallery import Album

    wanted = parse_seeds(seeds)
    check_folder(out)
    texts, [prompt] = with_tags(adapters, [prompt])
    studio = placement.composition(by_file(texts), base, loading)
    pictures = studio.inpaint(photo, mask, prompt, seeds=wanted, negative_prompt=negative_prompt, **asdict(sampling))
    album = Album(out)
    for file in (*album.save(pictures), album.gallery()):
        say(file)


@command
def preflight(
    adapters: Named = None,
    *,
    prompt: str,  # what to draw, e.g. "a photo of ohwx dog and zwx mug"
    base: OwnBase = None,
    loading: Loading,
    placement: Placement,
    steps: Steps = STEPS,
    size: Size = None,
    trial: bool = False,  # run a few denoising steps to measure time and memory
) -> None:
    """Report conflicts between adapters, how they overlap and what a picture costs, before you draw it."""
    texts, [prompt] = with_tags(adapters, [prompt])
    studio = placement.composition(by_file(texts), base, loading)
    report = studio.preflight(prompt, steps=steps, size=size, trial=trial)
    say(report)
    if report.refused:
        raise AdapterBaseMismatch(report.refused[0])


@command
def replay(
    recipe: Path,  # recipe file of `generate --recipe`, e.g. pair.json
    adapters: list[Path],  # adapter files that it needs, in any order, e.g. rex.safetensors
    *,
    base: OwnBase = None,
    loading: Loading,
    seeds: str | None = None,  # other seeds than the recipe's, e.g. 0-3 or 1,5,8
    out: Out = Path("pictures"),
) -> None:
    """Draw the pictures of a recipe again."""
    from ..adapters.adapter import Adapter
    from ..pictures.gallery import Album
    from ..pictures.recipe import Recipe

    check_folder(out)
    written = Recipe.load(recipe)
    changes: dict[str, Any] = {} if seeds is None else {"seeds": parse_seeds(seeds)}
    loaded = [Adapter.load(path) for path in adapters]
    pictures = written.generate(loading.base(base, loaded), loaded, **changes)
    album = Album(out)
    for file in (*album.save(pictures), album.gallery()):
        say(file)


@command
def grid(
    adapters: Named = None,
    *,
    prompting: Prompting,
    drawing: Drawing,
    base: OwnBase = None,
    loading: Loading,
    weights: str | None = None,  # factors on the adapters' weights, a column for each; 0: the base alone [0,0.4,0.8,1]
    before_after: bool = False,  # draw two rows: without and with the adapters
    seeds: str = "0-3",  # seeds, a row for each and every prompt, e.g. 0-3 or 1,5,8
    out: Path | None = None,  # file to write, e.g. grid.jpg (also .png, .webp) or grid.html [grid.png, or the next free name]
    method: Method = None,
) -> None:
    """Draw the same prompts and seeds at several weights, on one labelled sheet."""
    from ..pictures.gallery import check_output, first_free
    from ..pictures.grids import WEIGHTS, before_after_of, grid_steps

    if before_after and weights is not None:
        raise SettingsError("--before-after and --weights exclude each other; pass one of them")
    factors = (0.0, 1.0) if before_after else WEIGHTS if weights is None else parse_weights(weights)
    wanted = parse_seeds(seeds)
    out = out or first_free(Path("grid.png"))
    check_output(out)
    check_place(out)
    named, texts = prompting.read(adapters)
    chosen = [item for _, item in named]
    made = None
    loaded = loading.base(base, [adapter for adapter, _ in chosen])
    shared: dict[str, Any] = {"weights": factors, "seeds": wanted, "method": method, **asdict(drawing)}
    try:
        with progress(len(texts) * len(wanted) * len(factors), drawing.steps) as (on_image, on_step):
            for made in grid_steps(loaded, chosen, texts, **shared, on_step=on_step):
                on_image(len(made.pictures))
    finally:  # also when interrupted: what is drawn is saved
        if made is not None:
            say((before_after_of(made) if before_after else made).save(out))


@contextmanager
def progress(total: int, steps: int) -> Iterator[tuple[Callable[[int], None], Callable[[int], None]]]:
    """What to call with the pictures drawn so far, and with those that a denoising step advanced: lines, and a bar for long."""
    from ..training.progress import display

    done, began = 0, time.monotonic()

    def on_step(advanced: int) -> None:
        nonlocal done
        done += advanced
        if time.monotonic() - began > PATIENCE:
            shown.progress("denoising steps", done, total * steps)

    with display(True) as shown:
        yield lambda count: shown.say(f"picture {count}/{total}"), on_step
