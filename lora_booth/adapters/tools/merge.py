"""Merging adapters: the weighted sum of their changes, exactly or truncated to a rank."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Literal

import torch

from ...config import typed
from ...errors import AdapterError, SettingsError
from ..adapter import Adapter, weighted
from ..contents import Card, FamilyName, LoraFactors, one_rank
from ..lycoris import thin
from .spectrum import Truncation, Truncations, fitted, norm, one_family, resize

Method = Literal["sum", "svd"]


def merge(
    adapters: Sequence[tuple[Adapter, float]], *, method: Method = "sum", rank: int | None = None
) -> tuple[Adapter, Truncations]:
    """Return one adapter with the weighted sum of all changes, and what was lost.

    method  "sum" is exact and adds up the ranks; "svd" is the closest adapter of a lower rank
    rank    for svd; None: the largest rank of the inputs
    """
    adapters, method = weighted(adapters), typed("method", method, Method)
    if method == "sum" and rank is not None:
        raise SettingsError(f"rank {rank} with method sum, which keeps every rank; use method svd")
    joined = concatenated(adapters)
    if method == "sum":
        kept = [Truncation(name, f.rank, f.rank, norm(f), 0.0) for name, f in joined.modules.items()]
        return joined, Truncations(tuple(kept))
    largest = max((factors.rank for adapter, _ in adapters for factors in adapter.modules.values()), default=1)
    return resize(joined, rank=largest if rank is None else rank)


def concatenated(adapters: Sequence[tuple[Adapter, float]]) -> Adapter:
    """The sum of weight * change with concatenated ranks. Weights and alphas are folded in, so alpha = rank.

    If a module's ranks add up to more than its full rank, it gets the full rank.
    """
    if not adapters:
        raise AdapterError("nothing to merge; name at least one adapter")
    family = one_family([adapter for adapter, _ in adapters], "merged")
    names = sorted({name for adapter, _ in adapters for name in adapter.modules})
    modules = {
        name: _joined(name, [(a.modules[name], weight) for a, weight in adapters if name in a.modules]) for name in names
    }
    return Adapter(modules, _joint_card([adapter.card for adapter, _ in adapters], modules, family))


def _joined(name: str, parts: list[tuple[LoraFactors, float]]) -> LoraFactors:
    downs, ups, shape = [], [], parts[0][0].shape
    for factors, weight in parts:
        same = fitted(name, factors, shape)
        downs.append(same.down.float())
        ups.append(same.up.float() * (same.scale * weight))
    down, up = torch.cat(downs), torch.cat(ups, dim=1)
    if down.shape[0] > min(down[0].numel(), up.shape[0]):
        up, down = thin((up.flatten(1) @ down.flatten(1)).reshape(shape))
        up = up.reshape(*up.shape, *(1 for _ in shape[2:]))
    return LoraFactors(down, up, float(down.shape[0]))


def _joint_card(cards: Sequence[Card], modules: dict[str, LoraFactors], family: FamilyName | None) -> Card:
    """What all cards agree on; nothing else is known about the sum."""
    first = cards[0]
    shared = ("prediction_type", "base_model", "base_hash", "resolution", "license", "consent", "library_version")
    same = {name: getattr(first, name) for name in shared if len({getattr(card, name) for card in cards}) == 1}
    rank = one_rank(modules)
    title = " + ".join(card.title or card.token or "adapter" for card in cards)
    return replace(Card(**same), family=family, rank=rank, alpha=rank, title=title)
