"""Adapter files: round trips, the stock loaders as the oracle, and every way in which a file can be wrong."""

import hashlib
import json
import os
from dataclasses import replace
from pathlib import Path

os.environ["HF_HUB_OFFLINE"] = "1"

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from spoilt import header_end, put_together, saved, taken_apart

from lora_booth import errors as E
from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import Card, LoraFactors
from lora_booth.adapters.layouts import kohya_names, understood
from lora_booth.adapters.tools.merge import concatenated
from lora_booth.base.families import FAMILIES

TEXT = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.out_proj", "mlp.fc1", "mlp.fc2")
CROSS = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn2.to_k"
Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
KOHYA_Q = "lora_unet_down_blocks_0_attentions_0_transformer_blocks_0_attn1_to_q"


@pytest.fixture(autouse=True, scope="module")
def one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


def tiny_unet(family):
    from diffusers import UNet2DConditionModel

    common = {"sample_size": 8, "norm_num_groups": 8, "cross_attention_dim": 32}
    torch.manual_seed(0)
    if family == "sdxl":
        return UNet2DConditionModel(
            block_out_channels=(16, 32, 32),
            layers_per_block=2,
            down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "CrossAttnDownBlock2D"),
            up_block_types=("CrossAttnUpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
            transformer_layers_per_block=(1, 2, 2),
            attention_head_dim=8,
            use_linear_projection=True,
            addition_embed_type="text_time",
            addition_time_embed_dim=8,
            projection_class_embeddings_input_dim=80,
            **common,
        )
    return UNet2DConditionModel(
        block_out_channels=(32, 64),
        layers_per_block=1,
        down_block_types=("CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D"),
        attention_head_dim=8,
        use_linear_projection=family == "sd2",
        **common,
    )


def tiny_text(projection=False):
    from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

    config = CLIPTextConfig(
        hidden_size=32, intermediate_size=48, num_attention_heads=2, num_hidden_layers=2, vocab_size=64, projection_dim=32
    )
    return (CLIPTextModelWithProjection if projection else CLIPTextModel)(config)


@pytest.fixture(scope="module")
def unets():
    return {family: tiny_unet(family) for family in FAMILIES}


def random_factors(weight, generator, rank, alpha):
    out = weight.shape[0]
    rank = min(rank, out, weight[0].numel())
    down = torch.randn(rank, *weight.shape[1:], generator=generator) / 16
    up = torch.randn(out, rank, *([1, 1] if weight.ndim == 4 else []), generator=generator) / 16
    return LoraFactors(down, up, alpha)


def full_adapter(unet, family, ranks=(4,), alphas=(8.0,), text=True):
    """Every module that adapters change, convolutions and text encoders as well."""
    g = torch.Generator().manual_seed(1)
    modules = {}
    for name, module in unet.named_modules():
        if isinstance(module, (torch.nn.Linear, torch.nn.Conv2d)) and ("block" in name):
            n = len(modules)
            modules[f"unet.{name}"] = random_factors(module.weight, g, ranks[n % len(ranks)], alphas[n % len(alphas)])
    for component in FAMILIES[family].text_encoders if text else ():
        for layer in range(2):
            for target in TEXT:
                shape = {"mlp.fc1": (48, 32), "mlp.fc2": (32, 48)}.get(target, (32, 32))
                name = f"{component}.text_model.encoder.layers.{layer}.{target}"
                n = len(modules)
                modules[name] = random_factors(torch.empty(shape), g, ranks[n % len(ranks)], alphas[n % len(alphas)])
    card = Card(
        family=family,
        prediction_type="epsilon",
        base_model="owner/model",
        resolution=64,
        token="sks",
        class_noun="dog",
        prompt="a photo of sks dog",
        rank=ranks[0],
        alpha=alphas[0],
        steps=5,
        photos=4,
        library_version="0.1",
        consent="object",
    )
    return Adapter(modules, card)


def assert_same_change(one, other, atol=0.0):
    assert one.modules.keys() == other.modules.keys()
    for name in one.modules:
        torch.testing.assert_close(one.modules[name].delta(), other.modules[name].delta(), rtol=1e-6 if atol else 0, atol=atol)


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_round_trip(unets, family, layout, tmp_path):
    adapter = full_adapter(unets[family], family)
    path = adapter.save(tmp_path / "a.safetensors", layout=layout, dtype="fp32")
    back = Adapter.load(path)
    assert_same_change(adapter, back)  # alpha / rank is a power of two: exact
    assert back.card == adapter.card and back.name == "sks" and back.stem == "a"
    again = Adapter.load(back.save(tmp_path / "b.safetensors", layout="peft" if layout == "kohya" else "kohya", dtype="fp32"))
    third = Adapter.load(again.save(tmp_path / "c.safetensors", layout=layout, dtype="fp32"))
    assert_same_change(adapter, third)
    if layout == "peft":  # nothing left to fold
        assert third.digest() == back.digest()


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("dtype", ["fp16", "bf16", "fp32"])
def test_bytes_are_a_function_of_the_adapter(unets, layout, dtype, tmp_path):
    adapter = full_adapter(unets["sd1"], "sd1")
    shuffled = Adapter(dict(reversed(adapter.modules.items())), adapter.card, stem="elsewhere")
    one = adapter.save(tmp_path / "one.safetensors", layout=layout, dtype=dtype).read_bytes()
    two = shuffled.save(tmp_path / "two.safetensors", layout=layout, dtype=dtype).read_bytes()
    assert one == two
    assert sorted(p.name for p in tmp_path.iterdir()) == ["one.safetensors", "two.safetensors"]
    loaded = Adapter.load(tmp_path / "one.safetensors")
    assert loaded.save(tmp_path / "three.safetensors", layout=layout, dtype=dtype).read_bytes() == one


