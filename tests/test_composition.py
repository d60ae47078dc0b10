"""Composition and Picture: whose picture a seed is, what several adapters add up to, what a saved file tells."""

from __future__ import annotations

import math
import re
import warnings
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pipelines
import pytest
import torch
from PIL import Image

from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.tools.merge import concatenated
from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import quiet
from lora_booth.base.sizes import size_note, usual_sizes
from lora_booth.config import LoraSpec, sides
from lora_booth.errors import AdapterBaseMismatch, CompositionWarning, LoraBoothError, SettingsError
from lora_booth.kernels import attention_maps
from lora_booth.pictures import composition
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.picture import Picture
from lora_booth.pictures.regions import Region
from lora_booth.pictures.weights import Weight

PROMPT = "a photo of sks dog"
QUICK = {"steps": 2, "guidance": 2.0}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline("sd1"), name="tiny")


@pytest.fixture(scope="module")
def rex(base) -> Adapter:
    return pipelines.random_adapter(base, LoraSpec(rank=4, text_encoder=True), seed=1, size=0.2)


@pytest.fixture(scope="module")
def ink(base) -> Adapter:
    made = pipelines.random_adapter(base, LoraSpec(rank=2, alpha=4.0), seed=2, size=0.2)
    return named(made, None, None)  # a style


def pixels(pictures: list[Picture]) -> np.ndarray:
    """(N, H, W, 3) of all pictures."""
    return np.stack([np.asarray(picture.image) for picture in pictures])


def latents(studio: Composition, seed: int = 3) -> torch.Tensor:
    """What the stock pipeline makes with the adapters, before the VAE rounds it to pixels."""
    with studio.attached(PROMPT) as pipeline, quiet(pipeline):
        generator = torch.Generator().manual_seed(seed)
        made = pipeline(PROMPT, num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="latent")
    return made.images


# --- seeds ---------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_seed_gives_the_same_picture_whatever_else_is_asked_for(base, rex):
    studio = Composition(base, [(rex, 0.8)])
    three = studio.generate(PROMPT, seeds=[1, 2, 3], **QUICK)
    alone = studio.generate(PROMPT, seeds=[3], **QUICK)
    assert [picture.seed for picture in three] == [1, 2, 3]
    assert np.array_equal(pixels(alone)[0], pixels(three)[2])
    assert not np.array_equal(pixels(three)[0], pixels(three)[1])


@pytest.mark.slow
def test_batches_differ_by_rounding_only(base, rex):
    studio = Composition(base, [(rex, 0.8)])
    single = pixels(studio.generate(PROMPT, seeds=range(1, 4), **QUICK)).astype(int)
    batch = pixels(studio.generate(PROMPT, seeds=range(1, 4), batch_size=3, **QUICK)).astype(int)
    uneven = pixels(studio.generate(PROMPT, seeds=range(1, 4), batch_size=2, **QUICK)).astype(int)
    assert np.abs(single - batch).max() <= 2  # of 255
    assert np.abs(single - uneven).max() <= 2


def test_pictures_know_what_made_them(base, rex):
    counts: list[int] = []
    made = Composition(base, [(rex, 0.8)]).generate(
        PROMPT, seeds=[5, 6], negative_prompt="a dog", size=(48, 72), on_image=counts.append, **QUICK
    )
    assert counts == [1, 2]
    assert [picture.image.size for picture in made] == [(48, 72)] * 2
    assert [(p.prompt, p.seed, p.base, p.negative_prompt, p.steps, p.guidance) for p in made] == [
        (PROMPT, seed, "tiny", "a dog", 2, 2.0) for seed in (5, 6)
    ]
    assert made[0].adapters == ((rex.name, 0.8),)


# --- adapters ------------------------------------------------------------------------------------------------------


def test_several_adapters_are_the_exact_sum_of_their_changes(base, rex, ink):
    both = latents(Composition(base, [(rex, 0.8), (ink, -0.5)]))
    merged = latents(Composition(base, [(concatenated([(rex, 0.8), (ink, -0.5)]), 1.0)]))
    assert torch.allclose(both, merged, atol=1e-4)
    assert not torch.allclose(both, latents(Composition(base, [(rex, 0.8)])), atol=1e-2)


