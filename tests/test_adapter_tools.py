"""Tools on adapters: every figure against plain linear algebra on full matrices, every file against the stock loaders."""

from __future__ import annotations

import json
import math
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pipelines
import pytest
import spoilt
import torch
from diffusers import DDIMScheduler, DDPMScheduler, EDMEulerScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline
from safetensors import safe_open

import lora_booth as lb
from lora_booth.adapters.adapter import Adapter, weighted
from lora_booth.adapters.contents import Card, LoraFactors
from lora_booth.adapters.tools.convert import convert
from lora_booth.adapters.tools.inspection import inspect_adapter
from lora_booth.adapters.tools.spectrum import spectrum, spectrum_of
from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import quiet
from lora_booth.base.original_naming import schedule_marks, unet_weights, vae_weights
from lora_booth.config import LoraSpec
from lora_booth.errors import AdapterBaseMismatch, BaseModelError, LoraBoothError, SettingsError

PROMPT = "a photo of sks dog"
EVERYTHING = (
    *("to_q", "to_k", "to_v", "to_out.0", "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2"),
    *("conv1", "conv2", "time_emb_proj", "conv_shortcut", "downsamplers.0.conv", "upsamplers.0.conv"),
)
WIDE = LoraSpec(rank=4, alpha=2.0, target_modules=EVERYTHING, text_encoder=True)
Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
K = Q.replace("to_q", "to_k")
CONV = "unet.down_blocks.0.resnets.0.conv1"


@pytest.fixture(scope="module")
def bases() -> dict[str, BaseModel]:
    return {kind: BaseModel.from_pipeline(pipelines.make_pipeline(kind), name=f"tiny-{kind}") for kind in pipelines.KINDS}


@pytest.fixture(scope="module")
def rex(bases) -> Adapter:
    return pipelines.random_adapter(bases["sd1"], WIDE, seed=1, size=0.2)


@pytest.fixture(scope="module")
def ink(bases) -> Adapter:
    return pipelines.random_adapter(bases["sd1"], LoraSpec(rank=2, alpha=4.0), seed=2, size=0.2)


def latents(pipeline: Any) -> torch.Tensor:
    """A picture before the VAE rounds it."""
    with quiet(pipeline), torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        return pipeline(PROMPT, num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="latent").images


def pixels(pipeline: Any) -> torch.Tensor:
    """A picture as numbers from 0 to 1."""
    with quiet(pipeline), torch.no_grad():
        generator = torch.Generator().manual_seed(3)
        made = pipeline(PROMPT, num_inference_steps=2, guidance_scale=2.0, generator=generator, output_type="np").images
    return torch.from_numpy(made)


def matrix(factors: LoraFactors) -> torch.Tensor:
    """The whole change as a matrix, float64."""
    return factors.up.double().flatten(1) @ factors.down.double().flatten(1) * factors.scale


def random_factors(out: int, shape: tuple[int, ...], rank: int, seed: int, alpha: float = 3.0) -> LoraFactors:
    g = torch.Generator().manual_seed(seed)
    up = torch.randn(out, rank, *(1 for _ in shape[1:]), generator=g)
    return LoraFactors(torch.randn(rank, *shape, generator=g), up, alpha)


SHAPES = {"linear": (24, (32,)), "convolution": (24, (8, 3, 3)), "1x1": (24, (8, 1, 1)), "wide": (8, (32,)), "tall": (40, (6,))}


# --- resize --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
@pytest.mark.parametrize("rank", [1, 3, 6])
def test_resize_is_the_truncated_svd(kind, rank):
    factors = random_factors(*SHAPES[kind], rank=6, seed=0)
    smaller, report = lb.resize(Adapter({Q: factors}), rank=rank)
    found = smaller.modules[Q]
    u, s, v = torch.linalg.svd(matrix(factors), full_matrices=False)
    best = u[:, :rank] @ torch.diag(s[:rank]) @ v[:rank]
    torch.testing.assert_close(matrix(found), best, rtol=0, atol=1e-5)
    assert found.rank == rank and found.scale == 1 and found.down.dtype == torch.float32
    assert found.down.shape[1:] == factors.down.shape[1:] and found.up.shape[2:] == factors.up.shape[2:]
    (lost,) = report.modules
    assert (lost.module, lost.rank_before, lost.rank) == (Q, 6, rank)
    assert math.isclose(lost.norm, matrix(factors).norm().item(), rel_tol=1e-9)
    true = (matrix(factors) - best).norm() / matrix(factors).norm()
    assert math.isclose(lost.error, true.item(), rel_tol=1e-6, abs_tol=1e-9)
    assert math.isclose(report.error, lost.error) and math.isclose(report.norm, lost.norm)


