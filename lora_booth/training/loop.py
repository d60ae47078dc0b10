"""The algorithm: the loop (draw, forward, backward, clip, step, yield) and the DreamBooth loss.

`training_run.py` wraps it from outside: resuming, the memory ladder, rollbacks, capture, the display of steps.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ..base.base_model import BaseModel, TextConditions
from ..config import SettledConfig
from ..injection.trainable import TrainableLora
from ..kernels.lora import FlatFactors
from .distributed import ALONE, Processes
from .health import Health
from .latents import Batch, Inputs, LatentCache, conditions, draw, joined, step_seed


@dataclass(eq=False)
class LoopState:
    """All that the next update depends on. Changing it between two updates changes how the loop continues."""

    base: BaseModel
    cache: LatentCache
    config: SettledConfig
    lora: TrainableLora  # in the base's layers
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    dropout: float = 0.0  # in the adapter
    processes: Processes = ALONE  # that share each batch
    step: int = 0  # updates done
    health: Health = field(default_factory=Health)
    check: Callable[[], None] | None = None  # of the first gradients, before they are clipped

    @property
    def factors(self) -> FlatFactors:
        return self.lora.flat


def updates(state: LoopState, gradients: Callable[[], Tensor]) -> Iterator[Tensor]:
    """One optimizer update after the other, up to `config.steps`. Yields its loss () and does not wait for the device.

    gradients  `accumulate`, or what wraps it
    An update whose loss or gradients are not finite changes nothing and yields nan.
    """
    factors, optimizer, scaler = state.factors, state.optimizer, state.scaler
    while state.step < state.config.steps:
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(state.config, state.step) * state.health.rate_share * group.get("share", 1.0)
        loss = gradients()
        if state.processes.count > 1:
            loss = state.processes.sum_gradients(loss, factors.gradient)
        scaler.unscale_(optimizer)
        if state.check is not None:
            state.check()
        norm = torch.nn.utils.clip_grad_norm_(factors.values, state.config.max_grad_norm)
        finite = loss.isfinite() & norm.isfinite()
        step_if_finite(optimizer, scaler, finite)
        state.step += 1
        # gradients that overflow under a scaler are its own business: it lowers its scale
        yield loss if scaler.is_enabled() else torch.where(finite, loss, torch.nan)


def accumulate(state: LoopState, work: Callable[[Inputs], Tensor]) -> Tensor:
    """The gradients of one update, summed over its batches; returns its loss (). work: `backward`, or a recording of it"""
    state.factors.gradient.zero_()
    loss = torch.zeros((), device=state.base.device)
    for inputs in drawn(state):
        loss += work(inputs)  # forward and backward
    return loss


def drawn(state: LoopState) -> Iterator[Inputs]:
    """All that the next update reads, part by part."""
    batches = state.config.gradient_accumulation
    for index in range(state.step * batches, (state.step + 1) * batches):
        with dropout_seeded(state, index):
            yield from inputs_of(state, index)


def inputs_of(state: LoopState, index: int) -> Iterator[Inputs]:
    """Draw batch `index`: this process's share of it, in as many parts as memory requires."""
    config = state.config
    batch = draw(state.cache, seed=config.seed, step=index, batch_size=config.batch_size)
    if state.processes.count > 1:
        batch = batch[state.processes.share]
    size = config.pictures_at_a_time or max(1, len(batch))
    for first in range(0, len(batch), size):
        part = batch[first : first + size]
        text, of_class = conditions(state.base, state.cache.text, part.prompts), part.class_prompts
        yield Inputs(part, text, conditions(state.base, state.cache.class_text, of_class) if of_class else None)


def backward(state: LoopState, inputs: Inputs) -> Tensor:
    """Forward and backward pass of a batch or a part of it: adds to the gradient of the factors, returns its loss ()."""
    [loss] = backward_together(state.lora, [state], [inputs])
    return loss


def backward_together(lora: TrainableLora, states: Sequence[LoopState], inputs: Sequence[Inputs]) -> list[Tensor]:
    """One pass for several runs on one base, whose inputs have the same layout; returns the loss () of each.

    lora  in the base's layers, which computes with the adapter of each run on the rows of that run, in this order
    """
    base, every = states[0].base, joined(inputs)
    lora.flat.refresh()
    class_targets: list[Tensor | None] = [None] * len(states)
    if every.class_text is not None:  # what the base predicts there, as in Drift Correction (arXiv 2410.14159)
        of_class = joined([replace(one, batch=one.batch[one.batch.photos :]) for one in inputs]).batch
        with torch.no_grad(), lora.muted():
            class_targets = list(predict(base, of_class, every.class_text).chunk(len(states)))
    predicted = predict(base, every.batch, every.text).chunk(len(states))
    losses = []
    for state, one, prediction, targets in zip(states, inputs, predicted, class_targets, strict=True):
        loss = dreambooth_loss(
            base,
            one.batch,
            prediction,
            prior_loss_weight=state.config.prior_loss_weight,
            min_snr_gamma=state.config.min_snr_gamma,
            class_targets=targets,
        )
        losses.append(loss / state.config.gradient_accumulation)
    scaled = [state.scaler.scale(loss) for state, loss in zip(states, losses, strict=True)]
    torch.autograd.backward(scaled)
    return [loss.detach() for loss in losses]