def test_the_weight_is_the_cards_own_unless_one_is_given(base, rex):
    soft = replace(rex, card=replace(rex.card, weight=0.4))
    weights = [weight.value for _, weight in Composition(base, [soft, (soft, 1.0), (soft, 0)]).adapters]
    assert weights == [0.4, 1.0, 0.0]
    assert torch.equal(latents(Composition(base, [soft])), latents(Composition(base, [(rex, 0.4)])))


def test_without_adapters_or_with_weight_0_it_is_the_base(base, rex):
    assert torch.equal(latents(Composition(base)), latents(Composition(base, [(rex, 0.0)])))
    assert not torch.equal(latents(Composition(base)), latents(Composition(base, [rex])))


# --- the pipeline afterwards ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_bare_pipeline_works_and_is_as_it_was_afterwards(kind):
    pipeline = pipelines.make_pipeline(kind)
    before = pipelines.state(pipeline)
    adapter = pipelines.random_adapter(BaseModel.from_pipeline(pipeline), LoraSpec(rank=2, text_encoder=True))
    names = [name for name, _ in pipeline.unet.named_modules()]
    made = Composition(pipeline, [adapter]).generate(PROMPT, seeds=[1], **QUICK)
    assert made[0].image.size == (64, 64)
    assert pipelines.same_state(before, pipelines.state(pipeline))
    assert [name for name, _ in pipeline.unet.named_modules()] == names
    assert not getattr(pipeline, "_progress_bar_config", {}).get("disable")


def test_the_pipeline_is_as_it_was_after_an_exception(base, rex, ink):
    before = pipelines.state(base.pipeline)

    def stop(done: int) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        Composition(base, [rex, ink]).generate(PROMPT, seeds=[1, 2], on_image=stop, **QUICK)
    assert pipelines.same_state(before, pipelines.state(base.pipeline))
    assert not getattr(base.pipeline, "_progress_bar_config", {}).get("disable")


def test_a_misfit_is_told_before_anything_is_changed(base, rex):
    other = BaseModel.from_pipeline(pipelines.make_pipeline("sd2"), name="other")
    before = pipelines.state(other.pipeline)
    with pytest.raises(AdapterBaseMismatch, match="was made for tiny"):
        Composition(other, [rex]).generate(PROMPT, seeds=[1], **QUICK)
    assert pipelines.same_state(before, pipelines.state(other.pipeline))


# --- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        ({"seeds": []}, "no seeds"),
        ({"seeds": [-1]}, "seed -1"),
        ({"seeds": [2**64]}, "seed 18446744073709551616"),
        ({"steps": 0}, "steps 0"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"guidance": -1.0}, "guidance -1.0"),
        ({"guidance": math.nan}, "guidance nan"),
        ({"size": 0}, "size 0"),
        ({"size": 65}, "size 65: .* multiples of 8; pass 64 or 72 .usual for it: 64, 64x96, 96x64"),
        ({"size": (66, 104)}, "size 66x104: .* pass 64x104 or 72x104"),
        ({"size": (64, 64, 64)}, "size .64, 64, 64."),
        ({"size": "64 by 96"}, "size '64 by 96' cannot be read"),
        ({"size": 10**6}, "size 1000000"),
    ],
)
def test_settings_out_of_range_are_told(base, settings, words):
    with pytest.raises(SettingsError, match=words):
        Composition(base).generate(PROMPT, **settings)


@pytest.mark.parametrize(
    ("size", "note"),
    [
        (None, None),
        ((64, 96), None),
        ((48, 64), None),
        (40, "was not made for size 40: details get lost in pictures this small .usual for it: 64,"),
        ((96, 96), "was not made for size 96: subjects repeat in pictures this large"),
        ((40, 104), "was not made for size 40x104: subjects repeat in pictures this elongated"),
    ],
)
def test_a_size_that_the_base_was_not_made_for_is_drawn_with_a_note(base, size, note):
    studio = Composition(base)
    notes = [text for text in studio.preflight(PROMPT, size=size).warnings if "size" in text]
    assert len(notes) == (note is not None) and (note is None or re.search(note, notes[0]))
    with pytest.warns(CompositionWarning, match=note) if note else nullcontext():
        [picture] = studio.generate(PROMPT, steps=1, size=size)
    assert picture.image.size == (sides(size) or (64, 64))


