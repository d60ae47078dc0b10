"""Commands on adapter files."""

from __future__ import annotations

import json as json_text  # --json is a parameter of that name
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from ..errors import SettingsError, shown
from .app import app, say
from .arguments import check_adapter_file, check_dtype, check_layout, load_base, weighted

if TYPE_CHECKING:
    from ..adapters.tools.inspection import Inspection
    from ..adapters.tools.spectrum import Truncations

AdapterFile = Annotated[Path, typer.Argument(help="adapter file")]
Weighted = Annotated[list[str], typer.Argument(help="adapter files, each with an optional :WEIGHT")]
Out = Annotated[Path, typer.Option(help="the adapter file to write")]
Layout = Annotated[str, typer.Option(help="kohya (diffusers, ComfyUI, A1111) or peft")]
Dtype = Annotated[str, typer.Option(help="fp16, bf16 or fp32")]
Rank = Annotated[int | None, typer.Option(help="at most this in every layer")]
Energy = Annotated[float | None, typer.Option(help="share of every layer's squared norm to keep, 0 to 1")]
Modules = Annotated[bool, typer.Option(help="also a line for every module")]
Json = Annotated[bool, typer.Option(help="everything as JSON instead")]
MOST_NAMED = 8  # modules in one line


@app.command()
def show(adapter: AdapterFile, modules: Modules = False, json: Json = False) -> None:
    """Print an adapter's card, ranks, size, where its change is, what changes nothing, and what each program will read."""
    from ..adapters.adapter import Adapter
    from ..adapters.readers import report
    from ..adapters.tools.inspection import inspect_adapter

    found = inspect_adapter(Adapter.load(adapter))
    readings = report(adapter).readings
    if json:
        tell_json(found.as_dict() | {"readers": {name: asdict(reading) for name, reading in readings.items()}})
        return
    for key, value in vars(found.card).items():
        if value is not None:
            tell(key, shown(value))
    tell("modules", f"{len(found.modules)}, rank {counted(found.ranks)}")
    tell("alphas", counted(found.alphas))
    tell("norm", "  ".join(f"{block} {norm:.4g}" for block, norm in found.norms.items()))
    tell("dead", named(found.dead) if found.dead else "none")
    tell("tensors", f"{found.nbytes / 1e6:.2f} MB, sha256 {found.digest[:16]}")
    for name, reading in readings.items():
        tell(name, str(reading).removeprefix(f"{name}: "))
    if modules:
        tell_modules(found)


def tell_modules(found: Inspection) -> None:
    for m in found.modules:
        say(f"{m.norm:10.4g}  rank {m.rank:<4} alpha {m.alpha:<8g} {m.module}")


@app.command()
def convert(
    adapter: Annotated[Path, typer.Argument(help="adapter file to read")],
    out: Annotated[Path, typer.Argument(help="adapter file to write")],
    layout: Layout = "kohya",
    dtype: Annotated[str | None, typer.Option(help="fp16, bf16 or fp32 [the file's own, fp32 if that would lose]")] = None,
) -> None:
    """Rewrite an adapter in another naming, without loss."""
    from ..adapters.tools.convert import convert as rewrite

    check_layout(layout)
    if dtype is not None:
        check_dtype(dtype)
    say(f"wrote {rewrite(adapter, out, layout=layout, dtype=dtype)}")  # type: ignore[arg-type]