def test_header_for_other_programs(unets, tmp_path):
    path = full_adapter(unets["sdxl"], "sdxl").save(tmp_path / "a.safetensors")
    content = path.read_bytes()
    with safe_open(path, "pt") as f:
        metadata = f.metadata()
    start = header_end(content)
    assert metadata["sshs_model_hash"] == hashlib.sha256(content[start:]).hexdigest()
    assert metadata["ss_base_model_version"] == "sdxl_base_v1-0" and metadata["ss_v2"] == "False"
    assert metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base/lora"
    assert metadata["modelspec.resolution"] == "64x64" and metadata["modelspec.trigger_phrase"] == "sks dog"
    assert metadata["ss_network_dim"] == "4" and metadata["ss_network_alpha"] == "8"
    assert "lora_adapter_metadata" not in metadata and "modelspec.date" not in metadata
    assert start % 8 == 0


def weights_of(model):
    return {name: value.clone() for name, value in model.state_dict().items()}


def stock_change(pipe, path, components):
    """The change of every weight, after diffusers has loaded the file and fused it."""
    before = {c: weights_of(getattr(pipe, c)) for c in components}
    pipe.load_lora_weights(path.parent, weight_name=path.name, adapter_name="x")
    pipe.fuse_lora(components=components)
    pipe.unload_lora_weights()
    changes = {}
    for c in components:
        model = getattr(pipe, c)
        for name, value in model.state_dict().items():
            plain = name.replace(".base_layer", "")
            if plain.endswith(".weight") and not torch.equal(value, before[c][plain]):
                inner = plain.removesuffix(".weight")
                if c != "unet" and not inner.startswith("text_model."):
                    inner = f"text_model.{inner}"
                changes[f"{c}.{inner}"] = value - before[c][plain]
        model.load_state_dict(before[c])
    return changes


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("mixed", [False, True], ids=["one rank", "mixed ranks and alphas"])
def test_diffusers_loads_the_same_change(family, layout, mixed, tmp_path):
    from diffusers import DDIMScheduler, StableDiffusionPipeline, StableDiffusionXLPipeline

    parts = {
        "unet": tiny_unet(family),
        "text_encoder": tiny_text(),
        "vae": None,
        "tokenizer": None,
        "scheduler": DDIMScheduler(),
    }
    components = ["unet", "text_encoder"]
    if family == "sdxl":
        components.append("text_encoder_2")
        pipe = StableDiffusionXLPipeline(**parts, text_encoder_2=tiny_text(projection=True), tokenizer_2=None)
    else:
        pipe = StableDiffusionPipeline(**parts, safety_checker=None, feature_extractor=None, requires_safety_checker=False)
    with torch.no_grad():  # float32 rounding of base + change must not hide the change
        for c in components:
            for value in getattr(pipe, c).parameters():
                value.zero_()
    ranks, alphas = ((4, 2, 4), (8.0, 3.0, 8.0, 1.0)) if mixed else ((4,), (8.0,))
    adapter = full_adapter(pipe.unet, family, ranks, alphas)
    path = adapter.save(tmp_path / "a.safetensors", layout=layout, dtype="fp32")
    changes = stock_change(pipe, path, components)
    assert changes.keys() == adapter.modules.keys()
    for name, change in changes.items():
        torch.testing.assert_close(change, adapter.modules[name].delta(), rtol=0, atol=1e-6, msg=name)
    assert_same_change(adapter, Adapter.load(path), atol=1e-6)


def test_every_canonical_name_survives_kohya(unets):
    for family, unet in unets.items():
        modules = full_adapter(unet, family).modules
        names = kohya_names(modules, family)
        assert len(set(names.values())) == len(modules)
        for module, name in names.items():
            assert understood(f"{name}.alpha") == (module, "alpha")
        assert any("input_blocks" in n for n in names.values()) == (family == "sdxl")
        plain = {m: "lora_unet_" + m[5:].replace(".", "_") for m in modules if m.startswith("unet.")}
        assert all(understood(f"{name}.alpha") == (module, "alpha") for module, name in plain.items())


