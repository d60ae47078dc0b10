"""Groups of options. A command takes a group as one parameter, and `command` gives it an option for each field.

So a default stands once, in the dataclass, and its help is the comment beside it. A test compares the default with that of the
Python function behind the command.
"""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import MISSING, dataclass, fields, is_dataclass
from difflib import get_close_matches
from functools import wraps
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, get_args, get_origin, get_type_hints

import typer

from ..adapters.contents import Dtype, Layout
from ..config import GUIDANCE, STEPS, Quantization, comments, sides
from ..errors import SettingsError, reason_of, shown
from .app import app, note
from .arguments import base_of, by_file, region_words, with_tags

if TYPE_CHECKING:
    import torch

    from ..adapters.adapter import Adapter
    from ..base.base_model import BaseModel
    from ..pictures.composition import Composition
    from .arguments import Named as Chosen

# help that several commands or groups share
Adapters = Annotated[list[str], typer.Argument(help="adapter files, each with an optional weight, e.g. ink.safetensors:0.6")]
Named = Annotated[
    list[str] | None,
    typer.Argument(
        help="adapter files, each with an optional weight, e.g. ink.safetensors:0.6 [those that the prompt names]",
        show_default=False,
    ),
]
Base = Annotated[str, typer.Option(help="base model: 'toybox', a Hub id, a diffusers folder or a .safetensors checkpoint")]
OwnBase = Annotated[str | None, typer.Option(help="another base model than the adapters were made for, as for `train`")]
Photos = Annotated[Path, typer.Argument(help="folder of photos, e.g. photos/rex")]
Crop = Annotated[Literal["smart", "center"], typer.Option(help="crop: smart (keeps the subject, no black bars) or center")]
Precision = Annotated[Dtype | None, typer.Option(help="precision of the base: fp16, bf16 or fp32 [by the device]")]
Quantize = Annotated[
    Quantization | None,
    typer.Option(help="U-Net in less memory: int8 (8 bits), or nf4 (4 bits, less exact, needs bitsandbytes)"),
]
Names = Annotated[Layout, typer.Option(help="names of the tensors: kohya (diffusers, ComfyUI, A1111) or peft")]
Steps = Annotated[int, typer.Option(help="denoising steps; 20 to 50 is usual")]
Size = Annotated[str | None, typer.Option(help="side in pixels, or width x height, e.g. 768 or 832x1216 [the base's own]")]
Method = Annotated[str | None, typer.Option(help="how adapters combine: sum or regions [regions for several subjects]")]
Json = Annotated[bool, typer.Option(help="print everything as JSON")]


MOST_BYTES = 2**20  # of a file of settings; chosen
WITHOUT_PYTORCH = ("photos", "cache")  # commands that start at once


def command(function: Callable[..., None]) -> Callable[..., None]:
    """Register a command with the function's name.

    A parameter whose type is a dataclass becomes an option for each field, another keyword-only one an option, and the rest
    are arguments. The comment beside a parameter is its help.
    """
    groups: dict[str, Any] = {}
    parameters: list[inspect.Parameter] = []
    kinds = get_type_hints(function, include_extras=True)
    for name, one in inspect.signature(function).parameters.items():
        if is_dataclass(kinds[name]):
            groups[name] = kinds[name]
            parameters += options_of(groups[name])
            continue
        kind = kinds[name]
        if kind is not typer.Context and get_origin(kind) is not Annotated:
            about = typer.Option if one.kind is one.KEYWORD_ONLY else typer.Argument
            kind = Annotated[kind, about(help=comments(function).get(name, ""))]
        parameters.append(one.replace(kind=one.KEYWORD_ONLY, annotation=kind))

    @wraps(function)
    def run(**given: Any) -> None:
        if function.__name__ not in WITHOUT_PYTORCH and "torch" not in sys.modules:
            note("loading PyTorch")  # takes seconds
        made = {}
        for name, group in groups.items():
            values = {one.name: given.pop(one.name) for one in fields(group)}
            made[name] = group(**{key: value for key, value in values.items() if value not in (None, [])})
        function(**made, **given)

    run.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    run.__annotations__ = {one.name: one.annotation for one in parameters}
    return app.command(function.__name__.replace("_", "-"))(run)


