"""A subject drawn into a photo: by a plain base as diffusers' inpainting pipelines do it, and by U-Nets with nine channels."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline, StableDiffusionXLInpaintPipeline
from PIL import Image
from pipelines import base_of, make_pipeline, random_adapter, same_state, state

from lora_booth.base.base_model import BaseModel
from lora_booth.errors import BaseModelError, PhotoError, SettingsError
from lora_booth.injection.attached import attached
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.gallery import record_of
from lora_booth.pictures.inpainting import draw_into, drawn_size, part_around
from lora_booth.pictures.picture import command_of, python_of
from lora_booth.pictures.regions import Region
from lora_booth.pictures.serving import Request, Serving

PROMPT = "a sks dog"
QUICK: dict[str, Any] = {"steps": 4, "guidance": 3.0}


@pytest.fixture(scope="module")
def photo() -> Image.Image:
    rng = np.random.default_rng(1)
    return Image.fromarray(rng.integers(0, 255, (15, 20, 3), dtype=np.uint8)).resize((200, 150), Image.Resampling.BICUBIC)


@pytest.fixture(scope="module")
def mask() -> Image.Image:
    mask = Image.new("L", (200, 150))
    mask.paste(255, (120, 60, 170, 110))
    return mask


def nine_channels(base: BaseModel) -> Any:
    torch.manual_seed(3)
    parts = base.pipeline.components
    unet = type(base.unet).from_config(base.unet.config, in_channels=9).eval()
    return StableDiffusionInpaintPipeline(**{**parts, "unet": unet}, requires_safety_checker=False)


def test_the_part_that_the_base_sees(mask: Image.Image) -> None:
    assert part_around(mask) == (95, 35, 195, 135)
    base = base_of("sd1")
    assert drawn_size(base, (95, 35, 195, 135)) == (64, 64) and drawn_size(base, (0, 0, 200, 100)) == (88, 48)
    for white, seen in (
        ((0, 0, 200, 150), (0, 0, 200, 150)),
        ((0, 0, 100, 4), (0, 0, 200, 100)),
        ((199, 149, 200, 150), (198, 148, 200, 150)),
    ):
        other = Image.new("L", (200, 150))
        other.paste(255, white)
        assert part_around(other) == seen
    with pytest.raises(PhotoError, match="the mask has no white; make what is to be drawn anew white"):
        part_around(Image.new("L", (200, 150), 127))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sdxl"])
def test_it_draws_as_stock_diffusers(kind: str, photo: Image.Image, mask: Image.Image) -> None:
    base = base_of(kind)
    part = part_around(mask)
    piece, anew = (image.crop(part).resize((64, 64), Image.Resampling.BILINEAR) for image in (photo, mask))
    stock: Any = StableDiffusionXLInpaintPipeline if kind == "sdxl" else StableDiffusionInpaintPipeline
    more = {"add_watermarker": False} if kind == "sdxl" else {"requires_safety_checker": False}
    pipeline = stock(**base.pipeline.components, **more)
    options = {"num_inference_steps": 4, "guidance_scale": 3.0, "negative_prompt": "a cat"}
    ours = draw_into(base, base.pipeline, 5, prompt=PROMPT, piece=piece, mask=anew, **options)
    generator = torch.Generator().manual_seed(5)
    noise = torch.randn(1, 4, 8, 8, generator=generator)
    call = {"image": piece, "mask_image": anew, "latents": noise, "generator": generator, "strength": 1.0}
    theirs = pipeline(PROMPT, width=64, height=64, **call, **options).images[0]
    difference = np.abs(np.asarray(ours, dtype=int) - np.asarray(theirs, dtype=int))
    assert difference.max() <= 2 and np.asarray(theirs).std() > 1


def test_the_rest_of_the_photo_stays(photo: Image.Image, mask: Image.Image, tmp_path: Path) -> None:
    base = base_of("sd1")
    before, adapter = state(base.pipeline), random_adapter(base)
    studio = Composition(base, adapter)
    photo.save(tmp_path / "beach.png")
    mask.save(tmp_path / "here.png")
    first, second = studio.inpaint(tmp_path / "beach.png", str(tmp_path / "here.png"), PROMPT, seeds=[1, 2], **QUICK)
    assert same_state(state(base.pipeline), before)
    outside = np.asarray(mask) == 0
    for picture in (first, second):
        made = np.asarray(picture.image)
        assert picture.image.size == photo.size and (made == np.asarray(photo))[outside].all()
        assert (made != np.asarray(photo))[~outside].mean() > 0.5
    assert (np.asarray(first.image) != np.asarray(second.image)).any()
    [again] = studio.inpaint(photo, mask, PROMPT, seeds=[2], **QUICK)
    assert again.image.tobytes() == second.image.tobytes() and again.seed == 2
    [plain] = Composition(base).inpaint(photo, mask, PROMPT, seeds=[2], **QUICK)
    assert plain.image.tobytes() != second.image.tobytes()
    assert command_of(first) is None and python_of(first) is None
    assert ("note", "drawn into a photo, which is not recorded") in record_of(first)["facts"]


@pytest.mark.slow
def test_a_u_net_with_nine_channels(photo: Image.Image, mask: Image.Image) -> None:
    base = base_of("sd1")
    adapter = random_adapter(base).with_card(base_hash=None)  # of the plain base: its attention layers are the same
    pipeline = nine_channels(base)
    before = state(pipeline)
    [picture] = Composition(pipeline, adapter).inpaint(photo, mask, PROMPT, seeds=[3], **QUICK)
    [plain] = Composition(pipeline).inpaint(photo, mask, PROMPT, seeds=[3], **QUICK)
    assert same_state(state(pipeline), before) and picture.image.tobytes() != plain.image.tobytes()
    part = part_around(mask)
    piece, anew = (image.crop(part).resize((64, 64), Image.Resampling.LANCZOS) for image in (photo, mask))
    with attached(pipeline, [(adapter, 1.0)]) as pipe:
        call: dict[str, Any] = {"image": piece, "mask_image": anew, "width": 64, "height": 64, "strength": 1.0}
        options = {"num_inference_steps": 4, "guidance_scale": 3.0, "generator": torch.Generator().manual_seed(3)}
        drawn = pipe(PROMPT, **call, **options).images[0]
    centre = (140, 80, 150, 90)
    expected = drawn.resize((100, 100), Image.Resampling.LANCZOS).crop((45, 45, 55, 55))
    assert picture.image.crop(centre).tobytes() == expected.tobytes()
    places = [Region(adapter, box=(0, 0, 1, 1))]  # all of it
    [in_place] = Composition(pipeline, regions=places).inpaint(photo, mask, PROMPT, seeds=[3], **QUICK)
    assert in_place.image.tobytes() != plain.image.tobytes() and in_place.making.method == "regions"


def test_pipelines_that_cannot_draw_are_refused(photo: Image.Image, mask: Image.Image) -> None:
    inpainting, alone = nine_channels(base_of("sd1")), make_pipeline("sd1")
    alone.unet = inpainting.unet
    for pipeline, problem in (
        (alone, "its U-Net takes 9 channels and gives 4, the VAE has 4; use the text-to-image model, or `inpaint` with"),
        (inpainting, "StableDiffusionInpaintPipeline does not draw from text alone"),
    ):
        with pytest.raises(BaseModelError, match=problem):
            Composition(pipeline).generate(PROMPT, size=64)
        with pytest.raises(BaseModelError, match=problem):
            Composition(pipeline).preflight(PROMPT, trial=True)
        with pytest.raises(BaseModelError, match=problem):
            Serving(pipeline).generate([Request(PROMPT)])
    image_to_image = StableDiffusionImg2ImgPipeline.from_pipe(make_pipeline("sd1"))
    for pipeline, problem in ((alone, "its U-Net takes 9 channels"), (image_to_image, "does not draw from text alone")):
        with pytest.raises(BaseModelError, match=problem):
            Composition(pipeline).inpaint(photo, mask, PROMPT)


def test_a_black_drawing_is_an_error(photo: Image.Image, mask: Image.Image) -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    with torch.no_grad():
        base.vae.decoder.conv_out.bias.fill_(-1e9)
    with pytest.raises(SettingsError, match="came out black"):
        Composition(base).inpaint(photo, mask, PROMPT, **QUICK)


def test_samplers_and_weights_of_words(photo: Image.Image, mask: Image.Image) -> None:
    studio = Composition(base_of("sd1"))

    def placed(prompt: str, **options: Any) -> np.ndarray:
        [picture] = studio.inpaint(photo, mask, prompt, **QUICK, **options)
        assert picture.sampler == (options.get("sampler") and "euler a")
        return np.asarray(picture.image, dtype=int)

    plain = placed("a do")
    assert not np.array_equal(placed("a do", sampler="Euler a"), plain)
    with pytest.raises(SettingsError, match="sampler 'fast' is unknown"):
        placed("a do", sampler="fast")
    pytest.importorskip("compel")
    assert np.abs(placed("a (do:1.0)") - plain).max() <= 2  # of 255
    assert not np.array_equal(placed("a (do:1.5)"), plain)


def test_photos_and_masks_that_do_not_fit(photo: Image.Image, mask: Image.Image, tmp_path: Path) -> None:
    studio = Composition(base_of("sd1"))
    with pytest.raises(PhotoError, match=r"mask for the photo: 64x64 px for 200x150; it must have the shape of the upright"):
        studio.inpaint(photo, mask.resize((64, 64)), PROMPT)
    with pytest.raises(PhotoError, match="no such file"):
        studio.inpaint(tmp_path / "none.png", mask, PROMPT)
    for wrong in (5, None, ["x"]):
        with pytest.raises(SettingsError, match="photo "):
            studio.inpaint(wrong, mask, PROMPT)  # type: ignore[arg-type]
        with pytest.raises(SettingsError, match="mask "):
            studio.inpaint(photo, wrong, PROMPT)  # type: ignore[arg-type]


@pytest.mark.slow
def test_the_command_does_the_same(
    call: Any, folders: dict[str, Path], photo: Image.Image, mask: Image.Image, tmp_path: Path
) -> None:
    base = base_of("sd1")
    rex = random_adapter(base).save(tmp_path / "rex.safetensors", dtype="fp32")
    beach, here = tmp_path / "beach.png", tmp_path / "here.png"
    photo.save(beach)
    mask.save(here)
    words = (rex, "--base", folders["sd1"], "--dtype", "fp32", "--prompt", PROMPT, "--steps", 4, "--guidance", 3, "--out")
    code, out, _ = call("inpaint", beach, here, *words, tmp_path / "out")
    assert code == 0, out
    [file] = (tmp_path / "out").glob("*.png")
    [expected] = Composition(base, rex).inpaint(photo, mask, PROMPT, **QUICK)
    made = np.asarray(Image.open(file), dtype=int)
    assert np.abs(made - np.asarray(expected.image, dtype=int)).max() <= 2
    assert "drawn into a photo" in next((tmp_path / "out").glob("*.html")).read_text(encoding="utf-8")
    code, _, said = call("inpaint", beach, tmp_path / "none.png", *words, tmp_path / "out")
    assert code == 2 and said.splitlines()[-1].startswith("error: ") and "no such file" in said
