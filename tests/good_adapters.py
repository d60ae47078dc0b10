"""Good adapter files as the tools of the field write them, each with the change of every layer that it means.

The names and the arithmetic here are written down independently of the library: they are what it is tested against.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from spoilt import put_together, saved, taken_apart
from torch import Tensor

Meant = dict[str, Tensor]  # canonical module -> float64 change
T = "transformer_blocks.0"


@dataclass(frozen=True)
class Good:
    name: str
    write: Callable[[Path], tuple[Path, Meant]]  # into an empty folder


# --- modules: canonical path -> shape of the weight. Widths are small; that of the text condition is each family's own ----


def unet(family: str, width: int = 32, *, kinds: str = "attention", linear: bool | None = None) -> dict[str, tuple[int, ...]]:
    """kinds: attention, feed-forward, projections, convolutions, in any combination"""
    text = {"sd1": 768, "sd2": 1024, "sdxl": 2048}[family]
    ones = () if (family != "sd1" if linear is None else linear) else (1, 1)
    places = {
        "sd1": ("down_blocks.0.attentions.0", "mid_block.attentions.0", "up_blocks.3.attentions.2"),
        "sd2": ("down_blocks.2.attentions.1", "mid_block.attentions.0", "up_blocks.1.attentions.0"),
        "sdxl": ("down_blocks.1.attentions.0", "mid_block.attentions.0", "up_blocks.0.attentions.2"),
    }[family]
    found: dict[str, tuple[int, ...]] = {}
    for place in places:
        if "attention" in kinds:
            for attn, inner in (("attn1", width), ("attn2", text)):
                found |= {f"unet.{place}.{T}.{attn}.{m}": (width, inner) for m in ("to_k", "to_v")}
                found |= {f"unet.{place}.{T}.{attn}.{m}": (width, width) for m in ("to_q", "to_out.0")}
        if "feed-forward" in kinds:
            found |= {f"unet.{place}.{T}.ff.net.0.proj": (8 * width, width), f"unet.{place}.{T}.ff.net.2": (width, 4 * width)}
        if "projections" in kinds:
            found |= {f"unet.{place}.{m}": (width, width, *ones) for m in ("proj_in", "proj_out")}
    if "convolutions" in kinds:
        found |= {
            "unet.down_blocks.1.resnets.0.conv1": (width, width // 2, 3, 3),
            "unet.down_blocks.1.resnets.0.conv_shortcut": (width, width // 2, 1, 1),
            "unet.down_blocks.0.resnets.1.conv2": (width, width, 3, 3),
            "unet.mid_block.resnets.1.time_emb_proj": (width, 2 * width),
            "unet.up_blocks.2.resnets.2.conv2": (width, width, 3, 3),
            "unet.down_blocks.0.downsamplers.0.conv": (width, width, 3, 3),
            "unet.up_blocks.1.upsamplers.0.conv": (width, width, 3, 3),
        }
    return found


def text(component: str = "text_encoder", layers: tuple[int, ...] = (0, 11), width: int = 32) -> dict[str, tuple[int, ...]]:
    found: dict[str, tuple[int, ...]] = {}
    for layer in layers:
        place = f"{component}.text_model.encoder.layers.{layer}"
        found |= {f"{place}.self_attn.{m}": (width, width) for m in ("q_proj", "k_proj", "v_proj", "out_proj")}
        found |= {f"{place}.mlp.fc1": (2 * width, width), f"{place}.mlp.fc2": (width, 2 * width)}
    return found


# --- names: canonical path -> what a tool calls the module ---------------------------------------------------------

SGM = {  # the blocks of SDXL's U-Net in the original code, after its openaimodel.py
    "down_blocks.0.resnets.1": "input_blocks.2.0",
    "down_blocks.0.downsamplers.0.conv": "input_blocks.3.0.op",
    "down_blocks.1.resnets.0": "input_blocks.4.0",
    "down_blocks.1.attentions.0": "input_blocks.4.1",
    "mid_block.attentions.0": "middle_block.1",
    "mid_block.resnets.1": "middle_block.2",
    "up_blocks.0.attentions.2": "output_blocks.2.1",
    "up_blocks.1.upsamplers.0.conv": "output_blocks.5.2.conv",
    "up_blocks.2.resnets.2": "output_blocks.8.0",
}
SGM_RESNET = {
    "conv1": "in_layers.2",
    "conv2": "out_layers.3",
    "time_emb_proj": "emb_layers.1",
    "conv_shortcut": "skip_connection",
}


def sgm(path: str) -> str:
    """path: below "unet."."""
    place = next(p for p in SGM if path == p or path.startswith(p + "."))
    rest = path[len(place) + 1 :]
    rest = SGM_RESNET.get(rest, rest)
    return f"{SGM[place]}.{rest}" if rest else SGM[place]


def kohya(module: str, *, te: tuple[str, str] = ("lora_te", "lora_te2"), original: bool = False) -> str:
    component, path = module.split(".", 1)
    if component == "unet":
        return "lora_unet_" + (sgm(path) if original else path).replace(".", "_")
    return f"{te[component == 'text_encoder_2']}_{path.replace('.', '_')}"


def kohya_sgm(module: str) -> str:
    return kohya(module, te=("lora_te1", "lora_te2"), original=True)


def kohya_sdxl(module: str) -> str:
    return kohya(module, te=("lora_te1", "lora_te2"))


def lycoris_prefix(module: str) -> str:
    return "lycoris_" + module.split(".", 1)[1].replace(".", "_")


def comfyui(module: str) -> str:
    component, path = module.split(".", 1)
    if component == "unet":
        return "diffusion_model." + sgm(path)
    return f"text_encoders.{'clip_g' if component == 'text_encoder_2' else 'clip_l'}.transformer.{path}"


def same(module: str) -> str:
    return module


def bare(module: str) -> str:
    return module.split(".", 1)[1]


def prefixed(module: str) -> str:
    return f"base_model.model.{bare(module)}"


def component_prefixed(module: str) -> str:
    component, path = module.split(".", 1)
    return f"{component}.base_model.model.{path}"


def no_text_model(module: str) -> str:
    return module.replace("text_model.", "")


def processor(module: str) -> str:
    """diffusers before it knew PEFT: attention processors with layers of their own."""
    owner, _, last = module.removesuffix(".0").rpartition(".")
    return f"{owner}.processor.{last}_lora"


def text_processor(module: str) -> str:
    owner, _, last = module.rpartition(".")
    return f"{owner}.{ {'out_proj': 'to_out'}.get(last, 'to_' + last[0]) }_lora"


# suffixes: (down, up, alpha)
KOHYA = ("{}.lora_down.weight", "{}.lora_up.weight", "{}.alpha")
PEFT = ("{}.lora_A.weight", "{}.lora_B.weight", "{}.alpha")
PEFT_NAMED = ("{}.lora_A.default.weight", "{}.lora_B.default.weight", "{}.alpha")
OLD = ("{}.lora.down.weight", "{}.lora.up.weight", "{}.alpha")
OLD_ALPHA = ("{}.lora.down.weight", "{}.lora.up.weight", "{}.lora.alpha")
LINEAR_LAYER = ("{}.lora_linear_layer.down.weight", "{}.lora_linear_layer.up.weight", "{}.alpha")
PROCESSOR = ("{}.down.weight", "{}.up.weight", "{}.alpha")


# --- plain LoRA ----------------------------------------------------------------------------------------------------


def lora(
    name: str,
    modules: Mapping[str, tuple[int, ...]],
    naming: Callable[[str], str] = kohya,
    ends: tuple[str, str, str] = KOHYA,
    *,
    ranks: tuple[int, ...] = (4,),
    alphas: tuple[float | Tensor | None, ...] = (2.0,),  # in the file; None: no such tensor
    scales: Callable[[str, int], float] | None = None,  # meant where the file has no alpha; else 1
    dtypes: tuple[torch.dtype, ...] = (torch.float16,),
    metadata: dict[str, str] | None = None,
    flat_up: bool = False,  # the up factor of convolutions as 2-D
    flat_down: bool = False,
    config: dict[str, object] | None = None,
    file: str = "adapter.safetensors",
) -> Good:
    def write(folder: Path) -> tuple[Path, Meant]:
        g = torch.Generator().manual_seed(5)
        tensors, meant = {}, {}
        for i, (module, (out, inner, *kernel)) in enumerate(modules.items()):
            rank, alpha, dtype = ranks[i % len(ranks)], alphas[i % len(alphas)], dtypes[i % len(dtypes)]
            down = torch.randn(rank, inner, *kernel, generator=g).div(8).to(dtype)
            up = torch.randn(out, rank, *(1 for _ in kernel), generator=g).div(8).to(dtype)
            scale = scales(module, rank) if scales else 1.0
            stem = naming(module)
            if alpha is not None:
                given = alpha if isinstance(alpha, Tensor) else torch.tensor(alpha, dtype=dtype)
                tensors[ends[2].format(stem)] = given.clone()
                scale = float(given.double().reshape(())) / rank
            meant[module] = (scale * up.double().flatten(1) @ down.double().flatten(1)).reshape(out, inner, *kernel)
            tensors[ends[0].format(stem)] = down.flatten(1) if flat_down else down
            tensors[ends[1].format(stem)] = up.flatten(1) if flat_up else up
        written = saved(folder / file, tensors, metadata, config=config)
        return (written if file == "adapter.safetensors" else folder), meant

    return Good(name, write)


def rearranged(name: str, good: Good, change: Callable[[dict[str, object]], bytes]) -> Good:
    """The same file with its header written otherwise."""

    def write(folder: Path) -> tuple[Path, Meant]:
        path, meant = good.write(folder)
        header, data = taken_apart(path.read_bytes())
        path.write_bytes(put_together(change(header), data))
        return path, meant

    return Good(name, write)


def padded(header: dict[str, object]) -> bytes:
    return json.dumps(header, indent=2).encode() + b" " * 1000


def unaligned(header: dict[str, object]) -> bytes:
    text = json.dumps(dict(sorted(header.items(), reverse=True)), separators=(",", ":")).encode()
    return text + b" " * (1 + -len(text) % 2)


def linked(name: str, good: Good, *, hub: bool) -> Good:
    """The file behind a link: as the Hub's cache has it, or one that the user made and names."""

    def write(folder: Path) -> tuple[Path, Meant]:
        blobs, snapshot = folder / "models--a--b" / "blobs", folder / "models--a--b" / "snapshots" / "0123"
        blobs.mkdir(parents=True)
        snapshot.mkdir(parents=True)
        path, meant = good.write(blobs)
        blob = path.rename(blobs / "abcdef")
        link = snapshot / ("pytorch_lora_weights.safetensors" if hub else "mine.safetensors")
        link.symlink_to(Path("..") / ".." / "blobs" / blob.name)
        return (snapshot if hub else link), meant

    return Good(name, write)


