"""The folder of adapters that the server offers."""

from __future__ import annotations

import os
import shutil
import threading
from pathlib import Path
from typing import BinaryIO

from ..adapters.adapter import Adapter
from ..adapters.reading import read
from ..base.base_model import BaseModel
from ..base.changes import claimed
from ..errors import SettingsError, shown
from ..files import open_regular, replacing
from ..injection.attached import placements
from ..runs.many import NAME
from ..training.checkpoint import ADAPTER

ENDING = ".safetensors"


class Shelf:
    """NAME.safetensors, or NAME/adapter.safetensors as `train-many` writes them."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self._adding = threading.Lock()  # of two uploads of one name, one is kept

    def names(self) -> list[str]:
        stems = {path.name.removesuffix(ENDING) for path in self.folder.iterdir()}
        return sorted(name for name in stems if self.file(name) is not None)

    def file(self, name: str) -> Path | None:
        """None if there is none of this name, or the name might lead out of the folder."""
        places = (self.folder / f"{name}{ENDING}", self.folder / name / ADAPTER) if NAME.fullmatch(name) else ()
        return next((place for place in places if place.is_file()), None)

    def read(self, file: Path, name: str) -> Adapter:
        """Everything in it is checked. Errors name no folder of this machine."""
        with open_regular(file) as handle:
            found = read(handle, os.fstat(handle.fileno()).st_size, Path(f"{name}{ENDING}"))
        return Adapter(found.modules, found.card, name)

    def add(self, base: BaseModel, file_name: str, content: BinaryIO) -> str:
        """Keep an uploaded file once everything in it is checked, and that it fits this base. Returns its name."""
        name = file_name.removesuffix(ENDING)
        if name == file_name or not NAME.fullmatch(name):
            needed = f"NAME{ENDING}, with up to 100 letters, digits, spaces, and . _ - within"
            raise SettingsError(f"file name {shown(repr(file_name))[:80]}; needed: {needed}")
        with self._adding:
            if self.file(name) is not None:
                raise SettingsError(f"there is an adapter {name!r} already; choose another name")
            with replacing(self.folder / f"{name}{ENDING}") as temporary:
                with open(temporary, "wb") as file:
                    shutil.copyfileobj(content, file)
                with claimed(base.shell.unet):
                    placements(base, [(self.read(temporary, name), 1.0)])
        return name
