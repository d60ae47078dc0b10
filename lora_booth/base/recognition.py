"""Which family a pipeline is of, and whether it can be trained."""

from __future__ import annotations

import inspect
import math
from typing import Any

from torch import Tensor, nn

from ..errors import BaseModelError
from .families import FAMILIES, Family, labels

TIMESTEPS = 1000  # of the noise schedule of every family's published models (`num_train_timesteps`)


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


def check_trainable(pipeline: Any, family: Family) -> None:
    """Check that the parts are complete, fit together and do what the loss assumes. Raises BaseModelError."""
    import diffusers

    check_drawable(pipeline, family)
    known, remedy = getattr(diffusers, family.pipeline), f"use diffusers.{family.pipeline}.from_pipe(pipeline)"
    demand(isinstance(pipeline, known), f"{type(pipeline).__name__} is not supported; {remedy}")
    moved = [name for name, part in pipeline.components.items() if isinstance(part, nn.Module) and is_offloaded(part)]
    demand(not moved, f"its {', '.join(moved)} is offloaded; load the pipeline without offloading to train it")
    check_unet_and_vae(pipeline)
    check_schedule(pipeline.scheduler, family)
    check_text(pipeline, family)


def check_unet_and_vae(pipeline: Any) -> None:
    from diffusers import AutoencoderKL

    unet, vae = pipeline.unet.config, pipeline.vae.config
    kind = getattr(pipeline.vae, "_orig_mod", pipeline.vae)  # inside a compiled one
    demand(isinstance(kind, AutoencoderKL), f"its VAE is a {type(kind).__name__}; training needs an AutoencoderKL")
    demand(
        unet.in_channels == unet.out_channels == vae.latent_channels,
        f"its U-Net takes {unet.in_channels} channels and gives {unet.out_channels}, the VAE has {vae.latent_channels}: "
        "an inpainting or editing model; use the text-to-image model of the same family",
    )
    more = [k for k in ("time_cond_proj_dim", "class_embed_type", "encoder_hid_dim_type") if unet.get(k) is not None]
    demand(
        not more,
        f"its U-Net has further inputs ({', '.join(more)}), as distilled (LCM) models and IP-Adapters have; "
        "use the plain model, or call unload_ip_adapter() on the pipeline",
    )
    shifted = [key for key in ("latents_mean", "latents_std", "shift_factor") if vae.get(key)]
    demand(not shifted, f"its VAE shifts the latents ({', '.join(shifted)}), which the loss does not know; use another base")
    sizes = {"scaling_factor": vae.scaling_factor, "sample_size": unet.sample_size}
    for name, value in sizes.items():
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
