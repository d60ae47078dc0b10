"""What a device can do: known GPUs as a table, this machine's own by a short measurement that is kept."""

from __future__ import annotations

import platform
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch

from ..cache import key_of, read_entry, write_entry
from ..errors import SettingsError

GB = 1e9  # bytes
CPU_CONTEXT = 0.07 * GB  # compiled kernels of oneDNN and the like, beyond the imports
CUDA_CONTEXT = 0.75 * GB  # what CUDA itself takes of a GPU; 0.72 to 0.90 on an H100 with PyTorch 2.11
CUDA_WORKSPACES = 0.2 * GB  # what PyTorch keeps for matrix products of its streams; 0.2 to 0.4 there


@dataclass(frozen=True)
class Rates:
    """How fast a device computes what training consists of."""

    flops: float  # a second, of matrix products, convolutions and attention, in the precision of the base
    bandwidth: float  # bytes a second, of all other kernels
    kernel_seconds: float  # of the host, for each kernel that it starts
    spread: float  # times and over this: where a predicted time may lie
    source: str  # for people


@dataclass(frozen=True)
class Gpu:
    """From the maker's data sheet: dense tensor-core rate with fp32 accumulation, memory bandwidth."""

    label: str
    memory_gb: float  # usable
    half_tflops: float
    fp32_tflops: float
    bandwidth_gb: float  # a second
    bf16: bool = True


GPUS = {
    "t4": Gpu("T4", 15, 65, 8.1, 320, bf16=False),
    "l4": Gpu("L4", 22, 121, 30, 300),
    "3090": Gpu("RTX 3090", 24, 71, 35.6, 936),
    "4090": Gpu("RTX 4090", 24, 165, 82.6, 1008),
    "a100": Gpu("A100 40 GB", 40, 312, 19.5, 1555),
    "h100": Gpu("H100", 80, 990, 67, 3350),
    "h200": Gpu("H200", 141, 790, 67, 4800),  # 990 on its data sheet, 790 measured
}
EFFICIENCY = 0.5  # of a data sheet's figures, in a network's kernels: an estimate
KERNEL_SECONDS = 10e-6  # of a present-day host
PUBLISHED_SPREAD = 2.0
MEASURED_SPREAD = 2.0
KIND = "counts"  # of entries in the cache


def gpu_named(name: str) -> Gpu:
    words = name.lower().replace("_", " ").replace("-", " ").split()
    known = GPUS.get(words[-1]) if words else None
    if known is None:
        raise SettingsError(f"gpu {name!r} is not known; known are {', '.join(gpu.label for gpu in GPUS.values())}")
    return known


def published_rates(gpu: Gpu, dtype: torch.dtype) -> Rates:
    tflops = gpu.fp32_tflops if dtype == torch.float32 else gpu.half_tflops
    source = f"data sheet at {EFFICIENCY:.0%}"
    return Rates(
        EFFICIENCY * tflops * 1e12, EFFICIENCY * gpu.bandwidth_gb * 1e9, KERNEL_SECONDS, spread=PUBLISHED_SPREAD, source=source
    )


# --- this machine --------------------------------------------------------------------------------------------------


def device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return torch.cuda.get_device_name(device)
    return f"{platform.processor() or platform.machine()}, {torch.get_num_threads()} thread(s)"


def free_bytes(device: torch.device) -> int:
    """What a process may still take: of the GPU beside others, or of the memory of this machine or its container."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    free = int(psutil.virtual_memory().available)
    if device.type == "mps":
        free = min(free, torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory())
    return min([free, *container_free()])


def container_free() -> list[int]:
    """What the limit of a Linux container leaves; [] without one."""
    folder = Path("/sys/fs/cgroup")
    try:
        limit, used = ((folder / name).read_text().strip() for name in ("memory.max", "memory.current"))
        cached = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
    except (OSError, ValueError):
        return []
    return [int(limit) - int(used) + int(cached.get("inactive_file", 0))] if limit.isdigit() else []


def measured_rates(device: torch.device, dtype: torch.dtype) -> Rates:
    """From the cache, or from kernels of Stable Diffusion's sizes run now for about a second."""
    key = key_of(of="rates", device=device_name(device), dtype=str(dtype), torch=torch.__version__)
    kept = read_entry(KIND, key)
    if kept is None or kept.keys() != {"rates"}:
        kept = {"rates": torch.tensor(measure(device, dtype), dtype=torch.float64)}
        write_entry(KIND, key, kept)
    flops, bandwidth, kernel_seconds = kept["rates"].tolist()
    return Rates(flops, bandwidth, kernel_seconds, spread=MEASURED_SPREAD, source="measured here")


@torch.no_grad()
def measure(device: torch.device, dtype: torch.dtype) -> tuple[float, float, float]:
    """`Rates` of kernels of SD's sizes: a linear layer and a convolution with half of the arithmetic each, as in its U-Net; an
    addition that no cache holds; the smallest kernel, one after another."""
    big = device.type == "cuda"
    count = 8 if big else 1
    rows, wide, side = 4096 * count // (1 if big else 4), 1280, 64 if big else 32
    left, right = torch.randn(rows, wide, device=device).to(dtype), torch.randn(wide, wide, device=device).to(dtype)
    picture = torch.randn(count, 320, side, side, device=device).to(dtype)
    kernel = torch.randn(320, 320, 3, 3, device=device).to(dtype)
    product, convolution = 2 * rows * wide * wide, 2 * count * side * side * 320 * 320 * 9
    linear_rate = product / seconds(lambda: left @ right, device)
    convolution_rate = convolution / seconds(lambda: torch.nn.functional.conv2d(picture, kernel, padding=1), device)
    large = torch.empty((256 if big else 32) * 2**20, dtype=torch.uint8, device=device).view(torch.int32)
    bandwidth = 2 * large.nbytes / seconds(lambda: large + 1, device)
    small = torch.zeros(8, device=device)

    def hundred() -> None:
        for _ in range(100):
            small.add_(1)

    mean = 2 / (1 / linear_rate + 1 / convolution_rate)
    return mean, bandwidth, seconds(hundred, device) / 100


def seconds(work: Callable[[], object], device: torch.device, *, at_least: float = 0.2) -> float:
    """Of one call: the least of several."""

    def finish() -> None:
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        elif device.type == "mps":
            torch.mps.synchronize()

    work()
    finish()
    best, spent = float("inf"), 0.0
    while spent < at_least:
        started = time.perf_counter()
        work()
        finish()
        took = time.perf_counter() - started
        best, spent = min(best, took), spent + took
    return best
