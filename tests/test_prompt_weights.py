"""Weights of words and long prompts: the brackets, and compel's tensors against the stock pipelines'."""

from __future__ import annotations

import warnings
from typing import Any

import numpy as np
import pipelines
import pytest
import torch

from lora_booth.base.base_model import BaseModel
from lora_booth.base.prompt_weights import embedded, fragments
from lora_booth.config import LoraSpec
from lora_booth.errors import CompositionWarning
from lora_booth.pictures import composition
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.regions import Region

QUICK: dict[str, Any] = {"steps": 2, "guidance": 2.0}
LONG = "a dog, a cat, a owl, a cow, a hen"  # of 14 tokens, the tiny bases read the beginning


@pytest.fixture(params=["sd1", "sd2", "sdxl"])
def base(request: pytest.FixtureRequest) -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline(request.param), name="tiny")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        ("a red mug", [("a red mug", 1.0)]),
        ("a (red) mug", [("a (red) mug", 1.0)]),  # without a number or two brackets, they are text
        ("a (red:1.2) mug", [("a ", 1.0), ("red", 1.2), (" mug", 1.0)]),
        ("a ((red)) mug", [("a ", 1.0), ("red", 1.21), (" mug", 1.0)]),
        ("(a (red:1.5) mug:0.5)", [("a ", 0.5), ("red", 0.75), (" mug", 0.5)]),
        ("(red:1.2) [mug] (sea)", [("red", 1.2), ("mug", 1 / 1.1), ("sea", 1.1)]),
        (r"(red:1.2) \(mug\)", [("red", 1.2), (" (mug)", 1.0)]),
        ("(red:1.2) (mug", [("red", 1.2), (" (mug", 1.0)]),
        ("(red:1.2) mug)]", [("red", 1.2), (" mug)]", 1.0)]),
        ("(red:1.2) at 10:30", [("red", 1.2), (" at 10:30", 1.0)]),
        ("(red, blue: dark:.5)", [("red, blue: dark", 0.5)]),
        ("", [("", 1.0)]),
    ],
)
def test_brackets_stand_for_weights_as_in_other_programs(prompt: str, expected: list[tuple[str, float]]) -> None:
    found = fragments(prompt)
    assert [text for text, _ in found] == [text for text, _ in expected]
    assert [weight for _, weight in found] == pytest.approx([weight for _, weight in expected])


@pytest.mark.parametrize("negative", [None, "do"])
def test_without_weights_it_is_the_stock_pipelines_encoding(base: BaseModel, negative: str | None) -> None:
    pytest.importorskip("compel")
    with torch.no_grad():
        ours = embedded(base.pipeline, base.family, "a (sks:1.0) dog", negative, 2)
        stock = base.pipeline.encode_prompt(
            prompt="a sks dog",
            negative_prompt=negative,
            device="cpu",
            num_images_per_prompt=2,
            do_classifier_free_guidance=True,
        )
    assert len(ours) == len(stock)
    names = ("prompt_embeds", "negative_prompt_embeds", "pooled_prompt_embeds", "negative_pooled_prompt_embeds")
    for name, expected in zip(names, stock, strict=False):
        assert torch.allclose(ours[name], expected, atol=1e-5), name


def test_a_weight_scales_the_words_distance_from_an_empty_prompt(base: BaseModel) -> None:
    pytest.importorskip("compel")
    with torch.no_grad():
        plain, empty, heavy, light = (
            embedded(base.pipeline, base.family, prompt, None, 1)["prompt_embeds"]
            for prompt in ("a sks dog", "", "a (sks:1.5) dog", "a (sks:0.5) dog")
        )
    word = 2  # after the start and "a"
    assert torch.allclose(heavy[:, word], empty[:, word] + 1.5 * (plain - empty)[:, word], atol=1e-5)
    others = [i for i in range(plain.shape[1]) if i != word]
    assert torch.allclose(heavy[:, others], plain[:, others], atol=1e-5)
    assert not torch.allclose(light, plain, atol=1e-3)


@pytest.mark.slow
def test_long_and_weighted_prompts_are_drawn_to_their_end(base: BaseModel) -> None:
    pytest.importorskip("compel")
    studio = Composition(base, pipelines.random_adapter(base, LoraSpec(rank=2, text_encoder=True)))

    def drawn(prompt: str, **more: Any) -> np.ndarray:
        with warnings.catch_warnings():
            warnings.simplefilter("error", CompositionWarning)  # no note that the end is not read
            [picture] = studio.generate(f"sks dog, {prompt}", **QUICK, **more)
        return np.asarray(picture.image).astype(int)

    assert np.array_equal(drawn(LONG), drawn(LONG))
    assert not np.array_equal(drawn(LONG), drawn(LONG.replace("hen", "fox")))
    assert not np.array_equal(drawn("do", negative_prompt=LONG), drawn("do", negative_prompt=LONG.replace("hen", "fox")))
    assert not np.array_equal(drawn("(do:1.5)"), drawn("do"))
    assert np.abs(drawn("(do:1.0)") - drawn("do")).max() <= 2  # of 255


def test_where_they_are_read_as_text_a_note_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseModel.from_pipeline(pipelines.make_pipeline("sd1"), name="tiny")
    adapter = pipelines.random_adapter(base)
    places = Composition(base, regions=[Region(adapter, box=(0, 0, 0.5, 1))])
    monkeypatch.setattr(composition, "compel_version", lambda: "2.5.1")
    told = "'(sks dog:1.2)' is read as plain words; weights need pip install 'lora-booth[prompts]' and a composition without"
    assert any(note.startswith(told) for note in places.remarks("(sks dog:1.2)"))
    assert not any("plain words" in note for note in Composition(base, adapter).remarks("(sks dog:1.2)"))
    assert any("plain words" in note for note in Composition(base, adapter).remarks("(sks dog:1.2) [a|b]"))
    monkeypatch.setattr(composition, "compel_version", lambda: None)
    with pytest.warns(CompositionWarning, match="plain words; weights need pip install .lora-booth.prompts."):
        Composition(base, adapter).generate("(sks dog:1.2)", steps=1)
    long = [note for note in Composition(base, adapter).remarks(f"sks dog, {LONG}") if "does not read the end" in note]
    assert len(long) == 1 and long[0].endswith("shorten it to have all of it drawn, or pip install 'lora-booth[prompts]'")
