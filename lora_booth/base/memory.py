"""What fits into memory at a time, and how much a computation takes: counted tensor by tensor, on any device and on none."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

PIXELS_AT_A_TIME = 4 * 512 * 512  # through VAE or sampler on a GPU of 15 GB, in fp32
MOST_AT_A_TIME = 8


@contextmanager
def without_collections() -> Iterator[None]:
    """Python looks for cycles of garbage later: while libraries are imported it would look at all of them, again and again."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


def pictures_at_a_time(resolution: int) -> int:
    """How many square pictures of this side (pixels) go through the VAE or the sampler together: 4 at 512, 1 at 1024."""
    return max(1, min(MOST_AT_A_TIME, PIXELS_AT_A_TIME // resolution**2))


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the memory behind these tensors, what they share counted once."""
    return sum({one._cdata: one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}.values())


@dataclass
class Saved:
    """Memory that autograd keeps for a backward pass; weights and buffers of the models are not in it."""

    storages: dict[int, tuple[weakref.ref[Any], int]] = field(default_factory=dict)  # address -> storage, its bytes

    @property
    def bytes(self) -> int:
        """Of what is still kept."""
        return sum(size for storage, size in self.storages.values() if storage() is not None)


@contextmanager
def saved_for_backward(*models: nn.Module) -> Iterator[Saved]:
    """Count what autograd saves inside. Read it before the backward pass, which gives the memory back."""
    own = {t.untyped_storage()._cdata for model in models for t in (*model.parameters(), *model.buffers())}
    saved = Saved()

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            saved.storages[storage._cdata] = weakref.ref(storage), storage.nbytes()
        return tensor.detach()  # with its graph it would be kept by what it keeps

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        yield saved


# --- everything that a computation does ------------------------------------------------------------------------------

aten = torch.ops.aten
FLOPS: dict[Any, Any] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
LAID_OUT_ANEW = {aten.convolution: (0, 1), aten.convolution_backward: (0, 2)}  # arguments that oneDNN copies into its order


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Counts kernels, arithmetic, traffic and the most memory at once of all that runs inside.

    Tensors that exist before are not counted; tensors of the "meta" device have sizes, and cost nothing.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.live = self.peak = 0  # bytes of new storages
        self.peak_on_cpu = 0  # and with the copies that a CPU's convolutions work on
        self.flops = 0  # of matrix products, convolutions and attention
        self.moved = 0  # bytes read and written by all other kernels
        self.kernels = 0
        self._known: dict[int, weakref.ref[Any]] = {}  # address -> storage, to hear of its end
        self._seen: dict[Any, Any] = {}  # kernel and sizes on the "meta" device -> its results, without their memory

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = list(tensors_in((args, kwargs)))
        out = self._run(func, args, kwargs, given)
        made = list(tensors_in(out))
        inputs = {one.untyped_storage()._cdata for one in given}
        for tensor in made:
            storage = tensor.untyped_storage()
            if storage._cdata not in self._known and storage._cdata not in inputs:
                self._born(storage)
        copies = sum(args[i].nbytes for i in LAID_OUT_ANEW.get(func._overloadpacket, ()))
        self.peak_on_cpu = max(self.peak_on_cpu, self.peak, self.live + copies)
        if not is_view(func):
            self.kernels += 1
            formula = FLOPS.get(func._overloadpacket)
            if formula is not None:
                self.flops += formula(*args, **kwargs, out_val=out)
            else:
                self.moved += sum(tensor.numel() * tensor.element_size() for tensor in (*given, *made))
        return out

    def _run(self, func: Any, args: Any, kwargs: Any, given: list[Tensor]) -> Any:
        """The kernel; on the "meta" device, where one takes a millisecond of Python, each for each size only once."""
        if makes_no_new_memory(func) or not given or not all(tensor.is_meta for tensor in given):
            return func(*args, **kwargs)
        key = func, described((args, kwargs))
        if key not in self._seen:
            out = func(*args, **kwargs)
            self._seen[key] = (type(out), [described(one) for one in ((out,) if isinstance(out, Tensor) else out)])
            return out
        kind, parts = self._seen[key]
        made = [one.made() if isinstance(one, Sizes) else one for one in parts]
        return made[0] if issubclass(kind, Tensor) else made if kind is list else tuple(made)

    def _born(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size
        self.peak = max(self.peak, self.live)


@dataclass(frozen=True)
class Sizes:
    """A tensor of the "meta" device, all that there is to know of it."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def made(self) -> Tensor:
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device="meta")


def described(value: Any) -> Any:
    """`value` as one can look it up: tensors by their sizes."""
    if isinstance(value, Tensor):
        return Sizes(tuple(value.shape), value.stride(), value.dtype)
    if isinstance(value, list | tuple):
        return tuple(map(described, value))
    if isinstance(value, dict):
        return tuple((name, described(one)) for name, one in value.items())
    return value if isinstance(value, bool | int | str | None) else (type(value), str(value))


def tensors_in(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from tensors_in(one)
    elif isinstance(value, dict):
        yield from tensors_in(list(value.values()))


@cache
def is_view(func: Any) -> bool:
    """Does it only look at its input in another way, with no work on a device?"""
    returned = func._schema.returns
    return bool(returned) and all(one.alias_info is not None and not one.alias_info.is_write for one in returned)


@cache
def makes_no_new_memory(func: Any) -> bool:
    return any(one.alias_info is not None for one in (*func._schema.arguments, *func._schema.returns))


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on the "meta" device as real devices compute it: without a matrix of all scores.

    Their kernels save the same: query, key, value, output and one float32 for each row.
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
