"""Every file is written completely or not at all: what a full disk, an error or a network drive leaves."""

from __future__ import annotations

import errno
import json
import math
import os
import stat
import subprocess
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

import lora_booth as lb
from lora_booth.errors import AdapterError
from lora_booth.files import (
    HOST,
    Owned,
    add_lines,
    json_lines,
    number,
    open_regular,
    parse_json,
    read_json,
    replacing,
    write_file,
)
from lora_booth.pictures.picture import Picture

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
resource = pytest.importorskip("resource")  # Windows has none


@contextmanager
def full_disk(room: int) -> Iterator[None]:
    """No file can grow beyond `room` bytes."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (room, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def fsync_of_folders(answer: int) -> Callable[[int], None]:
    sync = os.fsync

    def fsync(descriptor: int) -> None:
        if stat.S_ISDIR(os.fstat(descriptor).st_mode):
            raise OSError(answer, os.strerror(answer))
        sync(descriptor)

    return fsync


def adapter() -> lb.Adapter:
    factors = lb.LoraFactors(torch.randn(2, 320), torch.randn(320, 2), 2.0)
    return lb.Adapter({Q: factors}, lb.Card(family="sd1", token="sks"))


def picture() -> Picture:
    pixels = np.random.default_rng(0).integers(0, 256, (64, 64, 3), np.uint8)
    return Picture(Image.fromarray(pixels), "a dog", 0)


@pytest.mark.parametrize("answer", [errno.EINVAL, errno.ENOTSUP, errno.ENOSYS])
def test_storage_that_cannot_sync_folders_takes_files(answer: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As some network drives: the file is there, so nothing has failed."""
    monkeypatch.setattr(os, "fsync", fsync_of_folders(answer))
    path = adapter().save(tmp_path / "a.safetensors")
    assert lb.Adapter.load(path).modules.keys() == {Q}
    assert [p.name for p in tmp_path.iterdir()] == ["a.safetensors"]


def test_other_errors_of_fsync_are_reported(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "fsync", fsync_of_folders(errno.EIO))
    with pytest.raises(OSError, match="Input/output error"):
        write_file(tmp_path / "a", b"x")


SAVERS: dict[str, Callable[[Path], object]] = {
    "a.safetensors": lambda path: adapter().save(path),
    "a.png": lambda path: picture().save(path),
    "a.jpg": lambda path: picture().save(path),
    "a.html": lambda path: lb.Gallery([picture()]).save(path),
    "a.json": lambda path: lb.Recipe("toybox", "0" * 16, (), {}, {"prompt": "a dog " * 1000, "seeds": [0]}, {}).save(path),
}


@pytest.mark.parametrize("name", SAVERS)
def test_a_full_disk_leaves_the_old_file(name: str, tmp_path: Path) -> None:
    path = tmp_path / name
    path.write_bytes(b"old")
    with full_disk(600), pytest.raises((OSError, AdapterError)):
        SAVERS[name](path)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]
    SAVERS[name](path)
    assert path.stat().st_size > 600 and list(tmp_path.iterdir()) == [path]


def test_an_error_in_the_block_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a"
    write_file(path, b"old")
    with pytest.raises(KeyboardInterrupt), replacing(path) as temporary:
        temporary.write_bytes(b"new")
        raise KeyboardInterrupt
    with pytest.raises(FileNotFoundError), replacing(path):
        pass  # nothing was written
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


KILLED = """
import os, pathlib, signal, sys
from lora_booth.files import replacing
for name, write in (("a.safetensors", lambda p: p.write_bytes(b"half")), ("shared", lambda p: (p.mkdir(), (p / "x").touch()))):
    child = os.fork()
    if child == 0:
        with replacing(pathlib.Path(sys.argv[1]) / name) as temporary:
            write(temporary)
            os.kill(os.getpid(), signal.SIGKILL)
    os.waitpid(child, 0)
"""


