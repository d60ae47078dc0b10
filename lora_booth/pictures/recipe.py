"""Recipe: all that made some pictures except the weights, in a small JSON file from which to draw them again."""

from __future__ import annotations

import base64
import hashlib
import json
import warnings
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch

from .. import __version__
from ..adapters.adapter import Adapter
from ..adapters.writing import packed
from ..base.ai_mark import picture_bytes
from ..base.base_model import BaseModel
from ..config import typed
from ..errors import AdapterBaseMismatch, CompositionWarning, SettingsError, reason_of, shown
from ..files import read_json, write_file
from ..photos.opening import read_picture
from .composition import PICTURES, Composition, checked
from .picture import Picture
from .regions import Region
from .weights import Weight

FORMAT = 1
MAX_BYTES = 16 * 2**20  # chosen


def file_hash(adapter: Adapter) -> str:
    """sha256 of the tensors as `adapter.save` writes them; other tools show it as sshs_model_hash."""
    content, _ = packed(adapter, "kohya", torch.float16, Path("recipe"))
    header = int.from_bytes(content[:8], "little")
    return hashlib.sha256(content[8 + header :]).hexdigest()


@dataclass(frozen=True)
class Recipe:
    """A composition and the arguments of its pictures. Adapters are identified by the hash of their tensors.

    composition  keyword arguments of Composition; its regions identify their adapters
    pictures     keyword arguments of generate, with the prompt
    """

    base: str
    base_hash: str
    adapters: tuple[dict[str, Any], ...]  # name, hash, weight
    composition: dict[str, Any]
    pictures: dict[str, Any]
    versions: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, studio: Composition, prompt: str, **pictures: Any) -> Recipe:
        """The recipe of `studio.generate(prompt, **pictures)`."""
        import diffusers

        pictures = asked(prompt=prompt, **pictures)
        settings = studio.settings(prompt)
        if settings["regions"] != "auto":
            settings["regions"] = [region_entry(region) for region in settings["regions"]]
        compel = studio.compel(prompt, pictures.get("negative_prompt"))
        return cls(
            base=studio.base.name,
            base_hash=studio.base.fingerprint,
            adapters=tuple(adapter_entry(adapter, weight) for adapter, weight in studio.adapters),
            composition=settings,
            pictures={"seeds": (0,), **pictures},
            versions={"lora_booth": __version__, "torch": torch.__version__, "diffusers": diffusers.__version__}
            | ({} if compel is None else {"compel": compel}),
        )

    def save(self, path: str | Path) -> Path:
        path = Path(typed("path", path, Path))
        path.parent.mkdir(parents=True, exist_ok=True)
        write_file(path, (json.dumps({"format": FORMAT, **asdict(self)}, indent=1) + "\n").encode())
        return path

    @classmethod
    def load(cls, path: str | Path) -> Recipe:
        """Read a recipe file. Raises SettingsError if it is not a recipe, or has arguments unknown to `generate`."""
        path = Path(typed("path", path, Path))
        try:
            entries = read_json(path, most=MAX_BYTES)
            if "format" not in entries:
                raise SettingsError("not a recipe; pass a file that `generate --recipe` or `Recipe.save` wrote")
            if entries.pop("format") != FORMAT:
                raise SettingsError("a recipe of another format; update lora_booth")
            entries["adapters"] = tuple(entries["adapters"])
            entries["pictures"] = asked(**entries["pictures"])
            return cls(**entries)
        except SettingsError as error:
            raise SettingsError(f"{shown(path)}: {error}") from error
        except OSError as error:
            raise SettingsError(f"{shown(path)}: {error.strerror}") from error
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise SettingsError(f"{shown(path)}: not a recipe ({shown(reason_of(error))})") from error

    def studio(self, base: BaseModel | Any, adapters: Sequence[Adapter]) -> Composition:
        """The composition again, with adapters loaded from their files in any order.

        Warns if compel read the prompts and does not here, or the other way round, or another version of it.
        Raises AdapterBaseMismatch for another base, SettingsError for an adapter that is missing.
        """
        base = BaseModel.of(base)
        if base.fingerprint != self.base_hash:
            raise AdapterBaseMismatch(f"the recipe was made with {self.base}; {base.name} has other weights")
        by_hash = {file_hash(adapter): adapter for adapter in adapters}

        def find(entry: dict[str, Any]) -> Adapter:
            if entry["hash"] not in by_hash:
                raise SettingsError(f"the recipe needs {entry['name']} (hash {entry['hash'][:12]}); pass its file too")
            return by_hash[entry["hash"]]

        settings = dict(self.composition)
        try:
            if settings["regions"] != "auto":
                settings["regions"] = [region_from(entry, find(entry)) for entry in settings["regions"]]
            everywhere = [(find(entry), Weight(**entry["weight"])) for entry in self.adapters]
            studio = Composition(base, everywhere, **settings)
            note = self.note_on(studio)
        except (KeyError, TypeError, ValueError) as error:
            raise SettingsError(f"the recipe cannot be read ({reason_of(error)})") from error
        if note is not None:
            warnings.warn(note, CompositionWarning, stacklevel=2)
        return studio

    def note_on(self, studio: Composition) -> str | None:
        """If compel read the prompts and does not here, or the other way round, or another version of it."""
        before = dict(self.versions).get("compel")
        here = studio.compel(self.pictures["prompt"], self.pictures.get("negative_prompt"))
        if before == here:
            return None
        remedy = f"pip install compel=={before}" if before else "pip uninstall compel"
        drawn, now = (f"compel {one}" if one else "the text encoders alone" for one in (before, here))
        return shown(f"the recipe's prompt was read by {drawn}, here by {now}, so the pictures may differ; {remedy}")

    def generate(self, base: BaseModel | Any, adapters: Sequence[Adapter], **changes: Any) -> list[Picture]:
        """The same pictures; with `changes`, others, e.g. seeds=range(8)."""
        return self.studio(base, adapters).generate(**self.pictures | changes)


def asked(**pictures: Any) -> dict[str, Any]:
    """Arguments of `generate` in their plain types. Raises SettingsError for others."""
    if unknown := sorted(set(pictures) - set(PICTURES)):
        raise SettingsError(f"a recipe cannot ask for {shown(unknown[0])}")
    return checked(**pictures)


def adapter_entry(adapter: Adapter, weight: float | Weight | None) -> dict[str, Any]:
    written = asdict(weight) if isinstance(weight, Weight) else weight
    return {"name": adapter.name, "hash": file_hash(adapter), "weight": written}


def region_entry(region: Region) -> dict[str, Any]:
    entry = adapter_entry(region.adapter, region.weight)
    entry |= {"prompt": region.prompt, "feather": region.feather, "box": region.box}
    if region.mask is not None:
        pixels = picture_bytes(region.mask.convert("L"), generated=False)  # without the metadata of the mask's file
        entry["mask"] = base64.b64encode(pixels).decode("ascii")
    return entry


def region_from(entry: dict[str, Any], adapter: Adapter) -> Region:
    mask, weight = entry.get("mask"), entry["weight"]
    return Region(
        adapter,
        box=entry["box"],
        mask=None if mask is None else read_picture(base64.b64decode(mask, validate=True), mode="L"),
        prompt=entry["prompt"],
        weight=Weight(**weight) if isinstance(weight, dict) else weight,
        feather=entry["feather"],
    )
