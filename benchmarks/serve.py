"""Many callers of one server: pictures a minute in shared batches, against one by one; and whether each gets its own picture.

python benchmarks/serve.py                                         100 adapters, 8 callers, 200 requests on the toybox
python benchmarks/serve.py --adapters 10 --requests 16 --steps 5 --threads 1

The server runs in a process of its own (`lora-booth serve`), and callers are OpenAI's client. One by one: the same requests,
each drawn by `Serving.generate` alone, in this process, once the server has ended. A picture is wrong if it differs from the
one drawn alone by more than rounding.
"""

from __future__ import annotations

import argparse
import base64
import io
import json
import os
import random
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import psutil
import torch
from openai import OpenAI
from PIL import Image
from serving import random_adapter

import lora_booth as lb

ROUNDING = 4  # of 255
WEIGHT = 5.0  # of an adapter, with which pictures of two adapters differ by far more
TOKEN = "a-token-for-measuring"
PROMPTS = ("a photo of a dog in the snow", "a photo of a mug on the beach", "a photo of an owl")


def started(folder: Path, arguments: argparse.Namespace) -> tuple[subprocess.Popen[bytes], str]:
    """The server, and its address."""
    log = folder / "log"
    command = [sys.executable, "-m", "lora_booth.cli", "serve", "--adapters", str(folder), "--port", "0"]
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


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--adapters", type=int, default=100)
    parser.add_argument("--callers", type=int, default=8)
    parser.add_argument("--requests", type=int, default=200)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--threads", type=int, help="of PyTorch [one for each CPU]")
    arguments = parser.parse_args()
    if arguments.threads:
        torch.set_num_threads(arguments.threads)
    base, chance = lb.BaseModel.load("toybox"), random.Random(0)
    names = [f"a{i}" for i in range(arguments.adapters)]
    asked = [(chance.choice(names), PROMPTS[i % len(PROMPTS)], i) for i in range(arguments.requests)]
    with TemporaryDirectory() as folder:
        for i, name in enumerate(names):
            random_adapter(base, name, 4, i).save(Path(folder) / f"{name}.safetensors")
        process, address = started(Path(folder), arguments)
        memory = psutil.Process(process.pid)

        def draw(one: tuple[str, str, int]) -> tuple[np.ndarray | None, float]:
            began = time.perf_counter()
            try:
                how = {"seed": one[2], "steps": arguments.steps}
                answer = client.images.generate(model=f"{one[0]}:{WEIGHT}", prompt=one[1], extra_body=how)
                picture = np.asarray(Image.open(io.BytesIO(base64.b64decode(answer.data[0].b64_json))))
            except Exception as error:
                print(f"{one}: {error}", file=sys.stderr)
                picture = None
            return picture, time.perf_counter() - began

        try:
            with OpenAI(base_url=address, api_key=TOKEN, timeout=3600) as client:
                draw(asked[0])  # what is done once only
                half, used = len(asked) // 2, [memory.memory_info().rss]
                began = time.perf_counter()
                found: list[tuple[np.ndarray | None, float]] = []
                with ThreadPoolExecutor(arguments.callers) as callers:
                    for part in (asked[:half], asked[half:]):
                        found += callers.map(draw, part)
                        used.append(memory.memory_info().rss)
                together = time.perf_counter() - began
        finally:
            process.terminate()
            process.wait()
        with lb.Serving(base) as live:
            for name in names:
                live.load(name, lb.Adapter.load(Path(folder) / f"{name}.safetensors"))
            live.generate([lb.Request(PROMPTS[0])], steps=1)
            began = time.perf_counter()
            alone = [live.generate([lb.Request(p, {n: WEIGHT}, s)], steps=arguments.steps)[0].image for n, p, s in asked]
            apart = time.perf_counter() - began
            name, prompt, seed = asked[0]
            others = [one for one in names if one != name][:5]
            with_others = live.generate([lb.Request(prompt, {one: WEIGHT}, seed) for one in others], steps=arguments.steps)
    differences = [difference(one, other) for (one, _), other in zip(found, alone, strict=True) if one is not None]
    seconds = sorted(took for _, took in found)
    report: dict[str, Any] = {
        "settings": {**vars(arguments), "threads": torch.get_num_threads()},
        "lost": sum(one is None for one, _ in found),
        "wrong": sum(one > ROUNDING for one in differences),
        "largest difference, of 255": max(differences),
        "smallest with another adapter": min(difference(one.image, alone[0]) for one in with_others),
        "pictures a minute": round(60 * len(asked) / together, 1),
        "pictures a minute, one by one": round(60 * len(asked) / apart, 1),
        "times as fast": round(apart / together, 2),
        "seconds of a request, median and longest": [round(seconds[len(seconds) // 2], 2), round(seconds[-1], 2)],
        "memory of the server, MB, first to last": [round(one / 2**20) for one in used],
    }
    print(json.dumps(report, indent=1))


if __name__ == "__main__":
    main()
