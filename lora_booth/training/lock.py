"""One folder, one run: a lock of the operating system, which goes with its process however that ends."""

from __future__ import annotations

import errno
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from ..errors import TrainingError, shown
from ..files import make_folder

LOCK = "lock"
FAR = 1 << 30  # where Windows locks a byte: behind the text, which others may then read

try:
    import fcntl
except ImportError:  # Windows
    import msvcrt

    TAKEN = (errno.EACCES, errno.EDEADLK)  # what its runtime says when another handle has the byte

    def take(descriptor: int) -> None:
        at_lock(descriptor, msvcrt.LK_NBLCK)  # type: ignore[attr-defined]

    def let_go(descriptor: int) -> None:
        at_lock(descriptor, msvcrt.LK_UNLCK)  # type: ignore[attr-defined]

    def at_lock(descriptor: int, mode: int) -> None:
        os.lseek(descriptor, FAR, os.SEEK_SET)  # `locking` begins at the file's position
        msvcrt.locking(descriptor, mode, 1)  # type: ignore[attr-defined]

else:
    TAKEN = (errno.EAGAIN, errno.EACCES)  # the second on some network storage

    def take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)

    def let_go(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_UN)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of `folder` (it is made). False: there are no locks here. Raises TrainingError: another run has it."""
    try:
        make_folder(folder)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except (OSError, ValueError) as error:  # the second: a name that no file can have
        reason = getattr(error, "strerror", None) or str(error)
        raise TrainingError(f"{shown(folder)}: cannot be written ({reason}); give out= another folder") from error
    try:
        held = True
        try:
            take(descriptor)
        except OSError as error:
            if error.errno in TAKEN:
                os.lseek(descriptor, 0, os.SEEK_SET)
                holder = shown(os.read(descriptor, 200).decode("utf-8", "replace").strip()) or "another process"
                raise TrainingError(
                    f"{shown(folder)}: another run is at work in it ({holder}); wait for its end, or give out= another folder"
                ) from None
            held = False
        if held:
            tell(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n")
        try:
            yield held
        finally:
            if held:
                tell(descriptor, "")
                with suppress(OSError):  # a storage that has gone
                    let_go(descriptor)  # at once: Windows takes its time after a close, and a forked process keeps a copy open
    finally:
        os.close(descriptor)


def tell(descriptor: int, holder: str) -> None:
    """Who holds it, for the others' error; a full disk is no reason to stop."""
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, holder.encode())
    except OSError:
        pass
