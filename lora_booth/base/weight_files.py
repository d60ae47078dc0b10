"""Weights on disk: read tensor by tensor in the target precision when a module is needed, and released when it is not.

The stock loaders map a whole file into memory: SD 1.5 as bf16 from an fp32 file takes 5.2 GiB that way. Here a tensor is
read in pieces into its final place, so a module takes its size and a few MB.
"""

from __future__ import annotations

import json
import math
import os
import weakref
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, replace
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..errors import AdapterError, BaseModelError
from .library_logging import without_bars
from .memory import return_to_system
from .safetensors_header import CHECKPOINT, DTYPES, read_header

PIECE = 2**24  # bytes read at a time; chosen
STEMS = ("diffusion_pytorch_model", "model")  # of the files with a module's weights in diffusers and transformers
MODULES = {  # component -> the classes that are read here; the stock loader reads all others
    "unet": {"UNet2DConditionModel": "diffusers"},
    "vae": {"AutoencoderKL": "diffusers"},
    "text_encoder": {"CLIPTextModel": "transformers"},
    "text_encoder_2": {"CLIPTextModelWithProjection": "transformers"},
    "safety_checker": {"StableDiffusionSafetyChecker": "diffusers.pipelines.stable_diffusion.safety_checker"},
}
OTHER_NAMES = (  # current name -> name in files of other releases of diffusers or transformers
    ("", "text_model."),
    ("text_model.", ""),
    ("vision_model.", "vision_model.vision_model."),
    ("to_q.", "query."),
    ("to_k.", "key."),
    ("to_v.", "value."),
    ("to_out.0.", "proj_attn."),
)


class UnreadableError(Exception):
    """Not a well-formed safetensors file; the stock loader reports what is wrong with it."""


class WeightFile:
    """An open safetensors file. It stays open, so the original is read even after the file was deleted or replaced."""

    def __init__(self, path: Path) -> None:
        self.path = path
        handle = open(path, "rb")
        weakref.finalize(self, handle.close)
        self.descriptor = handle.fileno()
        self.stamp = self._stamp()
        try:
            header = read_header(handle, self.stamp[2], path, CHECKPOINT)
            self.places = {
                key: Place(self, DTYPES[entry.dtype], entry.shape, header.data_start + entry.start)
                for key, entry in header.tensors.items()
            }
        except (AdapterError, KeyError) as error:
            raise UnreadableError(f"{path}: {error}") from error

    def _stamp(self) -> tuple[int, int, int, int]:
        status = os.fstat(self.descriptor)
        return status.st_dev, status.st_ino, status.st_size, status.st_mtime_ns

    def read(self, start: int, into: Tensor) -> None:
        """Read the bytes from `start` into a flat tensor on the CPU."""
        view = memoryview(into.view(torch.uint8).numpy())  # type: ignore[arg-type]  # an array is a buffer
        while view:
            got = os.preadv(self.descriptor, [view], start)
            if not got:
                raise BaseModelError(f"{self.path}: truncated while in use; load the base again")
            view, start = view[got:], start + got

    def check_unchanged(self) -> None:
        if self._stamp() != self.stamp:
            raise BaseModelError(f"{self.path}: changed while in use; load the base again")


