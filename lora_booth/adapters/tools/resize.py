"""An adapter with less rank: each module's change cut to its largest singular values."""

from __future__ import annotations

from dataclasses import replace

from ..adapter import Adapter
from .spectrum import Truncations, keep, one_rank, shape_of, spectrum, truncated


def resize(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> tuple[Adapter, Truncations]:
    """The nearest adapter of a lower rank, and what was lost. alpha = rank in every module.

    rank    at most this in every module; a module that has less keeps what it has
    energy  in every module as few directions as hold this share of its change's squared Frobenius norm (0 to 1)
    Both: whichever is less. A rank that is not used (zero or rounding) goes in any case.
    """
    chosen = keep(rank, energy)
    modules, lost = {}, []
    for name, factors in sorted(adapter.modules.items()):
        modules[name], loss = truncated(name, spectrum(factors), shape_of(factors), factors.rank, chosen)
        lost.append(loss)
    common = one_rank(modules)
    card = replace(adapter.card, rank=common, alpha=None if common is None else float(common))
    return replace(adapter, modules=modules, card=card), Truncations(tuple(lost))
