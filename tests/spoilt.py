"""Files that are wrong on purpose: safetensors files built from parts, cut off, or changed at random from a seed."""

from __future__ import annotations

import json
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from safetensors.torch import save
from torch import Tensor

# --- a safetensors file and its parts --------------------------------------------------------------------------------


def taken_apart(content: bytes) -> tuple[dict[str, Any], bytes]:
    """The header, and the tensors' bytes."""
    end = header_end(content)
    return json.loads(content[8:end]), content[end:]


def put_together(header: Any, data: bytes = b"", *, length: int | None = None) -> bytes:
    """header: bytes, or what becomes JSON; length: what the first 8 bytes say, if not the truth."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return (len(text) if length is None else length).to_bytes(8, "little") + text + data


def header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def saved(
    path: Path,
    tensors: dict[str, Tensor],
    metadata: dict[str, str] | None = None,
    *,
    config: dict[str, object] | None = None,
) -> Path:
    """Write a file, or with `config` a folder of PEFT's: what is to be loaded."""
    header, data = taken_apart(save({key: value.clone().contiguous() for key, value in tensors.items()}, metadata))
    text = json.dumps(header | ({"__metadata__": metadata} if metadata else {})).encode()  # whose order changes in each process
    path.write_bytes(put_together(text + b" " * (-len(text) % 8), data))
    if config is None:
        return path
    path.with_name("adapter_config.json").write_text(json.dumps(config))
    return path.parent


# --- bytes of any file -----------------------------------------------------------------------------------------------


def cut_at(content: bytes, percent: int) -> bytes:
    return content[: len(content) * percent // 100]


def flipped(content: bytes, at: int) -> bytes:
    return content[:at] + bytes([content[at] ^ 0xFF]) + content[at + 1 :]


# --- a good safetensors file with something changed at random ----------------------------------------------------------


def _place(content: bytes, rng: random.Random) -> int:
    """Half of all changes are in the header, where every byte matters."""
    return rng.randrange(min(header_end(content), len(content)) if rng.random() < 0.5 else len(content))


def bits(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 8, 64))):
        changed[_place(content, rng)] ^= 1 << rng.randrange(8)
    return bytes(changed)


def byte(content: bytes, rng: random.Random) -> bytes:
    changed = bytearray(content)
    for _ in range(rng.choice((1, 1, 2, 4, 32))):
        changed[_place(content, rng)] = rng.choice((0, 1, 0x7F, 0x80, 0xFF, *b'"{}[],:0129.\\-eE', rng.randrange(256)))
    return bytes(changed)


def cut(content: bytes, rng: random.Random) -> bytes:
    return content[: rng.choice((_place(content, rng), len(content) - rng.randrange(1, 9)))]


def longer(content: bytes, rng: random.Random) -> bytes:
    return content + rng.randbytes(rng.choice((1, 8, 4096)))


def spliced(content: bytes, rng: random.Random) -> bytes:
    """A piece of the file at another place of it, in addition or instead."""
    start, size, to = _place(content, rng), rng.choice((1, 4, 16, 200)), _place(content, rng)
    return content[:to] + content[start : start + size] + content[to + rng.choice((0, size)) :]


def dropped(content: bytes, rng: random.Random) -> bytes:
    start = _place(content, rng)
    return content[:start] + content[start + rng.choice((1, 2, 16, 300)) :]


def length(content: bytes, rng: random.Random) -> bytes:
    old = int.from_bytes(content[:8], "little")
    new = rng.choice((0, 1, 2, old - 1, old + 1, old + 8, len(content), len(content) - 8, 2**22, 2**32, 2**63, 2**64 - 1))
    return new.to_bytes(8, "little") + content[8:]


def edited(content: bytes, rng: random.Random) -> bytes:
    """The header parsed, one thing in it changed, and written again with its right length."""
    header, data = taken_apart(content)
    names = [name for name in header if name != "__metadata__"]
    name = rng.choice(names)
    odd = rng.choice((0, -1, 1.5, 2**40, 2**63, 10**400, 1e300, None, True, "x", [], {}, [[]]))
    change = rng.randrange(8)
    if change == 0:
        header[name][rng.choice(("dtype", "shape", "data_offsets"))] = odd
    elif change == 1:
        sizes = header[name]["shape"] or [1]
        sizes[rng.randrange(len(sizes))] = odd
        header[name]["shape"] = sizes
    elif change == 2:
        header[name]["data_offsets"][rng.randrange(2)] = odd
    elif change == 3:
        header[name]["dtype"] = rng.choice(("F16", "BF16", "F32", "F64", "I8", "BOOL", "F8_E4M3", "U64", "C64", "f32"))
    elif change == 4:
        other = rng.choice(names)
        header[name], header[other] = header[other], header[name]
    elif change == 5:
        del header[name]
    elif change == 6:
        at = rng.randrange(len(name))
        header[name[:at] + rng.choice(("", ".", "_", "0", "9" * 40, "\x1b", "é", "\n", "lora_")) + name[at + 1 :]] = header.pop(
            name
        )
    else:
        words = header.setdefault("__metadata__", {})
        words[rng.choice((*words, "lora_adapter_metadata", "lora_booth.card"))] = rng.choice(
            ("", "{", "[]", '{"unet.r": 1e9}', '{"family": 3}', "\x1b[2J", "x" * 70_000, "[" * 5000, 5, None)
        )
    return put_together(header, data)


def mixed(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(2, 6)):
        content = rng.choice((bits, byte, spliced, dropped))(content, rng) or b"\0"
        if header_end(content) > len(content):
            break
    return content


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (bits, byte, cut, longer, spliced, dropped, length, edited, mixed)


def mutants(files: list[bytes], *, count: int, seed: int) -> Iterator[bytes]:
    """The same `count` mutants for the same seed; each is of one file and one way."""
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        yield WAYS[i % len(WAYS)](rng.choice(files), rng)
