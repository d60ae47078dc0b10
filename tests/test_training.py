"""train(): real short trainings on tiny pipelines. The base comes back as it was, and equal calls give equal adapters."""

from __future__ import annotations

import importlib.util
import math
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict, replace
from itertools import groupby
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from ldm_naming import save_checkpoint
from PIL import Image
from pipelines import KINDS, base_of, make_pipeline, same_state, state

from lora_booth.adapters.adapter import Adapter
from lora_booth.base import generation
from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec, TrainingConfig, settled
from lora_booth.errors import MissingExtraError, SettingsError, TrainingError
from lora_booth.pictures.composition import Composition
from lora_booth.planning.planning import plan
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training.class_images import class_images
from lora_booth.training.encoding import prepare
from lora_booth.training.latents import Bucket, LatentCache, LatentSet, conditions, draw, rows
from lora_booth.training.loop import dreambooth_loss, learning_rate, predict
from lora_booth.training.progress import Lines, Step
from lora_booth.training.samples import SAMPLE_STEPS
from lora_booth.training.training_run import training_steps

LORA = LoraSpec(rank=2)
ALONE = TrainingConfig(steps=4, prior_loss_weight=0.0, warmup_steps=0)  # without class images
WITH_PRIOR = TrainingConfig(steps=4, class_images=2, warmup_steps=0)
BY_PREDICTIONS = TrainingConfig(steps=4, class_images=0, warmup_steps=0)


class Interrupted(Exception):
    pass


def run(base: BaseModel, subject: Any, config: TrainingConfig, lora: LoraSpec = LORA, **options: Any) -> Adapter:
    return train(base, subject, lora=lora, config=config, progress=False, **options)


def interrupt_at(index: int) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        if step.index == index:
            raise Interrupted

    return on_step


def left_as_it_was(base: BaseModel) -> Any:
    parts = (*base.components.values(), base.vae)
    flags = [(n, p.requires_grad, p.grad is None, p.dtype) for part in parts for n, p in part.named_parameters()]
    modes = [(n, type(m), m.training) for part in parts for n, m in part.named_modules()]
    return flags, modes, base.unet.is_gradient_checkpointing, {n: type(p) for n, p in base.unet.attn_processors.items()}


# --- every base ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_every_kind_loaded_every_way(
    kind: str, rex: Subject, folders: dict[str, Path], hub: Callable[[str, Path], str], tmp_path: Path
) -> None:
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    file = save_checkpoint(make_pipeline(kind), tmp_path / "one.safetensors")
    bases = {
        "tiny": base_of(kind),
        f"tiny-{kind}": BaseModel.load(folders[kind], **options),
        "some-one/tiny": BaseModel.load(hub("some-one/tiny", folders[kind]), **options),
        "one": BaseModel.load(file, config=folders[kind], **options),
    }
    learnt = []
    for name, base in bases.items():
        before, weights = left_as_it_was(base), state(base.pipeline)
        adapter = run(base, rex, ALONE)
        assert same_state(state(base.pipeline), weights) and left_as_it_was(base) == before
        assert any(factors.up.any() for factors in adapter.modules.values())
        card = adapter.card
        assert (card.base_model, card.family, card.prediction_type) == (name, base.family.name, base.prediction_type)
        assert (card.base_hash, card.resolution, card.steps, card.photos) == (base.fingerprint, 64, 4, 3)
        assert (card.rank, card.token, card.class_noun) == (2, "sks", "dog")
        learnt.append(torch.cat([adapter.modules[key].delta().flatten() for key in sorted(adapter.modules)]))
    for one in learnt:  # the same weights learn the same, wherever they came from, but for rounding
        assert (one - learnt[0]).norm() <= 0.01 * learnt[0].norm()


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_with_prior_and_text_encoders(kind: str, rex: Subject) -> None:
    base = base_of(kind)
    before, weights = left_as_it_was(base), state(base.pipeline)
    changed = []

    def on_step(step: Step) -> None:
        changed.append({key for key, factors in step.factors().items() if factors.up.any()})

    adapter = run(base, rex, WITH_PRIOR, replace(LORA, text_encoder=True), on_step=on_step)
    assert same_state(state(base.pipeline), weights) and left_as_it_was(base) == before
    assert changed[0] == set(adapter.modules)  # a gradient reached every module at the first step
    assert {key.partition(".")[0] for key in adapter.modules} == set(base.components)


@pytest.mark.slow
@pytest.mark.parametrize("error", [Interrupted, KeyboardInterrupt])
def test_base_is_as_it_was_after_an_exception(error: type[BaseException], rex: Subject, tmp_path: Path) -> None:
    base = base_of("sdxl")
    before, weights = left_as_it_was(base), state(base.pipeline)

    def on_step(step: Step) -> None:
        if step.index == 2:
            raise error

    config = replace(ALONE, gradient_checkpointing=True)
    with pytest.raises(error):
        run(base, rex, config, replace(LORA, text_encoder=True, dropout=0.1), on_step=on_step, out=tmp_path / "run")
    assert same_state(state(base.pipeline), weights) and left_as_it_was(base) == before


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_base_and_full_precision_adapter(dtype: torch.dtype, rex: Subject) -> None:
    base = base_of("sd1", dtype)
    seen = []

    def on_step(step: Step) -> None:
        parameters = step.lora.parameters.values()
        seen.append({p.dtype for p in parameters} | {p.grad.dtype for p in parameters if p.grad is not None})
        assert all(p.grad is not None for p in parameters)

    adapter = run(base, rex, replace(WITH_PRIOR, steps=2), on_step=on_step)
    assert seen == [{torch.float32}] * 2 and base.dtype == dtype
    assert {t.dtype for f in adapter.modules.values() for t in (f.down, f.up)} == {torch.float32}


# --- learning ------------------------------------------------------------------------------------------------------


@torch.no_grad()
def fixed_loss(base: BaseModel, cache: LatentCache) -> float:
    """Mean loss on 16 draws that are never trained on."""
    total = 0.0
    for i in range(16):
        batch = draw(cache, seed=99, step=10_000 + i, batch_size=2)
        text = conditions(base, cache.text, batch.prompts)
        total += dreambooth_loss(base, batch, predict(base, batch, text), prior_loss_weight=0.0).item() / 16
    return total


