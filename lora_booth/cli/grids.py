"""The command that draws grids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import SettingsError
from .app import Base, app, say
from .arguments import Contexts, Prompt, Prompts, PromptSet, load_base, parse_seeds, parse_weights, prompts_asked_for, weighted


@app.command()
def grid(
    adapters: Annotated[list[str], typer.Argument(help="adapter files, each with an optional :WEIGHT")],
    prompt: Prompt = None,
    prompts: Prompts = None,
    prompt_set: PromptSet = None,
    context: Contexts = None,
    base: Base = "toybox",
    weights: Annotated[
        str | None, typer.Option(help="columns: factors on the weight of each adapter, 0 for the base alone [0,0.4,0.8,1]")
    ] = None,
    before_after: Annotated[bool, typer.Option(help="two rows instead: without and with the adapters")] = False,
    seeds: Annotated[str, typer.Option(help="as 0-3 or 1,5,8; a row each of every prompt")] = "0-3",
    out: Annotated[Path, typer.Option(help="a sheet (.png, .jpg, .webp) or a page (.html)")] = Path("grid.png"),
    negative_prompt: Annotated[str | None, typer.Option(help="what the pictures shall not show")] = None,
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale")] = 5.0,
    size: Annotated[int | None, typer.Option(help="side in pixels [the base's own]")] = None,
    batch_size: Annotated[int, typer.Option(help="pictures at a time")] = 1,
    method: Annotated[str | None, typer.Option(help="how several adapters are heard, as in generate")] = None,
) -> None:
    """Draw the same prompts and seeds at several weights, on one labelled sheet."""
    from ..pictures.grids import before_after_of, check_output, grid_steps
    from ..pictures.prompts import prompts_for

    asked_for = prompts_asked_for(prompt, prompts, prompt_set)
    if before_after and weights is not None:
        raise SettingsError("--before-after and --weights exclude each other; give one of them")
    factors = [0.0, 1.0] if before_after else parse_weights(weights or "0,0.4,0.8,1")
    wanted = parse_seeds(seeds)
    check_output(out)
    chosen = weighted(adapters)
    texts = prompts_for([adapter for adapter, _ in chosen], asked_for, contexts=context or ())
    asked: dict[str, Any] = {"negative_prompt": negative_prompt, "steps": steps, "guidance": guidance, "size": size}
    made = None
    try:
        everything = grid_steps(
            load_base(base),
            chosen,
            texts,
            weights=factors,
            seeds=wanted,
            method=method,  # type: ignore[arg-type]  # checked by Composition
            batch_size=batch_size,
            **asked,
        )
        for made in everything:
            print(f"picture {len(made.pictures)}/{made.total}", file=sys.stderr, flush=True)
    finally:  # interrupted too: what is drawn is kept
        if made is not None:
            say(str((before_after_of(made) if before_after else made).save(out)))
