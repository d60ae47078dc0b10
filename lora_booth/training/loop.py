"""The loop: an iterator of optimizer updates over a `LatentCache`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ..base_model import BaseModel, TextConditions
from ..config import LoraSpec, TrainingConfig
from ..errors import TrainingError
from ..injection import TrainableLora, trainable
from ..latents import Batch, LatentCache, conditions, draw, step_seed
from ..loss import dreambooth_loss
from ..progress import Step
from .health import Health, RollBack
from .modes import training_mode
from .settings import learning_rate

LOOK_EVERY = 16  # updates on a GPU between two looks at the losses: each look waits for the GPU


@dataclass(frozen=True)
class Inputs:
    """All that one forward pass reads, on the device."""

    batch: Batch
    text: TextConditions
    noise: Tensor  # like batch.latents
    timesteps: Tensor  # (N,) int64


class TrainingRun(Iterator[Step]):
    """The state of one training: an iterator of `Step`s. `close()` takes the adapter out of the base.

    resume  what `state()` gave before
    say     told one line of every event: a rollback, a halved rate
    """

    def __init__(
        self,
        base: BaseModel,
        cache: LatentCache,
        lora: LoraSpec,
        config: TrainingConfig,
        *,
        resume: dict[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
    ) -> None:
        self.base, self.cache, self.config, self.say = base, cache, config, say
        self.dropout = lora.dropout
        self._stack = ExitStack()
        try:
            self.lora: TrainableLora = self._stack.enter_context(trainable(base, lora, seed=config.seed))
            self._stack.enter_context(training_mode(base, config))
            parameters = self.lora.named_parameters()
            for name, parameter in parameters.items():
                if parameter.dtype != torch.float32:
                    raise TrainingError(f"{name} is {parameter.dtype}; adapter weights must be float32")
            self.parameters = list(parameters.values())
            self.fused = base.device.type != "mps"
            self.optimizer = torch.optim.AdamW(
                self.parameters, lr=config.learning_rate or 0.0, weight_decay=config.weight_decay, fused=self.fused
            )
            self.scaler = torch.amp.GradScaler(
                base.device.type, enabled=base.dtype == torch.float16 and base.device.type == "cuda"
            )
            self.step, self.started = 0, time.monotonic()
            self.smoothed = torch.full((), torch.nan, device=base.device)
            self.health = Health()
            self._unread: list[Tensor] = []  # losses that the host has not looked at
            if resume is not None:
                self._restore(resume)
            self.first = self.step
            self._good = self.state()  # to roll back to
        except BaseException:
            self.close()
            raise

    @property
    def factors(self) -> dict[str, Any]:
        return self.lora.factors()

    def close(self) -> None:
        self._stack.close()

    def __next__(self) -> Step:
        while self.step < (self.config.steps or 0):
            loss = self._update()
            self.step += 1
            if self._went_well(loss):
                return self._report(loss)
        raise StopIteration

    # --- one update, without a look at what the device computes

    def _update(self) -> Tensor:
        self._set_rate(learning_rate(self.config, self.step) * self.health.rate_share)
        self.optimizer.zero_grad(set_to_none=False)
        total = torch.zeros((), device=self.base.device)
        for part in range(self.config.gradient_accumulation):
            index = self.step * self.config.gradient_accumulation + part
            with self._dropout_drawn_from(index):
                for inputs in self._inputs(index):
                    total += self._forward_backward(inputs)
        self._apply(total)
        return total

    def _inputs(self, index: int) -> Iterator[Inputs]:
        """Forward pass `index`, in as many parts as memory asks for."""
        config = self.config
        batch, noise, timesteps = draw(self.cache, seed=config.seed, step=index, batch_size=config.batch_size)
        size = config.pictures_at_a_time or len(batch)
        for first in range(0, len(batch), size):
            here = slice(first, first + size)
            part = batch[here]
            text = conditions(self.base, self.cache, part.prompts)
            yield Inputs(part, text, noise[here], timesteps[here])

    def _forward_backward(self, inputs: Inputs) -> Tensor:
        loss = dreambooth_loss(
            self.base,
            inputs.batch,
            inputs.text,
            inputs.noise,
            inputs.timesteps,
            prior_loss_weight=self.config.prior_loss_weight,
            min_snr_gamma=self.config.min_snr_gamma,
        )
        loss = loss / self.config.gradient_accumulation
        self.scaler.scale(loss).backward()  # type: ignore[no-untyped-call]
        return loss.detach()

    def _apply(self, loss: Tensor) -> None:
        """Clip and update; an update that is not finite leaves everything as it was."""
        self.scaler.unscale_(self.optimizer)
        if self.step == self.first == 0 and not self.scaler.is_enabled():
            self.lora.check_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.parameters, self.config.max_grad_norm)
        finite = loss.isfinite() & norm.isfinite()
        if self.scaler.is_enabled():
            self.scaler.step(self.optimizer)
            self.scaler.update()
        elif self.fused:
            self.optimizer.found_inf = (~finite).float()  # type: ignore[attr-defined]  # read by the fused kernel, as from a scaler
            self.optimizer.step()
        elif finite.item():
            self.optimizer.step()
        mean = torch.where(self.smoothed.isnan(), loss, 0.95 * self.smoothed + 0.05 * loss)
        self.smoothed = torch.where(loss.isfinite(), mean, self.smoothed)

    def _set_rate(self, rate: float) -> None:
        for group in self.optimizer.param_groups:
            if isinstance(group["lr"], Tensor):
                group["lr"].fill_(rate)
            else:
                group["lr"] = rate

    @contextmanager
    def _dropout_drawn_from(self, index: int) -> Iterator[None]:
        """Dropout has only the global generator: seeded for this forward pass, then left as it was."""
        if not self.dropout:
            yield
            return
        devices = [self.base.device] if self.base.device.type == "cuda" else []
        with torch.random.fork_rng(devices=devices):
            torch.manual_seed(step_seed(self.config.seed, index))
            yield

    # --- what the host sees of it

    def _went_well(self, loss: Tensor) -> bool:
        """Look at the losses now and then; False: they went wrong, and the run is back at its last good state."""
        self._unread.append(loss)
        last = self.step == self.config.steps
        if not (last or self.base.device.type == "cpu" or self.step % LOOK_EVERY == 0):
            return True
        losses, self._unread = torch.stack(self._unread).tolist(), []
        try:
            self.health.judge(losses, step=self.step, rate=self.config.learning_rate or 0.0)
        except RollBack as reason:
            self._restore(self._good, rate_share=self.health.rate_share)
            self.say(f"{reason}; going on from step {self.step}")
            return False
        if self.step - self._good["step"] >= self.config.checkpoint_every and self.health.well:
            self._good = self.state()
        return True

    def _report(self, loss: Tensor) -> Step:
        elapsed = time.monotonic() - self.started
        steps = self.config.steps or 0
        return Step(
            index=self.step,
            total=steps,
            loss_tensor=loss,
            smoothed_tensor=self.smoothed,
            learning_rate=float(self.optimizer.param_groups[0]["lr"]),
            seconds=elapsed,
            seconds_left=elapsed / max(1, self.step - self.first) * (steps - self.step),
            lora=self.lora,
        )

    def state(self) -> dict[str, Any]:
        """All that the next update depends on, as a copy."""
        optimizer = self.optimizer.state_dict()
        return {
            "step": self.step,
            "lora": {name: p.detach().clone() for name, p in self.lora.named_parameters().items()},
            "optimizer": optimizer | {"state": {i: cloned(s) for i, s in optimizer["state"].items()}},
            "scaler": self.scaler.state_dict(),
            "smoothed": self.smoothed.clone(),
            "health": self.health.state(),
        }

    def _restore(self, state: dict[str, Any], *, rate_share: float | None = None) -> None:
        with torch.no_grad():
            for name, parameter in self.lora.named_parameters().items():
                parameter.copy_(state["lora"][name])
        optimizer = state["optimizer"]
        self.optimizer.load_state_dict(optimizer | {"state": {i: cloned(s) for i, s in optimizer["state"].items()}})
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.smoothed = int(state["step"]), state["smoothed"].to(self.base.device)
        self.health = Health.from_state(state["health"])
        if rate_share is not None:
            self.health.rate_share = rate_share


def cloned(state: dict[str, Any]) -> dict[str, Any]:
    return {key: value.clone() if isinstance(value, Tensor) else value for key, value in state.items()}
