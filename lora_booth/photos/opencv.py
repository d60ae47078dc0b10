"""OpenCV, which is optional: it finds faces and cuts subjects out."""

from __future__ import annotations

from typing import Any

from ..errors import PhotoError


def load_opencv(purpose: str) -> Any:
    """The module `cv2`. Raises PhotoError with the remedy where it is missing, or is one without what is needed here."""
    remedy = f"{purpose} needs OpenCV 4; pip install 'lora-booth[vision]'"
    try:
        import cv2
    except ImportError:
        raise PhotoError(remedy) from None
    if not hasattr(cv2, "CascadeClassifier") or not hasattr(cv2, "grabCut"):  # OpenCV 5 has no cascades
        raise PhotoError(f"{remedy} (version {getattr(cv2, '__version__', 'unknown')} is installed)")
    return cv2
