"""BaseModel: a frozen Stable Diffusion pipeline and the few things that training asks of it."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from .errors import BaseModelError, first_line
from .family import FAMILIES, Family, labels
from .single_file import has_vocabulary, load_single_file
from .toybox import RARE_TOKENS

TOYBOX = "toybox"
TOYBOX_FOLDER = Path(__file__).parent / "toybox" / "model"


@dataclass(frozen=True)
class TextConditions:
    """What the text encoders tell the U-Net about N prompts."""

    states: Tensor  # (N, tokens, d); d = the U-Net's cross_attention_dim
    pooled: Tensor | None = None  # (N, p), SDXL only

    def __getitem__(self, rows: Tensor) -> TextConditions:
        return TextConditions(self.states[rows], None if self.pooled is None else self.pooled[rows])


@dataclass(frozen=True, eq=False)
class BaseModel:
    """A stock diffusers pipeline, recognised. The pipeline owns the modules; nothing here changes their weights."""

    pipeline: Any
    family: Family
    name: str  # for cards and people: a Hub id, a folder's or file's bare name; never a path

    @classmethod
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
    ) -> BaseModel:
        """Load `"toybox"`, a Hub id, a diffusers folder or a single `.safetensors` checkpoint.

        dtype            None: bf16 or fp16 on CUDA, bf16 on a CPU that has it, else fp32; the toybox: fp32 on a CPU
        device           None: CUDA, Apple's MPS or the CPU, the first there is
        config           for a single file: a diffusers folder of its family, instead of the built-in configuration
        prediction_type  for a single SD 2.x file that does not say: "epsilon" or "v_prediction"
        variant          as in diffusers, e.g. "fp16"
        Raises BaseModelError for anything that is not a text-to-image SD 1.x, SD 2.x or SDXL model.
        """
        place = torch.device(device) if device is not None else default_device()
        if str(source) == TOYBOX:
            precision = dtype or (torch.float32 if place.type == "cpu" else default_dtype(place))
            pipeline, name = load_folder(TOYBOX_FOLDER, precision), TOYBOX
        else:
            precision = dtype or default_dtype(place)
            path = Path(source).expanduser()
            if path.is_dir():
                pipeline = load_folder(path, precision, variant=variant)
                name = path.resolve().name
            elif path.is_file():
                pipeline, name = load_single_file(path, precision, config=config, prediction_type=prediction_type), path.stem
            elif is_hub_id(str(source)):
                pipeline, name = load_folder(str(source), precision, revision=revision, variant=variant), str(source)
            else:
                raise BaseModelError(
                    f"{source}: no such folder or file; give 'toybox', a Hub id (owner/name), a diffusers folder "
                    "or a .safetensors checkpoint"
                )
        base = cls.from_pipeline(pipeline, name=name)
        pipeline.to(place)
        return base

    @classmethod
    def from_pipeline(cls, pipeline: Any, *, name: str = "custom") -> BaseModel:
        """Recognise a pipeline that is loaded already; its modules are shared, not copied."""
        return cls(pipeline, recognise(pipeline), name)

    @property
    def unet(self) -> Any:
        return self.pipeline.unet

    @property
    def vae(self) -> Any:
        return self.pipeline.vae

    @property
    def text_encoders(self) -> dict[str, Any]:
        """Under their names in the pipeline, which are also their names in adapter files."""
        names = ("text_encoder", "text_encoder_2")[: self.family.text_encoders]
        return {name: getattr(self.pipeline, name) for name in names}

    @property
    def tokenizer(self) -> Any:
        return self.pipeline.tokenizer

    @property
    def components(self) -> dict[str, nn.Module]:
        """Every module that an adapter can change."""
        return {"unet": self.unet, **self.text_encoders}

    @property
    def device(self) -> torch.device:
        return next(self.unet.parameters()).device

    @property
    def dtype(self) -> torch.dtype:
        return next(self.unet.parameters()).dtype

    @property
    def pixels_per_latent(self) -> int:
        return int(2 ** (len(self.vae.config.block_out_channels) - 1))

    @property
    def resolution(self) -> int:
        """Side of the pictures that this base was made for, in pixels."""
        size = self.unet.config.sample_size
        return int(size if isinstance(size, int) else size[0]) * self.pixels_per_latent

    @property
    def prediction_type(self) -> str:
        return str(self.pipeline.scheduler.config.prediction_type)

    @cached_property
    def alphas_cumprod(self) -> Tensor:
        """(1000,) float32: the share of signal left at each timestep of the training schedule."""
        from diffusers import DDPMScheduler

        schedule = DDPMScheduler.from_config(self.pipeline.scheduler.config)
        return schedule.alphas_cumprod.float().to(self.device)

    @cached_property
    def fingerprint(self) -> str:
        """Which weights these are, whatever precision they were loaded in: sha256 of the signs of every tensor's start."""
        digest = hashlib.sha256()
        for name, value in sorted(self.unet.state_dict().items()):
            digest.update(f"{name} {tuple(value.shape)}".encode())
            digest.update(torch.signbit(value.flatten()[:256]).cpu().numpy().tobytes())
        return digest.hexdigest()[:16]

    @torch.no_grad()
    def encode_images(self, pixels: Tensor) -> tuple[Tensor, Tensor]:
        """(N, 3, H, W) in -1..1 -> mean and standard deviation of the latents, each (N, C, H/f, W/f) float32, unscaled.

        A VAE in fp16 computes in fp32 meanwhile: SDXL's overflows in fp16. (The stock pipeline decodes in the same way.)
        """
        kept = self.vae.dtype
        upcast = kept == torch.float16 and self.vae.config.force_upcast
        try:
            if upcast:
                nn.Module.to(self.vae, torch.float32)  # diffusers' own `to` warns of every change of precision
            posterior = self.vae.encode(pixels.to(self.vae.device, self.vae.dtype)).latent_dist
            return posterior.mean.float(), posterior.std.float()
        finally:
            if upcast:
                nn.Module.to(self.vae, kept)

    @property
    def scaling_factor(self) -> float:
        return float(self.vae.config.scaling_factor)

    def encode_text(self, prompts: Sequence[str]) -> TextConditions:
        """As the stock pipeline does it. Gradients flow when they are enabled (text-encoder LoRA)."""
        encoded = self.pipeline.encode_prompt(
            list(prompts), device=self.device, num_images_per_prompt=1, do_classifier_free_guidance=False
        )
        return TextConditions(encoded[0], encoded[2] if self.family.time_ids else None)

    def time_ids(self, original_size: tuple[int, int], crop: tuple[int, int], resolution: int) -> Tensor | None:
        """SDXL's (6,) size conditions: original height and width, crop top and left, target height and width (pixels).

        float32 whatever the base's precision: bf16 would round a photo's size to multiples of 8 or 16.
        """
        if not self.family.time_ids:
            return None
        return torch.tensor([*original_size, *crop, resolution, resolution], dtype=torch.float32, device=self.device)

    @contextmanager
    def only_unet_on_device(self) -> Iterator[None]:
        """On an accelerator, keep all but the U-Net in the host's memory meanwhile."""
        with moved(self._others, torch.device("cpu")):
            if self.device.type == "cuda":
                torch.cuda.empty_cache()
            yield

    @contextmanager
    def all_on_device(self) -> Iterator[None]:
        """Inside `only_unet_on_device`: everything back where the U-Net is, for a picture."""
        with moved(self._others, self.device):
            yield

    @property
    def _others(self) -> list[nn.Module]:
        return [m for m in self.pipeline.components.values() if isinstance(m, nn.Module) and m is not self.unet]


