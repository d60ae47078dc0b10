"""Adapters in parts of a picture, of the U-Net and of the denoising: exact invariants, and nothing left behind."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pipelines
import pytest
import torch
from PIL import Image

from lora_booth.adapters.adapter import Adapter
from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import quiet
from lora_booth.config import LoraSpec
from lora_booth.errors import AdapterBaseMismatch, SettingsError
from lora_booth.pictures import composition
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.regions import Masks, Region, masks_of, preview
from lora_booth.pictures.subjects import token_positions, without
from lora_booth.pictures.weights import Weight

PROMPT = "sks dog, do dog"
FULL = (0.0, 0.0, 1.0, 1.0)
LEFT, RIGHT = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
EVERYTHING = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2", "time_emb_proj")


@pytest.fixture(scope="module", params=["sd1", "sd2-v", "sdxl"])
def base(request) -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline(request.param), name="tiny")


@pytest.fixture(scope="module")
def sd1() -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline("sd1"), name="tiny")


@pytest.fixture(scope="module")
def ddim() -> BaseModel:
    """One U-Net call for each step, unlike sd1's PNDM, which calls twice at the second timestep."""
    return BaseModel.from_pipeline(pipelines.make_pipeline("sd2"), name="tiny")


def subject(base: BaseModel, token: str, seed: int, **lora: Any) -> Adapter:
    made = pipelines.random_adapter(base, LoraSpec(rank=2, **lora), seed=seed, size=0.4)
    return replace(made, card=replace(made.card, token=token, class_noun="dog"))


def pair(base: BaseModel, **lora: Any) -> tuple[Adapter, Adapter]:
    return subject(base, "sks", 1, **lora), subject(base, "do", 2, **lora)


def latents(studio: Composition, prompt: str = PROMPT, *, count: int = 1, **call: Any) -> torch.Tensor:
    """What the stock pipeline makes, before the VAE rounds it to pixels."""
    with studio.attached(prompt) as pipeline, quiet(pipeline):
        generators = [torch.Generator().manual_seed(seed) for seed in range(count)]
        options = {"num_inference_steps": 3, "guidance_scale": 2.0} | call
        return pipeline([prompt] * count, generator=generators, output_type="latent", **options).images


@pytest.fixture
def untouched(base) -> Iterator[None]:
    """The pipeline is bit-identical after the test, and no hook or wrapper is left."""
    yield from watch(base)


def watch(base: BaseModel) -> Iterator[None]:
    before = pipelines.state(base.pipeline)
    processors = {name: type(p) for name, p in base.unet.attn_processors.items()}
    yield
    assert pipelines.same_state(before, pipelines.state(base.pipeline))
    assert "forward" not in base.unet.__dict__
    assert {name: type(p) for name, p in base.unet.attn_processors.items()} == processors
    for module in base.unet.modules():
        assert not module._forward_hooks and not module._forward_pre_hooks


# --- exact invariants ----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("targets", [("to_q", "to_k", "to_v", "to_out.0"), EVERYTHING])
@pytest.mark.parametrize("second", [0.0, 1.0])
def test_masks_of_all_and_nothing_are_the_sum_and_the_single_adapter(base, untouched, monkeypatch, targets, second):
    rex, bob = pair(base, target_modules=targets)
    full = torch.ones(2, 1, 64, 64)
    full[1] = second
    monkeypatch.setattr(composition, "masks_of", lambda regions: Masks(full))
    regions = [Region(rex, box=FULL, prompt=PROMPT), Region(bob, box=FULL, prompt=PROMPT)]
    odd = {"width": 56, "height": 88}  # latents of 7 x 11, then 4 x 6 and 2 x 3
    for size in ({}, odd):
        split = latents(Composition(base, regions=regions), **size)
        plain = latents(Composition(base, [rex, bob] if second else [rex], method="sum"), **size)
        assert torch.allclose(split, plain, atol=1e-5)
    assert split.shape[-2:] == (11, 7)
    assert not torch.equal(plain, latents(Composition(base), **odd))


