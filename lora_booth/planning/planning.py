"""plan(): what a training will take on a device, and the fastest settings with which it fits."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from functools import cached_property
from itertools import product
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..base.base_model import BaseModel, default_device, default_dtype
from ..base.memory import pictures_at_a_time, storage_bytes
from ..base.quantization import KINDS, check_kind, is_quantized, tensors_of
from ..config import LoraSpec, TrainingConfig
from ..errors import SettingsError
from ..kernels.attention import fastest_attention
from ..training.memory_ladder import batch_of, choices
from ..training.settings import settled
from .counting import Count, Counter
from .devices import (
    CPU_CONTEXT,
    CUDA_CONTEXT,
    CUDA_WORKSPACES,
    GB,
    GPUS,
    Rates,
    device_name,
    free_bytes,
    gpu_named,
    measured_rates,
    published_rates,
)
from .shapes import shapes_of

RESERVE = 0.15  # of what a phase takes beside its weights: so far off a prediction may be
ADAM_BYTES = {"adamw": 8, "adamw8bit": 2}  # for each value of the adapter
COMMON_SIDES = (1536, 1024, 768, 640, 512, 384, 256, 192, 128, 64)  # pixels
WORTH = 1.05  # by this a saving must be faster to be taken without need
FITS = ("does not fit", "fits")
EASY = 0.25  # of the free memory: what is surely below is not counted


class DoesNotFit(SettingsError):
    """No settings that leave the result alone make the training fit; the message says which others would."""


@dataclass(frozen=True)
class Machine:
    """Where a training shall run."""

    name: str
    type: str  # "cuda", "cpu", "mps"
    budget: float  # bytes
    context: float  # bytes that the device and its libraries take of them
    rates: Rates


@dataclass(frozen=True)
class Forecast:
    """One way to train, predicted. Bytes and seconds."""

    settings: dict[str, Any]  # of TrainingConfig, beyond what was asked for; and `quantize` of BaseModel.load
    training: dict[str, float]  # what the memory of the loop consists of
    phases: dict[str, float]  # the most memory of each phase
    reserve: float
    flops: float  # of one update
    seconds: float  # for one update
    seconds_range: tuple[float, float]
    fits: bool  # with the reserve

    @property
    def peak(self) -> float:
        return max(self.phases.values())

    @property
    def words(self) -> str:
        return ", ".join(f"{name}={value}" for name, value in self.settings.items()) or "as asked"


@dataclass(frozen=True)
class Plan:
    """Every way to train, the fastest first; `config` is the one to take."""

    base: str
    family: str
    machine: Machine
    dtype: str
    asked: TrainingConfig
    lora: LoraSpec
    pictures: int  # in a batch
    forecasts: tuple[Forecast, ...]
    remedy: str  # what would fit, when nothing does
    offered: Forecast | None = None  # with a quantized base: other numbers, so never taken without asking

    @property
    def chosen(self) -> Forecast | None:
        return next((forecast for forecast in self.forecasts if forecast.fits), None) or self._narrow

    @property
    def _narrow(self) -> Forecast | None:
        """What fits if the prediction is right."""
        least = min(self.forecasts, key=lambda forecast: forecast.peak)
        return least if least.peak <= self.machine.budget else None

    @property
    def config(self) -> TrainingConfig:
        """The settings to train with. Raises DoesNotFit."""
        if self.chosen is None:
            raise DoesNotFit(self.remedy)
        return replace(self.asked, **self.chosen.settings)

    @property
    def title(self) -> str:
        config, prior = self.asked, self.asked.prior_loss_weight > 0
        batch = f"{config.batch_size} photo(s)" + (f" + {config.batch_size} class image(s)" if prior else "")
        rank = f"rank {self.lora.rank}" + (" with text encoders" if self.lora.text_encoder else "")
        return f"{self.base} ({self.family}, {self.dtype}) at {config.resolution} px, {batch}, {rank}"

    headings = ("settings", "memory", "s/step (from - to)", "")

    @property
    def rows(self) -> list[tuple[str, ...]]:
        """One for each forecast, the fastest first."""
        return [
            (
                one.words,
                f"{one.peak / GB:.2f} GB",
                f"{shown_seconds(one.seconds)} ({' to '.join(map(shown_seconds, one.seconds_range))})",
                "chosen" if one is self.chosen else FITS[one.fits] + ", if asked for" * (one is self.offered),
            )
            for one in (*self.forecasts, *filter(None, [self.offered]))
        ]

    @property
    def notes(self) -> list[str]:
        """What the numbers are made of."""
        machine, one = self.machine, self.chosen or min(self.forecasts, key=lambda forecast: forecast.peak)
        parts = ", ".join(f"{name} {size / GB:.2f}" for name, size in one.training.items() if size >= 0.005 * GB)
        phases = ", ".join(f"{name} {size / GB:.2f}" for name, size in one.phases.items())
        found = [
            f"on {machine.name}: {machine.budget / GB:.1f} GB; {one.flops / 1e12:.3g} TFLOP a step, "
            f"{machine.rates.flops / 1e12:.3g} TFLOP/s ({machine.rates.source})",
            f"training, GB: {parts}",
            f"phases, GB: {phases}; {RESERVE:.0%} of what are not weights is kept in reserve: {one.reserve / GB:.2f}",
        ]
        return found if self.chosen else [*found, self.remedy]

    def __str__(self) -> str:
        table = [self.headings, *self.rows]
        widths = [max(len(row[i]) for row in table) for i in range(3)]
        lines = ["  ".join(cell.ljust(width) for cell, width in zip(row, (*widths, 0), strict=True)).rstrip() for row in table]
        return "\n".join([self.title, *lines, *self.notes])

    def to_json(self) -> dict[str, Any]:
        """Plain values, bytes and seconds."""
        chosen = self.chosen
        return {
            "base": self.base,
            "family": self.family,
            "dtype": self.dtype,
            "resolution": self.asked.resolution,
            "pictures": self.pictures,
            "rank": self.lora.rank,
            "machine": asdict(self.machine),
            "chosen": None if chosen is None else chosen.settings,
            "remedy": self.remedy,
            "ways": [as_json(one) for one in self.forecasts],
            "offered": None if self.offered is None else as_json(self.offered),
        }


def as_json(one: Forecast) -> dict[str, Any]:
    return {**asdict(one), "seconds_range": list(one.seconds_range), "peak": one.peak}


def shown_seconds(seconds: float) -> str:
    return f"{seconds:.3g}" if seconds < 100 else f"{seconds:.0f}"


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
    quantize: str | None = None,
) -> Plan:
    """Predict memory and time of a training, counted on the base's structure without its weights.

    base     in memory; or what `BaseModel.load` takes, of which only configuration files are read; or "sd1", "sd2", "sdxl"
    vram_gb  10^9 bytes that it may take; None: what is free on the device, or the memory of `gpu`
    gpu      plan for another machine: T4, L4, 3090, 4090, A100, H100, H200. Without a GPU here, vram_gb alone means a T4
    device   None: the base's own, else as BaseModel.load chooses
    dtype    None: the base's own, else as BaseModel.load chooses
    photos   how many there will be
    quantize as in BaseModel.load; a base in memory that is quantized is counted so
    Raises BaseModelError, SettingsError; and DoesNotFit where `config` of the plan is asked for and nothing fits.
    """
    asked = {"vram_gb": vram_gb, "gpu": gpu, "device": device, "dtype": dtype, "quantize": quantize}
    return planner_for(base, lora or LoraSpec(), config, photos=photos, **asked).plan()  # type: ignore[arg-type]


def planner_for(
    base: BaseModel | str | Path,
    lora: LoraSpec,
    config: TrainingConfig | None,
    *,
    photos: int,
    vram_gb: float | None = None,
    gpu: str | None = None,
    device: str | torch.device | None = None,
    dtype: torch.dtype | None = None,
    quantize: str | None = None,
) -> Planner:
    """Of the arguments of `plan`, which says what they are."""
    check_kind(quantize)
    if isinstance(base, BaseModel) and is_quantized(base.structure["unet"]):
        quantize = quantize or KINDS[0]
    here = torch.device(device) if device is not None else base.device if isinstance(base, BaseModel) else default_device()
    if gpu is None and vram_gb is not None and device is None and here.type != "cuda":
        gpu = GPUS["t4"].label
    if vram_gb is not None and not vram_gb > 0:
        raise SettingsError(f"vram_gb {vram_gb} is out of range; allowed: above 0")
    precision = dtype or (base.dtype if isinstance(base, BaseModel) and gpu is None else None)
    if gpu is not None:
        facts = gpu_named(gpu)
        precision = precision or (torch.bfloat16 if facts.bf16 else torch.float16)
        budget = GB * (facts.memory_gb if vram_gb is None else vram_gb)
        machine = Machine(facts.label, "cuda", budget, CUDA_CONTEXT + CUDA_WORKSPACES, published_rates(facts, precision))
    else:
        precision = precision or default_dtype(here, "" if isinstance(base, BaseModel) else base)
        budget = vram_gb * GB if vram_gb is not None else free_bytes(here) + in_memory(base, here)
        context = {"cuda": CUDA_WORKSPACES, "cpu": CPU_CONTEXT}.get(here.type, 0.0)
        context += CUDA_CONTEXT if here.type == "cuda" and vram_gb is not None else 0.0
        machine = Machine(device_name(here), here.type, budget, context, measured_rates(here, precision))
    counter = Counter(shapes_of(base), dtype=precision, lora=lora)
    lazy = not isinstance(base, BaseModel) or base.weights is not None
    return Planner(counter, machine, settled(config or TrainingConfig(), counter.base, photos), photos, lazy, quantize)


def fitted(
    base: BaseModel, lora: LoraSpec, config: TrainingConfig, *, photos: int, say: Callable[[str], None] = lambda text: None
) -> TrainingConfig:
    """`config` (settled) with the savings that this machine's free memory asks for. Raises DoesNotFit."""
    budget = free_bytes(base.device) + in_memory(base, base.device)
    if not any(choices(config)) or ceiling(base, config) < EASY * budget:
        return config
    planner = planner_for(base, lora, config, photos=photos)
    if planner.forecast(config, {}).fits:  # nothing is faster, so the other ways need not be counted
        return config
    found = planner.plan()
    chosen = found.config
    if chosen != config:
        asked = next(one for one in found.forecasts if not one.settings)
        say(
            f"plan: {found.chosen.words if found.chosen else ''}, as {asked.peak / GB:.1f} GB would be needed without "
            f"and {found.machine.budget / GB:.1f} GB are free"
        )
    return chosen


