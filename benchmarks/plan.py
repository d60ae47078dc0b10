"""Predictions of `lb.plan` against trainings on this machine's CPU: `python benchmarks/plan.py [--cases NAME ...]`.

Each case trains in its own process on random weights. Measured is the peak of resident memory (Linux) above that of the
process after its imports and one training of the toybox; predicted is the plan's figure for the same phase.
`--start` prints instead the seconds that planning takes at the start of a run, SD 1.5's shapes at 256 px in fp32, with and
without class images: once as `train` calls it, once counted, as where memory is scarce.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch

import lora_booth as lb
from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import generate_images, pictures_at_a_time
from lora_booth.base.quantization import put_packed, quantize
from lora_booth.base.single_file import CONFIGS
from lora_booth.config import Quantization, settled
from lora_booth.planning.budget import is_ample
from lora_booth.planning.planning import plan
from lora_booth.planning.shapes import MODULES, built, configured
from lora_booth.training.latents import Bucket, LatentCache, LatentSet
from lora_booth.training.training_run import training_steps

STEPS = 3
VAE = {"block_out_channels": (32, 64, 128, 128)}  # narrow, for time


@dataclass(frozen=True)
class Case:
    family: str
    resolution: int
    dtype: torch.dtype = torch.float32
    unet: tuple[tuple[str, Any], ...] = ()  # what differs from the family's own configuration
    batch_size: int = 1
    gradient_checkpointing: bool = False
    quantize: Quantization | None = None
    tiny: bool = False


NARROW = (("block_out_channels", (96, 192, 384, 384)),)
NARROW_XL = (
    ("block_out_channels", (96, 192, 384)),
    ("attention_head_dim", (3, 6, 12)),
    ("transformer_layers_per_block", (1, 2, 4)),
)
CASES = {
    "narrow SD 1.x, fp32, 256 px": Case("sd1", 256, unet=NARROW),
    "narrow SD 1.x, fp32, 512 px, checkpointed": Case("sd1", 512, unet=NARROW, gradient_checkpointing=True),
    "narrow SD 1.x, fp32, 256 px, batch 4": Case("sd1", 256, unet=NARROW, batch_size=4),
    "narrow SD 2.x, bf16, 512 px": Case("sd2", 512, torch.bfloat16, unet=NARROW),
    "narrow SDXL, fp32, 512 px": Case("sdxl", 512, unet=NARROW_XL),
    "SD 1.5, bf16, 256 px": Case("sd1", 256, torch.bfloat16),
    "SD 1.5, bf16, 256 px, checkpointed": Case("sd1", 256, torch.bfloat16, gradient_checkpointing=True),
    "SD 1.5, bf16, 256 px, int8": Case("sd1", 256, torch.bfloat16, quantize="int8"),
}


def tiny(part: str, parts: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """The configuration of a module with as many blocks, some dozens of channels wide; at least 128 px."""
    config, encoders = dict(parts[part]), sum(name.startswith("text") for name in parts)
    if part == "vae":
        return config | {"block_out_channels": (32,) * 4, "layers_per_block": 1}
    if part != "unet":
        few = {"num_hidden_layers": 2, "num_attention_heads": 2}
        return config | few | {"hidden_size": 32, "intermediate_size": 64, "projection_dim": 32}
    config |= {"block_out_channels": (32, 64, 64, 64)[: len(config["block_out_channels"])], "layers_per_block": 1}
    config |= {"attention_head_dim": 2, "cross_attention_dim": 32 * encoders}
    if encoders == 2:
        config |= {"transformer_layers_per_block": (1, 1, 2), "layers_per_block": 2}
        config["projection_class_embeddings_input_dim"] = 6 * config["addition_time_embed_dim"] + 32
    return config


def base_of(case: Case, device: str = "cpu") -> BaseModel:
    """Random weights in the case's shapes."""
    parts = configured(CONFIGS / case.family)
    parts["unet"] |= dict(case.unet)
    parts["vae"] |= VAE
    if case.tiny:
        parts |= {part: tiny(part, parts) for part in MODULES if part in parts}
    base = built(case.family, parts, case.dtype)
    modules = (*base.structure.values(), base.shell.vae)
    deviation = 0.08 if case.tiny else 0.02  # narrow layers let less through, and fp16 on a CPU has no scaler
    tensors = [[*module.named_parameters(), *module.named_buffers()] for module in modules]
    if case.quantize is not None:
        quantize(base.shell.unet, None, case.dtype, case.quantize)
    for module, found in zip(modules, tensors, strict=True):
        for name, value in found:
            made = torch.empty(value.shape, dtype=case.dtype, device=device)
            if not value.is_floating_point():
                made = torch.arange(value.numel(), device=device).view(value.shape)
            elif made.dim() > 1:
                made = torch.empty(value.shape, device=device).normal_(std=deviation).to(case.dtype)  # alike in every precision
            else:
                made.fill_(float(name.endswith("weight")))
            put_packed(module, name, made)
    return base


