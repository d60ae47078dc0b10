"""The results of an evaluation: adapters between the base alone and the photos, and which is best."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import numpy as np

from ..pictures.picture import Picture
from .statistics import EDGES, Score, Values, draws, score

# chosen, not measured: thresholds of the advice
BARELY, WELL = 0.25, 0.6  # shares of the way from the base to the photos
FOLLOWED = 0.8  # share of the base's prompt fidelity
MANY_COPIES = 0.2  # share of the pictures
ROOM = 1e-3  # below this, floor and ceiling count as equal; chosen

CHANCE = "chance"  # key of a row's fidelity to prompts that its pictures were not drawn for


@dataclass(frozen=True)
class Metric:
    key: str
    label: str
    better: Literal["higher", "lower"] = "higher"
    of: Literal["subject", "prompt"] | None = None  # what it stands for in the overall score


@dataclass(frozen=True)
class Row:
    """One adapter, the base or the photos. Values are by metric, by prompt, by picture."""

    name: str
    values: Mapping[str, Values]
    step: int | None = None  # optimizer updates, of an adapter of a run
    digest: str | None = None  # of the adapter's factors
    pictures: tuple[Picture, ...] = field(default=(), repr=False)

    def score(self, key: str) -> Score | None:
        return score(self.values.get(key, ()))

    def mean(self, key: str) -> float | None:
        found = self.score(key)
        return None if found is None else found.mean


@dataclass(frozen=True)
class Comparison:
    """Adapters between floor (the base alone, "a dog" in place of "sks dog") and ceiling (the photos against each other)."""

    metrics: tuple[Metric, ...]
    adapters: tuple[Row, ...]
    floor: Row
    ceiling: Row
    described: str  # the encoders and settings of the measures
    photos: int
    prompts: tuple[str, ...]  # of the first adapter
    seeds: int
    class_prompt: str
    class_pictures: int
    settings: Mapping[str, Any] = field(default_factory=dict)  # of the sampler

    @property
    def prompt_chance(self) -> float:
        """Prompt fidelity of the base's pictures to prompts that they were not drawn for."""
        return self.floor.mean(CHANCE) or 0.0

    def _shares(self, row: Row, chosen: np.ndarray | None = None) -> np.ndarray | None:
        """(rounds, 2): subject and prompt fidelity, each scaled to 0..1 between floor and ceiling; (rounds, 1) if the base does
        not follow the prompts; None if the photos are no nearer to each other than the base's pictures are to them.
        chosen: (rounds, prompts), the prompts drawn in each round; None: one round with each prompt once"""
        floor, ceiling = self._mean(self.floor, "subject"), self._mean(self.ceiling, "subject")
        scales = [("subject", floor, ceiling)]
        if self._base_follows:
            scales.append(("prompt", self.prompt_chance, self._mean(self.floor, "prompt")))
        shares = []
        for of, low, high in scales:
            means = np.array([np.mean(group) for group in row.values.get(self._key(of), ()) if len(group)])
            if not len(means) or low is None or high is None or high - low < ROOM:
                return None
            if chosen is not None and chosen.shape[1] != len(means):
                return None
            means = means[None] if chosen is None else means[chosen]
            shares.append(((means.mean(axis=1) - low) / (high - low)).clip(0, 1))
        return np.stack(shares, axis=1)

    @property
    def _base_follows(self) -> bool:
        """Whether the base's pictures fit their prompts better than others."""
        fidelity = self._mean(self.floor, "prompt")
        return fidelity is not None and fidelity - self.prompt_chance >= ROOM

    def _key(self, of: str) -> str:
        return next((metric.key for metric in self.metrics if metric.of == of), "")

    def _mean(self, row: Row, of: str) -> float | None:
        return row.mean(self._key(of))

    def subject_share(self, row: Row) -> float | None:
        """Subject fidelity from the base alone (0) to the photos (1)."""
        shares = self._shares(row)
        return None if shares is None else float(shares[0, 0])

    def prompt_share(self, row: Row) -> float | None:
        """Prompt fidelity from pictures of other prompts (0) to the base alone (1)."""
        shares = self._shares(row)
        return None if shares is None or shares.shape[1] < 2 else float(shares[0, 1])

    def overall(self, row: Row) -> float | None:
        """The product of both shares, so that neither makes up for the other."""
        shares = self._shares(row)
        return None if shares is None else float(shares[0].prod())

    @property
    def best(self) -> Row:
        """The highest overall score; the first among equals."""
        return max(self.adapters, key=lambda row: self.overall(row) or 0.0)

    @property
    def lead(self) -> tuple[Row, float, float] | None:
        """The runner-up, and the 95 % interval of the best one's lead over it; None for a single adapter or prompt."""
        others = [row for row in self.adapters if row is not self.best]
        if not others:
            return None
        second = max(others, key=lambda row: self.overall(row) or 0.0)
        chosen = draws(len(self.prompts))
        first, other = self._shares(self.best, chosen), self._shares(second, chosen)
        if first is None or other is None or len(self.prompts) < 2:
            return None
        low, high = np.quantile(first.prod(axis=1) - other.prod(axis=1), EDGES)
        return second, float(low), float(high)

    # --- in words

    def advice(self) -> list[str]:
        """What the scores of the best adapter suggest, in plain sentences."""
        row, lines = self.best, []
        if self._shares(row) is None:
            return ["The photos are no more alike than the base's pictures are like them: check that all show one subject."]
        if len(self.adapters) > 1:
            lines.append(self._which())
        subject, prompt = self.subject_share(row) or 0.0, self.prompt_share(row)
        copies, drift = row.mean("copies") or 0.0, self.drift(row)
        if subject < BARELY:
            lines.append("The subject is hardly learnt yet: train longer, or check that the photos show it clearly.")
        elif subject < WELL:
            lines.append("The subject is partly learnt: more steps, more photos or a higher rank may help.")
        else:
            lines.append("The subject is learnt well.")
        if prompt is not None and prompt < FOLLOWED:
            lines.append(
                "Prompts are followed less closely than by the base: use a weight below 1, or an adapter with fewer steps."
            )
        if not self._base_follows:
            lines.append("The base itself does not follow these prompts: use others to measure prompt fidelity.")
        if copies > MANY_COPIES:
            lines.append(f"{copies:.0%} of the pictures are copies of photos: use fewer steps, or photos taken in more places.")
        if drift is not None and drift > BARELY:
            lines.append(
                "The plain class has begun to look like the subject: train with prior preservation, or for fewer steps."
            )
        return lines

    def drift(self, row: Row) -> float | None:
        """How far pictures of the plain class have moved from the base's (0) towards the photos (1)."""
        now, before = row.mean("pres"), self.floor.mean("pres")
        top = self.ceiling.mean("pres")
        if now is None or before is None or top is None or top - before < ROOM:
            return None
        return float(np.clip((now - before) / (top - before), 0, 1))

    def _which(self) -> str:
        if self.lead is None:
            return f"The best is {self.best.name}."
        second, low, _ = self.lead
        return f"The best is {self.best.name}, {'clearly' if low > 0 else 'but not clearly'} ahead of {second.name}."

    def lines(self) -> Iterator[str]:
        """A table: photos, base and adapters with their means and half of the 95 % intervals; then the advice."""
        yield self.described
        drawn = f"{len(self.prompts)} x {self.seeds} pictures (prompts x seeds), {self.class_pictures} of {self.class_prompt!r}"
        yield f"{drawn}, {self.photos} photos"
        rows = [self.ceiling, self.floor, *self.adapters]
        wide = max(len(row.name) for row in rows) + 2
        columns = [m for m in self.metrics if any(row.score(m.key) is not None for row in rows)]
        widths = {m.key: max(15, len(m.label) + 2) for m in columns}
        yield "".join([" " * wide, f"{'overall':>9}", *(f"{m.label:>{widths[m.key]}}" for m in columns)])
        for row in rows:
            cells = [f"{'-' if (s := row.score(m.key)) is None else s!s:>{widths[m.key]}}" for m in columns]
            overall = self.overall(row) if row in self.adapters else None
            yield "".join([f"{row.name:<{wide}}", f"{'-' if overall is None else format(overall, '.3f'):>9}", *cells])
        yield from self.advice()

    def as_dict(self) -> dict[str, Any]:
        """Everything except the pictures, for JSON."""

        def one(row: Row) -> dict[str, Any]:
            scores = {m.key: None if (s := row.score(m.key)) is None else asdict(s) for m in self.metrics}
            return {"name": row.name, "step": row.step, "digest": row.digest, "scores": scores}

        adapters = [
            one(row)
            | {
                "subject_share": self.subject_share(row),
                "prompt_share": self.prompt_share(row),
                "overall": self.overall(row),
                "drift": self.drift(row),
            }
            for row in self.adapters
        ]
        return {
            "measured_with": self.described,
            "metrics": [asdict(metric) for metric in self.metrics],
            "photos": one(self.ceiling) | {"count": self.photos},
            "base": one(self.floor),
            "adapters": adapters,
            "best": self.best.name,
            "advice": self.advice(),
            "prompts": list(self.prompts),
            "seeds": self.seeds,
            "class_prompt": self.class_prompt,
            "class_pictures": self.class_pictures,
            "prompt_chance": self.prompt_chance,
            "settings": dict(self.settings),
        }