@pytest.mark.slow
def test_a_sum_does_not_depend_on_the_order(base, untouched):
    rex, bob = pair(base)
    one, other = latents(Composition(base, [rex, (bob, 0.5)])), latents(Composition(base, [(bob, 0.5), rex]))
    assert torch.allclose(one, other, atol=1e-5)


def steps_of(studio: Composition, count: int) -> list[torch.Tensor]:
    """The latents after each denoising step."""
    seen: list[torch.Tensor] = []

    def keep(pipeline: Any, step: int, timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        seen.append(tensors["latents"].clone())
        return tensors

    latents(studio, num_inference_steps=count, callback_on_step_end=keep)
    return seen


# --- weights by block and step -------------------------------------------------------------------------------------


def test_a_weight_by_block_is_the_adapter_with_scaled_modules(base, untouched):
    rex, _ = pair(base, text_encoder=True)
    weight = Weight(0.8, blocks={"down": 0.5, "up.0": 0.0, "mid": 2.0, "text": 0.25})

    def factor(path: str) -> float:
        for start, value in (("unet.down", 0.5), ("unet.up_blocks.0.", 0.0), ("unet.mid", 2.0), ("text", 0.25)):
            if path.startswith(start):
                return 0.8 * value
        return 0.8

    scaled = replace(rex, modules={m: replace(f, alpha=f.alpha * factor(m)) for m, f in rex.modules.items()})
    assert torch.allclose(latents(Composition(base, [(rex, weight)])), latents(Composition(base, [(scaled, 1.0)])), atol=1e-5)


def test_a_weight_by_step_is_active_in_its_steps_only(ddim):
    rex, _ = pair(ddim)
    early = steps_of(Composition(ddim, [(rex, Weight(end=0.5))]), 6)
    late = steps_of(Composition(ddim, [(rex, Weight(start=0.5))]), 6)
    always, never = steps_of(Composition(ddim, [rex]), 6), steps_of(Composition(ddim), 6)
    assert all(torch.equal(a, b) for a, b in zip(early[:3], always[:3], strict=True)) and not torch.equal(early[3], always[3])
    assert all(torch.equal(a, b) for a, b in zip(late[:3], never[:3], strict=True)) and not torch.equal(late[3], never[3])


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"blocks": {"middle": 1}}, "'middle' is unknown"),
        ({"blocks": {"mid.0": 1}}, "'mid.0' is unknown"),
        ({"start": 0.5, "end": 0.5}, "start 0.5, end 0.5"),
        ({"value": float("nan")}, "weight nan"),
    ],
)
def test_a_weight_that_cannot_be(wrong, message):
    with pytest.raises(SettingsError, match=message):
        Weight(**wrong)


# --- regions -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_regions_with_their_own_prompts(base, untouched):
    rex, bob = pair(base, text_encoder=True)
    regions = [Region(rex, box=LEFT, prompt="sks dog"), Region(bob, box=RIGHT)]
    plain = [replace(region, prompt=None) for region in regions]
    with_prompt = latents(Composition(base, regions=regions))
    assert torch.isfinite(with_prompt).all()
    assert not torch.allclose(with_prompt, latents(Composition(base, regions=plain)), atol=1e-3)


def test_what_no_region_covers_reads_the_background_s_prompt(sd1):
    rex, _ = pair(sd1)
    regions = [Region(rex, box=LEFT)]
    plain = without(PROMPT, [rex])
    made = [latents(Composition(sd1, regions=regions, background=text)) for text in (None, plain, "cat")]
    assert torch.equal(made[0], made[1]) and not torch.allclose(made[1], made[2], atol=1e-3)


def test_in_its_region_an_adapter_s_text_encoder_is_active(sd1):
    rex, bob = pair(sd1, text_encoder=True)
    silent = replace(rex, modules={path: f for path, f in rex.modules.items() if path.startswith("unet.")})
    assert len(silent.modules) < len(rex.modules)
    regions = [Region(rex, box=LEFT), Region(bob, box=RIGHT)]
    made = [latents(Composition(sd1, regions=[replace(regions[0], adapter=one), regions[1]])) for one in (rex, silent)]
    assert not torch.allclose(*made, atol=1e-3)


