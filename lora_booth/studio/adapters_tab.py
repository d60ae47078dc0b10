"""Adapters: the shelf. What each file is, which programs read it, and the tools for it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr
from PIL import Image

from ..adapters.readers import readings
from ..adapters.tools.convert import convert as convert_file
from ..adapters.tools.merge import merge as merge_adapters
from ..adapters.tools.spectrum import resize as resize_adapter
from ..errors import shown
from .drawing import SMALL, thumbnail
from .events import Studio, choice, gallery, lines, listen, one_of, pick, sure

FIRST = ("prompt", "token", "class_noun", "weight")  # of a card: what it takes to use it
LAYOUTS = [("kohya: for ComfyUI, A1111 and diffusers", "kohya"), ("peft: for diffusers and PEFT", "peft")]


def adapters_tab(studio: Studio) -> None:
    folder, adapter_of = studio.folder, studio.models.adapter
    with gr.Tab("Adapters", id="adapters") as tab:
        files = gr.File(
            label="Drop .safetensors files here", file_count="multiple", type="filepath", height=140,
            elem_id="drop-adapter",
        )  # fmt: skip
        stored = gallery("All adapters", columns=6, allow_preview=False, buttons=[], elem_id="shelf")
        adapter = choice("Adapter", info="Or choose it above", elem_id="adapter")
        card = gr.HTML(elem_id="card")
        download = gr.DownloadButton("Download the file", visible=False)
        with gr.Accordion("Convert, resize, merge", open=False):
            with gr.Row():
                layout = gr.Radio(LAYOUTS, value="peft", label="Names of the tensors")
                convert = gr.Button("Convert")
            with gr.Row():
                rank = gr.Slider(1, 128, 4, step=1, label="Rank")
                resize = gr.Button("Resize")
            with gr.Row():
                other = choice("Other adapter")
                merge = gr.Button("Merge with it")
        with gr.Accordion("Share", open=False):
            with gr.Row():
                title = gr.Textbox(label="Title", max_lines=1)
                author = gr.Textbox(label="Author", max_lines=1)
                license = gr.Textbox(label="License", info="e.g. cc-by-4.0", max_lines=1)
            share = gr.Button("Make a folder for the Hub")
        result = gr.HTML(elem_id="result")
        with gr.Row():
            yes = gr.Checkbox(label="Yes, delete this adapter")
            delete = gr.Button("Delete", variant="stop")

    def describe(name: str | None) -> tuple[Any, Any]:
        if not name:
            return lines("No adapter yet: train one, or drop a file."), gr.DownloadButton(visible=False)
        file, card = folder.adapter_file(name), adapter_of(name).card
        facts = dict.fromkeys(FIRST) | vars(card)
        facts = {key: value for key, value in facts.items() if value is not None and key != "base_hash"}
        rows = [*facts.items(), ("size", f"{file.stat().st_size / 1e6:.2f} MB")]
        rows += [(reader, str(reading).removeprefix(f"{reader}: ")) for reader, reading in readings(file).items()]
        text = "".join(f"<tr><th scope='row'>{escape(shown(a))}</th><td>{escape(shown(b))}</td></tr>" for a, b in rows)
        return f"<table>{text}</table>", gr.DownloadButton(value=str(file), visible=True)

    def shelf(at: str | None = None) -> list[Any]:
        names = folder.names("adapters", ".safetensors")
        pictures = [(thumbnail(folder, name) or Image.new("RGB", (SMALL, SMALL), "#808080"), name) for name in names]
        return [pictures, one_of(names, at), gr.Dropdown(choices=names)]

    def made(name: str, *notes: str, at: str | None = None) -> list[Any]:
        return [*shelf(at or name), lines("; ".join([f"wrote {name}.safetensors", *notes]), kind="good")]

    def free(source: str, ending: str) -> Path:
        return folder.adapter_file(folder.free_name(f"{source}-{ending}"))

    def add(sent: list[str] | None) -> list[Any]:
        added = [folder.add_adapter(Path(one)) for one in sent or ()]
        return [None, *made(added[-1], "checked")]

    def converted(name: str, wanted: Any) -> list[Any]:
        return made(convert_file(folder.adapter_file(name), free(name, wanted), layout=wanted).stem, at=name)

    def resized(name: str, wanted: float) -> list[Any]:
        small, report = resize_adapter(adapter_of(name), rank=int(wanted))
        file = small.save(free(name, f"rank{int(wanted)}"))
        return made(file.stem, f"{report.error:.1%} of the change is lost", at=name)

    def merged(name: str, with_it: str) -> list[Any]:
        both, _ = merge_adapters([(adapter_of(one), 1.0) for one in (name, with_it)])
        return made(both.save(free(name, with_it)).stem, "their sum, exact", at=name)

    def shared(name: str, title: str, author: str, license: str) -> str:
        facts = {"title": title, "author": author, "license": license}
        given = {key: text for key, text in facts.items() if text}
        adapter = adapter_of(name).with_card(**given)
        place = adapter.save_folder(folder.place("shared", name), thumbnail=thumbnail(folder, name))
        return lines(f"wrote {place}: upload it to the Hugging Face Hub as it stands", kind="good")

    def deleted(name: str, yes: bool) -> list[Any]:
        sure(yes, "a deleted adapter is gone, and pictures made with it cannot be drawn again")
        folder.remove_adapter(name)
        return [*shelf(), lines(f"deleted {name}"), False]

    shown_there = [stored, adapter, other, result]
    listen([adapter.change], describe, [adapter], [card, download])
    listen([files.upload], add, [files], [files, *shown_there])
    listen([convert.click], converted, [adapter, layout], shown_there)
    listen([resize.click], resized, [adapter, rank], shown_there)
    listen([merge.click], merged, [adapter, other], shown_there)
    listen([share.click], shared, [adapter, title, author, license], [result])
    listen([delete.click], deleted, [adapter, yes], [*shown_there, yes])
    pick(stored, adapter, lambda: folder.names("adapters", ".safetensors"))
    listen([studio.page.load, tab.select], shelf, None, shown_there[:3])
