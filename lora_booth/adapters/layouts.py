"""The names of LoRA tensors: canonical module paths, and what kohya's tools, PEFT and diffusers call them.

A complete module path is matched against a table in which `#` stands for an index; no part of it is searched for.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable

from ..base.families import FAMILIES, UNET_WIDTHS, Family
from ..base.original_naming import OUTSIDE, RESNET, UNetNames
from ..errors import AdapterTargetError

Role = str  # of a tensor in its module: down, up, mid, alpha, or one of LYCORIS

ATTENTION = (
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.#.{attn}.{m}" for attn in ("attn1", "attn2") for m in ("to_q", "to_k", "to_v", "to_out.0")),
    "transformer_blocks.#.ff.net.0.proj",
    "transformer_blocks.#.ff.net.2",
)
KERNEL_3X3 = (".conv1", ".conv2", ".conv", ".conv_in", ".conv_out")  # ends of the modules with one, in every family
RESNET_MODULES = ("conv1", "conv2", "time_emb_proj", "conv_shortcut")
BLOCKS = ("down_blocks.#", "mid_block", "up_blocks.#")
UNET = (
    *(f"{block}.attentions.#.{m}" for block in BLOCKS for m in ATTENTION),
    *(f"{block}.resnets.#.{m}" for block in BLOCKS for m in RESNET_MODULES),
    "down_blocks.#.downsamplers.0.conv",
    "up_blocks.#.upsamplers.0.conv",
)
TEXT_MODULES = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
TEXT = tuple(f"text_model.encoder.layers.#.{m}" for m in TEXT_MODULES)
RARE = (  # understood, but left out unless allowed by name
    *(f"unet.{name}" for name in OUTSIDE if not name.endswith("norm_out")),
    "text_encoder.text_projection",
    "text_encoder_2.text_projection",
)
COMPONENTS = {
    "unet": (*UNET, *(name.removeprefix("unet.") for name in RARE if name.startswith("unet."))),
    "text_encoder": (*TEXT, "text_projection"),
    "text_encoder_2": (*TEXT, "text_projection"),
}
PEFT_PREFIX = "base_model.model."
PREFIXES = {  # how the name of a module begins; longest first where one begins another
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lycoris_": "unet",  # SimpleTuner's
    "unet.": "unet",
    "text_encoder.": "text_encoder",
    "text_encoder_2.": "text_encoder_2",
    "diffusion_model.": "unet",  # ComfyUI's, as the next three
    "text_encoders.clip_l.transformer.": "text_encoder",
    "text_encoders.clip_h.transformer.": "text_encoder",
    "text_encoders.clip_g.transformer.": "text_encoder_2",
}
TUCKER, LOHA, LOKR = "LoRA with a middle factor", "LoHa", "LoKr"
_HADA = frozenset(("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b"))
_W1 = (frozenset(("lokr_w1",)), frozenset(("lokr_w1_a", "lokr_w1_b")))
_W2 = (frozenset(("lokr_w2",)), frozenset(("lokr_w2_a", "lokr_w2_b")), frozenset(("lokr_w2_a", "lokr_w2_b", "lokr_t2")))
FORMS: dict[frozenset[Role], str] = {  # the tensors of one module except alpha -> what LyCORIS calls it
    frozenset(("down", "mid", "up")): TUCKER,
    _HADA: LOHA,
    _HADA | {"hada_t1", "hada_t2"}: LOHA,
    **{w1 | w2: LOKR for w1 in _W1 for w2 in _W2},
}
LYCORIS = frozenset[Role]().union(*FORMS) - {"down", "mid", "up"}
PAIRS = (  # how the names of both factors end
    (".lora_down.weight", ".lora_up.weight"),  # kohya
    (".lora_A.weight", ".lora_B.weight"),  # PEFT
    (".lora.down.weight", ".lora.up.weight"),  # the rest: diffusers, before it knew PEFT
    (".lora_linear_layer.down.weight", ".lora_linear_layer.up.weight"),
    ("_lora.down.weight", "_lora.up.weight"),
)
ENDS: dict[str, Role] = {  # of a key -> which tensor of its module it is; longest first
    **{f".{role}": role for role in LYCORIS},
    **dict.fromkeys((down for down, _ in PAIRS), "down"),
    **dict.fromkeys((up for _, up in PAIRS), "up"),
    ".lora_mid.weight": "mid",
    ".lora.alpha": "alpha",
    ".lora_linear_layer.alpha": "alpha",
    ".alpha": "alpha",
}
OLD_TEXT = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}  # diffusers, before it knew PEFT
SDXL_KEYS = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_", "lora_te1_")
LAYERS = 2  # resnets in a down block of every published SD 1.x, 2.x and XL; the original numbering counts with it
MOST_BLOCKS = 34  # as many as two digits number
INDEX = re.compile("0|[1-9][0-9]{0,2}")  # in a module's path


def _words(name: str) -> list[str]:
    return name.replace(".", "_").split("_")


def _shape(words: Iterable[str]) -> tuple[str, ...]:
    return tuple("#" if word.isdigit() else word for word in words)


_TEMPLATES: dict[tuple[str, tuple[str, ...]], list[str]] = {}  # component and shape of a name -> the templates that have it
for _component, _names in COMPONENTS.items():
    for _name in _names:
        _TEMPLATES.setdefault((_component, _shape(_words(_name.replace("#", "0")))), []).append(_name)
_RESNET = {RESNET[name].replace(".", "_"): name for name in RESNET_MODULES}
_SGM = [UNetNames(LAYERS, MOST_BLOCKS, attended) for attended in ((), range(MOST_BLOCKS))]
_SGM_BLOCKS = {name.replace(".", "_"): path for path, name in _SGM[0].blocks.items()}
_SGM_MODULES = {name.replace(".", "_"): path for names in _SGM for path, name in names.modules.items()}
del _SGM_MODULES["out_0"]  # a norm


def _matched(component: str, words: list[str]) -> str | None:
    """The path of the module whose name has these words between its dots and underscores."""
    for template in _TEMPLATES.get((component, _shape(words)), ()):
        indices = [word for want, word in zip(_words(template), words, strict=True) if want == "#"]
        if all(map(INDEX.fullmatch, indices)):
            path = template.replace("#", "{}").format(*indices)
            if _words(path) == words:  # it also has the numbers that the template fixes
                return path
    return None


def _from_sgm(words: list[str]) -> str | None:
    """`input_blocks_4_1_proj_in` -> `down_blocks.1.attentions.0.proj_in`."""
    if module := _SGM_MODULES.get("_".join(words)):
        return module
    size = 3 if words[0] == "middle" else 4
    block, rest = _SGM_BLOCKS.get("_".join(words[:size])), "_".join(words[size:])
    return None if block is None else _matched("unet", _words(f"{block}.{_RESNET.get(rest, rest)}"))


def _module(name: str) -> str | None:
    """The canonical path of the module that a file calls `name`."""
    name = name.removeprefix(PEFT_PREFIX)
    prefix = next((prefix for prefix in PREFIXES if name.startswith(prefix)), "")
    name = name.removeprefix(prefix).removeprefix(PEFT_PREFIX)
    text = name.startswith(("text_model.", "encoder."))
    component = PREFIXES[prefix] if prefix else "text_encoder" if text else "unet"
    words = _words(name.replace(".processor.", "."))
    if component == "unet":
        words += ["0"] if words[-2:] == ["to", "out"] else []
        path = _matched(component, words) or _from_sgm(words)
    else:
        words = ["text", "model", *words] if words[0] == "encoder" else words  # transformers 5 lost this level
        last = "_".join(words[-2:])
        path = _matched(component, words[:-2] + OLD_TEXT.get(last, last).split("_"))
    return None if path is None else f"{component}.{path}"


def _split(key: str) -> tuple[str, Role] | None:
    """The module's name in a key, and which tensor of the module it is."""
    parts = key.split(".")  # PEFT may put the adapter's name at the end
    if parts[-1] == "weight" and parts[-3:-2] in (["lora_A"], ["lora_B"]):
        del parts[-2]
    elif parts[-2:-1] and parts[-2] in LYCORIS:
        del parts[-1]
    key = ".".join(parts)
    return next(((key.removesuffix(end), role) for end, role in ENDS.items() if key.endswith(end)), None)


