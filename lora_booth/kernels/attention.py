"""Choose the fastest attention kernel for the U-Net on this machine, by a short measurement that is cached.

Fused attention (sdpa) stores no matrix of scores. On a CPU in bf16 its gradient is slow, and plain attention is two to seven
times faster on small images (`benchmarks/attention.py`). It stores all scores, so it is never chosen where these are large.
"""

from __future__ import annotations

import importlib.util
import math
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..base.base_model import BaseModel
from ..base.changes import undone
from ..cache import cached, key_of
from ..errors import MissingExtraError, SettingsError, setting

PROCESSORS = {"sdpa": "AttnProcessor2_0", "plain": "AttnProcessor", "xformers": "XFormersAttnProcessor"}  # of diffusers
MOST_SCORES = 2**28  # bytes that plain attention may store for the backward pass; chosen
FEWEST_SCORES = 2**20  # multiply-adds of the widest layer's scores in one head that make measuring worth it; chosen
CLEARLY = 1.2  # times faster than sdpa that a kernel must be to replace it, above measurement noise; chosen
REJECTED = 1e9  # seconds, in place of a measurement
CALLS = 5  # of each kernel, of which the shortest counts; chosen

Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # as `sdpa` below
Shape = tuple[int, int, int, int]  # heads, query tokens, key tokens, channels of a head


def check_attention(base: BaseModel, name: str) -> None:
    """Raises MissingExtraError or SettingsError when this kernel is not available here."""
    if name != "xformers":
        return
    if importlib.util.find_spec("xformers") is None:
        raise MissingExtraError(setting("attention", "xformers"), "xformers")
    if base.device.type != "cuda":
        raise SettingsError(f"xformers needs a CUDA GPU and the base is on {base.device}; pass {setting('attention', 'auto')}")


def kernel_of(layer: Any) -> Kernel | None:
    """The function for the processor of a diffusers attention layer; None for a custom processor."""
    kind = type(layer.processor).__name__
    if kind == PROCESSORS["plain"] and (layer.upcast_attention or layer.upcast_softmax):
        return None
    return next((KERNELS[name] for name, processor in PROCESSORS.items() if kind == processor), None)


@contextmanager
def attention_kernel(unet: Any, name: str) -> Iterator[list[str]]:
    """Use this kernel in stock layers; yields the names of custom processors, which stay."""
    from diffusers.models import attention_processor

    before = unet.attn_processors
    kinds = {name: getattr(attention_processor, kind) for name, kind in PROCESSORS.items()}
    stock, kind = tuple(kinds.values()), kinds[name]
    custom = sorted({type(processor).__name__ for processor in before.values() if type(processor) not in stock})
    changed = {path: kind() if type(p) in stock and type(p) is not kind else p for path, p in before.items()}
    with undone(lambda: unet.set_attn_processor(dict(before))):
        unet.set_attn_processor(changed)
        yield custom


