"""Load untrusted adapter files one after another: each loads within the limits or is refused by name."""

from __future__ import annotations

import math
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import MAX_RANK, MAX_SCALE, MAX_VALUE
from lora_booth.errors import AdapterError


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
