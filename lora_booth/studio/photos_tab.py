"""Photos: drop them in, see what training will see of them, name the subject."""

from __future__ import annotations

from collections.abc import Callable
from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import ImageDraw, ImageOps

from ..errors import PhotoError, SubjectError, counted
from ..photos.audit import audit_photos
from ..photos.opening import open_photo, read_mask
from ..photos.photo import Photo
from ..photos.segmenting import make_masks
from ..subject.tokens import check_token, propose_tokens
from ..training.encoding import token_reading
from .drawing import CANVAS, COLORS, Painted, mask_of, painting_of
from .events import Studio, choice, gallery, lines, listen, one_of, painting, pick
from .folder import check_name, square_around

MOST_PROPOSED = 8  # tokens; chosen


def photos_tab(studio: Studio) -> Any:
    """Returns the field of the subject."""
    folder = studio.folder
    with gr.Tab("Photos", id="photos") as tab:
        with gr.Row():
            subject = choice("Subject", info="Choose one, or type a new name")
            noun = gr.Textbox(
                label="What it is", info="In a word or two, as the base knows it", placeholder="e.g. dog", max_lines=1
            )
            token = gr.Textbox(label="Token", info="A rare word that will stand for it", placeholder="e.g. ohwx", max_lines=1)
        verdict = gr.HTML(elem_id="verdict")
        files = gr.File(label="Drop 3 to 30 photos here", file_count="multiple", type="filepath", height=140, elem_id="drop")
        audit = gr.HTML(elem_id="audit")
        squares = gallery("As training will see them", columns=5, allow_preview=False, buttons=[], elem_id="squares")
        photo = choice("Photo to change", info="Or choose it above")
        with gr.Accordion("Crop, mask and caption of this photo", open=False):
            canvas = painting("Paint over the subject, or drag across it from corner to corner", COLORS[:1], elem_id="canvas")
            with gr.Row():
                use_crop = gr.Button("Crop to what is painted")
                use_mask = gr.Button("Use as the mask")
                undo = gr.Button("No crop, no mask")
            caption = gr.Textbox(label="Caption", info="What else the photo shows; empty: the usual prompt", max_lines=3)
            masks = gr.Button("Make masks for all photos (rembg; downloads its model once)")
            remove = gr.Button("Remove the photo", variant="stop")

    def look(name: str | None, at: str | None = None) -> list[Any]:
        """The audit of a subject's photos."""
        if not name or name not in folder.names("photos"):
            return ["", [], one_of([])]
        try:
            found = folder.photos(name)
        except PhotoError as error:
            return [lines(str(error).removeprefix(f"{folder.root}/photos/")), [], one_of([])]
        report = audit_photos(found.photos, found.skipped, resolution=studio.models.base().resolution)
        pictures = [(one.thumbnail, "; ".join([one.photo.name, *one.notes])) for one in report.photos]
        skipped = [f"{one.name}: {one.reason}" for one in report.skipped]
        count = f"{counted(len(report.photos), 'photo')} at {report.resolution} pixels. Next: the Train tab"
        text = lines(count, kind="note" if report.advice else "good") + lines(*report.advice, *skipped, kind="advice")
        return [text, pictures, one_of([one.photo.path.name for one in report.photos], at)]

    def choose(name: str | None, class_noun: str, word: str, waiting: list[str] | None) -> list[Any]:
        """What is known of a subject. A new one's fields are being typed in meanwhile, so only another's token leaves them."""
        if waiting:
            store(name, waiting)
        known = folder.facts(name) if name else {}
        if known.get("token"):
            class_noun, word = known["class_noun"], known["token"]
            return [class_noun, word, judge(name, class_noun, word)[1], None, *look(name)]
        of_another = word in folder.tokens_but(name)
        field, verdict = judge(name, class_noun, "" if of_another else word)
        return [gr.skip(), "" if of_another else field, verdict, None, *look(name)]

    def judge(name: str | None, class_noun: str | None, word: str | None) -> tuple[Any, str]:
        """Keep what the subject is called, and say whether the token is free. Without one, propose it."""
        base = studio.models.base()
        read = token_reading(base)
        taken = folder.tokens_but(name)
        proposed = propose_tokens(base.tokenizer, MOST_PROPOSED + len(taken), **read)
        free = [one for one in proposed if one not in taken][:MOST_PROPOSED]
        word = (word or "").strip() or (name and folder.facts(check_name(name))["token"]) or next(iter(free), "")
        called = (class_noun or "").strip()
        report, field = check_token(word, base.tokenizer, **read, class_noun=called or "dog"), gr.Textbox(placeholder=word)
        if not called or not name:
            return field, lines("Say what it is, e.g. dog or coffee mug." if name else "Give the subject a name, e.g. rex.")
        try:
            folder.describe(name, word, called)
        except SubjectError as error:
            return field, lines(str(error), kind="error")
        notes = [*report.problems, *report.warnings, *["another subject has it; choose another"] * (word in taken)]
        if not notes:
            return field, lines(f"{word} is free. Prompts will say: a photo of {word} {called}", kind="good")
        return field, lines(*(f"{word}: {note}" for note in notes), f"others: {', '.join(free)}", kind="advice")

    def store(name: str | None, sent: list[str]) -> None:
        for line in folder.add_photos(name or "", [Path(one) for one in sent]):
            gr.Warning(escape(line), title="Not a photo for training", duration=None)

    def add(name: str | None, sent: list[str] | None) -> list[Any]:
        if not name:  # `choose` takes them then
            advice = lines("Give the subject a name above: then these photos are added.", kind="advice")
            return [gr.skip(), gr.skip(), advice, [], gr.skip()]
        store(name, sent or [])
        return [None, gr.Dropdown(choices=folder.names("photos"), value=name), *look(name)]

    def open_one(name: str, which: str | None) -> tuple[Painted | None, str]:
        if not which:
            return None, ""
        one = folder.photo(name, which)
        return easel_of(one), one.caption or ""

    def easel_of(one: Photo) -> Painted:
        """A photo with its crop and its mask, to paint on."""
        image = ImageOps.contain(open_photo(one), (CANVAS, CANVAS))  # first: the line keeps its width
        if one.crop is not None:
            corners = [fraction * side for fraction, side in zip(one.crop, image.size * 2, strict=True)]
            ImageDraw.Draw(image).rectangle(corners, outline=COLORS[0], width=3)
        mask = [] if one.mask is None else [read_mask(one.mask.source, one.name, sha256=one.mask.sha256)[0]]
        return painting_of(image, mask)

    def mask_all(name: str, which: str | None) -> list[Any]:
        made = make_masks(folder.place("photos", name))
        text, *there = look(name, which)
        without = lines(*(f"{one.photo.name}: {one.reason}" for one in made if one.path is None))
        return [text + without, *there, open_one(name, which)[0]]

    def discard(name: str, which: str) -> list[Any]:
        folder.remove_photo(folder.photo(name, which))
        text, pictures, names = look(name)
        return [text, pictures, gr.Dropdown(choices=names.choices, value=None)]  # a second click takes no other

    def changing(button: gr.Button, change: Callable[[Photo, Painted], object]) -> None:
        def changed(name: str, which: str, painted: Painted) -> list[Any]:
            change(folder.photo(name, which), painted)
            return [*look(name, which), easel_of(folder.photo(name, which))]

        listen([button.click], changed, [subject, photo, canvas], [*shown, canvas], model=True)

    def describe(name: str, which: str | None, text: str) -> None:
        if which:
            folder.set_caption(folder.photo(name, which), text or "")

    shown = [audit, squares, photo]
    facts = [subject, noun, token]
    listen([subject.change], choose, [*facts, files], [noun, token, verdict, files, *shown], model=True)
    listen([noun.blur, noun.submit, token.blur, token.submit], judge, facts, [token, verdict], model=True)
    listen([files.upload], add, [subject, files], [files, subject, *shown], model=True)
    pick(squares, photo, lambda name: [one.path.name for one in folder.photos(name).photos], [subject])
    listen([photo.change], open_one, [subject, photo], [canvas, caption])
    changing(use_crop, lambda one, painted: folder.set_crop(one, square_around(mask_of(painted, COLORS[0]))))
    changing(use_mask, lambda one, painted: folder.set_mask(one, mask_of(painted, COLORS[0])))
    changing(undo, lambda one, _: folder.use_all_of(one))
    listen([caption.blur, caption.submit], describe, [subject, photo, caption])
    listen([remove.click], discard, [subject, photo], shown, model=True)
    listen([masks.click], mask_all, [subject, photo], [*shown, canvas], model=True)
    listen([tab.select], lambda: gr.Dropdown(choices=folder.names("photos")), None, [subject])
    listen([studio.page.load], lambda: one_of(folder.names("photos")), None, [subject])
    return subject
