"""One folder, one run: a lock of the operating system, which goes with its process however that ends."""

from __future__ import annotations

import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from ..errors import TrainingError, shown

LOCK = "lock"
FAR = 1 << 30  # where Windows locks a byte: behind the text, which others may then read

if os.name == "nt":
    import msvcrt

    def take(descriptor: int) -> None:
        os.lseek(descriptor, FAR, os.SEEK_SET)
        try:
            msvcrt.locking(descriptor, msvcrt.LK_NBLCK, 1)  # type: ignore[attr-defined]
        except PermissionError as error:
            raise BlockingIOError(*error.args) from error

else:
    import fcntl

    def take(descriptor: int) -> None:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)


@contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold the lock of `folder` (it is made). False: there are no locks here. Raises TrainingError: another run has it."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        descriptor = os.open(folder / LOCK, os.O_RDWR | os.O_CREAT, 0o666)
    except OSError as error:
        raise TrainingError(f"{folder}: cannot be written ({error.strerror}); give out= another folder") from error
    try:
        held = True
        try:
            take(descriptor)
        except BlockingIOError:
            os.lseek(descriptor, 0, os.SEEK_SET)
            holder = shown(os.read(descriptor, 200).decode("utf-8", "replace").strip()) or "another process"
            raise TrainingError(
                f"{folder}: another run is at work in it ({holder}); wait for its end, or give out= another folder"
            ) from None
        except OSError:
            held = False
        if held:
            tell(descriptor, f"process {os.getpid()} on {socket.gethostname()}\n")
        yield held
        if held:
            tell(descriptor, "")
    finally:
        os.close(descriptor)  # which lets go of it


def tell(descriptor: int, holder: str) -> None:
    """Who holds it, for the others' error; a full disk is no reason to stop."""
    try:
        os.ftruncate(descriptor, 0)
        os.lseek(descriptor, 0, os.SEEK_SET)
        os.write(descriptor, holder.encode())
    except OSError:
        pass
