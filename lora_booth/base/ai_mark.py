"""Generated pictures as files and in pages, with a mark that a model made them."""

from __future__ import annotations

import base64
import io
from pathlib import Path
from typing import Any

from PIL import Image, PngImagePlugin

from ..errors import SettingsError
from ..files import write_file

# IPTC's mark for pictures made by a trained model, which picture agencies and platforms read
AI_MARK = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)
LOSSLESS = 128  # pixels; chosen: WebP pictures up to this width lose nothing
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def save_picture(image: Image.Image, path: Path, *, generated: bool = True) -> Path:
    """Save as PNG, JPEG or WebP: the pixels and the mark, without other metadata. generated: as for `data_url`

    Raises SettingsError for another ending.
    """
    kind = kind_of(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    write_file(path, picture_bytes(image, kind, generated=generated))
    return path


def kind_of(path: Path) -> str:
    """Pillow's name for what the ending says. Raises SettingsError for another ending."""
    if path.suffix.lower() not in KINDS:
        raise SettingsError(f"{path}: pictures are saved as .png, .jpg or .webp")
    return KINDS[path.suffix.lower()]


def picture_bytes(image: Image.Image, kind: str = "PNG", *, generated: bool = True, **options: Any) -> bytes:
    """What `save_picture` writes. options: Pillow's"""
    if generated and kind == "PNG":
        options["pnginfo"] = PngImagePlugin.PngInfo()
        options["pnginfo"].add_itxt("XML:com.adobe.xmp", AI_MARK)
    elif generated:
        options["xmp"] = AI_MARK.encode()
    clean = image.copy()
    clean.info = {}  # Pillow would write comments and colour profiles from it
    content = io.BytesIO()  # Pillow does not notice when a full disk truncates a JPEG
    clean.save(content, kind, **{"quality": 95, **options})
    return content.getvalue()


def data_url(image: Image.Image, quality: int, *, generated: bool = True) -> str:
    """A picture as WebP for a page. generated: with the mark; without it for photos"""
    content = picture_bytes(image, "WEBP", generated=generated, quality=quality, lossless=image.width <= LOSSLESS)
    return "data:image/webp;base64," + base64.b64encode(content).decode()
