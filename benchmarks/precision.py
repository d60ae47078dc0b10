"""Does a precision or a quantized base change what is learnt? The toybox learns a subject in each, with the same draws;
another seed is the noise.

python benchmarks/precision.py [--steps 500] [--device cuda] [--cases fp16 ...]
"""

from __future__ import annotations

import argparse
import importlib.util
import tempfile
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

import lora_booth as lb
from lora_booth.cli.demo import score, write_photos
from lora_booth.config import Quantization
from lora_booth.toybox.world import HELD_OUT

NAME = "olga"
WINDOWS = 5
CASES: tuple[tuple[str, torch.dtype, Quantization | None, int], ...] = (
    ("fp32", torch.float32, None, 0),
    ("bf16", torch.bfloat16, None, 0),
    ("bf16, int8", torch.bfloat16, "int8", 0),
    ("bf16, nf4", torch.bfloat16, "nf4", 0),
    ("fp16", torch.float16, None, 0),
    ("fp32, seed 1", torch.float32, None, 1),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--cases", nargs="*", default=[case[0] for case in CASES], help="[all]; fp32 is always among them")
    given = parser.parse_args()
    curves: dict[str, np.ndarray] = {}
    with tempfile.TemporaryDirectory() as folder:
        photos = write_photos(NAME, Path(folder), count=5)
        subject = lb.Subject.from_folder(photos, token="sks", class_noun=HELD_OUT[NAME].class_noun)
        for name, dtype, quantize, seed in CASES:
            if name not in ("fp32", *given.cases):
                continue
            if quantize == "nf4" and importlib.util.find_spec("bitsandbytes") is None:
                continue
            base = lb.BaseModel.load("toybox", dtype=dtype, device=given.device, quantize=quantize)
            config = replace(lb.TrainingConfig(), steps=given.steps, seed=seed, class_images=20)
            losses: list[torch.Tensor] = []
            began = time.perf_counter()
            adapter = lb.train(base, subject, config=config, progress=False, on_step=lambda s: losses.append(s.loss_tensor))  # noqa: B023
            seconds = time.perf_counter() - began
            curve = torch.stack(losses).float().cpu().numpy()
            curves[name] = np.array([part.mean() for part in np.array_split(curve, WINDOWS)])
            off = np.abs(curves[name] / curves["fp32"] - 1)
            identity_right = score(base, adapter, NAME, seeds=range(1)).best.mean("identity")
            print(
                f"{name:13s} mean loss {' '.join(f'{value:.4f}' for value in curves[name])}; "
                f"from fp32 at most {off.max():.1%}; identity {identity_right:.2f}; {seconds:.1f} s",
                flush=True,
            )


if __name__ == "__main__":
    main()