def status(key: str) -> int:
    """Bytes of this process: VmRSS now, VmHWM at most since `forget`."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(key))


def forget() -> None:
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)  # freed memory that the allocator keeps belongs to no phase
    Path("/proc/self/clear_refs").write_text("5")


def cache_of(base: BaseModel, config: lb.TrainingConfig) -> LatentCache:
    side, channels = (config.resolution or 0) // base.pixels_per_latent, base.unet.config.in_channels
    mean = torch.randn(1, 4, channels, side, side, device=base.device)
    ids = torch.full((4, 6), 512.0, device=base.device) if base.family.time_ids else None
    text = {"a photo": base.encode_text(["a photo"])}
    pictures = LatentSet(mean, torch.ones_like(mean), ("a photo",) * 4, ids)
    bucket = Bucket(pictures, pictures if config.prior_loss_weight > 0 else None)  # as your own class images
    return LatentCache((bucket,), base.scaling_factor, text)


def run(case: Case) -> dict[str, Any]:
    config = lb.TrainingConfig(
        steps=STEPS,
        prior_loss_weight=0.0,
        resolution=case.resolution,
        batch_size=case.batch_size,
        gradient_checkpointing=case.gradient_checkpointing,
        pictures_at_a_time=case.batch_size if case.batch_size > 1 else None,
    )
    with torch.no_grad():
        small = BaseModel.load("toybox", device="cpu", dtype=case.dtype)
        small_cache = cache_of(small, replace(config, resolution=64))
    for _ in training_steps(small, small_cache, config=replace(config, resolution=64, steps=2)):
        pass
    del small, small_cache
    forget()
    before = status("VmRSS")
    base = base_of(case)
    with torch.no_grad():
        cache = cache_of(base, config)
    measured = {}
    forget()
    for _ in training_steps(base, cache, config=config):
        pass
    measured["training"] = status("VmHWM") - before
    few = pictures_at_a_time(case.resolution)
    forget()
    with torch.no_grad():
        base.encode_images(torch.zeros(1, 3, case.resolution, case.resolution))
    measured["through the VAE"] = status("VmHWM") - before
    forget()
    generate_images(base.pipeline, "a photo", range(few), steps=1, size=case.resolution, batch_size=few)
    measured["drawing class images"] = status("VmHWM") - before
    forecast = next(one for one in plan(base, config=config, device="cpu").forecasts if not one.settings)
    with_prior = replace(config, prior_loss_weight=1.0, class_images=1, pictures_at_a_time=None)
    drawing = next(one for one in plan(base, config=with_prior, device="cpu").forecasts if not one.settings)
    predicted = {**drawing.phases, "training": forecast.phases["training"]}
    return {
        phase: {"measured_gb": measured[phase] / 1e9, "predicted_gb": predicted[phase] / 1e9}
        | {"error": predicted[phase] / measured[phase] - 1}
        for phase in measured
    }


def start() -> None:
    base = base_of(Case("sd1", 256))
    for weight in (0.0, 1.0):
        config = settled(lb.TrainingConfig(resolution=256, prior_loss_weight=weight), base, 5)
        began = time.perf_counter()
        assert is_ample(base, lb.LoraSpec(), config, photos=5)
        asked = time.perf_counter()
        plan(base, config=config, photos=5)
        print(f"prior_loss_weight {weight:g}: {asked - began:.2f} s, counted {time.perf_counter() - asked:.2f} s", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--one", choices=list(CASES), help=argparse.SUPPRESS)  # for the process of a case
    parser.add_argument("--json", type=Path, help="where to write everything")
    parser.add_argument("--start", action="store_true", help="time planning at the start of a run")
    arguments = parser.parse_args()
    if arguments.start:
        start()
        return
    if arguments.one:
        print(json.dumps(run(CASES[arguments.one])))
        return
    found = {}
    for name in arguments.cases:
        with tempfile.TemporaryFile("w+") as errors:
            done = subprocess.run([sys.executable, __file__, "--one", name], stdout=subprocess.PIPE, stderr=errors, text=True)
            errors.seek(0)
            if done.returncode:
                sys.exit(f"{name}: {errors.read()[-2000:]}")
        found[name] = json.loads(done.stdout.splitlines()[-1])
        cells = [
            f"{what} {row['predicted_gb']:.3f} / {row['measured_gb']:.3f} GB ({row['error']:+.0%})"
            for what, row in found[name].items()
        ]
        print(f"{name}: " + "; ".join(cells), flush=True)
    if arguments.json:
        arguments.json.write_text(json.dumps(found, indent=1))


if __name__ == "__main__":
    main()
