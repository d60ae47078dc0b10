"""Region: one adapter's place in the picture, and the masks of several regions."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont
from torch import Tensor

from ..adapters.adapter import Adapter
from ..config import check, check_types, typed
from ..errors import SettingsError
from ..kernels.attention_maps import blurred
from .weights import Weight

FEATHER = 0.04  # softness of a region's edge, as a share of the mask's side; chosen
SIDE = 512  # pixels of a drawn mask, which is reduced to the size of each layer; chosen
PREVIEW_COLORS = ("#e4572e", "#2e86ab", "#f2b134", "#56a3a6", "#a05195", "#76b041")  # of a preview


@dataclass(frozen=True, eq=False)
class Region:
    """Where one adapter is active.

    box      (x0, y0, x1, y1) as shares of width and height, 0 to 1, from the top left
    mask     instead of a box: a picture of any size, white where the subject goes
    prompt   what this region shows; None: the picture's prompt, with the plain class for every other subject
    weight   of the adapter in the region; None: what its card suggests
    feather  softness of the edge, as a share of the picture's side
    """

    adapter: Adapter
    box: tuple[float, float, float, float] | None = None
    mask: Image.Image | None = None
    prompt: str | None = None
    weight: float | Weight | None = None
    feather: float = FEATHER

    def __post_init__(self) -> None:
        check_types(self)
        if (self.box is None) == (self.mask is None):
            raise SettingsError(f"the region of {self.adapter.name} needs either a box or a mask")
        if self.box is not None:
            check_box(self.box)
        check(0 <= self.feather <= 0.5, f"feather {self.feather:g}", "0 to 0.5 of the picture's side")

    def mask_image(self) -> Image.Image:
        """Mode "L", SIDE x SIDE, with soft edges."""
        if self.mask is not None:
            drawn = self.mask.convert("L").resize((SIDE, SIDE), Image.Resampling.BOX)
        else:
            assert self.box is not None
            drawn = Image.new("L", (SIDE, SIDE))
            x0, y0, x1, y1 = (round(SIDE * edge) for edge in self.box)
            ImageDraw.Draw(drawn).rectangle((x0, y0, x1 - 1, y1 - 1), fill=255)
        if not self.feather:
            return drawn
        values = torch.from_numpy(np.array(drawn, dtype=np.float32))[None, None]
        soft = blurred(values, self.feather * SIDE / 2)  # which repeats the border: it does not fade there
        return Image.fromarray(soft[0, 0].round().clamp(0, 255).byte().numpy())


def check_box(box: Sequence[float]) -> None:
    """Raises SettingsError."""
    check(len(box) == 4, f"box {box}", "four shares of the picture's sides: x0, y0, x1, y1")
    x0, y0, x1, y1 = box
    check(0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1, f"box {box}", "0 <= x0 < x1 <= 1 and 0 <= y0 < y1 <= 1")


@dataclass
class Masks:
    """(N, P, H, W) float32 in 0..1: N subjects; P pictures of the batch, or 1 for all. Reduced to any layer's size."""

    full: Tensor
    _sizes: dict[tuple[int, int], Tensor] = field(default_factory=dict)

    def at(self, height: int, width: int) -> Tensor:
        """The masks averaged down to (N, P, height, width)."""
        if (height, width) not in self._sizes:
            # by height and width, never by their product: 8 x 32 and 16 x 16 have as many tokens
            self._sizes[height, width] = F.interpolate(self.full, (height, width), mode="area")
        return self._sizes[height, width]


def masks_of(regions: Sequence[Region]) -> Masks:
    drawn = [np.array(region.mask_image(), dtype=np.float32) / 255 for region in regions]
    for region, mask in zip(regions, drawn, strict=True):
        if mask.max() <= 0:
            raise SettingsError(f"the region of {region.adapter.name} is empty: no pixel of its mask is white; draw it larger")
    return Masks(torch.from_numpy(np.stack(drawn))[:, None])


def preview(regions: Sequence[Region], picture: Image.Image | None = None, *, side: int = 384) -> Image.Image:
    """The regions as coloured areas with their names, over a picture if there is one.

    side  the longer one, in pixels; the result has the picture's shape
    """
    regions, picture = typed("regions", regions, tuple[Region, ...]), typed("picture", picture, Image.Image | None)
    check(typed("side", side, int) >= 1, f"side {side}", "at least 1")
    canvas = (picture or Image.new("RGB", (side, side), "#808080")).convert("RGB")
    width, height = (max(1, round(side * length / max(canvas.size))) for length in canvas.size)
    canvas = canvas.resize((width, height))
    font = ImageFont.load_default(max(10, side // 24))
    for i, region in enumerate(regions):
        mask = region.mask_image().resize(canvas.size)
        tint = Image.new("RGB", canvas.size, PREVIEW_COLORS[i % len(PREVIEW_COLORS)])
        canvas = Image.composite(Image.blend(canvas, tint, 0.55), canvas, mask)
        inside = np.argwhere(np.asarray(mask) > 127)
        if len(inside):
            y, x = inside.mean(0)
            ImageDraw.Draw(canvas).text(
                (x, y), region.adapter.name, fill="white", anchor="mm", font=font, stroke_width=2, stroke_fill="black"
            )
    return canvas
