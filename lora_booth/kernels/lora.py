"""The adapter under training: its factors in one tensor, and the linear layers that compute with them.

With all factors in one tensor, and their gradients in another, clearing, clipping, updating and summing over processes take
one kernel each, however many layers there are. Layers in half precision read one copy of the factors, made for each pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ..base.quantization import state_of, unpacked
from . import dispatch

APART = 64  # values; each factor begins at a multiple of this; chosen: kernels read 16 bytes at a time


@dataclass(frozen=True)
class LoraPiece:
    """One layer: W x + b + scale B A x. Gradients of A and B are added in place, in float32, never returned.

    With S adapters at once, A, B and their gradients have one more dimension in front, S.
    """

    weight: Tensor  # (outs, ins), or packed
    bias: Tensor | None
    packing: Any  # state of a quantized weight; None: not quantized
    down: Tensor  # A, (rank, ins), in the precision of the input
    up: Tensor  # B, (outs, rank)
    scale: float
    down_gradient: Tensor
    up_gradient: Tensor
    trigger: Tensor  # requires a gradient, so that autograd runs the backward pass


@dataclass(frozen=True, eq=False)
class Views:
    """What layers read of one adapter's factors, or of several adapters' at once, and the gradients that they add to."""

    cast: Tensor  # (n,), or (S, n)
    gradient: Tensor  # the same shape, float32
    parts: dict[nn.Parameter, tuple[Tensor, Tensor]]  # of `cast` and `gradient`, in the parameter's shape, or (S, ...)


class FlatFactors:
    """The factors of the adapter under training: `parameters` (float32, on one device) become views of one long tensor, and
    their gradients of another.

    values    (n,) float32; `.grad` is never None
    cast      a copy of the values in `dtype`, made by `refresh`; the values themselves if `dtype` is float32
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        self._places: list[tuple[int, torch.Size]] = []
        end = 0
        for parameter in parameters:
            self._places.append((end, parameter.shape))
            end += -(-parameter.numel() // APART) * APART
        device = parameters[0].device
        self.values = nn.Parameter(torch.zeros(end, dtype=torch.float32, device=device))
        self.values.grad = torch.zeros_like(self.values)
        self.cast = self.values.data.to(dtype)
        tensors = (self.values.data, self.values.grad)
        for parameter, value, gradient in zip(parameters, *map(self.parts_of, tensors), strict=True):
            value.copy_(parameter.data)
            parameter.data, parameter.grad = value, gradient
        self._parameters = list(parameters)
        self._one = self._read = self._views_of(self.cast, self.values.grad)
        self._stacks: dict[int, Views] = {}  # for so many adapters at once

    def _views_of(self, cast: Tensor, gradient: Tensor) -> Views:
        pairs = zip(self.parts_of(cast), self.parts_of(gradient), strict=True)
        return Views(cast, gradient, dict(zip(self._parameters, pairs, strict=True)))

    def parts_of(self, tensor: Tensor) -> list[Tensor]:
        """A tensor like `values`, or several stacked -> views of it, one for each parameter, in its shape."""
        return [tensor[..., start : start + shape.numel()].view(*tensor.shape[:-1], *shape) for start, shape in self._places]

    @contextmanager
    def lent(self, adapters: Sequence[FlatFactors]) -> Iterator[None]:
        """Within the context the layers compute with these adapters, which are shaped like this one: each with its part of
        the rows of x, all parts alike, in this order. Afterwards each has the gradients of that added to its own."""
        if len(adapters) == 1:
            self.values.data.copy_(adapters[0].values.data)
            self.gradient.zero_()
            yield
            adapters[0].gradient.add_(self.gradient)
            return
        count = len(adapters)
        if count not in self._stacks:
            cast = self.cast.new_empty(count, *self.cast.shape)
            self._stacks[count] = self._views_of(cast, torch.zeros_like(cast, dtype=torch.float32))
        self._read = stack = self._stacks[count]
        try:
            for row, adapter in zip(stack.cast, adapters, strict=True):
                row.copy_(adapter.values.data)
            stack.gradient.zero_()
            yield
            for gradient, adapter in zip(stack.gradient, adapters, strict=True):
                adapter.gradient.add_(gradient)
        finally:
            self._read = self._one

    @property
    def several(self) -> bool:
        """Whether the layers compute with several adapters now."""
        return self._read is not self._one

    def split(self, count: int) -> list[nn.Parameter]:
        """The first `count` factors and the rest: two parameters that are views of the values, as their gradients are."""
        parts = []
        for part in (slice(None, self._places[count][0]), slice(self._places[count][0], None)):
            parts.append(nn.Parameter(self.values.data[part]))
            parts[-1].grad = self.gradient[part]
        return parts

    @property
    def gradient(self) -> Tensor:
        assert self.values.grad is not None
        return self.values.grad

    def refresh(self) -> None:
        """Make the layers' copy of the values equal to them. Call it before each forward pass, but not for `lent` values."""
        if self.cast.dtype != torch.float32:
            self.cast.copy_(self.values.data)

    def piece_of(self, layer: Any, x: Tensor) -> LoraPiece | None:
        """This PEFT layer's piece; None where its current setting or x's precision rules it out."""
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if layer.disable_adapters or layer.merged or len(names) != 1:
            return None
        (name,), base = names, layer.base_layer
        trigger, other = layer.lora_A[name].weight, layer.lora_B[name].weight
        parts, packing = self._read.parts, state_of(base)
        if trigger not in parts or other not in parts:
            return None
        (down, down_gradient), (up, up_gradient) = parts[trigger], parts[other]
        if down.dtype != x.dtype or packing is not None and packing.dtype != down.dtype:
            return None
        scale = layer.scaling[name]
        return LoraPiece(base.weight, base.bias, packing, down, up, scale, down_gradient, up_gradient, trigger)


class LoraLinears(Function):
    """Up to three layers with the same input (query, key, value). Saves x, and `rank` numbers per token and layer.

    x (..., ins) -> (..., outs) of each piece. With S adapters at once, each has an S-th of the first dimension of x
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Tensor, pieces: Sequence[LoraPiece]) -> tuple[Tensor, ...]:
        rows = rows_of(x, pieces)
        ctx.fused = fusible(rows, pieces)
        weights = [unpacked(piece.weight, piece.packing) for piece in pieces]
        work = dispatch.lora_linear if ctx.fused else plain_forward
        results, low = work(rows, weights, pieces)
        ctx.save_for_backward(x, *low)
        ctx.pieces = pieces
        return tuple(result.view(*x.shape[:-1], -1) for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *low = ctx.saved_tensors
        weights = [unpacked(piece.weight, piece.packing) for piece in ctx.pieces]
        rows = rows_of(x, ctx.pieces)
        flat = [rows_of(gradient, ctx.pieces) for gradient in gradients]
        work = dispatch.lora_linear_backward if ctx.fused else plain_backward
        for_x = work(flat, rows, low, weights, ctx.pieces, for_input=ctx.needs_input_grad[0])
        return None if for_x is None else for_x.view(x.shape), None, None


def rows_of(x: Tensor, pieces: Sequence[LoraPiece]) -> Tensor:
    """(..., C) -> (rows, C), or (S, rows of each, C) with S adapters at once"""
    return x.reshape(*pieces[0].down.shape[:-2], -1, x.shape[-1]).contiguous()


def fusible(rows: Tensor, pieces: Sequence[LoraPiece]) -> bool:
    """Whether the Triton kernel supports them: one adapter in half precision, and layers of one shape with aligned rows."""
    if rows.dim() > 2 or not rows.is_cuda or rows.dtype not in (torch.float16, torch.bfloat16):
        return False
    shapes = {(piece.down.shape, piece.up.shape, piece.bias is None) for piece in pieces}
    (rank, ins), outs = pieces[0].down.shape, len(pieces[0].up)
    aligned = ins % 8 == 0 and outs % 8 == 0 and rank % 4 == 0
    return len(shapes) == 1 and aligned and dispatch.works_on(rows.device, dispatch.OLDEST_FOR_PRODUCTS)


def plain_forward(x: Tensor, weights: Sequence[Tensor], pieces: Sequence[LoraPiece]) -> tuple[list[Tensor], list[Tensor]]:
    """Like `dispatch.lora_linear`; with several adapters each product is one batched product."""
    results, low = [], []
    for weight, piece in zip(weights, pieces, strict=True):
        low.append(x @ piece.down.mT)
        results.append(F.linear(x, weight, piece.bias))
        add_product(results[-1], low[-1], piece.up.mT, piece.scale)
    return results, low


def plain_backward(
    gradients: Sequence[Tensor], x: Tensor, low: Sequence[Tensor], weights: Sequence[Tensor], pieces: Sequence[LoraPiece], *,
    for_input: bool,
) -> Tensor | None:  # fmt: skip
    """Like `dispatch.lora_linear_backward`."""
    for_x: Tensor | None = None
    for gradient, one, weight, piece in zip(gradients, low, weights, pieces, strict=True):
        back = gradient @ piece.up
        add_product(piece.down_gradient, back.mT, x, piece.scale)
        add_product(piece.up_gradient.mT, one.mT, gradient, piece.scale)
        if for_input:
            through = gradient @ weight
            for_x = through if for_x is None else for_x.add_(through)
            add_product(for_x, back, piece.down, piece.scale)
    return for_x


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """total += scale a b, where the factors may have half the precision of `total`."""
    if a.dtype != total.dtype:
        total.add_(a @ b, alpha=scale)
    elif total.dim() == 2:
        total.addmm_(a, b, alpha=scale)
    else:
        total.baddbmm_(a, b, alpha=scale)
