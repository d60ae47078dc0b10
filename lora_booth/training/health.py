"""Judging a run by its losses: continue, roll back, or give up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ..errors import TrainingError, setting

# all chosen; benchmarks/reliability.py counts how faults end with them
BAD_STEPS = 3  # updates in a row without a finite loss
SPIKE = 10.0  # times the median before
RECENT, BEFORE, ENOUGH = 16, 128, 48  # losses: the median of the recent ones against that of those before, if there are enough
RAISED = 4  # recent losses above a spike that make a state unfit to roll back to


class RollBack(Exception):
    """The state is no longer good: continue from the last good one."""


@dataclass
class Health:
    """Reads every loss once. An update that is not finite is skipped; three in a row roll back and halve the rate; if that
    happens again, the training ends.

    A spike is recognised by the median of the last 16 losses: single losses of DreamBooth differ a hundredfold by their
    timestep, while those of a diverged run stay high. It rolls back once, also with half the rate, since the same draws at the
    same rate would lead there again; a second spike is only reported.
    """

    bad: int = 0  # updates in a row that were not finite
    skipped: int = 0  # of these in the whole run
    rate_share: float = 1.0  # of the configured learning rate
    rollbacks: dict[str, int] = field(default_factory=lambda: {"not finite": 0, "spike": 0})
    losses: list[float] = field(default_factory=list)  # the last finite ones, at most BEFORE + RECENT

    @property
    def well(self) -> bool:
        """Nothing looks wrong: the state is fit to roll back to."""
        before, recent = self._parts()
        return self.bad == 0 and (not before or sum(loss > SPIKE * median(before) for loss in recent) < RAISED)

    def judge(self, losses: Sequence[float], *, step: int, rate: float) -> Iterator[str]:
        """losses: of the updates up to `step`, nan for one whose gradients were not finite. Yields lines for the user. Raises
        RollBack, or TrainingError."""
        for loss, index in zip(losses, range(step - len(losses) + 1, step + 1), strict=True):
            if not math.isfinite(loss):
                self.bad += 1
                self.skipped += 1
                if self.bad == BAD_STEPS:
                    what = f"the loss or its gradients were not finite {BAD_STEPS} times in a row, at step {index}"
                    self._roll_back("not finite", what, rate)
                elif self.skipped & (self.skipped - 1) == 0:  # 1, 2, 4, 8, ...: not a thousand lines
                    so_far = f" ({self.skipped} so far)" if self.skipped > 1 else ""
                    yield f"the loss or its gradients were not finite at step {index}: the update is skipped{so_far}"
                continue
            self.bad = 0
            self.losses = [*self.losses, loss][-BEFORE - RECENT :]
            before, recent = self._parts()
            if before and median(recent) > SPIKE * median(before):
                what = f"the loss is {median(recent) / median(before):.0f} times what it was, at step {index}"
                self.losses = recent  # the new baseline, should they stay there
                yield self._roll_back("spike", what, rate)

    def _roll_back(self, kind: str, what: str, rate: float) -> str:
        first = self.rollbacks[kind] == 0
        self.rollbacks[kind] += 1
        if first:
            self.rate_share /= 2
            raise RollBack(f"{what}: the learning rate is halved")
        if kind == "spike":
            return what
        raise TrainingError(
            f"{what}, with half the rate as well; lower {setting('learning_rate')} (now {rate:g}) "
            f"or load the base with {setting('dtype=torch.float32', option='--dtype fp32')}"
        )

    def _parts(self) -> tuple[list[float], list[float]]:
        """The losses before and the recent ones; those before only once there are enough."""
        before, recent = self.losses[:-RECENT], self.losses[-RECENT:]
        return (before if len(before) >= ENOUGH else []), recent

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any], *, after: Health | None = None) -> Health:
        """after: the one that had to roll back to this state; its counts and rate are kept."""
        rollbacks = {kind: int(state["rollbacks"][kind]) for kind in cls().rollbacks}
        losses = [float(loss) for loss in state["losses"]]
        health = cls(int(state["bad"]), int(state["skipped"]), float(state["rate_share"]), rollbacks, losses)
        if after is not None:
            health.rate_share, health.rollbacks, health.skipped = after.rate_share, dict(after.rollbacks), after.skipped
        return health