# --- LyCORIS: the tensors of one module and its change, after lycoris/modules/*.py ---------------------------------

Made = tuple[dict[str, Tensor], Tensor]  # role -> tensor; the change before alpha / rank


def noise(*shape: int, seed: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed)) / 4


def tucker(t: Tensor, a: Tensor, b: Tensor) -> Tensor:
    """Every kernel position for itself: a^T t b."""
    out = torch.zeros(a.shape[1], b.shape[1], *t.shape[2:], dtype=torch.float64)
    for k in range(t.shape[2]):
        for j in range(t.shape[3]):
            out[:, :, k, j] = a.double().T @ t[:, :, k, j].double() @ b.double()
    return out


def loha(shape: tuple[int, ...], rank: int, *, core: bool = False, seed: int = 1) -> Made:
    out, inner, *kernel = shape
    parts: dict[str, Tensor] = {}
    halves = []
    for i in (1, 2):
        if core:
            a, b = noise(rank, out, seed=seed + i), noise(rank, inner, seed=seed + 10 + i)
            t = noise(rank, rank, *kernel, seed=seed + 20 + i)
            parts |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b, f"hada_t{i}": t}
            halves.append(tucker(t, a, b))
        else:
            a, b = noise(out, rank, seed=seed + i), noise(rank, inner * math.prod(kernel), seed=seed + 10 + i)
            parts |= {f"hada_w{i}_a": a, f"hada_w{i}_b": b}
            halves.append((a.double() @ b.double()).reshape(shape))
    return parts, halves[0] * halves[1]


