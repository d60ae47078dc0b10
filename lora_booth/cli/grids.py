"""The command that draws grids."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated

import typer

from ..config import GUIDANCE, STEPS
from ..errors import SettingsError
from .app import Base, app, say
from .arguments import (
    Adapters,
    BatchSize,
    Contexts,
    Guidance,
    Method,
    NegativePrompt,
    Prompt,
    Prompts,
    PromptSet,
    Size,
    Steps,
    load_base,
    parse_seeds,
    parse_weights,
    prompts_asked_for,
    weighted,
)


@app.command()
def grid(
    adapters: Adapters,
    prompt: Prompt = None,
    prompts: Prompts = None,
    prompt_set: PromptSet = None,
    context: Contexts = None,
    base: Base = "toybox",
    weights: Annotated[
        str | None,
        typer.Option(help="factors on the adapters' weights, e.g. 0,0.5,1, a column for each; 0: the base alone [0,0.4,0.8,1]"),
    ] = None,
    before_after: Annotated[bool, typer.Option(help="draw two rows: without and with the adapters")] = False,
    seeds: Annotated[str, typer.Option(help="seeds, a row for each and every prompt, e.g. 0-3 or 1,5,8")] = "0-3",
    out: Annotated[Path, typer.Option(help="file to write, e.g. grid.png (also .jpg, .webp) or grid.html")] = Path("grid.png"),
    negative_prompt: NegativePrompt = None,
    steps: Steps = STEPS,
    guidance: Guidance = GUIDANCE,
    size: Size = None,
    batch_size: BatchSize = 1,
    method: Method = None,
) -> None:
    """Draw the same prompts and seeds at several weights, on one labelled sheet."""
    from ..pictures.gallery import check_output
    from ..pictures.grids import WEIGHTS, before_after_of, grid_steps
    from ..pictures.prompts import prompts_for

    templates = prompts_asked_for(prompt, prompts, prompt_set)
    if before_after and weights is not None:
        raise SettingsError("--before-after and --weights exclude each other; pass one of them")
    factors = (0.0, 1.0) if before_after else WEIGHTS if weights is None else parse_weights(weights)
    wanted = parse_seeds(seeds)
    check_output(out)
    chosen = weighted(adapters)
    texts = prompts_for([adapter for adapter, _ in chosen], templates, contexts=context or ())
    made = None
    try:
        for made in grid_steps(
            load_base(base),
            chosen,
            texts,
            weights=factors,
            seeds=wanted,
            method=method,  # type: ignore[arg-type]  # checked by Composition
            negative_prompt=negative_prompt,
            steps=steps,
            guidance=guidance,
            size=size,
            batch_size=batch_size,
        ):
            print(f"picture {len(made.pictures)}/{made.total}", file=sys.stderr, flush=True)
    finally:  # also when interrupted: what is drawn is saved
        if made is not None:
            say(str((before_after_of(made) if before_after else made).save(out)))