@pytest.mark.slow
def test_the_loss_goes_down(rex: Subject) -> None:
    base = base_of("sd1")
    config = replace(ALONE, steps=60, learning_rate=1e-2, batch_size=2)
    cache = prepare(base, [rex], lora=LORA, config=config)
    start = fixed_loss(base, cache)
    losses = []
    for step in training_steps(base, cache, lora=replace(LORA, rank=8), config=config):
        losses.append(step.loss)
        if step.index == 60:
            end = fixed_loss(base, cache)
    assert end < 0.95 * start
    assert sum(losses[-10:]) < sum(losses[:10])
    assert fixed_loss(base, cache) == start  # the base itself has learnt nothing


def test_by_hand_and_stopped_early(rex: Subject) -> None:
    base = base_of("sd1")
    before = left_as_it_was(base)
    cache = prepare(base, [rex], lora=LORA, config=ALONE)
    for step in training_steps(base, cache, lora=LORA, config=ALONE):
        if step.index == 2:
            break
    early = step.factors()
    del step
    assert left_as_it_was(base) == before
    seen = {}
    whole = run(base, rex, ALONE, on_step=lambda s: seen.setdefault(s.index, s.factors()))
    assert list(seen) == [1, 2, 3, 4]
    assert early.keys() == whole.modules.keys()
    assert all(torch.equal(early[key].up, seen[2][key].up) for key in early)
    assert all(torch.equal(whole.modules[key].up, seen[4][key].up) for key in early)


@pytest.mark.slow
def test_nothing_is_encoded_or_decoded_in_the_loop(rex: Subject) -> None:
    for kind in ("sd1", "sdxl"):
        base = base_of(kind)
        cache = prepare(base, [rex], lora=LORA, config=WITH_PRIOR)
        calls: list[Any] = []
        parts = [base.vae.encoder, base.vae.decoder, *base.text_encoders.values()]
        hooks = [part.register_forward_hook(lambda *_: calls.append(1)) for part in parts]  # noqa: B023
        assert len(list(training_steps(base, cache, lora=LORA, config=WITH_PRIOR))) == 4
        assert not calls
        base.encode_text(["a dog"])
        assert calls  # the hooks do count
        for hook in hooks:
            hook.remove()


@pytest.mark.slow
def test_gradient_checkpointing_changes_nothing(rex: Subject) -> None:
    for kind in ("sd1", "sdxl"):
        plain = run(base_of(kind), rex, ALONE)
        saving = run(base_of(kind), rex, replace(ALONE, gradient_checkpointing=True))
        for key, factors in plain.modules.items():
            # Adam's first updates are about the gradient's sign, which makes rounding visible
            difference = (factors.delta() - saving.modules[key].delta()).norm()
            assert difference <= 1e-3 * factors.delta().norm(), key


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_batch_in_parts_is_the_same_batch(kind: str, rex: Subject) -> None:
    """Photos and class images one at a time through the U-Net: the same loss and gradients, in less memory."""
    found = []
    for size in (None, 1, 3):
        base = base_of(kind)
        config = replace(WITH_PRIOR, batch_size=2, steps=1, pictures_at_a_time=size)
        cache = prepare(base, [rex], lora=LORA, config=config)
        steps = training_steps(base, cache, lora=LORA, config=config)
        step = next(steps)
        found.append((step.loss, {n: p.grad.clone() for n, p in step.lora.parameters.items() if p.grad is not None}))
        steps.close()
    for loss, gradients in found[1:]:
        assert math.isclose(loss, found[0][0], rel_tol=1e-5)
        for name, gradient in found[0][1].items():
            assert torch.allclose(gradients[name], gradient, atol=1e-6 + 1e-4 * float(gradient.abs().max())), name


def test_gradient_accumulation(rex: Subject) -> None:
    base = base_of("sd1")
    config = replace(ALONE, gradient_accumulation=3, steps=2)
    cache = prepare(base, [rex], lora=LORA, config=config)
    expected = []
    with torch.no_grad():
        for i in range(3):
            batch = draw(cache, seed=0, step=i, batch_size=1)
            text = conditions(base, cache.text, batch.prompts)
            expected.append(dreambooth_loss(base, batch, predict(base, batch, text), prior_loss_weight=0.0).item())
    steps = list(training_steps(base, cache, lora=LORA, config=config))
    assert [step.index for step in steps] == [1, 2]
    assert math.isclose(steps[0].loss, sum(expected) / 3, rel_tol=1e-5)  # up = 0: the base's own loss


def test_rates(rex: Subject) -> None:
    config = TrainingConfig(steps=10, learning_rate=1e-3, warmup_steps=4)
    rates = [learning_rate(config, i) for i in range(10)]
    assert rates[:4] == pytest.approx([0.25e-3, 0.5e-3, 0.75e-3, 1e-3])
    assert rates[4:] == pytest.approx([1e-3 * 0.5 * (1 + math.cos(math.pi * i / 6)) for i in range(6)])
    constant = replace(config, lr_schedule="constant")
    assert [learning_rate(constant, i) for i in range(4, 10)] == [1e-3] * 6
    base = base_of("sd1")
    cache = prepare(base, [rex], lora=LORA, config=ALONE)
    config = replace(config, prior_loss_weight=0.0)
    assert [s.learning_rate for s in training_steps(base, cache, lora=LORA, config=config)] == pytest.approx(rates)


def test_defaults_depend_on_photos_and_base() -> None:
    base = base_of("sd1")
    few, many = settled(TrainingConfig(), base, 3), settled(TrainingConfig(), base, 30)
    assert None not in (few.steps, few.learning_rate, few.warmup_steps, few.class_images, few.resolution)
    assert few.steps is not None and many.steps is not None and few.steps < many.steps
    assert few.resolution == 64
    given = TrainingConfig(
        lr_schedule="cosine", steps=7, learning_rate=2e-4, warmup_steps=0, class_images=5, resolution=32, sample_every=3
    )
    assert asdict(settled(given, base, 3)) == asdict(given)
    with pytest.raises(SettingsError, match="multiples of 8"):
        settled(TrainingConfig(resolution=60), base, 3)


def test_settings_take_the_type_that_they_plainly_mean() -> None:
    lora = LoraSpec(rank=np.int64(4), alpha=8, target_modules="to_q", text_target_modules=["q_proj"])  # type: ignore[arg-type]
    assert lora == LoraSpec(4, 8.0, target_modules=("to_q",), text_target_modules=("q_proj",))
    config = TrainingConfig(steps=10.0, resolution=512.0, seed=3.0, sample_prompt=["a", "b"])  # type: ignore[arg-type]
    assert (config.steps, config.resolution, config.seed, config.sample_prompt) == (10, 512, 3, ("a", "b"))
    assert all(type(value) is int for value in (lora.rank, config.steps, config.resolution, config.seed))
    assert type(lora.alpha) is float and TrainingConfig(max_grad_norm=math.inf).max_grad_norm == math.inf


