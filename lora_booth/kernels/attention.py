"""The U-Net's attention while it trains: PyTorch's own fused kernel, or xformers'. Neither stores a matrix of scores."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch.nn.functional as F
from torch import Tensor

from ..base.base_model import BaseModel
from ..base.changes import undone
from ..errors import MissingExtraError, SettingsError, setting

PROCESSORS = {"sdpa": "AttnProcessor2_0", "xformers": "XFormersAttnProcessor"}  # of diffusers
STOCK = (*PROCESSORS.values(), "AttnProcessor")  # compute the same

Kernel = Callable[[Tensor, Tensor, Tensor, int], Tensor]  # as `sdpa` below


def check_attention(base: BaseModel, name: str) -> None:
    """Raises MissingExtraError or SettingsError when this kernel is not available here."""
    if name != "xformers":
        return
    if importlib.util.find_spec("xformers") is None:
        raise MissingExtraError(setting("attention", "xformers"), "xformers")
    if base.device.type != "cuda":
        raise SettingsError(f"xformers needs a CUDA GPU and the base is on {base.device}; pass {setting('attention', 'sdpa')}")


def kernel_of(layer: Any) -> Kernel | None:
    """The function for the processor of a diffusers attention layer; None for another processor."""
    kind = type(layer.processor).__name__
    return next((KERNELS[name] for name, processor in PROCESSORS.items() if kind == processor), None)


@contextmanager
def attention_kernel(unet: Any, name: str) -> Iterator[list[str]]:
    """Use this kernel in stock layers; yields the names of custom processors, which stay."""
    from diffusers.models import attention_processor

    before, kind = unet.attn_processors, getattr(attention_processor, PROCESSORS[name])
    stock = tuple(getattr(attention_processor, one) for one in STOCK)
    custom = sorted({type(processor).__name__ for processor in before.values() if type(processor) not in stock})
    changed = {path: kind() if type(p) in stock and type(p) is not kind else p for path, p in before.items()}
    with undone(lambda: unet.set_attn_processor(dict(before))):
        unet.set_attn_processor(changed)
        yield custom


# --- what diffusers' processors compute: (N, tokens, heads x width) each -> (N, query tokens, heads x width)


def split_heads(x: Tensor, heads: int) -> Tensor:
    """(N, tokens, heads x width) -> (N, heads, tokens, width)"""
    return x.reshape(*x.shape[:2], heads, -1).transpose(1, 2)


def sdpa(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    q, k, v = (split_heads(x, heads) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2)


def xformers(q: Tensor, k: Tensor, v: Tensor, heads: int) -> Tensor:
    from xformers.ops import memory_efficient_attention  # type: ignore[import-not-found]

    q, k, v = (split_heads(x, heads).flatten(0, 1).contiguous() for x in (q, k, v))
    result: Tensor = memory_efficient_attention(q, k, v)
    return result.view(-1, heads, *q.shape[1:]).transpose(1, 2).flatten(2)


KERNELS: dict[str, Kernel] = {"sdpa": sdpa, "xformers": xformers}
