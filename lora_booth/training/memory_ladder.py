"""Out of memory: how to recognise it, and the ladder of settings that need less, from the cheapest to the slowest."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any, TypeVar

import torch

from ..config import TrainingConfig

C = TypeVar("C", bound=TrainingConfig)

# Each level changes one setting and leaves rank, resolution, batch and steps alone: the same adapter up to rounding.
# The first step needs as much memory as any later one, so the ladder is used there, or when another program takes memory.
LEVELS: tuple[tuple[str, Any], ...] = (
    ("pictures_at_a_time", 1),
    ("gradient_checkpointing", True),
)
# these change the result
LEFT_TO_TRY = 'a smaller resolution or rank, or a base in half precision or with quantize="nf4" (--quantize nf4)'
SIGNS = (  # in the message of a RuntimeError, in lower case
    "can't allocate memory",  # PyTorch on a CPU
    "not enough memory",  # the same, on Windows
    "out of memory",  # CUDA, MPS
    "alloc_failed",  # cuBLAS, cuDNN
)


def is_out_of_memory(error: BaseException) -> bool:
    if isinstance(error, torch.OutOfMemoryError | MemoryError):
        return True
    return isinstance(error, RuntimeError) and any(sign in str(error).lower() for sign in SIGNS)


def next_level(config: TrainingConfig, *, pictures: int) -> str | None:
    """The next setting that can still save memory, or None. pictures: in this process's share of a batch."""
    for setting, value in LEVELS:
        useless = setting == "pictures_at_a_time" and pictures <= 1
        if getattr(config, setting) != value and not useless:
            return setting
    return None


def levels_between(config: TrainingConfig, lower: TrainingConfig) -> list[str]:
    """The levels that lead from `config` to `lower`."""
    return [setting for setting, value in LEVELS if getattr(lower, setting) == value != getattr(config, setting)]


def at_levels(config: C, levels: Sequence[str]) -> C:
    """`config` with these levels of the ladder."""
    changed: dict[str, Any] = {setting: value for setting, value in LEVELS if setting in levels}
    return replace(config, **changed)
