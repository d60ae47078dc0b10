"""Lean arithmetic for frozen layers: nothing is kept for the gradient of a weight that has none, and small products are fast.

PyTorch keeps the input of a frozen convolution, the two tensors between GroupNorm and its convolution, and three of a
GEGLU. Here a frozen layer keeps nothing, GroupNorm + SiLU its input, GEGLU one tensor, a LoRA layer its input and its
`rank` numbers a token. Gradients are the stock ones, but for rounding. On a CPU the products go to oneDNN, also those of
small pictures' convolutions, whose weights would otherwise be laid out anew at every call.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function
from torch.nn.grad import conv2d_input

from .quantization import is_packed, whole

# On a CPU a convolution is faster as one matrix product (measured on the layers of SD 1.5) when
FEW_PIXELS = 128  # of a batch at most come out of it and
MANY_WEIGHTS = 2**20  # at least would be laid out anew for it

# --- products ------------------------------------------------------------------------------------------------------


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
    if x.device.type == "cpu" and onednn(x.dtype) and torch.backends.mkldnn.enabled:
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


class LoraLinear(Function):
    """W x + b + scale B A x, computed in x's precision; gradients for x, A and B. packing: of a quantized W, kept packed."""

    @staticmethod
    def forward(
        ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, down: Tensor, up: Tensor, scale: float, packing: Any = None
    ) -> Tensor:
        hidden = product(x, down.to(x.dtype)).flatten(0, -2)
        result = product(x, whole(weight, packing), bias)
        result.view(-1, result.shape[-1]).addmm_(hidden, up.to(x.dtype).t(), alpha=scale)
        ctx.save_for_backward(x, hidden, weight, down, up)
        ctx.scale, ctx.packing = scale, packing
        return result

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, hidden, weight, down, up = ctx.saved_tensors
        rows = gradient.reshape(-1, gradient.shape[-1])
        inner = rows @ (up * ctx.scale).to(x.dtype)  # (tokens, rank)
        for_up = (hidden.t() @ rows).t() * ctx.scale
        for_down = inner.t() @ x.reshape(-1, x.shape[-1])
        for_x = None
        if ctx.needs_input_grad[0]:
            for_x = product(gradient, whole(weight, ctx.packing).t())
            for_x.view(-1, for_x.shape[-1]).addmm_(inner, down.to(x.dtype))
        return for_x, None, None, for_down.to(down.dtype), for_up.to(up.dtype), None, None


class FrozenConv2d(Function):
    """Keeps its weight alone."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor | None, how: dict[str, Any]) -> Tensor:
        ctx.save_for_backward(weight)
        ctx.shape, ctx.how = x.shape, how
        ctx.as_product = as_product(x, weight, how)
        return convolution(x, weight, bias, how) if ctx.as_product else F.conv2d(x, weight, bias, **how)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (weight,) = ctx.saved_tensors
        if ctx.as_product:
            return transposed_convolution(gradient, weight, ctx.shape, ctx.how), None, None, None
        return conv2d_input(ctx.shape, weight, gradient, **ctx.how), None, None, None  # type: ignore[no-untyped-call]


def as_product(x: Tensor, weight: Tensor, how: dict[str, Any]) -> bool:
    if x.device.type != "cpu" or how["groups"] != 1 or not (onednn(x.dtype) and weight.is_contiguous()):
        return False
    pixels = x.shape[0] * (x.shape[2] // how["stride"][0]) * (x.shape[3] // how["stride"][1])
    few = pixels <= FEW_PIXELS and weight.numel() >= MANY_WEIGHTS
    return few or (pointwise(weight, how) and x.dtype == torch.float32)


def pointwise(weight: Tensor, how: dict[str, Any]) -> bool:
    return weight.shape[2:] == (1, 1) and how["stride"] == (1, 1) and how["padding"] == (0, 0)


def convolution(x: Tensor, weight: Tensor, bias: Tensor | None, how: dict[str, Any]) -> Tensor:
    """The convolution as one product: patches (N, i k k, pixels) -> (N, o, height, width)."""
    n, _, height, width = x.shape
    if pointwise(weight, how):
        patches = x.flatten(2)
    else:
        sizes = {key: how[key] for key in ("stride", "padding", "dilation")}
        patches = F.unfold(x, weight.shape[2:], **sizes)  # type: ignore[arg-type]
        height, width = (
            (size + 2 * pad - spread * (kernel - 1) - 1) // stride + 1
            for size, pad, spread, kernel, stride in zip(
                x.shape[2:], how["padding"], how["dilation"], weight.shape[2:], how["stride"], strict=True
            )
        )
    columns = patches[0] if n == 1 else patches.transpose(0, 1).flatten(1)
    result = product(weight.flatten(1), columns.t())
    if bias is not None:
        result += bias[:, None]
    return result.view(-1, n, height, width).transpose(0, 1).contiguous()


def transposed_convolution(gradient: Tensor, weight: Tensor, shape: torch.Size, how: dict[str, Any]) -> Tensor:
    """The gradient of the convolution's input, of this shape."""
    rows = gradient.flatten(2).transpose(1, 2)  # (N, pixels, o)
    patches = product(rows.contiguous(), weight.flatten(1).t()).transpose(1, 2)
    if pointwise(weight, how):
        return patches.reshape(shape)
    sizes = {key: how[key] for key in ("stride", "padding", "dilation")}
    return F.fold(patches, shape[2:], weight.shape[2:], **sizes)  # type: ignore[arg-type]


