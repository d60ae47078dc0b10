"""Prodigy and schedule-free: the packages' own updates, resumed to the bit, and the right weights in the file."""

from __future__ import annotations

from contextlib import closing
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import base_of

from lora_booth.adapters.adapter import Adapter
from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec, TrainingConfig, settled
from lora_booth.errors import MissingExtraError, SettingsError, TrainingError
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training.encoding import prepare
from lora_booth.training.latents import LatentCache
from lora_booth.training.progress import Step
from lora_booth.training.training_run import TrainingRun

prodigyopt = pytest.importorskip("prodigyopt")
schedulefree = pytest.importorskip("schedulefree")

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(
    steps=6, prior_loss_weight=0.0, warmup_steps=2, checkpoint_every=1, attention="sdpa", learning_rate=1e-3
)
PRODIGY = replace(CONFIG, optimizer="prodigy", learning_rate=None)
SCHEDULE_FREE = replace(CONFIG, optimizer="schedulefree")
BOTH = pytest.mark.parametrize("config", [PRODIGY, SCHEDULE_FREE], ids=["prodigy", "schedulefree"])


class Interrupted(Exception):
    pass


@pytest.fixture(scope="module")
def prepared(rex: Subject) -> tuple[BaseModel, LatentCache]:
    base = base_of("sd1")
    return base, prepare(base, rex, config=CONFIG)


def stock(config: TrainingConfig, parameters: list[torch.nn.Parameter]) -> Any:
    if config.optimizer == "prodigy":
        return prodigyopt.Prodigy(parameters, weight_decay=0.01, use_bias_correction=True, safeguard_warmup=True)
    return schedulefree.AdamWScheduleFree(parameters, lr=1e-3, weight_decay=0.01, warmup_steps=2)


@BOTH
def test_updates_are_those_of_the_package(config: TrainingConfig, prepared: tuple[BaseModel, LatentCache]) -> None:
    """On a copy of the factors, one tensor each, with the same gradients; and what it would draw with."""
    base, cache = prepared
    with closing(TrainingRun(base, cache, LORA, settled(config, base, 3))) as run:
        copies = {name: torch.nn.Parameter(p.detach().clone()) for name, p in run.lora.parameters.items()}
        other = stock(config, list(copies.values()))
        if config.optimizer == "schedulefree":
            other.train()
        ours, update = run.loop.optimizer, run.loop.optimizer.step

        def stepped() -> None:
            for name, copy in copies.items():
                copy.grad = run.lora.parameters[name].grad.clone()  # type: ignore[union-attr]
            if config.optimizer == "prodigy":
                other.param_groups[0]["lr"] = ours.param_groups[0]["lr"]
            other.step()
            update()

        ours.step = stepped  # type: ignore[assignment, method-assign]
        for step in run:
            done = step
            for name, copy in copies.items():
                assert torch.allclose(run.lora.parameters[name], copy, rtol=1e-4, atol=1e-7)
        if config.optimizer == "schedulefree":
            other.eval()
        learnt = {f"{key}.{name}": getattr(f, name) for key, f in done.factors().items() for name in ("down", "up")}
        for name, copy in copies.items():
            assert torch.allclose(learnt[name], copy, rtol=1e-4, atol=1e-7)
        if config.optimizer == "prodigy":
            assert done.learning_rate == pytest.approx(ours.param_groups[0]["lr"] * ours.param_groups[0]["d"])
        else:  # it trains elsewhere than where it draws
            name = next(name for name in learnt if name.endswith(".up"))
            assert not torch.equal(learnt[name], run.lora.parameters[name])