def understood(key: str) -> tuple[str, Role] | None:
    """The canonical module path and the role of a tensor called `key` in a file; None: no adapter's."""
    name, role = _split(key) or ("", "")
    module = _module(name)
    return None if module is None else (module, role)


def are_pair(down: str, up: str) -> bool:
    """Whether two keys are the halves of one LoRA in the same naming."""
    halves = {"lora_A": "lora_B", "lora_down": "lora_up", "down": "up"}
    return [halves.get(part, part) for part in down.replace(":", ".").split(".")] == up.replace(":", ".").split(".")


def component_of(module: str) -> str:
    return module.split(".", 1)[0]


def tail_of(module: str) -> str:
    """The end of a path that names the kind of module, as in LoraConfig's target_modules: `to_q`, `ff.net.2`."""
    parts = module.split(".")
    for size in range(1, len(parts) + 1):
        tail = parts[-size]
        if not tail.isdigit() and tail not in ("conv", "proj", "net"):
            return ".".join(parts[-size:])
    return module


def likely_family(modules: Iterable[str], family: str | None) -> str:
    """The family of a file: as its card says, else what its components suggest."""
    return family or ("sdxl" if any(component_of(module) == "text_encoder_2" for module in modules) else "sd1")


def kohya_names(modules: Collection[str], family: str | None) -> dict[str, str]:
    """Canonical path -> kohya stem, for the modules of one file."""
    base = FAMILIES[likely_family(modules, family)]
    prefixes = {"unet": "lora_unet", **dict(zip(base.text_encoders, base.kohya_text_prefixes, strict=True))}
    paths = {}
    for module in modules:
        component, _, paths[module] = module.partition(".")
        if component not in prefixes:
            raise AdapterTargetError(f"{module}: {family or 'this family'} has no such component")
    if family is not None and base.kohya_sgm:
        attended = {int(m.split(".")[2]) for m in modules if m.startswith("unet.up_blocks.") and ".attentions." in m}
        names = UNetNames(LAYERS, MOST_BLOCKS, attended | {0, 1})  # SDXL's first two blocks up have attention
        original = {m: names.original(path) for m, path in paths.items() if component_of(m) == "unet"}
        if all(original.values()):  # all or none: diffusers drops the original names in a file that has both
            paths.update({module: name for module, name in original.items() if name})
    return {module: f"{prefixes[component_of(module)]}_{path.replace('.', '_')}" for module, path in paths.items()}


