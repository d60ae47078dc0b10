"""The studio's folder: subjects, runs, adapters and pictures as plain files. The page shows them, and holds nothing itself."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from PIL import Image

from ..adapters.adapter import Adapter
from ..base.ai_mark import save_picture
from ..base.families import FAMILIES
from ..errors import PhotoError, SettingsError, shown
from ..files import make_folder, read_table, remove, write_file
from ..photos.finding import CAPTION_ENDING, CROPS_FILE, MANY, MASK_ENDING, checked_caption, find_photos, read_crops
from ..photos.opening import opened, upright_copy
from ..photos.photo import CropRegion, Photo, PhotoSet, Unusable
from ..pictures.gallery import names
from ..subject.subject import Subject, check_words

ROOMS = ("photos", "runs", "adapters", "pictures", "shared", "bases")
SETTINGS = "studio.json"  # what holds for all subjects: the base
UPLOADS = ".page"  # what browsers sent, and pictures on their way to them
NAME = re.compile(r"[^\W_]([\w -]{0,38}[\w-])?")  # of subjects and runs
PIPELINES = {family.pipeline for family in FAMILIES.values()}
AROUND = 1.15  # side of a crop by that of what was painted; chosen


class StudioFolder:
    """photos/NAME/ with NAME.json beside it (token and class noun); runs/NAME/ with NAME.json (its settings) and NAME.log;
    adapters/NAME.safetensors; pictures/; shared/NAME/; bases/ for folders and checkpoints of your own."""

    def __init__(self, root: Path) -> None:
        make_folder(root.absolute())
        self.root = root.resolve()
        for room in ROOMS:
            make_folder(self.root / room)

    def place(self, room: str, *names: str) -> Path:
        """A path in one of ROOMS. Raises SettingsError for a name that leads elsewhere, also through a link."""
        path = self.root / room
        for name in names:
            plain = isinstance(name, str) and name.isprintable() and not {"/", "\\"} & set(name) and name.strip(". ")
            if not plain or len(os.fsencode(name)) > 200 or path.is_symlink():
                raise SettingsError(f"{shown(name)!r:.80} is not a name in this studio; choose one that the page lists")
            path /= name
        if path.is_symlink():
            raise SettingsError(f"{shown(path.name)}: a link, which the studio does not follow; copy the file instead")
        return path

    def names(self, room: str, ending: str = "") -> list[str]:
        """What is in a room: folders, or files with this ending, which is left out."""
        found = [path for path in (self.root / room).iterdir() if not path.name.startswith(".") and not path.is_symlink()]
        fits = [path for path in found if (path.is_file() and path.name.endswith(ending) if ending else path.is_dir())]
        return sorted(path.name.removesuffix(ending) for path in fits)

    # --- subjects and their photos

    def facts(self, subject: str) -> dict[str, str]:
        """token and class_noun"""
        found = read_table(self.place("photos", f"{subject}.json"))
        return {name: str(found.get(name, "")) for name in ("token", "class_noun")}

    def tokens_but(self, subject: str | None) -> set[str]:
        """Those of the other subjects."""
        return {self.facts(one)["token"] for one in self.names("photos") if one != subject}

    def describe(self, subject: str, token: str, class_noun: str) -> None:
        """Raises SubjectError for words that cannot work."""
        check_words(token, class_noun)
        write_facts(self.place("photos", f"{check_name(subject)}.json"), {"token": token, "class_noun": class_noun})

    def photos(self, subject: str) -> PhotoSet:
        """Raises PhotoError if none can be used."""
        return find_photos(self.place("photos", subject), minimum=1, maximum=MANY)

    def subject(self, name: str) -> Subject:
        facts = self.facts(name)
        folder = self.place("photos", name)
        return Subject.from_folder(folder, token=facts["token"], class_noun=facts["class_noun"], minimum=1, maximum=MANY)

    def photo(self, subject: str, name: str) -> Photo:
        found = next((photo for photo in self.photos(subject).photos if photo.path.name == name), None)
        if found is None:
            raise PhotoError(f"{shown(name)}: no such photo; choose one that the page lists")
        return found

    def add_photos(self, subject: str, files: Sequence[Path]) -> list[str]:
        """Copy what is a new photo. Returns a line for each other file."""
        folder, refused = self.place("photos", check_name(subject)), []
        make_folder(folder)
        for file in files:
            try:
                with opened(file) as (image, _, _):
                    upright_copy(image)
            except Unusable as error:
                refused.append(f"{shown(file.name)}: {error}")
                continue
            content = file.read_bytes()
            alike = (path for path in folder.iterdir() if path.is_file() and path.stat().st_size == len(content))
            if any(path.read_bytes() == content for path in alike):
                refused.append(f"{shown(file.name)}: it is there already")
                continue
            taken = {path.stem for path in folder.iterdir()}  # captions and masks go by it
            kind = file.suffix.lower() if file.suffix[1:].isalnum() else ""  # pictures are told by their content
            place = folder / f"{clean(file.stem)}{kind}"
            write_file(next(one for one in names(place) if one.stem not in taken), content)
        return refused

    def use_all_of(self, photo: Photo) -> None:
        """Without crop and mask."""
        self.set_crop(photo, None)
        self.set_mask(photo, None)

    def remove_photo(self, photo: Photo) -> None:
        self.use_all_of(photo)
        self.set_caption(photo, "")
        remove(photo.path)

    def set_caption(self, photo: Photo, text: str) -> None:
        path, caption = photo.path.with_name(photo.path.stem + CAPTION_ENDING), checked_caption(text, "here")
        remove(path) if caption is None else write_file(path, f"{caption}\n".encode())

    def set_crop(self, photo: Photo, region: CropRegion | None) -> None:
        path = self.place("photos", photo.path.parent.name, CROPS_FILE)
        crops = read_crops(path) if path.exists() else {}
        crops.pop(photo.path.name, None)
        if region is not None:
            crops[photo.path.name] = region
            find_photos([photo.path], crops={photo.path.name: region}, minimum=1)  # raises PhotoError if it is too small
        write_file(path, json.dumps(crops, indent=1).encode())

    def set_mask(self, photo: Photo, painted: Image.Image | None) -> None:
        """painted: greys in the shape of the upright photo, white on the subject; None: no mask. Raises PhotoError"""
        path = photo.path.with_name(photo.path.stem + MASK_ENDING)
        if painted is None:
            remove(path)
        else:  # raises PhotoError if its white is outside the crop
            name = photo.path.name
            find_photos([photo.path], crops={name: photo.crop} if photo.crop else {}, masks={name: painted}, minimum=1)
            save_picture(painted, path, generated=False)

    # --- bases

    def bases(self) -> dict[str, str]:
        """What the page calls a base -> what `BaseModel.load` takes. Only what is on this machine."""
        from huggingface_hub import constants

        found = {"toybox": "toybox"}
        for path in sorted((self.root / "bases").iterdir()):
            if (path / "model_index.json").is_file() or path.suffix == ".safetensors":
                found[path.name] = str(path)
        for index in sorted(Path(constants.HF_HUB_CACHE).glob("models--*--*/snapshots/*/model_index.json")):
            if read_table(index).get("_class_name") in PIPELINES:
                repo = index.parts[-4].removeprefix("models--").replace("--", "/")
                found[repo] = repo
        return found

    @property
    def base(self) -> str:
        """The chosen one, as the page calls it."""
        chosen = str(read_table(self.root / SETTINGS).get("base"))
        return chosen if chosen in self.bases() else "toybox"

    def choose_base(self, name: str) -> None:
        if name not in self.bases():
            raise SettingsError(f"{shown(name)}: no such base on this machine; choose one that the page lists")
        write_facts(self.root / SETTINGS, {"base": name})

    # --- adapters

    def add_adapter(self, file: Path) -> str:
        """Copy an adapter's file once everything in it is checked. Returns its name."""
        Adapter.load(file)
        name = self.free_name(clean(file.stem))
        write_file(self.adapter_file(name), file.read_bytes())
        return name

    def free_name(self, wanted: str) -> str:
        """The name, or one like it, that no run and no adapter has: a run writes an adapter of its name."""
        taken = {*self.names("runs", ".json"), *self.names("adapters", ".safetensors")}
        return next(one.stem for one in names(self.adapter_file(wanted)) if one.stem not in taken)

    def adapter_file(self, name: str) -> Path:
        return self.place("adapters", f"{name}.safetensors")

    def remove_adapter(self, name: str | None) -> None:
        if name not in self.names("adapters", ".safetensors"):
            raise SettingsError(f"{shown(name)}: no such adapter; choose one that the page lists")
        remove(self.adapter_file(name))


def write_facts(path: Path, facts: Mapping[str, Any]) -> None:
    write_file(path, (json.dumps(facts, indent=1, ensure_ascii=False) + "\n").encode())


def check_name(name: str) -> str:
    if not NAME.fullmatch(name or ""):
        raise SettingsError(f"name {shown(name)!r:.60}; needed: letters, digits, spaces, - and _, at most 40, e.g. 'rex'")
    return name


def clean(stem: str) -> str:
    """The name of a browser's file, without what a path or a shell could obey."""
    return re.sub(r"[^\w-]+", "_", stem).strip("-_")[:80] or "file"


def square_around(mask: Image.Image) -> CropRegion:
    """The crop whose square holds what is white in a mask, as fractions of the picture."""
    left, top, right, bottom = mask.getbbox() or (0, 0, *mask.size)
    side = min(AROUND * max(right - left, bottom - top), *mask.size)
    x = min(max(0.0, (left + right - side) / 2), mask.width - side)
    y = min(max(0.0, (top + bottom - side) / 2), mask.height - side)
    return x / mask.width, y / mask.height, (x + side) / mask.width, (y + side) / mask.height
