"""A computation that is written down and played again: the same bits for new values, and nothing more in memory."""

from __future__ import annotations

import gc
from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import _disable_current_modes

from lora_booth.base.memory import Meter
from lora_booth.kernels.tape import CannotRecord, Tape

WEIGHT = torch.linspace(-1, 1, 48).view(8, 6).requires_grad_()
KEPT = torch.zeros(8, 6)  # what is added to, as the gradients of a training


def views(x: Tensor) -> Tensor:
    halves = (x @ WEIGHT.detach().t()).chunk(2, dim=1)
    return (halves[0].t() * halves[1].t()[:, :1]).flatten()[1:].sum() + x.expand(3, *x.shape).select(0, 1).sum()


def in_place(x: Tensor) -> Tensor:
    y = torch.zeros(4, 8)
    y.addmm_(x, WEIGHT.detach().t(), alpha=0.5)
    y[1:3].mul_(2).add_(torch.arange(2.0)[:, None])
    KEPT.copy_(y.t() @ x)
    return KEPT.sum() + y.diagonal().sum()


def several_results(x: Tensor) -> Tensor:
    values, places = x.max(dim=1)
    normal, mean, _ = torch.native_layer_norm(x, [6], None, None, 1e-5)
    return (values * places).sum() + normal.abs().sum() * mean.sum()


def gradients(x: Tensor) -> Tensor:
    hidden = torch.nn.functional.gelu(x @ WEIGHT.t())
    loss = torch.nn.functional.scaled_dot_product_attention(*hidden.view(3, 1, 1, 4, 8).unbind()).square().mean()
    (gradient,) = torch.autograd.grad(loss, WEIGHT)
    KEPT.add_(gradient)
    return loss.detach()


def other_look(x: Tensor) -> Tensor:
    """Somebody takes a result and a constant apart behind the back of what is recorded."""
    y = x.exp()
    with _disable_current_modes():
        seen, kept = y.as_strided((3, 2), (4, 1), 2), KEPT.as_strided((3, 2), (4, 1), 1)
    return (seen * kept).sum() + y.sum()


def constants_only(x: Tensor) -> Tensor:
    return KEPT.t()[:2].sum() + x.float().double().float().sum()


@pytest.mark.parametrize("work", [views, in_place, several_results, gradients, other_look, constants_only])
def test_played_again_it_gives_the_same_bits(work: Callable[[Tensor], Tensor]) -> None:
    torch.manual_seed(0)
    rows = 12 if work is gradients else 4
    buffer = torch.randn(rows, 6)
    KEPT.fill_(0.25)
    with Tape() as tape:
        recorded = work(buffer)
    play = tape.player(recorded)
    for value in (torch.randn(rows, 6), torch.randn(rows, 6)):
        KEPT.fill_(0.5)
        wanted, left = work(value), KEPT.clone()
        KEPT.fill_(0.5)
        buffer.copy_(value)
        assert torch.equal(play(), wanted) and torch.equal(KEPT, left)
        assert not play().requires_grad


def test_what_is_read_to_the_last_is_given_back() -> None:
    x = torch.ones(1000)

    def work() -> Tensor:
        y = x
        for _ in range(50):
            y = y * 1.5 + 1
        return y.sum()

    with Tape() as tape:
        result = work()
    play = tape.player(result)
    gc.collect()
    with Meter() as meter:
        play()
    assert meter.peak <= 3 * x.nbytes


def test_a_place_in_memory_that_is_used_again_is_another_tensor() -> None:
    buffer = torch.randn(64, 64)

    def work() -> Tensor:
        total = torch.zeros(())
        for i in range(40):
            total = total + (buffer * i).relu().sum()  # each is freed before the next is made, most likely at its place
        return total

    with Tape() as tape:
        result = work()
    play = tape.player(result)
    buffer.copy_(torch.randn(64, 64))
    assert torch.equal(play(), work())


def test_what_cannot_be_recorded_says_so() -> None:
    x = torch.ones(4)
    with pytest.raises(CannotRecord, match="_local_scalar_dense"), Tape():
        x.sum().item()
    with pytest.raises(CannotRecord, match="another memory"), Tape():
        torch.empty(0).set_(x.untyped_storage())
    with pytest.raises(CannotRecord, match="another precision"), Tape():
        y = x.exp()
        with _disable_current_modes():
            z = y.view(torch.int32)
        z.sum()
