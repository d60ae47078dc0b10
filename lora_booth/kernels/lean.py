"""Lean forwards for the U-Net's frozen layers: nothing is saved for the gradient of a frozen weight.

PyTorch saves the input of a frozen convolution, the two tensors between GroupNorm and its convolution, and three of a
GEGLU. Here a frozen layer saves nothing, GroupNorm + SiLU its input, GEGLU one tensor, a LoRA layer its input and `rank`
numbers per token. Gradients equal the stock ones up to rounding. On a CUDA GPU norms, gates and LoRA layers are one Triton
kernel each (`dispatch`), on channels-last tensors.

Each lean forward calls the modules inside it, so their hooks and adapters work as usual; only norms and activations are
computed here. The forwards of four diffusers modules are first compared with the stock ones.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cache, partial
from typing import Any

import torch
from torch import Tensor, nn

from ..base.quantization import is_packed
from .attention import kernel_of
from .autograd import ConvOptions, FrozenConv2d, FrozenLinear, Geglu, NormBeside, SumAndNorm, SumWithBias
from .lora import Factor, LoraLinears, LoraPiece, LoraPieces


@contextmanager
def lean(
    model: nn.Module, factors: Mapping[nn.Parameter, Factor], *, say: Callable[[str], None] = lambda text: None
) -> Iterator[int]:
    """Give layers of `model` lean forwards; yields how many. A module whose forward is already replaced keeps that one.

    factors  of the adapter under training: `Flat.factors`
    say      gets a line for each kind of module whose stock forward differs from the known one, and so stays
    """
    patched: list[nn.Module] = []
    pieces = LoraPieces(factors)
    try:
        for name in sorted({type(module).__name__ for module in model.modules()} & set(REWRITTEN)):
            if not agrees(name):
                say(f"note: {name} of this diffusers differs from its lean forward, so the stock one is used: more memory")
        chosen = [(module, lean_forward(module, pieces)) for module in model.modules() if "forward" not in vars(module)]
        for module, forward in chosen:
            if forward is not None:
                patched.append(module)
                module.forward = forward
        yield len(patched)
    finally:
        for module in patched:
            vars(module).pop("forward", None)


def lean_forward(module: Any, pieces: LoraPieces) -> Callable[..., Any] | None:
    """The lean forward of this module; None if there is none, or the module is not a stock one."""
    from diffusers.models.activations import GEGLU
    from peft.tuners.lora import Linear as PeftLinear
    from peft.tuners.lora import LoraLayer

    kind = type(module)
    if kind is nn.Linear and frozen(module):
        return partial(lean_linear, module)
    if plain_conv(module):
        return partial(lean_conv, module)
    if kind is nn.GroupNorm and frozen(module) and module.weight is not None:
        return partial(lean_norm, module)
    if kind is GEGLU:
        return partial(lean_geglu, module)
    if kind is PeftLinear or (kind.__name__ == "Linear4bit" and isinstance(module, LoraLayer)):
        return partial(lean_lora, module, pieces) if plain_lora(module) else None
    rewrite = REWRITTEN.get(kind.__name__)
    if rewrite is not None and agrees(kind.__name__) and kind is rewrite.stock and rewrite.plain(module):
        return partial(rewrite.forward, module)
    return None


def stock(x: Tensor) -> bool:
    """Whether to use the stock forward: without gradients nothing is saved, and autocast may change precisions midway."""
    return not torch.is_grad_enabled() or (not x.is_meta and torch.is_autocast_enabled(x.device.type))


def frozen(module: nn.Module) -> bool:
    return not any(parameter.requires_grad for parameter in module.parameters())


def watched(module: nn.Module) -> bool:
    """Whether it has hooks, so that it must be called."""
    return bool(module._forward_hooks or module._forward_pre_hooks or module._backward_hooks or module._backward_pre_hooks)


def plain(module: nn.Module, kind: type[nn.Module]) -> bool:
    """Whether it is a frozen module of exactly this kind that can be computed without being called."""
    return type(module) is kind and frozen(module) and not watched(module) and "forward" not in vars(module)


def leads_to(module: nn.Module, function: Any) -> bool:
    """Whether this function is the module's lean forward, and it has no hooks."""
    forward = vars(module).get("forward")
    return isinstance(forward, partial) and forward.func is function and not watched(module)


