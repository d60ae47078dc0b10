"""Folders at URLs that fsspec understands: `s3://bucket/rex`, `gs://bucket/rex`, `memory://rex`."""

from __future__ import annotations

import errno
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..config import typed
from ..errors import SettingsError, reason_of, setting, shown


@dataclass(frozen=True)
class Remote:
    """A file or folder at a URL, with the names of pathlib for what the mirror does. Each method raises OSError.

    Object stores rename nothing and have no links: checkpoints are complete there when their manifest, written last, is.
    """

    url: str

    def __str__(self) -> str:
        return self.url

    def __truediv__(self, name: str) -> Remote:
        return Remote(f"{self.url}{'' if self.url.endswith('/') else '/'}{name}")

    @property
    def name(self) -> str:
        return self.url.rstrip("/").rpartition("/")[2]

    @property
    def parent(self) -> Remote:
        return Remote(self.url.rstrip("/").rpartition("/")[0])

    def is_symlink(self) -> bool:
        return False

    def iterdir(self) -> list[Remote]:
        with self._storage() as (storage, path):
            storage.invalidate_cache()  # of listings: other machines write here too
            return [self / name.rstrip("/").rpartition("/")[2] for name in storage.ls(path, detail=False)]

    def mkdir(self, parents: bool = False) -> None:
        """Nothing if it is there. Object stores have no folders, and do nothing."""
        with self._storage() as (storage, path):
            with suppress(FileExistsError):
                storage.makedirs(path, exist_ok=True) if parents else storage.mkdir(path, create_parents=False)

    def read_bytes(self) -> bytes:
        with self._storage() as (storage, path):
            return bytes(storage.cat_file(path))

    def write_bytes(self, content: bytes) -> None:
        with self._storage() as (storage, path):
            storage.pipe_file(path, content)

    def unlink(self, missing_ok: bool = False) -> None:
        try:
            with self._storage() as (storage, path):
                storage.rm_file(path)
        except FileNotFoundError:
            if not missing_ok:
                raise

    def rmdir(self) -> None:
        with self._storage() as (storage, path):
            storage.rmdir(path)

    @contextmanager
    def _storage(self) -> Iterator[tuple[Any, str]]:
        """fsspec's file system, and its name for this path."""
        from fsspec.core import url_to_fs  # PyTorch and huggingface_hub need fsspec as well

        try:
            yield url_to_fs(self.url)
        except OSError:
            raise
        except Exception as error:  # what the store's own package raises, e.g. without credentials
            raise OSError(errno.EIO, type(error).__name__, self.url) from error


Place = Path | Remote


def mirror_at(mirror: Any) -> Place | None:
    """The argument `mirror`: a URL, or the path of a folder. Raises SettingsError, also if the URL's package is not there."""
    if not isinstance(mirror, str) or "://" not in mirror:
        found: Path | None = typed("mirror", mirror, Path | None)
        return found
    from fsspec import get_filesystem_class

    try:
        get_filesystem_class(mirror.partition("://")[0])
    except (ImportError, ValueError) as error:  # the message names the package
        raise SettingsError(
            f"{shown(mirror)}: cannot be used ({reason_of(error)}); install that package, or pass {setting('mirror')} a folder"
        ) from error
    return Remote(mirror)
