"""What a step costs, counted and not timed: calls of the models, looks of the host at the device, what stays afterwards."""

from __future__ import annotations

import gc
from collections.abc import Callable, Iterator
from contextlib import ExitStack, closing
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import make_pipeline
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import MissingExtraError, SettingsError
from lora_booth.subject.subject import Subject
from lora_booth.training import latents
from lora_booth.training.encoding import prepare
from lora_booth.training.latents import LatentCache
from lora_booth.training.loop import inputs_of
from lora_booth.training.training_run import LOOK_EVERY, TrainingRun, training_steps

CONFIG = TrainingConfig(steps=40, class_images=2, warmup_steps=0, learning_rate=1e-3, resolution=64)
LORA = LoraSpec(rank=2)


@pytest.fixture
def begin(prepared: tuple[BaseModel, LatentCache]) -> Iterator[Callable[..., TrainingRun]]:
    """Runs that are closed whatever happens."""
    with ExitStack() as stack:

        def one(config: TrainingConfig, **options: Any) -> TrainingRun:
            run = TrainingRun(*prepared, LORA, config, **options)
            stack.callback(run.close)
            return run

        yield one


@pytest.fixture(scope="module")
def prepared(photos: Path) -> tuple[BaseModel, LatentCache]:
    base = BaseModel.from_pipeline(make_pipeline("sd1"), name="tiny")
    rex = Subject.from_folder(photos, token="sks", class_noun="dog")
    return base, prepare(base, [rex], lora=LORA, config=CONFIG)


class Looks(TorchDispatchMode):
    """Kernels whose result the host waits for."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func._overloadpacket in (torch.ops.aten._local_scalar_dense, torch.ops.aten.is_nonzero, torch.ops.aten.nonzero):
            self.seen.append(str(func))
        return func(*args, **(kwargs or {}))


class Reads(TorchFunctionMode):
    """Methods of tensors that wait for the device."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = getattr(func, "__name__", "")
        if name in ("tolist", "item", "cpu", "numpy", "__bool__", "__float__", "__int__"):
            self.seen.append(name)
        if name in ("tensor", "as_tensor") and (kwargs or {}).get("device") is not None:  # from memory that is not pinned
            self.seen.append(name)
        return func(*args, **(kwargs or {}))


@pytest.mark.slow
def test_two_calls_of_the_unet_and_none_of_the_others(
    prepared: tuple[BaseModel, LatentCache], begin: Callable[..., TrainingRun]
) -> None:
    base, _ = prepared
    calls: dict[str, int] = {"unet": 0, "others": 0}

    def counting(name: str) -> Any:
        def hook(*_: Any) -> None:
            calls[name] += 1

        return hook

    others = [base.vae.encoder, base.vae.decoder, *base.text_encoders.values()]
    hooks = [base.unet.register_forward_hook(counting("unet")), *(m.register_forward_hook(counting("others")) for m in others)]
    for config, expected in (
        (CONFIG, 2),  # what the base predicts for the class, and the step
        (replace(CONFIG, gradient_accumulation=3), 6),
        (replace(CONFIG, pictures_at_a_time=1), 3),
    ):
        run = begin(config)
        calls["unet"] = 0
        next(run), next(run)
        assert calls == {"unet": 2 * expected, "others": 0}
        run.close()
    for hook in hooks:
        hook.remove()


@pytest.mark.slow
def test_the_host_looks_at_the_device_now_and_then_only(
    begin: Callable[..., TrainingRun], monkeypatch: pytest.MonkeyPatch
) -> None:
    """As on a GPU: between two looks at the losses, nothing waits for it."""
    run = begin(CONFIG)
    run.look_every = LOOK_EVERY
    for order in ("turn", "rows"):  # the order of photos is the host's own affair
        monkeypatch.setattr(latents, order, cache(getattr(latents, order)))
    for index in range(40):
        list(inputs_of(run.loop, index))
    next(run)  # the first step's gradients are looked at
    looks: list[int] = []
    for _ in range(39):
        with Looks() as mode, Reads() as reads:
            step = next(run)
        if mode.seen or reads.seen:
            looks.append(step.index)
    assert looks == [16, 32, 40]
    run.close()


@pytest.mark.slow
def test_nothing_is_left_of_it(prepared: tuple[BaseModel, LatentCache]) -> None:
    base, cache = prepared

    def tensors() -> int:
        gc.collect()
        return sum(issubclass(type(one), torch.Tensor) for one in gc.get_objects())

    counts = []
    for _ in range(3):
        with closing(TrainingRun(base, cache, LORA, replace(CONFIG, steps=3))) as run:
            assert len([step.index for step in run]) == 3
        del run
        counts.append(tensors())
    assert counts[1] == counts[2]


def test_lean_and_stock_are_the_same_training(
    prepared: tuple[BaseModel, LatentCache], begin: Callable[..., TrainingRun]
) -> None:
    base, _ = prepared
    found = []
    ways: list[dict[str, Any]] = [{"lean": False}, {}]
    for way in ways:
        run = begin(replace(CONFIG, steps=4, **way))
        found.append([step.loss for step in run])
        run.close()
        assert not any("forward" in vars(module) for module in base.unet.modules())
    for losses in found[1:]:
        assert losses == pytest.approx(found[0], rel=1e-4)


def test_settings_that_cannot_be_had_are_refused_by_name(prepared: tuple[BaseModel, LatentCache]) -> None:
    base, cache = prepared
    with pytest.raises((MissingExtraError, SettingsError), match="adamw8bit"):
        next(training_steps(base, cache, config=replace(CONFIG, optimizer="adamw8bit")))
    for name in ("attention", "optimizer"):
        with pytest.raises(SettingsError, match=f"{name} 'fast'; needed: '"):
            replace(CONFIG, **{name: "fast"})  # type: ignore[arg-type]
    assert not any(hasattr(module, "lora_A") for module in base.unet.modules())