@BOTH
@pytest.mark.parametrize("text", [False, True], ids=["unet", "text too"])
def test_a_state_goes_on_to_the_bit(config: TrainingConfig, text: bool, rex: Subject) -> None:
    base, lora = base_of("sd1"), replace(LORA, text_encoder=text)
    if text and config.optimizer == "schedulefree":
        config = replace(config, text_encoder_learning_rate=3e-4)
    cache, config = prepare(base, rex, lora=lora, config=config), settled(config, base, 3)
    states: dict[int, Any] = {}
    with closing(TrainingRun(base, cache, lora, config)) as run:
        for step in run:
            before = run.lora.flat.values.detach().clone()
            step.factors()
            states[step.index] = run.state()
            assert torch.equal(run.lora.flat.values, before)  # looking changes nothing
    for index in (1, 3):
        with closing(TrainingRun(base, cache, lora, config, resume=states[index])) as run:
            assert [step.index for step in run] == list(range(index + 1, 7))
            last = run.state()
        for part in ("lora", "average"):
            expected = states[6][part] or {}
            assert all(torch.equal(last[part][name], value) for name, value in expected.items())
        assert str(last["optimizer"]["param_groups"]) == str(states[6]["optimizer"]["param_groups"])


@pytest.mark.slow
@BOTH
def test_a_run_is_resumed_exactly_and_its_file_holds_what_it_draws_with(
    config: TrainingConfig, rex: Subject, tmp_path: Path
) -> None:
    config = replace(config, sample_every=2)
    seen: list[Any] = []

    def stop(step: Step) -> None:
        if step.index == 3:
            raise Interrupted

    def go(name: str, **options: Any) -> Adapter:
        return train(base_of("sd1"), rex, lora=LORA, config=config, out=tmp_path / name, progress=False, **options)

    whole = go("whole", on_step=lambda step: seen.append(step.factors()))
    assert whole.modules.keys() == seen[-1].keys()
    assert all(torch.equal(factors.up, seen[-1][key].up) for key, factors in whole.modules.items())
    sampled = Adapter.load(tmp_path / "whole" / "samples" / "000002.safetensors")
    assert all(torch.equal(factors.up, seen[1][key].up.half().float()) for key, factors in sampled.modules.items())
    with pytest.raises(Interrupted):
        go("run", on_step=stop)
    assert go("run").digest() == whole.digest()


def test_a_state_of_other_counters_is_refused(prepared: tuple[BaseModel, LatentCache]) -> None:
    base, cache = prepared
    config = settled(PRODIGY, base, 3)
    with closing(TrainingRun(base, cache, LORA, config)) as run:
        next(run)
        state = run.state()
    for spoilt in ({"d": "x"}, {"d": float("nan")}, {"k": None}):
        groups = [state["optimizer"]["param_groups"][0] | spoilt]
        with pytest.raises(TrainingError, match="the saved state does not fit this run"):
            TrainingRun(
                base, cache, LORA, config, resume={**state, "optimizer": {**state["optimizer"], "param_groups": groups}}
            )


def test_what_they_expect(monkeypatch: pytest.MonkeyPatch, rex: Subject) -> None:
    base = base_of("sd1")
    assert settled(PRODIGY, base, 3).learning_rate == 1 and settled(PRODIGY, base, 3).lr_schedule == "cosine"
    assert settled(SCHEDULE_FREE, base, 3).lr_schedule == "constant"
    with pytest.raises(SettingsError, match="learning_rate 1.0 is out of range; allowed: above 0, at most 0.1"):
        replace(CONFIG, learning_rate=1.0)
    with pytest.raises(SettingsError, match="learning_rate 3.0 .* at most 2; Prodigy expects 1"):
        replace(PRODIGY, learning_rate=3)
    both = replace(PRODIGY, text_encoder_learning_rate=0.5)
    with pytest.raises(
        SettingsError, match="Prodigy has one learning rate for everything; leave out text_encoder_learning_rate"
    ):
        train(base, rex, lora=replace(LORA, text_encoder=True), config=both, progress=False)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r'optimizer="prodigy" .*pip install .lora-booth\[optimizers\]'):
        train(base, rex, lora=LORA, config=PRODIGY, progress=False)
