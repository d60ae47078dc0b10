"""Out of memory: how to recognise it, and the ladder of settings that need less, from the cheapest to the slowest."""

from __future__ import annotations

from typing import Any

import torch

from ..config import TrainingConfig

# Each level changes one setting and leaves rank, resolution, batch and steps alone: the same adapter up to rounding.
# The first step needs as much memory as any later one, so the ladder is used there, or when another program takes memory.
LEVELS: tuple[tuple[str, Any], ...] = (
    ("pictures_at_a_time", 1),
    ("gradient_checkpointing", True),
)
# these change the result
LEFT_TO_TRY = "a smaller resolution or rank, or a base in half precision or in 4 bits"
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


def next_level(config: TrainingConfig, *, pictures: int) -> tuple[str, Any] | None:
    """The next setting that can still save memory, and its value; or None. pictures: in this process's share of a batch."""
    for setting, value in LEVELS:
        useless = setting == "pictures_at_a_time" and pictures <= 1
        if getattr(config, setting) != value and not useless:
            return setting, value
    return None