def test_resize_takes_the_measure_of_each_precision():
    """Half-precision factors are what they are: the singular values are those of the rounded change."""
    factors = random_factors(24, (32,), 6, seed=0)
    half = LoraFactors(factors.down.half(), factors.up.half(), factors.alpha)
    wanted = torch.linalg.svdvals(matrix(half))[:6]
    torch.testing.assert_close(spectrum(half).values, wanted, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("shape", [(24, 32), (32, 24), (24, 8, 3, 3), (40, 2, 3, 3)], ids=str)
def test_spectrum_of_a_whole_change(shape):
    g = torch.Generator().manual_seed(0)
    change = torch.randn(shape, generator=g)
    change[:3] = change[3:6] * 2  # three directions less than there could be
    found = spectrum_of(change)
    wanted = torch.linalg.svdvals(change.flatten(1).double())
    torch.testing.assert_close(found.values, wanted, rtol=0, atol=1e-6)
    assert found.rank() == min(shape[0] - 3, change[0].numel())
    for rank in (1, found.rank()):
        u, s, v = torch.linalg.svd(change.flatten(1).double(), full_matrices=False)
        best = (u[:, :rank] * s[:rank]) @ v[:rank]
        torch.testing.assert_close(matrix(found.factors(rank, shape)), best, rtol=0, atol=1e-5)
        true = (change.flatten(1) - best).norm() / best.norm(dtype=torch.float64).hypot((change.flatten(1) - best).norm())
        assert math.isclose(found.error(rank), true.item(), abs_tol=1e-6)


def test_resize_by_energy():
    """Singular values 3, 2, 1 in one module and one alone in the other: ranks follow them."""
    steep = LoraFactors(torch.eye(3, 8) * torch.tensor([3.0, 2.0, 1.0])[:, None], torch.eye(8, 3), 3.0)
    flat = LoraFactors(torch.eye(3, 8), torch.eye(8, 3), 3.0)
    one = LoraFactors(torch.ones(3, 8), torch.ones(8, 3), 3.0)
    adapter = Adapter({Q: steep, K: flat, CONV: one})
    for energy, ranks in ((0.6, (1, 2, 1)), (9 / 14, (1, 2, 1)), (0.9, (2, 3, 1)), (0.95, (3, 3, 1)), (1.0, (3, 3, 1))):
        smaller, report = lb.resize(adapter, energy=energy)
        assert tuple(smaller.modules[name].rank for name in (Q, K, CONV)) == ranks, energy
        kept = [1 - m.error**2 for m in report.modules]
        assert all(share >= energy - 1e-9 for share in kept)
    assert lb.resize(adapter, energy=0.95, rank=2)[1].ranks == (1, 2)
    lost = {m.module: m for m in lb.resize(adapter, rank=1)[1].modules}
    assert math.isclose(lost[Q].error, math.sqrt(5 / 14)) and math.isclose(lost[K].error, math.sqrt(2 / 3))
    total = lb.resize(adapter, rank=1)[1].error
    assert math.isclose(total, math.sqrt((5 + 2) / (14 + 3 + 9 * 64)))


def test_resize_drops_what_is_not_used_and_keeps_the_dead():
    twice = LoraFactors(torch.ones(2, 8), torch.ones(8, 2), 2.0)
    dead = LoraFactors(torch.ones(2, 8), torch.zeros(8, 2), 2.0)
    smaller, report = lb.resize(Adapter({Q: twice, K: dead}, Card(rank=2, alpha=2.0)), rank=8)
    assert [smaller.modules[name].rank for name in (Q, K)] == [1, 1]
    torch.testing.assert_close(matrix(smaller.modules[Q]), matrix(twice), rtol=0, atol=1e-5)
    assert not matrix(smaller.modules[K]).any() and report.error < 1e-9
    assert (smaller.card.rank, smaller.card.alpha) == (1, 1.0)


def test_resized_files_are_saved_and_read(rex, tmp_path):
    smaller, _ = lb.resize(rex, energy=0.7)
    assert len({f.rank for f in smaller.modules.values()}) > 1 and smaller.card.rank is None
    for layout in ("kohya", "peft"):
        again = Adapter.load(smaller.save(tmp_path / "a.safetensors", layout=layout, dtype="fp32"))
        for name, factors in smaller.modules.items():
            torch.testing.assert_close(matrix(again.modules[name]), matrix(factors), rtol=0, atol=1e-5)


@pytest.mark.parametrize(
    "wrong", [{}, {"rank": 0}, {"rank": 513}, {"energy": 0.0}, {"energy": 1.1}, {"energy": float("nan")}], ids=str
)
def test_resize_settings(rex, wrong):
    with pytest.raises(SettingsError, match="rank|energy"):
        lb.resize(rex, **wrong)


# --- merge ---------------------------------------------------------------------------------------------------------


def test_merge_to_a_rank_is_the_best_of_that_rank(rex, ink):
    pair = [(rex, 0.8), (ink, -0.5)]
    exact, nothing = lb.merge(pair)
    cut, report = lb.merge(pair, method="svd", rank=3)
    assert nothing.error == 0 and report.error > 0.01
    lost, whole = 0.0, 0.0
    for module in report.modules:
        change = matrix(rex.modules[module.module]) * 0.8
        if module.module in ink.modules:
            change = change - 0.5 * matrix(ink.modules[module.module])
        torch.testing.assert_close(matrix(exact.modules[module.module]), change, rtol=0, atol=1e-5)
        tail = torch.linalg.svdvals(change)[3:].norm()
        torch.testing.assert_close((matrix(cut.modules[module.module]) - change).norm(), tail, rtol=1e-4, atol=1e-5)
        assert math.isclose(module.error, (tail / change.norm()).item(), rel_tol=1e-4, abs_tol=1e-6)
        lost, whole = lost + tail.item() ** 2, whole + change.norm().item() ** 2
    assert math.isclose(report.error, math.sqrt(lost / whole), rel_tol=1e-4)


def test_merge_takes_the_largest_rank_of_the_inputs(rex, ink):
    merged, report = lb.merge([(ink, 1.0), (rex, 1.0)], method="svd")
    assert merged.modules[Q].rank == 4 and report.ranks == (4, 4)
    assert {m.rank_before for m in report.modules if m.module == Q} == {6}


def test_merge_settings(rex):
    with pytest.raises(SettingsError, match="method 'mean'"):
        lb.merge([(rex, 1.0)], method="mean")
    with pytest.raises(SettingsError, match="rank 4 with method sum"):
        lb.merge([(rex, 1.0)], rank=4)
    with pytest.raises(LoraBoothError, match="nothing to merge"):
        lb.merge([], method="svd")
    empty = lb.Adapter({})
    assert not lb.merge([(empty, 1.0)], method="svd")[0].modules and not lb.merge([(empty, 1.0)])[0].modules


# --- difference ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", SHAPES)
def test_difference_is_that_of_the_full_matrices(kind):
    a, b = random_factors(*SHAPES[kind], rank=2, seed=0), random_factors(*SHAPES[kind], rank=4, seed=1, alpha=-2.0)
    both = LoraFactors(torch.cat([b.down[:3], a.down[:1]]), torch.cat([b.up[:, :3], a.up[:, :1]], 1), 4.0)
    for other in (b, both):
        (found,) = lb.difference(Adapter({Q: a}), Adapter({Q: other})).modules
        x, y = matrix(a), matrix(other)
        assert (found.rank_a, found.rank_b) == (2, 4)
        assert math.isclose(found.norm_a, x.norm().item()) and math.isclose(found.norm_b, y.norm().item())
        assert math.isclose(found.distance, (x - y).norm().item())
        assert math.isclose(found.cosine, ((x * y).sum() / (x.norm() * y.norm())).item(), abs_tol=1e-9)
        for mean, one, two in ((found.columns, x, y), (found.rows, x.T, y.T)):
            spaces = [torch.linalg.svd(m)[0][:, : torch.linalg.matrix_rank(m)] for m in (one, two)]
            cosines = torch.linalg.svdvals(spaces[0].T @ spaces[1])
            assert math.isclose(mean, (cosines**2).mean().item(), rel_tol=1e-6)


def test_difference_of_near_equals_keeps_its_digits():
    a = random_factors(24, (32,), 4, seed=0)
    b = replace(a, up=(a.up.double() * (1 + 1e-10)))
    found = lb.difference(Adapter({Q: a}), Adapter({Q: b}))
    assert math.isclose(found.relative, 1e-10, rel_tol=1e-3)


def test_difference_in_total(rex, ink):
    found = lb.difference(rex, ink)
    assert not found.only_b and set(found.only_a) == rex.modules.keys() - ink.modules.keys()
    assert [m.module for m in found.modules] == sorted(ink.modules)
    zero = {name: torch.zeros_like(matrix(f)) for name, f in rex.modules.items()}
    other = {name: matrix(ink.modules[name]) if name in ink.modules else empty for name, empty in zero.items()}
    x = torch.cat([matrix(rex.modules[name]).flatten() for name in zero])
    y = torch.cat([other[name].flatten() for name in zero])
    assert math.isclose(found.norm_a, x.norm().item()) and math.isclose(found.norm_b, y.norm().item())
    assert math.isclose(found.distance, (x - y).norm().item())
    assert math.isclose(found.relative, ((x - y).norm() / max(x.norm(), y.norm())).item())
    assert math.isclose(found.cosine, torch.cosine_similarity(x, y, dim=0).item(), abs_tol=1e-9)
    assert math.isclose(lb.difference(ink, rex).cosine, found.cosine, abs_tol=1e-12)


def saved(adapter: Adapter, path: Path, **how: str) -> Adapter:
    return Adapter.load(adapter.save(path, **how))


@pytest.mark.slow
def test_what_a_difference_is_called(rex, ink, bases, tmp_path):
    half = saved(rex, tmp_path / "half.safetensors", layout="peft", dtype="fp16")
    bf16 = saved(rex, tmp_path / "bf16.safetensors", dtype="bf16")
    other = pipelines.random_adapter(bases["sd1"], WIDE, seed=9, size=0.2)
    texts = Adapter({m: f for m, f in rex.modules.items() if m.startswith("text_")}, rex.card)
    cases = {
        "same": (rex, half),
        "scaled copy": (rex, rex.scaled(-0.5)),
        "overlapping": (rex, lb.merge([(rex, 0.7), (other, 0.7)])[0]),
        "unrelated": (rex, other),
    }
    one_seed = replace(
        other, modules={m: replace(f, down=rex.modules[m].down) for m, f in other.modules.items() if m in rex.modules}
    )
    assert lb.difference(rex, one_seed).rows > 0.999 and lb.difference(rex, one_seed).kind == "unrelated"
    for kind, (a, b) in cases.items():
        assert lb.difference(a, b).kind == kind and str(lb.difference(a, b)).startswith(kind)
    assert lb.difference(rex, bf16).kind in ("same", "scaled copy") and lb.difference(rex, bf16).relative < 0.01
    assert "a times -0.5" in str(lb.difference(rex, rex.scaled(-0.5)))
    merged = lb.difference(*cases["overlapping"])
    assert merged.columns > 0.999 and merged.rows > 0.999 and "the same way" in str(merged)
    assert "no module in common" in str(lb.difference(texts, ink))
    dead = rex.scaled(0.0)
    assert lb.difference(dead, dead).kind == "same" and lb.difference(rex, dead).cosine == 0
    json.dumps(lb.difference(rex, dead).as_dict(), allow_nan=False)


def test_difference_of_adapters_for_other_bases(rex, bases):
    with pytest.raises(AdapterBaseMismatch, match="sd1 and sdxl"):
        lb.difference(rex, pipelines.random_adapter(bases["sdxl"]))
    with pytest.raises(AdapterBaseMismatch, match="different bases"):
        lb.difference(Adapter({Q: random_factors(8, (8,), 2, 0)}), Adapter({Q: random_factors(8, (9,), 2, 0)}))


# --- one layer in two spellings ------------------------------------------------------------------------------------

LINEAR_1X1 = {"unet.down_blocks.0.attentions.0.proj_in": (24, (8,)), "unet.mid_block.attentions.0.proj_out": (8, (24,))}


def in_both_spellings(seed: int) -> tuple[Adapter, Adapter]:
    linear = {name: random_factors(*shape, rank=2, seed=seed) for name, shape in LINEAR_1X1.items()}
    one_by_one = {name: f.fitted((*f.shape, 1, 1)) for name, f in linear.items()}
    return Adapter(linear, Card(family="sd2")), Adapter(one_by_one, Card(family="sd2"))


@pytest.mark.parametrize("method", ["sum", "svd"])
def test_adapters_in_two_spellings_are_merged_and_compared(method):
    (a, a_too), (b, b_too) = in_both_spellings(1), in_both_spellings(2)
    wanted, _ = lb.merge([(a, 0.5), (b, -2.0)], method=method)
    for pair in ([(a_too, 0.5), (b, -2.0)], [(a, 0.5), (b_too, -2.0)], [(a_too, 0.5), (b_too, -2.0)]):
        merged, _ = lb.merge(pair, method=method)
        for name, factors in merged.modules.items():
            torch.testing.assert_close(matrix(factors), matrix(wanted.modules[name]), rtol=1e-5, atol=1e-5)
            assert factors.shape == pair[0][0].modules[name].shape
    many = [(x, 0.2) for x in in_both_spellings(3)] * 12  # more ranks than the layers have
    for name, factors in lb.merge(many)[0].modules.items():
        torch.testing.assert_close(matrix(factors), matrix(many[0][0].modules[name]) * 4.8, rtol=1e-5, atol=1e-4)
    found, plain = lb.difference(a, b_too), lb.difference(a, b)
    assert found.cosine == pytest.approx(plain.cosine) and found.distance == pytest.approx(plain.distance)
    assert lb.difference(a, a_too).kind == "same"


def test_a_kernel_is_not_another_spelling():
    a, b = ({CONV: random_factors(24, shape, 2, 0)} for shape in ((8, 3, 3), (72,)))
    with pytest.raises(AdapterBaseMismatch, match="different bases"):
        lb.merge([(Adapter(a), 1.0), (Adapter(b), 1.0)])
    with pytest.raises(AdapterBaseMismatch, match="different bases"):
        lb.difference(Adapter(a), Adapter(b))


# --- what is passed as adapters ------------------------------------------------------------------------------------


@pytest.mark.parametrize("weight", [math.nan, math.inf, -math.inf, 1e308, 101, 10**400, True, "0.5", [1.0]])
def test_what_is_not_a_weight_is_a_settings_error(weight, rex, bases, tmp_path):
    with pytest.raises(SettingsError, match="weight"):
        lb.merge([(rex, 1.0), (rex, weight)], method="svd")
    with pytest.raises(SettingsError, match="weight"):
        lb.bake(bases["sd1"], [(rex, weight)], tmp_path / "a.safetensors")
    with pytest.raises(SettingsError, match="weight"):
        rex.scaled(weight)
    with pytest.raises(SettingsError, match="weight"):
        lb.Composition(bases["sd1"], [(rex, weight)])
    with pytest.raises(SettingsError, match="weight"), lb.attached(bases["sd1"], [(rex, weight)]):
        pass
    assert not list(tmp_path.iterdir())


def test_adapters_are_taken_for_what_they_plainly_are(rex, ink, tmp_path):
    file = rex.with_card(weight=0.25).save(tmp_path / "rex.safetensors", dtype="fp32")
    light = rex.with_card(weight=0.25)
    for given, weights in (
        (rex, [1.0]), (light, [0.25]), (file, [0.25]), (str(file), [0.25]), ((rex, 2), [2.0]), ((str(file), 2), [2.0]),
        ([rex, ink], [1.0, 1.0]), ((rex, ink), [1.0, 1.0]), ([(rex, 0.5), str(file)], [0.5, 0.25]),
        ((light, None), [0.25]), ([(light, None), light], [0.25, 0.25]),
        (((rex, 0.5), (ink, 0.1)), [0.5, 0.1]), (iter([[rex, 0.5]]), [0.5]), ({rex: 0.5}.items(), [0.5]), ([], []),
    ):  # fmt: skip
        found = weighted(given)
        assert [weight for _, weight in found] == weights and all(type(weight) is float for _, weight in found)
        assert all(isinstance(adapter, Adapter) for adapter, _ in found)
    for given in (None, 5, [None], [(rex, 1.0, 2.0)], [()], {"a": 1}.values(), [[]], b"rex"):
        with pytest.raises(SettingsError, match="is not an adapter"):
            weighted(given)


def test_factors_that_are_not_finite_are_named(rex):
    broken = replace(rex, modules={Q: replace(rex.modules[Q], up=rex.modules[Q].up * math.nan)})
    for use in (lambda: lb.difference(rex, broken), lambda: lb.resize(broken, rank=1), lambda: lb.merge(broken, method="svd")):
        with pytest.raises(LoraBoothError, match="not finite"):
            use()


# --- inspection ----------------------------------------------------------------------------------------------------


def test_inspection(rex):
    dead = {Q: replace(rex.modules[Q], alpha=0.0), CONV: replace(rex.modules[CONV], up=rex.modules[CONV].up * 0)}
    found = inspect_adapter(replace(rex, modules=dict(rex.modules) | dead))
    assert found.dead == tuple(sorted(dead))
    assert found.ranks == {4: len(rex.modules)} and found.alphas == {0.0: 1, 2.0: len(rex.modules) - 1}
    begins = {"down": "unet.down", "mid": "unet.mid", "up": "unet.up", "text encoder": "text_encoder."}
    assert list(found.norms) == list(begins)
    for block, begin in begins.items():
        parts = [matrix(f) for m, f in rex.modules.items() if m.startswith(begin) and m not in dead]
        assert math.isclose(found.norms[block], math.sqrt(sum(p.norm().item() ** 2 for p in parts)))
    shapes = {m.module: m.shape for m in found.modules}
    assert len(shapes[CONV]) == 4 and len(shapes[Q]) == 2
    json.dumps(asdict(found), allow_nan=False)


# --- bake ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_original_names_are_those_of_the_published_models():
    """The stock loader finds every weight of the full-size U-Nets and VAEs under our names (weightless here)."""
    from diffusers import AutoencoderKL, UNet2DConditionModel
    from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint, convert_ldm_vae_checkpoint

    from lora_booth.base.single_file import CONFIGS

    spots = {
        "sd1": {"output_blocks.8.2.conv.weight", "output_blocks.2.1.conv.bias", "input_blocks.3.0.op.weight"},
        "sd2": {"middle_block.1.transformer_blocks.0.attn2.to_k.weight", "output_blocks.11.1.transformer_blocks.0.norm1.bias"},
        "sdxl": {"label_emb.0.2.bias", "output_blocks.2.2.conv.weight", "input_blocks.8.1.transformer_blocks.9.ff.net.2.bias"},
    }
    for family, some in spots.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(CONFIGS / family / "unet"))
            vae = AutoencoderKL.from_config(AutoencoderKL.load_config(CONFIGS / family / "vae"))
        named = unet_weights(unet.state_dict(), unet.config)
        assert some <= named.keys() and len(named) == len(unet.state_dict())
        stock = convert_ldm_unet_checkpoint({f"model.diffusion_model.{k}": v for k, v in named.items()}, dict(unet.config))
        assert {k: v.shape for k, v in stock.items()} == {k: v.shape for k, v in unet.state_dict().items()}
        named = vae_weights(vae.state_dict(), vae.config)
        assert (
            named["decoder.mid.attn_1.q.weight"].shape == (512, 512, 1, 1) and "encoder.down.2.downsample.conv.weight" in named
        )
        stock = convert_ldm_vae_checkpoint({f"first_stage_model.{k}": v for k, v in named.items()}, dict(vae.config))
        assert stock.keys() == vae.state_dict().keys()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2-v", "sdxl"])
