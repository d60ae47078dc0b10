"""Memory of this process: what tensors take, and what goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager

from torch import Tensor


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind these tensors; memory that they share counts once."""
    return sum({one._cdata: one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}.values())


def return_to_system() -> None:
    """Hand freed memory of the host back to the system: glibc would keep what lies below memory in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)


@contextmanager
def without_collections() -> Iterator[None]:
    """No garbage collection inside: while libraries are imported it would walk all of them, again and again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()
