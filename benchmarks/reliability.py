"""What a run survives: kills, full disks, faults of a step, signals, two runs in one folder. A line of JSON for each figure.

python benchmarks/reliability.py --work DIR [--quick] [--only kill,disk]

Tiny pipelines in processes that are forked from one that has everything imported; DIR is filled and left for a look.
"""

from __future__ import annotations

import argparse
import json
import os
import random
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

import numpy as np
from faults import (
    CONFIG,
    FAULTS,
    LORA,
    failing_disk,
    in_process,
    run_and_tell,
    subject,
    tiny,
    tiny_run,
    told,
    undisturbed,
    wrong_with,
)
from PIL import Image

from lora_booth.adapters.adapter import Adapter
from lora_booth.errors import LoraBoothError
from lora_booth.runs.one import train
from lora_booth.training.checkpoint import newest, read_back

TESTS = Path(__file__).parents[1] / "tests"

FULL = {
    "kill": 200,
    "resume": 50,
    "seeds": 10,
    "disk": None,
    "faults": 42,
    "twice": 100,
    "signals": 50,
    "processes": 1,
    "lost": 1,
}
QUICK = {"kill": 8, "resume": 4, "seeds": 2, "disk": 8, "faults": 7, "twice": 4, "signals": 4, "processes": 1, "lost": 1}


def photos_in(work: Path) -> Path:
    folder = work / "photos"
    folder.mkdir(parents=True, exist_ok=True)
    noise = np.random.default_rng(0)
    for i in range(3):
        Image.fromarray(noise.integers(0, 255, (300, 280, 3), dtype=np.uint8)).save(folder / f"{i}.png")
    return folder


def torn(run: Path) -> int:
    """Checkpoints under their final names that are not whole."""
    return sum(read_back(folder) is None for folder in (run / "checkpoints").glob("[0-9]*"))


def stopped_at(run: Path) -> int:
    found = newest([run / "checkpoints"])
    return 0 if found is None else found.step


def kill(photos: Path, work: Path, count: int) -> dict[str, Any]:
    """kill -9 at random moments of a run that is then continued, over and over."""
    config = replace(CONFIG, steps=10 * count, checkpoint_every=5)
    run, dice, corrupt, lost = work / "run", random.Random(0), 0, 0
    kills = finished = 0
    while kills < count:
        report = work / f"report{kills}-{finished}"
        process = in_process(run_and_tell, photos, run, report, {"config": config})
        while process.is_alive() and not told(report):
            time.sleep(0.005)
        process.join(dice.random() * 0.5)
        alive = process.is_alive()
        process.kill()
        process.join()
        if not alive:  # the run came to its end: another one begins
            finished += 1
            shutil.rmtree(run)
            continue
        kills += 1
        steps = [line for line in told(report) if isinstance(line, int)]
        corrupt += torn(run)
        lost = max(lost, (steps[-1] if steps else 0) - stopped_at(run))
    return {"kills": kills, "corrupt": corrupt, "worst_loss_in_steps": lost, "save_interval": config.checkpoint_every}


