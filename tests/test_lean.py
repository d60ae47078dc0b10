"""Lean layers: the gradients of stock autograd, from fewer bytes; and the modules as they were."""

from __future__ import annotations

from contextlib import nullcontext
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from diffusers import UNet2DConditionModel
from pipelines import KINDS, base_of, state
from torch import nn

from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec
from lora_booth.injection.trainable import TrainableLora, trainable
from lora_booth.kernels import autograd
from lora_booth.kernels.autograd import FrozenConv2d, Geglu, NormBeside, SumAndNorm
from lora_booth.kernels.lean import lean, rewrites
from lora_booth.kernels.lora import FlatFactors, LoraLinears, LoraPiece
from lora_booth.planning.counting import Meter

EVERY = ("to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2", "proj_in", "conv1", "conv_shortcut", "time_emb_proj")


def call(base: BaseModel, *, side: int = 8, rows: int = 2) -> torch.Tensor:
    """A loss () of one forward pass, prompts encoded with gradients."""
    generator = torch.Generator().manual_seed(3)
    text = base.encode_text(["a dog", "a photo of sks dog"][:rows])
    latents = torch.randn(rows, 4, side, side, generator=generator).to(base.device, base.dtype)
    extra = None
    if base.family.time_ids:
        extra = {"text_embeds": text.pooled, "time_ids": torch.full((rows, 6), 64.0, device=base.device)}
    times = torch.arange(10, 10 + rows, device=base.device)
    result: torch.Tensor = base.unet(latents, times, text.states, added_cond_kwargs=extra).sample
    return result.float().square().mean() + result.float().sum() / 100


def gradients(base: BaseModel, adapter: TrainableLora, **options: Any) -> tuple[float, dict[str, torch.Tensor]]:
    adapter.flat.gradient.zero_()
    torch.manual_seed(5)  # dropout
    adapter.flat.refresh()
    loss = call(base, **options)
    torch.autograd.backward(loss)
    return loss.item(), {n: p.grad.clone() for n, p in adapter.parameters.items() if p.grad is not None}


def fill_up(adapter: TrainableLora) -> None:
    """As after some training: the change is not zero."""
    torch.manual_seed(1)
    with torch.no_grad():
        for name, parameter in adapter.parameters.items():
            if name.endswith(".up"):
                parameter.normal_(0, 0.1)


