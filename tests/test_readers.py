"""What other programs read of our files: at full size, all kinds of modules; diffusers' loader is the oracle for diffusers."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from pipelines import make_pipeline
from safetensors import safe_open
from safetensors.torch import load_file
from spoilt import saved

from lora_booth import errors as E
from lora_booth.adapters import readers
from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import Card, LoraFactors
from lora_booth.adapters.layouts import RARE, kohya_names, understood
from lora_booth.base.families import FAMILIES
from lora_booth.base.single_file import CONFIGS

ATTENTION = ("to_q", "to_k", "to_v", "to_out.0")
TRANSFORMER = (*ATTENTION, "proj_in", "proj_out", "ff.net.0.proj", "ff.net.2")
RESNET = ("conv1", "conv2", "conv_shortcut", "time_emb_proj", "downsamplers.0.conv", "upsamplers.0.conv")
PROJECTIONS = ("q_proj", "k_proj", "v_proj", "out_proj")
TEXT_SIZES = {"sd1": [(12, 768)], "sd2": [(23, 1024)], "sdxl": [(12, 768), (32, 1280)]}  # layers, width
TEXT_LAYER = "text_model.encoder.layers.0"
Q = "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q"


# --- adapters ------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shapes() -> dict[str, dict[str, tuple[int, ...]]]:
    """family -> module -> shape of its weight, of the published models: everything that adapters change."""
    from diffusers import UNet2DConditionModel

    found = {}
    for family, sizes in TEXT_SIZES.items():
        with torch.device("meta"):
            unet = UNet2DConditionModel.from_config(json.loads((CONFIGS / family / "unet" / "config.json").read_text()))
        layers = {f"unet.{name}": module for name, module in unet.named_modules()}
        found[family] = {n: tuple(m.weight.shape) for n, m in layers.items() if n.endswith((*TRANSFORMER, *RESNET))}
        for component, (count, width) in zip(("text_encoder", "text_encoder_2"), sizes, strict=False):
            for layer in (f"{component}.text_model.encoder.layers.{i}" for i in range(count)):
                found[family] |= {f"{layer}.self_attn.{name}": (width, width) for name in PROJECTIONS}
                found[family] |= {f"{layer}.mlp.fc1": (4 * width, width), f"{layer}.mlp.fc2": (width, 4 * width)}
    return found


def factors(shape=(32, 32), rank=2, alpha=1.0, generator=None) -> LoraFactors:
    down = torch.randn(rank, *shape[1:], generator=generator) / 8
    up = torch.randn(shape[0], rank, *(1 for _ in shape[2:]), generator=generator) / 8
    return LoraFactors(down, up, alpha)


def adapter_of(shapes, family) -> Adapter:
    return Adapter({name: factors(shape) for name, shape in shapes.items()}, Card(family=family, token="sks"))


def small(*modules, family="sd1", alpha=1.0) -> Adapter:
    return Adapter({module: factors(alpha=alpha) for module in modules}, Card(family=family))


def text(*names, component="text_encoder") -> list[str]:
    return [f"{component}.{TEXT_LAYER}.{name}" for name in names]


def named(adapter, name_of, ends=(".lora_down.weight", ".lora_up.weight"), alpha=True) -> dict[str, torch.Tensor]:
    """The tensors of a file in which `name_of` names the modules."""
    tensors = {}
    for module, f in adapter.modules.items():
        tensors |= {name_of(module) + ends[0]: f.down, name_of(module) + ends[1]: f.up}
        if alpha:
            tensors[f"{name_of(module)}.alpha"] = torch.tensor(f.alpha)
    return tensors


def old_diffusers_name(module: str) -> str:
    return module.replace(".to_", ".processor.to_").replace(".to_out.0", ".to_out")


# --- what we write -------------------------------------------------------------------------------------------------


def test_sd_15_has_the_modules_that_sd_scripts_trains(shapes):
    """Its log says: 72 modules of the text encoder, 192 of the U-Net."""
    assert sum(name.endswith(TRANSFORMER) for name in shapes["sd1"] if name.startswith("unet.")) == 192
    assert sum(name.startswith("text_encoder.") for name in shapes["sd1"]) == 72
    assert sum(name.endswith(TRANSFORMER) for name in shapes["sdxl"] if name.startswith("unet.")) == 722


def complete(reading):
    return not (reading.dropped or reading.rescaled or reading.refusal)


@pytest.mark.slow
@pytest.mark.parametrize("family", FAMILIES)
def test_every_program_reads_all_of_a_kohya_file(shapes, family, tmp_path):
    adapter = adapter_of(shapes[family], family)
    path = adapter.save(tmp_path / "a.safetensors")
    readings = readers.readings(path)
    assert readers.opened(path, Adapter.load(path)).family == family and tuple(readings) == readers.READERS
    for reading in readings.values():
        assert complete(reading) and reading.notes == ()
        assert reading.scales == dict.fromkeys(sorted(adapter.modules), 0.5)
    count = len(adapter.modules)
    for reader in ("diffusers", "ComfyUI"):
        assert str(readings[reader]) == f"{reader}: reads {count} of {count} modules"


@pytest.mark.parametrize("family", FAMILIES)
def test_a_peft_file_is_for_diffusers(shapes, family, tmp_path):
    adapter = adapter_of(shapes[family], family)
    readings = readers.readings(adapter.save(tmp_path / "a.safetensors", layout="peft"))
    assert complete(readings["diffusers"]) and set(readings["diffusers"].scales.values()) == {1.0}  # folded
    attention = {module for module in adapter.modules if module.endswith(ATTENTION) and module.startswith("unet.")}
    assert set(readings["ComfyUI"].dropped) == attention and not readings["ComfyUI"].rescaled
    for reader in ("A1111", "sd-scripts"):
        assert not readings[reader].scales
        assert str(readings[reader]) == f"{reader}: reads nothing (its names are those of PEFT or diffusers)"


def test_a_peft_file_of_many_ranks_has_long_metadata(shapes, tmp_path):
    """They cannot be left out: diffusers would give every module the scale of the first."""
    modules = {name: factors((8, 8, *shape[2:]), rank=1 + i % 4) for i, (name, shape) in enumerate(shapes["sdxl"].items())}
    path = Adapter(modules, Card(family="sdxl")).save(tmp_path / "a.safetensors", layout="peft")
    with safe_open(path, "pt") as file:
        assert len(file.metadata()["lora_adapter_metadata"]) > 2**16
    assert {name: f.rank for name, f in Adapter.load(path).modules.items()} == {name: f.rank for name, f in modules.items()}


@pytest.mark.parametrize(
    "kind", [TRANSFORMER, RESNET, ("_proj",), ("fc1", "fc2")], ids=["transformers", "resnets", "text", "mlp"]
)
@pytest.mark.parametrize("family", FAMILIES)
def test_kinds_of_modules_can_be_alone(shapes, family, kind, tmp_path):
    some = {name: (4, *shape[1:]) for name, shape in shapes[family].items() if name.endswith(kind)}
    some = {name: shape for name, shape in some.items() if name.startswith("unet.") == (kind in (TRANSFORMER, RESNET))}
    assert all(
        complete(reading) for reading in readers.readings(adapter_of(some, family).save(tmp_path / "a.safetensors")).values()
    )


PARTS = {  # as sliders and other adapters of a few layers have them
    "self-attention": lambda name: ".attn1." in name,
    "cross-attention": lambda name: ".attn2." in name,
    "queries": lambda name: name.endswith(".attn2.to_q"),
    "feed-forward": lambda name: ".ff." in name,
    "convolutions": lambda name: name.endswith(RESNET),
    "projections": lambda name: name.endswith(("proj_in", "proj_out")),
    "down": lambda name: name.startswith("unet.down_blocks."),
    "middle": lambda name: name.startswith("unet.mid_block."),
    "up": lambda name: name.startswith("unet.up_blocks."),
    "one block": lambda name: name.startswith("unet.up_blocks.1.attentions.1.") and ".attn1." in name,
    "one layer": lambda name: name == "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
    "text": lambda name: name.startswith("text_encoder."),
    "second text": lambda name: name.startswith("text_encoder_2."),
    "last text layers": lambda name: ".layers.11." in name,
}


@pytest.mark.parametrize("part", PARTS)
@pytest.mark.parametrize("family", FAMILIES)
def test_a_few_layers_prove_the_family_that_has_them(shapes, family, part, tmp_path):
    """The published models are the oracle: what only one of them has is an adapter for it, and says so when saved again."""
    some = {name: shape for name, shape in shapes[family].items() if PARTS[part](name)}
    if not some:
        return
    possible = [other for other in FAMILIES if all(shapes[other].get(n, ())[:2] == shape[:2] for n, shape in some.items())]
    adapter = Adapter({name: factors(shape, rank=1) for name, shape in some.items()})
    tensors = named(adapter, lambda module: module, (".lora_A.weight", ".lora_B.weight"), alpha=False)
    loaded = Adapter.load(saved(tmp_path / "a.safetensors", tensors))
    assert loaded.card.family == family if len(possible) == 1 else loaded.card.family in (None, *possible)
    stated = Adapter.load(saved(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sdxl_base_v1-0"}))
    assert stated.card.family == (family if len(possible) == 1 else "sdxl" if "sdxl" in possible else loaded.card.family)
    with safe_open(loaded.save(tmp_path / "b.safetensors", layout="peft"), "pt") as file:
        assert (loaded.card.family is None) == ("ss_base_model_version" not in file.metadata())


ROLES = ("up", "down")


@pytest.mark.parametrize("learned", [{}, {"<s1>": torch.ones(1, 768)}])
def test_the_first_layout_is_refused_by_name(learned, tmp_path):
    """cloneofsimo/lora numbered its layers."""
    tensors = {f"{part}:{i}:{role}": torch.ones(4, 4) for part in ("unet", "text_encoder") for i in (0, 1) for role in ROLES}
    with pytest.raises(E.AdapterTargetError, match="first layout"):
        Adapter.load(saved(tmp_path / "a.safetensors", tensors | learned))


# --- what is never written -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("module", [module for module in RARE if module.startswith("unet.")])
def test_modules_that_a_program_cannot_take(module, tmp_path):
    adapter = small(Q, module, family="sdxl")
    with pytest.raises(E.AdapterTargetError, match=rf"sd-scripts would drop {module}; leave that out or try layout 'peft'"):
        adapter.save(tmp_path / "a.safetensors")
    assert list(tmp_path.iterdir()) == []
    assert complete(readers.readings(adapter.save(tmp_path / "a.safetensors", layout="peft"))["diffusers"])


@pytest.mark.parametrize(
    "family, modules, layout, message",
    [
        ("sdxl", text("text_projection", component="text_encoder_2"), "peft", "canonical path"),
        # A1111 has one module for the four projections of OpenCLIP's text encoders
        ("sdxl", text("self_attn.q_proj", "self_attn.out_proj", component="text_encoder_2"), "kohya", "A1111 would drop"),
        (
            "sd2",
            text("self_attn.v_proj", "self_attn.out_proj", "mlp.fc1"),
            "kohya",
            "A1111 would drop .* together or not at all",
        ),
        # diffusers tells old naming from new by the names of other modules
        ("sd1", text("self_attn.q_proj"), "kohya", "diffusers would refuse text_encoder.*infer"),
        ("sd1", text("mlp.fc1", "mlp.fc2"), "peft", "diffusers would refuse text_encoder.*infer"),
        # no published U-Net has a third resnet there
        ("sd1", [Q, "unet.down_blocks.0.resnets.2.conv1"], "kohya", r"ComfyUI would drop unet.down_blocks.0.resnets.2.conv1;"),
    ],
)
def test_what_a_program_would_drop_is_not_written(family, modules, layout, message, tmp_path):
    with pytest.raises(E.AdapterTargetError, match=message):
        small(*modules, family=family).save(tmp_path / "a.safetensors", layout=layout)
    assert list(tmp_path.iterdir()) == []


def test_the_same_is_fine_where_the_program_can_take_it(tmp_path):
    for family, names, layout in (
        ("sd1", ("self_attn.q_proj", "self_attn.out_proj"), "kohya"),  # OpenAI's encoder: separate modules
        ("sd2", ("self_attn.q_proj",), "peft"),
        ("sd1", ("mlp.fc1", "mlp.fc2"), "kohya"),
    ):
        small(*text(*names), family=family).save(tmp_path / "a.safetensors", layout=layout)


def test_another_strength_is_not_written(tmp_path):
    """diffusers gives the commonest alpha to all attention: exactly why `save` folds alphas into one."""
    modules = {Q.replace("to_q", name): factors(alpha=alpha) for name, alpha in (("to_q", 2.0), ("to_k", 1.0), ("to_v", 1.0))}
    adapter = Adapter(modules, Card(family="sd1"))
    path = saved(tmp_path / "a.safetensors", named(adapter, kohya_names(modules, "sd1").get))
    reading = readers.readings(path)["diffusers"]
    assert reading.rescaled == (Q,) and reading.scales[Q] == 0.5
    assert str(reading) == "diffusers: reads 3 of 3 modules, 1 of them at another strength"
    with pytest.raises(E.AdapterScaleError, match=f"diffusers would scale {Q} by 0.5, not 1"):
        readers.check_readers(readers.opened(path, Adapter.load(path)), "kohya", path)
    assert complete(readers.readings(adapter.save(tmp_path / "b.safetensors"))["diffusers"])


# --- what diffusers does: its loader is asked ----------------------------------------------------------------------


def loaded_scales(pipeline, path) -> dict[str, float]:
    """Module -> alpha / rank of the PEFT layers, after the stock loader has read the file."""
    pipeline.load_lora_weights(path.parent, weight_name=path.name, adapter_name="x")
    found = {}
    for component in ("unet", "text_encoder", "text_encoder_2"):
        for name, layer in getattr(pipeline, component).named_modules() if hasattr(pipeline, component) else ():
            if "x" in getattr(layer, "scaling", {}):
                level = "" if component == "unet" or name.startswith("text_model.") else "text_model."
                found[f"{component}.{level}{name}"] = layer.scaling["x"]
    return found


@pytest.fixture(scope="module")
def tiny() -> dict[str, dict[str, tuple[int, ...]]]:
    """family -> module -> shape, of the tests' pipelines."""
    found = {}
    for family in FAMILIES:
        pipeline = make_pipeline(family)
        found[family] = {}
        for component in FAMILIES[family].components:
            for name, module in getattr(pipeline, component).named_modules():
                if isinstance(module, torch.nn.Linear | torch.nn.Conv2d) and ("block" in name or "layers" in name):
                    level = "" if component == "unet" or name.startswith("text_model.") else "text_model."
                    found[family][f"{component}.{level}{name}"] = tuple(module.weight.shape)
    return found