def check_path(module: str) -> None:
    """Raise AdapterTargetError unless `module` is a canonical path that a file may hold."""
    component, _, name = module.partition(".")
    if _matched(component, _words(name)) != name:
        raise AdapterTargetError(f"{module!r} is not the canonical path of a module that adapters change")
    if module.endswith(".text_projection"):
        raise AdapterTargetError(f"{module} cannot be saved: most programs cannot read it")


# --- what the published models have ---------------------------------------------------------------------------------


def fits(family: Family, module: str, outer: int, inner: int) -> bool:
    """Whether the published models of a family have such a module: its place, its outputs, the inputs of a text's."""
    component, _, path = module.partition(".")
    kind, *parts = path.split(".")
    if component != "unet":
        if component not in family.text_encoders:
            return False
        width, layers = family.text_sizes[family.text_encoders.index(component)]
        return kind != "text_model" or (int(parts[2]) < layers and width == (outer if path.endswith("fc2") else inner))
    if kind not in ("down_blocks", "mid_block", "up_blocks"):
        return True
    last = len(family.depths) - 1
    level = last if kind == "mid_block" else int(parts[0]) if kind == "down_blocks" else last - int(parts[0])
    if not 0 <= level <= last or outer != UNET_WIDTHS[level] * (8 if path.endswith("ff.net.0.proj") else 1):
        return False
    if "attentions" not in parts:
        return True
    depth = max(family.depths) if kind == "mid_block" else family.depths[level]
    index = int(parts[parts.index("transformer_blocks") + 1]) if "transformer_blocks" in parts else 0
    return index < depth and (inner == family.text_width or not path.endswith((".attn2.to_k", ".attn2.to_v")))
