"""What the page does with models: one base in memory, pictures and grids, and a recipe beside each picture."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image

from ..errors import CompositionWarning, OtherBaseWarning, PhotoError, SettingsError
from ..files import json_lines
from ..photos.opening import opened
from ..photos.photo import Unusable
from .folder import StudioFolder

if TYPE_CHECKING:
    from ..base.base_model import BaseModel
    from ..pictures.composition import Composition
    from ..pictures.grids import Grid

PLACES = {  # on the page -> where two subjects go
    "found": "where the base looks for each, which takes one pass more",
    "side by side": "the first adapter to the left, the second to the right",
    "painted": "where you paint: the first in orange, the second in blue",
    "everywhere": "the plain sum: for one subject and a style",
}
COLORS = ("#e4572e", "#2e86ab")  # of the first and the second subject, as in `preview`
NEAR = 90  # largest distance of a painted pixel to its colour, of 441; chosen
MOST_SHOWN = 48  # pictures on the page; chosen
KEYS = ("steps", "guidance", "size", "negative_prompt")


class Models:
    """The chosen base, loaded when first needed. Used by one call at a time: the page's queue sees to it."""

    def __init__(self, folder: StudioFolder) -> None:
        self.folder = folder
        self._loaded: tuple[str, BaseModel] | None = None

    def base(self) -> BaseModel:
        from ..base.base_model import BaseModel

        name = self.folder.base
        if self._loaded is None or self._loaded[0] != name:
            self.release()
            self._loaded = name, BaseModel.load(self.folder.bases()[name])
        return self._loaded[1]

    def release(self) -> None:
        """Give the memory to a training."""
        import gc

        if self._loaded is not None:
            import torch

            self._loaded = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()

    # --- pictures

    def compose(self, chosen: Sequence[tuple[str, float]], place: str, painted: bytes | None = None) -> Composition:
        """chosen: names of adapters with weights. painted: a PNG of what was painted, for the place of that name"""
        from ..adapters.adapter import Adapter
        from ..pictures.composition import Composition
        from ..pictures.regions import Region

        loaded = [(Adapter.load(self.folder.adapter_file(name)), weight) for name, weight in chosen]
        if place not in PLACES:
            raise SettingsError(f"place {place!r}; needed: one of {', '.join(PLACES)}")
        if place == "everywhere" or len(loaded) < 2:
            return Composition(self.base(), loaded, method="sum")
        if place == "found":
            return Composition(self.base(), loaded)
        (first, one), (second, other), *rest = loaded
        if place == "side by side":
            regions = [Region(first, box=(0, 0, 0.5, 1), weight=one), Region(second, box=(0.5, 0, 1, 1), weight=other)]
        else:
            masks = [mask_of(painted, color) for color in COLORS]
            regions = [Region(first, mask=masks[0], weight=one), Region(second, mask=masks[1], weight=other)]
        return Composition(self.base(), rest, regions=regions)

    def draw(self, studio: Composition, prompt: str, seeds: Sequence[int], **sampler: Any) -> tuple[list[str], list[str]]:
        """Draw into the album, with a recipe beside each picture. Returns the pictures' names, and remarks."""
        from ..pictures.gallery import Album
        from ..pictures.recipe import Recipe

        on_step: Callable[[int], None] | None = sampler.pop("on_step", None)
        album, names = Album(self.folder.place("pictures")), []
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("ignore")
            for category in (CompositionWarning, OtherBaseWarning):
                warnings.simplefilter("always", category)
            for seed in seeds:
                made = studio.generate(prompt, seeds=[seed], on_step=on_step, **sampler)
                [file] = album.save(made)
                settings = {name: value for name, value in sampler.items() if name in KEYS and value is not None}
                Recipe.of(studio, prompt, seeds=[seed], **settings).save(file.with_suffix(".json"))
                names.append(file.name)
        return names, list(dict.fromkeys(str(one.message) for one in noted))

    def redraw(self, name: str, seeds: Sequence[int] | None, **more: Any) -> tuple[list[str], list[str]]:
        """A picture again by its recipe, with other seeds if you like. Its adapters are found by their hash."""
        from ..adapters.adapter import Adapter
        from ..pictures.recipe import Recipe

        recipe = Recipe.load(self.folder.place("pictures", Path(name).stem + ".json"))
        adapters = [Adapter.load(self.folder.adapter_file(one)) for one in self.folder.names("adapters", ".safetensors")]
        asked = recipe.pictures | ({} if seeds is None else {"seeds": list(seeds)})
        return self.draw(recipe.studio(self.base(), adapters), asked.pop("prompt"), asked.pop("seeds"), **asked, **more)

    # --- to compare

    def before_after(self, chosen: Sequence[tuple[str, float]], prompt: str, seeds: Sequence[int], **sampler: Any) -> Grid:
        from ..pictures.grids import before_after

        return before_after(self.base(), self.compose(chosen, "everywhere").adapters, prompt, seeds=seeds, **sampler)

    def weights(self, chosen: Sequence[tuple[str, float]], prompt: str, seeds: Sequence[int], **sampler: Any) -> Grid:
        from ..pictures.grids import grid

        return grid(self.base(), self.compose(chosen, "everywhere").adapters, prompt, seeds=seeds, **sampler)

    def steps(self, run: str, prompt: str, seeds: Sequence[int], **sampler: Any) -> Grid:
        """A column for each adapter that a run has saved: which step was best?"""
        from ..adapters.adapter import Adapter
        from ..pictures.composition import Composition
        from ..pictures.grids import Grid, labels_of
        from ..training.checkpoint import saved_adapters

        found = saved_adapters(self.folder.place("runs", run))
        if not found:
            raise SettingsError(f"{run} has saved no adapter yet; wait for its first checkpoint or samples")
        columns = []
        for file in found.values():
            studio = Composition(self.base(), [(Adapter.load(file), 1.0)])
            columns.append(tuple(studio.generate(prompt, seeds=seeds, **sampler)))
        rows, title = labels_of([prompt], seeds)
        made = Grid(tuple(f"step {step}" for step in found), rows, tuple(columns), title)
        return made.transposed()

    def keep_grid(self, grid: Grid, name: str) -> Path:
        from ..pictures.gallery import first_free

        return grid.save(first_free(self.folder.place("pictures", f"{name}.png")))


