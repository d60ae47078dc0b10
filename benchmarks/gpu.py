"""The training step on a CUDA GPU, one process: time, share of the measured matrix rate, memory against `plan`'s prediction.

python benchmarks/gpu.py [--cases NAME ...] [--steps 40] [--out DIR]        random weights in the real shapes, made on the GPU
python benchmarks/gpu.py --cases sd1 --with '{"capture": false}' --profile  any field of TrainingConfig; and what the GPU did
python benchmarks/gpu.py --dry --steps 4                                    tiny shapes, also on a CPU: does it run?

Seconds a step are the mean between two waits for the GPU, after ten steps. "used" is the most that the process held of the GPU
in all, CUDA itself included (`torch.cuda.mem_get_info` after the steps): one case in each process tells it best, as gpu_day.py
runs them.
"""

from __future__ import annotations

import argparse
import gc
import json
import sys
import time
from contextlib import ExitStack
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from plan import Case, base_of, cache_of

import lora_booth as lb
from lora_booth.planning.planning import plan
from lora_booth.training.training_run import TrainingRun

WARM = 10  # steps that are not timed: kernels are compiled, the step is recorded; of few steps a quarter


@dataclass(frozen=True)
class GpuCase:
    case: Case
    settings: dict[str, Any] = field(default_factory=dict)
    target: str = ""


BF16 = torch.bfloat16
DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
WITH_PRIOR = {"prior_loss_weight": 1.0}
CASES = {
    "sd1": GpuCase(Case("sd1", 512, BF16), target="<= 8 ms, <= 3 GB"),
    "sd1 batch 8": GpuCase(Case("sd1", 512, BF16, batch_size=8), target=">= 50 % of the matrix rate"),
    "sd1 checkpointed": GpuCase(Case("sd1", 512, BF16, gradient_checkpointing=True)),
    "sd2": GpuCase(Case("sd2", 768, BF16)),
    "sdxl": GpuCase(Case("sdxl", 1024, BF16), target="<= 40 ms, <= 10.5 GB"),
    "sdxl checkpointed": GpuCase(Case("sdxl", 1024, BF16, gradient_checkpointing=True), target="<= 7 GB"),
    "sdxl nf4 checkpointed": GpuCase(Case("sdxl", 1024, BF16, gradient_checkpointing=True, quantize="nf4"), target="<= 3.6 GB"),
    "sdxl int8 checkpointed": GpuCase(Case("sdxl", 1024, BF16, gradient_checkpointing=True, quantize="int8")),
    "sd1 fp16 with class images": GpuCase(Case("sd1", 512, torch.float16), WITH_PRIOR, "in 15 GB"),
    "sd1 fp32 with class images": GpuCase(Case("sd1", 512), WITH_PRIOR, "the losses of fp16"),
    "sdxl fp16 with class images": GpuCase(
        Case("sdxl", 1024, torch.float16), WITH_PRIOR | {"pictures_at_a_time": 1}, "in 15 GB"
    ),
    "sdxl fp32 with class images": GpuCase(Case("sdxl", 1024), WITH_PRIOR | {"pictures_at_a_time": 1}, "the losses of fp16"),
    "sd1 adamw8bit": GpuCase(Case("sd1", 512, BF16), {"optimizer": "adamw8bit"}),
    "sd1 xformers": GpuCase(Case("sd1", 512, BF16), {"attention": "xformers"}),
    "sd1 not recorded": GpuCase(Case("sd1", 512, BF16), {"capture": False}),
    "sd1 fp32": GpuCase(Case("sd1", 512, torch.float32)),
}


def matrix_rate(dtype: torch.dtype) -> float:
    """FLOP/s of a large product."""
    side = 8192 if DEVICE == "cuda" else 256
    a, b = torch.randn(2, side, side, device=DEVICE).to(dtype)
    for _ in range(3):
        a @ b
    wait()
    began = time.perf_counter()
    for _ in range(10):
        a @ b
    wait()
    return 10 * 2 * side**3 / (time.perf_counter() - began)


