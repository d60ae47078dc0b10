"""A pipeline as a published checkpoint in the original (LDM, A1111) naming: the weights, and what such files hold besides."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

from lora_booth.base.families import FAMILIES
from lora_booth.base.original_naming import original_weights


def checkpoint(pipeline: Any) -> dict[str, Tensor]:
    """Every weight of the pipeline, and the by-catch that published files have as well."""
    parts = {name: part.state_dict() for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    family = "sdxl" if "text_encoder_2" in parts else "sd2" if pipeline.unet.config.use_linear_projection else "sd1"
    weights = original_weights(pipeline, FAMILIES[family], parts)
    for key in list(weights):
        if key.endswith("text_model.embeddings.token_embedding.weight"):
            ids = torch.arange(pipeline.text_encoder.config.max_position_embeddings)[None]
            weights[key.replace("token_embedding.weight", "position_ids")] = ids
        if key.endswith(".text_projection"):  # OpenCLIP's
            weights[key.replace("text_projection", "logit_scale")] = torch.tensor(4.6)
    steps = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return weights | {"betas": steps, "alphas_cumprod": (1 - steps).cumprod(0)}


def save_checkpoint(pipeline: Any, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in checkpoint(pipeline).items()}, path, dict(metadata or {}))
    return path
