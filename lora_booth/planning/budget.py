"""The budget: free memory of a device, and an upper bound on what a training needs."""

from __future__ import annotations

import math
import platform
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import nn

from ..base.base_model import BaseModel
from ..base.generation import pictures_at_a_time
from ..base.quantization import storage_bytes, tensors_of, weight_shape
from ..config import LoraSpec, SettledConfig, TrainingConfig
from ..errors import SettingsError, counted

GB = 1e9  # bytes
CPU_CONTEXT = 0.07 * GB  # kernels that oneDNN and others compile; measured by benchmarks/plan.py
CUDA_CONTEXT = 0.75 * GB  # of CUDA itself; 0.72 to 0.90 on an H100 with PyTorch 2.11
CUDA_WORKSPACES = 0.2 * GB  # of PyTorch's matrix products; 0.2 to 0.4 on the same machine
RESERVE = 0.15  # share of a phase's memory without its weights; the largest error of benchmarks/plan.py is 0.10
ADAPTER_BYTES = 40  # per value of an adapter, at most: itself, gradient, optimizer, copies to roll back to, padding


@dataclass(frozen=True)
class Machine:
    """The machine to train on."""

    name: str
    type: str  # "cuda", "cpu", "mps"
    budget: float  # bytes
    context: float  # bytes of the budget that the device and its libraries take


GPUS = {"T4": 15, "L4": 22, "RTX 3090": 24, "RTX 4090": 24, "A100": 40, "H100": 80, "H200": 141}  # usable GB
WITHOUT_BF16 = ("T4",)


def gpu_named(name: str, vram_gb: float | None = None) -> Machine:
    """A GPU of the table by the last word of its name: "T4", "tesla t4", "RTX-4090". Raises SettingsError."""
    words = name.upper().replace("_", " ").replace("-", " ").split()
    for label, size in GPUS.items():
        if words[-1:] == label.split()[-1:]:
            return Machine(label, "cuda", GB * (vram_gb or size), CUDA_CONTEXT + CUDA_WORKSPACES)
    raise SettingsError(f"gpu {name!r} is unknown; choose from {', '.join(GPUS)}")


def this_machine(base: object, device: torch.device, vram_gb: float | None = None) -> Machine:
    """This machine's device. vram_gb: the budget, in place of what is free"""
    context = {"cuda": CUDA_WORKSPACES, "cpu": CPU_CONTEXT}.get(device.type, 0.0)
    context += CUDA_CONTEXT if device.type == "cuda" and vram_gb is not None else 0.0
    budget = available_bytes(base, device) if vram_gb is None else vram_gb * GB
    return Machine(device_name(device), device.type, budget, context)


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {counted(torch.get_num_threads(), 'thread')}"


def available_bytes(base: object, device: torch.device) -> int:
    """Bytes for a training: what is free, and what the base's modules in memory already take."""
    modules = base.loaded.values() if isinstance(base, BaseModel) else ()
    taken = (tensor for module in modules for tensor in tensors_of(module) if tensor.device.type == device.type)
    return free_bytes(device) + storage_bytes(taken)


def free_bytes(device: torch.device) -> int:
    """Free bytes: of the GPU, or of the memory of this machine or its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    free = int(psutil.virtual_memory().available)
    if device.type == "mps":
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min([free, *container_free()])


def container_free() -> list[int]:
    """Free bytes below the limit of a Linux container (cgroup v2); [] without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [int(limit) - int(used) + int(cached.get("inactive_file", 0))] if limit.isdigit() else []


# --- an upper bound ------------------------------------------------------------------------------------------------


def is_ample(base: BaseModel, lora: LoraSpec, config: SettledConfig, *, photos: int) -> bool:
    """Whether the free memory is more than this training can need, so that nothing need be counted."""
    return upper_bound(base, lora, config, photos=photos) <= available_bytes(base, base.device)


def subjects_at_once(base: BaseModel, lora: LoraSpec, config: SettledConfig, *, photos: int, most: int) -> int:
    """How many runs, up to `most`, may share a pass in memory that is certainly enough. photos: of all of them

    On a GPU 1: what sharing gains there was not measured yet.
    """
    if base.device.type != "cpu":
        return 1
    shared = (count for count in range(most, 1, -1) if is_ample(base, lora, of_several(config, count), photos=photos))
    return next(shared, 1)


def of_several(config: SettledConfig, count: int) -> SettledConfig:
    """The settings of one run whose batches and class images are those of `count` runs."""
    parts = config.pictures_at_a_time and count * config.pictures_at_a_time
    class_images = count * config.class_images
    return replace(config, batch_size=count * config.batch_size, class_images=class_images, pictures_at_a_time=parts)


