"""The names of LoRA tensors: canonical module paths, and what kohya's tools, PEFT and diffusers call them.

A complete module path is matched against a table in which `#` stands for an index; no part of it is searched for.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable

from ..base.families import FAMILIES, labels
from ..base.original_naming import OUTSIDE, RESNET, UNetNames
from ..errors import AdapterBaseMismatch, AdapterError, AdapterTargetError

Role = str  # of a tensor in its module: down, up, mid, alpha, or one of LYCORIS

ATTENTION = (
    "proj_in",
    "proj_out",
    *(f"transformer_blocks.#.{attn}.{m}" for attn in ("attn1", "attn2") for m in ("to_q", "to_k", "to_v", "to_out.0")),
    "transformer_blocks.#.ff.net.0.proj",
    "transformer_blocks.#.ff.net.2",
)
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
RARE = (  # understood, but refused unless allowed by name
    *(f"unet.{name}" for name in OUTSIDE if not name.endswith("norm_out")),
    "text_encoder.text_projection",
    "text_encoder_2.text_projection",
)
COMPONENTS = {
    "unet": (*UNET, *(name.removeprefix("unet.") for name in RARE if name.startswith("unet."))),
    "text_encoder": (*TEXT, "text_projection"),
    "text_encoder_2": (*TEXT, "text_projection"),
}
KOHYA_PREFIXES = {  # longest first where one begins another
    "lora_unet_": "unet",
    "lora_te1_": "text_encoder",
    "lora_te2_": "text_encoder_2",
    "lora_te_": "text_encoder",
    "lycoris_": "unet",  # SimpleTuner's
}
COMFYUI_TEXT = {"clip_l": "text_encoder", "clip_h": "text_encoder", "clip_g": "text_encoder_2"}
LYCORIS = frozenset(
    (
        *("hada_w1_a", "hada_w1_b", "hada_w2_a", "hada_w2_b", "hada_t1", "hada_t2"),
        *("lokr_w1", "lokr_w1_a", "lokr_w1_b", "lokr_w2", "lokr_w2_a", "lokr_w2_b", "lokr_t2"),
    )
)
OTHER_MODELS = (  # how the keys of other kinds of model begin
    "transformer.",
    "diffusion_model.",
    "text_encoder_3.",
    "lora_transformer_",
    "lora_te3_",
    "lora_unet_double_blocks_",
    "lora_unet_single_blocks_",
    "lora_unet_joint_blocks_",
    "lora_prior_",
    "lora_unet_blocks_",
    "unet.transformer_blocks.",
    "transformer_blocks.",
)
KINDS = {  # a part of a key (with a `_` at its end: how the part begins) -> a kind of adapter without LoRA factors
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "hada_": "LoHa",
    "lokr_": "LoKr",
    "on_input": "IA3",
    "ia3_": "IA3",
    "bundle_emb": "a bundled embedding",
    "lora_embedding_": "LoRA on token embeddings",
    "oft_": "OFT",
    "boft_": "BOFT",
    "rescale": "OFT",
    **dict.fromkeys(("a1", "a2", "b1", "b2", "bm"), "GLoRA"),
    "lora_E": "AdaLoRA",
    "vera_": "VeRA",
    "w_norm": "trained norm layers",
    "b_norm": "trained norm layers",
    "diff": "full weight differences",
    "diff_b": "full weight differences",
}
NO_FACTORS = "only LoRA, and LoHa and LoKr of low rank, can be read; ask for a LoRA of it"
REMEDIES = {
    "DoRA": "its change depends on the weights of its base and has no low rank; merge it into its base with the tool that "
    "made it, or ask for a plain LoRA",
    "a bundled embedding": "learned tokens belong in a separate file; ask for the file without it",
}
SGM_KEYS = ("lora_unet_input_blocks_", "lora_unet_middle_block_", "lora_unet_output_blocks_")
LAYERS = 2  # resnets in a down block of every published SD 1.x, 2.x and XL; the original numbering counts with it
MOST_BLOCKS = 34  # as many as two digits number


def _shape(parts: Iterable[str]) -> tuple[str, ...]:
    return tuple("#" if part.isdigit() else part for part in parts)


Table = dict[tuple[str, ...], list[str]]  # the shape of a name -> the templates that have it


def _table(templates: Iterable[str], separator: str) -> Table:
    table: Table = {}
    for template in dict.fromkeys(templates):
        table.setdefault(_shape(template.replace("#", "0").replace(".", separator).split(separator)), []).append(template)
    return table


_DOTTED = {component: _table(templates, ".") for component, templates in COMPONENTS.items()}
_UNDERSCORED = {component: _table(templates, "_") for component, templates in COMPONENTS.items()}
_STEMS = tuple(KOHYA_PREFIXES)
_ATTENTION = _table(ATTENTION, "_")
_RESNET = {RESNET[name].replace(".", "_"): name for name in RESNET_MODULES}
_SGM = [UNetNames(LAYERS, MOST_BLOCKS, attended) for attended in ((), range(MOST_BLOCKS))]
_SGM_BLOCKS = {name.replace(".", "_"): path for path, name in _SGM[0].blocks.items()}
_SGM_MODULES = {name.replace(".", "_"): path for names in _SGM for path, name in names.modules.items()}
del _SGM_MODULES["out_0"]  # a norm


def _filled(template: str, parts: list[str], separator: str) -> str | None:
    """`template` with the indices of `parts`; None if `parts` differs in a number that the template fixes."""
    wanted = template.replace(".", separator).split(separator)
    for want, part in zip(wanted, parts, strict=True):
        if want == "#":
            if len(part) > 3 or str(int(part)) != part:
                return None
        elif want != part:
            return None
    indices = iter([part for want, part in zip(wanted, parts, strict=True) if want == "#"])
    return "".join(next(indices) if c == "#" else c for c in template)


def _matched(table: Table, parts: list[str], separator: str) -> str | None:
    found = (_filled(template, parts, separator) for template in table.get(_shape(parts), ()))
    return next((module for module in found if module is not None), None)


def _from_sgm(name: str) -> str | None:
    """`input_blocks_4_1_proj_in` -> `down_blocks.1.attentions.0.proj_in`."""
    if name in _SGM_MODULES:
        return _SGM_MODULES[name]
    parts = name.split("_")
    size = 3 if parts[0] == "middle" else 4
    block, rest = _SGM_BLOCKS.get("_".join(parts[:size])), parts[size:]
    if block is None:
        return None
    module = _RESNET.get("_".join(rest)) if ".resnets." in block else _matched(_ATTENTION, rest, "_")
    return None if module is None else f"{block}.{module}"


def _kohya_module(stem: str) -> str | None:
    for prefix, component in KOHYA_PREFIXES.items():
        if stem.startswith(prefix):
            name = stem.removeprefix(prefix)
            module = _matched(_UNDERSCORED[component], name.split("_"), "_")
            if module is None and component == "unet":
                module = _from_sgm(name)
            return None if module is None else f"{component}.{module}"
    return None


def _dotted_module(parts: list[str]) -> str | None:
    component = ""
    if parts[:1] == ["diffusion_model"]:  # ComfyUI's: the names of the original code with dots
        module = _from_sgm("_".join(parts[1:]))
        return None if module is None else f"unet.{module}"
    if parts[:1] == ["text_encoders"] and parts[2:3] == ["transformer"]:
        parts = [COMFYUI_TEXT.get(parts[1], ""), *parts[3:]]
    if parts[:2] == ["base_model", "model"]:
        parts = parts[2:]
    if parts and parts[0] in COMPONENTS:
        component, parts = parts[0], parts[1:]
        if parts[:2] == ["base_model", "model"]:
            parts = parts[2:]
    if not component:
        component = "text_encoder" if parts[:1] in (["text_model"], ["encoder"]) else "unet"
    parts = [part for part in parts if part != "processor"]
    if component != "unet" and parts[:1] == ["encoder"]:  # transformers 5 lost this level of the first text encoder
        parts = ["text_model", *parts]
    if parts and parts[-1].endswith("_lora"):
        last = parts[-1].removesuffix("_lora")
        if component != "unet":
            last = {"to_q": "q_proj", "to_k": "k_proj", "to_v": "v_proj", "to_out": "out_proj"}.get(last, last)
        parts = [*parts[:-1], last]
    if parts[-1:] == ["to_out"]:
        parts = [*parts, "0"]
    module = _matched(_DOTTED[component], parts, ".")
    return None if module is None else f"{component}.{module}"


def _split(key: str) -> tuple[list[str], Role] | None:
    """The parts of the module's name in a key, and which tensor of the module it is."""
    parts = key.split(".")
    if len(parts) >= 2 and parts[-1] == "alpha":
        parts = parts[:-1]
        return parts[:-1] if len(parts) > 1 and parts[-1] in ("lora", "lora_linear_layer") else parts, "alpha"
    for size in (1, 2):  # PEFT may put the adapter's name at the end
        if len(parts) > size and parts[-size] in LYCORIS:
            return parts[:-size], parts[-size]
    if len(parts) < 3 or parts[-1] != "weight":
        return None
    parts = parts[:-1]
    halves: dict[str, Role] = {"lora_A": "down", "lora_B": "up", "lora_down": "down", "lora_up": "up", "lora_mid": "mid"}
    if parts[-1] in halves:
        return parts[:-1], halves[parts[-1]]
    if parts[-2] in ("lora_A", "lora_B"):  # lora_A.<adapter's name>.weight
        return parts[:-2], halves[parts[-2]]
    if parts[-1] in ("down", "up"):
        role: Role = "down" if parts[-1] == "down" else "up"
        if parts[-2] in ("lora", "lora_linear_layer"):
            return parts[:-2], role
        if parts[-2].endswith("_lora"):
            return parts[:-1], role
    return None