@pytest.mark.parametrize(
    ("kind", "settings", "message"),
    [
        (LoraSpec, {"rank": "4"}, "rank '4'; needed: a whole number"),
        (LoraSpec, {"rank": 4.5}, "rank 4.5; needed: a whole number"),
        (LoraSpec, {"rank": 10**5000}, "rank with thousands of digits; needed: a whole number"),
        (LoraSpec, {"alpha": math.nan}, "alpha nan; needed: a number or None"),
        (LoraSpec, {"dropout": None}, "dropout None; needed: a number"),
        (LoraSpec, {"text_encoder": 1}, "text_encoder 1; needed: True or False"),
        (LoraSpec, {"target_modules": ["to_q", 3]}, r"target_modules \['to_q', 3\]; needed: a tuple of strings"),
        (LoraSpec, {"text_encoder": True, "text_target_modules": ()}, r"text_target_modules \(\) is out of range"),
        (TrainingConfig, {"learning_rate": "1e-4"}, "learning_rate '1e-4'; needed: a number or None"),
        (TrainingConfig, {"learning_rate": 10**400}, "learning_rate 1000"),
        (TrainingConfig, {"steps": True}, "steps True; needed: a whole number or None"),
        (TrainingConfig, {"steps": 10**400}, "steps 1000"),
        (TrainingConfig, {"steps": math.inf}, "steps inf"),
        (TrainingConfig, {"seed": None}, "seed None; needed: a whole number"),
        (TrainingConfig, {"seed": -1}, "seed -1 is out of range; allowed: 0 to"),
        (TrainingConfig, {"weight_decay": math.nan}, "weight_decay nan; needed: a number"),
        (TrainingConfig, {"weight_decay": -0.1}, "weight_decay -0.1 is out of range"),
        (TrainingConfig, {"max_grad_norm": "inf"}, "max_grad_norm 'inf'; needed: a number"),
        (TrainingConfig, {"prior_loss_weight": math.inf}, "prior_loss_weight inf is out of range"),
        (TrainingConfig, {"class_images": -1}, "class_images -1 is out of range; allowed: at least 0"),
        (TrainingConfig, {"lr_schedule": "linear"}, "lr_schedule 'linear'; needed: 'constant' or 'cosine'"),
        (TrainingConfig, {"attention": None}, "attention None; needed: 'sdpa' or"),
        (TrainingConfig, {"sample_prompt": ("a", 3)}, "sample_prompt .*; needed: a string or a tuple of strings or None"),
        (TrainingConfig, {"sample_size": "wide"}, "sample_size 'wide' cannot be read; write a side like 768"),
        (TrainingConfig, {"sample_size": (512, 0)}, "sample_size 512x0 is out of range"),
        (TrainingConfig, {"flip": np.ones(100_000)}, r"flip array\(.{,80}; needed: True or False"),
    ],
)
def test_settings_of_another_type_are_refused_at_construction(kind: Any, settings: dict[str, Any], message: str) -> None:
    with pytest.raises(SettingsError, match=message):
        kind(**settings)


@pytest.mark.parametrize(("steps", "every", "expected"), [(400, None, 133), (99, None, 0), (400, 0, 0), (99, 10, 10)])
def test_samples_are_drawn_by_default_where_they_are_cheap(steps: int, every: int | None, expected: int) -> None:
    assert settled(TrainingConfig(steps=steps, sample_every=every), base_of("sd1"), 3).sample_every == expected
    with pytest.raises(SettingsError, match="at least 0"):
        TrainingConfig(sample_every=-1)


def test_a_sample_size_is_checked_before_training(rex: Subject, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(
        SettingsError, match="^sample_size 60x64: this base draws sides that are multiples of 8; pass 56x64 or 64 "
    ):
        train(base_of("sd1"), rex, config=TrainingConfig(steps=1, sample_size=(60, 64)))
    train(base_of("sd1"), rex, config=replace(ALONE, steps=1, sample_size=32))
    assert "note: tiny was not made for size 32: details get lost" in capsys.readouterr().err


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_token_that_no_text_encoder_tells_from_an_article_is_reported(
    kind: str, rex: Subject, capsys: pytest.CaptureFixture[str]
) -> None:
    base = base_of(kind)

    def said(subject: Subject) -> str:
        train(base, subject, config=replace(ALONE, steps=1))
        return capsys.readouterr().err

    for encoder, words in zip(base.text_encoders.values(), base.tokenizers, strict=True):
        assert "next to nothing" not in said(rex)  # as long as one of them can tell
        sks, a = words.convert_tokens_to_ids(["sks</w>", "a</w>"])
        table = encoder.get_input_embeddings().weight.data
        table[sks] = table[a]
    remedy = 'templates="a photo of a {token} {class_noun}"'
    told = said(rex)
    assert "note: sks: it says next to nothing to the text encoder: it takes the prompt 0.00 times as far" in told
    assert remedy in told  # this vocabulary has no rare token to propose
    assert "next to nothing" not in said(replace(rex, templates=("a photo of a {token} {class_noun}",)))


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_resolution_without_gradients_is_refused(kind: str, rex: Subject) -> None:
    base = base_of(kind)
    least = base.pixels_per_latent * (2 ** (len(base.unet.config.block_out_channels) - 1) + 1)
    for resolution in (8, least - base.pixels_per_latent, least + 1):
        with pytest.raises(
            SettingsError, match=f"resolution {resolution} is out of range; allowed: multiples of 8 from {least}"
        ):
            settled(TrainingConfig(resolution=resolution), base, 3)
    run(base, rex, replace(ALONE, steps=1, resolution=least))  # checks its first gradients


def test_a_seed_of_any_size_draws_class_images() -> None:
    for seed in (20_000_000_000_000, 2**63 - 1):
        [images] = class_images(base_of("sd1"), [("dog", (64, 64), 2)], seed=seed)
        assert len(images) == 2


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ({"base": 5}, "base 5; needed: BaseModel"),
        ({"subject": "photos"}, "'photos' is not a subject; pass one, e.g. Subject.from_folder"),
        ({"subject": Path("photos")}, "is not a subject; pass one"),
        ({"subject": None}, "None is not a subject"),
        ({"subject": ["photos"]}, "is not a subject"),
        ({"subject": []}, "no subject to train on"),
        ({"lora": {"rank": 4}}, "lora {'rank': 4}; needed: LoraSpec or None"),
        ({"config": LoraSpec()}, r"config LoraSpec\(.*; needed: TrainingConfig or None"),
        ({"out": 5}, "out 5; needed: a path"),
        ({"mirror": "x"}, "need a run folder; pass out="),
        ({"time_limit": "5"}, "time_limit '5'; needed: a number or None"),
        ({"time_limit": math.nan}, "time_limit nan; needed: a number or None"),
    ],
)
def test_arguments_of_another_kind_are_refused(words: dict[str, Any], message: str, rex: Subject) -> None:
    base = base_of("sd1")
    with pytest.raises(SettingsError, match=message):
        train(**{"base": base, "subject": rex, "config": ALONE, "progress": False} | words)
    if words.keys() & {"base", "subject", "config"}:
        with pytest.raises(SettingsError, match=message):
            prepare(**{"base": base, "subject": rex, "config": ALONE} | words)
    with pytest.raises(SettingsError, match="cache 'photos'; needed: LatentCache"):
        next(training_steps(base, "photos"))  # type: ignore[arg-type]