def in_memory(base: BaseModel | str | Path, device: torch.device) -> int:
    """Bytes of a base's modules that are on the device already."""
    if not isinstance(base, BaseModel):
        return 0
    modules = {name: m for name, m in base.shell.components.items() if isinstance(m, nn.Module) and base.unread(name) is None}
    return storage_bytes(t for m in modules.values() for t in tensors_of(m) if t.device.type == device.type)


def ceiling(base: BaseModel, config: TrainingConfig) -> int:
    """Bytes that no training of this base exceeds, far above what it takes: every layer keeps the largest of all tensors."""
    unet = base.structure["unet"]
    layers = sum(1 for module in unet.modules() if not list(module.children()))
    resolution = config.resolution or base.resolution
    side = resolution // base.pixels_per_latent
    widest = 8 * max(unet.config.block_out_channels)  # type: ignore[union-attr, arg-type]  # a feed-forward layer with its gate
    pixels = (config.class_images or 0) * 3 * resolution**2
    whole = sum(storage_bytes(m.parameters()) for m in (*base.structure.values(), base.shell.vae))
    return 2 * whole + pixels + batch_of(config) * layers * side**2 * widest * 4


@dataclass(frozen=True)
class Planner:
    counter: Counter
    machine: Machine
    config: TrainingConfig  # settled
    photos: int
    lazy: bool  # the base gives back what training does not need
    quantize: str | None = None

    def plan(self) -> Plan:
        base = self.counter.base
        forecasts = self._ways({})
        least = min(forecasts, key=lambda one: one.peak)
        offered = None
        if self.quantize is None and self.machine.type == "cuda":  # slow elsewhere
            packed = self._ways({"quantize": KINDS[0]})
            offered = next((one for one in packed if one.fits), min(packed, key=lambda one: one.peak))
        return Plan(
            base=base.name,
            family=base.family.label,
            machine=self.machine,
            dtype=str(base.dtype).removeprefix("torch.") + (f", {self.quantize}" if self.quantize else ""),
            asked=self.config,
            lora=self.counter.lora,
            pictures=batch_of(self.config),
            forecasts=tuple(forecasts),
            remedy="" if least.peak <= self.machine.budget else self._remedy(least, offered),
            offered=offered,
        )

    def _ways(self, with_these: dict[str, Any]) -> list[Forecast]:
        """All that the user left open, the fastest first."""
        ways = [[(), *((pair,) for pair in pairs)] for pairs in choices(self.config)]
        every = (with_these | dict(pair for part in way for pair in part) for way in product(*ways))
        return sorted(
            (self.forecast(self.config, way) for way in every), key=lambda one: one.seconds * WORTH ** len(one.settings)
        )

    @cached_property
    def _sampling(self) -> float:
        """The most memory while class images are drawn, beside all weights."""
        assert self.config.resolution
        few = {"pictures": pictures_at_a_time(self.config.resolution), "resolution": self.config.resolution}
        return max(self._peak(self.counter.sample(**few)), self._peak(self.counter.decode(**few)))

    def _peak(self, count: Count) -> int:
        return count.peak_on_cpu if self.machine.type == "cpu" else count.peak

    def forecast(self, config: TrainingConfig, settings: dict[str, Any]) -> Forecast:
        quantize = settings.get("quantize", self.quantize)
        config = replace(config, **{name: value for name, value in settings.items() if name != "quantize"})
        assert config.resolution and config.class_images
        weights, machine, resolution = self.counter.weights, self.machine, config.resolution
        pictures, prior = batch_of(config), config.prior_loss_weight > 0
        size = min(config.pictures_at_a_time or pictures, pictures)
        parts = [size] * (pictures // size) + [pictures % size] * (pictures % size > 0)
        counted = config
        if config.attention == "auto" and machine.type == "cpu":  # a GPU's kernels all count alike
            kernel: Any = fastest_attention(self.counter.base, resolution=resolution, pictures=size, device=torch.device("cpu"))
            counted = replace(config, attention=kernel)
        counts = [self.counter.step(counted, pictures=part, resolution=resolution) for part in parts]
        largest = max(counts, key=self._peak)
        unet = weights.packed if quantize else weights.unet
        unpacked = weights.widest if quantize else 0  # one layer at a time
        whole = unet + weights.vae + weights.text_encoders
        stays = whole if self.counter.lora.text_encoder or (machine.type == "cpu" and not self.lazy) else unet
        cached = self._cache(config)
        training = {
            "weights": float(stays),
            "context": machine.context,
            **self._of_adapter(config),
            "latents and text": float(cached),
            "kept for the backward pass": float(largest.saved),
            "at work": float(self._peak(largest) - largest.saved + unpacked),
        }
        encode = self._peak(self.counter.encode(pictures=1, resolution=resolution))
        opened = config.class_images if prior else self.photos
        images = 0 if machine.type == "cuda" else opened * 3 * resolution**2
        before = whole if prior else weights.vae + weights.text_encoders
        phases = {"through the VAE": machine.context + before + images + encode}
        loaded = {"through the VAE": before, "drawing class images": whole, "training": stays}
        if prior:
            phases["drawing class images"] = machine.context + whole + self._sampling + unpacked
        phases["training"] = sum(training.values())
        more = weights.linear if quantize else 0
        seconds = config.gradient_accumulation * sum(self._seconds(one, unpacked=more) for one in counts)
        spread, peak = machine.rates.spread, max(phases.values())
        reserve = max(size + RESERVE * (size - loaded[name]) for name, size in phases.items()) - peak
        return Forecast(
            settings=settings,
            training=training,
            phases=phases,
            reserve=reserve,
            flops=config.gradient_accumulation * sum(one.flops for one in counts),
            seconds=seconds,
            seconds_range=(seconds / spread, seconds * spread),
            fits=peak + reserve <= machine.budget,
        )

    def _of_adapter(self, config: TrainingConfig, *, share: float = 1.0) -> dict[str, float]:
        """share: of the adapter's rank"""
        lora = share * self.counter.weights.lora
        state = lora * ADAM_BYTES[config.optimizer] / 4
        near = 0.0 if self.counter.dtype == torch.float32 else lora / 2  # a copy for the layers, and places for its gradients
        found = {"adapter": lora + near, "gradients": lora + near, "optimizer": state}
        return found if self.machine.type == "cuda" else found | {"state to go back to": lora + state}  # which is on the host

    def _seconds(self, counted: Count, *, unpacked: int) -> float:
        """unpacked: bytes of packed weights that each pass through the U-Net writes out"""
        rates = self.machine.rates
        moved = counted.moved + unpacked * round(counted.flops / max(1, counted.forward_flops))
        device = counted.flops / rates.flops + moved / rates.bandwidth
        captured = self.machine.type == "cuda" and self.config.capture != "off" and not self.config.compile
        host = 0.0 if captured else counted.kernels * rates.kernel_seconds  # a CUDA graph is started as one
        return device + host if self.machine.type == "cpu" else max(device, host)  # a GPU computes while the host goes on

    def _cache(self, config: TrainingConfig) -> int:
        base = self.counter.base
        assert config.resolution and config.class_images
        side, unet = config.resolution // base.pixels_per_latent, base.structure["unet"].config
        pictures = self.photos + (config.class_images if config.prior_loss_weight > 0 else 0)
        latents = pictures * (2 if config.flip else 1) * 2 * 4 * unet.in_channels * side**2  # type: ignore[union-attr, operator]
        width: int = unet.cross_attention_dim  # type: ignore[union-attr, assignment]
        return int(latents) + 2 * base.tokenizer.model_max_length * width * base.dtype.itemsize

    def _remedy(self, least: Forecast, offered: Forecast | None) -> str:
        config, resolution = self.config, self.config.resolution
        assert resolution
        offers = []
        if offered is not None and offered.peak <= self.machine.budget:
            offers.append(f'a base with quantize="{KINDS[0]}" would need {offered.peak / GB:.1f} GB')
        for side in (one for one in COMMON_SIDES if one < resolution and one % self.counter.base.pixels_per_latent == 0):
            smaller = replace(self, config=replace(config, resolution=side)).forecast(
                replace(config, resolution=side), least.settings
            )
            if smaller.peak <= self.machine.budget:
                offers.append(f"resolution={side} would need {smaller.peak / GB:.1f} GB")
                break
        for rank in (one for one in (128, 64, 32, 16, 8, 4) if one < self.counter.lora.rank):
            saved = sum(self._of_adapter(config, share=1 - rank / self.counter.lora.rank).values())
            if least.peak == least.phases["training"] and least.peak - saved <= self.machine.budget:
                offers.append(f"rank={rank} would need {(least.peak - saved) / GB:.1f} GB")
                break
        if self.counter.dtype == torch.float32:
            offers.append("a base in half precision takes half of its weights")
        cause = f"{self.counter.base.name} at {resolution} px takes {least.peak / GB:.1f} GB at the least"
        value = f"{self.machine.name} has {self.machine.budget / GB:.1f} GB"
        return f"{cause} and {value}; {'; '.join(offers) or 'no smaller resolution fits'}. Which one is yours to choose"
