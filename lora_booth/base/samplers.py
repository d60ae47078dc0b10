"""Samplers by the names that AUTOMATIC1111 and ComfyUI give them, as diffusers' schedulers."""

from __future__ import annotations

import inspect
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

from ..errors import SettingsError, shown
from .changes import undone

# name -> class in diffusers, arguments. Everything else (betas, prediction type, spacing) comes from the base's scheduler.
UNCLIPPED = {"clip_sample": False}  # clipping is for models of pixels
SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "euler": ("EulerDiscreteScheduler", {}),
    "euler a": ("EulerAncestralDiscreteScheduler", {}),
    "heun": ("HeunDiscreteScheduler", {}),
    "dpm2": ("KDPM2DiscreteScheduler", {}),
    "dpm2 a": ("KDPM2AncestralDiscreteScheduler", {}),
    "dpm++ 2m": ("DPMSolverMultistepScheduler", {"algorithm_type": "dpmsolver++", "solver_order": 2}),
    "dpm++ 2m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 2}),
    "dpm++ 3m sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++", "solver_order": 3}),
    "dpm++ sde": (
        "DPMSolverSinglestepScheduler",
        {"algorithm_type": "sde-dpmsolver++", "solver_order": 2, "lower_order_final": True},  # also for an odd number of steps
    ),
    "unipc": ("UniPCMultistepScheduler", {"solver_type": "bh2"}),
    "ddim": ("DDIMScheduler", UNCLIPPED),
    "ddpm": ("DDPMScheduler", UNCLIPPED),
    "plms": ("PNDMScheduler", {"skip_prk_steps": True}),
    "lcm": ("LCMScheduler", UNCLIPPED),
    "tcd": ("TCDScheduler", UNCLIPPED),
}
SPACINGS: dict[str, dict[str, Any]] = {  # may follow the name: how the noise falls from step to step
    "karras": {"use_karras_sigmas": True},
    "exponential": {"use_exponential_sigmas": True},
    "trailing": {"timestep_spacing": "trailing"},
}
PLAIN = {"use_karras_sigmas": False, "use_exponential_sigmas": False, "use_beta_sigmas": False}  # without such a word
SPELLINGS = {
    "_": " ",
    "dpmpp": "dpm++",
    "dpm 2": "dpm2",
    "ancestral": "a",
    "uni pc": "unipc",
    "pndm": "plms",
    "sgm uniform": "trailing",
}


def sampler_name(text: str) -> str:
    """ "Euler a", "dpmpp_2m_karras" -> the name in the table, perhaps with a spacing. Raises SettingsError."""
    name = " ".join(text.lower().split())
    for theirs, ours in SPELLINGS.items():
        name = name.replace(theirs, ours)
    alone, _, spacing = name.rpartition(" ")
    if name in SAMPLERS or (alone in SAMPLERS and spacing in SPACINGS):
        return name
    known = f"{', '.join(SAMPLERS)}; also with {', '.join(SPACINGS)}, e.g. dpm++ 2m karras"
    raise SettingsError(f"sampler {shown(text[:40])!r} is unknown; use one of: {known}")


def scheduler_of(scheduler: Any, sampler: str, steps: int) -> Any:
    """A scheduler with the noise schedule of the base's. Raises SettingsError for a sampler that cannot draw with it."""
    alone, _, spacing = sampler.rpartition(" ") if sampler not in SAMPLERS else (sampler, "", "")
    config = scheduler.config
    if "beta_start" not in config or config.get("use_flow_sigmas"):
        raise SettingsError(f"the base's {type(scheduler).__name__} has a noise schedule of its own; leave out the sampler")
    kind = class_of(alone)
    wanted = SAMPLERS[alone][1] | SPACINGS.get(spacing, {})
    if unknown := [name for name in wanted if name not in taken(kind)]:
        others = [name for name in SAMPLERS if unknown[0] in taken(class_of(name))]
        raise SettingsError(f"sampler {sampler!r}: {alone} has no {spacing} spacing; leave it out, or use {', '.join(others)}")
    zero = "rescale_betas_zero_snr"
    if config.get(zero) and zero not in taken(kind):
        others = [name for name in SAMPLERS if zero in taken(class_of(name))]
        raise SettingsError(f"sampler {sampler!r} cannot draw with a base of zero terminal SNR; use {', '.join(others)}")
    known = {name: value for name, value in config.items() if name in taken(kind) or name.startswith("_")}
    made = kind.from_config(known, **{name: value for name, value in (PLAIN | wanted).items() if name in taken(kind)})
    try:
        made.set_timesteps(steps)
    except ValueError as error:  # LCM knows 50 steps, and says so at length
        raise SettingsError(f"sampler {sampler!r} cannot take {steps} steps; pass fewer") from error
    return made


def class_of(sampler: str) -> Any:
    import diffusers

    return getattr(diffusers, SAMPLERS[sampler][0])


def taken(kind: Any) -> list[str]:
    """The names of a scheduler's arguments."""
    return list(inspect.signature(kind.__init__).parameters)


@contextmanager
def sampling(pipeline: Any, sampler: str | None, steps: int) -> Iterator[None]:
    """Within the context, the pipeline draws with this sampler; None: with its own."""
    if sampler is None:
        yield
        return
    before = pipeline.scheduler
    with undone(partial(setattr, pipeline, "scheduler", before)):
        pipeline.scheduler = scheduler_of(before, sampler, steps)
        yield
