"""A base in 4 bits: the U-Net's linear layers as NF4 by bitsandbytes, packed one by one while it is read.

They compute in the base's precision, from values rounded to 16 levels in blocks of 64. Convolutions, norms, the VAE and the
text encoders are unchanged. An adapter trained on such a base fits the plain one.
"""

from __future__ import annotations

import importlib.metadata
import importlib.util
from collections.abc import Iterable, Iterator
from typing import Any, Literal

import torch
from torch import Tensor, nn

from ..config import typed
from ..errors import BaseModelError, MissingExtraError, SettingsError, reason_of, setting
from .weight_files import LazyModule, put

# bitsandbytes' defaults
BLOCK = 64  # values that share a scale
BLOCK_OF_SCALES = 256  # scales that share a second scale
TABLES = (16 + 256) * 4  # bytes: the values of the 4 bits and of the scales' 8 bits, stored with every layer


def check_quantization(kind: str, device: torch.device) -> None:
    """Raises SettingsError or MissingExtraError if a U-Net cannot be quantized on this device."""
    typed("quantize", kind, Literal["nf4"] | None)
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError(setting("quantize", kind), "quant")
    try:
        if not unpacked(*packed_and_state(torch.ones(BLOCK, BLOCK, device=device))).isfinite().all():
            raise ArithmeticError("its numbers are not finite")
    except Exception as error:  # without a kernel for the device, it may raise anything
        version = importlib.metadata.version("bitsandbytes")
        raise SettingsError(
            f"{setting('quantize', kind)} does not work on {device} with bitsandbytes {version} ({reason_of(error)}); "
            "load the base without it"
        ) from error


def is_packed(layer: nn.Module) -> bool:
    """Whether this is a 4-bit linear layer of bitsandbytes, packed here or by the user."""
    return type(layer).__name__ == "Linear4bit" and isinstance(layer, nn.Linear)


def is_quantized(module: nn.Module) -> bool:
    return any(map(is_packed, module.modules()))


def weight_shape(layer: Any) -> tuple[int, ...]:
    """(out, in) of a linear layer, also of a packed one; (out, in, height, width) of a convolution."""
    return (layer.out_features, layer.in_features) if isinstance(layer, nn.Linear) else tuple(layer.weight.shape)


def weight_dtype(layer: Any) -> torch.dtype:
    """The precision that the layer computes in."""
    stored: torch.dtype = layer.weight.dtype
    return stored if stored.is_floating_point else getattr(layer, "compute_dtype", None) or torch.float32


def refuse_quantized(module: nn.Module, name: str, what: str) -> None:
    """Raises BaseModelError if the module has only rounded weights, which cannot be added or subtracted."""
    if is_quantized(module):
        packed = setting("quantize", "nf4")
        raise BaseModelError(f"the U-Net of {name} is quantized, and {what} needs its weights; load it without {packed}")


# --- packing -------------------------------------------------------------------------------------------------------


def packed_and_state(weight: Tensor) -> tuple[Tensor, Any]:
    """(out, in) -> two values per byte, and the QuantState to unpack them; the scales are quantized as well."""
    from bitsandbytes.functional import quantize_4bit  # type: ignore[import-not-found]

    packed, state = quantize_4bit(weight.contiguous(), blocksize=BLOCK, compress_statistics=True, quant_type="nf4")
    return packed, state


def unpacked(weight: Tensor, state: Any) -> Tensor:
    """The inverse up to rounding: (out, in) in the precision that was packed. Without a state, `weight` itself."""
    if state is None:
        return weight
    from bitsandbytes.functional import dequantize_4bit

    result: Tensor = dequantize_4bit(weight, state)
    return result


def quantize(unet: nn.Module, lazy: LazyModule | None, dtype: torch.dtype) -> None:
    """Pack the linear layers of `unet`: now, or each one when it is read from its file."""
    for name, layer in list(unet.named_modules()):
        if type(layer) is nn.Linear:
            parent, _, child = name.rpartition(".")
            setattr(unet.get_submodule(parent), child, packed_layer(layer, dtype))
    if lazy is not None:
        lazy.put = put_packed


def packed_layer(layer: nn.Linear, dtype: torch.dtype) -> Any:
    """The layer to replace `layer`; its weight is packed now if it is in memory."""
    from bitsandbytes.nn import Linear4bit, Params4bit  # type: ignore[import-not-found]

    size = (layer.in_features, layer.out_features)
    made = Linear4bit(*size, bias=False, compute_dtype=dtype, compress_statistics=True, quant_type="nf4", device="meta")
    made.bias = layer.bias
    made.train(layer.training)
    # for inference on a CPU, bitsandbytes repacks the weights in a form without gradients
    made.support_avx512bf16_for_cpu = False
    if layer.weight.is_meta:
        made.weight = Params4bit(layer.weight.detach(), requires_grad=False, quant_type="nf4", module=made)
    else:
        pack_into(made, layer.weight.detach())
    return made


def pack_into(layer: Any, weight: Tensor) -> None:
    from bitsandbytes.nn import Params4bit

    packed, state = packed_and_state(weight)
    layer.weight = Params4bit(
        packed, requires_grad=False, quant_state=state, quant_type="nf4", module=layer, bnb_quantized=True
    )
    layer.quant_state = state


def put_packed(module: nn.Module, key: str, value: Tensor) -> None:
    """Like `put`, but pack a linear layer's weight."""
    above, _, name = key.rpartition(".")
    layer = module.get_submodule(above)
    if name == "weight" and is_packed(layer):
        pack_into(layer, value)
    else:
        put(module, key, value)


# --- how large -----------------------------------------------------------------------------------------------------


def storage_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes of the storage of these tensors; shared storage counts once."""
    return sum({one._cdata: one.nbytes() for one in (tensor.untyped_storage() for tensor in tensors)}.values())


def tensors_of(module: nn.Module) -> Iterator[Tensor]:
    """Parameters and buffers, and the scales of packed layers."""
    yield from module.parameters()
    yield from module.buffers()
    for layer in module.modules():
        state = getattr(layer, "quant_state", None) if is_packed(layer) else None
        if state is not None:
            inner = state.state2
            parts = (state.absmax, state.code, state.offset, *((inner.absmax, inner.code) if inner is not None else ()))
            yield from (part for part in parts if isinstance(part, Tensor))


def packed_bytes(layer: nn.Linear) -> int:
    """Bytes of a layer's packed weight, with its scales."""
    count = layer.in_features * layer.out_features
    blocks = -(-count // BLOCK)
    return -(-count // 2) + blocks + 4 * -(-blocks // BLOCK_OF_SCALES) + 4 + TABLES


def quantized_bytes(module: nn.Module) -> int:
    """Bytes of a module's weights if its linear layers were packed; it may be on the "meta" device."""
    linear = [layer for layer in module.modules() if type(layer) is nn.Linear]
    full = sum(layer.weight.nbytes for layer in linear)
    everything = sum(tensor.nbytes for tensor in (*module.parameters(), *module.buffers()))
    return everything - full + sum(map(packed_bytes, linear))
