"""The lock of a run's folder."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from filelock import FileLock, Timeout

from ..errors import TrainingError, setting, shown
from ..files import make_folder

LOCK = ".lora_booth.lock"


@contextmanager
def locked(folder: Path, name: str = LOCK, *, of: Path | None = None, wait: float = 0) -> Iterator[bool]:
    """Hold the lock of `folder`, created if missing, or of a file in it. False: the storage has no locks. Raises TrainingError.

    wait  seconds in which another process may still give it up
    The lock ends with its process, however that ends; a text beside it names the process for the error of a second run.
    """
    what, remedy = shown(of or folder), "use another folder" if of is None else f"pass another file as {setting('out')}"
    file, holder = folder / name, folder / f"{name}.txt"
    try:
        make_folder(folder)
        if file.is_symlink():
            raise OSError(errno.ELOOP, f"{name} is a link")
        file.touch()
    except (OSError, ValueError) as error:  # the second: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(f"{what}: cannot be written ({reason}); {remedy}") from error
    # no lock file without flock: after a crash of the machine it would remain, and block the run
    lock = FileLock(file, timeout=wait, fallback_to_soft=False)
    try:
        lock.acquire()
    except Timeout:
        by = "another process"
        with suppress(OSError):
            by = shown(holder.read_text("utf-8", "replace").strip()[:200]) or by
        raise TrainingError(f"{what}: another run is using it ({by}); wait until it ends, or {remedy}") from None
    except (OSError, NotImplementedError):
        pass
    try:
        with suppress(OSError):  # a full disk does not matter here
            holder.unlink(missing_ok=True)  # of a process that was killed
            holder.write_text(f"process {os.getpid()} on {socket.gethostname()}\n", encoding="utf-8")
        yield lock.is_locked
    finally:
        with suppress(OSError):  # the storage is gone
            holder.unlink(missing_ok=True)
        with suppress(OSError):
            lock.release()


@contextmanager
def locked_file(path: Path) -> Iterator[None]:
    """The same for one file that a run will write: a lock beside it, removed at the end."""
    lock = f".{path.name}{LOCK}"
    with locked(path.absolute().parent, lock, of=path):
        try:
            yield
        finally:
            with suppress(OSError):
                path.with_name(lock).unlink()
