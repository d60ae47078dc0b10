"""Picture: one generated picture, what made it, and how it is saved."""

from __future__ import annotations

from dataclasses import dataclass
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


@dataclass(frozen=True)
class Picture:
    """One picture and what made it."""

    image: Image.Image
    prompt: str
    seed: int
    adapters: tuple[tuple[str, float], ...] = ()  # name, weight
    base: str = ""
    negative_prompt: str | None = None
    steps: int = 0
    guidance: float = 0.0

    def save(self, path: str | Path) -> Path:
        """PNG or, by its ending, JPEG or WebP; marked as made by a model (IPTC), without anything else."""
        path = Path(path)
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg", ".webp"):
            raise SettingsError(f"{path}: pictures are saved as .png, .jpg or .webp")
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix.lower() == ".png":
            info = PngImagePlugin.PngInfo()
            info.add_itxt("XML:com.adobe.xmp", AI_MARK)
            self.image.save(path, pnginfo=info)
        else:
            self.image.save(path, xmp=AI_MARK.encode(), quality=95)
        return path
