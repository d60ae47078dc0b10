"""Launch the Triton kernels, each of which replaces several of PyTorch's on CUDA GPUs where `works_on`.

Each function has a counterpart in PyTorch, in `autograd` or `lora`, with the same result.
Images are channels last: (N, C, H, W) with the channels of a pixel side by side in memory.
"""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

import torch
from torch import Tensor

OLDEST = (7, 0)  # lowest compute capability that Triton supports
OLDEST_FOR_PRODUCTS = (8, 0)  # lowest one on which its matrix products use tensor cores well
TILE = 2048  # values of an image in one program; chosen
PARTS = (32, 128)  # most parts of a group's pixels that a kernel is compiled for; larger images take more; chosen
PROGRAMS = 528  # that share the sum over all tokens: four for each of an H100's 132 multiprocessors
FEWEST_ROWS = 512  # tokens that make another program worth it; chosen
COUNTERS = 2**14  # chosen


@cache
def works_on(device: torch.device, oldest: tuple[int, int] = OLDEST) -> bool:
    """Whether the kernels run on this device, and are right. Tried once, since they are compiled on first use."""
    if device.type != "cuda" or importlib.util.find_spec("triton") is None:
        return False
    if torch.cuda.get_device_capability(device) < oldest:
        return False
    try:
        x = torch.linspace(-3, 3, 128, device=device).view(4, 32)
        return torch.allclose(geglu(x), x[:, :16] * torch.nn.functional.gelu(x[:, 16:]), atol=1e-5)
    except Exception:  # no C compiler, cache folder or driver: each raises another kind
        return False


@cache
def compiled() -> Any:
    """The kernels' module, which needs Triton."""
    return importlib.import_module(".triton_kernels", __package__)


def power_of_2(n: int) -> int:
    """The smallest power of 2 >= n."""
    return 1 << max(0, n - 1).bit_length()