def test_a_baked_checkpoint_makes_the_pictures_of_the_attached_adapters(kind, bases, folders, tmp_path):
    base = bases[kind]
    pair = [
        (pipelines.random_adapter(base, WIDE, seed=1, size=0.2), 0.8),
        (pipelines.random_adapter(base, LoraSpec(rank=2), seed=2, size=0.2), -0.5),
    ]
    before = pipelines.state(base.pipeline)
    file = lb.bake(base, pair, tmp_path / "new" / "ab.safetensors", dtype="fp32")
    folder = lb.bake(base, pair, tmp_path / "ab", dtype="fp32")
    assert pipelines.same_state(before, pipelines.state(base.pipeline))
    with lb.attached(base, pair) as pipeline:
        wanted = latents(pipeline), pixels(pipeline)
    assert (wanted[0] - latents(base.pipeline)).abs().max() > 0.01
    stock = StableDiffusionXLPipeline if kind == "sdxl" else StableDiffusionPipeline
    loaded = {
        "folder": BaseModel.load(folder, dtype=torch.float32, device="cpu").pipeline,
        "file": BaseModel.load(file, dtype=torch.float32, device="cpu", config=folders[kind]).pipeline,
        "stock": stock.from_single_file(str(file), config=str(folders[kind]), torch_dtype=torch.float32),
    }
    for pipeline in loaded.values():
        torch.testing.assert_close(latents(pipeline), wanted[0], rtol=0, atol=1e-4)
        torch.testing.assert_close(pixels(pipeline), wanted[1], rtol=0, atol=1e-4)
    assert pipelines.same_state(pipelines.state(loaded["file"]), pipelines.state(loaded["folder"]))
    assert sorted(p.name for p in tmp_path.iterdir()) == ["ab", "new"] and len(list((tmp_path / "new").iterdir())) == 1


