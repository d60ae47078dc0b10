"""Composition: a base, weighted adapters, and the pictures that they make together."""

from __future__ import annotations

import math
import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import torch
from PIL import Image

from ..adapters.adapter import Adapter
from ..adapters.tools.spectrum import Truncations
from ..base.base_model import BaseModel, TextConditions
from ..base.generation import generate_images, quiet
from ..config import check
from ..errors import AdapterBaseMismatch, CompositionWarning, SettingsError
from ..injection import AttachedAdapter, attached_layers
from .attention_maps import AttentionMaps
from .calibration import Progress, Seen
from .making import making_of
from .one_adapter import joined, observed, refuse_parts
from .picture import Picture
from .preflight import Preflight, clashes, misfits, overlaps_of, recommendation, subjects_of, unnamed
from .regional import EMPTY, Isolation, Regional
from .regions import Region, masks_of
from .subjects import find_phrase, token_positions, without
from .unet_hook import Conductor, Forward, Voice, in_voices, plainly
from .weights import Weight

Method = Literal["sum", "svd", "ssr", "switch", "composite", "regions"]
METHODS: tuple[Method, ...] = ("sum", "svd", "ssr", "switch", "composite", "regions")
SWITCH_STEPS = 5  # LoRA Switch's tau (arXiv 2402.16843)
AUTO_START = 0.3  # share of the steps whose attention is read before automatic regions begin

Weighted = Adapter | tuple[Adapter, float | Weight]


