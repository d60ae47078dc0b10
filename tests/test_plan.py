"""plan(): what it predicts from shapes alone is what real pipelines take; what fits is chosen."""

from __future__ import annotations

import json
import re
import shutil
from collections.abc import Callable, Iterable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import base_of
from torch.utils.flop_counter import FlopCounterMode

from lora_booth import cli
from lora_booth.base.base_model import BaseModel
from lora_booth.base.quantization import storage_bytes
from lora_booth.base.single_file import CONFIGS
from lora_booth.config import LoraSpec, TrainingConfig, settled
from lora_booth.errors import BaseModelError, SettingsError
from lora_booth.kernels.lora import APART
from lora_booth.pictures.composition import Composition
from lora_booth.planning import budget, planning
from lora_booth.planning.budget import (
    CPU_CONTEXT,
    RESERVE,
    Machine,
    available_bytes,
    free_bytes,
    gpu_named,
    is_ample,
    upper_bound,
)
from lora_booth.planning.counting import Counter, Meter, count, count_step, draw, inputs
from lora_booth.planning.planning import DoesNotFit, Plan, Planner, levels_that_fit, plan
from lora_booth.planning.shapes import built, configured, without_weights
from lora_booth.training.latents import LatentCache

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(steps=4, batch_size=2, prior_loss_weight=0.0)


def weights_of(base: BaseModel, *, named: Iterable[str] = ("unet", "vae", "text_encoder")) -> int:
    """Bytes of those of these modules that are in memory."""
    there = [getattr(base.shell, name) for name in named if base.unread(name) is None]
    return storage_bytes(tensor for module in there for tensor in (*module.parameters(), *module.buffers()))


@cache
def counter_of(kind: str, dtype: torch.dtype = torch.float32, lora: LoraSpec = LORA) -> Counter:
    return Counter(without_weights(base_of(kind), dtype), lora, on_cpu=True)


def planned(kind: str = "sd1", *, budget: float, config: TrainingConfig = CONFIG, device: str = "cuda") -> Plan:
    counter = counter_of(kind)
    machine = Machine("a test", device, budget, 0.0)
    return Planner(counter, machine, settled(config, counter.base, 3), 3).plan()


# --- what is counted -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora", "config"),
    [
        ("sd1", LORA, TrainingConfig()),
        ("sd1", LORA, TrainingConfig(lean=False, gradient_checkpointing=True)),
        ("sd2", LORA, TrainingConfig(lean=False)),
        ("sd2-v", replace(LORA, dropout=0.1), TrainingConfig(lean=False, min_snr_gamma=5.0)),
        ("sdxl", replace(LORA, text_encoder=True), TrainingConfig(lean=False)),
    ],
)
def test_counts_without_weights_are_those_of_the_real_model(kind: str, lora: LoraSpec, config: TrainingConfig) -> None:
    real = base_of(kind)
    shapes = without_weights(real, torch.float32)
    assert all(p.is_meta for module in shapes.structure.values() for p in module.parameters())
    counted = [count_step(base, lora, config, 2, (64, 64)) for base in (real, shapes)]
    assert counted[0].saved == counted[1].saved > 0
    if config.lean:  # then a CPU lays small things out otherwise
        assert counted[1].peak == pytest.approx(counted[0].peak, rel=0.2)
    else:
        assert counted[1] == counted[0]
    assert counted[1].peak > counted[1].saved and counted[1].flops == counted[0].flops > 0


@pytest.mark.slow
def test_half_precision_differs_in_the_statistics_of_norms_alone() -> None:
    real = base_of("sd1", torch.bfloat16)
    on_cpu, without = (
        count_step(base, LORA, replace(CONFIG, lean=False), 2, (64, 64))
        for base in (real, without_weights(real, torch.bfloat16))
    )
    assert without.saved == pytest.approx(on_cpu.saved, rel=0.01) and without.flops == on_cpu.flops


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_weights_are_those_of_the_real_model(kind: str) -> None:
    base = base_of(kind)
    weights = counter_of(kind, torch.bfloat16).weights
    sizes = {name: sum(p.numel() for p in module.parameters()) for name, module in base.structure.items()}
    assert weights.unet == 2 * sizes["unet"]
    assert weights.vae == 2 * sum(p.numel() for p in base.vae.parameters())
    buffers = sum(storage_bytes(module.buffers()) for name, module in base.structure.items() if name != "unet")
    assert weights.text_encoders == 2 * sum(size for name, size in sizes.items() if name != "unet") + buffers
    layers = [m for n, m in base.unet.named_modules() if n.endswith(("to_q", "to_k", "to_v", "to_out.0"))]
    least = 4 * sum(2 * sum(layer.weight.shape) for layer in layers)  # rank 2, float32
    assert least <= weights.lora < least + 4 * 2 * len(layers) * APART


