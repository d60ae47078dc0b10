"""Recognising that memory ran out."""

from __future__ import annotations

import torch

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