def test_the_usual_sizes_are_the_familys(base):
    assert usual_sizes(base) == [(64, 64), (64, 96), (96, 64)]
    large = BaseModel.from_pipeline(pipelines.make_pipeline("sdxl"))
    large.unet.register_to_config(sample_size=128)
    assert usual_sizes(large) == list(large.family.sizes) and (832, 1216) in large.family.sizes
    assert not [size for size in large.family.sizes if size_note(large, size)]
    assert all(side % 64 == 0 for size in large.family.sizes for side in size)


@pytest.mark.parametrize("weight", [math.nan, math.inf])
def test_a_weight_is_a_finite_number(base, rex, weight):
    with pytest.raises(SettingsError, match="weight"):
        Composition(base, [(rex, weight)])


@pytest.mark.parametrize("adapters", ["one", "file", "pair", "files", "weighted file"])
def test_adapters_are_taken_for_what_they_plainly_are(base, rex, adapters, tmp_path):
    file = rex.save(tmp_path / "rex.safetensors")
    given = {"one": rex, "file": str(file), "pair": (rex, 0.5), "files": [file, str(file)], "weighted file": (file, 0.5)}
    studio = Composition(base, given[adapters])
    assert [adapter.card.token for adapter, _ in studio.adapters] == ["sks"] * (2 if adapters == "files" else 1)
    assert studio.adapters[0][1] == Weight(0.5 if "pair" in adapters or "weighted" in adapters else 1.0)


@pytest.mark.parametrize("adapters", [None, 3, [3], [None], {"a": 1}, [("rex", "much")], True])
def test_what_is_no_adapter_is_told(base, adapters, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(LoraBoothError):
        Composition(base, adapters)


def test_one_seed_is_one_picture(base):
    assert [picture.seed for picture in Composition(base).generate("a dog", seeds=5, **QUICK)] == [5]
    assert [picture.seed for picture in Composition(base).generate("a dog", seeds=np.arange(2), **QUICK)] == [0, 1]


@pytest.mark.parametrize("settings", [{"guidance": 1e308}, {"seeds": ["1"]}, {"seeds": None}, {"steps": 2.5}, {"prompt": 3}])
def test_absurd_settings_are_told(base, settings):
    with pytest.raises(SettingsError):
        Composition(base).generate(**{"prompt": "a dog"} | QUICK | settings)


def test_an_absurd_weight_is_told(base, rex):
    for weight in (1e308, -101, math.nan):
        with pytest.raises(SettingsError):
            Composition(base, [(rex, weight)])
        with pytest.raises(SettingsError):
            Weight(blocks={"mid": weight})


def test_a_black_picture_is_an_error():
    base = BaseModel.from_pipeline(pipelines.make_pipeline("sd1"))
    with torch.no_grad():
        base.vae.decoder.conv_out.bias.fill_(-1e9)
    with pytest.raises(SettingsError, match="came out black: numbers beyond float32; lower the guidance or the weights"):
        Composition(base).generate("a dog", **QUICK)


# --- what is probably not meant ------------------------------------------------------------------------------------


def remarks(studio: Composition, prompt: str) -> list[str]:
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        studio.generate(prompt, **QUICK)
    found = [str(one.message) for one in told if issubclass(one.category, CompositionWarning)]
    assert found == list(studio.preflight(prompt).warnings)
    return found


def test_a_prompt_without_the_token_is_told(base, rex, ink):
    studio = Composition(base, [rex, ink])  # ink has no token
    assert remarks(studio, "a dog") == ["the prompt does not name 'sks dog'; add it, or you get any dog"]
    for prompt in ("sks dog", "a photo of SKS", "a red sks dog, do"):
        assert remarks(studio, prompt) == []
    assert remarks(Composition(base, [(rex, 0.0), ink]), "a dog") == []
    region = Region(rex, box=(0, 0, 0.5, 1), prompt="sks dog")
    assert remarks(Composition(base, regions=[region]), "a dog") == []
    assert remarks(Composition(base, regions=[replace(region, prompt="a dog")]), "sks dog") != []


@pytest.mark.parametrize(
    ("words", "remedy"),
    [
        ("<lora:x:.8>", "pass the adapter's file"),
        ("<lyco:my style:1>", "pass the adapter's file"),
        ("(sks:1.4)", "weights need pip install"),
        ("(a dog :0.5)", "weights need pip install"),
        ("((dog))", "weights need pip install"),
        ("[dog|do]", "do not change between steps"),
        ("[dog:do:0.5]", "do not change between steps"),
    ],
)
def test_the_syntax_of_other_programs_is_told(base, rex, words, remedy, monkeypatch):
    monkeypatch.setattr(composition, "compel_version", lambda: None)
    [told] = [text for text in Composition(base, rex).remarks(f"sks dog {words}") if "plain words" in text]
    assert told.startswith(repr(words)) and remedy in told
    assert Composition(base, rex).remarks("sks dog (a do) 3:2") == []


# --- saved pictures ------------------------------------------------------------------------------------------------

SECRETS = Picture(
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (40, 56, 3), dtype=np.uint8)),
    "secretprompt of anna",
    271828,
    (("secretadapter", 0.5),),
    "secretbase",
    "secretnegative",
    20,
    4.0,
)


