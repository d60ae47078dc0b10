"""Lean forwards for the U-Net's frozen layers: nothing is saved for the gradient of a frozen weight.

PyTorch saves the input of a frozen convolution, the two tensors between GroupNorm and its convolution, and three of a
GEGLU. Here a frozen layer saves nothing, GroupNorm + SiLU its input, GEGLU one tensor, a LoRA layer its input and `rank`
numbers per token. Gradients equal the stock ones up to rounding. On a CUDA GPU norms, gates and LoRA layers are one Triton
kernel each (`dispatch`), on channels-last tensors.

Each lean forward calls the modules inside it, so their hooks and adapters work as usual; only norms and activations are
computed here. The forwards of four diffusers modules are first compared with the stock ones.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..base.changes import undone
from ..base.quantization import packing_of
from ..errors import TrainingError, setting
from .attention import kernel_of
from .autograd import FrozenConv2d, Geglu, NormBeside, SumAndNorm
from .lora import FlatFactors, LoraLinears, LoraPiece


@contextmanager
def lean(model: nn.Module, factors: FlatFactors, *, say: Callable[[str], None] = lambda text: None) -> Iterator[int]:
    """Give layers of `model` lean forwards; yields how many. A module whose forward is already replaced keeps that one.

    factors  of the adapter under training
    say      gets a line for each kind of module whose stock forward differs from the known one, and so stays
    """
    modules = list(model.modules())
    for rewrite in rewrites().values():
        if not rewrite.agrees and any(type(module) is rewrite.kind for module in modules):
            name = rewrite.kind.__name__
            say(f"note: {name} of this diffusers differs from its lean forward, so the stock one is used: more memory")
    found = [(module, lean_forward(module, factors)) for module in modules if "forward" not in vars(module)]
    forwards = {module: forward for module, forward in found if forward is not None}
    with undone(lambda: [vars(module).pop("forward", None) for module in forwards]):
        for module, forward in forwards.items():
            module.forward = forward  # type: ignore[assignment]
        yield len(forwards)


def lean_forward(module: Any, factors: FlatFactors) -> Callable[..., Any] | None:
    """The lean forward of this module; None if there is none, or the module is not a stock one."""
    if is_lora(module):
        return partial(lean_lora, factors, module)
    rewrite = rewrites().get(type(module))
    if rewrite is None or not rewrite.fits(module) or not rewrite.agrees:
        return None
    return partial(lean_or_stock, rewrite.forward, module)


def lean_or_stock(forward: Callable[..., Any], module: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> Any:
    """The result of this lean forward; of the stock one where that cannot be used, or is `NotImplemented`."""
    result = forward(module, x, *args, **kwargs) if usable(x) else NotImplemented
    return type(module).forward(module, x, *args, **kwargs) if result is NotImplemented else result


def usable(x: Tensor) -> bool:
    """Whether to use lean forwards: without gradients nothing is saved, and autocast may change precisions midway."""
    return torch.is_grad_enabled() and (x.is_meta or not torch.is_autocast_enabled(x.device.type))


def frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def has_hooks(module: nn.Module) -> bool:
    """Whether it has hooks, so that it must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is a frozen module of exactly this kind that can be computed without being called."""
    return type(module) is kind and frozen(module) and not has_hooks(module) and "forward" not in vars(module)


# --- single layers ---------------------------------------------------------------------------------------------------


def lean_conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    return FrozenConv2d.apply(x, layer)  # type: ignore[no-any-return, no-untyped-call]


def plain_conv(layer: nn.Conv2d) -> bool:
    return frozen(layer) and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"


def norm_beside(norm: nn.GroupNorm, x: Tensor, *, silu: bool = False) -> tuple[Tensor, Tensor]:
    return NormBeside.apply(x, norm, silu)  # type: ignore[no-any-return, no-untyped-call]


def sum_and_norm(norm: nn.LayerNorm, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
    return SumAndNorm.apply(x, more, norm)  # type: ignore[no-any-return, no-untyped-call]


def lean_geglu(layer: Any, x: Tensor) -> Tensor:
    return Geglu.apply(layer.proj(x))  # type: ignore[no-any-return, no-untyped-call]


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lean_lora(factors: FlatFactors, layer: Any, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A PEFT layer around a frozen linear layer, with one adapter, enabled and not merged."""
    piece = None if args or kwargs or not usable(x) else factors.piece_of(layer, x)
    if piece is None:
        if factors.several and not layer.disable_adapters:
            raise TrainingError(f"this base cannot compute several adapters at once; pass {setting('together', 1)}")
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    return projected(x, [piece])[0]


