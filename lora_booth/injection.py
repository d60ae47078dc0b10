"""PEFT in and out: put adapters into a pipeline's modules, and take them out without a trace. Only this file knows PEFT."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .adapters.adapter import Adapter, weighted
from .adapters.contents import LoraFactors
from .base.base_model import TOYBOX, BaseModel
from .base.changes import claimed, hooked, undone, unhook
from .base.families import FAMILIES
from .base.quantization import quantization_of, weight_dtype, weight_shape
from .config import ATTENTION_TARGETS, TEXT_TARGETS, LoraSpec
from .errors import AdapterBaseMismatch, OtherBaseWarning, SettingsError, TrainingError, setting
from .kernels.lora import FlatFactors

TEXT_LEVEL = "text_model."  # transformers 5 dropped this level from CLIPTextModel; adapter files keep it
NAME = "lora_booth"  # of our adapter in its PEFT layers
FINGERPRINT_LENGTH = 16  # hex digits of BaseModel.fingerprint


# --- paths: "unet.down_blocks.0…" in adapters <-> modules ----------------------------------------------------------


def module_path(component: str, path: str) -> str:
    """The adapter's path of a submodule; those of text encoders always have `text_model.`."""
    if component != "unet" and not path.startswith(TEXT_LEVEL):
        path = TEXT_LEVEL + path
    return f"{component}.{path}"


def local_path(module: nn.Module, path: str) -> str:
    """Inverse of `module_path`, below the component."""
    if path.startswith(TEXT_LEVEL) and not hasattr(module, "text_model"):
        return path.removeprefix(TEXT_LEVEL)
    return path


def adaptable(module: nn.Module) -> bool:
    return isinstance(module, nn.Linear | nn.Conv2d)


def base_layer(module: nn.Module) -> nn.Module:
    """The plain layer inside PEFT layers, or the layer itself."""
    while isinstance(inner := getattr(module, "base_layer", None), nn.Module):
        module = inner
    return module


def target_paths(base: BaseModel, lora: LoraSpec) -> dict[str, list[str]]:
    """For every component, the modules that `lora` adapts. Raises SettingsError for an impossible target or rank."""
    wanted = {"unet": lora.target_modules}
    if lora.text_encoder:
        wanted |= {name: lora.text_target_modules for name in base.structure if name != "unet"}
    chosen: dict[str, list[str]] = {}
    for component, suffixes in wanted.items():
        model = base.structure[component]
        unread = unread_layers(base, component)
        layers = [n for n, m in model.named_modules() if adaptable(base_layer(m)) and not any(f".{i}." in n for i in unread)]
        for suffix in suffixes:
            matching = [name for name in layers if name == suffix or name.endswith("." + suffix)]
            if not matching:
                raise SettingsError(f"no linear or convolution layer of the {component} ends in {suffix!r}; try 'to_q'")
            for path in matching:
                outer, *inner = weight_shape(base_layer(model.get_submodule(path)))
                limit = min(outer, math.prod(inner))
                if lora.rank > limit:
                    raise SettingsError(f"rank {lora.rank} is more than {path} can have; at most {limit} for this base")
            chosen.setdefault(component, []).extend(matching)
    return chosen


def unread_layers(base: BaseModel, component: str) -> list[str]:
    """Final text encoder layers without effect, e.g. "layers.11": an adapter there would learn nothing."""
    if component == "unet":
        return []
    depth = base.structure[component].config.num_hidden_layers
    count = base.family.unread_text_layers[base.family.text_encoders.index(component)]
    return [f"layers.{i}" for i in range(depth - count, depth)]


# --- training ------------------------------------------------------------------------------------------------------


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


# --- use -----------------------------------------------------------------------------------------------------------


Places = dict[str, tuple[nn.Module, LoraFactors]]  # path in adapter files -> the plain layer there, and its factors