def lokr(
    shape: tuple[int, ...], factor: int, *, rank1: int | None, rank2: int | None, core: bool = False, flat: bool = True
) -> Made:
    """rank1, rank2: of the two parts of the product; None: whole"""
    out, inner, *kernel = shape
    a, c = factor, factor
    b, d = out // a, inner // c
    parts: dict[str, Tensor] = {}
    if rank1 is None:
        w1 = parts["lokr_w1"] = noise(a, c, seed=31)
    else:
        parts |= {"lokr_w1_a": noise(a, rank1, seed=32), "lokr_w1_b": noise(rank1, c, seed=33)}
        w1 = parts["lokr_w1_a"].double() @ parts["lokr_w1_b"].double()
    if rank2 is None:
        w2 = parts["lokr_w2"] = noise(b, d, *kernel, seed=34)
    elif core:
        parts |= {
            "lokr_t2": noise(rank2, rank2, *kernel, seed=35),
            "lokr_w2_a": noise(rank2, b, seed=36),
            "lokr_w2_b": noise(rank2, d, seed=37),
        }
        w2 = tucker(parts["lokr_t2"], parts["lokr_w2_a"], parts["lokr_w2_b"])
    else:
        right = noise(rank2, d, *kernel, seed=38)
        parts |= {"lokr_w2_a": noise(b, rank2, seed=39), "lokr_w2_b": right.flatten(1) if flat else right}
        w2 = (parts["lokr_w2_a"].double() @ right.double().flatten(1)).reshape(b, d, *kernel)
    change = torch.zeros(shape, dtype=torch.float64)
    for i in range(a):  # the Kronecker product, block by block
        for j in range(c):
            change[i * b : (i + 1) * b, j * d : (j + 1) * d] = w1[i, j].double() * w2.double()
    return parts, change


