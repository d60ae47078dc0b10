"""What the loader does with files that are wrong, and how long it takes with files that are right.

python benchmarks/adapter_mutants.py --count 10000

Loads mutants of good files and the tests' hostile files in this process, then a good file of 40 MB.
"""

from __future__ import annotations

import argparse
import faulthandler
import resource
import sys
import tempfile
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import torch
from adapter_judge import Judge
from good_adapters import small_files
from hostile_adapters import hostile_files
from safetensors.torch import save_file
from spoilt import mutants

from lora_booth.adapters.adapter import Adapter
from lora_booth.errors import AdapterError

HANGS = 300  # seconds; then the traceback is printed and the run ends
SLOW = 2.0  # seconds of this process; other work on the machine does not count
LARGE = 100  # MiB of memory that one file may add; the mutants have 60 KB


def peak() -> float:
    """MiB that this process has ever held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)


def run_mutants(folder: Path, count: int, seed: int) -> bool:
    files = small_files(folder)
    judge, slow, large = Judge(folder / "mutant.safetensors"), 0, 0
    for content in files:
        judge.load(content)
    assert judge.loaded == len(files), judge.refused
    judge.loaded = 0
    begin = time.perf_counter()
    for content in mutants(files, count=count, seed=seed):
        before, start = peak(), time.process_time()
        faulthandler.dump_traceback_later(HANGS, exit=True)
        judge.load(content)
        faulthandler.cancel_dump_traceback_later()
        slow += time.process_time() - start > SLOW
        large += peak() - before > LARGE
    print(
        f"{count} mutants in {time.perf_counter() - begin:.0f} s: {judge.loaded} loaded, {sum(judge.refused.values())} refused"
    )
    for name, number in judge.refused.most_common():
        print(f"  {name:20} {number}")
    print(f"crashes or loads beyond limits {len(judge.faults)}, slower than {SLOW:g} s {slow}, above {LARGE} MiB {large}")
    print(f"slowest {judge.slowest * 1e3:.0f} ms")
    for fault in judge.faults[:20]:
        print(f"  {fault}")
    return not (judge.faults or slow or large)


def run_hostile(folder: Path) -> bool:
    wrong, slowest = [], (0.0, "")
    cases = hostile_files()
    for number, case in enumerate(cases):
        place = folder / str(number)
        place.mkdir()
        path, start = case.build(place), time.process_time()
        faulthandler.dump_traceback_later(HANGS, exit=True)
        try:
            Adapter.load(path)
            found = "loaded"  # those for another base are refused when they are attached
        except AdapterError as error:
            found = type(error).__name__
        faulthandler.cancel_dump_traceback_later()
        slowest = max(slowest, (time.process_time() - start, case.name))
        if found not in (case.error.__name__, "loaded") or (found == "loaded" and case.error.__name__ != "AdapterBaseMismatch"):
            wrong.append(f"{case.name}: {found}, expected {case.error.__name__}")
    print(f"{len(cases)} hostile files: {len(wrong)} with another error; slowest {slowest[0] * 1e3:.0f} ms ({slowest[1]})")
    for line in wrong:
        print(f"  {line}")
    return not wrong and slowest[0] < SLOW


def run_large(folder: Path) -> None:
    """A kohya file of 40 MB in half precision: 128 attention layers of the widths of SD 1.5."""
    tensors = {}
    for block, width in ((0, 320), (1, 640), (2, 1280), (3, 1280)):
        for attention in range(4):
            for attn in ("attn1", "attn2"):
                for name in ("to_q", "to_k", "to_v", "to_out_0"):
                    inner = 768 if attn == "attn2" and name in ("to_k", "to_v") else width
                    stem = f"lora_unet_down_blocks_{block}_attentions_{attention}_transformer_blocks_0_{attn}_{name}"
                    tensors[f"{stem}.lora_down.weight"] = (torch.randn(92, inner) / 8).half()
                    tensors[f"{stem}.lora_up.weight"] = (torch.randn(width, 92) / 8).half()
                    tensors[f"{stem}.alpha"] = torch.tensor(92.0)
    path = folder / "large.safetensors"
    save_file(tensors, path)
    times = []
    for _ in range(9):
        start = time.process_time(), time.perf_counter()
        Adapter.load(path)
        times.append(((time.process_time() - start[0]) * 1e3, (time.perf_counter() - start[1]) * 1e3))
    busy, clock = (sorted(column)[4] for column in zip(*times, strict=True))
    print(
        f"{path.stat().st_size / 1e6:.1f} MB, {len(tensors) // 3} layers: read and checked in {busy:.0f} ms of processor time "
        f"({clock:.0f} ms on the clock; medians of 9), {torch.get_num_threads()} thread(s)"
    )


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--count", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    chosen = parser.parse_args()
    faulthandler.enable()
    with tempfile.TemporaryDirectory() as name:
        run_large(Path(name))
        passed = [run_mutants(Path(name), chosen.count, chosen.seed), run_hostile(Path(name))]
    sys.exit(not all(passed))