def test_what_a_baked_checkpoint_says_of_itself(bases, folders, rex, tmp_path):
    loaded = BaseModel.load(folders["sd2-v"], dtype=torch.float32, device="cpu")
    adapter = pipelines.random_adapter(loaded, seed=1)
    with safe_open(lb.bake(loaded, [(adapter, 0.5)], tmp_path / "a.safetensors"), "pt") as file:
        assert file.metadata()["modelspec.prediction_type"] == "v"
        assert file.metadata()["modelspec.architecture"] == "stable-diffusion-v2-768-v"
        assert file.metadata()["modelspec.title"] == "tiny-sd2-v + sks 0.5"
        assert {file.get_tensor(key).dtype for key in file.keys() if key != "v_pred"} == {torch.float16}
        assert file.get_tensor("v_pred").shape == (0,)  # as others mark velocity prediction
    assert BaseModel.load(tmp_path / "a.safetensors", device="cpu", config=folders["sd2-v"]).prediction_type == "v_prediction"
    folder = lb.bake(loaded, [(adapter, 0.5)], tmp_path / "a", dtype="bf16")
    text = "".join(path.read_text(encoding="utf-8") for path in folder.rglob("*.json"))
    assert str(folders["sd2-v"]) not in text and "_name_or_path" not in text
    assert BaseModel.load(folder, dtype=torch.float32, device="cpu").prediction_type == "v_prediction"


