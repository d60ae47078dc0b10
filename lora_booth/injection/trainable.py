"""An adapter to train, in PEFT layers inside the frozen base. Only this file knows PEFT."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from ..adapters.adapter import Adapter
from ..adapters.contents import LoraFactors
from ..base.base_model import BaseModel
from ..base.changes import claimed, hooked, undone
from ..base.quantization import quantization_of
from ..config import ATTENTION_TARGETS, TEXT_TARGETS, LoraSpec
from ..errors import SettingsError, TrainingError, setting
from ..kernels.lora import FlatFactors
from .attached import placements
from .paths import module_path, target_paths, unread_layers

NAME = "lora_booth"  # of our adapter in its PEFT layers


def factors_of(tensors: Mapping[str, Tensor], alpha: float) -> dict[str, LoraFactors]:
    """Factors by module path, of tensors by path + ".down" or ".up"."""
    paths = dict.fromkeys(name.rpartition(".")[0] for name in tensors)
    return {path: LoraFactors(tensors[f"{path}.down"], tensors[f"{path}.up"], alpha) for path in paths}


@dataclass
class TrainableLora:
    """The adapter under training: float32 factors inside the frozen base. They stay readable when it is taken out."""

    parameters: dict[str, nn.Parameter]  # path in adapter files + ".down" or ".up"
    alpha: float
    flat: FlatFactors  # all of them, and their gradients
    layers: Sequence[Any]  # PEFT's, that hold them
    averaged: Callable[[], AbstractContextManager[None]] = nullcontext  # within it, the factors are those to use and save

    def apart(self) -> list[nn.Parameter]:
        """The U-Net's part of the flat values, and that of the text encoders: two parameters for an optimizer."""
        return self.flat.split(sum(name.startswith("unet.") for name in self.parameters))

    @contextmanager
    def muted(self) -> Iterator[None]:
        """The base computes as without the adapter, whose factors still require gradients: PEFT's own switch ends that."""
        try:
            for layer in self.layers:
                layer._disable_adapters = True
            yield
        finally:
            for layer in self.layers:
                layer._disable_adapters = False

    def copied(self) -> dict[str, Tensor]:
        """The values now, by the names of `parameters`: one copy from the device to the CPU."""
        values = self.flat.values.detach().to("cpu", copy=True)
        return dict(zip(self.parameters, self.flat.parts_of(values), strict=True))

    def factors(self) -> dict[str, LoraFactors]:
        """A copy of what was learnt so far, on the CPU."""
        with self.averaged():
            return factors_of(self.copied(), self.alpha)

    def check_gradients(self) -> None:
        """After the first backward pass. Raises TrainingError unless all gradients are finite and no up factor's is zero."""
        remedy = f"try another {setting('attention')} or {setting('dtype=torch.float32', option='--dtype fp32')}"
        broken = [name for name, p in self.parameters.items() if p.grad is not None and not p.grad.isfinite().all()]
        if broken:
            raise TrainingError(f"the first gradient of {broken[0]} is not finite; {remedy}")
        ups = [name for name in self.parameters if name.endswith(".up")]
        silent = [name for name in ups if not self.parameters[name].grad.any()]  # type: ignore[union-attr]
        if len(silent) == len(ups):
            raise TrainingError(f"all gradients are zero at the first step; {remedy}")
        if silent:
            raise TrainingError(f"no gradient reaches {len(silent)} adapter tensors, first {silent[0]}; please report this")


def spec_of(base: BaseModel, adapter: Adapter) -> LoraSpec:
    """The shape of an adapter, to train it further: its rank (the highest), its alpha, its modules.

    In text encoders, all layers of the same names. Raises AdapterBaseMismatch.
    """
    placements(base, [(adapter, 0.0)])
    rank = max((factors.rank for factors in adapter.modules.values()), default=1)
    scales = {factors.scale for factors in adapter.modules.values()}
    alpha = scales.pop() * rank if len(scales) == 1 else rank
    unet = [key.removeprefix("unet.") for key in adapter.modules if key.startswith("unet.")]
    text = {key.rpartition(".")[2] for key in adapter.modules if not key.startswith("unet.")}
    spec = LoraSpec(
        rank=rank,
        alpha=alpha if 0 < alpha <= 16 * rank else rank,
        text_encoder=bool(text),
        text_target_modules=TEXT_TARGETS if text <= set(TEXT_TARGETS) else tuple(sorted(text)),
    )
    usual = set(unet) == set(target_paths(base, LoraSpec(rank=1))["unet"])
    return replace(spec, target_modules=ATTENTION_TARGETS if usual or not unet else tuple(unet))


def first_factors(base: BaseModel, lora: LoraSpec, adapter: Adapter) -> dict[str, LoraFactors]:
    """The factors of `adapter` by module, to begin a training of `lora` with. A lower rank than `lora.rank` fits.

    Raises AdapterBaseMismatch, or SettingsError where `lora` would not train all of it.
    """
    [(_, _, places)] = placements(base, [(adapter, 1.0)])
    trained = {module_path(component, path) for component, paths in target_paths(base, lora).items() for path in paths}
    found = {}
    for key, (_, factors) in places.items():
        without_effect = any(f".{layer}." in key for layer in unread_layers(base, key.partition(".")[0]))
        if key not in trained and not without_effect:
            remedy = f"name it in {setting('target_modules' if key.startswith('unet.') else 'text_target_modules')}"
            if not key.startswith("unet.") and not lora.text_encoder:
                remedy = f"pass {setting('text_encoder', True)}"
            raise SettingsError(f"{adapter.name} also changes {key}, which would not be trained; {remedy}")
        if factors.rank > lora.rank:
            remedy = f"pass {setting('rank', factors.rank)}, or lower its rank first with resize"
            raise SettingsError(f"{adapter.name} has rank {factors.rank}, and rank {lora.rank} is to be trained; {remedy}")
        found[key] = factors
    return found