@contextmanager
def moved(modules: Sequence[nn.Module], device: torch.device) -> Iterator[None]:
    homes = [next(module.parameters()).device for module in modules]
    try:
        for module in modules:
            module.to(device)
        yield
    finally:
        for module, home in zip(modules, homes, strict=True):
            module.to(home)


def default_device() -> torch.device:
    if torch.cuda.is_available():
        return torch.device("cuda")
    return torch.device("mps" if torch.backends.mps.is_available() else "cpu")


def default_dtype(device: torch.device) -> torch.dtype:
    """bf16 where the chip computes in it, fp16 on older GPUs, else fp32."""
    if device.type == "cuda":
        return torch.bfloat16 if torch.cuda.is_bf16_supported(including_emulation=False) else torch.float16
    if device.type == "cpu" and torch.cpu.is_available() and torch.cpu._is_avx512_bf16_supported():
        return torch.bfloat16
    return torch.float32


def rare_tokens(base: BaseModel) -> tuple[str, ...]:
    """Tokens that are known to mean nothing to this base; () where nobody has told."""
    return RARE_TOKENS if base.name == TOYBOX else ()


def is_hub_id(source: str) -> bool:
    parts = source.split("/")
    return len(parts) == 2 and all(
        p and not p.startswith(".") and p.replace("-", "").replace("_", "").replace(".", "").isalnum() for p in parts
    )


