"""A diffusers pipeline's weights under the names of the original (LDM, A1111) checkpoints: the inverse of the stock loader."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import save_file
from torch import Tensor

Weights = dict[str, Tensor]


def checkpoint(pipeline: Any) -> Weights:
    """Every weight of the pipeline, and the by-catch that published files have as well."""
    weights = prefixed("model.diffusion_model.", unet_weights(pipeline.unet))
    weights |= prefixed("first_stage_model.", vae_weights(pipeline.vae))
    if getattr(pipeline, "text_encoder_2", None) is not None:
        weights |= prefixed("conditioner.embedders.0.transformer.", clip_weights(pipeline.text_encoder))
        weights |= prefixed("conditioner.embedders.1.model.", open_clip_weights(pipeline.text_encoder_2))
    elif pipeline.unet.config.use_linear_projection:
        weights |= prefixed("cond_stage_model.model.", open_clip_weights(pipeline.text_encoder))
    else:
        weights |= prefixed("cond_stage_model.transformer.", clip_weights(pipeline.text_encoder))
    steps = torch.linspace(0.00085**0.5, 0.012**0.5, 1000) ** 2
    return weights | {"betas": steps, "alphas_cumprod": (1 - steps).cumprod(0)}


def save_checkpoint(pipeline: Any, path: Path, metadata: Mapping[str, str] | None = None) -> Path:
    save_file({key: value.contiguous() for key, value in checkpoint(pipeline).items()}, path, dict(metadata or {}))
    return path


def prefixed(prefix: str, weights: Weights) -> Weights:
    return {prefix + key: value for key, value in weights.items()}


def renamed(weights: Mapping[str, Tensor], rules: list[tuple[str, str]]) -> Weights:
    """Each rule is tried on each key, in order."""
    result = {}
    for key, value in weights.items():
        for pattern, replacement in rules:
            key = re.sub(pattern, replacement, key)
        result[key] = value
    return result


def unet_weights(unet: Any) -> Weights:
    depth = unet.config.layers_per_block + 1  # of one resolution: its layers and the way to the next resolution
    rules = [(r"^time_embedding\.linear_1", "time_embed.0"), (r"^time_embedding\.linear_2", "time_embed.2")]
    rules += [(r"^add_embedding\.linear_1", "label_emb.0.0"), (r"^add_embedding\.linear_2", "label_emb.0.2")]
    rules += [(r"^conv_in\.", "input_blocks.0.0."), (r"^conv_norm_out\.", "out.0."), (r"^conv_out\.", "out.2.")]
    rules += [(r"^mid_block\.resnets\.0", "middle_block.0"), (r"^mid_block\.attentions\.0", "middle_block.1")]
    rules += [(r"^mid_block\.resnets\.1", "middle_block.2")]
    for i in range(len(unet.down_blocks)):
        first = 1 + i * depth
        for j in range(depth - 1):
            rules.append((rf"^down_blocks\.{i}\.resnets\.{j}\.", f"input_blocks.{first + j}.0."))
            rules.append((rf"^down_blocks\.{i}\.attentions\.{j}\.", f"input_blocks.{first + j}.1."))
        rules.append((rf"^down_blocks\.{i}\.downsamplers\.0\.conv\.", f"input_blocks.{first + depth - 1}.0.op."))
    for i, block in enumerate(unet.up_blocks):
        for j in range(depth):
            rules.append((rf"^up_blocks\.{i}\.resnets\.{j}\.", f"output_blocks.{i * depth + j}.0."))
            rules.append((rf"^up_blocks\.{i}\.attentions\.{j}\.", f"output_blocks.{i * depth + j}.1."))
        place = 2 if hasattr(block, "attentions") else 1
        rules.append((rf"^up_blocks\.{i}\.upsamplers\.0\.conv\.", f"output_blocks.{i * depth + depth - 1}.{place}.conv."))
    block = r"^((?:input|output)_blocks\.\d+\.0|middle_block\.[02])\."
    names = {"norm1": "in_layers.0", "conv1": "in_layers.2", "time_emb_proj": "emb_layers.1"}
    names |= {"norm2": "out_layers.0", "conv2": "out_layers.3", "conv_shortcut": "skip_connection"}
    rules += [(rf"{block}{name}\.", rf"\1.{old}.") for name, old in names.items()]
    return renamed(unet.state_dict(), rules)


def vae_weights(vae: Any) -> Weights:
    last = len(vae.config.up_block_types) - 1
    rules = [(r"^encoder\.down_blocks\.(\d+)\.resnets\.", r"encoder.down.\1.block.")]
    rules += [(r"^encoder\.down_blocks\.(\d+)\.downsamplers\.0\.", r"encoder.down.\1.downsample.")]
    for i in range(last + 1):
        rules.append((rf"^decoder\.up_blocks\.{i}\.resnets\.", f"decoder.up.{last - i}.block."))
        rules.append((rf"^decoder\.up_blocks\.{i}\.upsamplers\.0\.", f"decoder.up.{last - i}.upsample."))
    rules += [(r"mid_block\.resnets\.0\.", "mid.block_1."), (r"mid_block\.resnets\.1\.", "mid.block_2.")]
    rules += [(r"mid_block\.attentions\.0\.", "mid.attn_1."), (r"conv_shortcut", "nin_shortcut")]
    rules += [(r"conv_norm_out", "norm_out"), (r"attn_1\.group_norm", "attn_1.norm")]
    rules += [(r"attn_1\.to_([qkv])\.", r"attn_1.\1."), (r"attn_1\.to_out\.0\.", "attn_1.proj_out.")]
    weights = renamed(vae.state_dict(), rules)
    convolution = re.compile(r"attn_1\.(q|k|v|proj_out)\.weight$")  # linear layers were 1x1 convolutions
    return {key: value[:, :, None, None] if convolution.search(key) else value for key, value in weights.items()}


def clip_weights(encoder: Any) -> Weights:
    """transformers' names before release 5, and the ids that were once saved with them."""
    weights = renamed(encoder.state_dict(), [(r"^(?!text_model\.|text_projection)", "text_model.")])
    tokens = encoder.config.max_position_embeddings
    return weights | {"text_model.embeddings.position_ids": torch.arange(tokens)[None]}


def open_clip_weights(encoder: Any) -> Weights:
    """OpenCLIP's names: one input projection for query, key and value, and a projection the other way round."""
    rules = [(r"^text_model\.", ""), (r"^encoder\.layers\.", "transformer.resblocks."), (r"layer_norm([12])", r"ln_\1")]
    rules += [(r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"), (r"self_attn\.out_proj", "attn.out_proj")]
    rules += [(r"^final_layer_norm", "ln_final"), (r"^embeddings\.token_embedding", "token_embedding")]
    rules += [(r"^embeddings\.position_embedding\.weight", "positional_embedding")]
    weights = renamed(encoder.state_dict(), rules)
    for i in range(encoder.config.num_hidden_layers):
        block = f"transformer.resblocks.{i}."
        for kind in ("weight", "bias"):
            parts = [weights.pop(f"{block}self_attn.{part}_proj.{kind}") for part in "qkv"]
            weights[f"{block}attn.in_proj_{kind}"] = torch.cat(parts)
    width = encoder.config.hidden_size
    projection = weights.pop("text_projection.weight", torch.eye(width))
    return weights | {"text_projection": projection.T, "logit_scale": torch.tensor(4.6)}
