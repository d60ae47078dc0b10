"""The two measures: DINO and CLIP for pictures of the world, the toybox's judge for the drawn one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from itertools import combinations
from typing import Any, Protocol

import numpy as np
from PIL import Image

from ..toybox.judge import IDENTITY_PARTS, Verdict, judge
from ..toybox.world import HELD_OUT, Identity, Scene, draw
from .cases import Case
from .encoders import Clip, Dino
from .results import Metric, by_prompt
from .statistics import Values
from .toybox import attributes_right, copies, diversity, shows

Drawn = Sequence[Sequence[Image.Image]]  # by prompt


class Measure(Protocol):
    metrics: tuple[Metric, ...]
    described: str

    def of_drawn(self, cases: Sequence[Case], drawn: Drawn) -> dict[str, Values]:
        """Of the pictures of each case."""
        ...

    def of_class(self, pictures: Sequence[Image.Image]) -> dict[str, Values]:
        """Of pictures of the bare class."""
        ...

    def of_photos(self, cases: Sequence[Case], seeds: int) -> dict[str, Values]:
        """The ceiling."""
        ...

    def prompt_chance(self, cases: Sequence[Case], drawn: Drawn) -> float:
        """Prompt fidelity to prompts that the pictures were not drawn for."""
        ...


class PhotoMeasure:
    """arXiv 2208.12242, sec. 4.2: DINO and CLIP-I, mean cosine of each picture with every photo; CLIP-T, cosine of prompt and
    picture; PRES, DINO of the bare class's pictures with the photos. DIV is 1 - DINO among the pictures of a prompt here, and
    LPIPS in the paper. The prompt of CLIP-T has the class noun without the token, whose sound is no meaning.
    """

    metrics: tuple[Metric, ...] = (
        Metric("dino", "DINO", of="subject"),
        Metric("clip_i", "CLIP-I"),
        Metric("clip_t", "CLIP-T", of="prompt"),
        Metric("pres", "PRES", "lower"),
        Metric("div", "DIV (DINO)"),
        Metric("copies", "copies", "lower"),
    )

    def __init__(self, photos: Sequence[Image.Image], dino: Dino, clip: Clip) -> None:
        self.dino, self.clip = dino, clip
        self.described = (
            f"DINO {dino.source}, CLIP {clip.source}, bicubic, centre square of {dino.side} and {clip.side} px; "
            "DIV by DINO, not LPIPS"
        )
        self.photo_dino = dino.of_images(photos).numpy()
        self.photo_clip = clip.of_images(photos).numpy()

    def of_drawn(self, cases: Sequence[Case], drawn: Drawn) -> dict[str, Values]:
        images, counts = [image for group in drawn for image in group], [len(group) for group in drawn]
        seen, clip = self.dino.of_images(images).numpy(), self.clip.of_images(images).numpy()
        texts = self.clip.of_texts([case.bare for case in cases]).numpy()
        asked = np.repeat(texts, counts, axis=0)
        to_photos = seen @ self.photo_dino.T
        between = [a @ b for a, b in combinations(self.photo_dino, 2)]
        copied = (to_photos.max(axis=1) > max(between)).astype(float)
        ends = np.cumsum(counts)
        groups = [seen[end - count : end] for end, count in zip(ends, counts, strict=True)]
        return {
            "dino": by_prompt(to_photos.mean(axis=1), counts),
            "clip_i": by_prompt((clip @ self.photo_clip.T).mean(axis=1), counts),
            "clip_t": by_prompt((clip * asked).sum(axis=1), counts),
            "div": [[float(np.mean([1 - a @ b for a, b in combinations(group, 2)]))] for group in groups if len(group) > 1],
            "copies": by_prompt(copied, counts),
        }

    def of_class(self, pictures: Sequence[Image.Image]) -> dict[str, Values]:
        return {"pres": [(self.dino.of_images(pictures).numpy() @ self.photo_dino.T).mean(axis=1).tolist()]}

    def of_photos(self, cases: Sequence[Case], seeds: int) -> dict[str, Values]:
        dino = to_others(self.photo_dino)
        return {"dino": [dino], "clip_i": [to_others(self.photo_clip)], "pres": [dino]}

    def prompt_chance(self, cases: Sequence[Case], drawn: Drawn) -> float:
        texts = self.clip.of_texts([case.bare for case in cases]).numpy()
        others = []
        for index, group in enumerate(drawn):
            cosines = self.clip.of_images(group).numpy() @ np.delete(texts, index, axis=0).T
            others += cosines.flatten().tolist()
        return float(np.mean(others)) if others else 0.0


class ToyboxMeasure:
    """The judge's reading of each picture. With `identity`, one of the drawn world's, its attributes are counted and the
    ceiling is real renders in the prompts' contexts; without, its features stand for DINO and the ceiling is the photos."""

    def __init__(self, photos: Sequence[Image.Image], identity: Identity | None, name: str = "") -> None:
        self.photos, self.identity = list(photos), identity
        self.seen = features(judge(self.photos))
        of_features: Any = None if identity is not None else "subject"
        self.metrics: tuple[Metric, ...] = (
            *([Metric("identity", "identity", of="subject"), Metric("code", "whole identity")] if identity is not None else []),
            Metric("cosine", "judge cosine", of=of_features),
            Metric("context", "context", of="prompt"),
            Metric("pres", "PRES", "lower"),
            Metric("div", "DIV (judge)"),
            Metric("copies", "copies", "lower"),
        )
        who = f"the subject is {name}" if identity is not None else "features in place of DINO"
        self.described = f"the toybox's judge ({who}); not comparable with a paper's figures"

    def of_drawn(self, cases: Sequence[Case], drawn: Drawn) -> dict[str, Values]:
        verdicts = [judge(group) for group in drawn]
        found: dict[str, Values] = {
            "cosine": [(features(group) @ self.seen.T).mean(axis=1).tolist() for group in verdicts],
            "context": [
                [float(verdict.context == case.context) for verdict in group]
                for case, group in zip(cases, verdicts, strict=True)
                if case.context
            ],
            "div": [[diversity(group)] for group in verdicts if len(group) > 1],
            "copies": [[copies([image], self.photos) for image in group] for group in drawn],
        }
        return found | self._of_identity(verdicts)

    def _of_identity(self, verdicts: Sequence[Sequence[Verdict]]) -> dict[str, Values]:
        identity = self.identity
        if identity is None:
            return {}
        shares = [[attributes_right(verdict, identity) for verdict in group] for group in verdicts]
        return {"identity": shares, "code": [[float(share == 1.0) for share in group] for group in shares]}

    def of_class(self, pictures: Sequence[Image.Image]) -> dict[str, Values]:
        verdicts = judge(pictures)
        if self.identity is not None:
            return {"pres": [[float(shows(verdict, self.identity)) for verdict in verdicts]]}
        return {"pres": [(features(verdicts) @ self.seen.T).mean(axis=1).tolist()]}

    def of_photos(self, cases: Sequence[Case], seeds: int) -> dict[str, Values]:
        if self.identity is None:
            near = to_others(self.seen)
            return {"cosine": [near], "pres": [near]}
        drawn = [
            [draw(Scene((self.identity,), case.context, "photo", 77_000 + 100 * i + seed)).image for seed in range(seeds)]
            for i, case in enumerate(cases)
            if case.context
        ] or [self.photos]
        verdicts = [judge(group) for group in drawn]
        found = self._of_identity(verdicts)
        found["cosine"] = [(features(group) @ self.seen.T).mean(axis=1).tolist() for group in verdicts]
        found["pres"] = [[float(shows(verdict, self.identity)) for group in verdicts for verdict in group]]
        return found

    def prompt_chance(self, cases: Sequence[Case], drawn: Drawn) -> float:
        others = [
            float(verdict.context == other.context)
            for case, group in zip(cases, drawn, strict=True)
            for verdict in judge(group)
            for other in cases
            if other.context and other.context != case.context
        ]
        return float(np.mean(others)) if others else 0.0


def features(verdicts: Sequence[Verdict]) -> np.ndarray:
    """(N, FEATURES), each of length 1."""
    return np.stack([verdict.feature for verdict in verdicts])


def to_others(vectors: np.ndarray) -> list[float]:
    """Mean cosine of each with all others; empty for a single one."""
    if len(vectors) < 2:
        return []
    cosines = vectors @ vectors.T
    return ((cosines.sum(axis=1) - cosines.diagonal()) / (len(vectors) - 1)).tolist()


def drawn_subject(photos: Sequence[Image.Image]) -> tuple[str, Identity] | None:
    """Which held-out subject of the drawn world these photos show, by the majority of the judge's readings."""
    objects = [verdict.objects[0] for verdict in judge(photos) if verdict.objects]
    if 2 * len(objects) <= len(photos):
        return None
    usual = {part: Counter(getattr(one, part) for one in objects).most_common(1)[0][0] for part in IDENTITY_PARTS}
    found = Identity(**usual)
    return next(((name, held_out) for name, held_out in HELD_OUT.items() if held_out == found), None)


def contexts_shown(photos: Sequence[Image.Image]) -> set[str]:
    """Contexts of the drawn world that the photos were taken in."""
    return {verdict.context for verdict in judge(photos)}
