"""The drawn world of the toybox: pictures with ground truth, the same for the same seed.

A picture shows one or two objects in a context, in one of two styles. Captions may name an object's class and
colour; its *identity* (second and third colour, pattern, accessory) is never named, so a model can learn a
particular object from pictures only. That is what makes it a world to try DreamBooth in.

Everything is drawn in unit coordinates (x to the right, y down, 0..1) at three times the wanted size and reduced
by area, so any size can be drawn and edges are smooth.
"""

from __future__ import annotations

import math
import random
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from PIL import Image, ImageDraw

Point = tuple[float, float]
Shape = list[Point]  # a closed polygon
RGB = tuple[int, int, int]

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
ACCESSORIES = ("none", "hat", "crown", "scarf", "balloon")
STYLES = ("photo", "sticker")
OUTLINE: RGB = (26, 24, 32)
SUPERSAMPLING = 3


# --- what a picture shows ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Identity:
    """One particular object. `color` can be named in a caption; the rest never is."""

    class_noun: str
    color: str
    second: str  # the pattern's colour
    third: str  # the accessory's colour; "none" without an accessory
    pattern: str
    accessory: str


@dataclass(frozen=True)
class Scene:
    """One or two objects (left to right), where, and in which style; `seed` fixes pose and scenery."""

    objects: tuple[Identity, ...]
    context: str
    style: str = "photo"
    seed: int = 0

    def caption(self, *, colors: bool = True, context: bool = True) -> str:
        phrases = [with_article(f"{o.color} {o.class_noun}" if colors else o.class_noun) for o in self.objects]
        where = f" {self.context}" if context else ""
        return f"a {self.style} of {' and '.join(phrases)}{where}"


@dataclass(frozen=True)
class Render:
    image: Image.Image  # RGB, size x size
    masks: np.ndarray  # (number of objects, size, size) bool: what each object covers
    scene: Scene


def with_article(phrase: str) -> str:
    return f"{'an' if phrase[0] in 'aeiou' else 'a'} {phrase}"


def random_identity(rng: random.Random, class_noun: str | None = None) -> Identity:
    color, second, third = rng.sample(list(COLORS), 3)
    accessory = rng.choice(ACCESSORIES)
    return Identity(
        class_noun=class_noun or rng.choice(CLASSES),
        color=color,
        second=second,
        third="none" if accessory == "none" else third,
        pattern=rng.choice(PATTERNS),
        accessory=accessory,
    )


# Never drawn for the base's training: the subjects of the demo and of the benchmarks.
HELD_OUT: dict[str, Identity] = {
    "rex": Identity("dog", "brown", "white", "red", "spots", "scarf"),
    "olga": Identity("owl", "blue", "white", "yellow", "belly", "hat"),
    "bolt": Identity("robot", "green", "yellow", "purple", "stripes", "crown"),
    "brew": Identity("mug", "pink", "blue", "none", "half", "none"),
    "zoom": Identity("car", "purple", "orange", "red", "stripes", "balloon"),
    "misty": Identity("cat", "white", "orange", "green", "half", "scarf"),
    "finn": Identity("fish", "orange", "blue", "black", "spots", "hat"),
}


def is_held_out(identity: Identity) -> bool:
    """Also true for a near twin: the same class, colours and pattern with another accessory."""
    return any(replace(identity, accessory=h.accessory, third=h.third) == h for h in HELD_OUT.values())


def random_scene(seed: int, *, pair_share: float = 0.4, sticker_share: float = 0.12) -> Scene:
    """A random scene without any held-out subject."""
    rng = random.Random(f"scene {seed}")
    count = 2 if rng.random() < pair_share else 1
    objects: list[Identity] = []
    while len(objects) < count:
        identity = random_identity(rng)
        if not is_held_out(identity):
            objects.append(identity)
    style = "sticker" if rng.random() < sticker_share else "photo"
    return Scene(tuple(objects), rng.choice(CONTEXTS), style, seed)


# --- drawing -------------------------------------------------------------------------------------------------------


def ellipse(cx: float, cy: float, rx: float, ry: float, corners: int = 28) -> Shape:
    return arc(cx, cy, rx, ry, 0, 360, corners)


def arc(cx: float, cy: float, rx: float, ry: float, start: float, end: float, corners: int = 28) -> Shape:
    """Points on an ellipse from angle `start` to `end` (degrees, clockwise from the right)."""
    angles = [math.radians(start + (end - start) * i / corners) for i in range(corners + (end - start < 360))]
    return [(cx + rx * math.cos(a), cy + ry * math.sin(a)) for a in angles]