def idle(dropout: nn.Module) -> bool:
    return type(dropout) is nn.Dropout and dropout.p == 0 and not watched(dropout)


# --- single layers ---------------------------------------------------------------------------------------------------


def lean_linear(layer: nn.Linear, x: Tensor) -> Tensor:
    if stock(x):
        return nn.Linear.forward(layer, x)
    return FrozenLinear.apply(x, layer.weight, layer.bias)  # type: ignore[no-any-return, no-untyped-call]


def lean_conv(layer: nn.Conv2d, x: Tensor) -> Tensor:
    if stock(x):
        return nn.Conv2d.forward(layer, x)
    return convolved(layer, x, layer.bias)


def convolved(layer: nn.Conv2d, x: Tensor, bias: Tensor | None) -> Tensor:
    how = ConvOptions(layer.stride, layer.padding, layer.dilation, layer.groups)  # type: ignore[arg-type]
    return FrozenConv2d.apply(x, layer.weight, bias, how)  # type: ignore[no-any-return, no-untyped-call]


def plain_conv(layer: nn.Module) -> bool:
    return type(layer) is nn.Conv2d and frozen(layer) and not isinstance(layer.padding, str) and layer.padding_mode == "zeros"


def lean_norm(norm: nn.GroupNorm, x: Tensor) -> Tensor:
    if stock(x):
        return nn.GroupNorm.forward(norm, x)
    return norm_beside(norm, x)[1]


def norm_beside(norm: nn.GroupNorm, x: Tensor, shift: Tensor | None = None, *, silu: bool = False) -> tuple[Tensor, Tensor]:
    result = NormBeside.apply(x, shift, norm.weight, norm.bias, norm.num_groups, norm.eps, silu)  # type: ignore[no-untyped-call]
    return result  # type: ignore[no-any-return]


def sum_and_norm(norm: nn.LayerNorm, x: Tensor, more: Tensor | None) -> tuple[Tensor, Tensor]:
    return SumAndNorm.apply(x, more, norm.weight, norm.bias, norm.eps)  # type: ignore[no-any-return, no-untyped-call]


def lean_geglu(layer: Any, x: Tensor) -> Tensor:
    if stock(x):
        return type(layer).forward(layer, x)  # type: ignore[no-any-return]
    return Geglu.apply(layer.proj(x))  # type: ignore[no-any-return, no-untyped-call]


# --- LoRA ------------------------------------------------------------------------------------------------------------


