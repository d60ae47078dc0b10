"""Layers of Stable Diffusion on a CUDA GPU: LoRA layers by one Triton kernel against PyTorch's, and attention by each kernel.

python benchmarks/kernels.py [--blocks]    forward and backward pass as recorded graphs, microseconds; --blocks: the best tiles
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

from lora_booth.kernels import dispatch as kernels
from lora_booth.kernels.dispatch import Block
from lora_booth.kernels.lora import LoraPiece, plain_backward, plain_forward

LAYERS = {  # rows, outs, ins, layers that read the same input
    "SD 64x64 q k v": (4096, 320, 320, 3),
    "SD 64x64 out": (4096, 320, 320, 1),
    "SD 32x32 q k v": (1024, 640, 640, 3),
    "SD 32x32 out": (1024, 640, 640, 1),
    "SD 16x16 q k v": (256, 1280, 1280, 3),
    "SD 16x16 out": (256, 1280, 1280, 1),
    "SD 8x8 q k v": (64, 1280, 1280, 3),
    "SD text k v": (77, 1280, 768, 2),
    "XL 64x64 q k v": (4096, 640, 640, 3),
    "XL 32x32 q k v": (1024, 1280, 1280, 3),
    "XL text k v": (77, 1280, 2048, 2),
    "SD 64x64 q k v, batch 8": (32768, 320, 320, 3),
}
ATTENTION = {  # pictures, heads, queries, keys, width of a head
    "SD 64x64": (1, 8, 4096, 4096, 40),
    "SD 64x64 text": (1, 8, 4096, 77, 40),
    "SD 32x32": (1, 8, 1024, 1024, 80),
    "SD 16x16": (1, 8, 256, 256, 160),
    "XL 64x64": (1, 10, 4096, 4096, 64),
    "XL 32x32": (1, 20, 1024, 1024, 64),
    "XL 32x32 text": (1, 20, 1024, 77, 64),
}
TILES = (  # rows, outs, ins, warps, stages
    (32, 64, 64, 4, 4), (64, 32, 64, 4, 4), (64, 64, 64, 4, 3), (64, 64, 64, 4, 5), (64, 128, 64, 4, 4), (128, 64, 64, 4, 4),
    (128, 64, 64, 8, 4), (128, 128, 64, 8, 3), (128, 128, 64, 8, 4), (128, 128, 64, 4, 3), (64, 64, 128, 4, 3),
    (256, 64, 64, 8, 3),
)  # fmt: skip
DTYPE = torch.bfloat16


def microseconds(work: Callable[[], object]) -> float:
    from triton.testing import do_bench_cudagraph

    return 1e3 * float(do_bench_cudagraph(work, rep=10, return_mode="median"))


def not_recorded(work: Callable[[], object]) -> float:
    from triton.testing import do_bench

    return 1e3 * float(do_bench(work, warmup=5, rep=30, return_mode="median"))


def pieces(outs: int, ins: int, count: int, rank: int = 8) -> list[LoraPiece]:
    found = []
    for _ in range(count):
        weight, bias = (torch.randn(*size, device="cuda").to(DTYPE) * 0.05 for size in ((outs, ins), (outs,)))
        down, up = (torch.randn(*size, device="cuda").to(DTYPE) for size in ((rank, ins), (outs, rank)))
        places = torch.zeros_like(down).float(), torch.zeros_like(up).float()
        found.append(LoraPiece(weight, bias, None, down, up, 1.0, *places, trigger=down))
    return found


def layer_times(rows: int, outs: int, ins: int, count: int) -> list[float]:
    """Triton forward, backward; PyTorch forward, backward; the frozen layers alone, forward, backward."""
    x, some = torch.randn(rows, ins, device="cuda").to(DTYPE), pieces(outs, ins, count)
    weights = [piece.weight for piece in some]
    gradients = [torch.randn(rows, outs, device="cuda").to(DTYPE) for _ in some]
    low = kernels.lora_linear(x, weights, some)[1]
    for_input = "text" not in name_of(rows, outs, ins, count)
    return [
        microseconds(lambda: kernels.lora_linear(x, weights, some)),
        microseconds(lambda: kernels.lora_linear_backward(gradients, x, low, weights, some, for_input=for_input)),
        microseconds(lambda: plain_forward(x, weights, some)),
        microseconds(lambda: plain_backward(gradients, x, low, weights, some, for_input=for_input)),
        microseconds(lambda: [F.linear(x, piece.weight, piece.bias) for piece in some]),
        microseconds(lambda: [gradient @ weight for gradient, weight in zip(gradients, weights, strict=True)]),
    ]


def name_of(*shape: int) -> str:
    return next(name for name, known in LAYERS.items() if known == shape)


def blocks() -> None:
    """The best tiles of each layer's two products."""
    for name, (rows, outs, ins, count) in LAYERS.items():
        x, some = torch.randn(rows, ins, device="cuda").to(DTYPE), pieces(outs, ins, count)
        weights = [piece.weight for piece in some]
        gradients = [torch.randn(rows, outs, device="cuda").to(DTYPE) for _ in some]
        low = kernels.lora_linear(x, weights, some)[1]
        found: dict[str, list[tuple[float, Block]]] = {"forward": [], "backward": []}
        for down, across, deep, warps, stages in TILES:
            block = Block(down, across, deep, warps, stages)
            kernels.block_for = lambda *_, **__: block  # type: ignore[assignment]  # noqa: B023
            try:
                forward = microseconds(lambda: kernels.lora_linear(x, weights, some))  # noqa: B023
                backward = microseconds(lambda: kernels.lora_linear_backward(gradients, x, low, weights, some, for_input=True))  # noqa: B023
            except Exception as error:
                print(block, str(error)[:80])
                continue
            found["forward"].append((forward, block))
            found["backward"].append((backward, block))
        for way, times in found.items():
            best = sorted(times, key=lambda pair: pair[0])[:3]
            words = "; ".join(f"{t:.1f} us {b.rows}x{b.outs}x{b.ins} w{b.warps} s{b.stages}" for t, b in best)
            print(f"{name} {way}: {words}", flush=True)


