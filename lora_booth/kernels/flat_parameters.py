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
        self._places: list[tuple[int, torch.Size]] = []
        end = 0
        for parameter in parameters:
            self._places.append((end, parameter.shape))
            end += -(-parameter.numel() // APART) * APART
        device = parameters[0].device
        self.values = nn.Parameter(torch.zeros(end, dtype=torch.float32, device=device))
        self.values.grad = torch.zeros_like(self.values)
        same = dtype == torch.float32
        self.near = self.values.data if same else torch.zeros(end, dtype=dtype, device=device)
        self.near_gradient = self.values.grad if same else torch.zeros_like(self.near)
        self.factors: dict[nn.Parameter, Factor] = {}
        tensors = (self.values.data, self.values.grad, self.near, self.near_gradient)
        for parameter, *views in zip(parameters, *map(self.parts_of, tensors), strict=True):
            value, gradient, near, near_gradient = views
            value.copy_(parameter.data)
            parameter.data, parameter.grad = value, gradient
            self.factors[parameter] = Factor(near, near_gradient, gradient)

    def parts_of(self, tensor: Tensor) -> list[Tensor]:
        """A tensor like `values` -> views of it, one for each parameter and in its shape."""
        return [tensor[start : start + shape.numel()].view(shape) for start, shape in self._places]

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
