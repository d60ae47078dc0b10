"""The drawn world of the toybox: the same for the same seed.

A picture shows one or two objects in a context, in one of two styles. The base has learnt to draw any *look* (colours,
pattern, accessory) that a caption describes; the prompts of our evaluations name the class only: as in DreamBooth, which
particular object is meant can be learnt only from pictures. `tools/toybox/scenes.py` has the base's scenes and captions.

Everything is drawn in unit coordinates (x to the right, y down, 0..1) at three times the target size and
averaged down, so any size can be drawn and edges are smooth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw

from .drawing import RGB, Canvas, Shape, arc, box, ellipse
from .scenery import SCENERY

COLORS: dict[str, RGB] = {
    "red": (214, 40, 40),
    "orange": (247, 138, 30),
    "yellow": (250, 218, 60),
    "green": (56, 160, 70),
    "blue": (40, 90, 210),
    "purple": (125, 60, 175),
    "pink": (250, 150, 195),
    "brown": (120, 75, 40),
    "white": (245, 245, 240),
    "black": (45, 45, 50),
}
PATTERNS = ("belly", "stripes", "spots", "half")
ACCESSORIES = ("none", "hat", "crown", "flag", "balloon")
STYLES = ("photo", "sticker")
OUTLINE: RGB = (26, 24, 32)
SUPERSAMPLING = 3


# --- what a picture shows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """One particular object."""

    class_noun: str
    color: str
    second: str  # the pattern's colour
    third: str  # the accessory's colour; "none" without an accessory
    pattern: str
    accessory: str


@dataclass(frozen=True)
class Scene:
    """One or two objects (left to right), their context and style; `seed` fixes pose and scenery."""

    objects: tuple[Identity, ...]
    context: str
    style: str = "photo"
    seed: int = 0


# Never drawn for the base's training: the subjects of the demo and of the benchmarks.
HELD_OUT: dict[str, Identity] = {
    "rex": Identity("dog", "brown", "white", "red", "spots", "flag"),
    "olga": Identity("owl", "blue", "white", "yellow", "belly", "hat"),
    "bolt": Identity("robot", "green", "yellow", "purple", "stripes", "crown"),
    "brew": Identity("mug", "pink", "blue", "none", "half", "none"),
    "zoom": Identity("car", "purple", "orange", "red", "stripes", "balloon"),
    "misty": Identity("cat", "white", "orange", "green", "half", "flag"),
    "finn": Identity("fish", "orange", "blue", "black", "spots", "hat"),
    "stomp": Identity("boot", "yellow", "purple", "green", "stripes", "balloon"),
    "luna": Identity("cat", "black", "yellow", "pink", "belly", "crown"),
    "chip": Identity("robot", "red", "white", "none", "spots", "none"),
    "dash": Identity("car", "green", "pink", "white", "belly", "crown"),
    "java": Identity("mug", "brown", "yellow", "blue", "stripes", "flag"),
}


# --- figures -------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Figure:
    """A class's shape in the unit square. Parts are painted in order; "body" parts get the pattern."""

    parts: Sequence[tuple[str | RGB, Shape]]  # ("body" or a colour, polygon)
    head: tuple[float, float, float]  # x, y, width of the place for a hat or a crown


EYE_WHITE: RGB = (250, 250, 250)
BEAK: RGB = (245, 170, 40)
GLASS: RGB = (185, 225, 240)
METAL: RGB = (165, 170, 180)

