"""How the base is set while it trains, and as it was afterwards: dropout, attention, gradient checkpointing."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

from ..base_model import BaseModel
from ..config import LoraSpec, TrainingConfig
from ..errors import MissingExtraError, SettingsError
from ..injection import target_paths


def check_feasible(base: BaseModel, lora: LoraSpec, config: TrainingConfig) -> None:
    """What would fail after the class images are drawn fails before."""
    target_paths(base, lora)
    if config.attention == "xformers":
        check_xformers(base)


@contextmanager
def modes_kept(base: BaseModel) -> Iterator[None]:
    """Every module in training or evaluation mode as before."""
    modes = [(module, module.training) for model in base.components.values() for module in model.modules()]
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def training_mode(base: BaseModel, config: TrainingConfig) -> Iterator[None]:
    """Dropout on, memory-efficient attention, gradient checkpointing; all as it was afterwards."""
    processors = base.unet.attn_processors
    checkpointing = base.unet.is_gradient_checkpointing
    try:
        with modes_kept(base):
            for module in (m for model in base.components.values() for m in model.modules() if hasattr(m, "lora_dropout")):
                module.train()
            if config.attention == "xformers":
                base.unet.enable_xformers_memory_efficient_attention()
            if config.gradient_checkpointing:
                base.unet.enable_gradient_checkpointing()
                base.unet.train()  # diffusers checkpoints in training mode only; its U-Nets have no active dropout
            yield
    finally:
        if config.attention == "xformers":
            base.unet.set_attn_processor(processors)
        if config.gradient_checkpointing and not checkpointing:
            base.unet.disable_gradient_checkpointing()


def check_xformers(base: BaseModel) -> None:
    try:
        import xformers  # type: ignore[import-not-found]  # noqa: F401
    except ImportError as error:
        raise MissingExtraError('attention="xformers"', "xformers") from error
    if base.device.type != "cuda":
        raise SettingsError(f'attention="xformers" needs a CUDA GPU and the base is on {base.device}; use attention="sdpa"')
