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
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from ..files import make_folder, number, open_regular, parse_json, remove_folder, replacing, sync_folder, write_synced
from .remote import Place, Remote

STATE, ADAPTER, METRICS, RECORD, MANIFEST = "state.pt", "adapter.safetensors", "metrics.jsonl", "run.json", "manifest.json"
FILES = {STATE, ADAPTER, METRICS, RECORD}  # of a checkpoint, beside its manifest
SAMPLES, CROPS, SCORES, REPORT = "samples", "crops", "scores.json", "report.html"  # beside them in the folder of a run
ROOM = 3  # checkpoint sizes that must be free before one is written: chosen
KEPT = 2  # checkpoints; chosen: the newest, and one more in case that is damaged
NAMES = re.compile(r"\d{6,}(\.\d+)?")  # of checkpoints: the step, and a number where a step comes twice

PARTS = {"events": list, "seconds": dict, "surroundings": dict, "facts": dict}  # of run.json


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint that was read completely, with every hash right."""

    folder: Place
    step: int
    number: int  # of the run's checkpoints, from 1: after a rollback an older one may have a later step
    contents: Mapping[str, bytes]

    def record(self) -> dict[str, Any]:
        """run.json at that step; empty if it cannot be read."""
        return record_of(self.contents.get(RECORD, b""))


def read_record(run: Place) -> dict[str, Any]:
    """run.json of a run's folder; empty if it cannot be read."""
    try:
        record = parse_json(read_regular(run / RECORD))
    except (OSError, ValueError):
        return {}
    return record if isinstance(record, dict) else {}


def record_of(content: bytes) -> dict[str, Any]:
    """run.json; empty if it is not as `Record` writes it."""
    try:
        record = parse_json(content)
        fits = all(isinstance(record.get(name, kind()), kind) for name, kind in PARTS.items())
        fits = fits and all(isinstance(event, dict) for event in record.get("events", ()))
        fits = fits and None not in map(number, record.get("seconds", {}).values())
    except (ValueError, AttributeError):
        return {}
    return record if fits else {}


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
    """Raises ValueError for what `packed_state` did not write."""
    try:
        state: dict[str, Any] = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
        good = state["good"] and {**state["good"], "step": int(state["good"]["step"])}
        return {**state, "step": int(state["step"]), "levels": dict(state["levels"]), "good": good}
    except Exception as error:  # pickle's, zip's and PyTorch's
        raise ValueError(f"its state cannot be read ({type(error).__name__})") from error


def publish(parent: Path, step: int, number: int, contents: Mapping[str, bytes]) -> Checkpoint:
    """Write `parent/STEP` with `contents` (file name -> bytes) and a manifest of their hashes, then remove the oldest one.

    Raises OSError, and then the older ones are unchanged.
    """
    hashes = {name: hashlib.sha256(content).hexdigest() for name, content in contents.items()}
    manifest = json.dumps({"step": step, "number": number, "sha256": hashes}).encode()
    contents = {**contents, MANIFEST: manifest}
    make_folder(parent)
    return Checkpoint(write_folder(parent, step, contents), step, number, contents)


def write_folder(parent: Place, step: int, contents: Mapping[str, bytes], *, verify: bool = False) -> Place:
    """`contents` as the files of `parent/STEP`, synced and maybe read back, or no checkpoint; then the oldest are removed."""
    if parent.is_symlink():
        raise OSError(errno.ELOOP, f"{parent.name} is a link")
    if isinstance(parent, Path):
        needed, free = ROOM * sum(map(len, contents.values())), shutil.disk_usage(parent).free
        if free < needed:
            raise OSError(errno.ENOSPC, f"no room: {free / 1e6:.0f} MB free, {needed / 1e6:.0f} MB wanted")
    final, again = parent / f"{step:06d}", 0
    while os.path.lexists(final) if isinstance(final, Path) else manifest_of(final):  # after a rollback a step comes twice
        again += 1
        final = parent / f"{step:06d}.{again}"
    with complete_or_absent(final) as folder:
        for file, content in contents.items():
            path = folder / file
            write_synced(path, content) if isinstance(path, Path) else path.write_bytes(content)
        for file, content in contents.items() if verify else ():
            if uncached(folder / file) != content:
                raise OSError(errno.EIO, f"{file} was read back with other bytes")
    for old, manifest in sorted(checkpoints_in(parent).items(), key=lambda one: one[1]["number"])[:-KEPT]:  # type: ignore[no-any-return]
        with suppress(OSError):
            discard(old, manifest)
    return final