def projected(x: Tensor, pieces: list[LoraPiece]) -> tuple[Tensor, ...]:
    return LoraLinears.apply(x, pieces[0].trigger, pieces)  # type: ignore[no-any-return, no-untyped-call]


def together(layers: tuple[nn.Module, ...], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of these layers for x, in one step where all of them are lean LoRA layers without hooks."""
    forwards = [vars(layer).get("forward") for layer in layers]
    if all(getattr(forward, "func", None) is lean_lora for forward in forwards) and not any(map(has_hooks, layers)):
        pieces = [forward.args[0].piece_of(layer, x) for forward, layer in zip(forwards, layers, strict=True)]  # type: ignore[union-attr]
        if None not in pieces:
            return projected(x, pieces)
    return tuple(layer(x) for layer in layers)


def is_lora(layer: Any) -> bool:
    """Whether it is a PEFT layer that `lean_lora` can compute."""
    from peft.tuners.lora import Linear, LoraLayer

    if type(layer) is not Linear and not (type(layer).__name__ == "Linear4bit" and isinstance(layer, LoraLayer)):
        return False
    adapters = list(layer.lora_A)
    inner = [part for name in adapters for part in (layer.base_layer, layer.lora_A[name], layer.lora_B[name])]
    return (
        (type(layer.base_layer) is nn.Linear or packing_of(layer.base_layer) is not None)
        and frozen(layer.base_layer)
        and not any(has_hooks(part) or "forward" in vars(part) for part in inner)
        and not layer.lora_variant
        and all(type(layer.lora_dropout[name]) is nn.Identity for name in adapters)
        and all(layer.lora_A[name].bias is None and layer.lora_B[name].bias is None for name in adapters)
    )


# --- attention -------------------------------------------------------------------------------------------------------


def lean_attention(
    layer: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **more: Any
) -> Tensor:
    """One step for query, key and value of the same input. x (N, tokens, C) -> the same"""
    kernel = kernel_of(layer)
    if kernel is None or x.dim() != 3 or attention_mask is not None or more:
        return NotImplemented
    if encoder_hidden_states is None:
        query, key, value = together((layer.to_q, layer.to_k, layer.to_v), x)
    else:
        query = layer.to_q(x)
        key, value = together((layer.to_k, layer.to_v), encoder_hidden_states)
    out, dropout = layer.to_out
    return dropout(out(kernel(query, key, value, layer.heads)))  # type: ignore[no-any-return]


def plain_attention(layer: Any) -> bool:
    others = ("spatial_norm", "group_norm", "norm_q", "norm_k", "added_kv_proj_dim")
    return (
        all(getattr(layer, name, None) is None for name in others)
        and not layer.norm_cross
        and not layer.residual_connection
        and layer.rescale_output_factor == 1
        and len(layer.to_out) == 2
    )


# --- transformers ----------------------------------------------------------------------------------------------------


def lean_block(
    block: Any,
    x: Tensor,
    attention_mask: Tensor | None = None,
    encoder_hidden_states: Tensor | None = None,
    *args: Any,
    **more: Any,
) -> Tensor:
    """Each norm adds the output before it. x (N, tokens, C) -> the same"""
    if encoder_hidden_states is None or attention_mask is not None or args or given(more):
        return NotImplemented
    x, normal = sum_and_norm(block.norm1, x, None)
    x, normal = sum_and_norm(block.norm2, x, block.attn1(normal))
    x, normal = sum_and_norm(block.norm3, x, block.attn2(normal, encoder_hidden_states=encoder_hidden_states))
    return x + block.ff(normal)  # type: ignore[no-any-return]


def given(options: dict[str, Any]) -> bool:
    """Whether an option is set that lean forwards do not know."""
    return any(value is not None for name, value in options.items() if name != "timestep")


def plain_block(block: Any) -> bool:
    return (
        block.norm_type == "layer_norm"
        and block.pos_embed is None
        and block.attn2 is not None
        and not block.only_cross_attention
        and block._chunk_size is None
        and not hasattr(block, "fuser")
        and all(plain(norm, nn.LayerNorm) and norm.weight is not None for norm in (block.norm1, block.norm2, block.norm3))
    )


def lean_transformer(
    model: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, return_dict: bool = True, **more: Any
) -> tuple[Tensor]:
    """In channels-last format the tokens are the pixels as they lie in memory, so nothing is copied. x (N, C, H, W)"""
    if encoder_hidden_states is None or return_dict or given(more):
        return NotImplemented
    rows, _, height, width = x.shape
    skip, normal = norm_beside(model.norm, x)
    tokens = on_tokens(model.proj_in, normal.permute(0, 2, 3, 1).reshape(rows, height * width, -1))
    for block in model.transformer_blocks:
        if model.gradient_checkpointing:
            tokens = model._gradient_checkpointing_func(block, tokens, None, encoder_hidden_states)
        else:
            tokens = block(tokens, encoder_hidden_states=encoder_hidden_states)
    result = on_tokens(model.proj_out, tokens).view(rows, height, width, -1).permute(0, 3, 1, 2)
    channels_last = skip.is_contiguous(memory_format=torch.channels_last) and not skip.is_contiguous()
    return ((result if channels_last else result.contiguous()) + skip,)


def on_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, or a convolution of single pixels, which is the same. x (N, pixels, C)"""
    if type(layer) is nn.Conv2d:
        return F.linear(x, layer.weight.flatten(1), layer.bias)
    return layer(x)  # type: ignore[no-any-return]


def plain_transformer(model: Any) -> bool:
    ends = (model.proj_in, model.proj_out)
    single = all(plain(layer, nn.Conv2d) and layer.kernel_size == layer.stride == (1, 1) for layer in ends)
    return bool(model.is_input_continuous) and (model.use_linear_projection or single) and plain(model.norm, nn.GroupNorm)


# --- residual blocks -------------------------------------------------------------------------------------------------


def lean_resnet(block: Any, x: Tensor, temb: Tensor | None, *args: Any, **more: Any) -> Tensor:
    """The norms and their activations save one tensor each. x (N, C, H, W)"""
    if args or more:
        return NotImplemented
    skip, hidden = norm_beside(block.norm1, x, silu=True)
    hidden = block.conv1(hidden)
    if block.time_emb_proj is not None:
        hidden = hidden + block.time_emb_proj(block.nonlinearity(temb))[:, :, None, None]
    hidden = norm_beside(block.norm2, hidden, silu=True)[1]
    if block.conv_shortcut is not None:
        skip = block.conv_shortcut(skip)
    result = skip + block.conv2(hidden)
    return result if block.output_scale_factor == 1 else result / block.output_scale_factor  # type: ignore[no-any-return]


def plain_resnet(block: Any) -> bool:
    return (
        block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and plain(block.nonlinearity, nn.SiLU)
        and plain(block.dropout, nn.Dropout)
        and block.dropout.p == 0
        and plain(block.norm1, nn.GroupNorm)
        and plain(block.norm2, nn.GroupNorm)
    )


# --- which modules have one ------------------------------------------------------------------------------------------


Shape = tuple[int, ...]
Case = tuple[Mapping[str, Any], Shape, Mapping[str, Any]]  # options, shape of x, other inputs or the shapes of them


@dataclass(frozen=True, eq=False)
class Rewrite:
    """A lean forward for one kind of module, and small cases of it with the options of SD 1.x, 2.x and SDXL."""

    kind: type[nn.Module]
    fits: Callable[[Any], bool]  # whether the lean forward is right for a module of this kind
    forward: Callable[..., Any]
    cases: tuple[Case, ...] = ()

    @cached_property
    def agrees(self) -> bool:
        """Whether it has the stock forward's output and gradient, on small random modules: a few milliseconds."""
        try:
            with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
                torch.default_generator.manual_seed(0)  # of the CPU alone: those of GPUs stay as they are
                return all(self.agrees_in(*case) for case in self.cases)
        except Exception:  # a changed constructor, attribute or argument: whatever it is, use the stock forward
            return False

    def agrees_in(self, options: Mapping[str, Any], shape: Shape, more: Mapping[str, Any]) -> bool:
        module = self.kind(**options).float().requires_grad_(False)
        x = torch.randn(shape, dtype=torch.float32, requires_grad=True)
        others = {n: torch.randn(one, dtype=torch.float32) if isinstance(one, tuple) else one for n, one in more.items()}
        found = []
        for forward in (self.kind.forward, self.forward):
            result = forward(module, x, **others)
            result = result[0] if isinstance(result, tuple) else result
            found.append((result, *torch.autograd.grad(result.square().sum(), x)))
        return self.fits(module) and all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*found, strict=True))


