"""Memory of this process: how many pictures go through a model at a time, and what goes back to the system."""

from __future__ import annotations

import ctypes
import gc
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from functools import cache
from typing import Any

from torch import Tensor

PIXELS_AT_A_TIME = 4 * 512 * 512  # through the VAE or the sampler: what fits a GPU of 15 GB in fp32
MOST_AT_A_TIME = 8  # chosen: more gains little speed


def pictures_at_a_time(resolution: int) -> int:
    """How many square pictures of this side (pixels) go through the VAE or the sampler together: 4 at 512, 1 at 1024."""
    return max(1, min(MOST_AT_A_TIME, PIXELS_AT_A_TIME // resolution**2))


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


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and values of dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


@cache
def is_view(func: Any) -> bool:
    """Whether an operator only looks at its input in another way, with no work on a device."""
    returned = func._schema.returns
    return bool(returned) and all(one.alias_info is not None and not one.alias_info.is_write for one in returned)
