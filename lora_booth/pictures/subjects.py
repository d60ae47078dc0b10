"""Which words of a prompt are whose: the phrase of each subject, its tokens, and prompts without it."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import SettingsError


def phrase_of(adapter: Adapter) -> str | None:
    """ "sks dog", as its card says; None for an adapter without a token (a style, say)."""
    card = adapter.card
    return " ".join(filter(None, (card.token, card.class_noun))) if card.token else None


def patterns(adapter: Adapter) -> list[re.Pattern[str]]:
    """Token and class noun, and the token alone."""
    words = [phrase_of(adapter), adapter.card.token]
    return [re.compile(rf"(?<!\w){re.escape(w)}(?!\w)", re.IGNORECASE) for w in words if w]


def find_phrase(prompt: str, adapter: Adapter) -> re.Match[str] | None:
    """Where a prompt names the subject."""
    return next((found for pattern in patterns(adapter) if (found := pattern.search(prompt))), None)


def without(prompt: str, others: Collection[Adapter]) -> str:
    """The prompt with these subjects reduced to their class: "sks dog and zwx mug" -> "sks dog and a mug"."""
    for other in others:
        noun = other.card.class_noun or "object"
        plain = f"{'an' if noun[0] in 'aeiou' else 'a'} {noun}"
        for pattern in patterns(other):
            prompt = pattern.sub(lambda _, plain=plain: plain, prompt)  # type: ignore[misc]
    return prompt


def token_positions(prompt: str, adapter: Adapter, tokenizer: Any) -> list[int]:
    """Positions of the subject's phrase in the tokenized prompt. Raises SettingsError when the prompt does not name it."""
    found = find_phrase(prompt, adapter)
    if found is None:
        words = phrase_of(adapter)
        said = f"the prompt {prompt!r} does not name {words!r}" if words else f"{adapter.name} has no token on its card"
        raise SettingsError(f"{said}; name every subject in the prompt, or give its region a box and a prompt")
    ids = tokenizer(prompt, truncation=True).input_ids
    wanted = tokenizer(found.group(), add_special_tokens=False).input_ids
    for first in range(len(ids) - len(wanted) + 1):
        if ids[first : first + len(wanted)] == wanted:
            return list(range(first, first + len(wanted)))
    raise SettingsError(f"{found.group()!r} lies beyond the {len(ids)} tokens that this base reads of a prompt; shorten it")
