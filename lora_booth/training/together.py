"""Several runs at once on one base: they share each forward and backward pass, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from itertools import zip_longest
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.contents import LoraFactors
from ..base.base_model import BaseModel
from ..base.quantization import packing_of
from ..config import LoraSpec, SettledConfig, TrainingConfig
from ..errors import TrainingError, reason_of, setting
from ..injection.paths import base_layer, target_paths
from ..injection.trainable import TrainableLora, trainable
from ..kernels.capture import layout_of
from ..kernels.lora import FlatFactors
from .latents import Inputs
from .loop import LoopState, backward_together, drawn
from .memory import is_out_of_memory
from .training_mode import training_mode

MOST = 8  # runs that share a pass, unless you ask for more; chosen: beyond it hardly anything is gained
Part = tuple[LoopState, Inputs]


def obstacle(base: BaseModel, lora: LoraSpec, config: TrainingConfig) -> str | None:
    """Why runs with these settings cannot share passes; None if they can."""
    layers = [base.structure[name].get_submodule(path) for name, paths in target_paths(base, lora).items() for path in paths]
    obstacles = {
        "dropout draws in each run from a generator of its own": lora.dropout > 0,
        "text encoders are trained": lora.text_encoder,
        "lean=False": not config.lean,
        "target_modules has other layers than linear ones": not all(is_linear(base_layer(layer)) for layer in layers),
    }
    return next((reason for reason, present in obstacles.items() if present), None)


def is_linear(layer: nn.Module) -> bool:
    return type(layer) is nn.Linear or packing_of(layer) is not None


class Together:
    """The passes of several runs, each a `LoopState`, on one base: each row of a batch has the adapter of its run.

    A run has factors, an optimizer and a state like one alone; here it only gets its gradients. They are computed for all
    runs that wait for theirs, as soon as one asks. The base has one adapter in it, to which the runs lend their factors, from
    the first pass until `leave`.

    first  the factors that each run begins with, by module; None: new ones
    most   runs in a pass; halved where memory runs out
    """

    def __init__(
        self,
        base: BaseModel,
        lora: LoraSpec,
        config: SettledConfig,
        *,
        first: Mapping[str, LoraFactors] | None,
        most: int,
        say: Callable[[str], None],
    ) -> None:
        self.base, self.lora, self.most, self.say = base, lora, most, say
        self.config = config
        self.runs: list[LoopState] = []
        self._first = first
        self._fresh: dict[str, Tensor] = {}  # the factors that each run begins with
        self._losses: dict[LoopState, Tensor] = {}  # of passes whose gradients were not used yet
        self._adapter: TrainableLora | None = None
        self._inside = ExitStack()

    def inside(self) -> TrainableLora:
        """The adapter in the base's layers, put there now if there is none."""
        if self._adapter is None:
            enter = self._inside.enter_context
            enter(self.base.only_unet_on_device())
            adapter = enter(trainable(self.base, self.lora, seed=self.config.seed, first=self._first))
            enter(training_mode(self.base, adapter, self.config, say=self.say))
            self._fresh = self._fresh or {name: one.detach().clone() for name, one in adapter.parameters.items()}
            self._adapter = adapter
        return self._adapter

    def leave(self) -> None:
        """Restore the base, until the next pass."""
        self._adapter = None
        self._inside.close()

    @contextmanager
    def joined(self, run: LoopState) -> Iterator[None]:
        """Within the context this run takes part in the passes."""
        self.runs.append(run)
        try:
            yield
        finally:
            self.runs.remove(run)
            self._losses.pop(run, None)

    def fresh(self) -> TrainableLora:
        """An adapter for a run, outside the base."""
        if not self._fresh:
            self.inside()
        parameters = {name: nn.Parameter(values.clone()) for name, values in self._fresh.items()}
        return TrainableLora(parameters, self.lora.scale_alpha, FlatFactors(list(parameters.values()), torch.float32), ())

    @contextmanager
    def drawing(self, run: LoopState) -> Iterator[None]:
        """Within the context the base draws with the factors of this run."""
        self.inside().flat.values.data.copy_(run.factors.values.data)
        yield

    def gradients(self, run: LoopState) -> Tensor:
        """Put the gradients of this run's next update into its factors; returns its loss ()."""
        if run not in self._losses:
            self._compute([one for one in self.runs if one not in self._losses and one.step < one.config.steps])
        return self._losses.pop(run)

    def _compute(self, runs: Sequence[LoopState]) -> None:
        """The gradients of these runs. Batches of other sizes do not fit into one pass, so there may be several."""
        losses = {run: torch.zeros((), device=self.base.device) for run in runs}
        for run in runs:
            run.factors.gradient.zero_()
        for parts in zip_longest(*(drawn(run) for run in runs)):
            alike: dict[Any, list[Part]] = {}
            for run, inputs in zip(runs, parts, strict=True):
                if inputs is not None:
                    alike.setdefault(layout_of(inputs), []).append((run, inputs))
            for waiting in alike.values():
                while waiting:
                    now = waiting[: self.most]
                    found = self._tried(now)
                    if found is not None:
                        waiting = waiting[len(now) :]
                        for (run, _), loss in zip(now, found, strict=True):
                            losses[run] += loss
        self._losses |= losses

    def _tried(self, parts: Sequence[Part]) -> list[Tensor] | None:
        """One pass. None: memory ran out, and the next one has half as many runs. Raises TrainingError if it had one only."""
        adapter = self.inside()
        try:
            with adapter.flat.lent([run.factors for run, _ in parts]):
                return backward_together(adapter, [run for run, _ in parts], [inputs for _, inputs in parts])
        except Exception as error:
            if not is_out_of_memory(error):
                raise
            reason = reason_of(error)
        if len(parts) == 1:  # out here: the exception's traceback holds tensors
            raise TrainingError(f"out of memory ({reason}); pass {setting('together', 1)}, which can do with less")
        self.most = -(-len(parts) // 2)
        if self.base.device.type == "cuda":
            torch.cuda.empty_cache()
        self.say(f"out of memory with {len(parts)} subjects: continuing with {self.most} in a pass")
        return None