def test_arithmetic_is_that_of_the_flop_counter() -> None:
    base = base_of("sd2")
    latents, text, _ = inputs(base, 2, (64, 64))
    times = torch.zeros(2, dtype=torch.long)

    def forward() -> torch.Tensor:
        return base.unet(latents.requires_grad_(), times, text.states).sample

    with FlopCounterMode(display=False) as oracle:
        forward().sum().backward()
    with Meter() as meter:
        forward().sum().backward()
    attention = meter.flops - oracle.get_total_flops()  # which torch does not count on a CPU
    assert 0 < attention == attention_flops(base)


def attention_flops(base: BaseModel) -> int:
    """Of forward and backward pass over two pictures of 8 x 8 latents, from the sizes: two products forward, five backward."""
    total, tokens = 0, base.tokenizer.model_max_length
    for name, module in base.unet.named_modules():
        if name.endswith((".attn1", ".attn2")):
            queries = 16 if name.startswith(("mid", "down_blocks.1", "up_blocks.0")) else 64
            keys = queries if name.endswith("attn1") else tokens
            total += 7 * 2 * 2 * queries * keys * module.inner_dim
    return total


def test_saved_bytes_are_those_of_the_graph() -> None:
    x = torch.ones(1000, requires_grad=True)
    layer = torch.nn.Linear(1000, 10)
    with Meter() as meter:
        y = layer(x.exp())
        assert y.shape == (10,) and meter.live == 4040  # with exp's result, which is the layer's input; not the weights
    del y
    assert meter.live == 0 and meter.peak >= 4040


def test_convolutions_of_a_cpu_work_on_copies() -> None:
    x, weight = torch.empty(2, 8, 16, 16, device="meta"), torch.empty(4, 8, 3, 3, device="meta", requires_grad=True)
    peaks = []
    for on_cpu in (False, True):
        with Meter(on_cpu=on_cpu) as meter:
            y = torch.conv2d(x, weight, padding=1)
            assert meter.peak == y.nbytes + (x.nbytes + weight.nbytes if on_cpu else 0)
            y.sum().backward()
        peaks.append(meter.peak)
        weight.grad = None
    gradients = y.nbytes + weight.nbytes
    assert peaks[1] >= y.nbytes + gradients + weight.nbytes > peaks[0]


def test_the_weights_are_no_work() -> None:
    counter = Counter(without_weights(base_of("sd1"), torch.float64), LORA)  # no entry in the cache has this precision
    assert counter.draw(128) == count(draw, counter.base, 128)


@pytest.mark.slow
def test_more_pictures_are_on_a_line() -> None:
    counter = counter_of("sd1")
    five = counter.step(CONFIG, pictures=5, resolution=64)
    real = count_step(counter.base, LORA, CONFIG, 5, (64, 64), on_cpu=True)
    assert five.saved == real.saved and five.flops == real.flops and five.peak == pytest.approx(real.peak, rel=0.02)


def test_a_count_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    base, options = without_weights(base_of("sd1"), torch.float32), {"pictures": 1, "resolution": 64}
    first = Counter(base, LORA).step(CONFIG, **options)
    monkeypatch.setattr("lora_booth.planning.counting.count_step", lambda *_, **__: pytest.fail("counted again"))
    assert Counter(without_weights(base_of("sd1"), torch.float32), LORA).step(CONFIG, **options) == first


# --- bases that are not loaded -------------------------------------------------------------------------------------


@pytest.mark.slow
def test_folders_the_hub_and_memory_have_the_same_shapes(
    folders: dict[str, Path], hub: Callable[[str, Path], str], tmp_path: Path
) -> None:
    folder = tmp_path / "configs"  # without any weights
    for file in folders["sd2"].rglob("*.json"):
        (folder / file.relative_to(folders["sd2"])).parent.mkdir(parents=True, exist_ok=True)
        (folder / file.relative_to(folders["sd2"])).write_bytes(file.read_bytes())
    sources: list[Any] = [base_of("sd2"), folder, hub("some-one/configs", folder)]
    sizes = {Counter(without_weights(source, torch.float32), LORA).weights for source in sources}
    assert len(sizes) == 1 and sizes.pop().unet == storage_bytes(base_of("sd2").unet.parameters())
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(BaseModelError, match="vae/config.json"):
        without_weights(folder, torch.float32)


