"""The cache on disk: latents, text embeddings, class images and measurements, found by what they depend on.

An entry is one safetensors file, named by the hash of everything its values depend on, so it can never be stale. It carries
a checksum and is computed again if it is damaged. A full or read-only disk is not an error: everything works without the cache.

Latents show your photos (not their names or places), so only their owner can read the files; `clear_cache` deletes them.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import re
import stat
import time
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .files import TEMPORARY, replacing

if TYPE_CHECKING:
    from torch import Tensor

VERSION = 1  # of what entries contain
KINDS = ("latents", "text", "digests", "class_images", "counts", "bases")
OURS = re.compile(rf"[0-9a-f]{{64}}\.safetensors|{TEMPORARY.pattern}")  # names of our files; no other is counted or deleted
NOWHERE = Path(os.devnull, "lora_booth")  # cannot be made, so nothing is cached
LIMIT = 2.0  # GB; $LORA_BOOTH_CACHE_GB
FRESH = 3600  # seconds after its last use in which an entry is never pruned, since a run may need it: chosen


def cache_folder() -> Path:
    """$LORA_BOOTH_CACHE, else `lora_booth` in the user's cache folder; `NOWHERE` for a user without a home folder."""
    if chosen := os.environ.get("LORA_BOOTH_CACHE"):
        place = os.path.expanduser(chosen)
        return NOWHERE if place.startswith("~") else Path(place)
    common = Path(os.environ.get("XDG_CACHE_HOME", ""))
    if not common.is_absolute():  # then it counts as unset (XDG Base Directory Specification)
        home = Path(os.path.expanduser("~"))  # "~" without HOME and an entry in passwd, "/" where HOME is empty
        if not home.is_absolute() or home == home.parent:
            return NOWHERE
        common = home / ".cache"
    return common / "lora_booth"


def key_of(**facts: Any) -> str:
    """The hash of everything an entry's values depend on."""
    text = json.dumps({"version": VERSION, **facts}, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


def read_entry(kind: str, key: str) -> dict[str, Tensor] | None:
    """The tensors of an entry, on the CPU; None if it is missing or damaged."""
    from safetensors import SafetensorError, safe_open

    path = place_of(kind, key)
    try:
        if not path.is_file():  # opening a FIFO could block forever
            return None
        with safe_open(path, framework="pt") as file:
            metadata = file.metadata() or {}
            tensors = {name: file.get_tensor(name) for name in file.keys()}
        if metadata.get("key") != key or metadata.get("sha256") != checksum(sorted(tensors.items())):
            return None
        os.utime(path)  # when it was last used
    except (OSError, SafetensorError, ValueError, RuntimeError):  # PyTorch raises the last for a file that just vanished
        return None
    return tensors


def write_entry(kind: str, key: str, tensors: Mapping[str, Tensor]) -> bool:
    """Keep `tensors`, completely or not at all. Returns False if the disk cannot take them."""
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    path = place_of(kind, key)
    whole = {name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}
    try:
        path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
        with replacing(path, durable=False) as temporary:
            save_file(whole, temporary, {"key": key, "sha256": checksum(sorted(whole.items()))})
            temporary.chmod(0o600)
    except (OSError, SafetensorError):  # safetensors reports a full disk by its own error
        return False
    return True


def cached(kind: str, key: str, make: Callable[[], Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """The tensors of an entry; of `make` if it is missing or damaged, and these are then kept unless they are not finite."""
    found: Mapping[str, Tensor] | None = read_entry(kind, key)
    if found is None:
        found = make()
        if all(bool(tensor.isfinite().all()) for tensor in found.values()):
            write_entry(kind, key, found)
    return found


def place_of(kind: str, key: str) -> Path:
    return cache_folder() / kind / key[:2] / f"{key}.safetensors"


def checksum(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """sha256 of names, types, shapes and values."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode())
        digest.update(bytes_of(tensor))
    return digest.hexdigest()


def bytes_of(tensor: Tensor) -> Any:
    """The values of a tensor as a buffer, whatever their type."""
    import torch

    return tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy()


# --- its size -------------------------------------------------------------------------------------------------------


def entries() -> Iterator[tuple[Path, int, float]]:
    """Every file that this library wrote into the cache, its bytes and the time of its last use. Links are not followed."""
    with suppress(OSError):  # the folder cannot be read
        for path in cache_folder().glob("*/[0-9a-f][0-9a-f]/*"):
            shard, kind = path.parents[:2]
            if kind.name in KINDS and OURS.fullmatch(path.name) and not (shard.is_symlink() or kind.is_symlink()):
                with suppress(FileNotFoundError):  # another process removed it
                    status = path.lstat()
                    if stat.S_ISREG(status.st_mode):
                        yield path, status.st_size, status.st_mtime


def cache_size() -> int:
    """Bytes."""
    return sum(size for _, size, _ in entries())


def limit() -> int:
    """Bytes: $LORA_BOOTH_CACHE_GB, else 2 GB."""
    try:
        return int(float(os.environ.get("LORA_BOOTH_CACHE_GB", LIMIT)) * 1e9)
    except (ValueError, OverflowError):
        return int(LIMIT * 1e9)


def prune_cache(most: int | None = None, *, unused_for: float = FRESH) -> int:
    """Delete the least recently used entries until at most `most` bytes (None: the limit) are left. Returns the bytes deleted.

    unused_for  seconds; entries used since then stay, and so do temporary files that may still be written
    """
    most, now, gone = limit() if most is None else most, time.time(), 0
    found = sorted(entries(), key=lambda entry: entry[2])
    size = sum(entry[1] for entry in found)
    for path, bytes_, used in found:
        if (size - gone > most or path.suffix == ".tmp") and now - used > unused_for:
            with suppress(OSError):
                path.unlink()
                gone += bytes_
    return gone


def clear_cache() -> int:
    """Delete every entry: latents, text embeddings, class images, measurements. Returns the bytes deleted."""
    folders = {path.parent for path, _, _ in entries()}
    gone = prune_cache(-1, unused_for=-math.inf)
    for folder in sorted(folders | {one.parent for one in folders}, reverse=True):  # a folder after those in it
        with suppress(OSError):  # it holds other files
            folder.rmdir()
    return gone
