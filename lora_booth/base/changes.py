"""Changes of a model that last as long as a context."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from typing import Any

from torch import nn


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
