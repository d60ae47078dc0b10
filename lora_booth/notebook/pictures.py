"""Finished adapters in a notebook: sheets of pictures, a playground, and pages."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..errors import LoraBoothError
from .session import ipywidgets

if TYPE_CHECKING:
    from PIL import Image

    from ..base.base_model import BaseModel
    from ..pictures.composition import Weighted
    from ..pictures.picture import Picture

SIDE = 256  # pixels of a picture on a sheet, at most; chosen


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
