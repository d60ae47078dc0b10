"""Files: written completely or not at all, read within limits, and pages made from templates.

A full disk, an error or a power cut leaves the old file. Anyone may have edited what is read: `read_json`, `json_lines` and
`number` are for everything that does not come with the package.
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
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import resources
from pathlib import Path
from typing import Any, BinaryIO

MOST_BYTES = 2**28  # of a JSON file; chosen: twice the metrics of a million updates
LINES_BYTES = 2**16  # of lines that are read at once; chosen
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


def json_lines(path: Path) -> Iterator[dict[str, Any]]:
    """The objects in a file with one on each line. Other lines, and a file that cannot be read, are left out.

    Numbers are as Python reads them, NaN and 10**400 too: take them through `number`.
    """
    with suppress(OSError), open_regular(path) as file:
        while os.fstat(file.fileno()).st_size <= MOST_BYTES and (lines := file.readlines(LINES_BYTES)):
            try:  # at once: a million lines take a second or two
                several = json.loads(b"[" + b",".join(lines) + b"]")
            except (ValueError, RecursionError):
                several = [found for line in lines for found in _line(line)]
            yield from (found for found in several if isinstance(found, dict))


def _line(line: bytes) -> list[Any]:
    try:
        return [json.loads(line)]
    except (ValueError, RecursionError):  # half a line, from a power cut
        return []


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


def _refused(constant: str) -> None:
    raise ValueError(f"{constant} is not JSON")


def _integer(digits: str) -> int:
    if len(digits) > 20:  # 2**64 has 20
        raise ValueError(f"a number of {len(digits)} digits")
    return int(digits)


def _float(digits: str) -> float:
    if not math.isfinite(value := float(digits)):
        raise ValueError(f"{digits[:20]} is too large")
    return value


STRICT = json.JSONDecoder(object_pairs_hook=_once, parse_constant=_refused, parse_int=_integer, parse_float=_float)


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