def understood(key: str, *, allow: Collection[str] = (), path: object = None) -> tuple[str, Role]:
    """Return the canonical module path and the role of a tensor called `key` in a file."""
    split = _split(key)
    module = None
    if split is not None:
        parts = split[0]
        module = _kohya_module(parts[0]) if len(parts) == 1 and parts[0].startswith(_STEMS) else _dotted_module(parts)
    if split is None or module is None:
        raise _no_lora(key, path)
    if module in RARE and module not in allow:
        raise AdapterTargetError(f"{key} changes {module}, which adapters rarely do; to accept it, allow {module!r}", path)
    return module, split[1]


def _no_lora(key: str, path: object) -> AdapterError:
    """Why the tensor `key` cannot be read."""
    if key.startswith(OTHER_MODELS):
        return AdapterBaseMismatch(f"made for another kind of model than {labels()}; its keys begin as {key[:60]!r}", path)
    for piece in key.split("."):
        for mark, kind in KINDS.items():
            if piece.startswith(mark) if mark.endswith("_") else piece == mark:
                return AdapterTargetError(f"{key} is {kind}; {REMEDIES.get(kind, NO_FACTORS)}", path)
    return AdapterTargetError(f"{key} is not a LoRA tensor of a module that adapters change", path)


def are_pair(down: str, up: str) -> bool:
    """Whether two keys are the halves of one LoRA in the same naming."""
    halves = {"lora_A": "lora_B", "lora_down": "lora_up", "down": "up"}
    return [halves.get(part, part) for part in down.split(".")] == up.split(".")


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


