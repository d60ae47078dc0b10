"""The adapter under training: its factors in one tensor, and the linear layers that compute with them.

With all factors in one tensor, and their gradients in another, clearing, clipping, updating and summing over processes take
one kernel each, however many layers there are. Layers in half precision read one copy of the factors, made for each pass.
"""

from __future__ import annotations

from collections.abc import Sequence
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
    """One layer: W x + b + scale B A x. Gradients of A and B are added in place, in float32, never returned."""

    weight: Tensor  # (outs, ins), or packed
    bias: Tensor | None
    packing: Any  # state of a quantized weight; None: not quantized
    down: Tensor  # A, (rank, ins), in the precision of the input
    up: Tensor  # B, (outs, rank)
    scale: float
    down_gradient: Tensor
    up_gradient: Tensor
    trigger: Tensor  # requires a gradient, so that autograd runs the backward pass


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
        self._views: dict[nn.Parameter, tuple[Tensor, Tensor]] = {}  # of `cast` and of the gradient, in the parameter's shape
        self.pieces: dict[tuple[Any, ...], LoraPiece | None] = {}  # a layer and its setting -> its piece
        tensors = (self.values.data, self.values.grad, self.cast)
        for parameter, value, gradient, cast in zip(parameters, *map(self.parts_of, tensors), strict=True):
            value.copy_(parameter.data)
            parameter.data, parameter.grad = value, gradient
            self._views[parameter] = cast, gradient

    def parts_of(self, tensor: Tensor) -> list[Tensor]:
        """A tensor like `values` -> views of it, one for each parameter, in its shape."""
        return [tensor[start : start + shape.numel()].view(shape) for start, shape in self._places]

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
        """Make the layers' copy of the values equal to them; to be called before each forward pass."""
        if self.cast.dtype != torch.float32:
            self.cast.copy_(self.values.data)

    def piece_of(self, layer: Any, x: Tensor) -> LoraPiece | None:
        """This PEFT layer's piece; None where its current setting or x's precision rules it out."""
        if layer.disable_adapters or layer.merged:
            return None
        setting = layer, *layer.active_adapters, *layer.scaling.values()
        if setting not in self.pieces:
            self.pieces[setting] = self._make(layer)
        piece = self.pieces[setting]
        return piece if piece is not None and piece.down.dtype == x.dtype else None

    def _make(self, layer: Any) -> LoraPiece | None:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(names) != 1:
            return None
        (name,), base = names, layer.base_layer
        trigger, other = layer.lora_A[name].weight, layer.lora_B[name].weight
        if trigger not in self._views or other not in self._views:
            return None
        (down, down_gradient), (up, up_gradient) = self._views[trigger], self._views[other]
        packing = state_of(base)
        if packing is not None and packing.dtype != down.dtype:
            return None
        scale = layer.scaling[name]
        return LoraPiece(base.weight, base.bias, packing, down, up, scale, down_gradient, up_gradient, trigger)


class LoraLinears(Function):
    """Up to three layers with the same input (query, key, value). Saves x, and `rank` numbers per token and layer.

    x (..., ins) -> (..., outs) of each piece
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Tensor, pieces: Sequence[LoraPiece]) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
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
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        flat = [gradient.reshape(-1, gradient.shape[-1]).contiguous() for gradient in gradients]
        work = dispatch.lora_linear_backward if ctx.fused else plain_backward
        for_x = work(flat, rows, low, weights, ctx.pieces, for_input=ctx.needs_input_grad[0])
        return None if for_x is None else for_x.view(x.shape), None, None


def fusible(rows: Tensor, pieces: Sequence[LoraPiece]) -> bool:
    """Whether the Triton kernel supports them: half precision, and layers of one shape with aligned rows."""
    if not rows.is_cuda or rows.dtype not in (torch.float16, torch.bfloat16):
        return False
    shapes = {(piece.down.shape, piece.up.shape, piece.bias is None) for piece in pieces}
    (rank, ins), outs = pieces[0].down.shape, len(pieces[0].up)
    aligned = ins % 8 == 0 and outs % 8 == 0 and rank % 4 == 0
    return len(shapes) == 1 and aligned and dispatch.works_on(rows.device, dispatch.OLDEST_FOR_PRODUCTS)


def plain_forward(x: Tensor, weights: Sequence[Tensor], pieces: Sequence[LoraPiece]) -> tuple[list[Tensor], list[Tensor]]:
    """Like `dispatch.lora_linear`."""
    results, low = [], []
    for weight, piece in zip(weights, pieces, strict=True):
        low.append(x @ piece.down.t())
        results.append(F.linear(x, weight, piece.bias).addmm_(low[-1], piece.up.t(), alpha=piece.scale))
    return results, low


def plain_backward(
    gradients: Sequence[Tensor], x: Tensor, low: Sequence[Tensor], weights: Sequence[Tensor], pieces: Sequence[LoraPiece], *,
    for_input: bool,
) -> Tensor | None:  # fmt: skip
    """Like `dispatch.lora_linear_backward`."""
    for_x: Tensor | None = None
    for gradient, one, weight, piece in zip(gradients, low, weights, pieces, strict=True):
        back = gradient @ piece.up
        add_product(piece.down_gradient, back.t(), x, piece.scale)
        add_product(piece.up_gradient.t(), one.t(), gradient, piece.scale)
        if for_input:
            through = gradient @ weight
            for_x = through if for_x is None else for_x.add_(through)
            for_x.addmm_(back, piece.down, alpha=piece.scale)
    return for_x


def add_product(total: Tensor, a: Tensor, b: Tensor, scale: float) -> None:
    """total += scale a b, where the factors may have half the precision of `total`."""
    if a.dtype == total.dtype:
        total.addmm_(a, b, alpha=scale)
    else:
        total.add_(a @ b, alpha=scale)