@cache
def rewrites() -> dict[type[nn.Module], Rewrite]:
    from diffusers.models.activations import GEGLU
    from diffusers.models.attention import BasicTransformerBlock
    from diffusers.models.attention_processor import Attention
    from diffusers.models.resnet import ResnetBlock2D
    from diffusers.models.transformers.transformer_2d import Transformer2DModel

    tokens, picture, text = (2, 5, 16), (2, 16, 4, 4), {"encoder_hidden_states": (2, 3, 12)}
    heads = {"num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 12}
    attention = {"query_dim": 16, "heads": 2, "dim_head": 8}
    crossed = {**attention, "cross_attention_dim": 12}
    transformer = {"in_channels": 16, "norm_num_groups": 4, **heads}
    linear, as_tuple = {**transformer, "use_linear_projection": True}, {**text, "return_dict": False}
    resnet = {"in_channels": 8, "out_channels": 16, "temb_channels": 12, "groups": 4}
    found = (
        Rewrite(nn.Conv2d, plain_conv, lean_conv),
        Rewrite(nn.GroupNorm, frozen, lambda norm, x: norm_beside(norm, x)[1]),
        Rewrite(GEGLU, lambda layer: True, lean_geglu),
        Rewrite(ResnetBlock2D, plain_resnet, lean_resnet, ((resnet, (2, 8, 4, 4), {"temb": (2, 12)}),)),
        Rewrite(Attention, plain_attention, lean_attention, ((attention, tokens, {}), (crossed, tokens, text))),
        Rewrite(BasicTransformerBlock, plain_block, lean_block, (({"dim": 16, **heads}, tokens, text),)),
        Rewrite(
            Transformer2DModel,
            plain_transformer,
            lean_transformer,
            ((transformer, picture, as_tuple), (linear, picture, as_tuple)),
        ),
    )
    return {rewrite.kind: rewrite for rewrite in found}


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Convolution weights, and so the activations between them, in channels-last memory format."""
    layers = [module for module in model.modules() if isinstance(module, nn.Conv2d) and max(module.kernel_size) > 1]
    weights = [layer.weight for layer in layers if layer.weight.is_contiguous()]

    def store(memory_format: torch.memory_format) -> None:
        for weight in weights:
            weight.data = weight.data.contiguous(memory_format=memory_format)

    with undone(partial(store, torch.contiguous_format)):
        store(torch.channels_last)
        yield
