"""Weights on disk: read tensor by tensor in the target precision when a module is needed, and released when it is not.

The stock loaders map a whole file into memory: SD 1.5 as bf16 from an fp32 file takes 5.2 GiB that way. Here a tensor is
read in pieces into its final place, so a module takes its size and a few MB.
"""

from __future__ import annotations

import ctypes
import math
import os
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, BaseModelError
from ..files import open_regular
from .safetensors_header import CHECKPOINT, DTYPES, read_header

PIECE = 2**24  # bytes read at a time; chosen


class WeightFile:
    """An open safetensors file. It stays open, so the original is read even after the file was deleted or replaced."""

    def __init__(self, path: Path) -> None:
        """Raises BaseModelError."""
        self.path = path
        try:
            self._handle = open_regular(path)
        except OSError as error:
            raise BaseModelError(f"{path}: cannot be opened ({error.strerror})") from error
        weakref.finalize(self, self._handle.close)
        self._lock = threading.Lock()  # of the handle's position
        self.stamp = self._stamp()
        try:
            header = read_header(self._handle, self.stamp[2], path, CHECKPOINT)
        except AdapterError as error:
            raise BaseModelError(f"{path}: not a complete safetensors file ({str(error).removeprefix(f'{path}: ')})") from error
        self.metadata = header.metadata
        self.places = {
            key: Place(self, DTYPES[entry.dtype], entry.shape, header.data_start + entry.start)
            for key, entry in header.tensors.items()
        }

    def _stamp(self) -> tuple[int, int, int, int]:
        status = os.fstat(self._handle.fileno())
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def read(self, start: int, into: Tensor) -> None:
        """Read the bytes from `start` into a flat tensor on the CPU."""
        view = memoryview(into.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
        with self._lock:
            self._handle.seek(start)
            while view:
                got = self._handle.readinto(view)  # type: ignore[attr-defined]  # a file has it
                if not got:
                    raise BaseModelError(f"{self.path}: truncated while in use; load the base again")
                view = view[got:]

    def check_unchanged(self) -> None:
        if self._stamp() != self.stamp:
            raise BaseModelError(f"{self.path}: changed while in use; load the base again")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file."""

    file: WeightFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes
    transposed: bool = False  # in the file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def third(self, i: int) -> Place:
        """Query, key or value of a joint projection."""
        rows = self.shape[0] // 3
        return replace(self, shape=(rows, *self.shape[1:]), start=self.start + i * self.numel // 3 * self.dtype.itemsize)

    def start_of(self, count: int) -> Tensor:
        """The first values in the file, flat."""
        return replace(self, shape=(min(count, self.numel),), transposed=False).read(self.dtype, torch.device("cpu"))

    def read(self, dtype: torch.dtype, device: torch.device, scratch: Tensor | None = None) -> Tensor:
        """The tensor, as `dtype` if it is floating-point. scratch: PIECE bytes; sharing it avoids holes between tensors."""
        count = self.numel
        target = dtype if self.dtype.is_floating_point else self.dtype
        found = torch.empty(count, dtype=target, device=device)
        straight = target == self.dtype and device.type == "cpu"
        step = PIECE // self.dtype.itemsize
        if scratch is None:
            scratch = torch.empty(0 if straight else min(count, step) * self.dtype.itemsize, dtype=torch.uint8)
        pieces = scratch.view(self.dtype)
        for begin in range(0, count, step):
            end = min(begin + step, count)
            piece = found[begin:end] if straight else pieces[: end - begin]
            self.file.read(self.start + begin * self.dtype.itemsize, piece)
            if not straight:
                found[begin:end].copy_(piece)
        shaped = found.view(self.shape)
        return shaped.T.contiguous() if self.transposed else shaped


class LazyModule:
    """A module whose weights are read when needed. `kept`: a caller may hold on to it, so it is not released."""

    def __init__(self, module: Any, places: Mapping[str, Place], dtype: torch.dtype, device: torch.device) -> None:
        self.module, self.places, self.dtype, self.device = module, places, dtype, device
        self.put: Callable[[nn.Module, str, Tensor], None] = put  # stores a tensor that was read
        self.is_read = self.kept = False

    @torch.no_grad()
    def fill(self) -> None:
        if self.is_read:
            return
        for file in {place.file for place in self.places.values()}:
            file.check_unchanged()
        shapes = {key: value.shape for key, value in self.module.state_dict().items()}
        scratch = torch.empty(PIECE, dtype=torch.uint8)
        for key, place in self.places.items():
            self.put(self.module, key, place.read(self.dtype, self.device, scratch).view(shapes[key]))
        for key, buffer in list(self.module.named_buffers()):
            put(self.module, key, buffer.to(self.device))  # those that are in no file, e.g. position ids
        self.is_read = True

    @torch.no_grad()
    def drop(self) -> None:
        if self.is_read and not self.kept:
            self.is_read = False  # first: after an interrupt, `fill` reads all again
            weights = self.module.state_dict()
            for key in self.places:
                put(self.module, key, torch.empty_like(weights.pop(key), device="meta"))
            return_to_system()

    def stamp(self) -> str:
        """Identifies the files on this machine, and the places of the weights in them."""
        return repr(sorted((key, place.file.stamp, place.start) for key, place in self.places.items()))


def put(module: nn.Module, key: str, value: Tensor) -> None:
    """Replace the tensor of a parameter or buffer."""
    above, _, name = key.rpartition(".")
    parent = module.get_submodule(above)
    old = parent._parameters.get(name)
    if old is not None:
        parent._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        parent._buffers[name] = value


def return_to_system() -> None:
    """Return freed host memory to the system; glibc would hold on to what lies below memory in use."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None) if sys.platform == "linux" else None
    if trim is not None:
        trim(0)
