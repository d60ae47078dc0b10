"""Several adapters as one, exactly: the weighted sum of their changes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import torch

from ..errors import AdapterBaseMismatch, AdapterError, AdapterIncomplete
from .adapter import Adapter, Card, LoraFactors


def concatenated(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """sum of weight * change, with the ranks joined end to end; weights and alphas are folded in, so alpha = rank.

    A sum of more ranks than a module can have is written with that module's full rank.
    """
    if not adapters:
        raise AdapterError("nothing to merge; name at least one adapter")
    families = {adapter.card.family for adapter, _ in adapters} - {None}
    if len(families) > 1:
        raise AdapterBaseMismatch(f"adapters for {' and '.join(sorted(map(str, families)))} cannot be merged")
    names = sorted({name for adapter, _ in adapters for name in adapter.modules})
    modules = {
        name: _joined(name, [(a.modules[name], weight) for a, weight in adapters if name in a.modules]) for name in names
    }
    return Adapter(modules, _joint_card([adapter.card for adapter, _ in adapters], modules))


def _joined(name: str, parts: list[tuple[LoraFactors, float]]) -> LoraFactors:
    shapes = {(tuple(f.down.shape[1:]), f.up.shape[0]) for f, _ in parts}
    if len(shapes) > 1:
        raise AdapterIncomplete(f"{name}: the adapters have other widths here; they are for other bases")
    down = torch.cat([f.down.float() for f, _ in parts])
    up = torch.cat([f.up.float() * (f.scale * weight) for f, weight in parts], dim=1)
    rank, inner, outer = down.shape[0], down[0].numel(), up.shape[0]
    if rank > min(inner, outer):
        change = up.flatten(1) @ down.flatten(1)  # (out, in * kh * kw)
        if outer <= inner:
            down, up = change.reshape(outer, *down.shape[1:]), torch.eye(outer).reshape(outer, outer, *up.shape[2:])
        else:
            down, up = torch.eye(inner).reshape(inner, *down.shape[1:]), change.reshape(outer, inner, *up.shape[2:])
        rank = min(inner, outer)
    return LoraFactors(down, up, float(rank))


def _joint_card(cards: Sequence[Card], modules: dict[str, LoraFactors]) -> Card:
    """What all cards agree on; the rest is not known of the sum."""
    first = cards[0]
    shared = ("prediction_type", "base_model", "base_hash", "resolution", "license", "consent", "library_version")
    same = {name: getattr(first, name) for name in shared if len({getattr(card, name) for card in cards}) == 1}
    ranks = {factors.rank for factors in modules.values()}
    rank = ranks.pop() if len(ranks) == 1 else None
    title = " + ".join(card.title or card.token or "adapter" for card in cards)
    family = next((card.family for card in cards if card.family is not None), None)
    return replace(Card(**same), family=family, rank=rank, alpha=rank, title=title)
