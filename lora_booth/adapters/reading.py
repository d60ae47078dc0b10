"""Adapter files from strangers: everything is checked, under limits of our own, before anyone gets a tensor."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, NamedTuple

import torch
from torch import Tensor

from ..errors import (
    AdapterBaseMismatch,
    AdapterDtypeError,
    AdapterError,
    AdapterFormatError,
    AdapterIncomplete,
    AdapterNonFinite,
    AdapterScaleError,
    AdapterTargetError,
    AdapterTooLarge,
    UnsafeFormat,
)
from ..family import labels
from .adapter import Adapter, LoraFactors
from .header import PEFT_KEY, card_from
from .layouts import Role, component_of, understood

MAX_FILE = 2**30  # bytes
MAX_HEADER = 4 * 2**20  # bytes
MAX_METADATA = 64 * 2**10  # characters, keys and values
MAX_TENSORS = 4096
MAX_RANK = 512
MAX_SCALE = 16.0  # of alpha / rank
MAX_VALUE = 1e4  # of a factor's elements
MAX_KEY = 256  # characters
MAX_CONFIG = 2**20  # bytes of adapter_config.json

# Training logs and pictures that kohya's tools put into good files, often more than MAX_METADATA. We never read them.
BULK = frozenset(
    ("ss_tag_frequency", "ss_bucket_info", "ss_datasets", "ss_dataset_dirs", "ss_reg_dataset_dirs", "modelspec.thumbnail")
)
KEY_CHARACTERS = frozenset("ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789_.")
PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
SGM_KEYS = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
ITEM_SIZE = {
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 1),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 2),
    **dict.fromkeys(("U32", "I32", "F32"), 4),
    **dict.fromkeys(("U64", "I64", "F64"), 8),
}
FACTOR_DTYPES = {"F16": torch.float16, "BF16": torch.bfloat16, "F32": torch.float32}
ALPHA_DTYPES = {**FACTOR_DTYPES, "F64": torch.float64, "I64": torch.int64, "I32": torch.int32}  # some tools save alpha as int


class Entry(NamedTuple):
    """One tensor in the header."""

    dtype: str
    shape: tuple[int, ...]
    start: int  # bytes after the header
    end: int


@dataclass(frozen=True)
class Header:
    tensors: Mapping[str, Entry]
    metadata: Mapping[str, str]
    data_start: int  # bytes


def load(path: Path, *, allow: Collection[str] = (), stem: str | None = None) -> Adapter:
    """The adapter in a file or folder; see `Adapter.load`."""
    file, config = _find(path)
    with _open(file) as handle:
        header = read_header(handle, file)
        named = _named(header, allow, file)
        modules, shapes = {}, {}
        peft = PeftScales(header.metadata.get(PEFT_KEY), config, file)
        for module, keys in sorted(named.items()):
            modules[module] = _read_module(module, keys, header, handle, peft, file)
            shapes[module] = tuple(modules[module].down.shape)
    sgm = any(key.startswith(SGM_KEYS) for key in header.tensors)
    return Adapter(modules, card_from(header.metadata, shapes, sgm=sgm), file.stem if stem is None else stem)


def _find(path: Path) -> tuple[Path, Path | None]:
    """The tensors' file, and a PEFT folder's configuration."""
    if not path.is_dir():
        return path, None
    for name in FOLDER_FILES:
        if (path / name).exists():
            config = path / "adapter_config.json"
            return path / name, config if name == FOLDER_FILES[0] and config.exists() else None
    if any(child.suffix in PICKLE_SUFFIXES for child in path.iterdir()):
        raise UnsafeFormat("only pickles in this folder, and those could run their code; ask for a .safetensors file", path)
    raise AdapterError(f"no {' or '.join(FOLDER_FILES)} in this folder; name the adapter's file", path)


def _open(path: Path) -> BinaryIO:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsafeFormat(f"a {path.suffix} file is a pickle and could run its code; ask for a .safetensors file", path)
    try:  # not blocking: a named pipe would never answer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENXIO, errno.ENODEV):  # a socket or a dead device
            raise AdapterFormatError("not a regular file", path) from None
        reason = error.strerror if isinstance(error, OSError) else error
        raise AdapterError(f"cannot be opened: {reason}; check the name", path) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterFormatError("not a regular file", path)
    return os.fdopen(descriptor, "rb")


def read_header(handle: BinaryIO, path: Path) -> Header:
    """Parse and check the header; the handle stays open for the tensors."""
    size = os.fstat(handle.fileno()).st_size
    first = _exactly(handle, min(size, 9), path)
    length = int.from_bytes(first[:8], "little")
    if length > MAX_HEADER or first[8:] != b"{":
        if first[:2] == b"PK" or first[:1] == b"\x80":  # a header's length can begin so too, but not with that size or text
            raise UnsafeFormat("a pickle under another name; it could run its code; ask for a .safetensors file", path)
        if size >= 9 and first[8:] == b"{" and 8 + length <= size:
            raise AdapterTooLarge(f"its header has {length} bytes; allowed: {MAX_HEADER}", path)
        raise AdapterFormatError(f"not a safetensors file (header length {length}, file {size} bytes)", path)
    if size > MAX_FILE:
        raise AdapterTooLarge(f"{size} bytes; allowed: {MAX_FILE}", path)
    if 8 + length > size:
        raise AdapterFormatError(f"header length {length} is more than the file has ({size} bytes); download it again", path)
    content = _json(first[8:] + _exactly(handle, length - 1, path), path)
    metadata = _metadata(content.pop("__metadata__", {}), path)
    if len(content) > MAX_TENSORS:
        raise AdapterTooLarge(f"{len(content)} tensors; allowed: {MAX_TENSORS}", path)
    tensors = {_key(key, path): _entry(key, value, path) for key, value in content.items()}
    end = 0
    for key, entry in sorted(tensors.items(), key=lambda item: item[1].start):
        if entry.start != end:
            raise AdapterFormatError(f"{'overlap' if entry.start < end else 'hole'} before {key}, at byte {entry.start}", path)
        end = entry.end
    if 8 + length + end != size:
        what = "trailing bytes" if 8 + length + end < size else "tensors cut off"
        raise AdapterFormatError(f"{what}: {8 + length + end} bytes described, the file has {size}; download it again", path)
    return Header(tensors, metadata, 8 + length)


def _exactly(handle: BinaryIO, count: int, path: Path) -> bytes:
    content = handle.read(count)
    if len(content) != count:
        raise AdapterFormatError("shorter than its header says; download it again", path)
    return content


def _json(content: bytes, path: Path) -> dict[str, Any]:
    def once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key twice")
        return result

    def refuse(constant: str) -> None:
        raise ValueError(f"{constant} is no JSON")

    try:
        parsed = json.loads(content.decode("utf-8"), object_pairs_hook=once, parse_constant=refuse)
    except (ValueError, RecursionError) as error:
        reason = "nested too deeply" if isinstance(error, RecursionError) else ascii(str(error))[1:120].rstrip("'")
        raise AdapterFormatError(f"JSON that cannot be read: {reason}", path) from None
    if not isinstance(parsed, dict):
        raise AdapterFormatError("JSON that is not an object", path)
    return parsed


def _metadata(metadata: Any, path: Path) -> dict[str, str]:
    if not isinstance(metadata, dict) or not all(isinstance(value, str) for value in metadata.values()):
        raise AdapterFormatError("__metadata__ is not a table of strings", path)
    kept = {key: value for key, value in metadata.items() if key not in BULK}
    size = sum(len(key) + len(value) for key, value in kept.items())
    if size > MAX_METADATA:
        raise AdapterTooLarge(f"{size} characters of metadata; allowed: {MAX_METADATA}", path)
    return kept


def _key(key: str, path: Path) -> str:
    if not 0 < len(key) <= MAX_KEY or not KEY_CHARACTERS.issuperset(key):
        raise AdapterFormatError(f"tensor name {ascii(key[:60])}; allowed: A-Z a-z 0-9 _ . up to {MAX_KEY}", path)
    return key


def _entry(key: str, value: Any, path: Path) -> Entry:
    if not isinstance(value, dict) or set(value) != {"dtype", "shape", "data_offsets"}:
        raise AdapterFormatError(f"{key}: not a tensor's entry (dtype, shape, data_offsets)", path)
    dtype, shape, offsets = value["dtype"], value["shape"], value["data_offsets"]
    numbers = isinstance(shape, list) and isinstance(offsets, list) and all(type(n) is int and n >= 0 for n in shape + offsets)
    if not isinstance(dtype, str) or not numbers or len(offsets) != 2 or len(shape) > 8:
        raise AdapterFormatError(f"{key}: dtype, shape or data_offsets malformed", path)
    if 0 in shape or any(n > 2**40 for n in shape + offsets):
        raise AdapterFormatError(f"{key}: impossible shape or offsets", path)
    if dtype not in ITEM_SIZE:
        raise AdapterDtypeError(f"{key}: dtype {ascii(dtype[:20])}; allowed: {', '.join(FACTOR_DTYPES)}", path)
    if offsets[1] - offsets[0] != math.prod(shape) * ITEM_SIZE[dtype]:
        raise AdapterFormatError(f"{key}: {dtype} {shape} does not fill bytes {offsets[0]} to {offsets[1]}", path)
    return Entry(dtype, tuple(shape), *offsets)


def _named(header: Header, allow: Collection[str], path: Path) -> dict[str, dict[Role, str]]:
    """Canonical module -> role -> key; every pair whole, every dtype allowed, no rank too large."""
    named: dict[str, dict[Role, str]] = {}
    for key in header.tensors:
        module, role = understood(key, allow=allow, path=path)
        roles = named.setdefault(module, {})
        if role in roles:
            raise AdapterFormatError(f"{key} and {roles[role]} name the same tensor", path)
        roles[role] = key
    if not named:
        raise AdapterBaseMismatch(f"no LoRA tensors in it: not made for {labels()}", path)
    for module, roles in named.items():
        for role, key in roles.items():
            allowed = ALPHA_DTYPES if role == "alpha" else FACTOR_DTYPES
            if header.tensors[key].dtype not in allowed:
                raise AdapterDtypeError(f"{key}: dtype {header.tensors[key].dtype}; allowed: {', '.join(FACTOR_DTYPES)}", path)
        if "down" not in roles or "up" not in roles:
            present = next(iter(roles.values()))
            raise AdapterIncomplete(f"{module} has {present} but no {'up' if 'down' in roles else 'down'} factor", path)
        check_shapes(module, header.tensors[roles["down"]].shape, header.tensors[roles["up"]].shape, path)
        if "alpha" in roles and math.prod(header.tensors[roles["alpha"]].shape) != 1:
            raise AdapterFormatError(f"{roles['alpha']} is not one number", path)
    return named


def check_shapes(module: str, down: tuple[int, ...], up: tuple[int, ...], path: Path | None) -> None:
    """The two factors fit together and the rank is one that an adapter has."""
    fit = len(down) in (2, 4) and len(up) in (2, 4) and down[0] == up[1] and up[2:] in ((), (1, 1))
    # 1x1 convolutions and linear layers are written for each other; a larger kernel needs its own shape
    if not fit or (len(up) != len(down) and down[2:] not in ((), (1, 1))):
        raise AdapterIncomplete(f"{module}: factors {list(down)} and {list(up)} do not fit together", path)
    rank, limit = down[0], min(MAX_RANK, up[0], math.prod(down[1:]))
    if rank > limit:
        raise AdapterTooLarge(f"{module}: rank {rank}; allowed here: {limit}", path)


def check_values(module: str, tensor: Tensor, path: Path | None) -> None:
    low, high = torch.aminmax(tensor)
    if not (low.item() >= -MAX_VALUE and high.item() <= MAX_VALUE):  # NaN compares false
        raise AdapterNonFinite(f"{module}: values from {low.item():g} to {high.item():g}; allowed: +-{MAX_VALUE:g}", path)


def check_scale(module: str, alpha: float, rank: int, path: Path | None) -> None:
    if not math.isfinite(alpha) or abs(alpha / rank) > MAX_SCALE:
        raise AdapterScaleError(f"{module}: alpha {alpha:g} with rank {rank}; allowed: up to {MAX_SCALE:g} x rank", path)


def _read_module(
    module: str, keys: Mapping[Role, str], header: Header, handle: BinaryIO, peft: PeftScales, path: Path
) -> LoraFactors:
    down, up = (_tensor(header, key, handle, path) for key in (keys["down"], keys["up"]))
    if up.ndim != down.ndim:
        up = up.flatten(1) if down.ndim == 2 else up[:, :, None, None]
    rank = down.shape[0]
    if "alpha" in keys:
        alpha = float(_tensor(header, keys["alpha"], handle, path).item())
    else:
        alpha = peft.alpha(module, rank)
    check_scale(module, alpha, rank, path)
    for tensor in (down, up):
        check_values(module, tensor, path)
    return LoraFactors(down, up, alpha)


def _tensor(header: Header, key: str, handle: BinaryIO, path: Path) -> Tensor:
    entry = header.tensors[key]
    content = bytearray(entry.end - entry.start)
    handle.seek(header.data_start + entry.start)
    if handle.readinto(content) != len(content):  # type: ignore[attr-defined]  # of a buffered reader
        raise AdapterFormatError("became shorter while it was read", path)
    return torch.frombuffer(content, dtype=ALPHA_DTYPES[entry.dtype]).reshape(entry.shape)


class PeftScales:
    """Alphas of PEFT files, from the header entry or adapter_config.json. Only these fields are read, as plain text."""

    def __init__(self, entry: str | None, config: Path | None, path: Path) -> None:
        self.path = path
        self.fields: dict[str, Any] = {}
        if entry is not None:
            self.fields = _json(entry.encode("utf-8", "surrogatepass"), path) if entry.isascii() else self._refuse("not ASCII")
        elif config is not None:
            with _open(config) as handle:
                content = handle.read(MAX_CONFIG + 1)
            if len(content) > MAX_CONFIG:
                raise AdapterTooLarge(f"more than {MAX_CONFIG} bytes", config)
            self.fields = _json(content, config)
        for name, value in self.fields.items():
            field = name.rsplit(".", 1)[-1]
            if field in ("r", "rank_pattern"):
                for rank in value.values() if isinstance(value, dict) else [value]:
                    self._check_rank(rank)
            if field == "use_dora" and value is True:
                raise AdapterTargetError("is DoRA; only plain LoRA can be read", path)

    def _refuse(self, reason: str) -> dict[str, Any]:
        raise AdapterFormatError(f"{PEFT_KEY}: {reason}", self.path)

    def _check_rank(self, rank: Any) -> None:
        if not isinstance(rank, int) or isinstance(rank, bool) or rank < 1:
            self._refuse(f"rank {ascii(rank)[:40]}")
        if rank > MAX_RANK:
            raise AdapterTooLarge(f"rank {ascii(rank)[:40]} in its metadata; allowed: {MAX_RANK}", self.path)

    def _field(self, component: str, name: str) -> Any:
        return self.fields.get(f"{component}.{name}", self.fields.get(name))

    def alpha(self, module: str, rank: int) -> float:
        """PEFT's scale for the module, as the alpha of a plain alpha / rank; without any entry alpha = rank."""
        component = component_of(module)
        alpha = self._field(component, "lora_alpha")
        pattern = self._field(component, "alpha_pattern")
        if isinstance(pattern, dict) and pattern:
            parts = module.split(".")[1:]
            # a pattern names a module by its whole path or the end of it; PEFT's ^ marks a whole path
            names = ["^" + ".".join(parts), *(".".join(parts[i:]) for i in range(len(parts)))]
            alpha = next((pattern[name] for name in names if name in pattern), alpha)
        if alpha is None:
            return float(rank)
        if not isinstance(alpha, (int, float)) or isinstance(alpha, bool) or abs(alpha) > 1e300:
            raise AdapterScaleError(f"{module}: alpha {ascii(alpha)[:40]} in its metadata is not a usable number", self.path)
        return float(alpha) * (math.sqrt(rank) if self._field(component, "use_rslora") is True else 1.0)