def test_sdxl_names_are_those_of_the_original_code():
    wanted = {
        "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q": "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
        "unet.mid_block.attentions.0.proj_in": "middle_block_1_proj_in",
        "unet.mid_block.resnets.1.conv2": "middle_block_2_out_layers_3",
        "unet.up_blocks.0.attentions.0.transformer_blocks.9.ff.net.2": "output_blocks_0_1_transformer_blocks_9_ff_net_2",
        "unet.down_blocks.0.downsamplers.0.conv": "input_blocks_3_0_op",
        "unet.up_blocks.1.upsamplers.0.conv": "output_blocks_5_2_conv",
        "unet.down_blocks.1.resnets.0.conv_shortcut": "input_blocks_4_0_skip_connection",
        "unet.up_blocks.2.resnets.2.time_emb_proj": "output_blocks_8_0_emb_layers_1",
    }
    assert kohya_names(wanted, "sdxl") == {m: f"lora_unet_{n}" for m, n in wanted.items()}


@pytest.mark.parametrize(
    "key, module, role",
    [
        (f"{Q}.lora_A.weight", Q, "down"),
        (f"{Q}.lora_B.default.weight", Q, "up"),
        (f"base_model.model.{Q}.lora_A.weight", Q, "down"),
        (f"base_model.model.{Q[5:]}.lora_A.weight", Q, "down"),
        (f"{Q[5:]}.lora_B.weight", Q, "up"),
        (f"{Q}.lora.down.weight", Q, "down"),
        (f"{Q.replace('.to_q', '.processor.to_q')}_lora.up.weight", Q, "up"),
        (f"{Q.replace('to_q', 'processor.to_out_lora.down.weight')}", Q.replace("to_q", "to_out.0"), "down"),
        (f"{KOHYA_Q}.lora_down.weight", Q, "down"),
        (f"{KOHYA_Q}.alpha", Q, "alpha"),
        (
            "text_encoder.encoder.layers.1.mlp.fc1.lora_linear_layer.up.weight",
            "text_encoder.text_model.encoder.layers.1.mlp.fc1",
            "up",
        ),
        (
            "text_encoder.text_model.encoder.layers.0.self_attn.to_out_lora.down.weight",
            "text_encoder.text_model.encoder.layers.0.self_attn.out_proj",
            "down",
        ),
        (
            "lora_te2_text_model_encoder_layers_31_mlp_fc2.lora_up.weight",
            "text_encoder_2.text_model.encoder.layers.31.mlp.fc2",
            "up",
        ),
        ("lora_te1_text_model_encoder_layers_0_mlp_fc2.alpha", "text_encoder.text_model.encoder.layers.0.mlp.fc2", "alpha"),
        ("lora_unet_input_blocks_8_1_proj_out.lora_up.weight", "unet.down_blocks.2.attentions.1.proj_out", "up"),
        ("lora_unet_output_blocks_2_1_conv.lora_up.weight", "unet.up_blocks.0.upsamplers.0.conv", "up"),
    ],
)
def test_foreign_names(key, module, role):
    assert understood(key) == (module, role)


# files of others

D, U = f"{Q}.lora_A.weight", f"{Q}.lora_B.weight"
KD, KU, KA = (f"{KOHYA_Q}.{end}" for end in ("lora_down.weight", "lora_up.weight", "alpha"))


def pair(rank=4, width=32, out=32, dtype=torch.float32):
    g = torch.Generator().manual_seed(2)
    return torch.randn(rank, width, generator=g).to(dtype), torch.randn(out, rank, generator=g).to(dtype)


def foreign(tmp_path, tensors, metadata=None):
    path = tmp_path / "foreign.safetensors"
    return saved(path, tensors, metadata)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("rank", [1, 8, 128])
def test_good_foreign_files_load(tmp_path, dtype, rank):
    down, up = pair(rank, 320, 768, dtype)
    for alpha in (torch.tensor(4.0, dtype=dtype), torch.tensor([4]), torch.tensor(4.0, dtype=torch.float64)):
        factors = Adapter.load(foreign(tmp_path, {KD: down, KU: up, KA: alpha})).modules[Q]
        assert factors.alpha == 4 and factors.rank == rank and factors.down.dtype == dtype
        assert torch.equal(factors.delta(), up.float() @ down.float() * (4 / rank))
    assert Adapter.load(foreign(tmp_path, {KD: down, KU: up})).modules[Q].scale == 1
    assert Adapter.load(foreign(tmp_path, {D: down, U: up})).modules[Q].scale == 1