def mixed(shapes, family) -> Adapter:
    """Ranks and alphas that differ from module to module, as other tools write them."""
    modules = {
        name: factors(shape, rank=2 + i % 2, alpha=(1.0, 3.0, 1.0, 0.5)[i % 4])
        for i, (name, shape) in enumerate(shapes.items())
    }
    return Adapter(modules, Card(family=family))


def peft_metadata(adapter) -> dict[str, str]:
    fields = {}
    for component in {module.split(".")[0] for module in adapter.modules}:
        own = {
            m.split(".", 1)[1].removeprefix("text_model."): f
            for m, f in adapter.modules.items()
            if m.startswith(f"{component}.")
        }
        fields |= {f"{component}.r": 2, f"{component}.lora_alpha": 1.0, f"{component}.target_modules": sorted(own)}
        fields[f"{component}.rank_pattern"] = {name: f.rank for name, f in own.items()}
        fields[f"{component}.alpha_pattern"] = {name: f.alpha for name, f in own.items()}
    return {"lora_adapter_metadata": json.dumps(fields)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("naming", ["kohya", "kohya, few alphas", "peft", "peft, metadata", "old diffusers"])
def test_diffusers_reads_as_we_say(tiny, family, naming, tmp_path):
    adapter = mixed(tiny[family], family)
    ends, metadata = (".lora_A.weight", ".lora_B.weight"), None
    if naming.startswith("kohya"):
        tensors = named(adapter, kohya_names(adapter.modules, family).get)
        if "few" in naming:
            tensors = {key: value for key, value in tensors.items() if not (key.endswith(".alpha") and "attn" in key)}
    elif naming == "old diffusers":
        tensors = named(adapter, old_diffusers_name, ("_lora.down.weight", "_lora.up.weight"), alpha=False)
        tensors = {key: value for key, value in tensors.items() if ".processor." in key}
    else:
        tensors = named(adapter, lambda module: module, ends, alpha=False)
        metadata = peft_metadata(adapter) if "metadata" in naming else None
    path = saved(tmp_path / "a.safetensors", tensors, (metadata or {}) | {"lora_booth.card": json.dumps({"family": family})})
    said = readers.readings(path)["diffusers"]
    assert said.refusal is None
    assert said.scales == pytest.approx(loaded_scales(make_pipeline(family), path))
    assert said.scales  # there was something to compare
    if naming == "kohya":
        assert said.rescaled  # the modal alpha
    if naming == "peft, metadata":
        assert complete(said)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(
    "modules, ends, metadata",
    [
        (
            [Q],
            (".lora_A.weight", ".lora_B.weight"),
            {"unet.r": 4, "unet.target_modules": ["to_q"]},
        ),  # another rank than the tensors
        ([Q], (".lora_A.weight", ".lora_B.weight"), {"unet.r": 2, "unet.lora_alpha": 2}),
        (text("self_attn.q_proj"), (".lora_down.weight", ".lora_up.weight"), None),
        (text("mlp.fc1"), (".lora_A.weight", ".lora_B.weight"), None),
    ],
)
def test_diffusers_refuses_what_we_say(tiny, modules, ends, metadata, tmp_path):
    shapes = {module: tiny["sdxl"][module] for module in modules}
    adapter = Adapter({module: factors(shape) for module, shape in shapes.items()}, Card(family="sdxl"))
    kohya = ends[0] == ".lora_down.weight"
    tensors = named(adapter, kohya_names(shapes, "sdxl").get if kohya else lambda module: module, ends, alpha=kohya)
    entries = {} if metadata is None else {"lora_adapter_metadata": json.dumps(metadata)}
    path = saved(tmp_path / "a.safetensors", tensors, entries | {"ss_base_model_version": "sdxl_base_v1-0"})
    reading = readers.readings(path)["diffusers"]
    assert reading.refusal and str(reading).startswith("diffusers: refuses the file (")
    with pytest.raises((RuntimeError, ValueError, KeyError)):
        make_pipeline("sdxl").load_lora_weights(path.parent, weight_name=path.name)


# --- files of others -----------------------------------------------------------------------------------------------


def test_old_diffusers_naming_is_read_by_comfyui(tmp_path):
    adapter = small(*(Q.replace("to_q", name) for name in ATTENTION))
    tensors = named(adapter, old_diffusers_name, ("_lora.down.weight", "_lora.up.weight"), alpha=False)
    readings = readers.readings(saved(tmp_path / "a.safetensors", tensors))
    assert complete(readings["ComfyUI"]) and complete(readings["diffusers"]) and not readings["A1111"].scales


def test_diffusers_names_in_an_sdxl_file(tmp_path):
    """A1111 places them as in SD 1.x, where this sampler stands elsewhere; everyone else reads them all."""
    sampler = "unet.up_blocks.0.upsamplers.0.conv"
    tensors = named(small(Q, sampler), lambda module: "lora_unet_" + module[5:].replace(".", "_"))
    readings = readers.readings(saved(tmp_path / "a.safetensors", tensors, {"ss_base_model_version": "sdxl_base_v1-0"}))
    assert readings["A1111"].dropped == (sampler,) and tuple(readings["A1111"].scales) == (Q,)
    assert all(complete(reading) for reader, reading in readings.items() if reader != "A1111")


def test_comfyui_names_choke_a1111(tmp_path):
    tensors = named(small(Q), lambda module: "diffusion_model.input_blocks.4.1.transformer_blocks.0.attn1.to_q")
    readings = readers.readings(saved(tmp_path / "a.safetensors", tensors))
    assert complete(readings["ComfyUI"]) and readings["A1111"].refusal


def test_loha_is_read_by_those_who_know_lycoris(tmp_path):
    name = "lora_unet_down_blocks_1_attentions_0_transformer_blocks_0_attn1_to_q"
    tensors = {
        f"{name}.hada_w{i}_{side}": torch.ones(shape) for i in (1, 2) for side, shape in (("a", (32, 2)), ("b", (2, 32)))
    }
    path = saved(tmp_path / "a.safetensors", tensors | {f"{name}.alpha": torch.tensor(1.0)})
    readings = readers.readings(path)
    assert complete(readings["ComfyUI"]) and complete(readings["A1111"])
    assert readings["diffusers"].refusal and readings["sd-scripts"].dropped == (Q,)


def test_alphas_that_only_peft_metadata_holds(tmp_path):
    module = text("self_attn.q_proj")[0]
    tensors = named(small(module), lambda module: module, (".lora_A.weight", ".lora_B.weight"), alpha=False)
    fields = {"text_encoder.r": 2, "text_encoder.lora_alpha": 8, "text_encoder.target_modules": ["q_proj"]}
    metadata = {"lora_adapter_metadata": json.dumps(fields)}
    readings = readers.readings(saved(tmp_path / "a.safetensors", tensors, metadata))
    assert readings["diffusers"].scales == {module: 4.0} and complete(readings["diffusers"])
    assert readings["ComfyUI"].rescaled == (module,) and readings["ComfyUI"].scales == {module: 1.0}


def test_a_regular_expression_in_the_metadata_is_no_reason_to_show_nothing(tmp_path):
    tensors = named(small(Q), lambda module: module, (".lora_A.weight", ".lora_B.weight"), alpha=False)
    fields = {"unet.r": 2, "unet.lora_alpha": 2, "unet.target_modules": ["to_q"], "unet.rank_pattern": {"to_[qk]": 2}}
    path = saved(tmp_path / "a.safetensors", tensors, {"lora_adapter_metadata": json.dumps(fields)})
    readings = readers.readings(path)
    assert "regular expression" in readings["diffusers"].refusal and readings["A1111"].dropped == (Q,)


def test_a_folder_of_peft_is_nothing_for_diffusers(tmp_path):
    tensors = named(
        small(Q), lambda module: f"base_model.model.{module[5:]}", (".lora_A.weight", ".lora_B.weight"), alpha=False
    )
    saved(tmp_path / "adapter_model.safetensors", tensors)
    (tmp_path / "adapter_config.json").write_text('{"r": 2, "lora_alpha": 4, "peft_type": "LORA"}')
    assert all(not reading.scales for reading in readers.readings(tmp_path).values())


@pytest.mark.parametrize(
    "metadata, family",
    [
        ({}, None),
        ({"format": "pt"}, "sd1"),
        ({"ss_v2": "False"}, "sd1"),
        ({"ss_v2": "True"}, "sd2"),
        ({"ss_v2": "True", "ss_base_model_version": "sdxl_base_v1-0"}, "sdxl"),
        ({"ss_base_model_version": "sd_v2"}, "sd1"),
    ],
)
def test_the_base_that_a1111_reads_from_the_header(metadata, family):
    assert readers.a1111_family(metadata) == family


@pytest.mark.parametrize("family", FAMILIES)
def test_a_header_without_kohya_entries_hides_a_file_in_a1111(family, tmp_path):
    path = small(Q, Q.replace("attn1.to_q", "attn2.to_k"), family=family).save(tmp_path / "a.safetensors")
    assert readers.readings(path)["A1111"].notes == ()
    card = {"format": "pt", "lora_booth.card": json.dumps({"family": family})}
    notes = readers.readings(saved(tmp_path / "b.safetensors", load_file(path), card))["A1111"].notes
    assert notes == (
        () if family == "sd1" else ("takes it for Stable Diffusion 1.x, and hides it while another base is loaded",)
    )


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("family", ["sd1", "sd2"])
def test_a_layer_is_written_as_the_base_has_it(tiny, family, layout, tmp_path):
    """Some tools write linear layers as 1x1 convolutions, or the reverse; diffusers loads the base's own shape only."""
    names = [name for name in tiny[family] if name.endswith((".proj_in", ".conv_shortcut", "attn1.to_q")) and "unet" in name]
    adapter = Adapter({name: factors(tiny[family][name][:2]) for name in names}, Card(family=family))
    other = {}
    for name, f in adapter.modules.items():
        other[name] = LoraFactors(f.down[:, :, None, None], f.up[:, :, None, None], f.alpha) if "proj_in" in name else f
    for modules in (adapter.modules, other):
        path = Adapter(modules, adapter.card).save(tmp_path / "a.safetensors", layout=layout, dtype="fp32")
        assert loaded_scales(make_pipeline(family), path).keys() == set(names)
        for name, f in Adapter.load(path).modules.items():
            assert f.shape == tiny[family][name]
            assert torch.allclose(f.delta().flatten(), adapter.modules[name].delta().flatten(), rtol=1e-6, atol=0)


# --- the tables ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("family", FAMILIES)
def test_the_names_of_the_original_code_are_those_that_we_read(shapes, family):
    """There and back; that the names are right, diffusers' own conversion says (test_adapter_tools)."""
    original_name = readers.PUBLISHED[family].original
    modules = [module for module in shapes[family] if module.startswith("unet.")]
    originals = {module: original_name(module.removeprefix("unet.")) for module in modules}
    assert len(set(originals.values())) == len(modules)
    for module, original in originals.items():
        assert understood(f"lora_unet_{original.replace('.', '_')}.alpha")[0] == module
    assert original_name("down_blocks.7.resnets.0.conv1") is None


@pytest.mark.slow
def test_loading_needs_none_of_this(tmp_path):
    path = small(Q).save(tmp_path / "a.safetensors")
    code = f"import lora_booth as lb, sys; lb.Adapter.load({str(path)!r}); print(*sys.modules)"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1], check=True
    )
    assert {"diffusers", "peft", "lora_booth.adapters.readers"}.isdisjoint(done.stdout.split())
