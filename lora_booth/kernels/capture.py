"""Record forward and backward pass once as a CUDA graph and replay it: one launch in place of thousands.

A step's inputs are copied into the fixed buffers of the recording for their shapes, and the recorded kernels run again. A
step that cannot be recorded runs as usual, and the run reports why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.base_model import BaseModel
from ..config import LoraSpec
from ..errors import reason_of
from .lean import has_hooks

WARM_UPS = 3  # passes before a recording, for one-time set-up in cuDNN, cuBLAS and autograd; as in PyTorch's documentation


def obstacle(base: BaseModel, lora: LoraSpec) -> str | None:
    """Why the step cannot be recorded on a CUDA GPU; None if it can. Ask before the adapter is injected: its own hook is no
    obstacle."""
    obstacles = {
        "text encoders are trained, and their tokenizer runs on the host": lora.text_encoder,
        "dropout draws from a generator that is reseeded for every step": lora.dropout > 0,
        "the U-Net has hooks, which a replay would not call": any(map(has_hooks, base.shell.unet.modules())),
    }
    return next((reason for reason, present in obstacles.items() if present), None)


def leaves(value: Any) -> Iterator[Any]:
    """The tensors and plain values in a tree of dataclasses, in a fixed order; not the prompts, which the text encodes."""
    if not is_dataclass(value):
        yield value
        return
    for field in fields(value):
        if field.name not in ("prompts", "class_prompts"):
            yield from leaves(getattr(value, field.name))


def tensors_in(value: Any) -> list[Tensor]:
    return [leaf for leaf in leaves(value) if isinstance(leaf, Tensor)]


def layout_of(value: Any) -> tuple[Any, ...]:
    """What a recording depends on: sizes, precisions and plain values."""
    return tuple((leaf.shape, leaf.dtype) if isinstance(leaf, Tensor) else leaf for leaf in leaves(value))


class StepGraph:
    """Calls `work(inputs)`, which adds to `gradient` and returns a loss (); recorded where possible.

    inputs  a dataclass of tensors; each new layout gets a recording
    """

    _recordings: dict[Any, Callable[[Any], Tensor]]  # by layout
    _begun: set[Any]  # layouts
    _pool: Any
    _stream: Any  # of all recordings: in the pool, they share the memory of one stream only

    def __init__(self, work: Callable[[Any], Tensor], gradient: Tensor, *, say: Callable[[str], None]) -> None:
        self.work, self.gradient, self.say = work, gradient, say
        self.on = True
        self.forget()

    def __call__(self, inputs: Any) -> Tensor:
        if not self.on:
            return self.work(inputs)
        layout = layout_of(inputs)
        if layout not in self._begun:  # the gradients of the first pass are checked
            self._begun.add(layout)
            return self.work(inputs)
        if layout not in self._recordings:
            try:
                self._recordings[layout] = self._recorded(copy.deepcopy(inputs))
            except RuntimeError as error:
                reason = reason_of(error)
                self.close()
                self.say(f"the step cannot be recorded ({reason}); continuing without a recording")
                return self.work(inputs)
        return self._recordings[layout](inputs)

    def _recorded(self, buffers: Any) -> Callable[[Any], Tensor]:
        """`work`, replayed on its inputs' copies in `buffers`."""
        before = self.gradient.clone()
        torch.cuda.empty_cache()  # the graph's own pool cannot use memory cached by earlier steps
        try:
            side = self._stream = self._stream or torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.work(buffers)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side):  # whose cuBLAS workspaces exist
                loss = self.work(buffers)
            self._pool = graph.pool()

            def replay(inputs: Any) -> Tensor:
                torch._foreach_copy_(tensors_in(buffers), tensors_in(inputs), non_blocking=True)
                graph.replay()
                return loss.clone()

            return replay
        finally:
            self.gradient.copy_(before)

    @property
    def layouts(self) -> int:
        """How many it has seen."""
        return len(self._begun)

    def forget(self) -> None:
        """Discard the recordings, since the computation changed."""
        self._recordings, self._begun, self._pool, self._stream = {}, set(), None, None

    def close(self) -> None:
        """Discard the recordings and release their memory."""
        had = bool(self._recordings)
        self.forget()
        self.on = False
        if had:
            torch.cuda.empty_cache()
