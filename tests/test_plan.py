"""plan(): what it predicts from shapes alone is what real pipelines take; the fastest that fits is chosen."""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import make_pipeline
from torch.utils.flop_counter import FlopCounterMode

from lora_booth import cli
from lora_booth.base.base_model import BaseModel
from lora_booth.base.memory import Meter, saved_for_backward, storage_bytes
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import BaseModelError, SettingsError
from lora_booth.kernels.attention import attention_shapes
from lora_booth.kernels.lora import APART
from lora_booth.planning import planning
from lora_booth.planning.counting import Counter, count, count_step, inputs
from lora_booth.planning.devices import GPUS, Rates, free_bytes, gpu_named, measured_rates
from lora_booth.planning.planning import RESERVE, DoesNotFit, Machine, Plan, Planner, fitted, plan
from lora_booth.planning.shapes import Shapes, shapes_of, without_weights
from lora_booth.training.settings import settled

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(steps=4, batch_size=2, prior_loss_weight=0.0)
RATES = Rates(flops=1e12, bandwidth=1e11, kernel_seconds=1e-5, spread=1.5, source="a test")


def base_of(kind: str, dtype: torch.dtype = torch.float32) -> BaseModel:
    return BaseModel.from_pipeline(make_pipeline(kind).to(dtype), name="tiny")


@cache
def counter_of(kind: str, dtype: torch.dtype = torch.float32, lora: LoraSpec = LORA) -> Counter:
    return Counter(shapes_of(base_of(kind)), dtype=dtype, lora=lora)


def planned(kind: str = "sd1", *, budget: float, config: TrainingConfig = CONFIG, device: str = "cuda") -> Plan:
    counter = counter_of(kind)
    machine = Machine("a test", device, budget, 0.0, RATES)
    return Planner(counter, machine, settled(config, counter.base, 3), 3, lazy=True).plan()


# --- what is counted -----------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "lora", "config"),
    [
        ("sd1", LORA, TrainingConfig()),
        ("sd1", LORA, TrainingConfig(lean=False, gradient_checkpointing=True)),
        ("sd2", LORA, TrainingConfig(lean=False, attention="plain")),
        ("sd2-v", replace(LORA, dropout=0.1), TrainingConfig(lean=False, min_snr_gamma=5.0)),
        ("sdxl", replace(LORA, text_encoder=True), TrainingConfig(lean=False)),
    ],
)
def test_counts_without_weights_are_those_of_the_real_model(kind: str, lora: LoraSpec, config: TrainingConfig) -> None:
    real = base_of(kind)
    shapes = without_weights(shapes_of(real), torch.float32)
    assert all(p.is_meta for module in shapes.structure.values() for p in module.parameters())
    counted = [count_step(base, lora, config, 2, 64) for base in (real, shapes)]
    assert counted[0].saved == counted[1].saved > 0
    if config.lean:  # then a CPU lays small things out otherwise
        assert counted[1].peak == pytest.approx(counted[0].peak, rel=0.2)
    else:
        traffic = [(one.moved, one.kernels) for one in counted]  # tokens come from the host
        assert traffic[1] == pytest.approx(traffic[0], rel=0.002)
        assert len({replace(one, moved=0, kernels=0) for one in counted}) == 1
    assert counted[1].peak > counted[1].saved and counted[1].flops > 1.9 * counted[1].forward_flops > 0


@pytest.mark.slow
def test_plain_attention_keeps_its_scores(monkeypatch: pytest.MonkeyPatch) -> None:
    counter = counter_of("sd1")
    fused, plain = (counter.step(replace(CONFIG, attention=a), pictures=2, resolution=64) for a in ("sdpa", "plain"))  # type: ignore[arg-type]
    scores = sum(h * q * k * n for (h, q, k, _), n in attention_shapes(counter.base, 64).items())
    assert plain.saved - fused.saved == pytest.approx(2 * 4 * scores, rel=0.4) and plain.peak > fused.peak
    asked = planned(budget=1e9, config=replace(CONFIG, attention="plain"), device="cpu").forecasts[0]
    monkeypatch.setattr(planning, "fastest_attention", lambda base, **_: "plain")  # as on a CPU in bf16
    assert planned(budget=1e9, device="cpu").forecasts[0] == asked != planned(budget=1e9).forecasts[0]