class Composition:
    """A base (or any SD 1.x / 2.x / SDXL pipeline) with weighted adapters.

    adapters    each an Adapter, (Adapter, weight) or (Adapter, Weight(...))
    method      "sum"        every layer gets the exact weighted sum of the changes: one subject, and styles
                "svd"        the sum as one adapter of the highest rank among them, with an error
                "ssr"        one adapter that comes nearest to each alone on what each sees while drawing its subject;
                             draws a few latents for it at the first call
                "switch"     one adapter at a time, in turn every 5 denoising steps
                "composite"  the mean of what the U-Net predicts with each adapter alone
                "regions"    each adapter in its own part of the picture: two subjects that stay themselves
                None: "regions" when there are any, or several subjects (adapters with a token); else "sum"
    regions     adapters with their places, or "auto": each of `adapters` that the prompt names, where the U-Net looks
                for its words. None: "auto" for several subjects when no method is given
    isolate     of regions: "noise" keeps subjects apart, at the cost of a pass for each; "delta" takes about one pass
    start       share of the denoising steps before which all adapters are heard everywhere
    background  prompt of what no region covers; None: the picture's prompt without its subjects
    together    several passes as one batch; False takes less memory
    The pipeline is as it was after every call.
    """

    def __init__(
        self,
        base: BaseModel | Any,
        adapters: Iterable[Weighted] = (),
        *,
        method: Method | None = None,
        regions: Sequence[Region] | Literal["auto"] | None = None,
        isolate: Isolation = "noise",
        start: float | None = None,
        background: str | None = None,
        together: bool = True,
    ) -> None:
        self.base = BaseModel.of(base)
        self.adapters = tuple(weighted(item) for item in adapters)
        self.by_default = method is None and regions is None and len(subjects_of(self.adapters)) > 1
        regions = "auto" if self.by_default else regions or ()
        self.method: Method = method or ("regions" if regions else "sum")
        if self.method not in METHODS:
            raise SettingsError(f"method {method!r} is unknown; allowed: {', '.join(METHODS)}")
        if bool(regions) != (self.method == "regions"):
            raise SettingsError('method "regions" and regions=[Region(...)] or regions="auto" belong together')
        if isolate not in ("delta", "noise"):
            raise SettingsError(f"isolate {isolate!r} is unknown; allowed: delta, noise")
        self.regions, self.isolate, self.background, self.together = regions, isolate, background, together
        self.start = start if start is not None else AUTO_START if regions == "auto" else 0.0
        check(0 <= self.start < 1, f"start {self.start:g}", "0 to 1, a share of the denoising steps")
        if self.method != "regions" and (start or background is not None):
            raise SettingsError("start and background are of regions; give regions, or leave them out")
        if regions == "auto":
            check(self.start > 0, "start 0", "more than 0 with automatic regions, whose attention is read before it")
            if not self.adapters:
                raise SettingsError('regions="auto" without adapters; give one for each subject')
        self._seen: dict[str, Seen] | None = None  # the calibration of "ssr"
        self._one: Adapter | None = None  # what "svd" and "ssr" attach

    def __repr__(self) -> str:
        names = ", ".join(f"{adapter.name} {weight}" for adapter, weight in self.everyone()) or "no adapter"
        return f"Composition({self.base.name}, {self.method}: {names})"

    # --- pictures

    def generate(
        self,
        prompt: str,
        *,
        seeds: Sequence[int] = (0,),
        negative_prompt: str | None = None,
        steps: int = 25,
        guidance: float = 5.0,
        size: int | None = None,
        batch_size: int = 1,
        on_image: Callable[[int], None] | None = None,
    ) -> list[Picture]:
        """One picture for each seed; a seed gives the same picture whichever others are asked for with it.

        steps       denoising steps
        guidance    classifier-free guidance scale
        size        side in pixels; None: what the base was made for
        batch_size  pictures at a time; more than one is faster and may differ by rounding
        """
        if not len(seeds):
            raise SettingsError("no seeds; give one for each picture, as seeds=range(4)")
        for seed in seeds:
            check(0 <= seed < 2**63, f"seed {seed}", "0 to 2**63 - 1")
        check(steps >= 1, f"steps {steps}", "at least 1; 20 to 50 is usual")
        check(batch_size >= 1, f"batch_size {batch_size}", "at least 1")
        check(math.isfinite(guidance) and guidance >= 0, f"guidance {guidance}", "at least 0; 4 to 8 is usual")
        check(size is None or (size >= 8 and size % 8 == 0), f"size {size}", "multiples of 8 pixels")
        for text in clashes(self.everyone(prompt), self.method, self.isolate):
            warnings.warn(text, CompositionWarning, stacklevel=2)
        with self.attached(prompt) as pipeline:
            images = generate_images(
                pipeline,
                prompt,
                list(seeds),
                negative_prompt=negative_prompt,
                steps=steps,
                guidance=guidance,
                size=size,
                batch_size=batch_size,
                on_image=on_image,
            )
        used = tuple((adapter.name, weight.value) for adapter, weight in self.everyone(prompt))
        making = making_of(self, prompt)
        return [
            Picture(image, prompt, seed, used, self.base.name, negative_prompt, steps, guidance, making)
            for image, seed in zip(images, seeds, strict=True)
        ]

    @contextmanager
    def attached(self, prompt: str = "", pipeline: Any = None) -> Iterator[Any]:
        """The adapters on the pipeline, for calls of your own: image-to-image, inpainting, ControlNet.

        prompt    the prompt of those calls, which regions read
        pipeline  another pipeline around the same models; None: the base's own
        """
        with self._conducted(prompt, pipeline) as (active, _):
            yield active

    @contextmanager
    def _conducted(self, prompt: str, pipeline: Any = None) -> Iterator[tuple[Any, Any]]:
        """The pipeline with the adapters on, and how its U-Net is called."""
        pipeline = pipeline or self.base.pipeline
        everyone = self.everyone(prompt)
        if self.method in ("svd", "ssr") and any(weight.value for _, weight in everyone):
            with attached_layers(pipeline, [(self._as_one(), 1.0)]):
                yield pipeline, plainly
            return
        if self.method in ("composite", "regions"):
            refuse_hidden_adapters(self.base)
        with ExitStack() as stack:
            on = stack.enter_context(attached_layers(pipeline, [(a, w.value) for a, w in everyone]))
            weights = [weight for _, weight in everyone]
            for adapter, weight in zip(on, weights, strict=True):
                for path in adapter.layers:
                    text = not path.startswith("unet.")
                    adapter.scale(path, 0.0 if text and weight.start > 0 else weight.of(path))
            call = self._calling(prompt, on, weights, pipeline)
            if call is not plainly or any(weight.timed for weight in weights):
                conductor = Conductor(pipeline, on, weights)
                stack.enter_context(conductor.conducting(call))
            yield pipeline, call

    def find_regions(
        self,
        prompt: str,
        *,
        seed: int = 0,
        negative_prompt: str | None = None,
        steps: int = 25,
        guidance: float = 5.0,
        size: int | None = None,
    ) -> list[Region]:
        """Where `regions="auto"` puts each subject in the picture that `generate` would draw, to look at and to change.

        Show them with `preview(regions)`; give them, changed or not, as `regions=`. Draws the first steps only.
        """
        if self.regions != "auto":
            raise SettingsError('find_regions is for regions="auto"; these regions are given')
        found: list[Region] = []

        def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            pipeline._interrupt = step + 1 >= self.start * steps
            return tensors

        with self._conducted(prompt) as (pipeline, call), quiet(pipeline):
            generator = torch.Generator().manual_seed(seed)
            options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
            options |= {"negative_prompt": negative_prompt, "height": size, "width": size}
            pipeline(prompt, **options, output_type="latent", callback_on_step_end=stop)
            assert isinstance(call, Regional) and call.maps is not None
            masks = call.maps.masks().full[:, 0]
        named = [item for item in self.everyone(prompt) if find_phrase(prompt, item[0]) is not None]
        for (adapter, weight), mask in zip(named, masks, strict=True):
            drawn = Image.fromarray((mask * 255).round().byte().cpu().numpy())
            found.append(Region(adapter, mask=drawn, weight=weight, feather=0))
        return found

    def everyone(self, prompt: str = "") -> list[tuple[Adapter, Weight]]:
        """Adapters that are heard everywhere, then those of the regions."""
        if self.regions == "auto":
            named = [find_phrase(prompt, adapter) is not None for adapter, _ in self.adapters]
            rest = [item for item, is_named in zip(self.adapters, named, strict=True) if not is_named]
            return rest + [item for item, is_named in zip(self.adapters, named, strict=True) if is_named]
        return [*self.adapters, *(weighted(r.adapter if r.weight is None else (r.adapter, r.weight)) for r in self.regions)]

    def as_adapter(self, *, rank: int | None = None, on_progress: Progress | None = None) -> tuple[Adapter, Truncations]:
        """This composition as one adapter, whose card says what it is made of, and what was lost.

        rank         at most this in every module: of "svd" (None: the largest of the adapters) and "ssr" (None: all)
        on_progress  of the draws that "ssr" makes, once: how many are done, and how many there are
        The loss is relative: of the change's Frobenius norm; for "ssr" of what each adapter alone adds to its modules'
        outputs, over the draws. Raises SettingsError for what one adapter cannot be: places, turns, weights by step.
        """
        refuse_parts(self.method, self.adapters)
        if self._seen is None:
            self._seen = observed(self.base, self.adapters, on_progress) if self.method == "ssr" else {}
        return joined(self.method, self.adapters, self._seen, rank)

    def _as_one(self) -> Adapter:
        if self._one is None:
            self._one = self.as_adapter()[0]
        return self._one

    # --- before the first step

    def preflight(self, prompt: str = "", *, steps: int = 25, size: int | None = None, trial: bool = False) -> Preflight:
        """What this composition will cost and what speaks against it. trial: draw a few steps to measure time and memory."""
        everyone = self.everyone(prompt)
        refused, other_base = misfits(self.base, everyone)
        seconds, peak = self._trial(prompt, steps, size) if trial and not refused else (None, None)
        lossy = self.method == "svd" or self._one is not None  # "ssr" after its draws, for a trial or a picture
        return Preflight(
            method=self.method if self.method != "regions" else f"regions, isolate {self.isolate}",
            passes=self._passes(prompt),
            adapter_bytes=sum(adapter.nbytes for adapter, _ in everyone),
            overlaps=overlaps_of(everyone),
            warnings=(
                *(*refused, *other_base),
                *clashes(everyone, self.method, self.isolate),
                *self._unnamed(everyone, prompt),
            ),
            recommended=recommendation(everyone),
            seconds=seconds,
            peak_bytes=peak,
            loss=self._as_one().card.description if lossy and not refused and any(w.value for _, w in everyone) else None,
        )

    def _unnamed(self, everyone: Sequence[tuple[Adapter, Weight]], prompt: str) -> list[str]:
        return unnamed(everyone, prompt) if self.method != "regions" else []  # whose regions may have prompts of their own

    def _passes(self, prompt: str) -> int:
        if self.method == "composite":
            return max(1, len(self.adapters))
        if self.method != "regions" or self.isolate == "delta":
            return 1
        if self.regions == "auto":  # whose masks leave no background
            return max(1, sum(find_phrase(prompt, adapter) is not None for adapter, _ in self.adapters))
        return len(self.regions) + bool(masks_of(self.regions).background.max() > EMPTY)

    def _trial(self, prompt: str, steps: int, size: int | None) -> tuple[float, int | None]:
        """Seconds for a picture and peak bytes on the GPU, from four steps."""
        cuda = self.base.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        tried = 4
        with self.attached(prompt) as pipeline, quiet(pipeline):
            options = {"num_inference_steps": tried, "height": size, "width": size, "output_type": "latent"}
            pipeline(prompt, **options | {"num_inference_steps": 1})  # what is done once only
            started = time.perf_counter()
            pipeline(prompt, **options)
            if cuda:
                torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / tried * steps
        return seconds, torch.cuda.max_memory_allocated() if cuda else None

    # --- how the U-Net is called

    def _calling(self, prompt: str, on: Sequence[AttachedAdapter], weights: Sequence[Weight], pipeline: Any) -> Any:
        if self.method == "switch" and len(on) > 1:
            return partial(in_turn, every=SWITCH_STEPS)
        if self.method == "composite" and len(on) > 1:
            voices = [Voice(frozenset({i})) for i in range(len(on))]
            shares = torch.full((len(on), 1, 1, 1), 1 / len(on))
            return partial(in_voices, voices=voices, shares=shares, together=self.together)
        if self.method == "regions" and not (self.by_default and self._unasked(prompt)):
            return self._regional(prompt, on, weights, pipeline)
        return plainly

    def _unasked(self, prompt: str) -> bool:
        """The prompt names no subject, so there is none to keep apart."""
        return all(find_phrase(prompt, adapter) is None for adapter, _ in self.adapters)

    def _regional(self, prompt: str, on: Sequence[AttachedAdapter], weights: Sequence[Weight], pipeline: Any) -> Regional:
        regions = None if self.regions == "auto" else list(self.regions)
        if regions is None:
            members = [i for i, adapter in enumerate(on) if find_phrase(prompt, adapter.adapter) is not None]
            if not members:
                names = ", ".join(repr(a.card.token or a.name) for a, _ in self.adapters)
                raise SettingsError(f"the prompt {prompt!r} names none of {names}; name every subject in it")
            prompts: list[str | None] = [None] * len(members)
        else:
            members = list(range(len(self.adapters), len(on)))
            prompts = [region.prompt for region in regions]
        subjects = [on[i].adapter for i in members]
        for i in members:  # a text encoder has no pixels: its part is heard in the region's own prompt only
            hush_text(on[i])
        own: list[str | None] = []
        for subject, given in zip(subjects, prompts, strict=True):
            others = [s for s in subjects if s is not subject]
            own.append(given if given is not None or self.isolate == "delta" else without(prompt, others))
        texts = [self._text(p, on[i], weights[i]) for p, i in zip(own, members, strict=True)]
        ground = None
        if self.isolate == "noise":
            ground = self._text(without(prompt, subjects) if self.background is None else self.background, None, None)
        words = [self._words(prompt, s, needed=regions is None) for s in subjects]
        maps = AttentionMaps(words) if regions is None else None
        masks = None if regions is None else masks_of(regions).to(self.base.device)
        return Regional(self.isolate, members, masks, words, texts, ground, self.start, self.together, maps)

    def _words(self, prompt: str, subject: Adapter, *, needed: bool) -> Sequence[int]:
        if find_phrase(prompt, subject) is None and not needed:
            return ()
        return token_positions(prompt, subject, self.base.tokenizer)

    @torch.no_grad()
    def _text(self, prompt: str | None, adapter: AttachedAdapter | None, weight: Weight | None) -> TextConditions | None:
        """The prompt as the text encoders read it with one adapter alone."""
        if prompt is None:
            return None
        if adapter is None or weight is None:
            return self.base.encode_text([prompt])
        texts = [path for path in adapter.layers if not path.startswith("unet.")]
        for path in texts:
            adapter.scale(path, weight.of(path))
        try:
            return self.base.encode_text([prompt])
        finally:
            hush_text(adapter)