def box(x0: float, y0: float, x1: float, y1: float) -> Shape:
    return [(x0, y0), (x1, y0), (x1, y1), (x0, y1)]


@dataclass(frozen=True)
class Figure:
    """How a class looks, in the unit square. Parts are painted in order; "body" parts wear the pattern."""

    parts: Sequence[tuple[str | RGB, Shape]]  # ("body" or a colour, polygon)
    head: tuple[float, float, float]  # x, y, width of the place for a hat or a crown
    neck: tuple[float, float, float]  # x, y, width of the place for a scarf


EYE_WHITE: RGB = (250, 250, 250)
EYES = {"dark": OUTLINE, "light": EYE_WHITE}
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
        neck=(0.66, 0.55, 0.32),
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
        neck=(0.48, 0.58, 0.42),
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
        neck=(0.50, 0.64, 0.56),
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
        neck=(0.44, 0.66, 0.46),
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
        neck=(0.50, 0.46, 0.44),
    ),
    "mug": Figure(
        parts=[
            ("body", arc(0.70, 0.60, 0.28, 0.26, -80, 80) + arc(0.70, 0.60, 0.15, 0.14, -80, 80)[::-1]),
            ("body", [(0.10, 0.22), (0.74, 0.22), (0.70, 1.0), (0.14, 1.0)]),
            ((95, 60, 40), ellipse(0.42, 0.23, 0.31, 0.08)),
        ],
        head=(0.42, 0.20, 0.44),
        neck=(0.42, 0.52, 0.56),
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
        neck=(0.50, 0.58, 0.52),
    ),
    "boot": Figure(
        parts=[
            ("body", [(0.14, 0.04), (0.60, 0.04), (0.62, 0.50), (0.94, 0.64), (1.0, 0.90), (0.14, 0.90)]),
            (OUTLINE, box(0.12, 0.90, 1.0, 1.0)),
            (METAL, box(0.12, 0.02, 0.62, 0.12)),
        ],
        head=(0.38, 0.06, 0.44),
        neck=(0.38, 0.38, 0.48),
    ),
}
CLASSES: tuple[str, ...] = tuple(FIGURES)


def pattern_shapes(pattern: str, body: Sequence[Shape]) -> list[Shape]:
    """The parts of the body's bounding box that have the second colour."""
    xs, ys = [x for s in body for x, _ in s], [y for s in body for _, y in s]
    x0, y0, w, h = min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)
    if pattern == "belly":
        return [ellipse(x0 + 0.48 * w, y0 + 0.70 * h, 0.21 * w, 0.24 * h)]
    if pattern == "stripes":
        return [box(x0 + i * w / 7, y0, x0 + (i + 1) * w / 7, y0 + h) for i in (1, 3, 5)]
    if pattern == "spots":
        places = [(0.20, 0.58), (0.42, 0.76), (0.66, 0.56), (0.44, 0.36), (0.78, 0.88), (0.16, 0.90), (0.78, 0.22)]
        return [ellipse(x0 + px * w, y0 + py * h, 0.09, 0.09) for px, py in places]
    if pattern == "half":
        return [box(x0, y0 + 0.55 * h, x0 + w, y0 + h)]
    raise ValueError(f"unknown pattern {pattern!r}; one of {PATTERNS}")


def accessory_shapes(accessory: str, figure: Figure) -> list[Shape]:
    """What is worn, in the third colour, painted after the figure."""
    (hx, hy, hw), (nx, ny, nw) = figure.head, figure.neck
    if accessory == "none":
        return []
    if accessory == "hat":
        return [
            box(hx - 0.40 * hw, hy - 0.26, hx + 0.40 * hw, hy),
            box(hx - 0.80 * hw, hy - 0.05, hx + 0.80 * hw, hy + 0.04),
        ]
    if accessory == "crown":
        left, step, low, high = hx - 0.62 * hw, 1.24 * hw / 4, hy + 0.04, hy - 0.22
        tops = [(left + i * step, high if i % 2 == 0 else hy - 0.07) for i in range(5)]
        return [[(left, low), *tops, (left + 4 * step, low)]]
    if accessory == "scarf":
        return [
            box(nx + 0.20 * nw, ny, nx + 0.20 * nw + 0.15, ny + 0.34),
            box(nx - 0.60 * nw, ny - 0.07, nx + 0.60 * nw, ny + 0.08),
        ]
    if accessory == "balloon":
        return [[(0.90, 0.62), (0.935, 0.62), (0.985, 0.10), (0.95, 0.10)], ellipse(0.97, -0.02, 0.17, 0.19)]
    raise ValueError(f"unknown accessory {accessory!r}; one of {ACCESSORIES}")


