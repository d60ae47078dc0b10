"""train_many(): each of several subjects in the same passes learns what it learns alone, whatever happens to the others."""

from __future__ import annotations

import json
import shutil
import signal
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from pipelines import base_of, same_state, state

import lora_booth.runs.one
import lora_booth.training.together
import lora_booth.training.training_run
from lora_booth.adapters.adapter import Adapter
from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import PhotoError, SettingsError, TrainingError
from lora_booth.kernels.lora import LoraLinears, LoraPiece
from lora_booth.runs.many import Adapters, train_many
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training.checkpoint import ADAPTER, read_record
from lora_booth.training.latents import LatentCache, rows
from lora_booth.training.remote import mirror_at

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(steps=5, prior_loss_weight=0.0, warmup_steps=0, learning_rate=1e-3)
# relative difference: where a gradient is all but zero rounding decides its sign, which Adam's first steps follow
CLOSE = 5e-4
HALF = 1e-3  # the same of an adapter that is read from its file, in half precision


@pytest.fixture
def subjects(tmp_path: Path) -> dict[str, Subject]:
    """Of two to four photos; the third one is another kind of thing."""
    found, rng = {}, np.random.default_rng(0)
    for count, name, noun in ((2, "rex", "dog"), (3, "bob", "dog"), (4, "brew", "d")):
        folder = tmp_path / "photos" / name
        folder.mkdir(parents=True)
        for i in range(count):
            blocks = rng.integers(0, 255, (8, 8, 3), dtype=np.uint8).repeat(10, 0).repeat(10, 1)
            Image.fromarray(blocks).save(folder / f"{i}.png")
        found[name] = Subject.from_folder(folder, token="sks", class_noun=noun, minimum=1)
    return found


def many(base: BaseModel, subjects: dict[str, Subject], config: TrainingConfig = CONFIG, **options: Any) -> Any:
    return train_many(base, subjects, **{"lora": LORA, "config": config, "together": 3, "progress": False, **options})


def alone(base: BaseModel, subject: Subject, config: TrainingConfig = CONFIG, **options: Any) -> Adapter:
    return train(base, subject, **{"lora": LORA, "config": config, "progress": False, **options})


