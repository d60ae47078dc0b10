"""attached() adds exactly the adapters' changes and leaves no trace; trainable() adapts exactly what was asked for."""

from __future__ import annotations

import contextlib
import gc
import sys
import threading
import time
import warnings
import weakref
from collections.abc import Callable
from concurrent.futures import Future
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from accelerate import cpu_offload, cpu_offload_with_hook
from diffusers import AutoencoderTiny, StableDiffusionImg2ImgPipeline, StableDiffusionInpaintPipeline
from diffusers.hooks import apply_group_offloading
from peft.tuners.tuners_utils import BaseTunerLayer
from pipelines import KINDS, make_pipeline, random_adapter, same_state, state
from torch import Tensor, nn

import lora_booth
from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import LoraFactors
from lora_booth.base import changes
from lora_booth.base.base_model import BaseModel
from lora_booth.base.changes import CLAIMS, claimed
from lora_booth.base.generation import generate_images, quiet
from lora_booth.config import LoraSpec
from lora_booth.errors import AdapterBaseMismatch, BaseModelError, OtherBaseWarning, SettingsError, TrainingError
from lora_booth.injection.attached import attached
from lora_booth.injection.paths import local_path
from lora_booth.injection.trainable import trainable
from lora_booth.kernels.attention import attention_kernel
from lora_booth.kernels.lean import channels_last, lean
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.regions import Region
from lora_booth.pictures.serving import Request, Serving
from lora_booth.pictures.weights import Weight
from lora_booth.training.training_mode import checkpointed, modes_restored

TEXT_TOO = LoraSpec(rank=4, text_encoder=True)
PLACES = ("to_q", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_in")
EVERYWHERE = LoraSpec(rank=2, alpha=1.0, target_modules=PLACES)


def modules(pipeline: Any) -> dict[str, nn.Module]:
    return {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}


def traces(pipeline: Any) -> dict[str, Any]:
    """All of a pipeline that could be left changed, weights apart."""
    found: dict[str, Any] = {}
    for name, part in modules(pipeline).items():
        found[name] = [(path, id(m), type(m), m.training, sorted(vars(m))) for path, m in part.named_modules()]
        found[name + " parameters"] = [(path, id(p), p.requires_grad, p.grad is None) for path, p in part.named_parameters()]
        found[name + " peft"] = repr(getattr(part, "peft_config", None))
        layers = {path: m for path, m in part.named_modules() if isinstance(m, BaseTunerLayer)}
        found[name + " active"] = {
            path: (list(m.active_adapters), dict(m.scaling), list(m.merged_adapters), m.disable_adapters)
            for path, m in layers.items()
        }
    return found


def predict(pipeline: Any) -> Tensor:
    """The U-Net's output for a prompt, with the text encoders of the moment."""
    base = BaseModel.from_pipeline(pipeline)
    generator = torch.Generator().manual_seed(5)
    latents = torch.randn(1, 4, 8, 8, generator=generator)
    with torch.no_grad():
        text = base.encode_text(["a sks dog"])
        ids = base.time_ids((64, 64), (0, 0), (64, 64))
        extra = None if ids is None else {"text_embeds": text.pooled, "time_ids": ids[None]}
        return pipeline.unet(latents, torch.tensor([500]), text.states, added_cond_kwargs=extra).sample


def picture(pipeline: Any) -> np.ndarray[Any, Any]:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return np.asarray(pipeline("a sks dog", num_inference_steps=2, generator=generator, output_type="np").images[0])


def added_by_hand(pipeline: Any, adapters: list[tuple[Adapter, float]]) -> Any:
    for adapter, weight in adapters:
        for key, factors in adapter.modules.items():
            component, _, path = key.partition(".")
            model = getattr(pipeline, component)
            layer = model.get_submodule(local_path(model, path))
            up, down = factors.up.flatten(1), factors.down.flatten(1)
            with torch.no_grad():
                layer.weight += weight * (factors.alpha / factors.rank) * (up @ down).view_as(layer.weight)
    return pipeline


# --- attached ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("lora", [LoraSpec(rank=4), TEXT_TOO, EVERYWHERE], ids=["attention", "text", "everywhere"])
def test_attached_is_the_sum_of_the_changes(kind: str, lora: LoraSpec) -> None:
    pipeline = make_pipeline(kind)
    base = BaseModel.from_pipeline(pipeline)
    pair = [(random_adapter(base, lora, seed=1), 0.8), (random_adapter(base, LoraSpec(rank=3, alpha=6.0), seed=2), -0.5)]
    untouched = predict(pipeline)  # the first call of all: transformers puts its own hooks in then
    before, weights = traces(pipeline), state(pipeline)
    plain = set(pipeline.unet.parameters())
    with attached(base, pair) as given:
        assert given is pipeline
        inside = predict(pipeline)
        assert not any(p.requires_grad for p in pipeline.unet.parameters() if p not in plain)
        assert all(p.requires_grad for p in plain)  # as the user has it
    assert (inside - untouched).abs().max() > 1e-2
    expected = predict(added_by_hand(make_pipeline(kind), pair))
    assert (inside - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    assert traces(pipeline) == before and same_state(state(pipeline), weights)
    assert torch.equal(predict(pipeline), untouched)


def test_ranks_and_alphas_of_their_own() -> None:
    pipeline = make_pipeline("sd1")
    base = BaseModel.from_pipeline(pipeline)
    parts = [random_adapter(base, LoraSpec(rank=r, alpha=a), seed=r).modules for r, a in ((1, 1.0), (4, 2.0), (8, 8.0))]
    mixed = Adapter({key: parts[i % 3][key] for i, key in enumerate(parts[0])}, random_adapter(base).card)
    with attached(pipeline, [(mixed, 1.0)]):
        inside = predict(pipeline)
    assert torch.allclose(inside, predict(added_by_hand(make_pipeline("sd1"), [(mixed, 1.0)])), atol=1e-5)


def test_weight_zero_and_no_adapter_are_the_base() -> None:
    pipeline = make_pipeline("sd1")
    adapter, untouched = random_adapter(BaseModel.from_pipeline(pipeline)), predict(pipeline)
    for adapters in ([], [(adapter, 0.0)]):
        with attached(pipeline, adapters):
            assert torch.equal(predict(pipeline), untouched)


def test_half_precision_base() -> None:
    pipeline = make_pipeline("sd1").to(torch.bfloat16)
    base = BaseModel.from_pipeline(pipeline)
    weights = state(pipeline)
    with attached(base, [(random_adapter(base), 1.0)]):
        assert {p.dtype for p in pipeline.unet.parameters()} == {torch.bfloat16}
    assert same_state(state(pipeline), weights)


@pytest.mark.slow
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt, SystemExit])
def test_restored_after(error: type[BaseException]) -> None:
    pipeline = make_pipeline("sdxl")
    base = BaseModel.from_pipeline(pipeline)
    before, weights = traces(pipeline), state(pipeline)
    with pytest.raises(error), attached(base, [(random_adapter(base, TEXT_TOO), 1.0)]):
        raise error
    assert traces(pipeline) == before and same_state(state(pipeline), weights)
    with pytest.raises(error), trainable(base, TEXT_TOO):
        raise error
    assert traces(pipeline) == before and same_state(state(pipeline), weights)


