"""A second place for checkpoints: mounted storage that outlives the machine, e.g. a notebook's drive."""

from __future__ import annotations

import errno
import os
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

from ..files import make_folder
from .checkpoint import Checkpoint, checkpoints_in, identity_in, write_folder

PATIENCE = 120.0  # seconds that the end of a run waits for the last copy: chosen


class Mirror:
    """Copies checkpoints to `folder`, reads each back and compares. In a thread: slow or hanging storage never delays training.

    A checkpoint that comes while the previous one is still being copied is skipped; the last one is waited for.
    Storage that is gone (an unmounted drive) fails until it is back: the folder is created at the beginning only, or copies
    would go into the empty mount point.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._waiting: Checkpoint | None = None
        self._news: list[str] = []
        self._made = False
        self.seconds = 0.0  # of the longest copy
        self.runs: set[object] = {None}  # identities of the run whose copies are here; damaged ones have none

    def begin(self) -> None:
        """Create the folder. A failure is reported by the first copy."""
        try:
            self._make()
        except OSError:
            pass

    def _make(self) -> None:
        if not self._made:
            make_folder(self.folder)
            self._made = True

    def copy(self, checkpoint: Checkpoint) -> None:
        if self._thread is not None and self._thread.is_alive():
            self._waiting = checkpoint
            return
        self._waiting = None
        self._thread = threading.Thread(target=self._copy, args=(checkpoint,), daemon=True)
        self._thread.start()

    def finish(self) -> None:
        """Wait for the last copy."""
        for _ in range(2):
            if self._thread is not None:
                self._thread.join(PATIENCE)
                if self._thread.is_alive():
                    self._news.append("the mirror does not answer")
                    return
            if self._waiting is not None:
                self.copy(self._waiting)

    def news(self) -> Iterator[str]:
        """Lines for the user since the last call."""
        while self._news:
            yield self._news.pop(0)

    def _copy(self, checkpoint: Checkpoint) -> None:
        began = time.monotonic()
        try:
            self._make()
            if self._of_another_run(checkpoint):
                raise OSError(errno.EEXIST, "it holds checkpoints of another run")
            write_folder(self.folder, f"{checkpoint.step:06d}", checkpoint.contents, check=self._compare(checkpoint))
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            self._news.append(f"the mirror has no copy of step {checkpoint.step}: {reason}")
        else:
            self._news.append(f"safe at step {checkpoint.step}: copied to the mirror and read back")
        self.seconds = max(self.seconds, time.monotonic() - began)

    def _of_another_run(self, checkpoint: Checkpoint) -> bool:
        """Two runs with one mirror would remove each other's copies. (Locks are unreliable on mounted storage.)"""
        ours = {*self.runs, None, checkpoint.record().get("identity")}
        return any(identity_in(folder) not in ours for folder in checkpoints_in(self.folder))

    def _compare(self, checkpoint: Checkpoint) -> Callable[[Path], None]:
        def check(written: Path) -> None:
            for name, content in checkpoint.contents.items():
                if uncached(written / name) != content:
                    raise OSError(errno.EIO, f"{name} was read back with other bytes")

        return check


def uncached(path: Path) -> bytes:
    """The file's bytes, from the storage itself where the system allows it."""
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()
