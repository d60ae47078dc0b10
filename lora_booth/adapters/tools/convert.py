"""Converting an adapter file to the other naming without changing what it does."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import get_args

import torch
from torch import Tensor

from ...errors import AdapterNonFinite
from ..adapter import Adapter
from ..contents import MAX_SCALE, Dtype, Layout, LoraFactors
from ..writing import DTYPES, packed

ROUNDING = 2.0**-23  # of float32, relative


def convert(source: str | Path, out: str | Path, *, layout: Layout = "kohya", dtype: Dtype | None = None) -> Path:
    """Rewrite an adapter file in another naming. The change of every layer stays the same.

    dtype  None: that of the source, or fp32 if that could not hold the change (PEFT naming folds alpha / rank into
           `lora_B`, which may need more digits)
    kohya -> peft -> kohya restores a file written by `save` byte for byte if its modules have the card's alpha, as those of
    `train` do (in fp32 only if alpha / rank is a power of two, else the last digit is rounded). Any other file comes back
    with another alpha and the same change.
    """
    adapter = Adapter.load(source)
    if layout == "kohya":
        adapter = unfolded(adapter)
    return adapter.save(out, layout=layout, dtype=dtype or narrowest(adapter, layout))


def narrowest(adapter: Adapter, layout: Layout) -> Dtype:
    """The adapter's precision if that holds what `layout` writes, else fp32."""
    own = precision(adapter)
    try:
        _, meant = packed(adapter, layout, DTYPES[own], Path(adapter.name))
    except AdapterNonFinite:  # beyond the range of half precision
        return "fp32"
    return own if same_change(adapter, meant, tolerance=0) else "fp32"


def precision(adapter: Adapter) -> Dtype:
    """The precision of all factors if they share one, else fp32, which holds any."""
    dtypes = {tensor.dtype for f in adapter.modules.values() for tensor in (f.down, f.up)}
    return next((name for name in get_args(Dtype) if dtypes == {DTYPES[name]}), "fp32")


def same_change(adapter: Adapter, modules: Mapping[str, LoraFactors], *, tolerance: float) -> bool:
    """Whether down factors are equal, and scaled up factors differ by at most `tolerance`, relative to each element."""
    return all(
        torch.equal(f.down.double().flatten(1), modules[name].down.double().flatten(1))
        and torch.allclose(scaled_up(f), scaled_up(modules[name]), rtol=tolerance, atol=0)
        for name, f in adapter.modules.items()
    )


def scaled_up(factors: LoraFactors) -> Tensor:
    return factors.up.double().flatten(1) * factors.alpha / factors.rank


def unfolded(adapter: Adapter) -> Adapter:
    """Give a folded adapter (alpha = rank in every module) the alpha of its card again, if that is lossless.

    The precision is the first from which folding gives this adapter, so fp32 that only folding needed is dropped.
    """
    alpha = torch.tensor(adapter.card.alpha or 0.0, dtype=torch.float32).item()  # as files hold it
    if not alpha or any(f.alpha != f.rank or abs(alpha / f.rank) > MAX_SCALE for f in adapter.modules.values()):
        return adapter
    for name, dtype in DTYPES.items():
        modules = {
            m: LoraFactors(f.down.to(dtype), (f.up.float() * (f.rank / alpha)).to(dtype), alpha)
            for m, f in adapter.modules.items()
        }
        source = replace(adapter, modules=modules)
        if same_change(adapter, modules, tolerance=0 if name == "fp32" else ROUNDING):
            if narrowest(source, "peft") == precision(adapter):
                return source
    return adapter
