"""Count the memory of a computation tensor by tensor, on any device, also "meta"."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop


@contextmanager
def saved_for_backward(*models: nn.Module) -> Iterator[Callable[[], int]]:
    """Yields a function: the bytes that autograd has saved inside, without the models' weights and buffers.

    Call it before the backward pass, which frees the memory.
    """
    weights = {t.untyped_storage()._cdata for model in models for t in (*model.parameters(), *model.buffers())}
    storages: dict[int, tuple[weakref.ref[Any], int]] = {}  # address -> storage, its bytes

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in weights:
            storages[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return tensor.detach()  # its graph would keep the tensor alive

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield lambda: sum(size for storage, size in storages.values() if storage() is not None)


# --- everything that a computation allocates -------------------------------------------------------------------------

aten = torch.ops.aten
FLOPS: dict[Any, Any] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
REORDERED = {aten.convolution: (0, 1), aten.convolution_backward: (0, 2)}  # arguments that oneDNN copies to its layout


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count peak memory and arithmetic of everything in the context.

    Tensors that existed before are not counted. Tensors on the "meta" device count with their sizes, but take no memory.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0  # bytes of new storages
        self.peak_on_cpu = 0  # the same, with the copies that convolutions on a CPU work on
        self.flops = 0  # of matrix products, convolutions and attention
        self._known: dict[int, weakref.ref[Any]] = {}  # address -> storage, to notice when it is freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        inputs = {one.untyped_storage()._cdata for one in tensors_in((args, kwargs))}
        out = func(*args, **kwargs)
        for tensor in tensors_in(out):
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in inputs:
                self._born(storage)
        copies = sum(args[i].nbytes for i in REORDERED.get(func._overloadpacket, ()))
        self.peak_on_cpu = max(self.peak_on_cpu, self.peak, self.live + copies)
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _born(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


def tensors_in(value: Any) -> Iterator[Tensor]:
    """The tensors in nested lists, tuples and values of dicts."""
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on the "meta" device as real devices compute it, without a matrix of all scores.

    It saves the same for the backward pass: query, key, value, output and one float32 per row.
    """
    functional: Any = nn.functional
    stock = functional.scaled_dot_product_attention

    def attention(
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attn_mask: Tensor | None = None,
        dropout_p: float = 0.0,
        is_causal: bool = False,
        scale: float | None = None,
        **more: Any,
    ) -> Tensor:
        if not query.is_meta or more:
            return stock(query, key, value, attn_mask, dropout_p, is_causal, scale=scale, **more)
        kernel = aten._scaled_dot_product_flash_attention_for_cpu
        return kernel(query, key, value, dropout_p, is_causal, attn_mask=attn_mask, scale=scale)[0]

    functional.scaled_dot_product_attention = attention
    try:
        yield
    finally:
        functional.scaled_dot_product_attention = stock
