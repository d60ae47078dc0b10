"""Lean arithmetic for frozen layers: nothing is kept for the gradient of a weight that has none, and small work goes together.

PyTorch keeps the input of a frozen convolution, the two tensors between GroupNorm and its convolution, and three of a
GEGLU. Here a frozen layer keeps nothing, GroupNorm + SiLU its input, GEGLU one tensor, a LoRA layer its input and its
`rank` numbers a token. Gradients are the stock ones, but for rounding. On a CPU products go to oneDNN (`products`); on a CUDA
GPU norms, gates and LoRA layers are one Triton kernel each (`kernels`), in pictures whose channels lie last.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import nn

from . import blocks
from .flat_parameters import Factor
from .lora import LoraPieces


def lean_forward(module: Any, pieces: LoraPieces) -> Callable[..., Any] | None:
    """The lean way through this module; None: it has none, or is not the stock module that it should be."""
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel
    from peft.tuners.lora import Linear as PeftLinear
    from peft.tuners.lora import LoraLayer

    kind = type(module)
    if kind is nn.Linear and blocks.frozen(module):
        return partial(blocks.lean_linear, module)
    if blocks.plain_conv(module):
        return partial(blocks.lean_conv, module)
    if kind is nn.GroupNorm and blocks.frozen(module) and module.weight is not None:
        return partial(blocks.lean_norm, module)
    if kind is GEGLU:
        return partial(blocks.lean_geglu, module)
    if kind is PeftLinear or (kind.__name__ == "Linear4bit" and isinstance(module, LoraLayer)):
        return partial(blocks.lean_lora, module, pieces) if blocks.plain_lora(module) else None
    for stock, is_plain, forward in (
        (ResnetBlock2D, blocks.plain_resnet, blocks.lean_resnet),
        (Attention, blocks.plain_attention, blocks.lean_attention),
        (BasicTransformerBlock, blocks.plain_block, blocks.lean_block),
        (Transformer2DModel, blocks.plain_transformer, blocks.lean_transformer),
    ):
        if kind is stock and is_plain(module):
            return partial(forward, module)
    return None


@contextmanager
def lean(model: nn.Module, factors: Mapping[nn.Parameter, Factor]) -> Iterator[int]:
    """Layers of `model` compute as above meanwhile; yields how many. A module with a forward of its own keeps it.

    factors  of the adapter under training, as in `Flat.factors`
    """
    patched: list[nn.Module] = []
    pieces = LoraPieces(factors)
    try:
        chosen = [(module, lean_forward(module, pieces)) for module in model.modules() if "forward" not in vars(module)]
        for module, forward in chosen:
            if forward is not None:
                patched.append(module)
                module.forward = forward
        yield len(patched)
    finally:
        for module in patched:
            vars(module).pop("forward", None)


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Meanwhile the weights of convolutions, and so the pictures between them, have their channels last in memory."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]
    before = [layer.weight.is_contiguous() for layer in layers]
    try:
        for layer in layers:
            layer.weight.data = layer.weight.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for layer, plain in zip(layers, before, strict=True):
            if plain:
                layer.weight.data = layer.weight.data.contiguous()
