"""The page: the base at its top, and a tab for each step of the way."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator

import gradio as gr

from .adapters_tab import adapters_tab
from .drawing import Models
from .events import Studio, choice, lines, listen, one_of
from .folder import StudioFolder
from .photos_tab import photos_tab
from .play_tab import play_tab
from .runs import Trainings
from .train_tab import train_tab

FONTS = ("system-ui", "-apple-system", "Segoe UI", "Roboto", "sans-serif")  # what the machine has: nothing is fetched
CSS = """
.gradio-container { width: 100%; max-width: 1180px !important; margin: auto }
.note, .good, .advice, .error, .command { margin: .3em 0; padding: .45em .7em; border-radius: 6px; overflow-wrap: anywhere }
.note, .advice, .command { background: var(--background-fill-secondary) }
.good { border-left: 4px solid #2b8a3e } .advice { border-left: 4px solid #e67700 } .error { border-left: 4px solid #c92a2a }
.command { font-family: ui-monospace, monospace; font-size: .85em }
.command:empty { display: none }
button[role=tab].selected { color: inherit }
progress { width: 100%; height: .9em; accent-color: #3b5bdb }
#card table { width: 100%; font-size: .9em } #card th { text-align: left; padding-right: 1em; vertical-align: top }
#card td { overflow-wrap: anywhere }
.wrap:has(> span.error) { display: none !important } /* the message is beside it, and stays */
.grid-wrap { min-height: 0 !important; overflow-y: auto !important }
#status svg { max-width: 100%; height: auto }
"""


async def stay() -> AsyncIterator[None]:
    """Keep the page's stream of answers open.

    Gradio closes it once nothing is asked, and an answer to what is asked at that very moment would never arrive.
    """
    while True:
        yield
        await asyncio.sleep(5)


def theme() -> gr.themes.Base:
    made = gr.themes.Default(primary_hue="indigo", font=FONTS, font_mono=("ui-monospace", "monospace"))
    colors: dict[str, str] = {}  # where the default is too pale to read
    for name in ("block_info_text_color", "block_label_text_color", "block_title_text_color", "body_text_color_subdued"):
        colors |= {name: "*neutral_600", f"{name}_dark": "*neutral_300"}
    colors |= {"input_placeholder_color": "*neutral_500", "input_placeholder_color_dark": "*neutral_400"}
    for name, color in (("primary", "*primary_600"), ("cancel", "#b91c1c")):
        colors |= {f"button_{name}_background_fill{mode}": color for mode in ("", "_dark")}
    return made.set(**colors)


def page(folder: StudioFolder) -> gr.Blocks:
    with gr.Blocks(title="lora_booth studio", analytics_enabled=False, delete_cache=(3600, 24 * 3600)) as blocks:
        studio = Studio(blocks, folder, Trainings(folder), Models(folder))
        gr.Markdown("# Studio\nPhotos, then Train, then Play: teach a model your subject, and draw it.")
        where = f"What is on this machine; add yours to {folder.place('bases')}"
        base = choice("Base model", info=where, elem_id="base")
        about = gr.HTML(elem_id="about")
        with gr.Tabs(elem_id="tabs"):
            subject = photos_tab(studio)
            train_tab(studio, subject)
            play_tab(studio)
            adapters_tab(studio)

        def choose(name: str) -> str:
            folder.choose_base(name)
            found = studio.models.base()
            text = f"{found.family.label}, {found.resolution} x {found.resolution} pixels, on the {found.device.type.upper()}"
            toy = ["A tiny model for trials, which draws simple scenes. For real photos choose another base."]
            return lines(text, *toy * (name == "toybox"))

        blocks.load(stay, api_visibility="private", concurrency_limit=None, show_progress="hidden")
        listen([base.change], choose, [base], [about], model=True)
        listen([blocks.load], lambda: one_of(list(folder.bases()), folder.base), None, [base])
    blocks.queue(default_concurrency_limit=None, api_open=False)
    return blocks
