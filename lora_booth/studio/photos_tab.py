"""Photos: drop them in, see what training will see of them, name the subject."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..errors import PhotoError, counted
from ..photos.audit import audit_photos
from ..photos.opening import open_photo
from .drawing import mask_of
from .events import Studio, View, after, choice, lines, listen, one_of, painted_in, painting
from .folder import check_name, square_around

SIDE = 640  # pixels of a photo to paint on, at most; chosen


def photos_tab(studio: Studio) -> View:
    folder = studio.folder
    with gr.Tab("Photos", id="photos") as tab:
        with gr.Row():
            subject = choice(folder.names("photos"), "Subject", info="Choose one, or type a new name")
            noun = gr.Textbox(
                label="What it is", info="In a word or two, as the base knows it", placeholder="e.g. dog", max_lines=1
            )
            token = gr.Textbox(label="Token", info="A rare word that will stand for it", placeholder="e.g. ohwx", max_lines=1)
        verdict = gr.HTML(elem_id="verdict")
        files = gr.File(label="Drop 3 to 30 photos here", file_count="multiple", type="filepath", height=140, elem_id="drop")
        audit = gr.HTML(elem_id="audit")
        squares = gr.Gallery(
            label="As training will see them", columns=5, format="png", interactive=False, allow_preview=False,
            buttons=[], elem_id="squares",
        )  # fmt: skip
        photo = choice([], "Photo to change", info="Or choose it above")
        with gr.Accordion("Crop, mask and caption of this photo", open=False):
            canvas = painting("Paint over the subject", ["#e4572e"], 480, elem_id="canvas")
            with gr.Row():
                use_crop = gr.Button("Crop to what is painted")
                use_mask = gr.Button("Use as the mask")
                undo = gr.Button("No crop, no mask")
            caption = gr.Textbox(label="Caption", info="What else the photo shows; empty: the usual prompt", max_lines=3)
            with gr.Row():
                keep_caption = gr.Button("Keep the caption")
                remove = gr.Button("Remove the photo", variant="stop")

    shown = [audit, squares, photo]

    def look(name: str | None, at: str | None = None) -> list[Any]:
        """The audit of a subject's photos."""
        if not name or name not in folder.names("photos"):
            return ["", [], one_of([])]
        try:
            found = folder.photos(name)
        except PhotoError as error:
            return [lines(str(error)), [], one_of([])]
        report = audit_photos(found.photos, found.skipped, resolution=studio.models.base().resolution)
        pictures = [(one.thumbnail, "; ".join([one.photo.name, *one.notes])) for one in report.photos]
        skipped = [f"{one.name}: {one.reason}" for one in report.skipped]
        count = f"{counted(len(report.photos), 'photo')} at {report.resolution} pixels"
        names = [one.photo.path.name for one in report.photos]
        text = lines(count, kind="good" if not report.advice else "note") + lines(*report.advice, *skipped, kind="advice")
        return [text, pictures, one_of(names, at)]

    def choose(name: str | None) -> list[Any]:
        facts = folder.facts(name) if name in folder.names("photos") else {}
        known = facts.get("token") and facts.get("class_noun")
        return [*([facts["class_noun"], facts["token"]] if known else [gr.skip(), gr.skip() if facts else ""]), *look(name)]

    def judge(name: str | None, class_noun: str | None, word: str | None) -> tuple[str, str]:
        """Keep what the subject is called, and say whether the token is free. Without one, propose it."""
        from ..subject.tokens import check_token, propose_tokens

        base = studio.models.base()
        rare = base.rare_tokens
        taken = {folder.facts(one)["token"] for one in folder.names("photos") if one != name}
        free = [one for one in propose_tokens(base.tokenizer, 8 + len(taken), known_rare=rare) if one not in taken]
        word = (word or "").strip() or (name and folder.facts(check_name(name))["token"]) or next(iter(free), "")
        report = check_token(word, base.tokenizer, known_rare=rare)
        called = (class_noun or "").strip()
        if not called or not name:
            return word, lines("Say what it is, e.g. dog or coffee mug." if name else "Give the subject a name, e.g. rex.")
        folder.describe(name, word, called)
        notes = [*report.problems, *report.warnings, *["another subject has it"] * (word in taken)]
        if not notes:
            return word, lines(f"{word} is free. Prompts will say: a photo of {word} {called}", kind="good")
        return word, lines(*(f"{word}: {note}" for note in notes), f"others: {', '.join(free[:8])}")

    def add(name: str | None, sent: list[str] | None) -> list[Any]:
        refused = folder.add_photos(name or "", [Path(one) for one in sent or ()])
        for line in refused:
            gr.Warning(escape(line), title="Not a photo for training", duration=None)
        return [None, gr.Dropdown(choices=folder.names("photos"), value=name), *look(name)]

    def at(event: gr.SelectData, name: str) -> Any:
        return folder.photos(name).photos[event.index].path.name

    def open_one(name: str, which: str | None) -> tuple[Any, str]:
        if not which:
            return None, ""
        one = folder.photo(name, which)
        image = open_photo(one, smaller=max(1, max(one.width, one.height) // SIDE))
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        return {"background": image, "layers": [], "composite": None}, one.caption or ""

    def crop(name: str, which: str, value: Any) -> list[Any]:
        folder.set_crop(folder.photo(name, which), square_around(mask_of(painted_in(value))))
        return look(name, which)

    def mask(name: str, which: str, value: Any) -> list[Any]:
        folder.set_mask(folder.photo(name, which), mask_of(painted_in(value)))
        return look(name, which)

    def without(name: str, which: str) -> list[Any]:
        one = folder.photo(name, which)
        folder.set_crop(one, None)
        folder.set_mask(one, None)
        return look(name, which)

    def write(name: str, which: str, text: str) -> None:
        folder.set_caption(folder.photo(name, which), text or "")
        gr.Info("The caption is kept.")

    def discard(name: str, which: str) -> list[Any]:
        folder.remove_photo(folder.photo(name, which))
        return look(name)

    chosen = listen([subject.change], choose, [subject], [noun, token, *shown], model=True)
    after(chosen, judge, [subject, noun, token], [token, verdict])
    listen([noun.blur, noun.submit, token.blur, token.submit], judge, [subject, noun, token], [token, verdict], model=True)
    listen([files.upload], add, [subject, files], [files, subject, *shown], model=True)
    listen([squares.select], at, [subject], [photo])
    listen([photo.change], open_one, [subject, photo], [canvas, caption])
    listen([use_crop.click], crop, [subject, photo, canvas], shown, model=True)
    listen([use_mask.click], mask, [subject, photo, canvas], shown, model=True)
    listen([undo.click], without, [subject, photo], shown, model=True)
    listen([keep_caption.click], write, [subject, photo, caption])
    listen([remove.click], discard, [subject, photo], shown, model=True)

    def refresh() -> Any:
        return gr.Dropdown(choices=folder.names("photos"))

    return View(tab, refresh, [subject])