@pytest.mark.slow
def test_families_are_built_in() -> None:
    published = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}  # parameters of the U-Nets
    for family, size in published.items():
        base = without_weights(family, torch.float16)
        assert base.family.name == family and sum(p.numel() for p in base.unet.parameters()) == size
    with pytest.raises(BaseModelError, match="sd1, sd2, sdxl"):
        without_weights("sd7", torch.float16)


def test_what_cannot_be_trained_cannot_be_planned() -> None:
    parts = configured(CONFIGS / "sd1")
    parts["unet"]["in_channels"] = 9
    with pytest.raises(BaseModelError, match="inpainting"):
        built("other", parts, torch.float32)


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"_class_name": "FluxPipeline"}, "is a FluxPipeline; lora_booth trains"),
        ({"unet": []}, "which is not a part of a pipeline"),
        ({"unet": 5}, "no U-Net"),
        ({"scheduler": None}, "no scheduler can be built"),
        ({"scheduler": ["diffusers", "NoScheduler"]}, "no scheduler can be built"),
    ],
)
def test_a_folder_that_cannot_be_loaded_cannot_be_planned(changes: dict[str, Any], told: str, tmp_path: Path) -> None:
    shutil.copytree(CONFIGS / "sd1", tmp_path / "base")
    index = tmp_path / "base" / "model_index.json"
    found = json.loads(index.read_text()) | changes
    index.write_text(json.dumps({name: value for name, value in found.items() if value is not None}))
    with pytest.raises(BaseModelError, match=told):
        without_weights(tmp_path / "base", torch.float32)


# --- the choice ----------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_the_least_extra_computation_that_fits_is_chosen() -> None:
    plenty = planned(budget=1e9, config=replace(CONFIG, batch_size=4))
    assert plenty.chosen is not None and plenty.chosen.settings == {} and plenty.config == plenty.asked
    split = [{"pictures_at_a_time": 2}, {"pictures_at_a_time": 1}]
    again = {"gradient_checkpointing": True}
    assert [one.settings for one in plenty.forecasts] == [{}, *split, again, *(each | again for each in split)]
    assert [one.passes for one in plenty.forecasts] == [1, 2, 4, 1, 2, 4]
    flops = [one.flops for one in plenty.forecasts]
    assert flops[0] == flops[1] == flops[2] < flops[3] == flops[4] == flops[5] < 1.5 * flops[0]
    by_peak = sorted(plenty.forecasts, key=lambda one: one.phases["training"])
    assert by_peak[-1].settings == {} and by_peak[0].settings == split[1] | again
    for i, one in enumerate(plenty.forecasts):  # just enough for this one
        tight = planned(budget=one.peak + one.reserve, config=plenty.asked)
        assert tight.chosen is not None and tight.chosen.settings in [each.settings for each in plenty.forecasts[: i + 1]]
        assert tight.chosen.peak + tight.chosen.reserve <= tight.machine.budget


@pytest.mark.slow
def test_rank_resolution_and_batch_stay() -> None:
    config = replace(CONFIG, gradient_accumulation=3)
    found = planned(budget=1e9, config=config)
    chosen = {name for one in found.forecasts for name in one.settings}
    assert chosen == {"pictures_at_a_time", "gradient_checkpointing"}
    assert found.to_json()["pictures"] == 2 and found.forecasts[0].flops > 3 * 2 * 1e7


def test_what_was_asked_for_is_no_choice() -> None:
    found = planned(budget=1e9, config=replace(CONFIG, gradient_checkpointing=True, pictures_at_a_time=1))
    assert [one.settings for one in found.forecasts] == [{}]
    least = planned(budget=1e9).forecasts
    assert found.forecasts[0].peak == min(one.peak for one in least)


@pytest.mark.slow
def test_when_nothing_fits_the_error_says_what_would() -> None:
    wide = planned(budget=1e9, config=replace(CONFIG, resolution=128))
    least = min(one.peak for one in wide.forecasts)
    small = planned(budget=0.9 * least, config=replace(CONFIG, resolution=128))
    assert small.chosen is None and "does not fit" in str(small)
    with pytest.raises(DoesNotFit, match=r"at 128 px needs at least .* resolution=\d+ .*would need"):
        _ = small.config
    none = planned(budget=1000.0)
    with pytest.raises(DoesNotFit, match="no smaller resolution fits|half precision"):
        _ = none.config


def test_the_reserve_is_given_up_before_the_training() -> None:
    least = min(planned(budget=1e9).forecasts, key=lambda one: one.peak)
    found = planned(budget=least.peak)
    assert (
        found.chosen is not None
        and not found.chosen.fits
        and found.chosen.reserve == pytest.approx(RESERVE * (found.chosen.peak - counter_of("sd1").weights.unet))
    )