def difference(a: Adapter, b: Adapter) -> float:
    """Of the changes of all layers, relative to those of a."""
    assert a.modules.keys() == b.modules.keys()
    changes = [torch.cat([one.modules[key].delta().flatten() for key in a.modules]) for one in (a, b)]
    return float((changes[0] - changes[1]).norm() / changes[0].norm())


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many subjects each pass had."""
    counts = []
    stock = lora_booth.training.together.backward_together

    def counted(adapter: Any, states: Any, inputs: Any) -> Any:
        counts.append(len(states))
        return stock(adapter, states, inputs)

    monkeypatch.setattr(lora_booth.training.together, "backward_together", counted)
    return counts


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "changes"),
    [
        ("sd1", {"class_images": 2, "prior_loss_weight": 0.7, "min_snr_gamma": 5.0}),
        ("sd2-v", {"class_images": 0, "prior_loss_weight": 1.0, "gradient_accumulation": 2}),
        ("sdxl", {"class_images": 2, "prior_loss_weight": 1.0, "batch_size": 2, "pictures_at_a_time": 3}),
        ("sdxl", {"flip": True, "gradient_checkpointing": True, "max_grad_norm": 1e-3, "lr_schedule": "constant"}),
    ],
)
def test_each_learns_what_it_learns_alone(
    kind: str, changes: dict[str, Any], subjects: dict[str, Subject], passes: list[int]
) -> None:
    base, config = base_of(kind), replace(CONFIG, **changes)
    before = state(base.pipeline)
    expected = {name: alone(base, subject, config) for name, subject in subjects.items()}
    adapters, errors = many(base, subjects, config)
    assert not errors and list(adapters) == list(subjects) and set(passes) == {3}
    for name, adapter in adapters.items():
        assert difference(expected[name], adapter) <= CLOSE and adapter.card == expected[name].card
        assert all(difference(expected[other], adapter) > 100 * CLOSE for other in subjects if other != name)
    assert same_state(state(base.pipeline), before)
    assert not any(hasattr(module, "lora_A") for module in base.unet.modules())


@pytest.mark.slow
def test_after_fifty_steps(subjects: dict[str, Subject]) -> None:
    base, config = base_of("sdxl"), replace(CONFIG, steps=50, learning_rate=1e-4)
    adapters, _ = many(base, subjects, config)
    assert all(difference(alone(base, subject, config), adapters[name]) <= CLOSE for name, subject in subjects.items())


@pytest.mark.slow
def test_more_subjects_than_share_a_pass(subjects: dict[str, Subject], passes: list[int]) -> None:
    base = base_of("sd1")
    adapters, errors = many(base, subjects, replace(CONFIG, class_images=2, prior_loss_weight=1.0), together=2)
    assert not errors and passes == [2] * 5 + [1] * 5
    one_by_one, _ = many(base, subjects, replace(CONFIG, class_images=2, prior_loss_weight=1.0), together=1)
    assert all(difference(one_by_one[name], adapter) <= CLOSE for name, adapter in adapters.items())


@pytest.mark.slow
def test_photos_of_other_sizes_share_no_pass(subjects: dict[str, Subject], tmp_path: Path, passes: list[int]) -> None:
    wide = tmp_path / "wide"
    wide.mkdir()
    Image.fromarray(np.random.default_rng(1).integers(0, 255, (64, 180, 3), dtype=np.uint8)).save(wide / "0.png")
    subjects["wide"] = Subject.from_folder(wide, token="sks", class_noun="dog", minimum=1)
    base, config = base_of("sd1"), replace(CONFIG, shape="buckets")
    adapters, errors = many(base, subjects, config, together=4)
    assert not errors and passes == [3, 1] * 5
    assert all(difference(alone(base, subject, config), adapters[name]) <= CLOSE for name, subject in subjects.items())


# --- what goes wrong with one ----------------------------------------------------------------------------------------


def spoil(monkeypatch: pytest.MonkeyPatch, subject: Subject, good: tuple[int, ...]) -> None:
    """Make all latents of this subject nan, but for those of the `good` photos."""
    stock = lora_booth.runs.one.prepare

    def prepare(base: BaseModel, subjects: list[Subject], **options: Any) -> LatentCache:
        cache = stock(base, subjects, **options)
        if subjects[0] is subject:
            photos = cache.buckets[0].photos.mean
            photos[:, [i for i in range(photos.shape[1]) if i not in good]] = torch.nan
        return cache

    monkeypatch.setattr(lora_booth.runs.one, "prepare", prepare)


@pytest.mark.slow
def test_updates_that_are_not_finite_are_skipped_in_one_subject(
    subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch
) -> None:
    base, first = base_of("sd1"), rows(2, 0, 0, 1)[0]
    spoil(monkeypatch, subjects["rex"], (first,))  # each second update of this subject
    expected = {name: alone(base, subject) for name, subject in subjects.items()}
    adapters, errors = many(base, subjects)
    assert not errors and all(difference(expected[name], adapter) <= CLOSE for name, adapter in adapters.items())


@pytest.mark.slow
def test_one_that_diverges_rolls_back_and_ends_while_others_go_on(
    subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path, passes: list[int]
) -> None:
    base, first = base_of("sd1"), rows(4, 0, 0, 1)[0]
    expected = {name: alone(base, subject) for name, subject in subjects.items()}
    spoil(monkeypatch, subjects["brew"], (first,))  # three updates in a row, and again after the roll-back
    with pytest.raises(TrainingError) as reason:
        alone(base, subjects["brew"], out=tmp_path / "alone")
    adapters, errors = many(base, subjects, out=tmp_path / "runs")
    assert str(errors["brew"]) == str(reason.value) and list(adapters) == ["rex", "bob"]
    assert all(difference(expected[name], adapter) <= HALF for name, adapter in adapters.items())
    records = [json.loads((tmp_path / run / "run.json").read_text()) for run in ("alone", "runs/brew")]
    said, said_together = ([event["what"] for event in record["events"]] for record in records)
    assert len(said) > 3 and said == said_together
    assert [one["status"] for one in records] == ["stopped by an error"] * 2
    assert set(passes) == {1, 3}  # the others were done before it


def test_photos_that_are_gone_end_one_subject_only(subjects: dict[str, Subject], tmp_path: Path) -> None:
    subjects["bob"].photos[0].path.unlink()
    subjects["brew"].photos[0].path.write_bytes(b"no picture")
    adapters, errors = many(base_of("sd1"), subjects, replace(CONFIG, steps=1), out=tmp_path / "runs")
    assert list(adapters) == ["rex"] and list(errors) == ["bob", "brew"]
    assert all(isinstance(error, PhotoError) for error in errors.values())


@pytest.mark.slow
def test_less_memory_than_thought(subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch) -> None:
    base = base_of("sd1")
    stock = lora_booth.training.together.backward_together
    most = 2

    def limited(adapter: Any, states: Any, inputs: Any) -> Any:
        losses = stock(adapter, states, inputs)  # memory may run out at the end
        if len(states) > most:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return losses

    monkeypatch.setattr(lora_booth.training.together, "backward_together", limited)
    adapters, errors = many(base, subjects)
    assert not errors
    assert all(difference(alone(base, subject), adapters[name]) <= CLOSE for name, subject in subjects.items())
    most = 0
    adapters, errors = many(base, subjects)
    assert not adapters and all("pass together=1" in str(error) for error in errors.values())


# --- runs ------------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_signal_saves_all_and_the_same_call_goes_on(
    subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    base, config = base_of("sd1"), replace(CONFIG, class_images=2, prior_loss_weight=1.0)
    expected = {name: alone(base, subject, config) for name, subject in subjects.items()}
    asked, calls = lora_booth.runs.stopping.Stopping.asked, 0

    def asked_until(stopping: lora_booth.runs.stopping.Stopping, *, copying: float) -> int:
        nonlocal calls
        calls += 1
        if calls == 5:
            signal.raise_signal(signal.SIGTERM)
        return asked(stopping, copying=copying)

    with monkeypatch.context() as patch, pytest.raises(SystemExit) as end:
        patch.setattr(lora_booth.runs.stopping.Stopping, "asked", asked_until)
        many(base, subjects, config, out=tmp_path)
    assert end.value.code == 128 + signal.SIGTERM
    saved = [json.loads((tmp_path / name / "run.json").read_text()) for name in subjects]
    assert [(one["step"], one["status"]) for one in saved] == [(n, "stopped by SIGTERM") for n in (3, 2, 2)]
    early, errors = many(base, subjects, config, out=tmp_path, time_limit=1e-9)
    assert not errors and [adapter.card.steps for adapter in early.values()] == [4, 3, 3]
    adapters, errors = many(base, subjects, config, out=tmp_path)
    assert not errors and all(difference(expected[name], adapter) <= HALF for name, adapter in adapters.items())
    assert all(adapter.card == expected[name].card and adapter.stem == name for name, adapter in adapters.items())
    assert adapters["rex"] is not adapters["rex"]  # read when asked for, not held
    again, _ = many(base, subjects, config, out=tmp_path)  # finished
    assert [adapter.digest() for adapter in again.values()] == [adapter.digest() for adapter in adapters.values()]
    for name, subject in subjects.items():
        finished = alone(base, subject, config, out=tmp_path / name)
        assert difference(expected[name], finished) <= CLOSE and difference(finished, adapters[name]) <= HALF
        shutil.rmtree(tmp_path / name)
        with pytest.raises(TrainingError, match=f"{name}: its adapter is gone"):
            adapters[name]


@pytest.mark.slow
def test_a_mirror_has_each_run(subjects: dict[str, Subject], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Each goes on from it where its own folder is lost, and it brings the folder of another machine up to date."""
    base, mirror, here, away = base_of("sd1"), f"memory://{tmp_path.name}", tmp_path / "here", tmp_path / "away"
    early, _ = many(base, subjects, out=away, mirror=mirror, together=1, time_limit=1e-9)
    assert [adapter.card.steps for adapter in early.values()] == [1]
    known = Adapters(here, mirror_at(mirror))
    find = partial(known.find, replace=False)
    assert not find("rex", finished=True) and not find("bob", finished=False)
    assert find("rex", finished=False) and known["rex"].card == early["rex"].card
    assert known["rex"].digest() == early["rex"].digest()
    shutil.rmtree(away)
    adapters, errors = many(base, subjects, out=away, mirror=mirror, together=1)
    assert not errors and "continued at step 1" in [event["what"] for event in read_record(away / "rex")["events"]]
    for name in subjects:
        assert find(name, finished=True) and known[name].digest() == adapters[name].digest()
        assert (here / name / ADAPTER).read_bytes() == (away / name / ADAPTER).read_bytes()
        assert read_record(here / name)["status"] == "finished"
    finished = (here / "rex" / ADAPTER).stat().st_mtime_ns
    monkeypatch.setattr(lora_booth.training.training_run.TrainingRun, "__init__", None)  # nothing is trained again
    again, errors = many(base, subjects, out=here, mirror=mirror)
    assert not errors and {name: one.digest() for name, one in again.items()} == {n: known[n].digest() for n in subjects}
    assert find("rex", finished=True) and (here / "rex" / ADAPTER).stat().st_mtime_ns == finished
    monkeypatch.undo()
    other = alone(base, subjects["bob"], out=tmp_path / "other" / "rex")
    known = Adapters(tmp_path / "other", mirror_at(mirror))
    with pytest.raises(TrainingError, match="rex: holds another run than its mirror; use another folder"):
        known.find("rex", finished=True, replace=False)
    assert Adapter.load(tmp_path / "other" / "rex" / ADAPTER).card == other.card
    assert known.find("rex", finished=True, replace=True) and known["rex"].digest() == adapters["rex"].digest()


