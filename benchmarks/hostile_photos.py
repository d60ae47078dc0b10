"""Time and memory that hostile photos take, each in a process of its own: found, cropped and audited.

python benchmarks/hostile_photos.py      (not on Windows)

The photos and their outcomes are those of tests/hostile_photos.py, with some more that are too large for the tests.
Memory is the whole process's peak (ru_maxrss), with what Python, numpy and Pillow take.
"""

from __future__ import annotations

import argparse
import json
import os
import resource
import shutil
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))

from hostile_photos import HostilePhoto, good_folder, hostile_photos

from lora_booth.errors import PhotoError
from lora_booth.photos.audit import audit_photos
from lora_booth.photos.finding import find_photos

MOST_SECONDS, MOST_MIB = 1.0, 1024


def outcome_of(folder: Path, file: str) -> tuple[str, str]:
    try:
        found = find_photos(folder)
        audit = audit_photos(found.photos, found.skipped)
    except PhotoError as error:
        return "refused", str(error)
    for report in audit.photos:
        if report.photo.path.name == file:
            return "used", "; ".join(report.notes)
    return "skipped", next((one.reason for one in found.skipped if one.path.name == file), "not listed")


def in_a_child(work: Callable[[], Any]) -> Any:
    """What `work` returns, done by a fork of this process, so that its memory is its own."""
    read, write = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            answer = work()
        except BaseException as error:  # also what should never come
            answer = {"outcome": "exception", "said": repr(error), "seconds": 0.0, "mib": 0.0}
        os.write(write, json.dumps(answer).encode())
        os._exit(0)
    os.close(write)
    with os.fdopen(read, "rb") as pipe:
        answer = json.loads(pipe.read() or b"null")
    os.waitpid(child, 0)
    return answer or {"outcome": "killed", "said": "", "seconds": 0.0, "mib": 0.0}


def judged(folder: Path, file: str) -> dict[str, Any]:
    """What becomes of the file, and what that takes. Seconds of this process: other work on the machine does not count."""
    started = time.process_time()
    outcome, said = outcome_of(folder, file)
    seconds = time.process_time() - started
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)
    return {"outcome": outcome, "said": said, "seconds": seconds, "mib": peak}


def main() -> None:
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    rows: list[tuple[HostilePhoto, dict[str, Any]]] = []
    with tempfile.TemporaryDirectory() as scratch:
        folder = good_folder(Path(scratch) / "good")
        good = in_a_child(lambda: judged(folder, "good0.png"))
        print(f"three good photos of 96 x 80: {good['seconds']:.2f} s, peak {good['mib']:.0f} MiB")
        for number, hostile in enumerate(hostile_photos()):
            folder = good_folder(Path(scratch) / str(number) / "rex")
            in_a_child(lambda hostile=hostile, folder=folder: hostile.build(folder) or "built")
            rows.append((hostile, in_a_child(lambda hostile=hostile, folder=folder: judged(folder, hostile.file))))
            shutil.rmtree(folder.parent)
    right = [h for h, row in rows if row["outcome"] == h.outcome and h.says in row["said"]]
    for hostile, row in sorted(rows, key=lambda pair: -pair[1]["seconds"]):
        wrong = "" if hostile in right else f"  WRONG: {row['outcome']}: {row['said']}"
        over = row["seconds"] > MOST_SECONDS or row["mib"] > MOST_MIB
        if wrong or over or row["seconds"] > 0.5 or row["mib"] > 200:
            print(f"  {row['seconds']:6.2f} s  {row['mib']:6.0f} MiB  {hostile.name}{'  OVER' if over else ''}{wrong}")
    slow = sum(row["seconds"] > MOST_SECONDS for _, row in rows)
    print(
        f"{len(right)} of {len(rows)} as stated; over {MOST_SECONDS:g} s: {slow}; "
        f"over {MOST_MIB} MiB: {sum(row['mib'] > MOST_MIB for _, row in rows)}; "
        f"highest peak {max(row['mib'] for _, row in rows):.0f} MiB"
    )


if __name__ == "__main__":
    main()
