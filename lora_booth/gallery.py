"""Gallery: pictures as one PNG contact sheet or one self-contained HTML page."""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Sequence
from pathlib import Path

from .composition import AI_MARK, Picture
from .errors import SettingsError
from .photos import contact_sheet

THUMBNAIL = 256  # pixels
FULL_QUALITY = 92  # WebP

PAGE = """<!doctype html>
<html lang="en">
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>{title}</title>
<style>
  :root {{ color-scheme: light dark; font: 15px/1.45 system-ui, sans-serif; }}
  body {{ margin: 0 auto; max-width: 80rem; padding: 1.5rem; }}
  main {{ display: grid; gap: 1.25rem; grid-template-columns: repeat(auto-fill, minmax(13rem, 1fr)); }}
  figure {{ margin: 0; }}
  img {{ width: 100%; aspect-ratio: 1; object-fit: contain; border-radius: .5rem; image-rendering: {rendering}; }}
  figcaption {{ margin-top: .4rem; overflow-wrap: anywhere; }}
  small {{ display: block; opacity: .7; }}
  a:focus-visible {{ outline: 3px solid Highlight; }}
</style>
<h1>{title}</h1>
<main>
{figures}
</main>
</html>
"""

FIGURE = """<figure id="picture-{number}">
  <a href="{source}" download="picture-{number}.webp"><img src="{source}" alt="{prompt}" loading="lazy"></a>
  <figcaption>{prompt}<small>seed {seed}{adapters}{base}</small></figcaption>
</figure>"""


class Gallery:
    """Pictures with what made them. `save` writes by the path's ending: .html, .png, .jpg or .webp."""

    def __init__(self, pictures: Sequence[Picture], *, title: str = "lora_booth") -> None:
        if not pictures:
            raise SettingsError("a gallery without pictures; generate some first")
        self.pictures, self.title = list(pictures), title

    def save(self, path: str | Path) -> Path:
        path = Path(path)
        if path.suffix.lower() in (".html", ".htm"):
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(self.html(), encoding="utf-8")
            return path
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise SettingsError(f"{path}: a gallery is saved as .html, .png, .jpg or .webp")
        return self.sheet(path)

    def sheet(self, path: Path, *, columns: int = 4) -> Path:
        """A contact sheet with seed and prompt under each picture; a long prompt is cut at three lines."""
        labels = [f"seed {p.seed}: {p.prompt}" for p in self.pictures]
        images = [p.image for p in self.pictures]
        grid = contact_sheet(
            images, labels=labels, columns=min(columns, len(images)), side=max(128, min(THUMBNAIL, images[0].width))
        )
        return Picture(grid, self.title, 0).save(path)

    def html(self) -> str:
        """One page without any outside reference; every text is escaped."""
        figures = [figure(number, picture) for number, picture in enumerate(self.pictures, 1)]
        small = max(p.image.width for p in self.pictures) <= 128
        return PAGE.format(
            title=html.escape(self.title), figures="\n".join(figures), rendering="pixelated" if small else "auto"
        )


def figure(number: int, picture: Picture) -> str:
    worn = ", ".join(f"{name} {weight:g}" for name, weight in picture.adapters)
    return FIGURE.format(
        number=number,
        source=data_url(picture),
        prompt=html.escape(picture.prompt, quote=True),
        seed=picture.seed,
        adapters=f" · {html.escape(worn)}" if worn else "",
        base=f" · {html.escape(picture.base)}" if picture.base else "",
    )


def data_url(picture: Picture) -> str:
    buffer = io.BytesIO()
    picture.image.save(buffer, format="WEBP", quality=FULL_QUALITY, lossless=picture.image.width <= 128, xmp=AI_MARK.encode())
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()
