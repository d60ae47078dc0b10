"""DreamBooth with LoRA: teach Stable Diffusion one subject from a few photos, share it as one small file."""

from __future__ import annotations

from typing import TYPE_CHECKING

__version__ = "0.1.0"

# where each public name lives; nothing heavy is imported before it is used
_HOMES = {
    "Adapter": "adapters.adapter",
    "Card": "adapters.contents",
    "LoraFactors": "adapters.contents",
    "difference": "adapters.tools.inspection",
    "merge": "adapters.tools.merge",
    "resize": "adapters.tools.spectrum",
    "bake": "adapters.tools.bake",
    "BaseModel": "base.base_model",
    "Composition": "pictures.composition",
    "Picture": "pictures.picture",
    "Recipe": "pictures.recipe",
    "Region": "pictures.regions",
    "Request": "pictures.serving",
    "Serving": "pictures.serving",
    "Weight": "pictures.weights",
    "preview": "pictures.regions",
    "LoraSpec": "config",
    "TrainingConfig": "config",
    "LoraBoothError": "errors",
    "evaluate": "evaluation.protocol",
    "extract": "adapters.tools.extract",
    "Gallery": "pictures.gallery",
    "Grid": "pictures.grids",
    "before_after": "pictures.grids",
    "grid": "pictures.grids",
    "grid_steps": "pictures.grids",
    "attached": "injection.attached",
    "Photo": "photos.photo",
    "caption_model": "photos.captioning",
    "make_masks": "photos.segmenting",
    "Step": "training.progress",
    "PROMPT_SETS": "pictures.prompts",
    "fill_prompts": "pictures.prompts",
    "read_prompts": "pictures.prompts",
    "write_report": "report.report",
    "Subject": "subject.subject",
    "check_token": "subject.tokens",
    "propose_tokens": "subject.tokens",
    "plan": "planning.planning",
    "prepare": "training.encoding",
    "train": "runs.one",
    "train_many": "runs.many",
    "training_steps": "training.training_run",
}
__all__ = ["__version__", *_HOMES]

if TYPE_CHECKING:
    from .adapters.adapter import Adapter
    from .adapters.contents import Card, LoraFactors
    from .adapters.tools.bake import bake
    from .adapters.tools.extract import extract
    from .adapters.tools.inspection import difference
    from .adapters.tools.merge import merge
    from .adapters.tools.spectrum import resize
    from .base.base_model import BaseModel
    from .config import LoraSpec, TrainingConfig
    from .errors import LoraBoothError
    from .evaluation.protocol import evaluate
    from .injection.attached import attached
    from .photos.captioning import caption_model
    from .photos.photo import Photo
    from .photos.segmenting import make_masks
    from .pictures.composition import Composition
    from .pictures.gallery import Gallery
    from .pictures.grids import Grid, before_after, grid, grid_steps
    from .pictures.picture import Picture
    from .pictures.prompts import PROMPT_SETS, fill_prompts, read_prompts
    from .pictures.recipe import Recipe
    from .pictures.regions import Region, preview
    from .pictures.serving import Request, Serving
    from .pictures.weights import Weight
    from .planning.planning import plan
    from .report.report import write_report
    from .runs.many import train_many
    from .runs.one import train
    from .subject.subject import Subject
    from .subject.tokens import check_token, propose_tokens
    from .training.encoding import prepare
    from .training.progress import Step
    from .training.training_run import training_steps


def __getattr__(name: str) -> object:
    if name not in _HOMES:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(f".{_HOMES[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted(__all__)