@contextmanager
def dropout_seeded(state: LoopState, index: int) -> Iterator[None]:
    """Dropout draws from the global generator only: seed it for batch `index`, and restore it afterwards."""
    if not state.dropout:
        yield
        return
    device = state.base.device
    with torch.random.fork_rng(devices=[device] if device.type == "cuda" else []):
        torch.manual_seed(step_seed(state.config.seed, index) + state.processes.index)
        yield


def learning_rate(config: SettledConfig, step: int) -> float:
    """The rate of update `step` (from 0): linear warm-up, then constant or a half cosine to 0."""
    if step < config.warmup_steps:
        return config.learning_rate * (step + 1) / config.warmup_steps
    if config.lr_schedule == "constant":
        return config.learning_rate
    share = (step - config.warmup_steps) / max(1, config.steps - config.warmup_steps)
    return config.learning_rate * 0.5 * (1 + math.cos(math.pi * share))


def step_if_finite(optimizer: torch.optim.Optimizer, scaler: torch.amp.GradScaler, finite: Tensor) -> None:
    """Update unless `finite` () is false; on a GPU the host does not wait to learn which."""
    if scaler.is_enabled():
        scaler.step(optimizer)
        scaler.update()
    elif optimizer.defaults.get("fused"):
        optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # read by the fused kernel, as from a scaler
        optimizer.step()
    elif finite.item():
        optimizer.step()


# --- the loss --------------------------------------------------------------------------------------------------------


def dreambooth_loss(
    base: BaseModel,
    batch: Batch,
    predicted: Tensor,
    *,
    prior_loss_weight: float,
    min_snr_gamma: float | None = None,
    class_targets: Tensor | None = None,
) -> Tensor:
    """Mean squared error of the prediction on the photos, plus the weighted one on the class.

    batch.latents  (N, C, H/f, W/f)  times the scaling_factor; H, W in pixels, f pixels a latent; photos before the class
    predicted      the same shape, float32
    batch.weights  (N, 1, H/f, W/f)  of the error, with mean 1 in each picture; None: 1 everywhere
    batch.totals   photos and rows of the class of the full batch: the losses of its parts sum to that of the batch
    class_targets  (rows of the class, C, H/f, W/f)  what to predict there; None: noise or velocity, as for photos
    returns        () float32
    """
    signal, spread = signal_and_spread(base, batch)
    target = signal * batch.noise - spread * batch.latents if base.prediction_type == "v_prediction" else batch.noise
    if class_targets is not None:
        target = torch.cat([target[: batch.photos], class_targets])
    squared = (predicted - target).square()
    if batch.weights is not None:
        squared = squared * batch.weights
    error = squared.mean(dim=(1, 2, 3))
    if min_snr_gamma is not None:
        error = error * min_snr_weight(base.alphas_cumprod[batch.timesteps], min_snr_gamma, base.prediction_type)
    photos, of_class = batch.totals
    loss = error[: batch.photos].sum() / photos
    if of_class:
        loss = loss + prior_loss_weight * error[batch.photos :].sum() / of_class
    return loss


def predict(base: BaseModel, batch: Batch, text: TextConditions) -> Tensor:
    """What the U-Net predicts for the noisy latents, in their shape, float32.

    text.states    (N, tokens, d)    d = cross_attention_dim; SDXL adds text.pooled (N, p) and batch.time_ids (N, 6)
    """
    signal, spread = signal_and_spread(base, batch)
    noisy = signal * batch.latents + spread * batch.noise
    extra = None if batch.time_ids is None else {"text_embeds": text.pooled, "time_ids": batch.time_ids}
    predicted = base.unet(noisy.to(base.dtype), batch.timesteps, text.states.to(base.dtype), added_cond_kwargs=extra).sample
    return predicted.float()


def signal_and_spread(base: BaseModel, batch: Batch) -> tuple[Tensor, Tensor]:
    """What latents and noise are multiplied with at their timesteps, each (N, 1, 1, 1)."""
    alphas = base.alphas_cumprod[batch.timesteps].view(-1, 1, 1, 1)
    return alphas.sqrt(), (1 - alphas).sqrt()


def min_snr_weight(alphas_cumprod: Tensor, gamma: float, prediction_type: str) -> Tensor:
    """min(SNR, gamma) / SNR for epsilon and / (SNR + 1) for velocity (arXiv 2303.09556, sec. 3.4). (N,) -> (N,).

    At zero terminal SNR the epsilon weight is its limit, 1.
    """
    snr = alphas_cumprod / (1 - alphas_cumprod)
    if prediction_type == "v_prediction":
        return snr.clamp(max=gamma) / (snr + 1)
    return torch.where(snr > gamma, gamma / snr, torch.ones_like(snr))
