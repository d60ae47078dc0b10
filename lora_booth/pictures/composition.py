"""Composition: draw pictures with a base and weighted adapters."""

from __future__ import annotations

import time
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
from PIL import Image

from ..adapters.adapter import Adapter, weighted
from ..adapters.contents import file_stem
from ..base.base_model import BaseModel
from ..base.families import TIMESTEPS, check_drawable
from ..base.generation import generate_images, quiet, texts_of
from ..base.prompt_weights import compel_version, is_weighted
from ..base.samplers import sampler_name, sampling
from ..base.sizes import as_arguments, drawable, size_note
from ..config import GUIDANCE, STEPS, Size, check, sides, typed
from ..errors import CompositionWarning, SettingsError, setting
from ..injection.attached import AttachedAdapter, attached_layers
from ..kernels.attention_maps import AttentionMaps
from ..photos.masks import check_shape
from ..photos.opening import read_picture
from .inpainting import draw_into, drawn_size, inpaints, part_around, pasted
from .picture import AUTO_START, Making, Picture
from .preflight import Preflight, misfits, overlaps_of, ways_to_place
from .regional import Regional, masks_by_attention, refuse_hidden_adapters
from .regions import Masks, Region, masks_of
from .subjects import clashes, find_phrase, other_syntax, subjects_of, token_positions, unnamed, unread, without
from .unet_hook import UNetHook
from .weights import Weight

Method = Literal["sum", "regions"]

Weighted = Adapter | str | Path | tuple[Adapter | str | Path, float | Weight | None]

# argument of `generate` -> its type, and which values are allowed; limits: chosen, far above what gives a picture
PICTURES: dict[str, tuple[Any, Callable[[Any], bool], str]] = {
    "prompt": (str, lambda _: True, ""),
    "seeds": (tuple[int, ...], lambda _: True, ""),
    "negative_prompt": (str | None, lambda _: True, ""),
    "steps": (int, lambda steps: 1 <= steps < TIMESTEPS, f"1 to {TIMESTEPS - 1}; 20 to 50 is usual"),
    "guidance": (float, lambda scale: 0 <= scale <= 1000, "0 to 1000; 4 to 8 is usual"),
    "sampler": (str | None, lambda _: True, ""),
    "size": (tuple[int, ...] | None, lambda _: True, ""),
    "batch_size": (int, lambda count: count >= 1, "at least 1"),
}


