"""Memory of this process: bytes of tensors, pictures at a time, and returning freed memory to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor

PIXELS_AT_A_TIME = 4 * 512 * 512  # through the VAE or the sampler; chosen to fit a GPU of 15 GB in fp32
MOST_AT_A_TIME = 8  # chosen: more gains little speed


def pictures_at_a_time(resolution: int) -> int:
    """How many square pictures of this side (pixels) go through the VAE or the sampler together: 4 at 512, 1 at 1024."""
    return max(1, min(MOST_AT_A_TIME, PIXELS_AT_A_TIME // resolution**2))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storage of these tensors; shared storage counts once."""
    return sum({one._cdata: one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}.values())


def return_to_system() -> None:
    """Return freed host memory to the system; glibc would hold on to what lies below memory in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def without_collections() -> Iterator[None]:
    """Disable garbage collection, which repeatedly walks all libraries while they are imported."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
