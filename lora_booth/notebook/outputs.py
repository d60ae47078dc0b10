"""What a notebook shows: what fits, whether the token is free, live progress, curves, samples, a playground, pages."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraBoothError, PhotoError
from .session import ipywidgets

if TYPE_CHECKING:
    from PIL import Image

    from ..base.base_model import BaseModel
    from ..pictures.composition import Weighted
    from ..pictures.grids import Grid
    from ..pictures.picture import Picture
    from ..training.progress import Step

THUMBNAIL = 160  # pixels of a live sample; chosen
SIDE = 256  # pixels of a picture on a sheet, at most; chosen
MOST_COLUMNS = 8  # steps on a sheet of samples; chosen
CHART = (  # how a curve looks outside the report's page
    ".lb{background:#fff}.lb path{fill:none}.lb text{font:12px sans-serif;fill:#3a3f4b}.lb .grid{stroke:#e6e8ee}"
    ".lb .raw{stroke:#c3c9d6}.lb .mean{stroke:#3b5bdb;stroke-width:1.5}.lb .mark{stroke:#e8590c;stroke-dasharray:3 3}"
)


def compare(*bases: str, photos: int = 5, steps: int | None = None) -> None:
    """Print what training each base would take on this machine. bases: as for `plan`; steps: None for the default"""
    from ..config import TrainingConfig
    from ..planning.planning import plan

    for base in bases:
        print(f"{base}: {plan(base, config=TrainingConfig(steps=steps), photos=photos).summary}")


def judge(token: str, base: BaseModel) -> None:
    """Print whether the token is free to take a new meaning in this base, and other tokens that are."""
    from ..subject.tokens import check_token, propose_tokens
    from ..training.encoding import token_reading

    read = token_reading(base)
    report = check_token(token, base.tokenizer, **read)
    print(token, "is not free:" if report.problems else "can be used, but others are better:" if report.warnings else "is free")
    for line in (*report.problems, *report.warnings):
        print(" ", line)
    print("others:", *(one for one in propose_tokens(base.tokenizer, **read) if one != token))


def watch(run: str | Path, *, every: float = 5.0) -> Callable[[Step], None]:
    """For `train(on_step=...)`: the loss and the newest samples, redrawn in place. every: in seconds"""
    from IPython.display import HTML, display

    from ..report.report import chart
    from ..training.progress import clock, described

    points: list[tuple[float, float]] = []
    drawn = float("-inf")
    place = display(HTML(""), display_id=True)

    def on_step(step: Step) -> None:
        nonlocal drawn
        now = time.monotonic()
        if now - drawn < every and step.index < step.total:
            return  # reading a loss waits for the GPU
        drawn = now
        points.append((float(step.index), step.smoothed_loss))
        found = chart(f"step {step.index} of {step.total}", [("mean", points)], last=step.total, height=160, style=CHART)
        words = f"step {step.index} of {step.total}: {described(step)}, {clock(step.seconds_left)} left"
        place.update(HTML(f"<p>{words}</p>{found or ''}{newest_samples(Path(run))}"))

    return on_step


def newest_samples(run: Path) -> str:
    from ..base.ai_mark import data_url
    from ..pictures.gallery import FULL_QUALITY

    found = samples_of(run, most=1)
    return "" if found is None else f'<img src="{data_url(found.sheet(side=THUMBNAIL), FULL_QUALITY)}" alt="newest samples">'


def loss_curve(run: str | Path) -> Any:
    """The loss of a run and its running mean by step, as an SVG; None if there is no step yet."""
    from IPython.display import SVG

    from ..report.reading import read_run
    from ..report.report import loss_chart

    found = loss_chart(read_run(Path(run)), style=CHART)
    if found is None:
        print("No steps yet.")
        return None
    return SVG(found)


def samples(run: str | Path, *, side: int = 160) -> Image.Image | None:
    """A run's samples on one sheet: a row for each prompt and seed, a column for each step. side: of a sample, in pixels"""
    found = samples_of(Path(run), most=MOST_COLUMNS)
    if found is None:
        print("No samples: pass TrainingConfig(sample_every=100) to draw some; they stay in the session that draws them.")
        return None
    return found.sheet(side=side)


