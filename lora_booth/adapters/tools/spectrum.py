"""Singular values of a change, and its best approximation of a lower rank (Eckart and Young, 1936)."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from ...config import typed
from ...errors import AdapterNonFinite, SettingsError, setting
from ..contents import MAX_RANK, LoraFactors

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
        return math.sqrt(sum(m.norm**2 for m in self.modules))

    @property
    def error(self) -> float:
        """Relative Frobenius error of all changes together."""
        return math.sqrt(sum((m.error * m.norm) ** 2 for m in self.modules)) / self.norm if self.norm else 0.0

    @property
    def ranks(self) -> tuple[int, int]:
        """Smallest and largest rank that is left."""
        return min(m.rank for m in self.modules), max(m.rank for m in self.modules)

    def as_dict(self) -> dict[str, Any]:
        return {"error": self.error, "norm": self.norm, "modules": [asdict(m) for m in self.modules]}


def keep(rank: int | None, energy: float | None) -> Callable[[Spectrum], int]:
    """How many directions to keep of a spectrum: at most `rank`, and no more than hold `energy` of the squared norm."""
    rank, energy = typed("rank", rank, int | None), typed("energy", energy, float | None)
    if rank is None and energy is None:
        raise SettingsError(f"neither a rank nor an energy; pass e.g. {setting('rank', 8)} or {setting('energy', 0.99)}")
    if rank is not None and not 1 <= rank <= MAX_RANK:
        raise SettingsError(f"rank {rank} is out of range; allowed: 1 to {MAX_RANK}")
    if energy is not None and not 0 < energy <= 1:
        raise SettingsError(f"energy {energy} is out of range; allowed: above 0, at most 1; 0.9 to 0.999 is usual")

    def chosen(spectrum: Spectrum) -> int:
        kept = max(spectrum.rank(), 1)
        if energy is not None and spectrum.norm:
            share = (spectrum.values**2).double().cumsum(0) / (spectrum.values**2).double().sum()
            kept = min(kept, int((share < energy).sum()) + 1)
        return min(kept, MAX_RANK if rank is None else rank)

    return chosen


def truncated(
    module: str, spectrum: Spectrum, shape: tuple[int, ...], before: int, chosen: Callable[[Spectrum], int]
) -> tuple[LoraFactors, Truncation]:
    rank = chosen(spectrum)
    return spectrum.factors(rank, shape), Truncation(module, before, rank, spectrum.norm, spectrum.error(rank))


def one_rank(modules: Mapping[str, LoraFactors]) -> int | None:
    """The rank of all modules; None where they differ."""
    ranks = {factors.rank for factors in modules.values()}
    return ranks.pop() if len(ranks) == 1 else None
