"""Commands from adapters to pictures."""

from __future__ import annotations

import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import CompositionWarning, SettingsError
from .app import Base, app, say
from .arguments import (
    AutoRegions,
    Contexts,
    Isolate,
    Method,
    Places,
    Prompt,
    Prompts,
    PromptSet,
    Quantize,
    by_file,
    calibrating,
    composition_of,
    load_base,
    parse_seeds,
    prompts_asked_for,
)

if TYPE_CHECKING:
    from ..pictures.picture import Picture

Out = Annotated[Path, typer.Option(help="folder for the pictures")]


@app.command()
def generate(
    adapters: Annotated[list[str], typer.Argument(help="adapter files, each with an optional :WEIGHT")],
    prompt: Prompt = None,
    prompts: Prompts = None,
    prompt_set: PromptSet = None,
    context: Contexts = None,
    base: Base = "toybox",
    seeds: Annotated[str, typer.Option(help="as 0-3 or 1,5,8; one picture each of every prompt")] = "0-3",
    out: Out = Path("pictures"),
    negative_prompt: Annotated[str | None, typer.Option(help="what the pictures shall not show")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale")] = 5.0,
    size: Annotated[int | None, typer.Option(help="side in pixels [the base's own]")] = None,
    batch_size: Annotated[int, typer.Option(help="pictures at a time")] = 1,
    method: Method = None,
    region: Places = None,
    auto_regions: AutoRegions = False,
    isolate: Isolate = "noise",
    preview: Annotated[Path | None, typer.Option(help="where to write a picture of the regions")] = None,
    recipe: Annotated[Path | None, typer.Option(help="where to write a recipe that replays to these pictures")] = None,
    quantize: Quantize = None,
) -> None:
    """Draw pictures with one or several adapters, and a gallery page of them."""
    from ..base.ai_mark import save_marked
    from ..pictures.gallery import Gallery
    from ..pictures.prompts import prompts_for
    from ..pictures.recipe import Recipe
    from ..pictures.regions import preview as drawn

    asked_for = prompts_asked_for(prompt, prompts, prompt_set)
    wanted = parse_seeds(seeds)
    if preview is not None and not (region or auto_regions):
        raise SettingsError("--preview shows regions; give --region or --auto-regions")
    chosen = by_file(adapters)
    texts = prompts_for([adapter for _, (adapter, _) in chosen], asked_for, contexts=context or ())
    prompt, several = texts[0], len(texts) > 1
    if several and (preview is not None or recipe is not None):
        raise SettingsError(f"--preview and --recipe are of one prompt, and there are {len(texts)}; give one with --prompt")
    how: dict[str, Any] = {"region": region, "auto_regions": auto_regions, "isolate": isolate, "quantize": quantize}
    studio = composition_of(chosen, base, method=method, **how)
    if studio.method == "ssr":
        studio.as_adapter(on_progress=calibrating)
    asked: dict[str, Any] = {"negative_prompt": negative_prompt, "steps": steps, "guidance": guidance, "size": size}
    title = prompt if not several else f"{len(texts)} prompts"
    pictures: list[Picture] = []
    files: list[Path] = []
    try:
        for number, text, part in parts(texts, wanted, batch_size):
            with heard_once(again=bool(pictures)):
                told = counting(len(texts) * len(wanted), before=len(pictures))
                made = studio.generate(text, seeds=part, **asked, batch_size=batch_size, on_image=told)
            start = f"{number:03d}-" if several else ""
            files += [picture.save(out / f"{start}{picture.seed:06d}.png") for picture in made]
            pictures += made
    except KeyboardInterrupt:
        if pictures:
            say(str(Gallery(pictures, title=title).save(out / "gallery.html")))
        raise
    if preview is not None:
        found = studio.find_regions(prompt, seed=wanted[0], **asked) if isinstance(studio.regions, str) else studio.regions
        save_marked(drawn(found, pictures[0].image), preview)
        say(str(preview))
    if recipe is not None:
        say(str(Recipe.of(studio, prompt, seeds=wanted, **asked).save(recipe)))
    for file in files:
        say(str(file))
    say(str(Gallery(pictures, title=title).save(out / "gallery.html")))


@app.command()
def preflight(
    adapters: Annotated[list[str], typer.Argument(help="adapter files, each with an optional :WEIGHT")],
    prompt: Annotated[str, typer.Option(help="what shall be drawn")],
    base: Base = "toybox",
    method: Method = None,
    region: Places = None,
    auto_regions: AutoRegions = False,
    isolate: Isolate = "noise",
    steps: Annotated[int, typer.Option(help="denoising steps, for the time of a picture")] = 25,
    size: Annotated[int | None, typer.Option(help="side in pixels, for the trial [the base's own]")] = None,
    trial: Annotated[bool, typer.Option(help="draw a few steps to measure time and memory")] = False,
) -> None:
    """Say what speaks against adapters in one picture, how they overlap, and what it costs, before it is drawn."""
    studio = composition_of(by_file(adapters), base, method=method, region=region, auto_regions=auto_regions, isolate=isolate)
    say(str(studio.preflight(prompt, steps=steps, size=size, trial=trial)))


@app.command()
def replay(
    recipe: Annotated[Path, typer.Argument(help="recipe file, as `generate --recipe` writes it")],
    adapters: Annotated[list[Path], typer.Argument(help="the adapter files that it needs, in any order")],
    base: Base = "toybox",
    seeds: Annotated[str | None, typer.Option(help="others than the recipe's")] = None,
    out: Out = Path("pictures"),
) -> None:
    """Draw the pictures of a recipe again."""
    from ..adapters.adapter import Adapter
    from ..pictures.recipe import Recipe

    written = Recipe.load(recipe)
    changes: dict[str, Any] = {} if seeds is None else {"seeds": parse_seeds(seeds)}
    loaded = [Adapter.load(path) for path in adapters]
    save(written.generate(load_base(base), loaded, **changes), out, title=str(written.pictures.get("prompt", "")))


def counting(total: int, *, before: int = 0) -> Any:
    return lambda done: print(f"picture {before + done}/{total}", file=sys.stderr, flush=True)


def parts(texts: Sequence[str], seeds: Sequence[int], batch_size: int) -> Iterator[tuple[int, str, list[int]]]:
    """Number of the prompt, prompt and seeds of each call, so that what is drawn is kept as soon as it is there."""
    for number, text in enumerate(texts, 1):
        for first in range(0, len(seeds), max(1, batch_size)):
            yield number, text, list(seeds[first : first + max(1, batch_size)])


@contextmanager
def heard_once(*, again: bool) -> Iterator[None]:
    """The same adapters give the same warning for every picture."""
    with warnings.catch_warnings():
        if again:
            warnings.simplefilter("ignore", CompositionWarning)
        yield


def save(pictures: Sequence[Picture], out: Path, *, title: str) -> None:
    from ..pictures.gallery import Gallery

    for picture in pictures:
        say(str(picture.save(out / f"{picture.seed:06d}.png")))
    say(str(Gallery(pictures, title=title).save(out / "gallery.html")))
