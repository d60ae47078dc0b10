"""Baking adapters into a base: a checkpoint for programs that read nothing else."""

from __future__ import annotations

import copy
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ...base.base_model import BaseModel
from ...base.families import Family, recognise
from ...base.library_logging import without_bars
from ...base.original_naming import original_weights, schedule_marks
from ...base.quantization import refuse_quantized
from ...base.single_file import CONFIGS
from ...config import typed
from ...errors import BaseModelError, SettingsError
from ...files import replacing
from ...injection.attached import placements
from ..adapter import Adapter, weighted
from ..contents import Dtype
from ..metadata import SGM_IMPLEMENTATION, base_entries
from ..reading import PICKLE_SUFFIXES
from ..writing import DTYPES

LATENT_CHANNELS = 4  # of every VAE in them
CHANNELS = (4, 8, 9)  # that U-Nets in single files take: of models for text to image, editing (InstructPix2Pix) and inpainting
PRIVATE = ("_name_or_path", "name_or_path")  # where a configuration was loaded from, which is often somebody's folder


def bake(base: BaseModel | Any, adapters: Sequence[tuple[Adapter, float]], out: str | Path, *, dtype: Dtype = "fp16") -> Path:
    """Write `base` with the weighted sum of `adapters` in its weights. `base` itself is not changed.

    base   a BaseModel or any compatible diffusers pipeline, best loaded in fp32 so that its rounding is not added
    out    ending with .safetensors: one file in the original naming, for A1111, ComfyUI and others;
           otherwise a new diffusers folder. Either is written completely or not at all
    dtype  of the written weights; sums are computed in float32
    Raises AdapterBaseMismatch if an adapter was made for another base.
    """
    path, adapters, dtype = typed("out", out, Path), weighted(adapters), typed("dtype", dtype, Dtype)
    single = path.suffix.lower() == ".safetensors"
    if path.suffix.lower() in PICKLE_SUFFIXES:
        raise SettingsError(f"{path}: a pickle's name; end it with .safetensors, or pass the name of a folder")
    if path.is_dir() and (single or any(path.iterdir())) or (path.exists() and not single and not path.is_dir()):
        raise SettingsError(f"{path}: already exists; pass the name of a new folder or of a .safetensors file")
    base = BaseModel.of(base, name="this pipeline")
    if single:
        check_single_file(base)
    pipeline = baked(base, adapters, dtype=DTYPES[dtype])
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path) as temporary:
        if single:
            title = " + ".join([base.name, *(f"{adapter.name} {weight:g}" for adapter, weight in adapters)])
            save_single_file(pipeline, temporary, title=title)
        else:
            save_folder(pipeline, temporary)
    return path


def check_single_file(base: BaseModel) -> None:
    """Raise BaseModelError for what no program reads from a single file, or what it cannot say. A folder holds all of it."""
    parts, family, channels = base.shell.components, base.family, base.unet.config.in_channels
    lacking = [name for name in ("vae", "scheduler", *family.text_encoders) if parts.get(name) is None]
    reasons = {f"a pipeline without {' and '.join(lacking)}": bool(lacking)}
    if not lacking:
        schedule, vae = parts["scheduler"].config, parts["vae"].config
        reasons = {
            f"a U-Net that takes {channels} channels": channels not in CHANNELS,
            f"prediction type {schedule.get('prediction_type')!r}": schedule.get("prediction_type") not in family.modelspec,
            f"the noise schedule of its {type(parts['scheduler']).__name__}": not is_usual(schedule, family),
            f"latents of {vae.get('latent_channels')} channels": vae.get("latent_channels") != LATENT_CHANNELS,
            "a VAE with latents_mean": vae.get("latents_mean") is not None,
        }
    for reason, found in reasons.items():
        if found:
            raise BaseModelError(f"{base.name}: no single file holds {reason}; bake a folder (a name without .safetensors)")


def is_usual(schedule: Mapping[str, Any], family: Family) -> bool:
    """Whether it is the noise schedule that readers of the file assume; the file can only add zero terminal SNR to it."""
    from diffusers import DDPMScheduler

    usual = DDPMScheduler.load_config(CONFIGS / family.name / "scheduler")
    keys = ("num_train_timesteps", "beta_start", "beta_end", "beta_schedule", "trained_betas")
    odd = ("use_flow_sigmas", "sigma_data")  # of flow matching and EDM
    return all(schedule.get(key) == usual.get(key) for key in keys) and not any(schedule.get(key) for key in odd)


@torch.no_grad()
def baked(base: BaseModel, adapters: Sequence[tuple[Adapter, float]], *, dtype: torch.dtype) -> Any:
    """A copy of the pipeline on the CPU, in `dtype`, with the weighted sum of `adapters` in its weights."""
    pipeline = base.pipeline
    refuse_quantized(pipeline.unet, base.name, "baking")
    changes: dict[int, Tensor] = {}  # id of a weight -> what is added to it
    for _, weight, places in placements(base, adapters):
        for layer, factors in places.values():
            change, key = factors.delta().cpu() * weight, id(layer.weight)
            changes[key] = changes[key] + change if key in changes else change
    result = copy.copy(pipeline)
    for name, module in pipeline.components.items():
        if isinstance(module, nn.Module):
            setattr(result, name, changed(module, name, changes, dtype))
    return result


def changed(module: nn.Module, name: str, changes: Mapping[int, Tensor], dtype: torch.dtype) -> nn.Module:
    """A copy of a module with `changes` added to its weights. No weight is held twice in the old precision."""
    memo: dict[int, Any] = {}
    tensors = [*module.named_parameters(), *module.named_buffers()]
    if any(".lora_" in key for key, _ in tensors):
        raise BaseModelError(f"its {name} already has adapters; call unload_lora_weights() on the pipeline first")
    for key, tensor in tensors:
        value = tensor.detach().cpu()
        if value.is_floating_point():
            value = (value.float() + changes[id(tensor)] if id(tensor) in changes else value).to(dtype)
            if not value.isfinite().all():
                raise BaseModelError(f"{name}.{key} is not finite as {str(dtype).removeprefix('torch.')}; try dtype fp32")
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
    return copy.deepcopy(module, memo)  # takes what is in the memo for a copy of the tensor


def save_folder(pipeline: Any, folder: Path) -> None:
    """As diffusers does, but without the path that the pipeline was loaded from."""
    with without_bars():
        pipeline.save_pretrained(folder, safe_serialization=True)
    for file in folder.rglob("*.json"):
        values = json.loads(file.read_text(encoding="utf-8"))
        if isinstance(values, dict) and any(key in values for key in PRIVATE):
            values = {key: value for key, value in values.items() if key not in PRIVATE}
            file.write_text(json.dumps(values, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_single_file(pipeline: Any, path: Path, *, title: str) -> None:
    """One safetensors file in the original naming; its header says family and prediction type (ModelSpec)."""
    from safetensors.torch import save_file

    family = recognise(pipeline)
    modules = {name: module.state_dict() for name, module in pipeline.components.items() if isinstance(module, nn.Module)}
    weights = original_weights(pipeline, family, modules) | schedule_marks(pipeline.scheduler)
    tensors = {key: value.contiguous() for key, value in sorted(weights.items())}
    entries = base_entries(family, pipeline.scheduler.config.prediction_type)
    metadata = {
        **entries,
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": entries["modelspec.architecture"].removesuffix("/lora"),
        "modelspec.implementation": SGM_IMPLEMENTATION,
        "modelspec.title": title,
    }
    save_file(tensors, path, metadata)
