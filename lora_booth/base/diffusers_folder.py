"""Diffusers folders and Hub ids: which pipeline it is, and its weights to be read later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import BaseModelError, first_line
from .families import FAMILIES, labels
from .weight_files import LazyWeights, assemble, parts_in_folder


def load_folder(
    source: str | Path, dtype: torch.dtype, device: torch.device, *, revision: str | None = None, variant: str | None = None
) -> tuple[Any, LazyWeights]:
    """A diffusers folder, or a Hub id (from the cache when it is there): the pipeline, and what of it is read later."""
    index = read_model_index(source, revision)
    known = {family.pipeline for family in FAMILIES.values()}
    if index.get("_class_name") not in known:
        raise BaseModelError(
            f"{source} is a {index.get('_class_name', 'pipeline of unknown class')}; "
            f"lora_booth trains {labels()} text-to-image models"
        )
    import diffusers

    cls = getattr(diffusers, index["_class_name"])
    given = {} if variant is None else {"variant": variant}
    try:
        folder = source if isinstance(source, Path) else Path(cls.download(source, revision=revision, **given))
        return assemble(cls, folder, parts_in_folder(folder, index, dtype, device, variant), dtype, device, **given)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(f"{source}: cannot be loaded ({first_line(error)}); is the folder complete?") from error


def read_model_index(source: str | Path, revision: str | None) -> dict[str, Any]:
    if isinstance(source, Path):
        path = source / "model_index.json"
        if not path.is_file():
            raise BaseModelError(
                f"{source}: no model_index.json, so not a diffusers folder; save one with pipe.save_pretrained(folder)"
            )
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            path = Path(hf_hub_download(source, "model_index.json", revision=revision))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise BaseModelError(
                f"{source}: not in the local cache, and the Hub cannot be reached; download it once with a network"
            ) from error
        except HFValidationError as error:
            raise BaseModelError(f"{source}: not a Hub id ({first_line(error)}), and no such folder or file") from error
        except HfHubHTTPError as error:
            raise BaseModelError(f"{source}: {first_line(error)}; check the name, or log in with `hf auth login`") from error
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path}: not valid JSON ({error})") from error
    return index if isinstance(index, dict) else {}
