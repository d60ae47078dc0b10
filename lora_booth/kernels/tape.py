"""A computation on a CPU written down kernel by kernel, to be played again without modules, autograd and their Python.

A step of the toybox makes some 2,000 calls, and a fifth of its time goes into finding out, every time anew, which they are.
Played are the same kernels on the same memory in the same order, so the bits are the same.
"""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from ..base.memory import is_view, tensors_in

UNREAD = "_"  # the name of a result that nobody reads


class CannotRecord(RuntimeError):
    """The computation is another one each time, or has parts that the tape does not see."""


@dataclass(frozen=True)
class Line:
    """One kernel: the names of what it reads and writes."""

    call: str
    reads: tuple[str, ...]
    writes: tuple[str, ...]
    several: bool = False  # results, in a tuple


class Tape(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Runs what is inside as usual and writes it down. Tensors that were there before stay; their values are read anew.

    A tensor is known by its place in memory, as autograd hands the same one over in ever new Python objects.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.lines: list[Line] = []
        self.constants: dict[str, Any] = {}
        self._named: dict[int, dict[Any, str]] = {}  # storage -> layout -> name
        self._ends: dict[int, Any] = {}  # storage -> what tells its end
        self._functions: dict[Any, str] = {}
        self._count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if torch.Tag.data_dependent_output in func.tags:
            raise CannotRecord(f"{func} hands a value to the host")
        given = list(tensors_in((args, list(kwargs.values()))))
        reads = [self._name_of(tensor) for tensor in given]
        words = [self._word(one) for one in args] + [f"{name}={self._word(one)}" for name, one in kwargs.items()]
        out = func(*args, **kwargs)
        if is_view(func) and reads and all(name in self.constants for name in reads):
            return out  # it stays as it is, and is found as a constant when somebody reads it
        several = isinstance(out, tuple | list)
        writes = tuple(self._named_if_new(one) for one in (out if several else [out]))
        if not is_view(func) or set(writes) != {UNREAD}:
            self.lines.append(Line(f"{self._function(func)}({', '.join(words)})", tuple(reads), writes, several))
        return out

    # --- names

    def _next(self, kind: str) -> str:
        self._count += 1
        return f"{kind}{self._count}"

    def _keep(self, value: Any, kind: str) -> str:
        name = self._next(kind)
        self.constants[name] = value
        return name

    def _function(self, func: Any) -> str:
        if func not in self._functions:
            self._functions[func] = self._keep(func, "f")
        return self._functions[func]

    def _named_if_new(self, made: Any) -> str:
        """A result's name; none where it is another look at what has one."""
        if not isinstance(made, Tensor) or layout_of_tensor(made) in self._named.get(made.untyped_storage()._cdata, {}):
            return UNREAD
        return self._new_name(made)

    def _new_name(self, tensor: Tensor) -> str:
        name = self._next("v")
        self._register(tensor, name)
        return name

    def _constant(self, tensor: Tensor) -> str:
        name = self._keep(tensor.detach(), "k")
        self._register(tensor, name)
        return name

    def _register(self, tensor: Tensor, name: str) -> None:
        storage = tensor.untyped_storage()
        key = storage._cdata
        if key not in self._named:

            def gone(_: object) -> None:
                self._named.pop(key, None)
                self._ends.pop(key, None)

            self._named[key], self._ends[key] = {}, weakref.ref(storage, gone)
        self._named[key][layout_of_tensor(tensor)] = name

    def _name_of(self, tensor: Tensor) -> str:
        names = self._named.get(tensor.untyped_storage()._cdata)
        if names is None:
            return self._constant(tensor)
        layout = layout_of_tensor(tensor)
        if layout not in names:  # somebody looks at it in a way that no kernel has made
            beside = next((name for other, name in names.items() if other[0] == layout[0]), None)
            if beside is None:
                raise CannotRecord(f"a tensor of {tensor.dtype} in the memory of another precision")
            if beside in self.constants:
                return self._constant(tensor)
            _, offset, size, stride = layout
            name = self._new_name(tensor)
            call = f"{self._function(torch.as_strided)}({beside}, {list(size)}, {list(stride)}, {offset})"
            self.lines.append(Line(call, (beside,), (name,)))
        return names[layout]

    def _word(self, value: Any) -> str:
        """An argument as Python would write it."""
        if isinstance(value, Tensor):
            return self._name_of(value)
        if isinstance(value, list | tuple):
            return "[" + ", ".join(map(self._word, value)) + "]"
        if isinstance(value, torch.UntypedStorage | torch.TypedStorage):
            raise CannotRecord("a tensor is given another memory")
        if value is None or isinstance(value, bool | int | str) or (isinstance(value, float) and math.isfinite(value)):
            return repr(value)
        return self._keep(value, "c")

    # --- the end

    def player(self, result: Tensor) -> Callable[[], Tensor]:
        """What does the same again and returns the successor of `result`."""
        wanted = self._name_of(result)
        body = ["def play():"]
        last = {name: i for i, line in enumerate(self.lines) for name in (*line.writes, *line.reads)}
        last[wanted] = len(self.lines)
        read = {name for line in self.lines for name in line.reads} | {wanted}
        for i, line in enumerate(self.lines):
            names = [name if name in read else UNREAD for name in line.writes]
            left = f"[{', '.join(names)}] = " if line.several else f"{names[0]} = "
            body.append(f" {left if set(names) != {UNREAD} else ''}{line.call}")
            done = sorted({name for name in (*line.reads, *line.writes) if last[name] == i} & read - self.constants.keys())
            if done:
                body.append(f" {' = '.join(done)} = None")
        body.append(f" return {wanted}")
        space = dict(self.constants)
        exec(compile("\n".join(body), "<tape>", "exec"), space)  # noqa: S102  # what stands above
        played: Callable[[], Tensor] = torch.no_grad()(space["play"])
        return played


def layout_of_tensor(tensor: Tensor) -> tuple[torch.dtype, int, tuple[int, ...], tuple[int, ...]]:
    return tensor.dtype, int(tensor.storage_offset()), tuple(tensor.shape), tensor.stride()
