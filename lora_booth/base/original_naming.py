"""Rename a pipeline's weights as in original (LDM, A1111) checkpoints: the inverse of the stock single-file loader.

The names are those of CompVis/latent-diffusion (`ldm/modules/diffusionmodules`), Stability-AI/generative-models for SDXL
and mlfoundations/open_clip for the text encoders from there.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor

from .families import Family

Weights = dict[str, Tensor]
Renames = Iterable[tuple[str, str]]  # the beginning of a name -> its replacement

# how checkpoints say what their models predict; ComfyUI looks for these names (comfy/supported_models.py)
V_PREDICTION, ZERO_SNR = "v_pred", "ztsnr"
OUTSIDE = {  # the U-Net's modules outside of its blocks
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
    "conv_in": "input_blocks.0.0",
    "conv_norm_out": "out.0",
    "conv_out": "out.2",
}
MIDDLE = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
RESNET = {
    "norm1": "in_layers.0",
    "conv1": "in_layers.2",
    "time_emb_proj": "emb_layers.1",
    "norm2": "out_layers.0",
    "conv2": "out_layers.3",
    "conv_shortcut": "skip_connection",
}
VAE_MIDDLE = (
    ("mid_block.resnets.0.", "mid.block_1."),
    ("mid_block.resnets.1.", "mid.block_2."),
    ("mid_block.attentions.0.group_norm.", "mid.attn_1.norm."),
    ("mid_block.attentions.0.to_q.", "mid.attn_1.q."),
    ("mid_block.attentions.0.to_k.", "mid.attn_1.k."),
    ("mid_block.attentions.0.to_v.", "mid.attn_1.v."),
    ("mid_block.attentions.0.to_out.0.", "mid.attn_1.proj_out."),
    ("conv_norm_out.", "norm_out."),
)
OPEN_CLIP = (
    ("encoder.layers.", "transformer.resblocks."),
    ("final_layer_norm.", "ln_final."),
    ("embeddings.token_embedding.", "token_embedding."),
    ("embeddings.position_embedding.weight", "positional_embedding"),
)
OPEN_CLIP_LAYER = (
    (".layer_norm1.", ".ln_1."),
    (".layer_norm2.", ".ln_2."),
    (".mlp.fc1.", ".mlp.c_fc."),
    (".mlp.fc2.", ".mlp.c_proj."),
    (".self_attn.out_proj.", ".attn.out_proj."),
)


def original_weights(pipeline: Any, family: Family, weights: Mapping[str, Mapping[str, Tensor]]) -> Weights:
    """weights: component -> its state dict, with diffusers' and transformers' names. The pipeline has the configuration."""
    named: Weights = {}
    for component, (prefix, renamed) in {**IMAGES, **TEXT[family.name]}.items():
        if component in weights:
            config = getattr(pipeline, component).config
            named |= {prefix + key: value for key, value in renamed(weights[component], config).items()}
    return named


def schedule_marks(scheduler: Any) -> Weights:
    """Empty tensors that say by their names what a model predicts."""
    config = scheduler.config
    marks = {
        V_PREDICTION: config.get("prediction_type") == "v_prediction",
        ZERO_SNR: bool(config.get("rescale_betas_zero_snr")),
    }
    return {name: torch.empty(0) for name, meant in marks.items() if meant}


def unet_weights(weights: Mapping[str, Tensor], config: Any) -> Weights:
    attended = {i for i, kind in enumerate(config.up_block_types) if "CrossAttn" in kind}
    names = UNetNames(config.layers_per_block, len(config.down_block_types), attended)
    named = {}
    for key, value in weights.items():
        module, _, kind = key.rpartition(".")
        named[f"{names.original(module) or module}.{kind}"] = value
    return named


class UNetNames:
    """The original names of a U-Net's modules, numbered over all resolutions, each with its layers and its sampler.

    layers    resnets in a block on the way down
    count     resolutions
    attended  indices of those with attention on the way up
    """

    def __init__(self, layers: int, count: int, attended: Collection[int]) -> None:
        step = layers + 1
        self.blocks = dict(MIDDLE)  # path -> original name
        self.modules = dict(OUTSIDE)
        for i in range(count):
            for inner, kind in enumerate(("resnets", "attentions")):
                for j in range(layers):
                    self.blocks[f"down_blocks.{i}.{kind}.{j}"] = f"input_blocks.{1 + i * step + j}.{inner}"
                for j in range(step):
                    self.blocks[f"up_blocks.{i}.{kind}.{j}"] = f"output_blocks.{i * step + j}.{inner}"
        for i in range(count - 1):  # the last has no sampler
            self.modules[f"down_blocks.{i}.downsamplers.0.conv"] = f"input_blocks.{(i + 1) * step}.0.op"
            after = 2 if i in attended else 1  # the resnet, and the attention if there is one
            self.modules[f"up_blocks.{i}.upsamplers.0.conv"] = f"output_blocks.{(i + 1) * step - 1}.{after}.conv"

    def original(self, path: str) -> str | None:
        """The name of the module at `path` (below the U-Net); None if this U-Net has no such module."""
        if path in self.modules:
            return self.modules[path]
        parts = path.split(".")
        size = 3 if parts[0] == "mid_block" else 4
        block, inner = self.blocks.get(".".join(parts[:size])), ".".join(parts[size:])
        return None if block is None else f"{block}.{RESNET.get(inner, inner)}"


def vae_weights(weights: Mapping[str, Tensor], config: Any) -> Weights:
    """The decoder's blocks are counted from the picture, and linear layers become 1x1 convolutions."""
    last = len(config.up_block_types) - 1
    renames: list[tuple[str, str]] = []
    for i in range(last + 1):
        for j in range(config.layers_per_block + 1):  # one less in the encoder
            renames.append((f"encoder.down_blocks.{i}.resnets.{j}.", f"encoder.down.{i}.block.{j}."))
            renames.append((f"decoder.up_blocks.{i}.resnets.{j}.", f"decoder.up.{last - i}.block.{j}."))
        renames.append((f"encoder.down_blocks.{i}.downsamplers.0.", f"encoder.down.{i}.downsample."))
        renames.append((f"decoder.up_blocks.{i}.upsamplers.0.", f"decoder.up.{last - i}.upsample."))
    for half in ("encoder.", "decoder."):
        renames += [(half + old, half + new) for old, new in VAE_MIDDLE]
    named = {}
    for key, value in weights.items():
        linear = ".attentions." in key and key.endswith(".weight") and value.ndim == 2
        name = _with_prefix(key, renames).replace(".conv_shortcut.", ".nin_shortcut.")
        named[name] = value[:, :, None, None] if linear else value
    return named