def test_a_regions_prompt_over_the_whole_picture_replaces_the_picture_s(base, untouched):
    rex, _ = pair(base)
    studio = Composition(base, regions=[Region(rex, box=FULL, prompt="sks dog")])
    if base.family.name != "sdxl":  # whose pooled condition stays the picture's
        assert torch.allclose(latents(studio, "do"), latents(Composition(base, [rex]), "sks dog"), atol=1e-4)


def test_before_its_start_a_region_is_the_plain_sum(ddim):
    rex, bob = pair(ddim)
    regions = [Region(rex, box=LEFT), Region(bob, box=RIGHT)]
    late = steps_of(Composition(ddim, regions=regions, start=0.5), 4)
    both = steps_of(Composition(ddim, [rex, bob]), 4)
    assert torch.equal(late[1], both[1]) and not torch.equal(late[2], both[2])


def test_other_adapters_are_active_everywhere(sd1):
    rex, bob = pair(sd1)
    styled = Composition(sd1, [bob], regions=[Region(rex, box=FULL)])
    assert torch.allclose(latents(styled, "sks dog"), latents(Composition(sd1, [bob, rex]), "sks dog"), atol=1e-4)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lora_booth.errors.CompositionWarning")
def test_pictures_do_not_depend_on_their_batch(sd1):
    rex, bob = pair(sd1)
    for regions in ("auto", [Region(rex, box=LEFT), Region(bob, box=RIGHT)]):
        studio = Composition(sd1, [rex, bob] if regions == "auto" else [], regions=regions)
        three = studio.generate(PROMPT, seeds=[0, 1, 2], steps=4, batch_size=3)
        alone = studio.generate(PROMPT, seeds=[2], steps=4)
        difference = np.abs(np.asarray(three[2].image).astype(int) - np.asarray(alone[0].image).astype(int))
        assert difference.max() <= 2  # of 255


def test_masks_keep_their_shape_whatever_the_number_of_pixels(sd1):
    rex, _ = pair(sd1)
    mask = masks_of([Region(rex, box=(0, 0, 1, 0.5), feather=0)])
    wide, square = mask.at(8, 32), mask.at(16, 16)
    assert torch.equal(wide[0, 0, :4], torch.ones(4, 32)) and not wide[0, 0, 4:].any()
    assert torch.equal(square[0, 0, :8], torch.ones(8, 16)) and not square[0, 0, 8:].any()


def test_a_feathered_edge_is_soft_and_the_border_full(sd1):
    rex, _ = pair(sd1)
    mask = masks_of([Region(rex, box=LEFT, feather=0.1)]).full[0, 0]
    row = mask[256]
    assert row[0] == 1 and row[511] == 0 and 0.4 < row[256] < 0.6
    assert (row[1:] <= row[:-1] + 1e-6).all()