def parts_of(n: int, size: int) -> int:
    return -(-n // size)


# --- group norm ------------------------------------------------------------------------------------------------------


def channels_last(x: Tensor) -> Tensor:
    """x if its channels lie side by side, also as a slice of a larger tensor's channels; else a copy."""
    good = x.stride(1) == 1 and (x.shape[2] == 1 or x.stride(2) == x.shape[3] * x.stride(3))
    return x if good else x.contiguous(memory_format=torch.channels_last)


def tiles_of(x: Tensor, groups: int) -> tuple[tuple[int, int], tuple[int, ...], dict[str, int], int]:
    """How programs share the groups of images (N, C, H, W): the grid; pixels, channels, parts of a group's pixels and channels
    of a group; the tiles' constants; and for how many parts the kernels that add them up are compiled."""
    rows, channels, pixels = x.shape[0], x.shape[1], x.shape[2] * x.shape[3]
    width = channels // groups
    across = power_of_2(width)
    down = max(1, TILE // across)
    parts = parts_of(pixels, down)
    most = next((most for most in PARTS if parts <= most), power_of_2(parts))
    sizes = {"GROUPS": groups, "PIXELS": down, "WIDTH": across}
    return (rows * groups, parts), (pixels, channels, parts, width), sizes, most


def group_norm(
    x: Tensor, weight: Tensor, bias: Tensor, groups: int, eps: float, *, silu: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """GroupNorm, then SiLU if `silu`; and mean and 1 / deviation of each group, (N x groups,) float32. x (N, C, H, W)"""
    x = channels_last(x)
    grid, numbers, sizes, most = tiles_of(x, groups)
    means, squares = torch.empty((2, *grid), dtype=torch.float32, device=x.device)
    mean, rstd = torch.empty((2, grid[0]), dtype=torch.float32, device=x.device)
    y = torch.empty_like(x, memory_format=torch.channels_last)
    strides = x.stride(0), x.stride(3)
    compiled().group_moments_kernel[grid](x, means, squares, *strides, *numbers, **sizes)
    compiled().group_norm_kernel[grid](
        x, weight, bias, means, squares, mean, rstd, y, *strides, *numbers, eps, int(silu), PARTS=most, **sizes
    )
    return y, mean, rstd


def group_norm_backward(
    gradient: Tensor,
    skip: Tensor | None,
    x: Tensor,
    mean: Tensor,
    rstd: Tensor,
    weight: Tensor,
    bias: Tensor,
    groups: int,
    *,
    silu: bool,
) -> Tensor:
    """The gradient of x in `group_norm`, plus `skip`, its gradient along other paths. All shaped like x."""
    x, gradient = channels_last(x), channels_last(gradient)
    grid, numbers, sizes, most = tiles_of(x, groups)
    plain, along = torch.empty((2, *grid), dtype=torch.float32, device=x.device)
    result = torch.empty_like(x, memory_format=torch.channels_last)
    beside = gradient if skip is None else channels_last(skip)
    strides = [size for tensor in (x, gradient) for size in (tensor.stride(0), tensor.stride(3))]
    compiled().group_sums_kernel[grid](
        x, weight, bias, gradient, mean, rstd, plain, along, *strides, *numbers, int(silu), **sizes
    )
    compiled().group_norm_backward_kernel[grid](
        x, weight, bias, gradient, beside, mean, rstd, plain, along, result,
        *strides, beside.stride(0), beside.stride(3), *numbers, int(silu), int(skip is not None), PARTS=most, **sizes,
    )  # fmt: skip
    return result


# --- layer norm ------------------------------------------------------------------------------------------------------


def layer_norm(
    x: Tensor, more: Tensor | None, weight: Tensor, bias: Tensor, eps: float
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """x + more, LayerNorm of that; mean and 1 / deviation of each token (tokens,) float32. x, more (..., C)"""
    x, channels = x.contiguous(), x.shape[-1]
    tokens = x.numel() // channels
    more = None if more is None else more.contiguous()
    total, y = x if more is None else torch.empty_like(x), torch.empty_like(x)
    mean, rstd = torch.empty((2, tokens), dtype=torch.float32, device=x.device)
    compiled().layer_norm_kernel[(tokens,)](
        x, x if more is None else more, weight, bias, total, y, mean, rstd, channels, eps,
        int(more is not None), WIDTH=power_of_2(channels),
    )  # fmt: skip
    return total, y, mean, rstd


def layer_norm_backward(
    gradient: Tensor, skip: Tensor | None, total: Tensor, mean: Tensor, rstd: Tensor, weight: Tensor
) -> Tensor:
    """The gradient of the sum in `layer_norm`, plus `skip`, its gradient along other paths."""
    total, gradient, channels = total.contiguous(), gradient.contiguous(), total.shape[-1]
    result = torch.empty_like(total)
    beside = gradient if skip is None else skip.contiguous()
    compiled().layer_norm_backward_kernel[(total.numel() // channels,)](
        total, gradient, beside, weight, mean, rstd, result, channels, int(skip is not None), WIDTH=power_of_2(channels)
    )
    return result


# --- element by element ----------------------------------------------------------------------------------------------


def geglu(halves: Tensor) -> Tensor:
    """(..., 2 F) -> (..., F): values x GELU(gates), by the error function"""
    halves, width = halves.contiguous(), halves.shape[-1] // 2
    y = halves.new_empty(*halves.shape[:-1], width)
    block = min(1024, power_of_2(width))
    compiled().geglu_kernel[(y.numel() // width, parts_of(width, block))](halves, y, width, WIDTH=block)
    return y


def geglu_backward(gradient: Tensor, halves: Tensor) -> Tensor:
    halves, gradient, width = halves.contiguous(), gradient.contiguous(), gradient.shape[-1]
    result, block = torch.empty_like(halves), min(1024, power_of_2(width))
    compiled().geglu_backward_kernel[(gradient.numel() // width, parts_of(width, block))](
        halves, gradient, result, width, WIDTH=block
    )
    return result


# --- linear layers with a LoRA ---------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Block:
    """Tile sides of a matrix product, and the warps and pipeline stages for a tile."""

    rows: int
    outs: int
    ins: int
    warps: int
    stages: int


# Largest first; measured on an H100 for the layers of SD 1.x and SDXL (benchmarks/kernels.py --blocks)
BLOCKS = (Block(128, 128, 64, 8, 3), Block(64, 128, 64, 4, 4), Block(64, 64, 64, 4, 5), Block(64, 32, 64, 4, 4))
ENOUGH = 80  # blocks that occupy most of a GPU; chosen


def block_for(rows: int, outs: int, *, layers: int = 1) -> Block:
    """The largest block of which a product of (rows, outs) has enough."""
    enough = (one for one in BLOCKS if parts_of(rows, one.rows) * parts_of(outs, one.outs) * layers >= ENOUGH)
    return next(enough, BLOCKS[-1])


def three(values: Sequence[Any]) -> list[Any]:
    return [values[min(i, len(values) - 1)] for i in range(3)]


def each(pieces: Sequence[Any], *names: str) -> list[Any]:
    """The kernels' arguments: for each name the values of three layers, the last one repeated where there are fewer."""
    return [value for name in names for value in three([getattr(piece, name) for piece in pieces])]


def ranks_of(pieces: Sequence[Any]) -> dict[str, int]:
    rank = pieces[0].down.shape[0]
    return {"RANK": rank, "RANKS": max(16, power_of_2(rank))}


def lora_linear(x: Tensor, weights: Sequence[Tensor], pieces: Sequence[Any]) -> tuple[list[Tensor], list[Tensor]]:
    """y = W x + b + scale B A x and A x of up to three layers of one shape. x (rows, ins); y (rows, outs), A x (rows, rank)"""
    (rows, ins), outs, count = x.shape, weights[0].shape[0], len(pieces)
    results, low = ([x.new_empty(rows, wide) for _ in pieces] for wide in (outs, pieces[0].down.shape[0]))
    block, biased = block_for(rows, outs, layers=count), pieces[0].bias is not None
    grid = (parts_of(rows, block.rows) * parts_of(outs, block.outs), count)
    compiled().lora_kernel[grid](
        x, *three(results), *three(low), *three(weights), *(each(pieces, "bias") if biased else [x] * 3),
        *each(pieces, "down", "up", "scale"), rows, outs, ins, int(biased), **ranks_of(pieces), ROWS=block.rows,
        OUTS=block.outs, INS=block.ins, EVEN=ins % block.ins == 0, num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    return results, low


def lora_linear_backward(
    gradients: Sequence[Tensor],
    x: Tensor,
    low: Sequence[Tensor],
    weights: Sequence[Tensor],
    pieces: Sequence[Any],
    *,
    for_input: bool,
) -> Tensor | None:
    """The gradient of x if `for_input`; those of A and B are added to the pieces' `down_gradient` and `up_gradient`.

    gradients (rows, outs), x (rows, ins), low: as returned by `lora_linear`
    """
    (rows, ins), outs, count = x.shape, weights[0].shape[0], len(pieces)
    result = x.new_empty(rows, ins) if for_input else x
    back = [x.new_empty(rows, pieces[0].down.shape[0]) for _ in pieces]
    sizes, block = ranks_of(pieces), block_for(rows, ins)
    grid = (parts_of(rows, block.rows) * (parts_of(ins, block.outs) if for_input else 1), 1)
    compiled().lora_input_gradient_kernel[grid](
        *three(gradients), result, *three(back), *three(weights), *each(pieces, "down", "up", "scale"), rows, outs, ins,
        count, FOR_INPUT=for_input, **sizes, ROWS=block.rows, OUTS=block.ins, INS=block.outs, EVEN=outs % block.ins == 0,
        num_warps=block.warps, num_stages=block.stages,
    )  # fmt: skip
    wide, deep = 32, 128 if rows >= 128 else 64
    blocks = parts_of(ins, wide) + parts_of(outs, wide)
    parts = max(1, min(PROGRAMS // (blocks * count), rows // FEWEST_ROWS)) if blocks * count <= COUNTERS else 1
    share = parts_of(parts_of(rows, parts), deep) * deep
    parts = parts_of(rows, share)
    partials = x.new_empty(blocks * count * parts * sizes["RANKS"] * wide if parts > 1 else 1, dtype=torch.float32)
    compiled().lora_factor_gradient_kernel[(blocks, count, parts)](
        x, *three(gradients), *three(low), *three(back), *each(pieces, "down_gradient", "up_gradient", "scale"), partials,
        counters_on(x.device), rows, outs, ins, share, parts, **sizes, ROWS=deep, WIDE=wide, num_warps=4, num_stages=4,
    )  # fmt: skip
    return result if for_input else None


@cache
def counters_on(device: torch.device) -> Tensor:
    """Counters, which every kernel leaves at zero."""
    return torch.zeros(COUNTERS, dtype=torch.int32, device=device)
