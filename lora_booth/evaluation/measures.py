"""Prompts of an evaluation, and the measures of their pictures: DINO and CLIP for photos, the judge for the toybox's world."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import numpy as np
import torch
from PIL import Image

from ..adapters.contents import Card
from ..errors import SettingsError, setting, shown
from ..pictures.prompts import fill_prompts
from ..subject.wording import without_subject
from ..toybox.judge import OBJECT_HEADS, Verdict, judge, to_pixels
from ..toybox.scenery import CONTEXTS
from ..toybox.world import HELD_OUT, Identity, Scene, draw
from .encoders import Clip, Dino
from .results import CHANCE, Metric, Values

Groups = Sequence[Sequence[Image.Image]]  # by prompt
RENDER_SEED = 77_000  # chosen: far from the seeds of the photos, so that the ceiling shows other poses
RECOGNISED_BY = ("class_noun", "color", "second", "pattern")  # parts of the subject's identity, in pictures of its class
TEMPLATE = "a photo of {token} {class_noun} {context}"


@dataclass(frozen=True)
class Case:
    """One prompt of the evaluation."""

    template: str  # with {token}, and all else filled in
    plain: str  # without the token: what the base draws, and what CLIP compares pictures with

    @property
    def context(self) -> str | None:
        """The toybox context that it asks for."""
        return next((context for context in CONTEXTS if context in self.plain), None)

    def prompt_for(self, card: Card) -> str:
        return fill_prompts([self.template], token=card.token)[0]


def cases_of(card: Card, templates: Sequence[str], contexts: Sequence[str] = ()) -> list[Case]:
    """A case for each prompt, or for each context of a prompt with {context}. Prompts may also contain the token itself.

    Raises SettingsError for a prompt that does not name the subject, and for a card without token or class noun.
    """
    if not (card.token and card.class_noun):
        remedy = setting("with_card(token=..., class_noun=...)", option="--token and --class-noun")
        raise SettingsError(f"the adapter's card has no token or class noun; add them with {remedy}")
    token, noun = card.token, card.class_noun
    found: dict[str, Case] = {}
    for text in templates:
        templated = re.sub(rf"(?<![\w{{]){re.escape(token)}(?![\w}}])", "{token}", text)
        if "{token}" not in templated:
            raise SettingsError(f"prompt {shown(text)!r} does not name the subject; add {{token}} or {token!r} to it")
        for template in fill_prompts([templated], token="{token}", class_noun=noun, contexts=contexts):
            filled = template.replace("{token}", token)
            found[filled] = Case(template, without_subject(filled, token, noun))
    return list(found.values())


# --- measures ------------------------------------------------------------------------------------------------------


class PhotoMeasure:
    """arXiv 2208.12242, sec. 4.2: DINO and CLIP-I, the mean cosine of each picture with every photo; CLIP-T, the cosine of
    picture and prompt; PRES, DINO of the plain class's pictures with the photos. DIV is 1 - DINO among the pictures of one
    prompt here, and LPIPS in the paper. CLIP-T compares with the class noun without the token, which CLIP does not know.

    of_subject  values for the pictures of each case; CHANCE is their fidelity to the other cases' prompts
    of_class    values for pictures of the plain class
    of_photos   the ceiling
    """

    metrics: tuple[Metric, ...] = (
        Metric("dino", "DINO", of="subject"),
        Metric("clip_i", "CLIP-I"),
        Metric("clip_t", "CLIP-T", of="prompt"),
        Metric("pres", "PRES", "lower"),
        Metric("div", "DIV (DINO)"),
        Metric("copies", "copies", "lower"),
    )

    def __init__(self, photos: Sequence[Image.Image], dino: str | Path, clip: str | Path, device: torch.device) -> None:
        self.dino, self.clip = Dino(dino, device=device), Clip(clip, device=device)
        sides = f"{self.dino.side} and {self.clip.side} px"
        self.described = f"DINO {dino}, CLIP {clip}, bicubic, centre square of {sides}; DIV by DINO, not LPIPS"
        self.photo_dino = self.dino.of_images(photos).numpy()
        self.photo_clip = self.clip.of_images(photos).numpy()
        self.closest = max(a @ b for a, b in combinations(self.photo_dino, 2))  # cosine of the two most alike

    def of_subject(self, cases: Sequence[Case], drawn: Groups) -> dict[str, Values]:
        texts = self.clip.of_texts([case.plain for case in cases]).numpy()
        seen = [self.dino.of_images(group).numpy() for group in drawn]
        clip = [self.clip.of_images(group).numpy() for group in drawn]
        to_photos, to_texts = [group @ self.photo_dino.T for group in seen], [group @ texts.T for group in clip]
        return {
            "dino": [cosines.mean(axis=1).tolist() for cosines in to_photos],
            "clip_i": [(group @ self.photo_clip.T).mean(axis=1).tolist() for group in clip],
            "clip_t": [cosines[:, index].tolist() for index, cosines in enumerate(to_texts)],
            CHANCE: [np.delete(cosines, index, axis=1).flatten().tolist() for index, cosines in enumerate(to_texts)],
            "div": [diversity(group) for group in seen],
            "copies": [(cosines.max(axis=1) > self.closest).astype(float).tolist() for cosines in to_photos],
        }

    def of_class(self, pictures: Sequence[Image.Image]) -> dict[str, Values]:
        return {"pres": [(self.dino.of_images(pictures).numpy() @ self.photo_dino.T).mean(axis=1).tolist()]}

    def of_photos(self, cases: Sequence[Case], seeds: int) -> dict[str, Values]:
        dino = to_others(self.photo_dino)
        return {"dino": [dino], "clip_i": [to_others(self.photo_clip)], "pres": [dino]}


class ToyboxMeasure:
    """The judge's reading of each picture. If the photos show a subject of the drawn world, its attributes are counted and
    the ceiling is real renders in the prompts' contexts; else the judge's features replace DINO and the ceiling is the photos.
    The same three methods as of PhotoMeasure.
    """

    def __init__(self, photos: Sequence[Image.Image]) -> None:
        found = drawn_subject(photos)
        self.identity = None if found is None else found[1]
        self.photo_features = features(judge(photos))
        self.photo_pixels = to_pixels(photos).flatten(1)  # (photos, 3 x 64 x 64)
        self.closest = min(float((a - b).abs().mean()) for a, b in combinations(self.photo_pixels, 2))
        self.metrics: tuple[Metric, ...] = (
            *((Metric("identity", "identity", of="subject"), Metric("code", "whole identity")) if found else ()),
            Metric("cosine", "judge cosine", of=None if found else "subject"),
            Metric("context", "context", of="prompt"),
            Metric("pres", "PRES", "lower"),
            Metric("div", "DIV (judge)"),
            Metric("class_div", "DIV of class"),
            Metric("copies", "copies", "lower"),
        )
        who = f"the subject is {found[0]}" if found else "features in place of DINO"
        self.described = f"the toybox's judge ({who}); not comparable with a paper's figures"

    def of_subject(self, cases: Sequence[Case], drawn: Groups) -> dict[str, Values]:
        verdicts = [judge(group) for group in drawn]
        contexts = [case.context for case in cases if case.context]
        asked = [(case.context, group) for case, group in zip(cases, verdicts, strict=True) if case.context]
        found: dict[str, Values] = {
            "cosine": [self.to_photos(group) for group in verdicts],
            "context": [[float(verdict.context == context) for verdict in group] for context, group in asked],
            CHANCE: [
                [float(verdict.context == other) for verdict in group for other in contexts if other != case.context]
                for case, group in zip(cases, verdicts, strict=True)
            ],
            "div": [diversity(features(group)) for group in verdicts],
            "copies": [self.copies(group) for group in drawn],
        }
        if self.identity is not None:
            shares = [[attributes_right(verdict, self.identity) for verdict in group] for group in verdicts]
            found |= {"identity": shares, "code": [[float(share == 1.0) for share in group] for group in shares]}
        return found

    def of_class(self, pictures: Sequence[Image.Image]) -> dict[str, Values]:
        verdicts, who = judge(pictures), self.identity
        if who is None:
            pres = self.to_photos(verdicts)
        else:
            pres = [float(attributes_right(verdict, who, RECOGNISED_BY) == 1) for verdict in verdicts]
        return {"pres": [pres], "class_div": [diversity(features(verdicts))]}

    def of_photos(self, cases: Sequence[Case], seeds: int) -> dict[str, Values]:
        if self.identity is None:
            near = to_others(self.photo_features)
            return {"cosine": [near], "pres": [near]}
        contexts = [case.context or CONTEXTS[index % len(CONTEXTS)] for index, case in enumerate(cases)]
        renders = [
            [draw(Scene((self.identity,), context, "photo", RENDER_SEED + 100 * i + seed)) for seed in range(seeds)]
            for i, context in enumerate(contexts)
        ]
        pres = self.of_class([image for group in renders for image in group])["pres"]
        return self.of_subject(cases, renders) | {"pres": pres}

    def to_photos(self, verdicts: Sequence[Verdict]) -> list[float]:
        """The mean cosine of each verdict with the photos."""
        cosines: list[float] = (features(verdicts) @ self.photo_features.T).mean(axis=1).tolist()
        return cosines

    def copies(self, images: Sequence[Image.Image]) -> list[float]:
        """1 for each picture that is nearer to a photo, in pixels, than any two photos are to each other; else 0."""
        made = to_pixels(images).flatten(1)
        nearest = [min(float((one - photo).abs().mean()) for photo in self.photo_pixels) for one in made]
        return [float(distance < self.closest) for distance in nearest]


def features(verdicts: Sequence[Verdict]) -> np.ndarray:
    """(N, FEATURES), each of length 1."""
    return np.stack([verdict.feature for verdict in verdicts])


def diversity(vectors: np.ndarray) -> list[float]:
    """The mean of 1 - cosine over all pairs; empty for fewer than 2. vectors: (N, d), each of length 1"""
    distances = [1 - a @ b for a, b in combinations(vectors, 2)]
    return [float(np.mean(distances))] if distances else []


def to_others(vectors: np.ndarray) -> list[float]:
    """The mean cosine of each with all others; empty for fewer than 2. vectors: (N, d), each of length 1"""
    if len(vectors) < 2:
        return []
    cosines = vectors @ vectors.T
    return ((cosines.sum(axis=1) - cosines.diagonal()) / (len(vectors) - 1)).tolist()


# --- the drawn world


def attributes_right(verdict: Verdict, identity: Identity, parts: Sequence[str] = tuple(OBJECT_HEADS)) -> float:
    """The share of these attributes of the identity that the first object has; 0 without an object."""
    if not verdict.objects:
        return 0.0
    return float(np.mean([getattr(verdict.objects[0], part) == getattr(identity, part) for part in parts]))


def drawn_subject(photos: Sequence[Image.Image]) -> tuple[str, Identity] | None:
    """Which held-out subject of the drawn world these photos show, by the majority of the judge's readings."""
    objects = [verdict.objects[0] for verdict in judge(photos) if verdict.objects]
    if 2 * len(objects) <= len(photos):
        return None
    usual = {part: Counter(getattr(one, part) for one in objects).most_common(1)[0][0] for part in OBJECT_HEADS}
    found = Identity(**usual)
    return next(((name, held_out) for name, held_out in HELD_OUT.items() if held_out == found), None)


def unseen_contexts(photos: Sequence[Image.Image]) -> list[str]:
    """The drawn world's contexts that the photos do not show; all of them if none is left."""
    seen = {verdict.context for verdict in judge(photos)}
    return [context for context in CONTEXTS if context not in seen] or list(CONTEXTS)
