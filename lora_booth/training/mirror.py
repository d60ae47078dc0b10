"""A second place for checkpoints: storage that outlives the machine, e.g. a notebook's drive or a bucket."""

from __future__ import annotations

import errno
import threading
import time
from contextlib import suppress

from ..files import make_folder
from .checkpoint import Checkpoint, checkpoints_in, identity_in, write_folder
from .remote import Place, Remote

PATIENCE = 120.0  # seconds that the end of a run waits for the last copy: chosen


class Mirror:
    """Copies checkpoints to `folder`, reads each back and compares. In a thread: slow or hanging storage never delays training.

    A checkpoint that comes while the previous one is still being copied is skipped; the last one is waited for.
    Storage that is gone (an unmounted drive) fails until it is back: the folder is created at the beginning only, or copies
    would go into the empty mount point.
    """

    def __init__(self, folder: Place) -> None:
        self.folder = folder
        self.news: list[str] = []  # lines for the user
        self.seconds = 0.0  # of the longest copy
        self.runs: set[object] = set()  # identities of the run whose copies are here
        self._thread: threading.Thread | None = None
        self._waiting: Checkpoint | None = None
        self._made = False
        with suppress(OSError):  # the first copy reports it
            self._make()

    def _make(self) -> None:
        if not self._made:
            self.folder.mkdir(parents=True) if isinstance(self.folder, Remote) else make_folder(self.folder)
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
                    self.news.append("the mirror does not answer")
                    return
            if self._waiting is not None:
                self.copy(self._waiting)

    def _copy(self, checkpoint: Checkpoint) -> None:
        began = time.monotonic()
        try:
            self._make()
            # two runs with one mirror would remove each other's copies (locks are unreliable on mounted storage); a damaged
            # copy has no identity
            ours = {*self.runs, None, checkpoint.record().get("identity")}
            if any(identity_in(folder) not in ours for folder in checkpoints_in(self.folder)):
                raise OSError(errno.EEXIST, "it holds checkpoints of another run")
            write_folder(self.folder, checkpoint.step, checkpoint.contents, verify=True)
        except (OSError, MemoryError) as error:
            reason = getattr(error, "strerror", None) or type(error).__name__
            self.news.append(f"the mirror has no copy of step {checkpoint.step}: {reason}")
        else:
            self.news.append(f"safe at step {checkpoint.step}: copied to the mirror and read back")
        self.seconds = max(self.seconds, time.monotonic() - began)
