"""Out of memory: which errors say so, and the ladder of settings that take less."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Any

import torch

from ..config import TrainingConfig

# Each rung changes one setting that leaves rank, resolution, batch and steps alone: the same adapter but for rounding.
# The first step is as large as any later one, so the ladder is climbed there or, for memory that others took, never far on.
RUNGS: tuple[tuple[str, Any], ...] = (
    ("pictures_at_a_time", 1),
    ("gradient_checkpointing", True),
)
LEFT_TO_TRY = 'a smaller resolution or rank, or a base in half precision or with quantize="nf4"'  # nobody does it unasked
SIGNS = (  # in a RuntimeError, in lower case
    "can't allocate memory",  # PyTorch on a CPU
    "not enough memory",  # the same, on Windows
    "out of memory",  # CUDA, MPS
    "alloc_failed",  # cuBLAS, cuDNN
)


def says_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def next_rung(config: TrainingConfig, *, pictures: int) -> str | None:
    """The setting that can still save something; None: there is none left. pictures: in a batch of this process."""
    for setting, value in RUNGS:
        useless = setting == "pictures_at_a_time" and pictures <= 1
        if getattr(config, setting) != value and not useless:
            return setting
    return None


def rungs_between(config: TrainingConfig, saving: TrainingConfig) -> list[str]:
    """The rungs that lead from the one to the other."""
    return [setting for setting, value in RUNGS if getattr(saving, setting) == value != getattr(config, setting)]


def batch_of(config: TrainingConfig) -> int:
    return config.batch_size * (2 if config.prior_loss_weight > 0 else 1)


def choices(config: TrainingConfig) -> list[list[tuple[str, Any]]]:
    """For each saving that the user left open, its values; a saving that was asked for is no choice."""
    found = []
    for setting, value in RUNGS:
        if getattr(config, setting) != getattr(TrainingConfig(), setting):
            continue
        values = list(halves(batch_of(config))) if setting == "pictures_at_a_time" else [value]
        if values:
            found.append([(setting, one) for one in values])
    return found


def halves(pictures: int) -> Iterator[int]:
    while pictures > 1:
        pictures //= 2
        yield pictures


def climbed(config: TrainingConfig, rungs: Sequence[str]) -> TrainingConfig:
    """`config` with these savings."""
    changed: dict[str, Any] = {setting: value for setting, value in RUNGS if setting in rungs}
    return replace(config, **changed)
