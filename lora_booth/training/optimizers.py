"""The optimizers: PyTorch's AdamW, and those of other packages, with state that is saved and restored exactly."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..config import SettledConfig, TrainingConfig
from ..errors import MissingExtraError, SettingsError, setting
from ..injection.trainable import TrainableLora

PACKAGES = {  # optimizer -> its package, and the extra that installs it
    "adamw8bit": ("bitsandbytes", "quant"),
    "prodigy": ("prodigyopt", "optimizers"),
    "schedulefree": ("schedulefree", "optimizers"),
}
COUNTERS = (  # numbers that Prodigy and schedule-free update in their parameter groups
    *("k", "d", "d_max", "d_numerator", "d_denom", "d_hat"),
    *("weight_sum", "lr_max", "scheduled_lr", "train_mode"),
)
SHAPED = ("exp_avg", "exp_avg_sq", "s", "p0", "z")  # tensors of a state that are as large as the parameter


def check_optimizer(config: TrainingConfig, device: torch.device) -> None:
    """Raises MissingExtraError or SettingsError when this optimizer is not available on `device`."""
    package, extra = PACKAGES.get(config.optimizer, ("torch", ""))
    if importlib.util.find_spec(package) is None:
        raise MissingExtraError(setting("optimizer", config.optimizer), extra)
    if config.optimizer == "adamw8bit" and device.type != "cuda":
        raise SettingsError(f"adamw8bit needs a CUDA GPU and the base is on {device}; use {setting('optimizer', 'adamw')}")
    if config.optimizer == "prodigy" and config.text_encoder_learning_rate is not None:
        raise SettingsError(f"Prodigy has one learning rate for everything; leave out {setting('text_encoder_learning_rate')}")


def make_optimizer(lora: TrainableLora, config: SettledConfig, device: torch.device) -> torch.optim.Optimizer:
    """The optimizer of `config`; AdamW is fused where PyTorch has a fused kernel.

    With a learning rate for text encoders there are two groups, and the "share" of the second is its part of the first's.
    """
    rate, decay, for_text = config.learning_rate, config.weight_decay, config.text_encoder_learning_rate
    groups: list[dict[str, Any]] = [{"params": [lora.flat.values]}]
    if for_text is not None:
        unet, text = lora.apart()
        groups = [{"params": [unet]}, {"params": [text], "share": for_text / rate}]
    optimizer: Any
    if config.optimizer == "adamw8bit":
        import bitsandbytes  # type: ignore[import-not-found]

        optimizer = bitsandbytes.optim.AdamW8bit(groups, lr=rate, weight_decay=decay)
    elif config.optimizer == "prodigy":
        from prodigyopt import Prodigy

        # what its authors advise for diffusion models; its constructor prints a line about any decay
        optimizer = Prodigy(groups, lr=rate, use_bias_correction=True, safeguard_warmup=True)
        for group in optimizer.param_groups:
            group["weight_decay"] = decay
    elif config.optimizer == "schedulefree":
        from schedulefree import AdamWScheduleFree

        optimizer = AdamWScheduleFree(groups, lr=rate, weight_decay=decay)
        optimizer.train()
    else:
        optimizer = torch.optim.AdamW(groups, lr=rate, weight_decay=decay, fused=device.type != "mps")
    return optimizer


def restore(optimizer: torch.optim.Optimizer, saved: Mapping[str, Any]) -> None:
    """Take over a `state_dict()`, but for the settings in it. `saved` must be a copy: its tensors are updated from now on.

    Raises ValueError and the like for what another optimizer saved.
    """
    groups, state = optimizer.state_dict()["param_groups"], saved["state"]
    shapes = [values.shape for group in optimizer.param_groups for values in group["params"]]
    for index, found in state.items():
        if any(found[name].shape != shapes[index] for name in SHAPED if name in found):
            raise ValueError("optimizer")
    for group, before in zip(groups, saved["param_groups"], strict=True):
        counters = {name: before[name] for name in COUNTERS if name in before}
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in counters.values()):
            raise ValueError("optimizer")
        group |= counters
    optimizer.load_state_dict({"state": state, "param_groups": groups})


def averaged(optimizer: torch.optim.Optimizer, values: Tensor) -> Callable[[], AbstractContextManager[None]]:
    """A context in which `values` are those to use. Schedule-free trains at other weights than the average that it learns.

    Afterwards they are as before, bit for bit: its own way back would round.
    """
    if not hasattr(optimizer, "eval"):
        return nullcontext
    return partial(_averaged, optimizer, values)


@contextmanager
def _averaged(optimizer: Any, values: Tensor) -> Iterator[None]:
    before = values.detach().clone()
    try:
        optimizer.eval()
        yield
    finally:
        optimizer.train()
        values.data.copy_(before)