@pytest.mark.parametrize(("name", "kind"), [("p.png", "PNG"), ("p.jpg", "JPEG"), ("p.JPEG", "JPEG"), ("p.webp", "WEBP")])
def test_a_saved_picture_bears_the_mark_and_tells_nothing_else(tmp_path, name, kind):
    path = SECRETS.save(tmp_path / "secretfolder" / f"secret{name}")
    content = path.read_bytes()
    assert b"http://cv.iptc.org/newscodes/digitalsourcetype/trainedAlgorithmicMedia" in content
    for word in (b"secret", b"anna", b"271828", str(tmp_path).encode(), b"lora_booth"):
        assert word not in content.lower()
    with Image.open(path) as read:
        assert (read.format, read.size) == (kind, (56, 40))
        assert b"trainedAlgorithmicMedia" in read.info["xmp"]  # where a reader of XMP finds it
        if kind == "PNG":
            assert np.array_equal(np.asarray(read), np.asarray(SECRETS.image))


def test_a_picture_is_saved_as_what_its_name_says(tmp_path):
    assert SECRETS.save(str(tmp_path / "p.png")) == Path(tmp_path / "p.png")
    with pytest.raises(SettingsError, match=r"\.png, \.jpg or \.webp"):
        SECRETS.save(tmp_path / "new" / "p.gif")
    assert not (tmp_path / "new").exists()


# --- before the first step -----------------------------------------------------------------------------------------


def named(adapter: Adapter, token: str | None, noun: str | None) -> Adapter:
    return replace(adapter, card=replace(adapter.card, token=token, class_noun=noun))


def test_a_preflight_says_what_will_clash_and_what_it_costs(base, rex, ink):
    dog, owl, other = named(rex, "sks", "dog"), named(ink, "zwx", "owl"), named(ink, "sks", "owl")
    style = named(ink, None, None)
    alone = Composition(base, [dog, style]).preflight("a photo of sks dog")
    assert alone.warnings == () and 'method "sum"' in alone.recommended
    assert "does not name 'sks dog'" in str(Composition(base, [dog]).preflight("a dog"))
    two = Composition(base, [dog, owl], method="sum").preflight("sks dog and zwx owl")
    assert "in a sum, 2 subjects change each other" in two.warnings[0] and "regions" in two.recommended
    assert [(o.first, o.second) for o in two.overlaps] == [("sks", "zwx")]
    assert "share the token 'sks'" in Composition(base, [dog, other]).preflight("sks").warnings[0]
    twins = Composition(base, [dog, named(ink, "zwx", "dog")], method="sum").preflight("sks dog and zwx dog")
    assert "are both a dog" in twins.warnings[0]
    places = [Region(dog, box=(0, 0, 0.5, 1)), Region(owl, box=(0.5, 0, 1, 0.5))]
    assert Composition(base, regions=places).preflight().method == "regions"
    auto = Composition(base, [dog, owl], regions="auto").preflight("sks dog and zwx owl")
    assert auto.warnings == () and auto.recommended.startswith("draw it")


