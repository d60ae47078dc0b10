"""BaseModel: a frozen Stable Diffusion pipeline, and what training needs of it."""

from __future__ import annotations

import gc
import hashlib
import math
import os
import pickle
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cached_property, partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..config import Quantization, typed
from ..errors import BaseModelError, LoraBoothError, SettingsError, reason_of, setting
from .changes import claimed, undone
from .diffusers_folder import declared_rare_tokens, load_folder
from .families import Family, check_trainable, is_hub_id, is_offloaded, noise_schedule, recognise
from .library_logging import quiet_about_long_prompts, quiet_about_torchvision
from .quantization import check_quantization, quantization_of
from .quantization import quantize as quantize_unet
from .single_file import load_single_file
from .weight_files import LazyModule

TOYBOX = "toybox"
TOYBOX_FOLDER = Path(__file__).parent.parent / "toybox" / "model"
FINGERPRINT_LENGTH = 16  # hex digits of BaseModel.fingerprint, unless the user has quantized the U-Net
IMPORTING = threading.Lock()


def import_libraries() -> None:
    """While one thread imports diffusers, others wait: it puts another module in its own place at the end, and its parts
    import one another when first used, so a second thread would find half of them."""
    with IMPORTING:
        from diffusers import StableDiffusionPipeline, StableDiffusionXLPipeline  # noqa: F401


@contextmanager
def without_collections() -> Iterator[None]:
    """Disable garbage collection, which repeatedly walks all libraries while they are imported."""
    on = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if on:
            gc.enable()


