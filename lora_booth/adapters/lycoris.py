"""LyCORIS adapters whose change has a low rank: rewritten exactly as plain LoRA factors.

The formulas are those of lycoris/modules/{locon,loha,lokr}.py in KohakuBlueleaf/LyCORIS; PEFT's tuners/loha and
tuners/lokr compute the same. m: outputs, n: inputs, k: side of a kernel, r: rank of a part.

- LoCon with a middle factor (Tucker): up @ (mid applied to down)             rank r
- LoHa: (a1 @ b1) * (a2 @ b2), element by element                              rank at most r1 r2
- LoKr: Kronecker product of w1 and w2, each either full or as a @ b         rank(w1) rank(w2)
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from pathlib import Path
from typing import NamedTuple

import torch
from torch import Tensor

from ..errors import AdapterIncomplete
from .layouts import Role

LORA, TUCKER, LOHA, LOKR = "LoRA", "LoRA with a middle factor", "LoHa", "LoKr"
_HADA = frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
_W1 = (frozenset(("lokr_w1",)), frozenset(("lokr_w1_a", "lokr_w1_b")))
_W2 = (frozenset(("lokr_w2",)), frozenset(("lokr_w2_a", "lokr_w2_b")), frozenset(("lokr_w2_a", "lokr_w2_b", "lokr_t2")))
FORMS: dict[frozenset[Role], str] = {  # the tensors of one module except alpha
    frozenset(("down", "up")): LORA,
    frozenset(("down", "mid", "up")): TUCKER,
    _HADA: LOHA,
    _HADA | {"hada_t1", "hada_t2"}: LOHA,
    **{w1 | w2: LOKR for w1 in _W1 for w2 in _W2},
}
KERNEL_3X3 = (".conv1", ".conv2", ".conv", ".conv_in", ".conv_out")  # ends of the modules with one, in every family

Shape = tuple[int, ...]


class Plan(NamedTuple):
    """What the factors of one module will be, as known from the header."""

    kind: str
    down: Shape
    up: Shape
    rank: int | None  # of alpha / rank; None: the scale is 1 whatever alpha is


def plan(module: str, shapes: Mapping[Role, Shape], path: Path) -> Plan:
    """shapes: of the module's tensors except alpha. Raises AdapterIncomplete if they do not fit together."""
    kind = FORMS.get(frozenset(shapes))
    if kind is None:
        raise AdapterIncomplete(f"{module}: {', '.join(sorted(shapes))} are not a complete LoRA, LoHa or LoKr", path)
    if kind == LORA:
        return Plan(kind, shapes["down"], shapes["up"], shapes["up"][1] if len(shapes["up"]) > 1 else 1)
    try:
        return {TUCKER: _plan_tucker, LOHA: _plan_loha, LOKR: _plan_lokr}[kind](module, shapes)
    except _Misfit:
        listed = ", ".join(f"{role} {list(shape)}" for role, shape in sorted(shapes.items()))
        raise AdapterIncomplete(f"{module}: the parts of its {kind} do not fit together: {listed}", path) from None


def factors(plan: Plan, tensors: Mapping[Role, Tensor]) -> tuple[Tensor, Tensor]:
    """down and up of the planned shapes; float32 if anything had to be computed."""
    if plan.kind == LORA:
        return tensors["down"], tensors["up"]
    parts = {role: tensor.float() for role, tensor in tensors.items()}
    down, up = {TUCKER: _tucker, LOHA: _loha, LOKR: _lokr}[plan.kind](plan, parts)
    return down.reshape(plan.down).contiguous(), up.reshape(plan.up).contiguous()


class _Misfit(Exception):
    pass


def _must(fits: bool) -> None:
    if not fits:
        raise _Misfit


# --- from shapes ---------------------------------------------------------------------------------------------------


def _planned(kind: str, outer: int, inner: Shape, low: int, rank: int | None) -> Plan:
    up = (outer, low, *(1 for _ in inner[1:]))
    return Plan(kind, (low, *inner), up, rank)