def disk(photos: Path, work: Path, count: int | None) -> dict[str, Any]:
    """No room at every single write of a run, then at that and all later ones."""
    with failing_disk(work, at=10**9) as meter:
        expected = tiny_run(photos, work / "count")
    writes = meter["count"]
    chosen = range(1, writes + 1) if count is None else range(1, writes + 1, max(1, writes // count))
    bad, refused = 0, 0
    for at in chosen:
        for times in (1, 10**6):
            run = work / "run"
            shutil.rmtree(run, ignore_errors=True)
            with failing_disk(run, at, times=times):
                try:
                    bad += tiny_run(photos, run) != expected
                except LoraBoothError:
                    refused += 1  # the folder could not even be begun
            bad += torn(run)
            shutil.rmtree(run / "adapter.safetensors", ignore_errors=True)
            (run / "adapter.safetensors").unlink(missing_ok=True)  # so that the run itself is continued, not its file read
            bad += tiny_run(photos, run) != expected
    return {"writes": writes, "tried": 2 * len(chosen), "not_survived": bad, "refused_at_the_start": refused}


class Enough(Exception):
    pass


def resume(photos: Path, work: Path, count: int) -> dict[str, Any]:
    config = replace(CONFIG, steps=30, checkpoint_every=1)
    expected, dice, exact = tiny_run(photos, None, config=config), random.Random(0), 0
    for number in range(count):
        run, stop = work / str(number), dice.randrange(1, 30)

        def on_step(step: Any, stop: int = stop) -> None:
            if step.index == stop:
                raise Enough

        try:
            tiny_run(photos, run, config=config, on_step=on_step)
        except Enough:
            exact += tiny_run(photos, run, config=config) == expected
    return {"resumes": count, "bit_identical": exact}


def seeds(photos: Path, work: Path, count: int) -> dict[str, Any]:
    digests = set()
    for number in range(count):
        report = work / f"report{number}"
        process = in_process(run_and_tell, photos, None, report, {})
        process.join()
        digests.add(told(report)[-1])
    return {"processes": count, "different_digests": len(digests)}


def faults(photos: Path, work: Path, count: int) -> dict[str, Any]:
    """No memory, NaN and spikes at points all over a run, once or for good: each must end as tests/faults.py says."""
    dice, kinds, reference, wrong = random.Random(0), list(FAULTS), undisturbed(photos), {}
    for number in range(count):
        kind = kinds[number % len(kinds)]
        at = dice.choice(FAULTS[kind].begins)
        found = wrong_with(kind, at, photos, work / str(number), reference)
        if found:
            wrong[f"{kind} at {at}"] = found
    return {"faults": count, "kinds": len(kinds), "wrong_outcome": len(wrong)} | ({"wrong": wrong} if wrong else {})


def twice(photos: Path, work: Path, count: int) -> dict[str, Any]:
    """Two processes start the same run at the same time: one does it, the other is refused or finds it finished."""
    expected, right, corrupt = tiny_run(photos, None), 0, 0
    for number in range(count):
        run, reports = work / str(number), [work / f"{number}-{i}" for i in range(2)]
        pair = [in_process(run_and_tell, photos, run, report, {}) for report in reports]
        for process in pair:
            process.join()
        ends = [told(report)[-1] for report in reports if told(report) and isinstance(told(report)[-1], str)]
        right += bool(ends) and set(ends) == {expected}
        corrupt += torn(run)
    return {"pairs": count, "right": right, "corrupt": corrupt}


def signals(photos: Path, work: Path, count: int) -> dict[str, Any]:
    """Ctrl-C or SIGTERM at a random moment of the loop; the same call then gives the same adapter."""
    config = replace(CONFIG, steps=40, checkpoint_every=40)
    expected, dice, clean = tiny_run(photos, None, config=config), random.Random(0), 0
    for number in range(count):
        run, report = work / str(number), work / f"report{number}"
        process = in_process(run_and_tell, photos, run, report, {"config": config})
        while process.is_alive() and not told(report):
            time.sleep(0.005)
        time.sleep(dice.random() * 0.3)
        number_sent = dice.choice([signal.SIGINT, signal.SIGTERM])
        if process.is_alive():
            os.kill(process.pid, number_sent)
        process.join()
        steps = [line for line in told(report) if isinstance(line, int)]
        saved = process.exitcode == 0 or (process.exitcode in (1, 143) and stopped_at(run) == steps[-1])
        clean += saved and tiny_run(photos, run, config=config) == expected
    return {"signals": count, "clean": clean}


LAUNCHED = """
import sys
sys.path.insert(0, {tests!r})
from pathlib import Path
from faults import tiny, subject, LORA
from test_processes import CONFIG
from lora_booth.runs.one import train
from lora_booth.training.distributed import is_main
adapter = train(tiny(), subject(Path({photos!r})), lora=LORA, config=CONFIG, out=Path({run!r}), progress=False)
if is_main():
    adapter.save(Path({out!r}), dtype="fp32")
"""


def processes(photos: Path, work: Path, count: int) -> dict[str, Any]:
    """Two processes under `accelerate launch` against one. (Its --cpu starts only one; --multi_gpu two, also without a GPU.)"""
    from test_processes import CONFIG as SHARED
    from test_processes import difference

    script, out = work / "launched.py", work / "several.safetensors"
    script.write_text(LAUNCHED.format(tests=str(TESTS), photos=str(photos), run=str(work / "run"), out=str(out)))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    words = ["--multi_gpu", "--num_processes", "2", "--num_machines", "1", "--mixed_precision", "no", "--dynamo_backend", "no"]
    command = [sys.executable, "-m", "accelerate.commands.launch", *words, "--main_process_port", str(port), str(script)]
    subprocess.run(command, check=True, cwd=TESTS.parent)
    alone = train(tiny(), subject(photos), lora=LORA, config=SHARED, progress=False)
    ran = json.loads((work / "run" / "run.json").read_text())["surroundings"]["processes"]
    return {"processes": ran, "largest_difference": difference(Adapter.load(out), alone)}


def lost(photos: Path, work: Path, count: int) -> dict[str, Any]:
    """One of two processes is killed, or stopped so that it says nothing more: how long the other goes on, what is left."""
    from test_processes import CONFIG as SHARED
    from test_processes import several, wait_for_step

    config, longest, hung, corrupt, continued = replace(SHARED, steps=1000, checkpoint_every=5), 0.0, 0, 0, 0
    cases = [(rank, number) for rank in (0, 1) for number in (signal.SIGKILL, signal.SIGSTOP)] * count
    for place, (rank, number) in enumerate(cases):
        run, results = work / str(place), work / f"results{place}"
        pair = several(2, photos, results, run, config)
        wait_for_step(results, 1, 7)
        os.kill(pair[rank].pid, number)
        began = time.monotonic()
        pair[1 - rank].join(60)
        longest = max(longest, time.monotonic() - began)
        hung += pair[1 - rank].exitcode in (None, 0)
        for process in pair:
            process.kill()
            process.join()
        corrupt += torn(run)
        at = stopped_at(run)

        def on_step(step: Any, at: int = at) -> None:
            raise Enough if step.index == at + 1 else AssertionError

        try:
            train(tiny(), subject(photos), lora=LORA, config=config, out=run, on_step=on_step, progress=False)
        except Enough:
            continued += at >= 5
    told = {"longest_seconds": round(longest, 1), "corrupt": corrupt, "continued": continued}
    return {"lost": len(cases), "not_ended_in_60_s": hung, **told}


PARTS: dict[str, Callable[[Path, Path, Any], dict[str, Any]]] = {
    "kill": kill,
    "disk": disk,
    "resume": resume,
    "seeds": seeds,
    "faults": faults,
    "twice": twice,
    "signals": signals,
    "processes": processes,
    "lost": lost,
}

if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", type=Path, required=True)
    parser.add_argument("--quick", action="store_true", help="a few of each")
    parser.add_argument("--only", default=",".join(PARTS), help="some of " + ", ".join(PARTS))
    chosen = parser.parse_args()
    os.environ["LORA_BOOTH_CACHE"] = str(chosen.work / "cache")
    place = photos_in(chosen.work)
    for name in chosen.only.split(","):
        folder = chosen.work / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        began = time.monotonic()
        found = PARTS[name](place, folder, (QUICK if chosen.quick else FULL)[name])
        print(json.dumps({"figure": name, **found, "seconds": round(time.monotonic() - began)}), flush=True)