def test_convolution_and_linear_are_written_for_each_other(tmp_path):
    down, up = pair()
    mixed = Adapter.load(foreign(tmp_path, {KD: down[:, :, None, None], KU: up})).modules[Q]
    assert torch.equal(mixed.delta()[:, :, 0, 0], up @ down)
    name = "lora_unet_down_blocks_0_resnets_0_conv1"
    down = torch.randn(8, 4, 3, 3)  # the rank may exceed the channels, not the whole of a kernel
    loaded = Adapter.load(
        foreign(tmp_path, {f"{name}.lora_down.weight": down, f"{name}.lora_up.weight": torch.ones(8, 8, 1, 1)})
    )
    assert loaded.modules["unet.down_blocks.0.resnets.0.conv1"].delta().shape == (8, 4, 3, 3)


def test_alpha_of_peft_files(tmp_path):
    down, up = pair()
    other = Q.replace("to_q", "to_v")
    tensors = {D: down, U: up, f"{other}.lora_A.weight": down, f"{other}.lora_B.weight": up}

    def alphas(**fields):
        text = json.dumps({f"unet.{name}": value for name, value in fields.items()})
        modules = Adapter.load(foreign(tmp_path, tensors, {"lora_adapter_metadata": text})).modules
        return modules[Q].alpha, modules[other].alpha

    assert alphas(r=4, lora_alpha=16) == (16, 16)
    assert alphas(r=4, lora_alpha=16, alpha_pattern={"to_v": 2}) == (16, 2)
    assert alphas(r=4, lora_alpha=16, alpha_pattern={f"^{other[5:]}": 2}) == (16, 2)
    assert alphas(r=4, lora_alpha=16, alpha_pattern={"o_v": 3, "to_v": 2, other[5:]: 8}) == (16, 2)  # PEFT takes the first
    for pattern in (".*", "(a+)+$", "to_[qv]"):  # text is compared, never run
        with pytest.raises(E.AdapterScaleError, match="regular expression"):
            alphas(r=4, lora_alpha=16, alpha_pattern={pattern: 2})
    assert alphas(r=4, lora_alpha=8, use_rslora=True) == (16, 16)
    assert alphas(r=4, alpha=16) == (4, 4)  # no field of a LoRA's
    with pytest.raises(E.AdapterTooLarge):
        alphas(r=10**9, lora_alpha=16)
    with pytest.raises(E.AdapterTooLarge):
        alphas(r=4, rank_pattern={"to_q": 10**9})
    with pytest.raises(E.AdapterScaleError):
        alphas(r=4, lora_alpha=1e30)
    with pytest.raises(E.AdapterScaleError):
        alphas(r=4, lora_alpha="16")
    with pytest.raises(E.AdapterFormatError):
        alphas(r="4")
    with pytest.raises(E.AdapterTargetError):
        alphas(r=4, use_dora=True)


def test_folders(tmp_path):
    down, up = pair()
    tensors = {f"base_model.model.{Q[5:]}.lora_A.weight": down, f"base_model.model.{Q[5:]}.lora_B.weight": up}
    save_file(tensors, tmp_path / "adapter_model.safetensors")
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "peft_type": "LORA"}')
    assert Adapter.load(tmp_path).modules[Q].scale == 2
    (tmp_path / "adapter_config.json").write_text("[")
    with pytest.raises(E.AdapterFormatError):
        Adapter.load(tmp_path)
    (tmp_path / "adapter_config.json").unlink()
    (tmp_path / "adapter_model.safetensors").rename(tmp_path / "pytorch_lora_weights.safetensors")
    assert Adapter.load(tmp_path).modules[Q].scale == 1
    (tmp_path / "pytorch_lora_weights.safetensors").rename(tmp_path / "other.safetensors")
    assert Adapter.load(tmp_path).modules[Q].scale == 1  # the only one there
    (tmp_path / "another.safetensors").write_bytes((tmp_path / "other.safetensors").read_bytes())
    with pytest.raises(E.AdapterError, match="2 .safetensors files in this folder"):
        Adapter.load(tmp_path)
    (tmp_path / "another.safetensors").unlink()
    (tmp_path / "other.safetensors").unlink()
    (tmp_path / "adapter_model.bin").write_bytes(b"PK")
    with pytest.raises(E.UnsafeFormat):
        Adapter.load(tmp_path)


PEFT_PAIR = [f"base_model.model.{Q[5:]}.lora_A.weight", f"base_model.model.{Q[5:]}.lora_B.weight"]


@pytest.mark.parametrize("name", ["adapter_model.safetensors", "renamed.safetensors"])
def test_a_peft_file_named_directly_has_the_configuration_beside_it(tmp_path, name):
    def load(**config):
        (tmp_path / "adapter_config.json").write_text(json.dumps({"r": 4, "lora_alpha": 8, "peft_type": "LORA", **config}))
        return Adapter.load(path)

    path = saved(tmp_path / name, dict(zip(PEFT_PAIR, pair(), strict=True)))
    assert load().modules[Q].scale == 2
    assert load(use_rslora=True).modules[Q].scale == 4
    assert load(alpha_pattern={"to_q": 2}).modules[Q].scale == 0.5
    for refused in ({"use_dora": True}, {"init_lora_weights": "pissa"}):
        with pytest.raises(E.AdapterTargetError):
            load(**refused)
    link = tmp_path / "elsewhere" / "adapter_config.json"
    link.parent.mkdir()
    link.symlink_to(tmp_path / "adapter_config.json")
    path = path.rename(link.with_name(name))
    with pytest.raises(E.UnsafePath):
        Adapter.load(path)


