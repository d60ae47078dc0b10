"""Serving: adapters that come and go on one pipeline, and requests with different ones in one batch."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pipelines
import pytest
import torch

from lora_booth.adapters.adapter import Adapter
from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import quiet
from lora_booth.config import LoraSpec
from lora_booth.errors import AdapterBaseMismatch, CompositionWarning, SettingsError
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.serving import Request, Serving

PROMPT = "sks dog"


@pytest.fixture(params=["sd1", "sdxl"])
def base(request) -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline(request.param), name="tiny")


def three(base: BaseModel) -> dict[str, Adapter]:
    made = {}
    for seed, name in enumerate(("rex", "bob", "ink")):
        lora = LoraSpec(rank=2 + seed, text_encoder=seed == 2)
        adapter = pipelines.random_adapter(base, lora, seed=seed)
        made[name] = replace(adapter, card=replace(adapter.card, token=None, title=name))
    return made


def latents(pipeline) -> torch.Tensor:
    with quiet(pipeline):
        generator = torch.Generator().manual_seed(1)
        return pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="latent").images


def alone(base: BaseModel, adapters: list[tuple[Adapter, float]]) -> torch.Tensor:
    with Composition(base, adapters).attached(PROMPT) as pipeline:
        return latents(pipeline)


@pytest.mark.slow
def test_what_is_used_is_what_is_active(base):
    before = pipelines.state(base.pipeline)
    flags = [p.requires_grad for p in base.unet.parameters()]
    adapters = three(base)
    plain, rex = latents(base.pipeline), alone(base, [(adapters["rex"], 0.8)])
    with Serving(base) as live:
        for name, adapter in adapters.items():
            live.load(name, adapter)
        assert torch.equal(latents(live.pipeline), plain)  # nothing loaded is active unless asked for
        live.use({"rex": 0.8})
        assert torch.equal(latents(live.pipeline), rex)
        live.use({"bob": 1.0, "ink": 0.5})
        both = alone_elsewhere(base, [(adapters["bob"], 1.0), (adapters["ink"], 0.5)])
        assert torch.allclose(latents(live.pipeline), both, atol=1e-5)
        live.use({})
        assert torch.equal(latents(live.pipeline), plain)
    assert pipelines.same_state(before, pipelines.state(base.pipeline))
    assert [p.requires_grad for p in base.unet.parameters()] == flags


def alone_elsewhere(base: BaseModel, adapters: list[tuple[Adapter, float]]) -> torch.Tensor:
    """On a pipeline with the same weights."""
    return alone(BaseModel.from_pipeline(pipelines.make_pipeline("sdxl" if base.family.time_ids else "sd1")), adapters)


@pytest.mark.slow
@pytest.mark.parametrize("order", [["rex", "bob", "ink"], ["ink", "bob", "rex"], ["bob", "rex", "ink"]])
def test_adapters_can_go_in_any_order(base, order):
    before = pipelines.state(base.pipeline)
    flags = [p.requires_grad for p in base.unet.parameters()]
    adapters = three(base)
    with Serving(base) as live:
        for name, adapter in adapters.items():
            live.load(name, adapter)
        left = list(adapters)
        for name in order:
            live.unload(name)
            left.remove(name)
            for other in left:
                live.use({other: 1.0})
                wanted = alone_elsewhere(base, [(adapters[other], 1.0)])
                assert torch.allclose(latents(live.pipeline), wanted, atol=1e-5)
    assert pipelines.same_state(before, pipelines.state(base.pipeline))
    assert [p.requires_grad for p in base.unet.parameters()] == flags


@pytest.mark.slow
def test_requests_in_one_batch_are_what_each_would_be_alone(base):
    adapters = three(base)
    requests = [
        Request("sks dog", {"rex": 1.0}, seed=1),
        Request("dog", {}, seed=2),
        Request("do", {"bob": 0.5, "ink": 1.0}, seed=3, negative_prompt="a cat"),
    ]
    with Serving(base) as live:
        for name, adapter in adapters.items():
            live.load(name, adapter)
        live.use({"bob": 0.3})
        held = latents(live.pipeline)
        together = live.generate(requests, steps=3, guidance=3.0, size=(56, 72))
        assert torch.equal(latents(live.pipeline), held)  # what was in use still is
        apart = [live.generate([request], steps=3, guidance=3.0, size="56x72")[0] for request in requests]
    for request, a, b in zip(requests, together, apart, strict=True):
        assert np.abs(np.asarray(a.image).astype(int) - np.asarray(b.image).astype(int)).max() <= 2  # of 255
        named = [(adapters[name], weight) for name, weight in request.adapters.items()]
        options = {
            "seeds": [request.seed],
            "steps": 3,
            "guidance": 3.0,
            "size": (56, 72),
            "negative_prompt": request.negative_prompt,
        }
        [stock] = Composition(base, named).generate(request.prompt, **options)
        assert np.abs(np.asarray(a.image).astype(int) - np.asarray(stock.image).astype(int)).max() <= 2
        assert (a.prompt, a.seed, dict(a.adapters)) == (request.prompt, request.seed, dict(request.adapters))


def test_a_prompt_that_is_cut_is_told(base):
    with Serving(base) as live, pytest.warns(CompositionWarning, match="does not read the end of a prompt this long"):
        live.generate([Request("a dog far away on the moon")], steps=1, size=48)


def test_weights_of_words_are_not_read_and_a_note_says_so(base):
    with Serving(base) as live, pytest.warns(CompositionWarning, match=r"'\(a do:1.2\)' is read as plain words; weights need"):
        live.generate([Request("a do", negative_prompt="(a do:1.2)")], steps=1, size=48)


def test_mistakes_are_named(base):
    adapters = three(base)
    other = BaseModel.from_pipeline(pipelines.make_pipeline("sd2"))
    before = pipelines.state(base.pipeline)
    with Serving(base) as live:
        live.load("rex", adapters["rex"])
        with pytest.raises(SettingsError, match="already loaded"):
            live.load("rex", adapters["rex"])
        with pytest.raises(SettingsError, match="'bob' is not loaded; load it first .loaded: rex."):
            live.use({"bob": 1.0})
        with pytest.raises(SettingsError, match="weights {'rex': nan}; needed"):
            live.use({"rex": float("nan")})
        with pytest.raises(SettingsError, match="no requests"):
            live.generate([])
        with pytest.raises(AdapterBaseMismatch):
            live.load("other", pipelines.random_adapter(other))
        with pytest.raises(SettingsError, match="'bob' is not loaded"):
            live.unload("bob")
    assert pipelines.same_state(before, pipelines.state(base.pipeline))