FIGURES: dict[str, Figure] = {
    "dog": Figure(
        parts=[
            ("body", [(0.10, 0.58), (0.00, 0.30), (0.10, 0.28), (0.22, 0.52)]),
            ("body", box(0.14, 0.68, 0.27, 1.0)),
            ("body", box(0.52, 0.68, 0.65, 1.0)),
            ("body", ellipse(0.40, 0.63, 0.34, 0.21)),
            ("body", ellipse(0.90, 0.40, 0.13, 0.10)),
            ("body", ellipse(0.72, 0.33, 0.20, 0.20)),
            ("body", ellipse(0.58, 0.38, 0.08, 0.18)),
            (OUTLINE, ellipse(0.99, 0.37, 0.05, 0.05)),
            (OUTLINE, ellipse(0.78, 0.29, 0.04, 0.05)),
        ],
        head=(0.72, 0.15, 0.30),
    ),
    "cat": Figure(
        parts=[
            ("body", [(0.70, 0.98), (0.98, 0.86), (0.98, 0.52), (0.88, 0.52), (0.88, 0.78), (0.66, 0.86)]),
            ("body", ellipse(0.48, 0.74, 0.30, 0.26)),
            ("body", [(0.20, 0.36), (0.20, 0.02), (0.44, 0.16)]),
            ("body", [(0.76, 0.36), (0.76, 0.02), (0.52, 0.16)]),
            ("body", ellipse(0.48, 0.34, 0.30, 0.23)),
            (BEAK, ellipse(0.36, 0.32, 0.06, 0.07)),
            (BEAK, ellipse(0.60, 0.32, 0.06, 0.07)),
            (OUTLINE, ellipse(0.48, 0.44, 0.05, 0.03)),
        ],
        head=(0.48, 0.14, 0.34),
    ),
    "owl": Figure(
        parts=[
            (BEAK, box(0.32, 0.92, 0.44, 1.0)),
            (BEAK, box(0.56, 0.92, 0.68, 1.0)),
            ("body", ellipse(0.14, 0.62, 0.11, 0.26)),
            ("body", ellipse(0.86, 0.62, 0.11, 0.26)),
            ("body", ellipse(0.50, 0.54, 0.35, 0.42)),
            (EYE_WHITE, ellipse(0.36, 0.32, 0.14, 0.14)),
            (EYE_WHITE, ellipse(0.64, 0.32, 0.14, 0.14)),
            (OUTLINE, ellipse(0.37, 0.33, 0.06, 0.06)),
            (OUTLINE, ellipse(0.63, 0.33, 0.06, 0.06)),
            (BEAK, [(0.43, 0.42), (0.57, 0.42), (0.50, 0.56)]),
        ],
        head=(0.50, 0.15, 0.42),
    ),
    "fish": Figure(
        parts=[
            ("body", [(0.72, 0.60), (1.00, 0.30), (1.00, 0.90)]),
            ("body", [(0.36, 0.80), (0.58, 0.80), (0.56, 1.0)]),
            ("body", ellipse(0.42, 0.60, 0.41, 0.29)),
            (EYE_WHITE, ellipse(0.18, 0.52, 0.08, 0.08)),
            (OUTLINE, ellipse(0.17, 0.52, 0.04, 0.04)),
        ],
        head=(0.38, 0.33, 0.34),
    ),
    "robot": Figure(
        parts=[
            ("body", box(0.26, 0.80, 0.42, 1.0)),
            ("body", box(0.58, 0.80, 0.74, 1.0)),
            ("body", box(0.02, 0.46, 0.18, 0.76)),
            ("body", box(0.82, 0.46, 0.98, 0.76)),
            ("body", box(0.20, 0.42, 0.80, 0.86)),
            (METAL, box(0.27, 0.06, 0.73, 0.40)),
            (EYE_WHITE, ellipse(0.39, 0.20, 0.07, 0.07)),
            (EYE_WHITE, ellipse(0.61, 0.20, 0.07, 0.07)),
            (OUTLINE, box(0.38, 0.31, 0.62, 0.35)),
        ],
        head=(0.50, 0.07, 0.40),
    ),
    "mug": Figure(
        parts=[
            ("body", arc(0.70, 0.60, 0.28, 0.26, -80, 80) + arc(0.70, 0.60, 0.15, 0.14, -80, 80)[::-1]),
            ("body", [(0.10, 0.22), (0.74, 0.22), (0.70, 1.0), (0.14, 1.0)]),
            ((95, 60, 40), ellipse(0.42, 0.23, 0.31, 0.08)),
        ],
        head=(0.42, 0.20, 0.44),
    ),
    "car": Figure(
        parts=[
            (
                "body",
                [(0.00, 0.84), (0.00, 0.58), (0.16, 0.52), (0.30, 0.28)]
                + [(0.70, 0.28), (0.84, 0.52), (1.0, 0.60), (1.0, 0.84)],
            ),
            (GLASS, [(0.27, 0.52), (0.36, 0.35), (0.48, 0.35), (0.48, 0.52)]),
            (GLASS, [(0.53, 0.35), (0.65, 0.35), (0.74, 0.52), (0.53, 0.52)]),
            (OUTLINE, ellipse(0.24, 0.86, 0.14, 0.14)),
            (OUTLINE, ellipse(0.76, 0.86, 0.14, 0.14)),
            (METAL, ellipse(0.24, 0.86, 0.06, 0.06)),
            (METAL, ellipse(0.76, 0.86, 0.06, 0.06)),
        ],
        head=(0.50, 0.28, 0.36),
    ),
    "boot": Figure(
        parts=[
            ("body", [(0.14, 0.04), (0.60, 0.04), (0.62, 0.50), (0.94, 0.64), (1.0, 0.90), (0.14, 0.90)]),
            (OUTLINE, box(0.12, 0.90, 1.0, 1.0)),
            (METAL, box(0.12, 0.02, 0.62, 0.12)),
        ],
        head=(0.38, 0.06, 0.44),
    ),
}
CLASSES: tuple[str, ...] = tuple(FIGURES)


def pattern_shapes(pattern: str, body: Sequence[Shape]) -> list[Shape]:
    """The shapes in the body's bounding box that get the second colour."""
    xs, ys = [x for s in body for x, _ in s], [y for s in body for _, y in s]
    x0, y0, w, h = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    if pattern == "belly":
        return [ellipse(x0 + 0.48 * w, y0 + 0.68 * h, 0.25 * w, 0.27 * h)]
    if pattern == "stripes":
        return [box(x0 + i * w / 5, y0, x0 + (i + 1) * w / 5, y0 + h) for i in (1, 3)]
    if pattern == "spots":
        places = [(0.20, 0.62), (0.46, 0.84), (0.70, 0.60), (0.44, 0.40), (0.86, 0.90), (0.14, 0.92), (0.80, 0.24)]
        return [ellipse(x0 + px * w, y0 + py * h, 0.115, 0.115) for px, py in places]
    if pattern == "half":
        return [box(x0, y0 + 0.52 * h, x0 + w, y0 + h)]
    raise ValueError(f"unknown pattern {pattern!r}; one of {PATTERNS}")


