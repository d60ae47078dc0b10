"""Train: start a run, follow it, stop it and go on. Every browser sees the same, since all is read from the run's folder."""

from __future__ import annotations

from html import escape
from typing import Any

import gradio as gr

from ..config import LoraSpec, TrainingConfig, comments
from ..errors import SettingsError
from .events import Studio, View, choice, lines, listen, one_of
from .folder import numbered
from .runs import CHOICES, State, settings_of

EVERY = 2.0  # seconds between two looks at a run; chosen
SAMPLE = 128  # pixels of a sample on the page; chosen
COLUMNS = 8  # rounds of samples in view; chosen
ADVANCED = (  # of TrainingConfig and LoraSpec; the rest is for the command line
    *("steps", "learning_rate", "rank", "resolution", "batch_size", "class_images", "prior_loss_weight"),
    *("sample_every", "sample_prompt", "seed", "flip", "text_encoder"),
)


def train_tab(studio: Studio) -> View:
    folder, trainings = studio.folder, studio.trainings
    with gr.Tab("Train", id="train") as tab:
        with gr.Row():
            subject = choice(folder.names("photos"), "Subject")
            name = gr.Textbox(label="Name of the run", info="And of its adapter; empty: the subject's", max_lines=1)
        how = gr.Radio(
            [(f"{one}: {what}", one) for one, what in CHOICES.items()], value="standard", label="How", elem_id="choice"
        )
        with gr.Accordion("Everything else", open=False):
            gr.Markdown("Leave a field empty for its default, which is in brackets.")
            with gr.Row():
                fields = [field_of(one) for one in ADVANCED]
        forecast = gr.HTML(elem_id="forecast")
        with gr.Row():
            check = gr.Button("Does it fit?")
            start = gr.Button("Start training", variant="primary", elem_id="start")
        run = choice(trainings.names(), "Run")
        status = gr.HTML(elem_id="status")
        with gr.Row():
            stop = gr.Button("Stop", elem_id="stop")
            go_on = gr.Button("Go on", elem_id="go-on")
            anew = gr.Button("Start anew")
            forget = gr.Button("Remove the run", variant="stop")
        samples = gr.Image(
            label="Samples: a column for each round", format="png", interactive=False, buttons=["download"], visible=False,
            alt_text="Samples of the run, a row for each prompt and a column for each round", elem_id="samples",
        )  # fmt: skip
        seen = gr.State("")
        timer = gr.Timer(EVERY)

    def settings(how: str, who: str, values: tuple[Any, ...]) -> dict[str, Any]:
        given = {key: parsed(key, value) for key, value in zip(ADVANCED, values, strict=True) if value not in (None, "", False)}
        return settings_of(how, len(folder.photos(who).photos), given)

    def fits(who: str, how: str, *values: Any) -> str:
        from ..planning.planning import plan

        config, lora = split(settings(how, chosen(who), values))
        found = plan(studio.models.base(), config=config, lora=lora, photos=len(folder.photos(who).photos))
        return lines(found.summary, kind="good" if found.chosen else "error")

    def chosen(who: str | None) -> str:
        if not who:
            raise SettingsError("no subject; add photos and a name on the first tab")
        return who

    def begin(who: str, named: str | None, how: str, *values: Any) -> tuple[Any, ...]:
        wanted = settings(how, chosen(who), values)
        split(wanted)  # a wrong value is told here, and not in the log
        folder.subject(who)
        taken = trainings.names()
        new = (named or "").strip() or next(one for one in numbered(who) if one not in taken)
        studio.models.release()
        trainings.start(new, who, folder.bases()[folder.base], wanted)
        return (one_of(trainings.names(), new), *look(new, ""))

    def look(which: str | None, before: str) -> tuple[Any, Any, Any]:
        """Status, samples if there are new ones, and what was seen now."""
        if not which or which not in trainings.names():
            return "", gr.Image(visible=False), ""
        state = trainings.state(which)
        now = f"{which} {len(state.run.samples) if state.run else 0}"
        return page_of(state), gr.skip() if now == before else sheet_of(state), now

    def tick(which: str | None, before: str) -> tuple[Any, ...]:
        names = trainings.names()
        return (gr.skip() if which in names or not names else one_of(names, names[-1]), *look(which, before))

    def again(which: str) -> tuple[Any, ...]:
        studio.models.release()
        trainings.again(which)
        return look(which, "")

    def restart(which: str) -> tuple[Any, ...]:
        studio.models.release()
        trainings.again(which, restart=True)
        return look(which, "")

    def end(which: str) -> tuple[Any, ...]:
        trainings.stop(which)
        return look(which, "")

    def remove(which: str) -> tuple[Any, ...]:
        trainings.remove(which)
        names = trainings.names()
        return (one_of(names), *look(names[0] if names else None, ""))

    shown = [status, samples, seen]
    listen([check.click], fits, [subject, how, *fields], [forecast], model=True)
    listen([start.click], begin, [subject, name, how, *fields], [run, *shown], model=True)
    listen([run.change], lambda which: look(which, ""), [run], shown, quiet=True)
    listen([timer.tick], tick, [run, seen], [run, *shown], quiet=True)
    listen([stop.click], end, [run], shown)
    listen([go_on.click], again, [run], shown, model=True)
    listen([anew.click], restart, [run], shown, model=True)
    listen([forget.click], remove, [run], [run, *shown])

    def refresh() -> list[Any]:
        names = trainings.names()
        busy = next((one for one in names if trainings.process(one) is not None), None)
        return [one_of(folder.names("photos")), one_of(names, busy)]

    return View(tab, refresh, [subject, run])


