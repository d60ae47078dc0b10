"""Commands on adapter files."""

from __future__ import annotations

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from ..adapters.contents import Dtype
from ..errors import SettingsError, listed, shown
from .app import say, say_json
from .arguments import base_of, check_adapter_file, weighted
from .options import Adapters, Json, Names, OwnBase, Reading, command

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..adapters.tools.spectrum import Truncations

AdapterFile = Annotated[Path, typer.Argument(help="adapter file, e.g. rex.safetensors")]
Precision = Annotated[Dtype, typer.Option(help="precision of the file: fp16, bf16 or fp32")]
Rank = Annotated[int | None, typer.Option(help="keep at most this rank in each layer, e.g. 4")]
Energy = Annotated[float | None, typer.Option(help="keep this share of each layer's squared norm, e.g. 0.95")]
Modules = Annotated[bool, typer.Option(help="also print a line for each module")]


@dataclass(frozen=True)
class Output:
    """The adapter file that a tool writes."""

    out: Path  # adapter file to write, e.g. small.safetensors
    layout: Names = "kohya"
    dtype: Precision = "fp16"
    modules: Modules = False

    def __post_init__(self) -> None:  # before the work, not after it
        check_adapter_file(self.out)

    def write(self, adapter: Adapter, report: Truncations) -> None:
        """Save the adapter, and print what was cut from it."""
        file = adapter.save(self.out, layout=self.layout, dtype=self.dtype)
        low, high = report.ranks
        worst = max(report.modules, key=lambda m: m.error)
        most = f", {worst.error:.3g} in {worst.module}" if worst.error else ""
        say_row("rank", low if low == high else f"{low} to {high}")
        say_row("error", f"{report.error:.3g} of the change in total{most}")
        if self.modules:
            for m in report.modules:
                say(f"{m.error:10.3g}  rank {m.rank_before} -> {m.rank}  norm {m.norm:.4g}  {m.module}")
        say_file(file)


@command
def show(adapter: AdapterFile, *, modules: Modules = False, json: Json = False) -> None:
    """Print an adapter's card, ranks, size, norms by block, modules without effect, and what each program reads of it."""
    from ..adapters.adapter import Adapter
    from ..adapters.readers import readings
    from ..adapters.tools.inspection import inspect_adapter

    found = inspect_adapter(Adapter.load(adapter))
    read = readings(adapter)
    if json:
        say_json(asdict(found) | {"readers": {name: asdict(reading) for name, reading in read.items()}})
        return
    for key, value in vars(found.card).items():
        if value is not None:
            say_row(key, shown(value))
    say_row("modules", f"{len(found.modules)}, rank {spread(found.ranks)}")
    say_row("alphas", spread(found.alphas))
    say_row("norm", "  ".join(f"{block} {norm:.4g}" for block, norm in found.norms.items()))
    say_row("dead", f"{len(found.dead)}: {listed(found.dead)}" if found.dead else "none")
    say_row("tensors", f"{found.nbytes / 1e6:.2f} MB, sha256 {found.digest[:16]}")
    for name, reading in read.items():
        say_row(name, str(reading).removeprefix(f"{name}: "))
    if modules:
        for m in found.modules:
            say(f"{m.norm:10.4g}  rank {m.rank:<4} alpha {m.alpha:<8g} {m.module}")


@command
def convert(
    adapter: Path,  # adapter file to read, e.g. rex.safetensors
    out: Path,  # adapter file to write, e.g. rex-peft.safetensors
    *,
    layout: Names = "kohya",
    dtype: Dtype | None = None,  # precision of the file: fp16, bf16 or fp32 [the input's, or fp32 if that is lossy]
) -> None:
    """Rewrite an adapter with other tensor names, without loss."""
    from ..adapters.tools.convert import convert as rewrite

    say(f"wrote {rewrite(adapter, out, layout=layout, dtype=dtype)}")


@command
def share(
    adapter: Path,  # adapter file to share, e.g. rex.safetensors
    *,
    out: Path | None = None,  # write file, README.md and pictures to this folder, e.g. shared/rex
    push: str | None = None,  # upload the folder to this Hub repository, e.g. anna/rex
    private: bool = False,  # make the repository private
    layout: Names = "kohya",
    title: str | None = None,  # title on the card, e.g. 'Rex the dog'
    author: str | None = None,  # author on the card, e.g. anna
    license: str | None = None,  # license of the adapter, e.g. cc-by-4.0
    consent: str | None = None,  # who agreed to be shown, e.g. self or 'consenting person'
    tags: str | None = None,  # search terms, separated by commas, e.g. dog,plush
    thumbnail: Path | None = None,  # picture for the file's header, e.g. rex.png
) -> None:
    """Make a folder ready for the Hub, or upload it."""
    from ..adapters.adapter import Adapter

    if (out is None) == (push is None):
        raise SettingsError("share writes a folder or uploads it; pass either --out FOLDER or --push OWNER/NAME")
    facts = {"title": title, "author": author, "license": license, "consent": consent, "tags": tags}
    shared = Adapter.load(adapter).with_card(**{name: fact for name, fact in facts.items() if fact is not None})
    if out is not None:
        say(f"wrote {shared.save_folder(out, layout=layout, thumbnail=thumbnail)}")
    if push is not None:
        say(shared.push_to_hub(push, private=private, layout=layout, thumbnail=thumbnail))


