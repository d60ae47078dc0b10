"""Drawing in unit coordinates (x to the right, y down, 0..1): polygons, and the canvas they are filled on."""

from __future__ import annotations

import math
from dataclasses import dataclass, field

from PIL import Image, ImageDraw

Point = tuple[float, float]
Shape = list[Point]  # a closed polygon
RGB = tuple[int, int, int]


def ellipse(cx: float, cy: float, rx: float, ry: float, corners: int = 28) -> Shape:
    return arc(cx, cy, rx, ry, 0, 360, corners)


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, corners: int = 28) -> Shape:
    """Points on an ellipse from angle `start` to `end` (degrees, clockwise from the right)."""
    angles = [math.radians(start + (end - start) * i / corners) for i in range(corners + (end - start < 360))]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def box(x0: float, y0: float, x1: float, y1: float) -> Shape:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


def blend(a: RGB, b: RGB, t: float) -> RGB:
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


@dataclass
class Canvas:
    """A picture in the making, `side` supersampled pixels wide and high."""

    side: int
    image: Image.Image = field(init=False)
    pen: ImageDraw.ImageDraw = field(init=False)

    def __post_init__(self) -> None:
        self.image = Image.new("RGB", (self.side, self.side))
        self.pen = ImageDraw.Draw(self.image)

    def scaled(self, shape: Shape) -> Shape:
        return [(x * self.side, y * self.side) for x, y in shape]

    def fill(self, color: RGB, *shapes: Shape) -> None:
        for shape in shapes:
            self.pen.polygon(self.scaled(shape), fill=color)

    def gradient(self, top: RGB, bottom: RGB, y0: float = 0.0, y1: float = 1.0) -> None:
        """A vertical gradient, row by row."""
        first, last = round(y0 * self.side), round(y1 * self.side)
        for y in range(first, last):
            t = (y - first) / max(1, last - first - 1)
            self.pen.line([(0, y), (self.side, y)], fill=blend(top, bottom, t))
