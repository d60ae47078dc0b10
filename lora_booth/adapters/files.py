"""Which file an adapter is in, opened so that nothing but a regular file is ever read."""

from __future__ import annotations

import errno
import os
import stat
from pathlib import Path
from typing import BinaryIO

from ..errors import AdapterError, AdapterFormatError, UnsafeFormat, UnsafePath

PICKLE_SUFFIXES = (".bin", ".pt", ".pth", ".ckpt", ".pkl", ".pickle")
FOLDER_FILES = ("adapter_model.safetensors", "pytorch_lora_weights.safetensors")
CONFIG_FILE = "adapter_config.json"  # PEFT's, beside the first of them


def find(path: Path) -> tuple[Path, Path | None]:
    """The tensors' file, and a PEFT folder's configuration. A file that is named itself may be a link."""
    try:
        if not path.is_dir():
            return path, None
        names = {child.name for child in path.iterdir()}
    except (OSError, ValueError) as error:
        raise _cannot_open(path, error) from None
    for name in FOLDER_FILES:
        if name in names:
            config = name == FOLDER_FILES[0] and CONFIG_FILE in names
            return _inside(path, name), _inside(path, CONFIG_FILE) if config else None
    own = [name for name in sorted(names) if name.endswith(".safetensors") and not name.startswith(".")]
    if len(own) == 1:  # as `Adapter.save_folder` and many repositories on the Hub have it
        return _inside(path, own[0]), None
    if own:
        raise AdapterError(f"{len(own)} .safetensors files in this folder; name the adapter's file", path)
    if any(name.endswith(PICKLE_SUFFIXES) for name in names):
        raise UnsafeFormat("only pickles in this folder, and those could run their code; ask for a .safetensors file", path)
    raise AdapterError(f"no {' or '.join(FOLDER_FILES)} in this folder; name the adapter's file", path)


def _inside(folder: Path, name: str) -> Path:
    """A file of the folder; a link only within it or, as the Hub's cache is built, to the `blobs` of a folder above it."""
    path = folder / name
    try:
        home, target = folder.resolve(), path.resolve()
    except (OSError, RuntimeError) as error:  # a link to itself
        raise _cannot_open(path, error) from None
    blob = target.parent.name == "blobs" and target.parent.parent in home.parents
    if target != home / name and not blob and not target.is_relative_to(home):
        raise UnsafePath("a link that leads out of its folder; name the file that you mean", path)
    return path


def open_regular(path: Path) -> BinaryIO:
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise UnsafeFormat(f"a {path.suffix} file is a pickle and could run its code; ask for a .safetensors file", path)
    try:  # not blocking: a named pipe would never answer
        descriptor = os.open(path, os.O_RDONLY | getattr(os, "O_NONBLOCK", 0) | getattr(os, "O_BINARY", 0))
    except (OSError, ValueError) as error:
        if isinstance(error, OSError) and error.errno in (errno.ENXIO, errno.ENODEV):  # a socket or a dead device
            raise AdapterFormatError("not a regular file", path) from None
        raise _cannot_open(path, error) from None
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise AdapterFormatError("not a regular file", path)
    return os.fdopen(descriptor, "rb")


def _cannot_open(path: Path, error: Exception) -> AdapterError:
    reason = error.strerror if isinstance(error, OSError) else error
    return AdapterError(f"cannot be opened: {reason}; check the name", path)
