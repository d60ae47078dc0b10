"""What the page does with models: one base in memory, pictures and grids, and a recipe beside each picture."""

from __future__ import annotations

import gc
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageColor, ImageOps

from ..adapters.adapter import Adapter
from ..adapters.sharing import thumbnail_of
from ..base.base_model import BaseModel
from ..base.sizes import drawable
from ..errors import SettingsError, shown
from ..photos.opening import read_picture
from ..pictures.composition import Composition
from ..pictures.gallery import Album
from ..pictures.grids import Grid, grid
from ..pictures.preflight import misfits
from ..pictures.recipe import Recipe
from ..pictures.regions import PREVIEW_COLORS, Region
from ..training.checkpoint import saved_adapters
from .folder import StudioFolder

PLACES = {  # on the page -> where two subjects go
    "found": "where the base puts each of them",
    "side by side": "the first adapter in the left half, the second in the right; say so in the prompt as well",
    "painted": "where you paint: the first in orange, the second in blue",
    "everywhere": "no places: for one subject and a style",
}
BY_WEIGHT = "the adapters at 0 (before), 40, 80 and 100 % (after) of their weights"
BY_STEP = "every step that a run has saved"
COLORS = PREVIEW_COLORS[:2]  # of the first and the second subject
COLOR_NAMES = dict(zip(COLORS, ("orange", "blue"), strict=True))
NEAR = 90  # largest distance of a painted pixel to its colour, of 441; chosen
CANVAS = 480  # pixels a side of what is painted on; chosen
SMALL = 256  # of a thumbnail
SHEER = 150  # opacity of what is not painted by hand, of 255; chosen
Chosen = Sequence[tuple[str, float]]  # names of adapters on the shelf, with weights
Painted = dict[str, Any]  # what `gr.ImageEditor` holds


class Models:
    """The chosen base, loaded when first needed. Used by one call at a time: the page's queue sees to it."""

    def __init__(self, folder: StudioFolder) -> None:
        self.folder = folder
        self._loaded: tuple[str, BaseModel] | None = None

    def base(self) -> BaseModel:
        name = self.folder.base
        if self._loaded is None or self._loaded[0] != name:
            self.release()
            self._loaded = name, BaseModel.load(self.folder.bases()[name])
        return self._loaded[1]

    def release(self) -> None:
        """Give the memory to a training."""
        self._loaded = None
        gc.collect()
        torch.cuda.empty_cache()

    def adapter(self, name: str) -> Adapter:
        if name not in self.folder.names("adapters", ".safetensors"):
            raise SettingsError(f"{shown(name) if name else 'none'}: no such adapter; choose one that the page lists")
        return Adapter.load(self.folder.adapter_file(name))

    def weighted(self, chosen: Chosen) -> list[tuple[Adapter, float]]:
        return [(self.adapter(name), weight) for name, weight in chosen]

    def compose(self, chosen: Chosen, place: str, painted: Painted | None = None) -> Composition:
        loaded = self.weighted(chosen)
        if place == "everywhere" or len(loaded) < 2:
            return Composition(self.base(), loaded, method="sum")
        if place == "found":
            return Composition(self.base(), loaded)
        halves: list[dict[str, Any]] = [{"box": (0, 0, 0.5, 1)}, {"box": (0.5, 0, 1, 1)}]
        where = halves if place == "side by side" else [{"mask": mask_of(painted, color)} for color in COLORS]
        regions = [Region(adapter, weight=weight, **one) for (adapter, weight), one in zip(loaded, where, strict=False)]
        return Composition(self.base(), loaded[2:], regions=regions)

    def draw(self, studio: Composition, prompt: str, seeds: Sequence[int], *, on_step: Any = None, **sampler: Any) -> str:
        """Draw into the album, with a recipe beside each picture. Returns the first picture's name."""
        album, files = Album(self.folder.place("pictures")), []
        for seed in seeds:
            files += album.save(studio.generate(prompt, seeds=[seed], on_step=on_step, **sampler))
            Recipe.of(studio, prompt, seeds=[seed], **sampler).save(files[-1].with_suffix(".json"))
        return files[0].name

    def recipe(self, name: str) -> tuple[Recipe, Composition]:
        """How a picture was made. Its adapters are found by their hash."""
        found = Recipe.load(self.folder.place("pictures", Path(name).stem + ".json"))
        adapters = [self.adapter(one) for one in self.folder.names("adapters", ".safetensors")]
        return found, found.studio(self.base(), adapters)

    def redraw(self, name: str) -> tuple[str, list[str]]:
        """A picture again by its recipe; and what there is to say of it."""
        recipe, studio = self.recipe(name)
        notes = [*filter(None, [recipe.note_on(studio)]), *remarks(studio, **recipe.pictures)]
        return self.draw(studio, **recipe.pictures), notes

    def traced(self, name: str) -> Painted:
        """A picture to paint on, with the places of its subjects: those that were set, or found as they were then."""
        recipe, studio = self.recipe(name)
        places = studio.places
        if studio.regions == "auto":
            how = {key: value for key, value in recipe.pictures.items() if key not in ("seeds", "batch_size")}
            places = studio.find_regions(**how, seed=recipe.pictures["seeds"][0])
        return painting_of(read_picture(self.folder.place("pictures", name)), [place.mask_image() for place in places])

    def by_step(self, run: str, prompt: str, **settings: Any) -> Grid:
        """A column for each adapter that a run has saved: which step was best?"""
        found = saved_adapters(self.folder.place("runs", run))
        if not found:
            raise SettingsError(f"{run} has saved no adapter yet; wait for its first checkpoint or samples")
        each = [grid(self.base(), Adapter.load(file), prompt, weights=[1], **settings) for file in found.values()]
        rows = tuple(tuple(one.pictures) for one in each)
        return Grid(tuple(f"step {step}" for step in found), each[0].rows, rows, each[0].title).transposed()