@app.command()
def share(
    adapter: Annotated[Path, typer.Argument(help="adapter file to share")],
    out: Annotated[Path | None, typer.Option(help="the folder to write: file, README.md and pictures")] = None,
    push: Annotated[str | None, typer.Option(help="a Hub repository, as owner/name, to upload it to")] = None,
    private: Annotated[bool, typer.Option(help="of the repository: for you alone")] = False,
    layout: Layout = "kohya",
    title: Annotated[str | None, typer.Option(help="what it is called")] = None,
    author: Annotated[str | None, typer.Option(help="who made it")] = None,
    license: Annotated[str | None, typer.Option(help="as cc-by-4.0")] = None,
    consent: Annotated[str | None, typer.Option(help="who agreed to be shown, as self or consenting person")] = None,
    tags: Annotated[str | None, typer.Option(help="words to find it by, with commas between them")] = None,
    thumbnail: Annotated[Path | None, typer.Option(help="a picture for the file's header")] = None,
) -> None:
    """Make a folder ready for the Hub, or upload it."""
    from ..adapters.adapter import Adapter

    check_layout(layout)
    if (out is None) == (push is None):
        raise SettingsError("share writes a folder or uploads it; give either --out FOLDER or --push OWNER/NAME")
    facts = {"title": title, "author": author, "license": license, "consent": consent, "tags": tags}
    card = {name: fact for name, fact in facts.items() if fact is not None}
    shared = Adapter.load(adapter).with_card(**card)
    if out is not None:
        say(f"wrote {shared.save_folder(out, layout=layout, thumbnail=thumbnail)}")  # type: ignore[arg-type]
    else:
        assert push is not None
        say(shared.push_to_hub(push, private=private, layout=layout, thumbnail=thumbnail))  # type: ignore[arg-type]


@app.command()
def merge(
    adapters: Weighted,
    out: Out,
    method: Annotated[str, typer.Option(help="sum (exact, the ranks add up) or svd (cut to --rank)")] = "sum",
    rank: Annotated[int | None, typer.Option(help="of svd, e.g. 8 [the largest of the inputs]")] = None,
    layout: Layout = "kohya",
    dtype: Dtype = "fp16",
    modules: Modules = False,
) -> None:
    """Write several adapters as one: the weighted sum of their changes."""
    from ..adapters.tools.merge import merge as merged

    check_output(out, layout, dtype)
    adapter, report = merged(weighted(adapters), method=method, rank=rank)  # type: ignore[arg-type]
    file = adapter.save(out, layout=layout, dtype=dtype)  # type: ignore[arg-type]
    tell_truncations(report, modules)
    tell_file(file)


@app.command()
def resize(
    adapter: AdapterFile,
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    layout: Layout = "kohya",
    dtype: Dtype = "fp16",
    modules: Modules = False,
) -> None:
    """Write the nearest adapter of a lower rank."""
    from ..adapters.adapter import Adapter
    from ..adapters.tools.resize import resize as resized

    check_output(out, layout, dtype)
    smaller, report = resized(Adapter.load(adapter), rank=rank, energy=energy)
    file = smaller.save(out, layout=layout, dtype=dtype)  # type: ignore[arg-type]
    tell_truncations(report, modules)
    tell_file(file)


@app.command()
def extract(
    tuned: Annotated[str, typer.Argument(help="the fine-tuned model: a Hub id, a diffusers folder or a checkpoint")],
    base: Annotated[str, typer.Option(help="what it was made from: 'toybox', a Hub id, a diffusers folder or a checkpoint")],
    out: Out,
    rank: Rank = None,
    energy: Energy = None,
    text_encoder: Annotated[bool, typer.Option(help="compare the text encoders as well")] = False,
    layout: Layout = "kohya",
    dtype: Dtype = "fp16",
    modules: Modules = False,
) -> None:
    """Write the difference of a fine-tuned model and its base as an adapter."""
    from ..adapters.tools.extract import extract as extracted
    from ..adapters.tools.spectrum import keep

    check_output(out, layout, dtype)
    keep(rank, energy)  # is checked before gigabytes are read
    models = (load_base(tuned, exact=True), load_base(base, exact=True))
    adapter, report = extracted(*models, rank=rank, energy=energy, text_encoder=text_encoder)
    file = adapter.save(out, layout=layout, dtype=dtype)  # type: ignore[arg-type]
    tell_truncations(report.truncations, modules)
    if report.left_out:
        tell("left out", f"{named(tuple(report.left_out))}; with them the error is {report.error:.3g}")
    tell_file(file)


