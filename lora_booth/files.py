"""Files: written completely or not at all, read within limits, and pages made from templates.

A full disk, an error or a power cut leaves the old file. Anyone may have edited what is read: the readers of JSON
and `number` are for everything that does not come with the package.
"""

from __future__ import annotations

import base64
import errno
import hashlib
import json
import math
import os
import platform
import re
import secrets
import shutil
import stat
import zlib
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 2**28  # of a JSON file; chosen: twice the metrics of a million updates
LARGEST = 1e15  # of a count, a time or a size in a file; chosen: far above all of them, and exact as a float
NO_SYNC = (errno.EINVAL, errno.ENOTSUP, errno.ENOSYS)  # how some network drives answer fsync
HOST = f"{zlib.crc32(platform.node().encode()):08x}"
TEMPORARY = re.compile(r"\.lora_booth-([0-9a-f]{8})-([0-9]{1,9})-[0-9a-f]{16}\.tmp")  # host, process


@contextmanager
def replacing(path: Path, *, durable: bool = True) -> Iterator[Path]:
    """Yield a temporary path beside `path`. The file or folder that the block writes there replaces `path`.

    After an error it is removed; what a killed process left, the next call removes.
    durable  wait until it is on the disk; not needed for what can be computed again
    """
    temporary = temporary_beside(path)
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


def temporary_beside(path: Path) -> Path:
    return path.with_name(f".lora_booth-{HOST}-{os.getpid()}-{secrets.token_hex(8)}.tmp")


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


def remove_folder(folder: Path) -> None:
    """Remove a folder, so that a kill leaves no half of it under its name; `sweep` removes the rest then. Raises OSError."""
    aside = temporary_beside(folder)
    os.replace(folder, aside)
    remove(aside)


def write_file(path: Path, content: bytes) -> None:
    """Replace `path` by `content`."""
    with replacing(path) as temporary:
        temporary.write_bytes(content)


def add_lines(path: Path, lines: Sequence[Mapping[str, Any]]) -> None:
    """Add lines of JSON to a file in one write, so that those of several processes stay apart. Raises OSError, also for a link
    and for a named pipe, which might never answer."""
    if os.path.lexists(path) and (path.is_symlink() or not path.is_file()):
        raise OSError(errno.EINVAL, f"{path.name} is a link or no regular file", str(path))
    content = "".join(json.dumps(line) + "\n" for line in lines).encode()
    with open(path, "ab", buffering=0) as file:
        if file.write(content) < len(content):  # the disk has room for a part
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), str(path))


def check_writable(path: Path) -> None:
    """Raises OSError if `path` could not be written later, e.g. because of a parent that is a file. Leaves nothing behind."""
    there = next(folder for folder in path.absolute().parents if os.path.lexists(folder))
    temporary = temporary_beside(there / path.name)
    temporary.touch()
    temporary.unlink()


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


# --- a folder in which others may write too ----------------------------------------------------------------------------


class Owned:
    """The files of this library in a folder. What others put there, or a link leads to, is never replaced or removed.

    A file is ours if its content is what we wrote: `.lora_booth.jsonl` lists its hash, from just before it is written.
    """

    LIST = ".lora_booth.jsonl"

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def has(self, name: str) -> bool:
        """Whether the file `name` (its path in the folder) is there and ours."""
        if self._leads_elsewhere(name):
            return False
        try:
            with open_regular(self.folder / name) as file:
                return hashlib.sha256(file.read()).hexdigest() in self._listed().get(name, ())
        except OSError:
            return False

    def check(self, name: str) -> None:
        """Raises FileExistsError if something that is not ours has this name."""
        if os.path.lexists(self.folder / name) and not self.has(name):
            raise FileExistsError(errno.EEXIST, f"{name} is not a file of this library", name)

    def write(self, name: str, content: bytes) -> Path:
        """Raises OSError, also for what `check` refuses."""
        self.check(name)
        if self._leads_elsewhere(name):
            raise OSError(errno.ELOOP, f"{name} is behind a link")
        path = self.folder / name
        make_folder(path.parent)
        add_lines(self.folder / self.LIST, [{"file": name, "sha256": hashlib.sha256(content).hexdigest()}])
        write_file(path, content)
        return path

    def clear(self) -> None:
        """Remove our files, and the folders that are empty then. Raises OSError."""
        names = [name for name in self._listed() if self.has(name)]
        for name in names:
            (self.folder / name).unlink()
        for folder in {Path(name).parent for name in names} - {Path()}:
            with suppress(OSError):
                (self.folder / folder).rmdir()
        if not (self.folder / self.LIST).is_symlink():
            (self.folder / self.LIST).unlink(missing_ok=True)

    def _listed(self) -> dict[str, set[str]]:
        """Name -> the hashes of what was written there."""
        listed: dict[str, set[str]] = {}
        for line in json_lines(self.folder / self.LIST):
            listed.setdefault(str(line.get("file")), set()).add(str(line.get("sha256")))
        return listed

    def _leads_elsewhere(self, name: str) -> bool:
        path = Path(name)
        inside = not path.is_absolute() and ".." not in path.parts
        return not inside or any((self.folder / one).is_symlink() for one in (path, *path.parents[:-1]))