def test_velocity_prediction_is_marked_as_others_do():
    scheduler = pipelines.make_pipeline("sdxl").scheduler
    assert "v_pred" not in schedule_marks(scheduler)
    scheduler.register_to_config(prediction_type="v_prediction", rescale_betas_zero_snr=True)
    assert schedule_marks(scheduler).keys() == {"v_pred", "ztsnr"}


def test_what_cannot_be_baked(bases, rex, tmp_path):
    base = bases["sd1"]
    with pytest.raises(AdapterBaseMismatch):
        lb.bake(bases["sdxl"], [(rex, 1.0)], tmp_path / "a.safetensors")
    with pytest.raises(SettingsError, match="dtype 'int8'; needed: 'fp16'"):
        lb.bake(base, [(rex, 1.0)], tmp_path / "a.safetensors", dtype="int8")
    with pytest.raises(SettingsError, match="pickle"):
        lb.bake(base, [(rex, 1.0)], tmp_path / "a.ckpt")
    huge = replace(rex, modules={Q: LoraFactors(rex.modules[Q].down * 1e4, rex.modules[Q].up * 1e4, 4.0)})
    with pytest.raises(BaseModelError, match="not finite as float16; try dtype fp32"):
        lb.bake(base, [(huge, 1.0)], tmp_path / "a.safetensors")
    full = tmp_path / "full"
    full.mkdir()
    (full / "mine.txt").write_text("mine")
    with pytest.raises(SettingsError, match="already exists"):
        lb.bake(base, [(rex, 1.0)], full)
    own = pipelines.make_pipeline("sd1")
    rex.save(tmp_path / "rex.safetensors")
    own.load_lora_weights(tmp_path, weight_name="rex.safetensors")
    with pytest.raises(BaseModelError, match="unload_lora_weights"):
        lb.bake(own, [(rex, 1.0)], tmp_path / "a.safetensors")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["full", "rex.safetensors"]
    assert (full / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
def test_what_bake_writes_of_the_schedule_is_read_again(kind, prediction, zero, folders, tmp_path):
    pipeline = pipelines.make_pipeline(kind)
    pipeline.scheduler = DDIMScheduler(**pipelines.SCHEDULE, prediction_type=prediction, rescale_betas_zero_snr=zero)
    file = lb.bake(pipeline, [], tmp_path / "a.safetensors")
    loaded = BaseModel.load(file, device="cpu", config=folders[kind])  # whose own schedule is plain
    assert loaded.prediction_type == prediction
    assert bool(loaded.scheduler.config.get("rescale_betas_zero_snr")) == zero


def altered(**unet: Any) -> StableDiffusionPipeline:
    pipeline = pipelines.make_pipeline("sd1")
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    pipeline.unet = pipelines.UNet2DConditionModel.from_config({**config, **unet}).eval()
    return pipeline


def without(*parts: str) -> StableDiffusionPipeline:
    pipeline = pipelines.make_pipeline("sd1")
    for part in parts:
        setattr(pipeline, part, None)
    return pipeline


def of_schedule(scheduler: Any) -> StableDiffusionPipeline:
    pipeline = pipelines.make_pipeline("sd1")
    pipeline.scheduler = scheduler
    return pipeline


FOLDERS_ONLY = {
    "takes 6 channels": lambda: altered(in_channels=6),
    "without text_encoder": lambda: without("text_encoder", "tokenizer"),
    "without vae and text_encoder": lambda: without("vae", "text_encoder", "tokenizer"),
    "without scheduler": lambda: without("scheduler"),
    "the noise schedule of its EDMEulerScheduler": lambda: of_schedule(EDMEulerScheduler()),
    "the noise schedule of its DDIMScheduler": lambda: of_schedule(DDIMScheduler(beta_schedule="linear")),
    "the noise schedule of its DDPMScheduler": lambda: of_schedule(
        DDPMScheduler(**pipelines.SCHEDULE | {"num_train_timesteps": 500})
    ),
    "prediction type 'sample'": lambda: of_schedule(DDIMScheduler(**pipelines.SCHEDULE, prediction_type="sample")),
}


@pytest.mark.filterwarnings("ignore::lora_booth.errors.OtherBaseWarning")
@pytest.mark.parametrize("kind", FOLDERS_ONLY)
def test_what_no_single_file_holds_is_baked_as_a_folder(kind, ink, tmp_path):
    pipeline = FOLDERS_ONLY[kind]()
    with pytest.raises(BaseModelError, match=f"no single file holds .*{kind}; bake a folder"):
        lb.bake(pipeline, [(ink, 1.0)], tmp_path / "a.safetensors")
    assert not list(tmp_path.iterdir())
    folder = lb.bake(pipeline, [(ink, 0.5)], tmp_path / "a", dtype="fp32")
    found = pipelines.UNet2DConditionModel.from_pretrained(folder, subfolder="unet").state_dict()
    key = Q.removeprefix("unet.") + ".weight"
    wanted = pipeline.unet.state_dict()[key] + 0.5 * ink.modules[Q].delta()
    torch.testing.assert_close(found[key], wanted)


@pytest.mark.filterwarnings("ignore::lora_booth.errors.OtherBaseWarning")
@pytest.mark.parametrize("channels", [8, 9])
def test_models_for_editing_and_inpainting_are_baked_into_a_file(channels, ink, tmp_path):
    file = lb.bake(altered(in_channels=channels), [(ink, 0.5)], tmp_path / "a.safetensors")
    with safe_open(file, "pt") as written:
        assert written.get_slice("model.diffusion_model.input_blocks.0.0.weight").get_shape()[1] == channels
    with pytest.raises(BaseModelError, match="inpainting or editing"):
        BaseModel.load(file)


# --- extract -------------------------------------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_what_was_baked_is_extracted_again(kind, bases, folders, tmp_path):
    base = bases[kind]
    known = pipelines.random_adapter(base, WIDE, seed=1, size=0.2)
    tuned = BaseModel.load(lb.bake(base, [(known, 1.0)], tmp_path / "tuned", dtype="fp32"), dtype=torch.float32, device="cpu")
    found, report = lb.extract(tuned, base, rank=4, text_encoder=True)
    assert found.modules.keys() == known.modules.keys()
    assert {f.rank for f in found.modules.values()} == {4} and not report.left_out
    assert report.error < 1e-5 and math.isclose(report.truncations.error, report.error)
    assert lb.difference(found, known).relative < 1e-5
    assert found.card.title == f"tuned minus tiny-{kind}" and found.card.base_hash == base.fingerprint
    with lb.attached(base, [(saved(found, tmp_path / "found.safetensors", dtype="fp32"), 1.0)]) as pipeline:
        torch.testing.assert_close(pixels(pipeline), pixels(tuned.pipeline), rtol=0, atol=1e-3)
        torch.testing.assert_close(latents(pipeline), latents(tuned.pipeline), rtol=0, atol=1e-3)
    by_energy, _ = lb.extract(tuned, base, energy=0.9999, text_encoder=True)
    assert max(f.rank for f in by_energy.modules.values()) <= 4
    less, lost = lb.extract(tuned, base, rank=2, text_encoder=True)
    cut, same = lb.resize(known, rank=2)
    assert lb.difference(less, cut).relative < 1e-4 and math.isclose(lost.error, same.error, rel_tol=1e-4)
    only_unet, rest = lb.extract(tuned, base, rank=4)
    assert only_unet.modules.keys() == {m for m in known.modules if m.startswith("unet.")} and not rest.left_out


def test_extraction_says_what_it_leaves_out(bases):
    base = bases["sd1"]
    tuned = BaseModel.from_pipeline(pipelines.make_pipeline("sd1"), name="tuned")
    with torch.no_grad():
        tuned.unet.conv_in.weight += 0.1
        tuned.unet.get_submodule(Q[5:]).weight += 0.1
        tuned.unet.conv_norm_out.bias += 1.0
    found, report = lb.extract(tuned, base, rank=4)
    assert list(found.modules) == [Q] and found.modules[Q].rank == 1  # a constant has rank 1
    assert list(report.left_out) == ["unet.conv_in.weight", "unet.conv_norm_out.bias"]
    sizes = [tuned.unet.conv_in.weight.numel() * 0.01, float(tuned.unet.conv_norm_out.bias.numel())]
    inside = tuned.unet.get_submodule(Q[5:]).weight.numel() * 0.01
    assert math.isclose(report.error, math.sqrt(sum(sizes) / (sum(sizes) + inside)), rel_tol=1e-4)


def test_extraction_leaves_out_what_conditions_nothing(bases):
    base, tuned = bases["sdxl"], BaseModel.from_pipeline(pipelines.make_pipeline("sdxl"), name="tuned")
    name = next(name for name, _ in tuned.unet.named_modules() if name.endswith("to_q"))
    with torch.no_grad():
        tuned.unet.get_submodule(name).weight += 0.1
        for values in tuned.text_encoders["text_encoder"].encoder.layers[-1].parameters():
            values += 0.1
    found, report = lb.extract(tuned, base, rank=4, text_encoder=True)
    assert list(found.modules) == [f"unet.{name}"] and not report.left_out


def test_what_cannot_be_extracted(bases):
    with pytest.raises(BaseModelError, match="pass the base that it was tuned from"):
        lb.extract(bases["sd1"], bases["sdxl"], rank=4)
    with pytest.raises(BaseModelError, match="nothing to extract"):
        lb.extract(bases["sd1"], bases["sd1"], rank=4)
    with pytest.raises(SettingsError):
        lb.extract(bases["sd1"], bases["sd1"])
    pipeline = pipelines.make_pipeline("sd1")
    pipeline.unet = pipelines.UNet2DConditionModel.from_config(dict(pipeline.unet.config) | {"block_out_channels": (16, 16)})
    with pytest.raises(BaseModelError, match="neither was made from the other"):
        lb.extract(BaseModel.from_pipeline(pipeline), bases["sd1"], rank=4)


# --- convert -------------------------------------------------------------------------------------------------------

ALPHAS = {"alpha = rank": 4.0, "a power of two": 8.0, "three quarters": 3.0, "a third": 4 / 3}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("kind", "dtype"), [("sd1", "fp16"), ("sd1", "bf16"), ("sd1", "fp32"), ("sd2", "fp16"), ("sdxl", "fp16")]
)
@pytest.mark.parametrize("alpha", ALPHAS.values(), ids=ALPHAS)
def test_kohya_to_peft_to_kohya_gives_the_same_bytes(kind, dtype, alpha, bases, tmp_path):
    adapter = pipelines.random_adapter(bases[kind], replace(WIDE, alpha=alpha), seed=1)
    adapter = replace(adapter, card=replace(adapter.card, rank=4, alpha=alpha))
    first = adapter.save(tmp_path / "first.safetensors", dtype=dtype)
    peft = convert(first, tmp_path / "peft.safetensors", layout="peft")
    back = convert(peft, tmp_path / "back.safetensors")
    one, two, three = (Adapter.load(path).modules for path in (first, peft, back))
    exact = alpha in (4, 8) or (dtype != "fp32" and alpha == 3)  # else it takes more digits than fp32 has
    for name, factors in one.items():
        torch.testing.assert_close(matrix(two[name]), matrix(factors), rtol=0 if exact else 1e-6, atol=0 if exact else 1e-6)
        if dtype != "fp32" or exact:
            assert torch.equal(three[name].up, factors.up) and three[name].alpha == factors.alpha
    if dtype != "fp32" or exact:
        assert back.read_bytes() == first.read_bytes()
        assert convert(back, tmp_path / "again.safetensors", layout="peft").read_bytes() == peft.read_bytes()


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("told", [True, False], ids=["card with alpha", "card without"])
def test_conversion_of_ranks_and_alphas_of_each_module(kind, told, bases, tmp_path):
    """The change is the same. The file is the same too if its card says the alpha; else from the first way back on."""
    adapter = pipelines.random_adapter(bases[kind], WIDE, seed=1)
    modules = {}
    for i, (name, f) in enumerate(sorted(adapter.modules.items())):
        rank, alpha = (4, 2, 1)[i % 3], (8.0, 8.0, 8.0, 2.0, 1.0)[i % 5]
        modules[name] = LoraFactors(f.down[:rank], f.up[:, :rank], alpha)
    card = replace(adapter.card, alpha=8.0 if told else None)
    first = Adapter(modules, card).save(tmp_path / "first.safetensors")
    peft = convert(first, tmp_path / "peft.safetensors", layout="peft")
    back = convert(peft, tmp_path / "back.safetensors")
    again = convert(convert(back, tmp_path / "b.safetensors", layout="peft"), tmp_path / "c.safetensors")
    one, two, three = (Adapter.load(path).modules for path in (first, peft, back))
    for name in one:
        assert torch.equal(matrix(one[name]), matrix(two[name])) and torch.equal(matrix(one[name]), matrix(three[name]))
    assert again.read_bytes() == back.read_bytes()
    assert (back.read_bytes() == first.read_bytes()) == told


