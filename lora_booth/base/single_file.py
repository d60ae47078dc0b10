"""Load single `.safetensors` checkpoints with original (A1111) names.

The published configurations are in `single_file_configs/`. A tokenizer's vocabulary is neither in such a file nor in this
package: it comes from the local cache of the Hub (any copy of the family's repository or of OpenAI's CLIP), from the Hub,
or from the folder passed as `config`.
"""

from __future__ import annotations

import json
import tempfile
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import BaseModelError, first_line
from .diffusers_folder import read_config
from .families import FAMILIES, Family, labels
from .original_naming import original_weights
from .weight_files import LazyModule, LazyWeights, Place, UnreadableError, WeightFile, assemble, empty_module, matched

CONFIGS = Path(__file__).parent / "single_file_configs"

# keys that only this family's checkpoints have
FAMILY_KEYS = {
    "sdxl": "conditioner.embedders.1.model.ln_final.weight",
    "sd2": "cond_stage_model.model.ln_final.weight",
    "sd1": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
}
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # never in such a file
UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"


def load_single_file(
    path: Path, dtype: torch.dtype, device: torch.device, *, config: str | Path | None, prediction_type: str | None
) -> tuple[Any, LazyWeights]:
    """The pipeline, and its weights to read later. Raises BaseModelError."""
    family, metadata = inspect_checkpoint(path)
    import diffusers

    cls = getattr(diffusers, family.pipeline)
    try:
        if config is not None:
            pipeline, weights = assembled(cls, family, path, str(config), dtype, device)
        else:
            with tempfile.TemporaryDirectory() as folder:
                write_config(family, Path(folder))
                pipeline, weights = assembled(cls, family, path, folder, dtype, device, **tokenizers(family))
    except BaseModelError:
        raise
    except (OSError, ValueError, KeyError, RuntimeError, AttributeError) as error:
        raise BaseModelError(f"{path}: cannot be read as {family.label} ({first_line(error)})") from error
    wanted = prediction_type or stated_prediction_type(metadata)
    if wanted is not None:
        pipeline.scheduler.register_to_config(prediction_type=wanted)
        if config is None and wanted in family.resolution:  # SD 2.x: the epsilon models are for 512 px, the others for 768
            pipeline.unet.register_to_config(sample_size=family.resolution[wanted] // 8)
    return pipeline, weights


def assembled(
    cls: Any, family: Family, path: Path, config: str, dtype: torch.dtype, device: torch.device, **given: Any
) -> tuple[Any, LazyWeights]:
    """With weights to read later if every tensor is found in the file; else from the stock loader, which reports what is
    missing."""
    folder = Path(config)
    if (folder / "model_index.json").is_file():
        index = read_config(folder, "model_index.json")
        unread = {name: None for name in OPTIONAL if name in index}
        parts = parts_in_checkpoint(path, family, folder, index, dtype, device)
        if parts and index.get("_class_name") == family.pipeline:
            return assemble(cls, folder, parts, dtype, device, **unread, **given)
    pipeline = cls.from_single_file(str(path), config=config, torch_dtype=dtype, local_files_only=True, **given)
    return pipeline.to(device), LazyWeights()


def parts_in_checkpoint(
    path: Path, family: Family, folder: Path, index: dict[str, Any], dtype: torch.dtype, device: torch.device
) -> dict[str, LazyModule]:
    """The modules to read later; {} if not all of their tensors are in the file under known names.

    `original_weights` maps a pipeline's tensors to the names in such files. Here it maps pairs of numbers instead, which
    show for each name in the file which tensors it holds, in which order and whether transposed.
    """
    names = ("unet", "vae", *("text_encoder", "text_encoder_2")[: family.text_encoders])
    modules = {name: empty_module(folder, name, index.get(name), dtype) for name in names}
    if any(module is None for module in modules.values()):
        return {}
    keys = [(name, key) for name, module in modules.items() for key in module.state_dict()]
    marks: dict[str, dict[str, torch.Tensor]] = {name: {} for name in names}
    for i, (name, key) in enumerate(keys, 1):
        marks[name][key] = torch.tensor([[2 * i, 2 * i + 1]])
    no_scheduler = SimpleNamespace(config={})
    pipeline = SimpleNamespace(unet=modules["unet"], vae=modules["vae"], scheduler=no_scheduler)
    found: dict[str, dict[str, Place]] = {name: {} for name in names}
    try:
        places = WeightFile(path).places
        for original, mark in original_weights(pipeline, family, marks).items():
            held = [i // 2 for i in mark.flatten().tolist() if i % 2 == 0]
            for part, i in enumerate(held):
                if i == 0:  # added by `original_weights` for other readers
                    continue
                name, key = keys[i - 1]
                place = places[original]
                place = place.third(part) if len(held) == 3 else place
                found[name][key] = replace(place, transposed=mark.shape == (2, 1))
    except (UnreadableError, KeyError):
        return {}
    if any(matched(module, found[name], ones=name == "vae") is None for name, module in modules.items()):
        return {}
    return {name: LazyModule(module, found[name], dtype, device) for name, module in modules.items()}


def inspect_checkpoint(path: Path) -> tuple[Family, dict[str, str]]:
    """Family and metadata, from the header alone. Raises BaseModelError."""
    from safetensors import SafetensorError, safe_open

    if path.suffix.lower() in (".ckpt", ".pt", ".pth", ".bin"):
        raise BaseModelError(f"{path}: a pickle, which can run code when read; use the .safetensors file of this model")
    try:
        with safe_open(path, framework="pt") as file:
            keys, metadata = set(file.keys()), dict(file.metadata() or {})
            channels = file.get_slice(UNET_KEY).get_shape()[1] if UNET_KEY in keys else None
    except (SafetensorError, OSError) as error:
        raise BaseModelError(f"{path}: not a safetensors file ({error})") from error
    for name, key in FAMILY_KEYS.items():
        if key in keys and channels is not None:
            if channels != 4:
                raise BaseModelError(
                    f"{path}: its U-Net takes {channels} channels: an inpainting or editing model; use the text-to-image one"
                )
            return FAMILIES[name], metadata
    if any("lora_" in key for key in keys):
        raise BaseModelError(f"{path}: an adapter, not a base model; pass the base that it was made for")
    raise BaseModelError(f"{path}: not a checkpoint of {labels()} in the original naming")


def stated_prediction_type(metadata: dict[str, str]) -> str | None:
    """The prediction type in ModelSpec metadata; None in most files."""
    stated = metadata.get("modelspec.prediction_type", "")
    return {"v": "v_prediction", "v_prediction": "v_prediction", "epsilon": "epsilon"}.get(stated)


def has_vocabulary(tokenizer: Any) -> bool:
    """Whether it has more than special tokens: without its files, transformers 5 makes a tokenizer without words."""
    return tokenizer is not None and len(tokenizer) > len(set(tokenizer.all_special_tokens))


def published_configs(family: str) -> dict[str, Any]:
    """Component -> its configuration; `model_index` -> the pipeline's."""
    parts: dict[str, Any] = json.loads((CONFIGS / f"{family}.json").read_text(encoding="utf-8"))
    return parts


def write_config(family: Family, folder: Path) -> None:
    """Write the family's configuration as a diffusers folder."""
    parts = published_configs(family.name)
    (folder / "model_index.json").write_text(json.dumps(parts.pop("model_index")))
    for name, values in parts.items():
        (folder / name).mkdir()
        file = "scheduler_config.json" if name == "scheduler" else "config.json"
        (folder / name / file).write_text(json.dumps(values))


def tokenizers(family: Family) -> dict[str, Any]:
    """CLIP's tokenizer, once for each text encoder. SD 2.x and SDXL's second pad with "!"."""
    from transformers import CLIPTokenizer

    names = ("tokenizer", "tokenizer_2")[: family.text_encoders]
    for repo in ("openai/clip-vit-large-patch14", *family.reference_repos):
        subfolder = "" if repo.startswith("openai/") else "tokenizer"
        found = {}
        try:
            for name in names:
                pad = "!" if name == "tokenizer_2" or family.name == "sd2" else "<|endoftext|>"
                found[name] = CLIPTokenizer.from_pretrained(repo, subfolder=subfolder, pad_token=pad, model_max_length=77)
        except (OSError, ValueError):
            continue
        if all(map(has_vocabulary, found.values())):
            return found
    raise BaseModelError(
        "a single file has no tokenizer, and CLIP's is not in the local cache; run this once while online: "
        "hf download openai/clip-vit-large-patch14 vocab.json merges.txt tokenizer_config.json (or load a diffusers folder of "
        f"{family.label} instead)"
    )