@pytest.mark.slow
def test_an_interrupt_restores_the_base(subjects: dict[str, Subject], monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    base = base_of("sd1")
    before, calls = state(base.pipeline), 0
    stock = lora_booth.training.together.backward_together

    def interrupted(*inputs: Any) -> Any:
        nonlocal calls
        calls += 1
        if calls == 3:
            raise KeyboardInterrupt
        return stock(*inputs)

    monkeypatch.setattr(lora_booth.training.together, "backward_together", interrupted)
    with pytest.raises(KeyboardInterrupt):
        many(base, subjects, out=tmp_path)
    assert same_state(state(base.pipeline), before)
    assert not any(hasattr(module, "lora_A") for module in base.unet.modules())
    statuses = {json.loads((tmp_path / name / "run.json").read_text())["status"] for name in subjects}
    assert statuses == {"interrupted by KeyboardInterrupt"}
    adapters, errors = many(base, subjects, out=tmp_path)
    assert len(adapters) == 3 and not errors


@pytest.mark.slow
def test_samples_are_drawn_by_each_adapter(subjects: dict[str, Subject], tmp_path: Path) -> None:
    base = base_of("sd1")
    config = replace(CONFIG, sample_every=2, sample_prompt="sks dog", learning_rate=0.02)
    many(base, subjects, config, out=tmp_path / "many")
    seen = []
    for name, subject in subjects.items():
        alone(base, subject, config, out=tmp_path / "alone" / name)
        pictures = [np.asarray(Image.open(tmp_path / how / name / "samples/000004.png")) for how in ("alone", "many")]
        assert np.abs(pictures[0].astype(int) - pictures[1]).max() <= 2
        seen.append(pictures[0])
    assert not np.array_equal(seen[0], seen[1])


# --- arguments -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["", "..", "a/b", "a\\b", ".hidden", "x" * 101, "a\n", "a.", 5])
def test_names_are_those_of_folders(name: Any, rex: Subject) -> None:
    with pytest.raises(SettingsError, match="name"):
        train_many(base_of("sd1"), {name: rex})


def test_what_cannot_be_shared_is_refused_or_trained_one_by_one(rex: Subject, passes: list[int]) -> None:
    base = base_of("sd1")
    both = {"rex": rex, "bob": rex}
    with pytest.raises(SettingsError, match="case"):
        many(base, {"rex": rex, "Rex": rex})
    with pytest.raises(SettingsError, match=r"together=2 is not possible: dropout.*pass together=1"):
        many(base, both, lora=LoraSpec(rank=2, dropout=0.1), together=2)
    with pytest.raises(SettingsError, match="linear"):
        many(base, both, lora=LoraSpec(rank=2, target_modules=("conv1",)), together=2)
    adapters, _ = many(base, both, replace(CONFIG, steps=1, lean=False), together=None)
    assert adapters["rex"].digest() == adapters["bob"].digest() and not passes


# --- the layers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layers_of_several_adapters_are_those_of_each(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    draw: Callable[..., torch.Tensor] = lambda *shape: torch.randn(*shape, generator=generator).to(dtype)  # noqa: E731
    weight, bias, trigger = draw(12, 8), draw(12), torch.zeros((), requires_grad=True)
    flat, x, outer = draw(3, 2 * 8 + 12 * 2), draw(6, 5, 8).requires_grad_(), draw(6, 5, 12)

    def piece(factors: torch.Tensor, gradients: torch.Tensor) -> LoraPiece:
        parts = [(t[..., :16].unflatten(-1, (2, 8)), t[..., 16:].unflatten(-1, (12, 2))) for t in (factors, gradients)]
        (down, up), (for_down, for_up) = parts
        return LoraPiece(weight, bias, None, down, up, 0.5, for_down, for_up, trigger)

    gradients = torch.zeros(2, 3, flat.shape[1])
    (y,) = LoraLinears.apply(x, trigger, [piece(flat, gradients[0])])
    (for_x,) = torch.autograd.grad(y, x, outer)
    for n in range(3):
        own = slice(2 * n, 2 * n + 2)
        (y_alone,) = LoraLinears.apply(x[own], trigger, [piece(flat[n], gradients[1, n])])
        (alone_for_x,) = torch.autograd.grad(y_alone, x, outer[own])
        torch.testing.assert_close(y[own], y_alone)
        torch.testing.assert_close(for_x[own], alone_for_x[own])
    torch.testing.assert_close(gradients[0], gradients[1])