# --- what is computed again -----------------------------------------------------------------------------------------


class NormSilu(Function):
    """SiLU(GroupNorm(x)): keeps x and the groups' statistics; the gradient computes the rest again."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float) -> Tensor:
        x = x.contiguous()
        n, channels, pixels = x.shape[0], x.shape[1], x.shape[2:].numel()
        normal, mean, rstd = torch.native_group_norm(x, weight, bias, n, channels, pixels, groups, eps)
        ctx.save_for_backward(x, mean, rstd, weight, bias)
        ctx.groups, ctx.eps = groups, eps
        return F.silu(normal, inplace=True)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        x, mean, rstd, weight, bias = ctx.saved_tensors
        sizes = (x.shape[0], x.shape[1], x.shape[2:].numel(), ctx.groups)
        normal = torch.native_group_norm(x, weight, bias, *sizes, ctx.eps)[0]
        gradient = torch.ops.aten.silu_backward(gradient, normal)
        mask = [True, False, False]
        for_x = torch.ops.aten.native_group_norm_backward(gradient, x, mean, rstd, weight, *sizes, mask)[0]
        return for_x, None, None, None, None


class Geglu(Function):
    """Values x GELU(gates): keeps both halves as the one tensor that they are."""

    @staticmethod
    def forward(ctx: Any, halves: Tensor) -> Tensor:
        ctx.save_for_backward(halves)
        values, gates = halves.chunk(2, dim=-1)
        return F.gelu(gates).mul_(values)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        (halves,) = ctx.saved_tensors
        values, gates = halves.chunk(2, dim=-1)
        result = torch.empty_like(halves)
        for_values, for_gates = result.chunk(2, dim=-1)
        torch.mul(gradient, F.gelu(gates), out=for_values)
        torch.ops.aten.gelu_backward.grad_input(gradient * values, gates, grad_input=for_gates)
        return result


# --- modules -------------------------------------------------------------------------------------------------------


def lean_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if stock(x):
        return nn.Linear.forward(layer, x)
    return FrozenLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return, no-untyped-call]


def lean_conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if stock(x):
        return nn.Conv2d.forward(layer, x)
    how = {"stride": layer.stride, "padding": layer.padding, "dilation": layer.dilation, "groups": layer.groups}
    return FrozenConv2d.apply(x, layer.weight, layer.bias, how)  # type: ignore[no-any-return, no-untyped-call]


def lean_lora(layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A PEFT layer around a frozen linear layer, with one adapter, switched on and not merged."""
    names = [name for name in layer.active_adapters if name in layer.lora_A]
    if args or kwargs or len(names) != 1 or layer.disable_adapters or layer.merged or stock(x):
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    (name,) = names
    plain = layer.base_layer
    packing = plain.weight.quant_state if is_packed(plain) else None
    if packing is not None and packing.dtype != x.dtype:
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    down, up = layer.lora_A[name].weight, layer.lora_B[name].weight
    return LoraLinear.apply(x, plain.weight, plain.bias, down, up, layer.scaling[name], packing)  # type: ignore[no-any-return, no-untyped-call]