def weighted(item: Weighted) -> tuple[Adapter, Weight]:
    adapter, weight = (item, item.card.weight) if isinstance(item, Adapter) else item
    if isinstance(weight, Weight):
        return adapter, weight
    check(math.isfinite(weight), f"weight {weight} of {adapter.name}", "any finite number; 0 to 1 is usual")
    return adapter, Weight(float(weight))


def hush_text(adapter: AttachedAdapter) -> None:
    for path in adapter.layers:
        if not path.startswith("unet."):
            adapter.scale(path, 0.0)


def in_turn(conductor: Conductor, forward: Forward, args: tuple[Any, ...], kwargs: dict[str, Any], *, every: int) -> Any:
    """One adapter at a time, the next after `every` denoising steps."""
    assert conductor.moment is not None
    turn = conductor.moment.step // every % len(conductor.on)
    for index, weight in enumerate(conductor.weights):
        conductor.hear(index, float(index == turn and weight.heard(conductor.moment.progress)))
    return forward(*args, **kwargs)


def refuse_hidden_adapters(base: BaseModel) -> None:
    """An adapter that is fused into the weights, or that rescales them (DoRA), cannot be kept to a region."""
    for component, model in base.components.items():
        for name, module in model.named_modules():
            where = f"{component}.{name} of {base.name}"
            if getattr(module, "merged_adapters", None):
                raise AdapterBaseMismatch(
                    f"an adapter is fused into {where}, so it cannot be kept apart; call unfuse_lora() first"
                )
            if any(dict(getattr(module, "use_dora", None) or {}).values()):
                raise AdapterBaseMismatch(
                    f"a DoRA adapter is on {where}, which rescales what other adapters change; call unload_lora_weights() first"
                )
