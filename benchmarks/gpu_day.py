"""Everything that only a CUDA GPU can tell, in parts: one JSON file, which a later call goes on with.

python benchmarks/gpu_day.py --out day.json --work DIR --peer train_dreambooth_lora.py --peer-sdxl train_dreambooth_lora_sdxl.py
python benchmarks/gpu_day.py --out day.json --work DIR --peer ... --again       what failed or could not run once more
python benchmarks/gpu_day.py --out day.json --work DIR --only "sd1" "sdxl"      some parts; --list shows all of them
python benchmarks/gpu_day.py --out dry.json --work DIR --peer ... --dry         tiny shapes and few steps, also on a CPU

Each part is one or more commands in processes of their own, the most telling part first. Its result and its seconds are in the
file as soon as it ends, and a part whose result is there is left out. One that fails or takes too long leaves its last lines
there, and the others go on. No part begins when less is left of --seconds than it should take; one that is stopped at their end
is tried again by the next call, as is one for which a package or a script was missing.

Nothing is downloaded: bases have random weights in the real shapes (made once in --work), photos are random or drawn. The peer
is the script of diffusers' examples/dreambooth, unmodified. While others use the GPU too, the memory says nothing.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent
PACKAGES = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "bitsandbytes", "xformers", "torchao")
LINES, COLUMNS = 200, 300  # of what a part prints, the last ones


@dataclass(frozen=True)
class Part:
    """{out} is a folder for the part's files, {sd1} the name of a base and {sd1_px} its resolution, likewise SDXL's."""

    name: str
    seconds: int  # that it should take, its process's start included; it is stopped at twice as many and 30
    commands: tuple[str, ...]  # words after `python`
    dry: str = ""  # what a dry run adds to each
    needs: tuple[str, ...] = ()  # packages, or scripts that are given


def tests(seconds: int, words: str, dry: str = "") -> Part:
    options = "-o addopts= -p no:cacheprovider -W default --disable-warnings -q --tb=short -rfE --durations=3"
    return Part(f"tests: {words}", seconds, (f"-m pytest {options} tests/{words}",), dry)


def case(name: str, seconds: int, *needs: str, more: str = "", steps: int = 40) -> Part:
    command = f'benchmarks/gpu.py --cases "{name}" --steps {steps} --out {{out}} {more}'
    return Part(" ".join((name, more)).strip(), seconds, (command,), "--dry --steps 4", needs)


def runs(name: str, seconds: int, base: str, how: str, steps: int, peer: str = "") -> Part:
    """Whole runs in processes of their own. The base is made before, if it is not there."""
    script, needs = (f" --script {{{peer}}}", (peer,)) if peer else ("", ())
    commands = (
        f"benchmarks/train_step.py --work {{work}} --base {{{base}}} --rounds 0",
        f"benchmarks/train_step.py --work {{work}} --base {{{base}}} --resolution {{{base}_px}} --steps {steps}"
        f" --runs {how}{script} --out {{out}}/runs.json",
    )
    return Part(name, seconds, commands, "--steps 4 --class-images 2", needs)


PARTS = (
    Part("machine", 20, ("benchmarks/gpu_day.py --machine --out {out}/machine.json",), "--dry"),
    case("sd1", 75, more="--profile"),  # Triton compiles first
    tests(90, "test_cuda.py"),
    case("sdxl", 70, more="--profile"),
    case("sd1 batch 8", 45, more="--profile"),
    runs("peer: sd1", 110, "sd1", "lora_booth:bf16 script:bf16 script:fp32", 60, "peer"),
    runs("peer: sdxl", 220, "sdxl", "lora_booth:bf16 script:bf16", 40, "peer_sdxl"),
    case("sdxl checkpointed", 60),
    case("sdxl nf4 checkpointed", 70, "bitsandbytes"),
    runs("whole run: sd1", 70, "sd1", "lora_booth:bf16 lora_booth:bf16,prior --draw --class-images 16", 500),
    runs("whole run: sdxl", 150, "sdxl", "lora_booth:bf16", 1000),
    case("sd1 fp16 with class images", 45, more="--cap 15", steps=100),
    case("sd1 fp32 with class images", 55, steps=100),
    case("sdxl fp16 with class images", 80, more="--cap 15"),
    case("sdxl fp32 with class images", 110),
    Part("precision", 150, ("benchmarks/precision.py --steps 300",), "--steps 5 --cases 'fp32, seed 1'"),
    Part(
        "train_many: sd1",
        100,
        (
            "benchmarks/train_step.py --work {work} --base {sd1} --rounds 0",
            "benchmarks/train_many.py --base {work}/bases/{sd1} --resolution {sd1_px} --prior 0 --rounds 1 --steps 100"
            " --out {out}/many.json",
        ),
        "--steps 2",
    ),
    Part("train_many: toybox", 90, ("benchmarks/train_many.py --rounds 1 --out {out}/many.json",), "--steps 2 --subjects 2"),
    case("sd1 adamw8bit", 30, "bitsandbytes"),
    case("sdxl int8 checkpointed", 60),
    case("sd1 xformers", 30, "xformers"),
    case("sd1 not recorded", 30),
    case("sd1", 30, more="--no-kernels"),
    case("sd1 checkpointed", 30),
    case("sd2", 40),
    case("sd1 fp32", 30),
    Part("kernels", 90, ("benchmarks/kernels.py",), "--help"),
    tests(120, "test_capture.py"),
    tests(240, "test_kernels.py", "--collect-only"),  # in Triton's interpreter for an hour
    Part("quantization", 60, ("benchmarks/quantization.py",), "--help"),  # which is run on CPUs as it is, for minutes
    Part("kernels: tiles", 200, ("benchmarks/kernels.py --blocks",), "--help"),
)


class Day:
    """The file, and what is left of this call's time."""

    def __init__(self, file: Path, work: Path, *, seconds: float, dry: bool = False, scripts: Mapping[str, Path] | None = None):
        self.file, self.work, self.dry = file, work.resolve(), dry
        self.scripts = {name: str(path.resolve()) for name, path in (scripts or {}).items()}
        self.end = time.monotonic() + seconds
        self.found: dict[str, Any] = json.loads(file.read_text()) if file.is_file() else {"dry": dry, "parts": {}}
        if self.found["dry"] != dry:
            sys.exit(f"{file}: holds a {'dry' if not dry else 'real'} run; use another file")

    def do(self, parts: Sequence[Part], *, again: bool = False) -> None:
        for part in parts:
            known = self.found["parts"].get(part.name, {})
            if "result" in known or ("error" in known and not again):
                print(f"{part.name}: in the file", flush=True)
                continue
            left = self.end - time.monotonic()
            if left < part.seconds:
                print(f"{part.name}: not begun, {left:.0f} s are left of the {part.seconds} it should take", flush=True)
                continue
            missing = [name for name in part.needs if name not in self.scripts and importlib.util.find_spec(name) is None]
            record = {"missing": missing} if missing else self.one(part)
            outcome = next(key for key in ("missing", "stopped", "error", "result") if key in record)
            print(f"{part.name}: {outcome if outcome == 'result' else f'{outcome}: {record[outcome]}'}", flush=True)
            if part.name == "machine" and outcome == "error":
                sys.exit("nothing else is tried")
            self.found["parts"][part.name] = {"at": time.strftime("%Y-%m-%d %H:%M"), **record}
            save(self.file, self.found)

    def one(self, part: Part) -> dict[str, Any]:
        """Run its commands: "result", or "error" or "stopped" with the last lines."""
        out = self.work / "parts" / "".join(letter if letter.isalnum() else "-" for letter in part.name)
        out.mkdir(parents=True, exist_ok=True)
        for old in out.iterdir():
            old.unlink()
        sizes = ("tiny-sd1", 128, "tiny-sdxl", 128) if self.dry else ("sd1", 512, "sdxl", 1024)
        places = dict(zip(("sd1", "sd1_px", "sdxl", "sdxl_px"), sizes, strict=True))
        places |= self.scripts | {"out": out, "work": self.work}
        lines: list[str] = []
        began, error = time.monotonic(), ""
        limit = 2 * part.seconds + 30.0
        stop = min(began + limit, self.end)
        for command in part.commands:
            words = [word.format(**places) for word in shlex.split(command)] + (shlex.split(part.dry) if self.dry else [])
            error, printed = run([sys.executable, *words], stop - time.monotonic(), self.environment(), out / "log.txt")
            lines += printed
            if error:
                break
        seconds = time.monotonic() - began
        record: dict[str, Any] = {"seconds": round(seconds, 1)}
        if not error:
            return record | {"result": written(out) or lines}
        over = error == "timeout" and stop < began + limit
        error = "at the end of this call's time" if over else f"stopped after {limit:.0f} s" if error == "timeout" else error
        return record | {"stopped" if over else "error": error, "lines": lines, "written": written(out)}

    def environment(self) -> dict[str, str]:
        path = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        more = {"PYTHONPATH": path, "LORA_BOOTH_CACHE": str(self.work / "cache"), "HF_HUB_OFFLINE": "1"}
        return {**os.environ, **more, "PYTHONUNBUFFERED": "1"} | ({} if self.dry else {"TRITON_INTERPRET": "0"})


