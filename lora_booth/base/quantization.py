"""A base in 8 or 4 bits: the U-Net's linear layers, packed one by one while it is read.

"int8" rounds each row of a weight to 255 levels, with one scale; "nf4" (bitsandbytes) rounds blocks of 64 values to 16 levels.
The layers compute in the base's precision, from weights that are unpacked for each product. Convolutions, norms, the VAE and
the text encoders are unchanged. An adapter trained on such a base fits the plain one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import Function

from ..config import Quantization, typed
from ..errors import BaseModelError, MissingExtraError, SettingsError, reason_of, setting
from .weight_files import LazyModule, put

LEVELS = 127  # of int8, on either side of 0

# bitsandbytes' defaults
BLOCK = 64  # values that share a scale
BLOCK_OF_SCALES = 256  # scales that share a second scale
TABLES = (16 + 256) * 4  # bytes: the values of the 4 bits and of the scales' 8 bits, stored with every layer


def check_quantization(kind: Quantization, device: torch.device) -> None:
    """Raises SettingsError or MissingExtraError if a U-Net cannot be quantized on this device."""
    typed("quantize", kind, Quantization | None)
    library = "bitsandbytes" if kind == "nf4" else "torch"
    if importlib.util.find_spec(library) is None:
        raise MissingExtraError(setting("quantize", kind), "quant")
    try:
        if not unpacked(*packed_and_state(torch.ones(BLOCK, BLOCK, device=device), kind)).isfinite().all():
            raise ArithmeticError("its numbers are not finite")
    except Exception as error:  # without a kernel for the device, it may raise anything
        raise SettingsError(
            f"{setting('quantize', kind)} does not work on {device} with {library} {importlib.metadata.version(library)} "
            f"({reason_of(error)}); load the base without it"
        ) from error


class Int8Linear(nn.Linear):
    """A frozen linear layer in 8 bits. weight: (out, in) int8; scale: (out, 1) in the precision that it computes in."""

    scale: Tensor

    def forward(self, x: Tensor) -> Tensor:
        """x (..., in) -> (..., out)"""
        if x.requires_grad and not torch.is_autocast_enabled(x.device.type):
            return UnpackedLinear.apply(x, self)  # type: ignore[no-any-return, no-untyped-call]
        return F.linear(x, unpacked(self.weight, self.scale), self.bias)

    def _save_to_state_dict(self, destination: dict[str, Any], prefix: str, keep_vars: bool) -> None:
        """As a plain layer, so that a saved pipeline is one that every program reads."""
        super()._save_to_state_dict(destination, prefix, keep_vars)  # type: ignore[no-untyped-call]
        destination[f"{prefix}weight"] = unpacked(self.weight, self.scale)


class UnpackedLinear(Function):
    """Unpacks the weight again in the backward pass: autograd would keep the unpacked one until then."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, layer: Int8Linear) -> Tensor:
        ctx.layer = layer
        return F.linear(x, unpacked(layer.weight, layer.scale), layer.bias)

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        return gradient @ unpacked(ctx.layer.weight, ctx.layer.scale), None


def packing_of(layer: nn.Module) -> Quantization | None:
    """How this layer's weight is packed, here or, as NF4 by bitsandbytes, by the user."""
    if isinstance(layer, Int8Linear):
        return "int8"
    return "nf4" if type(layer).__name__ == "Linear4bit" and isinstance(layer, nn.Linear) else None


def quantization_of(module: nn.Module) -> Quantization | None:
    """How layers of this module are packed."""
    return next(filter(None, map(packing_of, module.modules())), None)


def state_of(layer: Any) -> Any:
    """What `unpacked` needs besides the layer's weight; its `dtype` is the precision that was packed. None: not packed"""
    kind = packing_of(layer)
    return None if kind is None else layer.scale if kind == "int8" else layer.weight.quant_state


def weight_shape(layer: Any) -> tuple[int, ...]:
    """(out, in) of a linear layer, also of a packed one; (out, in, height, width) of a convolution."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def weight_dtype(layer: Any) -> torch.dtype:
    """The precision that the layer computes in."""
    stored: torch.dtype = layer.scale.dtype if isinstance(layer, Int8Linear) else layer.weight.dtype
    return stored if stored.is_floating_point else getattr(layer, "compute_dtype", None) or torch.float32


def refuse_quantized(module: nn.Module, name: str, what: str) -> None:
    """Raises BaseModelError if the module has only rounded weights, which cannot be added or subtracted."""
    kind = quantization_of(module)
    if kind is not None:
        remedy = f"load it without {setting('quantize', kind)}"
        raise BaseModelError(f"the U-Net of {name} is quantized, and {what} needs its weights; {remedy}")


# --- packing -------------------------------------------------------------------------------------------------------


def packed_and_state(weight: Tensor, kind: Quantization) -> tuple[Tensor, Any]:
    """(out, in) -> a byte per value and its row's scale, or two values per byte and the QuantState to unpack them."""
    if kind == "int8":
        scale = (weight.abs().amax(1, keepdim=True).float() / LEVELS).to(weight.dtype)
        levels = (weight.float() / scale.float()).nan_to_num_(0)  # rows of zeros have a scale of 0
        return levels.round_().clamp_(-LEVELS, LEVELS).to(torch.int8), scale
    from bitsandbytes.functional import quantize_4bit  # type: ignore[import-not-found]

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return packed, state  # the scales are quantized as well