@dataclass(frozen=True)
class Place:
    """Where a tensor is in a file."""

    file: WeightFile
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int  # bytes
    transposed: bool = False  # in the file

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    def third(self, i: int) -> Place:
        """Query, key or value of a joint projection."""
        rows = self.shape[0] // 3
        return replace(self, shape=(rows, *self.shape[1:]), start=self.start + i * self.numel // 3 * self.dtype.itemsize)

    def start_of(self, count: int) -> Tensor:
        """The first values in the file, flat."""
        found = torch.empty(min(count, self.numel), dtype=self.dtype)
        self.file.read(self.start, found)
        return found

    def read(self, dtype: torch.dtype, device: torch.device, scratch: Tensor | None = None) -> Tensor:
        """The tensor, as `dtype` if it is floating-point. scratch: PIECE bytes; sharing it avoids holes between tensors."""
        count = self.numel
        target = dtype if self.dtype.is_floating_point else self.dtype
        found = torch.empty(count, dtype=target, device=device)
        straight = target == self.dtype and device.type == "cpu"
        step = PIECE // self.dtype.itemsize
        if scratch is None:
            scratch = torch.empty(0 if straight else min(count, step) * self.dtype.itemsize, dtype=torch.uint8)
        pieces = scratch.view(self.dtype)
        for begin in range(0, count, step):
            end = min(begin + step, count)
            piece = found[begin:end] if straight else pieces[: end - begin]
            self.file.read(self.start + begin * self.dtype.itemsize, piece)
            if not straight:
                found[begin:end].copy_(piece)
        shaped = found.view(self.shape)
        return shaped.T.contiguous() if self.transposed else shaped


class LazyModule:
    """A module whose weights are read when needed."""

    def __init__(self, module: Any, places: Mapping[str, Place], dtype: torch.dtype, device: torch.device) -> None:
        self.module, self.places, self.dtype, self.device = module, places, dtype, device
        self.put: Callable[[nn.Module, str, Tensor], None] = put  # stores a tensor that was read
        self.is_read = False

    @torch.no_grad()
    def fill(self) -> None:
        if self.is_read:
            return
        for file in {place.file for place in self.places.values()}:
            file.check_unchanged()
        shapes = {key: value.shape for key, value in self.module.state_dict().items()}
        scratch = torch.empty(PIECE, dtype=torch.uint8)
        for key, place in self.places.items():
            self.put(self.module, key, place.read(self.dtype, self.device, scratch).view(shapes[key]))
        for key, buffer in list(self.module.named_buffers()):
            put(self.module, key, buffer.to(self.device))  # those that are in no file, e.g. position ids
        self.is_read = True

    @torch.no_grad()
    def drop(self) -> None:
        if self.is_read:
            weights = self.module.state_dict()
            for key in self.places:
                put(self.module, key, torch.empty_like(weights.pop(key), device="meta"))
            self.is_read = False

    def stamp(self) -> str:
        """Identifies the files on this machine, and the places of the weights in them."""
        return repr(sorted((key, place.file.stamp, place.start) for key, place in self.places.items()))


class LazyWeights:
    """The modules of a pipeline that are read when needed. `kept`: a caller has them, so none is released."""

    def __init__(self, parts: Mapping[str, LazyModule] | None = None) -> None:
        self.parts = dict(parts or {})
        self.kept = False

    def fill(self, *names: str) -> list[str]:
        """Read these modules; returns those that were not in memory before."""
        unread = [name for name in names if name in self.parts and not self.parts[name].is_read]
        for name in unread:
            self.parts[name].fill()
        return unread

    def drop(self, names: Iterable[str]) -> None:
        if self.parts and not self.kept:
            for name in names:
                self.parts[name].drop()
            return_to_system()


def put(module: nn.Module, key: str, value: Tensor) -> None:
    """Replace the tensor of a parameter or buffer."""
    above, _, name = key.rpartition(".")
    parent = module.get_submodule(above)
    old = parent._parameters.get(name)
    if old is not None:
        parent._parameters[name] = nn.Parameter(value, requires_grad=old.requires_grad)
    else:
        parent._buffers[name] = value


def assemble(
    cls: Any, folder: Path, parts: Mapping[str, LazyModule], dtype: torch.dtype, device: torch.device, **given: Any
) -> tuple[Any, LazyWeights]:
    """The stock pipeline of a folder: `parts` are read later, the rest by the stock loader, with the arguments `given`."""
    modules = {component: part.module for component, part in parts.items()}
    with without_bars():
        pipeline = cls.from_pretrained(folder, dtype=dtype, **modules, **given)
    for component, module in pipeline.components.items():
        if isinstance(module, nn.Module) and component not in parts:
            module.to(device)
    return pipeline, LazyWeights(parts)


# --- which tensors of which files -----------------------------------------------------------------------------------


def parts_in_folder(
    folder: Path, index: Mapping[str, Any], dtype: torch.dtype, device: torch.device, variant: str | None
) -> dict[str, LazyModule]:
    """The modules of a diffusers folder that can be read later."""
    parts = {}
    for component, entry in index.items():
        module = empty_module(folder, component, entry, dtype)
        places = places_in_folder(folder / component, variant) if module is not None else None
        fitting = matched(module, places) if places is not None else None
        if fitting is not None:
            parts[component] = LazyModule(module, fitting, dtype, device)
    return parts


def empty_module(folder: Path, component: str, entry: Any, dtype: torch.dtype) -> Any:
    """The module without weights, from its configuration; None if the stock loader must load it."""
    if not isinstance(entry, list) or len(entry) != 2 or entry[1] not in MODULES.get(component, {}):
        return None
    if not hasattr(os, "preadv"):  # Windows, where an open file also cannot be replaced
        return None
    if not (folder / component / "config.json").is_file():
        return None
    from accelerate import init_empty_weights

    cls = getattr(import_module(MODULES[component][entry[1]]), entry[1])
    if getattr(cls, "_keep_in_fp32_modules", None):
        return None
    with init_empty_weights(include_buffers=False):
        if hasattr(cls, "load_config"):
            module = cls.from_config(cls.load_config(folder / component, local_files_only=True))
        else:
            config = cls.config_class.from_pretrained(folder / component, local_files_only=True)
            config.dtype = dtype
            module = cls(config)
    return nn.Module.to(module, dtype).eval()


def places_in_folder(folder: Path, variant: str | None) -> dict[str, Place] | None:
    """The tensors of a component's folder; None if it has not exactly one set of safetensors files."""
    singles, indices = [], []
    for stem in STEMS:
        singles.append(folder / (f"{stem}.{variant}.safetensors" if variant else f"{stem}.safetensors"))
        pattern = f"{stem}.safetensors.*json" if variant else f"{stem}.safetensors.index.json"
        indices += [path for path in folder.glob(pattern) if not variant or f".{variant}." in path.name]
    singles = [path for path in singles if path.is_file()]
    if len(singles) + len(indices) != 1:
        return None
    try:
        if singles:
            return WeightFile(singles[0]).places
        names = set(json.loads(indices[0].read_text(encoding="utf-8"))["weight_map"].values())
        return {key: place for name in sorted(names) for key, place in WeightFile(folder / name).places.items()}
    except (OSError, UnreadableError, ValueError, KeyError, AttributeError):
        return None


def matched(module: nn.Module, places: Mapping[str, Place], *, ones: bool = False) -> dict[str, Place] | None:
    """A place for every tensor of the module; None if one is missing or has another shape.

    ones: a linear layer may be a 1x1 convolution in the file, with the same values
    """
    found = {}
    for key, value in module.state_dict().items():
        names = [key]
        for new, old in OTHER_NAMES:
            names += [old + key.removeprefix(new)] if key.startswith(new) else []
            names += [key.replace(f".{new}", f".{old}")] if new and f".{new}" in key else []
        place = next((places[name] for name in names if name in places), None)
        if place is None:
            return None
        if place.shape != tuple(value.shape) and not (ones and squeezed(place.shape) == squeezed(value.shape)):
            return None
        found[key] = place
    return found


def squeezed(shape: Iterable[int]) -> tuple[int, ...]:
    return tuple(n for n in shape if n != 1)
