"""LyCORIS adapters whose change has a low rank: rewritten exactly as plain LoRA factors.

The formulas are those of lycoris/modules/{locon,loha,lokr}.py in KohakuBlueleaf/LyCORIS; PEFT's tuners/loha and
tuners/lokr compute the same. m: outputs, n: inputs, k: side of a kernel, r: rank of a part.

- LoCon with a middle factor (Tucker): up @ (mid applied to down)             rank r
- LoHa: (a1 @ b1) * (a2 @ b2), element by element                              rank at most r1 r2
- LoKr: Kronecker product of w1 and w2, each either full or as a @ b         rank(w1) rank(w2)
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from .layouts import FORMS, KERNEL_3X3, LOHA, LOKR, TUCKER, Role

Lora = tuple[Tensor, Tensor, int | None]  # down, up, and the rank of alpha / rank; None: the scale is 1 whatever alpha is


def as_lora(module: str, parts: Mapping[Role, Tensor]) -> Lora:
    """parts: complete, all float32. On the meta device it computes the shapes alone.

    Raises ValueError, RuntimeError or IndexError if the parts do not fit together.
    """
    down, up, rank = {TUCKER: _tucker, LOHA: _loha, LOKR: _lokr}[FORMS[frozenset(parts)]](module, parts)
    return down.contiguous(), up.reshape(*up.shape[:2], *(1 for _ in down.shape[2:])).contiguous(), rank


def _must(fits: bool) -> None:
    if not fits:
        raise ValueError("the parts do not fit together")


def _applied(core: Tensor, right: Tensor) -> Tensor:
    """(r, r, k, k) and (r, n) -> (r, n, k, k)"""
    _must(core.ndim == 4 and core.shape[0] == core.shape[1] == right.shape[0])
    return torch.einsum("ijkl,jn->inkl", core, right)


def _kernel(module: str, matrix: Tensor) -> Tensor:
    """(m, n) or (m, n, k, k); a kernel may have been flattened."""
    _must(matrix.ndim in (2, 4))
    return matrix.reshape(matrix.shape[0], -1, 3, 3) if matrix.ndim == 2 and module.endswith(KERNEL_3X3) else matrix


def _halves(module: str, parts: Mapping[Role, Tensor], a: Role, b: Role, core: Role) -> tuple[Tensor, Tensor]:
    """left (m, r) and right (r, n) or (r, n, k, k), whose product is the part."""
    left, right = parts[a], parts[b]
    _must(left.ndim == 2)
    if core in parts:
        _must(left.shape[0] == right.shape[0] and right.ndim == 2)
        return left.T, _applied(parts[core], right)
    _must(left.shape[1] == right.shape[0])
    return left, _kernel(module, right)


def _product(left: Tensor, right: Tensor) -> Tensor:
    return (left @ right.flatten(1)).reshape(left.shape[0], *right.shape[1:])


def thin(whole: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix itself, with an identity on its smaller side."""
    outer, inner = whole.shape[0], whole[0].numel()
    identity = torch.eye(min(outer, inner), device=whole.device)
    return (identity, whole) if outer <= inner else (whole.flatten(1), identity.reshape(inner, *whole.shape[1:]))


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """(m, n) and (p, q) or (p, q, k, k) -> (m p, n q) or (m p, n q, k, k); torch.kron fails on some views of size 1."""
    (m, n), (p, q, *kernel) = a.shape, b.shape
    product = a.reshape(m, 1, n, 1, *(1 for _ in kernel)) * b.reshape(1, p, 1, q, *kernel)
    return product.reshape(m * p, n * q, *kernel)


def _tucker(module: str, parts: Mapping[Role, Tensor]) -> Lora:
    down, mid, up = parts["down"], parts["mid"], parts["up"]
    _must(all(t.ndim in (2, 4) and t.shape[2:] in ((), (1, 1)) for t in (down, up)) and up.shape[1] == mid.shape[0])
    return _applied(mid, down.flatten(1)), up.flatten(1), mid.shape[0]


def _loha(module: str, parts: Mapping[Role, Tensor]) -> Lora:
    (left1, right1), (left2, right2) = (_halves(module, parts, f"hada_w{i}_a", f"hada_w{i}_b", f"hada_t{i}") for i in (1, 2))
    _must(left1.shape == left2.shape and right1.shape == right2.shape)
    outer, rank = left1.shape
    if rank**2 <= min(outer, right1[0].numel()):  # the products of every column with every column (Khatri-Rao)
        up = (left1[:, :, None] * left2[:, None, :]).flatten(1)
        return (right1[:, None] * right2[None]).flatten(0, 1), up, rank
    up, down = thin(_product(left1, right1) * _product(left2, right2))
    return down, up, rank


def _lokr(module: str, parts: Mapping[Role, Tensor]) -> Lora:
    halves, ranks = [], []
    for i, name in ((1, ""), (2, module)):  # only the second part has a kernel
        if f"lokr_w{i}" in parts:
            halves.append(thin(_kernel(name, parts[f"lokr_w{i}"])))
            continue
        left, right = _halves(name, parts, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")
        ranks.append(left.shape[1])
        low = left.shape[1] <= min(left.shape[0], right[0].numel())
        halves.append((left, right) if low else thin(_product(left, right)))
    (left1, right1), (left2, right2) = halves
    _must(right1.ndim == 2 and len(set(ranks)) < 2)
    return _kron(right1, right2), _kron(left1, left2), ranks[0] if ranks else None
