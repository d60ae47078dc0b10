"""Play: draw with adapters, place two subjects, compare, and keep what was drawn."""

from __future__ import annotations

from itertools import islice
from typing import Any

import gradio as gr
from PIL import Image

from ..config import GUIDANCE, STEPS
from ..errors import SettingsError
from ..files import remove as remove_file
from ..pictures.gallery import Album, first_free
from ..pictures.grids import grid
from .drawing import BY_STEP, BY_WEIGHT, CANVAS, COLORS, PLACES, Painted, album, painting_of, remarks
from .events import Studio, choice, gallery, lines, listen, one_of, painting, pick

SLOTS = ("First adapter", "Second adapter", "Third adapter, e.g. a style")
MOST_WEIGHT = 1.5  # of a slider
MOST_SHOWN = 48  # pictures on the page; chosen
MOST_AT_ONCE = 8  # pictures of one click
NONE = "none"


def play_tab(studio: Studio) -> None:
    folder, models = studio.folder, studio.models
    with gr.Tab("Play", id="play") as tab:
        prompt = gr.Textbox(label="Prompt", lines=2, placeholder="e.g. a photo of ohwx dog on the beach", elem_id="prompt")
        suggested, words = gr.State(""), gr.HTML(elem_id="words")
        names: list[Any] = []
        weights: list[Any] = []
        for label in SLOTS:
            with gr.Row():
                names.append(choice(label, value=NONE))
                weights.append(gr.Slider(0, MOST_WEIGHT, 1, step=0.05, label=f"Weight of the {label.split(',')[0].lower()}"))
        place = gr.Radio([(f"{k}: {v}", k) for k, v in PLACES.items()], value="found", label="Where two subjects go")
        with gr.Column(visible=False) as easel:  # not the canvas itself: a change of its settings would make it anew
            label = "Paint the first subject's place in orange, the second's in blue"
            grey = painting_of(Image.new("RGB", (CANVAS, CANVAS), "#808080"), [])
            canvas = painting(label, COLORS, value=grey, elem_id="easel")
            trace = gr.Button("Paint on the picture that is chosen below, from where its subjects went", elem_id="trace")
        with gr.Accordion("Seeds, steps, size", open=False):
            with gr.Row():
                seed = gr.Number(0, label="First seed", precision=0, minimum=0)
                number = gr.Slider(1, MOST_AT_ONCE, 2, step=1, label="Pictures")
                steps = gr.Slider(1, 100, STEPS, step=1, label="Denoising steps")
                guidance = gr.Slider(0, 15, GUIDANCE, step=0.5, label="Guidance")
                size = gr.Textbox(label="Size", info="e.g. 768 or 768x512; empty: the base's own", max_lines=1)
            negative = gr.Textbox(label="What to avoid", max_lines=1)
        draw = gr.Button("Draw", variant="primary", elem_id="draw")
        notes = gr.HTML(elem_id="notes")
        tools = ["download", "fullscreen"]
        pictures = gallery("Pictures, the newest first", columns=4, buttons=tools, elem_id="pictures")
        picture = choice("Picture", info="Choose one above to see how it was made", elem_id="picture")
        how = gr.HTML(elem_id="how")
        with gr.Row():
            redraw = gr.Button("Redraw", elem_id="redraw")
            remove = gr.Button("Remove", variant="stop")
            page = gr.Button("All as one page", elem_id="page")
        sent = gr.DownloadButton("Download gallery.html", visible=False)
        with gr.Accordion("Compare", open=False):
            kind = gr.Radio([BY_WEIGHT, BY_STEP], value=BY_WEIGHT, label="What to compare")
            run = choice("Run", info="Whose steps")
            compare = gr.Button("Draw the comparison")
            compared = gr.HTML(min_height=40)  # where its progress is shown
            sheet = gr.Image(
                label="Compared", format="png", interactive=False, visible=False, buttons=tools,
                alt_text="A grid of pictures, labelled by row and column", elem_id="sheet",
            )  # fmt: skip

    def asked(text: str, values: tuple[Any, ...]) -> tuple[list[tuple[str, float]], list[int], dict[str, Any]]:
        """Adapters with weights, seeds, and the rest for `generate`."""
        if not (text or "").strip():
            raise SettingsError("no prompt; write what to draw, with the token of an adapter")
        *slots, first, number, steps, guidance, size, negative = values
        pairs = zip(slots[: len(SLOTS)], slots[len(SLOTS) :], strict=True)
        chosen = [(name, float(weight)) for name, weight in pairs if name and name != NONE]
        seeds = [int(first or 0) + place for place in range(int(number))]
        more = {"size": (size or "").strip() or None, "negative_prompt": (negative or "").strip() or None}
        return chosen, seeds, {"steps": int(steps), "guidance": float(guidance), **more}

    def shelf(at: str | None = None) -> list[Any]:
        found = dict(islice(album(folder).items(), MOST_SHOWN))
        images = [
            (folder.place("pictures", name), f"{made.get('seed')} · {made.get('prompt')}") for name, made in found.items()
        ]
        return [images, one_of(list(found), at)]

    def make(text: str, where: str, painted: Painted, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        chosen, seeds, more = asked(text, values)
        progress(0, desc="loading the base")
        done, total = 0, len(seeds) * more["steps"]

        def on_step(advanced: int) -> None:
            nonlocal done
            done += advanced
            progress((done, total), unit="steps")

        composition = models.compose(chosen, where, painted)
        notes = remarks(composition, text, **more)
        name = models.draw(composition, text, seeds, on_step=on_step, **more)
        return [lines(*notes, kind="advice"), *shelf(name)]

    def draw_grid(kind: str, which: str | None, text: str, *values: Any) -> tuple[Any, str]:
        chosen, seeds, more = asked(text, values)
        if kind == BY_STEP:
            made = models.by_step(which or "", text, seeds=seeds, **more)
        else:
            made = grid(models.base(), models.weighted(chosen), text, seeds=seeds, **more)
        file = made.save(first_free(folder.place("pictures", "grid.png")))
        return gr.Image(value=str(file), visible=True), lines(f"{kind}: {text}")

    def explain(name: str | None) -> str:
        made = album(folder).get(name or "")
        if made is None:
            return ""
        facts = [f"{key}: {value}" for key, value in made.get("facts", ())]
        return lines(str(made.get("prompt")), " · ".join(facts)) + lines(str(made.get("command") or ""), kind="command")

    def again(name: str) -> list[Any]:
        made, notes = models.redraw(name or "")
        return [lines(f"drawn again, exactly as it was made: {made}", *notes), *shelf(made)]

    def discard(name: str) -> list[Any]:
        picture = folder.place("pictures", name)
        for file in (picture, picture.with_suffix(".json")):
            remove_file(file)
        return ["", *shelf()]

    def whole_page() -> Any:
        return gr.DownloadButton(value=str(Album(folder.place("pictures")).gallery()), visible=True)

    def suggest(name: str, other: str, text: str, before: str) -> list[Any]:
        """A prompt that names the subjects, unless the user has written one."""
        cards = [models.adapter(one).card for one in (name, other) if one and one != NONE]
        subjects = [card.words for card in cards if card.words]
        if not subjects:
            return [gr.skip(), gr.skip(), ""]
        said = lines(f"Prompts say: {', '.join(subjects)}")
        unchanged = (text or "").strip() in ("", before)
        return [*[f"a photo of {' and '.join(subjects)}" if unchanged else gr.skip()] * 2, said]

    values = [*names, *weights, seed, number, steps, guidance, size, negative]
    shown = [notes, pictures, picture]
    listen([draw.click, prompt.submit], make, [prompt, place, canvas, *values], shown, model=True)
    listen([compare.click], draw_grid, [kind, run, prompt, *values], [sheet, compared], model=True)
    listen([place.change], lambda one: gr.Column(visible=one == "painted"), [place], [easel])
    listen([trace.click], lambda name: models.traced(name or ""), [picture], [canvas], model=True)
    listen([names[0].input, names[1].input], suggest, [*names[:2], prompt, suggested], [prompt, suggested, words])
    listen([picture.change], explain, [picture], [how])
    pick(pictures, picture, lambda: list(album(folder)))
    listen([redraw.click], again, [picture], shown, model=True)
    listen([remove.click], discard, [picture], shown)
    listen([page.click], whole_page, None, [sent])

    def refresh(*chosen: str) -> list[Any]:
        found = [NONE, *folder.names("adapters", ".safetensors")]
        return [*(one_of(found, one) for one in chosen), one_of(studio.trainings.names()), *shelf()]

    listen([studio.page.load, tab.select], refresh, names, [*names, run, pictures, picture])
