"""Read the header of an untrusted safetensors file, within limits."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch

from ..errors import AdapterDtypeError, AdapterFormatError, AdapterTooLarge, UnsafeFormat

KEY_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.")


@dataclass(frozen=True)
class Limits:
    """Limits on a file. All were chosen: far above every good file known, and cheap to check."""

    file: int = 2**30  # bytes
    header: int = 4 * 2**20  # bytes
    metadata: int = 64 * 2**10  # characters, keys and values
    tensors: int = 4096
    key: int = 256  # characters of a tensor's name
    key_characters: frozenset[str] | None = KEY_CHARACTERS  # None: any
    brackets: int = 100_000  # lists and tables, counting those in strings; a million would take seconds
    empty: bool = False  # whether a tensor may have no elements


ADAPTER = Limits()
CHECKPOINT = Limits(
    file=2**40, header=2**26, metadata=2**26, tensors=2**20, key=2**20, key_characters=None, brackets=2**26, empty=True
)
MAX_EXTENT = 2**40  # of a dimension or an offset; chosen

# Training logs, settings and pictures that other tools put into good files, often beyond the limit. They are never read.
BULK = frozenset(
    (
        *("ss_tag_frequency", "ss_bucket_info", "ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs"),
        *("modelspec.thumbnail", "sd_merge_models", "sd_merge_recipe"),
        *("ot_config", "prompt", "workflow"),
    )
)
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


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]  # without BULK
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
        raise AdapterFormatError(f"not a safetensors file (header length {length}, file {size} bytes)", path)
    if length < 2:
        raise AdapterFormatError(f"header length {length}: not a safetensors file", path)
    if size > limits.file:
        raise AdapterTooLarge(f"{size} bytes; allowed: {limits.file}", path)
    if 8 + length > size:
        raise AdapterFormatError(f"header length {length} is more than the file has ({size} bytes); download it again", path)
    content = parse_json(first[8:] + exactly(handle, length - 1, path), path, brackets=limits.brackets)
    metadata = _metadata(content.pop("__metadata__", {}), path, limits)
    if len(content) > limits.tensors:
        raise AdapterTooLarge(f"{len(content)} tensors; allowed: {limits.tensors}", path)
    tensors = {_key(key, path, limits): _entry(key, value, path, limits) for key, value in content.items()}
    end = 0
    for key, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != end:
            raise AdapterFormatError(f"{'overlap' if entry.start < end else 'hole'} before {key}, at byte {entry.start}", path)
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

    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a duplicate key")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is not JSON")

    found = content.count(b"[") + content.count(b"{")
    if found > brackets:
        raise AdapterTooLarge(f"{found} lists and tables in its JSON; allowed: {brackets}", path)
    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else ascii(str(error))[1:120].rstrip("'")
        raise AdapterFormatError(f"JSON that cannot be read: {reason}", path) from None
    if not isinstance(parsed, dict):
        raise AdapterFormatError("JSON that is not an object", path)
    return parsed


def _metadata(metadata: Any, path: Path, limits: Limits) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFormatError("__metadata__ is not a table of strings", path)
    small = {key: value for key, value in metadata.items() if key not in BULK}
    size = sum(len(key) + len(value) for key, value in small.items())
    if size > limits.metadata:
        raise AdapterTooLarge(f"{size} characters of metadata; allowed: {limits.metadata}", path)
    return small


def _key(key: str, path: Path, limits: Limits) -> str:
    characters = limits.key_characters
    if not 0 < len(key) <= limits.key or (characters is not None and not characters.issuperset(key)):
        raise AdapterFormatError(f"tensor name {ascii(key[:60])}; allowed: A-Z a-z 0-9 _ . up to {limits.key}", path)
    return key


def _entry(key: str, value: Any, path: Path, limits: Limits) -> Entry:
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
