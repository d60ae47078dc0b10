"""How the base is set while it trains, and as it was afterwards: dropout, attention, savings; and the optimizer."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch import Tensor

from ..attention import attention_kernel, check_attention
from ..base_model import BaseModel
from ..config import LoraSpec, TrainingConfig
from ..errors import MissingExtraError, SettingsError
from ..injection import target_paths
from ..lean import lean


def check_feasible(base: BaseModel, lora: LoraSpec, config: TrainingConfig) -> None:
    """What would fail after the class images are drawn fails before."""
    target_paths(base, lora)
    check_attention(base, config.attention)
    check_optimizer(config, base.device)


@contextmanager
def modes_kept(base: BaseModel) -> Iterator[None]:
    """Every module in training or evaluation mode as before."""
    modes = [(module, module.training) for model in base.structure.values() for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def training_mode(base: BaseModel, config: TrainingConfig, *, say: Callable[[str], None] = lambda text: None) -> Iterator[None]:
    """Dropout on, the attention of `config`, lean layers, gradient checkpointing; all as it was afterwards."""
    check_attention(base, config.attention)
    with ExitStack() as stack:
        stack.enter_context(modes_kept(base))
        for module in (m for model in base.structure.values() for m in model.modules() if hasattr(m, "lora_dropout")):
            module.train()
        own = stack.enter_context(attention_kernel(base.unet, config.attention))
        if own:
            say(f"note: attention by {', '.join(own)} is left as it is")
        if config.compile:
            say("compile: the first step compiles the U-Net's blocks, which takes a minute or more")
            stack.enter_context(compiled(base.unet))
        elif config.lean:
            for model in base.structure.values():
                if any(hasattr(module, "lora_A") for module in model.modules()):
                    stack.enter_context(lean(model))
        if config.gradient_checkpointing:
            if not base.unet.is_gradient_checkpointing:
                stack.callback(base.unet.disable_gradient_checkpointing)
            base.unet.enable_gradient_checkpointing()
            base.unet.train()  # diffusers checkpoints in training mode only; its U-Nets have no active dropout
        yield


@contextmanager
def compiled(unet: Any) -> Iterator[None]:
    """The U-Net's repeated blocks by torch.compile, as in diffusers' `compile_repeated_blocks`: compiled once for all."""
    kinds = set(unet._repeated_blocks or ())
    blocks = [m for m in unet.modules() if type(m).__name__ in kinds and m._compiled_call_impl is None]
    for block in blocks:
        block.compile()
    try:
        yield
    finally:
        for block in blocks:
            block._compiled_call_impl = None


def check_optimizer(config: TrainingConfig, device: torch.device) -> None:
    """Raises MissingExtraError or SettingsError when this optimizer cannot be had here."""
    if config.optimizer != "adamw8bit":
        return
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtraError('optimizer="adamw8bit"', "quant")
    if device.type != "cuda":
        raise SettingsError(f'optimizer="adamw8bit" needs a CUDA GPU and the base is on {device}; use optimizer="adamw"')


def make_optimizer(parameters: Sequence[Tensor], config: TrainingConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW in one kernel where there is one; or with 8 bits for each value of its state."""
    check_optimizer(config, device)
    rate, decay = config.learning_rate or 0.0, config.weight_decay
    if config.optimizer == "adamw8bit":
        import bitsandbytes  # type: ignore[import-not-found]

        optimizer: torch.optim.Optimizer = bitsandbytes.optim.AdamW8bit(parameters, lr=rate, weight_decay=decay)
        return optimizer
    return torch.optim.AdamW(parameters, lr=rate, weight_decay=decay, fused=device.type != "mps")
