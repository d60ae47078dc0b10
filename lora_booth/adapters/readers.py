"""What other programs read of an adapter file: which modules, how strongly, and what they silently drop.

For diffusers its own conversion runs on the file. The rules of the others are tables, written from the sources that they
name; they hold for the published shapes of each family.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

from safetensors import safe_open
from torch import Tensor

from ..base.families import FAMILIES
from ..base.original_naming import UNetNames
from ..config import TEXT_TARGETS
from ..errors import AdapterError, AdapterScaleError, AdapterTargetError, reason_of
from .contents import AdapterContents, Layout
from .layouts import LAYERS, LYCORIS, PAIRS, RARE, likely_family
from .metadata import PEFT_KEY
from .reading import PeftConfig, find, load

# How names are made of a module's path below its component: {path} as it is, {original} as the original code calls it,
# {path_} and {original_} with underscores for dots, {processor} as diffusers wrote attention before it knew PEFT.
Names = dict[str, tuple[str, ...]]  # module, or else its component -> templates
UNET: Names = {"unet": ("lora_unet_{original_}", "lora_unet_{path_}")}
TEXT: Names = {"text_encoder": ("lora_te_{path_}",)}
TEXTS: Names = {"text_encoder": ("lora_te1_{path_}",), "text_encoder_2": ("lora_te2_{path_}",)}


@dataclass(frozen=True)
class Program:
    """A program looks for a name that it knows of a module, with one of the pairs of endings.

    The scale is `<name>.alpha` / rank, and 1 without such a tensor.
    """

    names: Mapping[str, Names]  # by family
    ends: tuple[tuple[str, str], ...]  # of the down and the up factor
    unread: tuple[str, ...] = ()  # modules that it never takes
    lycoris: bool = False  # it reads LoHa, LoKr and LoRA with a middle factor as well, by LyCORIS's formulas
    joined: Mapping[str, str] | None = None  # family -> component where it takes all four projections of a layer, or none


PROGRAMS = {
    "ComfyUI": Program(
        # Comfy-Org/ComfyUI a125cd84: comfy/lora.py, comfy/utils.py (unet_to_diffusers), comfy/weight_adapter
        names={
            name: {
                "unet": (
                    *UNET["unet"],
                    *("diffusion_model.{original}", "lycoris_{path_}", "unet.{processor}", "{processor}"),
                ),
                "text_encoder": ("lora_te_{path_}", "lora_te1_{path_}", "text_encoder.{path}", clip + "{path}"),
                "text_encoder_2": ("lora_te2_{path_}", "text_encoder_2.{path}", "text_encoders.clip_g.transformer.{path}"),
                "text_encoder.text_projection": (clip + "{path}",) if name == "sd2" else ("lora_te1_{path_}", clip + "{path}"),
                "text_encoder_2.text_projection": ("lora_te2_{path_}", "text_encoders.clip_g.transformer.{path}"),
            }
            for name in FAMILIES
            for clip in ["text_encoders.clip_h.transformer." if name == "sd2" else "text_encoders.clip_l.transformer."]
        },
        ends=(*PAIRS, (".lora_A.default.weight", ".lora_B.default.weight")),
        lycoris=True,
    ),
    "A1111": Program(
        # AUTOMATIC1111/stable-diffusion-webui 82a973c0 (1.10.1): extensions-builtin/Lora, networks.py and network*.py
        names={
            "sd1": UNET | {"text_encoder": ("lora_te_{path_}", "lora_te1_{path_}")},
            "sd2": UNET | TEXT,
            # of diffusers' names it knows those of SD 1.x, which has no such embedding, and no attention before this sampler
            "sdxl": UNET
            | TEXTS
            | {
                f"unet.{path}": ("lora_unet_{original_}",)
                for path in ("add_embedding.linear_1", "add_embedding.linear_2", "up_blocks.0.upsamplers.0.conv")
            },
        },
        ends=PAIRS[:1],
        unread=("text_encoder.text_projection", "text_encoder_2.text_projection"),
        lycoris=True,
        joined={"sd2": "text_encoder", "sdxl": "text_encoder_2"},  # OpenCLIP's, which have torch's MultiheadAttention
    ),
    "sd-scripts": Program(
        # kohya-ss/sd-scripts 48d368fa: networks/lora.py, library/original_unet.py, library/sdxl_original_unet.py
        names={**dict.fromkeys(("sd1", "sd2"), {"unet": ("lora_unet_{path_}",)} | TEXT), "sdxl": UNET | TEXTS},
        ends=PAIRS[:1],
        unread=RARE,  # it adapts transformers, resnets, samplers and text layers, nothing else
    ),
}

PUBLISHED = {
    name: UNetNames(LAYERS, len(family.depths), {i for i, depth in enumerate(reversed(family.depths)) if depth})
    for name, family in FAMILIES.items()
}
READERS = ("diffusers", *PROGRAMS)
MUST_READ = {"kohya": READERS, "peft": ("diffusers",)}  # layout -> who has to read all that `save` writes


@dataclass(frozen=True, eq=False)
class OpenFile:
    """A file as all these programs open it, and what it means."""

    tensors: Mapping[str, Tensor]
    metadata: Mapping[str, str]
    family: str  # of the base assumed: the file's, or the likeliest if the file does not say
    meant: Mapping[str, float]  # module -> alpha / rank


@dataclass(frozen=True)
class Reading:
    """How one program reads a file; `str()` says it in a line."""

    reader: str
    scales: Mapping[str, float]  # module that it reads -> the alpha / rank that it applies
    dropped: tuple[str, ...]  # modules that it silently leaves out
    rescaled: tuple[str, ...]  # modules that it reads at another strength than the file means
    notes: tuple[str, ...] = ()  # why, and what else happens
    refusal: str | None = None  # the error with which it refuses the file

    def __str__(self) -> str:
        if self.refusal is not None:
            return f"{self.reader}: refuses the file ({self.refusal})"
        count = len(self.scales)
        text = f"reads {count} of {count + len(self.dropped)} modules" if count else "reads nothing"
        if self.rescaled:
            text += f", {len(self.rescaled)} of them at another strength"
        return f"{self.reader}: {text}" + (f" ({'; '.join(self.notes)})" if self.notes else "")


def readings(path: str | Path) -> dict[str, Reading]:
    """How every program reads an adapter file. Raises what `Adapter.load` raises."""
    path = Path(path)
    file = opened(find(path)[0], load(path, allow=RARE))
    return {reader: read_as(reader, file) for reader in READERS}


def opened(path: Path, adapter: AdapterContents) -> OpenFile:
    """path: a file that `load` has checked; adapter: what it found there."""
    with safe_open(path, "pt") as content:
        tensors = {key: content.get_tensor(key) for key in content.keys()}  # no dictionary
        metadata = content.metadata() or {}
    family = likely_family(adapter.modules, adapter.card.family)
    return OpenFile(tensors, metadata, family, {module: f.scale for module, f in adapter.modules.items()})


def read_as(reader: str, file: OpenFile) -> Reading:
    """What `reader`, one of READERS, makes of a file."""
    found: dict[str, float] = {}
    refusal = None
    try:
        found = by_diffusers(file) if reader == "diffusers" else by_table(PROGRAMS[reader], file)
    except (AdapterError, ValueError, KeyError, IndexError, TypeError, RuntimeError) as error:  # diffusers raises many kinds
        refusal = reason_of(error)
    if reader == "A1111" and any(key.startswith("diffusion_model.") for key in file.tensors):
        refusal = "it takes diffusion_model for the name of a module"  # the part before the first dot; and there is one
    scales = {module: found[module] for module in file.meant if module in found}
    dropped = tuple(module for module in file.meant if module not in found)
    rescaled = tuple(m for m, scale in scales.items() if not math.isclose(scale, file.meant[m], rel_tol=1e-6))
    return Reading(reader, scales, dropped, rescaled, tuple(_notes(reader, file, dropped)), refusal)


def _notes(reader: str, file: OpenFile, dropped: tuple[str, ...]) -> list[str]:
    notes = []
    component = (PROGRAMS[reader].joined or {}).get(file.family) if reader in PROGRAMS else None
    if dropped and not any(key.startswith(("lora_", "lycoris_")) for key in file.tensors):
        notes.append("its names are those of PEFT or diffusers")
    elif any(module.startswith(f"{component}.") and ".self_attn." in module for module in dropped):
        notes.append(f"of a layer of the {component} it takes {', '.join(TEXT_TARGETS)} together or not at all")
    if reader == "A1111" and (taken := a1111_family(file.metadata)) not in (None, file.family):
        notes.append(f"takes it for {FAMILIES[taken].label}, and hides it while another base is loaded")
    return notes


def a1111_family(metadata: Mapping[str, str]) -> str | None:
    """The family whose bases A1111 lists a file for (network.py, detect_version); None: any."""
    if metadata.get("ss_base_model_version", "").startswith("sdxl_"):
        return "sdxl"
    if metadata.get("ss_v2") == "True":
        return "sd2"
    return "sd1" if metadata else None


def by_table(program: Program, file: OpenFile) -> dict[str, float]:
    """Module -> scale, for what `program` finds in the file."""
    tensors, scales = file.tensors, {}
    for module in file.meant:
        for name in names_of(module, file.family, program):
            for down, up in program.ends:
                if name + down in tensors and name + up in tensors:
                    alpha = tensors.get(f"{name}.alpha")
                    scales[module] = 1.0 if alpha is None else alpha.item() / tensors[name + down].shape[0]
            if program.lycoris and any(f"{name}.{role}" in tensors for role in LYCORIS):
                scales[module] = file.meant[module]  # the same formula as ours
            if not program.lycoris and f"{name}.lora_mid.weight" in tensors:
                scales.pop(module, None)
    component = (program.joined or {}).get(file.family)
    for layer in {m.rpartition(".")[0] for m in scales if m.startswith(f"{component}.") and ".self_attn." in m}:
        projections = [f"{layer}.{projection}" for projection in TEXT_TARGETS]
        if not scales.keys() >= set(projections):
            for projection in projections:
                scales.pop(projection, None)
    return scales


def names_of(module: str, family: str, program: Program) -> list[str]:
    """The names under which `program` looks for a module, with a base of `family`."""
    if module in program.unread:
        return []
    component, _, path = module.partition(".")
    forms = {"path": path}
    if component == "unet":
        original = PUBLISHED[family].original(path)
        if original is None:
            return []
        forms |= {"original": original, "original_": original.replace(".", "_")}
        forms["processor"] = path.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
    forms["path_"] = path.replace(".", "_")
    table = program.names[family]
    return [template.format_map(forms) for template in table.get(module, table.get(component, ()))]


# --- diffusers, by its own functions -------------------------------------------------------------------------------


def by_diffusers(file: OpenFile) -> dict[str, float]:
    """Module -> scale, as `load_lora_weights` finds them. Raises what it raises.

    This calls its conversion of names, alphas and metadata, without importing its pipelines, which takes as long again.
    """
    from diffusers.loaders import lora_conversion_utils as conversion

    tensors, alphas = dict(file.tensors), {}
    if all(key.startswith(("lora_unet_", "lora_te_", "lora_te1_", "lora_te2_")) for key in tensors):
        if FAMILIES[file.family].kohya_sgm:  # only the pipeline of SDXL gives the configuration for it
            tensors = conversion._maybe_map_sgm_blocks_to_diffusers(tensors, SimpleNamespace(layers_per_block=LAYERS))
        tensors, alphas = conversion._convert_non_diffusers_lora_to_diffusers(tensors)
    if not all("lora" in key for key in tensors):
        raise ValueError("a name without 'lora' in it")
    config = json.loads(file.metadata.get(PEFT_KEY) or "null")
    if alphas and config:
        raise ValueError(f"alphas and {PEFT_KEY}, of which only one may be there")
    scales: dict[str, float] = {}
    for component in FAMILIES[file.family].components:
        if part := _below(tensors, component):
            fields = None if config is None else _below(config, component)
            scales |= _component_scales(component, part, _below(alphas, component), fields)
    return scales


def _below(entries: Mapping[str, Any], component: str) -> dict[str, Any]:
    """The entries of one component, named without it."""
    prefix = f"{component}."
    return {key.removeprefix(prefix): value for key, value in entries.items() if key.startswith(prefix)}


def _component_scales(
    component: str, tensors: dict[str, Tensor], alphas: dict[str, float], config: dict[str, Any] | None
) -> dict[str, float]:
    """tensors, alphas: named below the component. config: what the file's metadata says of LoraConfig, if it has such."""
    from diffusers.utils import (
        convert_state_dict_to_diffusers,
        convert_state_dict_to_peft,
        convert_unet_state_dict_to_peft,
        get_peft_kwargs,
        is_transformers_version,
    )

    unet, level = component == "unet", ""
    if not unet:
        tensors = convert_state_dict_to_peft(convert_state_dict_to_diffusers(tensors))
        if component == "text_encoder" and is_transformers_version(">=", "5.0"):  # whose CLIPTextModel has no such level
            level = "text_model."
            tensors = {key.removeprefix(level): value for key, value in tensors.items()}
    elif "lora_A" not in next(iter(tensors)):
        tensors = convert_unet_state_dict_to_peft(tensors)
    ranks = {key: tensor.shape[1] for key, tensor in tensors.items() if key.endswith(".lora_B.weight")}
    if config is None:
        marked = {f"^{key}" if unet else key: rank for key, rank in ranks.items()}
        config = get_peft_kwargs(marked, alphas, tensors, is_unet=unet)
    if not config.get("target_modules"):
        raise ValueError(f"no {component}.target_modules in its metadata")
    peft = PeftConfig({"r": 8, "lora_alpha": 8} | config)  # 8 and 8 are LoraConfig's own
    scales = {}
    for key, rank in ranks.items():
        path = key.removesuffix(".lora_B.weight")
        if f"{path}.lora_A.weight" not in tensors:
            continue
        stated = peft.value(f"{component}.{path}", "rank_pattern", "r")
        if stated != rank:
            raise ValueError(f"{component}.{path} has rank {rank}, but {stated} in its metadata")
        scales[f"{component}.{level}{path}"] = peft.alpha(f"{component}.{path}", rank) / rank
    return scales


# --- the check before a file appears -------------------------------------------------------------------------------


def check_readers(file: OpenFile, layout: Layout, path: Path) -> None:
    """Raise AdapterTargetError or AdapterScaleError if a program that reads this layout would not read all of the file."""
    remedy = f"; leave that out or try layout {'peft' if layout == 'kohya' else 'kohya'!r}"
    for reader in MUST_READ[layout]:
        reading = read_as(reader, file)
        if reading.refusal is not None:
            raise AdapterTargetError(f"{reader} would refuse {_some(tuple(file.meant))}: {reading.refusal}{remedy}", path)
        if reading.dropped:
            why = f" ({'; '.join(reading.notes)})" if reading.notes else ""
            raise AdapterTargetError(f"{reader} would drop {_some(reading.dropped)}{why}{remedy}", path)
        if reading.rescaled:
            module = reading.rescaled[0]
            scales = f"{reading.scales[module]:g}, not {file.meant[module]:g}"
            raise AdapterScaleError(f"{reader} would scale {_some(reading.rescaled)} by {scales}{remedy}", path)


def _some(modules: tuple[str, ...]) -> str:
    return modules[0] + (f" and {len(modules) - 1} more" if len(modules) > 1 else "")