def interrupted(job: Callable[[], object], at: int) -> list[tuple[str, int]]:
    """Run `job` with Ctrl-C at the line that runs as number `at`, of this package or of contextlib; returns all that ran."""
    lines: list[tuple[str, int]] = []

    def on_line(frame: Any, event: str, _: object) -> Any:
        if event == "line":
            lines.append((frame.f_code.co_filename, frame.f_lineno))
            if len(lines) == at:
                raise KeyboardInterrupt
        return on_line

    def on_call(frame: Any, event: str, _: object) -> Any:
        return on_line if frame.f_code.co_filename.startswith(WATCHED) else None

    sys.settrace(on_call)
    try:
        job()
    except KeyboardInterrupt:
        pass
    finally:
        sys.settrace(None)
    return lines


WATCHED = (str(Path(lora_booth.__file__).parent), contextlib.__file__)


def small_adapter(base: BaseModel, seed: int = 0) -> Adapter:
    whole = random_adapter(base, TEXT_TOO, seed=seed)
    few = dict(list(whole.modules.items())[:2] + list(whole.modules.items())[-2:])
    return Adapter(few, replace(whole.card, base_hash=None))


def by_regions(base: BaseModel) -> Callable[[], Any]:
    one, other = (Composition(base, [small_adapter(base, seed)]).adapters[0][0] for seed in (1, 2))
    regions = [Region(one, box=(0, 0, 0.5, 1), weight=Weight(1, end=0.5)), Region(other, box=(0.5, 0, 1, 1))]
    studio = Composition(base, regions=regions)
    return partial(studio.attached, "a sks dog")


def by_serving(base: BaseModel) -> Any:
    live = Serving(base)
    live.load("a", small_adapter(base))
    return live