def unpacked(weight: Tensor, state: Any) -> Tensor:
    """The inverse up to rounding: (out, in) in the precision that was packed. Without a state, `weight` itself."""
    if state is None:
        return weight
    if isinstance(state, Tensor):
        return weight * state
    from bitsandbytes.functional import dequantize_4bit

    result: Tensor = dequantize_4bit(weight, state)
    return result


def quantize(unet: nn.Module, lazy: LazyModule | None, dtype: torch.dtype, kind: Quantization) -> None:
    """Pack the linear layers of `unet`: now, or each one when it is read from its file."""
    for name, layer in list(unet.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, packed_layer(layer, dtype, kind))
    if lazy is not None:
        lazy.put = put_packed


def packed_layer(layer: nn.Linear, dtype: torch.dtype, kind: Quantization) -> Any:
    """The layer to replace `layer`; its weight is packed now if it is in memory."""
    size, weight = (layer.in_features, layer.out_features), layer.weight.detach()
    made: Any
    if kind == "int8":
        made = Int8Linear(*size, bias=False, device="meta")
        made.register_buffer("scale", torch.empty(len(weight), 1, dtype=dtype, device="meta"), persistent=False)
        made.weight = nn.Parameter(torch.empty_like(weight, dtype=torch.int8, device="meta"), requires_grad=False)
    else:
        from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

        made = Linear4bit(*size, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta")
        # for inference on a CPU, bitsandbytes repacks the weights in a form without gradients
        made.support_avx512bf16_for_cpu = False
        made.weight = Params4bit(weight, requires_grad=False, quant_type="nf4", module=made)
    made.bias = layer.bias
    made.train(layer.training)
    if not weight.is_meta:
        pack_into(made, weight)
    return made


def pack_into(layer: Any, weight: Tensor) -> None:
    if isinstance(layer, Int8Linear):
        packed, layer.scale = packed_and_state(weight, "int8")
        layer.weight = nn.Parameter(packed, requires_grad=False)
        return
    from bitsandbytes.nn import Params4bit

    packed, state = packed_and_state(weight, "nf4")
    layer.weight = Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", module=layer, bnb_quantized=True
    )
    layer.quant_state = state


def put_packed(module: nn.Module, key: str, value: Tensor) -> None:
    """Like `put`, but pack a linear layer's weight."""
    above, _, name = key.rpartition(".")
    layer = module.get_submodule(above)
    if name == "weight" and packing_of(layer):
        pack_into(layer, value)
    else:
        put(module, key, value)


# --- how large -----------------------------------------------------------------------------------------------------


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storage of these tensors; shared storage counts once."""
    return sum({one._cdata: one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}.values())


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and what bitsandbytes keeps beside them."""
    yield from module.parameters()
    yield from module.buffers()
    for layer in module.modules():
        state = getattr(layer, "quant_state", None) if packing_of(layer) == "nf4" else None
        if state is not None:
            inner = state.state2
            parts = (state.absmax, state.code, state.offset, *((inner.absmax, inner.code) if inner is not None else ()))
            yield from (part for part in parts if isinstance(part, Tensor))


def packed_bytes(layer: nn.Linear, kind: Quantization) -> int:
    """Bytes of a layer's packed weight, with its scales."""
    if kind == "int8":
        return layer.out_features * (layer.in_features + layer.weight.itemsize)
    count = layer.in_features * layer.out_features
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // BLOCK_OF_SCALES) + 4 + TABLES


def quantized_bytes(module: nn.Module, kind: Quantization) -> int:
    """Bytes of a module's weights if its linear layers were packed; it may be on the "meta" device."""
    linear = [layer for layer in module.modules() if type(layer) is nn.Linear]
    full = sum(layer.weight.nbytes for layer in linear)
    everything = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return everything - full + sum(packed_bytes(layer, kind) for layer in linear)
