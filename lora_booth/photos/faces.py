"""People's faces, by the Haar cascades that OpenCV carries (Viola and Jones, "Rapid Object Detection", CVPR 2001)."""

from __future__ import annotations

from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from ..errors import PhotoError
from .opencv import load_opencv
from .photo import Region, box
from .saliency import small_copy

LONG_SIDE = 512  # pixels of the copy that is looked at
LEAST_SIDE = 40  # pixels of it; a smaller face is not what the photo is about
# Of the cascades, the one with the fewest false alarms; how many overlapping finds make a face.
# Measured by benchmarks/photo_audit.py.
FRONT, PROFILE, NEIGHBOURS = "haarcascade_frontalface_alt2.xml", "haarcascade_profileface.xml", 5


def face_of(image: Image.Image, crop: Region | None = None) -> Region | None:
    """Where the largest face of a picture (or of its `crop`) is: x0, y0, x1, y1 as fractions; None: no face found.

    Faces that look at the camera come first, then profiles. Raises PhotoError without OpenCV.
    """
    part = box(image.width, image.height, crop)
    grey = np.asarray(small_copy(image, LONG_SIDE, part).convert("L"))
    found = _faces(grey, FRONT)
    if not found:
        found = _faces(grey, PROFILE)  # those that look to one side; then, mirrored, to the other
    if not found:
        width = grey.shape[1]
        found = [(width - x - w, y, w, h) for x, y, w, h in _faces(np.ascontiguousarray(grey[:, ::-1]), PROFILE)]
    if not found:
        return None
    x, y, w, h = max(found, key=lambda face: face[2] * face[3])
    across, down = (part[2] - part[0]) / grey.shape[1], (part[3] - part[1]) / grey.shape[0]
    return (
        (part[0] + x * across) / image.width,
        (part[1] + y * down) / image.height,
        (part[0] + (x + w) * across) / image.width,
        (part[1] + (y + h) * down) / image.height,
    )


def check_faces() -> None:
    """Raises PhotoError if faces cannot be looked for here."""
    for name in (FRONT, PROFILE):
        _cascade(name)


def _faces(grey: Any, name: str) -> list[tuple[int, int, int, int]]:
    """x, y, width and height in pixels of what a cascade takes for faces."""
    found = _cascade(name).detectMultiScale(grey, scaleFactor=1.1, minNeighbors=NEIGHBOURS, minSize=(LEAST_SIDE, LEAST_SIDE))
    return [(int(x), int(y), int(w), int(h)) for x, y, w, h in found]


@cache
def _cascade(name: str) -> Any:
    cv2 = load_opencv('crop="face"')
    folder = getattr(getattr(cv2, "data", None), "haarcascades", "")
    cascade = cv2.CascadeClassifier(str(Path(folder) / name)) if (Path(folder) / name).is_file() else None
    if cascade is None or cascade.empty():  # a system's package without its data
        raise PhotoError(f"crop=\"face\": this OpenCV came without {name}; pip install 'lora-booth[vision]'")
    return cascade