# --- in training ---------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_takes_what_fits_into_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base, said, always = base_of("sd1"), [], []
    config = settled(CONFIG, base, 3)
    monkeypatch.setattr(planning, "return_always", lambda: always.append(True))
    assert is_ample(base, LORA, config, photos=3)
    with monkeypatch.context() as patch:  # it fits: no other way is counted
        patch.setattr(Planner, "plan", None)
        assert levels_that_fit(base, LORA, config, photos=3, say=said.append) == {} and not said
    asked, *_ = (one for one in plan(base, lora=LORA, config=config, photos=3).forecasts if not one.settings)
    free = asked.peak - storage_bytes(p for m in (*base.structure.values(), base.vae) for p in m.parameters())
    monkeypatch.setattr(budget, "free_bytes", lambda device: int(free) - 1)
    assert not is_ample(base, LORA, config, photos=3)
    levels = levels_that_fit(base, LORA, config, photos=3, say=said.append)
    assert levels and set(levels) <= {"pictures_at_a_time", "gradient_checkpointing"}
    assert len(said) == 1 and "plan: " in said[0] and always
    monkeypatch.setattr(budget, "free_bytes", lambda device: -(10**9))
    with pytest.raises(DoesNotFit):
        levels_that_fit(base, LORA, config, photos=3)
    both = replace(config, pictures_at_a_time=1, gradient_checkpointing=True)
    assert levels_that_fit(base, LORA, both, photos=3) == {}  # somebody who set both wants to try


@pytest.mark.slow
@pytest.mark.parametrize(("kind", "text_encoder"), [("sd1", False), ("sd1", True), ("sdxl", False), ("sdxl", True)])
def test_no_phase_exceeds_the_upper_bound(kind: str, text_encoder: bool) -> None:
    """Where it is below the free memory, nothing is counted."""
    lora = replace(LORA, text_encoder=text_encoder)
    for dtype, prior, batch in ((torch.float32, 0.0, 4), (torch.bfloat16, 1.0, 1)):
        counter = counter_of(kind, dtype, lora)
        config = TrainingConfig(batch_size=batch, prior_loss_weight=prior, lean=False, resolution=128)
        config = settled(config, counter.base, 3)
        for resident in (frozenset[str](), frozenset({"unet", "vae", "text_encoder", "text_encoder_2"})):
            planner = Planner(counter, Machine("a test", "cpu", 1e9, CPU_CONTEXT), config, 3, resident)
            one, bound = planner.forecast(config, {}), upper_bound(counter.base, lora, config, photos=3)
            assert one.peak + one.reserve < bound < 4 * one.peak


@pytest.mark.slow
def test_the_upper_bound_of_a_published_model() -> None:
    config = TrainingConfig(resolution=256)
    counter = Counter(without_weights("sd1", torch.float32), LoraSpec())
    config = settled(config, counter.base, 5)
    one = Planner(counter, Machine("a test", "cpu", 1e12, CPU_CONTEXT), config, 5).forecast(config, {})
    assert one.peak + one.reserve < upper_bound(counter.base, LoraSpec(), config, photos=5) < 1.5 * one.peak


@pytest.mark.slow
def test_modules_that_stay_in_memory_are_counted() -> None:
    """After pictures on the same base somebody may hold its VAE and text encoder: training cannot give them back."""
    base = BaseModel.load("toybox", device="cpu", dtype=torch.float32)

    def planned_and_there() -> tuple[float, int]:
        with base.only_unet_on_device():
            there = weights_of(base)
        return plan(base, config=CONFIG, lora=LORA).forecasts[0].training["weights"], there

    assert base.unet is not None
    alone, there = planned_and_there()
    assert alone == there
    Composition(base, []).generate("a dog", seeds=[0], steps=1)
    whole, there = planned_and_there()
    assert whole == there > 1.2 * alone
    encoding = plan(base, config=CONFIG, lora=LORA).forecasts[0].phases["through the VAE"]
    unread = plan("toybox", config=CONFIG, lora=LORA, device="cpu").forecasts[0].phases["through the VAE"]
    assert encoding == unread + alone  # the U-Net is there too


