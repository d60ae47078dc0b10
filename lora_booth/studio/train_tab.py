"""Train: start a run, follow it, stop it and go on. Every browser sees the same, since all is read from the run's folder."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import partial
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..config import LoraSpec, TrainingConfig, comments
from ..errors import LoraBoothError, SettingsError
from ..notebook.outputs import CHART, MOST_COLUMNS, THUMBNAIL, samples_of
from ..report.report import loss_chart
from .events import Studio, choice, lines, listen, one_of, sure
from .runs import CHOICES, State, settings_of

EVERY = 2.0  # seconds between two looks at a run; chosen
# of TrainingConfig and LoraSpec; the rest is for the command line
COUNTS = ("steps", "rank", "resolution", "batch_size", "class_images", "sample_every", "seed")
REASONS = ("defaults.md", "../../docs/defaults.md")  # beside this file in a wheel; in the repository
ADVANCED = (*COUNTS, "learning_rate", "prior_loss_weight", "flip", "text_encoder")


def train_tab(studio: Studio, on_photos: Any) -> None:
    """on_photos: the subject of the first tab, which is chosen here as well"""
    folder, trainings = studio.folder, studio.trainings
    with gr.Tab("Train", id="train") as tab:
        with gr.Row():
            subject = choice("Subject")
            name = gr.Textbox(label="Name of the run", info="And of its adapter; leave it empty for the subject's", max_lines=1)
        ways = [(f"{one}: {what}", one) for one, what in CHOICES.items()]
        how = gr.Radio(ways, value="standard", label="How", elem_id="choice")
        with gr.Accordion("Everything else", open=False):
            gr.Markdown("Leave a field empty for its default.")
            with gr.Row():
                about, why = {**comments(TrainingConfig), **comments(LoraSpec)}, reasons()
                fields = [field_of(one, about.get(one, ""), why.get(one, "")) for one in ADVANCED]
        forecast = gr.HTML(elem_id="forecast")
        with gr.Row():
            check = gr.Button("Does it fit, and how long?")
            compare = gr.Button("Which bases fit?")
            start = gr.Button("Start training", variant="primary", elem_id="start")
        run = choice("Run")
        status = gr.HTML(elem_id="status")
        with gr.Row():
            stop, go_on, anew = gr.Button("Stop"), gr.Button("Go on"), gr.Button("Start anew")
            forget = gr.Button("Remove the run", variant="stop")
            yes = gr.Checkbox(label="Yes, discard what this run has")
        samples = gr.Image(
            label="Samples: a column for each round", format="png", interactive=False, buttons=["download"], visible=False,
            alt_text="Samples of the run, a row for each prompt and a column for each round", elem_id="samples",
        )  # fmt: skip
        seen = gr.State("")
        timer = gr.Timer(EVERY)

    def settings(who: str | None, how: str, values: tuple[Any, ...]) -> tuple[dict[str, Any], TrainingConfig, LoraSpec]:
        if not who:
            raise SettingsError("no subject; add photos and a name on the first tab")
        given = {key: parsed(key, value) for key, value in zip(ADVANCED, values, strict=True) if value not in (None, "", False)}
        wanted = settings_of(how, len(folder.subject(who).photos), given)
        lora = {key: value for key, value in wanted.items() if key in vars(LoraSpec())}
        return wanted, TrainingConfig(**{k: v for k, v in wanted.items() if k not in lora}), LoraSpec(**lora)

    def fits(who: str, how: str, *values: Any) -> str:
        from ..planning.planning import plan  # which takes seconds to import: the page comes first

        _, config, lora = settings(who, how, values)
        photos = len(folder.photos(who).photos)
        found = plan(studio.models.base(), config=config, lora=lora, photos=photos, measure=True)
        return lines(found.summary, kind="good" if found.chosen else "error")

    def bases_that_fit(who: str, how: str, *values: Any) -> str:
        """Only counted, without loading a base; the chosen one can be timed."""
        from ..planning.planning import plan

        _, config, lora = settings(who, how, values)
        text, photos = "", len(folder.photos(who).photos)
        for name, source in folder.bases().items():
            try:
                found = plan(source, config=config, lora=lora, photos=photos)
                text += lines(f"{name}: {found.summary}", kind="good" if found.chosen else "error")
            except LoraBoothError as error:  # of this base alone
                text += lines(f"{name}: {error}", kind="error")
        return text

    def begin(who: str, named: str | None, how: str, *values: Any) -> Any:
        wanted, *_ = settings(who, how, values)
        if (token := folder.facts(who)["token"]) in folder.tokens_but(who):
            raise SettingsError(f"another subject has the token {token!r} too; give this one another on the first tab")
        new = (named or "").strip() or folder.free_name(who)
        studio.models.release()
        trainings.start(new, who, folder.bases()[folder.base], wanted)
        return one_of(trainings.names(), new)

    def look(which: str | None, before: str = "") -> tuple[Any, ...]:
        """This run, or another if it is none; its status, its samples if there are new ones, and what was seen now."""
        names = trainings.names()
        at = which if which in names else next(iter([*trainings.training(), *names]), None)
        listed = gr.skip() if at == which else one_of(names, at)
        if at is None:
            return listed, "", gr.Image(visible=False), ""
        state = trainings.state(at)
        now = f"{at} {len(state.run.samples) if state.run else 0}"
        return listed, page_of(state), gr.skip() if now == before else sheet_of(state), now

    def again(which: str, restart: bool = False) -> None:
        studio.models.release()
        trainings.again(which, restart=restart)

    def doing(button: gr.Button, action: Callable[[str], None], *, discards: bool = False, model: bool = False) -> None:
        def done(which: str, ticked: bool) -> tuple[Any, ...]:
            if which not in trainings.names():
                raise SettingsError("no run is chosen; start a training, or choose a run")
            if discards:
                sure(ticked, "the run's samples and checkpoints are lost; a finished adapter is kept until another replaces it")
            action(which)
            return (*look(which), False)

        listen([button.click], done, [run, yes], [*shown, yes], model=model)

    shown = [run, status, samples, seen]
    listen([check.click], fits, [subject, how, *fields], [forecast], model=True)
    listen([compare.click], bases_that_fit, [subject, how, *fields], [forecast], model=True)
    listen([start.click], begin, [subject, name, how, *fields], [run], model=True)
    listen([run.change], look, [run], shown)
    listen([timer.tick], look, [run, seen], shown)
    doing(stop, trainings.stop)
    doing(go_on, again, model=True)
    doing(anew, partial(again, restart=True), discards=True, model=True)
    doing(forget, trainings.remove, discards=True)
    listen([subject.change, how.change], lambda: "", None, [forecast])  # it was for another training

    def refresh(there: str | None, here: str | None) -> list[Any]:
        return [one_of(folder.names("photos"), there or here), gr.Dropdown(choices=trainings.names())]

    listen([studio.page.load, tab.select], refresh, [on_photos, subject], [subject, run])


def reasons() -> dict[str, str]:
    """Setting -> its default and the reason for it, from the table of docs/defaults.md."""
    places = (Path(__file__).parent / one for one in REASONS)
    text = next((place.read_text(encoding="utf-8") for place in places if place.is_file()), "")
    plain = re.sub(r"`|\[([^]]+)\]\([^)]+\)", r"\1", text)
    rows = re.findall(r"^\| (\w+) \| ([^|]+) \| ([^|]+) \|$", plain, re.MULTILINE)
    return {name: f"Default: {value} ({why})" for name, value, why in rows}


def field_of(name: str, *notes: str) -> Any:
    label, info = name.replace("_", " "), ". ".join(filter(None, notes))
    if name in ("flip", "text_encoder"):
        return gr.Checkbox(label=label, info=info)
    return gr.Textbox(label=label, info=info, max_lines=1, min_width=220)  # an empty `gr.Number` sends 0


def parsed(name: str, value: Any) -> Any:
    try:
        return value if value is True else int(value) if name in COUNTS else float(value)
    except ValueError:
        raise SettingsError(f"{name.replace('_', ' ')} {value!r}; needed: a {'whole ' * (name in COUNTS)}number") from None


def page_of(state: State) -> str:
    """Where a run is, its loss, and what happened."""
    kind = "error" if state.failed else "good" if state.finished else "note"
    bar = f'<progress value="{state.done:.3f}" max="1" aria-label="share that is done"></progress>'
    text = lines(state.line, kind=kind) + bar
    if state.run is not None:
        text += str(loss_chart(state.run, style=CHART) or "")
        events = [(event.step, event.what.partition(";")[0]) for event in state.run.events[-8:]]  # the rest is for a terminal
        items = "".join(f"<li>step {step}: {escape(what)}</li>" for step, what in events)
        text += f"<ul>{items}</ul>" if items else ""
    role = "" if state.alive else ' role="status"'  # a screen reader hears of the end, and not of every step
    return f'<div{role} data-alive="{int(state.alive)}" data-finished="{int(state.finished)}">{text}</div>'


def sheet_of(state: State) -> Any:
    found = None if state.run is None else samples_of(state.run.path, most=MOST_COLUMNS)
    return gr.Image(value=found and found.sheet(side=THUMBNAIL), visible=found is not None)