def run(command: list[str], seconds: float, environment: Mapping[str, str], log: Path) -> tuple[str, list[str]]:
    """What went wrong ("": nothing), and the last lines printed. At the end of the time all processes that it began end too."""
    with open(log, "wb") as file:
        process = subprocess.Popen(
            command,
            cwd=ROOT,
            env=environment,
            stdout=file,
            stderr=subprocess.STDOUT,
            stdin=subprocess.DEVNULL,
            start_new_session=True,
        )
        try:
            code = process.wait(max(0.0, seconds))
            error = f"exit status {code}" if code else ""
        except BaseException as reason:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
            if not isinstance(reason, subprocess.TimeoutExpired):
                raise
            error = "timeout"
    lines = [line.rstrip()[:COLUMNS] for line in log.read_text(errors="replace").replace("\r", "\n").split("\n")]
    log.unlink()
    lines = [line for line in lines if line][-LINES:]
    return f"{error}: {lines[-1]}" if error.startswith("exit") and lines else error, lines


def written(out: Path) -> dict[str, Any]:
    """What a part wrote into its folder, by the names of the files; what it was stopped in the middle of is left out."""
    found: dict[str, Any] = {}
    for path in sorted(out.iterdir()):
        try:
            if path.suffix == ".json":
                found[path.stem] = json.loads(path.read_text())
            elif path.suffix == ".jsonl":
                found |= json.loads(path.read_text())  # of one case
            elif path.suffix == ".txt":
                found[f"{path.stem} profile"] = path.read_text().splitlines()
        except ValueError:
            continue
    if "runs" in found:
        del found["runs"]["runs"]  # train_step.py's clock at every step; its rows say it
    return found