def accessory_shapes(accessory: str, figure: Figure) -> list[Shape]:
    """The accessory's shapes, painted after the figure in the third colour."""
    hx, hy, hw = figure.head
    if accessory == "none":
        return []
    if accessory == "hat":
        return [
            box(hx - 0.50 * hw, hy - 0.30, hx + 0.50 * hw, hy),
            box(hx - 0.95 * hw, hy - 0.06, hx + 0.95 * hw, hy + 0.05),
        ]
    if accessory == "crown":
        left, step, low, high = hx - 0.78 * hw, 1.56 * hw / 4, hy + 0.06, hy - 0.26
        tops = [(left + i * step, high if i % 2 == 0 else hy - 0.09) for i in range(5)]
        return [[(left, low), *tops, (left + 4 * step, low)]]
    if accessory == "flag":
        return [box(0.05, -0.28, 0.10, 0.62), [(0.10, -0.28), (0.46, -0.12), (0.10, 0.05)]]
    if accessory == "balloon":
        return [[(0.89, 0.62), (0.94, 0.62), (0.95, 0.10), (0.91, 0.10)], ellipse(0.93, -0.04, 0.20, 0.21)]
    raise ValueError(f"unknown accessory {accessory!r}; one of {ACCESSORIES}")


# --- painting ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Pose:
    x: float  # centre
    bottom: float
    scale: float  # side of the figure's unit square
    angle: float  # degrees
    flip: bool

    def place(self, shape: Shape) -> Shape:
        cos, sin = math.cos(math.radians(self.angle)), math.sin(math.radians(self.angle))
        placed = []
        for x, y in shape:
            u, v = (0.5 - x if self.flip else x - 0.5), y - 0.5
            rx, ry = cos * u - sin * v, sin * u + cos * v
            placed.append((self.x + self.scale * rx, self.bottom + self.scale * (ry - 0.5)))
        return placed


def random_pose(rng: random.Random, index: int, count: int) -> Pose:
    if count == 1:
        x, scale = rng.uniform(0.44, 0.56), rng.uniform(0.60, 0.70)
    else:
        x, scale = (0.25, 0.74)[index] + rng.uniform(-0.015, 0.015), rng.uniform(0.44, 0.48)
    return Pose(x, rng.uniform(0.90, 0.95), scale, rng.uniform(-5, 5), rng.random() < 0.5)


def paint_object(canvas: Canvas, identity: Identity, pose: Pose, style: str) -> None:
    figure = FIGURES[identity.class_noun]
    body = [shape for paint, shape in figure.parts if paint == "body"]
    cloth = Canvas(canvas.side)
    cloth.fill(COLORS[identity.color], box(0, 0, 1, 1))
    cloth.fill(COLORS[identity.second], *(pose.place(s) for s in pattern_shapes(identity.pattern, body)))

    worn = [(COLORS[identity.third], s) for s in accessory_shapes(identity.accessory, figure)]
    parts = [(paint, canvas.scaled(pose.place(shape))) for paint, shape in [*figure.parts, *worn]]
    line = max(2, round(0.020 * canvas.side))
    if style == "sticker":  # a white rim around the object
        for _, shape in parts:
            canvas.pen.line([*shape, *shape[:2]], fill=EYE_WHITE, width=3 * line, joint="curve")
    for paint, shape in parts:
        canvas.pen.line([*shape, *shape[:2]], fill=OUTLINE, width=line, joint="curve")
        if paint == "body":
            part = Image.new("L", canvas.image.size)
            ImageDraw.Draw(part).polygon(shape, fill=255)
            canvas.image.paste(cloth.image, mask=part)
        else:
            canvas.pen.polygon(shape, fill=paint)


def draw(scene: Scene, size: int = 64) -> Image.Image:
    """Draw `scene` as `size` x `size` pixels, RGB."""
    if not 1 <= len(scene.objects) <= 2:
        raise ValueError(f"a scene has one or two objects, not {len(scene.objects)}")
    rng = random.Random(f"picture {scene.seed}")
    canvas = Canvas(size * SUPERSAMPLING)
    SCENERY[scene.context](canvas, rng)
    if scene.style == "sticker":
        canvas.image.paste(Image.blend(canvas.image, Image.new("RGB", canvas.image.size, EYE_WHITE), 0.55))
    for index, identity in enumerate(scene.objects):
        paint_object(canvas, identity, random_pose(rng, index, len(scene.objects)), scene.style)
    return canvas.image.resize((size, size), Image.Resampling.BOX)


def photos_of(identity: Identity, count: int, contexts: Sequence[str], *, seed: int = 0, size: int = 256) -> list[Image.Image]:
    """Pictures like a user's photos: one object, in `contexts` by turns."""
    return [draw(Scene((identity,), contexts[i % len(contexts)], "photo", seed + i), size) for i in range(count)]