def upper_bound(base: BaseModel, lora: LoraSpec, config: SettledConfig, *, photos: int) -> float:
    """Bytes, with the reserve, that no phase of this training exceeds: computed from layer sizes, in milliseconds.

    Up to several times the counted memory.
    """
    resolution, itemsize, unet = config.resolution, base.dtype.itemsize, base.structure["unet"]
    weights = storage_bytes(tensor for module in base.modules.values() for tensor in tensors_of(module))
    adapted = base.structure.values() if lora.text_encoder else (unet,)
    values = sum(math.prod(weight_shape(m)[1:]) + weight_shape(m)[0] for one in adapted for m in layers_of(one).values())
    adapter = lora.rank * values * ADAPTER_BYTES
    pictures = batch_of(config)
    size = min(config.pictures_at_a_time or pictures, pictures)
    each, largest = layer_values(base, resolution)
    step = size * (each + 4 * largest) * itemsize
    if lora.text_encoder:
        step += size * text_values(base) * itemsize
    few = pictures_at_a_time(resolution)
    sampling = 2 * few * 10 * largest * itemsize  # with guidance
    vae = few * vae_values(base, resolution) * 4  # in fp32 where fp16 overflows
    images = (config.class_images + photos) * 3 * resolution**2
    context = CUDA_CONTEXT + CUDA_WORKSPACES if base.device.type == "cuda" else CPU_CONTEXT
    beside = adapter + cache_bytes(base, config, photos=photos) + images + context + max(step, sampling, vae)
    return weights + storage_bytes(base.shell.vae.parameters()) + (1 + RESERVE) * beside


def layers_of(model: nn.Module) -> dict[str, nn.Module]:
    """Linear layers and convolutions by path."""
    return {path: layer for path, layer in model.named_modules() if isinstance(layer, nn.Linear | nn.Conv2d)}


def layer_values(base: BaseModel, resolution: int) -> tuple[int, int]:
    """For one picture (pixels): the values that all layers of the U-Net read and write, and the most of one layer."""
    unet, side, tokens = base.structure["unet"], resolution // base.pixels_per_latent, base.tokenizer.model_max_length
    levels = len(unet.config.block_out_channels)  # type: ignore[union-attr, arg-type]
    every, largest = 0, 0
    for path, layer in layers_of(unet).items():
        once = "time_emb" in path or "add_embedding" in path  # once per picture
        pixels = 1 if once else max(math.ceil(side / 2 ** halvings(path, levels)) ** 2, tokens if "attn" in path else 1)
        values = pixels * sum(weight_shape(layer)[:2])
        every, largest = every + values, max(largest, values)
    return every, largest


def halvings(path: str, levels: int) -> int:
    """How often the picture is halved where this module of a U-Net works. levels: its resolutions"""
    part, number = (*path.split("."), "0")[:2]
    if part == "up_blocks":
        return max(0, levels - 1 - int(number) - ("upsamplers" in path))  # a sampler works on the larger picture
    return {"down_blocks": int(number) if number.isdigit() else 0, "mid_block": levels - 1}.get(part, 0)


def text_values(base: BaseModel) -> int:
    """For one prompt: twice the values that all layers of the text encoders read and write, and the attention's scores."""
    tokens, total = base.tokenizer.model_max_length, 0
    for name, encoder in base.structure.items():
        if name != "unet":
            total += 2 * tokens * sum(sum(weight_shape(layer)) for layer in layers_of(encoder).values())
            config = encoder.config
            total += 3 * config.num_hidden_layers * config.num_attention_heads * tokens**2  # type: ignore[union-attr, operator]
    return total


def vae_values(base: BaseModel, resolution: int) -> int:
    """For one picture: six of the largest maps of features."""
    channels = base.shell.vae.config.block_out_channels
    wide = [(*channels[1:], channels[-1])[level] * (resolution // 2**level) ** 2 for level in range(len(channels))]
    return int(6 * max(wide))


def cache_bytes(base: BaseModel, config: SettledConfig, *, photos: int) -> int:
    """The `LatentCache`: means and deviations of the latents in float32, and two text conditions."""
    side, unet = config.resolution // base.pixels_per_latent, base.structure["unet"].config
    pictures = photos + (config.class_images if config.prior_loss_weight > 0 else 0)
    latents = pictures * (2 if config.flip else 1) * 2 * 4 * unet.in_channels * side**2
    return int(latents + 2 * base.tokenizer.model_max_length * unet.cross_attention_dim * base.dtype.itemsize)


def batch_of(config: TrainingConfig) -> int:
    """Pictures of a batch."""
    return config.batch_size * (2 if config.prior_loss_weight > 0 else 1)