def lean_lora(layer: Any, pieces: LoraPieces, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
    """A PEFT layer around a frozen linear layer, with one adapter, enabled and not merged."""
    piece = None if args or kwargs or stock(x) else pieces.of(layer, x)
    if piece is None:
        return type(layer).forward(layer, x, *args, **kwargs)  # type: ignore[no-any-return]
    return projected(x, [piece])[0]


def projected(x: Tensor, pieces: list[LoraPiece]) -> tuple[Tensor, ...]:
    return LoraLinears.apply(x, pieces[0].trigger, pieces)  # type: ignore[no-any-return, no-untyped-call]


def plain_lora(layer: Any) -> bool:
    adapters = list(layer.lora_A)
    inner = [part for name in adapters for part in (layer.base_layer, layer.lora_A[name], layer.lora_B[name])]
    return (
        (type(layer.base_layer) is nn.Linear or is_packed(layer.base_layer))
        and frozen(layer.base_layer)
        and not any(watched(part) or "forward" in vars(part) for part in inner)
        and not layer.lora_variant
        and all(type(layer.lora_dropout[name]) is nn.Identity for name in adapters)
        and all(layer.lora_A[name].bias is None and layer.lora_B[name].bias is None for name in adapters)
    )


# --- attention -------------------------------------------------------------------------------------------------------


def lean_attention(
    layer: Any, x: Tensor, encoder_hidden_states: Tensor | None = None, attention_mask: Tensor | None = None, **kwargs: Any
) -> Tensor:
    """One step for query, key and value of the same input. x (N, tokens, C) -> the same"""
    kernel = kernel_of(layer)
    if kernel is None or stock(x) or x.dim() != 3 or attention_mask is not None or kwargs:
        result = type(layer).forward(layer, x, encoder_hidden_states, attention_mask, **kwargs)
        return result  # type: ignore[no-any-return]
    if encoder_hidden_states is None:
        query, key, value = together((layer.to_q, layer.to_k, layer.to_v), x)
    else:
        query = layer.to_q(x)
        key, value = together((layer.to_k, layer.to_v), encoder_hidden_states)
    out, dropout = layer.to_out
    return dropout(out(kernel(query, key, value, layer.heads)))  # type: ignore[no-any-return]


def together(layers: tuple[nn.Module, ...], x: Tensor) -> tuple[Tensor, ...]:
    """The outputs of these layers for x, in one step where all of them are lean LoRA layers."""
    pieces = []
    for layer in layers:
        piece = vars(layer)["forward"].args[1].of(layer, x) if leads_to(layer, lean_lora) else None
        if piece is None:
            return tuple(layer(x) for layer in layers)
        pieces.append(piece)
    return projected(x, pieces)


def plain_attention(layer: Any) -> bool:
    return (
        all(
            getattr(layer, name, None) is None
            for name in ("spatial_norm", "group_norm", "norm_q", "norm_k", "added_kv_proj_dim")
        )
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
    **kwargs: Any,
) -> Tensor:
    unknown = args or attention_mask is not None or any(kwargs[name] is not None for name in kwargs.keys() - {"timestep"})
    if stock(x) or encoder_hidden_states is None or unknown:
        result = type(block).forward(block, x, attention_mask, encoder_hidden_states, *args, **kwargs)
        return result  # type: ignore[no-any-return]
    x, last = two_parts(block, x, None, encoder_hidden_states)
    return x + last


def two_parts(block: Any, x: Tensor, more: Tensor | None, text: Tensor) -> tuple[Tensor, Tensor]:
    """The block's output for x + more, as two terms: the next norm adds them."""
    x, normal = sum_and_norm(block.norm1, x, more)
    x, normal = sum_and_norm(block.norm2, x, block.attn1(normal))
    x, normal = sum_and_norm(block.norm3, x, block.attn2(normal, encoder_hidden_states=text))
    return x, block.ff(normal)


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
    model: Any,
    hidden_states: Tensor,
    encoder_hidden_states: Tensor | None = None,
    return_dict: bool = True,
    **options: Any,
) -> Any:
    """In channels-last format the tokens are the pixels as they lie in memory, so nothing is copied."""
    given = any(value is not None for name, value in options.items() if name != "timestep")
    if stock(hidden_states) or encoder_hidden_states is None or given:
        options |= {"encoder_hidden_states": encoder_hidden_states, "return_dict": return_dict}
        return type(model).forward(model, hidden_states, **options)
    rows, _, height, width = hidden_states.shape
    skip, normal = norm_beside(model.norm, hidden_states)
    x = on_tokens(model.proj_in, normal.permute(0, 2, 3, 1).reshape(rows, height * width, -1))
    more: Tensor | None = None
    for block in model.transformer_blocks:
        if model.gradient_checkpointing:
            x = model._gradient_checkpointing_func(block, x, None, encoder_hidden_states)
        elif leads_to(block, lean_block):
            x, more = two_parts(block, x, more, encoder_hidden_states)
        else:
            x, more = block(x if more is None else x + more, encoder_hidden_states=encoder_hidden_states), None
    x = on_tokens(model.proj_out, x if more is None else x + more).view(rows, height, width, -1).permute(0, 3, 1, 2)
    result = (x if in_channels_last(skip) else x.contiguous()) + skip
    if not return_dict:
        return (result,)
    from diffusers.models.modeling_outputs import Transformer2DModelOutput

    return Transformer2DModelOutput(sample=result)


