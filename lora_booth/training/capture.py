"""Forward and backward pass as one CUDA graph: the GPU is handed a whole step at once, not its thousands of kernels one by one.

Shapes are the same in every step, so a step's inputs are copied into buffers that stay, and the recorded kernels are
played again. What cannot be recorded is computed in the usual way, and the reason is told.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, is_dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..base_model import BaseModel
from ..config import LoraSpec, TrainingConfig
from ..errors import SettingsError, first_line

WARM_UPS = 3  # passes before a recording, in which cuDNN, cuBLAS and autograd make what they make only once


def obstacle(base: BaseModel, lora: LoraSpec, config: TrainingConfig) -> str | None:
    """Why the step cannot be one CUDA graph; None: it can."""
    if base.device.type != "cuda":
        return f"the base is on {base.device.type}"
    if lora.text_encoder:
        return "text encoders are trained: their tokenizer works on the host"
    if lora.dropout:
        return "dropout draws from a generator that is seeded anew for every step"
    if config.compile:
        return "compile=True"
    if any(m._forward_hooks or m._forward_pre_hooks or m._backward_hooks for m in base.unet.modules()):
        return "the U-Net has hooks, which would be called once only"
    return None


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a tree of dataclasses, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name))]
    return []


def copied(value: Any) -> Any:
    """The tree with every tensor copied."""
    if isinstance(value, Tensor):
        return value.clone()
    if is_dataclass(value) and not isinstance(value, type):
        return replace(value, **{field.name: copied(getattr(value, field.name)) for field in fields(value)})
    return value


def layout_of(value: Any, *, apart: Sequence[str] = ("prompts",)) -> Any:
    """What a recording depends on: sizes, precisions and plain values, but for the words."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if is_dataclass(value):
        return tuple(layout_of(getattr(value, field.name)) for field in fields(value) if field.name not in apart)
    return value


@dataclass
class Recording:
    inputs: Any  # the buffers that it reads
    graph: Any
    loss: Tensor  # the buffer that it writes

    def play(self, inputs: Any) -> Tensor:
        fill(self.inputs, inputs)
        self.graph.replay()
        return self.loss.clone()


def fill(buffers: Any, inputs: Any) -> None:
    torch._foreach_copy_(tensors_of(buffers), tensors_of(inputs), non_blocking=True)


class StepGraph:
    """Calls `work(inputs)`, which adds to `gradient` and returns a loss (); recorded where that is possible.

    inputs  a dataclass of tensors; for each new layout there is one recording
    """

    def __init__(
        self,
        work: Callable[[Any], Tensor],
        gradient: Tensor,
        *,
        reason: str | None,
        wanted: str = "auto",
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        if wanted == "on" and reason is not None:
            raise SettingsError(f'capture="on" is not possible: {reason}; use capture="auto"')
        self.work, self.gradient, self.say = work, gradient, say
        self.on = wanted != "off" and reason is None
        self._recordings: dict[Any, Recording] = {}
        self._begun: set[Any] = set()
        self._pool: Any = None

    def __call__(self, inputs: Any) -> Tensor:
        if not self.on:
            return self.work(inputs)
        layout = layout_of(inputs)
        if layout not in self._begun:  # the first pass is looked at: by the check of the gradients
            self._begun.add(layout)
            return self.work(inputs)
        if layout not in self._recordings:
            try:
                self._recordings[layout] = self._record(inputs)
            except RuntimeError as error:
                reason = first_line(error)
                self.close()
                self.say(f"the step is not recorded as a CUDA graph ({reason}); going on without")
                return self.work(inputs)
        return self._recordings[layout].play(inputs)

    def _record(self, inputs: Any) -> Recording:
        buffers = copied(inputs)
        kept = self.gradient.clone()
        torch.cuda.empty_cache()  # what the step before has left lies where the warm-up does not look
        try:
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
            side.wait_stream(torch.cuda.current_stream())
            with torch.cuda.stream(side):
                for _ in range(WARM_UPS):
                    self.work(buffers)
            torch.cuda.current_stream().wait_stream(side)
            graph = torch.cuda.CUDAGraph()
            with torch.cuda.graph(graph, pool=self._pool, stream=side):  # whose workspaces for products are there
                loss = self.work(buffers)
            self._pool = graph.pool()
            return Recording(buffers, graph, loss)
        finally:
            self.gradient.copy_(kept)

    def forget(self) -> None:
        """The gradients or the way of computing have changed: record anew."""
        self._recordings, self._begun, self._pool = {}, set(), None

    def close(self) -> None:
        """Give the memory back."""
        had = bool(self._recordings)
        self.forget()
        self.on = False
        if had:
            torch.cuda.empty_cache()