@dataclass(frozen=True)
class TextConditions:
    """The text encoders' output for N prompts, which conditions the U-Net."""

    states: Tensor  # (N, tokens, d); d = the U-Net's cross_attention_dim
    pooled: Tensor | None = None  # (N, p), SDXL only


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A stock diffusers pipeline of a known family. The pipeline owns the modules; nothing here changes their weights.

    Modules on disk are read when first needed, and training releases the VAE and text encoders while it does not need them.
    Modules that you get from `pipeline`, `vae`, `text_encoders` or `components` stay in memory.
    """

    shell: Any  # the stock pipeline; some of its modules may not have been read yet
    family: Family
    name: str  # for cards and messages: a Hub id, or the name of a folder or file without its path
    weights: Mapping[str, LazyModule] = field(default_factory=dict)  # of the modules that are read when needed
    quantized: Quantization | None = None  # how the U-Net's linear layers were packed; None: not by this library
    rare_tokens: tuple[str, ...] = ()  # words without meaning to it, as its folder declares

    @classmethod
    @without_collections()
    def load(
        cls,
        source: str | Path,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device | None = None,
        config: str | Path | None = None,
        prediction_type: str | None = None,
        revision: str | None = None,
        variant: str | None = None,
        vae: str | Path | None = None,
        quantize: Quantization | None = None,
    ) -> BaseModel:
        """Load `"toybox"`, a Hub id, a diffusers folder or a single `.safetensors` checkpoint.

        dtype            None: bf16 or fp16 on CUDA, bf16 on a CPU with bf16 instructions, else fp32; toybox on a CPU: fp32
        device           None: the first available of CUDA, Apple's MPS and the CPU
        config           for a single file: a diffusers folder of its family, instead of the built-in configuration
        prediction_type  for a base that states none or a wrong one: "epsilon" or "v_prediction"
        variant          as in diffusers, e.g. "fp16"; None: the plain weights or, if there are none, the only variant
        vae              another VAE: its folder, Hub id or .safetensors file, also for a single file without one
        quantize         the U-Net's linear layers in less memory, a little slower: "int8" (8 bits, nearly exact) or "nf4"
                         (4 bits by bitsandbytes, less exact)
        Raises BaseModelError for anything that is not a text-to-image SD 1.x, SD 2.x or SDXL model; SettingsError for
        `config` of anything but a single file, or `variant` or `revision` of one; SettingsError and MissingExtraError if it
        cannot be quantized.
        """
        quiet_about_torchvision()
        import_libraries()
        source, dtype = typed("source", source, str | Path), typed("dtype", dtype, torch.dtype | None)
        place = default_device() if device is None else usable(device)
        if quantize is not None:
            check_quantization(quantize, place)
        precision = dtype or default_dtype(place, source)
        name, path = located(source)
        file = path if isinstance(path, Path) and path.is_file() else None
        without_effect = {"config": config} if file is None else {"revision": revision, "variant": variant}
        for option, value in without_effect.items():
            if value is not None:
                kind = "a folder or a Hub id" if file is None else "a single file"
                raise SettingsError(f"{setting(option, value)} has no effect on {kind}; leave it out")
        other_vae = None if vae is None else located(typed("vae", vae, str | Path))[1]
        tokens: tuple[str, ...] = ()
        try:
            if file is not None:
                pipeline, weights = load_single_file(
                    file, precision, place, config=config, prediction_type=prediction_type, vae=other_vae
                )
            else:
                tokens = declared_rare_tokens(path) if isinstance(path, Path) else ()
                pipeline, weights = load_folder(path, precision, place, revision=revision, variant=variant, vae=other_vae)
                if prediction_type is not None:
                    pipeline.scheduler.register_to_config(prediction_type=typed("prediction_type", prediction_type, str))
            base = cls(pipeline, recognise(pipeline), name, weights, quantize, tokens)
            check_trainable(pipeline, base.family)
        except LoraBoothError:
            raise
        except Exception as error:  # what the libraries raise for files that are incomplete or wrong has no bounds
            reason = "a pickle that could run code" if isinstance(error, pickle.UnpicklingError) else reason_of(error)
            raise BaseModelError(f"{source}: cannot be loaded ({reason}); check that it is complete") from error
        if quantize is not None:
            _ = base.fingerprint  # cached now, from the weights in the file, to equal the plain base's
            quantize_unet(pipeline.unet, weights.get("unet"), precision, quantize)
        return base

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, name: str = "custom") -> BaseModel:
        """The base of a loaded text-to-image pipeline, whose modules are shared, not copied.

        Raises BaseModelError if it cannot be trained.
        """
        base = cls.of(pipeline, name=name)
        check_trainable(base.shell, base.family)
        return base

    @classmethod
    def of(cls, base: BaseModel | Any, *, name: str = "custom") -> BaseModel:
        """The base itself, or that of any loaded pipeline with a U-Net that adapters fit, with this name.

        Raises BaseModelError for anything else.
        """
        if isinstance(base, str | Path):
            raise BaseModelError(f"{str(base)!r} is not loaded; pass BaseModel.load({str(base)!r}) or a diffusers pipeline")
        return base if isinstance(base, cls) else cls(base, recognise(base), name)

    def __repr__(self) -> str:
        return f"BaseModel({self.name!r}: {self.family.label}, {self.precision}, {self.device})"

    @property
    def precision(self) -> str:
        """In words: "float32", or "bfloat16, int8" of a quantized base."""
        return str(self.dtype).removeprefix("torch.") + (f", {self.quantized}" if self.quantized else "")

    @property
    def pipeline(self) -> Any:
        """The stock pipeline, with all modules in memory."""
        self.read(*self.weights)
        return self.shell

    @property
    def unet(self) -> Any:
        return self.read("unet")["unet"]

    @property
    def vae(self) -> Any:
        return self.read("vae")["vae"]

    @property
    def text_encoders(self) -> dict[str, Any]:
        """By their names in the pipeline, which are also those in adapter files."""
        return self.read(*(name for name in self.structure if name != "unet"))

    @property
    def tokenizer(self) -> Any:
        return self.shell.tokenizer

    @property
    def tokenizers(self) -> list[Any]:
        """One for each text encoder."""
        return [getattr(self.shell, name) for name in self.family.tokenizers]

    @property
    def scheduler(self) -> Any:
        return self.shell.scheduler

    @property
    def components(self) -> dict[str, nn.Module]:
        """Every module that an adapter can change."""
        return self.read(*self.structure)

    @property
    def structure(self) -> dict[str, Any]:
        """The modules of `components`, perhaps without weights yet, to look at their layers and modes."""
        found = {name: getattr(self.shell, name, None) for name in self.family.components}
        return {name: module for name, module in found.items() if module is not None}

    @property
    def modules(self) -> dict[str, nn.Module]:
        """All modules in the pipeline, e.g. also a safety checker; some may not have weights yet."""
        return {name: module for name, module in self.shell.components.items() if isinstance(module, nn.Module)}

    @property
    def loaded(self) -> dict[str, nn.Module]:
        """The modules that are in memory."""
        return {name: module for name, module in self.modules.items() if self.unread(name) is None}

    def read(self, *names: str, keep: bool = True) -> dict[str, Any]:
        """These modules, with their weights in memory. keep: for a caller who may hold on to them"""
        for part in (self.weights[name] for name in names if name in self.weights):
            part.fill()
            part.kept |= keep
        return {name: getattr(self.shell, name) for name in names}

    def unread(self, name: str) -> LazyModule | None:
        """A module that is still on disk; None if it is in memory."""
        part = self.weights.get(name)
        return None if part is None or part.is_read else part

    def stays(self, name: str) -> bool:
        """Whether this module is in memory and training does not release it."""
        part = self.weights.get(name)
        return part is None or part.is_read and (part.kept or name == "unet")

    @property
    def device(self) -> torch.device:
        """Where the U-Net computes."""
        unread = self.unread("unet")
        if unread is not None:
            return unread.device
        if is_offloaded(self.shell.unet):
            return torch.device(self.shell._execution_device)
        return next(self.shell.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.shell.unet.parameters()).dtype

    @property
    def pixels_per_latent(self) -> int:
        return int(2 ** (len(self.shell.vae.config.block_out_channels) - 1))

    @property
    def side_multiple(self) -> int:
        """Pixels; sides of pictures are multiples of it: of the VAE's factor, and of 8, which diffusers' pipelines demand."""
        return math.lcm(self.pixels_per_latent, 8)

    @property
    def resolution(self) -> int:
        """Side of the pictures that this base was trained for, in pixels."""
        size = self.shell.unet.config.sample_size
        return int(size if isinstance(size, int) else size[0]) * self.pixels_per_latent

    @property
    def prediction_type(self) -> str:
        return str(getattr(self.scheduler, "config", {}).get("prediction_type"))

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(1000,) float32: the share of signal left at each timestep of the training schedule."""
        return noise_schedule(self.scheduler).to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """Identifies the weights, whatever their precision: sha256 of the signs at the start of every tensor.

        A pipeline that was quantized elsewhere has lost some signs to rounding: its fingerprint differs, and is longer.
        """
        digest = hashlib.sha256()
        unread = self.unread("unet")
        unet = getattr(self.shell.unet, "_orig_mod", self.shell.unet)  # inside torch.compile
        weights = unet.state_dict()
        plain = {path.replace(".base_layer", ""): path for path in weights if ".lora_" not in path}  # not PEFT's
        for name, path in sorted(plain.items()):
            digest.update(f"{name} {tuple(weights[path].shape)}".encode())
            start = beginning(unet, path, weights[path]) if unread is None else unread.places[path].start_of(256)
            digest.update(torch.signbit(start).cpu().numpy().tobytes())
        return digest.hexdigest()[: 64 if quantization_of(self.shell.unet) else FINGERPRINT_LENGTH]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in -1..1 -> mean and standard deviation of the latents, each (N, C, H/f, W/f) float32, unscaled."""
        with self.upcast_vae() as vae:
            posterior = vae.encode(pixels.to(vae.device, vae.dtype)).latent_dist
            return posterior.mean.float(), posterior.std.float()

    @contextmanager
    def upcast_vae(self) -> Iterator[Any]:
        """The VAE, within the context in fp32 where fp16 overflows (SDXL), as in the stock pipeline."""
        vae = self.read("vae", keep=False)["vae"]
        upcast = vae.dtype == torch.float16 and vae.config.force_upcast
        to = partial(nn.Module.to, vae)  # diffusers' own `to` warns at every change of precision
        with undone(*([partial(to, vae.dtype)] if upcast else [])):
            if upcast:
                to(torch.float32)
            yield vae

    @property
    def scaling_factor(self) -> float:
        return float(self.shell.vae.config.scaling_factor)

    def encode_text(self, prompts: Sequence[str]) -> TextConditions:
        """Encode like the stock pipeline. With gradients if they are enabled (text-encoder LoRA)."""
        self.read(*self.family.text_encoders, keep=False)
        with quiet_about_long_prompts(self.shell):
            encoded = self.shell.encode_prompt(
                list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
            )
        return TextConditions(encoded[0], encoded[2] if self.family.time_ids else None)

    def cut_off(self, prompt: str) -> str:
        """The end of a prompt that a text encoder does not read, in the tokenizer's spelling; "" if all of it is read."""
        ends = [""]
        with claimed(self.shell.unet):  # a tokenizer mixes up the settings of threads that call it at the same time
            for tokenizer in filter(None, self.tokenizers):
                ids = tokenizer(prompt, verbose=False).input_ids
                if len(ids) > tokenizer.model_max_length:
                    ends.append(tokenizer.decode(ids[tokenizer.model_max_length - 1 : -1]).strip())
        return max(ends, key=len)

    def time_ids(self, original_size: tuple[int, int], crop: tuple[int, int], target_size: tuple[int, int]) -> Tensor | None:
        """SDXL's (6,) size conditions: original height and width, crop top and left, target height and width (pixels).

        float32 whatever the base's precision: bf16 would round a photo's size to multiples of 8 or 16.
        """
        if not self.family.time_ids:
            return None
        return torch.tensor([*original_size, *crop, *target_size], dtype=torch.float32, device=self.device)

    @contextmanager
    def only_unet_on_device(self) -> Iterator[None]:
        """Within the context, release all but the U-Net, or move it to the host if it cannot be read again."""
        with claimed(self.shell.unet, training=True):
            for name, part in self.weights.items():
                if name != "unet":
                    part.drop()
            with moved(self._others, torch.device("cpu")):
                if self.device.type == "cuda":
                    torch.cuda.empty_cache()
                yield

    @contextmanager
    def all_on_device(self) -> Iterator[Any]:
        """The complete pipeline on the U-Net's device, to draw with, also inside `only_unet_on_device`."""
        unread = [part for name, part in self.weights.items() if name != "unet" and not part.is_read]
        with claimed(self.shell.unet), undone(*(part.drop for part in unread)):
            self.read(*self.weights, keep=False)
            with moved(self._others, self.device):
                yield self.shell

    @property
    def _others(self) -> list[nn.Module]:
        """The modules in memory except the U-Net, and except those that are moved for each call anyway."""
        return [module for name, module in self.loaded.items() if name != "unet" and not is_offloaded(module)]


