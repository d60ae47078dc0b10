"""Count the memory of each phase of a training, tensor by tensor, on a base without weights."""

from __future__ import annotations

import json
import weakref
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property, partial
from typing import Any, get_args

import diffusers
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry, sdpa_backward_flop, sdpa_flop

from .. import __version__
from ..base.base_model import BaseModel, TextConditions
from ..base.changes import undone
from ..base.generation import pictures_at_a_time
from ..base.quantization import quantized_bytes, storage_bytes, tensors_of
from ..cache import cached, key_of
from ..config import LoraSpec, Quantization, TrainingConfig
from ..injection.trainable import trainable
from ..photos.cropping import WidthHeight
from ..training.latents import Batch
from ..training.loop import dreambooth_loss, predict
from ..training.training_mode import training_mode
from .shapes import plain

# --- everything that a computation allocates -------------------------------------------------------------------------

aten = torch.ops.aten
FLOPS: dict[Any, Any] = flop_registry | {
    aten._scaled_dot_product_flash_attention_for_cpu: sdpa_flop,
    aten._scaled_dot_product_flash_attention_for_cpu_backward: sdpa_backward_flop,
}
REORDERED = {aten.convolution: (0, 1), aten.convolution_backward: (0, 2)}  # arguments that oneDNN copies to its layout


