"""The results of an evaluation: adapters between the base alone and the photos, which is best, and 95 % intervals by bootstrap
over prompts."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np

from ..errors import EvaluationError, shown
from ..files import Owned
from ..pictures.picture import Picture
from ..training.checkpoint import SCORES, read_record

# chosen, not measured: thresholds of the advice
BARELY, WELL = 0.25, 0.6  # shares of the way from the base to the photos
FOLLOWED = 0.8  # share of the base's prompt fidelity
MANY_COPIES = 0.2  # share of the pictures
ROOM = 1e-3  # below this, floor and ceiling count as equal; chosen
ROUNDS = 2000  # of a bootstrap; chosen: 1,000 is the usual minimum for percentile intervals
EDGES = (0.025, 0.975)

OVERFITTED = (  # what is seen, a remedy, and where the subject is learnt another
    ("Prompts are followed less closely than by the base", "use a weight below 1", "an adapter with fewer steps"),
    ("{copies:.0%} of the pictures are copies of photos", "use photos taken in more places", "fewer steps"),
    ("The plain class has begun to look like the subject", "train with prior preservation", "for fewer steps"),
)

CHANCE = "chance"  # key of a row's fidelity to prompts that its pictures were not drawn for

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
    """Adapters between floor (the base alone, "a dog" in place of "ohwx dog") and ceiling (the photos against each other)."""

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

    def _key(self, of: str) -> str:
        return next((metric.key for metric in self.metrics if metric.of == of), "")

    @property
    def _scales(self) -> dict[str, tuple[float | None, float | None]]:
        """What counts as 0 and as 1: of the subject the base alone and the photos, of the prompt the base's pictures of other
        prompts and of these. No prompt where the base does not follow these prompts."""
        subject, prompt = self._key("subject"), self._key("prompt")
        scales = {subject: (self.floor.mean(subject), self.ceiling.mean(subject))}
        chance, followed = self.floor.mean(CHANCE) or 0.0, self.floor.mean(prompt)
        return scales if followed is None or followed - chance < ROOM else scales | {prompt: (chance, followed)}

    def _shares(self, row: Row, chosen: np.ndarray | None = None) -> np.ndarray | None:
        """(rounds, 2): subject and prompt fidelity, each scaled to 0..1; (rounds, 1) if the base does not follow the prompts;
        None if the photos are no nearer to each other than the base's pictures are to them.
        chosen: (rounds, prompts), the prompts drawn in each round; None: one round with each prompt once"""
        shares = []
        for key, (low, high) in self._scales.items():
            means = np.array([np.mean(group) for group in row.values.get(key, ()) if len(group)])
            if not len(means) or low is None or high is None or high - low < ROOM:
                return None
            if chosen is not None and chosen.shape[1] != len(means):
                return None
            means = means[None] if chosen is None else means[chosen]
            shares.append(((means.mean(axis=1) - low) / (high - low)).clip(0, 1))
        return np.stack(shares, axis=1)

    def standing(self, row: Row) -> dict[str, float | None]:
        """Where the row stands; None where there is nothing to compare with.

        subject_share  subject fidelity from the base alone (0) to the photos (1)
        prompt_share   prompt fidelity from pictures of other prompts (0) to the base alone (1)
        overall        the product of both, so that neither makes up for the other
        drift          how far pictures of the plain class have moved from the base's (0) towards the photos (1)
        """
        shares = [] if (found := self._shares(row)) is None else found[0].tolist()
        before, now, top = (one.mean("pres") for one in (self.floor, row, self.ceiling))
        drift = None
        if before is not None and now is not None and top is not None and top - before >= ROOM:
            drift = float(np.clip((now - before) / (top - before), 0, 1))
        return {
            "subject_share": shares[0] if shares else None,
            "prompt_share": shares[1] if len(shares) > 1 else None,
            "overall": float(np.prod(shares)) if shares else None,
            "drift": drift,
        }

    def overall(self, row: Row) -> float | None:
        return self.standing(row)["overall"]

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
        row, standing = self.best, self.standing(self.best)
        subject, prompt, drift = (standing[name] for name in ("subject_share", "prompt_share", "drift"))
        copies = row.mean("copies") or 0.0
        if subject is None:
            return ["The photos are no more alike than the base's pictures are like them: check that all show one subject."]
        lines = []
        if len(self.adapters) > 1:
            ahead = ", by one prompt alone: pass more to be sure" if len(self.prompts) == 1 else ""
            if (lead := self.lead) is not None:
                ahead = f", {'clearly' if lead[1] > 0 else 'but not clearly'} ahead of {lead[0].name}"
            lines.append(f"The best is {row.name}{ahead}.")
        deaf, drifted = prompt is not None and prompt < FOLLOWED, drift is not None and drift > BARELY
        signs = [sign for sign, seen in zip(OVERFITTED, (deaf, copies > MANY_COPIES, drifted), strict=True) if seen]
        amount = "partly learnt" if subject >= BARELY else "hardly learnt yet"
        if subject >= WELL:
            lines.append("The subject is learnt well.")
        elif signs:
            lines.append(f"The subject is {amount}, but more steps would make the rest worse: use more or clearer photos.")
        elif subject >= BARELY:
            lines.append(f"The subject is {amount}: more steps, more photos or a higher rank may help.")
        else:
            lines.append(f"The subject is {amount}: train longer, or check that the photos show it clearly.")
        for words, remedy, fewer in signs:
            lines.append(f"{words.format(copies=copies)}: {remedy}{f', or {fewer}' if subject >= WELL else ''}.")
        if prompt is None:
            lines.append("The base itself does not follow these prompts: use others to measure prompt fidelity.")
        return lines

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

        return {
            "measured_with": self.described,
            "metrics": [asdict(metric) for metric in self.metrics],
            "photos": one(self.ceiling) | {"count": self.photos},
            "base": one(self.floor),
            "adapters": [one(row) | self.standing(row) for row in self.adapters],
            "best": self.best.name,
            "advice": self.advice(),
            "prompts": list(self.prompts),
            "seeds": self.seeds,
            "class_prompt": self.class_prompt,
            "class_pictures": self.class_pictures,
            "prompt_chance": self.floor.mean(CHANCE) or 0.0,
            "settings": dict(self.settings),
        }


def scores_file(folder: str | Path, made: Comparison) -> Path:
    """Write the scores to a folder; in that of a run, the report shows them until another run starts there.

    Raises EvaluationError, also if a file of this name is not ours.
    """
    identity = read_record(Path(folder)).get("identity")
    content = made.as_dict() | ({} if identity is None else {"identity": identity})
    try:
        return Owned(Path(folder)).write(SCORES, (json.dumps(content, indent=1) + os.linesep).encode())
    except OSError as error:
        raise EvaluationError(f"{shown(folder)}: {SCORES} cannot be written ({error.strerror}); move it away") from error
