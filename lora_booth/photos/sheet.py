"""Contact sheets: many labelled pictures in one."""

from __future__ import annotations

from collections.abc import Sequence

from PIL import Image, ImageDraw, ImageFont

from ..errors import PhotoError, shown


def contact_sheet(
    images: Sequence[Image.Image], *, labels: Sequence[str] | None = None, columns: int = 5, side: int = 160
) -> Image.Image:
    """A grid of pictures, each fitted into side x side pixels, with a wrapped label (up to 3 lines) below it."""
    if not images:
        raise PhotoError("no pictures for a contact sheet; pass at least one")
    if labels is not None and len(labels) != len(images):
        raise PhotoError(f"{len(labels)} labels for {len(images)} pictures; pass one label for each picture")
    gap, size = 8, 12  # pixels
    line = size + 3
    font = ImageFont.load_default(size)
    wrapped = [wrapped_lines(shown(label), font, side) for label in labels] if labels is not None else [[] for _ in images]
    columns = max(1, min(columns, len(images)))
    text_height = line * max(len(lines) for lines in wrapped)
    cell = (side + gap, side + text_height + gap)
    rows = -(-len(images) // columns)
    sheet = Image.new("RGB", (columns * cell[0] + gap, rows * cell[1] + gap), (255, 255, 255))
    draw = ImageDraw.Draw(sheet)
    for index, (image, lines) in enumerate(zip(images, wrapped, strict=True)):
        left, top = gap + index % columns * cell[0], gap + index // columns * cell[1]
        scale = side / max(image.size)
        fitted = (max(1, round(image.width * scale)), max(1, round(image.height * scale)))
        small = image.convert("RGB")
        if fitted != small.size:
            small = small.resize(fitted, Image.Resampling.LANCZOS, reducing_gap=2.0)
        sheet.paste(small, (left + (side - fitted[0]) // 2, top + (side - fitted[1]) // 2))
        for row, text in enumerate(lines):
            draw.text((left, top + side + 2 + row * line), text, fill=(30, 30, 30), font=font)
    return sheet


def wrapped_lines(text: str, font: ImageFont.FreeTypeFont | ImageFont.ImageFont, width: int, most: int = 3) -> list[str]:
    """`text` in up to `most` lines of at most `width` pixels, broken at spaces if possible."""
    lines: list[str] = []
    rest = " ".join(text.split())[:500]
    while rest and len(lines) < most:
        end = len(rest)
        while end > 1 and font.getlength(rest[:end]) > width:
            end -= 1
        if end < len(rest) and (space := rest.rfind(" ", 0, end + 1)) > 0:
            end = space
        lines.append(rest[:end])
        rest = rest[end:].lstrip()
    if rest:
        last = lines[-1]
        while last and font.getlength(f"{last}...") > width:
            last = last[:-1]
        lines[-1] = f"{last}..."
    return lines
