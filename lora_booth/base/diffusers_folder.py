"""Load diffusers folders and Hub ids, with weights that are read later."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..errors import BaseModelError, first_line
from .families import FAMILIES, labels
from .weight_files import LazyWeights, assemble, parts_in_folder

DECLARED = "lora_booth.json"  # in a diffusers folder: facts that the base's author declares


def load_folder(
    source: str | Path, dtype: torch.dtype, device: torch.device, *, revision: str | None = None, variant: str | None = None
) -> tuple[Any, LazyWeights]:
    """The pipeline of a diffusers folder or Hub id (from the cache if possible), and its weights to read later."""
    index = read_config(source, "model_index.json", revision)
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
        raise BaseModelError(f"{source}: cannot be loaded ({first_line(error)}); check that the folder is complete") from error


def declared_rare_tokens(folder: Path) -> tuple[str, ...]:
    """Tokens without meaning to this base, as its folder declares: {"rare_tokens": ["sks"]} in lora_booth.json."""
    path = folder / DECLARED
    if not path.is_file():
        return ()
    try:
        tokens = json.loads(path.read_text(encoding="utf-8"))["rare_tokens"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise BaseModelError(f"{path}: cannot be read ({first_line(error)}); write rare_tokens, a list of words") from error
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise BaseModelError(f"{path}: rare_tokens is {tokens!r}; write a list of words")
    return tuple(tokens)


def read_config(source: str | Path, name: str, revision: str | None = None) -> dict[str, Any]:
    """One JSON file, e.g. unet/config.json, of a diffusers folder or a Hub id (from the cache if possible).

    Raises BaseModelError.
    """
    if isinstance(source, Path):
        path = source / name
        if not path.is_file():
            raise BaseModelError(
                f"{source}: no {name}, so this is not a complete diffusers folder; save one with pipe.save_pretrained(folder)"
            )
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            path = Path(hf_hub_download(source, name, revision=revision))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise BaseModelError(
                f"{source}: not in the local cache, and the Hub cannot be reached; load it once while online"
            ) from error
        except HFValidationError as error:
            raise BaseModelError(f"{source}: not a Hub id ({first_line(error)}), file or folder; check the name") from error
        except HfHubHTTPError as error:
            raise BaseModelError(f"{source}: {first_line(error)}; check the name, or log in with `hf auth login`") from error
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: cannot be read as JSON ({first_line(error)}); download it again") from error
    return config if isinstance(config, dict) else {}