@dataclass
class Canvas:
    """A picture under way, `side` supersampled pixels wide."""

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
        """Vertical, in bands that are too fine to see."""
        first, last = round(y0 * self.side), round(y1 * self.side)
        for y in range(first, last):
            t = (y - first) / max(1, last - first - 1)
            self.pen.line([(0, y), (self.side, y)], fill=blend(top, bottom, t))


def blend(a: RGB, b: RGB, t: float) -> RGB:
    return (round(a[0] + (b[0] - a[0]) * t), round(a[1] + (b[1] - a[1]) * t), round(a[2] + (b[2] - a[2]) * t))


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
        x, scale = rng.uniform(0.42, 0.58), rng.uniform(0.56, 0.66)
    else:
        x, scale = (0.26, 0.74)[index] + rng.uniform(-0.02, 0.02), rng.uniform(0.40, 0.44)
    return Pose(x, rng.uniform(0.90, 0.95), scale, rng.uniform(-5, 5), rng.random() < 0.5)


def paint_object(canvas: Canvas, identity: Identity, pose: Pose, style: str) -> Image.Image:
    """Paint one object; returns its mask (mode "L", supersampled)."""
    figure = FIGURES[identity.class_noun]
    body = [shape for paint, shape in figure.parts if paint == "body"]
    cloth = Canvas(canvas.side)
    cloth.fill(COLORS[identity.color], box(0, 0, 1, 1))
    cloth.fill(COLORS[identity.second], *(pose.place(s) for s in pattern_shapes(identity.pattern, body)))

    worn = [(COLORS[identity.third], s) for s in accessory_shapes(identity.accessory, figure)]
    parts = [(paint, canvas.scaled(pose.place(shape))) for paint, shape in [*figure.parts, *worn]]
    line = max(2, round(0.020 * canvas.side))
    mask = Image.new("L", canvas.image.size)
    mask_pen = ImageDraw.Draw(mask)
    if style == "sticker":  # a white rim around the whole object
        for _, shape in parts:
            canvas.pen.line([*shape, *shape[:2]], fill=EYE_WHITE, width=3 * line, joint="curve")
    for paint, shape in parts:
        canvas.pen.line([*shape, *shape[:2]], fill=OUTLINE, width=line, joint="curve")
        mask_pen.line([*shape, *shape[:2]], fill=255, width=line, joint="curve")
        mask_pen.polygon(shape, fill=255)
        if paint == "body":
            part = Image.new("L", canvas.image.size)
            ImageDraw.Draw(part).polygon(shape, fill=255)
            canvas.image.paste(cloth.image, mask=part)
        else:
            canvas.pen.polygon(shape, fill=paint)
    return mask


def draw(scene: Scene, size: int = 64) -> Render:
    """Draw `scene` as `size` x `size` pixels."""
    if not 1 <= len(scene.objects) <= 2:
        raise ValueError(f"a scene has one or two objects, not {len(scene.objects)}")
    rng = random.Random(f"picture {scene.seed}")
    canvas = Canvas(size * SUPERSAMPLING)
    SCENERY[scene.context](canvas, rng)
    if scene.style == "sticker":
        canvas.image.paste(Image.blend(canvas.image, Image.new("RGB", canvas.image.size, EYE_WHITE), 0.55))
    masks = []
    for index, identity in enumerate(scene.objects):
        mask = paint_object(canvas, identity, random_pose(rng, index, len(scene.objects)), scene.style)
        masks.append(np.asarray(mask.resize((size, size), Image.Resampling.BOX)) > 127)
    image = canvas.image.resize((size, size), Image.Resampling.BOX)
    return Render(image, np.stack(masks), scene)


def photos_of(identity: Identity, count: int, contexts: Sequence[str], *, seed: int = 0, size: int = 256) -> list[Render]:
    """What a user's photos would be: one object, `contexts` in turn."""
    scenes = [Scene((identity,), contexts[i % len(contexts)], "photo", seed + i) for i in range(count)]
    return [draw(scene, size) for scene in scenes]


# --- contexts ------------------------------------------------------------------------------------------------------


