"""What the losses say: go on, go back, or give up."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from statistics import median
from typing import Any

from ..errors import TrainingError

BAD_STEPS = 3  # updates in a row without a finite loss
SPIKE = 10.0  # times the median before
RECENT, BEFORE, ENOUGH = 16, 128, 48  # losses: whose median is judged, by whose it is judged, and how many of those are needed
RAISED = 4  # of the recent ones above that: too many for a state to go back to


class RollBack(Exception):
    """The state is spoilt: go on from the last good one."""


@dataclass
class Health:
    """Reads every loss once. An update that is not finite is left out; three in a row roll back and halve the rate; again, the
    training ends.

    A spike is told by the median of the last 16 losses: single losses of DreamBooth differ a hundredfold by their timestep,
    while a run that has lost its way stays high. It rolls back once, also with half the rate, since the same draws at the same
    rate would lead there again; a second one is only told.
    """

    bad: int = 0  # updates in a row that were not finite
    left_out: int = 0  # of these in the whole run
    rate_share: float = 1.0  # of the learning rate that was asked for
    gone_back: dict[str, int] = field(default_factory=lambda: {"not finite": 0, "spike": 0})
    losses: list[float] = field(default_factory=list)  # the last finite ones, at most BEFORE + RECENT

    @property
    def well(self) -> bool:
        """Nothing looks wrong: a state to go back to."""
        before, recent = self._parts()
        return self.bad == 0 and (not before or sum(loss > SPIKE * median(before) for loss in recent) < RAISED)

    def judge(self, losses: Sequence[float], *, step: int, rate: float) -> Iterator[str]:
        """losses: of the updates up to `step`, nan for one with gradients that were not finite. Yields what is to be told;
        raises RollBack, or TrainingError."""
        for loss, index in zip(losses, range(step - len(losses) + 1, step + 1), strict=True):
            if not math.isfinite(loss):
                self.bad += 1
                self.left_out += 1
                if self.bad == BAD_STEPS:
                    what = f"the loss or its gradients were not finite {BAD_STEPS} times in a row, at step {index}"
                    self._go_back("not finite", what, rate)
                elif self.left_out & (self.left_out - 1) == 0:  # 1, 2, 4, 8, ...: nobody reads a thousand lines
                    so_far = f" ({self.left_out} so far)" if self.left_out > 1 else ""
                    yield f"the loss or its gradients were not finite at step {index}: the update is left out{so_far}"
                continue
            self.bad = 0
            self.losses = [*self.losses, loss][-BEFORE - RECENT :]
            before, recent = self._parts()
            if before and median(recent) > SPIKE * median(before):
                what = f"the loss is {median(recent) / median(before):.0f} times what it was, at step {index}"
                self.losses = recent  # the new measure, should it stay
                yield self._go_back("spike", what, rate)

    def _go_back(self, kind: str, what: str, rate: float) -> str:
        first = self.gone_back[kind] == 0
        self.gone_back[kind] += 1
        if first:
            self.rate_share /= 2
            raise RollBack(f"{what}: the learning rate is halved")
        if kind == "spike":
            return what
        raise TrainingError(
            f"{what}, with half the rate as well; lower learning_rate (now {rate:g}) or load the base with dtype=torch.float32"
        )

    def _parts(self) -> tuple[list[float], list[float]]:
        """The losses before and the recent ones; nothing before until there are enough."""
        before, recent = self.losses[:-RECENT], self.losses[-RECENT:]
        return (before if len(before) >= ENOUGH else []), recent

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any], *, after: Health | None = None) -> Health:
        """after: the one that had to go back to this state; it keeps what it has learnt from that."""
        health = cls(**state | {"gone_back": dict(state["gone_back"]), "losses": list(state["losses"])})
        if after is not None:
            health.rate_share, health.gone_back, health.left_out = after.rate_share, dict(after.gone_back), after.left_out
        return health
