"""Changes of a model that last as long as a context: by one thread at a time, and undone for certain."""

from __future__ import annotations

import math
import threading
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any
from weakref import WeakKeyDictionary

from torch import nn

from ..errors import SettingsError


@contextmanager
def undone(*steps: Callable[[], object]) -> Iterator[None]:
    """Undo by these steps on leaving, twice: the second time finishes what an interrupt cut short.

    Name every change before you make it; a step that finds nothing to undo does nothing.
    """
    try:
        try:
            yield
        finally:
            for step in reversed(steps):
                step()
    finally:
        for step in reversed(steps):
            step()


@dataclass(eq=False)
class Claim:
    thread: int
    training: bool
    granted: bool = False


CLAIMS: WeakKeyDictionary[nn.Module, list[Claim]] = WeakKeyDictionary()  # in the order in which they were made
PATIENCE = 20.0  # seconds until a thread that waits says so: chosen
POLLING = 0.01  # seconds; a lock would stay locked where an interrupt comes between a `with` block's end and its `__exit__`


@contextmanager
def claimed(unet: nn.Module, *, training: bool = False) -> Iterator[None]:
    """Within the context no other thread draws with this U-Net's pipeline or changes it: it waits for its turn.

    Raises SettingsError while another thread trains on it, which may take hours. Warns while it waits for long: a thread that
    waits for its workers within `attached` would wait for ever if they draw with the same base.
    """
    mine, warn_at = Claim(threading.get_ident(), training), time.monotonic() + PATIENCE
    claims = CLAIMS.setdefault(getattr(unet, "_orig_mod", unet), [])  # the one inside torch.compile

    def release() -> None:
        if mine in claims:
            claims.remove(mine)

    with undone(release):
        claims.append(mine)
        while not mine.granted:
            granted = [claim for claim in list(claims) if claim.granted]
            if any(claim.training and claim.thread != mine.thread for claim in granted):
                raise SettingsError("another thread is training on this base; wait until it is done, or load a second base")
            mine.granted = granted[0].thread == mine.thread if granted else claims[0] is mine
            if not mine.granted:
                if time.monotonic() > warn_at:
                    warnings.warn(
                        "still waiting for another thread that uses this base; load a second base to use both", stacklevel=2
                    )
                    warn_at = math.inf
                time.sleep(POLLING)
        yield


@contextmanager
def hooked(hooks: Sequence[tuple[nn.Module, Callable[..., Any]]]) -> Iterator[None]:
    """Modules with these forward hooks."""
    with undone(*(partial(unhook, module, hook) for module, hook in hooks)):
        for module, hook in hooks:
            module.register_forward_hook(hook)
        yield


def unhook(module: nn.Module, hook: Callable[..., Any]) -> None:
    for key in [key for key, other in module._forward_hooks.items() if other == hook]:
        del module._forward_hooks[key]
