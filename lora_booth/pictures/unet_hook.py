"""Directs attached adapters during the U-Net's calls: which is heard, at which step, in which row and at which pixel.

Everything is done from outside a stock pipeline. The U-Net's `forward` is wrapped while the conductor is on, and a
forward hook on the `up` factor of each adapter multiplies the change of its layer by a gate; both are gone afterwards.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from ..base.base_model import TextConditions
from ..errors import SettingsError
from ..injection import AttachedAdapter
from .regions import Masks
from .weights import Weight

TEXT_SIDE = (".attn2.to_k", ".attn2.to_v")  # their outputs are words, not pixels


@dataclass(frozen=True)
class Moment:
    """What is known of one call of the U-Net."""

    step: int  # denoising steps done before it
    progress: float  # share of this denoising that is behind it, 0 to 1
    rows: int  # of the pipeline's own batch: pictures, twice with classifier-free guidance
    guided: bool  # the first half of the rows is the negative prompt
    size: tuple[int, int]  # of the latents

    @property
    def pictures(self) -> int:
        return self.rows // 2 if self.guided else self.rows


@dataclass
class Gate:
    """What one adapter's changes are multiplied by; None: 1."""

    rows: Tensor | None = None  # (rows,)
    masks: Masks | None = None  # of all subjects, which keep their reduced sizes from step to step
    subject: int = 0  # which of them
    words: Tensor | None = None  # (rows or 1, tokens), for the layers that read the prompt


Forward = Callable[..., Any]


