"""Line charts as SVG."""

from __future__ import annotations

import math
from collections.abc import Sequence
from html import escape

Point = tuple[float, float]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 58, 22, 10, 26  # pixels
MOST_POINTS = 600  # of one line; chosen: about one per pixel
HIGHEST = 0.98  # share of the raw losses inside the chart, since a few lie far above; chosen


def chart(
    label: str,
    lines: Sequence[tuple[str, Sequence[Point]]],
    *,
    height: int = 240,
    top: float | None = None,
    dots: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    last: float | None = None,
    style: str = "",
) -> str | None:
    """An SVG element, with all text escaped; None if there are no points.

    label      a description for screen readers
    lines      CSS class and points, by x
    top, last  ends of the axes; None: those of the points
    dots       a dot at each point, with its values on hover
    marks      x and text of vertical lines
    style      CSS for svg.lb, for use outside the report; "": the page has the style
    """
    everything = [point for _, points in lines for point in points]
    if not everything:
        return None
    last_x = max(1.0, last or 0.0, *(x for x, _ in everything))
    highest = top if top is not None else max(y for _, y in everything)
    y_ticks = ticks(0.0, highest or 1.0, max(1, height // 60))
    highest = max(highest, y_ticks[-1])
    right, floor = WIDTH - RIGHT, height - BOTTOM

    def across(x: float) -> str:
        return f"{LEFT + x / last_x * (right - LEFT):.1f}"

    def up(y: float) -> str:
        return f"{floor - min(max(y, 0.0), highest) / highest * (floor - TOP):.1f}"

    x_ticks = [x for x in ticks(0.0, last_x, 6) if x <= last_x and x.is_integer()]
    title = f'aria-label="{escape(label)}"'
    alone = f'xmlns="http://www.w3.org/2000/svg" class="lb" width="{WIDTH}" height="{height}" ' if style else ""
    parts = [f'<svg {alone}viewBox="0 0 {WIDTH} {height}" role="img" {title}>', f"<style>{style}</style>" if style else ""]
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
    return "".join([*parts, "</svg>"])


def ticks(low: float, high: float, count: int) -> list[float]:
    """Round numbers over low..high, about `count` of them; the last is at or above `high`."""
    raw = max((high - low) / count, 1e-12)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.999)
    first = math.floor(low / step + 1e-9)
    return [round((first + i) * step, 12) for i in range(math.ceil(high / step - 1e-9) - first + 1)]


def short(value: float) -> str:
    return f"{value:g}".replace("e-0", "e-")


def thinned(points: Sequence[Point]) -> list[Point]:
    """At most about MOST_POINTS: the lowest and the highest of each stretch, so that spikes stay."""
    if len(points) <= MOST_POINTS:
        return list(points)
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


def usual_top(values: Sequence[float]) -> float:
    """An upper end for the axis of noisy values."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(HIGHEST * len(ordered)))] if ordered else 1.0
