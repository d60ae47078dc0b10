"""Commands from adapters to pictures."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SettingsError
from .app import Base, app, say
from .words import file_and_weight, load_base, parse_seeds, region_words, weighted

if TYPE_CHECKING:
    from ..composition import Picture

Out = Annotated[Path, typer.Option(help="folder for the pictures")]


@app.command()
def generate(
    adapters: Annotated[list[str], typer.Argument(help="adapter files, each with an optional :WEIGHT")],
    prompt: Annotated[str, typer.Option(help="what to draw; the adapter's token belongs in it")],
    base: Base = "toybox",
    seeds: Annotated[str, typer.Option(help="as 0-3 or 1,5,8; one picture each")] = "0-3",
    out: Out = Path("pictures"),
    negative_prompt: Annotated[str | None, typer.Option(help="what the pictures shall not show")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale")] = 5.0,
    size: Annotated[int | None, typer.Option(help="side in pixels [the base's own]")] = None,
    batch_size: Annotated[int, typer.Option(help="pictures at a time")] = 1,
    method: Annotated[
        str | None, typer.Option(help="sum, svd, switch, composite or regions [regions where there are any, else sum]")
    ] = None,
    region: Annotated[
        list[str] | None,
        typer.Option(
            help="place of an adapter, as NAME:x0,y0,x1,y1 or NAME:x0,y0,x1,y1:PROMPT; NAME of its file; once for each"
        ),
    ] = None,
    auto_regions: Annotated[bool, typer.Option(help="find the place of each adapter that the prompt names")] = False,
    isolate: Annotated[str, typer.Option(help="of regions: noise (a pass for each) or delta (about one pass)")] = "noise",
    preview: Annotated[Path | None, typer.Option(help="where to write a picture of the regions")] = None,
    recipe: Annotated[Path | None, typer.Option(help="where to write a recipe that replays to these pictures")] = None,
) -> None:
    """Draw pictures with one or several adapters, and a gallery page of them."""
    from ..composition import Composition, Recipe, Region
    from ..composition import preview as drawn

    wanted = parse_seeds(seeds)
    if region and auto_regions:
        raise SettingsError("--region and --auto-regions exclude each other; give one of them")
    if preview is not None and not (region or auto_regions):
        raise SettingsError("--preview shows regions; give --region or --auto-regions")
    names = [file_and_weight(text)[0].stem for text in adapters]
    chosen = list(zip(names, weighted(adapters), strict=True))
    if region and len(set(names)) < len(names):
        raise SettingsError("two of the adapter files have one name; rename one, so that regions can tell them apart")
    places: dict[str, Region] = {}
    for text in region or []:
        name, box, words = region_words(text)
        if name not in names:
            raise SettingsError(f"region {text!r}: no adapter {name!r}; given: {', '.join(names)}")
        adapter, weight = dict(chosen)[name]
        places[name] = Region(adapter, box=box, prompt=words, weight=weight)
    studio = Composition(
        load_base(base),
        [item for name, item in chosen if name not in places],
        method=method,  # type: ignore[arg-type]  # checked by Composition
        regions="auto" if auto_regions else list(places.values()),
        isolate=isolate,  # type: ignore[arg-type]
    )
    asked: dict[str, Any] = {"negative_prompt": negative_prompt, "steps": steps, "guidance": guidance, "size": size}
    pictures = studio.generate(prompt, seeds=wanted, **asked, batch_size=batch_size, on_image=counting(len(wanted)))
    if preview is not None:
        found = (
            studio.find_regions(prompt, seed=wanted[0], steps=steps, guidance=guidance)
            if auto_regions
            else list(places.values())
        )
        drawn(found, pictures[0].image).save(preview)
        say(str(preview))
    if recipe is not None:
        say(str(Recipe.of(studio, prompt, seeds=wanted, **asked).save(recipe)))
    save(pictures, out, title=prompt)


@app.command()
def replay(
    recipe: Annotated[Path, typer.Argument(help="recipe file, as `generate --recipe` writes it")],
    adapters: Annotated[list[Path], typer.Argument(help="the adapter files that it needs, in any order")],
    base: Base = "toybox",
    seeds: Annotated[str | None, typer.Option(help="others than the recipe's")] = None,
    out: Out = Path("pictures"),
) -> None:
    """Draw the pictures of a recipe again."""
    from ..adapters import Adapter
    from ..composition import Recipe

    written = Recipe.load(recipe)
    changes: dict[str, Any] = {} if seeds is None else {"seeds": parse_seeds(seeds)}
    loaded = [Adapter.load(path) for path in adapters]
    save(written.generate(load_base(base), loaded, **changes), out, title=str(written.pictures.get("prompt", "")))


def counting(total: int) -> Any:
    return lambda done: print(f"picture {done}/{total}", file=sys.stderr, flush=True)


def save(pictures: Sequence[Picture], out: Path, *, title: str) -> None:
    from ..gallery import Gallery

    for picture in pictures:
        say(str(picture.save(out / f"{picture.seed:06d}.png")))
    say(str(Gallery(pictures, title=title).save(out / "gallery.html")))
