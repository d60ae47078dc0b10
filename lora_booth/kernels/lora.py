"""Frozen linear layers with a LoRA around them, up to three that read the same input (query, key and value) at once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd import Function

from ..base.quantization import is_packed, whole
from . import dispatch as kernels
from .flat_parameters import Factor
from .products import product


@dataclass(frozen=True)
class LoraPiece:
    """One layer: W x + b + scale B A x. Gradients of A and B are added to places of their own, never returned."""

    weight: Tensor  # (outs, ins), or packed
    bias: Tensor | None
    packing: Any  # of a quantized weight, kept packed; None: it is whole
    down: Tensor  # A, (rank, ins), in the precision of the input
    up: Tensor  # B, (outs, rank)
    scale: float
    near_gradients: tuple[Tensor, Tensor]  # places for those of A and B in the precision of the input
    down_gradient: Tensor  # and in float32
    up_gradient: Tensor
    trigger: Tensor  # what requires a gradient, so that autograd comes here

    @property
    def whole(self) -> Tensor:
        return whole(self.weight, self.packing)


class LoraPieces:
    """The pieces of an adapter under training, each made once for every way that its layer is set.

    factors  as in `Flat.factors`
    """

    def __init__(self, factors: Mapping[nn.Parameter, Factor]) -> None:
        self.factors = factors
        self._made: dict[tuple[Any, ...], LoraPiece | None] = {}

    def of(self, layer: Any, x: Tensor) -> LoraPiece | None:
        """What `LoraLinears` computes with for this PEFT layer; None: as it is set now, or in this precision, it cannot."""
        if layer.disable_adapters or layer.merged:
            return None
        setting = layer, *layer.active_adapters, *layer.scaling.values()
        if setting not in self._made:
            self._made[setting] = self._make(layer)
        piece = self._made[setting]
        return piece if piece is not None and piece.down.dtype == x.dtype else None

    def _make(self, layer: Any) -> LoraPiece | None:
        names = [name for name in layer.active_adapters if name in layer.lora_A]
        if len(names) != 1:
            return None
        (name,), base = names, layer.base_layer
        parameters = layer.lora_A[name].weight, layer.lora_B[name].weight
        if any(one not in self.factors for one in parameters):
            return None
        down, up = (self.factors[one] for one in parameters)
        packing = base.weight.quant_state if is_packed(base) else None
        if packing is not None and packing.dtype != down.value.dtype:
            return None
        return LoraPiece(
            weight=base.weight,
            bias=base.bias,
            packing=packing,
            down=down.value,
            up=up.value,
            scale=layer.scaling[name],
            near_gradients=(down.gradient, up.gradient),
            down_gradient=down.whole_gradient,
            up_gradient=up.whole_gradient,
            trigger=parameters[0],
        )


class LoraLinears(Function):
    """Keeps x and its `rank` numbers a token for each layer.

    x (..., ins), trigger (any tensor that requires a gradient, so that autograd comes here) -> (..., outs) of each piece
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, trigger: Tensor, pieces: Sequence[LoraPiece]) -> tuple[Tensor, ...]:
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        ctx.fused = fusible(rows, pieces)
        weights = [piece.whole for piece in pieces]
        work = kernels.lora_linear if ctx.fused else plain_forward
        results, low = work(rows, weights, pieces)
        ctx.save_for_backward(x, *low)
        ctx.pieces = pieces
        return tuple(result.view(*x.shape[:-1], -1) for result in results)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Any:
        x, *low = ctx.saved_tensors
        weights = [piece.whole for piece in ctx.pieces]
        rows = x.reshape(-1, x.shape[-1]).contiguous()
        flat = [gradient.reshape(-1, gradient.shape[-1]).contiguous() for gradient in gradients]
        work = kernels.lora_linear_backward if ctx.fused else plain_backward
        for_x = work(flat, rows, low, weights, ctx.pieces, whole=ctx.needs_input_grad[0])
        return None if for_x is None else for_x.view(x.shape), None, None


def fusible(rows: Tensor, pieces: Sequence[LoraPiece]) -> bool:
    """Whether Triton's kernel takes them: half precision, and layers of one shape whose rows lie at multiples of some bytes."""
    if not kernels.products_work_on(rows.device) or rows.dtype not in (torch.float16, torch.bfloat16):
        return False
    one = pieces[0]
    alike = all(
        piece.down.shape == one.down.shape and piece.up.shape == one.up.shape and (piece.bias is None) == (one.bias is None)
        for piece in pieces
    )
    return alike and one.down.shape[1] % 8 == 0 and one.up.shape[0] % 8 == 0 and one.down.shape[0] % 4 == 0


def plain_forward(x: Tensor, weights: Sequence[Tensor], pieces: Sequence[LoraPiece]) -> tuple[list[Tensor], list[Tensor]]:
    """As `kernels.lora_linear`."""
    results, low = [], []
    for weight, piece in zip(weights, pieces, strict=True):
        low.append(product(x, piece.down))
        results.append(product(x, weight, piece.bias).addmm_(low[-1], piece.up.t(), alpha=piece.scale))
    return results, low


def plain_backward(
    gradients: Sequence[Tensor], x: Tensor, low: Sequence[Tensor], weights: Sequence[Tensor], pieces: Sequence[LoraPiece], *,
    whole: bool,
) -> Tensor | None:  # fmt: skip
    """As `kernels.lora_linear_backward`, but for the precision of the gradients of A and B."""
    for_x: Tensor | None = None
    for gradient, one, weight, piece in zip(gradients, low, weights, pieces, strict=True):
        back = gradient @ piece.up
        down_gradient, up_gradient = piece.near_gradients
        down_gradient.addmm_(back.t(), x, alpha=piece.scale)
        up_gradient.t().addmm_(one.t(), gradient, alpha=piece.scale)
        if whole:
            through = product(gradient, weight.t())
            for_x = through if for_x is None else for_x.add_(through)
            for_x.addmm_(back, piece.down, alpha=piece.scale)
    return for_x