def moon(c: Canvas, rng: random.Random) -> None:
    c.fill((48, 46, 98), box(0, 0, 1, 1))
    for _ in range(7):
        c.fill((250, 250, 235), ellipse(rng.random(), rng.uniform(0, 0.55), 0.014, 0.014, 8))
    x, y = rng.uniform(0.1, 0.9), rng.uniform(0.1, 0.2)
    c.fill((70, 140, 220), ellipse(x, y, 0.09, 0.09))
    c.fill((90, 180, 110), ellipse(x + 0.02, y - 0.01, 0.045, 0.04))
    c.fill((176, 176, 186), ellipse(0.5, 1.25, 1.1, 0.58))
    for _ in range(4):
        c.fill((140, 140, 152), ellipse(rng.random(), rng.uniform(0.80, 0.97), 0.09, 0.03))


def underwater(c: Canvas, rng: random.Random) -> None:
    c.gradient((70, 190, 215), (15, 75, 140))
    c.fill((200, 185, 130), ellipse(0.5, 1.18, 1.0, 0.28))
    for _ in range(5):
        x, w = rng.random(), 0.025
        c.fill((30, 120, 80), [(x - w, 1), (x + w, 1), (x + 2 * w, 0.75), (x, rng.uniform(0.45, 0.6)), (x - w, 0.8)])
    for _ in range(7):
        c.fill((205, 240, 250), ellipse(rng.random(), rng.uniform(0, 0.7), 0.022, 0.022, 12))


def snow(c: Canvas, rng: random.Random) -> None:
    c.gradient((150, 175, 205), (205, 218, 232))
    for _ in range(4):
        x, h = rng.random(), rng.uniform(0.28, 0.42)
        c.fill((60, 105, 95), [(x - 0.11, 0.70), (x + 0.11, 0.70), (x, 0.70 - h)])
        c.fill((240, 244, 250), [(x - 0.05, 0.70 - 0.55 * h), (x + 0.05, 0.70 - 0.55 * h), (x, 0.70 - h)])
    c.fill((238, 243, 250), ellipse(0.5, 1.15, 1.1, 0.48))
    for _ in range(12):
        c.fill((255, 255, 255), ellipse(rng.random(), rng.random(), 0.018, 0.018, 10))


def beach(c: Canvas, rng: random.Random) -> None:
    c.gradient((135, 205, 250), (205, 235, 250), 0, 0.45)
    c.fill((255, 225, 90), ellipse(rng.uniform(0.1, 0.9), 0.14, 0.09, 0.09))
    c.fill((30, 130, 190), box(0, 0.42, 1, 0.66))
    c.fill((245, 250, 255), box(0, 0.64, 1, 0.675))
    c.fill((240, 215, 150), box(0, 0.675, 1, 1))
    x = rng.choice([0.06, 0.94])
    c.fill((130, 90, 50), box(x - 0.025, 0.25, x + 0.025, 0.80))
    for dx, dy in ((-0.2, 0.08), (0.2, 0.08), (-0.14, -0.10), (0.14, -0.10)):
        c.fill((45, 150, 75), [(x, 0.22), (x + dx, 0.22 + dy), (x + 0.5 * dx, 0.29 + dy)])


def jungle(c: Canvas, rng: random.Random) -> None:
    c.gradient((25, 95, 55), (12, 52, 38))
    for _ in range(9):
        x, y, r = rng.random(), rng.uniform(-0.05, 0.75), rng.uniform(0.10, 0.17)
        green = (rng.randint(40, 85), rng.randint(125, 165), rng.randint(50, 80))
        tip = rng.uniform(-0.12, 0.12)
        c.fill(green, [(x - r, y), (x, y - 0.6 * r), (x + r, y + tip), (x, y + 0.6 * r)])
    for _ in range(3):
        x = rng.random()
        c.fill((95, 65, 40), box(x - 0.015, 0, x + 0.015, rng.uniform(0.4, 0.7)))
    c.fill((75, 60, 35), ellipse(0.5, 1.15, 1.0, 0.27))