def test_the_configuration_of_another_adapter_does_not_matter(tmp_path):
    """One may lie beside many files; those of kohya's tools have alphas of their own."""
    (tmp_path / "adapter_config.json").write_text('{"r": 4, "lora_alpha": 8, "use_dora": true}')
    assert Adapter.load(foreign(tmp_path, dict(zip((KD, KU), pair(), strict=True)))).modules[Q].scale == 1


def test_an_untitled_file_keeps_its_name_as_title(tmp_path):
    down, up = pair()
    for name, metadata in (("ink", None), ("ink wash", {"ss_output_name": "None"})):
        path = saved(tmp_path / f"{name}.safetensors", {KD: down, KU: up}, metadata)
        again = Adapter.load(path).save(tmp_path / "other.safetensors")
        with safe_open(again, "pt") as file:
            assert file.metadata()["modelspec.title"] == name
        assert Adapter.load(again).name == name
    plain = Adapter({Q: LoraFactors(down, up, 4.0)}).save(tmp_path / "plain.safetensors")
    assert Adapter.load(Adapter.load(plain).save(tmp_path / "other.safetensors")).name == "plain"


@pytest.mark.parametrize("layout", ["kohya", "peft"])
@pytest.mark.parametrize("weight", [20, -20, 100, 0.0])
def test_any_weight_can_be_saved(tmp_path, layout, weight):
    """alpha / rank is limited in a file; what exceeds it goes into the factors."""
    adapter = small()
    back = Adapter.load(adapter.scaled(weight).save(tmp_path / "a.safetensors", layout=layout, dtype="fp32"))
    torch.testing.assert_close(back.modules[Q].delta(), adapter.modules[Q].delta() * weight, rtol=1e-5, atol=1e-6 * abs(weight))


def test_foreign_cards(tmp_path):
    def card(width, metadata=None, key=CROSS):
        down, up = pair(4, width, 64)
        return Adapter.load(foreign(tmp_path, {f"{key}.lora_A.weight": down, f"{key}.lora_B.weight": up}, metadata)).card

    assert [card(w).family for w in (768, 1024, 2048, 32)] == ["sd1", "sd2", "sdxl", None]
    assert card(32, {"ss_v2": "True"}).family == "sd2"
    assert card(32, {"ss_v2": "False", "ss_base_model_version": "sdxl_base_v1-0"}).family == "sdxl"
    assert card(32, {"modelspec.architecture": "stable-diffusion-v1/lora"}).family == "sd1"
    assert card(32, None, "text_encoder_2.text_model.encoder.layers.0.self_attn.q_proj").family == "sdxl"
    rich = {
        "ss_sd_model_name": "/home/someone/models/base.safetensors",
        "modelspec.title": "a\x1b[31mred\n",
        "modelspec.resolution": "768x512",
        "modelspec.prediction_type": "v",
        "ss_network_dim": "4",
        "ss_network_alpha": "2.0",
        "lora_booth.card": "{",
    }
    found = card(768, rich)
    assert (found.base_model, found.title, found.resolution) == ("base.safetensors", "a [31mred", 768)
    assert (found.prediction_type, found.rank, found.alpha) == ("v_prediction", 4, 2.0)
    bulk = {"ss_tag_frequency": "x" * 200_000}
    assert card(768, bulk).family == "sd1"  # kohya's training log is no reason to refuse
    ours = Card(family="sd1", token="sks", title="x" * 10_000)
    text = json.dumps({**ours.__dict__, "consent": "forged", "steps": "many"})
    assert card(32, {"lora_booth.card": text}) == Card(family="sd1", token="sks", title="x" * 500)


@pytest.mark.parametrize(
    "key, module",
    [
        ("unet.time_embedding.linear_1", "unet.time_embedding.linear_1"),
        ("lora_unet_conv_in", "unet.conv_in"),
        ("lora_unet_label_emb_0_2", "unet.add_embedding.linear_2"),
        ("lora_te2_text_projection", "text_encoder_2.text_projection"),
    ],
)
def test_rare_modules_are_left_out_and_listed_unless_allowed(tmp_path, key, module):
    down, up = pair()
    path = foreign(tmp_path, {f"{key}.lora_down.weight": down, f"{key}.lora_up.weight": up, KD: down, KU: up})
    with pytest.warns(E.LeftOutWarning, match=rf"foreign.safetensors: changes {module}, .* left out .*allow=\['{module}'\]"):
        assert Adapter.load(path).modules.keys() == {Q}
    with pytest.warns(E.LeftOutWarning):
        Adapter.load(path).save(tmp_path / "kohya.safetensors")
    loaded = Adapter.load(path, allow=[module])
    assert loaded.modules.keys() == {Q, module}
    if module.startswith("unet."):
        loaded.save(tmp_path / "peft.safetensors", layout="peft")
    with pytest.raises(E.AdapterTargetError, match=module):
        loaded.save(tmp_path / "other.safetensors", layout="kohya")


