"""What the page's parts share: how a handler is called, and that a mistake is one line in the page and never a traceback."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import wraps
from html import escape
from typing import Any

import gradio as gr

from ..base.base_model import import_libraries
from ..errors import LoraBoothError, SettingsError, in_command
from .drawing import CANVAS, Models
from .folder import StudioFolder
from .runs import Trainings

TOOLS = 120  # pixels of Gradio's tools around a picture to paint on


@dataclass(frozen=True)
class Studio:
    """The page, and what it is a view of."""

    page: gr.Blocks
    folder: StudioFolder
    trainings: Trainings
    models: Models


# Gradio's components, made for this page. They are no classes of our own: those get a file beside their source.


def choice(label: str, **more: Any) -> Any:
    """A list of names in the studio's folder, which checks what comes: in another browser there may be more of them.

    Nothing is chosen until the tab is read, so that choosing is a change, which shows what is chosen.
    """
    return gr.Dropdown([], label=label, allow_custom_value=True, **{"value": None, **more})


def gallery(label: str, columns: int, **more: Any) -> Any:
    """Pictures, each with a name in a list beside it."""
    return gr.Gallery(label=label, columns=columns, fit_columns=False, height="auto", format="png", interactive=False, **more)


def pick(pictures: Any, names: Any, listed: Callable[..., Sequence[str]], inputs: Sequence[Any] | None = None) -> None:
    """Let a click on a picture choose its name. listed: the names, in the order of the pictures"""

    def picked(event: gr.SelectData, *given: Any) -> Any:
        there = listed(*given)
        return there[event.index] if event.index < len(there) else gr.skip()  # removed in another browser

    listen([pictures.select], picked, inputs, [names])


def painting(label: str, colors: Sequence[str], **more: Any) -> Any:
    """Where one paints over what `painting_of` returns."""
    brush = gr.Brush(default_size=40, colors=list(colors), color_mode="fixed")
    plain = {"sources": [], "transforms": [], "layers": False, "buttons": [], "type": "pil", "format": "png"}
    return gr.ImageEditor(label=label, brush=brush, height=CANVAS + TOOLS, canvas_size=(CANVAS, CANVAS), **plain, **more)


def listen(
    triggers: Sequence[Any],
    handler: Callable[..., Any],
    inputs: Sequence[Any] | None = None,
    outputs: Sequence[Any] | None = None,
    *,
    model: bool = False,
) -> None:
    """Call `handler` on these events. model: it uses a base, so that one such call runs at a time and the others wait"""
    pressed = {one.event_name for one in triggers} <= {"click", "submit"}
    gr.on(
        triggers,
        plain(handler),
        inputs,
        outputs,
        api_visibility="private",
        concurrency_limit=1 if model else None,
        concurrency_id="model" if model else None,
        show_progress="minimal" if model or pressed else "hidden",
        # a field that changes again meanwhile is read once more; a button that is pressed again is not
        trigger_mode="once" if pressed else "always_last",
    )


def plain(handler: Callable[..., Any]) -> Callable[..., Any]:
    @wraps(handler)
    def call(*given: Any, **more: Any) -> Any:
        in_command.set(False)  # messages are for the page, which has fields and no options
        import_libraries()
        try:
            return handler(*given, **more)
        except (LoraBoothError, OSError) as error:
            raise gr.Error(escape(str(error)), duration=None, title="Please change something", print_exception=False) from None
        except Exception as error:  # which Gradio prints in the terminal
            text = "This should not happen; the terminal of the studio shows what did. Your files are safe."
            raise gr.Error(text, duration=None, title="A defect of the studio") from error

    return call


def sure(yes: bool, loss: str) -> None:
    """Raises SettingsError unless the box beside the button is ticked."""
    if not yes:
        raise SettingsError(f"tick 'Yes' first: {loss}")


def one_of(names: Sequence[str], wanted: str | None = None) -> Any:
    """An update of a drop-down list."""
    value = wanted if wanted in names else names[0] if names else None
    return gr.Dropdown(choices=list(names), value=value)


def lines(*texts: str, kind: str = "note") -> str:
    """HTML of a paragraph for each text."""
    return "".join(f'<p class="{kind}">{escape(text)}</p>' for text in texts)
