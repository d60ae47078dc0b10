"""The adapters in a run's folder, and the file of their scores."""

from __future__ import annotations

import json
import os
from pathlib import Path

from ..adapters.adapter import Adapter
from ..errors import EvaluationError, shown
from ..files import Owned
from ..training.checkpoint import RECORD, SCORES, read_record, saved_adapters
from .protocol import Candidate
from .results import Comparison


def is_run(path: str | Path) -> bool:
    return (Path(path) / RECORD).is_file()


def candidates_of(run: str | Path) -> list[Candidate]:
    """The adapters that a run has saved, by step: next to its samples, in its checkpoints, and the finished one.

    Raises EvaluationError if there is none.
    """
    files = saved_adapters(Path(run))
    if not files:
        raise EvaluationError(f"{shown(run)}: no adapter in this run's folder yet; train longer, or pass adapter files")
    return [Candidate(Adapter.load(file), name=f"step {step}", step=step) for step, file in files.items()]


def scores_file(folder: str | Path, made: Comparison) -> Path:
    """Write the scores to a folder; in that of a run, the report shows them until another run starts there.

    Raises EvaluationError, also if a file of this name is not ours.
    """
    identity = read_record(Path(folder)).get("identity")
    content = made.as_dict() | ({} if identity is None else {"identity": identity})
    try:
        return Owned(Path(folder)).write(SCORES, (json.dumps(content, indent=1) + os.linesep).encode())
    except OSError as error:
        raise EvaluationError(f"{shown(folder)}: {SCORES} cannot be written ({error.strerror}); move it away") from error
