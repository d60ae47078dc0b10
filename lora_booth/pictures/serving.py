"""Serving: many adapters on one live pipeline, switched without reloading, and mixed in one batch."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

from ..adapters.adapter import Adapter, weighted
from ..base.base_model import BaseModel
from ..base.changes import claimed, undone
from ..base.generation import quiet
from ..base.samplers import sampling
from ..base.sizes import as_arguments, drawable, size_note
from ..config import GUIDANCE, STEPS, Size, check, check_types, typed
from ..errors import CompositionWarning, SettingsError
from ..injection.attached import AttachedAdapter, attachable
from .composition import checked
from .picture import Picture
from .subjects import other_syntax, unread
from .unet_hook import Gate, UNetCall, UNetHook

# what `encode_prompt` returns; the last two of SDXL alone
EMBEDS = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")


@dataclass(frozen=True)
class Request:
    """One picture: prompt, seed, and the loaded adapters to draw it with, by name."""

    prompt: str
    adapters: Mapping[str, float] = field(default_factory=dict)
    seed: int = 0
    negative_prompt: str | None = None

    def __post_init__(self) -> None:
        check_types(self)
        checked(seeds=self.seed)


class Serving:
    """A base whose adapters you load and switch at run time: `with lb.Serving(base) as live:`. Leaving restores the base.

    live.load("rex", adapter)
    live.use({"rex": 0.8})          # for calls of your own of `live.pipeline`
    live.generate([Request("a photo of ohwx dog", {"rex": 1.0}), Request("a mug", seed=1)])
    live.unload("rex")

    Threads may share it: each call waits for its turn. Calls of your own of `live.pipeline` belong to one thread.
    """

    def __init__(self, base: BaseModel | Any) -> None:
        self.base = BaseModel.of(base)
        self.loaded: dict[str, AttachedAdapter] = {}
        self._left = False

    @property
    def pipeline(self) -> Any:
        return self.base.pipeline

    def __enter__(self) -> Serving:
        self._left = False
        return self

    def __exit__(self, *_: object) -> None:
        with claimed(self.base.shell.unet):
            with undone(*(on.detach for on in self.loaded.values())):
                self._left = True
            self.loaded.clear()

    def load(self, name: str, adapter: Adapter) -> None:
        """Attach an adapter to the base, with weight 0 until you use it. Raises AdapterBaseMismatch."""
        typed("name", name, str)
        with claimed(self.base.shell.unet):
            if self._left:
                raise SettingsError("this Serving was left, and its base restored; load within its `with` block")
            if name in self.loaded:
                raise SettingsError(f"{name!r} is already loaded; unload it first, or choose another name")
            [on] = attachable(self.base, weighted([(adapter, 1.0)]))
            on.use(0.0)
            self.loaded[name] = on
            on.attach()

    def unload(self, name: str) -> None:
        with claimed(self.base.shell.unet):
            self._known(name)
            self.loaded[name].detach()
            del self.loaded[name]

    def use(self, weights: Mapping[str, float]) -> None:
        """Activate exactly these adapters, with these weights."""
        weights = typed("weights", weights, Mapping[str, float])
        with claimed(self.base.shell.unet):
            for name, weight in weights.items():
                self._known(name)
                check(math.isfinite(weight), f"weight {weight} of {name!r}", "any finite number; 0 to 1 is usual")
            for name, on in self.loaded.items():
                on.use(weights.get(name, 0.0))

    def _weights(self) -> dict[str, float]:
        return {name: on.weight for name, on in self.loaded.items()}

    def _known(self, name: str) -> None:
        if name not in self.loaded:
            raise SettingsError(f"{name!r} is not loaded; load it first (loaded: {', '.join(self.loaded) or 'none'})")

    @torch.no_grad()
    def generate(
        self,
        requests: Sequence[Request],
        *,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        size: Size | None = None,
        sampler: str | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Picture]:
        """Draw all requests in one batch, each with its adapters: the same pictures as one by one.

        size              in pixels: 768, (width, height) or "832x1216"; None: the resolution that the base was trained for
        sampler, on_step  as for `Composition.generate`
        """
        requests = typed("requests", requests, tuple[Request, ...])
        steps, guidance, sampler = checked(steps=steps, guidance=guidance, sampler=sampler).values()
        pair = drawable(self.base, size)
        if not requests:
            raise SettingsError("no requests; pass one for each picture")
        for text in size_note(self.base, pair):
            warnings.warn(text, CompositionWarning, stacklevel=2)

        def step_done(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(len(requests))
            return tensors

        with claimed(self.base.shell.unet), undone(partial(self.use, self._weights())), quiet(self.pipeline):
            names = [n for n in self.loaded if any(request.adapters.get(n) for request in requests)]
            texts = [self._encoded(request) for request in requests]
            self.use(dict.fromkeys(names, 1.0))
            rows = {n: torch.tensor([float(r.adapters.get(n, 0.0)) for r in requests]) for n in names}

            def answer(hook: UNetHook, call: UNetCall) -> Any:
                hook.gates = [Gate(rows=rows[n].repeat(2 if call.guided else 1).to(self.base.device)) for n in names]
                return call.run()

            hook = UNetHook(self.pipeline, [self.loaded[n] for n in names])
            with sampling(self.pipeline, sampler, steps), hook.hooked(answer):
                images = self.pipeline(
                    **{name: torch.cat([text[name] for text in texts]) for name in texts[0]},
                    num_inference_steps=steps,
                    guidance_scale=guidance,
                    **as_arguments(pair),
                    generator=[torch.Generator().manual_seed(request.seed) for request in requests],
                    callback_on_step_end=step_done,
                ).images
        how: dict[str, Any] = {"base": self.base.name, "steps": steps, "guidance": guidance, "sampler": sampler}
        return [
            Picture(image, r.prompt, r.seed, tuple(r.adapters.items()), negative_prompt=r.negative_prompt, **how)
            for image, r in zip(images, requests, strict=True)
        ]

    def _encoded(self, request: Request) -> dict[str, Tensor]:
        """The pipeline's arguments in place of the request's prompts."""
        prompts = request.prompt, request.negative_prompt
        for warning in [*(text for one in prompts for text in other_syntax(one or "")), *unread(self.base, [], *prompts)]:
            warnings.warn(warning, CompositionWarning, stacklevel=3)
        self.use(request.adapters)  # a text encoder may have an adapter too
        encoded = self.pipeline.encode_prompt(
            prompt=request.prompt,
            negative_prompt=request.negative_prompt,
            device=self.base.device,
            num_images_per_prompt=1,
            do_classifier_free_guidance=True,
        )
        return dict(zip(EMBEDS, encoded, strict=False))
