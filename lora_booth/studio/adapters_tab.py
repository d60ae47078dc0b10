"""Adapters: the shelf. What each file is, which programs read it, and the tools for it."""

from __future__ import annotations

from html import escape
from pathlib import Path
from typing import Any

import gradio as gr

from ..errors import SettingsError, shown
from ..files import remove as remove_file
from .events import Studio, View, choice, lines, listen, one_of

LAYOUTS = ("kohya", "peft")


def adapters_tab(studio: Studio) -> View:
    folder = studio.folder

    def names() -> list[str]:
        return folder.names("adapters", ".safetensors")

    with gr.Tab("Adapters", id="adapters") as tab:
        files = gr.File(
            label="Drop .safetensors files here; each is checked first", file_count="multiple", type="filepath", height=140,
            elem_id="drop-adapter",
        )  # fmt: skip
        adapter = choice(names(), "Adapter", elem_id="adapter")
        card = gr.HTML(elem_id="card")
        download = gr.DownloadButton("Download the file", visible=False)
        with gr.Accordion("Convert, resize, merge", open=False):
            with gr.Row():
                layout = gr.Radio(list(LAYOUTS), value="peft", label="Names of the tensors")
                convert = gr.Button("Convert")
            with gr.Row():
                rank = gr.Slider(1, 128, 4, step=1, label="Rank")
                resize = gr.Button("Resize")
            with gr.Row():
                other = choice(names(), "Other adapter")
                merge = gr.Button("Merge with it")
        with gr.Accordion("Share", open=False):
            with gr.Row():
                title = gr.Textbox(label="Title", max_lines=1)
                author = gr.Textbox(label="Author", max_lines=1)
                license = gr.Textbox(label="License", info="e.g. cc-by-4.0", max_lines=1)
            share = gr.Button("Make a folder for the Hub")
        result = gr.HTML(elem_id="result")
        with gr.Row():
            sure = gr.Checkbox(label="Yes, delete this adapter")
            delete = gr.Button("Delete", variant="stop")

    def describe(name: str | None) -> tuple[Any, Any]:
        from ..adapters.adapter import Adapter
        from ..adapters.readers import readings

        if not name:
            return lines("No adapter yet: train one, or drop a file."), gr.DownloadButton(visible=False)
        file = folder.adapter_file(name)
        found = Adapter.load(file)
        facts = {key: value for key, value in vars(found.card).items() if value is not None and key != "base_hash"}
        rows = [*facts.items(), ("size", f"{file.stat().st_size / 1e6:.2f} MB")]
        rows += [(reader, str(reading).removeprefix(f"{reader}: ")) for reader, reading in readings(file).items()]
        text = "".join(f"<tr><th scope='row'>{escape(shown(a))}</th><td>{escape(shown(b))}</td></tr>" for a, b in rows)
        picture = f'<img src="{escape(found.thumbnail)}" alt="thumbnail">' if found.thumbnail else ""
        return f"{picture}<table>{text}</table>", gr.DownloadButton(value=str(file), visible=True)

    def shelf(at: str | None = None) -> list[Any]:
        return [one_of(names(), at), gr.Dropdown(choices=names())]

    def add(sent: list[str] | None) -> list[Any]:
        added = [folder.add_adapter(Path(one)) for one in sent or ()]
        return [None, *shelf(added[-1] if added else None), lines(f"checked and added: {', '.join(added)}", kind="good")]

    def written(source: str, ending: str) -> Path:
        if not source:
            raise SettingsError("no adapter; choose one")
        from ..pictures.gallery import first_free

        return first_free(folder.adapter_file(f"{source}-{ending}"))

    def converted(name: str, wanted: str) -> list[Any]:
        from ..adapters.tools.convert import convert

        file = convert(folder.adapter_file(name), written(name, wanted), layout=wanted)  # type: ignore[arg-type]
        return [*shelf(file.stem), lines(f"wrote {file.name}", kind="good")]

    def resized(name: str, wanted: float) -> list[Any]:
        from ..adapters.adapter import Adapter
        from ..adapters.tools.spectrum import resize

        made, report = resize(Adapter.load(folder.adapter_file(name)), rank=int(wanted))
        file = made.save(written(name, f"rank{int(wanted)}"))
        return [*shelf(file.stem), lines(f"wrote {file.name}; {report.error:.1%} of the change is lost", kind="good")]

    def merged(name: str, with_it: str | None) -> list[Any]:
        from ..adapters.adapter import Adapter
        from ..adapters.tools.merge import merge

        if not with_it or with_it == name:
            raise SettingsError("merging needs another adapter; choose one")
        both = [(Adapter.load(folder.adapter_file(one)), 1.0) for one in (name, with_it)]
        made, _ = merge(both)
        file = made.save(written(name, with_it))
        return [*shelf(file.stem), lines(f"wrote {file.name}: their sum, exact", kind="good")]

    def shared(name: str, *facts: str) -> str:
        from ..adapters.adapter import Adapter

        given = {
            key: text.strip() for key, text in zip(("title", "author", "license"), facts, strict=True) if (text or "").strip()
        }
        made = Adapter.load(folder.adapter_file(name)).with_card(**given)
        place = made.save_folder(folder.place("shared", name))
        return lines(f"wrote shared/{place.name} in the studio's folder: upload it to the Hub as it stands", kind="good")

    def deleted(name: str, yes: bool) -> list[Any]:
        if not yes:
            raise SettingsError("say yes first: a deleted adapter is gone")
        remove_file(folder.adapter_file(name))
        return [*shelf(), lines(f"deleted {name}"), False]

    both = [adapter, other]
    listen([adapter.change], describe, [adapter], [card, download], quiet=True)
    listen([files.upload], add, [files], [files, *both, result])
    listen([convert.click], converted, [adapter, layout], [*both, result])
    listen([resize.click], resized, [adapter, rank], [*both, result])
    listen([merge.click], merged, [adapter, other], [*both, result])
    listen([share.click], shared, [adapter, title, author, license], [result])
    listen([delete.click], deleted, [adapter, sure], [*both, result, sure])
    return View(tab, shelf, both)