def on_tokens(layer: nn.Module, x: Tensor) -> Tensor:
    """A linear layer, or a convolution of single pixels, which is the same. x (N, pixels, C)"""
    if type(layer) is nn.Conv2d:
        return FrozenLinear.apply(x, layer.weight.flatten(1), layer.bias)  # type: ignore[no-any-return, no-untyped-call]
    return layer(x)  # type: ignore[no-any-return]


def in_channels_last(x: Tensor) -> bool:
    return x.is_contiguous(memory_format=torch.channels_last) and not x.is_contiguous()


def plain_transformer(model: Any) -> bool:
    ends = (model.proj_in, model.proj_out)
    single = all(
        type(layer) is not nn.Conv2d or (plain(layer, nn.Conv2d) and layer.kernel_size == layer.stride == (1, 1))
        for layer in ends
    )
    linear = all(isinstance(layer, nn.Linear) or type(layer) is nn.Conv2d or hasattr(layer, "lora_A") for layer in ends)
    same = model.use_linear_projection or all(type(layer) is nn.Conv2d for layer in ends)
    return bool(model.is_input_continuous) and single and linear and same and plain(model.norm, nn.GroupNorm)


# --- residual blocks -------------------------------------------------------------------------------------------------


def lean_resnet(block: Any, x: Tensor, temb: Tensor | None, *args: Any, **kwargs: Any) -> Tensor:
    """Biases and the time embedding are added where another addition happens anyway."""
    if args or kwargs or stock(x):
        return type(block).forward(block, x, temb, *args, **kwargs)  # type: ignore[no-any-return]
    skip, hidden = norm_beside(block.norm1, x, silu=True)
    hidden, shift = without_bias(block.conv1, hidden)
    if block.time_emb_proj is not None:
        embedded = block.time_emb_proj(block.nonlinearity(temb))
        if embedded.requires_grad:
            hidden = hidden + embedded[:, :, None, None]
        else:
            shift = embedded if shift is None else embedded + shift
    if shift is not None:
        shift = shift.expand(len(x), -1).contiguous()
    hidden = norm_beside(block.norm2, hidden, shift, silu=True)[1]
    hidden, bias = without_bias(block.conv2, hidden)
    if block.conv_shortcut is not None:
        skip = block.conv_shortcut(skip)
    result = SumWithBias.apply(hidden, bias, skip)  # type: ignore[no-untyped-call]
    return result if block.output_scale_factor == 1 else result / block.output_scale_factor  # type: ignore[no-any-return]


def without_bias(layer: Any, x: Tensor) -> tuple[Tensor, Tensor | None]:
    """A convolution's output and the bias still to be added; None if it has none or was called."""
    if layer.bias is not None and x.device.type == "cuda" and leads_to(layer, lean_conv):
        return convolved(layer, x, None), layer.bias
    return layer(x), None


def plain_resnet(block: Any) -> bool:
    return (
        block.time_embedding_norm == "default"
        and not block.skip_time_act
        and block.upsample is None
        and block.downsample is None
        and type(block.nonlinearity) is nn.SiLU
        and not watched(block.nonlinearity)
        and idle(block.dropout)
        and plain(block.norm1, nn.GroupNorm)
        and plain(block.norm2, nn.GroupNorm)
    )


# --- compared with diffusers -----------------------------------------------------------------------------------------


