"""Composition: several adapters in one picture, and the pictures that they make."""

from .composition import Composition
from .making import Making
from .picture import AI_MARK, Picture
from .preflight import Preflight
from .recipe import Recipe
from .regions import Region, preview
from .serving import Request, Serving
from .weights import Weight

__all__ = [
    "AI_MARK",
    "Composition",
    "Making",
    "Picture",
    "Preflight",
    "Recipe",
    "Region",
    "Request",
    "Serving",
    "Weight",
    "preview",
]
