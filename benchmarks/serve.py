"""Many callers of one server: pictures a minute in shared batches, against one by one; and whether each gets its own picture.

python benchmarks/serve.py                                         100 adapters, 8 callers, 200 requests on the toybox
python benchmarks/serve.py --adapters 4 --callers 2 --requests 8 --queue 4 --steps 5 --threads 1

The server runs in a process of its own (`lora-booth serve`), and callers are OpenAI's client. One by one: the same requests,
each drawn by `Serving.generate` alone, in this process, once the server has ended. A picture is wrong if it differs from the
one drawn alone by more than rounding. A flood, twice what may wait, comes at the end.
"""

from __future__ import annotations

import argparse
import base64
import io
import os
import random
import re
import statistics
import subprocess
import sys
import time
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from openai import APIStatusError, OpenAI
from PIL import Image
from serving import random_adapter, timed

import lora_booth as lb
from lora_booth.serve.limits import Limits

ROUNDING = 4  # of 255
WEIGHT = 5.0  # of an adapter, with which pictures of two adapters differ by far more
TOKEN = "a-token-for-measuring"
PROMPTS = ("a photo of a dog in the snow", "a photo of a mug on the beach", "a photo of an owl")


def started(folder: Path, arguments: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    """The server, and its address."""
    log = folder / "log"
    command = [sys.executable, "-m", "lora_booth.cli", "serve", "--adapters", str(folder), "--port", "0"]
    command += ["--queue", str(arguments.queue)]
    environment = os.environ | {"LORA_BOOTH_TOKEN": TOKEN}
    if arguments.threads:
        environment["OMP_NUM_THREADS"] = str(arguments.threads)
    with open(log, "wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment)
    while "token: " not in log.read_text():
        if process.poll() is not None:
            raise SystemExit(log.read_text())
        time.sleep(0.1)
    return process, re.findall(r"http://\S+", log.read_text())[0]


def difference(one: Any, other: Any) -> int:
    return int(np.abs(np.asarray(one).astype(int) - np.asarray(other).astype(int)).max())


def switching(live: lb.Serving) -> float:
    """Milliseconds from one adapter, or none, to another."""
    names = list(live.loaded)
    chosen = [{names[0]: 1.0}, dict.fromkeys(names[1:][-1:], 1.0)]
    return statistics.median(timed(lambda i=i: live.use(chosen[i % 2])) for i in range(100))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--queue", type=int, default=Limits.queue, help="pictures that may wait")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, help="of PyTorch [one for each CPU]")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    base, chance, count = lb.BaseModel.load("toybox"), random.Random(0), arguments.requests
    names = [f"a{i}" for i in range(arguments.adapters)]
    asked = [(chance.choice(names), PROMPTS[i % len(PROMPTS)], i) for i in range(count)]
    with TemporaryDirectory() as folder:
        files = [random_adapter(base, name, 4, i).save(Path(folder) / f"{name}.safetensors") for i, name in enumerate(names)]
        megabytes = sum(file.stat().st_size for file in files) / 2**20
        process, address = started(Path(folder), arguments)
        used: dict[str, int] = {}

        def note_memory(when: object) -> None:
            used[str(when)] = round(psutil.Process(process.pid).memory_info().rss / 2**20)

        def drawn(client: OpenAI, one: tuple[str, str, int]) -> np.ndarray:
            how = {"seed": one[2], "steps": arguments.steps}
            answer = client.images.generate(model=f"{one[0]}:{WEIGHT}", prompt=one[1], extra_body=how)
            return np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))

        def ask(one: tuple[str, str, int]) -> tuple[np.ndarray | None, float]:
            began = time.perf_counter()
            try:
                picture = drawn(client, one)
            except Exception as error:
                print(f"{one}: {error}", file=sys.stderr)
                picture = None
            return picture, time.perf_counter() - began

        def flood(one: tuple[str, str, int]) -> int:
            try:
                drawn(hasty, one)
            except APIStatusError as error:
                return error.status_code
            return 200

        try:
            with OpenAI(base_url=address, api_key=TOKEN, timeout=3600) as client, client.with_options(max_retries=0) as hasty:
                note_memory("at the start")
                ask(asked[0])  # what is done once only
                found: list[tuple[np.ndarray | None, float]] = []
                began = time.perf_counter()
                with ThreadPoolExecutor(arguments.callers) as callers:
                    for upto in (count // 4, count // 2, count):
                        found += callers.map(ask, asked[len(found) : upto])
                        note_memory(f"after {upto}")
                together = time.perf_counter() - began
                many = 2 * arguments.queue
                with ThreadPoolExecutor(many) as callers:
                    answers = Counter(callers.map(flood, asked[:1] * many))
                note_memory("after the flood")
        finally:
            process.terminate()
            process.wait()
        with lb.Serving(base) as live:
            times = []
            for name, file in zip(names, files, strict=True):
                live.load(name, lb.Adapter.load(file))
                if name in (names[0], names[-1]):
                    live.generate([lb.Request(PROMPTS[0])], steps=2)  # what is done once only
                    alone_ms = timed(lambda: live.generate([lb.Request(PROMPTS[0])], steps=arguments.steps))
                    times.append((switching(live), alone_ms))
            began = time.perf_counter()
            alone = [live.generate([lb.Request(p, {n: WEIGHT}, s)], steps=arguments.steps)[0].image for n, p, s in asked]
            apart = time.perf_counter() - began
            name, prompt, seed = asked[0]
            others = [one for one in names if one != name][:5]
            with_others = live.generate([lb.Request(prompt, {one: WEIGHT}, seed) for one in others], steps=arguments.steps)
    differences = [difference(one, other) for (one, _), other in zip(found, alone, strict=True) if one is not None]
    seconds = sorted(took for _, took in found)
    table = {
        "settings": ", ".join(f"{name} {value}" for name, value in vars(arguments).items() if name != "threads"),
        "threads": torch.get_num_threads(),
        "lost": sum(one is None for one, _ in found),
        "wrong": sum(one > ROUNDING for one in differences),
        "largest difference, of 255": max(differences, default=0),
        "smallest with another adapter": min(difference(one.image, alone[0]) for one in with_others),
        "pictures a minute": f"{60 * count / together:.1f}",
        "pictures a minute, one by one": f"{60 * count / apart:.1f}",
        "times as fast": f"{apart / together:.2f}",
        "seconds of a request, median and longest": f"{statistics.median(seconds):.2f}, {seconds[-1]:.2f}",
        "memory of the server, MB": ", ".join(f"{when} {size}" for when, size in used.items()),
        "size of all adapters, MB": f"{megabytes:.1f}",
        f"answers to {many} requests at once": ", ".join(f"{number} x {code}" for code, number in sorted(answers.items())),
        f"ms to switch with 1 and {len(names)} loaded": ", ".join(f"{switch:.2f}" for switch, _ in times),
        f"ms of a picture with 1 and {len(names)} loaded": ", ".join(f"{picture:.0f}" for _, picture in times),
    }
    print("| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in table.items()), sep="\n")


if __name__ == "__main__":
    main()