class Meter(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Count memory and arithmetic of everything in the context.

    Tensors that existed before are not counted. Tensors on the "meta" device count with their sizes, but take no memory.
    on_cpu: with the copies that convolutions on a CPU work on
    """

    def __init__(self, *, on_cpu: bool = False) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.on_cpu = on_cpu
        self.live = self.peak = 0  # bytes of new storages
        self.flops = 0  # of matrix products, convolutions and attention
        self._known: dict[int, weakref.ref[Any]] = {}  # address -> storage, to notice when it is freed

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        given = {storage._cdata for storage in storages_in((args, kwargs))}
        out = func(*args, **kwargs)
        for storage in storages_in(out):
            if storage._cdata not in self._known and storage._cdata not in given:
                self._born(storage)
        copies = REORDERED.get(func._overloadpacket, ()) if self.on_cpu else ()
        self.peak = max(self.peak, self.live + sum(args[i].nbytes for i in copies))
        formula = FLOPS.get(func._overloadpacket)
        if formula is not None:
            self.flops += formula(*args, **kwargs, out_val=out)
        return out

    def _born(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()

        def gone(_: object) -> None:
            self._known.pop(key, None)
            self.live -= size

        self._known[key] = weakref.ref(storage, gone)
        self.live += size


def storages_in(value: Any) -> list[Any]:
    return [leaf.untyped_storage() for leaf in tree_leaves(value) if isinstance(leaf, Tensor)]


@contextmanager
def fused_attention() -> Iterator[None]:
    """Attention on the "meta" device as real devices compute it, without a matrix of all scores.

    It saves the same for the backward pass: query, key, value, output and one float32 per row.
    """
    functional: Any = nn.functional
    stock = functional.scaled_dot_product_attention

    def attention(query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        if query.is_meta:
            return aten._scaled_dot_product_flash_attention_for_cpu(query, key, value, **options)[0]
        return stock(query, key, value, **options)

    with undone(lambda: setattr(functional, "scaled_dot_product_attention", stock)):
        functional.scaled_dot_product_attention = attention
        yield


# --- the phases of a training ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Count:
    """One forward pass, or one forward and backward pass."""

    peak: int  # bytes at once, beyond those before
    saved: int  # bytes that the forward pass saves for the backward pass
    flops: int


@dataclass(frozen=True)
class Weights:
    """Bytes."""

    unet: int
    vae: int
    text_encoders: int
    lora: int  # float32
    widest: int  # the largest linear layer of the U-Net
    packed: Mapping[Quantization, int] = field(hash=False)  # the U-Net with its linear layers packed


class Counter:
    """Counts for a base without weights and an adapter, each cached on disk. on_cpu: as for `Meter`"""

    def __init__(self, base: BaseModel, lora: LoraSpec, *, on_cpu: bool = False) -> None:
        self.base, self.lora, self.on_cpu = base, lora, on_cpu
        configs = {name: plain(module.config) for name, module in {"vae": base.shell.vae, **base.structure}.items()}
        facts = [torch.__version__, diffusers.__version__, __version__, str(base.dtype), on_cpu, asdict(lora), configs]
        facts.append(plain(base.scheduler.config))
        self._about = json.dumps(facts, sort_keys=True, default=str)

    def step(self, config: TrainingConfig, *, pictures: int, resolution: int) -> Count:
        """Forward and backward pass over `pictures` of a batch; beyond two, extrapolated linearly."""
        if pictures > 2:
            one, two = (asdict(self.step(config, pictures=few, resolution=resolution)) for few in (1, 2))
            return Count(**{name: one[name] + (two[name] - one[name]) * (pictures - 1) for name in one})
        how = [config.gradient_checkpointing, config.lean, config.min_snr_gamma]
        work = partial(count_step, self.base, self.lora, config, pictures, (resolution, resolution), on_cpu=self.on_cpu)
        return self._cached(["step", *how, pictures, resolution], work)

    def encode(self, resolution: int) -> Count:
        """One photo through the VAE's encoder."""
        photo = torch.empty(1, 3, resolution, resolution, device="meta")
        return self._cached(["encode", resolution], partial(count, self.base.encode_images, photo, on_cpu=self.on_cpu))

    def draw(self, resolution: int) -> Count:
        """Class images, as many as are drawn at a time: a denoising step with guidance, then the VAE's decoder."""
        return self._cached(["draw", resolution], partial(count, draw, self.base, resolution, on_cpu=self.on_cpu))

    @cached_property
    def weights(self) -> Weights:
        base = self.base
        with trainable(base, self.lora) as adapter:
            factors = storage_bytes(adapter.parameters.values())
        unet, vae = (storage_bytes(tensors_of(module)) for module in (base.unet, base.vae))
        text = sum(storage_bytes(tensors_of(module)) for module in base.text_encoders.values())
        linear = [module.weight.nbytes for module in base.unet.modules() if type(module) is nn.Linear]
        packed = {kind: quantized_bytes(base.unet, kind) for kind in get_args(Quantization)}
        return Weights(unet, vae, text, factors, max(linear), packed)

    def _cached(self, about: list[Any], work: Callable[[], Count]) -> Count:
        key = key_of(of="count", base=self._about, about=about)
        found = cached("counts", key, lambda: {name: torch.tensor(value) for name, value in asdict(work()).items()})
        return Count(**{name: int(value) for name, value in found.items()})


def count(work: Callable[..., Any], *arguments: Any, on_cpu: bool = False) -> Count:
    """Count a computation without gradients."""
    with torch.no_grad(), fused_attention(), Meter(on_cpu=on_cpu) as meter:
        work(*arguments)
    return Count(meter.peak, 0, meter.flops)


def draw(base: BaseModel, resolution: int) -> None:
    pictures = pictures_at_a_time(resolution)
    latents, text, time_ids = inputs(base, 2 * pictures, (resolution, resolution))
    extra = None if time_ids is None else {"text_embeds": text.pooled, "time_ids": time_ids}
    times = torch.zeros(len(latents), dtype=torch.long, device=base.device)
    base.unet(latents.to(base.dtype), times, text.states, added_cond_kwargs=extra)
    with base.upcast_vae() as vae:
        vae.decode(latents[:pictures].to(vae.dtype))


def inputs(base: BaseModel, rows: int, size: WidthHeight) -> tuple[Tensor, TextConditions, Tensor | None]:
    """Latents (N, C, H/f, W/f) float32, text conditions and time_ids (N, 6), all zeros, on the base's device."""
    factor, unet, device = base.pixels_per_latent, base.unet.config, base.device
    latents = torch.zeros(rows, unet.in_channels, size[1] // factor, size[0] // factor, device=device)
    tokens = base.tokenizer.model_max_length
    states = torch.zeros(rows, tokens, unet.cross_attention_dim, dtype=base.dtype, device=device)
    if not base.family.time_ids:
        return latents, TextConditions(states), None
    width = unet.projection_class_embeddings_input_dim - 6 * unet.addition_time_embed_dim
    pooled = torch.zeros(rows, width, dtype=base.dtype, device=device)
    return latents, TextConditions(states, pooled), torch.zeros(rows, 6, device=device)


def count_step(
    base: BaseModel, lora: LoraSpec, config: TrainingConfig, pictures: int, size: WidthHeight, *, on_cpu: bool = False
) -> Count:
    """One forward and backward pass as in training, on any device; the gradients exist before."""
    config = replace(config, attention="sdpa")  # all save the same
    with trainable(base, lora) as adapter, training_mode(base, adapter, config):
        latents, text, time_ids = inputs(base, pictures, size)
        times = torch.zeros(pictures, dtype=torch.long, device=base.device)
        batch = Batch(latents, torch.zeros_like(latents), times, ("",) * pictures, time_ids, photos=pictures)
        _ = base.alphas_cumprod  # made once per base, so not counted
        with fused_attention(), Meter(on_cpu=on_cpu) as meter:
            adapter.flat.refresh()
            if lora.text_encoder:
                text = base.encode_text(batch.prompts)
            loss = dreambooth_loss(
                base, batch, predict(base, batch, text), prior_loss_weight=1.0, min_snr_gamma=config.min_snr_gamma
            )
            saved = meter.live  # nothing else is left of the forward pass
            torch.autograd.backward(loss)
        return Count(meter.peak, saved, meter.flops)
