"""Read the header of an untrusted safetensors file, within limits."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from .. import files
from ..errors import AdapterDtypeError, AdapterFormatError, AdapterTooLarge, UnsafeFormat


@dataclass(frozen=True)
class Limits:
    """Limits on a header. All were chosen: far above every good file known, and cheap to check."""

    header: int = 4 * 2**20  # bytes
    tensors: int = 4096
    key: int = 256  # characters of a tensor's name
    brackets: int = 100_000  # lists and tables, counting those in strings; a million would take seconds
    empty: bool = False  # whether a tensor may have no elements


ADAPTER = Limits()
CHECKPOINT = Limits(header=2**26, tensors=2**20, key=2**20, brackets=2**26, empty=True)
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
    first = exactly(handle, min(size, 9), path)
    length = int.from_bytes(first[:8], "little")
    if length > limits.header or first[8:] != b"{":
        if first[:2] == b"PK" or first[:1] == b"\x80":  # a header's length may also begin so, but not with that size or text
            raise UnsafeFormat("a pickle under another name, which could run code; use a .safetensors file", path)
        if size >= 9 and first[8:] == b"{" and 8 + length <= size:
            raise AdapterTooLarge(f"its header has {length} bytes; allowed: {limits.header}", path)
        kind = next((f"; it is {name}" for begins, name in KNOWN.items() if first.startswith(begins)), "")
        raise AdapterFormatError(f"not a safetensors file{kind or ', or a damaged one; download it again'}", path)
    if length < 2:
        raise AdapterFormatError("not a safetensors file: its header is empty", path)
    if 8 + length > size:
        raise AdapterFormatError(f"header length {length} is more than the file has ({size} bytes); download it again", path)
    content = parse_json(first[8:] + exactly(handle, length - 1, path), path, brackets=limits.brackets)
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


def exactly(handle: BinaryIO, count: int, path: Path) -> bytes:
    content = handle.read(count)
    if len(content) != count:
        raise AdapterFormatError("shorter than its header states; download it again", path)
    return content


def parse_json(content: bytes, path: Path, *, brackets: int = ADAPTER.brackets) -> dict[str, Any]:
    """A JSON object with unique keys. Raises AdapterError for anything else, however deep or long."""
    found = content.count(b"[") + content.count(b"{")
    if found > brackets:
        raise AdapterTooLarge(f"{found} lists and tables in its JSON; allowed: {brackets}", path)
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
    if not isinstance(dtype, str) or not numbers or len(offsets) != 2 or len(shape) > 8:
        raise AdapterFormatError(f"{key}: dtype, shape or data_offsets malformed", path)
    if (0 in shape and not limits.empty) or any(n > MAX_EXTENT for n in shape + offsets):
        raise AdapterFormatError(f"{key}: impossible shape or offsets", path)
    if dtype not in DTYPES:
        raise AdapterDtypeError(f"{key}: dtype {ascii(dtype[:20])}; allowed: {', '.join(FACTOR_DTYPES)}", path)
    if offsets[1] - offsets[0] != math.prod(shape) * DTYPES[dtype].itemsize:
        raise AdapterFormatError(f"{key}: {dtype} {shape} does not fill bytes {offsets[0]} to {offsets[1]}", path)
    return Entry(dtype, tuple(shape), *offsets)
