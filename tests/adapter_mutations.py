"""Good adapter files with something changed at random, and a judge of what loading them does."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch
from good_adapters import PEFT, diffusers_metadata, loha, lokr, lora, lycoris, same, text, unet

from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.checks import MAX_RANK, MAX_SCALE, MAX_VALUE
from lora_booth.errors import AdapterError


def small_file(folder: Path) -> list[bytes]:
    """Good files of 10 to 60 KB: kohya, PEFT with metadata, LoHa and LoKr."""
    q, v = (f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_v"))
    kinds = {q: (loha((16, 16), 2), 2.0, 1.0), v: (lokr((16, 16), 4, rank1=None, rank2=2), 1.0, 0.5)}
    patterns = diffusers_metadata(r=4, lora_alpha=16, alpha_pattern={"to_v": 2}, rank_pattern={"to_k": 8})
    goods = (
        lora("", unet("sd1", 16) | text(width=16), metadata={"ss_v2": "False", "ss_network_dim": "4"}),
        lora("", unet("sd2", 16, kinds="attention projections"), same, PEFT, alphas=(None,), metadata=patterns),
        lycoris("", kinds),
    )
    return [good.write(folder)[0].read_bytes() for good in goods]


# --- ways to change bytes ------------------------------------------------------------------------------------------


def _header_end(content: bytes) -> int:
    return 8 + int.from_bytes(content[:8], "little")


def _place(content: bytes, rng: random.Random) -> int:
    """Half of all changes are in the header, where every byte matters."""
    return rng.randrange(_header_end(content) if rng.random() < 0.5 else len(content))


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
    end = _header_end(content)
    header = json.loads(content[8:end])
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
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + content[end:]


def mixed(content: bytes, rng: random.Random) -> bytes:
    for _ in range(rng.randrange(2, 6)):
        content = rng.choice((bits, byte, spliced, dropped))(content, rng) or b"\0"
        if _header_end(content) > len(content):
            break
    return content


WAYS: tuple[Callable[[bytes, random.Random], bytes], ...] = (bits, byte, cut, longer, spliced, dropped, length, edited, mixed)


def mutants(files: list[bytes], *, count: int, seed: int) -> Iterator[bytes]:
    """The same `count` mutants for the same seed; each is of one file and one way."""
    for i in range(count):
        rng = random.Random(f"{seed} {i}")
        yield WAYS[i % len(WAYS)](rng.choice(files), rng)


# --- what loading them does ----------------------------------------------------------------------------------------


@dataclass
class Judge:
    """Loads one file after the other and counts what happens."""

    path: Path  # where each is written
    loaded: int = 0
    refused: Counter[str] = field(default_factory=Counter)  # by the name of the error
    faults: list[str] = field(default_factory=list)  # any other exception, or a load beyond the limits
    slowest: float = 0.0  # seconds of this process; other work on the machine does not count

    def load(self, content: bytes) -> None:
        self.path.write_bytes(content)
        start = time.process_time()
        try:
            adapter = Adapter.load(self.path)
        except AdapterError as error:
            self.refused[type(error).__name__] += 1
            if not str(error).isprintable():
                self.faults.append(f"not printable: {error!r}")
        except Exception as error:
            self.faults.append(f"{type(error).__name__}: {ascii(str(error))[:200]}")
        else:
            self.loaded += 1
            self.faults += beyond(adapter)
        self.slowest = max(self.slowest, time.process_time() - start)


def beyond(adapter: Adapter) -> Iterator[str]:
    """Where a loaded adapter is outside the limits, found in another way than the loader's."""
    for module, factors in adapter.modules.items():
        values = torch.cat([factors.down.float().flatten(), factors.up.float().flatten()])
        if not torch.isfinite(values).all() or values.abs().max() > MAX_VALUE:
            yield f"{module}: values"
        if not math.isfinite(factors.alpha) or abs(factors.scale) > MAX_SCALE * (1 + 1e-6):
            yield f"{module}: alpha {factors.alpha}"
        if factors.rank > min(MAX_RANK, factors.up.shape[0], factors.down[0].numel()):
            yield f"{module}: rank {factors.rank}"
        if not module.startswith(("unet.", "text_encoder.", "text_encoder_2.")):
            yield f"{module!r}: no module"
    for name, value in vars(adapter.card).items():
        if isinstance(value, str) and not value.isprintable():
            yield f"card: {name}"
