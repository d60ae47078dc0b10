"""Commands about how well a training went: scores, and the report of a run."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .app import note, say, say_json
from .arguments import check_folder, file_and_weight, parse_seeds
from .options import Loading, OwnBase, Prompting, SizedSampling, command

if TYPE_CHECKING:
    from ..evaluation.protocol import Candidate
    from ..evaluation.results import Comparison


@command
def evaluate(
    adapters: list[str],  # adapter files with an optional weight, or folders of runs, e.g. rex.safetensors:0.8 runs/rex
    *,
    photos: Path,  # folder of photos of the subject, e.g. photos/rex
    base: OwnBase = None,
    loading: Loading,
    prompting: Prompting,
    sampling: SizedSampling,
    seeds: str = "0-3",  # seeds of the pictures of each prompt, e.g. 0-3 or 1,5,8
    class_seeds: str = "0-15",  # seeds of the pictures of the plain class, e.g. 0-15
    batch_size: int | None = None,  # pictures at a time, e.g. 4 [4 at 512 pixels]
    dino: str | None = None,  # DINO model: a Hub id or folder, e.g. models/dino [facebook/dino-vits16]
    clip: str | None = None,  # CLIP model: a Hub id or folder, e.g. models/clip [openai/clip-vit-base-patch32]
    token: str | None = None,  # token of adapters whose card has none, e.g. ohwx
    class_noun: str | None = None,  # class noun of adapters whose card has none, e.g. dog
    json: bool = False,  # print everything as JSON instead of a table
    out: Path | None = None,  # folder for scores.json and a gallery of the pictures, e.g. scored
) -> None:
    """Score adapters, or all that a run has saved, by new pictures, and name the best."""
    from ..evaluation.protocol import evaluate as compared
    from ..evaluation.protocol import is_run, opened

    changes: dict[str, Any] = {"prompts": prompting.templates()} if prompting.given else {}
    changes |= {name: model for name, model in (("dino", dino), ("clip", clip)) if model is not None}
    if out is not None:
        check_folder(out)
    of_subject, of_class = parse_seeds(seeds), parse_seeds(class_seeds)
    chosen = [one for text in adapters for one in candidates(text, token, class_noun)]
    runs = [path for text in adapters if is_run(path := file_and_weight(text)[0])]
    images = opened(photos)  # before gigabytes are read
    made = compared(
        loading.base(base, [one.adapter for one in chosen]),
        chosen,
        images,
        contexts=prompting.context or None,
        seeds=of_subject,
        class_seeds=of_class,
        batch_size=batch_size,
        on_progress=lambda done, total: note(f"picture {done}/{total}"),
        **asdict(sampling),
        **changes,
    )
    if json:
        say_json(made.as_dict())
    else:
        say("\n".join(made.lines()))
    for file in written(made, runs, out):
        (note if json else say)(f"wrote {file}")


@command
def report(
    run: Path,  # folder of a run, e.g. runs/rex
    *,
    photos: bool = True,  # show small copies of the photos; leave them out of a page that you share
) -> None:
    """Write the report.html of a run again, from the files in its folder."""
    from ..report.report import write_report

    say(f"wrote {write_report(run, photos=photos)}")


def candidates(text: str, token: str | None, class_noun: str | None) -> Iterator[Candidate]:
    from ..adapters.adapter import Adapter
    from ..evaluation.protocol import Candidate, candidates_of, is_run

    path, weight = file_and_weight(text)
    for found in candidates_of(path) if is_run(path) else [Candidate(Adapter.load(path), path.stem)]:
        card = found.adapter.card
        words = {"token": card.token or token, "class_noun": card.class_noun or class_noun}
        yield replace(found, adapter=found.adapter.with_card(**words), weight=weight)


def written(made: Comparison, runs: list[Path], out: Path | None) -> Iterator[Path]:
    from ..evaluation.results import scores_file
    from ..pictures.gallery import Gallery
    from ..report.report import write_report

    if len(runs) == 1:
        yield scores_file(runs[0], made)
        yield write_report(runs[0])
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
        yield scores_file(out, made)
        pictures = [picture for row in (made.floor, *made.adapters) for picture in row.pictures]
        yield Gallery(pictures, title="evaluation").save(out / "gallery.html")
