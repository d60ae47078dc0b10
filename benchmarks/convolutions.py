"""SD 1.5's convolutions of few pixels as products of patches and as PyTorch's convolutions: forward and backward pass on a CPU.

python benchmarks/convolutions.py [--resolution 256] [--pictures 1] [--dtype bfloat16] [--times 9]

Both ways in turn, in one thread; CPU milliseconds, medians. Only the layers that the package computes as products.
"""

from __future__ import annotations

import argparse
import statistics
import time
from collections import Counter
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from torch import nn

from lora_booth.base.single_file import CONFIGS
from lora_booth.kernels import autograd
from lora_booth.kernels.autograd import FrozenConv2d

Layer = tuple[tuple[int, ...], tuple[Any, ...]]  # the shape of x; the arguments of nn.Conv2d


def layers(resolution: int, pictures: int) -> Counter[Layer]:
    """The convolutions of SD 1.5's U-Net, and how many there are of each."""
    found: Counter[Layer] = Counter()

    def seen(layer: Any, inputs: tuple[torch.Tensor, ...]) -> None:
        names = ("in_channels", "out_channels", "kernel_size", "stride", "padding")
        found[tuple(inputs[0].shape), tuple(getattr(layer, name) for name in names)] += 1

    side = resolution // 8
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / "sd1" / "unet"))
        for module in unet.modules():
            if isinstance(module, nn.Conv2d):
                module.register_forward_pre_hook(seen)
        unet(torch.zeros(pictures, 4, side, side), torch.zeros(pictures), torch.zeros(pictures, 77, 768))
    return found


def milliseconds(case: Layer, dtype: torch.dtype, times: int) -> list[float] | None:
    """As a product, as a convolution; None if it is no product."""
    shape, sizes = case
    x, layer = torch.randn(shape).to(dtype).requires_grad_(), nn.Conv2d(*sizes, bias=False, dtype=dtype).requires_grad_(False)
    found: dict[int, list[float]] = {autograd.FEW_PIXELS: [], 0: []}
    few = autograd.FEW_PIXELS
    try:
        for number in range(times + 1):
            for most in sorted(found, reverse=number % 2 == 0):
                autograd.FEW_PIXELS = most
                began = time.process_time()
                result = FrozenConv2d.apply(x, layer)
                if most and not result.grad_fn.product:
                    return None
                result.backward(torch.ones_like(result))
                found[most] += [1e3 * (time.process_time() - began)] if number else []
    finally:
        autograd.FEW_PIXELS = few
    return [statistics.median(seconds) for seconds in found.values()]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--pictures", type=int, default=1)
    parser.add_argument("--dtype", default="float32")
    parser.add_argument("--times", type=int, default=9)
    given = parser.parse_args()
    torch.set_num_threads(1)
    totals = [0.0, 0.0]
    for layer, count in layers(given.resolution, given.pictures).items():
        found = milliseconds(layer, getattr(torch, given.dtype), given.times)
        if found is not None:
            totals = [total + count * one for total, one in zip(totals, found, strict=True)]
            print(f"{count} x {layer[1]} on {layer[0]}: product {found[0]:.1f}, convolution {found[1]:.1f} ms", flush=True)
    print(f"a step: products {totals[0]:.0f}, convolutions {totals[1]:.0f} ms, {totals[1] / totals[0]:.2f} times as long")


if __name__ == "__main__":
    main()
