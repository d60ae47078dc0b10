"""The lock of a run's folder, and checkpoints on file systems that behave like those of Windows."""

from __future__ import annotations

import errno
import multiprocessing
import os
import shutil
import time
from collections.abc import Callable
from multiprocessing.process import BaseProcess
from pathlib import Path

import pytest

from lora_booth.errors import TrainingError
from lora_booth.files import write_file
from lora_booth.training.checkpoint import publish, read_back
from lora_booth.training.lock import locked

fcntl = pytest.importorskip("fcntl")


def test_a_second_run_is_refused_and_a_third_may(tmp_path: Path) -> None:
    with locked(tmp_path) as held:
        assert held is True
        for _ in range(2):
            with pytest.raises(TrainingError, match=rf"another run is using it \(process {os.getpid()} on \S+\)"):
                with locked(tmp_path):
                    raise AssertionError("not reached")
    with pytest.raises(KeyboardInterrupt), locked(tmp_path):
        raise KeyboardInterrupt
    with locked(tmp_path) as held:
        assert held is True
    assert [path.name for path in tmp_path.iterdir()] == [".lora_booth.lock"]


def test_a_holder_that_cannot_be_read_is_another_process(tmp_path: Path) -> None:
    with locked(tmp_path):
        (tmp_path / ".lora_booth.lock.txt").unlink()
        (tmp_path / ".lora_booth.lock.txt").mkdir()
        with pytest.raises(TrainingError, match=r"another run is using it \(another process\)"), locked(tmp_path):
            raise AssertionError("not reached")
    with locked(tmp_path) as held:  # released, although the name could not be removed
        assert held is True


@pytest.mark.parametrize("code", [errno.ENOSYS, errno.ENOTSUP, errno.ENOLCK])
def test_storage_without_locks(code: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def flock(descriptor: int, operation: int) -> None:
        raise OSError(code, os.strerror(code))

    monkeypatch.setattr(fcntl, "flock", flock)
    with locked(tmp_path) as held:
        assert held is False


def test_a_forked_process_does_not_keep_the_lock(tmp_path: Path) -> None:
    """flock belongs to the open file, which a child shares: without an unlock it would outlive the run."""
    with locked(tmp_path):
        process = in_fork(time.sleep, 60)
    try:
        with locked(tmp_path) as held:
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