@pytest.mark.parametrize("height", [64, 96])
def test_pictures_need_not_be_square(sd1, height):
    rex, bob = pair(sd1)
    regions = [Region(rex, box=LEFT, prompt="sks"), Region(bob, box=RIGHT)]
    made = latents(Composition(sd1, regions=regions), height=height, width=128)
    assert made.shape[-2:] == (height // 8, 16)


# --- automatic regions ---------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_automatic_regions_share_the_picture(base, untouched):
    rex, bob = pair(base)
    studio = Composition(base, [rex, bob], regions="auto")
    assert torch.isfinite(latents(studio, count=2, num_inference_steps=4)).all()
    found = studio.find_regions(PROMPT, seed=1, steps=4)
    assert [region.adapter for region in found] == [rex, bob]
    masks = np.stack([np.asarray(region.mask_image(), dtype=float) / 255 for region in found])
    assert 0.9 < masks.sum(0).mean() < 1.1
    again = Composition(base, regions=[replace(region, weight=0.5) for region in found])
    assert torch.isfinite(latents(again)).all()


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lora_booth.errors.CompositionWarning")
def test_automatic_regions_are_found_first_and_active_from_the_first_step(sd1):
    rex, bob = pair(sd1)
    auto, how = Composition(sd1, [rex, bob], regions="auto"), {"steps": 5, "guidance": 2.0}
    advanced: list[int] = []
    drawn = auto.generate(PROMPT, seeds=[1, 2], batch_size=2, on_step=advanced.append, **how)
    assert advanced == [0] * 3 + [2] * 6  # PNDM calls twice at its second timestep
    in_mid_way = latents(auto, count=1, num_inference_steps=5)  # of a pipeline that the user calls: one pass
    assert torch.isfinite(in_mid_way).all()
    for seed, picture in zip((1, 2), drawn, strict=True):
        found = auto.find_regions(PROMPT, seed=seed, **how)
        [again] = Composition(sd1, regions=found).generate(PROMPT, seeds=[seed], **how)
        [late] = Composition(sd1, regions=found, start=auto.start).generate(PROMPT, seeds=[seed], **how)
        near, far = (np.abs(np.asarray(picture.image).astype(int) - np.asarray(one.image)).max() for one in (again, late))
        assert near <= 2 < far  # of 255: the masks of `found` have 256 levels


def test_automatic_regions_need_the_subjects_in_the_prompt(sd1):
    rex, bob = pair(sd1)
    studio = Composition(sd1, [rex, bob], regions="auto")
    with pytest.raises(SettingsError, match="names none of 'sks', 'do'"):
        latents(studio, "a cat")
    style = replace(bob, card=replace(bob.card, token=None, title="ink"))
    with_style = Composition(sd1, [rex, style], regions="auto")
    assert [a.name for a, _ in with_style.everyone("sks dog")] == ["ink", "sks"]  # the style is active everywhere
    assert torch.isfinite(latents(with_style, "sks dog", num_inference_steps=4)).all()


# --- words ---------------------------------------------------------------------------------------------------------


def test_whose_words(sd1):
    rex, bob = pair(sd1)
    owl = replace(bob, card=replace(bob.card, class_noun="owl"))
    assert without("a photo of sks dog and Do dog", [bob]) == "a photo of sks dog and a dog"
    assert without("do owl, do, dodo", [owl]) == "an owl, an owl, dodo"
    assert token_positions(PROMPT, rex, sd1.tokenizer) == [1, 2]
    assert token_positions(PROMPT, bob, sd1.tokenizer)[0] > 2
    assert token_positions("a cat", rex, sd1.tokenizer) == []
    with pytest.raises(SettingsError, match="beyond the"):
        token_positions("a cat, a cat, a cat, a cat, a cat sks dog", rex, sd1.tokenizer)


# --- other pipelines -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_image_to_image_inpainting_and_controlnet(sd1):
    from diffusers import (
        ControlNetModel,
        StableDiffusionControlNetPipeline,
        StableDiffusionImg2ImgPipeline,
        StableDiffusionInpaintPipeline,
    )

    rex, bob = pair(sd1)
    parts = sd1.pipeline.components
    picture, mask = Image.new("RGB", (64, 64), "#4060a0"), Image.new("L", (64, 64), 255)
    torch.manual_seed(0)
    controlnet = ControlNetModel.from_unet(sd1.unet, conditioning_channels=3)
    for residual in controlnet.controlnet_down_blocks.parameters():
        torch.nn.init.normal_(residual, std=0.1)
    others = [
        (StableDiffusionImg2ImgPipeline(**parts, requires_safety_checker=False), {"image": picture, "strength": 0.6}),
        (StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False), {"image": picture, "mask_image": mask}),
        (StableDiffusionControlNetPipeline(**parts, controlnet=controlnet, requires_safety_checker=False), {"image": picture}),
    ]
    for regions in ("auto", [Region(rex, box=LEFT), Region(bob, box=RIGHT, prompt="do dog")]):
        studio = Composition(sd1, [rex, bob] if regions == "auto" else [], regions=regions)
        for pipeline, call in others:
            with studio.attached(PROMPT, pipeline) as pipe, quiet(pipe):
                options = {"num_inference_steps": 6, "guidance_scale": 2.0, "output_type": "pt"}
                generator = torch.Generator().manual_seed(0)
                made = pipe(PROMPT, generator=generator, **call, **options).images
            assert torch.isfinite(made).all(), type(pipeline).__name__


