"""Triton's kernels against plain PyTorch in float64: on a CUDA GPU where there is one, elsewhere in Triton's interpreter."""

from __future__ import annotations

import itertools
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from lora_booth.kernels import dispatch as kernels
from lora_booth.kernels.lora import LoraPiece, plain_backward, plain_forward

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HALVES = [torch.float16, torch.bfloat16] if DEVICE.type == "cuda" else [torch.float16]  # numpy, which interprets, has no bf16
DTYPES = [torch.float32, *HALVES]
FAR = {torch.float32: 2e-6, torch.float16: 2e-3, torch.bfloat16: 1.5e-2}


def drawn(*size: int, dtype: torch.dtype = torch.float32) -> Tensor:
    return torch.randn(*size, device=DEVICE).to(dtype)


def away(found: Tensor, exact: Tensor) -> float:
    """Relative to the size of the exact one; NaN never passes."""
    exact = exact.detach().double()
    return float((found.double() - exact).norm() / exact.norm())


def picture(layout: str, rows: int, channels: int, height: int, width: int, dtype: torch.dtype) -> Tensor:
    x = drawn(rows, 2 * channels, height, width, dtype=dtype) + 3  # a mean that is large against the deviation
    if layout == "slice":  # as the gradient of a concatenation is one
        return x.contiguous(memory_format=torch.channels_last)[:, channels:]
    x = x[:, :channels]
    return x.contiguous(memory_format=torch.channels_last) if layout == "last" else x.contiguous()


PICTURES = [
    ("last", 12, 2, 5, 5),
    ("slice", 12, 2, 5, 5),
    ("first", 16, 8, 4, 4),
    ("slice", 48, 1, 3, 1),
    ("last", 32, 2, 1, 1),
]
NORMS = [  # the interpreter, which is slow, takes the precisions in turn
    (*size, silu, dtype)
    for turn, (size, silu) in enumerate(itertools.product(PICTURES, (True, False)))
    for dtype in (DTYPES if DEVICE.type == "cuda" else [DTYPES[turn % len(DTYPES)]])
]


@pytest.mark.slow
@pytest.mark.parametrize(("layout", "channels", "groups", "height", "width", "silu", "dtype"), NORMS)
def test_group_norm(
    layout: str, channels: int, groups: int, height: int, width: int, silu: bool, dtype: torch.dtype,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "TILE", 64)  # several programs for each group
    torch.manual_seed(0)
    x, gradient, skip = (picture(layout, 2, channels, height, width, dtype) for _ in range(3))
    weight, bias = drawn(channels, dtype=dtype), drawn(channels, dtype=dtype)
    exact = x.double().requires_grad_()
    expected = F.group_norm(exact, groups, weight.double(), bias.double(), 1e-5)
    expected = F.silu(expected) if silu else expected
    (wanted,) = torch.autograd.grad(expected, exact, gradient.double())
    y, mean, rstd = kernels.group_norm(x, weight, bias, groups, 1e-5, silu=silu)
    assert y.dtype == dtype and y.is_contiguous(memory_format=torch.channels_last)
    assert away(y, expected) < 10 * FAR[dtype]
    for beside in (None, skip):
        found = kernels.group_norm_backward(gradient, beside, x, mean, rstd, weight, bias, groups, silu=silu)
        exactly = wanted if beside is None else wanted + skip.double()
        scale = exactly.norm() if exactly.norm() > 1e-6 else torch.ones((), device=DEVICE)  # one value: no gradient at all
        assert float((found.double() - exactly).norm() / scale) < 20 * FAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("channels", [8, 24])
def test_layer_norm(dtype: torch.dtype, channels: int) -> None:
    torch.manual_seed(0)
    x, more, gradient, skip = (drawn(2, 5, channels, dtype=dtype) for _ in range(4))
    weight, bias = drawn(channels, dtype=dtype), drawn(channels, dtype=dtype)
    for given in (more, None):
        exact = (x.double() + (0 if given is None else given.double())).requires_grad_()
        expected = F.layer_norm(exact, [channels], weight.double(), bias.double(), 1e-5)
        (wanted,) = torch.autograd.grad(expected, exact, gradient.double())
        total, y, mean, rstd = kernels.layer_norm(x, given, weight, bias, 1e-5)
        assert torch.equal(total, x if given is None else x + more)
        assert away(y, expected) < FAR[dtype]
        for beside in (None, skip):
            found = kernels.layer_norm_backward(gradient, beside, total, mean, rstd, weight)
            assert away(found, wanted if beside is None else wanted + skip.double()) < 4 * FAR[dtype]


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("width", [6, 1300])
def test_geglu(dtype: torch.dtype, width: int) -> None:
    torch.manual_seed(0)
    halves, gradient = drawn(3, 2, 2 * width, dtype=dtype) * 3, drawn(3, 2, width, dtype=dtype)
    exact = halves.double().requires_grad_()
    values, gates = exact.chunk(2, -1)
    expected = values * F.gelu(gates)
    (wanted,) = torch.autograd.grad(expected, exact, gradient.double())
    assert away(kernels.geglu(halves), expected) < 2 * FAR[dtype]
    assert away(kernels.geglu_backward(gradient, halves), wanted) < 2 * FAR[dtype]