def attention_times(pictures: int, heads: int, queries: int, keys: int, width: int) -> dict[str, str]:
    """Forward and backward pass by each of PyTorch's kernels and xformers'."""
    q, k, v = (torch.randn(pictures, n, heads, width, device="cuda").to(DTYPE).requires_grad_() for n in (queries, keys, keys))
    given = torch.randn(pictures, queries, heads, width, device="cuda").to(DTYPE)
    turned = [x.transpose(1, 2) for x in (q, k, v)]

    def sdpa(backend: SDPBackend) -> Any:
        with sdpa_kernel(backend):
            return F.scaled_dot_product_attention(*turned).transpose(1, 2)

    def others() -> Any:
        from xformers.ops import memory_efficient_attention

        return memory_efficient_attention(q, k, v)

    ways: dict[str, Callable[[], Any]] = {b.name: lambda b=b: sdpa(b) for b in (
        SDPBackend.FLASH_ATTENTION, SDPBackend.CUDNN_ATTENTION, SDPBackend.EFFICIENT_ATTENTION)}  # fmt: skip
    ways["xformers"] = others
    found = {}
    for name, work in ways.items():
        try:
            with torch.no_grad():
                forward = not_recorded(work)
            both = not_recorded(lambda: torch.autograd.grad(work(), (q, k, v), given))  # noqa: B023
            found[name.removesuffix("_ATTENTION").lower()] = f"{forward:.0f} + {both - forward:.0f}"
        except Exception as error:
            found[name] = str(error)[:60].replace("\n", " ")
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--blocks", action="store_true")
    given = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}; microseconds, forward + backward")
    if given.blocks:
        blocks()
    for name, sizes in ATTENTION.items():
        print(f"attention {name:16s} {attention_times(*sizes)}", flush=True)
    if given.blocks:
        return
    for name, shape in LAYERS.items():
        triton, triton_back, plain, plain_back, alone, alone_back = layer_times(*shape)
        print(
            f"{name:26s} Triton {triton:.1f} + {triton_back:.1f}, PyTorch {plain:.1f} + {plain_back:.1f}, "
            f"frozen alone {alone:.1f} + {alone_back:.1f}",
            flush=True,
        )


if __name__ == "__main__":
    main()