@app.command()
def bake(
    adapters: Weighted,
    base: Annotated[str, typer.Option(help="'toybox', a Hub id, a diffusers folder or a .safetensors checkpoint")],
    out: Annotated[Path, typer.Option(help="NAME.safetensors for one file (A1111, ComfyUI), else a new diffusers folder")],
    dtype: Dtype = "fp16",
) -> None:
    """Write a base with adapters in its weights, as a checkpoint that needs no adapter."""
    from ..adapters.tools.bake import bake as baked

    check_dtype(dtype)
    tell_file(baked(load_base(base, exact=True), weighted(adapters), out, dtype=dtype))  # type: ignore[arg-type]


@app.command()
def diff(
    a: Annotated[Path, typer.Argument(help="adapter file")],
    b: Annotated[Path, typer.Argument(help="adapter file to compare it with")],
    modules: Modules = False,
    json: Json = False,
) -> None:
    """Say how two adapters differ and overlap."""
    from ..adapters.adapter import Adapter
    from ..adapters.tools.difference import difference

    found = difference(Adapter.load(a), Adapter.load(b))
    if json:
        tell_json(found.as_dict())
        return
    say(str(found))
    tell("modules", f"{len(found.modules)} in both, {len(found.only_a)} only in a, {len(found.only_b)} only in b")
    tell("norm", f"a {found.norm_a:.4g}  b {found.norm_b:.4g}  a - b {found.distance:.4g} ({found.relative:.3g} of the larger)")
    tell("cosine", f"{found.cosine:.4f}")
    tell("overlap", f"outputs {found.columns:.1%}  inputs {found.rows:.1%}  beyond chance {found.beyond_chance:.1%}")
    for label, names in (("only in a", found.only_a), ("only in b", found.only_b)):
        if names:
            tell(label, named(names))
    if modules:
        for m in found.modules:
            figures = f"cosine {m.cosine:7.4f}  outputs {m.columns:6.1%}  inputs {m.rows:6.1%}"
            say(f"a {m.norm_a:10.4g}  b {m.norm_b:10.4g}  a - b {m.distance:10.4g}  {figures}  {m.module}")


# --- how figures are told ------------------------------------------------------------------------------------------


def check_output(out: Path, layout: str, dtype: str) -> None:
    check_layout(layout)
    check_dtype(dtype)
    check_adapter_file(out)


def tell(label: str, text: object) -> None:
    say(f"{label:16} {text}")


def tell_json(report: dict[str, Any]) -> None:
    say(json_text.dumps(report, indent=2))


def tell_truncations(report: Truncations, modules: bool) -> None:
    low, high = report.ranks
    worst = max(report.modules, key=lambda m: m.error)
    tell("rank", low if low == high else f"{low} to {high}")
    tell(
        "error",
        f"{report.error:.3g} of the change in total" + (f", {worst.error:.3g} in {worst.module}" if worst.error else ""),
    )
    if modules:
        for m in report.modules:
            say(f"{m.error:10.3g}  rank {m.rank_before} -> {m.rank}  norm {m.norm:.4g}  {m.module}")


def tell_file(path: Path) -> None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    say(f"wrote {path} ({sum(file.stat().st_size for file in files) / 1e6:.2f} MB)")


def counted(found: dict[int, int] | dict[float, int]) -> str:
    """ "8", or "4 (x12), 8 (x100)" where there are several."""
    if len(found) == 1:
        return f"{next(iter(found)):g}"
    return ", ".join(f"{value:g} (x{count})" for value, count in found.items())


def named(names: tuple[str, ...]) -> str:
    more = f" and {len(names) - MOST_NAMED} more" if len(names) > MOST_NAMED else ""
    return f"{len(names)}: {', '.join(names[:MOST_NAMED])}{more}"