@command
def merge(
    adapters: Adapters,
    *,
    output: Output,
    method: str = "sum",  # how to merge: sum (exact, the ranks add up) or svd (cut to --rank)
    rank: int | None = None,  # rank of the result of svd, e.g. 8 [the largest of the inputs]
) -> None:
    """Write several adapters as one: the weighted sum of their changes."""
    from ..adapters.tools.merge import merge as merged

    output.write(*merged(weighted(adapters), method=method, rank=rank))  # type: ignore[arg-type]


@command
def resize(adapter: AdapterFile, *, output: Output, rank: Rank = None, energy: Energy = None) -> None:
    """Write the nearest adapter of a lower rank."""
    from ..adapters.adapter import Adapter
    from ..adapters.tools.spectrum import resize as resized

    output.write(*resized(Adapter.load(adapter), rank=rank, energy=energy))


@command
def extract(
    tuned: str,  # fine-tuned model: a Hub id, a diffusers folder or a .safetensors checkpoint
    *,
    base: str,  # model it was tuned from: 'toybox', a Hub id, a folder or a checkpoint
    output: Output,
    reading: Reading,
    rank: Rank = None,
    energy: Energy = None,
    text_encoder: bool = False,  # also compare the text encoders
) -> None:
    """Write the difference of a fine-tuned model and its base as an adapter."""
    from ..adapters.tools.extract import extract as extracted
    from ..adapters.tools.spectrum import keep

    keep(rank, energy)  # checked before gigabytes are read
    files, readings = [Path(one).is_file() for one in (tuned, base)], [reading, reading]
    if files[0] != files[1]:  # each takes options of its own
        of_file, of_other = replace(reading, variant=None, revision=None), replace(reading, config=None)
        readings = [of_file if is_file else of_other for is_file in files]
    models = readings[0].load(tuned), readings[1].load(base)
    adapter, report = extracted(*models, rank=rank, energy=energy, text_encoder=text_encoder)
    if report.left_out:
        names = listed(list(report.left_out))
        say_row("left out", f"{len(report.left_out)}: {names}; with them the error is {report.error:.3g}")
    output.write(adapter, report.truncations)


@command
def bake(
    adapters: Adapters,
    *,
    base: OwnBase = None,
    out: Path,  # checkpoint to write, e.g. rex-sd15.safetensors, or else a new diffusers folder
    reading: Reading,
    dtype: Precision = "fp16",
) -> None:
    """Write a base with adapters in its weights, as a checkpoint that needs no adapter."""
    from ..adapters.tools.bake import bake as baked

    chosen = weighted(adapters)
    source = base_of([adapter for adapter, _ in chosen]) if base is None else base
    say_file(baked(reading.load(source), chosen, out, dtype=dtype))


@command
def diff(
    a: AdapterFile,
    b: Path,  # adapter file to compare it with, e.g. ink.safetensors
    *,
    modules: Modules = False,
    json: Json = False,
) -> None:
    """Print how two adapters differ and overlap."""
    from ..adapters.adapter import Adapter
    from ..adapters.tools.inspection import difference

    found = difference(Adapter.load(a), Adapter.load(b))
    if json:
        say_json(found.as_dict())
        return
    say(str(found))
    say_row("modules", f"{len(found.modules)} in both, {len(found.only_a)} only in a, {len(found.only_b)} only in b")
    norms = f"a {found.norm_a:.4g}  b {found.norm_b:.4g}  a - b {found.distance:.4g}"
    say_row("norm", f"{norms} ({found.relative:.3g} of the larger)")
    say_row("cosine", f"{found.cosine:.4f}")
    say_row("overlap", f"outputs {found.columns:.1%}  inputs {found.rows:.1%}  outputs beyond chance {found.beyond_chance:.1%}")
    for label, names in (("only in a", found.only_a), ("only in b", found.only_b)):
        if names:
            say_row(label, f"{len(names)}: {listed(names)}")
    if modules:
        for m in found.modules:
            figures = f"cosine {m.cosine:7.4f}  outputs {m.columns:6.1%}  inputs {m.rows:6.1%}"
            say(f"a {m.norm_a:10.4g}  b {m.norm_b:10.4g}  a - b {m.distance:10.4g}  {figures}  {m.module}")


# --- how figures are printed ---------------------------------------------------------------------------------------


def say_row(label: str, text: object) -> None:
    say(f"{label:16} {text}")


def say_file(path: Path) -> None:
    files = [path] if path.is_file() else [file for file in path.rglob("*") if file.is_file()]
    say(f"wrote {path} ({sum(file.stat().st_size for file in files) / 1e6:.2f} MB)")


def spread(found: dict[int, int] | dict[float, int]) -> str:
    """ "8", or "4 (x12), 8 (x100)" where there are several."""
    if len(found) == 1:
        return f"{next(iter(found)):g}"
    return ", ".join(f"{value:g} (x{count})" for value, count in found.items())
