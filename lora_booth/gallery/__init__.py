"""Gallery: pictures as one PNG contact sheet or one self-contained HTML page."""

from .gallery import Gallery

__all__ = ["Gallery"]
