"""Norms and gates that keep little and compute the rest again in the backward pass.

Norms come with the way around them: of what goes both through a norm and past it, the two gradients are added where the norm's
is made. On a CUDA GPU each is one or two kernels (`kernels`), elsewhere PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import dispatch as kernels


class NormBeside(Function):
    """x, and GroupNorm(x + shift), with SiLU if asked for: keeps x and the groups' statistics.

    x (N, C, H, W); shift (N, C), which gets no gradient, or None
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.eps, ctx.silu, ctx.fused = groups, eps, silu, kernels.works_on(x.device)
        if ctx.fused:
            normal, mean, rstd = kernels.group_norm(x, shift, weight, bias, groups, eps, silu=silu)
            ctx.save_for_backward(x, shift, mean, rstd, weight, bias)
            return x.view_as(x), normal
        kept = (x if shift is None else x + shift[:, :, None, None]).contiguous()
        normal, mean, rstd = torch.native_group_norm(kept, weight, bias, *sizes_of(x), groups, eps)
        ctx.save_for_backward(kept, None, mean, rstd, weight, bias)
        return x.view_as(x), F.silu(normal, inplace=True) if silu else normal

    @staticmethod
    def backward(ctx: Any, skip: Tensor | None, gradient: Tensor | None) -> Any:
        x, shift, mean, rstd, weight, bias = ctx.saved_tensors
        if gradient is None:
            return skip, None, None, None, None, None, None
        if ctx.fused:
            work = kernels.group_norm_backward
            for_x = work(gradient, skip, x, shift, mean, rstd, weight, bias, ctx.groups, silu=ctx.silu)
            return for_x, None, None, None, None, None, None
        sizes, gradient = (*sizes_of(x), ctx.groups), gradient.contiguous()  # PyTorch reads it so, whatever its strides
        if ctx.silu:
            normal = torch.native_group_norm(x, weight, bias, *sizes, ctx.eps)[0]
            gradient = torch.ops.aten.silu_backward(gradient, normal)
        mask = [True, False, False]
        for_x = torch.ops.aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *sizes, mask)[0]
        return for_x if skip is None else for_x.add_(skip), None, None, None, None, None, None


def sizes_of(x: Tensor) -> tuple[int, int, int]:
    """Pictures, channels, pixels."""
    return x.shape[0], x.shape[1], x.shape[2:].numel()


class SumAndNorm(Function):
    """x + more (x itself without more), and LayerNorm of that: keeps the sum and each token's statistics. x (..., C)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.fused, ctx.summed = kernels.works_on(x.device), more is not None
        if ctx.fused:
            total, normal, mean, rstd = kernels.layer_norm(x, more, weight, bias, eps)
        else:
            total = x if more is None else x + more
            normal, mean, rstd = torch.native_layer_norm(total, [x.shape[-1]], weight, bias, eps)
        ctx.save_for_backward(total, mean, rstd, weight, bias)
        return total.view_as(total) if more is None else total, normal

    @staticmethod
    def backward(ctx: Any, skip: Tensor | None, gradient: Tensor | None) -> Any:
        total, mean, rstd, weight, bias = ctx.saved_tensors
        if gradient is None:
            result = skip
        elif ctx.fused:
            result = kernels.layer_norm_backward(gradient, skip, total, mean, rstd, weight)
        else:
            backward, mask = torch.ops.aten.native_layer_norm_backward, [True, False, False]
            result = backward(gradient, total, [total.shape[-1]], mean, rstd, weight, bias, mask)[0]
            if skip is not None:
                result = result.add_(skip)
        return result, result if ctx.summed else None, None, None, None


class Geglu(Function):
    """Values x GELU(gates): keeps both halves as the one tensor that they are."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        ctx.save_for_backward(halves)
        ctx.fused = kernels.works_on(halves.device)
        if ctx.fused:
            return kernels.geglu(halves)
        values, gates = halves.chunk(2, dim=-1)
        return F.gelu(gates).mul_(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (halves,) = ctx.saved_tensors
        if ctx.fused:
            return kernels.geglu_backward(gradient, halves)
        values, gates = halves.chunk(2, dim=-1)
        result = torch.empty_like(halves)
        for_values, for_gates = result.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gates), out=for_values)
        torch.ops.aten.gelu_backward.grad_input(gradient * values, gates, grad_input=for_gates)
        return result


class SumWithBias(Function):
    """x + bias by channel + more, whose gradients are all that of the sum. x, more (N, C, H, W)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, more: Tensor) -> Tensor:
        if bias is not None and kernels.works_on(x.device):
            return kernels.sum_with_bias(x, bias, more)
        return (x if bias is None else x + bias[:, None, None]) + more

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, gradient
