"""Resizing an adapter: each module's change truncated to its largest singular values."""

from __future__ import annotations

from dataclasses import replace

from ..adapter import Adapter
from .spectrum import Truncations, keep, one_rank, spectrum, truncated


def resize(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> tuple[Adapter, Truncations]:
    """Return the closest adapter of a lower rank, and what was lost. alpha = rank in every module.

    rank    the most in any module; a module with less keeps its rank
    energy  in every module, keep the fewest directions that hold this share of the change's squared Frobenius norm (0 to 1)
    With both, the smaller result counts. Directions that are zero or rounding are always dropped.
    """
    chosen = keep(rank, energy)
    modules, lost = {}, []
    for name, factors in sorted(adapter.modules.items()):
        modules[name], loss = truncated(name, spectrum(factors), factors.shape, factors.rank, chosen)
        lost.append(loss)
    common = one_rank(modules)
    card = replace(adapter.card, rank=common, alpha=None if common is None else float(common))
    return replace(adapter, modules=modules, card=card), Truncations(tuple(lost))