@pytest.mark.parametrize(
    ("prompt", "told"),
    [
        ("sks dog on a hill by a lake", "shorten it to have all"),
        ("on a hill by a lake, a sks dog", "move 'sks dog' forward"),
        ("a photo of sks dog", None),
    ],
)
def test_a_prompt_that_is_cut_is_told(base, rex, prompt, told, caplog, monkeypatch):
    """The tiny base reads 14 letters or words that it knows."""
    monkeypatch.setattr(composition, "compel_version", lambda: None)
    studio = Composition(base, [named(rex, "sks", "dog")])
    found = [text for text in studio.preflight(prompt).warnings if "does not read the end" in text]
    assert len(found) == (told is not None) and (told is None or told in found[0])
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        studio.generate(prompt, steps=1, size=48)
        studio.generate("sks dog", negative_prompt=prompt, steps=1, size=48)
    assert [str(note.message) for note in caught if "does not read the end" in str(note.message)] == found * 2
    assert not [text for text in caplog.messages if "indexing errors" in text or "truncated" in text]


def test_a_preflight_says_that_the_base_is_another(base, rex):
    moved = replace(rex, card=replace(rex.card, base_hash="0" * 16))
    assert "other weights of the same shapes" in Composition(base, [moved]).preflight("sks dog").warnings[0]
    stranger = pipelines.random_adapter(BaseModel.from_pipeline(pipelines.make_pipeline("sdxl"), name="large"))
    found = Composition(base, [rex, stranger]).preflight("sks dog", trial=True)
    assert "was made for large" in found.refused[0] and found.overlaps == () and found.seconds is None
    assert "cannot be attached: sks was made for large" in str(found) and "recommended" not in str(found)


def test_regions_are_found_at_any_size(base, rex, monkeypatch):
    """The coarsest layers are read however large they are; where none can be read, that is said."""
    studio = Composition(base, [named(rex, "sks", "dog")], regions="auto")
    monkeypatch.setattr(attention_maps, "MOST_PIXELS", 1)
    monkeypatch.setattr(attention_maps, "COARSE", 4)
    [found] = studio.find_regions(PROMPT, seed=1, steps=4, negative_prompt="a cat", size="48x64")
    assert found.mask.size == (6, 8)
    monkeypatch.setattr(attention_maps, "COARSE", 64)
    with pytest.raises(SettingsError, match="no attention could be read.*pass regions="):
        studio.find_regions(PROMPT, steps=4)


def test_a_trial_measures_time(base, rex):
    found = Composition(base, [rex]).preflight("sks dog", steps=8, trial=True)
    assert found.seconds is not None and found.seconds > 0 and "s a picture" in str(found)


@pytest.mark.slow
def test_several_subjects_get_regions_of_their_own_unless_told_otherwise(base, rex, ink):
    dog, owl, style = named(rex, "sks", "dog"), named(ink, "zwx", "owl"), named(ink, None, None)
    chosen, asked = Composition(base, [dog, owl, style]), Composition(base, [dog, owl, style], regions="auto")
    prompt = "sks dog and zwx owl"
    assert chosen.method == "regions"
    pictures = [studio.generate(prompt, **QUICK)[0].image for studio in (chosen, asked)]
    assert pictures[0].tobytes() == pictures[1].tobytes()
    for studio in (Composition(base, [dog, style]), Composition(base, [dog, (owl, 0.0)]), Composition(base, [style, style])):
        assert studio.method == "sum"
    # a prompt without any of them has nobody to keep apart
    plain = Composition(base, [dog, owl, style], method="sum")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CompositionWarning)
        expected = plain.generate("a tree", **QUICK)[0].image
        assert chosen.generate("a tree", **QUICK)[0].image.tobytes() == expected.tobytes()
        with pytest.raises(SettingsError, match="names none of 'sks', 'zwx'"):
            asked.generate("a tree", **QUICK)


def test_blending_two_subjects_warns_once_per_call(base, rex, ink):
    studio = Composition(base, [named(rex, "sks", "dog"), named(ink, "zwx", "owl")], method="sum")
    with pytest.warns(CompositionWarning, match="regions, which separate them"):
        studio.generate("sks dog and zwx owl", **QUICK)
