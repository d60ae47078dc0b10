"""Checkpoints: folders that are complete or absent, from which a run resumes exactly.

Every random draw comes from (seed, step), so the state is the adapter, the optimizer, the scaler, the recent losses and the
step.
"""

from __future__ import annotations

import errno
import hashlib
import io
import json
import os
import re
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import make_folder, read_json, sync_folder, write_synced

STATE, ADAPTER, METRICS, RECORD, MANIFEST = "state.pt", "adapter.safetensors", "metrics.jsonl", "run.json", "manifest.json"
SAMPLES, CROPS, SCORES, REPORT = "samples", "crops", "scores.json", "report.html"  # beside them in the folder of a run
ROOM = 3  # checkpoint sizes that must be free before one is written: chosen
KEPT = 2  # checkpoints; chosen: the newest, and one more in case that is damaged
OURS = re.compile(r"\d{6,}(\.\d+)?|\..+\.tmp")  # names in a folder of checkpoints that pruning may touch


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read completely, with every hash right."""

    folder: Path
    step: int
    number: int  # of the run's checkpoints, from 1: after a rollback an older one may have a later step
    contents: Mapping[str, bytes]

    def record(self) -> dict[str, Any]:
        """run.json at that step."""
        found: dict[str, Any] = json.loads(self.contents[RECORD])
        return found


def read_record(run: Path) -> dict[str, Any]:
    """run.json of a run's folder; empty if it cannot be read."""
    try:
        record = read_json(run / RECORD)
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def saved_adapters(run: Path) -> dict[int, Path]:
    """The adapters in a run's folder by step, in order: beside its samples, in its checkpoints, and the finished one."""
    found = {}
    for file in (*run.glob(f"{SAMPLES}/*.safetensors"), *run.glob(f"checkpoints/*/{ADAPTER}"), run / ADAPTER):
        name, _, _ = (file.parent.name if file.name == ADAPTER else file.stem).partition(".")
        step = read_record(run).get("step") if file.parent == run else int(name) if name.isdecimal() else None
        if isinstance(step, int) and file.is_file():
            found[step] = file  # of two for one step, the later one counts
    return dict(sorted(found.items()))


def packed_state(state: dict[str, Any]) -> bytes:
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


def unpacked_state(content: bytes) -> dict[str, Any]:
    state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    return state


def publish(parent: Path, step: int, number: int, contents: Mapping[str, bytes]) -> Checkpoint:
    """Write `parent/STEP` with `contents` (file name -> bytes) and a manifest of their hashes, then remove the oldest one.

    Raises OSError, and then the older ones are unchanged.
    """
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = json.dumps({"step": step, "number": number, "sha256": hashes}).encode()
    contents = {**contents, MANIFEST: manifest}
    make_folder(parent)
    return Checkpoint(write_folder(parent, f"{step:06d}", contents), step, number, contents)


def write_folder(
    parent: Path, name: str, contents: Mapping[str, bytes], *, check: Callable[[Path], None] = lambda folder: None
) -> Path:
    """`contents` as files of `parent/name`: a temporary folder, every file synced, `check`, renamed, the parent synced; at last
    the oldest ones are removed."""
    needed, free = ROOM * sum(map(len, contents.values())), shutil.disk_usage(parent).free
    if free < needed:
        raise OSError(errno.ENOSPC, f"no room: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB wanted")
    final, again = parent / name, 0
    while final.exists():  # after a rollback a step comes twice
        again += 1
        final = parent / f"{name}.{again}"
    temporary = parent / f".{name}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    try:
        temporary.mkdir()
        for file, content in contents.items():
            write_synced(temporary / file, content)
        sync_folder(temporary)
        check(temporary)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    sync_folder(parent)
    prune(parent)
    return final


def prune(parent: Path) -> None:
    """Remove all but the newest checkpoints, and leftovers of dead processes. The lock keeps others from writing here."""
    ours = [path for path in parent.iterdir() if OURS.fullmatch(path.name)]
    written = [folder for folder in in_place(ours) if (folder / MANIFEST).exists()]  # others belong to another program
    for old in sorted(written, key=number_of)[:-KEPT]:
        aside = parent / f".{old.name}.{os.getpid()}.tmp"  # so that no half-removed folder has a checkpoint's name
        try:
            ours.append(old.replace(aside))
        except OSError:
            continue
    for leftover in ours:
        if leftover.name.startswith("."):
            shutil.rmtree(leftover, ignore_errors=True)


def in_place(paths: Iterable[Path]) -> list[Path]:
    """The paths with the name of a complete checkpoint."""
    return [path for path in paths if OURS.fullmatch(path.name) and not path.name.startswith(".")]


def number_of(folder: Path) -> int:
    """The checkpoint's number in its run, from 1, by the manifest alone; 0 if that cannot be read."""
    try:
        return int(json.loads((folder / MANIFEST).read_bytes())["number"])
    except (OSError, ValueError, KeyError, TypeError):
        return 0


def read_back(folder: Path) -> Checkpoint | None:
    """The checkpoint in `folder` if every file has the hash in its manifest, else None."""
    try:
        written = (folder / MANIFEST).read_bytes()
        manifest = json.loads(written)
        contents = {name: (folder / Path(name).name).read_bytes() for name in manifest["sha256"]} | {MANIFEST: written}
        intact = all(hashlib.sha256(contents[name]).hexdigest() == sha for name, sha in manifest["sha256"].items())
        return Checkpoint(folder, manifest["step"], manifest["number"], contents) if intact and STATE in contents else None
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return None


def newest(parents: Sequence[Path], *, damaged: list[Path] | None = None) -> Checkpoint | None:
    """The newest intact checkpoint in these folders. Damaged ones are skipped, and added to `damaged`."""
    found: Checkpoint | None = None
    for parent in parents:
        try:
            folders = in_place(parent.iterdir())
        except OSError:
            continue
        for folder in folders:
            checkpoint = read_back(folder)
            if checkpoint is None:
                if damaged is not None:
                    damaged.append(folder)
            elif found is None or checkpoint.number > found.number:
                found = checkpoint
    return found
