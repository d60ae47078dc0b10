"""One adapter from a composition: the least squares of "ssr", what is lost by each method, and what cannot be one."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pipelines
import pytest
import torch

from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import LoraFactors
from lora_booth.adapters.tools.difference import difference
from lora_booth.adapters.tools.merge import concatenated, merge
from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import quiet
from lora_booth.config import LoraSpec
from lora_booth.errors import AdapterBaseMismatch, SettingsError
from lora_booth.injection import attached
from lora_booth.pictures import calibration
from lora_booth.pictures.calibration import Fits, Seen, calibrated, joint_rows, outputs, routed, routed_module, ups_on
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.one_adapter import by_block
from lora_booth.pictures.regions import Region
from lora_booth.pictures.weights import Weight

EVERYTHING = ("to_q", "to_k", "to_v", "to_out.0", "conv1", "proj_in", "ff.net.2", "time_emb_proj")
PROMPT = "sks dog, do owl"


@pytest.fixture(autouse=True)
def quick(monkeypatch) -> None:
    monkeypatch.setattr(calibration, "STEPS", 2)
    monkeypatch.setattr(calibration, "PROMPTS", ("a {}", "{} do"))


@pytest.fixture(scope="module", params=["sd1", "sd2-v", "sdxl"])
def base(request) -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline(request.param), name="tiny")


@pytest.fixture(scope="module")
def sd1() -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline("sd1"), name="tiny")


def pair(base: BaseModel, **lora: Any) -> tuple[Adapter, Adapter]:
    made = [pipelines.random_adapter(base, LoraSpec(**{"rank": 3} | lora), seed=seed, size=0.4) for seed in (1, 2)]
    cards = [replace(made[0].card, token="sks", class_noun="dog"), replace(made[0].card, token="do", class_noun="owl")]
    rex, bob = (replace(adapter, card=card) for adapter, card in zip(made, cards, strict=True))
    return rex, bob


@pytest.fixture
def untouched(base) -> Iterator[None]:
    """The pipeline is bit-identical after the test, and no hook or wrapper is left."""
    before, names = pipelines.state(base.pipeline), [name for name, _ in base.unet.named_modules()]
    yield
    assert pipelines.same_state(before, pipelines.state(base.pipeline))
    assert [name for name, _ in base.unet.named_modules()] == names
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in base.unet.modules())
    assert not getattr(base.pipeline, "_progress_bar_config", {}).get("disable")


def latents(studio: Composition) -> torch.Tensor:
    with studio.attached(PROMPT) as pipeline, quiet(pipeline):
        generator = torch.Generator().manual_seed(3)
        return pipeline(PROMPT, num_inference_steps=2, generator=generator, output_type="latent").images


# --- the least squares ---------------------------------------------------------------------------------------------


def problem(kernel: tuple[int, ...] = ()) -> tuple[list[LoraFactors], Seen, list[torch.Tensor]]:
    """Three random adapters of one module of 11 outputs and 20 inputs, and 40 inputs of each."""
    generator = torch.Generator().manual_seed(0)
    parts, inputs = [], []
    for rank in (2, 3, 4):
        down = torch.randn(rank, 20, generator=generator)
        parts.append(LoraFactors(down, torch.randn(11, rank, generator=generator), alpha=2.0 * rank))
        inputs.append(torch.randn(20, 20, generator=generator).double() @ torch.randn(20, 40, generator=generator).double())
    rows = joint_rows(parts)
    read = [rows.double() @ x for x in inputs]
    energies = torch.tensor([float(x.square().mean()) * x.shape[1] for x in inputs], dtype=torch.float64)
    return parts, Seen(rows, torch.stack([z @ z.T for z in read]), energies), inputs


@pytest.mark.parametrize("ridge", [1e-9, 0.1, 1e3])
def test_it_is_the_least_squares_solution(ridge):
    """Against torch.linalg.lstsq on the inputs themselves, in float64."""
    parts, seen, inputs = problem()
    made, fit = routed_module("m", parts, seen, None, ridge)
    rows = seen.rows.double()
    white = (ridge * seen.energies.sum()).sqrt() * torch.eye(len(rows), dtype=torch.float64)
    own = [p.up.double() @ p.down.double() * p.scale for p in parts]
    read = torch.cat([*(rows @ x for x in inputs), white], dim=1)
    wanted = torch.cat([*(d @ x for d, x in zip(own, inputs, strict=True)), sum(own) @ rows.T @ white], dim=1)
    best = torch.linalg.lstsq(read.T, wanted.T, driver="gelsd").solution.T
    found = made.up.double() @ made.down.double() * made.scale
    assert torch.allclose(found, best @ rows, atol=1e-5)
    gradient = (found @ rows.T @ read - wanted) @ read.T
    assert float(gradient.norm()) < 1e-5 * float((wanted @ read.T).norm())
    missed = sum(float(((found - d) @ x).square().sum()) for d, x in zip(own, inputs, strict=True)) ** 0.5
    whole = sum(float((d @ x).square().sum()) for d, x in zip(own, inputs, strict=True)) ** 0.5
    of_sum = sum(float(((sum(own) - d) @ x).square().sum()) for d, x in zip(own, inputs, strict=True)) ** 0.5
    assert fit.norm == pytest.approx(whole, rel=1e-5)
    assert fit.error == pytest.approx(missed / whole, rel=1e-4)
    assert fit.error_of_sum == pytest.approx(of_sum / whole, rel=1e-4) and fit.error <= fit.error_of_sum


def test_a_large_ridge_gives_the_sum_and_a_missing_input_too():
    parts, seen, _ = problem()
    for what, ridge in ((seen, 1e9), (replace(seen, grams=0 * seen.grams, energies=0 * seen.energies), 0.1)):
        made, _ = routed_module("m", parts, what, None, ridge)
        assert torch.allclose(made.delta(), sum(p.delta() for p in parts), atol=1e-4)


@pytest.mark.parametrize("rank", [1, 3, 6])
def test_a_lower_rank_is_the_best_of_its_rank(rank):
    """No worse than the plain truncation and than small changes of it, by the objective."""
    parts, seen, _ = problem()
    rows = seen.rows.double()
    metric = seen.grams.sum(0) + 0.1 * seen.energies.sum() * torch.eye(len(rows), dtype=torch.float64)
    best = ups_on(routed_module("m", parts, seen, None, 0.1)[0], rows)

    def objective(change: torch.Tensor) -> float:
        """What it is more than the best of full rank."""
        return float((((change - best) @ metric) * (change - best)).sum())

    made, fit = routed_module("m", parts, seen, rank, 0.1)
    found = ups_on(made, rows)
    left, values, right = torch.linalg.svd(best, full_matrices=False)
    assert made.rank == fit.rank == rank
    assert objective(found) < objective(left[:, :rank] * values[:rank] @ right[:rank])
    generator = torch.Generator().manual_seed(1)
    left, values, right = torch.linalg.svd(found, full_matrices=False)
    for _ in range(20):
        up = left[:, :rank] * values[:rank] + 0.01 * torch.randn(11, rank, generator=generator).double()
        down = right[:rank] + 0.01 * torch.randn(rank, len(rows), generator=generator).double()
        assert objective(up @ down) > objective(found)


# --- on real pipelines ---------------------------------------------------------------------------------------------


def inputs_of(base: BaseModel, adapter: Adapter, paths: list[str]) -> dict[str, torch.Tensor]:
    """All inputs of some modules as patches (tokens, in * kh * kw), kept while the stock pipeline draws as calibration does."""
    kept: dict[str, list[torch.Tensor]] = {path: [] for path in paths}
    handles = []
    for path in paths:
        layer = base.unet.get_submodule(path.removeprefix("unet."))

        def keep(module: Any, args: Any, path: str = path, layer: Any = layer) -> None:
            x = args[0][len(args[0]) // 2 :]
            if isinstance(layer, torch.nn.Conv2d):
                x = torch.nn.functional.unfold(x, layer.kernel_size, padding=layer.padding, stride=layer.stride).mT
            kept[path].append(x.flatten(0, -2))

        handles.append(layer.register_forward_pre_hook(keep))
    with attached(base, [(adapter, 1.0)]) as pipeline, quiet(pipeline), torch.no_grad():
        for seed, prompt in enumerate(calibration.PROMPTS):
            text = prompt.format(f"{adapter.card.token} {adapter.card.class_noun}")
            options = {"num_inference_steps": calibration.STEPS, "guidance_scale": calibration.GUIDANCE}
            pipeline(text, **options, generator=torch.Generator().manual_seed(seed), output_type="latent")
    for handle in handles:
        handle.remove()
    return {path: torch.cat(parts) for path, parts in kept.items()}


def test_each_adapter_is_nearer_to_itself_than_in_the_sum(base, untouched):
    """On the inputs of its own draws, which are kept here in full."""
    adapters = pair(base, target_modules=EVERYTHING, text_encoder=True)
    merged, report = Composition(base, [(a, 1.0) for a in adapters], method="ssr").as_adapter()
    assert isinstance(report, Fits) and report.error < 0.9 * report.error_of_sum
    both = concatenated([(adapter, 1.0) for adapter in adapters])
    paths = [m.module for m in report.modules][::4]
    observed = [inputs_of(base, adapter, paths) for adapter in adapters]
    fits = {m.module: m for m in report.modules}
    for path in paths:
        own = [adapter.modules[path].delta().flatten(1) for adapter in adapters]

        def missed(change: torch.Tensor, path: str = path, own: Any = own) -> float:
            differences = [x[path] @ (change - d).T for x, d in zip(observed, own, strict=True)]
            return sum(float(d.square().sum()) for d in differences) ** 0.5

        whole = sum(float((x[path] @ d.T).square().sum()) for x, d in zip(observed, own, strict=True)) ** 0.5
        now, of_sum = (missed(adapter.modules[path].delta().flatten(1)) / whole for adapter in (merged, both))
        assert now < of_sum
        assert (now, of_sum) == pytest.approx((fits[path].error, fits[path].error_of_sum), rel=1e-3)
    for path, factors in both.modules.items():  # the text encoders' part is the exact sum
        if not path.startswith("unet."):
            assert torch.allclose(merged.modules[path].delta(), factors.delta(), atol=1e-5)
    assert {path for path in merged.modules} == set(both.modules)


def test_one_adapter_is_itself(base, untouched):
    rex, bob = pair(base, target_modules=EVERYTHING)
    modules, _ = routed([rex], calibrated(base, [rex]))
    assert difference(replace(rex, modules=modules), rex).relative < 1e-5
    one = latents(Composition(base, [rex, (bob, 0.0)], method="ssr"))
    assert torch.allclose(one, latents(Composition(base, [rex])), atol=1e-4)
    assert torch.equal(latents(Composition(base, [(rex, 0.0)], method="ssr")), latents(Composition(base)))


def test_neither_order_nor_a_second_time_matters(sd1):
    rex, bob = pair(sd1)
    one, again = (Composition(sd1, [(rex, 0.8), bob], method="ssr").as_adapter()[0] for _ in range(2))
    other = Composition(sd1, [bob, (rex, 0.8)], method="ssr").as_adapter()[0]
    assert one.digest() == again.digest()
    assert difference(one, other).relative < 1e-4


def test_it_is_not_the_sum_and_is_drawn_with_one_pass(sd1):
    rex, bob = pair(sd1)
    studio = Composition(sd1, [rex, bob], method="ssr")
    made = latents(studio)
    assert torch.isfinite(made).all() and not torch.allclose(made, latents(Composition(sd1, [rex, bob])), atol=1e-3)
    assert torch.allclose(made, latents(Composition(sd1, [studio.as_adapter()[0]])), atol=1e-5)
    assert studio.preflight(PROMPT).passes == 1


def test_the_draws_are_made_once_and_told(sd1):
    rex, bob = pair(sd1)
    studio, told = Composition(sd1, [rex, bob], method="ssr"), []
    first = studio.as_adapter(on_progress=lambda done, total: told.append((done, total)))[0]
    assert told == [(1, 4), (2, 4), (3, 4), (4, 4)]
    assert studio.as_adapter(on_progress=lambda *_: pytest.fail("drawn again"))[0].digest() == first.digest()
    cut, report = studio.as_adapter(rank=2, on_progress=lambda *_: pytest.fail("drawn again"))
    assert {f.rank for f in cut.modules.values()} == {2} and report.ranks == (2, 2) and cut.card.rank == 2
    with pytest.raises(SettingsError, match="rank 0"):
        studio.as_adapter(rank=0)


def test_an_interrupt_in_the_draws_leaves_nothing(base, untouched):
    def stop(done: int, total: int) -> None:
        if done == 3:
            raise KeyboardInterrupt

    studio = Composition(base, list(pair(base, text_encoder=True)), method="ssr")
    with pytest.raises(KeyboardInterrupt):
        studio.as_adapter(on_progress=stop)


def test_weights_by_block_are_those_of_scaled_adapters(sd1):
    rex, bob = pair(sd1)
    weight = Weight(0.8, blocks={"down": 0.5, "up.0": 0.0})
    one = Composition(sd1, [(rex, weight), bob], method="ssr").as_adapter()[0]
    other = Composition(sd1, [(by_block(rex, weight), 1.0), bob], method="ssr").as_adapter()[0]
    assert one.digest() == other.digest()


def test_a_style_is_added_as_it_is(sd1):
    rex, bob = pair(sd1)
    style = pipelines.random_adapter(sd1, LoraSpec(rank=2, target_modules=("conv1", "to_q")), seed=9)
    ink = replace(style, card=replace(style.card, token=None, class_noun=None, title="ink"))
    with_ink = Composition(sd1, [rex, (ink, 0.5), bob], method="ssr").as_adapter()[0]
    without = Composition(sd1, [rex, bob], method="ssr").as_adapter()[0]
    wanted = concatenated([(without, 1.0), (ink, 0.5)])
    assert difference(with_ink, wanted).relative < 1e-5 and with_ink.card.title == "sks + do + ink"
    alone = Composition(sd1, [rex, ink], method="ssr")  # nothing to tell apart
    assert "it is the sum" in alone.preflight("sks dog").warnings[0]
    assert difference(alone.as_adapter()[0], concatenated([(rex, 1.0), (ink, 1.0)])).relative < 1e-6


def test_a_module_of_one_subject_is_quiet_on_the_other_s_inputs(sd1):
    rex, bob = pair(sd1)
    _, report = Composition(sd1, [rex, replace(bob, modules={})], method="ssr").as_adapter()
    assert isinstance(report, Fits) and 0 < report.error < report.error_of_sum


def test_adapters_of_two_bases_are_refused_before_a_draw(sd1):
    rex, _ = pair(sd1)
    stranger = pipelines.random_adapter(BaseModel.from_pipeline(pipelines.make_pipeline("sd2")), LoraSpec(rank=2))
    studio = Composition(sd1, [rex, replace(stranger, card=replace(stranger.card, token="do"))], method="ssr")
    with pytest.raises(AdapterBaseMismatch, match="was made for"):
        studio.as_adapter(on_progress=lambda *_: pytest.fail("drawn"))
    found = studio.preflight("sks dog, do", trial=True)  # said, not raised
    assert "was made for" in found.warnings[0] and found.seconds is None and found.overlaps == ()


def test_outputs_are_the_norm_over_all_inputs():
    generator = torch.Generator().manual_seed(0)
    changes, inputs = torch.randn(2, 5, 3, generator=generator), torch.randn(2, 3, 7, generator=generator)
    wanted = float((changes @ inputs).norm())
    assert outputs(changes, inputs @ inputs.mT) == pytest.approx(wanted, rel=1e-5)


# --- one file, with its loss ---------------------------------------------------------------------------------------


def test_a_file_of_a_composition_is_the_composition_for_stock_diffusers(sd1, tmp_path):
    rex, bob = pair(sd1)
    for method in ("sum", "svd", "ssr"):
        studio = Composition(sd1, [rex, (bob, 0.5)], method=method)
        made, report = studio.as_adapter()
        file = made.save(tmp_path / f"{method}.safetensors", dtype="fp32")
        wanted = latents(studio)
        sd1.pipeline.load_lora_weights(file)
        stock = latents(Composition(sd1))
        sd1.pipeline.unload_lora_weights()
        assert torch.allclose(stock, wanted, atol=1e-4)
        said = Adapter.load(file).card.description or ""
        assert said.startswith(f"sks (1) + do (0.5), as one adapter: {method}, ")
        assert f"{report.error:.1%}" in said if method != "sum" else said.endswith("sum, exact")
        if method != "ssr":
            assert report.error == merge([(rex, 1.0), (bob, 0.5)], method=method)[1].error
    assert "as one adapter: svd" in str(Composition(sd1, [rex, bob], method="svd").preflight(PROMPT))


def test_what_one_adapter_cannot_be_is_named(sd1):
    rex, bob = pair(sd1)
    for method in ("switch", "composite"):
        with pytest.raises(SettingsError, match=f"'{method}' cannot be one adapter.*take method"):
            Composition(sd1, [rex, bob], method=method).as_adapter()
    for places in ({"regions": [Region(rex, box=(0, 0, 1, 1))]}, {"adapters": [rex, bob], "regions": "auto"}):
        with pytest.raises(SettingsError, match=r"'regions' cannot be one adapter, which has no places; .*recipe"):
            Composition(sd1, **places).as_adapter()
    for method in ("sum", "svd", "ssr"):
        with pytest.raises(SettingsError, match=r"sks is heard in some .*\(1, steps 0 to 0.5\).*leave out start and end"):
            Composition(sd1, [(rex, Weight(end=0.5)), bob], method=method).as_adapter()
    with pytest.raises(SettingsError, match="start and background are of regions"):
        Composition(sd1, [rex], background="the sea")


# --- the command line ----------------------------------------------------------------------------------------------


def test_commands(call, tmp_path):
    folder = pipelines.save("sd1", tmp_path / "tiny")
    rex, bob = pair(BaseModel.load(folder, dtype=torch.float32, device="cpu"))
    dog, owl = rex.save(tmp_path / "dog.safetensors"), bob.save(tmp_path / "owl.safetensors")
    out = tmp_path / "both.safetensors"
    code, said, err = call("merge", dog, f"{owl}:0.5", "--method", "ssr", "--base", folder, "--rank", 4, "--out", out)
    assert code == 0 and "calibration draw 4/4" in err and "of the adapters' own outputs in total" in said
    assert "do (0.5), as one adapter: ssr, " in (Adapter.load(out).card.description or "")
    code, _, err = call("merge", dog, owl, "--method", "ssr", "--out", out)
    assert code == 2 and "ssr and --base belong together" in err
    words = ["--prompt", PROMPT, "--base", folder, "--steps", 2, "--size", 32]
    code, said, _ = call("preflight", dog, owl, *words, "--region", "dog:0,0,0.5,1", "--region", "owl:0.5,0,1,1", "--trial")
    assert code == 0 and said.startswith("method regions, isolate noise: 2 passes a step, about ")
    code, said, _ = call("preflight", dog, owl, *words, "--method", "ssr", "--trial")
    assert code == 0 and "as one adapter: ssr, " in said and "warning: method ssr of 2 subjects blends them" in said
    code, said, _ = call("preflight", dog, owl, *words, "--auto-regions", "--isolate", "delta")
    assert code == 0 and said.startswith("method regions, isolate delta: 1 pass a step; adapters ")
    assert "sks and do: " in said and "recommended: " in said
    code, _, err = call("preflight", dog, "--prompt", "x", "--region", "cat:0,0,1,1")
    assert code == 2 and "no adapter 'cat'" in err
    code, said, err = call("generate", dog, owl, *words, "--method", "ssr", "--seeds", 1, "--out", tmp_path / "made")
    assert code == 0 and "calibration draw 4/4" in err and (tmp_path / "made" / "000001.png").is_file()