def placed(adapter: Adapter, base: BaseModel) -> Places:
    """Where the adapter's factors go. Raises AdapterBaseMismatch if one does not fit."""
    if adapter.card.family not in (None, base.family.name):
        raise unfit(adapter, f"{base.name} is {base.family.label}")
    places: Places = {}
    components = base.structure
    for key, factors in adapter.modules.items():
        component, _, path = key.partition(".")
        if component not in components:
            raise unfit(adapter, f"{base.name} has no {component}")
        model = components[component]
        try:
            layer = base_layer(model.get_submodule(local_path(model, path)))
        except AttributeError:
            raise unfit(adapter, f"{base.name} has no module {key}") from None
        if not adaptable(layer):
            raise unfit(adapter, f"{key} of {base.name} is not a linear or convolution layer")
        wanted = weight_shape(layer)
        if (fitted := factors.fitted(wanted)) is None:
            raise unfit(adapter, f"{key} is {factors.shape} in the file and {wanted} in {base.name}")
        places[key] = layer, fitted
    return places


def unfit(adapter: Adapter, why: str) -> AdapterBaseMismatch:
    own = setting("the base that it was made for", option=f"--base {adapter.card.base_model or 'MODEL'}")
    return AdapterBaseMismatch(f"{made_for(adapter)}; {why}; use {own}")


def made_for(adapter: Adapter) -> str:
    card = adapter.card
    label = FAMILIES[card.family].label if card.family in FAMILIES else "another base"
    name = f"{adapter.stem}.safetensors" if adapter.stem else adapter.name
    return f"{name} was made for {card.base_model or label}" + (f" ({label})" if card.base_model else "")


class AttachedLayer:
    """One adapter's change of one layer, added by a forward hook of the plain layer: below whatever PEFT or accelerate put
    around it, so that no call of theirs changes it.

    scale  alpha / rank times the adapter's weight; 0: off
    gate   multiplies the change, e.g. by a mask; None: active everywhere
    """

    def __init__(self, layer: nn.Module, factors: LoraFactors, weight: float) -> None:
        self.layer, self.scale = layer, factors.scale * weight
        self.gate: Callable[[Tensor], Tensor] | None = None
        self.down, self.up = (factor.to(weight_dtype(layer)) for factor in (factors.down, factors.up))

    def __call__(self, layer: Any, args: tuple[Tensor, ...], output: Tensor) -> Tensor | None:
        if self.scale == 0:
            return None
        if self.down.device != output.device:  # at the first call, and when the pipeline was moved
            self.down, self.up = self.down.to(output.device), self.up.to(output.device)
        x = args[0].to(self.down)
        if isinstance(layer, nn.Conv2d):
            change = F.conv2d(F.conv2d(x, self.down, None, layer.stride, layer.padding, layer.dilation), self.up)
        else:
            change = F.linear(F.linear(x, self.down), self.up)
        if self.gate is not None:
            change = self.gate(change)
        return (output + change * self.scale).to(output.dtype)


@dataclass
class AttachedAdapter:
    """One adapter on a pipeline: its layers by their path in adapter files, and its weight."""

    adapter: Adapter
    weight: float
    layers: dict[str, AttachedLayer]
    models: Sequence[nn.Module]  # that hold them
    even: bool = False  # all layers are known to have the weight

    def attach(self) -> None:
        for layer in self.layers.values():
            layer.layer.register_forward_hook(layer)
        forget_compiled(self.models)

    def detach(self) -> None:
        for layer in self.layers.values():
            unhook(layer.layer, layer)
        forget_compiled(self.models)

    def scale(self, path: str, weight: float) -> None:
        """Set the weight of one layer."""
        self.even = False
        self.layers[path].scale = self.adapter.modules[path].scale * weight

    def use(self, weight: float) -> None:
        """Set the weight of all layers; with 0 they cost nothing."""
        if self.even and self.weight == weight:
            return
        self.even = False  # an interrupt may come before all layers have it
        self.weight = weight
        for path in self.layers:
            self.scale(path, weight)
        self.even = True


