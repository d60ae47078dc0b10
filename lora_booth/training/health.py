"""What the losses say: go on, go back, or give up."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

from ..errors import TrainingError

BAD_STEPS = 3  # updates in a row without a finite loss


class RollBack(Exception):
    """The state is spoilt: go on from the last good one."""


@dataclass
class Health:
    """Reads every loss once. An update that is not finite is skipped; three in a row roll back and halve the rate; again, the
    training ends."""

    bad: int = 0  # losses in a row that were not finite
    rate_share: float = 1.0  # of the learning rate that was asked for

    @property
    def well(self) -> bool:
        return self.bad == 0

    def judge(self, losses: Sequence[float], *, step: int, rate: float) -> None:
        """losses: of the updates up to `step`. Raises RollBack, or TrainingError when going back has not helped."""
        for loss, index in zip(losses, range(step - len(losses) + 1, step + 1), strict=True):
            self.bad = 0 if math.isfinite(loss) else self.bad + 1
            if self.bad < BAD_STEPS:
                continue
            reason = f"the loss was not finite {BAD_STEPS} times in a row, at step {index}"
            if self.rate_share < 1:
                raise TrainingError(
                    f"{reason}, with half the rate as well; lower learning_rate (now {rate:g}) "
                    "or load the base with dtype=torch.float32"
                )
            self.rate_share = 0.5
            raise RollBack(f"{reason}: the learning rate is halved")

    def state(self) -> dict[str, Any]:
        return asdict(self)

    @classmethod
    def from_state(cls, state: dict[str, Any]) -> Health:
        return cls(**state)