def save(file: Path, found: Any) -> None:
    beside = file.with_name(file.name + ".part")
    beside.write_text(json.dumps(found, indent=1), encoding="utf-8")
    os.replace(beside, file)


def machine(file: Path, *, dry: bool) -> None:
    """In a process of its own: that of the parts holds nothing of the GPU."""
    import platform
    from importlib.metadata import PackageNotFoundError, version

    import torch
    from gpu import DEVICE, matrix_rate, others

    if DEVICE == "cpu" and not dry:
        sys.exit("no CUDA GPU here")
    facts: dict[str, Any] = {"python": platform.python_version(), "cpus": os.cpu_count(), "versions": {}}
    for name in PACKAGES:
        try:
            facts["versions"][name] = version(name)
        except PackageNotFoundError:
            facts["versions"][name] = None
    if DEVICE == "cuda":
        about = torch.cuda.get_device_properties(0)
        facts |= {"gpu": about.name, "gb": about.total_memory / 1e9, "cuda": torch.version.cuda}
        facts |= {"capability": torch.cuda.get_device_capability(), "cudnn": torch.backends.cudnn.version()}
    kinds = (torch.bfloat16, torch.float16, torch.float32)
    facts["tflops"] = {str(kind).removeprefix("torch."): matrix_rate(kind) / 1e12 for kind in kinds}
    facts["others_gb"] = others() / 1e9
    save(file, facts)


