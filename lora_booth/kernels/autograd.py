"""Autograd functions for frozen layers: they save little for the backward pass and recompute the rest.

Norms include the skip connection around them: their backward pass adds the gradients of both paths. On a CUDA GPU each is
one or two Triton kernels (`dispatch`), elsewhere PyTorch's.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function

from . import dispatch

# Where one product of patches is faster than a convolution: measured on SD 1.5's layers, on one core.
FEW_PIXELS = 128  # of a batch, at most
MANY_WEIGHTS = 2**20  # at least


def fused(x: Tensor) -> bool:
    return x.is_cuda and dispatch.works_on(x.device)


# --- products --------------------------------------------------------------------------------------------------------


class FrozenLinear(Function):
    """Saves only its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return F.linear(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return gradient @ weight, None, None


class ConvOptions(NamedTuple):
    """Each as (height, width), in the order of `F.conv2d`."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


def few_pixels(x: Tensor, weight: Tensor, how: ConvOptions) -> bool:
    """Whether a CPU convolution is faster as one product of patches: PyTorch's reorders its weights at every call."""
    pixels = len(x) * (x.shape[2] // how.stride[0]) * (x.shape[3] // how.stride[1])
    small = pixels <= FEW_PIXELS and weight.numel() >= MANY_WEIGHTS
    return small and x.device.type == "cpu" and how.groups == 1 and weight.is_contiguous()


class FrozenConv2d(Function):
    """Saves only its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: ConvOptions) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, how
        pointwise = weight.shape[2:] == how.stride == (1, 1) and how.padding == (0, 0)
        ctx.linear = pointwise and x.is_cuda and x.is_contiguous(memory_format=torch.channels_last)
        if ctx.linear:  # a linear layer on pixels, which adds the bias as well
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        ctx.product = few_pixels(x, weight, how)
        if ctx.product:
            patches = F.unfold(x, weight.shape[2:], how.dilation, how.padding, how.stride)  # type: ignore[arg-type]
            result = weight.flatten(1) @ patches.transpose(0, 1).flatten(1)  # (o, N pixels)
            result = result if bias is None else result.add_(bias[:, None])
            height = (x.shape[2] + 2 * how.padding[0] - how.dilation[0] * (weight.shape[2] - 1) - 1) // how.stride[0] + 1
            return result.view(len(weight), len(x), height, -1).transpose(0, 1).contiguous()
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,), how = ctx.saved_tensors, ctx.how
        if ctx.linear:
            return (gradient.permute(0, 2, 3, 1) @ weight.flatten(1)).permute(0, 3, 1, 2), None, None, None
        if ctx.product:
            patches = (gradient.flatten(2).transpose(1, 2) @ weight.flatten(1)).transpose(1, 2)
            sizes = ctx.shape[2:], weight.shape[2:], how.dilation, how.padding, how.stride
            return F.fold(patches, *sizes), None, None, None  # type: ignore[arg-type]
        left = tuple(
            size - ((out - 1) * stride - 2 * pad + spread * (kernel - 1) + 1)
            for size, out, stride, pad, spread, kernel in zip(
                ctx.shape[2:], gradient.shape[2:], how.stride, how.padding, how.dilation, weight.shape[2:], strict=True
            )
        )
        return F.conv_transpose2d(gradient, weight, output_padding=left, **how._asdict()), None, None, None


# --- norms and gates -------------------------------------------------------------------------------------------------


class NormBeside(Function):
    """x, and GroupNorm(x + shift), with SiLU if `silu`: saves x and the groups' statistics.

    x (N, C, H, W); shift (N, C) or None, without gradient
    """

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, shift: Tensor | None, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.eps, ctx.silu, ctx.fused = groups, eps, silu, fused(x)
        if ctx.fused:
            normal, mean, rstd = dispatch.group_norm(x, shift, weight, bias, groups, eps, silu=silu)
            ctx.save_for_backward(x, shift, mean, rstd, weight, bias)
            return x.view_as(x), normal
        shifted = (x if shift is None else x + shift[:, :, None, None]).contiguous()
        normal, mean, rstd = torch.native_group_norm(shifted, weight, bias, *sizes_of(x), groups, eps)
        ctx.save_for_backward(shifted, None, mean, rstd, weight, bias)
        return x.view_as(x), F.silu(normal, inplace=True) if silu else normal

    @staticmethod
    def backward(ctx: Any, skip: Tensor | None, gradient: Tensor | None) -> Any:
        x, shift, mean, rstd, weight, bias = ctx.saved_tensors
        if gradient is None:
            return skip, None, None, None, None, None, None
        if ctx.fused:
            work = dispatch.group_norm_backward
            for_x = work(gradient, skip, x, shift, mean, rstd, weight, bias, ctx.groups, silu=ctx.silu)
            return for_x, None, None, None, None, None, None
        sizes, gradient = (
            (*sizes_of(x), ctx.groups),
            gradient.contiguous(),
        )  # PyTorch reads it as contiguous, whatever its strides
        if ctx.silu:
            normal = torch.native_group_norm(x, weight, bias, *sizes, ctx.eps)[0]
            gradient = torch.ops.aten.silu_backward(gradient, normal)
        mask = [True, False, False]
        for_x = torch.ops.aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *sizes, mask)[0]
        return for_x if skip is None else for_x.add_(skip), None, None, None, None, None, None


def sizes_of(x: Tensor) -> tuple[int, int, int]:
    """Images, channels, pixels."""
    return x.shape[0], x.shape[1], x.shape[2:].numel()


class SumAndNorm(Function):
    """x + more (just x without more), and LayerNorm of that: saves the sum and each token's statistics. x (..., C)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.fused, ctx.summed = fused(x), more is not None
        if ctx.fused:
            total, normal, mean, rstd = dispatch.layer_norm(x, more, weight, bias, eps)
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
            result = dispatch.layer_norm_backward(gradient, skip, total, mean, rstd, weight)
        else:
            backward, mask = torch.ops.aten.native_layer_norm_backward, [True, False, False]
            result = backward(gradient, total, [total.shape[-1]], mean, rstd, weight, bias, mask)[0]
            if skip is not None:
                result = result.add_(skip)
        return result, result if ctx.summed else None, None, None, None


class Geglu(Function):
    """Values x GELU(gates): saves both halves, as the one tensor they come in."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        ctx.save_for_backward(halves)
        ctx.fused = fused(halves)
        if ctx.fused:
            return dispatch.geglu(halves)
        values, gates = halves.chunk(2, dim=-1)
        return F.gelu(gates).mul_(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (halves,) = ctx.saved_tensors
        if ctx.fused:
            return dispatch.geglu_backward(gradient, halves)
        values, gates = halves.chunk(2, dim=-1)
        result = torch.empty_like(halves)
        for_values, for_gates = result.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gates), out=for_values)
        torch.ops.aten.gelu_backward.grad_input(gradient * values, gates, grad_input=for_gates)
        return result


class SumWithBias(Function):
    """x + bias (by channel) + more; all share the gradient of the sum. x, more (N, C, H, W)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, bias: Tensor | None, more: Tensor) -> Tensor:
        if bias is not None and fused(x):
            return dispatch.sum_with_bias(x, bias, more)
        return (x if bias is None else x + bias[:, None, None]) + more

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient, None, gradient