def forget_compiled(models: Sequence[nn.Module]) -> None:
    """Compiled modules do not notice hooks that come or go: they are compiled again at their next call."""
    modules = [module for model in models for module in model.modules()]
    if any(m._compiled_call_impl is not None or type(m).__name__ == "OptimizedModule" for m in modules):
        torch._dynamo.reset()


def placements(base: BaseModel, adapters: Sequence[tuple[Adapter, float]]) -> list[tuple[Adapter, float, Places]]:
    """Each adapter, its weight and its places. Raises AdapterBaseMismatch if one was made for another base."""
    plan = [(adapter, weight, placed(adapter, base)) for adapter, weight in adapters]
    for adapter, weight, _ in plan:
        if weight and (note := other_weights(adapter, base)) is not None:
            warnings.warn(note, OtherBaseWarning, stacklevel=2)
    return plan


def other_weights(adapter: Adapter, base: BaseModel) -> str | None:
    """Family and shapes fit: a note if the adapter was trained for another prediction or on other weights.

    Raises AdapterBaseMismatch for one of an earlier version's toybox, of which it could draw nothing here.
    """
    trained, given, known = adapter.card.prediction_type, base.prediction_type, adapter.card.base_hash or ""
    if given in base.family.modelspec and trained not in (None, given):
        difference = f", which predicts {trained}; {base.name} predicts {given}, so its pictures will look wrong"
    elif len(known) != FINGERPRINT_LENGTH or any(hasattr(module, "base_layer") for module in base.unet.modules()):
        return None  # other tools' hashes are of files, not of weights; the user's own adapters may be fused
    elif base.fingerprint == known or len(base.fingerprint) != FINGERPRINT_LENGTH:  # longer: quantized by the user
        return None
    elif adapter.card.base_model == base.name == TOYBOX:
        raise AdapterBaseMismatch(f"{made_for(adapter)} of an earlier version of lora_booth; train it again on this one")
    else:
        difference = f"; {base.name} has other weights of the same shapes, so it may look different"
    return made_for(adapter) + difference


@contextmanager
def attached(base: BaseModel | Any, adapters: Sequence[tuple[Adapter, float]]) -> Iterator[Any]:
    """Adapters with their weights on a base or on any compatible diffusers pipeline; yields the pipeline.

    Each layer computes W x + sum of weight x (alpha / rank) x up(down(x)), exactly the sum of the adapters. Every
    check comes before the first change, and leaving restores the pipeline bit for bit, also after an exception.
    Raises AdapterBaseMismatch when an adapter was made for another base.
    """
    with attached_layers(base, weighted(adapters)):
        yield BaseModel.of(base).pipeline


@contextmanager
def attached_layers(base: BaseModel | Any, adapters: Sequence[tuple[Adapter, float]]) -> Iterator[list[AttachedAdapter]]:
    """Like `attached`, for code that changes weights while the adapters are on: yields an AttachedAdapter for each."""
    base = BaseModel.of(base, name="this pipeline")
    with claimed(base.shell.unet):
        on = attachable(base, adapters)
        with undone(*(one.detach for one in on)), hooked([(base.shell.unet, refuse_fused)]):
            for one in on:
                one.attach()
            yield on


def refuse_fused(unet: nn.Module, *_: Any) -> None:
    """A forward hook of the U-Net. Raises AdapterBaseMismatch where the layers that adapters change are not called."""
    if any("Fused" in type(getattr(module, "processor", None)).__name__ for module in unet.modules()):
        raise AdapterBaseMismatch("with fused projections adapters have no effect; call unfuse_qkv_projections() first")


def attachable(base: BaseModel, adapters: Sequence[tuple[Adapter, float]]) -> list[AttachedAdapter]:
    """The adapters, checked and ready to `attach`; those of weight 0 have no layers."""
    models = list(base.components.values())
    refuse_fused(base.unet)
    on = []
    for adapter, weight, places in placements(base, adapters):
        layers = {key: AttachedLayer(layer, factors, weight) for key, (layer, factors) in places.items() if weight}
        on.append(AttachedAdapter(adapter, weight, layers, models))
    return on