def summary(found: Mapping[str, Any]) -> str:
    """A line for each part, and how far the losses in fp16 are from those in fp32."""
    lines, curves = [], {}
    for name, record in found["parts"].items():
        result = record.get("result", {})
        result = result if isinstance(result, dict) else {}  # lines
        words = next((f"{key}: {record[key]}" for key in ("missing", "stopped", "error") if key in record), "done")
        if "ms" in result:
            curves[result["case"]] = result["losses"]
            words = f"{result['ms']:.2f} ms, {result['used_gb']:.2f} GB, plan {result['predicted_gb']:.2f} for "
            words += f"{result['allocated_gb']:.2f}, {result['share']:.0%}, {'' if result['recorded'] else 'not '}recorded"
        lines.append(f"{name}: {words} ({record.get('seconds', 0):.0f} s)")
        for row in result["runs"]["rows"] if "runs" in result else ():
            times = f", the script's / it {row['times_same']:.2f}" if "times_same" in row else ""
            lines.append(f"  {row['run']}: {1e3 * row['step']:.1f} ms a step{times}, whole run {row['whole_run']:.1f} s")
    for family in ("sd1", "sdxl"):
        one, other = (curves.get(f"{family} {precision} with class images") for precision in ("fp16", "fp32"))
        if one and other:
            off = max(abs(a / b - 1) for a, b in zip(one, other, strict=True))
            lines.append(f"{family}: losses in fp16 at most {off:.2g} (relative) from those in fp32")
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, help="the JSON file")
    parser.add_argument("--work", type=Path, help="folder for random bases, photos and outputs")
    parser.add_argument("--peer", type=Path, help="diffusers' train_dreambooth_lora.py")
    parser.add_argument("--peer-sdxl", type=Path, help="diffusers' train_dreambooth_lora_sdxl.py")
    parser.add_argument("--seconds", type=float, default=520, help="that this call may take")
    parser.add_argument("--only", nargs="+", metavar="PART", choices=[part.name for part in PARTS])
    parser.add_argument("--again", action="store_true", help="try what failed again")
    parser.add_argument("--dry", action="store_true", help="tiny shapes and few steps, on a CPU if there is no GPU")
    parser.add_argument("--list", action="store_true", help="the parts and the seconds that they should take")
    parser.add_argument("--machine", action="store_true", help=argparse.SUPPRESS)  # for the process of that part
    given = parser.parse_args()
    if given.list:
        print("\n".join(f"{part.seconds:4d} s  {part.name}" for part in PARTS))
        return
    if given.out is None or (given.work is None and not given.machine):
        parser.error("--out and --work are needed")
    if given.machine:
        machine(given.out, dry=given.dry)
        return
    scripts = {name: path for name in ("peer", "peer_sdxl") if (path := getattr(given, name)) is not None}
    if absent := [str(path) for path in scripts.values() if not path.is_file()]:
        parser.error(f"not a file: {', '.join(absent)}")
    signal.signal(signal.SIGTERM, lambda *_: sys.exit("stopped"))  # with the part's processes
    day = Day(given.out, given.work, seconds=given.seconds, dry=given.dry, scripts=scripts)
    day.do([part for part in PARTS if given.only is None or part.name in given.only], again=given.again)
    print(summary(day.found))


if __name__ == "__main__":
    main()