class Conductor:
    """While on: `direct` is called before each U-Net call and may set `gates` and repeat the rows.

    gates  one for each attached adapter; None: as attached
    """

    def __init__(self, pipeline: Any, on: Sequence[AttachedAdapter], weights: Sequence[Weight]) -> None:
        self.pipeline, self.unet = pipeline, pipeline.unet
        self.on, self.weights = on, weights
        self.gates: list[Gate | None] = [None] * len(on)
        self.moment: Moment | None = None
        self.size: tuple[int, int] = (0, 0)  # of the hidden states that pass through the current transformer
        self._heard: list[float] = [1.0] * len(on)
        self._seen: list[float] = []  # timesteps of this denoising, in order
        self._ahead = 1  # how many there are

    # --- on and off

    @contextmanager
    def conducting(self, call: Callable[[Conductor, Forward, tuple[Any, ...], dict[str, Any]], Any]) -> Iterator[None]:
        """`call(conductor, forward, args, kwargs)` answers every U-Net call meanwhile."""
        with ExitStack() as stack:
            for module in self.unet.modules():
                if type(module).__name__ == "Transformer2DModel":
                    stack.enter_context(hooked(module.register_forward_pre_hook(self._note_size, with_kwargs=True)))
            for index, adapter in enumerate(self.on):
                for path in adapter.layers:
                    if path.startswith("unet."):
                        hook = self._gating(index, path)
                        stack.enter_context(hooked(adapter.up(path).register_forward_hook(hook)))
            forward, own = self.unet.forward, "forward" in self.unet.__dict__

            def directed(*args: Any, **kwargs: Any) -> Any:
                self._begin(*args, **kwargs)
                return call(self, forward, args, kwargs)

            self.unet.forward = directed
            try:
                yield
            finally:
                if own:
                    self.unet.forward = forward
                else:
                    del self.unet.forward

    def _begin(self, sample: Tensor, timestep: Any, *_: Any, **kwargs: Any) -> None:
        time = float(timestep.flatten()[0]) if isinstance(timestep, Tensor) else float(timestep)
        if not self._seen or time > self._seen[-1]:  # a new picture begins; image-to-image begins in mid-schedule
            self._seen = []
            every = [float(t) for t in self.pipeline.scheduler.timesteps.tolist()]
            self._ahead = max(1, len([t for t in dict.fromkeys(every) if t <= time]))
        if not self._seen or self._seen[-1] != time:  # some schedulers call twice at one timestep
            self._seen.append(time)
        step = len(self._seen) - 1
        guided = bool(getattr(self.pipeline, "do_classifier_free_guidance", False)) and len(sample) % 2 == 0
        height, width = sample.shape[-2:]
        self.moment = Moment(step, min(1.0, step / self._ahead), len(sample), guided, (height, width))
        progress = self.moment.progress
        for index, weight in enumerate(self.weights):
            if weight.timed:
                self.hear(index, float(weight.heard(progress)))

    def hear(self, index: int, loudness: float) -> None:
        """Multiply one adapter's weight in the U-Net by `loudness`."""
        if self._heard[index] == loudness:
            return
        self._heard[index] = loudness
        adapter, weight = self.on[index], self.weights[index]
        for path in adapter.layers:
            if path.startswith("unet."):
                adapter.scale(path, weight.of(path) * loudness)

    # --- gates

    def _note_size(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        states = args[0] if args else kwargs["hidden_states"]
        self.size = (states.shape[-2], states.shape[-1])

    def _gating(self, index: int, path: str) -> Callable[[nn.Module, Any, Tensor], Tensor | None]:
        words = path.endswith(TEXT_SIDE)

        def gate(module: nn.Module, args: Any, output: Tensor) -> Tensor | None:
            chosen = self.gates[index]
            if chosen is None:
                return None
            shape = [len(output)] + [1] * (output.ndim - 1)
            if chosen.rows is not None:
                output = output * chosen.rows.to(output.dtype).reshape(shape)
            if words and chosen.words is not None:
                output = output * chosen.words.to(output.dtype)[..., None]
            elif not words and chosen.masks is not None:
                output = output * self._pixels(chosen, output)
            return output

        return gate

    def _pixels(self, gate: Gate, output: Tensor) -> Tensor:
        """The gate in the shape of a layer's output: (rows, H, W) -> (rows, 1, H, W), (rows, H * W, 1) or (rows, 1)."""
        assert gate.masks is not None
        if output.ndim == 4:
            mask = gate.masks.at(*output.shape[-2:])[gate.subject][:, None]
        elif output.ndim == 3:
            mask = gate.masks.at(*self.size)[gate.subject].flatten(1)[:, :, None]
        else:  # a resnet's time embedding has no pixels: the subject's share of the picture
            mask = gate.masks.full[gate.subject].mean((1, 2))[:, None]
        repeats = len(output) // len(mask) if len(mask) > 1 else 1
        return mask.repeat(repeats, *[1] * (mask.ndim - 1)).to(output.dtype)


@contextmanager
def hooked(handle: Any) -> Iterator[None]:
    try:
        yield
    finally:
        handle.remove()


# --- ways of calling the U-Net -------------------------------------------------------------------------------------


def plainly(conductor: Conductor, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    return forward(*args, **kwargs)


@dataclass
class Voice:
    """One of several answers that are mixed into one: its adapters, its prompt."""

    adapters: frozenset[int]  # which of the attached adapters are heard
    text: TextConditions | None = None  # (1, tokens, d); None: the pipeline's own


def in_voices(
    conductor: Conductor,
    forward: Forward,
    args: tuple[Any, ...],
    kwargs: dict[str, Any],
    voices: Sequence[Voice],
    shares: Tensor,
    *,
    together: bool,
) -> Any:
    """The mean of the U-Net's answers in several voices, weighted by `shares` (V, P or 1, H or 1, W or 1).

    together  all voices in one call of V times the rows; else one call after the other, in less memory
    """
    rows = conductor.moment.rows if conductor.moment else 0
    if together:
        gates = []
        for index in range(len(conductor.on)):
            heard = torch.tensor([float(index in voice.adapters) for voice in voices]).repeat_interleave(rows)
            gates.append(Gate(rows=heard.to(conductor.unet.device)) if not heard.all() else None)
        conductor.gates = gates
        spoken = [worded(conductor, args, kwargs, voice) for voice in voices]
        joined_args, joined_kwargs = joined(spoken, rows)
        answer = forward(*joined_args, **joined_kwargs)
        predictions = list(torch.split(prediction_of(answer), rows))
    else:
        predictions = []
        for voice in voices:
            quiet = torch.zeros(rows, device=conductor.unet.device)
            conductor.gates = [None if i in voice.adapters else Gate(rows=quiet) for i in range(len(conductor.on))]
            own_args, own_kwargs = worded(conductor, args, kwargs, voice)
            answer = forward(*own_args, **own_kwargs)
            predictions.append(prediction_of(answer))
    conductor.gates = [None] * len(conductor.on)
    mixed = torch.zeros_like(predictions[0])
    for share, prediction in zip(shares.to(mixed), predictions, strict=True):
        part = share[:, None] if len(share) == 1 else share.repeat(rows // len(share), 1, 1)[:, None]
        mixed += part * prediction
    return with_prediction(answer, mixed)


def prediction_of(answer: Any) -> Tensor:
    return answer[0] if isinstance(answer, tuple) else answer.sample


def with_prediction(answer: Any, prediction: Tensor) -> Any:
    return (prediction, *answer[1:]) if isinstance(answer, tuple) else type(answer)(sample=prediction)


def worded(
    conductor: Conductor, args: tuple[Any, ...], kwargs: dict[str, Any], voice: Voice
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """The call with the voice's own prompt in the rows that are not the negative prompt's."""
    if voice.text is None:
        return args, kwargs
    assert conductor.moment is not None
    first = conductor.moment.pictures if conductor.moment.guided else 0
    positional = len(args) > 2
    states = args[2] if positional else kwargs["encoder_hidden_states"]
    if voice.text.states.shape[1:] != states.shape[1:]:
        raise SettingsError(
            f"a region's prompt has {voice.text.states.shape[1]} tokens and the picture's {states.shape[1]}; "
            "shorten the longer prompt"
        )
    states = states.clone()
    states[first:] = voice.text.states.to(states)
    args = (*args[:2], states, *args[3:]) if positional else args
    kwargs = kwargs if positional else kwargs | {"encoder_hidden_states": states}
    added = kwargs.get("added_cond_kwargs")
    if voice.text.pooled is not None and added:
        pooled = added["text_embeds"].clone()
        pooled[first:] = voice.text.pooled.to(pooled)
        kwargs = kwargs | {"added_cond_kwargs": added | {"text_embeds": pooled}}
    return args, kwargs


def joined(calls: Sequence[tuple[tuple[Any, ...], dict[str, Any]]], rows: int) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """Several calls as one: every tensor with `rows` rows end to end, everything else as in the first."""

    def join(values: list[Any]) -> Any:
        first = values[0]
        if isinstance(first, Tensor):
            return torch.cat(values) if first.ndim and len(first) == rows else first
        if isinstance(first, dict):
            return {key: join([value[key] for value in values]) for key in first}
        if isinstance(first, (list, tuple)):  # the residuals of a ControlNet
            return type(first)(join(list(parts)) for parts in zip(*values, strict=True))
        return first

    arguments = tuple(join([args[i] for args, _ in calls]) for i in range(len(calls[0][0])))
    return arguments, {key: join([kwargs[key] for _, kwargs in calls]) for key in calls[0][1]}