def kohya_names(modules: Collection[str], family: str | None) -> dict[str, str]:
    """Canonical path -> kohya stem, for the modules of one file."""
    texts = ("text_encoder", "text_encoder_2")
    if family is None:
        two = any(component_of(m) == texts[1] for m in modules)
        prefixes: tuple[str, ...] = ("lora_te1", "lora_te2") if two else ("lora_te",)
        sgm = False
    else:
        prefixes, sgm = FAMILIES[family].kohya_text_prefixes, FAMILIES[family].kohya_sgm
    attended = {int(m.split(".")[2]) for m in modules if m.startswith("unet.up_blocks.") and ".attentions." in m}
    original = UNetNames(LAYERS, MOST_BLOCKS, attended | {0, 1})  # sgm is SDXL, whose first two blocks up have attention
    names: dict[str, str] = {}
    sgm_names: dict[str, str | None] = {}
    for module in modules:
        component, name = module.split(".", 1)
        if component == "unet":
            names[module] = "lora_unet_" + name.replace(".", "_")
            sgm_names[module] = original.original(name) if sgm else None
        elif component in texts[: len(prefixes)]:
            names[module] = f"{prefixes[texts.index(component)]}_{name.replace('.', '_')}"
        else:
            raise AdapterTargetError(f"{module}: {family or 'this family'} has no such component")
    if all(sgm_names.values()):  # all or none: diffusers drops the original names in a file that has both
        names.update({module: f"lora_unet_{name.replace('.', '_')}" for module, name in sgm_names.items() if name})
    return names


def checked_path(module: str) -> str:
    """Return `module` if it is a canonical path that a file may hold."""
    component, _, name = module.partition(".")
    if component not in COMPONENTS or _matched(_DOTTED[component], name.split("."), ".") != name:
        raise AdapterTargetError(f"{module!r} is not the canonical path of a module that adapters change")
    if module.endswith(".text_projection"):
        raise AdapterTargetError(f"{module} cannot be saved: most programs cannot read it")
    return module