Shape = tuple[int, ...]
Case = tuple[dict[str, Any], Shape, dict[str, Shape]]  # options, shape of x, shapes of other inputs


@dataclass(frozen=True)
class Rewrite:
    """A lean forward for one of diffusers' modules, and small cases of it with the options of SD 1.x, 2.x and SDXL."""

    path: str  # of the stock class
    plain: Callable[[Any], bool]  # whether the lean forward is right for a module
    forward: Callable[..., Any]
    cases: tuple[Case, ...]
    tupled: bool = False  # returns a tuple, with return_dict=False

    @property
    def stock(self) -> Any:
        module, _, name = self.path.rpartition(".")
        return getattr(importlib.import_module(module), name)


TOKENS: Shape = (2, 5, 16)
PICTURE: Shape = (2, 16, 4, 4)
TEXT: dict[str, Shape] = {"encoder_hidden_states": (2, 3, 12)}
ATTENTION = {"query_dim": 16, "heads": 2, "dim_head": 8}
BLOCK = {"dim": 16, "num_attention_heads": 2, "attention_head_dim": 8, "cross_attention_dim": 12}
TRANSFORMER = {"in_channels": 16, "norm_num_groups": 4, **{name: BLOCK[name] for name in list(BLOCK)[1:]}}
RESNET = {"in_channels": 8, "out_channels": 16, "temb_channels": 12, "groups": 4}
REWRITTEN = {
    rewrite.path.rpartition(".")[2]: rewrite
    for rewrite in (
        Rewrite(
            "diffusers.models.resnet.ResnetBlock2D",
            plain_resnet,
            lean_resnet,
            ((RESNET, (2, 8, 4, 4), {"temb": (2, 12)}),),
        ),
        Rewrite(
            "diffusers.models.attention_processor.Attention",
            plain_attention,
            lean_attention,
            ((ATTENTION, TOKENS, {}), (ATTENTION | {"cross_attention_dim": 12}, TOKENS, TEXT)),
        ),
        Rewrite("diffusers.models.attention.BasicTransformerBlock", plain_block, lean_block, ((BLOCK, TOKENS, TEXT),)),
        Rewrite(
            "diffusers.models.transformers.transformer_2d.Transformer2DModel",
            plain_transformer,
            lean_transformer,
            tuple((TRANSFORMER | {"use_linear_projection": linear}, PICTURE, TEXT) for linear in (False, True)),
            tupled=True,
        ),
    )
}


@cache
def agrees(name: str) -> bool:
    """Whether the lean forward has the stock one's output and gradient, on small random modules: a few milliseconds."""
    rewrite = REWRITTEN[name]
    try:
        with torch.random.fork_rng(devices=[]), torch.inference_mode(False), torch.enable_grad(), torch.device("cpu"):
            torch.default_generator.manual_seed(0)  # of the CPU alone: those of GPUs stay as they are
            return all(same(rewrite, rewrite.stock(**options).float(), x, more) for options, x, more in rewrite.cases)
    except Exception:  # a changed constructor, attribute or argument: whatever it is, use the stock forward
        return False


def same(rewrite: Rewrite, module: nn.Module, shape: Shape, more: dict[str, Shape]) -> bool:
    module.requires_grad_(False)
    x = torch.randn(shape, dtype=torch.float32, requires_grad=True)
    others: dict[str, Any] = {name: torch.randn(size, dtype=torch.float32) for name, size in more.items()}
    if rewrite.tupled:
        others["return_dict"] = False
    found = []
    for forward in (rewrite.stock.forward, rewrite.forward):
        result = forward(module, x, **others)
        result = result[0] if rewrite.tupled else result
        found.append((result, *torch.autograd.grad(result.square().sum(), x)))
    return rewrite.plain(module) and all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*found, strict=True))


@contextmanager
def channels_last(model: nn.Module) -> Iterator[None]:
    """Convolution weights, and so the activations between them, in channels-last memory format."""
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