@dataclass
class Injection:
    """PEFT layers around some layers of a model whose weights are all frozen meanwhile.

    They wrap the plain layer itself, below any PEFT layer that the user put there, so the user's own adapters stay as they are
    (active, disabled or fused).
    """

    model: nn.Module
    layers: dict[str, Any] = field(default_factory=dict)  # path -> PEFT layer

    def __post_init__(self) -> None:
        self._required_grad = [(parameter, parameter.requires_grad) for parameter in self.model.parameters()]

    def put(self, paths: Sequence[str], *, rank: int, alpha: float, dropout: float = 0.0) -> None:
        """Wrap these layers with fresh factors that change nothing yet (up = 0)."""
        from peft import LoraConfig, inject_adapter_in_model

        homes = [list(layers_at(self.model, path))[-1] for path in paths]
        alone = nn.ModuleDict({f"m{i}": plain for i, (_, _, plain) in enumerate(homes)})  # PEFT sees these layers only
        alone.is_loaded_in_4bit = quantization_of(alone) == "nf4"  # type: ignore[assignment]  # PEFT has special layers for these
        config = LoraConfig(
            r=rank,
            lora_alpha=alpha,  # type: ignore[arg-type]  # PEFT says int and computes with float
            target_modules=list(alone),
            lora_dropout=dropout,
            init_lora_weights="gaussian",
        )
        inject_adapter_in_model(config, alone, adapter_name=NAME)
        self.layers.update(zip(paths, alone.values(), strict=True))
        for (holder, child, _), layer in zip(homes, self.layers.values(), strict=True):
            holder._modules[child] = layer
            for call in ADAPTER_CALLS:
                setattr(layer, call, refuse)
        self.model.requires_grad_(False)

    def check(self, *_: Any) -> None:
        """A forward hook of the model. Raises TrainingError if the layers were taken out."""
        for path, ours in self.layers.items():
            if all(layer is not ours for _, _, layer in layers_at(self.model, path)):
                refuse()

    def remove(self) -> None:
        """Take the layers out, wherever they are by now; a second call finishes what an interrupt left."""
        for path, ours in self.layers.items():
            for holder, child, layer in layers_at(self.model, path):
                if layer is ours:
                    holder._modules[child] = ours._modules["base_layer"]
                    break
        for parameter, required in self._required_grad:
            parameter.requires_grad_(required)


def layers_at(model: nn.Module, path: str) -> Iterator[tuple[nn.Module, str, nn.Module]]:
    """The layer at `path`, then those that it wraps, down to the plain one: (holder, its name for the layer, layer)."""
    above, _, child = path.rpartition(".")
    holder = model.get_submodule(above)
    while (layer := holder._modules.get(child)) is not None:
        yield holder, child, layer
        holder, child = layer, "base_layer"


ADAPTER_CALLS = ("update_layer", "set_adapter", "enable_adapters", "delete_adapter", "merge", "unmerge")  # of PEFT layers


def refuse(*_: Any, **__: Any) -> None:
    raise TrainingError("an adapter is being trained on this pipeline; load, set, fuse or unload others before or after that")


@contextmanager
def trainable(
    base: BaseModel, lora: LoraSpec, *, seed: int = 0, first: Mapping[str, LoraFactors] | None = None
) -> Iterator[TrainableLora]:
    """Inject an adapter to train: a new one, or the `first_factors` of another. Leaving takes it out and restores the base,
    also after an exception."""
    chosen = target_paths(base, lora)
    injections = {component: Injection(model) for component, model in base.read(*chosen).items()}
    parameters: dict[str, nn.Parameter] = {}
    with claimed(base.shell.unet, training=True), undone(*(injection.remove for injection in injections.values())):
        for component, injection in injections.items():
            with torch.random.fork_rng(devices=[]):  # PEFT draws the down factors from the global generator
                torch.manual_seed(seed)
                injection.put(chosen[component], rank=lora.rank, alpha=lora.scale_alpha, dropout=lora.dropout)
            for path, layer in injection.layers.items():
                key, down, up = module_path(component, path), layer.lora_A[NAME], layer.lora_B[NAME]
                for name, factor in (("down", down), ("up", up)):
                    factor.to(torch.float32).requires_grad_(True)
                    parameters[f"{key}.{name}"] = factor.weight
                if first is not None and key in first:
                    before = first[key]  # of this rank or a lower one: the other rows stay as drawn, with up = 0
                    down.weight.data[: before.rank] = before.down
                    up.weight.data[:, : before.rank] = before.up.float() * (before.scale / layer.scaling[NAME])
        flat = FlatFactors(list(parameters.values()), base.dtype)
        layers = [layer for injection in injections.values() for layer in injection.layers.values()]
        checks = [(injection.model, injection.check) for injection in injections.values()]
        with hooked(checks), undone(layers.clear):  # which hold the base's weights
            yield TrainableLora(parameters, lora.scale_alpha, flat, layers)