@pytest.mark.slow
def test_time_is_measured_by_real_steps() -> None:
    base = base_of("sd1")
    before = {name: value.clone() for name, value in base.unet.state_dict().items()}
    config = TrainingConfig(batch_size=1, steps=60)
    found = plan(base, lora=LORA, config=config, measure=True)
    assert found.seconds is not None and 0.001 < found.seconds < 60 and found.to_json()["seconds"] == found.seconds
    assert found.to_json()["seconds_in_all"] == found.seconds * (found.asked.steps or 0)
    after = base.unet.state_dict()
    assert after.keys() == before.keys() and all(torch.equal(after[name], value) for name, value in before.items())
    text = plan(base, lora=replace(LORA, text_encoder=True), config=replace(config, steps=1), measure=True)
    assert text.seconds is not None and text.seconds > found.seconds / 2
    assert plan(base, lora=LORA, config=config).seconds is None
    with pytest.raises(SettingsError, match="measure=True with gpu="):
        plan(base, gpu="T4", measure=True)
    with pytest.raises(SettingsError, match="measure=True with 'sd1': only a loaded base"):
        plan("sd1", measure=True)


@pytest.mark.parametrize("weight", [0.0, 1.0])
def test_the_measured_steps_keep_the_class_as_the_training_will(weight: float, monkeypatch: pytest.MonkeyPatch) -> None:
    caches: list[LatentCache] = []
    steps = planning.training_steps
    monkeypatch.setattr(
        planning, "training_steps", lambda base, cache, **more: caches.append(cache) or steps(base, cache, **more)
    )
    plan(base_of("sd1"), lora=LORA, config=TrainingConfig(batch_size=1, prior_loss_weight=weight), measure=True)
    (bucket,) = caches[0].buckets
    assert len(bucket.photos.class_prompts) == caches[0].rows_per_photo - 1 == weight


def test_this_machine() -> None:
    cpu = torch.device("cpu")
    assert free_bytes(cpu) > 10**8
    base = base_of("sd1")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(budget, "free_bytes", lambda device: 10**9)
        assert available_bytes(base, cpu) == 10**9 + weights_of(base) and available_bytes("sd1", cpu) == 10**9


def test_gpus_by_name() -> None:
    assert gpu_named("T4") == gpu_named("tesla t4")
    assert gpu_named("RTX-4090").budget == 24e9 and gpu_named("RTX-4090", 7).budget == 7e9
    with pytest.raises(SettingsError, match="choose from T4"):
        gpu_named("voodoo")
    with pytest.raises(SettingsError, match="vram_gb"):
        plan("sd1", vram_gb=0)
    with pytest.raises(SettingsError, match="device tpu cannot be used here"):
        plan("sd1", device="tpu")


# --- what people see -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_json_is_stable(folders: dict[str, Path]) -> None:
    found = plan(folders["sd1"], lora=LORA, config=CONFIG, gpu="T4")
    facts = json.loads(json.dumps(found.to_json()))
    assert facts == plan(folders["sd1"], lora=LORA, config=CONFIG, gpu="T4").to_json()
    assert list(facts) == [
        *(
            "base",
            "family",
            "dtype",
            "resolution",
            "pictures",
            "rank",
            "machine",
            "chosen",
            "seconds",
            "seconds_in_all",
            "remedy",
            "ways",
            "offered",
        ),
    ]
    assert (
        facts["seconds"] is None
        and facts["machine"]["budget"] == 15e9
        and facts["dtype"] == "float16"
        and facts["chosen"] == {}
    )
    assert set(facts["ways"][0]) == {
        *("settings", "training", "phases", "reserve", "passes", "flops", "fits", "peak"),
    }


@pytest.mark.slow
def test_on_the_command_line(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["plan", "--base", str(folders["sd1"]), "--rank", "2", *words])
        return int(left.value.code or 0), *capsys.readouterr()

    code, out, _ = said("--vram", "15")
    assert code == 0 and "on T4: 15 GB" in out and "chosen" in out and out.count(" GB  ") >= 4
    code, out, _ = said("--gpu", "t4", "--vram", "7", "--json")
    assert code == 0 and json.loads(out)["machine"]["budget"] == 7e9
    code, out, error = said("--vram", "0.5")  # CUDA's own context takes more
    assert code == 2 and "does not fit" in out and error.startswith("error: tiny-sd1 at 64 px needs at least")
    assert "needs at least" not in out and "the budget on " in error and " is 0.0 GB" not in error
    assert "s/step" not in out and "time:" not in out
    code, out, _ = said("--measure", "--resolution", "64")
    assert code == 0 and re.search(r"time: [\d.e-]+ s a step \(median of 3 here\), about \d+ min for 500 steps", out)
    code, out, error = said("--measure", "--gpu", "T4")
    assert code == 2 and not out and "without --vram, --gpu" in error
    assert said("--base", "sdxl", "--measure")[2] == error
