"""How the base is set while it trains: dropout, attention, lean layers, checkpointing; and its gradient scaler."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import torch
from torch.utils.checkpoint import checkpoint

from ..base.base_model import BaseModel
from ..base.changes import undone
from ..config import LoraSpec, TrainingConfig
from ..errors import SettingsError, setting
from ..injection.paths import target_paths
from ..injection.trainable import TrainableLora
from ..kernels.attention import attention_kernel, check_attention
from ..kernels.lean import channels_last, lean
from .optimizers import check_optimizer


def check_feasible(base: BaseModel, lora: LoraSpec, config: TrainingConfig) -> None:
    """Raises now what would otherwise fail after the class images were drawn."""
    target_paths(base, lora)
    check_attention(base, config.attention)
    check_optimizer(config, base.device)
    if config.text_encoder_learning_rate is not None and not lora.text_encoder:
        rate, remedy = setting("text_encoder_learning_rate", config.text_encoder_learning_rate), setting("text_encoder", True)
        raise SettingsError(f"{rate} has no effect while text encoders are not trained; pass {remedy} too, or leave it out")


@contextmanager
def modes_restored(base: BaseModel) -> Iterator[None]:
    """Afterwards every module is in training or evaluation mode as before."""
    modes = [(module, module.training) for model in base.structure.values() for module in model.modules()]

    def undo() -> None:
        for module, mode in modes:
            module.training = mode

    with undone(undo):
        yield


@contextmanager
def training_mode(
    base: BaseModel, lora: TrainableLora, config: TrainingConfig, *, say: Callable[[str], None] = lambda text: None
) -> Iterator[None]:
    """Dropout on, the attention of `config`, lean layers, gradient checkpointing; all restored afterwards."""
    with ExitStack() as stack:
        stack.enter_context(modes_restored(base))
        for module in (m for model in base.structure.values() for m in model.modules() if hasattr(m, "lora_dropout")):
            module.train()
        own = stack.enter_context(attention_kernel(base.unet, config.attention))
        if own:
            say(f"note: attention by {', '.join(own)} is left in place")
        if config.lean:
            for model in base.structure.values():
                if any(hasattr(module, "lora_A") for module in model.modules()):
                    stack.enter_context(lean(model, lora.flat, say=say))
        if base.device.type == "cuda":
            stack.enter_context(channels_last(base.unet))
        if config.gradient_checkpointing:
            draws = any(isinstance(module, torch.nn.Dropout) and module.p > 0 for module in base.unet.modules())
            stack.enter_context(checkpointed(base.unet, draws=draws))
            base.unet.train()  # diffusers checkpoints in training mode only; its U-Nets have no active dropout
        yield


@contextmanager
def checkpointed(unet: Any, *, draws: bool) -> Iterator[None]:
    """Activations are computed again in the backward pass; restored afterwards.

    draws  the U-Net has active dropout, which must draw the same again; otherwise the generators' states are not saved, since
           the host would wait for them
    """
    parts = [module for module in unet.modules() if hasattr(module, "gradient_checkpointing")]
    before = [(part, part.gradient_checkpointing, vars(part).get("_gradient_checkpointing_func")) for part in parts]

    def recompute(module: Any, *arguments: Any) -> Any:
        return checkpoint(module.__call__, *arguments, use_reentrant=False, preserve_rng_state=draws)

    def undo() -> None:
        for part, on, function in before:
            part.gradient_checkpointing = on
            if function is not None:
                part._gradient_checkpointing_func = function
            else:
                vars(part).pop("_gradient_checkpointing_func", None)

    with undone(undo):
        unet.enable_gradient_checkpointing(recompute)
        yield


def make_scaler(base: BaseModel) -> torch.amp.GradScaler:
    """Scales the loss of a float16 base on a GPU, whose small gradients would vanish; elsewhere it does nothing."""
    return torch.amp.GradScaler(base.device.type, enabled=base.dtype == torch.float16 and base.device.type == "cuda")