def city(c: Canvas, rng: random.Random) -> None:
    c.gradient((250, 190, 150), (235, 225, 215), 0, 0.8)
    x = -0.05
    while x < 1:
        w, top = rng.uniform(0.16, 0.24), rng.uniform(0.10, 0.42)
        gray = rng.randint(95, 140)
        c.fill((gray, gray, gray + 18), box(x, top, x + w - 0.02, 0.85))
        for wy in (0.06, 0.17, 0.28):
            for wx in (0.03, 0.10):
                c.fill((255, 235, 140), box(x + wx, top + wy, x + wx + 0.04, top + wy + 0.05))
        x += w
    c.fill((75, 75, 82), box(0, 0.80, 1, 1))
    for i in range(4):
        c.fill((235, 235, 230), box(0.03 + 0.27 * i, 0.94, 0.17 + 0.27 * i, 0.965))


def desert(c: Canvas, rng: random.Random) -> None:
    c.gradient((255, 165, 85), (255, 220, 150))
    c.fill((255, 245, 205), ellipse(rng.uniform(0.15, 0.85), 0.18, 0.10, 0.10))
    c.fill((225, 150, 85), ellipse(rng.uniform(0, 0.4), 0.95, 0.7, 0.38))
    c.fill((205, 125, 65), ellipse(rng.uniform(0.6, 1.0), 1.10, 0.9, 0.42))
    x, green = rng.choice([0.08, 0.92]), (50, 125, 65)
    c.fill(green, box(x - 0.035, 0.30, x + 0.035, 0.82), box(x - 0.11, 0.42, x - 0.065, 0.56))
    c.fill(green, box(x - 0.11, 0.53, x, 0.58), box(x, 0.46, x + 0.11, 0.51), box(x + 0.065, 0.36, x + 0.11, 0.50))


def kitchen(c: Canvas, rng: random.Random) -> None:
    tones = ((232, 226, 214), (206, 214, 216))
    shift = rng.uniform(0, 0.16)
    for row in range(5):
        for column in range(-1, 7):
            x, y = 0.16 * column + shift, 0.16 * row
            c.fill(tones[(row + column) % 2], box(x, y, x + 0.16, y + 0.16))
    c.fill((150, 100, 60), box(0, 0.30, 1, 0.345))
    for _ in range(4):
        x = rng.random()
        c.fill(rng.choice([(190, 90, 70), (110, 150, 130), (225, 190, 110)]), box(x, 0.17, x + 0.09, 0.30))
    c.fill((178, 124, 76), box(0, 0.76, 1, 1))
    c.fill((140, 92, 54), box(0, 0.76, 1, 0.79))


def meadow(c: Canvas, rng: random.Random) -> None:
    c.gradient((110, 180, 245), (190, 225, 250))
    for _ in range(2):
        x, y = rng.random(), rng.uniform(0.08, 0.28)
        for dx, r in ((-0.09, 0.06), (0, 0.085), (0.09, 0.06)):
            c.fill((250, 250, 255), ellipse(x + dx, y, r, 0.75 * r))
    c.fill((130, 200, 90), ellipse(rng.uniform(0.2, 0.8), 1.15, 1.1, 0.62))
    for _ in range(9):
        x, y = rng.random(), rng.uniform(0.66, 0.98)
        c.fill(rng.choice([(250, 240, 120), (250, 170, 200), (255, 255, 255)]), ellipse(x, y, 0.025, 0.025, 10))


def stage(c: Canvas, rng: random.Random) -> None:
    c.fill((60, 22, 38), box(0, 0, 1, 1))
    x = rng.uniform(0.35, 0.65)
    c.fill((150, 110, 95), [(x - 0.08, 0), (x + 0.08, 0), (x + 0.36, 0.85), (x - 0.36, 0.85)])
    for side in (0, 1):
        for i in range(3):
            left = i * 0.075 if side == 0 else 1 - (i + 1) * 0.075
            c.fill((175, 25, 45) if i % 2 == 0 else (135, 15, 35), box(left, 0, left + 0.075, 0.85))
    c.fill((175, 25, 45), *(ellipse(0.125 + 0.25 * i, 0.0, 0.135, 0.11) for i in range(4)))
    c.fill((110, 65, 40), box(0, 0.82, 1, 1))
    c.fill((235, 205, 150), ellipse(x, 0.93, 0.36, 0.055))


SCENERY: dict[str, Callable[[Canvas, random.Random], None]] = {
    "on the moon": moon,
    "underwater": underwater,
    "in the snow": snow,
    "on the beach": beach,
    "in the jungle": jungle,
    "in the city": city,
    "in the desert": desert,
    "in the kitchen": kitchen,
    "in a meadow": meadow,
    "on a stage": stage,
}
CONTEXTS: tuple[str, ...] = tuple(SCENERY)
