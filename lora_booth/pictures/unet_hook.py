"""UNetHook: which attached adapter is active in the U-Net, by step, row and pixel.

The pipeline stays a stock one. While hooked, the U-Net's `forward` is wrapped, and a gate multiplies each layer's change;
both are removed afterwards.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any

from torch import Tensor, nn

from ..base.base_model import TextConditions
from ..base.changes import hooked, undone
from ..errors import SettingsError
from ..injection.attached import AttachedAdapter
from .regions import Masks
from .weights import Weight

PROMPT_LAYERS = (".attn2.to_k", ".attn2.to_v")  # their outputs belong to the prompt's tokens, not to pixels


@dataclass(frozen=True)
class UNetCall:
    """One call of the U-Net: its arguments by name, and its place in the denoising."""

    forward: Callable[..., Any]
    arguments: Mapping[str, Any]
    step: int  # denoising steps done before it
    progress: float  # share of the denoising steps done before it, 0 to 1
    rows: int  # of the pipeline's batch: one for each picture, two with classifier-free guidance
    guided: bool  # the first half of the rows is the negative prompt
    size: tuple[int, int]  # height and width of the latents

    @property
    def pictures(self) -> int:
        return self.rows // 2 if self.guided else self.rows

    def run(self, **changed: Any) -> Any:
        """The U-Net's answer, with these arguments in place of the call's."""
        return self.forward(**{**self.arguments, **changed})

    def states_of(self, text: TextConditions) -> Tensor:
        """The text encoders' output with another prompt, (1, tokens, d), in the rows that are not the negative prompt's.
        (rows, tokens, d)"""
        states: Tensor = self.arguments["encoder_hidden_states"].clone()
        theirs, ours = text.states.shape[1], states.shape[1]
        if theirs != ours:
            raise SettingsError(f"a region's prompt has {theirs} tokens and the picture's {ours}; shorten the longer prompt")
        states[self.rows - self.pictures :] = text.states.to(states)
        return states


@dataclass
class Gate:
    """Factors on the changes of one adapter; None: 1."""

    rows: Tensor | None = None  # (rows,)
    masks: Masks | None = None  # of all subjects, with their reduced sizes cached from step to step
    subject: int = 0  # which of them
    words: Tensor | None = None  # (rows or 1, tokens), for the layers that read the prompt


Answer = Callable[["UNetHook", UNetCall], Any]  # returns what the pipeline gets in place of the U-Net's output


class UNetHook:
    """Weights by step, and gates by row, pixel and word, for adapters that are attached to a pipeline.

    weights  of the attached adapters; (): as they are attached
    gates    one for each attached adapter, set before a call runs; None: active everywhere
    size     height and width of the hidden states that pass through the current transformer
    """

    size: tuple[int, int]

    def __init__(self, pipeline: Any, attached: Sequence[AttachedAdapter], weights: Sequence[Weight] = ()) -> None:
        from diffusers import UNet2DConditionModel

        self.pipeline, self.unet = pipeline, pipeline.unet
        self.attached, self.weights = attached, weights
        self.gates: list[Gate | None] = [None] * len(attached)
        self._names = list(inspect.signature(UNet2DConditionModel.forward).parameters)[1:]  # after self
        self._timesteps: list[float] = []  # of this denoising so far
        self._total = 1  # timesteps of this denoising

    # --- on and off

    @contextmanager
    def hooked(self, answer: Answer | None = None) -> Iterator[None]:
        """Within the context, `answer(hook, call)` answers every U-Net call; None: the U-Net does."""
        sizes = [(m.norm, self._note_size) for m in self.unet.modules() if type(m).__name__ == "Transformer2DModel"]
        inside = [(i, *item) for i, one in enumerate(self.attached) for item in one.layers.items() if item[0][:5] == "unet."]
        forward, before = self.unet.forward, vars(self.unet).get("forward")

        def answering(*args: Any, **kwargs: Any) -> Any:
            call = self._call(forward, {**dict(zip(self._names, args, strict=False)), **kwargs})
            return call.run() if answer is None else answer(self, call)

        def undo() -> None:
            for _, _, layer in inside:
                layer.gate = None
            if before is not None:
                self.unet.forward = before
            else:
                vars(self.unet).pop("forward", None)

        with undone(undo), hooked(sizes):
            for index, path, layer in inside:
                layer.gate = partial(self._gated, index, path)
            self.unet.forward = answering
            yield

    def _call(self, forward: Callable[..., Any], arguments: Mapping[str, Any]) -> UNetCall:
        sample, timestep = arguments["sample"], arguments["timestep"]
        time = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        if not self._timesteps or time > self._timesteps[-1]:  # a new picture; image-to-image begins in mid-schedule
            self._timesteps = []
            schedule = [float(t) for t in self.pipeline.scheduler.timesteps.tolist()]
            self._total = max(1, len([t for t in dict.fromkeys(schedule) if t <= time]))
        if not self._timesteps or self._timesteps[-1] != time:  # some schedulers call twice at one timestep
            self._timesteps.append(time)
        step = len(self._timesteps) - 1
        progress = min(1.0, step / self._total)
        for adapter, weight in zip(self.attached, self.weights, strict=False):
            for path in adapter.layers if weight.timed else ():
                if path.startswith("unet."):
                    adapter.scale(path, weight.of(path) if weight.active(progress) else 0.0)
        guided = bool(getattr(self.pipeline, "do_classifier_free_guidance", False)) and len(sample) % 2 == 0
        height, width = sample.shape[-2:]
        return UNetCall(forward, arguments, step, progress, len(sample), guided, (height, width))

    # --- gates

    def _note_size(self, norm: nn.Module, args: Any, states: Tensor) -> None:
        self.size = (states.shape[-2], states.shape[-1])

    def _gated(self, index: int, path: str, change: Tensor) -> Tensor:
        gate, reads_prompt = self.gates[index], path.endswith(PROMPT_LAYERS)
        if gate is None:
            return change
        if gate.rows is not None:
            change = change * gate.rows.to(change.dtype).reshape([len(change)] + [1] * (change.ndim - 1))
        if reads_prompt and gate.words is not None:
            change = change * gate.words.to(change.dtype)[..., None]
        elif not reads_prompt and gate.masks is not None:
            change = change * self._pixels(gate.masks, gate.subject, change)
        return change

    def _pixels(self, masks: Masks, subject: int, output: Tensor) -> Tensor:
        """The mask in the shape of a layer's output: (rows, H, W) -> (rows, 1, H, W), (rows, H * W, 1) or (rows, 1)."""
        if output.ndim == 4:
            mask = masks.at(*output.shape[-2:])[subject][:, None]
        elif output.ndim == 3:
            mask = masks.at(*self.size)[subject].flatten(1)[:, :, None]
        else:  # a resnet's time embedding has no pixels: the subject's share of the picture
            mask = masks.full[subject].mean((1, 2))[:, None]
        repeats = len(output) // len(mask) if len(mask) > 1 else 1
        return mask.repeat(repeats, *[1] * (mask.ndim - 1)).to(output.dtype)
