"""Find the subjects of adapters in a prompt, and remove them from it."""

from __future__ import annotations

import re
from collections.abc import Collection
from typing import Any

from ..adapters.adapter import Adapter
from ..errors import SettingsError
from ..subject.wording import subject_pattern, without_subject


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
    """Positions of the subject's phrase in the tokenized prompt. Raises SettingsError when the prompt does not name it."""
    found = find_phrase(prompt, adapter)
    if found is None:
        card = adapter.card
        cause = (
            f"the prompt {prompt!r} does not name {card.words!r}" if card.token else f"{adapter.name} has no token on its card"
        )
        raise SettingsError(f"{cause}; name every subject in the prompt, or pass a region with a box and a prompt")
    ids = tokenizer(prompt, truncation=True).input_ids
    wanted = tokenizer(found.group(), add_special_tokens=False).input_ids
    for first in range(len(ids) - len(wanted) + 1):
        if ids[first : first + len(wanted)] == wanted:
            return list(range(first, first + len(wanted)))
    raise SettingsError(
        f"{found.group()!r} is beyond the {len(ids)} tokens that this base reads of a prompt; shorten the prompt"
    )
