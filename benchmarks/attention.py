"""Seconds of the U-Net's attention, forward and backward, by every kernel that there is on this machine.

python benchmarks/attention.py [--device cuda] [--bases toybox sd1] [--pixels 256 512]
"""

from __future__ import annotations

import argparse
import math
from collections import Counter

import torch

from lora_booth.kernels.attention import KERNELS, REJECTED, Shape, attention_shapes, candidates, seconds_of
from lora_booth.planning.shapes import without_weights


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--bases", nargs="+", default=["toybox", "sd1"])
    parser.add_argument("--pixels", nargs="+", type=int, default=[256, 512])
    parser.add_argument("--pictures", type=int, default=2)
    args = parser.parse_args()
    device = torch.device(args.device)
    print(f"torch {torch.__version__}, {device}, {torch.get_num_threads()} thread(s); milliseconds a step")
    print(f"{'':42s}" + "".join(f"{name:>10s}" for name in KERNELS))
    for name in args.bases:
        base = without_weights(name, torch.float32)
        sizes = [base.resolution] if name == "toybox" else args.pixels
        for size in sizes:
            shapes: Counter[Shape] = attention_shapes(base, size)
            for dtype in (torch.float32, torch.bfloat16):
                kernels = [k for k in KERNELS if k != "xformers" or device.type == "cuda"]
                if device.type == "cpu" and "plain" not in candidates(Place(base, device, dtype), shapes, args.pictures):  # type: ignore[arg-type]
                    kernels.remove("plain")
                found = {k: seconds_of(k, shapes, args.pictures, dtype, device) if k in kernels else math.inf for k in KERNELS}
                words = "".join(f"{1e3 * s:10.1f}" if s < REJECTED else f"{'-':>10s}" for s in found.values())
                print(f"{name} {size} px x {args.pictures} {str(dtype)[6:]:10s}".ljust(42) + words, flush=True)


class Place:
    """Where and in which precision, for `candidates`."""

    def __init__(self, base: object, device: torch.device, dtype: torch.dtype) -> None:
        self.base, self.device, self.dtype = base, device, dtype


if __name__ == "__main__":
    main()
