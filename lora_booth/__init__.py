"""DreamBooth with LoRA: teach Stable Diffusion one subject from a few photos, share it as one small file."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# where each public name lives; nothing heavy is imported before it is used
_HOMES = {
    "Adapter": "adapters",
    "Card": "adapters",
    "LoraFactors": "adapters",
    "difference": "adapters.difference",
    "merge": "adapters.merge",
    "resize": "adapters.resize",
    "bake": "baking",
    "BaseModel": "base_model",
    "Composition": "composition",
    "Picture": "composition",
    "Recipe": "composition",
    "Region": "composition",
    "Request": "composition",
    "Serving": "composition",
    "Weight": "composition",
    "preview": "composition",
    "LoraSpec": "config",
    "TrainingConfig": "config",
    "LoraBoothError": "errors",
    "evaluate": "evaluation",
    "extract": "extraction",
    "Gallery": "gallery",
    "Grid": "grids",
    "before_after": "grids",
    "grid": "grids",
    "grid_steps": "grids",
    "attached": "injection",
    "Photo": "photos",
    "make_masks": "photos",
    "Step": "progress",
    "PROMPT_SETS": "prompts",
    "fill_prompts": "prompts",
    "read_prompts": "prompts",
    "write_report": "report",
    "Subject": "subject",
    "check_token": "subject",
    "propose_tokens": "subject",
    "plan": "training.planning",
    "prepare": "training",
    "train": "training",
    "training_steps": "training",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .adapters import Adapter, Card, LoraFactors
    from .adapters.difference import difference
    from .adapters.merge import merge
    from .adapters.resize import resize
    from .baking import bake
    from .base_model import BaseModel
    from .composition import Composition, Picture, Recipe, Region, Request, Serving, Weight, preview
    from .config import LoraSpec, TrainingConfig
    from .errors import LoraBoothError
    from .evaluation import evaluate
    from .extraction import extract
    from .gallery import Gallery
    from .grids import Grid, before_after, grid, grid_steps
    from .injection import attached
    from .photos import Photo, make_masks
    from .progress import Step
    from .prompts import PROMPT_SETS, fill_prompts, read_prompts
    from .report import write_report
    from .subject import Subject, check_token, propose_tokens
    from .training import prepare, train, training_steps
    from .training.planning import plan


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
