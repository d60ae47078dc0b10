"""Contact sheets: many labelled pictures in one."""

from __future__ import annotations

import textwrap
from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont, ImageOps

from ..errors import PhotoError, shown


def contact_sheet(
    images: Sequence[Image.Image], *, labels: Sequence[str] = (), columns: int = 5, side: int = 160
) -> Image.Image:
    """A grid of pictures, each fitted into side x side pixels, with a wrapped label (up to 3 lines) below it."""
    if not images:
        raise PhotoError("no pictures for a contact sheet; pass at least one")
    gap, size = 8, 12  # pixels
    line = size + 3
    font = ImageFont.load_default(size)
    wrapped = [wrapped_lines(shown(label), font, side) for label in labels or [""] * len(images)]
    columns = max(1, min(columns, len(images)))
    text_height = line * max(len(lines) for lines in wrapped)
    cell = (side + gap, side + text_height + gap)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = gap + index % columns * cell[0], gap + index // columns * cell[1]
        fitted = ImageOps.pad(image.convert("RGB"), (side, side), Image.Resampling.LANCZOS, color="white")
        sheet.paste(fitted, (left, top))
        for row, text in enumerate(lines):
            draw.text((left, top + side + 2 + row * line), text, fill=(30, 30, 30), font=font)
    return sheet


def wrapped_lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3) -> list[str]:
    """`text` in up to `most` lines of at most `width` pixels, broken at spaces if possible."""
    for characters in range(width // 3, 3, -1):  # fewer to a line until it fits; few characters are narrower than 3 pixels
        lines = textwrap.wrap(text[:500], characters, max_lines=most, placeholder="...")
        if all(font.getlength(line) <= width for line in lines):
            return lines
    return []
