"""Load single `.safetensors` checkpoints with original (A1111) names.

A tokenizer's vocabulary is neither in such a file nor in this package: it comes from the local cache of the Hub (any copy of
the family's repository or of OpenAI's CLIP), from the Hub, or from the folder passed as `config`.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import torch

from ..errors import BaseModelError, setting
from .diffusers_folder import assemble, check_files, empty_module, load_vae, matched, read_index
from .families import FAMILIES, TIMESTEPS, Family, demand, has_vocabulary, labels
from .original_naming import V_PREDICTION, ZERO_SNR, original_weights
from .weight_files import LazyModule, Place, WeightFile

CONFIGS = Path(__file__).parent / "single_file_configs"  # family -> its diffusers folder, without weights and tokenizers

# keys that only this family's checkpoints have
FAMILY_KEYS = {
    "sdxl": "conditioner.embedders.1.model.ln_final.weight",
    "sd2": "cond_stage_model.model.ln_final.weight",
    "sd1": "cond_stage_model.transformer.text_model.final_layer_norm.weight",
}
OPTIONAL = ("safety_checker", "feature_extractor", "image_encoder")  # never in such a file
UNET_KEY = "model.diffusion_model.input_blocks.0.0.weight"
EDM_KEYS = ("edm_mean", "edm_std", "edm_vpred.sigma_max", "edm_vpred.sigma_min")  # comfy/supported_models.py
PREDICTIONS = {  # modelspec.prediction_type, as it is written
    "": None,
    **dict.fromkeys(("epsilon", "eps"), "epsilon"),
    **dict.fromkeys(("v", "v_prediction", "vpred", "v_pred"), "v_prediction"),
}


def load_single_file(
    path: Path,
    dtype: torch.dtype,
    device: torch.device,
    *,
    config: str | Path | None,
    prediction_type: str | None,
    vae: str | Path | None,
) -> tuple[Any, dict[str, LazyModule]]:
    """The pipeline, and its weights to read later. Raises BaseModelError."""
    from diffusers import EulerDiscreteScheduler

    file = WeightFile(path)
    family = family_of(file)
    folder = CONFIGS / family.name if config is None else Path(os.path.expanduser(config))
    index = read_index(folder)
    same = index.get("_class_name") == family.pipeline
    demand(same, f"{path} is {family.label}, and {folder} is not; pass a {setting('config')} of the same family")
    check_files(folder, index)
    given: dict[str, Any] = {name: None for name in OPTIONAL if name in index}
    if vae is not None:
        given["vae"] = load_vae(vae, folder, dtype)
    names = [name for name in ("vae", *family.components) if name not in given]
    modules = {name: empty_module(folder, name, index.get(name), dtype) for name in names}
    for name, module in modules.items():
        remedy = f"pass a {setting('config')} of a text-to-image model"
        demand(module is not None, f"{folder}: has no {name} of {family.label}; {remedy}")
    places = places_in_checkpoint(file, family, modules)
    parts = {name: LazyModule(module, places[name], dtype, device) for name, module in modules.items()}
    if config is None:
        given |= tokenizers(family, parts["text_encoder"].module.config.max_position_embeddings)
    pipeline = assemble(folder, parts, dtype, device, **given)
    wanted = prediction_type or stated_prediction_type(file, family)
    if wanted is None and config is None and len(set(family.modelspec.values())) > 1:  # published with both
        parts["unet"].fill()
        wanted = tried_prediction_type(pipeline.unet)
    if wanted is not None:
        pipeline.scheduler.register_to_config(prediction_type=wanted)
        if config is None and wanted in family.resolution:  # SD 2.x: the epsilon models are for 512 px, the others for 768
            pipeline.unet.register_to_config(sample_size=family.resolution[wanted] // 8)
    if ZERO_SNR in file.places:
        zero = {"rescale_betas_zero_snr": True, "timestep_spacing": "trailing"}  # trailing: starts from pure noise
        pipeline.scheduler = EulerDiscreteScheduler.from_config(pipeline.scheduler.config, **zero)
    return pipeline, parts


def family_of(file: WeightFile) -> Family:
    """Whose checkpoint it is, from the names and shapes of its tensors. Raises BaseModelError."""
    edm = [key for key in file.places if key in EDM_KEYS]
    demand(not edm, f"{file.path}: made for the noise schedule of EDM ({', '.join(edm)}), which the loss does not know")
    unet = file.places.get(UNET_KEY)
    if unet is None:
        adapter = any("lora_" in key for key in file.places)
        demand(not adapter, f"{file.path}: an adapter, not a base model; pass the base that it was made for")
        raise BaseModelError(f"{file.path}: not a checkpoint of {labels()} in the original naming")
    channels = unet.shape[1] if len(unet.shape) == 4 else None
    remedy = "an inpainting or editing model; use the text-to-image one"
    demand(channels == 4, f"{file.path}: its U-Net takes {channels} channels: {remedy}")
    for name, key in FAMILY_KEYS.items():
        if key in file.places:
            return FAMILIES[name]
    raise BaseModelError(f"{file.path}: has a U-Net, but no text encoder of {labels()}; use a complete checkpoint")


def places_in_checkpoint(file: WeightFile, family: Family, modules: Mapping[str, Any]) -> dict[str, dict[str, Place]]:
    """Where the tensors of each module are. Raises BaseModelError if the file does not hold all of them.

    `original_weights` maps a pipeline's tensors to the names in such files. Here it maps pairs of numbers instead, which
    show for each name in the file which tensors it holds, in which order and whether transposed.
    """
    keys = [(name, key) for name, module in modules.items() for key in module.state_dict()]
    marks: dict[str, dict[str, torch.Tensor]] = {name: {} for name in modules}
    for i, (name, key) in enumerate(keys, 1):
        marks[name][key] = torch.tensor([[2 * i, 2 * i + 1]])
    found: dict[str, dict[str, Place]] = {name: {} for name in modules}
    for original, mark in original_weights(SimpleNamespace(**modules), family, marks).items():
        held = [i // 2 for i in mark.flatten().tolist() if i % 2 == 0]
        for part, i in enumerate(held):
            place = file.places.get(original)
            if i and place is not None:  # 0: added by `original_weights` for other readers
                name, key = keys[i - 1]
                place = place.third(part) if len(held) == 3 else place
                found[name][key] = replace(place, transposed=mark.shape == (2, 1))
    for name, places in found.items():
        remedy = f"pass {setting('vae')}, a folder, Hub id or file of one" if name == "vae" else "use a complete checkpoint"
        demand(bool(places), f"{file.path}: has no {name}; {remedy}")
    return {name: matched(modules[name], places, file.path, ones=name == "vae") for name, places in found.items()}


def stated_prediction_type(file: WeightFile, family: Family) -> str | None:
    """The prediction type that a file states, by its keys or in ModelSpec metadata; None in most files.

    Raises BaseModelError for an unknown one.
    """
    if V_PREDICTION in file.places:
        return "v_prediction"
    stated = file.metadata.get("modelspec.prediction_type", "").lower().replace("-", "_")
    demand(stated in PREDICTIONS, f"{file.path}: its prediction type is {stated!r}; allowed: {', '.join(family.modelspec)}")
    architecture = f"{file.metadata.get('modelspec.architecture')}/lora"
    named = [prediction for prediction, name in family.modelspec.items() if name == architecture]
    return PREDICTIONS[stated] or (named[0] if len(named) == 1 else None)


@torch.no_grad()
def tried_prediction_type(unet: Any) -> str:
    """From the U-Net's answer to pure noise, which an epsilon model repeats and a v-prediction model does not."""
    noise = torch.randn(1, unet.config.in_channels, 32, 32, generator=torch.Generator().manual_seed(0))
    text = torch.zeros(1, 77, unet.config.cross_attention_dim)
    answer = unet(noise.to(unet.device, unet.dtype), TIMESTEPS - 1, text.to(unet.device, unet.dtype)).sample
    likeness = torch.cosine_similarity(answer.flatten().float().cpu(), noise.flatten(), dim=0)
    return "epsilon" if likeness > 0.5 else "v_prediction"  # 0.5: chosen; 1 and 0.07 for perfect models


def tokenizers(family: Family, length: int) -> dict[str, Any]:
    """CLIP's tokenizer, once for each text encoder. SD 2.x and SDXL's second pad with "!"."""
    from transformers import CLIPTokenizer

    for repo in ("openai/clip-vit-large-patch14", *family.reference_repos):
        subfolder = "" if repo.startswith("openai/") else "tokenizer"
        found = {}
        try:
            for name in family.tokenizers:
                pad = "!" if name == "tokenizer_2" or family.name == "sd2" else "<|endoftext|>"
                found[name] = CLIPTokenizer.from_pretrained(repo, subfolder=subfolder, pad_token=pad, model_max_length=length)
        except (OSError, ValueError):
            continue
        if all(map(has_vocabulary, found.values())):
            return found
    raise BaseModelError(
        "a single file has no tokenizer, and CLIP's is not in the local cache; run this once while online: "
        "hf download openai/clip-vit-large-patch14 vocab.json merges.txt tokenizer_config.json (or load a diffusers folder of "
        f"{family.label} instead)"
    )