def options_of(group: Any) -> Iterator[inspect.Parameter]:
    """An option for each field of a dataclass."""
    kinds = get_type_hints(group, include_extras=True)
    for one in fields(group):
        kind = kinds[one.name]
        default: Any = inspect.Parameter.empty if one.default is MISSING else one.default
        if get_origin(kind) is not Annotated:
            help = comments(group).get(one.name, "")
            arms = get_args(kind) or (kind,)
            if {int, str} <= set(arms):  # a size, which a string can express
                kind = str | None
            elif tuple in [get_origin(arm) for arm in (kind, *arms)]:
                kind, help = list[str] | None, f"{help}; repeatable"
                help += f" [{', '.join(default)}]" if default else ""
                default = None
            kind = Annotated[kind, typer.Option(help=help)]
        yield inspect.Parameter(one.name, inspect.Parameter.KEYWORD_ONLY, default=default, annotation=kind)


def is_given(context: typer.Context, group: Any) -> bool:
    """Whether the command line or a file of settings gives an option of this group."""
    sources = [context.get_parameter_source(one.name) for one in fields(group)]
    return any(source is not None and source.name != "DEFAULT" for source in sources)


# --- settings in a file ------------------------------------------------------------------------------------------------


def read_settings(context: typer.Context, file: Path | None) -> Path | None:
    """Let a file give the options that the command line does not. Raises SettingsError."""
    if file is None:
        return None
    known = {str(one.name): one for one in context.command.params if one.name != "settings"}
    given: dict[str, Any] = {}
    for key, value in settings_in(file).items():
        name = key.replace("-", "_")
        if value is None:  # of JSON
            continue
        if name not in known:
            near = get_close_matches(name, known, n=1)
            meant = f"did you mean {near[0]}?" if near else f"known: {', '.join(known)}"
            raise SettingsError(f"{file}: {key!r} is not a setting of {context.command.name}; {meant}")
        repeatable, values = getattr(known[name], "multiple", False), value if isinstance(value, list) else [value]
        if any(isinstance(one, dict | list) for one in values) or (len(values) != 1 and not repeatable):
            raise SettingsError(f"{file}: {key} is {shown(value)}; write one value")
        words = [one if isinstance(one, bool) else str(one) for one in values]
        given[name] = words if repeatable else words[0]
    context.default_map = given
    return file


def settings_in(file: Path) -> dict[str, Any]:
    from ..files import read_json

    try:
        if file.suffix.lower() == ".json":
            found = read_json(file, most=MOST_BYTES)
        elif sys.version_info < (3, 11):
            raise SettingsError(f"{file}: TOML needs Python 3.11; write the settings as JSON, in a file that ends with .json")
        else:
            import tomllib

            found = tomllib.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise SettingsError(f"{file}: cannot be read ({error.strerror}); pass a TOML or JSON file of settings") from error
    except ValueError as error:  # also of TOML, JSON and UTF-8
        raise SettingsError(f"{file}: not TOML, or JSON in a file that ends with .json ({reason_of(error)})") from error
    if not isinstance(found, dict):
        raise SettingsError(f"{file}: not a table of settings; write names and values")
    return found


Settings = Annotated[
    Path | None,
    typer.Option(
        help="TOML or JSON file of these settings, e.g. rex.toml; options on the command line come first",
        is_eager=True,
        callback=read_settings,
    ),
]


# --- groups ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Reading:
    """How to read a base's files, as in `BaseModel.load`."""

    config: Path | None = None  # for a single file: a diffusers folder of its family, e.g. models/sd21 [built in]
    prediction_type: str | None = None  # epsilon or v_prediction [what the base states]
    variant: str | None = None  # which weights of a folder or Hub id, e.g. fp16
    vae: str | None = None  # another VAE: its folder, Hub id or .safetensors file, e.g. stabilityai/sd-vae-ft-mse
    revision: str | None = None  # branch, tag or commit of a Hub id, e.g. main

    def load(self, source: str, *, dtype: Dtype | None = "fp32", device: str | None = "cpu", **more: Any) -> BaseModel:
        """By default a base in fp32 on the CPU, to add and subtract weights."""
        from ..base.base_model import BaseModel

        how = {one.name: getattr(self, one.name) for one in fields(Reading)}
        return BaseModel.load(source, dtype=torch_dtype(dtype), device=device, **how, **more)


