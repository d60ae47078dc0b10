"""The prompts of an evaluation: with the adapter's token, and without it for the base and for CLIP."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass

from ..adapters.contents import Card
from ..errors import SettingsError, setting, shown
from ..pictures.prompts import fill_prompts
from ..subject.wording import without_subject
from ..toybox.scenery import CONTEXTS

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