def locon_tucker(shape: tuple[int, ...], rank: int) -> Made:
    out, inner, *kernel = shape
    up, mid, down = noise(out, rank, seed=41), noise(rank, rank, *kernel, seed=42), noise(rank, inner, seed=43)
    parts = {
        "lora_up.weight": up[:, :, None, None],
        "lora_mid.weight": mid,
        "lora_down.weight": down[:, :, None, None],
    }
    return parts, tucker(mid, up.T, down)


def lycoris(
    name: str,
    made: Mapping[str, tuple[Made, float | None, float]],  # module -> its tensors, alpha in the file, the scale that is meant
    naming: Callable[[str], str] = kohya,
    *,
    dtype: torch.dtype = torch.float32,
    config: dict[str, object] | None = None,
) -> Good:
    def write(folder: Path) -> tuple[Path, Meant]:
        tensors, meant = {}, {}
        for module, ((parts, change), alpha, scale) in made.items():
            for role, tensor in parts.items():
                tensors[f"{naming(module)}.{role}"] = tensor.to(dtype)
            if alpha is not None:
                tensors[f"{naming(module)}.alpha"] = torch.tensor(alpha)
            meant[module] = change * scale
        file = "adapter.safetensors" if config is None else "adapter_model.safetensors"
        return saved(folder / file, tensors, {"format": "pt"}, config=config), meant

    return Good(name, write)


# --- metadata ------------------------------------------------------------------------------------------------------

SS = {  # what sd-scripts writes into a real file, with a long training log
    "format": "pt",
    "ss_v2": "False",
    "ss_base_model_version": "sd_v1",
    "ss_network_module": "networks.lora",
    "ss_network_dim": "4",
    "ss_network_alpha": "2.0",
    "ss_network_args": '{"conv_dim": "4"}',
    "ss_tag_frequency": json.dumps({"10_sks dog": {f"word {i}": i for i in range(15_000)}}),
    "ss_bucket_info": json.dumps({"buckets": {str(i): {"resolution": [512, 512], "count": 1} for i in range(500)}}),
    "ss_datasets": json.dumps([{"tag_frequency": {f"word {i}": i for i in range(15_000)}}]),
    "ss_steps": "1000",
    "ss_resolution": "(512, 512)",
    "ss_sd_model_hash": "e1441589",
    "ss_new_sd_model_hash": "cc6cb27103417325ff94f52b7a5d2dde45a7515b25c255d8e396c90014281516",
    "ss_output_name": "sks dog, 犬",
    "ss_training_comment": "None",
    "sshs_model_hash": "0" * 64,
    "sshs_legacy_hash": "0" * 8,
}
MODELSPEC = {
    "modelspec.sai_model_spec": "1.0.0",
    "modelspec.architecture": "stable-diffusion-xl-v1-base/lora",
    "modelspec.implementation": "https://github.com/Stability-AI/generative-models",
    "modelspec.title": "a title",
    "modelspec.resolution": "1024x1024",
    "modelspec.thumbnail": "data:image/jpeg;base64," + "A" * 300_000,
}
ONETRAINER = {"ot_branch": "master", "ot_config": json.dumps({f"setting_{i}": "x" * 90 for i in range(1000)})}