# --- reading what anyone may have edited -------------------------------------------------------------------------------


def open_regular(path: Path) -> BinaryIO:
    """Open a file for reading. Raises OSError also for a named pipe, a socket or a device, which might never answer."""
    descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", str(path))
    return os.fdopen(descriptor, "rb")


def read_json(path: Path, *, most: int = MOST_BYTES) -> Any:
    """What `parse_json` makes of a file of at most `most` bytes. Raises OSError or ValueError."""
    with open_regular(path) as file:
        content = file.read(most + 1)
    if len(content) > most:
        raise ValueError(f"larger than {most} bytes")
    return parse_json(content)


def read_table(path: Path) -> dict[str, Any]:
    """What `read_json` finds; empty if that is no object, or the file cannot be read."""
    try:
        found = read_json(path)
    except (OSError, ValueError):
        return {}
    return found if isinstance(found, dict) else {}


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file with one on each line. Other lines, and a file that cannot be read, are left out.

    Numbers are as Python reads them, NaN and 10**400 too: take them through `number`.
    """
    with suppress(OSError), open_regular(path) as file:
        for line in file if os.fstat(file.fileno()).st_size <= MOST_BYTES else ():
            try:
                found = json.loads(line.decode())
            except (ValueError, RecursionError):  # half a line, from a power cut
                continue
            if isinstance(found, dict):
                yield found


def parse_json(content: bytes) -> Any:
    """Read JSON. Raises ValueError also for what Python's own reader lets through or fails on in another way: NaN, numbers
    beyond 64 bits or the range of floats, a key twice, and nesting that exhausts the stack."""
    try:
        return STRICT.decode(content.decode("utf-8-sig"))
    except RecursionError:
        raise ValueError("nested too deeply") from None


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    if len(result) != len(pairs):
        raise ValueError("a duplicate key")
    return result


def _integer(digits: str) -> int:
    if len(digits) > 20:  # 2**64 has 20
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _finite(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is not a finite number")
    return value


STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_finite, parse_int=_integer, parse_float=_finite)


def number(value: Any, least: float = -LARGEST, most: float = LARGEST) -> float | None:
    """`value` as a float if it is a number from `least` to `most`, else None."""
    return float(value) if type(value) in (int, float) and least <= value <= most else None


# --- pages -------------------------------------------------------------------------------------------------------------


def page(package: str, **values: Any) -> str:
    """The package's `page.html`, filled in by Jinja, with all values escaped.

    In it, `part(name)` is another file of the package as it stands, and `hash(text)` how a content security policy names a
    style or script that it allows.
    """
    from jinja2 import Environment, StrictUndefined
    from markupsafe import Markup

    def part(name: str) -> str:
        return (resources.files(package) / name).read_text(encoding="utf-8")

    def source_hash(text: str) -> str:
        return "sha256-" + base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()

    environment = Environment(autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True)
    template = environment.from_string(part("page.html"))
    return template.render(part=lambda name: Markup(part(name)), hash=source_hash, **values)