def _inner(module: str, sizes: Shape) -> Shape:
    """The input side of a weight, (n,) or (n, k, k); a kernel may have been flattened."""
    if len(sizes) == 1 and module.endswith(KERNEL_3X3):
        _must(sizes[0] % 9 == 0)
        return (sizes[0] // 9, 3, 3)
    _must(len(sizes) in (1, 3))
    return sizes


def _product(module: str, a: Shape, b: Shape, t: Shape | None) -> tuple[int, int, Shape]:
    """Outputs, rank and input side of a @ b, or with a core t (r, r, k, k) of a (r, m) and b (r, n)."""
    if t is None:
        _must(len(a) == 2 and len(b) in (2, 4) and a[1] == b[0])
        return a[0], a[1], _inner(module, b[1:])
    _must(len(a) == len(b) == 2 and len(t) == 4 and t[:2] == (a[0], b[0]) and t[0] == t[1])
    return a[1], a[0], (b[1], *t[2:])


def _plan_tucker(module: str, shapes: Mapping[Role, Shape]) -> Plan:
    down, mid, up = shapes["down"], shapes["mid"], shapes["up"]
    _must(all(len(s) in (2, 4) and s[2:] in ((), (1, 1)) for s in (down, up)) and len(mid) == 4)
    _must(mid[:2] == (up[1], down[0]) and mid[0] == mid[1])
    return _planned(TUCKER, up[0], (down[1], *mid[2:]), up[1], up[1])


def _plan_loha(module: str, shapes: Mapping[Role, Shape]) -> Plan:
    first, second = (_product(module, shapes[f"hada_w{i}_a"], shapes[f"hada_w{i}_b"], shapes.get(f"hada_t{i}")) for i in (1, 2))
    outer, rank, inner = first
    _must(first == second)
    return _planned(LOHA, outer, inner, min(rank * rank, outer, math.prod(inner)), rank)


def _plan_lokr(module: str, shapes: Mapping[Role, Shape]) -> Plan:
    rank: int | None = None
    if "lokr_w1" in shapes:
        _must(len(shapes["lokr_w1"]) == 2)
        a, c = shapes["lokr_w1"]
    else:
        a, rank, side = _product("", shapes["lokr_w1_a"], shapes["lokr_w1_b"], None)
        _must(len(side) == 1)
        c = side[0]
    if "lokr_w2" in shapes:
        b, *rest = shapes["lokr_w2"] or (0,)
        inner = _inner(module, tuple(rest))
        second = min(b, math.prod(inner))
    else:
        b, low, inner = _product(module, shapes["lokr_w2_a"], shapes["lokr_w2_b"], shapes.get("lokr_t2"))
        _must(rank in (None, low))
        second = min(low, b, math.prod(inner))
    first = min(a, c) if rank is None else min(rank, a, c)
    scaled_by = shapes["lokr_w2_b"][0] if "lokr_w2_b" in shapes else rank
    return _planned(LOKR, a * b, (c * inner[0], *inner[1:]), first * second, scaled_by)


# --- from tensors; all float32 -------------------------------------------------------------------------------------


def _applied(t: Tensor, b: Tensor) -> Tensor:
    """(r, r', k, k) and (r', n) -> (r, n, k, k)"""
    return torch.einsum("ijkl,jn->inkl", t, b)


def _halves(parts: Mapping[Role, Tensor], a: Role, b: Role, t: Role) -> tuple[Tensor, Tensor]:
    """left (m, r) and right (r, n) or (r, n, k, k), whose product is the part."""
    if t in parts:
        return parts[a].T, _applied(parts[t], parts[b])
    return parts[a], parts[b]


def _thin(whole: Tensor) -> tuple[Tensor, Tensor]:
    """The matrix itself, with an identity on its smaller side."""
    outer, inner = whole.shape[0], whole[0].numel()
    if outer <= inner:
        return torch.eye(outer), whole
    return whole.flatten(1), torch.eye(inner).reshape(inner, *whole.shape[1:])


def _kron(a: Tensor, b: Tensor) -> Tensor:
    """(m, n) and (p, q) or (p, q, k, k) -> (m p, n q) or (m p, n q, k, k); torch.kron fails on some views of size 1."""
    (m, n), (p, q, *kernel) = a.shape, b.shape
    product = a.reshape(m, 1, n, 1, *(1 for _ in kernel)) * b.reshape(1, p, 1, q, *kernel)
    return product.reshape(m * p, n * q, *kernel)


def _tucker(plan: Plan, parts: Mapping[Role, Tensor]) -> tuple[Tensor, Tensor]:
    return _applied(parts["mid"], parts["down"].flatten(1)), parts["up"]


def _loha(plan: Plan, parts: Mapping[Role, Tensor]) -> tuple[Tensor, Tensor]:
    left1, right1 = _halves(parts, "hada_w1_a", "hada_w1_b", "hada_t1")
    left2, right2 = _halves(parts, "hada_w2_a", "hada_w2_b", "hada_t2")
    right1, right2 = right1.flatten(1), right2.flatten(1)
    if plan.down[0] == left1.shape[1] ** 2:  # the products of every column with every column (Khatri-Rao)
        up = (left1[:, :, None] * left2[:, None, :]).flatten(1)
        return (right1[:, None] * right2[None]).flatten(0, 1), up
    up, down = _thin((left1 @ right1) * (left2 @ right2))
    return down, up


def _lokr(plan: Plan, parts: Mapping[Role, Tensor]) -> tuple[Tensor, Tensor]:
    halves = []
    for i, inner in ((1, ()), (2, plan.down[2:])):
        whole = parts.get(f"lokr_w{i}")
        if whole is None:
            left, right = _halves(parts, f"lokr_w{i}_a", f"lokr_w{i}_b", f"lokr_t{i}")
            if left.shape[1] <= min(left.shape[0], right[0].numel()):
                halves.append((left, right))
                continue
            whole = left @ right.flatten(1)
        halves.append(_thin(whole.reshape(whole.shape[0], -1, *inner)))
    (left1, right1), (left2, right2) = halves
    return _kron(right1, right2.reshape(right2.shape[0], -1, *plan.down[2:])), _kron(left1, left2)