def wait() -> None:
    if DEVICE == "cuda":
        torch.cuda.synchronize()


def settings_of(one: GpuCase, steps: int, more: dict[str, Any]) -> lb.TrainingConfig:
    case = one.case
    config = lb.TrainingConfig(
        steps=steps,
        prior_loss_weight=0.0,
        class_images=1,
        learning_rate=1e-4,
        warmup_steps=0,
        resolution=case.resolution,
        batch_size=case.batch_size,
        gradient_checkpointing=case.gradient_checkpointing,
    )
    return replace(config, **one.settings, **more)


def others() -> int:
    """Bytes of the GPU that PyTorch's allocator does not hold: CUDA itself with its kernels, and who else is on the GPU."""
    if DEVICE == "cpu":
        return 0
    free, total = torch.cuda.mem_get_info()
    return total - free - torch.cuda.memory_reserved()


def run(one: GpuCase, steps: int, more: dict[str, Any], profile: Path | None, *, planned: bool) -> dict[str, Any]:
    gc.collect()
    torch.cuda.empty_cache()
    torch.manual_seed(0)  # the same weights and latents for each precision
    base = base_of(one.case, DEVICE)
    config, said = settings_of(one, steps, more), []
    with torch.no_grad():
        cache = cache_of(base, config)
    with ExitStack() as stack:
        stack.enter_context(base.only_unet_on_device())
        gc.collect()
        torch.cuda.empty_cache()
        if DEVICE == "cuda":
            torch.cuda.reset_peak_memory_stats()
        began = time.perf_counter()
        training = TrainingRun(base, cache, lb.LoraSpec(rank=8), config, say=said.append)
        stack.callback(training.close)
        losses, marks, first, warm = [], [], 0.0, max(2, min(WARM, steps // 4))
        for index in range(steps):
            if index in (1, warm):
                wait()
                first = first or time.perf_counter() - began
                marks.append(time.perf_counter())
            losses.append(next(training).loss_tensor)
        wait()
        step = (time.perf_counter() - marks[-1]) / (steps - warm)
        allocated, reserved = torch.cuda.max_memory_allocated(), torch.cuda.max_memory_reserved()
        beside = others()
        recorded = bool(getattr(training.backward, "_recordings", None))
        if profile is not None:
            training.loop.config = replace(training.loop.config, steps=steps + 3)
            try:
                table(training, profile)
            except Exception as error:  # what was measured is worth more
                said.append(f"no profile: {error}")
    prediction = {}
    if planned:
        one_way = next(one for one in plan(base, config=config).forecasts if not one.settings)
        prediction = {
            "tflops": one_way.flops / step / 1e12,
            "predicted_gb": one_way.phases["training"] / 1e9,
        }
    del training, base, cache
    curve = [round(float(loss), 5) for loss in losses]
    return prediction | {
        "ms": 1e3 * step,
        "first_step_s": first,
        "recorded": recorded,
        "allocated_gb": allocated / 1e9,
        "used_gb": (reserved + beside) / 1e9,
        "others_gb": beside / 1e9,
        "losses": curve,
        "said": said,
    }


def table(training: TrainingRun, path: Path) -> None:
    """The kernels of three steps, by their time."""
    from torch.profiler import ProfilerActivity

    with torch.profiler.profile(activities=[getattr(ProfilerActivity, DEVICE.upper())]) as found:
        for _ in range(3):
            next(training)
        wait()
    rows = sorted(found.key_averages(), key=lambda row: -row.self_device_time_total)
    total, count = sum(row.self_device_time_total for row in rows), sum(row.count for row in rows)
    lines = [f"{total / 3e3:.3f} ms of kernels a step, {count / 3:.0f} kernels"]
    lines += [f"{row.self_device_time_total / 3e3:9.4f} ms {row.count / 3:7.1f} x  {row.key[:150]}" for row in rows[:70]]
    path.write_text("\n".join(lines))
    print("\n".join(line[:110] for line in lines[:60]))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--cases", nargs="*", default=list(CASES), choices=list(CASES), metavar="NAME")
    parser.add_argument("--steps", type=int, default=40)
    parser.add_argument("--with", dest="more", type=json.loads, default={}, help="fields of TrainingConfig as JSON")
    parser.add_argument("--cap", type=float, help="GB that PyTorch may take, as on a smaller GPU")
    parser.add_argument("--profile", action="store_true", help="the GPU's kernels by their time")
    parser.add_argument("--no-plan", action="store_true", help="without the prediction, whose counting takes a while")
    parser.add_argument("--cudnn-benchmark", action="store_true", help="let cuDNN time its ways to compute each convolution")
    parser.add_argument("--no-cudnn-attention", action="store_true", help="PyTorch's flash attention in place of cuDNN's")
    parser.add_argument("--no-kernels", action="store_true", help="PyTorch's kernels in place of Triton's")
    parser.add_argument("--dry", action="store_true", help="tiny shapes, on a CPU if there is no GPU")
    parser.add_argument("--out", type=Path, help="folder for JSON lines and profiles")
    given = parser.parse_args()
    if DEVICE == "cpu" and not given.dry:
        sys.exit("no CUDA GPU here")
    if given.out is not None:
        given.out.mkdir(parents=True, exist_ok=True)
    if given.cap is not None and DEVICE == "cuda":
        total = torch.cuda.get_device_properties(0).total_memory
        torch.cuda.set_per_process_memory_fraction(given.cap * 1e9 / total)
    if given.no_kernels:
        from lora_booth.kernels import dispatch as kernels

        kernels.works_on = lambda *_: False  # type: ignore[assignment]
    torch.backends.cuda.enable_cudnn_sdp(not given.no_cudnn_attention)
    torch.backends.cudnn.benchmark = given.cudnn_benchmark
    rate = {dtype: matrix_rate(dtype) for dtype in (torch.bfloat16, torch.float16)}
    rate[torch.float32] = rate[torch.bfloat16]
    device = torch.cuda.get_device_name() if DEVICE == "cuda" else "CPU"
    print(f"{device}, torch {torch.__version__}, {rate[BF16] / 1e12:.4g} TFLOP/s bf16", flush=True)
    failed = []
    for name in given.cases:
        one = CASES[name]
        if given.dry:
            one = replace(one, case=replace(one.case, resolution=128, tiny=True))
        place = given.out / f"{name.replace(' ', '-')}.txt" if given.out is not None and given.profile else None
        try:
            found = run(one, given.steps, given.more, place, planned=not given.no_plan)
        except Exception as error:  # the other cases are worth their time
            import traceback

            traceback.print_exc()
            found = {"error": str(error)[:300]}
            failed.append(f"{name}: {str(error)[:200]}")
        found |= {"case": name, "with": given.more, "cap": given.cap, "kernels": not given.no_kernels, "target": one.target}
        if "ms" in found:
            more = ""
            if "tflops" in found:
                found["share"] = found["tflops"] * 1e12 / rate[one.case.dtype]
                more = f"{found['tflops']:.0f} TFLOP/s ({found['share']:.0%} of the matrix rate), "
                more += f"plan {found['predicted_gb']:.2f} GB, "
            print(
                f"{name}: {found['ms']:.2f} ms a step, {more}"
                f"{'recorded' if found['recorded'] else 'not recorded'}, first step {found['first_step_s']:.1f} s, "
                f"{found['used_gb']:.2f} GB used (CUDA {found['others_gb']:.2f}, allocated {found['allocated_gb']:.2f}), "
                f"loss {found['losses'][0]:.3f} -> {found['losses'][-1]:.3f}; target {one.target or '-'}",
                flush=True,
            )
        if given.out is not None:
            with open(given.out / "gpu.jsonl", "a") as file:
                file.write(json.dumps(found) + "\n")
    if failed:
        sys.exit(f"failed: {'; '.join(failed)}")


if __name__ == "__main__":
    main()