@contextmanager
def complete_or_absent(final: Place) -> Iterator[Place]:
    """Yield a folder whose files become those of `final`. After an error it is no checkpoint."""
    if isinstance(final, Path):
        with replacing(final) as temporary:
            temporary.mkdir()
            yield temporary
            sync_folder(temporary)
        return
    final.mkdir()
    try:
        yield final  # what a killed process left there without a manifest is overwritten
    except BaseException:
        with suppress(OSError):
            remove_files(final, FILES)
        raise


def uncached(path: Place) -> bytes:
    """The file's bytes, from the storage itself where the system allows it."""
    if isinstance(path, Remote):
        return path.read_bytes()
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()


def checkpoints_in(parent: Place) -> dict[Place, dict[str, Any]]:
    """The checkpoints in a folder, also damaged ones, with their manifests: folders with the name and manifest of one."""
    try:
        named: list[Place] = [] if parent.is_symlink() else [path for path in parent.iterdir() if NAMES.fullmatch(path.name)]
    except OSError:
        return {}
    manifests = {path: manifest_of(path) for path in named if not path.is_symlink()}
    return {path: manifest for path, manifest in manifests.items() if manifest}


def manifest_of(folder: Place) -> dict[str, Any]:
    """{"step": n, "number": n, "sha256": {file name: hash}}; empty if there is none like this."""
    try:
        found = parse_json(read_regular(folder / MANIFEST))
        steps = [number(found[name], least=0) for name in ("step", "number")]
        ours = None not in steps and found["sha256"].keys() <= FILES
        return {**found, "step": int(found["step"]), "number": int(found["number"])} if ours else {}
    except (OSError, ValueError, KeyError, TypeError, AttributeError):
        return {}


def discard(checkpoint: Place, manifest: Mapping[str, Any]) -> None:
    """Remove a checkpoint, so that a kill leaves no half of it under its name. What others put into its folder stays."""
    ours = {*manifest["sha256"], MANIFEST}
    if isinstance(checkpoint, Path) and {path.name for path in checkpoint.iterdir()} <= ours:
        remove_folder(checkpoint)
    else:
        remove_files(checkpoint, ours)


def remove_files(checkpoint: Place, names: Iterable[str]) -> None:
    for name in (MANIFEST, *names):  # without a manifest it is no checkpoint any more
        (checkpoint / name).unlink(missing_ok=True)
    if isinstance(checkpoint, Remote):
        with suppress(OSError):  # an object store has no folders, and others may have put files into this one
            checkpoint.rmdir()


def identity_in(checkpoint: Place) -> Any:
    """The identity of its run; None if it is damaged."""
    return read_record(checkpoint).get("identity")


def read_back(folder: Place) -> Checkpoint | None:
    """The checkpoint in `folder` if every file has the hash in its manifest, else None."""
    manifest = manifest_of(folder)
    try:
        contents = {name: read_regular(folder / name) for name in (*manifest.get("sha256", ()), MANIFEST)}
        if any(hashlib.sha256(contents[name]).hexdigest() != sha for name, sha in manifest["sha256"].items()):
            return None
        found = Checkpoint(folder, manifest["step"], manifest["number"], contents)
        return found if STATE in contents else None
    except (OSError, ValueError, KeyError):
        return None


def read_regular(path: Place) -> bytes:
    """Raises OSError also for a link, a named pipe or a device."""
    if isinstance(path, Remote):
        return path.read_bytes()
    if path.is_symlink():
        raise OSError(errno.ELOOP, "a link", str(path))
    with open_regular(path) as file:
        return file.read()


def newest(parents: Sequence[Place], *, damaged: dict[Place, int] | None = None) -> Checkpoint | None:
    """The newest intact checkpoint in these folders. Damaged ones are skipped, and added to `damaged` with their numbers."""
    found: Checkpoint | None = None
    for folder, manifest in ((folder, m) for parent in parents for folder, m in checkpoints_in(parent).items()):
        checkpoint = read_back(folder)
        if checkpoint is None:
            if damaged is not None:
                damaged[folder] = manifest["number"]
        elif found is None or checkpoint.number > found.number:
            found = checkpoint
    return found
