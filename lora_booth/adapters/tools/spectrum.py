"""Singular values of a change, and the closest adapter of a lower rank (Eckart and Young, 1936)."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ...config import check, typed
from ...errors import AdapterBaseMismatch, AdapterNonFinite, SettingsError, setting
from ..adapter import Adapter
from ..contents import MAX_RANK, FamilyName, LoraFactors, one_rank

NOTHING = 1e-6  # of the largest singular value; anything smaller is rounding


@dataclass(frozen=True, eq=False)
class Spectrum:
    """A change as left @ diag(values) @ right, the largest value first."""

    left: Tensor  # (out, k), orthonormal columns
    values: Tensor  # (k,), not negative
    right: Tensor  # (k, in * kh * kw), orthonormal rows

    @property
    def norm(self) -> float:
        """Frobenius."""
        return float(self.values.norm())

    def rank(self, above: float = NOTHING) -> int:
        """How many singular values are larger than `above` times the largest."""
        return int((self.values > above * self.values[0]).sum())

    def error(self, rank: int) -> float:
        """Frobenius norm of what `rank` directions leave out, relative to the full change."""
        return float(self.values[rank:].norm()) / self.norm if self.norm else 0.0

    def factors(self, rank: int, like: tuple[int, ...]) -> LoraFactors:
        """The first `rank` directions as float32 factors of equal size. like: shape of the weight."""
        root = self.values[:rank].sqrt()
        up, down = (self.left[:, :rank] * root).float(), (root[:, None] * self.right[:rank]).float()
        up = up.reshape(like[0], rank, *(1 for _ in like[2:]))
        return LoraFactors(down.reshape(rank, *like[1:]).contiguous(), up.contiguous(), float(rank))


def cores(*parts: tuple[LoraFactors, float]) -> tuple[Tensor, Tensor, Tensor]:
    """The sum of weight * change as q_up @ core @ q_down, with a core of rank x rank; float64.

    q_up (out, k), core (k, l), q_down (l, in * kh * kw). The change itself, (out, in * kh * kw), is never formed.
    """
    up = torch.cat([f.up.double().flatten(1) * (f.scale * weight) for f, weight in parts], dim=1)
    down = torch.cat([f.down.double().flatten(1) for f, _ in parts])
    if not (up.isfinite().all() and down.isfinite().all()):
        raise AdapterNonFinite("its factors, alpha or weight are not finite; nothing can be computed from them")
    q_up, r_up = torch.linalg.qr(up)
    q_down, r_down = torch.linalg.qr(down.T)
    return q_up, r_up @ r_down.T, q_down.T


def norm(factors: LoraFactors) -> float:
    """Frobenius norm of a module's change."""
    return float(cores((factors, 1.0))[1].norm())


def spectrum(factors: LoraFactors) -> Spectrum:
    """The spectrum of an adapter's module, float64."""
    q_up, core, q_down = cores((factors, 1.0))
    left, values, right = torch.linalg.svd(core, full_matrices=False)
    return Spectrum(q_up @ left, values, right @ q_down)


def spectrum_of(change: Tensor) -> Spectrum:
    """The spectrum of a full matrix (out, in) or kernel (out, in, kh, kw); float64, on the CPU.

    It is computed from the eigenvalues of the smaller Gram matrix, M M^T or M^T M: accurate to about 1e-8 of the largest
    value, and for wide layers several times as fast as an SVD.
    """
    matrix = change.flatten(1).to("cuda" if torch.cuda.is_available() else "cpu", torch.float64)
    wide = matrix if matrix.shape[0] <= matrix.shape[1] else matrix.T
    squares, vectors = torch.linalg.eigh(wide @ wide.T)  # in rising order
    values, left = squares.clamp(min=0).sqrt().flip(0).cpu(), vectors.flip(1)
    right = (left.T @ wide).cpu() * torch.where(values > NOTHING * values[0], 1 / values, 0.0)[:, None]
    left = left.cpu()
    return Spectrum(left, values, right) if wide is matrix else Spectrum(right.T, values, left.T)


