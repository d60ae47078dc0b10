"""The lock of a run's folder as Windows takes it, which nobody here has: with the words of its C runtime on locks of Linux that
behave alike (a byte range, held by one open file and not by its process)."""

from __future__ import annotations

import errno
import importlib.util
import multiprocessing
import os
import shutil
import struct
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.process import BaseProcess
from pathlib import Path
from types import ModuleType

import pytest

import lora_booth.training.lock
from lora_booth.errors import TrainingError
from lora_booth.files import write_file
from lora_booth.training.checkpoint import publish, read_back

fcntl = pytest.importorskip("fcntl")
if not hasattr(fcntl, "F_OFD_SETLK"):
    pytest.skip("no locks of an open file here", allow_module_level=True)

FLOCK = "hhqqi4x"  # struct flock of 64-bit Linux: type, whence, start, length, process


class Runtime(ModuleType):
    """msvcrt.locking as its documentation says: `nbytes` from the file's current position; another handle's bytes are refused,
    also in the same process, and so is unlocking what is not locked. LK_LOCK tries ten times, then says deadlock."""

    LK_UNLCK, LK_LOCK, LK_NBLCK = 0, 1, 2
    refusal = errno.EACCES

    def __init__(self) -> None:
        super().__init__("msvcrt")
        self.held: set[tuple[int, int, int]] = set()  # descriptor, first byte, bytes

    def locking(self, descriptor: int, mode: int, nbytes: int) -> None:
        place = (descriptor, os.lseek(descriptor, 0, os.SEEK_CUR), nbytes)
        if mode == self.LK_UNLCK:
            if place not in self.held:
                raise OSError(errno.EACCES, "Permission denied")
            self.held.discard(place)
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_UNLCK, os.SEEK_SET, place[1], nbytes, 0))
            return
        if place in self.held:
            raise OSError(errno.EACCES, "Permission denied")
        try:
            fcntl.fcntl(descriptor, fcntl.F_OFD_SETLK, struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, place[1], nbytes, 0))
        except OSError as error:
            raise OSError(self.refusal, os.strerror(self.refusal)) from error
        self.held.add(place)


@pytest.fixture
def runtime() -> Runtime:
    return Runtime()


@pytest.fixture
def windows(runtime: Runtime, monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    """lora_booth.training.lock as it is imported where there is msvcrt and no fcntl."""
    monkeypatch.setitem(sys.modules, "fcntl", None)
    monkeypatch.setitem(sys.modules, "msvcrt", runtime)
    spec = importlib.util.spec_from_file_location("lora_booth.training.lock_of_windows", lora_booth.training.lock.__file__)
    assert spec is not None and spec.loader is not None
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    yield made
    assert not runtime.held  # all is let go of, before the file is closed


def free(file: Path, start: int, count: int) -> bool:
    """Nobody has locked these bytes, which another handle could neither read nor write on Windows."""
    with open(file, "rb+") as other:
        asked = struct.pack(FLOCK, fcntl.F_WRLCK, os.SEEK_SET, start, count, 0)
        kind: int = struct.unpack(FLOCK, fcntl.fcntl(other, fcntl.F_OFD_GETLK, asked))[0]
    return kind == fcntl.F_UNLCK


@pytest.mark.parametrize("refusal", [errno.EACCES, errno.EDEADLK])
def test_a_second_one_is_refused_and_the_third_may(windows: ModuleType, runtime: Runtime, refusal: int, tmp_path: Path) -> None:
    runtime.refusal = refusal
    with windows.locked(tmp_path) as held:
        assert held is True
        assert free(tmp_path / "lock", 0, 200) and not free(tmp_path / "lock", windows.FAR, 1)
        for _ in range(2):
            with pytest.raises(TrainingError, match=rf"another run is at work in it \(process {os.getpid()} on \S+\)"):
                with windows.locked(tmp_path):
                    raise AssertionError("not reached")
    assert (tmp_path / "lock").read_bytes() == b""
    with pytest.raises(KeyboardInterrupt), windows.locked(tmp_path):
        raise KeyboardInterrupt
    with windows.locked(tmp_path) as held:
        assert held is True


def test_where_there_are_no_locks_it_says_so(windows: ModuleType, runtime: Runtime, tmp_path: Path) -> None:
    def locking(descriptor: int, mode: int, nbytes: int) -> None:
        raise OSError(errno.EINVAL, "Invalid argument")

    runtime.locking = locking  # type: ignore[method-assign]
    with windows.locked(tmp_path) as held:
        assert held is False


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """flock belongs to the open file, which a child shares: without an unlock it would outlive the run."""
    with lora_booth.training.lock.locked(tmp_path):
        process = in_fork(time.sleep, 60)
    try:
        with lora_booth.training.lock.locked(tmp_path) as held:
            assert held is True
    finally:
        process.kill()
        process.join()


def in_fork(target: Callable[..., object], *words: object) -> BaseProcess:
    process = multiprocessing.get_context("fork").Process(target=target, args=words)
    process.start()
    return process


def test_checkpoints_without_a_sync_of_folders(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows opens no folders, gives no file a name that is taken by a folder, and moves none that somebody looks into."""
    opened, rename = os.open, os.replace

    def open_file(path: object, flags: int, *more: int, **words: int) -> int:
        if os.path.isdir(str(path)):
            raise PermissionError(errno.EACCES, "Permission denied")
        return opened(path, flags, *more, **words)  # type: ignore[arg-type]

    looked_at: list[str] = []

    def move(old: Path, new: Path) -> None:
        if os.path.isdir(new) or os.path.basename(old) in looked_at:
            raise PermissionError(errno.EACCES, "Permission denied")
        rename(old, new)

    monkeypatch.delattr(os, "O_DIRECTORY")
    monkeypatch.setattr(shutil, "_use_fd_functions", False)  # as there
    monkeypatch.setattr(os, "open", open_file)
    monkeypatch.setattr(os, "replace", move)
    parent, files = tmp_path / "run" / "checkpoints", {"state.pt": b"x"}
    for number in (1, 2, 3):
        publish(parent, number, number, files)
    assert sorted(path.name for path in parent.iterdir()) == ["000002", "000003"]
    looked_at.append("000002")
    publish(parent, 4, 4, files)
    assert sorted(path.name for path in parent.iterdir()) == ["000002", "000003", "000004"]  # it stays, and goes next time
    assert all(read_back(path) is not None for path in parent.iterdir())
    looked_at.clear()
    publish(parent, 2, 5, files)  # the same step again, after a rollback
    assert sorted(path.name for path in parent.iterdir()) == ["000002.1", "000004"]
    write_file(tmp_path / "run" / "run.json", b"{}")
    write_file(tmp_path / "run" / "run.json", b"{ }")
    assert (tmp_path / "run" / "run.json").read_bytes() == b"{ }"