def samples_of(run: Path, *, most: int) -> Grid | None:
    """A row for each prompt and seed, and columns for at most so many steps, the last one among them."""
    from ..photos.opening import read_picture
    from ..pictures.grids import Grid
    from ..pictures.picture import Picture
    from ..report.reading import samples as samples_in
    from ..report.report import spread
    from ..training.checkpoint import SAMPLES

    found = samples_in(run / SAMPLES)
    if not found:
        return None
    at = {(one.prompt, one.seed, one.step): one.file for one in found}
    rows = list(dict.fromkeys((one.prompt, one.seed) for one in found))
    every = sorted({one.step for one in found})
    steps = every[-1:] if most == 1 else spread(every, most)

    def cell(prompt: str, seed: int, step: int) -> Picture | None:
        file = at.get((prompt, seed, step))
        try:
            return None if file is None else Picture(read_picture(file, inside=run), prompt, seed)
        except PhotoError:
            return None

    return Grid(
        tuple(prompt for prompt, _ in rows),
        tuple(f"step {step}" if step else "before" for step in steps),
        tuple(tuple(cell(*row, step) for step in steps) for row in rows),
    )


def sheet(pictures: Sequence[Picture], *, columns: int = 4) -> Image.Image:
    """Pictures side by side, labelled with their seeds."""
    from ..photos.sheet import contact_sheet

    return contact_sheet([p.image for p in pictures], labels=[f"seed {p.seed}" for p in pictures], columns=columns, side=SIDE)


def playground(
    base: BaseModel, adapters: Sequence[Weighted], prompt: str, *, seed: int = 0, weight: float = 1.0, steps: int = 25
) -> list[Picture]:
    """Draw a picture, then show fields for prompt, seed, number of pictures and weight, and a button that draws more.

    Returns the list that every drawn picture is added to. Without widgets there is one picture; call it again for another.
    """
    from dataclasses import replace

    from IPython.display import display

    from ..pictures.composition import Composition, everyone_of

    everyone, drawn = everyone_of(adapters), []

    def draw(prompt: str, seed: int, weight: float, count: int = 1) -> None:
        studio = Composition(base, [(a, replace(w, value=w.value * weight)) for a, w in everyone])
        made = studio.generate(prompt, seeds=range(seed, seed + count), steps=steps)
        drawn.extend(made)
        display(sheet(made))

    draw(prompt, seed, weight)
    widgets = ipywidgets()
    if widgets is None:
        return drawn
    wide = widgets.Layout(width="95%")
    text = widgets.Text(prompt, description="prompt", layout=wide)
    first = widgets.BoundedIntText(seed, min=0, max=2**31 - 1, description="seed")
    count = widgets.IntSlider(1, min=1, max=8, description="pictures")
    strength = widgets.FloatSlider(weight, min=0, max=1.5, step=0.05, description="weight")
    button, output = widgets.Button(description="Draw", button_style="primary"), widgets.Output()

    def clicked(_: Any) -> None:
        button.disabled = True
        try:
            with output:
                output.clear_output(wait=True)
                try:
                    draw(text.value, first.value, strength.value, count.value)
                except LoraBoothError as error:
                    print(error)
        finally:
            button.disabled = False

    button.on_click(clicked)
    display(widgets.VBox([text, widgets.HBox([first, count, strength]), button, output]))
    return drawn


def page(path: str | Path, *, height: int = 640) -> Any:
    """Show a gallery or report in the notebook, even where its files are not served. height: in pixels"""
    from IPython.display import HTML

    inside = escape(Path(path).read_text(encoding="utf-8"))
    style = f"width:100%;height:{height}px;border:1px solid #8884"
    allowed = 'sandbox="allow-scripts allow-downloads" allow="clipboard-write *"'
    return HTML(f'<div><iframe srcdoc="{inside}" style="{style}" {allowed}></iframe></div>')
