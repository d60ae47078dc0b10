"""Products with frozen weights: nothing is kept for a gradient that nobody needs, and on a CPU they go to oneDNN, also those
of small pictures' convolutions, whose weights would otherwise be laid out anew at every call."""

from __future__ import annotations

from functools import cache
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd import Function
from torch.nn.grad import conv2d_input

# Measured on the layers of SD 1.5 and of the toybox, on one core. On a CPU a convolution is faster as one matrix product when
FEW_PIXELS = 128  # of a batch at most come out of it and
MANY_WEIGHTS = 2**20  # at least would be laid out anew for it; or, in float32, when
FEWEST_PIXELS = 16  # at most come out. Else oneDNN is faster than the way that PyTorch takes for
SMALL_INPUT = 20480  # values of a picture at most (its own limit)
SMALL_PRODUCT = 3 * 2**19  # multiply-adds in float32, below which the call of oneDNN costs more than it gains


@cache
def onednn(dtype: torch.dtype) -> bool:
    """Whether the CPU's oneDNN can be asked directly. PyTorch gives float32 products to MKL, which is slow on AMD."""
    if not (torch._C._has_mkldnn and hasattr(torch.ops.mkldnn, "_linear_pointwise")):
        return False
    if dtype == torch.bfloat16:
        return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())
    return dtype == torch.float32


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W^T + b: (..., i), (o, i), (o,) -> (..., o). Outside of autograd."""
    small = x.dtype == torch.float32 and x.numel() * weight.shape[0] < SMALL_PRODUCT
    if not small and x.device.type == "cpu" and onednn(x.dtype) and torch.backends.mkldnn.enabled:
        result: Tensor = torch.ops.mkldnn._linear_pointwise(x, weight, bias, "none", [], "")
        return result
    return F.linear(x, weight, bias)


class FrozenLinear(Function):
    """Keeps its weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        ctx.save_for_backward(weight)
        return product(x, weight, bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        return product(gradient, weight.t()), None, None


class ConvOptions(NamedTuple):
    """Height, width; in the order of `F.conv2d`."""

    stride: tuple[int, int] = (1, 1)
    padding: tuple[int, int] = (0, 0)
    dilation: tuple[int, int] = (1, 1)
    groups: int = 1


class FrozenConv2d(Function):
    """Keeps its weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: ConvOptions) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how, ctx.way = x.shape, how, way_through(x, weight, how)
        if ctx.way == "product":
            return convolution(x, weight, bias, how)
        if ctx.way == "pixels":  # a linear layer, which adds the bias as well
            return F.linear(x.permute(0, 2, 3, 1), weight.flatten(1), bias).permute(0, 3, 1, 2)
        if ctx.way == "onednn":
            result: Tensor = torch.mkldnn_convolution(x, weight, bias, how.padding, how.stride, how.dilation, 1)
            return result
        return F.conv2d(x, weight, bias, *how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,), how = ctx.saved_tensors, ctx.how
        if ctx.way == "product":
            return transposed_convolution(gradient, weight, ctx.shape, how), None, None, None
        if ctx.way == "pixels":
            return (gradient.permute(0, 2, 3, 1) @ weight.flatten(1)).permute(0, 3, 1, 2), None, None, None
        if ctx.way == "onednn" and how.stride == (1, 1):
            turned = torch.ops.mkldnn._convolution_transpose_pointwise
            options = how.padding, (0, 0), how.stride, how.dilation, 1
            return turned(gradient, weight, None, *options, "none", [], ""), None, None, None
        if gradient.device.type == "cuda":  # the same kernels of cuDNN, without an input that nobody reads
            return transposed(gradient, weight, ctx.shape, how), None, None, None
        return conv2d_input(ctx.shape, weight, gradient, *how), None, None, None  # type: ignore[no-untyped-call]


def transposed(gradient: Tensor, weight: Tensor, shape: torch.Size, how: ConvOptions) -> Tensor:
    """The gradient of the convolution's input, of this shape."""
    left = tuple(
        size - ((out - 1) * stride - 2 * pad + spread * (kernel - 1) + 1)
        for size, out, stride, pad, spread, kernel in zip(
            shape[2:], gradient.shape[2:], how.stride, how.padding, how.dilation, weight.shape[2:], strict=True
        )
    )
    return F.conv_transpose2d(gradient, weight, output_padding=left, **how._asdict())


def way_through(x: Tensor, weight: Tensor, how: ConvOptions) -> str:
    """What computes it: "product" of patches or of "pixels", "onednn", or "stock", which is PyTorch's choice."""
    if x.device.type == "cpu":
        return way_on_cpu(x.dtype, x.shape, weight.shape, weight.is_contiguous(), how, torch.backends.mkldnn.enabled)
    last = x.device.type == "cuda" and pointwise(weight.shape, how) and x.is_contiguous(memory_format=torch.channels_last)
    return "pixels" if last else "stock"


@cache
def way_on_cpu(dtype: torch.dtype, x: torch.Size, weight: torch.Size, plain: bool, how: ConvOptions, enabled: bool) -> str:
    if how.groups != 1 or not onednn(dtype):
        return "stock"
    pixels = x[0] * (x[2] // how.stride[0]) * (x[3] // how.stride[1])
    few = pixels <= FEW_PIXELS and weight.numel() >= MANY_WEIGHTS
    if plain and (few or (dtype == torch.float32 and (pixels <= FEWEST_PIXELS or pointwise(weight, how)))):
        return "product"
    small = x[0] == 1 and x.numel() <= SMALL_INPUT
    return "onednn" if small and dtype == torch.float32 and enabled else "stock"


def pointwise(weight: torch.Size, how: ConvOptions) -> bool:
    return weight[2:] == (1, 1) and how.stride == (1, 1) and how.padding == (0, 0)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, how: ConvOptions) -> Tensor:
    """The convolution as one product: patches (N, i k k, pixels) -> (N, o, height, width)."""
    n, _, height, width = x.shape
    if pointwise(weight.shape, how):
        patches = x.flatten(2)
    else:
        patches = F.unfold(x, weight.shape[2:], how.dilation, how.padding, how.stride)  # type: ignore[arg-type]
        height, width = (
            (size + 2 * pad - spread * (kernel - 1) - 1) // stride + 1
            for size, pad, spread, kernel, stride in zip(
                x.shape[2:], how.padding, how.dilation, weight.shape[2:], how.stride, strict=True
            )
        )
    columns = patches[0] if n == 1 else patches.transpose(0, 1).flatten(1)
    result = product(weight.flatten(1), columns.t())
    if bias is not None:
        result += bias[:, None]
    return result.view(-1, n, height, width).transpose(0, 1).contiguous()


def transposed_convolution(gradient: Tensor, weight: Tensor, shape: torch.Size, how: ConvOptions) -> Tensor:
    """The gradient of the convolution's input, of this shape."""
    rows = gradient.flatten(2).transpose(1, 2)  # (N, pixels, o)
    patches = product(rows.contiguous(), weight.flatten(1).t()).transpose(1, 2)
    if pointwise(weight.shape, how):
        return patches.reshape(shape)
    return F.fold(patches, shape[2:], weight.shape[2:], how.dilation, how.padding, how.stride)  # type: ignore[arg-type]
