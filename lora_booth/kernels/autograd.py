"""Autograd functions for frozen layers: they save little for the backward pass and recompute the rest.

Norms include the skip connection around them: their backward pass adds the gradients of both paths. On a CUDA GPU each is
one or two Triton kernels (`dispatch`), elsewhere PyTorch's.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from . import dispatch

# Where one product of patches is faster than a convolution: measured on SD 1.5's layers (benchmarks/convolutions.py)
FEW_PIXELS = 128  # of all outputs in a batch, at most
MANY_WEIGHTS = 2**20  # at least


def fused(x: Tensor) -> bool:
    return x.is_cuda and dispatch.works_on(x.device)


# --- convolutions ----------------------------------------------------------------------------------------------------


class FrozenConv2d(Function):
    """A convolution of x (N, C, H, W) that saves nothing. layer: an nn.Conv2d"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Any) -> Tensor:
        steps = [divmod(far, stride) for far, stride in zip(reach(x, layer), layer.stride, strict=True)]
        ctx.layer, ctx.size, ctx.left = layer, x.shape[2:], tuple(left for _, left in steps)
        height, width = (count + 1 for count, _ in steps)
        ctx.product = as_product(x, layer, len(x) * height * width)
        if not ctx.product:
            return nn.Conv2d.forward(layer, x)
        weight = layer.weight.flatten(1)
        patches = F.unfold(x, layer.kernel_size, layer.dilation, layer.padding, layer.stride)
        result = weight @ patches.transpose(0, 1).flatten(1)  # (outs, N pixels)
        result = result if layer.bias is None else result.add_(layer.bias[:, None])
        return result.view(len(weight), len(x), height, width).transpose(0, 1).contiguous()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        layer, weight = ctx.layer, ctx.layer.weight
        if not ctx.product:
            how = layer.stride, layer.padding, ctx.left, layer.groups, layer.dilation
            return F.conv_transpose2d(gradient, weight, None, *how), None
        rows = gradient.flatten(2).transpose(1, 2).flatten(0, 1)  # (N pixels, outs): one product, however many images
        patches = (rows @ weight.flatten(1)).unflatten(0, (len(gradient), -1)).transpose(1, 2)
        return F.fold(patches, ctx.size, layer.kernel_size, layer.dilation, layer.padding, layer.stride), None


def reach(x: Tensor, layer: Any) -> list[int]:
    """Down and across: how far the kernel moves from the first pixel to the last."""
    sizes = zip(x.shape[2:], layer.padding, layer.dilation, layer.kernel_size, strict=True)
    return [size + 2 * pad - spread * (kernel - 1) - 1 for size, pad, spread, kernel in sizes]


def as_product(x: Tensor, layer: Any, pixels: int) -> bool:
    """Whether one product of patches is faster: on a CPU, a convolution reorders its weights at every call."""
    small = pixels <= FEW_PIXELS and layer.weight.numel() >= MANY_WEIGHTS
    return small and x.device.type == "cpu" and layer.groups == 1 and layer.weight.is_contiguous()


# --- norms and gates -------------------------------------------------------------------------------------------------


class NormBeside(Function):
    """x, and its GroupNorm, with SiLU if `silu`: saves x and the groups' statistics. x (N, C, H, W); norm: an nn.GroupNorm"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, norm: Any, silu: bool) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.silu = norm, silu
        how = norm.weight, norm.bias, norm.num_groups, norm.eps
        if fused(x):
            normal, mean, rstd = dispatch.group_norm(x, *how, silu=silu)
        else:
            normal, mean, rstd = native_group_norm(x.contiguous(), norm)
            normal = F.silu(normal, inplace=True) if silu else normal
        ctx.save_for_backward(x, mean, rstd)
        return x.view_as(x), normal

    @staticmethod
    def backward(ctx: Any, skip: Tensor | None, gradient: Tensor | None) -> Any:
        x, mean, rstd = ctx.saved_tensors
        norm = ctx.norm
        if gradient is None:
            return skip, None, None
        if fused(x):
            how = norm.weight, norm.bias, norm.num_groups
            return dispatch.group_norm_backward(gradient, skip, x, mean, rstd, *how, silu=ctx.silu), None, None
        x, gradient = x.contiguous(), gradient.contiguous()  # PyTorch reads them as contiguous, whatever their strides
        if ctx.silu:
            gradient = torch.ops.aten.silu_backward(gradient, native_group_norm(x, norm)[0])
        sizes, mask = (*sizes_of(x), norm.num_groups), [True, False, False]
        for_x = torch.ops.aten.native_group_norm_backward(gradient, x, mean, rstd, norm.weight, *sizes, mask)[0]
        return for_x if skip is None else for_x.add_(skip), None, None


def native_group_norm(x: Tensor, norm: Any) -> tuple[Tensor, Tensor, Tensor]:
    return torch.native_group_norm(x, norm.weight, norm.bias, *sizes_of(x), norm.num_groups, norm.eps)


def sizes_of(x: Tensor) -> tuple[int, int, int]:
    """Images, channels, pixels."""
    return x.shape[0], x.shape[1], x.shape[2:].numel()


class SumAndNorm(Function):
    """x + more (just x without more), and LayerNorm of that: saves the sum and each token's statistics. x (..., C)"""

    @staticmethod
    def forward(ctx: Any, x: Tensor, more: Tensor | None, norm: Any) -> tuple[Tensor, Tensor]:
        ctx.set_materialize_grads(False)
        ctx.norm, ctx.summed = norm, more is not None
        if fused(x):
            total, normal, mean, rstd = dispatch.layer_norm(x, more, norm.weight, norm.bias, norm.eps)
        else:
            total = x if more is None else x + more
            normal, mean, rstd = torch.native_layer_norm(total, [x.shape[-1]], norm.weight, norm.bias, norm.eps)
        ctx.save_for_backward(total, mean, rstd)
        return total.view_as(total) if more is None else total, normal

    @staticmethod
    def backward(ctx: Any, skip: Tensor | None, gradient: Tensor | None) -> Any:
        total, mean, rstd = ctx.saved_tensors
        weight, bias = ctx.norm.weight, ctx.norm.bias
        if gradient is None:
            result = skip
        elif fused(total):
            result = dispatch.layer_norm_backward(gradient, skip, total, mean, rstd, weight)
        else:
            backward, mask = torch.ops.aten.native_layer_norm_backward, [True, False, False]
            result = backward(gradient, total, [total.shape[-1]], mean, rstd, weight, bias, mask)[0]
            if skip is not None:
                result = result.add_(skip)
        return result, result if ctx.summed else None, None


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
