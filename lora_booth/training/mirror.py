"""A second place for checkpoints: mounted storage that outlives the machine, such as a notebook's drive."""

from __future__ import annotations

import errno
import os
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from ..checkpoint import Checkpoint, write_folder

PATIENCE = 120.0  # seconds that the end of a run waits for the last copy


class Mirror:
    """Copies checkpoints to `folder`, reads each back and compares. In a thread: slow or hanging storage holds up no training.

    A checkpoint that comes while the one before is still being copied is left out; the last one is waited for.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._thread: threading.Thread | None = None
        self._waiting: Checkpoint | None = None
        self._news: list[str] = []
        self.safe = 0  # the newest step that was read back

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
        try:
            write_folder(self.folder, f"{checkpoint.step:06d}", checkpoint.contents, check=self._compare(checkpoint))
        except OSError as error:
            self._news.append(f"the mirror has no copy of step {checkpoint.step}: {error.strerror or type(error).__name__}")
        else:
            self.safe = checkpoint.step
            self._news.append(f"safe at step {checkpoint.step}: copied to the mirror and read back")

    def _compare(self, checkpoint: Checkpoint) -> Callable[[Path], None]:
        def check(written: Path) -> None:
            for name, content in checkpoint.contents.items():
                if uncached(written / name) != content:
                    raise OSError(errno.EIO, f"{name} was read back with other bytes")

        return check


def uncached(path: Path) -> bytes:
    """The file's bytes, from the storage itself where the system lets us ask for that."""
    with open(path, "rb") as file:
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        return file.read()
