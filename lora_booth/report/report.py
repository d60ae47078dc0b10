"""report.html: whether a run worked, what it did, and what to do next."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, asdict, dataclass, fields
from importlib.resources import files
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

from jinja2 import Environment, StrictUndefined
from markupsafe import Markup
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.contents import file_stem, loading, one_line, quoted
from ..config import LoraSpec, TrainingConfig
from ..errors import shown
from ..files import write_file
from ..pictures.gallery import SMALL, data_url, source_hash
from ..training.checkpoint import REPORT
from ..training.progress import clock
from .charts import chart, smoothed, usual_top
from .reading import Run, Sample, advice, counted, dicts, integer, number, part, read_run

T = TypeVar("T")

THUMBNAIL = 256  # pixels of a picture on the page, at most; chosen
QUALITY = 80  # of WebP; chosen
MOST_COLUMNS = 24  # pictures of a row of samples, at most; chosen
TIMES = {"preparing": "preparing", "training": "training", "sampling": "of which sampling", "saving": "of which saving"}
MEMORY = {"host": "peak memory of the process", "device": "peak memory of the GPU"}
SHARES = (("subject_share", "subject", 0.0), ("prompt_share", "prompt", 1.0))  # with the share of the base, at step 0


@dataclass(frozen=True)
class PagePicture:
    """A picture on the page."""

    url: str
    width: int
    height: int
    text: str  # caption and alternative text
    pixelated: bool


def write_report(run: str | Path, *, photos: bool = True) -> Path:
    """Write `report.html` to the folder of a run, from the files in it.

    photos  show small copies of the photos; leave them out of a page that you share
    Raises SettingsError if the folder is not that of a run.
    """
    found = read_run(Path(run))
    path = found.path / REPORT
    write_file(path, html(found, photos=photos).encode("utf-8", "replace"))
    return path


def try_report(run: Path, say: Callable[[str], None]) -> None:
    """`write_report` for the end of a training, which a failure must not break: `say` gets a line about it."""
    try:
        write_report(run)
    except Exception as error:
        say(f"no {REPORT} ({type(error).__name__})")


def html(run: Run, *, photos: bool = True) -> str:
    """One self-contained page; all text is escaped."""
    style = file("page.css")
    page = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    adapter = run.adapter
    card = {} if adapter is None else {k: v for k, v in asdict(adapter.card).items() if v is not None}
    changed, chosen, usual = settings(run)
    fidelity, losses, rates = (
        None if one is None else Markup(one) for one in (fidelity_chart(run), loss_chart(run), rate_chart(run))
    )
    return page.from_string(file("page.html")).render(
        style=Markup(style),  # a file of this package; charts escape their text
        hash=source_hash,
        title=title_of(run),
        summary=summary(run),
        advice=list(advice(run)),
        strips=strips(run),
        ways=[] if adapter is None or run.adapter_file is None else list(ways(adapter, run.adapter_file, run.path)),
        losses=losses,
        rates=rates,
        fidelity=fidelity,
        scores=scores_table(run),
        crops=[picture(path, f"photo {i}") for i, path in enumerate(run.crops if photos else (), 1)],
        mirrored=bool(run.config.get("flip")),
        resolution=run.config.get("resolution"),
        events=[event_words(event) for event in run.events],
        timings=timings(run),
        changed=changed,
        chosen=chosen,
        usual=usual,
        versions=[(str(k).replace("_", " "), str(v)) for k, v in part(run.record, "surroundings").items()],
        card=[(k.replace("_", " "), str(v)) for k, v in card.items()],
    )


def file(name: str) -> str:
    return (files(__package__) / name).read_text(encoding="utf-8")


# --- the head


def title_of(run: Run) -> str:
    names = [" ".join(str(s.get(k, "")) for k in ("token", "class_noun")) for s in run.subjects]
    return " and ".join(names) or shown(run.path.resolve().name)


def summary(run: Run) -> list[str]:
    took = part(run.record, "seconds")
    seconds = (number(took.get("preparing")) or 0.0) + (number(took.get("training")) or 0.0)
    base = part(run.record, "facts", "base")
    state = "finished" if run.finished else f"{run.record.get('status', 'running')} at step {run.step} of {run.total}"
    return [
        state,
        counted(run.step if run.finished else run.total, "step"),
        counted(run.photos, "photo"),
        *([str(base["name"])] if "name" in base else []),
        *([f"{clock(seconds)} in all"] if seconds else []),
    ]


# --- pictures


def strips(run: Run) -> list[tuple[str, int, list[PagePicture]]]:
    """The samples of one prompt and seed over time, for each prompt and seed."""
    rows: dict[tuple[str, int], list[Sample]] = {}
    for sample in run.samples:
        rows.setdefault((sample.prompt, sample.seed), []).append(sample)
    return [
        (prompt, seed, [picture(s.file, f"step {s.step}" if s.step else "before") for s in spread(row)])
        for (prompt, seed), row in rows.items()
    ]


def spread(row: Sequence[T], most: int = MOST_COLUMNS) -> list[T]:
    """At most `most` of them, evenly spaced, with the first and the last."""
    if len(row) <= most:
        return list(row)
    return [row[round(i * (len(row) - 1) / (most - 1))] for i in range(most)]


def picture(path: Path, text: str) -> PagePicture:
    """A grey picture if the file cannot be read."""
    try:
        with Image.open(path) as opened:
            image = opened.convert("RGB")
    except OSError:
        image, text = Image.new("RGB", (SMALL, SMALL), (128, 128, 128)), f"{text}: cannot be read"
    pixelated = image.width <= SMALL
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=2.0)
    return PagePicture(data_url(image, QUALITY), image.width, image.height, text, pixelated)


# --- curves


def loss_chart(run: Run, *, style: str = "") -> str | None:
    points = [(float(u.step), u.loss) for u in run.updates if u.loss is not None]
    mean = smoothed(points)
    label = f"Loss by step; its mean went from {mean[0][1]:.3g} to {mean[-1][1]:.3g}" if mean else ""
    top = max(usual_top([y for _, y in points]), max((y for _, y in mean), default=0.0))
    marks = [(number(e.get("step")) or 0.0, str(e.get("what"))) for e in run.events]
    return chart(label, [("raw", points), ("mean", mean)], top=top, marks=marks, last=run.total, style=style)


def rate_chart(run: Run) -> str | None:
    points = [(float(u.step), u.rate) for u in run.updates]
    return chart("Learning rate by step", [("rate", points)], height=120, last=run.total)


def fidelity_chart(run: Run) -> str | None:
    rows, lines = [row for row in dicts(run.scores.get("adapters")) if row.get("step") is not None], []
    for key, kind, start in SHARES:
        points = [(float(integer(row["step"])), value) for row in rows if (value := number(row.get(key))) is not None]
        if points:
            lines.append((kind, [(0.0, start), *points]))
    return chart("Subject and prompt fidelity by step", lines, top=1.0, dots=True, last=run.total)


def scores_table(run: Run) -> dict[str, Any] | None:
    """heads; rows of name, whether it is the best, and cells; labels of the lower-is-better metrics; how it was measured"""
    metrics, best = dicts(run.scores.get("metrics")), run.scores.get("best")
    if not metrics:
        return None

    def cells(row: dict[str, Any]) -> Iterator[str]:
        overall = number(row.get("overall"))
        yield "–" if overall is None else f"{overall:.3f}"
        for metric in metrics:
            one = part(row, "scores", str(metric.get("key")))
            mean, low, high = (number(one.get(name)) for name in ("mean", "low", "high"))
            around = "" if low is None or high is None else f" ±{(high - low) / 2:.2f}"
            yield "–" if mean is None else f"{mean:.3f}{around}"

    rows = [part(run.scores, "photos"), part(run.scores, "base"), *dicts(run.scores.get("adapters"))]
    return {
        "heads": ["overall", *(str(m.get("label")) for m in metrics)],
        "rows": [(str(row.get("name")), row.get("name") == best, list(cells(row))) for row in rows],
        "lower": [str(m.get("label")) for m in metrics if m.get("better") == "lower"],
        "how": str(run.scores.get("measured_with", "")),
    }


# --- facts

Setting = tuple[str, str, str]  # name, value, default


def settings(run: Run) -> tuple[list[Setting], list[Setting], list[Setting]]:
    """Settings changed from the default; those without a fixed default (set, or chosen for this run); those at the default."""
    changed: list[Setting] = []
    chosen: list[Setting] = []
    usual: list[Setting] = []
    for spec, values in ((TrainingConfig, run.config), (LoraSpec, run.lora)):
        for one in fields(spec):
            if one.name not in values:
                continue
            value, default = values[one.name], None if one.default is MISSING else one.default
            same = text_of(value) == text_of(default)
            group = usual if same else chosen if default is None else changed
            group.append((one.name, text_of(value), text_of(default)))
    return changed, chosen, usual


def text_of(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == [] or value == ():
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return f"{value:.4g}".replace("e-0", "e-") if isinstance(value, float) else str(value)


def timings(run: Run) -> list[tuple[str, str]]:
    took = {name: number(value) for name, value in part(run.record, "seconds").items()}
    found = [(TIMES.get(name, name), clock(value)) for name in {**TIMES, **took} if (value := took.get(name)) is not None]
    each = [b.seconds - a.seconds for a, b in pairwise(run.updates)]
    if each:
        found.append(("a step, median", f"{median(each):.2f} s"))
    peaks = part(run.record, "peak_memory")
    return found + [(text, f"{peaks[name] / 2**30:.1f} GiB") for name, text in MEMORY.items() if number(peaks.get(name))]


def event_words(event: dict[str, Any]) -> tuple[str, str, str]:
    at = str(event.get("at", "")).replace("T", " ").removesuffix("+00:00")
    return at, f"step {integer(event.get('step'))}", str(event.get("what", ""))


# --- how to use the file

Way = tuple[str, list[str], str]  # program, sentences, code


def ways(adapter: Adapter, file: Path, run: Path) -> Iterator[Way]:
    """A way for each program. The page has the name of the run's folder, but not its path."""
    card = adapter.card
    prompt, weight = one_line(card.prompt or card.words or "a photo"), f"{card.weight:g}"
    base = card.base_model or "the base"
    folder, name, stem = one_line(run.resolve().name), file.relative_to(run).as_posix(), file_stem(adapter.name)
    here = f"From the folder above {folder}:"
    used = f"pipe.load_lora_weights({quoted(folder)}, weight_name={quoted(name)})\nimage = pipe({quoted(prompt)}).images[0]"
    yield "diffusers", [here], f"{loading(card)}\n{used}"
    copy = f"Copy {name} to models/{{}}/ under a unique name, e.g. {stem}.safetensors."
    node = f"Add a Load LoRA node between the checkpoint and the prompts, set both strengths to {weight}, and write:"
    yield "ComfyUI", [copy.format("loras"), node], prompt
    yield "A1111", [copy.format("Lora"), "Then write:"], f"{prompt} <lora:{stem}:{weight}>"
    script = (
        f"import lora_booth as lb\n\nbase = lb.BaseModel.load({quoted(base)})\n"
        f"adapter = lb.Adapter.load({quoted(f'{folder}/{name}')})\n"
        f"pictures = lb.Composition(base, [adapter]).generate({quoted(f'{prompt} in the snow')}, seeds=range(4))\n"
        'lb.Gallery(pictures).save("gallery.html")'
    )
    yield "lora_booth", [here, f"To score every adapter that the run has saved, run lora-booth evaluate on {folder}."], script
