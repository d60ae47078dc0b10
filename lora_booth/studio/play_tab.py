"""Play: draw with adapters, place two subjects, compare, and keep what was drawn."""

from __future__ import annotations

from typing import Any

import gradio as gr
from PIL import Image

from ..config import GUIDANCE, STEPS
from ..errors import SettingsError
from .drawing import COLORS, PLACES, album, remove_picture
from .events import Studio, View, choice, lines, listen, one_of, painted_in, painting

SLOTS = ("First adapter", "Second adapter", "Third adapter, e.g. a style")
MOST_WEIGHT = 1.5  # of a slider
MOST_AT_ONCE = 8  # pictures of one click
CANVAS = 384  # pixels of the place to paint on
NONE = "none"


def play_tab(studio: Studio) -> View:
    folder, models = studio.folder, studio.models
    with gr.Tab("Play", id="play") as tab:
        prompt = gr.Textbox(label="Prompt", lines=2, placeholder="e.g. a photo of ohwx dog on the beach", elem_id="prompt")
        slots: list[Any] = []
        for label in SLOTS:
            with gr.Row():
                name = choice([NONE], label, value=NONE)
                slots += [name, gr.Slider(0, MOST_WEIGHT, 1, step=0.05, label=f"Weight of the {label.split(',')[0].lower()}")]
        place = gr.Radio(
            [(f"{one}: {what}", one) for one, what in PLACES.items()], value="found", label="Where two subjects go"
        )
        with gr.Column(visible=False) as easel:  # not the canvas itself: a change of its settings would make it anew
            canvas = painting(
                "Paint the first subject's place in orange, the second's in blue",
                COLORS,
                CANVAS + 120,
                value={"background": Image.new("RGB", (CANVAS, CANVAS), "#808080"), "layers": [], "composite": None},
            )
        with gr.Accordion("Seeds, steps, size", open=False):
            with gr.Row():
                seed = gr.Number(0, label="First seed", precision=0, minimum=0)
                count = gr.Slider(1, MOST_AT_ONCE, 2, step=1, label="Pictures")
                steps = gr.Slider(1, 100, STEPS, step=1, label="Denoising steps")
                guidance = gr.Slider(0, 15, GUIDANCE, step=0.5, label="Guidance")
                size = gr.Textbox(label="Size", info="e.g. 768 or 768x512; empty: the base's own", max_lines=1)
            negative = gr.Textbox(label="What to avoid", max_lines=1)
        with gr.Row():
            draw = gr.Button("Draw", variant="primary", elem_id="draw")
            before = gr.Button("Before and after")
            weights = gr.Button("At several weights")
        with gr.Row():
            run = choice(studio.trainings.names(), "Run", info="Which step was best?")
            by_step = gr.Button("At every saved step")
        notes = gr.HTML(elem_id="notes")
        sheet = gr.Image(
            label="Compared", format="png", interactive=False, visible=False, buttons=["download", "fullscreen"],
            alt_text="A grid of pictures, labelled by row and column", elem_id="sheet",
        )  # fmt: skip
        pictures = gr.Gallery(
            label="Pictures, the newest first", columns=4, fit_columns=False, format="png", interactive=False,
            allow_preview=True, buttons=["download", "fullscreen"], elem_id="pictures",
        )  # fmt: skip
        picture = choice([], "Picture", info="Choose one above to see how it was made", elem_id="picture")
        how = gr.HTML(elem_id="how")
        with gr.Row():
            redraw = gr.Button("Redraw", elem_id="redraw")
            others = gr.Button("With the seeds above")
            remove = gr.Button("Remove", variant="stop")
            page = gr.Button("All as one page", elem_id="page")
        sent = gr.DownloadButton("Download gallery.html", visible=False)

    sampler = [seed, count, steps, guidance, size, negative]
    where = [place, canvas]

    def asked(text: str, values: tuple[Any, ...]) -> tuple[list[tuple[str, float]], list[int], dict[str, Any]]:
        """Adapters with weights, seeds, and the rest for `generate`."""
        if not (text or "").strip():
            raise SettingsError("no prompt; write what to draw, with the token of an adapter")
        pairs, rest = values[: len(slots)], values[len(slots) :]
        chosen = [(one, float(weight)) for one, weight in zip(pairs[::2], pairs[1::2], strict=True) if one and one != NONE]
        first, number, steps, guidance, size, negative = rest
        seeds = list(range(int(first or 0), int(first or 0) + min(int(number), MOST_AT_ONCE)))
        more = {"steps": int(steps), "guidance": float(guidance), "size": (size or "").strip() or None}
        return chosen, seeds, more | {"negative_prompt": (negative or "").strip() or None}

    def counter(progress: Any, total: int) -> Any:
        done = 0

        def on_step(advanced: int) -> None:
            nonlocal done
            done += advanced
            progress((done, total), unit="steps")

        return on_step

    def shelf(at: str | None = None) -> list[Any]:
        found = album(folder)
        images = [(folder.place("pictures", name), str(made.get("prompt"))) for name, made in found.items()]
        return [images, one_of(list(found), at)]

    def make(text: str, where: str, painted: Any, *values: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        chosen, seeds, more = asked(text, values)
        progress(0, desc="loading the base")
        composed = models.compose(chosen, where, painted_in(painted))
        names, remarks = models.draw(composed, text, seeds, **more, on_step=counter(progress, len(seeds) * more["steps"]))
        return [lines(*remarks), *shelf(names[0])]

    def compare(kind: str) -> Any:
        def made(text: str, which: str | None, *values: Any, progress: Any = gr.Progress()) -> Any:  # noqa: B008
            chosen, seeds, more = asked(text, values)
            if kind != "steps" and not chosen:
                raise SettingsError("no adapter; choose one")
            progress(0, desc="drawing")
            if kind == "before":
                grid = models.before_after(chosen, text, seeds, **more)
            elif kind == "weights":
                grid = models.weights(chosen, text, seeds, **more)
            else:
                grid = models.steps(which or "", text, seeds, **more)
            file = models.keep_grid(grid, f"grid-{kind}")
            return gr.Image(value=str(file), visible=True)

        return made

    def explain(name: str | None) -> str:
        made = album(folder).get(name or "")
        if made is None:
            return ""
        facts = [f"{key}: {value}" for key, value in made.get("facts", ())]
        return lines(str(made.get("prompt")), " · ".join(facts)) + lines(str(made.get("command") or ""), kind="command")

    def pick(event: gr.SelectData) -> Any:
        return list(album(folder))[event.index]

    def again(name: str, first: Any, number: Any, same: bool, progress: Any) -> list[Any]:
        seeds = None if same else list(range(int(first or 0), int(first or 0) + int(number)))
        progress(0, desc="redrawing")
        names, remarks = models.redraw(name or "", seeds)
        return [lines(f"drawn again: {names[0]}", *remarks), *shelf(names[0])]

    def repeat(name: str, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        return again(name, 0, 1, True, progress)

    def vary(name: str, first: Any, number: Any, progress: Any = gr.Progress()) -> list[Any]:  # noqa: B008
        return again(name, first, number, False, progress)

    def discard(name: str) -> list[Any]:
        remove_picture(folder, name)
        return ["", *shelf()]

    def whole_page() -> Any:
        from ..pictures.gallery import Album

        return gr.DownloadButton(value=str(Album(folder.place("pictures")).gallery()), visible=True)

    def suggest(name: str, other: str, text: str) -> Any:
        """A prompt that names the subjects, unless there is one."""
        from ..adapters.adapter import Adapter

        if (text or "").strip():
            return gr.skip()
        cards = [Adapter.load(folder.adapter_file(one)).card for one in (name, other) if one and one != NONE]
        words = " and ".join(card.words for card in cards if card.words)
        return f"a photo of {words}" if words else gr.skip()

    values = [*slots, *sampler]
    shown = [notes, pictures, picture]
    listen([draw.click, prompt.submit], make, [prompt, *where, *values], shown, model=True)
    for button, kind in ((before, "before"), (weights, "weights"), (by_step, "steps")):
        listen([button.click], compare(kind), [prompt, run, *values], [sheet], model=True)
    listen([place.change], lambda one: gr.Column(visible=one == "painted"), [place], [easel], quiet=True)
    listen([slots[0].input, slots[2].input], suggest, [slots[0], slots[2], prompt], [prompt], quiet=True)
    listen([picture.change], explain, [picture], [how], quiet=True)
    listen([pictures.select], pick, None, [picture], quiet=True)
    listen([redraw.click], repeat, [picture], shown, model=True)
    listen([others.click], vary, [picture, seed, count], shown, model=True)
    listen([remove.click], discard, [picture], shown)
    listen([page.click], whole_page, None, [sent])

    def refresh() -> list[Any]:
        names = [NONE, *folder.names("adapters", ".safetensors")]
        return [*(gr.Dropdown(choices=names) for _ in SLOTS), one_of(studio.trainings.names()), *shelf()]

    return View(tab, refresh, [*slots[::2], run, pictures, picture])
