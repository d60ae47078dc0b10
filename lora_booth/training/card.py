"""The card of a trained adapter."""

from __future__ import annotations

from collections.abc import Sequence

from .. import __version__
from ..adapters.contents import Card
from ..adapters.metadata import card_facts
from ..base.base_model import BaseModel
from ..config import LoraSpec, TrainingConfig
from ..subject.subject import Subject


def make_card(base: BaseModel, subjects: Sequence[Subject], lora: LoraSpec, config: TrainingConfig) -> Card:
    first = subjects[0]
    return Card(
        **card_facts(base),
        resolution=config.resolution,
        token=first.token,
        class_noun=first.class_noun,
        prompt=first.card_prompt,
        rank=lora.rank,
        alpha=lora.scale_alpha,
        steps=config.steps,
        photos=sum(len(s.photos) for s in subjects),
        library_version=__version__,
        title=" and ".join(f"{s.token} {s.class_noun}" for s in subjects),
    )