def pieces_for(count: int, outs: int, ins: int, rank: int, dtype: torch.dtype, *, biased: bool) -> list[LoraPiece]:
    found = []
    for i in range(count):
        down, up = drawn(rank, ins, dtype=dtype), drawn(outs, rank, dtype=dtype)
        places = torch.ones_like(down, dtype=torch.float32), torch.zeros_like(up, dtype=torch.float32)
        bias = drawn(outs, dtype=dtype) if biased else None
        weight = drawn(outs, ins, dtype=dtype)
        found.append(LoraPiece(weight, bias, None, down, up, 0.5 + i, *places, trigger=down))
    return found


def exactly(piece: LoraPiece) -> LoraPiece:
    """In float64."""
    down, up = piece.down.double(), piece.up.double()
    places = torch.zeros_like(down), torch.zeros_like(up)
    bias = None if piece.bias is None else piece.bias.double()
    return LoraPiece(piece.weight.double(), bias, None, down, up, piece.scale, *places, trigger=down)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize(("count", "rank", "biased"), [(1, 8, True), (2, 12, False), (3, 20, False), (3, 4, True)])
@pytest.mark.parametrize(("rows", "outs", "ins", "fewest"), [(130, 72, 40, 512), (130, 72, 40, 16), (5, 32, 96, 512)])
def test_lora_layers(
    dtype: torch.dtype, count: int, rank: int, biased: bool, rows: int, outs: int, ins: int, fewest: int,
    monkeypatch: pytest.MonkeyPatch,
) -> None:  # fmt: skip
    monkeypatch.setattr(kernels, "FEWEST_ROWS", fewest)  # of tokens that a program adds up
    torch.manual_seed(0)
    x, gradients = drawn(rows, ins, dtype=dtype), [drawn(rows, outs, dtype=dtype) for _ in range(count)]
    pieces = pieces_for(count, outs, ins, rank, dtype, biased=biased)
    exact = [exactly(piece) for piece in pieces]
    weights, exact_weights = ([piece.weight for piece in some] for some in (pieces, exact))
    expected, low = plain_forward(x.double(), exact_weights, exact)
    found, found_low = kernels.lora_linear(x, weights, pieces)
    assert all(away(a, b) < FAR[dtype] for a, b in zip((*found, *found_low), (*expected, *low), strict=True))
    wanted = plain_backward([g.double() for g in gradients], x.double(), low, exact_weights, exact, for_input=True)
    for for_input in (True, False):
        for_x = kernels.lora_linear_backward(gradients, x, found_low, weights, pieces, for_input=for_input)
        assert (for_x is None) != for_input
        if for_input:
            assert away(for_x, wanted) < 2 * FAR[dtype]
    for piece, one in zip(pieces, exact, strict=True):  # added twice, to what was there
        assert away(piece.down_gradient - 1, 2 * one.down_gradient) < 2 * FAR[dtype]
        assert away(piece.up_gradient, 2 * one.up_gradient) < 2 * FAR[dtype]


def test_where_there_are_none() -> None:
    assert not kernels.works_on(torch.device("cpu")) and not kernels.works_on(torch.device("cpu"), kernels.OLDEST_FOR_PRODUCTS)


needs_cuda = pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA GPU")


@needs_cuda
@pytest.mark.parametrize("kind", ["sd1", "sd2", "sdxl"])
@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("checkpointing", [False, True])
def test_a_unet_with_them_has_the_gradients_of_one_without(
    kind: str, dtype: torch.dtype, checkpointing: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    from pipelines import make_pipeline
    from test_lean import fill_up, gradients

    from lora_booth.base.base_model import BaseModel
    from lora_booth.config import LoraSpec
    from lora_booth.injection.trainable import trainable
    from lora_booth.kernels.lean import channels_last, lean

    assert kernels.works_on(torch.device("cuda", 0))
    for place in (torch.backends.cudnn, torch.backends.cuda.matmul):
        monkeypatch.setattr(place, "allow_tf32", False)  # other kernels would round other values
    found: dict[str, Any] = {}
    for way in ("exact", "stock", "lean"):
        base = BaseModel.from_pipeline(make_pipeline(kind).to(DEVICE, torch.float32 if way == "exact" else dtype), name="tiny")
        with trainable(base, LoraSpec(rank=4)) as adapter:
            fill_up(adapter)
            if checkpointing:
                base.unet.enable_gradient_checkpointing()
                base.unet.train()
            if way == "lean":
                with channels_last(base.unet), lean(base.unet, adapter.flat):
                    found[way] = gradients(base, adapter)[1]
            else:
                found[way] = gradients(base, adapter)[1]
        assert all(p.is_contiguous() for p in base.unet.parameters())
    off = {way: sum(float((one[n] - found["exact"][n]).square().sum()) for n in one) ** 0.5 for way, one in found.items()}
    size = sum(float(g.square().sum()) for g in found["exact"].values()) ** 0.5
    assert off["lean"] < max(1.5 * off["stock"], 1e-5 * size)
