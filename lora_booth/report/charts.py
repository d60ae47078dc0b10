"""Charts as geometry: lines and ticks in the pixels of an SVG, which the page draws."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass

Point = tuple[float, float]

WIDTH, LEFT, RIGHT, TOP, BOTTOM = 720, 58, 22, 10, 26  # pixels
MOST_POINTS = 600  # of one line
HIGHEST = 0.98  # of the raw losses that are in the picture; a few lie far above


@dataclass(frozen=True)
class Line:
    kind: str  # the class that the page's style knows
    path: str  # of an SVG
    dots: tuple[tuple[str, str, str], ...] = ()  # x, y, what it is


@dataclass(frozen=True)
class Chart:
    label: str  # what it shows, for who cannot see it
    height: int
    x_ticks: tuple[tuple[str, str], ...]  # pixel, text
    y_ticks: tuple[tuple[str, str], ...]
    lines: tuple[Line, ...]
    marks: tuple[tuple[str, str], ...] = ()  # pixel, text: vertical lines
    width: int = WIDTH
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP

    @property
    def floor(self) -> int:
        return self.height - BOTTOM


def chart(
    label: str,
    lines: Sequence[tuple[str, Sequence[Point]]],
    *,
    height: int = 240,
    top: float | None = None,
    dots: bool = False,
    marks: Sequence[tuple[float, str]] = (),
    last: float | None = None,
) -> Chart | None:
    """lines: kind and points, by x. top, last: ends of the axes; None: those of the points. None: nothing to show."""
    everything = [point for _, points in lines for point in points]
    if not everything:
        return None
    first_x, last_x = 0.0, max(1.0, last or 0.0, *(x for x, _ in everything))
    highest = top if top is not None else max(y for _, y in everything)
    y_steps = ticks(0.0, highest or 1.0, max(1, height // 60))
    highest = max(highest, y_steps[-1])
    span_x, span_y = last_x - first_x, highest or 1.0

    def place(point: Point) -> tuple[float, float]:
        x, y = point
        across = (x - first_x) / span_x * (WIDTH - LEFT - RIGHT)
        up = min(max(y, 0.0), highest) / span_y * (height - TOP - BOTTOM)
        return LEFT + across, height - BOTTOM - up

    def one(kind: str, points: Sequence[Point]) -> Line:
        spots = [place(point) for point in thinned(points)]
        path = "M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in spots) if spots else ""
        told = [f"step {x:g}: {y:.3g}" for x, y in points] if dots else []
        placed = [place(point) for point in points] if dots else []
        return Line(kind, path, tuple((f"{x:.1f}", f"{y:.1f}", text) for (x, y), text in zip(placed, told, strict=True)))

    x_steps = [x for x in ticks(first_x, last_x, 6) if first_x <= x <= last_x and float(x).is_integer()]
    return Chart(
        label,
        height,
        tuple((f"{place((x, 0))[0]:.1f}", f"{x:g}") for x in x_steps),
        tuple((f"{place((0, y))[1]:.1f}", short(y)) for y in y_steps),
        tuple(one(kind, points) for kind, points in lines if points),
        tuple((f"{place((x, 0))[0]:.1f}", text) for x, text in marks if first_x <= x <= last_x),
    )


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
    """At most about MOST_POINTS: of each stretch its lowest and highest, so that spikes stay."""
    if len(points) <= MOST_POINTS:
        return list(points)
    size, kept = math.ceil(2 * len(points) / MOST_POINTS), []
    for start in range(0, len(points), size):
        stretch = points[start : start + size]
        kept += sorted({min(stretch, key=lambda p: p[1]), max(stretch, key=lambda p: p[1])})
    return kept


def smoothed(points: Sequence[Point]) -> list[Point]:
    """Exponential mean over a twentieth of the points, at least over 20, without the pull of its beginning."""
    keep = 1 - 2 / (max(20, len(points) / 20) + 1)
    return list(running(points, keep))


def running(points: Sequence[Point], keep: float) -> Iterator[Point]:
    total = weight = 0.0
    for x, y in points:
        total, weight = keep * total + y, keep * weight + 1
        yield x, total / weight


def usual_top(values: Sequence[float]) -> float:
    """Where a chart of noisy values may end."""
    ordered = sorted(values)
    return ordered[min(len(ordered) - 1, int(HIGHEST * len(ordered)))] if ordered else 1.0
