"""The ten contexts: backgrounds for the objects of a scene."""

from __future__ import annotations

import random
from collections.abc import Callable

from .drawing import Canvas, box, ellipse


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