def remarks(
    studio: Composition, prompt: str, *, negative_prompt: str | None = None, size: Any = None, **more: Any
) -> list[str]:
    """What the library warns of: not by Python's warnings, whose filters all threads share."""
    _, other_base = misfits(studio.base, studio.everyone(prompt))
    return [*other_base, *studio.remarks(prompt, negative_prompt, size=drawable(studio.base, size))]


def mask_of(painted: Painted | None, color: str) -> Image.Image:
    """White where the first layer that was painted has this colour."""
    layer = next(filter(None, (painted or {}).get("layers") or ()), None)
    if layer is None:
        raise SettingsError("nothing is painted; paint over the place of the subject")
    background = painted and painted.get("background")
    box = background.convert("RGBA").getchannel("A").getbbox() if background else None  # without the margins
    pixels = np.asarray(layer.convert("RGBA").crop(box), dtype=np.float32)
    distance = np.linalg.norm(pixels[..., :3] - ImageColor.getrgb(color), axis=-1)
    inside = (distance < NEAR) & (pixels[..., 3] > 0)
    if not inside.any():
        raise SettingsError(f"nothing is painted in {COLOR_NAMES[color]}, which the palette beside the picture has")
    return Image.fromarray(inside.astype(np.uint8) * 255)


def painting_of(picture: Image.Image, masks: Sequence[Image.Image]) -> Painted:
    """The picture, and over it in its colour what is white in each mask, to be painted further.

    Both are squares with transparent margins: the editor shifts a layer of another size than the picture before it.
    """
    square = (CANVAS, CANVAS)
    layer = Image.new("RGBA", square)
    for mask, color in zip(masks, COLORS, strict=False):
        inside = ImageOps.pad(mask.resize(picture.size), square).point(lambda grey: 255 * (grey > 127))
        layer.paste((*ImageColor.getrgb(color), SHEER), mask=inside)
    background = ImageOps.pad(picture.convert("RGBA"), square, color=(0, 0, 0, 0))
    return {"background": background, "layers": [layer] * bool(masks), "composite": None}


def album(folder: StudioFolder) -> dict[str, dict[str, Any]]:
    """The pictures that are still there, the newest first: name -> how each was made."""
    there = {f"{name}.png" for name in folder.names("pictures", ".png")}
    records = Album(folder.place("pictures")).records()
    return {name: records[name] for name in reversed(records) if name in there}


def thumbnail(folder: StudioFolder, adapter: str) -> Image.Image | None:
    """The picture in the adapter's file, else the newest that was drawn with it, and with as few others as possible."""
    drawn = [(len(made.get("files", ())), name) for name, made in album(folder).items() if adapter in made.get("files", ())]
    newest = next((name for number, name in drawn if number == min(drawn)[0]), None)
    found = thumbnail_of(folder.adapter_file(adapter))
    if found is None and newest is not None:
        found = read_picture(folder.place("pictures", newest))
    return found and ImageOps.fit(found, (SMALL, SMALL))
