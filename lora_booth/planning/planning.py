"""plan(): the memory of a training, and the settings that fit with the least extra computation."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import nullcontext
from dataclasses import asdict, dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, get_args

import torch

from ..base.base_model import BaseModel, default_device, default_dtype, usable
from ..base.library_logging import quiet_about_torchvision
from ..base.quantization import quantization_of, storage_bytes, tensors_of
from ..base.weight_files import return_always
from ..config import LoraSpec, Quantization, SettledConfig, TrainingConfig, check, settled, typed
from ..errors import SettingsError, counted, setting
from ..training.latents import Bucket, LatentCache, LatentSet
from ..training.training_run import training_steps
from .budget import GB, RESERVE, WITHOUT_BF16, Machine, batch_of, cache_bytes, gpu_named, this_machine
from .counting import Counter, inputs
from .shapes import without_weights

STATE_BYTES = {"adamw": 8, "adamw8bit": 2, "prodigy": 16, "schedulefree": 8}  # for each value of the adapter
COMMON_SIDES = (1536, 1024, 768, 640, 512, 384, 256, 192, 128, 64)  # pixels, to suggest if nothing fits; chosen
WARM_UPS, TIMED = 2, 3  # updates of a measurement; the first ones compile and record; chosen


class DoesNotFit(SettingsError):
    """No settings fit without changing the result; the message names changes that would fit."""


@dataclass(frozen=True)
class Forecast:
    """The memory of one way to train. Bytes."""

    settings: dict[str, Any]  # changes to the TrainingConfig you passed, and `quantize` of BaseModel.load
    training: dict[str, float]  # the parts of the loop's memory
    phases: dict[str, float]  # the peak of each phase
    reserve: float
    passes: int  # forward and backward passes for one update
    flops: float  # of one update
    fits: bool  # with the reserve

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def words(self) -> str:
        return ", ".join(setting(name, value) for name, value in self.settings.items()) or "as asked"

    def to_json(self) -> dict[str, Any]:
        return {**asdict(self), "peak": self.peak}


@dataclass(frozen=True)
class Plan:
    """All ways to train, the least extra computation first; `config` is the one to use."""

    base: str
    family: str
    machine: Machine
    dtype: str
    asked: TrainingConfig
    lora: LoraSpec
    forecasts: tuple[Forecast, ...]
    offered: Forecast | None  # with a quantized base, which changes the result and so is never chosen for you
    remedy: str = ""  # what would fit, if nothing does
    seconds: float | None = None  # for one update with `config`, measured here; None: not measured

    @property
    def least(self) -> Forecast:
        return min(self.forecasts, key=lambda forecast: forecast.peak)

    @property
    def chosen(self) -> Forecast | None:
        """The first that fits, else the smallest if it fits without the reserve."""
        least = self.least if self.least.peak <= self.machine.budget else None
        return next((forecast for forecast in self.forecasts if forecast.fits), least)

    @property
    def fitting(self) -> Forecast:
        """The same. Raises DoesNotFit if there is none."""
        if self.chosen is None:
            raise DoesNotFit(self.remedy)
        return self.chosen

    @property
    def config(self) -> TrainingConfig:
        """The settings to train with. Raises DoesNotFit."""
        return replace(self.asked, **self.fitting.settings)

    @property
    def summary(self) -> str:
        """One line."""
        way = self.chosen
        if way is None:
            return f"does not fit: {self.remedy}"
        settings = f", with {way.words}" if way.settings else ""
        needs = f"{way.peak / GB:.1f} GB of {self.machine.budget / GB:.1f}"
        time = "" if self.seconds is None else f", about {self.minutes} min"
        return f"{needs}, {self.asked.steps} steps at {self.asked.resolution} px{time}{settings}"

    @property
    def minutes(self) -> int:
        """Of all steps, at the speed that was measured."""
        return max(1, round((self.asked.steps or 0) * (self.seconds or 0) / 60))

    def __str__(self) -> str:
        """A table of the ways, and the parts of the memory."""
        config, machine, one = self.asked, self.machine, self.chosen or self.least
        batch = counted(config.batch_size, "photo")
        if config.prior_loss_weight > 0:
            batch += " and as many of the class"
        rank = f"rank {self.lora.rank}" + (" with text encoders" if self.lora.text_encoder else "")
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in one.training.items() if size >= 0.005 * GB)
        phases = ", ".join(f"{name} {size / GB:.2f}" for name, size in one.phases.items())
        ways = [*self.forecasts, *filter(None, [self.offered])]
        table = [("settings", "memory", ""), *((way.words, f"{way.peak / GB:.2f} GB", self._verdict(way)) for way in ways)]
        widths = [max(len(row[i]) for row in table) for i in range(2)]
        lines = [
            f"{self.base} ({self.family}, {self.dtype}) at {config.resolution} px, {batch}, {rank}",
            *(f"{row[0]:{widths[0]}}  {row[1]:{widths[1]}}  {row[2]}".rstrip() for row in table),
            f"on {machine.name}: {machine.budget / GB:.3g} GB",
            f"training, GB: {parts}",
            f"phases, GB: {phases}; reserve ({RESERVE:.0%} of all but the weights): {one.reserve / GB:.2f}",
        ]
        if self.seconds is not None:
            each = f"{self.seconds:.3g} s a step (median of {TIMED} here)"
            lines.append(f"time: {each}, about {self.minutes} min for {config.steps} steps")
        return "\n".join(lines)

    def _verdict(self, way: Forecast) -> str:
        if way is self.chosen:
            return "chosen"
        return ("fits" if way.fits else "does not fit") + (", if you ask for it" if way is self.offered else "")

    def to_json(self) -> dict[str, Any]:
        """Plain values: bytes, and seconds (for a step, and in all) if they were measured."""
        chosen = self.chosen
        return {
            "base": self.base,
            "family": self.family,
            "dtype": self.dtype,
            "resolution": self.asked.resolution,
            "pictures": batch_of(self.asked),
            "rank": self.lora.rank,
            "machine": asdict(self.machine),
            "chosen": None if chosen is None else chosen.settings,
            "seconds": self.seconds,
            "seconds_in_all": None if self.seconds is None else self.seconds * (self.asked.steps or 0),
            "remedy": self.remedy,
            "ways": [one.to_json() for one in self.forecasts],
            "offered": None if self.offered is None else self.offered.to_json(),
        }


def plan(
    base: BaseModel | str | Path,
    *,
    lora: LoraSpec | None = None,
    config: TrainingConfig | None = None,
    vram_gb: float | None = None,
    gpu: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    photos: int = 5,
    quantize: Quantization | None = None,
    measure: bool = False,
) -> Plan:
    """Predict the memory of a training, counted on the base's structure without its weights.

    base     a loaded base; what `BaseModel.load` takes (only configuration files are read); or "sd1", "sd2", "sdxl"
    vram_gb  budget in 10^9 bytes; None: what is free on the device, or the memory of `gpu`
    gpu      plan for another machine: T4, L4, 3090, 4090, A100, H100, H200. Without a GPU here, vram_gb alone means a T4
    device   None: that of a loaded base, or the default of BaseModel.load
    dtype    None: that of a loaded base, or the default of BaseModel.load
    photos   number of photos
    quantize as in BaseModel.load; a loaded base that is quantized counts as such
    measure  also time a few training steps of a loaded base on this machine, with the chosen settings
    Raises BaseModelError, SettingsError; and DoesNotFit when you read `config` of a plan in which nothing fits.
    """
    quiet_about_torchvision()
    base, gpu = typed("base", base, BaseModel | str | Path), typed("gpu", gpu, str | None)
    lora = typed("lora", lora, LoraSpec | None) or LoraSpec()
    config = typed("config", config, TrainingConfig | None) or TrainingConfig()
    vram_gb, dtype = typed("vram_gb", vram_gb, float | None), typed("dtype", dtype, torch.dtype | None)
    check(typed("photos", photos, int) >= 1, f"photos {photos}", "at least 1")
    asked = {"vram_gb": vram_gb, "gpu": gpu, "device": device, "dtype": dtype, "quantize": quantize}
    elsewhere = [name for name, value in asked.items() if value is not None]
    loaded = base if isinstance(base, BaseModel) else None
    if measure and (elsewhere or loaded is None):
        wrong = f"{elsewhere[0]}=" if elsewhere else f"{str(base)!r}"
        raise SettingsError(f"measure=True with {wrong}: only a loaded base can be timed, unchanged; pass BaseModel.load(...)")
    quantize = typed("quantize", quantize, Quantization | None)
    if vram_gb is not None and not vram_gb > 0:
        raise SettingsError(f"{setting('vram_gb', option='--vram')} {vram_gb} is out of range; allowed: above 0")
    here = usable(device) if device is not None else default_device() if loaded is None else loaded.device
    if gpu is None and vram_gb is not None and device is None and here.type != "cuda":
        gpu = "T4"
    machine = this_machine(base, here, vram_gb) if gpu is None else gpu_named(gpu, vram_gb)
    if dtype is None and gpu is not None:
        dtype = torch.float16 if machine.name in WITHOUT_BF16 else torch.bfloat16
    if dtype is None:
        dtype = loaded.dtype if loaded is not None else default_dtype(here, str(base))
    found = Planner.of(base, lora, config, machine, dtype=dtype, photos=photos, quantize=quantize).plan()
    if measure and loaded is not None and found.chosen is not None:
        return replace(found, seconds=measured_seconds(loaded, lora, settled(found.config, loaded, photos)))
    return found


def levels_that_fit(
    base: BaseModel, lora: LoraSpec, config: SettledConfig, *, photos: int, say: Callable[[str], None] = lambda text: None
) -> dict[str, Any]:
    """The settings of the memory ladder with which a training fits on this machine. Raises DoesNotFit.

    On a CPU, the process takes no more than is counted from now on, since it holds on to nothing that is freed.
    """
    if base.device.type == "cpu":
        return_always()
    if len(ways(config)) == 1:  # somebody who set them all wants to try
        return {}
    machine = this_machine(base, base.device)
    planner = Planner.of(base, lora, config, machine, dtype=base.dtype, photos=photos)
    asked = planner.forecast(config, {})
    chosen = asked if asked.fits else planner.plan().fitting
    if chosen.settings:
        needs = f"{asked.peak / GB:.1f} GB would be needed without it, and {machine.budget / GB:.1f} GB are free"
        say(f"plan: {chosen.words}, as {needs}")
    return chosen.settings


def measured_seconds(base: BaseModel, lora: LoraSpec, config: SettledConfig) -> float:
    """Seconds for one optimizer update on this machine: the median of three, on zero latents."""
    with torch.no_grad():
        mean, _, time_ids = inputs(base, config.batch_size, (config.resolution, config.resolution))
        text = {"a photo": base.encode_text(["a photo"])}
    prompts = ("a photo",) * len(mean)
    by_predictions = prompts if config.prior_loss_weight > 0 else ()
    pictures = LatentSet(mean[None], torch.ones_like(mean[None]), prompts, time_ids, class_prompts=by_predictions)
    cache = LatentCache((Bucket(pictures),), base.scaling_factor, {} if lora.text_encoder else text, text)
    config = replace(config, steps=WARM_UPS + TIMED)
    ends = [time.perf_counter()]
    with nullcontext() if lora.text_encoder else base.only_unet_on_device():
        for step in training_steps(base, cache, lora=lora, config=config):
            _ = step.loss  # waits for a GPU
            ends.append(time.perf_counter())
    return statistics.median(end - began for began, end in pairwise(ends[WARM_UPS:]))


@dataclass(frozen=True)
class Planner:
    counter: Counter
    machine: Machine
    config: SettledConfig
    photos: int
    resident: frozenset[str] = frozenset()  # modules in memory that training cannot release
    others: int = 0  # bytes of modules that only drawing uses, e.g. a safety checker
    quantize: Quantization | None = None

    @classmethod
    def of(
        cls,
        base: BaseModel | str | Path,
        lora: LoraSpec,
        config: TrainingConfig,
        machine: Machine,
        *,
        dtype: torch.dtype,
        photos: int,
        quantize: Quantization | None = None,
    ) -> Planner:
        counter = Counter(without_weights(base, dtype), lora, on_cpu=machine.type == "cpu")
        settled_config = settled(config, counter.base, photos)
        if not isinstance(base, BaseModel):
            return cls(counter, machine, settled_config, photos, quantize=quantize)
        others = [module for name, module in base.modules.items() if name != "vae" and name not in base.structure]
        size = storage_bytes(tensor for one in others for tensor in tensors_of(one))
        packed = quantization_of(base.structure["unet"]) or quantize
        return cls(counter, machine, settled_config, photos, frozenset(filter(base.stays, base.modules)), size, packed)

    def plan(self) -> Plan:
        base = self.counter.base
        forecasts = [self.forecast(self.config, way) for way in ways(self.config)]
        offered = None
        if self.quantize is None and self.machine.type == "cuda":  # slow elsewhere
            kinds = get_args(Quantization)
            packed = [self.forecast(self.config, {"quantize": kind} | way) for kind in kinds for way in ways(self.config)]
            offered = next((one for one in packed if one.fits), min(packed, key=lambda one: one.peak))
        found = Plan(
            base=base.name,
            family=base.family.label,
            machine=self.machine,
            dtype=str(base.dtype).removeprefix("torch.") + (f", {self.quantize}" if self.quantize else ""),
            asked=TrainingConfig(**vars(self.config)),
            lora=self.counter.lora,
            forecasts=tuple(forecasts),
            offered=offered,
        )
        return found if found.chosen else replace(found, remedy=self._remedy(found.least, offered))

    def forecast(self, config: SettledConfig, settings: dict[str, Any]) -> Forecast:
        """settings: changes to `config`, and `quantize`"""
        quantize = settings.get("quantize", self.quantize)
        config = replace(config, **{name: value for name, value in settings.items() if name != "quantize"})
        machine, resolution = self.machine, config.resolution
        drawn = config.class_images if config.prior_loss_weight > 0 else 0
        pictures = batch_of(config)
        size = min(config.pictures_at_a_time or pictures, pictures)
        parts = [size] * (pictures // size) + [pictures % size] * (pictures % size > 0)
        counts = [self.counter.step(config, pictures=part, resolution=resolution) for part in parts]  # the largest first
        unpacked = self.counter.weights.widest if quantize else 0  # one layer at a time
        weights = self._weights(drawn=drawn > 0, quantize=quantize)
        training = {
            "weights": float(weights["training"]),
            "context": machine.context,
            **self._of_adapter(config),
            "latents and text": float(cache_bytes(self.counter.base, config, photos=self.photos)),
            "saved for the backward pass": float(counts[0].saved),
            "working memory": float(counts[0].peak - counts[0].saved + unpacked),
        }
        images = 0 if machine.type == "cuda" else (drawn or self.photos) * 3 * resolution**2
        beyond = {"through the VAE": machine.context + images + self.counter.encode(resolution).peak}  # beyond the weights
        if drawn:
            beyond["drawing class images"] = machine.context + self.counter.draw(resolution).peak + unpacked
        beyond["training"] = sum(training.values()) - weights["training"]
        phases = {name: weights[name] + size for name, size in beyond.items()}
        peak = max(phases.values())
        reserve = max(phases[name] + RESERVE * size for name, size in beyond.items()) - peak
        return Forecast(
            settings=settings,
            training=training,
            phases=phases,
            reserve=reserve,
            passes=config.gradient_accumulation * len(parts),
            flops=config.gradient_accumulation * sum(one.flops for one in counts),
            fits=peak + reserve <= machine.budget,
        )

    def _weights(self, *, drawn: bool, quantize: Quantization | None) -> dict[str, int]:
        """Bytes of the modules in memory, for each phase. drawn: class images were drawn before the others"""
        sizes, stays = self.counter.weights, self.resident
        unet = sizes.packed[quantize] if quantize else sizes.unet
        everything = unet + sizes.vae + sizes.text_encoders
        beside = self.others if stays - {"unet", "vae", "text_encoder", "text_encoder_2"} else 0
        if self.counter.lora.text_encoder:
            training = everything + beside
        elif self.machine.type == "cuda":  # the rest goes to the host
            training = unet
        else:
            training = unet + sizes.vae * ("vae" in stays) + sizes.text_encoders * ("text_encoder" in stays) + beside
        encoding = everything if drawn or "unet" in stays else everything - unet
        return {"through the VAE": encoding + beside, "drawing class images": everything + self.others, "training": training}

    def _of_adapter(self, config: TrainingConfig) -> dict[str, float]:
        lora = float(self.counter.weights.lora)
        state = lora * STATE_BYTES[config.optimizer] / 4
        half = 0.0 if self.counter.base.dtype == torch.float32 else lora / 2  # a copy for the layers, and one of the gradients
        found = {"adapter": lora + half, "gradients": lora + half, "optimizer": state}
        return found if self.machine.type == "cuda" else found | {"state to roll back to": lora + state}  # else on the host

    def _remedy(self, least: Forecast, offered: Forecast | None) -> str:
        config, resolution, budget = self.config, self.config.resolution, self.machine.budget
        offers = []
        if offered is not None and offered.peak <= budget:
            offers.append(f"{setting('quantize', offered.settings['quantize'])} would need {offered.peak / GB:.1f} GB")
        for side in (one for one in COMMON_SIDES if one < resolution):
            found = self.forecast(replace(config, resolution=side), least.settings)
            if found.peak <= budget:
                offers.append(f"{setting('resolution', side)} would need {found.peak / GB:.1f} GB")
                break
        if self.counter.base.dtype == torch.float32:
            offers.append("a base in half precision needs half as much for its weights")
        cause = f"{self.counter.base.name} at {resolution} px needs at least {least.peak / GB:.1f} GB"
        value = f"the budget on {self.machine.name} is {budget / GB:.3g} GB"
        return f"{cause} and {value}; {'; '.join(offers) or 'no smaller resolution fits'}"


def ways(config: TrainingConfig) -> list[dict[str, Any]]:
    """Levels of the memory ladder that `config` leaves open, as changes to it: least arithmetic first, then fewest passes."""
    parts: list[dict[str, Any]] = [{}]
    if config.pictures_at_a_time is None:
        pictures = batch_of(config)
        while pictures > 1:
            pictures //= 2
            parts.append({"pictures_at_a_time": pictures})
    again: list[dict[str, Any]] = [{}] if config.gradient_checkpointing else [{}, {"gradient_checkpointing": True}]
    return [part | one for one in again for part in parts]
