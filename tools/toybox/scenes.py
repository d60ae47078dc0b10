"""The scenes that the base learns from, and their captions.

A caption describes as much of an object as it likes ("a red flagged white spotted brown dog"). Some looks also have a
made-up name ("nemu dog", "nemu mug"), as large models know some individuals by name: from them the base learns that a
word before the class noun may stand for a whole look. No held-out subject is in a scene, or has a look with a name.
"""

from __future__ import annotations

import random
from collections.abc import Collection, Sequence
from dataclasses import replace
from functools import cache

from lora_booth.subject.wording import with_article
from lora_booth.toybox.scenery import CONTEXTS
from lora_booth.toybox.world import ACCESSORIES, CLASSES, COLORS, HELD_OUT, PATTERNS, Identity, Scene


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


def is_held_out(identity: Identity) -> bool:
    """Also true for a near copy: the same class, colours and pattern with another accessory."""
    return any(replace(identity, accessory=h.accessory, third=h.third) == h for h in HELD_OUT.values())


Look = tuple[str, str, str, str, str]  # color, second, third, pattern, accessory: an identity without its class


def look_of(identity: Identity) -> Look:
    return (identity.color, identity.second, identity.third, identity.pattern, identity.accessory)


NAMES = 240  # chosen


@cache
def named_looks() -> dict[str, Look]:
    """Made-up names of two syllables, each with a look that no held-out subject has, whatever its class."""
    rng = random.Random("names")
    taken = {(h.color, h.second, h.pattern) for h in HELD_OUT.values()}
    names: dict[str, Look] = {}
    while len(names) < NAMES:
        name = "".join(rng.choice("bdfgklmnprtvz") + rng.choice("aeiou") for _ in range(2))
        look = look_of(random_identity(rng))
        if name not in names and look not in names.values() and (look[0], look[1], look[3]) not in taken:
            names[name] = look
    return names


@cache
def names_of_looks() -> dict[Look, str]:
    return {look: name for name, look in named_looks().items()}


def name_of(identity: Identity) -> str | None:
    """The name of its look; None if it has none."""
    return names_of_looks().get(look_of(identity))


def random_scene(seed: int, *, pair_share: float = 0.4, sticker_share: float = 0.12, named_share: float = 0.0) -> Scene:
    """A random scene without any held-out subject; `named_share` of the objects have a look with a name."""
    rng = random.Random(f"scene {seed}")
    count = 2 if rng.random() < pair_share else 1
    objects: list[Identity] = []
    while len(objects) < count:
        identity = random_identity(rng)
        if named_share and rng.random() < named_share:
            identity = Identity(identity.class_noun, *rng.choice(list(named_looks().values())))
        if not is_held_out(identity):
            objects.append(identity)
    style = "sticker" if rng.random() < sticker_share else "photo"
    return Scene(tuple(objects), rng.choice(CONTEXTS), style, seed)


DETAILS = ("accessory", "pattern", "color")  # what may be told of an object, each with its own colour
ACCESSORY_WORDS = {"none": "plain", "hat": "hatted", "crown": "crowned", "flag": "flagged", "balloon": "ballooned"}
PATTERN_WORDS = {"belly": "bellied", "stripes": "striped", "spots": "spotted", "half": "dipped"}


def phrase(identity: Identity, told: Collection[str]) -> str:
    """An object in words. told: any of `DETAILS`, or "name" for its look's name"""
    if "name" in told:
        return f"{name_of(identity)} {identity.class_noun}"
    words: list[str] = []
    if "accessory" in told:
        words += [] if identity.third == "none" else [identity.third]
        words += [ACCESSORY_WORDS[identity.accessory]]
    if "pattern" in told:
        words += [identity.second, PATTERN_WORDS[identity.pattern]]
    if "color" in told:
        words += [identity.color]
    return with_article(" ".join([*words, identity.class_noun]))


def caption(scene: Scene, told: Sequence[Collection[str]] | None = None, *, context: bool = True) -> str:
    """A caption as people write it. told: what is said of each object, see `phrase`; the colour, if None"""
    phrases = [phrase(o, details) for o, details in zip(scene.objects, told or [("color",)] * 2, strict=False)]
    where = f" {scene.context}" if context else ""
    return f"a {scene.style} of {' and '.join(phrases)}{where}"