# --- of several adapters -------------------------------------------------------------------------------------------


def one_family(adapters: Iterable[Adapter], done: str) -> FamilyName | None:
    """The family that the adapters are for, as far as their cards say. Raises AdapterBaseMismatch if there are several."""
    families = sorted({adapter.card.family for adapter in adapters if adapter.card.family is not None})
    if len(families) > 1:
        raise AdapterBaseMismatch(f"adapters for {' and '.join(families)} cannot be {done}")
    return families[0] if families else None


def fitted(module: str, factors: LoraFactors, shape: tuple[int, ...]) -> LoraFactors:
    """The same change for a weight of `shape`, which another adapter changes. Raises AdapterBaseMismatch."""
    if (same := factors.fitted(shape)) is None:
        raise AdapterBaseMismatch(f"{module}: {shape} in one adapter, {factors.shape} in another; they are for different bases")
    return same


# --- how many to keep ----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Truncation:
    """What one module lost."""

    module: str
    rank_before: int
    rank: int
    norm: float  # Frobenius, of the change before
    error: float  # Frobenius norm of the loss, relative to the change before


@dataclass(frozen=True)
class Truncations:
    """What an adapter lost, by module and in total."""

    modules: tuple[Truncation, ...]

    @property
    def norm(self) -> float:
        """Of all changes together, before."""
        return math.hypot(*(m.norm for m in self.modules))

    @property
    def error(self) -> float:
        """Relative Frobenius error of all changes together."""
        return math.hypot(*(m.error * m.norm for m in self.modules)) / self.norm if self.norm else 0.0

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank that is left."""
        return min(m.rank for m in self.modules), max(m.rank for m in self.modules)


def keep(rank: int | None, energy: float | None) -> Callable[[Spectrum], int]:
    """How many directions to keep of a spectrum: at most `rank`, and no more than hold `energy` of the squared norm."""
    rank, energy = typed("rank", rank, int | None), typed("energy", energy, float | None)
    if rank is None and energy is None:
        raise SettingsError(f"neither a rank nor an energy; pass e.g. {setting('rank', 8)} or {setting('energy', 0.99)}")
    check(rank is None or 1 <= rank <= MAX_RANK, f"rank {rank}", f"1 to {MAX_RANK}")
    check(energy is None or 0 < energy <= 1, f"energy {energy}", "above 0, at most 1; 0.9 to 0.999 is usual")

    def chosen(spectrum: Spectrum) -> int:
        kept = max(spectrum.rank(), 1)
        if energy is not None and spectrum.norm:
            share = (spectrum.values**2).double().cumsum(0) / (spectrum.values**2).double().sum()
            kept = min(kept, int((share < energy).sum()) + 1)
        return min(kept, MAX_RANK if rank is None else rank)

    return chosen


def truncated(
    module: str, spectrum: Spectrum, shape: tuple[int, ...], chosen: Callable[[Spectrum], int]
) -> tuple[LoraFactors, Truncation]:
    rank = chosen(spectrum)
    return spectrum.factors(rank, shape), Truncation(module, len(spectrum.values), rank, spectrum.norm, spectrum.error(rank))


def resize(adapter: Adapter, *, rank: int | None = None, energy: float | None = None) -> tuple[Adapter, Truncations]:
    """Return the closest adapter of a lower rank, and what was lost. alpha = rank in every module.

    rank    the most in any module; a module with less keeps its rank
    energy  in every module, keep the fewest directions that hold this share of the change's squared Frobenius norm (0 to 1)
    With both, the smaller result counts. Directions that are zero or rounding are always dropped.
    """
    adapter, chosen = typed("adapter", adapter, Adapter), keep(rank, energy)
    modules, lost = {}, []
    for name, factors in sorted(adapter.modules.items()):
        modules[name], loss = truncated(name, spectrum(factors), factors.shape, chosen)
        lost.append(loss)
    common = one_rank(modules)
    return replace(adapter, modules=modules, card=replace(adapter.card, rank=common, alpha=common)), Truncations(tuple(lost))
