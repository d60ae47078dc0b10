"""Pause and resume exactly: a run's state in one folder, whole or not there at all.

Every random draw comes from (seed, step), so the state is the adapter, the optimizer, the scaler and the step.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from pathlib import Path
from typing import Any

import torch

from .errors import TrainingError

STATE, MANIFEST = "state.pt", "manifest.json"


def save_checkpoint(run: Path, step: int, state: dict[str, Any], *, identity: str) -> Path:
    """Write `run/checkpoints/STEP`: a temporary folder first, synced, then renamed; older ones go only after that."""
    parent = run / "checkpoints"
    parent.mkdir(parents=True, exist_ok=True)
    final, temporary = parent / f"{step:06d}", parent / f".{step:06d}.{os.getpid()}.tmp"
    shutil.rmtree(temporary, ignore_errors=True)
    temporary.mkdir()
    try:
        with open(temporary / STATE, "wb") as file:
            torch.save(state, file)
            sync(file.fileno())
        manifest = {"step": step, "identity": identity, "sha256": sha256(temporary / STATE)}
        with open(temporary / MANIFEST, "w", encoding="utf-8") as text:
            json.dump(manifest, text)
            text.flush()
            sync(text.fileno())
        if final.exists():
            shutil.rmtree(final)
        os.replace(temporary, final)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise
    if hasattr(os, "O_DIRECTORY"):
        descriptor = os.open(parent, os.O_RDONLY | os.O_DIRECTORY)
        sync(descriptor)
        os.close(descriptor)
    for old in parent.iterdir():
        if old != final:
            shutil.rmtree(old, ignore_errors=True)
    return final


def latest_checkpoint(run: Path, *, identity: str, device: torch.device) -> dict[str, Any] | None:
    """The newest whole state of this run. Raises TrainingError when it belongs to other settings or photos."""
    parent = run / "checkpoints"
    if not parent.is_dir():
        return None
    for folder in sorted((f for f in parent.iterdir() if f.name.isdigit()), reverse=True):
        try:
            manifest = json.loads((folder / MANIFEST).read_text(encoding="utf-8"))
            whole = manifest["sha256"] == sha256(folder / STATE)
        except (OSError, ValueError, KeyError):
            continue
        if not whole:
            continue
        if manifest["identity"] != identity:
            raise TrainingError(
                f"{run}: holds a run with other photos, settings or another base (step {manifest['step']}); "
                "use another folder, or delete this one's 'checkpoints' to start anew"
            )
        state: dict[str, Any] = torch.load(folder / STATE, map_location=device, weights_only=True)
        return state
    return None


def sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return (
            hashlib.file_digest(file, "sha256").hexdigest()
            if hasattr(hashlib, "file_digest")
            else hashlib.sha256(file.read()).hexdigest()
        )


def sync(descriptor: int) -> None:
    os.fsync(descriptor)
