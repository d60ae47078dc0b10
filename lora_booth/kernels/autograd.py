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

# Where one product of patches is faster than a convolution: measured on SD 1.5's layers (benchmarks/convolutions.py)
FEW_PIXELS = 128  # of all outputs in a batch, at most
MANY_WEIGHTS = 2**20  # at least


def fused(x: Tensor) -> bool:
    return x.is_cuda and dispatch.works_on(x.device)


# --- convolutions ----------------------------------------------------------------------------------------------------


class ConvOptions(NamedTuple):
    """Each as (height, width), in the order of `F.conv2d`."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class FrozenConv2d(Function):
    """Saves only its weight."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: ConvOptions) -> Tensor:
        ctx.save_for_backward(weight)
        steps = [divmod(far, stride) for far, stride in zip(reach(x, weight, how), how.stride, strict=True)]
        ctx.shape, ctx.how, ctx.left = x.shape, how, tuple(left for _, left in steps)
        height, width = (count + 1 for count, _ in steps)
        ctx.product = as_product(x, weight, how, len(x) * height * width)
        if not ctx.product:
            return F.conv2d(x, weight, bias, *how)
        patches = F.unfold(x, weight.shape[2:], how.dilation, how.padding, how.stride)  # type: ignore[arg-type]
        result = weight.flatten(1) @ patches.transpose(0, 1).flatten(1)  # (outs, N pixels)
        result = result if bias is None else result.add_(bias[:, None])
        return result.view(len(weight), len(x), height, width).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,), how = ctx.saved_tensors, ctx.how
        if not ctx.product:
            for_x = F.conv_transpose2d(gradient, weight, output_padding=ctx.left, **how._asdict())
            return for_x, None, None, None
        rows = gradient.flatten(2).transpose(1, 2).flatten(0, 1)  # (N pixels, outs): one product, however many images
        patches = (rows @ weight.flatten(1)).unflatten(0, (len(gradient), -1)).transpose(1, 2)
        sizes = ctx.shape[2:], weight.shape[2:], how.dilation, how.padding, how.stride
        return F.fold(patches, *sizes), None, None, None  # type: ignore[arg-type]


def reach(x: Tensor, weight: Tensor, how: ConvOptions) -> list[int]:
    """Down and across: how far the kernel moves from the first pixel to the last."""
    sizes = zip(x.shape[2:], how.padding, how.dilation, weight.shape[2:], strict=True)
    return [size + 2 * pad - spread * (kernel - 1) - 1 for size, pad, spread, kernel in sizes]


def as_product(x: Tensor, weight: Tensor, how: ConvOptions, pixels: int) -> bool:
    """Whether one product of patches is faster: on a CPU, a convolution reorders its weights at every call."""
    small = pixels <= FEW_PIXELS and weight.numel() >= MANY_WEIGHTS
    return small and x.device.type == "cpu" and how.groups == 1 and weight.is_contiguous()


# --- norms and gates -------------------------------------------------------------------------------------------------


class NormBeside(Function):
    """x, and GroupNorm(x), with SiLU if `silu`: saves x and the groups' statistics. x (N, C, H, W)"""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, silu: bool
    ) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.groups, ctx.eps, ctx.silu = groups, eps, silu
        if fused(x):
            normal, mean, rstd = dispatch.group_norm(x, weight, bias, groups, eps, silu=silu)
        else:
            normal, mean, rstd = torch.native_group_norm(x.contiguous(), weight, bias, *sizes_of(x), groups, eps)
            normal = F.silu(normal, inplace=True) if silu else normal
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        return x.view_as(x), normal

    @staticmethod
    def backward(ctx: Any, skip: Tensor | None, gradient: Tensor | None) -> Any:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        if gradient is None:
            return skip, None, None, None, None, None
        if fused(x):
            work = dispatch.group_norm_backward
            for_x = work(gradient, skip, x, mean, rstd, weight, bias, ctx.groups, silu=ctx.silu)
            return for_x, None, None, None, None, None
        sizes = (*sizes_of(x), ctx.groups)
        x, gradient = x.contiguous(), gradient.contiguous()  # PyTorch reads them as contiguous, whatever their strides
        if ctx.silu:
            normal = torch.native_group_norm(x, weight, bias, *sizes, ctx.eps)[0]
            gradient = torch.ops.aten.silu_backward(gradient, normal)
        mask = [True, False, False]
        for_x = torch.ops.aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *sizes, mask)[0]
        return for_x if skip is None else for_x.add_(skip), None, None, None, None, None


def sizes_of(x: Tensor) -> tuple[int, int, int]:
    """Images, channels, pixels."""
    return x.shape[0], x.shape[1], x.shape[2:].numel()


class SumAndNorm(Function):
    """x + more (just x without more), and LayerNorm of that: saves the sum and each token's statistics. x (..., C)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, eps: float) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.summed = more is not None
        if fused(x):
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
        elif fused(total):
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
        if fused(halves):
            return dispatch.geglu(halves)
        values, gates = halves.chunk(2, dim=-1)
        return F.gelu(gates).mul_(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (halves,) = ctx.saved_tensors
        if fused(halves):
            return dispatch.geglu_backward(gradient, halves)
        values, gates = halves.chunk(2, dim=-1)
        result = torch.empty_like(halves)
        for_values, for_gates = result.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gates), out=for_values)
        torch.ops.aten.gelu_backward.grad_input(gradient * values, gates, grad_input=for_gates)
        return result
