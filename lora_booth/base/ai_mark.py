"""The mark of pictures that a model made, and the one way in which such pictures are saved."""

from __future__ import annotations

from pathlib import Path

from PIL import Image, PngImagePlugin

from ..errors import SettingsError

# IPTC's mark for pictures made by a trained model, which picture agencies and platforms read
AI_MARK = (
    '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
    '<rdf:Description xmlns:Iptc4xmpExt="http://iptc.org/std/Iptc4xmpExt/2008-02-29/" '
    'Iptc4xmpExt:DigitalSourceType="http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia"/>'
    "</rdf:RDF></x:xmpmeta>"
)
KINDS = {".png": "PNG", ".jpg": "JPEG", ".jpeg": "JPEG", ".webp": "WEBP"}


def save_marked(image: Image.Image, path: Path, *, kind: str | None = None) -> Path:
    """Save as PNG, JPEG or WebP: the pixels and the mark, without anything else that the picture carries.

    kind  "PNG", "JPEG" or "WEBP"; None: by the path's ending
    Raises SettingsError for another ending.
    """
    kind = kind or KINDS.get(path.suffix.lower())
    if kind is None:
        raise SettingsError(f"{path}: pictures are saved as .png, .jpg or .webp")
    path.parent.mkdir(parents=True, exist_ok=True)
    clean = image.copy()
    clean.info = {}  # of which Pillow writes comments and colour profiles
    if kind == "PNG":
        info = PngImagePlugin.PngInfo()
        info.add_itxt("XML:com.adobe.xmp", AI_MARK)
        clean.save(path, kind, pnginfo=info)
    else:
        clean.save(path, kind, xmp=AI_MARK.encode(), quality=95)
    return path