def test_the_next_save_removes_what_a_killed_one_left(tmp_path: Path) -> None:
    """A file and a folder; what others wrote, or a process that runs still writes, stays."""
    subprocess.run([sys.executable, "-c", KILLED, str(tmp_path)], check=True, cwd=Path(__file__).parents[1])
    (left, folder), outside = sorted(tmp_path.iterdir(), key=Path.is_dir), tmp_path.parent / "outside"
    assert left.read_bytes() == b"half" and (folder / "x").is_file()
    outside.mkdir()
    (outside / "x").touch()
    linked = tmp_path / left.name.replace(left.name[-20:-4], "0" * 16)
    linked.symlink_to(outside)
    other_host = tmp_path / left.name.replace(HOST, "0" * 8)
    names = (".tmp", ".lora_booth-notes.tmp", f"{left.name}.bak", other_host.name)
    for name in names:
        (tmp_path / name).touch()
    with replacing(tmp_path / "b") as writing:
        writing.touch()
        adapter().save(tmp_path / "a.safetensors")
        assert {p.name for p in tmp_path.iterdir()} == {*names, linked.name, writing.name, "a.safetensors"}
    assert (outside / "x").is_file()


def test_a_folder_replaces_another(tmp_path: Path) -> None:
    path = tmp_path / "a"
    for name in ("old", "new"):
        with replacing(path) as temporary:
            temporary.mkdir()
            (temporary / name).touch()
    assert [p.name for p in path.iterdir()] == ["new"] and list(tmp_path.iterdir()) == [path]


def test_only_what_we_wrote_is_replaced_or_removed(tmp_path: Path) -> None:
    folder, outside = tmp_path / "run", tmp_path / "outside"
    owned = Owned(folder)
    for name, content in (("a.json", b"1"), ("a.json", b"2"), ("samples/1.png", b"x"), ("changed", b"ours"), ("gone", b"y")):
        owned.write(name, content)
    (folder / "gone").unlink()
    (folder / "changed").write_bytes(b"a user's own")
    outside.mkdir()
    (outside / "a.json").write_bytes(b"2")  # the same bytes as ours
    (folder / "linked").symlink_to(outside / "a.json")
    (folder / "crops").symlink_to(outside)
    (folder / "mine").write_bytes(b"2")
    assert [name for name in ("a.json", "samples/1.png", "changed", "gone", "mine", "linked") if owned.has(name)] == [
        *("a.json", "samples/1.png"),
    ]
    for name in ("changed", "mine", "linked", "crops/a.json", "crops/new", "../outside/new", str(outside / "new")):
        with pytest.raises(OSError, match="not a file of this library|behind a link"):
            owned.write(name, b"new")
    Owned(folder).clear()
    assert sorted(path.name for path in folder.iterdir()) == ["changed", "crops", "linked", "mine"]
    assert [(path.name, path.read_bytes()) for path in outside.iterdir()] == [("a.json", b"2")]


def test_a_list_that_is_a_link_is_not_written_to(tmp_path: Path) -> None:
    (tmp_path / "theirs").write_text("")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / Owned.LIST).symlink_to(tmp_path / "theirs")
    owned = Owned(tmp_path / "run")
    with pytest.raises(OSError, match="is a link"):
        owned.write("a", b"x")
    owned.clear()
    assert (tmp_path / "theirs").read_text() == "" and (tmp_path / "run" / Owned.LIST).is_symlink()


def test_lines_that_the_disk_has_no_room_for_are_an_error(tmp_path: Path) -> None:
    with full_disk(30), pytest.raises(OSError, match="[Nn]o space"):  # there is room for a part
        add_lines(tmp_path / "lines", [{"text": "x" * 100}])


def test_lines_are_not_added_to_a_named_pipe(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "lines")
    reader = os.open(tmp_path / "lines", os.O_RDONLY | os.O_NONBLOCK)  # without one, opening it would block
    with pytest.raises(OSError, match="is a link or no regular file"):
        add_lines(tmp_path / "lines", [{}])
    os.close(reader)


