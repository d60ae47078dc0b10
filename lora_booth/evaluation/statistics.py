"""Means and their 95 % intervals, by bootstrap over prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

ROUNDS = 2000  # chosen; 1,000 is the usual minimum for percentile intervals
EDGES = (0.025, 0.975)

Values = Sequence[Sequence[float]]  # by prompt, by picture


@dataclass(frozen=True)
class Score:
    """A mean and its 95 % interval; None for a single value."""

    mean: float
    low: float | None
    high: float | None
    count: int  # values

    def __str__(self) -> str:
        """The mean and half of its interval."""
        around = "" if self.low is None or self.high is None else f" ±{(self.high - self.low) / 2:.3f}"
        return f"{self.mean:.3f}{around}"


def score(values: Values) -> Score | None:
    """Resample prompts, since pictures of one prompt resemble each other; with a single prompt, its pictures. None: no
    values."""
    groups = [list(group) for group in values if len(group)]
    if not groups:
        return None
    units = groups if len(groups) > 1 else [[value] for value in groups[0]]
    sums, counts = np.array([sum(unit) for unit in units]), np.array([len(unit) for unit in units])
    mean = float(sums.sum() / counts.sum())
    if len(units) == 1:
        return Score(mean, None, None, int(counts.sum()))
    chosen = draws(len(units))
    low, high = np.quantile(sums[chosen].sum(axis=1) / counts[chosen].sum(axis=1), EDGES)
    return Score(mean, float(low), float(high), int(counts.sum()))


def draws(count: int) -> np.ndarray:
    """(ROUNDS, count) indices below `count`, drawn with replacement: the same for the same count, so that adapters are
    compared on equal draws."""
    return np.random.default_rng(0).integers(count, size=(ROUNDS, count))
