"""The adapters in a run's folder, and the file of their scores."""

from __future__ import annotations

import json
import os
from collections.abc import Iterator
from pathlib import Path

from ..adapters.adapter import Adapter
from ..errors import EvaluationError, shown
from ..files import write_file
from ..training.checkpoint import ADAPTER, RECORD, SAMPLES, SCORES, read_record
from .protocol import Candidate
from .results import Comparison


def is_run(path: str | Path) -> bool:
    return (Path(path) / RECORD).is_file()


def candidates_of(run: str | Path) -> list[Candidate]:
    """The adapters that a run has saved, by step: next to its samples, in its checkpoints, and the finished one.

    Raises EvaluationError if there is none.
    """
    run = Path(run)
    files = dict(saved_adapters(run))
    if not files:
        raise EvaluationError(f"{shown(run)}: no adapter in this run's folder yet; train longer, or pass adapter files")
    return [Candidate(Adapter.load(files[step]), name=f"step {step}", step=step) for step in sorted(files)]


def saved_adapters(run: Path) -> Iterator[tuple[int, Path]]:
    """Steps and files; of two for one step, the later one counts."""
    for file in (*run.glob(f"{SAMPLES}/*.safetensors"), *run.glob(f"checkpoints/*/{ADAPTER}")):
        name, _, _ = (file.parent.name if file.name == ADAPTER else file.stem).partition(".")
        if name.isdigit():
            yield int(name), file
    last = read_record(run).get("step")
    if isinstance(last, int) and (run / ADAPTER).is_file():
        yield last, run / ADAPTER


def scores_file(folder: str | Path, made: Comparison) -> Path:
    """Write the scores to a folder; in that of a run, the report shows them until another run starts there."""
    path = Path(folder) / SCORES
    identity = read_record(Path(folder)).get("identity")
    content = made.as_dict() | ({} if identity is None else {"identity": identity})
    write_file(path, (json.dumps(content, indent=1) + os.linesep).encode())
    return path