def test_conversion_of_another_spelling_keeps_the_precision(tmp_path):
    """sd-scripts writes the projections of SD 2.x as 1x1 convolutions."""
    name = "unet.down_blocks.0.attentions.0.proj_in"
    factors = LoraFactors(torch.randn(4, 32, 1, 1).half(), torch.randn(32, 4, 1, 1).half(), 4.0)
    tensors = {f"{name}.lora_A.weight": factors.down, f"{name}.lora_B.weight": factors.up}
    source = spoilt.saved(tmp_path / "a.safetensors", tensors, {"ss_v2": "True"})
    found = Adapter.load(convert(source, tmp_path / "b.safetensors", layout="kohya")).modules[name]
    assert found.down.dtype == torch.float16 and found.shape == (32, 32)
    assert torch.equal(found.delta(), factors.delta()[:, :, 0, 0])


def test_conversion_keeps_the_precision_and_takes_the_one_given(ink, tmp_path):
    for dtype in ("fp16", "bf16", "fp32"):
        file = ink.save(tmp_path / "a.safetensors", dtype=dtype)
        found = Adapter.load(convert(file, tmp_path / "b.safetensors", layout="peft")).modules
        assert {f.down.dtype for f in found.values()} == {f.down.dtype for f in Adapter.load(file).modules.values()}
    file = convert(file, tmp_path / "c.safetensors", layout="peft", dtype="bf16")
    assert {f.up.dtype for f in Adapter.load(file).modules.values()} == {torch.bfloat16}
