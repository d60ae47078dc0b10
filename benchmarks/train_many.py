"""Subjects an hour: train_many, several in each pass, against one by one; and how far their adapters differ.

python benchmarks/train_many.py                                    8 subjects on the toybox, 50 steps, with class images
python benchmarks/train_many.py --subjects 8 --prior 0 --threads 1
python benchmarks/train_many.py --base DIR --resolution 512        another base, as `train_step.py --rounds 0` makes it

Both ways follow one another in each round, on one base in memory and with the same cache, so that a slow minute hits both.
Times are of the wall and of the CPU: the latter says more on a machine that is shared.
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
from lora_booth.cli.demo import write_photos
from lora_booth.toybox.world import HELD_OUT


def timed(job: Callable[[], dict[str, lb.Adapter]]) -> tuple[dict[str, lb.Adapter], dict[str, float]]:
    """Seconds of the wall and of the CPU."""
    wall, cpu = time.perf_counter(), time.process_time()
    return job(), {"wall": time.perf_counter() - wall, "cpu": time.process_time() - cpu}


def difference(a: lb.Adapter, b: lb.Adapter) -> dict[str, float]:
    """Relative: of all factors, and of the changes of all layers."""
    pairs = [(a.modules[key], b.modules[key]) for key in a.modules]
    factors = [torch.cat([torch.cat([one[i].down.flatten(), one[i].up.flatten()]) for one in pairs]) for i in range(2)]
    changes = [torch.cat([one[i].delta().flatten() for one in pairs]) for i in range(2)]
    return {name: float((x - y).norm() / x.norm()) for name, (x, y) in {"factors": factors, "changes": changes}.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="toybox")
    parser.add_argument("--resolution", type=int, help="[the base's own]")
    parser.add_argument("--subjects", type=int, default=8)
    parser.add_argument("--together", type=int, help="subjects in a pass [all]")
    parser.add_argument("--steps", type=int, default=50)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--class-images", type=int, default=10)
    parser.add_argument("--prior", type=float, default=1.0, help="weight of keeping the plain class")
    parser.add_argument("--threads", type=int, help="of PyTorch [one for each CPU]")
    parser.add_argument("--out", type=Path, help="JSON with what is printed")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    count = arguments.subjects
    base = lb.BaseModel.load(arguments.base)
    config = lb.TrainingConfig(
        steps=arguments.steps,
        class_images=arguments.class_images,
        prior_loss_weight=arguments.prior,
        resolution=arguments.resolution,
        sample_every=0,
    )
    seconds: dict[str, list[dict[str, float]]] = {"one by one": [], "together": []}
    differences: list[dict[str, float]] = []
    with TemporaryDirectory() as folder:
        names = [list(HELD_OUT)[i % len(HELD_OUT)] for i in range(count)]
        subjects: dict[str, Any] = {}
        for i, name in enumerate(names):
            photos = write_photos(name, Path(folder) / f"{i}", count=4 + i // len(HELD_OUT))
            subjects[f"{i} {name}"] = lb.Subject.from_folder(photos, token="ohwx", class_noun=HELD_OUT[name].class_noun)
        for subject in subjects.values():
            lb.prepare(base, subject, config=config)  # class images and latents are in the cache from here on

        def one_by_one() -> dict[str, lb.Adapter]:
            return {name: lb.train(base, one, config=config, progress=False) for name, one in subjects.items()}

        def at_once() -> dict[str, lb.Adapter]:
            adapters, errors = lb.train_many(
                base, subjects, config=config, together=arguments.together or count, progress=False
            )
            if errors:
                raise SystemExit(f"{errors}")
            return adapters

        for _ in range(arguments.rounds):
            alone, apart = timed(one_by_one)
            adapters, shared = timed(at_once)
            seconds["one by one"].append(apart)
            seconds["together"].append(shared)
            differences = [difference(alone[name], adapters[name]) for name in alone]
            print(json.dumps({"one by one": apart, "together": shared}), flush=True)
    settings = {key: value for key, value in vars(arguments).items() if key != "out"}
    report: dict[str, Any] = {"settings": {**settings, "threads": torch.get_num_threads()}}
    for clock in ("wall", "cpu"):
        medians = {way: statistics.median(one[clock] for one in each) for way, each in seconds.items()}
        ratios = [a[clock] / b[clock] for a, b in zip(*seconds.values(), strict=True)]
        report[clock] = {
            **{f"{way}, seconds": round(value, 2) for way, value in medians.items()},
            **{f"{way}, subjects an hour": round(3600 * count / value) for way, value in medians.items()},
            "times as fast": [round(ratio, 2) for ratio in (min(ratios), statistics.median(ratios), max(ratios))],
        }
    report["largest difference"] = {name: max(one[name] for one in differences) for name in ("factors", "changes")}
    print(json.dumps(report, indent=1))
    if arguments.out is not None:
        arguments.out.write_text(json.dumps(report, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