def load_folder(source: str | Path, dtype: torch.dtype, **options: str | None) -> Any:
    """A diffusers folder, or a Hub id (from the cache when it is there)."""
    index = read_model_index(source, options.get("revision"))
    known = {family.pipeline for family in FAMILIES.values()}
    if index.get("_class_name") not in known:
        raise BaseModelError(
            f"{source} is a {index.get('_class_name', 'pipeline of unknown class')}; "
            f"lora_booth trains {labels()} text-to-image models"
        )
    import diffusers

    given = {key: value for key, value in options.items() if value is not None}
    try:
        return getattr(diffusers, index["_class_name"]).from_pretrained(source, dtype=dtype, **given)
    except (OSError, ValueError, KeyError, RuntimeError) as error:
        raise BaseModelError(f"{source}: cannot be loaded ({first_line(error)}); is the folder complete?") from error


def read_model_index(source: str | Path, revision: str | None) -> dict[str, Any]:
    if isinstance(source, Path):
        path = source / "model_index.json"
        if not path.is_file():
            raise BaseModelError(
                f"{source}: no model_index.json, so not a diffusers folder; save one with pipe.save_pretrained(folder)"
            )
    else:
        from huggingface_hub import hf_hub_download
        from huggingface_hub.errors import HfHubHTTPError, HFValidationError, LocalEntryNotFoundError, OfflineModeIsEnabled

        try:
            path = Path(hf_hub_download(source, "model_index.json", revision=revision))
        except (LocalEntryNotFoundError, OfflineModeIsEnabled) as error:
            raise BaseModelError(
                f"{source}: not in the local cache, and the Hub cannot be reached; download it once with a network"
            ) from error
        except HFValidationError as error:
            raise BaseModelError(f"{source}: not a Hub id ({first_line(error)}), and no such folder or file") from error
        except HfHubHTTPError as error:
            raise BaseModelError(f"{source}: {first_line(error)}; check the name, or log in with `hf auth login`") from error
    try:
        index = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BaseModelError(f"{path}: not valid JSON ({error})") from error
    return index if isinstance(index, dict) else {}


def recognise(pipeline: Any) -> Family:
    """The family of a loaded pipeline, from its modules. Raises BaseModelError for what cannot be trained."""
    what = type(pipeline).__name__
    unet, vae = getattr(pipeline, "unet", None), getattr(pipeline, "vae", None)
    if unet is None or vae is None:
        raise BaseModelError(f"{what} has no U-Net and VAE; lora_booth trains {labels()}")
    if unet.config.in_channels != vae.config.latent_channels:
        raise BaseModelError(
            f"its U-Net takes {unet.config.in_channels} channels and the VAE gives {vae.config.latent_channels}: "
            "an inpainting or editing model; take the text-to-image model of the same family"
        )
    encoders = [e for e in (getattr(pipeline, n, None) for n in ("text_encoder", "text_encoder_2")) if e is not None]
    time_ids = unet.config.addition_embed_type == "text_time"
    linear = bool(unet.config.use_linear_projection)
    widths = sum(e.config.hidden_size for e in encoders)
    for family in FAMILIES.values():
        if (len(encoders), time_ids, linear) == (family.text_encoders, family.time_ids, family.linear_projection):
            break
    else:
        raise BaseModelError(
            f"{what} with {len(encoders)} text encoder(s) is not {labels()} "
            "(an SDXL refiner cannot be trained; take the SDXL base)"
        )
    if widths != unet.config.cross_attention_dim:
        raise BaseModelError(
            f"the text encoder gives {widths} values a token, the U-Net wants {unet.config.cross_attention_dim}: "
            "the parts are of different models"
        )
    for name in ("tokenizer", "tokenizer_2")[: family.text_encoders]:
        if not has_vocabulary(getattr(pipeline, name)):
            raise BaseModelError(f"its {name} has no vocabulary; are the files in its {name} folder complete?")
    prediction = pipeline.scheduler.config.get("prediction_type")
    if prediction not in family.modelspec:
        raise BaseModelError(f"prediction type {prediction!r} is not supported; {' or '.join(family.modelspec)} is")
    return family
