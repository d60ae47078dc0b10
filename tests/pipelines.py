"""Tiny stock pipelines of every family, with random weights: what the tests train, save and load for real."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from diffusers import (
    AutoencoderKL,
    DDIMScheduler,
    EulerDiscreteScheduler,
    PNDMScheduler,
    StableDiffusionPipeline,
    StableDiffusionXLPipeline,
    UNet2DConditionModel,
)
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection, CLIPTokenizer

from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import Card, LoraFactors, card_facts
from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec
from lora_booth.injection.paths import module_path, target_paths

SCHEDULE: dict[str, Any] = {"beta_start": 0.00085, "beta_end": 0.012, "beta_schedule": "scaled_linear", "steps_offset": 1}
KINDS = ("sd1", "sd2", "sd2-v", "sd2-zsnr", "sdxl")


def tokenizer(pad_token: str = "<|endoftext|>") -> CLIPTokenizer:
    """Single letters, and the word pieces of the tests' prompts."""
    letters = "abcdefghijklmnopqrstuvwxyz!,."
    vocabulary = [*letters, *(letter + "</w>" for letter in letters), "do", "dog</w>", "sk", "sks</w>"]
    vocabulary += ["<|startoftext|>", "<|endoftext|>"]
    merges = [("d", "o"), ("do", "g</w>"), ("s", "k"), ("sk", "s</w>")]
    ids = {piece: i for i, piece in enumerate(vocabulary)}
    return CLIPTokenizer(vocab=ids, merges=merges, model_max_length=16, pad_token=pad_token)


def text_config(words: CLIPTokenizer, width: int, act: str) -> CLIPTextConfig:
    return CLIPTextConfig(
        vocab_size=len(words),
        hidden_size=width,
        intermediate_size=2 * width,
        num_hidden_layers=2,
        num_attention_heads=2,
        max_position_embeddings=16,
        projection_dim=width,
        hidden_act=act,
        bos_token_id=words.bos_token_id,
        eos_token_id=words.eos_token_id,
        pad_token_id=words.pad_token_id,
    )


def vae() -> AutoencoderKL:
    return AutoencoderKL(
        down_block_types=("DownEncoderBlock2D",) * 4,
        up_block_types=("UpDecoderBlock2D",) * 4,
        block_out_channels=(8, 8, 16, 16),
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=4,
        sample_size=64,
    )


def unet(kind: str, width: int) -> UNet2DConditionModel:
    common: dict[str, Any] = {"sample_size": 8, "cross_attention_dim": width, "norm_num_groups": 8, "layers_per_block": 1}
    if kind == "sdxl":
        return UNet2DConditionModel(
            **common | {"layers_per_block": 2},
            block_out_channels=(16, 32, 32),
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            attention_head_dim=(1, 2, 2),
            transformer_layers_per_block=(1, 1, 2),
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=8 * 6 + 24,
        )
    return UNet2DConditionModel(
        **common,
        block_out_channels=(16, 32),
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=2 if kind == "sd1" else (1, 2),
        use_linear_projection=kind != "sd1",
    )


def make_pipeline(kind: str) -> Any:
    """A fresh pipeline of `kind`, the same weights each time, 64 x 64 pixels."""
    torch.manual_seed(7)
    words = tokenizer()
    if kind == "sdxl":
        other = tokenizer("!")
        return StableDiffusionXLPipeline(
            vae=vae().eval(),
            text_encoder=CLIPTextModel(text_config(words, 16, "quick_gelu")).eval(),
            text_encoder_2=CLIPTextModelWithProjection(text_config(other, 24, "gelu")).eval(),
            tokenizer=words,
            tokenizer_2=other,
            unet=unet(kind, 40).eval(),
            scheduler=EulerDiscreteScheduler(**SCHEDULE, timestep_spacing="leading"),
            add_watermarker=False,
        )
    scheduler: Any = PNDMScheduler(**SCHEDULE, skip_prk_steps=True)
    if kind != "sd1":
        prediction = "epsilon" if kind == "sd2" else "v_prediction"
        zero = kind == "sd2-zsnr"
        spacing = "trailing" if zero else "leading"
        scheduler = DDIMScheduler(
            **SCHEDULE, prediction_type=prediction, clip_sample=False, rescale_betas_zero_snr=zero, timestep_spacing=spacing
        )
    words = words if kind == "sd1" else tokenizer("!")
    return StableDiffusionPipeline(
        vae=vae().eval(),
        text_encoder=CLIPTextModel(text_config(words, 16, "quick_gelu" if kind == "sd1" else "gelu")).eval(),
        tokenizer=words,
        unet=unet(kind, 16).eval(),
        scheduler=scheduler,
        safety_checker=None,
        feature_extractor=None,
        requires_safety_checker=False,
    )


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    return BaseModel.from_pipeline(make_pipeline(kind).to(dtype), name="tiny")


def state(pipeline: Any) -> dict[str, torch.Tensor]:
    """A copy of every weight of every module."""
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, torch.nn.Module)}
    return {f"{name}.{key}": value.clone() for name, module in modules.items() for key, value in module.state_dict().items()}


def same_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


def random_adapter(base: BaseModel, lora: LoraSpec | None = None, *, seed: int = 0, size: float = 0.3) -> Adapter:
    """An adapter for `base` whose change can be seen."""
    generator = torch.Generator().manual_seed(seed)
    lora = lora or LoraSpec(rank=4)
    modules = {}
    for component, paths in target_paths(base, lora).items():
        for path in paths:
            layer = base.components[component].get_submodule(path)
            outer, *inner = layer.weight.shape
            down = torch.randn(lora.rank, *inner, generator=generator) / layer.weight[0].numel() ** 0.5
            up = torch.randn(outer, lora.rank, *(1 for _ in inner[1:]), generator=generator) * size
            modules[module_path(component, path)] = LoraFactors(down, up, lora.scale_alpha)
    return Adapter(modules, Card(**card_facts(base), token="sks", class_noun="dog"))


def save(kind: str, folder: Path) -> Path:
    make_pipeline(kind).save_pretrained(folder, safe_serialization=True)
    return folder
