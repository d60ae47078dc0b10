"""SSR: one adapter from several, by least squares on what each of them sees while it draws its own subject.

For every module of the U-Net, D_k is the change of adapter k, and X_k are the module's inputs while the base draws
subject k with adapter k alone. The merged change D reads only what the adapters read (its rows are combinations of
theirs) and minimises

    sum_k |D X_k - D_k X_k|^2  +  l |D - sum_k D_k|^2        (Frobenius norms)

so it is adapter k's own change on the inputs of subject k, and the plain sum where there were none. With V the
orthonormal rows of all `down` factors together, D_k = T_k V and G_k = V X_k (V X_k)^T:

    D = (sum_k T_k (G_k + l I)) (sum_k G_k + l I)^-1 V

This is Subspace Signal Routing (SSR-Merge, arXiv 2606.10617: B R A with R = Q G^-1), with a ridge towards the sum in
place of one towards nothing; so one adapter alone stays what it is. A D of lower rank is the best of its rank for the
same objective (reduced-rank regression). No input is kept: only the k x k matrices G_k, in float64.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.contents import LoraFactors
from ..adapters.tools.spectrum import Spectrum, Truncation, Truncations, shape_of
from ..base.base_model import BaseModel
from ..base.generation import quiet
from ..injection import attached_layers, base_layer, placements
from .subjects import phrase_of
from .unet_hook import hooked

PROMPTS = ("a photo of {}", "{} in the snow", "{} on the beach", "{} in a city street at night")  # a draw for each
STEPS = 8  # denoising steps of a draw
GUIDANCE = 5.0
RIDGE = 0.1  # l, as a share of the mean squared input: the least error on other prompts and seeds, of the toybox

Progress = Callable[[int, int], None]  # draws done, draws in all


@dataclass(frozen=True)
class Fit(Truncation):
    """How near one merged module comes to each adapter alone. Norm and error are of what it adds to its outputs."""

    error_of_sum: float  # what the plain sum differs, relative as `error`


@dataclass(frozen=True)
class Fits(Truncations):
    """The same of all modules that were fitted, together."""

    modules: tuple[Fit, ...]

    @property
    def error_of_sum(self) -> float:
        return math.sqrt(sum((m.error_of_sum * m.norm) ** 2 for m in self.modules)) / self.norm if self.norm else 0.0


@dataclass(frozen=True, eq=False)
class Seen:
    """The inputs of one module, as all adapters together read them."""

    rows: Tensor  # V: (k, in * kh * kw) float32, orthonormal
    grams: Tensor  # G_k: (adapters, k, k) float64
    energies: Tensor  # (adapters,) float64: mean square of an input's values, times the number of inputs


def calibrated(base: BaseModel, adapters: Sequence[Adapter], *, on_progress: Progress | None = None) -> dict[str, Seen]:
    """Draw each subject with its adapter alone and note what reaches the U-Net's modules; the base is as it was.

    adapters  with weights folded in, and a token on their cards
    Each draw has its own prompt and seed, so the same adapters see the same inputs.
    """
    placements(base, [(adapter, 1.0) for adapter in adapters])  # all fit, before the first draw
    names = sorted({name for adapter in adapters for name in adapter.modules if name.startswith("unet.")})
    seen: dict[str, Seen] = {}
    for name in names:
        rows = joint_rows([a.modules[name] for a in adapters if name in a.modules])
        grams = torch.zeros(len(adapters), len(rows), len(rows), dtype=torch.float64)
        seen[name] = Seen(rows, grams, torch.zeros(len(adapters), dtype=torch.float64))
    for index, adapter in enumerate(adapters):
        with attached_layers(base, [(adapter, 1.0)]), watched(base, seen, index), quiet(base.pipeline), torch.no_grad():
            for number, prompt in enumerate(PROMPTS):
                base.pipeline(
                    prompt.format(phrase_of(adapter)),
                    num_inference_steps=STEPS,
                    guidance_scale=GUIDANCE,
                    generator=torch.Generator().manual_seed(number),
                    output_type="latent",
                )
                if on_progress is not None:
                    on_progress(index * len(PROMPTS) + number + 1, len(adapters) * len(PROMPTS))
    return seen


def joint_rows(parts: Sequence[LoraFactors]) -> Tensor:
    """Orthonormal rows that span what all `down` factors read. (k, in * kh * kw) float32"""
    down = torch.cat([f.down.double().flatten(1).cpu() for f in parts])
    return torch.linalg.qr(down.T)[0].T.float().contiguous()


@contextmanager
def watched(base: BaseModel, seen: Mapping[str, Seen], index: int) -> Iterator[None]:
    """Meanwhile the inputs of every module count as those of adapter `index`."""
    with ExitStack() as stack:
        for name, what in seen.items():
            layer = base_layer(base.unet.get_submodule(name.removeprefix("unet.")))
            stack.enter_context(hooked(layer.register_forward_pre_hook(watching(base, what, index))))
        yield


def watching(base: BaseModel, seen: Seen, index: int) -> Callable[[nn.Module, Any], None]:
    rows = seen.rows.to(base.device)

    def watch(layer: nn.Module, args: Any) -> None:
        inputs = args[0].detach().float()
        if base.pipeline.do_classifier_free_guidance:
            inputs = inputs[len(inputs) // 2 :]  # the prompt's; the negative prompt does not name the subject
        if isinstance(layer, nn.Conv2d):
            kernel = rows.reshape(len(rows), *layer.weight.shape[1:])
            read = F.conv2d(inputs, kernel, None, layer.stride, layer.padding, layer.dilation).movedim(1, -1)  # type: ignore[arg-type]
        else:
            read = F.linear(inputs, rows)
        read = read.reshape(-1, len(rows))  # (tokens, k)
        exact = read.double() if read.device.type != "mps" else read.cpu().double()  # MPS has no float64
        seen.grams[index] += (exact.T @ exact).cpu()
        seen.energies[index] += len(read) * float(inputs.square().mean())

    return watch


def routed(
    adapters: Sequence[Adapter], seen: Mapping[str, Seen], *, rank: int | None = None, ridge: float = RIDGE
) -> tuple[dict[str, LoraFactors], Fits]:
    """The merged modules, and how near they come to each adapter alone. rank: at most this in every module."""
    modules, fits = {}, []
    for name, what in seen.items():
        parts = [adapter.modules.get(name) for adapter in adapters]
        modules[name], fit = routed_module(name, parts, what, rank, ridge)
        fits.append(fit)
    return modules, Fits(tuple(fits))


def routed_module(
    name: str, parts: Sequence[LoraFactors | None], seen: Seen, rank: int | None, ridge: float
) -> tuple[LoraFactors, Fit]:
    rows, grams = seen.rows.double(), seen.grams
    present = [f for f in parts if f is not None]
    shape = shape_of(present[0])
    own = torch.stack([ups_on(f, rows) if f else torch.zeros(shape[0], len(rows), dtype=rows.dtype) for f in parts])
    total = own.sum(0)  # (out, k): the plain sum
    small = ridge * float(seen.energies.sum()) or 1.0  # a module that was never called: the sum
    metric = grams.sum(0) + small * torch.eye(len(rows), dtype=rows.dtype)
    merged = torch.linalg.solve(metric, ((own @ grams).sum(0) + small * total).T).T
    if rank is not None:
        best = torch.linalg.svd(merged @ torch.linalg.cholesky(metric), full_matrices=False)[0][:, :rank]
        merged = best @ (best.T @ merged)
    left, values, right = torch.linalg.svd(merged, full_matrices=False)
    spectrum = Spectrum(left, values, right @ rows)
    kept = max(1, min(spectrum.rank(), len(values) if rank is None else rank))
    norm, error, of_sum = (outputs(change, grams) for change in (own, own - merged, own - total))
    fit = Fit(name, sum(f.rank for f in present), kept, norm, error / norm if norm else 0.0, of_sum / norm if norm else 0.0)
    return spectrum.factors(kept, shape), fit


def ups_on(factors: LoraFactors, rows: Tensor) -> Tensor:
    """T of D = T V. (out, k)"""
    up, down = factors.up.double().flatten(1).cpu(), factors.down.double().flatten(1).cpu()
    return up @ (down @ rows.T) * factors.scale


def outputs(changes: Tensor, grams: Tensor) -> float:
    """Norm of what changes (adapters, out, k) make of each adapter's inputs, together."""
    return math.sqrt(max(0.0, float(((changes @ grams) * changes).sum())))
