"""Safetensors files: the header, read within limits, and the tensors, in the target precision when a module needs them.

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
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor, nn

from .. import files
from ..errors import AdapterDtypeError, AdapterError, AdapterFormatError, AdapterTooLarge, BaseModelError, UnsafeFormat

PIECE = 2**24  # bytes read at a time; chosen
LARGE = 2**20  # bytes of a tensor whose memory is worth returning; chosen
M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


@dataclass(frozen=True)
class Limits:
    """Limits on a header. All were chosen: far above every good file known, and cheap to check."""

    header: int = 4 * 2**20  # bytes
    tensors: int = 4096
    key: int = 256  # characters of a tensor's name
    empty: bool = False  # whether a tensor may have no elements


ADAPTER = Limits()
CHECKPOINT = Limits(header=2**26, tensors=2**20, key=2**20, empty=True)
MAX_EXTENT = 2**40  # of a dimension or an offset; chosen

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "U16": torch.uint16,
    "I16": torch.int16,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "U32": torch.uint32,
    "I32": torch.int32,
    "F32": torch.float32,
    "U64": torch.uint64,
    "I64": torch.int64,
    "F64": torch.float64,
}
FACTOR_DTYPES = ("F16", "BF16", "F32")


class Entry(NamedTuple):
    """One tensor in the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes after the header
    end: int


KNOWN = {  # how files begin that people take for safetensors files
    b"\x89PNG": "a PNG picture",
    b"\xff\xd8\xff": "a JPEG picture",
    b"RIFF": "a WebP picture",
    b"<": "a web page, such as the error page of a download",
    b"version ": "a Git LFS pointer; fetch the file itself, e.g. with git lfs pull",
    b"{": "a JSON file",
}


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int  # bytes


def read_header(handle: BinaryIO, size: int, path: Path, limits: Limits = ADAPTER) -> Header:
    """Read and check the header of a file of `size` bytes; the handle stays open for the tensors.

    Raises a kind of AdapterError; UnsafeFormat for a pickle.
    """
    first = handle.read(9)
    length = int.from_bytes(first[:8], "little")
    if length < 2 or first[8:] != b"{":
        if first[:2] == b"PK" or first[:1] == b"\x80":
            raise UnsafeFormat("a pickle under another name, which could run code; use a .safetensors file", path)
        kind = next((f"; it is {name}" for begins, name in KNOWN.items() if first.startswith(begins)), "")
        raise AdapterFormatError(f"not a safetensors file{kind or ', or a damaged one; download it again'}", path)
    if 8 + length > size:
        raise AdapterFormatError(f"header length {length} is more than the file has ({size} bytes); download it again", path)
    if length > limits.header:
        raise AdapterTooLarge(f"its header has {length} bytes; allowed: {limits.header}", path)
    text = first[8:] + handle.read(length - 1)
    if len(text) != length:
        raise AdapterFormatError("became shorter while it was being read; download it again", path)
    content = parse_json(text, path)
    metadata = content.pop("__metadata__", {})
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFormatError("__metadata__ is not a table of strings", path)
    if len(content) > limits.tensors:
        raise AdapterTooLarge(f"{len(content)} tensors; allowed: {limits.tensors}", path)
    longest = max(map(len, content), default=1)
    if longest > limits.key or "" in content:
        raise AdapterFormatError(f"tensor names of {longest} characters; allowed: 1 to {limits.key}", path)
    tensors = {key: _entry(key, value, path, limits) for key, value in content.items()}
    end = 0
    for key, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != end:
            raise AdapterFormatError(
                f"{'overlap' if entry.start < end else 'hole'} before {brief(key)}, at byte {entry.start}", path
            )
        end = entry.end
    if 8 + length + end != size:
        what = "trailing bytes" if 8 + length + end < size else "tensors cut off"
        raise AdapterFormatError(f"{what}: {8 + length + end} bytes described, the file has {size}; download it again", path)
    return Header(tensors, metadata, 8 + length)


def parse_json(content: bytes, path: Path) -> dict[str, Any]:
    """A JSON object with unique keys. Raises AdapterFormatError for anything else, however deep."""
    try:
        parsed = files.parse_json(content)
    except ValueError as error:
        raise AdapterFormatError(f"JSON that cannot be read: {brief(str(error))}", path) from None
    if not isinstance(parsed, dict):
        raise AdapterFormatError("JSON that is not an object", path)
    return parsed


def brief(text: str) -> str:
    """Text from a file, e.g. a tensor's name, for a message."""
    return ascii(text)[1:-1][:160]


def _entry(name: str, value: Any, path: Path, limits: Limits) -> Entry:
    key = brief(name)
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterFormatError(f"{key}: not a tensor's entry (dtype, shape, data_offsets)", path)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    numbers = isinstance(shape, list) and isinstance(offsets, list) and all(type(n) is int and n >= 0 for n in shape + offsets)
    possible = numbers and max(shape + offsets, default=0) <= MAX_EXTENT and (limits.empty or 0 not in shape)
    if not isinstance(dtype, str) or not possible or len(offsets) != 2 or len(shape) > 8:
        raise AdapterFormatError(f"{key}: dtype, shape or data_offsets malformed", path)
    if dtype not in DTYPES:
        raise AdapterDtypeError(f"{key}: dtype {ascii(dtype[:20])}; allowed: {', '.join(FACTOR_DTYPES)}", path)
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise AdapterFormatError(f"{key}: {dtype} {shape} does not fill bytes {offsets[0]} to {offsets[1]}", path)
    return Entry(dtype, tuple(shape), *offsets)


# --- tensors, read when they are needed ----------------------------------------------------------------------------


class WeightFile:
    """An open safetensors file. It stays open, so the original is read even after the file was deleted or replaced."""

    def __init__(self, path: Path) -> None:
        """Raises BaseModelError."""
        self.path = path
        try:
            self._handle = files.open_regular(path)
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
            if self._handle.readinto(view) != len(view):  # type: ignore[attr-defined]  # a file has it
                raise BaseModelError(f"{self.path}: truncated while in use; load the base again")

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
    glibc("malloc_trim", 0)


def return_always() -> None:
    """From now on, return each large tensor's host memory as soon as it is freed.

    glibc holds on to tensors below 32 MB, and the gaps between them may come to as much as they do. Asking the system each time
    costs some speed on a CPU.
    """
    glibc("mallopt", M_MMAP_THRESHOLD, LARGE)


def glibc(function: str, *arguments: int) -> None:
    """Call it where it exists."""
    found = getattr(ctypes.CDLL(None), function, None) if sys.platform == "linux" else None
    if found is not None:
        found(*arguments)