@pytest.mark.slow
def test_half_precision_differs_in_the_statistics_of_norms_alone() -> None:
    real = base_of("sd1", torch.bfloat16)
    on_cpu, without = (
        count_step(base, LORA, replace(CONFIG, lean=False), 2, 64)
        for base in (real, without_weights(shapes_of(real), torch.bfloat16))
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
    latents, text, _ = inputs(base, 2, 64)
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
    with saved_for_backward(layer) as saved, Meter() as meter:
        y = layer(x.exp())
        assert saved.bytes == 4000  # exp's result, which is the layer's input; not the weights
        assert y.shape == (10,) and meter.live == 4040
    del y
    assert saved.bytes == 0 and meter.live == 0 and meter.peak >= 4040


def test_convolutions_of_a_cpu_work_on_copies() -> None:
    x, weight = torch.empty(2, 8, 16, 16, device="meta"), torch.empty(4, 8, 3, 3, device="meta", requires_grad=True)
    with Meter() as meter:
        y = torch.conv2d(x, weight, padding=1)
        assert (meter.peak, meter.peak_on_cpu) == (y.nbytes, y.nbytes + x.nbytes + weight.nbytes)
        y.sum().backward()
    gradients = y.nbytes + weight.nbytes
    assert meter.peak_on_cpu >= y.nbytes + gradients + weight.nbytes > meter.peak


def test_the_weights_are_no_work() -> None:
    shapes, options = shapes_of(base_of("sd1")), {"pictures": 1, "resolution": 128}
    found = Counter(shapes, dtype=torch.float64, lora=LORA).sample(**options)  # nothing is kept of this one
    counter = Counter(shapes, dtype=torch.float64, lora=LORA)
    assert counter.base and found == count(lambda: counter._denoise(2, 128))


def test_more_pictures_are_on_a_line() -> None:
    counter = counter_of("sd1")
    five = counter.step(CONFIG, pictures=5, resolution=64)
    real = count_step(counter.base, LORA, CONFIG, 5, 64)
    assert five.saved == real.saved and five.flops == real.flops and five.peak == pytest.approx(real.peak, rel=0.02)


def test_a_count_is_made_once(monkeypatch: pytest.MonkeyPatch) -> None:
    shapes, options = shapes_of(base_of("sd1")), {"pictures": 1, "resolution": 64}
    first = Counter(shapes, dtype=torch.float32, lora=LORA).step(CONFIG, **options)
    weights = Counter(shapes, dtype=torch.float32, lora=LORA).weights
    monkeypatch.setattr("lora_booth.planning.counting.count_step", None)
    monkeypatch.setattr("lora_booth.planning.counting.count_weights", None)
    again = Counter(shapes, dtype=torch.float32, lora=LORA)
    assert again.step(CONFIG, **options) == first and again.weights == weights


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
    sizes = {Counter(shapes_of(source), dtype=torch.float32, lora=LORA).weights for source in sources}
    assert len(sizes) == 1 and sizes.pop().unet == storage_bytes(base_of("sd2").unet.parameters())
    (folder / "vae" / "config.json").unlink()
    with pytest.raises(BaseModelError, match="vae/config.json"):
        shapes_of(folder)


@pytest.mark.slow
def test_families_are_built_in() -> None:
    published = {"sd1": 859_520_964, "sd2": 865_910_724, "sdxl": 2_567_463_684}  # parameters of the U-Nets
    for family, size in published.items():
        base = without_weights(shapes_of(family), torch.float16)
        assert base.family.name == family and sum(p.numel() for p in base.unet.parameters()) == size
    with pytest.raises(BaseModelError, match="sd1, sd2, sdxl"):
        shapes_of("sd7")


def test_what_cannot_be_trained_cannot_be_planned() -> None:
    known = shapes_of("sd1")
    inpainting = {**known.parts, "unet": {**known.parts["unet"], "in_channels": 9}}
    with pytest.raises(BaseModelError, match="inpainting"):
        without_weights(Shapes("other", inpainting), torch.float32)


# --- the choice ----------------------------------------------------------------------------------------------------


def test_the_fastest_that_fits_is_chosen() -> None:
    plenty = planned(budget=1e9)
    times = [one.seconds for one in plenty.forecasts]
    assert plenty.chosen is not None and plenty.chosen.settings == {} and plenty.config == plenty.asked
    assert all(one.seconds >= 0.95 * times[0] for one in plenty.forecasts) and len(times) == 4
    by_peak = sorted(plenty.forecasts, key=lambda one: one.phases["training"])
    assert by_peak[-1].settings == {} and by_peak[0].settings == {"pictures_at_a_time": 1, "gradient_checkpointing": True}
    for one in plenty.forecasts:  # just enough for this one: nothing faster may fit
        tight = planned(budget=one.peak + one.reserve)
        assert tight.chosen is not None and tight.chosen.seconds <= one.seconds * 1.05**2
        assert tight.chosen.peak + tight.chosen.reserve <= tight.machine.budget


def test_rank_resolution_and_batch_stay() -> None:
    config = replace(CONFIG, gradient_accumulation=3)
    found = planned(budget=1e9, config=config)
    chosen = {name for one in found.forecasts for name in one.settings}
    assert chosen == {"pictures_at_a_time", "gradient_checkpointing"}
    assert found.pictures == 2 and found.forecasts[0].flops > 3 * 2 * 1e7


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
    with pytest.raises(DoesNotFit, match=r"at 128 px takes .* at the least .* resolution=\d+ would need"):
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


def test_training_takes_what_fits_into_free_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    base, said = base_of("sd1"), []
    config = settled(CONFIG, base, 3)
    assert fitted(base, LORA, config, photos=3, say=said.append) == config and not said  # far below what is free
    monkeypatch.setattr(planning, "measured_rates", lambda device, dtype: RATES)
    monkeypatch.setattr(planning, "EASY", 0.0)
    with monkeypatch.context() as patch:  # it fits: no other way is counted
        patch.setattr(Planner, "plan", None)
        assert fitted(base, LORA, config, photos=3, say=said.append) == config and not said
    asked, *_ = (one for one in plan(base, lora=LORA, config=config, photos=3).forecasts if not one.settings)
    free = asked.peak - storage_bytes(p for m in (*base.structure.values(), base.vae) for p in m.parameters())
    monkeypatch.setattr(planning, "free_bytes", lambda device: int(free) - 1)
    chosen = fitted(base, LORA, config, photos=3, say=said.append)
    assert chosen != config and replace(chosen, pictures_at_a_time=None, gradient_checkpointing=False) == config
    assert len(said) == 1 and "plan: " in said[0]
    monkeypatch.setattr(planning, "free_bytes", lambda device: -(10**9))
    with pytest.raises(DoesNotFit):
        fitted(base, LORA, config, photos=3)
    both = replace(config, pictures_at_a_time=1, gradient_checkpointing=True)
    assert fitted(base, LORA, both, photos=3) == both  # somebody who set both wants to try


def test_this_machine() -> None:
    cpu = torch.device("cpu")
    rates = measured_rates(cpu, torch.float32)
    assert rates.flops > 1e8 and rates.bandwidth > 1e7 and 0 < rates.kernel_seconds < 0.1
    assert measured_rates(cpu, torch.float32) == rates  # kept
    assert free_bytes(cpu) > 10**8


def test_gpus_by_name() -> None:
    assert gpu_named("T4") is gpu_named("tesla t4") is GPUS["t4"] and gpu_named("RTX-4090").half_tflops == 165
    with pytest.raises(SettingsError, match="known are T4"):
        gpu_named("voodoo")
    with pytest.raises(SettingsError, match="vram_gb"):
        plan("sd1", vram_gb=0)


# --- what people see -----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_json_is_stable(folders: dict[str, Path]) -> None:
    found = plan(folders["sd1"], lora=LORA, config=CONFIG, gpu="T4")
    facts = json.loads(json.dumps(found.to_json()))
    assert facts == plan(folders["sd1"], lora=LORA, config=CONFIG, gpu="T4").to_json()
    assert list(facts) == [
        *("base", "family", "dtype", "resolution", "pictures", "rank", "machine", "chosen", "remedy", "ways", "offered"),
    ]
    assert facts["machine"]["budget"] == 15e9 and facts["dtype"] == "float16" and facts["chosen"] == {}
    assert set(facts["ways"][0]) == {
        *("settings", "training", "phases", "reserve", "flops", "seconds", "seconds_range", "fits", "peak"),
    }


@pytest.mark.slow
def test_on_the_command_line(folders: dict[str, Path], capsys: pytest.CaptureFixture[str]) -> None:
    def said(*words: str) -> tuple[int, str, str]:
        with pytest.raises(SystemExit) as left:
            cli.main(["plan", "--base", str(folders["sd1"]), "--rank", "2", *words])
        return int(left.value.code or 0), *capsys.readouterr()

    code, out, _ = said("--vram", "15")
    assert code == 0 and "on T4: 15.0 GB" in out and "chosen" in out and out.count(" GB  ") >= 4
    code, out, _ = said("--gpu", "t4", "--vram", "7", "--json")
    assert code == 0 and json.loads(out)["machine"]["budget"] == 7e9
    code, out, error = said("--vram", "0.5")  # CUDA's own context takes more
    assert code == 2 and "does not fit" in out and error.startswith("error: tiny-sd1 at 64 px takes")
    code, _, error = said("--family", "sd7")
    assert code == 2 and "allowed: sd1, sd2, sdxl" in error
