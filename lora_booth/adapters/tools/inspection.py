"""What an adapter changes, and how two differ and overlap: from their factors alone, no module's full matrix is formed."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import asdict, dataclass
from typing import Any

from ...config import typed
from ..adapter import Adapter
from ..contents import Card, LoraFactors
from .spectrum import cores, fitted, norm, one_family, spectrum

BLOCKS = {  # how a module's path begins -> what the block is called
    "unet.down_blocks.": "down",
    "unet.mid_block.": "mid",
    "unet.up_blocks.": "up",
    "unet.": "unet, other",
    "text_encoder.": "text encoder",
    "text_encoder_2.": "text encoder 2",
}
USED = 1e-3  # of a change's largest singular value: smaller ones may be the rounding of half precision
# where the summary draws its lines; chosen
SAME = 1e-3  # relative distance; half precision alone makes 5e-4
COPY = 0.999  # cosine, either sign
# cosine, or overlap of the outputs on a scale from chance (0) to all (1): two trainings on one toybox subject have .38 to .51,
# on two subjects .10 to .26 (benchmarks/RESULTS.md)
RELATED = 0.3


@dataclass(frozen=True)
class ModuleInspection:
    module: str
    shape: tuple[int, ...]  # of the weight that it changes
    rank: int
    alpha: float
    norm: float  # Frobenius, of the change


@dataclass(frozen=True)
class Inspection:
    """An overview of an adapter."""

    card: Card
    modules: tuple[ModuleInspection, ...]
    nbytes: int  # of the tensors
    digest: str  # sha256 of the factors
    ranks: dict[int, int]  # rank -> how many modules have it
    alphas: dict[float, int]  # the same for alpha
    norms: dict[str, float]  # block -> Frobenius norm of all its changes together
    dead: tuple[str, ...]  # modules whose change is zero


def inspect_adapter(adapter: Adapter) -> Inspection:
    """Inspect an adapter. Norms are computed from the factors, in float64."""
    modules = [ModuleInspection(name, f.shape, f.rank, f.alpha, norm(f)) for name, f in sorted(adapter.modules.items())]
    norms: dict[str, list[float]] = {block: [] for block in BLOCKS.values()}
    for m in modules:
        norms[next(block for start, block in BLOCKS.items() if m.module.startswith(start))].append(m.norm)
    return Inspection(
        card=adapter.card,
        modules=tuple(modules),
        nbytes=adapter.nbytes,
        digest=adapter.digest(),
        ranks=dict(sorted(Counter(m.rank for m in modules).items())),
        alphas=dict(sorted(Counter(m.alpha for m in modules).items())),
        norms={block: math.hypot(*parts) for block, parts in norms.items() if parts},
        dead=tuple(m.module for m in modules if m.norm == 0),
    )


# --- two adapters ---------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ModuleDifference:
    """Two changes of one module. Norms are Frobenius norms of the scaled change."""

    module: str
    rank_a: int  # directions in use
    rank_b: int
    norm_a: float
    norm_b: float
    distance: float  # norm of a - b
    cosine: float  # of the angle between the changes as vectors; 0 where one is zero
    columns: float  # mean squared cosine of the principal angles between the outputs (column spaces) that they use, 0 to 1
    rows: float  # the same for the inputs (row spaces)
    columns_by_chance: float  # what random spaces of these ranks have


@dataclass(frozen=True)
class Difference:
    """What two adapters have in common, by module and in total; `str()` says what it means."""

    only_a: tuple[str, ...]  # modules
    only_b: tuple[str, ...]
    modules: tuple[ModuleDifference, ...]  # in both
    norm_a: float  # of all changes together, including modules that only one adapter has
    norm_b: float
    distance: float  # norm of a - b
    cosine: float

    @property
    def relative(self) -> float:
        """The distance, relative to the larger of the two."""
        return self.distance / larger if (larger := max(self.norm_a, self.norm_b)) else 0.0

    @property
    def columns(self) -> float:
        """Overlap of the outputs, averaged over all directions of the common modules; 0 to 1."""
        return self._mean("columns")

    @property
    def rows(self) -> float:
        """Overlap of the inputs."""
        return self._mean("rows")

    @property
    def beyond_chance(self) -> float:
        """Overlap of the outputs on a scale from chance (0) to all (1).

        Not of the inputs: trainings from one seed begin with the same ones, and keep most of them.
        """
        chance = self._mean("columns_by_chance")
        return (self.columns - chance) / (1 - chance) if chance < 1 else 0.0

    def _mean(self, figure: str) -> float:
        """Of a figure of the common modules, weighted by how many directions they can share."""
        weights = [min(m.rank_a, m.rank_b) for m in self.modules]
        total = sum(getattr(m, figure) * weight for m, weight in zip(self.modules, weights, strict=True))
        return total / sum(weights) if any(weights) else 0.0

    @property
    def kind(self) -> str:
        """same, scaled copy, overlapping or unrelated"""
        if self.relative < SAME:
            return "same"
        if abs(self.cosine) > COPY:
            return "scaled copy"
        return "overlapping" if max(abs(self.cosine), self.beyond_chance) > RELATED else "unrelated"

    def __str__(self) -> str:
        if self.kind == "same":
            return f"same: they differ by {self.relative:.2g} of their size, which is rounding"
        if self.kind == "scaled copy":
            scale = math.copysign(self.norm_b / self.norm_a, self.cosine)
            return f"scaled copy: b is a times {scale:.3g}"
        if not self.modules:
            return "unrelated: they change no module in common"
        if self.kind == "unrelated":
            return f"unrelated: cosine {self.cosine:.2f}, {self.columns:.0%} of their outputs in common"
        together = "the same way" if self.cosine > RELATED else "opposite ways" if self.cosine < -RELATED else "different ways"
        return (
            f"overlapping: they change {together} (cosine {self.cosine:.2f}) "
            f"and share {self.columns:.0%} of their outputs, {self.rows:.0%} of their inputs"
        )

    def as_dict(self) -> dict[str, Any]:
        derived = {name: getattr(self, name) for name in ("kind", "relative", "columns", "rows", "beyond_chance")}
        return asdict(self) | derived


def difference(a: Adapter, b: Adapter) -> Difference:
    """Compare what two adapters do to a base. Raises AdapterBaseMismatch if they do not fit the same base."""
    a, b = typed("a", a, Adapter), typed("b", b, Adapter)
    one_family((a, b), "compared")
    both = sorted(a.modules.keys() & b.modules.keys())
    only_a, only_b = sorted(a.modules.keys() - b.modules.keys()), sorted(b.modules.keys() - a.modules.keys())
    modules = tuple(compared(name, a.modules[name], b.modules[name]) for name in both)
    alone_a, alone_b = ([norm(x.modules[name]) for name in names] for x, names in ((a, only_a), (b, only_b)))
    norm_a, norm_b = math.hypot(*alone_a, *(m.norm_a for m in modules)), math.hypot(*alone_b, *(m.norm_b for m in modules))
    inner = sum(m.cosine * m.norm_a * m.norm_b for m in modules)
    return Difference(
        only_a=tuple(only_a),
        only_b=tuple(only_b),
        modules=modules,
        norm_a=norm_a,
        norm_b=norm_b,
        distance=math.hypot(*alone_a, *alone_b, *(m.distance for m in modules)),
        cosine=inner / (norm_a * norm_b) if norm_a and norm_b else 0.0,
    )


def compared(module: str, a: LoraFactors, b: LoraFactors) -> ModuleDifference:
    b = fitted(module, b, a.shape)
    one, other = spectrum(a), spectrum(b)
    rank_a, rank_b = one.rank(USED), other.rank(USED)
    few, many = sorted((rank_a, rank_b))
    outputs, inputs = one.left.T @ other.left, one.right @ other.right.T  # cosines of all pairs of directions
    # <a, b> = sum of s_i t_j (u_i . x_j) (v_i . y_j) over the singular directions
    product = float((one.values[:, None] * other.values * outputs * inputs).sum())
    cosine = product / (one.norm * other.norm) if few else 0.0
    outputs, inputs = outputs[:rank_a, :rank_b], inputs[:rank_a, :rank_b]
    return ModuleDifference(
        module=module,
        rank_a=rank_a,
        rank_b=rank_b,
        norm_a=one.norm,
        norm_b=other.norm,
        distance=float(cores((a, 1.0), (b, -1.0))[1].norm()),  # from the norms, half of the digits would be lost
        cosine=max(-1.0, min(1.0, cosine)),
        columns=float((outputs**2).sum()) / few if few else 0.0,
        rows=float((inputs**2).sum()) / few if few else 0.0,
        columns_by_chance=many / one.left.shape[0],
    )
