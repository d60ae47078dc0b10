"""A composition as one adapter, which any program can load, and what that costs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from ..adapters.adapter import Adapter
from ..adapters.tools.merge import concatenated, merge
from ..adapters.tools.spectrum import Truncations, keep, one_rank
from ..base.base_model import BaseModel
from ..errors import SettingsError
from .calibration import Fits, Progress, Seen, calibrated, routed
from .subjects import phrase_of
from .weights import Weight

ONE_ADAPTER = ("sum", "svd", "ssr")  # methods whose result is one
REMEDY = 'take method "sum", "svd" or "ssr", or pass on a recipe with the adapter files'


def refuse_parts(method: str, adapters: Sequence[tuple[Adapter, Weight]]) -> None:
    """What one adapter cannot be, by name."""
    if method not in ONE_ADAPTER:
        what = "has no places" if method == "regions" else "is heard all the time and by every layer"
        raise SettingsError(f"method {method!r} cannot be one adapter, which {what}; {REMEDY}")
    for adapter, weight in adapters:
        if weight.timed:
            raise SettingsError(
                f"{adapter.name} is heard in some denoising steps only ({weight}), which one adapter cannot be; "
                "leave out start and end, or pass on a recipe with the adapter files"
            )


def by_block(adapter: Adapter, weight: Weight) -> Adapter:
    """The adapter with its weight folded into every module."""
    return replace(adapter, modules={m: replace(f, alpha=f.alpha * weight.of(m)) for m, f in adapter.modules.items()})


def told_apart(adapters: Sequence[tuple[Adapter, Weight]]) -> list[Adapter]:
    """Those that "ssr" routes, weights folded in: with a token, so that the base can draw them. Others are just added."""
    return [by_block(adapter, weight) for adapter, weight in adapters if phrase_of(adapter) and weight.value]


def observed(
    base: BaseModel, adapters: Sequence[tuple[Adapter, Weight]], on_progress: Progress | None = None
) -> dict[str, Seen]:
    """The calibration of "ssr"; {} where there is nothing to tell apart."""
    subjects = told_apart(adapters)
    return calibrated(base, subjects, on_progress=on_progress) if len(subjects) > 1 else {}


def joined(
    method: str, adapters: Sequence[tuple[Adapter, Weight]], seen: dict[str, Seen], rank: int | None
) -> tuple[Adapter, Truncations]:
    """One adapter, which says on its card what it is made of; and what was lost."""
    if method != "ssr" or not seen:
        parts = [(by_block(adapter, weight), 1.0) for adapter, weight in adapters if weight.value]
        cut = method == "svd" or (method == "ssr" and rank is not None)
        made, report = merge(parts, method="svd" if cut else "sum", rank=rank)
    else:
        if rank is not None:
            keep(rank, None)  # is in range
        subjects = told_apart(adapters)
        modules, report = routed(subjects, seen, rank=rank)
        plain = concatenated([(subject, 1.0) for subject in subjects])
        made = replace(plain, modules={**plain.modules, **modules})
        others = [(by_block(a, w), 1.0) for a, w in adapters if w.value and not phrase_of(a)]
        if others:
            made = concatenated([(made, 1.0), *others])
    common = one_rank(made.modules)
    whole = " + ".join(f"{adapter.name} ({weight})" for adapter, weight in adapters)
    facts = {"rank": common, "alpha": None if common is None else float(common)}
    return made.with_card(**facts, description=f"{whole}, as one adapter: {loss(method, report)}"), report


def loss(method: str, report: Truncations) -> str:
    """What was lost, in words."""
    if isinstance(report, Fits):
        return (
            f"{method}, {report.error:.1%} from each adapter's own outputs on its calibration draws "
            f"(the sum: {report.error_of_sum:.1%})"
        )
    return f"{method}, {report.error:.1%} of the change lost" if report.error else f"{method}, exact"