def clip_weights(weights: Mapping[str, Tensor], _: Any) -> Weights:
    """transformers' names before release 5, with one more level."""
    named = {}
    for key, value in weights.items():
        named[key if key.startswith(("text_model.", "text_projection.")) else f"text_model.{key}"] = value
    return named


def open_clip_weights(weights: Mapping[str, Tensor], _: Any) -> Weights:
    """One input projection for query, key and value, and a transposed final projection."""
    named: Weights = {}
    joint: dict[str, dict[str, Tensor]] = {}
    for key, value in weights.items():
        key = _with_prefix(key.removeprefix("text_model."), OPEN_CLIP)
        layer, part, rest = key.partition(".self_attn.")
        if part and rest[:7] in ("q_proj.", "k_proj.", "v_proj."):
            joint.setdefault(f"{layer}.attn.in_proj_{rest[7:]}", {})[rest[0]] = value
        elif key == "text_projection.weight":
            named["text_projection"] = value.T
        else:
            for old, new in OPEN_CLIP_LAYER:
                key = key.replace(old, new)
            named[key] = value
    named |= {key: torch.cat([parts[letter] for letter in "qkv"]) for key, parts in joint.items()}
    if "text_projection" not in named:  # readers take the width from it; SD 2.x does not use it
        embedding = named["token_embedding.weight"]
        named["text_projection"] = torch.eye(embedding.shape[1], dtype=embedding.dtype, device=embedding.device)
    return named


Renaming = tuple[str, Callable[[Mapping[str, Tensor], Any], Weights]]  # prefix, (state dict, configuration) -> renamed
IMAGES: dict[str, Renaming] = {
    "unet": ("model.diffusion_model.", unet_weights),
    "vae": ("first_stage_model.", vae_weights),
}
TEXT: dict[str, dict[str, Renaming]] = {
    "sd1": {"text_encoder": ("cond_stage_model.transformer.", clip_weights)},
    "sd2": {"text_encoder": ("cond_stage_model.model.", open_clip_weights)},
    "sdxl": {
        "text_encoder": ("conditioner.embedders.0.transformer.", clip_weights),
        "text_encoder_2": ("conditioner.embedders.1.model.", open_clip_weights),
    },
}


def _with_prefix(key: str, renames: Renames) -> str:
    """`key` with a renamed beginning; at most one rename applies."""
    return next((new + key.removeprefix(old) for old, new in renames if key.startswith(old)), key)
