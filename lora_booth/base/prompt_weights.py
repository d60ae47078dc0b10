"""Weights of words, as in "(red:1.2) mug", and prompts longer than a text encoder reads, by compel.

The brackets are AUTOMATIC1111's; compel turns weighted pieces of text into what conditions the U-Net.
"""

from __future__ import annotations

import re
from importlib.metadata import version
from importlib.util import find_spec
from typing import Any

import torch
from torch import Tensor

from .families import Family

WEIGHTED = re.compile(r"\(+[^()]*:\s*[-+]?[\d.]+\s*\)+|\({2,}[^()]+\){2,}")  # what shows that brackets stand for weights
PIECES = re.compile(r"\\[()\[\]]|:\s*([-+]?\d*\.?\d+)\s*\)|[()\[\]]|[^\\()\[\]:]+|.", re.DOTALL)
STEP = 1.1  # of (word); [word] divides by it


def is_weighted(prompt: str) -> bool:
    return WEIGHTED.search(prompt) is not None


def compel_version() -> str | None:
    """Of the installed compel, if there is one."""
    return version("compel") if find_spec("compel") else None


def fragments(prompt: str) -> list[tuple[str, float]]:
    """ "a (red:1.2) mug" -> [("a ", 1.0), ("red", 1.2), (" mug", 1.0)]; a bracket that is not closed is text."""
    if not is_weighted(prompt):
        return [(prompt, 1.0)]
    found: list[tuple[str, float]] = []
    opened: list[tuple[str, int]] = []  # bracket, and how many fragments came before it

    def weigh(factor: float) -> None:
        _, first = opened.pop()
        found[first:] = [(text, weight * factor) for text, weight in found[first:]]

    for match in PIECES.finditer(prompt):
        piece, within = match.group(), opened[-1][0] if opened else ""
        if piece in ("(", "["):
            opened.append((piece, len(found)))
        elif match[1] is not None and within == "(":
            weigh(float(match[1]))
        elif piece == ")" and within == "(":
            weigh(STEP)
        elif piece == "]" and within == "[":
            weigh(1 / STEP)
        else:
            found.append((piece[1:] if piece[0] == "\\" and len(piece) > 1 else piece, 1.0))
    for bracket, first in reversed(opened):
        found.insert(first, (bracket, 1.0))
    merged: list[tuple[str, float]] = []
    for text, weight in found:
        if merged and merged[-1][1] == weight:
            text = merged.pop()[0] + text
        merged.append((text, weight))
    return [(text, weight) for text, weight in merged if text.strip()]


def embedded(pipeline: Any, family: Family, prompt: str, negative_prompt: str | None, count: int) -> dict[str, Tensor]:
    """A pipeline's arguments in place of `prompt` and `negative_prompt`, for `count` pictures: (count, tokens, d)."""
    from compel.embeddings_provider import EmbeddingsProviderMulti, ReturnedEmbeddingsType

    kinds = ReturnedEmbeddingsType
    wanted = kinds.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED if family.time_ids else kinds.LAST_HIDDEN_STATES_NORMALIZED
    encoders = [getattr(pipeline, name) for name in family.text_encoders]
    provider = EmbeddingsProviderMulti(
        [getattr(pipeline, name) for name in family.tokenizers],
        encoders,
        truncate=False,
        returned_embeddings_type=wanted,
        requires_pooled_mask=[False] * (len(encoders) - 1) + [family.time_ids],
    )
    made: dict[str, Tensor] = {}
    empty = torch.cat([one.empty_z for one in provider.embedding_providers], dim=-1)  # (1, 77, d)
    for prefix, text in (("", prompt), ("negative_", negative_prompt)):
        # SDXL's pipeline takes zeros for a negative prompt that is not given
        zeros = text is None and getattr(pipeline.config, "force_zeros_for_empty_prompt", False)
        parts = fragments(text or "")
        states = provider.get_embeddings_for_weighted_prompt_fragments(
            [[one for one, _ in parts]], [[weight for _, weight in parts]], device=encoders[0].device
        )
        made[f"{prefix}prompt_embeds"] = torch.zeros_like(states) if zeros else states
        if family.time_ids:
            pooled = provider.get_pooled_embeddings(["".join(one for one, _ in parts)], device=encoders[-1].device)
            made[f"{prefix}pooled_prompt_embeds"] = torch.zeros_like(pooled) if zeros else pooled
    longest = max(made[name].shape[1] for name in ("prompt_embeds", "negative_prompt_embeds"))
    for name, zeros in (("prompt_embeds", False), ("negative_prompt_embeds", not made["negative_prompt_embeds"].any())):
        missing = (longest - made[name].shape[1]) // empty.shape[1]
        padding = (torch.zeros_like(empty) if zeros else empty).to(made[name])
        made[name] = torch.cat([made[name], *[padding] * missing], dim=1)
    return {name: value.repeat(count, *[1] * (value.ndim - 1)) for name, value in made.items()}