def far(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> float:
    """The difference of all gradients, as a share of their size; that of each tensor is looked at too, but coarsely."""
    assert a.keys() == b.keys()
    assert all((a[n] - b[n]).norm() <= 2e-4 * b[n].norm() for n in a)
    return float(sum((a[n] - b[n]).square().sum() for n in a) ** 0.5 / sum(b[n].square().sum() for n in a) ** 0.5)


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    ("lora", "side", "checkpointing"),
    [
        (LoraSpec(rank=4), 8, False),
        (LoraSpec(rank=3, alpha=1.5, target_modules=EVERY[:7]), 16, True),
        (LoraSpec(rank=2, dropout=0.4, text_encoder=True), 8, False),
        (LoraSpec(rank=2, target_modules=("conv1", "conv_shortcut", "time_emb_proj")), 8, True),
    ],
    ids=["attention", "linear-checkpointed", "dropout-text", "convolutions"],
)
def test_gradients_are_the_stock_ones(
    kind: str, lora: LoraSpec, side: int, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(autograd, "MANY_WEIGHTS", 0)
    base = base_of(kind)
    weights = state(base.pipeline)
    with trainable(base, lora) as adapter:
        fill_up(adapter)
        if lora.dropout:
            for layer in (m for model in base.components.values() for m in model.modules() if hasattr(m, "lora_dropout")):
                layer.train()
        if checkpointing:
            base.unet.enable_gradient_checkpointing()
            base.unet.train()
        loss, expected = gradients(base, adapter, side=side)
        with lean(base.unet, adapter.flat) as layers:
            assert layers > 20
            found = gradients(base, adapter, side=side)
        again = gradients(base, adapter, side=side)
    assert found[0] == pytest.approx(loss, rel=1e-6)
    assert far(found[1], expected) < 5e-6
    assert again[0] == loss and far(again[1], expected) == 0  # stock again
    assert all(torch.equal(value, weights[name]) for name, value in state(base.pipeline).items())


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_to_float32_as_the_stock_layers(dtype: torch.dtype) -> None:
    exact, half = base_of("sd1"), base_of("sd1", dtype)
    found = []
    for base, is_lean in ((exact, False), (half, False), (half, True)):
        with trainable(base, LoraSpec(rank=4)) as adapter, lean(base.unet, adapter.flat) if is_lean else nullcontext():
            fill_up(adapter)
            found.append(gradients(base, adapter)[1])
    stock, ours = (sum(float((one[n] - found[0][n]).square().sum()) for n in one) ** 0.5 for one in (found[1], found[2]))
    assert all(g.dtype == torch.float32 for g in found[2].values())
    assert 0 < ours < 1.5 * stock


def narrow_unet(dtype: torch.dtype) -> Any:
    """SD 1.5's structure, a tenth as wide."""
    torch.manual_seed(0)
    return UNet2DConditionModel(
        sample_size=16, block_out_channels=(32, 64, 128, 128), attention_head_dim=4, cross_attention_dim=32, norm_num_groups=8
    ).to(dtype)


@pytest.mark.slow
@pytest.mark.parametrize(("dtype", "share"), [(torch.float32, 0.7), (torch.bfloat16, 0.6)])
def test_a_step_keeps_far_less(dtype: torch.dtype, share: float) -> None:
    from lora_booth.injection.trainable import Injection

    unet = narrow_unet(dtype)
    paths = [n for n, m in unet.named_modules() if isinstance(m, nn.Linear) and n.endswith(EVERY[:4])]
    injection = Injection(unet)
    injection.put(paths, rank=4, alpha=4.0)
    for layer in injection.layers.values():
        for factor in (layer.lora_A["lora_booth"], layer.lora_B["lora_booth"]):
            factor.to(torch.float32).requires_grad_(True)
    flat = FlatFactors([p for p in unet.parameters() if p.requires_grad], dtype)
    kept = []
    for context in (nullcontext(), lean(unet, flat)):
        with context, Meter() as meter:
            out = unet(torch.randn(1, 4, 16, 16, dtype=dtype), 5, torch.randn(1, 8, 32, dtype=dtype)).sample
            kept.append(meter.live)
        del out
    injection.remove()
    assert kept[1] < share * kept[0], kept


# --- each by itself ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rows", [1, 3])
@pytest.mark.parametrize(
    ("kernel", "how"),
    [
        (3, {"padding": 1}),
        (3, {"stride": 2, "padding": 1}),
        (3, {"stride": (1, 2), "padding": (0, 2), "dilation": (2, 1)}),
        (1, {}),
        (1, {"stride": 2}),
        (3, {"padding": 1, "groups": 4}),
    ],
)
@pytest.mark.parametrize("size", [(6, 5), (33, 20)])
@pytest.mark.parametrize("as_product", [True, False])
def test_convolutions(
    rows: int, kernel: int, how: dict[str, Any], size: tuple[int, int], as_product: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    if as_product:
        monkeypatch.setattr(autograd, "MANY_WEIGHTS", 0)
        monkeypatch.setattr(autograd, "FEW_PIXELS", 10**6)
    torch.manual_seed(0)
    x = torch.randn(rows, 8, *size, requires_grad=True)
    for bias in (True, False):
        layer = nn.Conv2d(8, 12, kernel, bias=bias, **how).requires_grad_(False)
        expected, found = layer(x), FrozenConv2d.apply(x, layer)
        up = torch.randn_like(expected)
        assert torch.allclose(found, expected, atol=1e-4) and found.is_contiguous()
        (wanted,), (got,) = torch.autograd.grad(expected, x, up), torch.autograd.grad(found, x, up)
        assert torch.allclose(got, wanted, atol=1e-4)


def filled(layer: Any) -> Any:
    """This norm, frozen, with weights that can be told apart."""
    nn.init.normal_(layer.weight)
    nn.init.normal_(layer.bias)
    return layer.requires_grad_(False).double()


def test_what_is_computed_again() -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 8, 3, 3, dtype=torch.float64, requires_grad=True)
    norm = filled(nn.GroupNorm(4, 8))
    for silu in (True, False):
        assert torch.autograd.gradcheck(lambda x: NormBeside.apply(x, norm, silu), (x,))  # noqa: B023
        skip, found = NormBeside.apply(x, norm, silu)
        expected = norm(x)
        assert torch.equal(skip, x) and torch.allclose(found, F.silu(expected) if silu else expected)
    halves = torch.randn(2, 3, 8, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(Geglu.apply, (halves,))
    values, gates = halves.chunk(2, -1)
    assert torch.allclose(Geglu.apply(halves), values * F.gelu(gates))


def test_sums_on_the_way() -> None:
    torch.manual_seed(0)
    x, more = torch.randn(2, 2, 5, 8, dtype=torch.float64).requires_grad_().unbind()
    norm = filled(nn.LayerNorm(8))
    for given in (more, None):
        total, normal = SumAndNorm.apply(x, given, norm)
        assert torch.equal(total, x if given is None else x + more)
        assert torch.allclose(normal, norm(total))
    assert torch.autograd.gradcheck(lambda x, more: SumAndNorm.apply(x, more, norm), (x, more))
    assert torch.autograd.gradcheck(lambda x: SumAndNorm.apply(x, None, norm), (x,))
    assert torch.autograd.gradcheck(lambda x: SumAndNorm.apply(x, x * 2, norm)[1], (x,))


@pytest.mark.parametrize("count", [1, 3])
@pytest.mark.parametrize("biased", [True, False])
def test_lora_layers(count: int, biased: bool) -> None:
    torch.manual_seed(0)
    x = torch.randn(2, 3, 6, dtype=torch.float64, requires_grad=True)
    pieces, expected, factors = [], [], []
    for scale in (0.7, 1.0, -2.0)[:count]:
        weight, bias = torch.randn(5, 6, dtype=torch.float64), torch.randn(5, dtype=torch.float64) if biased else None
        down, up = (torch.randn(*size, dtype=torch.float64, requires_grad=True) for size in ((2, 6), (5, 2)))
        places = torch.full((2, 6), 3.0).double(), torch.zeros(5, 2).double()
        pieces.append(LoraPiece(weight, bias, None, down.detach(), up.detach(), scale, *places, trigger=down))
        expected.append(F.linear(x, weight, bias) + scale * F.linear(F.linear(x, down), up))
        factors += [down, up]
    found = LoraLinears.apply(x, pieces[0].trigger, pieces)
    given = [torch.randn_like(one) for one in expected]
    wanted = torch.autograd.grad(expected, (x, *factors), given)
    got = torch.autograd.grad(found, x, given)
    assert all(torch.allclose(a, b) for a, b in zip(found, expected, strict=True))
    assert torch.allclose(got[0], wanted[0])
    places = [place for piece in pieces for place in (piece.down_gradient, piece.up_gradient)]
    assert all(torch.allclose(a - b, c) for a, b, c in zip(places, [3.0, 0.0] * count, wanted[1:], strict=True))  # added


# --- in and out ----------------------------------------------------------------------------------------------------


def test_who_has_a_forward_or_hooks_keeps_them() -> None:
    base = base_of("sd1")
    seen: list[str] = []
    with trainable(base, LoraSpec(rank=2)) as adapter:
        fill_up(adapter)
        block = base.unet.mid_block.resnets[0]
        own = block.conv2
        stock = own.forward
        own.forward = lambda x: seen.append("own") or stock(x)  # type: ignore[func-returns-value]
        hooks = [
            block.norm1.register_forward_hook(lambda *_: seen.append("norm")),
            base.unet.conv_in.register_forward_hook(lambda *_: seen.append("conv_in")),
        ]
        before = gradients(base, adapter)
        assert sorted(seen) == ["conv_in", "norm", "own"]
        seen.clear()
        mine = vars(own)["forward"]
        with lean(base.unet, adapter.flat):
            found = gradients(base, adapter)
            assert vars(own)["forward"] is mine
        assert sorted(seen) == ["conv_in", "norm", "own"] and vars(own)["forward"] is mine
        assert far(found[1], before[1]) < 5e-6
        for hook in hooks:
            hook.remove()
        del own.forward
    assert not any("forward" in vars(module) for module in base.unet.modules())


@pytest.mark.slow
def test_layers_that_are_set_anew_compute_as_they_are_set() -> None:
    base = base_of("sd1")
    with trainable(base, LoraSpec(rank=2)) as adapter:
        fill_up(adapter)
        layers = [module for module in base.unet.modules() if hasattr(module, "lora_A")]
        name = layers[0].active_adapters[0]

        def scaled(factor: float) -> None:
            for layer in layers:
                layer.scaling[name] *= factor

        def switched(on: bool) -> None:
            for layer in layers:
                layer._disable_adapters = not on  # its method refuses while it trains

        wanted = {1.0: gradients(base, adapter)}
        scaled(0.5)
        wanted[0.5] = gradients(base, adapter)
        assert wanted[0.5][0] != pytest.approx(wanted[1.0][0], rel=1e-3)
        with lean(base.unet, adapter.flat):
            assert far(gradients(base, adapter)[1], wanted[0.5][1]) < 5e-6
            scaled(2.0)
            assert far(gradients(base, adapter)[1], wanted[1.0][1]) < 5e-6
            with_it = call(base).item()
            switched(False)
            assert call(base).item() != pytest.approx(with_it, rel=1e-3)
            switched(True)
            assert call(base).item() == with_it == pytest.approx(wanted[1.0][0], rel=1e-5)


def test_the_layers_come_back_after_an_exception_and_are_stock_without_gradients() -> None:
    base = base_of("sdxl")
    with torch.no_grad():
        expected = call(base)
    with trainable(base, LoraSpec(rank=2)) as adapter:
        with pytest.raises(KeyboardInterrupt), lean(base.unet, adapter.flat):
            assert any("forward" in vars(module) for module in base.unet.modules())
            with torch.no_grad():
                assert torch.equal(call(base), expected)  # up = 0
            raise KeyboardInterrupt
        assert not any("forward" in vars(module) for module in base.unet.modules())


def test_weights_that_are_trained_are_left_alone() -> None:
    layer = nn.Sequential(nn.GroupNorm(1, 3), nn.Conv2d(3, 3, 3), nn.Conv2d(3, 3, 3).requires_grad_(False))
    with lean(layer, FlatFactors([nn.Parameter(torch.zeros(1))], torch.float32)) as layers:
        assert layers == 1 and ["forward" in vars(one) for one in layer] == [False, False, True]


COMPARED = [kind for kind, rewrite in rewrites().items() if rewrite.cases]


@pytest.mark.parametrize("kind", COMPARED)
def test_a_lean_forward_is_used_only_where_the_stock_one_is_the_known_one(kind: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    base, said = base_of("sd1"), list[str]()

    def lean_ones(factors: Any) -> set[type]:
        with lean(base.unet, factors, say=said.append):
            return {type(module) for module in base.unet.modules() if "forward" in vars(module)}

    with trainable(base, LoraSpec(rank=2)) as adapter:
        assert rewrites()[kind].agrees and set(COMPARED) <= lean_ones(adapter.flat) and not said
        stock = kind.forward

        def newer(self: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
            return stock(self, x * 1.1, *args, **kwargs)

        monkeypatch.setattr(kind, "forward", newer)
        rewrites.cache_clear()
        try:
            assert set(COMPARED) - lean_ones(adapter.flat) == {kind}
            assert len(said) == 1 and said[0].startswith(f"note: {kind.__name__} of this diffusers differs")
            expected = gradients(base, adapter)
            with lean(base.unet, adapter.flat):
                assert far(gradients(base, adapter)[1], expected[1]) < 5e-6
            monkeypatch.setattr(kind, "__init__", lambda self, **_: None)  # and other options
            rewrites.cache_clear()
            assert not rewrites()[kind].agrees
        finally:
            rewrites.cache_clear()
