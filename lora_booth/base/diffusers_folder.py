"""Load diffusers folders and Hub ids: the configuration now, the weights when they are needed."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn

from ..errors import BaseModelError, first_line
from .families import FAMILIES, labels
from .library_logging import without_bars
from .weight_files import LazyModule, LazyWeights, Place, WeightFile

DECLARED = "lora_booth.json"  # in a diffusers folder: facts that the base's author declares
MODULES = {  # component -> the library and class that are read here; the stock loader reads all others
    "unet": ("diffusers", "UNet2DConditionModel"),
    "vae": ("diffusers", "AutoencoderKL"),
    "text_encoder": ("transformers", "CLIPTextModel"),
    "text_encoder_2": ("transformers", "CLIPTextModelWithProjection"),
    "safety_checker": ("diffusers.pipelines.stable_diffusion.safety_checker", "StableDiffusionSafetyChecker"),
}
# a component's weights in one file, or the index of its shards, of diffusers or transformers; perhaps of a variant
WEIGHTS = re.compile(r"(?:diffusion_pytorch_)?model(?:\.(\w+))?\.safetensors")
SHARDS = re.compile(r"(?:diffusion_pytorch_)?model\.safetensors(?:\.(\w+))?\.index(?:\.(\w+))?\.json")
OTHER_NAMES = (  # current name -> name in files of other releases of diffusers or transformers
    ("", "text_model."),
    ("text_model.", ""),
    ("vision_model.", "vision_model.vision_model."),
    ("to_q.", "query."),
    ("to_k.", "key."),
    ("to_v.", "value."),
    ("to_out.0.", "proj_attn."),
)


def load_folder(
    source: str | Path, dtype: torch.dtype, device: torch.device, *, revision: str | None = None, variant: str | None = None
) -> tuple[Any, LazyWeights]:
    """The pipeline of a diffusers folder or Hub id (from the cache if possible), and its weights to read later."""
    index = read_config(source, "model_index.json", revision)
    if index.get("_class_name") not in {family.pipeline for family in FAMILIES.values()}:
        raise BaseModelError(
            f"{source} is a {index.get('_class_name', 'pipeline of unknown class')}; "
            f"lora_booth trains {labels()} text-to-image models"
        )
    from diffusers import DiffusionPipeline

    given = {} if variant is None else {"variant": variant}
    folder = source if isinstance(source, Path) else Path(DiffusionPipeline.download(source, revision=revision, **given))
    parts = {}
    for component, entry in index.items():
        module = empty_module(folder, component, entry, dtype)
        places = places_in_folder(folder / component, variant) if module is not None else {}
        if places:
            parts[component] = LazyModule(module, matched(module, places, folder / component), dtype, device)
    return assemble(folder, parts, dtype, device, **given)


def assemble(
    folder: Path, parts: Mapping[str, LazyModule], dtype: torch.dtype, device: torch.device, **given: Any
) -> tuple[Any, LazyWeights]:
    """The stock pipeline of a folder: `parts` are read later, the rest by the stock loader, with the arguments `given`."""
    from diffusers import DiffusionPipeline

    modules = {component: part.module for component, part in parts.items()}
    with without_bars():
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **modules, **given)
    for component, module in pipeline.components.items():
        if isinstance(module, nn.Module) and component not in parts:
            module.to(device)
    return pipeline, LazyWeights(parts)


def empty_module(folder: Path, component: str, entry: Any, dtype: torch.dtype) -> Any:
    """The module without weights, from its configuration; None if the stock loader must load it.

    entry: [library, class], as in model_index.json
    """
    library, name = MODULES.get(component, ("", ""))
    if not name or not isinstance(entry, list) or entry[1:] != [name]:
        return None
    from accelerate import init_empty_weights

    cls = getattr(import_module(library), name)
    with init_empty_weights(include_buffers=False):
        if hasattr(cls, "load_config"):
            module = cls.from_config(cls.load_config(folder / component, local_files_only=True))
        else:
            config = cls.config_class.from_pretrained(folder / component, local_files_only=True)
            config.dtype = dtype
            module = cls(config)
    return nn.Module.to(module, dtype).eval()


def places_in_folder(folder: Path, variant: str | None) -> dict[str, Place]:
    """The tensors in a component's safetensors files; {} if it has none of this variant. Raises BaseModelError."""
    names = sorted(path.name for path in folder.glob("*"))
    for name in names:
        match = WEIGHTS.fullmatch(name)
        if match and match[1] == variant:
            return WeightFile(folder / name).places
    for name in names:
        match = SHARDS.fullmatch(name)
        if match and (match[1] or match[2]) == variant:
            shards = sorted(set(read_config(folder, name)["weight_map"].values()))
            return {key: place for shard in shards for key, place in WeightFile(folder / shard).places.items()}
    return {}


def matched(module: nn.Module, places: Mapping[str, Place], where: Path, *, ones: bool = False) -> dict[str, Place]:
    """A place for every tensor of the module. Raises BaseModelError if one is missing or has another shape.

    ones: a linear layer may be a 1x1 convolution in the file, with the same values
    """
    found = {}
    for key, value in module.state_dict().items():
        names = [key]
        for new, old in OTHER_NAMES:
            names += [old + key.removeprefix(new)] if key.startswith(new) else []
            names += [key.replace(f".{new}", f".{old}")] if new and f".{new}" in key else []
        place = next((places[name] for name in names if name in places), None)
        if place is None:
            raise BaseModelError(f"{where}: not complete, {key} is missing; download it again")
        given, wanted = place.shape, tuple(value.shape)
        if given != wanted and not (ones and squeezed(given) == squeezed(wanted)):
            raise BaseModelError(f"{where}: {key} is {given} in the file and {wanted} by its configuration")
        found[key] = place
    return found


def squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)


def declared_rare_tokens(folder: Path) -> tuple[str, ...]:
    """Tokens without meaning to this base, as its folder declares: {"rare_tokens": ["ohwx"]} in lora_booth.json."""
    if not (folder / DECLARED).is_file():
        return ()
    tokens = read_config(folder, DECLARED).get("rare_tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise BaseModelError(f"{folder / DECLARED}: rare_tokens is {tokens!r}; write a list of words")
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
        from huggingface_hub.errors import HfHubHTTPError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            path = Path(hf_hub_download(source, name, revision=revision))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise BaseModelError(
                f"{source}: not in the local cache, and the Hub cannot be reached; load it once while online"
            ) from error
        except HfHubHTTPError as error:
            raise BaseModelError(f"{source}: {first_line(error)}; check the name, or log in with `hf auth login`") from error
    try:
        config = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: cannot be read as JSON ({first_line(error)}); write or download it again") from error
    return config if isinstance(config, dict) else {}
