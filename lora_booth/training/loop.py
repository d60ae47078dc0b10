"""The loop: an iterator of optimizer updates over a `LatentCache`."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ..base.base_model import BaseModel, TextConditions
from ..config import LoraSpec, TrainingConfig
from ..errors import TrainingError, first_line
from ..injection import TrainableLora, trainable
from ..kernels.attention import fastest_attention
from ..kernels.capture import WORTH_A_TRACE, StepGraph, obstacle
from .distributed import ALONE, Ranks
from .health import Health, RollBack
from .latents import Batch, LatentCache, conditions, draw, step_seed
from .loss import dreambooth_loss
from .memory_ladder import LEFT_TO_TRY, climbed, next_rung, says_out_of_memory
from .modes import make_optimizer, training_mode
from .progress import Step
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

    resume   what `state()` gave before
    savings  rungs of the memory ladder to begin with; those of `resume` go before
    say      told one line of every event: a rollback, a halved rate, a saving of memory
    ranks    the processes that share each batch
    """

    def __init__(
        self,
        base: BaseModel,
        cache: LatentCache,
        lora: LoraSpec,
        config: TrainingConfig,
        *,
        resume: dict[str, Any] | None = None,
        savings: Sequence[str] = (),
        say: Callable[[str], None] = lambda text: None,
        ranks: Ranks = ALONE,
    ) -> None:
        self.savings: list[str] = list(savings if resume is None else resume["savings"])  # rungs that were taken
        config = climbed(config, self.savings)
        if config.attention == "auto":  # a run goes on with the kernel that it began with
            kernel: Any = resume["attention"] if resume else fastest_for(base, cache, config, ranks)
            config = replace(config, attention=kernel)
            say(f"attention: {config.attention}")
        self.base, self.cache, self.config, self.say, self.ranks = base, cache, config, say, ranks
        self.dropout = lora.dropout
        self._stack, self._modes = ExitStack(), ExitStack()
        try:
            self.lora: TrainableLora = self._stack.enter_context(trainable(base, lora, seed=config.seed))
            self._stack.enter_context(self._modes)
            self._modes.enter_context(training_mode(base, self.lora, config, say=say))
            self.flat = self.lora.flat
            self.optimizer = make_optimizer(self.flat.values, config, base.device)
            self.fused = bool(self.optimizer.defaults.get("fused"))
            self.step = 0 if resume is None else int(resume["step"])
            few = base.device.type == "cpu" and (config.steps or 0) - self.step < WORTH_A_TRACE
            wanted = "off" if config.capture == "auto" and few else config.capture
            reason = obstacle(base, lora, config)
            self.graph = StepGraph(self._forward_backward, self.flat.gradient, reason=reason, wanted=wanted, say=say)
            self._stack.callback(self.graph.close)
            self.scaler = torch.amp.GradScaler(
                base.device.type, enabled=base.dtype == torch.float16 and base.device.type == "cuda"
            )
            self.started = time.monotonic()
            self.look_every = 1 if base.device.type == "cpu" else LOOK_EVERY
            self.smoothed = torch.full((), torch.nan, device=base.device)
            self.health = Health()
            self._unread: list[Tensor] = []  # losses that the host has not looked at
            if resume is not None:
                self._restore(resume)
            self.first = self.step
            good = None if resume is None else resume["good"]
            self._good: dict[str, Any] = good or self._now()  # to roll back to
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
            began = time.monotonic()
            loss = self._update()
            if self.config.compile and self.step == self.first:
                self.say(f"compile: the first step took {time.monotonic() - began:.1f} s")
            self.step += 1
            if self._went_well(loss):
                return self._report(loss)
        raise StopIteration

    # --- one update, without a look at what the device computes

    def _update(self) -> Tensor:
        self._set_rate(learning_rate(self.config, self.step) * self.health.rate_share)
        while True:
            try:
                loss = self._gradients()
                break
            except Exception as error:
                if not says_out_of_memory(error):
                    raise
                reason = first_line(error)
            self._save_memory(reason)  # out here: the exception's traceback holds tensors
        loss = self.ranks.add_up(loss, self.flat.gradient)
        return self._apply(loss)

    def _gradients(self) -> Tensor:
        """The loss () and its gradients, of this process's share of the update."""
        self.flat.gradient.zero_()
        total = torch.zeros((), device=self.base.device)
        for part in range(self.config.gradient_accumulation):
            index = self.step * self.config.gradient_accumulation + part
            with self._dropout_drawn_from(index):
                for inputs in self._inputs(index):
                    total += self.graph(inputs)
        return total

    def _save_memory(self, reason: str) -> None:
        """Go on with the next rung of the ladder. Raises TrainingError at its end."""
        pictures = self.config.batch_size * (1 if self.cache.class_images is None else 2)
        rung = next_rung(self.config, pictures=-(-pictures // self.ranks.count))
        if rung is None:
            raise TrainingError(f"out of memory at step {self.step + 1} with every saving ({reason}); try {LEFT_TO_TRY}")
        self.savings.append(rung)
        self.config = climbed(self.config, [rung])
        self._modes.close()
        self._modes.enter_context(training_mode(self.base, self.lora, self.config))
        self.graph.forget()
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"out of memory at step {self.step + 1}: going on with {rung}={getattr(self.config, rung)}")

    def _inputs(self, index: int) -> Iterator[Inputs]:
        """Forward pass `index`, in as many parts as memory asks for."""
        config = self.config
        batch, noise, timesteps = draw(self.cache, seed=config.seed, step=index, batch_size=config.batch_size)
        if self.ranks.count > 1:
            share = self.ranks.share
            batch, noise, timesteps = batch[share], noise[share], timesteps[share]
        size = config.pictures_at_a_time or max(1, len(batch))
        for first in range(0, len(batch), size):
            here = slice(first, first + size)
            part = batch[here]
            text = conditions(self.base, self.cache, part.prompts)
            yield Inputs(part, text, noise[here], timesteps[here])

    def _forward_backward(self, inputs: Inputs) -> Tensor:
        with self.flat.computing():
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

    def _apply(self, loss: Tensor) -> Tensor:
        """Clip and update; an update that is not finite leaves everything as it was. The loss (), nan for such an update."""
        self.scaler.unscale_(self.optimizer)
        if self.step == self.first == 0 and not self.scaler.is_enabled():
            self.lora.check_gradients()
        norm = torch.nn.utils.clip_grad_norm_(self.flat.values, self.config.max_grad_norm)
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
        # gradients that a scaler makes overflow are its own business: it lowers its scale
        return loss if self.scaler.is_enabled() else torch.where(finite, loss, torch.nan)

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
            torch.manual_seed(step_seed(self.config.seed, index) + self.ranks.rank)
            yield

    # --- what the host sees of it

    def _went_well(self, loss: Tensor) -> bool:
        """Look at the losses now and then; False: they went wrong, and the run is back at its last good state."""
        self._unread.append(loss)
        last = self.step == self.config.steps
        if not (last or self.step % self.look_every == 0):
            return True
        losses, self._unread = torch.stack(self._unread).tolist(), []
        try:
            for line in self.health.judge(losses, step=self.step, rate=self.config.learning_rate or 0.0):
                self.say(line)
        except RollBack as reason:
            self.go_back()
            self.say(f"{reason}; going on from step {self.step}")
            return False
        except TrainingError:
            self.go_back()  # for whoever saves what there is
            raise
        if self.step - self._good["step"] >= self.config.checkpoint_every and self.health.well:
            self._good = self._now()
        return True

    def go_back(self) -> None:
        """To the last good state; what went wrong stays known."""
        health = self.health
        self._restore(self._good)
        self.health = Health.from_state(self._good["health"], after=health)

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
        """All that the next updates depend on, as a copy: also the state to roll back to, when it is another one."""
        return self._now() | {"good": None if self._good["step"] == self.step else self._good}

    def _now(self) -> dict[str, Any]:
        """On the CPU: a GPU's memory is scarcer."""
        return {
            "step": self.step,
            "lora": self.lora.copied(),
            "optimizer": on_cpu(self.optimizer.state_dict()),
            "scaler": self.scaler.state_dict(),
            "smoothed": on_cpu(self.smoothed),
            "health": self.health.state(),
            "unread": on_cpu(torch.stack(self._unread)) if self._unread else None,
            "savings": list(self.savings),
            "attention": self.config.attention,
        }

    def _restore(self, state: dict[str, Any]) -> None:
        with torch.no_grad():
            for name, parameter in self.lora.named_parameters().items():
                parameter.copy_(state["lora"][name])
        self.optimizer.load_state_dict(on_cpu(state["optimizer"]))  # which would otherwise go on in what is kept
        self.scaler.load_state_dict(state["scaler"])
        self.step, self.smoothed = int(state["step"]), state["smoothed"].to(self.base.device)
        self.health = Health.from_state(state["health"])
        self._unread = [] if state["unread"] is None else list(state["unread"].to(self.base.device).unbind())


def fastest_for(base: BaseModel, cache: LatentCache, config: TrainingConfig, ranks: Ranks) -> str:
    """The attention for the batches of this run, the same in all its processes."""
    pictures = config.batch_size * (1 if cache.class_images is None else 2)
    pictures = min(config.pictures_at_a_time or pictures, -(-pictures // ranks.count))
    side = cache.photos.mean.shape[-1] * base.pixels_per_latent
    return ranks.from_main(lambda: fastest_attention(base, resolution=side, pictures=pictures))


def on_cpu(value: Any) -> Any:
    """A copy, whatever dictionaries and lists the tensors are in."""
    if isinstance(value, Tensor):
        return value.detach().to("cpu", copy=True)
    if isinstance(value, dict):
        return {key: on_cpu(one) for key, one in value.items()}
    return [on_cpu(one) for one in value] if isinstance(value, list) else value