CHANGING = ("changes.py", "attached.py", "trainable.py", "unet_hook.py", "contextlib.py")
ONE_LAYER = LoraSpec(rank=2, target_modules=("down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "conv_in"))
CONTEXTS: dict[str, Callable[[BaseModel], Callable[[], Any]]] = {
    "attached": lambda base: partial(attached, base, [(small_adapter(base), 1.0)]),
    "regions": by_regions,
    "trainable": lambda base: partial(trainable, base, ONE_LAYER),
    "lean": lambda base: partial(lean, base.text_encoders["text_encoder"], {}),
    "channels_last": lambda base: partial(channels_last, base.unet),
    "attention": lambda base: partial(attention_kernel, base.unet, "xformers"),
    "checkpointed": lambda base: partial(checkpointed, base.unet, draws=False),
    "modes": lambda base: partial(modes_restored, base),
    "only_unet": lambda base: base.only_unet_on_device,
    "all": lambda base: base.all_on_device,
    "upcast": lambda base: base.upcast_vae,
    "quiet": lambda base: partial(quiet, base.pipeline),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", CONTEXTS)
@pytest.mark.filterwarnings("ignore::lora_booth.errors.CompositionWarning")
def test_an_interrupt_at_any_line_leaves_nothing(name: str) -> None:
    pipeline = make_pipeline("sd1")
    base = BaseModel.from_pipeline(pipeline)
    context = CONTEXTS[name](base)
    with context():  # imports what it needs
        pass
    before, weights, bar = traces(pipeline), state(pipeline), dict(getattr(pipeline, "_progress_bar_config", {}))

    def job() -> None:
        with context():
            pass

    lines = interrupted(job, at=0)
    assert traces(pipeline) == before and len(lines) > 5
    files = CHANGING if name == "regions" else WATCHED  # the others take long and change nothing
    last = {line: at for at, line in enumerate(lines, 1) if line[0].endswith(CHANGING) or line[0].startswith(files)}
    for at in sorted(last.values()):
        interrupted(job, at)
        assert traces(pipeline) == before and not CLAIMS.get(pipeline.unet), (at, lines[at - 1])
        assert getattr(pipeline, "_progress_bar_config", {}) == bar
    assert same_state(state(pipeline), weights)


def test_serving_can_be_left_again_after_an_interrupt() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    before = traces(base.pipeline)
    lines = interrupted(lambda: by_serving(base).__exit__(None, None, None), at=0)
    for at in range(len(lines) - 60, len(lines) + 1):
        live = by_serving(base)
        interrupted(lambda live=live: live.__exit__(None, None, None), at)
        live.__exit__(None, None, None)
        assert traces(base.pipeline) == before, at


def test_serving_uses_what_it_is_told_after_an_interrupt() -> None:
    with by_serving(BaseModel.from_pipeline(make_pipeline("sd1"))) as live:
        scales = lambda: [layer.scale for layer in live.loaded["a"].layers.values()]  # noqa: E731
        live.use({"a": 0.5})
        half = scales()
        for at in range(1, len(interrupted(lambda: live.use({"a": 1.0}), at=0)) + 1):
            for told, expected in ({"a": 0.5}, half), ({"a": 1.0}, [2 * scale for scale in half]):
                live.use({"a": 0.5})
                interrupted(lambda: live.use({"a": 1.0}), at)
                live.use(told)
                assert scales() == expected, at


# --- threads -------------------------------------------------------------------------------------------------------


def in_thread(job: Callable[[], Any]) -> Future[Any]:
    result: Future[Any] = Future()

    def run() -> None:
        try:
            result.set_result(job())
        except BaseException as error:
            result.set_exception(error)

    threading.Thread(target=run, daemon=True).start()
    return result


def test_threads_take_turns_on_one_base() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    adapters = [random_adapter(base, seed=seed) for seed in (1, 2)]

    def drawn(adapter: Adapter | None) -> Tensor:
        with attached(base, [] if adapter is None else [(adapter, 1.0)]):
            return predict(base.pipeline)

    alone = [drawn(adapter) for adapter in (None, *adapters)]
    entered, leave = threading.Event(), threading.Event()

    def hold() -> None:
        with attached(base, [(adapters[0], 1.0)]), attached(base, [(adapters[1], 0.0)]):  # the same thread never waits
            entered.set()
            leave.wait(30)

    holder = in_thread(hold)
    assert entered.wait(30)
    waiting = [in_thread(lambda one=one: drawn(one)) for one in (None, *adapters, None)]
    pictures = in_thread(lambda: generate_images(base.pipeline, "a dog", [0], steps=1))
    tokens = in_thread(lambda: base.cut_off("a dog"))  # a tokenizer is not for several threads at once
    time.sleep(0.1)
    assert not any(one.done() for one in (*waiting, pictures, tokens))
    leave.set()
    holder.result(60)
    for one, expected in zip(waiting, (*alone, alone[0]), strict=True):
        assert torch.equal(one.result(60), expected)
    assert pictures.result(60)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lora_booth.errors.CompositionWarning")
def test_compositions_and_serving_draw_the_same_in_threads_as_alone() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    before = traces(base.pipeline)
    adapters = [random_adapter(base, TEXT_TOO, seed=seed) for seed in range(3)]
    studio = Composition(base, [(adapters[0], 1.0), (adapters[1], 0.5)])
    with Serving(base) as live:
        for name, adapter in zip("abc", adapters, strict=True):
            live.load(name, adapter)
        jobs: list[Callable[[], Any]] = [
            lambda: studio.generate("a dog " * 20, steps=2),
            lambda: Composition(base, adapters[2]).generate("a dog", seeds=[1], steps=2),
            lambda: live.generate([Request("a dog", {"a": 1.0}), Request("a dog", {"b": 0.5, "c": 1.0})], steps=2),
            lambda: live.generate([Request("a dog", {"c": -1.0}, seed=3)], steps=3),
        ]
        pictures = lambda job: [np.asarray(one.image) for one in job()]  # noqa: E731
        alone = [pictures(job) for job in jobs]
        for _ in range(3):
            threads = [in_thread(partial(pictures, job)) for job in jobs]
            assert all(np.array_equal(one.result(60), drawn) for one, drawn in zip(threads, alone, strict=True))
    assert traces(base.pipeline) == before


def test_what_threads_do_to_serving_while_others_wait() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    before, adapter = traces(base.pipeline), small_adapter(base)
    with Serving(base) as live:

        def waiting(*jobs: Callable[[], Any]) -> list[Future[Any]]:
            """Wait for the base, in this order."""
            found = []
            for job in jobs:
                found.append(in_thread(job))
                while len(CLAIMS[base.unet]) <= len(found):
                    time.sleep(0.001)
            return found

        with claimed(base.unet):
            first, second = waiting(*[lambda: live.load("a", adapter)] * 2)
        first.result(60)
        with pytest.raises(SettingsError, match="'a' is already loaded"):
            second.result(60)
        with claimed(base.unet):
            [drawn] = waiting(lambda: live.generate([Request("a dog")], steps=1))
            live.use({"a": 0.5})
        assert drawn.result(60) and live.loaded["a"].weight == 0.5
        with claimed(base.unet):
            jobs = (lambda: live.generate([Request("a dog", {"a": 1.0})], steps=1), lambda: live.use({"a": 1.0}))
            late = waiting(*jobs, lambda: live.unload("a"))
            live.unload("a")
        for one in late:
            with pytest.raises(SettingsError, match="'a' is not loaded"):
                one.result(60)
        with claimed(base.unet):
            [late_load] = waiting(lambda: live.load("a", adapter))
            live.__exit__(None, None, None)
        with pytest.raises(SettingsError, match="this Serving was left"):
            late_load.result(60)
    assert traces(base.pipeline) == before


def test_a_thread_that_waits_for_long_says_so(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(changes, "PATIENCE", 0.05)
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    said: list[str] = []
    monkeypatch.setattr(warnings, "warn", lambda message, **_: said.append(str(message)))

    def wait() -> None:
        with attached(base, []):
            pass

    with attached(base, []):
        waiting = in_thread(wait)
        end = time.monotonic() + 30
        while not said and time.monotonic() < end:
            time.sleep(0.01)
    waiting.result(60)
    assert said == ["still waiting for another thread that uses this base; load a second base to use both"]


def test_a_base_that_trains_is_refused_to_other_threads() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    adapter = random_adapter(base)
    live = Serving(base)
    jobs: list[Callable[[], Any]] = [
        lambda: attached(base, [(adapter, 1.0)]).__enter__(),
        lambda: trainable(base, LoraSpec(rank=2)).__enter__(),
        lambda: Composition(base).generate("a dog"),
        lambda: live.load("a", adapter),
    ]
    with trainable(base, LoraSpec(rank=2)):
        for job in jobs:
            with pytest.raises(SettingsError, match="another thread is training on this base; wait"):
                in_thread(job).result(60)
        with attached(base, [(adapter, 1.0)]):  # its own thread may draw
            predict(base.pipeline)
    with attached(base, [(adapter, 1.0)]):
        pass


# --- on a pipeline that has the user's own adapter -----------------------------------------------------------------


def switched_off(pipeline: Any) -> None:
    pipeline.disable_lora()


def fused(pipeline: Any) -> None:
    pipeline.fuse_lora()


def as_loaded(pipeline: Any) -> None:
    pass


@pytest.mark.parametrize("put", [as_loaded, switched_off, fused])
@pytest.mark.filterwarnings("ignore")
def test_the_users_own_adapter_stays(put: Callable[[Any], None], tmp_path: Path) -> None:
    clean = BaseModel.from_pipeline(make_pipeline("sd1"))
    theirs = random_adapter(clean, LoraSpec(rank=4, text_encoder=True), seed=8)
    ours = random_adapter(clean, LoraSpec(rank=3, target_modules=("to_q", "to_k", "ff.net.2")), seed=9)
    pipeline = make_pipeline("sd1")
    pipeline.load_lora_weights(str(theirs.save(tmp_path / "theirs.safetensors", dtype="fp32")))
    put(pipeline)
    alone = predict(pipeline)
    before, weights = traces(pipeline), state(pipeline)
    for _ in range(2):
        with attached(pipeline, [(ours, 0.7)]):
            both = predict(pipeline)
        assert traces(pipeline) == before and same_state(state(pipeline), weights)
        assert torch.equal(predict(pipeline), alone)
    known = [] if put is switched_off else [(theirs, 1.0)]
    expected = predict(added_by_hand(make_pipeline("sd1"), [*known, (ours, 0.7)]))
    assert (both - expected).abs().max() < 1e-5 * max(1.0, float(expected.abs().max()))
    with trainable(BaseModel.from_pipeline(pipeline), TEXT_TOO) as lora:
        assert torch.equal(predict(pipeline), alone)
        parts = [pipeline.unet, pipeline.text_encoder]
        needing = {id(p) for part in parts for p in part.parameters() if p.requires_grad}
        assert needing == {id(p) for p in lora.parameters.values()}
        assert set(lora.parameters) == {
            f"{key}.{half}" for key in random_adapter(clean, TEXT_TOO).modules for half in ("down", "up")
        }
    assert traces(pipeline) == before and same_state(state(pipeline), weights)
    pipeline.unload_lora_weights()


LIVE: dict[str, Callable[[Any, str], object]] = {
    "load": lambda pipe, file: pipe.load_lora_weights(file, adapter_name="more"),
    "load, set": lambda pipe, file: (pipe.load_lora_weights(file, adapter_name="more"), pipe.set_adapters("more", 0.5)),
    "set": lambda pipe, file: pipe.set_adapters("own", 0.5),
    "delete": lambda pipe, file: pipe.delete_adapters("own"),
    "disable": lambda pipe, file: pipe.disable_lora(),
    "disable, enable": lambda pipe, file: (pipe.disable_lora(), pipe.enable_lora()),
    "unload": lambda pipe, file: pipe.unload_lora_weights(),
    "fuse": lambda pipe, file: pipe.fuse_lora(),
    "fuse, unfuse": lambda pipe, file: (pipe.fuse_lora(), pipe.unfuse_lora()),
    "fuse, unload": lambda pipe, file: (pipe.fuse_lora(), pipe.unload_lora_weights()),
    "device": lambda pipe, file: pipe.set_lora_device(["own"], "cpu"),
    "unet only": lambda pipe, file: pipe.unet.load_lora_adapter(pipe.lora_state_dict(file)[0], prefix="unet"),
    "half and back": lambda pipe, file: (pipe.to(torch.float16), pipe.to(torch.float32)),
}


@pytest.mark.parametrize(
    ("call", "own"), [(call, True) for call in LIVE] + [(call, False) for call in ("load, set", "set", "fuse", "unload")]
)
@pytest.mark.filterwarnings("ignore")
def test_the_users_calls_within_leave_ours_on(call: str, own: bool, tmp_path: Path) -> None:
    """Whatever is called on the pipeline within, the picture is that of the same calls and our change; afterwards, theirs."""

    def prepared() -> Any:
        pipeline = make_pipeline("sd1")
        if own:
            pipeline.load_lora_weights(theirs, adapter_name="own")
        return pipeline

    clean = BaseModel.from_pipeline(make_pipeline("sd1"))
    lora = LoraSpec(rank=2, text_encoder=True)
    theirs, more = (str(random_adapter(clean, lora, seed=s).save(tmp_path / f"{s}.safetensors", dtype="fp32")) for s in (1, 2))
    ours = random_adapter(clean, LoraSpec(rank=3, target_modules=("to_q", "ff.net.2", "conv1"), text_encoder=True), seed=9)
    without = prepared()
    try:
        LIVE[call](without, more)
    except Exception as error:  # there is nothing to set or delete
        refused: Exception | None = error
    else:
        refused = None
    pipeline = prepared()
    with attached(pipeline, [(ours, 0.7)]):
        if refused is None:
            LIVE[call](pipeline, more)
        else:
            with pytest.raises(type(refused)):
                LIVE[call](pipeline, more)
        inside = predict(pipeline)
    if own:
        assert torch.equal(predict(pipeline), predict(without))
    assert same_state(state(pipeline), state(without))
    with attached(without, [(ours, 0.7)]):
        assert torch.allclose(inside, predict(without), atol=1e-5)
    assert not any(module._forward_hooks for module in pipeline.unet.modules())


@pytest.mark.parametrize(
    ("call", "own"), [("load", False), ("delete", False), ("unload", False), ("fuse", False), ("set", True), ("disable", True)]
)
@pytest.mark.filterwarnings("ignore")
def test_the_users_calls_while_an_adapter_trains_are_refused(call: str, own: bool, tmp_path: Path) -> None:
    clean = BaseModel.from_pipeline(make_pipeline("sd1"))
    file = str(random_adapter(clean, LoraSpec(rank=2, text_encoder=True)).save(tmp_path / "a.safetensors", dtype="fp32"))
    pipeline = make_pipeline("sd1")
    if own:
        pipeline.load_lora_weights(file, adapter_name="own")
    base, weights, before = BaseModel.from_pipeline(pipeline), plain_weights(pipeline), predict(pipeline)
    with trainable(base, TEXT_TOO) as lora:
        start = lora.copied()
        with pytest.raises((TrainingError, ValueError)) as told:  # the second: there is nothing to set or delete
            LIVE[call](pipeline, file)
            predict(pipeline)
        assert "an adapter is being trained" in str(told.value) or (call in ("set", "delete") and not own)
        assert all(torch.equal(value, start[name]) for name, value in lora.copied().items())
    assert same_state(plain_weights(pipeline), weights)
    assert own or torch.allclose(predict(pipeline), before, atol=1e-6)  # what the call did to their own adapter is theirs


def plain_weights(pipeline: Any) -> dict[str, Tensor]:
    """All weights but those of adapters, by the names that they have without any."""
    return {name.replace("base_layer.", ""): value for name, value in state(pipeline).items() if ".lora_" not in name}


def test_fused_projections_are_refused_by_name() -> None:
    pipeline = make_pipeline("sd1")
    adapter = small_adapter(BaseModel.from_pipeline(pipeline))
    with attached(pipeline, [(adapter, 1.0)]):
        pipeline.unet.fuse_qkv_projections()
        with pytest.raises(AdapterBaseMismatch, match="call unfuse_qkv_projections"):
            predict(pipeline)
    with pytest.raises(AdapterBaseMismatch, match="call unfuse_qkv_projections"), attached(pipeline, [(adapter, 1.0)]):
        pass
    pipeline.unet.unfuse_qkv_projections()
    with attached(pipeline, [(adapter, 1.0)]):
        predict(pipeline)


@pytest.mark.slow
def test_a_compiled_pipeline_sees_adapters_come_and_go() -> None:
    pipeline = make_pipeline("sd1")
    base = BaseModel.from_pipeline(pipeline)
    adapter, plain = random_adapter(base), predict(pipeline)
    with attached(pipeline, [(adapter, 1.0)]):
        expected = predict(pipeline)
    pipeline.unet.down_blocks[0].attentions[0].compile(backend="eager")
    assert torch.allclose(predict(pipeline), plain, atol=1e-5)
    with attached(pipeline, [(adapter, 1.0)]):
        assert torch.allclose(predict(pipeline), expected, atol=1e-5)
    assert torch.allclose(predict(pipeline), plain, atol=1e-5)
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    with attached(pipeline, [(adapter, 1.0)]):  # without a warning of another base
        pass


# --- stock diffusers reads our files to the same picture -----------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.filterwarnings("ignore")
def test_stock_loader_gives_the_same_picture(kind: str, tmp_path: Path) -> None:
    pipeline = make_pipeline(kind)
    base = BaseModel.from_pipeline(pipeline)
    adapter = random_adapter(base, LoraSpec(rank=4, alpha=2.0, text_encoder=True), size=0.6)
    untouched, weights = picture(pipeline), state(pipeline)
    with attached(pipeline, [(adapter, 1.0)]):
        ours = picture(pipeline)
    assert np.abs(ours - untouched).max() > 0.05
    assert np.array_equal(picture(pipeline), untouched)  # attached() moves no weight
    for layout in ("kohya", "peft"):
        pipeline.load_lora_weights(str(adapter.save(tmp_path / f"{layout}.safetensors", layout=layout, dtype="fp32")))
        stock = picture(pipeline)
        pipeline.unload_lora_weights()
        assert np.abs(stock - ours).max() < 1e-4, layout
    # diffusers may move weights in memory, and the last bits of a product depend on where its factors lie
    assert same_state(state(pipeline), weights)
    assert np.abs(picture(pipeline) - untouched).max() < 1e-4


# --- adapters for other bases --------------------------------------------------------------------------------------


def test_mismatches_are_found_before_any_change() -> None:
    pipeline = make_pipeline("sd2")
    base = BaseModel.from_pipeline(pipeline, name="tiny")
    before, good = traces(pipeline), random_adapter(base)
    other_family = random_adapter(BaseModel.from_pipeline(make_pipeline("sdxl"), name="big"))
    key, factors = next(iter(good.modules.items()))
    wide = LoraFactors(torch.zeros(4, 99), factors.up, 4.0)
    cases = {
        "big": other_family,
        r"\(\d+, 99\)": Adapter({**good.modules, key: wide}, good.card),
        "no module unet.nowhere.to_q": Adapter({**good.modules, "unet.nowhere.to_q": factors}, good.card),
        "not a linear": Adapter({**good.modules, "unet.conv_norm_out": factors}, good.card),
        "has no text_encoder_2": Adapter({**good.modules, "text_encoder_2.text_model.x": factors}, good.card),
    }
    for expected, adapter in cases.items():
        for adapters in ([(adapter, 1.0)], [(good, 1.0), (adapter, 0.0)]):
            with pytest.raises(AdapterBaseMismatch, match=expected), attached(base, adapters):
                raise AssertionError("attached")
            assert traces(pipeline) == before


@pytest.mark.slow
def test_other_weights_of_the_same_shapes_are_told() -> None:
    """Family and shapes fit: that is no reason to refuse, and one to say so."""
    trained_on = BaseModel.from_pipeline(make_pipeline("sd1"), name="one")
    adapter = random_adapter(trained_on)
    with attached(trained_on, [(adapter, 1.0)]), attached(make_pipeline("sd1"), [(adapter, 1.0)]):
        pass  # the same weights, whoever loaded them
    with attached(make_pipeline("sd1").to(torch.float16), [(adapter, 1.0)]):
        pass  # and whatever their precision
    other = make_pipeline("sd1")
    with torch.no_grad():
        other.unet.conv_out.weight.neg_()
    with pytest.warns(OtherBaseWarning, match="other weights of the same shapes"), attached(other, [(adapter, 1.0)]):
        assert (predict(other) - predict(make_pipeline("sd1"))).abs().max() > 1e-2
    with attached(other, [(adapter, 0.0)]):
        pass  # not used
    for known in (None, "e1441589", "cc6cb271" * 8):  # other tools' hashes of files
        with attached(other, [(replace(adapter, card=replace(adapter.card, base_hash=known)), 1.0)]):
            pass


def test_the_toybox_of_an_earlier_version_is_refused() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"), name="toybox")
    adapter = random_adapter(base)
    card = replace(adapter.card, base_model="toybox", base_hash="0" * len(base.fingerprint))
    with (
        pytest.raises(AdapterBaseMismatch, match="toybox .* of an earlier version of lora_booth; train it again"),
        attached(base, [(replace(adapter, card=card), 1.0)]),
    ):
        pass


def test_another_prediction_type_is_told() -> None:
    adapter = random_adapter(BaseModel.from_pipeline(make_pipeline("sd2")))
    base = BaseModel.from_pipeline(make_pipeline("sd2-v"), name="velocity")
    told = "which predicts epsilon; velocity predicts v_prediction"
    with pytest.warns(OtherBaseWarning, match=told), attached(base, [(adapter, 1.0)]):
        pass
    for silent in (replace(adapter, card=replace(adapter.card, prediction_type=None, base_hash=None)), adapter):
        with attached(base, [(silent, 0.0 if silent is adapter else 1.0)]):
            pass


# --- pipelines of other kinds ----------------------------------------------------------------------------------------


def without(*names: str) -> Any:
    pipeline = make_pipeline("sd1")
    for name in names:
        setattr(pipeline, name, None)
    return pipeline


def guided() -> Any:
    """With a distilled guidance embedding, as LCM models have; the other weights are the same."""
    pipeline = make_pipeline("sd1")
    unet = type(pipeline.unet).from_config(pipeline.unet.config, time_cond_proj_dim=8)
    unet.load_state_dict(pipeline.unet.state_dict(), strict=False)
    pipeline.unet = unet
    return pipeline


OTHER_KINDS: dict[str, Callable[[], Any]] = {
    "no text encoder": lambda: without("text_encoder", "tokenizer"),
    "no VAE": lambda: without("vae"),
    "only a U-Net": lambda: without("text_encoder", "tokenizer", "vae", "scheduler"),
    "image to image": lambda: StableDiffusionImg2ImgPipeline.from_pipe(make_pipeline("sd1")),
    "tiny VAE": lambda: StableDiffusionImg2ImgPipeline.from_pipe(make_pipeline("sd1"), vae=AutoencoderTiny()),
    "LCM": guided,
}


@pytest.mark.parametrize("kind", OTHER_KINDS)
def test_pipelines_with_the_same_unet(kind: str) -> None:
    plain, pipeline = make_pipeline("sd1"), OTHER_KINDS[kind]()
    adapter = random_adapter(BaseModel.from_pipeline(plain)).with_card(base_hash=None)
    before = state(pipeline)

    def answer(pipeline: Any) -> Tensor:
        with torch.no_grad():
            return pipeline.unet(torch.ones(1, 4, 8, 8), torch.tensor(1), torch.ones(1, 16, 16)).sample

    with attached(plain, [(adapter, 1.0)]), attached(pipeline, [(adapter, 1.0)]):
        torch.testing.assert_close(answer(pipeline), answer(plain))
    assert same_state(state(pipeline), before)
    if kind != "LCM":
        with pytest.raises(BaseModelError, match="has no|does not draw from text alone"):
            lora_booth.Composition(pipeline, [adapter]).generate("a sks dog", steps=1)
    if "text_encoder" not in modules(pipeline):
        with_text = random_adapter(BaseModel.from_pipeline(plain), TEXT_TOO)
        with pytest.raises(AdapterBaseMismatch, match="has no text_encoder"), attached(pipeline, [(with_text, 1.0)]):
            pass


def test_inpainting_pipelines() -> None:
    plain = make_pipeline("sd1")
    adapter = random_adapter(BaseModel.from_pipeline(plain))
    parts = {**plain.components, "unet": type(plain.unet).from_config(plain.unet.config, in_channels=9)}
    inpainting = StableDiffusionInpaintPipeline(**parts, requires_safety_checker=False)
    before = state(inpainting)
    latents, text = torch.ones(1, 9, 8, 8), torch.ones(1, 16, 16)
    with torch.no_grad():
        untouched = inpainting.unet(latents, 1, text).sample
        with pytest.warns(OtherBaseWarning), attached(inpainting, [(adapter, 1.0)]):
            assert (inpainting.unet(latents, 1, text).sample - untouched).abs().max() > 1e-2
    assert same_state(state(inpainting), before)


def offloaded_as(kind: str) -> Any:
    pipeline = make_pipeline("sd1")
    cpu = torch.device("cpu")
    for module in (pipeline.unet, pipeline.text_encoder, pipeline.vae):
        if kind == "sequential":
            cpu_offload(module, execution_device=cpu)
        elif kind == "model":
            cpu_offload_with_hook(module, execution_device=cpu)
        else:
            groups = {"num_blocks_per_group": 1} if kind == "block_level" else {}
            apply_group_offloading(module, onload_device=cpu, offload_device=cpu, offload_type=kind, **groups)
    return pipeline


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sequential", "model", "block_level", "leaf_level"])
def test_offloaded_pipelines(kind: str) -> None:
    plain, pipeline = make_pipeline("sd1"), offloaded_as(kind)
    base = BaseModel.of(pipeline)
    assert base.fingerprint == BaseModel.of(plain).fingerprint and base.device == torch.device("cpu")
    adapter = random_adapter(BaseModel.of(plain), TEXT_TOO)
    untouched = picture(plain)
    with attached(plain, [(adapter, 1.0)]):
        wanted = picture(plain)
    with attached(pipeline, [(adapter, 1.0)]):
        for _ in range(2):
            np.testing.assert_allclose(picture(pipeline), wanted, atol=1e-5)
    np.testing.assert_allclose(picture(pipeline), untouched, atol=1e-5)
    drawn = lora_booth.Composition(pipeline, [adapter]).generate("a sks dog", steps=2)[0].image
    expected = lora_booth.Composition(plain, [adapter]).generate("a sks dog", steps=2)[0].image
    assert np.abs(np.asarray(drawn, int) - np.asarray(expected, int)).max() <= 1
    assert not np.isclose(wanted, untouched, atol=1e-2).all()


# --- what is trained -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_default_targets_are_all_attention_projections(kind: str) -> None:
    base = BaseModel.from_pipeline(make_pipeline(kind))
    names = ("to_q", "to_k", "to_v", "to_out.0")
    every = {f"unet.{n}" for n, m in base.unet.named_modules() if isinstance(m, nn.Linear) and n.endswith(names)}
    untouched = predict(base.pipeline)
    with trainable(base, LoraSpec(rank=2)) as lora:
        assert set(lora.factors()) == every
        assert len(every) == 8 * sum(len(m.transformer_blocks) for m in base.unet.modules() if hasattr(m, "transformer_blocks"))
        assert {p.dtype for p in lora.parameters.values()} == {torch.float32}
        assert torch.equal(predict(base.pipeline), untouched)  # up = 0: nothing is changed at the start


def test_a_trained_adapter_keeps_no_weight_of_the_base() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    with trainable(base, LoraSpec(rank=2)) as lora, lean(base.unet, lora.flat):
        predict(base.pipeline)
    weight = weakref.ref(base.unet.mid_block.attentions[0].transformer_blocks[0].attn1.to_q.weight)
    del base
    gc.collect()
    assert weight() is None and lora.factors()


def test_other_targets() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sdxl"))
    with trainable(base, EVERYWHERE) as lora:
        for place in PLACES:
            assert any(key.endswith(f".{place}") for key in lora.factors()), place
        assert lora.factors()["unet.conv_in"].down.shape == (2, 4, 3, 3)
        assert lora.factors()["unet.conv_in"].up.shape == (16, 2, 1, 1)
    with trainable(base, LoraSpec(rank=2, text_encoder=True, text_target_modules=("q_proj", "fc1"))) as lora:
        found = {key for key in lora.factors() if not key.startswith("unet")}
    # the last layer of SDXL's first text encoder conditions nothing
    assert found == {
        *(f"text_encoder.text_model.encoder.layers.0.{tail}" for tail in ("self_attn.q_proj", "mlp.fc1")),
        *(f"text_encoder_2.text_model.encoder.layers.{i}.{tail}" for i in (0, 1) for tail in ("self_attn.q_proj", "mlp.fc1")),
    }


@pytest.mark.parametrize(
    ("lora", "expected"),
    [
        (LoraSpec(rank=2, target_modules=("to_q", "to_nowhere")), "to_nowhere"),
        (LoraSpec(rank=2, text_encoder=True, text_target_modules=("nothing",)), "nothing"),
        (LoraSpec(rank=17), "rank 17.*at most 16"),
        (LoraSpec(rank=5, target_modules=("conv_out",)), "rank 5.*at most 4"),
    ],
)
def test_impossible_targets_leave_the_base_untouched(lora: LoraSpec, expected: str) -> None:
    pipeline = make_pipeline("sd1")
    before, weights = traces(pipeline), state(pipeline)
    with pytest.raises(SettingsError, match=expected), trainable(BaseModel.from_pipeline(pipeline), lora):
        raise AssertionError("trainable")
    assert traces(pipeline) == before and same_state(state(pipeline), weights)


def test_the_seed_decides_the_start() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    starts = []
    for seed in (1, 1, 2):
        torch.manual_seed(len(starts))
        after = torch.get_rng_state()
        with trainable(base, LoraSpec(rank=2), seed=seed) as lora:
            starts.append(torch.cat([f.down.flatten() for f in lora.factors().values()]))
        assert torch.equal(torch.get_rng_state(), after)  # the caller's random numbers are left alone
    assert torch.equal(starts[0], starts[1]) and not torch.equal(starts[0], starts[2])