@dataclass(frozen=True)
class Loading(Reading):
    """How to load a base that draws or learns."""

    dtype: Precision = None
    device: str | None = None  # where to compute, e.g. cuda:1 or cpu [the fastest here]
    quantize: Quantize = None

    def base(self, source: str | None, adapters: Sequence[Adapter] = ()) -> BaseModel:
        """source: None for the base that the adapters were made for"""
        found = base_of(adapters) if source is None else source
        note(f"loading the base {shown(found)}")
        return self.load(found, dtype=self.dtype, device=self.device, quantize=self.quantize)


def torch_dtype(dtype: Dtype | None) -> torch.dtype | None:
    from ..adapters.writing import DTYPES

    return None if dtype is None else DTYPES[dtype]


@dataclass(frozen=True)
class Prompting:
    """What to draw."""

    prompt: str | None = None  # what to draw, e.g. "a photo of ohwx dog at sea", with the adapter's token
    prompts: Path | None = None  # instead of --prompt: a text file, one prompt a line, e.g. prompts.txt
    prompt_set: Literal["object", "live"] | None = None  # instead of --prompt: the DreamBooth paper's, of things or of animals
    context: tuple[str, ...] = ()  # what {context} in a prompt stands for, e.g. "in the snow"

    @property
    def given(self) -> int:
        return sum(one is not None for one in (self.prompt, self.prompts, self.prompt_set))

    def templates(self) -> Sequence[str]:
        """The one prompt, those of the file, or a known set; with their placeholders."""
        from ..pictures.prompts import PROMPT_SETS, read_prompts

        if self.given != 1:
            raise SettingsError("which prompts? pass exactly one of --prompt TEXT, --prompts FILE and --prompt-set NAME")
        if self.prompt_set is not None:
            return PROMPT_SETS[self.prompt_set]
        return [self.prompt] if self.prompt is not None else read_prompts(self.prompts or "")

    def read(self, adapters: Sequence[str] | None) -> tuple[Chosen, list[str]]:
        """The adapters of arguments and of <lora:...> tags, and the prompts without these."""
        from ..pictures.prompts import prompts_for

        texts, templates = with_tags(adapters, self.templates())
        chosen = by_file(texts)
        return chosen, prompts_for([adapter for _, (adapter, _) in chosen], templates, contexts=self.context)


@dataclass(frozen=True)
class Sampling:
    """How to draw."""

    steps: Steps = STEPS
    guidance: float = GUIDANCE  # how closely to follow the prompt; 4 to 8 is usual
    sampler: str | None = None  # e.g. "euler a", "dpm++ 2m karras", ddim, unipc or lcm [the base's own]

    def __post_init__(self) -> None:
        from ..base.samplers import sampler_name

        if self.sampler is not None:
            sampler_name(self.sampler)


@dataclass(frozen=True)
class SizedSampling(Sampling):
    size: Size = None

    def __post_init__(self) -> None:
        super().__post_init__()
        sides(self.size)


@dataclass(frozen=True)
class Drawing(SizedSampling):
    negative_prompt: str | None = None  # what to avoid, e.g. "blurry, text"
    batch_size: int = 1  # pictures at a time, e.g. 4: faster, but takes more memory


@dataclass(frozen=True)
class Placement:
    """Where each adapter is active."""

    method: Method = None
    region: tuple[str, ...] = ()  # where an adapter is active, perhaps with a prompt, e.g. rex:0,0,0.5,1 or 'rex:0,0,1,1:a dog'
    auto_regions: bool = False  # find the place of each subject that the prompt names

    def __post_init__(self) -> None:
        if self.region and self.auto_regions:
            raise SettingsError("--region and --auto-regions exclude each other; pass one of them")

    def composition(self, adapters: Chosen, base: str | None, loading: Loading) -> Composition:
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
        )