def attention_shapes(base: BaseModel, resolution: int) -> Counter[Shape]:
    """The shapes of the U-Net's attention for one image of `resolution` pixels, and how many layers have each."""
    unet = base.shell.unet
    side, levels = resolution // base.pixels_per_latent, len(unet.config.block_out_channels)
    found: Counter[Shape] = Counter()
    for path, layer in unet.named_modules():
        if not hasattr(layer, "to_q") or not hasattr(layer, "heads"):
            continue
        queries = math.ceil(side / 2 ** halvings(path, levels)) ** 2
        keys = base.tokenizer.model_max_length if layer.is_cross_attention else queries
        found[layer.heads, queries, keys, layer.inner_dim // layer.heads] += 1
    return found


def halvings(path: str, levels: int) -> int:
    """How often the picture is halved where this module of a U-Net works. levels: its resolutions"""
    part, number = (*path.split("."), "0")[:2]
    if part == "up_blocks":
        return max(0, levels - 1 - int(number) - ("upsamplers" in path))  # a sampler works on the larger picture
    return {"down_blocks": int(number) if number.isdigit() else 0, "mid_block": levels - 1}.get(part, 0)


def candidates(base: BaseModel, shapes: Counter[Shape], pictures: int) -> list[str]:
    """Kernels that may be fastest on the base's device, sdpa first. A base without weights is to run on a CPU."""
    found, kind = ["sdpa"], base.device.type
    scores = sum(heads * queries * keys * count for (heads, queries, keys, _), count in shapes.items()) * pictures
    if kind in ("cpu", "meta") and scores * base.dtype.itemsize <= MOST_SCORES:
        found.append("plain")
    if kind == "cuda" and base.dtype != torch.float32 and importlib.util.find_spec("xformers") is not None:
        found.append("xformers")
    return found


def fastest_attention(base: BaseModel, *, resolution: int, pictures: int) -> str:
    """The kernel for `pictures` images of `resolution` pixels in one forward pass: measured once, then read from the cache."""
    device = torch.device("cpu") if base.device.type == "meta" else base.device
    shapes = attention_shapes(base, resolution)
    names = candidates(base, shapes, pictures)
    widest = max((queries * keys * width for _, queries, keys, width in shapes), default=0)
    if len(names) == 1 or widest * pictures < FEWEST_SCORES:
        return "sdpa"
    key = key_of(
        device=torch.cuda.get_device_name(device) if device.type == "cuda" else torch.backends.cpu.get_cpu_capability(),
        threads=torch.get_num_threads(),
        torch=torch.__version__,
        dtype=str(base.dtype),
        shapes=sorted(shapes.items()),
        pictures=pictures,
        kernels=names,
    )

    def measured() -> dict[str, Tensor]:
        return {name: torch.tensor(seconds_of(name, shapes, pictures, base.dtype, device)) for name in names}

    seconds = cached("attention", key, measured)
    best = min(names, key=lambda name: float(seconds[name]))
    return best if seconds[best] * CLEARLY <= seconds["sdpa"] else "sdpa"


def seconds_of(name: str, shapes: Counter[Shape], pictures: int, dtype: torch.dtype, device: torch.device) -> float:
    """Forward and backward pass of all layers; REJECTED when the kernel does not support them."""
    total = 0.0
    for (heads, queries, keys, width), count in shapes.items():
        sizes = ((pictures, tokens, heads * width) for tokens in (queries, keys, keys))
        q, k, v = (torch.randn(*size, device=device).to(dtype).requires_grad_() for size in sizes)
        try:
            total += count * min(seconds_for(KERNELS[name], q, k, v, heads) for _ in range(CALLS))
        except (RuntimeError, NotImplementedError, ValueError):
            return REJECTED
    return total


def seconds_for(kernel: Kernel, q: Tensor, k: Tensor, v: Tensor, heads: int) -> float:
    began = now(q.device)
    result = kernel(q, k, v, heads)
    result.backward(torch.ones_like(result))  # type: ignore[no-untyped-call]
    return now(q.device) - began


def now(device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


# --- what diffusers' processors compute: (N, tokens, heads x width) each -> (N, query tokens, heads x width)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, tokens, heads x width) -> (N, heads, tokens, width)"""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def plain(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (split_heads(x, heads).flatten(0, 1) for x in (q, k, v))
    scores = torch.bmm(q, k.transpose(1, 2)) * q.shape[-1] ** -0.5
    return torch.bmm(scores.softmax(dim=-1), v).view(-1, heads, *q.shape[1:]).transpose(1, 2).flatten(2)


def xformers(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    q, k, v = (split_heads(x, heads).flatten(0, 1).contiguous() for x in (q, k, v))
    result: Tensor = memory_efficient_attention(q, k, v)
    return result.view(-1, heads, *q.shape[1:]).transpose(1, 2).flatten(2)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "plain": plain, "xformers": xformers}
