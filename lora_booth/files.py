"""Atomic file writes: a full disk, an error or a power cut leaves the old file."""

from __future__ import annotations

import errno
import os
import platform
import re
import secrets
import shutil
import zlib
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # how some network drives answer fsync
HOST = f"{zlib.crc32(platform.node().encode()):08x}"
TEMPORARY = re.compile(r"\.lora_booth-([0-9a-f]{8})-([0-9]{1,9})-[0-9a-f]{16}\.tmp")  # host, process


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`. The file or folder that the block writes there replaces `path`.

    After an error it is removed; what a killed process left, the next call removes.
    durable  wait until it is on the disk; not needed for what can be computed again
    """
    temporary = path.with_name(f".lora_booth-{HOST}-{os.getpid()}-{secrets.token_hex(8)}.tmp")
    aside = temporary.with_suffix(".old")
    try:
        yield temporary
        if durable and temporary.is_file():
            with open(temporary, "rb+") as file:
                sync(file.fileno())
        if temporary.is_dir() and path.is_dir():  # the old folder is removed only once the new one is in its place
            path.rename(aside)
        os.replace(temporary, path)
    finally:
        if aside.exists() and not path.exists():
            aside.rename(path)
        remove(temporary)
    remove(aside)
    if durable:
        sync_folder(path.parent)
        sweep(path.parent)


def sweep(folder: Path) -> None:
    """Remove what killed processes of this machine left unfinished in `folder`."""
    for left in folder.glob(".lora_booth-*.tmp"):
        named = TEMPORARY.fullmatch(left.name)
        if named and named[1] == HOST and not left.is_symlink() and not is_running(int(named[2])):
            with suppress(OSError):
                remove(left)


def is_running(process: int) -> bool:
    import psutil  # type: ignore[import-untyped]  # comes with accelerate

    return bool(psutil.pid_exists(process))


def remove(path: Path) -> None:
    """Remove a file or a folder, if it is there."""
    if path.is_dir():
        shutil.rmtree(path, ignore_errors=True)
    else:
        path.unlink(missing_ok=True)


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def write_synced(path: Path, content: bytes) -> None:
    """Write straight to `path`, for a folder that is renamed into place later; the bytes are on the disk when this returns."""
    with open(path, "wb") as file:
        file.write(content)
        file.flush()
        sync(file.fileno())


def make_folder(folder: Path) -> None:
    """Make a folder and its parents so that their names survive a power cut."""
    if folder.exists():
        return
    make_folder(folder.parent)
    folder.mkdir(exist_ok=True)
    sync_folder(folder.parent)


def sync_folder(folder: Path) -> None:
    """Make new names in `folder` survive a power cut. Windows does so by itself."""
    if not hasattr(os, "O_DIRECTORY"):
        return
    try:
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
    except PermissionError:  # a folder that can be written but not read
        return
    try:
        sync(descriptor)
    finally:
        os.close(descriptor)


def sync(descriptor: int) -> None:
    try:
        os.fsync(descriptor)
    except OSError as error:
        if error.errno not in NO_SYNC:
            raise