@pytest.mark.parametrize("path", ["a\0b", "a\0/b"])
@pytest.mark.parametrize("ending", ["png", "html", "safetensors", "json", "txt", "folder"])
def test_a_path_with_a_nul_is_a_users_mistake(path: str, ending: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    use: dict[str, Callable[[str], object]] = {
        "png": picture().save,
        "html": lb.Gallery([picture()]).save,
        "safetensors": adapter().save,
        "json": lb.Recipe("tiny", "0", (), {}, {}).save,
        "txt": lb.read_prompts,
        "folder": adapter().save_folder,
    }
    with pytest.raises(lb.LoraBoothError):
        use[ending](f"{path}.{ending}")
    assert not list(tmp_path.iterdir())


# --- JSON that anyone may have written -----------------------------------------------------------------------------

BAD_JSON = {
    "deep": b"[" * 100_000 + b"]" * 100_000,
    "deep objects": b'{"a":' * 100_000,
    "10**400": b'{"a": 1' + b"0" * 400 + b"}",
    "10**5000": b"1" + b"0" * 5000,
    "1e999": b"[1e999]",
    "nan": b"[NaN]",
    "infinity": b'{"a": -Infinity}',
    "twice": b'{"a": 1, "a": 2}',
    "latin": '{"a": "ü"}'.encode("latin-1"),
    "cut": b'{"a": [1, 2',
    "empty": b"",
    "utf-16": '{"a": 1}'.encode("utf-16"),
}


@pytest.mark.parametrize("kind", BAD_JSON)
def test_json_that_is_not_json_is_a_value_error(kind: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=".+"):
        parse_json(BAD_JSON[kind])
    file = tmp_path / "a.json"
    file.write_bytes(BAD_JSON[kind])
    with pytest.raises(ValueError, match=".+"):
        read_json(file)
    lines = tmp_path / "a.jsonl"
    one_line = BAD_JSON[kind].replace(b"\n", b" ")
    lines.write_bytes(b'{"step": 1}\n' + one_line + b'\n[3]\n\n{"step": 2}\n{"st')
    steps = [number(line.get("step")) for line in json_lines(lines)]
    assert [step for step in steps if step is not None] == [1, 2]


def test_json_is_read_as_it_is(tmp_path: Path) -> None:
    value = {"seed": 2**64 - 1, "loss": 1e308, "minus": -(2**63), "text": "ü", "list": [None, True, 0.5]}
    for content in (json.dumps(value).encode(), b"\xef\xbb\xbf" + json.dumps(value, ensure_ascii=False).encode()):
        assert parse_json(content) == value
    (tmp_path / "a.json").write_bytes(json.dumps(value).encode())
    assert read_json(tmp_path / "a.json") == value
    with pytest.raises(ValueError, match="larger than 10 bytes"):
        read_json(tmp_path / "a.json", most=10)
    many = [{"step": i, "loss": 0.5} for i in range(5000)]  # more than are read at once
    (tmp_path / "a.jsonl").write_text("".join(json.dumps(line) + "\n" for line in many) + '{"half')
    assert list(json_lines(tmp_path / "a.jsonl")) == many


@pytest.mark.parametrize(
    ("value", "found"),
    [(1, 1.0), (0.5, 0.5), (-1e15, -1e15), (10**16, None), (10**400, None), (math.nan, None), (math.inf, None)]
    + [(True, None), ("1", None), (None, None), ([1], None)],
)
def test_what_counts_as_a_number(value: object, found: float | None) -> None:
    assert number(value) == found
    assert number(value, 0) == (None if found is None or found < 0 else found)


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no named pipes here")
def test_what_would_never_answer_is_not_opened(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    for open_it in (open_regular, read_json):
        with pytest.raises(OSError, match="not a regular file"):
            open_it(tmp_path / "pipe")
    assert list(json_lines(tmp_path / "pipe")) == list(json_lines(tmp_path / "gone")) == []
    with pytest.raises(OSError, match=".+"):
        open_regular(tmp_path)