class Composition:
    """A base (or any SD 1.x / 2.x / SDXL pipeline) with weighted adapters.

    adapters    one or several, each an Adapter, its file, (Adapter, weight) or (Adapter, Weight(...))
    method      "sum"      every layer gets the exact weighted sum of the changes: one subject, and styles
                "regions"  each adapter in its part of the picture: two subjects that stay distinct
                None: "regions" if you pass any, or for several subjects (adapters with a token); else "sum"
    regions     adapters with their places, or "auto": each of `adapters` that the prompt names, where the U-Net attends
                to its words. None: "auto" for several subjects without a method
    start       share of the denoising steps before which all adapters are active everywhere. With automatic regions:
                whose attention is read, after which `generate` begins anew; pipelines that you call yourself go on
    background  prompt of what no region covers; None: the picture's prompt without its subjects
    Every call restores the pipeline; threads that share a base take turns. Raises SettingsError for settings that contradict
    each other.
    """

    def __init__(
        self,
        base: BaseModel | Any,
        adapters: Weighted | Iterable[Weighted] = (),
        *,
        method: Method | None = None,
        regions: Sequence[Region] | Literal["auto"] | None = None,
        start: float | None = None,
        background: str | None = None,
    ) -> None:
        self.base = BaseModel.of(base)
        self.adapters = everyone_of(adapters)
        self.by_default = method is None and regions is None and len(subjects_of(self.adapters)) > 1
        regions = "auto" if self.by_default else typed("regions", regions, Literal["auto"] | tuple[Region, ...] | None) or ()
        self.method: Method = ("regions" if regions else "sum") if method is None else method
        typed("method", self.method, Method)
        if regions and self.method != "regions":
            raise SettingsError(f"method {method!r} has no regions; leave out the method or the regions")
        if not regions and self.method == "regions":
            raise SettingsError(f'method "regions" needs places; pass {ways_to_place()}')
        self.regions = regions
        self.places: Sequence[Region] = [] if isinstance(regions, str) else regions
        self.placed = everyone_of([(place.adapter, place.weight) for place in self.places])
        self.background = typed("background", background, str | None)
        default = AUTO_START if regions == "auto" else 0.0
        self.start = default if start is None else typed("start", start, float)
        check(0 <= self.start < 1, f"start {self.start:g}", "0 to 1, a share of the denoising steps")
        if self.method != "regions" and (start or background is not None):
            raise SettingsError("start and background are settings of regions; pass regions, or leave them out")
        if regions == "auto":
            check(self.start > 0, "start 0", "more than 0 with automatic regions, which read attention until then")
            if not self.adapters:
                raise SettingsError("automatic regions without adapters; pass one for each subject")

    def __repr__(self) -> str:
        names = ", ".join(f"{adapter.name} {weight}" for adapter, weight in self.everyone()) or "no adapter"
        return f"Composition({self.base.name}, {self.method}: {names})"

    def settings(self, prompt: str) -> dict[str, Any]:
        """Keyword arguments of a Composition that draws `prompt` alike, without the automatic choice of a method."""
        if self.method == "sum" or (self.by_default and not self._named(prompt)):  # no subjects to separate
            return {"method": "sum", "regions": (), "start": 0.0, "background": None}
        return {"method": "regions", "regions": self.regions, "start": self.start, "background": self.background}

    # --- pictures

    def generate(
        self,
        prompt: str,
        *,
        seeds: Sequence[int] = (0,),
        negative_prompt: str | None = None,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        size: Size | None = None,
        sampler: str | None = None,
        batch_size: int = 1,
        on_image: Callable[[int], None] | None = None,
        on_step: Callable[[int], None] | None = None,
    ) -> list[Picture]:
        """One picture for each seed; a seed gives the same picture whatever the other seeds are.

        steps       denoising steps
        guidance    classifier-free guidance scale
        size        in pixels: 768, (width, height) or "832x1216"; None: the resolution that the base was trained for
        sampler     e.g. "euler a", "dpm++ 2m karras", "lcm" (names in docs/pictures.md); None: the base's own
        batch_size  pictures at a time; more than one is faster and may differ by rounding
        on_image    called with the number of pictures drawn so far
        on_step     called after each denoising step with the number of pictures that it advanced: 0 while regions are found
        """
        how = {"steps": steps, "guidance": guidance, "size": size, "sampler": sampler, "batch_size": batch_size}
        asked = checked(prompt=prompt, seeds=seeds, negative_prompt=negative_prompt, **how)
        asked["size"] = drawable(self.base, size)
        for text in self.remarks(prompt, negative_prompt, size=asked["size"]):
            warnings.warn(text, CompositionWarning, stacklevel=2)
        with self._attached(prompt) as (pipeline, regional):
            find = None
            if regional is not None and regional.maps is not None:
                find = partial(self._find, pipeline, regional, on_step=on_step)
            weights = self.compel(prompt, negative_prompt) is not None
            images = generate_images(pipeline, **asked, weights=weights, before=find, on_image=on_image, on_step=on_step)
        refuse_black(images, self.base)
        return self._pictures(images, asked)

    def inpaint(
        self,
        photo: Path | str | Image.Image,
        mask: Path | str | Image.Image,
        prompt: str,
        *,
        seeds: Sequence[int] = (0,),
        negative_prompt: str | None = None,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        sampler: str | None = None,
    ) -> list[Picture]:
        """The photo with something new where the mask is white, for each seed; the rest of it stays as it is, bit for bit.

        photo, mask  files or PIL images of one shape; greys of the mask blend
        prompt       what the masked place shows, with its surroundings: "a photo of ohwx dog on a beach"
        The base sees the mask and half its size around it, at the size that it was trained for. It may be a text-to-image base
        or, for seams that match better, a diffusers inpainting pipeline (`Composition(pipeline, adapter)`). Boxes of regions
        are fractions of what it sees. Raises PhotoError, SettingsError, BaseModelError.
        """
        how = {"steps": steps, "guidance": guidance, "sampler": sampler}
        asked = checked(prompt=prompt, seeds=seeds, negative_prompt=negative_prompt, **how)
        if not inpaints(self.base.shell):
            check_drawable(self.base.shell, self.base.family)
        kinds: Any = Path | Image.Image
        around = read_picture(typed("photo", photo, kinds))
        greys = read_picture(typed("mask", mask, kinds), mode="L")
        check_shape(greys, "for the photo", *around.size, "the upright photo")
        greys = greys.resize(around.size, Image.Resampling.BILINEAR)
        part = part_around(greys)
        size = drawn_size(self.base, part)
        piece, anew = (image.crop(part).resize(size, Image.Resampling.LANCZOS) for image in (around, greys))
        for text in self.remarks(prompt, negative_prompt, size=size):
            warnings.warn(text, CompositionWarning, stacklevel=2)
        steps, guidance = asked["steps"], asked["guidance"]
        with self.attached(prompt) as pipeline, sampling(pipeline, asked["sampler"], steps), quiet(pipeline):
            weights = self.compel(prompt, negative_prompt) is not None
            options = texts_of(pipeline, prompt, negative_prompt, 1, weights=weights)
            options |= {"num_inference_steps": steps, "guidance_scale": guidance}
            images = [draw_into(self.base, pipeline, seed, piece=piece, mask=anew, **options) for seed in asked["seeds"]]
        refuse_black(images, self.base)
        return self._pictures([pasted(around, part, image, greys) for image in images], asked, photo=True)

    def _pictures(self, images: Sequence[Image.Image], asked: Mapping[str, Any], *, photo: bool = False) -> list[Picture]:
        """The pictures drawn as `asked`, with how they were made."""
        prompt, everyone = asked["prompt"], self.everyone(asked["prompt"])
        extras = ["a mask"] * any(place.box is None for place in self.places)
        extras += ["weights by block or step"] * any(weight.blocks or weight.timed for _, weight in everyone)
        files = tuple(adapter.stem or file_stem(adapter.name) for adapter, _ in everyone)
        compel = self.compel(prompt, asked["negative_prompt"])
        making = Making(files, recipe_only=" and ".join(extras) or None, photo=photo, compel=compel, **self.settings(prompt))
        used = tuple((adapter.name, weight.value) for adapter, weight in everyone)
        how = {name: asked[name] for name in ("negative_prompt", "steps", "guidance", "sampler")}
        return [
            Picture(image, prompt, seed, used, self.base.name, making=making, **how)
            for image, seed in zip(images, asked["seeds"], strict=True)
        ]

    @contextmanager
    def attached(self, prompt: str = "", pipeline: Any = None) -> Iterator[Any]:
        """Attach the adapters to the pipeline for calls of your own: image-to-image, inpainting, ControlNet.

        prompt    the prompt of those calls, for regions
        pipeline  another pipeline around the same models; None: the base's pipeline
        """
        with self._attached(prompt, pipeline) as (active, _):
            yield active

    @contextmanager
    def _attached(self, prompt: str, pipeline: Any = None) -> Iterator[tuple[Any, Regional | None]]:
        """The pipeline with the adapters attached, and what answers its U-Net's calls; None: the U-Net itself."""
        everyone = self.everyone(typed("prompt", prompt, str))
        weights = [weight for _, weight in everyone]
        if self.method == "regions":
            refuse_hidden_adapters(self.base)
        with attached_layers(pipeline or self.base, [(adapter, weight.value) for adapter, weight in everyone]) as on:
            for adapter, weight in zip(on, weights, strict=True):
                for path in adapter.layers:
                    late_text = weight.start > 0 and not path.startswith("unet.")
                    adapter.scale(path, 0.0 if late_text else weight.of(path))
            by_region = self.settings(prompt)["method"] == "regions"
            regional = self._regional(prompt, on, weights) if by_region else None
            needed = regional is not None or any(weight.timed for weight in weights)
            pipeline = pipeline or self.base.pipeline
            with UNetHook(pipeline, on, weights).hooked(regional) if needed else nullcontext():
                yield pipeline, regional

    def find_regions(
        self,
        prompt: str,
        *,
        seed: int = 0,
        negative_prompt: str | None = None,
        steps: int = STEPS,
        guidance: float = GUIDANCE,
        size: Size | None = None,
        sampler: str | None = None,
    ) -> list[Region]:
        """Where `regions="auto"` puts each subject in the picture that `generate` would draw, to inspect and to edit.

        Show them with `preview(regions)`; pass them on, edited or not, as `regions=`. Runs only the steps before `start`.
        """
        if self.regions != "auto":
            raise SettingsError('find_regions needs regions="auto"; this composition has regions of its own')
        [seed] = checked(seeds=[seed])["seeds"]
        how = {"steps": steps, "guidance": guidance, "sampler": sampler}
        sampler = checked(prompt=prompt, negative_prompt=negative_prompt, **how)["sampler"]
        asked = as_arguments(drawable(self.base, size))
        with self._attached(prompt) as (pipeline, regional), sampling(pipeline, sampler, steps), quiet(pipeline):
            if regional is None or regional.maps is None:
                raise SettingsError(f"the prompt {prompt!r} names no subject; name those whose regions you want")
            generator = torch.Generator().manual_seed(seed)
            options = {"num_inference_steps": steps, "guidance_scale": guidance, "generator": generator}
            self._find(pipeline, regional, {"prompt": prompt, "negative_prompt": negative_prompt, **options, **asked})
            assert regional.masks is not None
            masks = regional.masks.full
        found: list[Region] = []
        for (adapter, weight), mask in zip(self._named(prompt), masks[:, 0], strict=True):
            drawn = Image.fromarray((mask * 255).round().byte().cpu().numpy())
            found.append(Region(adapter, mask=drawn, weight=weight, feather=0))
        return found

    def _find(
        self,
        pipeline: Any,
        regional: Regional,
        arguments: Mapping[str, Any],
        on_step: Callable[[int], None] | None = None,
    ) -> None:
        """Run the steps of this call before `start`, whose attention gives its pictures regions from the first step on."""

        def stop(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            if on_step is not None:
                on_step(0)
            schedule = pipeline.scheduler.timesteps.tolist()  # some samplers call twice at one timestep
            done = len(dict.fromkeys(schedule[: step + 2])) - 1
            pipeline._interrupt = done >= self.start * len(dict.fromkeys(schedule))
            return tensors

        assert regional.maps is not None
        regional.start = self.start
        pipeline(**arguments, output_type="latent", callback_on_step_end=stop)
        regional.masks = regional.masks or masks_by_attention(regional.maps.found())
        regional.start = 0.0

    def everyone(self, prompt: str = "") -> list[tuple[Adapter, Weight]]:
        """Adapters that are active everywhere, then those of the regions."""
        named = self._named(prompt) if self.regions == "auto" else []
        return [*(item for item in self.adapters if not any(item is other for other in named)), *named, *self.placed]

    def _named(self, prompt: str) -> list[tuple[Adapter, Weight]]:
        """The adapters whose subject the prompt names."""
        return [item for item in self.adapters if find_phrase(prompt, item[0]) is not None]

    # --- before the first step

    def remarks(self, prompt: str, negative_prompt: str | None = None, *, size: tuple[int, int] | None = None) -> list[str]:
        """What is probably not meant, one line each; `generate` gives them as warnings."""
        everyone, extra = self.everyone(prompt), self.settings(prompt)["method"] != "regions"
        weights = self.compel(prompt, negative_prompt) is not None
        prompts = [prompt] * (len(everyone) - len(self.places)) + [place.prompt or prompt for place in self.places]
        return [
            *clashes(everyone, self.method),
            *unnamed(everyone, prompts),
            *(text for one in dict.fromkeys([*prompts, negative_prompt or ""]) for text in other_syntax(one, weights=weights)),
            *([] if weights else unread(self.base, everyone, prompt, negative_prompt, extra=extra)),
            *size_note(self.base, size),
        ]

    def compel(self, prompt: str, negative_prompt: str | None) -> str | None:
        """The version of compel, if it encodes the prompts: those with weights and long ones, in a picture without regions."""
        if self.settings(prompt)["method"] == "regions":
            return None
        wanted = any(is_weighted(text) or self.base.cut_off(text) for text in (prompt, negative_prompt or ""))
        return compel_version() if wanted else None

    def preflight(self, prompt: str = "", *, steps: int = STEPS, size: Size | None = None, trial: bool = False) -> Preflight:
        """The cost and the conflicts of this composition. trial: run a few steps to measure time and memory."""
        prompt, steps = checked(prompt=prompt, steps=steps).values()
        pair = drawable(self.base, size)
        everyone = self.everyone(prompt)
        refused, other_base = misfits(self.base, everyone)
        seconds, peak = self._trial(prompt, steps, pair) if trial and not refused else (None, None)
        return Preflight(
            method=self.method,
            adapter_bytes=sum(adapter.nbytes for adapter, _ in everyone),
            overlaps=overlaps_of(everyone),
            warnings=(*other_base, *self.remarks(prompt, size=pair)),
            recommended=self._recommended(len(subjects_of(everyone))),
            refused=tuple(refused),
            seconds=seconds,
            peak_bytes=peak,
        )

    def _recommended(self, subjects: int) -> str:
        if subjects < 2:
            return 'method "sum": one subject, and styles'
        return "draw it: each subject has its place" if self.method == "regions" else ways_to_place()

    def _trial(self, prompt: str, steps: int, size: tuple[int, int] | None) -> tuple[float, int | None]:
        """Seconds for a picture and peak bytes on the GPU, from four steps."""
        cuda = self.base.device.type == "cuda"
        if cuda:
            torch.cuda.reset_peak_memory_stats()
        tried = 4  # chosen
        with self.attached(prompt) as pipeline, quiet(pipeline):
            options = {"num_inference_steps": tried, "output_type": "latent", **as_arguments(size)}
            pipeline(prompt, **options | {"num_inference_steps": 1})  # one-time set-up
            started = time.perf_counter()
            pipeline(prompt, **options)
            if cuda:
                torch.cuda.synchronize()
        seconds = (time.perf_counter() - started) / tried * steps
        seconds *= 1 + self.start * (self.settings(prompt)["regions"] == "auto")
        return seconds, torch.cuda.max_memory_allocated() if cuda else None

    # --- regions

    @torch.no_grad()
    def _regional(self, prompt: str, on: Sequence[AttachedAdapter], weights: Sequence[Weight]) -> Regional:
        auto = self.regions == "auto"
        subjects = [adapter for adapter, _ in (self._named(prompt) if auto else self.placed)]
        if not subjects:
            names = ", ".join(repr(a.card.token or a.name) for a, _ in self.adapters)
            raise SettingsError(f"the prompt {prompt!r} names none of {names}; name every subject in it")
        prompts = [None] * len(subjects) if auto else [place.prompt for place in self.places]
        masks = None if auto else Masks(masks_of(self.places).full.to(self.base.device))
        members = list(range(len(on) - len(subjects), len(on)))
        for i in members:  # a text encoder has no pixels: its part is active only in the region's prompt
            scale_text(on[i], None)
        texts = []
        for i, subject, text in zip(members, subjects, prompts, strict=True):
            if text is None:
                text = without(prompt, [other for other in subjects if other is not subject])
            scale_text(on[i], weights[i])
            texts.append(self.base.encode_text([text]))
            scale_text(on[i], None)
        background = self.base.encode_text([without(prompt, subjects) if self.background is None else self.background])
        maps = None
        if auto:
            words = [token_positions(prompt, one, self.base.tokenizer) for one in subjects]
            boxes = setting("regions=[Region(...)]", option="--region NAME:0,0,0.5,1")
            maps = AttentionMaps(words, remedy=f"pass {boxes}")
        return Regional(members, masks, texts, background, self.start, maps)


def checked(**settings: Any) -> dict[str, Any]:
    """Arguments of `generate` in their plain types. Raises SettingsError for one out of range."""
    if "seeds" in settings:
        seeds = settings["seeds"]
        settings["seeds"] = seeds = list(seeds) if isinstance(seeds, Iterable) and not isinstance(seeds, str) else [seeds]
        if not seeds:
            raise SettingsError("no seeds; pass one for each picture, e.g. range(4)")
        for seed in seeds:
            check(not isinstance(seed, int) or 0 <= seed < 2**63, f"seed {seed}", "0 to 2**63 - 1")
    if "size" in settings:
        settings["size"] = sides(settings["size"])
    for name, value in settings.items():
        kind, allows, allowed = PICTURES[name]
        settings[name] = typed(name, value, kind)
        check(allows(settings[name]), f"{name} {settings[name]}", allowed)
    if settings.get("sampler") is not None:
        settings["sampler"] = sampler_name(settings["sampler"])
    return settings


def refuse_black(images: Sequence[Image.Image], base: BaseModel) -> None:
    """NaN ends as black. Raises SettingsError, unless a safety checker makes pictures black too."""
    if getattr(base.shell, "safety_checker", None) is None and not all(image.getbbox() for image in images):
        raise SettingsError(
            f"a picture came out black: numbers beyond {str(base.dtype).removeprefix('torch.')}; lower the guidance "
            f"or the weights, or load the base with {setting('dtype', 'float32')}"
        )


def everyone_of(adapters: Weighted | Iterable[Weighted]) -> tuple[tuple[Adapter, Weight], ...]:
    """Adapters with their weights, from one or several."""
    pairs = weighted(adapters, float | Weight)
    return tuple((adapter, weight if isinstance(weight, Weight) else Weight(weight)) for adapter, weight in pairs)


def scale_text(adapter: AttachedAdapter, weight: Weight | None) -> None:
    """Set the weight of an adapter's part in the text encoders; None: off."""
    for path in adapter.layers:
        if not path.startswith("unet."):
            adapter.scale(path, 0.0 if weight is None else weight.of(path))