def lean_geglu(layer: Any, x: Tensor) -> Tensor:
    if stock(x):
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    return Geglu.apply(layer.proj(x))  # type: ignore[no-any-return, no-untyped-call]


def lean_resnet(block: Any, x: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    if args or kwargs or stock(x):
        return type(block).forward(block, x, temb, *args, **kwargs)  # type: ignore[no-any-return]
    hidden = block.conv1(norm_silu(block.norm1, x))
    if block.time_emb_proj is not None:
        hidden = hidden + block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    hidden = block.conv2(norm_silu(block.norm2, hidden))
    if block.conv_shortcut is not None:
        x = block.conv_shortcut(x)
    result = x + hidden
    return result if block.output_scale_factor == 1 else result / block.output_scale_factor


def norm_silu(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    return NormSilu.apply(x, norm.weight, norm.bias, norm.num_groups, norm.eps)  # type: ignore[no-any-return, no-untyped-call]


def stock(x: Tensor) -> bool:
    """Without gradients there is nothing to save; autocast would change precisions between forward and backward."""
    return not torch.is_grad_enabled() or (not x.is_meta and torch.is_autocast_enabled(x.device.type))


def frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def watched(module: nn.Module) -> bool:
    """Whether somebody looks at what goes in or out: then it has to be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def lean_forward(module: nn.Module) -> Callable[..., Tensor] | None:
    """The lean way through this module; None: it has none, or is not the stock module that it should be."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.resnet import ResnetBlock2D
    from peft.tuners.lora import Linear as PeftLinear
    from peft.tuners.lora import LoraLayer

    kind = type(module)
    if kind is nn.Linear and frozen(module):
        return lean_linear
    if kind is nn.Conv2d and frozen(module) and not isinstance(module.padding, str) and module.padding_mode == "zeros":
        return lean_conv
    if kind is GEGLU:
        return lean_geglu
    if (kind is PeftLinear or (kind.__name__ == "Linear4bit" and isinstance(module, LoraLayer))) and plain_lora(module):
        return lean_lora
    if kind is ResnetBlock2D and plain_resnet(module):
        return lean_resnet
    return None


def plain_lora(layer: Any) -> bool:
    adapters = list(layer.lora_A)
    inner = [part for name in adapters for part in (layer.base_layer, layer.lora_A[name], layer.lora_B[name])]
    return (
        (type(layer.base_layer) is nn.Linear or is_packed(layer.base_layer))
        and frozen(layer.base_layer)
        and not any(watched(part) or "forward" in vars(part) for part in inner)
        and not layer.lora_variant
        and all(type(layer.lora_dropout[name]) is nn.Identity for name in adapters)
        and all(layer.lora_A[name].bias is None and layer.lora_B[name].bias is None for name in adapters)
    )


def plain_resnet(block: Any) -> bool:
    parts = (block.norm1, block.norm2, block.dropout, block.nonlinearity)
    return (
        block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and type(block.nonlinearity) is nn.SiLU
        and block.dropout.p == 0
        and all(type(norm) is nn.GroupNorm and frozen(norm) for norm in parts[:2])
        and not any(watched(part) or "forward" in vars(part) for part in parts)
    )


@contextmanager
def lean(model: nn.Module) -> Iterator[int]:
    """Frozen layers of `model` compute as above meanwhile; yields how many. A module with a forward of its own keeps it."""
    patched: list[nn.Module] = []
    try:
        chosen = [(module, lean_forward(module)) for module in model.modules() if "forward" not in vars(module)]
        for module, forward in chosen:
            if forward is not None:
                patched.append(module)
                module.forward = partial(forward, module)
        yield len(patched)
    finally:
        for module in patched:
            vars(module).pop("forward", None)
