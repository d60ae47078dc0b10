"""Record forward and backward pass once as a CUDA graph and replay it: one launch in place of thousands.

Shapes are the same in every step, so its inputs are copied into fixed buffers and the recorded kernels run again. A step
that cannot be recorded runs as usual, and the run reports why.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor

from ..base.base_model import BaseModel
from ..config import LoraSpec, TrainingConfig
from ..errors import SettingsError, reason_of, setting
from .lean import watched

WARM_UPS = 3  # passes before a recording, for one-time set-up in cuDNN, cuBLAS and autograd; as in PyTorch's documentation


def can_capture(base: BaseModel, lora: LoraSpec, config: TrainingConfig) -> bool:
    """Whether to record the step. Raises SettingsError if `capture="on"` is impossible."""
    reason = obstacle(base, lora, config)
    if config.capture == "on" and reason is not None:
        raise SettingsError(f"{setting('capture', 'on')} is not possible: {reason}; use {setting('capture', 'auto')}")
    return config.capture != "off" and reason is None


def obstacle(base: BaseModel, lora: LoraSpec, config: TrainingConfig) -> str | None:
    """Why the step cannot be recorded; None if it can."""
    if base.device.type != "cuda":
        return f"the base is on {base.device.type}"
    if lora.text_encoder:
        return "text encoders are trained, and their tokenizer runs on the host"
    if lora.dropout:
        return "dropout draws from a generator that is reseeded for every step"
    if config.compile:
        return "compile=True"
    if any(watched(module) for module in base.unet.modules()):
        return "the U-Net has hooks, which a replay would not call"
    return None


def tensors_of(value: Any) -> list[Tensor]:
    """All tensors of a tree of dataclasses, in a fixed order."""
    if isinstance(value, Tensor):
        return [value]
    if is_dataclass(value):
        return [tensor for field in fields(value) for tensor in tensors_of(getattr(value, field.name))]
    return []


def layout_of(value: Any) -> Any:
    """What a recording depends on: sizes, precisions and plain values, but not the prompts."""
    if isinstance(value, Tensor):
        return tuple(value.shape), value.dtype
    if is_dataclass(value):
        return tuple(layout_of(getattr(value, field.name)) for field in fields(value) if field.name != "prompts")
    return value


def fill(buffers: Any, inputs: Any) -> None:
    torch._foreach_copy_(tensors_of(buffers), tensors_of(inputs), non_blocking=True)


class StepGraph:
    """Calls `work(inputs)`, which adds to `gradient` and returns a loss (); recorded where possible.

    inputs  a dataclass of tensors; each new layout gets a recording
    """

    def __init__(
        self,
        work: Callable[[Any], Tensor],
        gradient: Tensor,
        *,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.work, self.gradient, self.say = work, gradient, say
        self.on = True
        self._recordings: dict[Any, Callable[[Any], Tensor]] = {}
        self._begun: set[Any] = set()
        self._pool: Any = None

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
            side = torch.cuda.Stream()  # type: ignore[no-untyped-call]
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
                fill(buffers, inputs)
                graph.replay()
                return loss.clone()

            return replay
        finally:
            self.gradient.copy_(before)

    def forget(self) -> None:
        """Discard the recordings, since the computation changed."""
        self._recordings, self._begun, self._pool = {}, set(), None

    def close(self) -> None:
        """Discard the recordings and release their memory."""
        had = bool(self._recordings)
        self.forget()
        self.on = False
        if had:
            torch.cuda.empty_cache()