# what a file is


def lora_of(*names, ends=(".lora_A.weight", ".lora_B.weight")):
    return [name + end for name in names for end in ends]


KOHYA = (".lora_down.weight", ".lora_up.weight", ".alpha")
FOREIGN = {  # keys -> what the message names
    "FLUX": [
        lora_of("transformer.single_transformer_blocks.0.attn.to_k", "transformer.transformer_blocks.1.attn.to_out.0"),
        lora_of("diffusion_model.double_blocks.0.img_attn.qkv", "diffusion_model.single_blocks.9.linear2"),
        lora_of("lora_unet_double_blocks_0_img_attn_proj", "lora_unet_single_blocks_9_modulation_lin", ends=KOHYA),
        lora_of("double_blocks.0.processor.proj_lora1", ends=(".down.weight", ".up.weight")),
        [
            "double_blocks.0.img_attn.norm.key_norm.scale",
            *lora_of("double_blocks.0.img_attn.proj"),
            "vector_in.out_layer.lora_B.bias",
        ],
        [
            *lora_of("lora_te1_text_model_encoder_layers_0_mlp_fc1", ends=(*KOHYA, ".dora_scale")),
            *lora_of("lora_transformer_single_transformer_blocks_13_attn_to_q", ends=(*KOHYA, ".dora_scale")),
        ],
        lora_of("base_model.model.single_transformer_blocks.3.proj_mlp"),
    ],
    "Stable Diffusion 3": [
        lora_of("lora_unet_joint_blocks_0_context_block_attn_qkv", ends=KOHYA),
        lora_of("diffusion_model.joint_blocks.3.x_block.attn.proj"),
        lora_of("transformer.transformer_blocks.0.attn.add_k_proj"),
        lora_of("lora_te3_encoder_block_0_layer_0_SelfAttention_q", ends=KOHYA),
        lora_of("text_encoder_3.encoder.block.0.layer.0.SelfAttention.q"),
    ],
    "Qwen-Image": [
        lora_of("transformer_blocks.0.attn.to_k", "transformer_blocks.1.attn.to_q", ends=KOHYA),
        lora_of("transformer.transformer_blocks.0.img_mlp.net.2"),
        lora_of("lora_unet_transformer_blocks_0_txt_mod_1", ends=KOHYA),
    ],
    "Z-Image": [
        lora_of("diffusion_model.layers.0.attention.to_q", "diffusion_model.layers.29.feed_forward.w1"),
        lora_of("lora_unet_noise_refiner_0_attention_qkv", ends=KOHYA),
        lora_of("transformer.layers.3.attention.to_out.0"),
    ],
    "video": [
        lora_of(
            "diffusion_model.blocks.0.self_attn.q", "diffusion_model.blocks.0.cross_attn.k", "diffusion_model.blocks.0.ffn.0"
        ),
        lora_of("lora_unet_blocks_0_self_attn_q", ends=KOHYA),
        lora_of("transformer.blocks.0.attn1.to_q"),
        lora_of("transformer.transformer_blocks.0.attn1.to_q"),
        ["down_blocks.0.motion_modules.0.temporal_transformer.transformer_blocks.0.attention_blocks.0.to_q.weight"],
    ],
    "Anima": [lora_of("lora_unet_blocks_0_cross_attn_k_proj", "lora_unet_blocks_0_adaln_modulation_cross_attn_1", ends=KOHYA)],
    "Krea 2": [lora_of("lora_unet_blocks_0_attn_gate", "lora_unet_txtmlp_3", ends=KOHYA)],
    "HiDream": [lora_of("diffusion_model.double_stream_blocks.0.block.attn1.to_q")],
    "language model": [
        lora_of("base_model.model.model.layers.0.self_attn.q_proj"),
        lora_of("model.layers.11.mlp.gate_proj"),
        lora_of("base_model.model.transformer.h.0.attn.c_attn"),
    ],
    "textual inversion": [
        ["emb_params"],
        ["clip_l", "clip_g"],
        ["clip_g", "clip_l", "t5xxl"],
        ["<cat-toy>"],
        ["sks"],
        ["string_to_param.*"],
    ],
    "bundled embedding": [[KD, KU, "bundle_emb.my token.clip_l", "bundle_emb.sks.string_to_param.*"]],
    "ControlNet": [
        ["control_model.input_blocks.0.0.weight", "control_model.zero_convs.0.0.weight"],
        ["controlnet_cond_embedding.conv_in.weight", "down_blocks.0.resnets.0.conv1.weight"],
        ["lllite_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q.down.0.weight"],
    ],
    "IP-Adapter": [
        ["image_proj.proj.weight", "ip_adapter.1.to_k_ip.weight"],
        ["ip_adapter.1.to_q_lora.down.weight"],
    ],
    "VAE": [
        ["decoder.conv_in.weight", "decoder.mid_block.attentions.0.to_q.weight", "post_quant_conv.weight"],
        ["first_stage_model.decoder.up.0.block.0.conv1.weight"],
        ["encoder.down.0.block.0.conv1.weight", "decoder.up.0.block.0.conv1.weight"],
        ["vae.decoder.conv_in.lora_A.weight"],
    ],
    "whole checkpoint": [
        ["model.diffusion_model.input_blocks.0.0.weight", "first_stage_model.encoder.conv_in.weight"],
        ["conditioner.embedders.0.transformer.text_model.embeddings.token_embedding.weight"],
    ],
    "whole U-Net": [["conv_in.weight", "down_blocks.0.resnets.0.norm1.weight", "time_embedding.linear_1.weight"]],
    "text encoder": [["text_model.embeddings.token_embedding.weight", "text_model.encoder.layers.0.mlp.fc1.weight"]],
}


