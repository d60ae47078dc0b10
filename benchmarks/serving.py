"""Many adapters on one live pipeline: time to load, switch and unload one of about 6 MB, and of requests in one batch.

python benchmarks/serving.py                      a U-Net and text encoder of SD 1.5's shape (random), then the toybox
python benchmarks/serving.py --loaded 8 --repeats 20

Times are medians on the CPU; no picture is drawn with the SD 1.5 shape, since its weights are not there.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

import lora_booth as lb
from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import Card, LoraFactors
from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec
from lora_booth.injection.paths import module_path, target_paths

SHARED = {"layers_per_block": 2, "sample_size": 64, "attention_head_dim": 8, "cross_attention_dim": 768}
RANK = 16  # of the layers of the attention: a file of 6.4 MB
PROMPTS = ("a photo of sks dog in the snow", "a photo of sks dog on the beach")


def sd15_shape() -> Any:
    """A pipeline with the layers of SD 1.5. Their weights are memory that nobody has written to."""
    from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

    words = CLIPTokenizer(vocab={"<|startoftext|>": 0, "<|endoftext|>": 1, "a</w>": 2}, merges=[], model_max_length=77)
    with torch.device("meta"):
        unet = UNet2DConditionModel(**SHARED)
        text = CLIPTextModel(CLIPTextConfig(hidden_size=768, intermediate_size=3072, num_attention_heads=12))
        vae = AutoencoderKL()
    modules = [module.to_empty(device="cpu").requires_grad_(False).eval() for module in (unet, text, vae)]
    parts = dict(zip(("unet", "text_encoder", "vae"), modules, strict=True))
    scheduler = DDIMScheduler(beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear")
    extras = {"safety_checker": None, "feature_extractor": None, "requires_safety_checker": False}
    return StableDiffusionPipeline(**parts, tokenizer=words, scheduler=scheduler, **extras)


def random_adapter(base: BaseModel, name: str, rank: int, seed: int) -> Adapter:
    generator = torch.Generator().manual_seed(seed)
    modules = {}
    for component, paths in target_paths(base, LoraSpec(rank=rank)).items():
        for path in paths:
            weight = base.components[component].get_submodule(path).weight
            down = torch.randn(rank, weight.shape[1], generator=generator) * 0.02
            up = torch.randn(weight.shape[0], rank, generator=generator) * 0.02
            modules[module_path(component, path)] = LoraFactors(down, up, float(rank))
    return Adapter(modules, Card(family=base.family.name, title=name, rank=rank, alpha=float(rank)))


def timed(job: Callable[[], object]) -> float:
    """Milliseconds."""
    started = time.perf_counter()
    job()
    return (time.perf_counter() - started) * 1000


def switching(loaded: int, repeats: int, folder: Path) -> dict[str, Any]:
    base = BaseModel.from_pipeline(sd15_shape(), name="SD 1.5 shape")
    files = [random_adapter(base, f"a{i}", RANK, i).save(folder / f"a{i}.safetensors") for i in range(loaded + 1)]
    times: dict[str, list[float]] = {name: [] for name in ("read", "load", "switch", "unload")}
    with lb.Serving(base) as live:
        for i in range(loaded):
            live.load(f"a{i}", Adapter.load(files[i]))
        for i in range(repeats):
            started = time.perf_counter()
            adapter = Adapter.load(files[-1])
            times["read"].append((time.perf_counter() - started) * 1000)
            times["load"].append(timed(lambda adapter=adapter: live.load("new", adapter)))
            times["switch"].append(timed(lambda i=i: live.use({f"a{i % loaded}": 1.0})))
            times["switch"].append(timed(lambda: live.use({"new": 0.8})))
            times["unload"].append(timed(lambda: live.unload("new")))
    report: dict[str, Any] = {"megabytes": round(files[0].stat().st_size / 1e6, 2), "modules": len(adapter.modules)}
    report |= {"loaded beside it": loaded, "repeats": repeats}
    return report | {f"{name} ms": round(statistics.median(values), 1) for name, values in times.items()}


def batching(repeats: int, steps: int) -> dict[str, Any]:
    """Four requests, three adapters and one without: in one batch, and one by one, on the toybox."""
    base = BaseModel.load("toybox", device="cpu")
    names = [f"a{i}" for i in range(3)]
    requests = [lb.Request(PROMPTS[i % 2], {} if i == 3 else {names[i]: 0.5}, seed=i) for i in range(4)]
    together, apart = [], []
    with lb.Serving(base) as live:
        for i, name in enumerate(names):
            live.load(name, random_adapter(base, name, 4, i))
        live.generate(requests, steps=1)  # what is done once only
        for _ in range(repeats):
            together.append(timed(lambda: live.generate(requests, steps=steps)))
            apart.append(timed(lambda: [live.generate([request], steps=steps) for request in requests]))
    both = {"one batch ms": round(statistics.median(together)), "one by one ms": round(statistics.median(apart))}
    return {"requests": len(requests), "steps": steps} | both


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--loaded", type=int, default=3, help="adapters that are on the pipeline all the time")
    parser.add_argument("--repeats", type=int, default=10)
    parser.add_argument("--steps", type=int, default=20)
    arguments = parser.parse_args()
    with TemporaryDirectory() as folder:
        print(json.dumps(switching(arguments.loaded, arguments.repeats, Path(folder))), flush=True)
    print(json.dumps(batching(max(3, arguments.repeats // 3), arguments.steps)), flush=True)


if __name__ == "__main__":
    main()