def mask_of(painted: bytes | None, color: str | None = None) -> Image.Image:
    """White where a picture with transparency has this colour; None: where it has any."""
    import numpy as np

    if painted is None:
        raise SettingsError("nothing is painted; paint over the subject, or choose another way")
    try:
        with opened(painted) as (image, _, _):
            values = np.asarray(image.convert("RGBA"), dtype=np.float32)
    except Unusable as error:
        raise PhotoError(f"what was painted: {error}") from None
    found = values[..., 3] > 127
    if color is not None:
        wanted = np.array([int(color[i : i + 2], 16) for i in (1, 3, 5)], dtype=np.float32)
        found &= np.linalg.norm(values[..., :3] - wanted, axis=-1) < NEAR
    if not found.any():
        raise SettingsError("nothing is painted in a colour that is needed; paint each subject's place in its own")
    return Image.fromarray(found.astype(np.uint8) * 255)


def album(folder: StudioFolder) -> dict[str, dict[str, Any]]:
    """The newest pictures that are still there: name -> how each was made."""
    from ..pictures.gallery import RECORD

    found: dict[str, dict[str, Any]] = {}
    for line in json_lines(folder.place("pictures") / RECORD):
        name = str(line.get("file"))
        found.pop(name, None)
        found[name] = line
    shown = {}
    for name in reversed(found):
        try:
            path = folder.place("pictures", name)
        except SettingsError:
            continue
        if path.is_file():
            shown[name] = found[name]
        if len(shown) == MOST_SHOWN:
            break
    return shown


def remove_picture(folder: StudioFolder, name: str) -> None:
    for path in (folder.place("pictures", name), folder.place("pictures", Path(name).stem + ".json")):
        path.unlink(missing_ok=True)
