"""Groups of options. A command takes a group as one parameter, and `command` gives it an option for each field.

So a default stands once, in the dataclass; a test compares it with that of the Python function behind the command.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Sequence
from dataclasses import MISSING, Field, dataclass, field, fields, is_dataclass
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ..adapters.contents import Dtype, Layout
from ..config import GUIDANCE, STEPS
from ..errors import SettingsError, shown
from .app import app, note
from .arguments import region_words, torch_dtype

if TYPE_CHECKING:
    from ..adapters.adapter import Adapter
    from ..base.base_model import BaseModel
    from ..pictures.composition import Composition
    from .arguments import Named

Adapters = Annotated[list[str], typer.Argument(help="adapter files, each with an optional weight, e.g. ink.safetensors:0.6")]
Base = Annotated[str, typer.Option(help="base model: 'toybox', a Hub id, a diffusers folder or a .safetensors checkpoint")]
OwnBase = Annotated[str | None, typer.Option(help="another base model than the adapters were made for, as for `train`")]
Photos = Annotated[Path, typer.Argument(help="folder of photos, e.g. photos/rex")]
Crop = Annotated[
    Literal["smart", "center"],
    typer.Option(help="which square of a photo to use: smart (keeps the subject, no black bars) or center"),
]
Precision = Annotated[Dtype | None, typer.Option(help="precision of the base: fp16, bf16 or fp32 [by the device]")]
Quantize = Annotated[
    Literal["nf4"] | None, typer.Option(help="nf4 loads the U-Net in 4 bits (bitsandbytes): less memory, less exact")
]
Names = Annotated[Layout, typer.Option(help="names of the tensors: kohya (diffusers, ComfyUI, A1111) or peft")]
Steps = Annotated[int, typer.Option(help="denoising steps; 20 to 50 is usual")]
Size = Annotated[int | None, typer.Option(help="side in pixels, e.g. 768 [the base's own]")]
Method = Annotated[str | None, typer.Option(help="how adapters combine: sum or regions [regions for several subjects]")]
Json = Annotated[bool, typer.Option(help="print everything as JSON")]
HELP = {  # of the fields of LoraSpec and TrainingConfig
    "rank": "LoRA rank, e.g. 16; 4 to 32 is usual",
    "alpha": "scales the change by alpha / rank, e.g. 16 [rank]",
    "dropout": "share of the adapter's inputs to drop in training, e.g. 0.1",
    "target_modules": "U-Net modules to train, by the end of their path; repeatable [to_q, to_k, to_v, to_out.0]",
    "text_encoder": "also train the text encoders",
    "text_target_modules": "their modules to train; repeatable [q_proj, k_proj, v_proj, out_proj]",
    "steps": "optimizer updates, e.g. 800 [from the number of photos]",
    "learning_rate": "learning rate at its highest, e.g. 1e-4 [from the base]",
    "batch_size": "photos in a forward pass, e.g. 2; as many class images are added",
    "gradient_accumulation": "forward passes for one optimizer update, e.g. 4",
    "pictures_at_a_time": "pictures of a batch in memory at a time, e.g. 1 [all]",
    "lr_schedule": "learning rate after the warm-up: cosine (falls to 0) or constant",
    "warmup_steps": "updates over which the rate rises from 0, e.g. 50 [a twentieth of the steps, at most 50]",
    "weight_decay": "weight decay of AdamW, e.g. 0.01",
    "max_grad_norm": "norm at which gradients are clipped, e.g. 1; inf: never",
    "prior_loss_weight": "weight of the class images, e.g. 0.5; 0: none",
    "class_images": "pictures of the plain class to train on as well, e.g. 100 [from the number of photos]",
    "min_snr_gamma": "gamma of min-SNR loss weighting, e.g. 5 [off]",
    "flip": "also train on mirrored photos",
    "resolution": "side in pixels, e.g. 512 [the base's own]",
    "seed": "seed of every random draw, e.g. 7; the same seed gives the same adapter",
    "attention": "attention kernel: auto (the fastest here), plain, sdpa or xformers",
    "gradient_checkpointing": "recompute activations: less memory, slower",
    "lean": "store less for the backward pass; the numbers stay the same up to rounding",
    "capture": "replay a recorded step on a GPU: auto (where possible), on or off",
    "compile": "compile the U-Net: a first step of minutes, then faster on a GPU",
    "optimizer": "adamw, or adamw8bit (needs lora-booth[quant] and a GPU)",
    "checkpoint_every": "updates between two checkpoints, e.g. 50",
    "checkpoint_minutes": "minutes between two checkpoints, if that is sooner, e.g. 2",
    "sample_every": "updates between sample pictures, e.g. 100; 0: none [three rounds]",
    "sample_prompt": "prompt of the samples, e.g. 'ohwx dog at sea'; repeatable [subject, subject in snow, class]",
    "sample_seeds": "sample pictures of each prompt, e.g. 2",
}


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command with the function's name; a parameter whose type is a dataclass becomes an option for each field."""
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []

    def add(name: str, kind: Any, default: Any) -> None:
        parameters.append(inspect.Parameter(name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind))

    hints = get_type_hints(function, include_extras=True)
    for name, parameter in inspect.signature(function).parameters.items():
        if not is_dataclass(hints[name]):
            add(name, hints[name], parameter.default)
            continue
        groups[name] = hints[name]
        kinds = get_type_hints(groups[name], include_extras=True)
        for one in fields(groups[name]):
            default = None if isinstance(one.default, tuple) else one.default
            add(one.name, as_option(one, kinds[one.name]), parameter.empty if default is MISSING else default)

    @wraps(function)
    def run(**given: Any) -> None:
        if Loading in groups.values():
            note("loading PyTorch")  # takes seconds
        made = {}
        for name, group in groups.items():
            values = {one.name: given.pop(one.name) for one in fields(group)}
            made[name] = group(**{key: value for key, value in values.items() if value not in (None, [])})
        function(**made, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return app.command()(run)


def as_option(one: Field[Any], kind: Any) -> Any:
    """The type of a field, and its help, as typer reads them."""
    if get_origin(kind) is Annotated:
        return kind
    several = tuple in [get_origin(arm) for arm in (kind, *get_args(kind))]
    return Annotated[list[str] | None if several else kind, typer.Option(help=one.metadata.get("help") or HELP[one.name])]


def option(default: Any, help: str) -> Any:
    """A field with its help."""
    return field(default=default, metadata={"help": help})


# --- groups ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How to read a base's files, as in `BaseModel.load`."""

    config: Path | None = option(None, "for a single file: a diffusers folder of its family, e.g. models/sd21 [built in]")
    prediction_type: str | None = option(None, "for a single file: epsilon or v_prediction [what it states]")
    variant: str | None = option(None, "which weights of a folder or Hub id, e.g. fp16")
    vae: str | None = option(None, "another VAE: its folder, Hub id or .safetensors file, e.g. stabilityai/sd-vae-ft-mse")
    revision: str | None = option(None, "branch, tag or commit of a Hub id, e.g. main")

    def exact(self, source: str) -> BaseModel:
        """A base in fp32 on the CPU, to add and subtract weights."""
        return self.load(source, dtype="fp32", device="cpu")

    def load(self, source: str, *, dtype: Dtype | None = None, **where: Any) -> BaseModel:
        from ..base.base_model import BaseModel

        how = {one.name: getattr(self, one.name) for one in fields(Reading)}
        return BaseModel.load(source, dtype=torch_dtype(dtype), **how, **where)


@dataclass(frozen=True)
class Loading(Reading):
    """How to load a base that draws or learns."""

    dtype: Precision = None
    device: str | None = option(None, "where to compute, e.g. cuda:1 or cpu [the fastest here]")
    quantize: Quantize = None

    def base(self, source: str | None, adapters: Sequence[Adapter] = ()) -> BaseModel:
        """source: None for the base that the adapters were made for"""
        from .bases import base_of

        found = base_of(adapters) if source is None else source
        note(f"loading the base {shown(found)}")
        return self.load(found, dtype=self.dtype, device=self.device, quantize=self.quantize)


@dataclass(frozen=True)
class Prompting:
    """What to draw."""

    prompt: str | None = option(None, 'what to draw, e.g. "a photo of ohwx dog at sea", with the adapter\'s token')
    prompts: Path | None = option(None, "instead of --prompt: a text file, one prompt a line, e.g. prompts.txt")
    prompt_set: Literal["object", "live"] | None = option(
        None, "instead of --prompt: the DreamBooth paper's 25, object (things) or live (animals)"
    )
    context: tuple[str, ...] = option((), 'what {context} in a prompt stands for, e.g. "in the snow"; repeat for several')

    @property
    def given(self) -> int:
        return sum(one is not None for one in (self.prompt, self.prompts, self.prompt_set))

    def templates(self) -> Sequence[str]:
        """The one prompt, those of the file, or a known set; with their placeholders."""
        from ..pictures.prompts import PROMPT_SETS, read_prompts

        if self.given != 1:
            ways = "--prompt TEXT, --prompts FILE and --prompt-set object or live"
            raise SettingsError(f"which prompts? pass exactly one of {ways}")
        if self.prompt_set is not None:
            return PROMPT_SETS[self.prompt_set]
        return [self.prompt] if self.prompt is not None else read_prompts(self.prompts or "")

    def texts(self, adapters: Sequence[Adapter]) -> list[str]:
        from ..pictures.prompts import prompts_for

        return prompts_for(adapters, self.templates(), contexts=self.context)


@dataclass(frozen=True)
class Sampling:
    """How to draw."""

    steps: Steps = STEPS
    guidance: float = option(GUIDANCE, "how closely to follow the prompt; 4 to 8 is usual")
    size: Size = None


@dataclass(frozen=True)
class Drawing(Sampling):
    negative_prompt: str | None = option(None, 'what to avoid, e.g. "blurry, text"')
    batch_size: int = option(1, "pictures at a time, e.g. 4: faster, but takes more memory")


@dataclass(frozen=True)
class Placement:
    """Where each adapter is active."""

    method: Method = None
    region: tuple[str, ...] = option(
        (), "where an adapter is active, and optionally a prompt, e.g. rex:0,0,0.5,1 or 'rex:0,0,0.5,1:ohwx dog'; repeatable"
    )
    auto_regions: bool = option(False, "find the place of each subject that the prompt names")
    isolate: Literal["delta", "noise"] = option(
        "noise", "how regions are kept apart: noise (a pass for each) or delta (about one pass)"
    )

    def __post_init__(self) -> None:
        if self.region and self.auto_regions:
            raise SettingsError("--region and --auto-regions exclude each other; pass one of them")

    def composition(self, adapters: Named, base: str | None, loading: Loading) -> Composition:
        """adapters: as of `by_file`. Everything else is checked before the base is loaded."""
        from ..pictures.composition import Composition
        from ..pictures.regions import Region

        names = [name for name, _ in adapters]
        if self.region and len(set(names)) < len(names):
            raise SettingsError("two adapter files have the same name; rename one, so that --region can name either")
        places: dict[str, Region] = {}
        for text in self.region:
            name, box, words = region_words(text)
            if name not in names:
                raise SettingsError(f"region {text!r}: no adapter {name!r}; use one of: {', '.join(names)}")
            adapter, weight = dict(adapters)[name]
            places[name] = Region(adapter, box=box, prompt=words, weight=weight)
        return Composition(
            loading.base(base, [adapter for _, (adapter, _) in adapters]),
            [item for name, item in adapters if name not in places],
            method=self.method,  # type: ignore[arg-type]  # checked by Composition
            regions="auto" if self.auto_regions else list(places.values()) or None,
            isolate=self.isolate,
        )
