"""The subjects of adapters in a prompt: find them, remove them, and tell what is probably not meant."""

from __future__ import annotations

import re
from collections.abc import Collection, Sequence
from itertools import combinations
from typing import Any

from ..adapters.adapter import Adapter
from ..base.base_model import BaseModel
from ..base.prompt_weights import WEIGHTED
from ..errors import SettingsError, shown
from ..subject.wording import subject_pattern, with_article, without_subject
from .weights import Weight

SYNTAX = (  # of AUTOMATIC1111 and others
    (re.compile(r"<(?:lora|lyco|hypernet)\w*:[^<>]*>", re.IGNORECASE), "pass the adapter's file with its weight instead"),
    (WEIGHTED, "weights need pip install 'lora-booth[prompts]' and a composition without regions; else leave the brackets out"),
    (re.compile(r"\[[^\[\]]*[:|][^\[\]]*\]"), "prompts do not change between steps here: leave the brackets out"),
)


def find_phrase(prompt: str, adapter: Adapter) -> re.Match[str] | None:
    """Where a prompt names the subject: token and class noun, or the token alone."""
    if adapter.card.token is None:
        return None
    return re.search(subject_pattern(adapter.card.token, adapter.card.class_noun), prompt, re.IGNORECASE)


def without(prompt: str, others: Collection[Adapter]) -> str:
    """The prompt with these subjects reduced to their class: "ohwx dog and zwx mug" -> "ohwx dog and a mug"."""
    for card in (other.card for other in others):
        if card.token is not None:
            prompt = without_subject(prompt, card.token, card.class_noun)
    return prompt


def token_positions(prompt: str, adapter: Adapter, tokenizer: Any) -> list[int]:
    """Positions of the subject's phrase in the tokenized prompt; none if the prompt does not name it. Raises SettingsError."""
    found = find_phrase(prompt, adapter)
    if found is None:
        return []
    ids = tokenizer(prompt, truncation=True).input_ids
    wanted = tokenizer(found.group(), add_special_tokens=False).input_ids
    for first in range(len(ids) - len(wanted) + 1):
        if ids[first : first + len(wanted)] == wanted:
            return list(range(first, first + len(wanted)))
    raise SettingsError(f"{found.group()!r} is beyond the {len(ids)} tokens that this base reads; shorten the prompt")


# --- remarks: one line each ----------------------------------------------------------------------------------------


def subjects_of(adapters: Sequence[tuple[Adapter, Weight]]) -> list[Adapter]:
    """The adapters with a token: a style has none."""
    return [adapter for adapter, weight in adapters if adapter.card.token and weight.value]


def clashes(adapters: Sequence[tuple[Adapter, Weight]], method: str) -> list[str]:
    """Warnings about subjects that will blend, one line each."""
    subjects = subjects_of(adapters)
    found = []
    for a, b in combinations(subjects, 2):
        if a.card.token == b.card.token:
            found.append(
                f"two adapters share the token {a.card.token!r}: the prompt cannot tell them apart; "
                "pass a region with a prompt for each, or retrain one of them with another token"
            )
        elif a.card.class_noun and a.card.class_noun == b.card.class_noun and method == "sum":
            both = f"{a.card.words!r} and {b.card.words!r} are both {with_article(a.card.class_noun)}"
            found.append(f"{both}: a sum blends them or loses one; use regions")
    if len(subjects) > 1 and method == "sum":
        found.append(f"in a sum, {len(subjects)} subjects change each other; use regions, which separate them")
    return found


def unnamed(adapters: Sequence[tuple[Adapter, Weight]], prompts: Sequence[str]) -> list[str]:
    """Warnings about subjects that their prompt leaves out: "a dog" draws any dog."""
    found = []
    for (adapter, weight), prompt in zip(adapters, prompts, strict=True):
        if adapter.card.token and weight.value and prompt and find_phrase(prompt, adapter) is None:
            found.append(f"the prompt does not name {adapter.card.words!r}; add it, or you get any {adapter.card.class_noun}")
    return found


def other_syntax(prompt: str, *, weights: bool = False) -> list[str]:
    """Warnings about what other programs read as instructions. weights: those of words are read here too"""
    return [
        f"{found.group()!r} is read as plain words; {remedy}"
        for pattern, remedy in SYNTAX
        if pattern is not WEIGHTED or not weights
        for found in pattern.finditer(prompt)
    ]


def unread(base: BaseModel, adapters: Sequence[tuple[Adapter, Weight]], *prompts: str | None, extra: bool = False) -> list[str]:
    """Warnings about prompts whose end the text encoders do not read, and the subjects that are lost with it.

    extra: with an optional package, it would be read
    """
    found = []
    for prompt in prompts:
        if not prompt or not (rest := base.cut_off(prompt)):
            continue
        places = [(subject, find_phrase(prompt, subject)) for subject in subjects_of(adapters)]
        lost = [one.card.words for one, place in places if place is not None and base.cut_off(prompt[: place.end()])]
        names = " and ".join(map(repr, lost))
        remedy = f"move {names} forward, or shorten it" if lost else "shorten it to have all of it drawn"
        remedy += ", or pip install 'lora-booth[prompts]'" if extra else ""
        found.append(f"the base does not read the end of a prompt this long ({shown(rest)!r}); {remedy}")
    return found