def diffusers_metadata(**fields: object) -> dict[str, str]:
    return {"format": "pt", "lora_adapter_metadata": json.dumps({f"unet.{name}": value for name, value in fields.items()})}


BOMB = "(a+)+$" * 50 + "(.*)*" * 50  # takes for ever as a regular expression


def good_files() -> list[Good]:
    sd1, sd2, sdxl = (unet(family) for family in ("sd1", "sd2", "sdxl"))
    every = "attention feed-forward projections convolutions"
    whole = {family: unet(family, kinds=every) for family in ("sd1", "sd2", "sdxl")}
    q = f"down_blocks.0.attentions.0.{T}.attn1.to_q"
    half, brain, single = torch.float16, torch.bfloat16, torch.float32
    te = text()
    both = text() | text("text_encoder_2", (0, 31))
    conv, shortcut = "unet.down_blocks.1.resnets.0.conv1", "unet.down_blocks.1.resnets.0.conv_shortcut"
    linear = f"unet.{q}"
    proj = "unet.mid_block.attentions.0.proj_in"

    def sixteen(module: str, rank: int) -> float:
        return 16 / rank

    def to_v_is_2(module: str, rank: int) -> float:
        return (2 if module.endswith(".to_v") else 16) / rank

    return [
        # kohya's names
        lora("sd1 attention", sd1),
        lora("sd1 with text", sd1 | te),
        lora("sd1 text alone", te),
        lora("sd1 every layer", whole["sd1"] | te, ranks=(8,), alphas=(8.0,)),
        lora("sd1 fp32", sd1, dtypes=(single,), alphas=(1.0,)),
        lora("sd1 bf16", sd1, dtypes=(brain,)),
        lora("sd1 three dtypes", sd1, dtypes=(half, brain, single)),
        lora("rank 1", sd1, ranks=(1,), alphas=(1.0,)),
        lora("rank 32 alpha 1", unet("sd1", 64), ranks=(32,), alphas=(1.0,)),
        lora("rank 128", unet("sd1", 320), ranks=(128,), alphas=(64.0,)),
        lora("rank of a whole layer", unet("sd1", 32), ranks=(32,), alphas=(32.0,)),
        lora("ranks and alphas of their own", whole["sd1"] | te, ranks=(1, 4, 7, 16), alphas=(1.0, 2.5, 8.0)),
        lora("no alpha", sd1 | te, alphas=(None,)),
        lora("alpha in places", sd1 | te, alphas=(None, 3.0)),
        lora("alpha 0", sd1, alphas=(0.0, 4.0)),
        lora("alpha below 0", sd1, alphas=(-2.0,)),
        lora("alpha an integer", sd1, alphas=(torch.tensor(3),)),
        lora("alpha int32", sd1, alphas=(torch.tensor(3, dtype=torch.int32),)),
        lora("alpha double", sd1, alphas=(torch.tensor(0.3, dtype=torch.float64),)),
        lora("alpha a list of one", sd1, alphas=(torch.tensor([2.0]),)),
        lora("alpha 16 x rank", sd1, alphas=(64.0,)),
        lora("convolutions alone", unet("sd1", kinds="convolutions"), ranks=(8,), alphas=(4.0,)),
        lora("projections as linear layers", unet("sd1", kinds="projections", linear=True)),
        lora("up without a kernel", unet("sd1", kinds="attention projections"), flat_up=True),
        lora("down without a kernel", unet("sd1", kinds="attention projections"), flat_down=True),
        lora("sd2", sd2 | text(layers=(0, 22), width=64), metadata={"ss_v2": "True"}),
        lora("sd2 every layer", whole["sd2"]),
        lora("sd2 of sd-scripts", unet("sd2", kinds="attention projections", linear=False)),
        lora("sdxl original names", sdxl, kohya_sgm),
        lora("sdxl original names, every layer, texts", whole["sdxl"] | both, kohya_sgm, metadata=MODELSPEC),
        lora("sdxl diffusers names", whole["sdxl"] | both, kohya_sdxl),
        lora("sdxl texts alone", both, kohya_sdxl),
        lora("sdxl second text alone", text("text_encoder_2", (3,)), kohya_sdxl),
        lora("sdxl bf16 rank 16", unet("sdxl", 64), kohya_sgm, ranks=(16,), alphas=(1.0,), dtypes=(brain,)),
        # diffusers' names, old and new
        lora("processors", sd1, processor, PROCESSOR, alphas=(None,)),
        lora("processors without a component", sd1, lambda m: processor(bare(m)), PROCESSOR, alphas=(None,)),
        lora("lora.down", whole["sd1"], same, OLD, alphas=(None,)),
        lora("lora.down with alpha", sd1, same, OLD),
        lora("lora.down with lora.alpha", sd1, same, OLD_ALPHA),
        lora("text: lora_linear_layer", te, same, LINEAR_LAYER, alphas=(None,)),
        lora(
            "text: to_q_lora",
            {m: s for m, s in te.items() if "self_attn" in m},
            text_processor,
            PROCESSOR,
            alphas=(None,),
        ),
        lora("diffusers today", whole["sd1"] | te, same, PEFT, alphas=(None,)),
        lora("diffusers today, sdxl", whole["sdxl"] | both, same, PEFT, alphas=(None,)),
        lora("diffusers with alpha tensors", sd1, same, PEFT),
        lora("text without text_model", te, no_text_model, PEFT, alphas=(None,)),
        lora("no component", sd1, bare, PEFT, alphas=(None,)),
        lora("adapter's name in the key", sd1, same, PEFT_NAMED, alphas=(None,)),
        lora("base_model.model after the component", sd1, component_prefixed, PEFT, alphas=(None,)),
        lora(
            "diffusers metadata",
            sd1,
            same,
            PEFT,
            alphas=(None,),
            scales=sixteen,
            metadata=diffusers_metadata(r=4, lora_alpha=16, target_modules=["to_q"]),
        ),
        lora(
            "alpha_pattern",
            sd1,
            same,
            PEFT,
            ranks=(4, 8),
            alphas=(None,),
            scales=to_v_is_2,
            metadata=diffusers_metadata(r=4, lora_alpha=16, alpha_pattern={"to_v": 2}, rank_pattern={f"^{q}": 8}),
        ),
        lora(
            "bombs where regular expressions go",
            sd1,
            same,
            PEFT,
            alphas=(None,),
            scales=sixteen,
            metadata=diffusers_metadata(
                r=4, lora_alpha=16, target_modules=BOMB, exclude_modules=BOMB, rank_pattern={BOMB: 8}, layers_pattern=BOMB
            ),
        ),
        # folders
        lora("pytorch_lora_weights folder", sd1, same, PEFT, alphas=(None,), file="pytorch_lora_weights.safetensors"),
        *(
            lora(
                f"peft folder {name}",
                sd1,
                prefixed,
                PEFT,
                alphas=(None,),
                scales=scales,
                config={"peft_type": "LORA", "r": 4, "lora_alpha": 16, "init_lora_weights": True, **config},
                file="adapter_model.safetensors",
            )
            for name, scales, config in (
                ("plain", sixteen, {"alpha_pattern": {}, "rank_pattern": {}, "use_dora": False, "target_modules": BOMB}),
                ("rslora", lambda _, rank: 16 / math.sqrt(rank), {"use_rslora": True}),
                ("patterns", to_v_is_2, {"alpha_pattern": {"attn2.to_v": 2, "to_v": 2}, "init_lora_weights": "gaussian"}),
                ("escaped pattern", to_v_is_2, {"alpha_pattern": {"attn1\\.to_v$": 2, "to_v": 2}, "init_lora_weights": "eva"}),
            )
        ),
        # other tools' names
        lora("ComfyUI's own names", whole["sdxl"] | both, comfyui),
        lora("SimpleTuner's names", sd1, lycoris_prefix),
        # the same bytes otherwise
        lora("no metadata", sd1, metadata=None),
        lora("a log of 600 KB", sd1, metadata=SS),
        lora("OneTrainer's settings", sd1, metadata=ONETRAINER),
        lora("an entry of 200,000 characters that nobody knows", sd1, metadata={"notes": "x" * 200_000}),
        lora(
            "diffusers metadata of 80,000 characters",
            sd1,
            same,
            PEFT,
            alphas=(None,),
            scales=sixteen,
            metadata=diffusers_metadata(r=4, lora_alpha=16, rank_pattern={f"{'x' * 70}{i}": 4 for i in range(1000)}),
        ),
        lora("a broken card", sd1, metadata={"lora_booth.card": '{"family": [', "modelspec.resolution": "x" * 5000}),
        lora("control characters in its words", sd1, metadata={"modelspec.title": "\x1b[2J\x00\u202e", "ss_output_name": "\n"}),
        rearranged("indented and padded header", lora("", sd1), padded),
        rearranged("keys in another order, odd start", lora("", sd1), unaligned),
        linked("in the Hub's cache", lora("", sd1), hub=True),
        linked("behind the user's link", lora("", sd1), hub=False),
        # LyCORIS kinds of low rank
        lycoris("locon tucker", {conv: (locon_tucker((32, 16, 3, 3), 4), 2.0, 0.5)}),
        lycoris("loha", {linear: (loha((32, 32), 4), 2.0, 0.5), conv: (loha((32, 16, 3, 3), 3), 3.0, 1.0)}),
        lycoris("loha without alpha", {linear: (loha((32, 24), 2), None, 1.0)}),
        lycoris("loha tucker", {conv: (loha((32, 16, 3, 3), 3, core=True), 1.0, 1 / 3)}),
        lycoris("loha of full rank", {linear: (loha((32, 24), 8), 8.0, 1.0), conv: (loha((16, 4, 3, 3), 7), 7.0, 1.0)}),
        lycoris("loha on 1x1", {proj: (loha((32, 32), 2), 2.0, 1.0), shortcut: (loha((32, 16), 2), 2.0, 1.0)}),
        lycoris("lokr", {linear: (lokr((32, 32), 4, rank1=None, rank2=2), 1.0, 0.5)}),
        lycoris("lokr both low", {linear: (lokr((64, 32), 8, rank1=2, rank2=2), 4.0, 2.0)}),
        lycoris("lokr whole", {linear: (lokr((32, 32), 4, rank1=None, rank2=None), 77.0, 1.0)}, lycoris_prefix),
        lycoris("lokr conv", {conv: (lokr((32, 16, 3, 3), 4, rank1=None, rank2=2), 2.0, 1.0)}),
        lycoris("lokr conv 4-D", {conv: (lokr((32, 16, 3, 3), 2, rank1=None, rank2=2, flat=False), 2.0, 1.0)}),
        lycoris("lokr conv whole", {conv: (lokr((32, 16, 3, 3), 4, rank1=None, rank2=None), None, 1.0)}),
        lycoris("lokr conv tucker", {conv: (lokr((32, 16, 3, 3), 4, rank1=None, rank2=3, core=True), 3.0, 1.0)}),
        lycoris(
            "peft loha folder",
            {linear: (loha((32, 32), 4), None, 2.0)},
            prefixed,
            config={"peft_type": "LOHA", "r": 4, "alpha": 8},
        ),
        lycoris(
            "peft lokr folder",
            {linear: (lokr((32, 32), 4, rank1=None, rank2=None), None, 2.0)},
            prefixed,
            config={"peft_type": "LOKR", "r": 16, "alpha": 32},
        ),
    ]


def small_files(folder: Path) -> list[bytes]:
    """Good files of 10 to 60 KB: kohya, PEFT with metadata, LoHa and LoKr."""
    q, v = (f"unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.{name}" for name in ("to_q", "to_v"))
    kinds = {q: (loha((16, 16), 2), 2.0, 1.0), v: (lokr((16, 16), 4, rank1=None, rank2=2), 1.0, 0.5)}
    patterns = diffusers_metadata(r=4, lora_alpha=16, alpha_pattern={"to_v": 2}, rank_pattern={"to_k": 8})
    goods = (
        lora("", unet("sd1", 16) | text(width=16), metadata={"ss_v2": "False", "ss_network_dim": "4"}),
        lora("", unet("sd2", 16, kinds="attention projections"), same, PEFT, alphas=(None,), metadata=patterns),
        lycoris("", kinds),
    )
    return [good.write(folder)[0].read_bytes() for good in goods]
