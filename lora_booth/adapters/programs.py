"""How other programs look for a module in an adapter file: their rules as tables, which we wrote from the sources named.

They hold for the published shapes of each family, and for names that this library reads as well. Apart from `layouts`,
since they are what the names made there are held against. (diffusers needs no table: it is asked itself, in `readers`.)
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from ..base.families import FAMILIES
from .layouts import RARE

# How names are made of a module's path below its component: {path} as it is, {original} as the original code calls it,
# {path_} and {original_} with underscores for dots, {processor} as diffusers wrote attention before it knew PEFT.
UNET = {"unet": ("lora_unet_{original_}", "lora_unet_{path_}")}
TEXT = {"text_encoder": ("lora_te_{path_}",)}
TEXTS = {"text_encoder": ("lora_te1_{path_}",), "text_encoder_2": ("lora_te2_{path_}",)}
NO_PROJECTION: dict[str, tuple[str, ...]] = {"text_encoder.text_projection": (), "text_encoder_2.text_projection": ()}
KOHYA_ENDS = (".lora_down.weight", ".lora_up.weight")


@dataclass(frozen=True)
class Program:
    """A program looks for a name that it knows of a module, with one of the pairs of endings.

    The scale is `<name>.alpha` / rank, and 1 where there is no such tensor.
    """

    source: str  # what the tables were written from
    names: Mapping[str, Mapping[str, tuple[str, ...]]]  # family -> module, or else its component -> names
    ends: tuple[tuple[str, str], ...]  # of the down and the up factor
    lycoris: bool = False  # it reads LoHa, LoKr and LoRA with a middle factor as well, by LyCORIS's formulas
    joined: Mapping[str, str] | None = None  # family -> component where it takes all four projections of a layer, or none


PROGRAMS = {
    "ComfyUI": Program(
        source="Comfy-Org/ComfyUI a125cd84: comfy/lora.py, comfy/utils.py (unet_to_diffusers), comfy/weight_adapter",
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
        ends=(
            KOHYA_ENDS,
            ("_lora.down.weight", "_lora.up.weight"),
            (".lora_A.weight", ".lora_B.weight"),
            (".lora.down.weight", ".lora.up.weight"),
            (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
            (".lora_A.default.weight", ".lora_B.default.weight"),
        ),
        lycoris=True,
    ),
    "A1111": Program(
        source="AUTOMATIC1111/stable-diffusion-webui 82a973c0 (1.10.1): extensions-builtin/Lora, networks.py and network*.py",
        names={
            "sd1": UNET | {"text_encoder": ("lora_te_{path_}", "lora_te1_{path_}")} | NO_PROJECTION,
            "sd2": UNET | TEXT | NO_PROJECTION,
            "sdxl": UNET
            | TEXTS
            | NO_PROJECTION
            # of diffusers' names it knows those of SD 1.x, which has no such embedding, and no attention before this sampler
            | {
                f"unet.{path}": ("lora_unet_{original_}",)
                for path in ("add_embedding.linear_1", "add_embedding.linear_2", "up_blocks.0.upsamplers.0.conv")
            },
        },
        ends=(KOHYA_ENDS,),
        lycoris=True,
        joined={"sd2": "text_encoder", "sdxl": "text_encoder_2"},  # OpenCLIP's, which have torch's MultiheadAttention
    ),
    "sd-scripts": Program(
        source="kohya-ss/sd-scripts 48d368fa: networks/lora.py, library/original_unet.py, library/sdxl_original_unet.py",
        names={  # it adapts transformers, resnets, samplers and text layers, nothing else
            "sd1": {"unet": ("lora_unet_{path_}",)} | TEXT | dict.fromkeys(RARE, ()),
            "sd2": {"unet": ("lora_unet_{path_}",)} | TEXT | dict.fromkeys(RARE, ()),
            "sdxl": UNET | TEXTS | dict.fromkeys(RARE, ()),
        },
        ends=(KOHYA_ENDS,),
    ),
}

# --- the names of the original code --------------------------------------------------------------------------------

OUTSIDE = {
    "conv_in": "input_blocks.0.0",
    "conv_out": "out.2",
    "time_embedding.linear_1": "time_embed.0",
    "time_embedding.linear_2": "time_embed.2",
    "add_embedding.linear_1": "label_emb.0.0",
    "add_embedding.linear_2": "label_emb.0.2",
}
MIDDLE = {
    "mid_block.resnets.0": "middle_block.0",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
}
IN_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def places(before_sampler: tuple[int, ...]) -> dict[str, str]:
    """Blocks, and modules outside of blocks, in diffusers -> in the original code.

    before_sampler: for each block on the way up but the last, how many layers stand in one place with its sampler
    """
    found = OUTSIDE | MIDDLE
    for block in range(len(before_sampler) + 1):
        for inner, kind in enumerate(("resnets", "attentions")):
            found |= {f"down_blocks.{block}.{kind}.{n}": f"input_blocks.{3 * block + n + 1}.{inner}" for n in range(2)}
            found |= {f"up_blocks.{block}.{kind}.{n}": f"output_blocks.{3 * block + n}.{inner}" for n in range(3)}
    for block, before in enumerate(before_sampler):
        found[f"down_blocks.{block}.downsamplers.0.conv"] = f"input_blocks.{3 * block + 3}.0.op"
        found[f"up_blocks.{block}.upsamplers.0.conv"] = f"output_blocks.{3 * block + 2}.{before}.conv"
    return found


# a resnet, and where there is attention that too: SD 1.x and 2.x have none in their first block on the way up
PLACES = {"sd1": places((1, 2, 2)), "sd2": places((1, 2, 2)), "sdxl": places((2, 2))}


def original_name(path: str, family: str) -> str | None:
    """Of the U-Net module at `path` in diffusers; None: the published shapes have no such module."""
    known = PLACES[family]
    if path in known:
        return known[path]
    parts = path.split(".")
    size = 3 if parts[0] == "mid_block" else 4
    place, inner = known.get(".".join(parts[:size])), ".".join(parts[size:])
    return None if place is None else f"{place}.{IN_RESNET.get(inner, inner)}"


def names_of(module: str, family: str, program: Program) -> list[str]:
    """The names under which `program` looks for a module, with a base of `family`."""
    component, _, path = module.partition(".")
    forms = {"path": path}
    if component == "unet":
        original = original_name(path, family)
        if original is None:
            return []
        forms |= {"original": original, "original_": original.replace(".", "_")}
        forms["processor"] = path.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")
    forms["path_"] = path.replace(".", "_")
    table = program.names[family]
    return [template.format_map(forms) for template in table.get(module, table.get(component, ()))]