@pytest.mark.parametrize("what, keys", [(what, keys) for what, several in FOREIGN.items() for keys in several])
def test_a_refusal_says_what_the_file_is(tmp_path, what, keys):
    path = foreign(tmp_path, {key: torch.ones(4, 8) for key in keys})
    with pytest.raises((E.AdapterTargetError, E.AdapterBaseMismatch), match=what):
        Adapter.load(path)


def test_a_large_checkpoint_is_recognised_by_its_header(tmp_path):
    """Before its size: nobody makes sense of `6938040674 bytes; allowed: 1073741824`."""
    path, size = tmp_path / "sd_xl_base_1.0.safetensors", 3 * 2**30
    entry = {"dtype": "F8_E4M3", "shape": [size], "data_offsets": [0, size]}
    with open(path, "wb") as file:
        file.truncate(file.write(put_together({"model.diffusion_model.out.2.weight": entry})) + size)
    with pytest.raises(E.AdapterTargetError, match="whole checkpoint"):
        Adapter.load(path)


def test_a_length_that_looks_like_a_pickle_is_fine(tmp_path):
    down, up = pair()
    for first in (0x4B50, 0x0280):  # "PK", and a pickle's protocol 2
        path = foreign(tmp_path, {KD: down, KU: up})
        header, data = taken_apart(path.read_bytes())
        text = json.dumps(header).encode().ljust(first)
        assert len(text) == first
        path.write_bytes(put_together(text, data))
        assert Adapter.load(path).modules[Q].rank == 4


# saving


def small(alpha=4.0, rank=4, card=None, **changes):
    down, up = pair(rank)
    return Adapter({Q: LoraFactors(down, up, alpha)}, card or Card(family="sd1", token="sks", **changes))


