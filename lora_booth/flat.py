"""All factors of an adapter under training in one tensor, and their gradients in another.

Clearing, clipping, updating and adding up over processes are then one kernel each, however many layers there are; and layers
that compute in half precision read their factors from one copy that is made once for a pass, instead of each its own.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

APART = 64  # a factor begins at a multiple of so many values: kernels read 16 bytes at a time


@dataclass(frozen=True)
class Factor:
    """One factor as layers compute with it: views, all in the shape of its parameter."""

    value: Tensor  # in the precision of the base
    gradient: Tensor  # a place in that precision to add to, for products that cannot give another
    whole_gradient: Tensor  # the gradient itself, float32


class Flat:
    """Makes `parameters` (float32, all on one device), and their gradients, views of two long tensors.

    values    (n,) float32; its `.grad` are the gradients, never None
    near      the values in `dtype`, as of the last `computing`; the values themselves where that is float32
    """

    def __init__(self, parameters: Sequence[nn.Parameter], dtype: torch.dtype) -> None:
        starts, end = [], 0
        for parameter in parameters:
            starts.append(end)
            end += -(-parameter.numel() // APART) * APART
        device = parameters[0].device
        self.values = nn.Parameter(torch.zeros(end, dtype=torch.float32, device=device))
        self.values.grad = torch.zeros_like(self.values)
        same = dtype == torch.float32
        self.near = self.values.data if same else torch.zeros(end, dtype=dtype, device=device)
        self.near_gradient = self.values.grad if same else torch.zeros_like(self.near)
        self.factors: dict[nn.Parameter, Factor] = {}
        for parameter, start in zip(parameters, starts, strict=True):
            views = [
                one[start : start + parameter.numel()].view(parameter.shape)
                for one in (self.values.data, self.values.grad, self.near, self.near_gradient)
            ]
            views[0].copy_(parameter.data)
            parameter.data, parameter.grad = views[:2]
            self.factors[parameter] = Factor(views[2], views[3], views[1])

    @property
    def gradient(self) -> Tensor:
        assert self.values.grad is not None
        return self.values.grad

    @contextmanager
    def computing(self) -> Iterator[None]:
        """Around a forward and a backward pass: the layers' copy is up to date, and what they leave in theirs is added."""
        if self.near.dtype == torch.float32:
            yield
            return
        self.near.copy_(self.values.data)
        self.near_gradient.zero_()
        yield
        self.gradient.add_(self.near_gradient)
