"""report.html: whether a run worked, what it did, and what to do next."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from html import escape
from itertools import pairwise
from pathlib import Path
from statistics import median
from typing import Any, TypeVar

import numpy as np
from markupsafe import Markup
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.contents import file_stem, quoted, ways
from ..base.ai_mark import LOSSLESS, data_url
from ..config import LoraSpec, TrainingConfig, typed
from ..errors import AdapterError, PhotoError, SettingsError, counted, one_line, shown
from ..evaluation.results import Score
from ..files import Owned, number, page
from ..photos.opening import read_picture
from ..training.checkpoint import REPORT
from ..training.progress import clock
from .reading import Run, Sample, advice, dicts, integer, part, read_run

T = TypeVar("T")
Point = tuple[float, float]

THUMBNAIL = 256  # pixels of a picture on the page, at most; chosen
QUALITY = 80  # of WebP; chosen
MOST_COLUMNS = 24  # pictures of a row of samples, at most; chosen
TIMES = {"preparing": "preparing", "training": "training", "sampling": "of which sampling", "saving": "of which saving"}
WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 58, 22, 10, 26  # pixels of a chart
MOST_POINTS = 600  # of one line; chosen: about one per pixel
HIGHEST = 0.98  # share of the raw losses inside the chart, since a few lie far above; chosen
MEMORY = {"host": "peak memory of the process", "device": "peak memory of the GPU"}
SHARES = (("subject_share", "subject", 0.0), ("prompt_share", "prompt", 1.0))  # with the share of the base, at step 0


def write_report(run: str | Path, *, photos: bool = True) -> Path:
    """Write `report.html` to the folder of a run, from the files in it.

    photos  show small copies of the photos; leave them out of a page that you share
    Raises SettingsError if the folder is not that of a run.
    """
    found = read_run(typed("run", run, Path))
    path = found.path / REPORT
    try:
        Owned(found.path).write(REPORT, html(found, photos=photos).encode("utf-8", "replace"))
    except OSError as error:
        raise SettingsError(f"{shown(path)}: cannot be written ({error.strerror}); move it away") from error
    return path


def html(run: Run, *, photos: bool = True) -> str:
    """One self-contained page; all text is escaped."""
    subjects = [" ".join(str(one.get(name, "")) for name in ("token", "class_noun")) for one in run.subjects]
    rates = [(float(update.step), update.rate) for update in run.updates]
    rate = chart("Learning rate by step", [("rate", rates)], height=120, last=run.total)
    adapter = last_adapter(run)
    card = {} if adapter is None else {name: fact for name, fact in asdict(adapter.card).items() if fact is not None}
    return page(
        __package__,
        run=run,
        title=" and ".join(subjects) or shown(run.path.resolve().name),
        summary=summary(run),
        advice=advice(run),
        strips=strips(run),
        choices=list(choices(run)),
        ways=[] if adapter is None else list(uses(adapter, run)),
        charts={"loss": loss_chart(run), "rate": rate, "fidelity": fidelity_chart(run)},
        scores=scores_table(run),
        crops=[picture(run, path, f"photo {i}", generated=False) for i, path in enumerate(run.crops if photos else (), 1)],
        timings=timings(run),
        settings=settings(run),
        versions=part(run.record, "surroundings"),
        card=card,
    )


def last_adapter(run: Run) -> Adapter | None:
    try:
        return Adapter.load(run.path / list(run.adapters.values())[-1]) if run.adapters else None
    except (AdapterError, OSError):
        return None


def summary(run: Run) -> Iterator[str]:
    yield "finished" if run.finished else f"{run.record.get('status', 'running')} at step {run.step} of {run.total}"
    yield counted(run.step if run.finished else run.total, "step")
    yield counted(run.photos, "photo")
    if name := part(run.record, "facts", "base").get("name"):
        yield str(name)
    took = part(run.record, "seconds")
    if seconds := (number(took.get("preparing")) or 0.0) + (number(took.get("training")) or 0.0):
        yield f"{clock(seconds)} in all"


# --- pictures


def strips(run: Run) -> list[tuple[str, int, list[dict[str, Any]]]]:
    """The samples of one prompt and seed over time, for each prompt and seed."""
    rows: dict[tuple[str, int], list[Sample]] = {}
    for sample in run.samples:
        rows.setdefault((sample.prompt, sample.seed), []).append(sample)
    return [
        (prompt, seed, [picture(run, s.file, f"step {s.step}" if s.step else "before") for s in spread(row)])
        for (prompt, seed), row in rows.items()
    ]


def choices(run: Run) -> Iterator[dict[str, Any]]:
    """The adapters that the run has saved, one for each step, and their scores if they have some."""
    rows = {integer(row.get("step")): row for row in dicts(run.scores.get("adapters"))}
    for step, file in spread(list(run.adapters.items())):
        row = rows.get(step, {})
        best = bool(row) and row.get("name") == run.scores.get("best")
        yield {"step": step, "file": file, "best": best, "overall": number(row.get("overall"))}


def spread(row: Sequence[T], most: int = MOST_COLUMNS) -> list[T]:
    """At most `most` of them, evenly spaced, with the first and the last."""
    if len(row) <= most:
        return list(row)
    return [row[round(i * (len(row) - 1) / (most - 1))] for i in range(most)]


def picture(run: Run, path: Path, text: str, *, generated: bool = True) -> dict[str, Any]:
    """A picture on the page, with its caption; a grey one if the file cannot be read."""
    try:
        image = read_picture(path, inside=run.path)
    except PhotoError:
        image, text = Image.new("RGB", (LOSSLESS, LOSSLESS), (128, 128, 128)), f"{text}: cannot be read"
    pixelated = image.width <= LOSSLESS
    image.thumbnail((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, reducing_gap=2.0)
    url = data_url(image, QUALITY, generated=generated)
    return {"url": url, "width": image.width, "height": image.height, "text": text, "pixelated": pixelated}


# --- curves


def loss_chart(run: Run, *, style: str = "") -> Markup | None:
    points = [(float(u.step), u.loss) for u in run.updates if u.loss is not None]
    if not points:
        return None
    mean = smoothed(points)
    label = f"Loss by step; its mean went from {mean[0][1]:.3g} to {mean[-1][1]:.3g}"
    top = max(float(np.quantile([y for _, y in points], HIGHEST)), *(y for _, y in mean))
    marks = [(event.step, event.what) for event in run.events]
    return chart(label, [("raw", points), ("mean", mean)], top=top, marks=marks, last=run.total, style=style)


def fidelity_chart(run: Run) -> Markup | None:
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
            yield "–" if mean is None else str(Score(mean, low, high, 0))

    rows = [part(run.scores, "photos"), part(run.scores, "base"), *dicts(run.scores.get("adapters"))]
    return {
        "heads": ["overall", *(str(m.get("label")) for m in metrics)],
        "rows": [(str(row.get("name")), row.get("name") == best, list(cells(row))) for row in rows],
        "lower": [str(m.get("label")) for m in metrics if m.get("better") == "lower"],
        "how": str(run.scores.get("measured_with", "")),
    }


def chart(
    label: str,
    lines: Sequence[tuple[str, Sequence[Point]]],
    *,
    height: int = 240,
    top: float | None = None,
    dots: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    last: float = 0.0,
    style: str = "",
) -> Markup | None:
    """A line chart as an SVG element, with all text escaped; None if there are no points.

    label      a description for screen readers
    lines      CSS class and points, by x
    top, last  ends of the axes; the x axis also holds all points, and so does the other without `top`
    dots       a dot at each point, with its values on hover
    marks      x and text of vertical lines
    style      CSS for svg.lb, for use outside the report; "": the page has the style
    """
    everything = [point for _, points in lines for point in points]
    if not everything:
        return None
    last_x = max(1.0, last, *(x for x, _ in everything))
    highest = top if top is not None else max(y for _, y in everything)
    y_ticks = ticks(highest or 1.0, max(1, height // 60))
    highest = max(highest, y_ticks[-1])
    right, floor = WIDTH - RIGHT, height - BOTTOM

    def across(x: float) -> str:
        return f"{LEFT + x / last_x * (right - LEFT):.1f}"

    def up(y: float) -> str:
        return f"{floor - min(max(y, 0.0), highest) / highest * (floor - TOP):.1f}"

    x_ticks = [x for x in ticks(last_x, 6) if x <= last_x and x.is_integer()]
    alone = f'xmlns="http://www.w3.org/2000/svg" class="lb" width="{WIDTH}" height="{height}" ' if style else ""
    parts = [f'<svg {alone}viewBox="0 0 {WIDTH} {height}" role="img" aria-label="{escape(label)}">']
    parts.append(f"<style>{style}</style>" if style else "")
    for y in y_ticks:
        parts.append(f'<path class="grid" d="M{LEFT} {up(y)}H{right}"/>')
        parts.append(f'<text x="{LEFT - 8}" y="{up(y)}" dy=".32em" text-anchor="end">{short(y)}</text>')
    for x in x_ticks:
        text = f"{x:g}" if x else "step 0"
        parts.append(f'<text x="{across(x)}" y="{height - 6}" text-anchor="middle">{text}</text>')
    for x, text in marks:
        if 0 <= x <= last_x:
            parts.append(f'<path class="mark" d="M{across(x)} {TOP}V{floor}"><title>{escape(text)}</title></path>')
    for kind, points in lines:
        if points:
            path = "L".join(f"{across(x)} {up(y)}" for x, y in thinned(points))
            parts.append(f'<path class="{kind}" d="M{path}"/>')
        for x, y in points if dots else ():
            place = f'cx="{across(x)}" cy="{up(y)}" r="4"'
            parts.append(f'<circle class="{kind}" {place}><title>step {x:g}: {y:.3g}</title></circle>')
    return Markup("".join([*parts, "</svg>"]))


def ticks(high: float, count: int) -> list[float]:
    """Round numbers from 0, about `count` of them; the last is at or above `high`."""
    raw = max(high / count, 1e-12)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    return [round(i * step, 12) for i in range(math.ceil(high / step - 1e-9) + 1)]


def short(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MOST_POINTS: the lowest and the highest of each stretch, so that spikes stay."""
    size, extremes = math.ceil(2 * len(points) / MOST_POINTS), []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        extremes += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return extremes


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential mean over a twentieth of the points, at least 20 (chosen), without bias towards its first value."""
    keep = 1 - 2 / (max(20, len(points) / 20) + 1)
    total, weight, means = 0.0, 0.0, []
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        means.append((x, total / weight))
    return means


# --- facts


def settings(run: Run) -> dict[str, list[tuple[str, str, str]]]:
    """Names, values and defaults: changed ones, those without a fixed default (set, or chosen for this run), and the usual."""
    groups: dict[str, list[tuple[str, str, str]]] = {"changed": [], "chosen": [], "usual": []}
    values = {**run.config, **part(run.record, "facts", "lora")}
    for name, default in (asdict(TrainingConfig()) | asdict(LoraSpec())).items():
        if name in values:
            value, usual = text_of(values[name]), text_of(default)
            group = "usual" if value == usual else "chosen" if default is None else "changed"
            groups[group].append((name, value, usual))
    return groups


def text_of(value: Any) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if value is None or value == [] or value == ():
        return "none"
    if isinstance(value, list | tuple):
        return ", ".join(map(str, value))
    return short(value) if isinstance(value, float) else str(value)


def timings(run: Run) -> dict[str, str]:
    took = {name: number(value) for name, value in part(run.record, "seconds").items()}
    found = {TIMES.get(name, name): clock(value) for name in {**TIMES, **took} if (value := took.get(name)) is not None}
    if each := [b.seconds - a.seconds for a, b in pairwise(run.updates)]:
        found["a step, median"] = f"{median(each):.2f} s"
    peaks = part(run.record, "peak_memory")
    return found | {text: f"{peaks[name] / 2**30:.1f} GiB" for name, text in MEMORY.items() if number(peaks.get(name))}


# --- how to use the file


def uses(adapter: Adapter, run: Run) -> Iterator[tuple[str, str, str]]:
    """Program, sentence and code, for each program. The page has the name of the run's folder, but not its path."""
    folder, name = one_line(run.path.resolve().name), list(run.adapters.values())[-1]
    here = f"From the folder above {folder}"
    for program, sentence, code in ways(adapter, name, folder, new_name=f"{file_stem(adapter.name)}.safetensors"):
        yield program, sentence or here, code
    prompt = f"{one_line(adapter.card.prompt or 'a photo')} in the snow"
    script = (
        f"import lora_booth as lb\n\nbase = lb.BaseModel.load({quoted(adapter.card.base_model or 'the base')})\n"
        f"adapter = lb.Adapter.load({quoted(f'{folder}/{name}')})\n"
        f"pictures = lb.Composition(base, [adapter]).generate({quoted(prompt)}, seeds=range(4))\n"
        'lb.Gallery(pictures).save("gallery.html")'
    )
    yield "lora_booth", f"To score every adapter that the run has saved, run lora-booth evaluate on {folder}. {here}", script