def test_saving_is_whole_or_not_at_all(tmp_path, monkeypatch):
    path = small().save(tmp_path / "new" / "a.safetensors")
    before = path.read_bytes()

    def full(*_):
        raise OSError(28, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", full)
        with pytest.raises(E.AdapterError, match="No space"):
            small(2.0).save(path)
    with monkeypatch.context() as patch:  # the disk gives back something else
        from lora_booth.adapters import writing

        patch.setattr(writing, "load", lambda *_, **__: small(3.0))
        with pytest.raises(E.AdapterFormatError, match="read back"):
            small(2.0).save(path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_what_is_never_written(tmp_path):
    path = tmp_path / "a.safetensors"
    down, up = pair()
    for factors, error in (
        (LoraFactors(down, up * float("nan"), 4.0), E.AdapterNonFinite),
        (LoraFactors(down, up * 1e6, 4.0), E.AdapterNonFinite),
        (LoraFactors(down, up, float("inf")), E.AdapterScaleError),
        (LoraFactors(down, up[:, :2], 4.0), E.AdapterIncomplete),
    ):
        for layout in ("kohya", "peft"):
            with pytest.raises(error):
                Adapter({Q: factors}, Card()).save(path, layout=layout)
    for module in ("text_encoder_2.text_projection", "unet.nothing", "vae.conv", Q[5:]):
        with pytest.raises(E.AdapterTargetError):
            Adapter({module: LoraFactors(down, up, 4.0)}, Card()).save(path)
    with pytest.raises(E.AdapterTargetError):
        Adapter({"text_encoder_2.text_model.encoder.layers.0.mlp.fc1": LoraFactors(down, up, 4.0)}, Card("sd1")).save(path)
    with pytest.raises(E.AdapterError):
        Adapter({}, Card()).save(path)
    with pytest.raises(E.AdapterFormatError):
        small().save(tmp_path / "a.pt")
    assert list(tmp_path.iterdir()) == []


def test_mixed_alphas_are_folded(tmp_path):
    down, up = pair()
    alphas = {"to_q": 4.0, "to_k": 4.0, "to_v": 1.0, "to_out.0": 0.0}
    adapter = Adapter({Q.replace("to_q", n): LoraFactors(down, up, a) for n, a in alphas.items()}, Card("sd1"))
    tensors = load_file(adapter.save(tmp_path / "a.safetensors", dtype="fp32"))
    assert {v.item() for k, v in tensors.items() if k.endswith(".alpha")} == {4.0}
    assert_same_change(adapter, Adapter.load(tmp_path / "a.safetensors"))
    # one alpha must be possible for every rank: 64 / 1 would be refused by our own reader
    low = LoraFactors(down[:1], up[:, :1], 1.0)
    mixed = Adapter({Q: LoraFactors(*pair(32), 32.0), Q.replace("to_q", "to_v"): low}, Card("sd1"))
    assert_same_change(mixed, Adapter.load(mixed.save(tmp_path / "b.safetensors", dtype="fp32")))


def test_cards_hold_no_path():
    for path in (
        "/home/someone/base.safetensors",
        "C:\\Users\\someone\\base.safetensors",
        "./x/base.safetensors",
        "~/base.safetensors",
    ):
        assert Card(base_model=path).base_model == "base.safetensors"
    assert Card(base_model="owner/model").base_model == "owner/model"
    with pytest.raises(E.SettingsError):
        Card(consent="yes")


def test_scaled_digest_and_size():
    adapter = small()
    assert torch.equal(adapter.scaled(0.5).modules[Q].delta(), adapter.modules[Q].delta() * 0.5)
    assert adapter.nbytes == 2 * 4 * 32 * 4
    assert adapter.digest() == replace(adapter, card=Card()).digest() != adapter.scaled(0.5).digest()


def test_concatenated_is_the_exact_sum(tmp_path):
    one, two = small(8.0), small(2.0, rank=6)
    extra = Q.replace("to_q", "to_v")
    two = replace(two, modules={**two.modules, extra: two.modules[Q]})
    both = concatenated([(one, 0.5), (two, -1.0)])
    assert both.modules[Q].rank == 10 and both.modules[Q].scale == 1 and both.card.token is None
    wanted = 0.5 * one.modules[Q].delta() - two.modules[Q].delta()
    torch.testing.assert_close(both.modules[Q].delta(), wanted, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(both.modules[extra].delta(), -two.modules[extra].delta(), rtol=1e-5, atol=1e-5)
    many = concatenated([(one, 0.1)] * 12)  # 48 ranks in a 32 x 32 module
    assert many.modules[Q].rank == 32
    torch.testing.assert_close(many.modules[Q].delta(), one.modules[Q].delta() * 1.2, rtol=1e-5, atol=1e-4)
    assert Adapter.load(many.save(tmp_path / "many.safetensors", dtype="fp32")).modules[Q].rank == 32
    with pytest.raises(E.AdapterBaseMismatch):
        concatenated([(one, 1.0), (small(card=Card(family="sdxl")), 1.0)])
    with pytest.raises(E.AdapterError):
        concatenated([])


def test_importing_is_cheap():
    import subprocess
    import sys

    code = "import lora_booth.adapters, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=Path(__file__).parents[1]).returncode == 0


def test_a_rank_8_adapter_of_sd15_is_under_3_4_megabytes(tmp_path):
    """All attention of the real U-Net (weightless here): 128 layers, as diffusers' script adapts them."""
    from accelerate import init_empty_weights
    from diffusers import UNet2DConditionModel

    from lora_booth.base.single_file import CONFIGS
    from lora_booth.config import ATTENTION_TARGETS

    config = json.loads((CONFIGS / "sd1" / "unet" / "config.json").read_text())
    with init_empty_weights():
        unet = UNet2DConditionModel.from_config(config)
    layers = {n: m for n, m in unet.named_modules() if any(n.endswith("." + target) for target in ATTENTION_TARGETS)}
    assert len(layers) == 128
    modules = {
        f"unet.{name}": LoraFactors(torch.randn(8, layer.in_features), torch.randn(layer.out_features, 8), 8.0)
        for name, layer in layers.items()
    }
    card = Card(family="sd1", base_model="stable-diffusion-v1-5/stable-diffusion-v1-5", token="sks", class_noun="dog")
    for layout in ("kohya", "peft"):
        file = Adapter(modules, card).save(tmp_path / f"{layout}.safetensors", layout=layout)
        assert file.stat().st_size < 3.4e6
        assert Adapter.load(file).modules.keys() == modules.keys()
