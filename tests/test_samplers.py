"""Samplers by name: diffusers' schedulers as the oracle, one seed one picture, and nothing left behind."""

from __future__ import annotations

from pathlib import Path

import diffusers
import numpy as np
import pipelines
import pytest
import torch

from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import quiet
from lora_booth.base.samplers import SAMPLERS, sampler_name, scheduler_of
from lora_booth.config import LoraSpec
from lora_booth.errors import SettingsError
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.recipe import Recipe

PROMPT = "a photo of sks dog"
EVERYTHING = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2", "time_emb_proj")  # what LCM's adapters change


@pytest.fixture(scope="module", params=["sd1", "sd2-v", "sdxl"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline(request.param), name="tiny")


@pytest.fixture(scope="module")
def sd1() -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline("sd1"), name="tiny")


def pixels(pictures: list) -> np.ndarray:
    return np.stack([np.asarray(getattr(picture, "image", picture)) for picture in pictures]).astype(int)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("Euler a", "euler a"),
        ("euler_ancestral", "euler a"),
        ("DPM++ 2M Karras", "dpm++ 2m karras"),
        ("dpmpp_2m_sde exponential", "dpm++ 2m sde exponential"),
        ("dpm_2_ancestral", "dpm2 a"),
        ("uni_pc", "unipc"),
        ("euler sgm_uniform", "euler trailing"),
        ("LCM", "lcm"),
    ],
)
def test_the_names_of_other_programs(text: str, name: str) -> None:
    assert sampler_name(text) == name


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "kind", "arguments"),
    [
        ("Euler a", "EulerAncestralDiscreteScheduler", {}),
        ("DPM++ 2M Karras", "DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
        ("DPM++ 2M SDE", "DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
        ("UniPC", "UniPCMultistepScheduler", {}),
        ("DDIM", "DDIMScheduler", {"clip_sample": False}),
        ("LCM", "LCMScheduler", {"clip_sample": False}),
        ("euler sgm_uniform", "EulerDiscreteScheduler", {"timestep_spacing": "trailing"}),
    ],
)
def test_a_sampler_is_diffusers_scheduler(base: BaseModel, name: str, kind: str, arguments: dict) -> None:
    own = base.scheduler
    made = Composition(base).generate(PROMPT, seeds=[3], steps=5, guidance=2.0, sampler=name)
    assert base.scheduler is own and made[0].sampler == sampler_name(name)
    stock = type(base.pipeline)(
        **base.pipeline.components, **({} if base.family.time_ids else {"requires_safety_checker": False})
    )
    stock.scheduler = getattr(diffusers, kind).from_config(own.config, **arguments)
    with quiet(stock):
        generator = torch.Generator().manual_seed(3)
        expected = stock(PROMPT, num_inference_steps=5, guidance_scale=2.0, generator=generator).images
    assert np.array_equal(pixels(made), pixels(expected))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:__array_wrap__ must accept:DeprecationWarning")  # diffusers' KDPM2
@pytest.mark.parametrize("name", SAMPLERS)
def test_a_seed_is_one_picture_with_every_sampler(sd1: BaseModel, name: str) -> None:
    """Also with samplers that draw noise in every step."""
    own = sd1.scheduler
    studio, how = Composition(sd1), {"steps": 5, "guidance": 2.0, "sampler": name}
    three = pixels(studio.generate(PROMPT, seeds=[1, 2, 3], batch_size=3, **how))
    assert np.abs(three[2] - pixels(studio.generate(PROMPT, seeds=[3], **how))[0]).max() <= 2  # of 255
    assert np.abs(three[2] - three[1]).max() > 2
    assert sd1.scheduler is own


def test_zero_terminal_snr_needs_a_sampler_that_knows_it() -> None:
    base = BaseModel.from_pipeline(pipelines.make_pipeline("sd2-zsnr"), name="tiny")
    made = scheduler_of(base.scheduler, "euler a", 4)
    assert made.config.rescale_betas_zero_snr and made.config.prediction_type == "v_prediction"
    with pytest.raises(SettingsError, match="'heun' cannot draw with a base of zero terminal SNR; use euler, euler a, dpm"):
        Composition(base).generate(PROMPT, steps=2, sampler="heun")
    assert type(base.scheduler) is diffusers.DDIMScheduler


def test_what_a_sampler_cannot_do_is_told(sd1: BaseModel) -> None:
    studio = Composition(sd1)
    with pytest.raises(SettingsError, match="sampler 'magic' is unknown; use one of: euler, euler a, .* e.g. dpm.. 2m karras"):
        studio.generate(PROMPT, sampler="magic")
    with pytest.raises(
        SettingsError, match="sampler 'lcm karras': lcm has no karras spacing; leave it out, or use euler, heun"
    ):
        studio.generate(PROMPT, sampler="lcm karras")
    with pytest.raises(SettingsError, match="sampler 'lcm' cannot take 51 steps; pass fewer"):
        studio.generate(PROMPT, steps=51, sampler="lcm")
    with pytest.raises(SettingsError, match="has a noise schedule of its own; leave out the sampler"):
        scheduler_of(diffusers.EDMEulerScheduler(), "euler", 4)


def test_regions_are_found_in_the_steps_that_a_picture_reads(sd1: BaseModel) -> None:
    """Heun's sampler calls the U-Net twice at all timesteps but the first."""
    studio = Composition(sd1, pipelines.random_adapter(sd1), regions="auto")
    calls: list[None] = []
    handle = sd1.unet.conv_in.register_forward_hook(lambda *_: calls.append(None))
    studio.find_regions(PROMPT, steps=10, sampler="heun")  # 0.3 of 10 steps
    handle.remove()
    assert len(calls) == 1 + 2 + 2


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:Already found a `peft_config`")  # PEFT, of two adapters in the stock pipeline
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
@pytest.mark.parametrize(
    ("sampler", "guidance", "stock"),
    [
        ("lcm", 1.0, ("LCMScheduler", {"clip_sample": False})),
        ("lcm", 2.0, ("LCMScheduler", {"clip_sample": False})),
        ("euler trailing", 0.0, ("EulerDiscreteScheduler", {"timestep_spacing": "trailing"})),  # Lightning's
    ],
)
def test_an_adapter_for_few_steps_beside_a_subject(
    kind: str, sampler: str, guidance: float, stock: tuple[str, dict], tmp_path: Path
) -> None:
    """As stock diffusers draws both files together."""
    base = BaseModel.from_pipeline(pipelines.make_pipeline(kind), name="tiny")
    subject = pipelines.random_adapter(base, LoraSpec(rank=2), seed=1)
    few = pipelines.random_adapter(base, LoraSpec(rank=4, alpha=2.0, target_modules=EVERYTHING), seed=2, size=0.1)
    files = [
        subject.save(tmp_path / "rex.safetensors", dtype="fp32"),
        few.with_card(token=None).save(tmp_path / "few.safetensors", dtype="fp32"),
    ]
    studio = Composition(base, [(files[0], 0.8), files[1]])
    made = studio.generate(PROMPT, seeds=[3], steps=4, guidance=guidance, sampler=sampler)
    other = pipelines.make_pipeline(kind)
    other.scheduler = getattr(diffusers, stock[0]).from_config(other.scheduler.config, **stock[1])
    for file in files:
        other.load_lora_weights(str(file), adapter_name=file.stem)
    other.set_adapters(["rex", "few"], [0.8, 1.0])
    with quiet(other):
        generator = torch.Generator().manual_seed(3)
        expected = other(PROMPT, num_inference_steps=4, guidance_scale=guidance, generator=generator).images
    assert np.abs(pixels(made) - pixels(expected)).max() <= 2  # of 255
    recipe = Recipe.of(studio, PROMPT, seeds=[3], steps=4, guidance=guidance, sampler=sampler)
    again = Recipe.load(recipe.save(tmp_path / "few.json")).generate(base, [a for a, _ in studio.adapters])
    assert np.array_equal(pixels(made), pixels(again))
