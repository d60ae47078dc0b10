"""Commands that say how well it went: scores, and the report of a run."""

from __future__ import annotations

import json as json_text  # --json is a parameter of that name
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from .app import Base, app, say
from .arguments import Contexts, Prompt, Prompts, PromptSet, file_and_weight, load_base, parse_seeds, prompts_asked_for

if TYPE_CHECKING:
    from ..evaluation.protocol import Candidate
    from ..evaluation.results import Comparison


@app.command()
def evaluate(
    adapters: Annotated[list[str], typer.Argument(help="adapter files, each with an optional :WEIGHT, or folders of runs")],
    photos: Annotated[Path, typer.Option(help="folder of photos of the subject")],
    base: Base = "toybox",
    prompt: Prompt = None,
    prompts: Prompts = None,
    prompt_set: PromptSet = None,
    context: Contexts = None,
    seeds: Annotated[str, typer.Option(help="as 0-3 or 1,5,8; one picture each of every prompt")] = "0-3",
    class_seeds: Annotated[str, typer.Option(help="of pictures of the bare class")] = "0-15",
    steps: Annotated[int, typer.Option(help="denoising steps")] = 25,
    guidance: Annotated[float, typer.Option(help="classifier-free guidance scale")] = 5.0,
    size: Annotated[int | None, typer.Option(help="side in pixels [the base's own]")] = None,
    batch_size: Annotated[int | None, typer.Option(help="pictures at a time [4 of 512 pixels]")] = None,
    dino: Annotated[str | None, typer.Option(help="Hub id or folder [facebook/dino-vits16]")] = None,
    clip: Annotated[str | None, typer.Option(help="Hub id or folder [openai/clip-vit-base-patch32]")] = None,
    token: Annotated[str | None, typer.Option(help="of adapters whose card names none")] = None,
    class_noun: Annotated[str | None, typer.Option(help="of adapters whose card names none")] = None,
    json: Annotated[bool, typer.Option(help="everything as JSON instead")] = False,
    out: Annotated[Path | None, typer.Option(help="folder for scores.json and a gallery of the pictures [none]")] = None,
) -> None:
    """Score adapters, or all that a run has kept, on new pictures: subject, prompt, prior, copies; and say which is best."""
    from ..evaluation.cases import TEMPLATE
    from ..evaluation.encoders import CLIP, DINO
    from ..evaluation.protocol import evaluate as compared

    given = any(one is not None for one in (prompt, prompts, prompt_set))
    asked_for = prompts_asked_for(prompt, prompts, prompt_set) if given else (TEMPLATE,)
    wanted, of_class = parse_seeds(seeds), parse_seeds(class_seeds)
    chosen = [one for text in adapters for one in candidates(text, token, class_noun)]
    runs = [Path(text) for text in adapters if has_run(text)]

    def told(done: int, total: int) -> None:
        print(f"picture {done}/{total}", file=sys.stderr, flush=True)

    made = compared(
        load_base(base),
        chosen,
        photos,
        prompts=asked_for,
        contexts=context,
        seeds=wanted,
        class_seeds=of_class,
        steps=steps,
        guidance=guidance,
        size=size,
        batch_size=batch_size,
        dino=dino or DINO,
        clip=clip or CLIP,
        on_progress=told,
    )
    for line in [json_text.dumps(made.as_dict(), indent=1)] if json else made.lines():
        say(line)
    told_of = sys.stderr if json else sys.stdout
    for file in written(made, runs, out):
        print(f"wrote {file}", file=told_of, flush=True)


@app.command()
def report(
    run: Annotated[Path, typer.Argument(help="folder of a run")],
    photos: Annotated[bool, typer.Option(help="show small copies of the photos; without, the page can be passed on")] = True,
) -> None:
    """Write a run's report.html anew, from what its folder holds."""
    from ..report.report import write_report

    say(f"wrote {write_report(run, photos=photos)}")


def has_run(text: str) -> bool:
    from ..evaluation.runs import is_run

    return is_run(file_and_weight(text)[0])


def candidates(text: str, token: str | None, class_noun: str | None) -> Iterator[Candidate]:
    from dataclasses import replace

    from ..adapters.adapter import Adapter
    from ..evaluation.protocol import Candidate
    from ..evaluation.runs import candidates_of, is_run

    path, weight = file_and_weight(text)
    for found in candidates_of(path) if is_run(path) else [Candidate(Adapter.load(path), path.stem)]:
        card = found.adapter.card
        words = {"token": card.token or token, "class_noun": card.class_noun or class_noun}
        yield replace(found, adapter=found.adapter.with_card(**words), weight=weight)


def written(made: Comparison, runs: list[Path], out: Path | None) -> Iterator[Path]:
    from ..evaluation.runs import scores_file
    from ..files import write_file
    from ..pictures.gallery import Gallery
    from ..report.report import write_report

    if len(runs) == 1:
        yield scores_file(runs[0], made)
        yield write_report(runs[0])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        file = out / "scores.json"
        write_file(file, json_text.dumps(made.as_dict(), indent=1).encode())
        yield file
        pictures = [picture for row in (made.floor, *made.adapters) for picture in row.pictures]
        yield Gallery(pictures, title="evaluation").save(out / "gallery.html")
