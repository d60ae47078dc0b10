"""lora_booth against the script, diffusers' examples/dreambooth/train_dreambooth_lora.py: step, start, whole run, memory, file.

python benchmarks/train_step.py --script train_dreambooth_lora.py --work DIR                     SD 1.5's shape, random weights
python benchmarks/train_step.py --script train_dreambooth_lora.py --work DIR --base toybox --resolution 64 --steps 50
python benchmarks/train_step.py --script train_dreambooth_lora_sdxl.py --work DIR --base sdxl --resolution 1024
python benchmarks/train_step.py --work DIR --runs lora_booth:bf16 lora_booth:bf16,gradient_checkpointing=true --again

A run is `lora_booth:PRECISION` or `script:PRECISION` and, after commas, `prior`, then any field of TrainingConfig as NAME=VALUE
or `quantize=KIND` (lora_booth), or any option of the script as it is (script: `--gradient_checkpointing`). All runs of a round
follow one another, each in a process of its own with the same photos, rank, batch, precision and steps; so a slow minute of the
machine hits all.
The base is a diffusers folder, or "toybox", "sd1", "sd2", "sdxl": their real shapes with random weights, made once in --work
(and nothing else with --rounds 0). "tiny-sd1" and "tiny-sdxl" are some dozens of channels wide, to try the commands at 128 px.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HERE = Path(__file__).resolve().parent
DTYPES = {"fp32": "float32", "bf16": "bfloat16", "fp16": "float16"}
RUNS = ("lora_booth:fp32", "script:fp32", "lora_booth:bf16", "script:bf16")
CLASS_IMAGES = 8


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--base", default="sd1", help="toybox, sd1, sd2, sdxl or a diffusers folder")
    parser.add_argument("--script", type=Path, help="diffusers' script; without it only lora_booth is measured")
    parser.add_argument("--work", type=Path, required=True, help="folder for random bases, photos and outputs")
    parser.add_argument("--photos", type=Path, help="a folder of photos [five random ones]")
    parser.add_argument("--runs", nargs="+", default=RUNS)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--resolution", type=int, default=256)
    parser.add_argument("--rank", type=int, default=8)
    parser.add_argument("--batch", type=int, default=1)
    parser.add_argument("--class-images", type=int, default=CLASS_IMAGES)
    parser.add_argument("--draw", action="store_true", help="lora_booth keeps the class in its own way (prior runs)")
    parser.add_argument(
        "--again", action="store_true", help="lora_booth a second time, with what the first run has left in the cache"
    )
    parser.add_argument("--out", type=Path, help="JSON with all figures; the plot lies beside it")
    arguments = parser.parse_args()
    arguments.work = arguments.work.resolve()
    bench = Bench(arguments)
    results = bench.all_rounds()
    rows = summary(results)
    print(table(rows, bench))
    if arguments.out is not None:
        arguments.out.parent.mkdir(parents=True, exist_ok=True)
        settings = {key: str(value) if isinstance(value, Path) else value for key, value in vars(arguments).items()}
        arguments.out.write_text(json.dumps({"settings": settings, "rows": rows, "runs": results}, indent=1), encoding="utf-8")
        plot(rows, arguments.out.with_suffix(".png"))


class Bench:
    def __init__(self, arguments: argparse.Namespace) -> None:
        self.arguments, self.work = arguments, arguments.work
        self.work.mkdir(parents=True, exist_ok=True)
        self.photos = arguments.photos.resolve() if arguments.photos else self.work / "photos"
        shapes = ("toybox", "sd1", "sd2", "sdxl", "tiny-sd1", "tiny-sdxl")
        self.base = self.work / "bases" / arguments.base if arguments.base in shapes else Path(arguments.base).resolve()
        if arguments.base in shapes or not arguments.photos:
            self.child({"what": "build", "family": arguments.base, "base": str(self.base), "photos": str(self.photos)})

    def all_rounds(self) -> dict[str, list[dict[str, Any]]]:
        results: dict[str, list[dict[str, Any]]] = {}
        for number in range(self.arguments.rounds):
            for run in self.arguments.runs:
                who, _, how = run.partition(":")
                if who == "script" and self.arguments.script is None:
                    continue
                shutil.rmtree(self.work / "cache", ignore_errors=True)
                for name in (run, f"{run} (again)") if who == "lora_booth" and self.arguments.again else (run,):
                    results.setdefault(name, []).append(self.one(who, how.split(",")))
                    print(f"round {number + 1}: {name}: {shown(results[name][-1])}", file=sys.stderr, flush=True)
        return results

    def one(self, who: str, how: list[str]) -> dict[str, Any]:
        given = self.arguments
        precision, prior, more = how[0], "prior" in how[1:], [word for word in how[1:] if word != "prior"]
        out = self.work / "out"
        shutil.rmtree(out, ignore_errors=True)
        out.mkdir()
        pictures = self.work / "class_images"
        if prior and not (who == "lora_booth" and given.draw):
            shutil.rmtree(pictures, ignore_errors=True)
            facts = {"resolution": given.resolution, "count": given.class_images, "class_images": str(pictures)}
            self.child({"what": "class_pictures", **facts})
        common = {"what": who, "steps": given.steps, "out": str(out)}
        if who == "lora_booth":
            config = {
                "steps": given.steps,
                "batch_size": given.batch,
                "resolution": given.resolution,
                "learning_rate": 1e-4,
                "lr_schedule": "constant",
                "warmup_steps": 0,
                "prior_loss_weight": 1.0 if prior else 0.0,
                "class_images": given.class_images,
                **dict(field(word) for word in more),
            }
            job = {"base": str(self.base), "photos": str(self.photos), "dtype": DTYPES[precision], "rank": given.rank}
            job |= {"own": str(pictures)} if prior and not given.draw else {}
            result = self.child({**common, **job, "config": config})
        else:
            options = {
                "pretrained_model_name_or_path": self.base,
                "instance_data_dir": self.photos,
                "instance_prompt": "a photo of sks dog",
                "output_dir": out,
                "resolution": given.resolution,
                "train_batch_size": given.batch,
                "max_train_steps": given.steps,
                "learning_rate": 1e-4,
                "lr_scheduler": "constant",
                "lr_warmup_steps": 0,
                "mixed_precision": "no" if precision == "fp32" else precision,
                "rank": given.rank,
                "checkpointing_steps": 10**9,
                "seed": 0,
            }
            if prior:
                options |= {
                    "class_data_dir": pictures,
                    "class_prompt": "a photo of a dog",
                    "num_class_images": given.class_images,
                }
                more = [*more, "--with_prior_preservation"]
            words = [word for key, value in options.items() for word in (f"--{key}", str(value))]
            result = self.child(
                {**common, "script": str(given.script.resolve()), "arguments": [*words, "--center_crop", *more]}
            )
        files = sorted(out.rglob("*.safetensors"), key=lambda path: path.stat().st_size)
        return result | {"adapter_mb": files[-1].stat().st_size / 1e6 if files else None}

    def child(self, job: dict[str, Any]) -> dict[str, Any]:
        """Run one_training.py; what it measured, and its wall time."""
        file, result, log = (self.work / name for name in ("job.json", "result.json", "log.txt"))
        file.write_text(json.dumps({**job, "result": str(result)}), encoding="utf-8")
        result.unlink(missing_ok=True)
        environment = {
            **os.environ,
            "PYTHONPATH": os.pathsep.join([str(HERE.parent), os.environ.get("PYTHONPATH", "")]).rstrip(os.pathsep),
            "LORA_BOOTH_CACHE": str(self.work / "cache"),
            "HF_HUB_OFFLINE": "1",
        }
        with open(log, "w", encoding="utf-8") as output:
            started = time.time()
            environment["BENCHMARK_STARTED"] = str(started)
            command = [sys.executable, str(HERE / "one_training.py"), str(file)]
            code = subprocess.run(command, env=environment, stdout=output, stderr=subprocess.STDOUT).returncode
            wall = time.time() - started
        if code or not result.is_file():
            sys.exit(f"{job['what']} failed:\n{log.read_text(encoding='utf-8', errors='replace')[-3000:]}")
        return json.loads(result.read_text(encoding="utf-8")) | {"whole_run": wall}


def field(word: str) -> tuple[str, Any]:
    name, _, value = word.partition("=")
    try:
        return name, json.loads(value)
    except ValueError:
        return name, value


def step_seconds(result: dict[str, Any]) -> float:
    """On a CPU the median; on a GPU, where updates overlap, the mean between two waits for the device."""
    return result["mean"] if result["device"] != "cpu" or not result["intervals"] else statistics.median(result["intervals"])


def shown(result: dict[str, Any]) -> str:
    memory = f"{result['peak_gib']:.2f}" if result["peak_gib"] is not None else "?"
    first, whole = result["to_first_step"], result["whole_run"]
    return f"{step_seconds(result):.3f} s a step, first after {first:.1f} s, whole {whole:.1f} s, peak {memory} GiB"


def summary(results: dict[str, list[dict[str, Any]]]) -> list[dict[str, Any]]:
    """Medians over the rounds; ratios to the script in the same precision and batch, and to its default (fp32)."""
    rows = []
    for name, runs in results.items():
        row: dict[str, Any] = {"run": name, "rounds": len(runs), "step": statistics.median(step_seconds(r) for r in runs)}
        for key in ("to_first_step", "whole_run", "peak_gib", "cuda_allocated_gib", "cuda_reserved_gib", "adapter_mb"):
            values = [r[key] for r in runs if r[key] is not None]
            row[key] = statistics.median(values) if values else None
        values = [r["peaks_gib"].get("training") for r in runs if r["peaks_gib"].get("training") is not None]
        row["training_gib"] = statistics.median(values) if values else None
        row["device"] = runs[0]["device"]
        if row["device"] == "cpu":
            row["cpu_step"] = statistics.median(statistics.median(r["cpu_intervals"] or [0]) for r in runs)
            for key in ("cpu_to_first_step", "cpu_whole_run"):
                row[key] = statistics.median(r[key] for r in runs)
        rows.append(row)
    known = {row["run"]: row for row in rows}
    for row in rows:
        if not row["run"].startswith("lora_booth"):
            continue
        words = row["run"].removesuffix(" (again)").partition(":")[2].split(",")
        prior = ",prior" if "prior" in words else ""
        for key, other in (("same", f"script:{words[0]}{prior}"), ("default", f"script:fp32{prior}")):
            if other in known:
                row[f"times_{key}"] = known[other]["step"] / row["step"]
                row[f"whole_{key}"] = known[other]["whole_run"] / row["whole_run"]
                if row.get("cpu_step"):
                    row[f"cpu_{key}"] = known[other]["cpu_step"] / row["cpu_step"]
        first = known.get(row["run"].removesuffix(" (again)"))
        if first is not None and first is not row:
            row["first_step_of_first_run"] = row["to_first_step"] / first["to_first_step"]
    return rows


COLUMNS = (
    ("step", "s/step", 3),
    ("times_same", "script/lora_booth", 2),
    ("times_default", "script fp32/lora_booth", 2),
    ("cpu_step", "CPU s/step", 3),
    ("cpu_same", "script/lora_booth, CPU", 2),
    ("cpu_default", "script fp32/lora_booth, CPU", 2),
    ("to_first_step", "first step, s", 1),
    ("cpu_to_first_step", "CPU s", 1),
    ("whole_run", "whole run, s", 1),
    ("whole_same", "script/lora_booth", 2),
    ("training_gib", "training, GiB", 2),
    ("peak_gib", "process, GiB", 2),
    ("cuda_reserved_gib", "CUDA, GiB", 2),
    ("adapter_mb", "file, MB", 2),
)


def table(rows: list[dict[str, Any]], bench: Bench) -> str:
    given = bench.arguments
    used = [column for column in COLUMNS if any(row.get(column[0]) is not None for row in rows)]
    settings = f"{given.base}, {given.resolution} px, batch {given.batch}, rank {given.rank}, {given.steps} steps"
    lines = [
        f"{settings}, {given.rounds} round(s), {rows[0]['device'] if rows else ''}",
        "",
        "| run | " + " | ".join(title for _, title, _ in used) + " |",
        "|---" * (len(used) + 1) + "|",
    ]
    for row in rows:
        cells = ["-" if row.get(key) is None else f"{row[key]:.{digits}f}" for key, _, digits in used]
        lines.append(f"| {row['run']} | " + " | ".join(cells) + " |")
    for row in rows:
        if "first_step_of_first_run" in row:
            lines.append(f"\n{row['run']}: first step after {row['first_step_of_first_run']:.2f} of the first run's time")
    return "\n".join(lines)


def plot(rows: list[dict[str, Any]], path: Path) -> None:
    """Bars of seconds a step and of memory; nothing without matplotlib."""
    try:
        import matplotlib
    except ImportError:
        print("no matplotlib: no plot", file=sys.stderr)
        return
    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(1, 2, figsize=(10, 0.45 * len(rows) + 1.2), sharey=True)
    names = [row["run"].replace(":", ", ").replace(",prior", ", prior").replace("script", "diffusers' script") for row in rows]
    colours = ["tab:blue" if name.startswith("lora_booth") else "tab:gray" for name in names]
    for axis, key, title in ((axes[0], "step", "seconds a step"), (axes[1], "peak_gib", "process peak, GiB")):
        bars = axis.barh(names, [row[key] or 0 for row in rows], color=colours)
        axis.bar_label(bars, fmt=" %.2f")
        axis.margins(x=0.15)
        axis.set_title(title)
    axes[0].invert_yaxis()
    figure.tight_layout()
    figure.savefig(path, dpi=120)


if __name__ == "__main__":
    main()