# --- nothing is left behind ----------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_middle_leaves_nothing(base, untouched, error):
    def fail(*_: Any) -> None:
        raise error("stop")

    rex, bob = pair(base, text_encoder=True)
    regions = [Region(rex, box=LEFT, prompt="sks"), Region(bob, box=RIGHT)]
    for settings in (
        {"regions": regions},
        {"adapters": [rex, bob], "regions": "auto"},
        {"adapters": [rex, (bob, Weight(end=0.5))], "method": "sum"},
    ):
        with pytest.raises(error, match="stop"):
            latents(Composition(base, **settings), callback_on_step_end=fail)


def test_fused_and_dora_adapters_are_refused_by_name():
    from peft import LoraConfig

    rex_path = pipelines.make_pipeline("sd1")
    base = BaseModel.from_pipeline(rex_path, name="tiny")
    rex, bob = pair(base)
    studio = Composition(base, regions=[Region(rex, box=LEFT), Region(bob, box=RIGHT)])
    config = {"r": 2, "target_modules": ["to_q"]}
    base.unet.add_adapter(LoraConfig(**config), adapter_name="own")
    latents(studio)  # an adapter of the user's own is no hindrance
    base.pipeline.fuse_lora(components=["unet"])
    with pytest.raises(AdapterBaseMismatch, match=r"fused .*unfuse_lora\(\)"):
        latents(studio)
    base.pipeline.unfuse_lora(components=["unet"])
    base.unet.delete_adapters("own")
    base.unet.add_adapter(LoraConfig(**config, use_dora=True), adapter_name="dora")
    with pytest.raises(AdapterBaseMismatch, match="DoRA"):
        latents(studio)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"method": "blend"}, "method 'blend'; needed: 'sum' or 'regions'"),
        ({"method": "regions"}, r"needs places; pass regions="),
        ({"regions": "auto"}, "without adapters"),
        ({"start": 0.2, "method": "sum"}, "settings of regions"),
        ({"start": 1.0}, "start 1 is out of range"),
    ],
)
def test_settings_that_cannot_be(sd1, settings, message):
    with pytest.raises(SettingsError, match=message):
        Composition(sd1, **settings)


def test_a_region_has_one_place(sd1):
    rex, _ = pair(sd1)
    with pytest.raises(SettingsError, match="either a box or a mask"):
        Region(rex)
    with pytest.raises(SettingsError, match="x0 < x1"):
        Region(rex, box=(0.5, 0, 0.5, 1))
    for wrong in (
        {"box": (0, 0, 1)},
        {"box": "left"},
        {"mask": "mask.png"},
        {"box": LEFT, "weight": "1"},
        {"box": LEFT, "feather": None},
    ):
        with pytest.raises(SettingsError):
            Region(rex, **wrong)
    assert Region(rex, box=[0, 0, 1, 1]).box == (0.0, 0.0, 1.0, 1.0)
    with pytest.raises(SettingsError, match="no pixel"):
        masks_of([Region(rex, mask=Image.new("L", (8, 8)))])


def test_a_preview_shows_each_region_with_its_name(sd1):
    rex, bob = pair(sd1)
    drawn = np.asarray(preview([Region(rex, box=LEFT), Region(bob, box=RIGHT)], side=128)).astype(int)
    assert drawn.shape == (128, 128, 3)
    assert np.abs(drawn[8, 8] - drawn[8, 120]).max() > 40
    with_picture = preview([Region(rex, box=LEFT)], Image.new("RGB", (64, 64), "#00ff00"))
    assert with_picture.size == (384, 384)
    assert preview([Region(rex, box=LEFT)], Image.new("RGB", (64, 96))).size == (256, 384)