def test_a_base_may_be_named(rex: Subject, folders: dict[str, Path]) -> None:
    one = train(folders["sd1"], rex, lora=LORA, config=replace(ALONE, steps=1, resolution=64), progress=False)
    other = train(str(folders["sd1"]), (rex,), lora=LORA, config=replace(ALONE, steps=1, resolution=64), progress=False)
    assert one.digest() == other.digest()


def test_lines_say_the_start_and_the_time_left(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter(range(0, 1000, 4))
    monkeypatch.setattr("lora_booth.training.progress.time.monotonic", lambda: float(next(now)))
    lines = Lines()
    for done in range(0, 9, 2):
        lines.progress("class images", done, 8)
    lines.progress("encoding", 0, 11)
    assert capsys.readouterr().err.splitlines() == [
        *("class images 0/8", "class images 4/8  0:08 left", "class images 8/8  0:00 left"),
        "encoding 0/11",
    ]


# --- what is drawn -------------------------------------------------------------------------------------------------


def test_each_photo_once_before_any_twice() -> None:
    for batch_size in (1, 2, 3):
        order = [row for step in range(10) for row in rows(5, 3, step, batch_size)]
        for first in range(0, len(order) - 4, 5):
            assert sorted(order[first : first + 5]) == [0, 1, 2, 3, 4]
    orders = {tuple(rows(5, 3, step, 5)) for step in range(20)}
    assert len(orders) > 5


def test_a_batch_is_photos_then_class_images() -> None:
    def numbered(count: int, first: int) -> LatentSet:
        mean = torch.arange(first, first + count).float().view(1, count, 1, 1, 1).expand(1, count, 4, 2, 2)
        return LatentSet(mean, torch.zeros_like(mean), tuple(f"{first + i}" for i in range(count)), None)

    cache = LatentCache((Bucket(numbered(3, 0), numbered(4, 10)),), 0.5, {})
    seen = []
    for step in range(6):
        batch = draw(cache, seed=1, step=step, batch_size=2)
        noise, timesteps = batch.noise, batch.timesteps
        assert batch.photos == 2 and batch.latents.shape == noise.shape == (4, 4, 2, 2)
        assert timesteps.shape == (4,) and timesteps.dtype == torch.int64 and 0 <= timesteps.min() and timesteps.max() < 1000
        values = (batch.latents[:, 0, 0, 0] / 0.5).int().tolist()
        assert [str(value) for value in values] == list(batch.prompts)  # pictures and prompts stay together
        assert max(values[:2]) < 3 and min(values[2:]) >= 10
        seen.append((values, noise.sum().item()))
        again = draw(cache, seed=1, step=step, batch_size=2)
        assert torch.equal(again.noise, noise) and torch.equal(again.timesteps, timesteps)
    assert len({noise for _, noise in seen}) == 6


def test_by_predictions_a_batch_has_each_noisy_photo_again_by_its_class() -> None:
    mean = torch.arange(3.0).view(1, 3, 1, 1, 1).expand(1, 3, 4, 2, 2)
    weights, class_prompts = torch.zeros(1, 3, 1, 2, 2), ("a dog", "a cat", "an owl")
    photos = LatentSet(mean, torch.ones_like(mean), ("0", "1", "2"), torch.arange(18).view(3, 6), weights, class_prompts)
    cache = LatentCache((Bucket(photos),), 0.5, {})
    alone = LatentCache((Bucket(replace(photos, class_prompts=())),), 0.5, {})
    for step in range(4):
        batch = draw(cache, seed=1, step=step, batch_size=2)
        assert (batch.photos, batch.totals, len(batch)) == (2, (2, 2), 4)
        assert batch.time_ids is not None and batch.weights is not None
        for tensor in (batch.latents, batch.noise, batch.timesteps, batch.time_ids):
            assert torch.equal(tensor[:2], tensor[2:])
        assert batch.weights[:2].sum() == 0 and bool((batch.weights[2:] == 1).all())  # the whole picture is kept
        assert batch.prompts[2:] == batch.class_prompts == tuple(class_prompts[int(i)] for i in batch.prompts[:2])
        assert batch[1:3].class_prompts == batch.class_prompts[:1] and batch[:2].class_prompts == ()
        same = draw(alone, seed=1, step=step, batch_size=2)
        assert torch.equal(same.latents, batch.latents[:2]) and torch.equal(same.noise, batch.noise[:2])


def test_class_images_and_photos_by_their_class_take_turns() -> None:
    mean = torch.arange(4.0).view(1, 4, 1, 1, 1).expand(1, 4, 4, 2, 2)
    none, outside = torch.zeros_like(mean), torch.full((1, 4, 1, 2, 2), 2.0)
    photos = LatentSet(mean[:, :3], none[:, :3], ("p0", "p1", "p2"), None, None, ("c0", "c1", "c2"))
    beside = LatentSet(mean + 10, none, ("i0", "i1", "i2", "i3"), None, outside, ("b0", "b1", "b2", "b3"))
    cache = LatentCache((Bucket(photos, beside),), 1.0, {})
    drawn: list[str] = []
    for step in range(16):
        batch = draw(cache, seed=1, step=step, batch_size=1)
        photo, other = batch.prompts
        assert batch.weights is not None and batch.weights[:1].eq(1).all() and len(batch.class_prompts) == 1
        if step % 2 == 0:
            assert other == batch.class_prompts[0] == photo.replace("p", "c") and torch.equal(batch.noise[0], batch.noise[1])
            assert batch.weights[1:].eq(1).all()
        else:
            assert batch.class_prompts[0] == other.replace("i", "b") and not torch.equal(batch.noise[0], batch.noise[1])
            assert batch.weights[1:].eq(2).all() and f"i{int(batch.latents[1, 0, 0, 0]) - 10}" == other
            drawn.append(other)
    assert sorted(drawn[:4]) == sorted(drawn[4:]) == ["i0", "i1", "i2", "i3"]  # each once before any comes twice


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sdxl"])
def test_beside_the_subject_the_other_thing_is_kept(rex: Subject, kind: str) -> None:
    base = base_of(kind)
    cache = prepare(base, [replace(rex, class_noun="coffee mug")], lora=LORA, config=replace(WITH_PRIOR, class_images=5))
    [bucket] = cache.buckets
    kept = bucket.class_images
    assert kept is not None and kept.weights is not None and kept.weights.shape == (1, 5, 1, 8, 8)
    things = ["a cat", "a car", "a fish", "a dog", "a cat"]  # no mug beside a mug
    assert kept.prompts == tuple(f"a photo of sks coffee mug and {thing}" for thing in things)
    assert kept.class_prompts == tuple(f"a photo of a coffee mug and {thing}" for thing in things)
    assert {*kept.prompts, *kept.class_prompts, *bucket.photos.prompts, *bucket.photos.class_prompts} == set(cache.text)
    assert {*kept.class_prompts, *bucket.photos.class_prompts} == set(cache.class_text)
    for weights in kept.weights[0]:  # the place of the thing, and the rest, where nothing counts
        assert weights.min() == 0 < weights.max() and weights.mean() == pytest.approx(1)


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_the_class_can_be_kept_without_a_class_image(rex: Subject, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("lora_booth.training.class_images.class_images", None)  # not called
    base, config = base_of(kind), replace(BY_PREDICTIONS, batch_size=2, learning_rate=1e-2)
    (bucket,) = prepare(base, [rex], lora=LORA, config=config).buckets
    assert bucket.class_images is None and bucket.photos.class_prompts == ("a photo of a dog",) * 3
    kept = run(base, rex, config)
    for name, other in {
        "in two parts": replace(config, pictures_at_a_time=1),
        "stock layers": replace(config, lean=False),
        "checkpointed": replace(config, gradient_checkpointing=True),
    }.items():
        assert distance(kept, run(base, rex, other)) < 1e-4, name
    assert distance(kept, run(base, rex, replace(config, prior_loss_weight=0.0))) > 1e-3


def distance(one: Adapter, other: Adapter) -> float:
    """Of their changes of the base, relative to the first's."""
    deltas = [[f.up @ f.down for f in adapter.modules.values()] for adapter in (one, other)]
    return float(sum((a - b).norm() for a, b in zip(*deltas, strict=True)) / sum(a.norm() for a in deltas[0]))


def test_what_the_base_predicts_does_not_hang_on_a_text_encoder_in_training(rex: Subject) -> None:
    base, lora = base_of("sd1"), replace(LORA, text_encoder=True)
    before = base.encode_text(["a photo of a dog"]).states
    cache = prepare(base, [rex], lora=lora, config=BY_PREDICTIONS)
    assert cache.text == {} and torch.equal(cache.class_text["a photo of a dog"].states, before)
    assert run(base, rex, BY_PREDICTIONS, lora).card.steps == 4


def test_every_timestep_is_drawn() -> None:
    mean = torch.zeros(1, 1, 1, 1, 1)
    cache = LatentCache((Bucket(LatentSet(mean, mean, ("a dog",), None)),), 1.0, {})
    drawn = torch.cat([draw(cache, seed=0, step=i, batch_size=100).timesteps for i in range(200)])
    assert (drawn.min(), drawn.max()) == (0, 999)
    assert abs(drawn.float().mean().item() - 499.5) < 10 and len(drawn.unique()) == 1000


def test_flip_doubles_the_views(rex: Subject) -> None:
    base = base_of("sdxl")
    plain, flipped = (prepare(base, [rex], config=replace(ALONE, flip=flip)).buckets[0].photos for flip in (False, True))
    assert (plain.mean.shape, flipped.mean.shape) == ((1, 3, 4, 8, 8), (2, 3, 4, 8, 8))
    assert torch.equal(flipped.mean[0], plain.mean[0])
    assert not torch.allclose(flipped.mean[1], plain.mean[0])
    assert plain.time_ids is not None and plain.time_ids.shape == (3, 6)
    assert plain.time_ids[0].tolist()[:2] == [300, 260]  # height, width of the photo


@pytest.mark.slow
def test_several_subjects(rex: Subject, photos: Path) -> None:
    base = base_of("sd1")
    ink = Subject.from_folder(photos, token="ohwx", class_noun="cat")
    cache = prepare(base, [rex, ink], lora=LORA, config=WITH_PRIOR)
    (bucket,) = cache.buckets
    assert bucket.photos.prompts == ("a photo of sks dog",) * 3 + ("a photo of ohwx cat",) * 3
    assert bucket.class_images is not None
    assert bucket.class_images.class_prompts == tuple(
        f"a photo of {pair}" for pair in ("a dog and a cat", "a dog and a mug", "a cat and a mug", "a cat and a car")
    )
    assert bucket.photos.class_prompts == ("a photo of a dog",) * 3 + ("a photo of a cat",) * 3
    adapter = run(base, [rex, ink], WITH_PRIOR)
    assert adapter.card.photos == 6 and adapter.name == "sks dog and ohwx cat"
    with pytest.raises(SettingsError, match="no subject"):
        run(base, [], ALONE)


# --- the same again ------------------------------------------------------------------------------------------------

FULL = TrainingConfig(steps=6, class_images=2, gradient_accumulation=2, batch_size=2, flip=True, checkpoint_every=2)
DROPPED = LoraSpec(rank=2, dropout=0.3, text_encoder=True)

IN_ANOTHER_PROCESS = """
import sys
sys.path.insert(0, {tests!r})
import torch
torch.set_num_threads(1)
import test_training as t
rex = t.Subject.from_folder({photos!r}, token="sks", class_noun="dog")
print(t.run(t.base_of("sd1"), rex, t.FULL, t.DROPPED).digest())
"""


@pytest.mark.slow
def test_same_seed_same_adapter(rex: Subject, photos: Path) -> None:
    torch.manual_seed(1)
    first = run(base_of("sd1"), rex, FULL, DROPPED).digest()
    torch.manual_seed(2)  # the caller's random numbers do not matter, and are not used up
    after = torch.get_rng_state()
    assert run(base_of("sd1"), rex, FULL, DROPPED).digest() == first
    assert run(base_of("sd1"), rex, replace(FULL, seed=1), DROPPED).digest() != first
    torch.manual_seed(2)
    assert torch.equal(torch.get_rng_state(), after)
    code = IN_ANOTHER_PROCESS.format(tests=str(Path(__file__).parent), photos=str(photos))
    other = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert other.stdout.strip() == first, other.stderr[-2000:]


@pytest.mark.slow
@pytest.mark.parametrize(("lora", "stops"), [(LORA, (1, 4)), (DROPPED, (3,))], ids=["plain", "dropout"])
def test_resume_is_exact(lora: LoraSpec, stops: tuple[int, ...], rex: Subject, tmp_path: Path) -> None:
    whole = run(base_of("sd1"), rex, FULL, lora).digest()
    for index in stops:  # before the first checkpoint, on one, between two
        folder = tmp_path / f"run{index}"
        with pytest.raises(Interrupted):
            run(base_of("sd1"), rex, FULL, lora, out=folder, on_step=interrupt_at(index))
        assert not (folder / "adapter.safetensors").exists()
        seen: list[int] = []
        torch.manual_seed(index)
        again = run(base_of("sd1"), rex, FULL, lora, out=folder, on_step=lambda s: seen.append(s.index))  # noqa: B023
        assert again.digest() == whole
        assert seen == list(range(index // 2 * 2 + 1, 7))
    assert Adapter.load(folder / "adapter.safetensors").modules.keys() == again.modules.keys()
    steps: list[int] = []
    done = run(base_of("sd1"), rex, FULL, lora, out=folder, on_step=lambda s: steps.append(s.index))
    assert done.digest() == whole and not steps  # a finished run is not trained again


@pytest.mark.slow
def test_resume_with_other_settings_is_refused(rex: Subject, tmp_path: Path) -> None:
    config = replace(ALONE, checkpoint_every=1)
    with pytest.raises(Interrupted):
        run(base_of("sd1"), rex, config, out=tmp_path, on_step=interrupt_at(2))
    other = Subject(rex.photos[:2], "sks", "dog")
    changes: list[tuple[str, str, Subject, TrainingConfig, LoraSpec]] = [
        ("learning_rate [0-9.]+ -> 1e-05;", "sd1", rex, replace(config, learning_rate=1e-5), LORA),
        ("rank 2 -> 3;", "sd1", rex, config, LoraSpec(rank=3)),
        ("photos 3 -> 2;", "sd1", other, config, LORA),
        ("base tiny -> tiny .other weights.;", "sd2", rex, config, LORA),
    ]
    for said, kind, subject, changed, lora in changes:
        with pytest.raises(TrainingError, match=f"other .*{said}"):
            run(base_of(kind), subject, changed, lora, out=tmp_path)
    run(base_of("sd1"), rex, replace(config, checkpoint_every=3, sample_size=48), out=tmp_path)  # these change nothing


@pytest.mark.slow
def test_torn_checkpoints_are_passed_over(rex: Subject, tmp_path: Path) -> None:
    config = replace(ALONE, steps=5, checkpoint_every=1)
    whole = run(base_of("sd1"), rex, config).digest()
    folders = tmp_path / "run" / "checkpoints"

    def keep_and_stop(step: Step) -> None:
        shutil.copytree(folders / f"{step.index:06d}", tmp_path / "kept" / f"{step.index:06d}")
        if step.index == 3:
            raise Interrupted

    def continued() -> tuple[str, int]:
        seen: list[int] = []
        adapter = run(base_of("sd1"), rex, config, out=tmp_path / "run", on_step=lambda s: seen.append(s.index))
        shutil.rmtree(tmp_path / "run")
        return adapter.digest(), seen[0]

    with pytest.raises(Interrupted):
        run(base_of("sd1"), rex, config, out=tmp_path / "run", on_step=keep_and_stop)
    assert sorted(folder.name for folder in folders.iterdir()) == ["000002", "000003"]
    torn = (tmp_path / "kept" / "000003" / "state.pt").read_bytes()[:-100]
    (folders / "000003" / "state.pt").write_bytes(torn)
    assert continued() == (whole, 3)  # from the older one
    shutil.copytree(tmp_path / "kept" / "000003", folders / "000003")
    (folders / "000003" / "state.pt").write_bytes(torn)
    assert continued() == (whole, 1)  # from the beginning
    shutil.copytree(tmp_path / "kept" / "000003", folders / ".000003.1.tmp")  # a save that was cut off
    assert continued() == (whole, 1)


# --- what goes wrong -----------------------------------------------------------------------------------------------


def test_a_loss_that_is_not_finite_ends_the_training(rex: Subject) -> None:
    base = base_of("sd1")
    before, weights = left_as_it_was(base), state(base.pipeline)
    seen: list[int] = []

    def on_step(step: Step) -> None:
        seen.append(step.index)
        if step.index == 2:
            with torch.no_grad():
                next(iter(step.lora.parameters.values())).fill_(math.nan)

    with pytest.raises(TrainingError, match="not finite 3 times in a row, at step 5, with half the rate.*lower learning_rate"):
        run(base, rex, replace(ALONE, steps=10), on_step=on_step)
    assert seen == [1, 2, 3, 4] * 2
    assert same_state(state(base.pipeline), weights) and left_as_it_was(base) == before


def test_a_spoilt_state_is_rolled_back_and_the_rate_halved(rex: Subject) -> None:
    """Once: then the run goes on from its last good state and ends well."""
    base = base_of("sd1")
    seen: list[tuple[int, float]] = []

    def on_step(step: Step) -> None:
        seen.append((step.index, step.learning_rate))
        if len(seen) == 2:
            with torch.no_grad():
                next(iter(step.lora.parameters.values())).fill_(math.nan)

    config = replace(ALONE, steps=6, learning_rate=1e-3, lr_schedule="constant")
    adapter = run(base, rex, config, on_step=on_step)
    assert seen == [(i, 1e-3) for i in (1, 2, 3, 4)] + [(i, 5e-4) for i in (1, 2, 3, 4, 5, 6)]
    assert all(f.up.isfinite().all() and f.down.isfinite().all() for f in adapter.modules.values())


def test_one_step_that_is_not_finite_is_left_out(rex: Subject) -> None:
    base = base_of("sd1")
    cache = prepare(base, [rex], lora=LORA, config=ALONE)
    factors: dict[int, Any] = {}
    hook = None
    for step in training_steps(base, cache, lora=LORA, config=ALONE):
        factors[step.index] = step.factors()
        if step.index == 2:
            hook = base.unet.register_forward_hook(lambda _, __, output: type(output)(sample=output.sample * math.nan))
        elif hook is not None:
            hook.remove()
    key = next(iter(factors[2]))
    assert torch.equal(factors[2][key].up, factors[3][key].up)
    assert factors[4][key].up.isfinite().all() and not torch.equal(factors[3][key].up, factors[4][key].up)


def test_a_broken_base_is_told_at_the_first_step(rex: Subject) -> None:
    base = base_of("sd1")
    cache = prepare(base, [rex], lora=LORA, config=ALONE)
    photos = cache.buckets[0].photos
    broken = replace(cache, buckets=(Bucket(replace(photos, mean=photos.mean * math.inf)),))
    with pytest.raises(TrainingError, match="not finite"):
        list(training_steps(base, broken, lora=LORA, config=ALONE))
    with pytest.raises(TrainingError, match="not finite"):
        next(iter(training_steps(base, broken, lora=LORA, config=ALONE)))


@pytest.mark.parametrize(
    ("factor", "overflows", "message"),
    [
        (0.0, 0, "all gradients are zero at the first step"),
        (1.0, 100, "the first gradient of .* is not finite"),
        (1.0, 2, None),
    ],
)
def test_the_first_gradients_are_checked_under_a_scaler_too(
    factor: float, overflows: int, message: str | None, rex: Subject, monkeypatch: pytest.MonkeyPatch
) -> None:
    """float16 on a GPU such as a T4: gradients may overflow at first, but not be zero or never finite."""
    base, passes = base_of("sd1"), []
    cache = prepare(base, [rex], lora=LORA, config=ALONE)
    monkeypatch.setattr("lora_booth.training.training_run.make_scaler", lambda base: torch.amp.GradScaler("cpu"))

    def damaged(gradient: torch.Tensor) -> torch.Tensor:
        passes.append(1)
        return gradient * (math.inf if len(passes) <= overflows else factor)

    def watch(module: Any, inputs: Any, output: Any) -> None:
        output.sample.register_hook(damaged)

    hook = base.unet.register_forward_hook(watch)
    config = replace(ALONE, steps=30)
    try:
        if message is None:
            *_, last = training_steps(base, cache, lora=LORA, config=config)
            assert last.index == 30 and math.isfinite(last.loss)
        else:
            with pytest.raises(TrainingError, match=message):
                list(training_steps(base, cache, lora=LORA, config=config))
    finally:
        hook.remove()


def test_wrong_first_gradients_are_refused_every_time(rex: Subject, tmp_path: Path) -> None:
    """Nothing is saved of a first step whose gradients are wrong, so the next call checks them again."""
    for _ in range(2):
        base = base_of("sd1")
        layer = base.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q
        with pytest.raises(TrainingError, match="gradient .*; try another attention or"):
            original = layer.weight.data.clone()
            layer.weight.data.fill_(math.nan)
            try:
                run(base, rex, ALONE, out=tmp_path / "run")
            finally:
                layer.weight.data.copy_(original)
        assert not list((tmp_path / "run").glob("checkpoints/*"))


@pytest.mark.slow
def test_a_variant_of_a_planned_config_is_settled_again() -> None:
    base = base_of("sd1")
    first = settled(TrainingConfig(steps=7), base, 3)
    assert settled(first, base, 3) == first
    again = settled(replace(TrainingConfig(**vars(first)), steps=None, resolution=None, learning_rate=None), base, 3)
    assert None not in (again.steps, again.resolution, again.learning_rate)
    with pytest.raises(SettingsError, match="resolution 65"):
        settled(replace(first, resolution=65), base, 3)
    assert type(plan(base, photos=3, config=TrainingConfig(resolution=64)).config) is TrainingConfig


def test_memory_that_runs_out_in_the_update_is_no_reason_to_climb(rex: Subject, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only drawing, forward and backward pass may be done again: an update could be half done."""
    base = base_of("sd1")
    cache = prepare(base, rex, lora=LORA, config=ALONE)

    def no_memory(*_: Any) -> None:
        raise torch.OutOfMemoryError("out of memory")

    monkeypatch.setattr("lora_booth.training.loop.step_if_finite", no_memory)
    with pytest.raises(torch.OutOfMemoryError):
        list(training_steps(base, cache, lora=LORA, config=ALONE))


@pytest.mark.skipif(importlib.util.find_spec("xformers") is not None, reason="xformers is installed")
def test_xformers_missing(rex: Subject) -> None:
    base = base_of("sd1")
    before = left_as_it_was(base)
    with pytest.raises(MissingExtraError, match=r"lora-booth\[xformers\]"):
        run(base, rex, replace(ALONE, attention="xformers"))
    assert left_as_it_was(base) == before


# --- pictures ------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_samples_are_drawn_with_what_is_learnt_so_far(rex: Subject, tmp_path: Path) -> None:
    base = base_of("sd1")
    config = replace(ALONE, sample_every=2, learning_rate=1e-2, seed=5, sample_size=(48, 72))
    lora = replace(LORA, dropout=0.5)
    learnt = {}
    final = run(base, rex, config, lora, out=tmp_path, on_step=lambda s: learnt.setdefault(s.index, s.factors()))
    assert sorted(path.name for path in (tmp_path / "samples").iterdir()) == [
        *("000000-1.png", "000000-2.png", "000000.png", "000002-1.png", "000002-2.png", "000002.png", "000002.safetensors"),
        *("000004-1.png", "000004-2.png", "000004.png", "samples.jsonl"),  # the last adapter is the run's own
    ]
    assert run(base, rex, replace(config, sample_every=None), lora).digest() == final.digest()
    pictures = []
    for index in (2, 4):
        adapter = Adapter(learnt[index], final.card)
        studio = Composition(base, [adapter])
        expected = studio.generate("a photo of sks dog", seeds=[5], size="48x72", steps=SAMPLE_STEPS)[0].image
        pictures.append(np.asarray(Image.open(tmp_path / "samples" / f"{index:06d}.png")).astype(int))
        assert np.abs(pictures[-1] - np.asarray(expected)).max() <= 1
    assert (pictures[0] != pictures[1]).any()


@pytest.mark.slow
@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_a_caption_that_is_cut_keeps_its_subject_and_is_told(
    kind: str, rex: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    """Also where everything comes from the cache. The encoders of the tiny bases read 14 letters or words they know."""
    monkeypatch.setenv("LORA_BOOTH_CACHE", str(tmp_path))
    captions = ["sks dog far away on the moon", "far away on the moon, a sks dog", "the moon over dog town", "a dog"]
    photos = [replace(rex.photos[0], caption=caption) for caption in captions]
    subject = replace(rex, photos=tuple(photos))
    expected = [captions[0], f"sks dog, {captions[1]}", "sks dog, the moon over sks dog town", "a sks dog"]
    expected[2] = expected[2] if base_of(kind).cut_off("the moon over sks") else "the moon over sks dog town"

    for _ in range(2):
        lines: list[str] = []
        config = TrainingConfig(steps=1, prior_loss_weight=0.0)
        cache = prepare(base_of(kind), subject, config=config, say=lines.append)
        assert list(cache.buckets[0].photos.prompts) == expected
        cut = [n for n, prompt in enumerate(expected, 1) if base_of(kind).cut_off(prompt)]
        said = [line for line in lines if "does not read the end" in line]
        assert [line.split(":")[0] for line in said] == [f"photo {n}" for n in cut] and len(cut) >= 2
        assert not any(word in line for line in said for word in ("moon", "sks", photos[0].name))  # nothing private
    with pytest.warns(UserWarning, match="does not read the end"):
        prepare(base_of(kind), replace(subject, photos=(photos[1],)), config=config)
    lines = []
    config = TrainingConfig(steps=1, class_images=1, prior_loss_weight=1.0)
    plain = replace(subject, photos=rex.photos[:1], class_template="far away on the moon, {a} {class_noun}")
    prepare(base_of(kind), plain, config=config, say=lines.append)
    assert [line for line in lines if line.startswith("class prompt: the text encoder does not read the end")]
    assert not [text for text in caplog.messages if "indexing errors" in text or "truncated" in text]


@pytest.mark.slow
def test_class_images_are_kept(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BOOTH_CACHE", str(tmp_path))
    base = base_of("sd1")
    drawn: list[int] = []
    base.vae.decoder.register_forward_hook(lambda _, inputs, __: drawn.append(len(inputs[0])))
    reported: list[tuple[int, int]] = []

    def made(count: int, noun: str = "dog", **options: Any) -> list[Any]:
        drawn.clear()
        [images] = class_images(base, [(noun, (64, 64), count)], **options)
        return [np.asarray(one.image).astype(int) for one in images]

    first = made(2, on_progress=lambda done, total: reported.append((done, total)))
    assert sum(drawn) == 2 and reported == [(0, 2), (1, 2), (2, 2)]  # beside one thing, and another
    assert (first[0] != first[1]).any() and first[0].shape == (64, 64, 3)
    assert all((a == b).all() for a, b in zip(made(2), first, strict=True)) and not drawn
    longer = made(3)
    assert sum(drawn) == 1 and all((a == b).all() for a, b in zip(longer, first, strict=False))
    assert len(made(1)) == 1 and not drawn
    file = sorted((tmp_path / "class_images").rglob("*.safetensors"))[1]
    file.write_bytes(file.read_bytes()[:200])
    again = made(3)
    assert sum(drawn) == 1 and all(np.abs(a - b).max() <= 1 for a, b in zip(again, longer, strict=True))
    assert not list(tmp_path.rglob("*.tmp"))
    for other in ({"noun": "cat"}, {"seed": 1}):
        assert (made(2, **other)[0] != first[0]).any() and sum(drawn) == 2


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_memory_is_given_back_between_the_unet_and_the_vae(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pipeline, order = make_pipeline(kind), []
    pipeline.unet.register_forward_hook(lambda *_: order.append("unet"))
    pipeline.vae.decoder.register_forward_hook(lambda *_: order.append("vae"))
    monkeypatch.setattr(generation, "return_to_system", lambda: order.append("room"))
    generation.generate_images(pipeline, "a dog", [1, 2], steps=3, size=64)
    assert [name for name, _ in groupby(order)] == ["unet", "room", "vae"] * 2


class Censor(torch.nn.Module):
    """A safety checker that blacks out the first pictures it sees, as diffusers' own does."""

    def __init__(self, black: int) -> None:
        super().__init__()
        self.black, self.weight = black, torch.nn.Parameter(torch.zeros(1))
        self.device, self.dtype = self.weight.device, self.weight.dtype

    def forward(self, clip_input: Any, images: np.ndarray) -> tuple[np.ndarray, list[bool]]:
        flags = []
        for image in images:
            flags.append(self.black > 0)
            if self.black > 0:
                image[...], self.black = 0, self.black - 1
        return images, flags


@pytest.mark.slow
@pytest.mark.parametrize("black", [3, 1000])
def test_a_blacked_out_class_image_is_not_learnt(black: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from transformers import CLIPImageProcessor

    monkeypatch.setenv("LORA_BOOTH_CACHE", str(tmp_path))
    base = base_of("sd1")
    base.pipeline.safety_checker = Censor(black)
    base.pipeline.feature_extractor = CLIPImageProcessor()
    if black == 1000:
        with pytest.raises(TrainingError, match="stay black.*another class noun"):
            class_images(base, [("dog", (64, 64), 2)])
        assert not list((tmp_path / "class_images").rglob("*.*"))
        return
    [images] = class_images(base, [("dog", (64, 64), 3)])
    assert all(one.image.getbbox() is not None for one in images)
    assert len({one.image.tobytes() for one in images}) == 3


@pytest.mark.slow
def test_class_images_are_reused_by_training(rex: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("LORA_BOOTH_CACHE", str(tmp_path))
    base = base_of("sd1")
    drawn: list[int] = []
    base.vae.decoder.register_forward_hook(lambda *_: drawn.append(1))
    first = run(base, rex, WITH_PRIOR)
    assert drawn
    drawn.clear()
    assert run(base, rex, WITH_PRIOR).digest() == first.digest() and not drawn