def page_of(state: State) -> str:
    """Where a run is, its loss, and what happened."""
    from ..notebook.outputs import CHART
    from ..report.report import loss_chart

    failed = not state.alive and state.line.startswith("error: ")
    kind = "error" if failed else "good" if state.finished else "note"
    bar = f'<progress value="{state.done:.3f}" max="1" aria-label="share that is done"></progress>'
    text = lines(state.line, kind=kind) + bar
    if state.run is not None:
        text += str(loss_chart(state.run, style=CHART) or "")
        items = "".join(f"<li>step {event.step}: {escape(event.what)}</li>" for event in state.run.events[-8:])
        text += f"<ul>{items}</ul>" if items else ""
    told = "" if state.alive else ' role="status"'  # a screen reader hears of the end, and not of every step
    return f'<div{told} data-alive="{int(state.alive)}" data-finished="{int(state.finished)}">{text}</div>'


def sheet_of(state: State) -> Any:
    from ..notebook.outputs import samples_of

    found = None if state.run is None else samples_of(state.run.path, most=COLUMNS)
    if found is None:
        return gr.Image(value=None, visible=False)
    side = max(SAMPLE, min(256, max(one.image.width for one in found.pictures) // 2)) if found.pictures else SAMPLE
    return gr.Image(value=found.sheet(side=side), visible=True)


# --- settings ----------------------------------------------------------------------------------------------------------


def field_of(name: str) -> Any:
    about = {**comments(TrainingConfig), **comments(LoraSpec)}.get(name, "")
    label = name.replace("_", " ")
    if kind_of(name) is bool:
        return gr.Checkbox(label=label, info=about)
    return gr.Textbox(label=label, info=about, max_lines=1, min_width=220)


def kind_of(name: str) -> type:
    default = {**vars(TrainingConfig()), **vars(LoraSpec())}[name]
    known: dict[str, type] = {"learning_rate": float, "sample_prompt": str}
    return known.get(name, int if default is None else type(default))


def parsed(name: str, value: Any) -> Any:
    kind = kind_of(name)
    try:
        return value if kind in (bool, str) else kind(value)
    except ValueError:
        raise SettingsError(f"{name.replace('_', ' ')} {value!r}; needed: a {'whole ' * (kind is int)}number") from None


def split(settings: dict[str, Any]) -> tuple[TrainingConfig, LoraSpec]:
    known = vars(LoraSpec())
    lora = {key: value for key, value in settings.items() if key in known}
    return TrainingConfig(**{key: value for key, value in settings.items() if key not in lora}), LoraSpec(**lora)
