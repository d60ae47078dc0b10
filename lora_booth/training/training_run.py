"""A training as an iterator of steps: what wraps the loop from outside."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, nullcontext
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map_only

from ..adapters.adapter import Adapter
from ..adapters.contents import LoraFactors
from ..base.base_model import BaseModel
from ..config import LoraSpec, SettledConfig, TrainingConfig, settled, typed
from ..errors import TrainingError, reason_of, setting
from ..injection.trainable import TrainableLora, first_factors, spec_of, trainable
from ..kernels.capture import StepGraph, obstacle
from .distributed import ALONE, Processes
from .health import Health, RollBack
from .latents import Inputs, LatentCache
from .loop import LoopState, accumulate, backward, updates
from .memory import is_out_of_memory
from .optimizers import averaged, make_optimizer, restore
from .progress import Step
from .together import Together
from .training_mode import check_feasible, make_scaler, training_mode

LOOK_EVERY = 16  # updates on a GPU between two looks at the losses, since each waits for the GPU: chosen
SMOOTHING = 0.95  # of the displayed loss, an exponential mean over about 1 / (1 - .95) = 20 updates: chosen

# The ladder of settings that need less memory, from the cheapest to the slowest.
# Each level changes one setting and leaves rank, resolution, batch and steps alone: the same adapter up to rounding.
# The first step needs as much memory as any later one, so the ladder is used there, or when another program takes memory.
LEVELS: tuple[tuple[str, Any], ...] = (
    ("pictures_at_a_time", 1),
    ("gradient_checkpointing", True),
)
# these change the result
LEFT_TO_TRY = "a smaller resolution or rank, or a base in half precision or in 4 bits"


def training_steps(
    base: BaseModel,
    cache: LatentCache,
    *,
    lora: LoraSpec | None = None,
    config: TrainingConfig | None = None,
    init: Adapter | str | Path | None = None,
) -> Iterator[Step]:
    """Train on what `prepare` encoded; yields after each optimizer update.

    init  an adapter to begin with, as in `train`

    Stop whenever you like: `step.factors()` holds what was learnt so far. The base is restored when the iteration ends.
    Raises SettingsError, TrainingError.
    """
    base, cache = typed("base", base, BaseModel), typed("cache", cache, LatentCache)
    lora, _, first = beginning_with(init, base, typed("lora", lora, LoraSpec | None))
    config = settled(config, base, cache.photos)
    check_feasible(base, lora, config)
    run = TrainingRun(base, cache, lora, config, first=first)
    try:
        yield from run
    finally:
        run.close()


def beginning_with(
    init: Adapter | str | Path | None, base: BaseModel, lora: LoraSpec | None
) -> tuple[LoraSpec, Adapter | None, dict[str, LoraFactors] | None]:
    """What is trained, the adapter that it begins with, and its factors."""
    given: Any = typed("init", init, Adapter | Path | None)  # type: ignore[operator]
    if given is None:
        return lora or LoraSpec(), None, None
    adapter = given if isinstance(given, Adapter) else Adapter.load(given)
    lora = lora or spec_of(base, adapter)
    return lora, adapter, first_factors(base, lora, adapter)


class TrainingRun(Iterator[Step]):
    """An iterator of `Step`s. `close()` takes the adapter out of the base.

    first      the factors to begin with, by module; None: new ones
    resume     what `state()` returned earlier
    levels     settings of the memory ladder to start with; those of `resume` take precedence
    say        called with one line for each event: a rollback, a halved rate, a level of the memory ladder
    processes  that share each batch
    together   shares each pass with other runs; None: this run has the base to itself
    """

    def __init__(
        self,
        base: BaseModel,
        cache: LatentCache,
        lora: LoraSpec,
        config: SettledConfig,
        *,
        first: Mapping[str, LoraFactors] | None = None,
        resume: dict[str, Any] | None = None,
        levels: Mapping[str, Any] | None = None,
        say: Callable[[str], None] = lambda text: None,
        processes: Processes = ALONE,
        together: Together | None = None,
    ) -> None:
        self.say = say
        self.processes = processes
        self.together = together
        saved = resume or {}
        found = saved.get("levels", levels or {})
        self.levels = {name: found[name] for name, _ in LEVELS if name in found}
        config = replace(config, **self.levels)
        recorded = config.capture and base.device.type == "cuda" and together is None
        if recorded and (reason := obstacle(base, lora)) is not None:
            say(f"note: the step is not recorded, since {reason}")
            recorded = False
        self._stack, self._modes = ExitStack(), ExitStack()
        try:
            self.lora: TrainableLora
            if together is not None:
                self.lora = together.fresh()
            else:
                self.lora = self._stack.enter_context(trainable(base, lora, seed=config.seed, first=first))
                self._stack.enter_context(self._modes)
                self._modes.enter_context(training_mode(base, self.lora, config, say=say))
            optimizer, scaler = make_optimizer(self.lora, config, base.device), make_scaler(base)
            self.lora.averaged = averaged(optimizer, self.lora.flat.values)
            self.loop = LoopState(base, cache, config, self.lora, optimizer, scaler, lora.dropout, processes)
            if together is not None:
                self._stack.enter_context(together.joined(self.loop))
            self.backward: Callable[[Inputs], Tensor] = partial(backward, self.loop)
            if recorded:
                graph = StepGraph(self.backward, self.lora.flat.gradient, say=say)
                self._stack.callback(graph.close)
                self.backward = graph
            self._updates = updates(self.loop, self._gradients)
            self.started = time.monotonic()
            self.look_every = 1 if base.device.type == "cpu" else LOOK_EVERY
            self.smoothed = torch.full((), torch.nan, device=base.device)
            self._unread: list[Tensor] = []  # losses that the host has not looked at
            if resume is not None:
                self._restore(resume)
            self.first = self.loop.step
            if self.first == 0:
                self.loop.check = self._check_gradients
            self._good: dict[str, Any] = saved.get("good") or self._now()  # to roll back to
        except BaseException:
            self.close()
            raise

    @property
    def step(self) -> int:
        """Updates done."""
        return self.loop.step

    def close(self) -> None:
        self._stack.close()

    @contextmanager
    def drawing(self) -> Iterator[None]:
        """Within the context the base draws with what is learnt so far."""
        with self.lora.averaged(), nullcontext() if self.together is None else self.together.drawing(self.loop):
            yield

    def __next__(self) -> Step:
        while True:
            loss = next(self._updates)
            if self._went_well(loss):
                return self._report(loss)

    def _gradients(self) -> Tensor:
        """`accumulate`, from the start again at the next level of the memory ladder where memory runs out."""
        if self.together is not None:
            return self.together.gradients(self.loop)
        while True:
            try:
                return accumulate(self.loop, self.backward)
            except Exception as error:
                if not is_out_of_memory(error):
                    raise
                reason = reason_of(error)
            self._climb(reason)  # out here: the exception's traceback holds tensors

    def _climb(self, reason: str) -> None:
        """Go to the next level of the memory ladder. Raises TrainingError at its end.

        Before that, drop the recordings of other layouts, whose memory a new one cannot use.
        """
        loop = self.loop
        if isinstance(self.backward, StepGraph) and self.backward.layouts > 1:
            self.backward.close()
            self.say(f"out of memory at step {self.step + 1}: continuing without a recording")
            return
        pictures = loop.config.batch_size * loop.cache.rows_per_photo
        level = next_level(loop.config, pictures=-(-pictures // loop.processes.count))
        if level is None:
            raise TrainingError(f"out of memory at step {self.step + 1} at every level ({reason}); try {LEFT_TO_TRY}")
        name, value = level
        self.levels[name] = value
        loop.config = replace(loop.config, **{name: value})
        self._modes.close()
        self._modes.enter_context(training_mode(loop.base, self.lora, loop.config))
        if isinstance(self.backward, StepGraph):
            self.backward.forget()
        if loop.base.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"out of memory at step {self.step + 1}: continuing with {name}={value}")

    # --- looking at the losses

    def _went_well(self, loss: Tensor) -> bool:
        """Look at the losses now and then. False: they went wrong, and the run is back at its last good state."""
        mean = torch.where(self.smoothed.isnan(), loss, SMOOTHING * self.smoothed + (1 - SMOOTHING) * loss)
        self.smoothed = torch.where(loss.isfinite(), mean, self.smoothed)
        self._unread.append(loss)
        if not (self.step == self.loop.config.steps or self.step % self.look_every == 0):
            return True
        losses, self._unread = torch.stack(self._unread).tolist(), []
        try:
            for line in self.loop.health.judge(losses, step=self.step, rate=self.loop.config.learning_rate):
                self.say(line)
        except RollBack as reason:
            self._go_back()
            self.say(f"{reason}; continuing from step {self.step}")
            return False
        except TrainingError:
            self._go_back()  # for whoever saves the last good state
            raise
        if self.step - self._good["step"] >= self.loop.config.checkpoint_every and self.loop.health.well:
            self._good = self._now()
        return True

    def _check_gradients(self) -> None:
        """Once, with the first gradients that do not overflow under a GradScaler, which lowers its scale, down to 1."""
        scaler = self.loop.scaler
        if scaler.is_enabled() and scaler.get_scale() >= 1 and not self.loop.factors.gradient.isfinite().all():
            return
        self.lora.check_gradients()
        self.loop.check = None

    def _report(self, loss: Tensor) -> Step:
        elapsed, steps = time.monotonic() - self.started, self.loop.config.steps
        group = self.loop.optimizer.param_groups[0]
        return Step(
            index=self.step,
            total=steps,
            loss_tensor=loss,
            smoothed_tensor=self.smoothed,
            learning_rate=group["lr"] * group.get("d", 1.0),  # d: of Prodigy
            seconds=elapsed,
            seconds_left=elapsed / max(1, self.step - self.first) * (steps - self.step),
            lora=self.lora,
        )

    # --- the state, to resume from and to roll back to

    def state(self) -> dict[str, Any]:
        """All that the next updates depend on, as a copy; with the state to roll back to, if that is another one."""
        with self.lora.averaged():
            average = None if self.lora.averaged is nullcontext else self.lora.copied()
        return self._now() | {"average": average, "good": None if self._good["step"] == self.step else self._good}

    def _now(self) -> dict[str, Any]:
        """On the CPU: a GPU's memory is scarcer."""
        loop = self.loop
        return {
            "step": loop.step,
            "lora": self.lora.copied(),
            "optimizer": on_cpu(loop.optimizer.state_dict()),
            "scaler": loop.scaler.state_dict(),
            "smoothed": on_cpu(self.smoothed),
            "health": loop.health.state(),
            "unread": on_cpu(torch.stack(self._unread)) if self._unread else None,
            "levels": dict(self.levels),
        }

    def _restore(self, state: dict[str, Any]) -> None:
        """Raises TrainingError for a state that no run with these settings has saved."""
        loop = self.loop
        try:
            for name, parameter in self.lora.parameters.items():
                factor = state["lora"][name]
                if factor.shape != parameter.shape or not factor.isfinite().all():
                    raise ValueError(name)
                with torch.no_grad():
                    parameter.copy_(factor)
            restore(loop.optimizer, on_cpu(state["optimizer"]))  # a copy
            loop.scaler.load_state_dict(state["scaler"])
            loop.step, self.smoothed = int(state["step"]), state["smoothed"].to(loop.base.device).reshape(())
            loop.health = Health.from_state(state["health"])
            self._unread = [] if state["unread"] is None else list(state["unread"].to(loop.base.device).reshape(-1).unbind())
        except (LookupError, TypeError, ValueError, AttributeError, RuntimeError) as error:
            reason = f"{type(error).__name__}: {reason_of(error)}"
            remedy = setting("restart", True)
            raise TrainingError(f"the saved state does not fit this run ({reason}); discard it with {remedy}") from error

    def _go_back(self) -> None:
        """To the last good state, remembering what went wrong."""
        health = self.loop.health
        self._restore(self._good)
        self.loop.health = Health.from_state(self._good["health"], after=health)


def next_level(config: TrainingConfig, *, pictures: int) -> tuple[str, Any] | None:
    """The next setting that can still save memory, and its value; or None. pictures: in this process's share of a batch."""
    for name, value in LEVELS:
        useless = name == "pictures_at_a_time" and pictures <= 1
        if getattr(config, name) != value and not useless:
            return name, value
    return None


def on_cpu(value: Any) -> Any:
    """A copy on the CPU, whatever the tensors are in."""
    return tree_map_only(Tensor, lambda tensor: tensor.detach().to("cpu", copy=True), value)