def beginning(model: nn.Module, name: str, value: Tensor) -> Tensor:
    """The first 256 numbers of a tensor, flat. `value` has none if accelerate has offloaded it."""
    if not value.is_meta:
        return value.flatten()[:256]
    from accelerate.utils import align_module_device

    above, _, leaf = name.rpartition(".")
    owner = model.get_submodule(above)
    with align_module_device(owner):
        return owner.get_parameter(leaf).flatten()[:256].clone()


@contextmanager
def moved(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    with undone(*(partial(module.to, next(module.parameters()).device) for module in modules)):
        for module in modules:
            module.to(device)
        yield


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def usable(device: str | torch.device) -> torch.device:
    """Raises SettingsError for a device that this machine, or this build of PyTorch, does not have."""
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise SettingsError(f"device {device} cannot be used here ({reason_of(error)}); pass cpu, cuda or mps") from error


def default_dtype(device: torch.device, source: str | Path = "") -> torch.dtype:
    """bf16 where the hardware supports it, fp16 on older GPUs, else fp32; fp32 for the toybox on a CPU."""
    if device.type == "cpu" and str(source) == TOYBOX:
        return torch.float32
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and torch.cpu.is_available() and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def located(source: str | Path, *, or_else: str = "") -> tuple[str, Path | str]:
    """A base's name for people, and its folder, file or Hub id. Raises BaseModelError, which also offers `or_else`."""
    path = TOYBOX_FOLDER if str(source) == TOYBOX else Path(os.path.expanduser(source))
    if path.is_dir():
        return TOYBOX if str(source) == TOYBOX else path.resolve().name, path
    if path.is_file():
        return path.stem, path
    if is_hub_id(str(source)):
        return str(source), str(source)
    meant = f"did you mean {TOYBOX!r}? " if get_close_matches(str(source).lower(), [TOYBOX]) else ""
    raise BaseModelError(
        f"{source}: no such folder or file; {meant}pass {or_else}{TOYBOX!r}, a Hub id (owner/name), a diffusers folder "
        "or a .safetensors checkpoint"
    )
