"""A base in 8 or 4 bits: trained, left as it was, counted; what it teaches fits the plain base."""

from __future__ import annotations

import importlib.util
import itertools
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pipelines import make_pipeline, random_adapter, same_state, state
from torch import nn

import lora_booth.base.quantization as quantization
from lora_booth.adapters.tools.bake import baked
from lora_booth.adapters.tools.extract import extract
from lora_booth.base.base_model import BaseModel
from lora_booth.base.generation import generate_images
from lora_booth.base.quantization import (
    packed_and_state,
    packed_bytes,
    packing_of,
    quantized_bytes,
    state_of,
    storage_bytes,
    tensors_of,
    unpacked,
)
from lora_booth.config import LoraSpec, Quantization, TrainingConfig, settled
from lora_booth.errors import BaseModelError, MissingExtraError, SettingsError
from lora_booth.injection.attached import attached
from lora_booth.injection.trainable import trainable
from lora_booth.planning import budget
from lora_booth.planning.counting import inputs
from lora_booth.planning.planning import DoesNotFit, plan
from lora_booth.planning.shapes import without_weights
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training.class_images import image_key
from lora_booth.training.job import Job
from lora_booth.training.latents import Batch
from lora_booth.training.loop import dreambooth_loss, predict
from lora_booth.training.training_mode import training_mode

LORA = LoraSpec(rank=2, target_modules=("to_q", "to_v", "to_out.0", "ff.net.2"))
CONFIG = TrainingConfig(steps=3, class_images=2, warmup_steps=0, learning_rate=1e-2, resolution=64, prior_loss_weight=0.0)

bitsandbytes = pytest.mark.skipif(importlib.util.find_spec("bitsandbytes") is None, reason="bitsandbytes is not installed")
KINDS = ["int8", pytest.param("nf4", marks=bitsandbytes)]


@pytest.fixture(params=KINDS)
def packed(folders: dict[str, Path], request: pytest.FixtureRequest) -> BaseModel:
    return BaseModel.load(folders["sd1"], dtype=torch.float32, device="cpu", quantize=request.param)


@pytest.fixture
def rounded(packed: BaseModel) -> BaseModel:
    """A plain base with the weights that the packed one stands for."""
    base = BaseModel.from_pipeline(make_pipeline("sd1"), name="rounded")
    for name, layer in packed.unet.named_modules():
        if packing_of(layer):
            base.unet.get_submodule(name).weight.data = unpacked(layer.weight, state_of(layer)).clone()
    return base


def packed_state(base: BaseModel) -> dict[str, torch.Tensor]:
    """A copy of every tensor of the U-Net, scales included."""
    return {str(i): tensor.clone() for i, tensor in enumerate(tensors_of(base.unet))}


def gradients(base: BaseModel, *, lean: bool) -> dict[str, torch.Tensor]:
    config = replace(CONFIG, lean=lean)
    with trainable(base, LORA) as lora, training_mode(base, lora, config):
        torch.manual_seed(0)
        for name, parameter in lora.parameters.items():
            if name.endswith(".up"):
                nn.init.normal_(parameter, std=0.1)
        latents, text, _ = inputs(base, 2, (64, 64))
        torch.manual_seed(1)
        latents, noise = torch.randn_like(latents), torch.randn_like(latents)
        text = replace(text, states=torch.randn_like(text.states))
        batch = Batch(latents, noise, torch.tensor([10, 700]), ("", ""), None, photos=2)
        dreambooth_loss(base, batch, predict(base, batch, text), prior_loss_weight=0.0).backward()
        return {name: parameter.grad.clone() for name, parameter in lora.parameters.items()}


def test_linear_layers_are_packed_and_nothing_else(packed: BaseModel, folders: dict[str, Path]) -> None:
    plain = BaseModel.load(folders["sd1"], dtype=torch.float32, device="cpu")
    kind = packed.quantized
    assert kind is not None and plain.quantized is None
    largest = {"int8": 0.5 / 127, "nf4": 0.2}[kind] * 1.001  # of the errors, as a share of a layer's largest value
    assert packed.fingerprint == plain.fingerprint  # before and
    kinds = {name: type(layer) for name, layer in plain.unet.named_modules()}
    kept = {name: value for name, value in plain.unet.state_dict().items()}
    for name, layer in packed.unet.named_modules():
        assert packing_of(layer) == (kind if kinds[name] is nn.Linear else None)
        if packing_of(layer):
            original = kept[f"{name}.weight"]
            error = (unpacked(layer.weight, state_of(layer)) - original).abs().max() / original.abs().max()
            assert 0 < error < largest and layer.weight.itemsize == 1
    same = [key for key in kept if not packing_of(packed.unet.get_submodule(key.rpartition(".")[0])) or key.endswith("bias")]
    assert len(same) > 30 and all(torch.equal(kept[key], packed.unet.state_dict()[key]) for key in same)
    assert packed.fingerprint == plain.fingerprint  # after the weights were read
    assert packed.dtype == torch.float32 and packed.device.type == "cpu"


def test_weights_are_read_when_they_are_needed(packed: BaseModel) -> None:
    assert packed.unread("unet") is not None and all(p.is_meta for p in packed.structure["unet"].parameters())
    layers = [layer for layer in packed.structure["unet"].modules() if packing_of(layer)]
    assert len(layers) > 20 and all(layer.weight.is_meta for layer in layers)
    assert not any(layer.weight.is_meta for layer in packed.unet.modules() if packing_of(layer))


@pytest.mark.parametrize("lean", [True, False])
def test_gradients_are_those_of_the_rounded_base(packed: BaseModel, rounded: BaseModel, lean: bool) -> None:
    before = packed_state(packed)
    found, wanted = gradients(packed, lean=lean), gradients(rounded, lean=lean)
    assert found.keys() == wanted.keys() and len(found) > 20
    for name, gradient in found.items():
        assert wanted[name].any() and torch.allclose(gradient, wanted[name], rtol=1e-3, atol=1e-6), name
    assert same_state(before, packed_state(packed)) and not any(hasattr(m, "lora_A") for m in packed.unet.modules())


def test_an_adapter_of_the_packed_base_is_one_of_the_plain_base(
    packed: BaseModel, folders: dict[str, Path], photos: Path, tmp_path: Path
) -> None:
    plain = BaseModel.load(folders["sd1"], dtype=torch.float32, device="cpu")
    rex = Subject.from_folder(photos, token="sks", class_noun="dog")
    _ = packed.unet
    before = packed_state(packed)
    adapter, other = (train(base, rex, lora=LORA, config=CONFIG) for base in (packed, plain))
    assert same_state(before, packed_state(packed))
    assert adapter.modules.keys() == other.modules.keys() and adapter.card.base_hash == other.card.base_hash
    assert all(adapter.modules[path].down.shape == other.modules[path].down.shape for path in other.modules)
    weights = state(plain.pipeline)
    pictures = {}
    for name, base in (("packed", packed), ("plain", plain)):
        with attached(base, [(adapter, 1.0)]) as pipeline:
            pictures[name] = generate_images(pipeline, "a sks dog", [1], steps=2, guidance=2.0, size=64)
    assert same_state(weights, state(plain.pipeline)) and same_state(before, packed_state(packed))
    assert len(pictures["packed"]) == len(pictures["plain"]) == 1


def test_pictures_with_an_adapter_are_those_of_the_rounded_base(packed: BaseModel, rounded: BaseModel) -> None:
    adapter = random_adapter(rounded, LORA)
    latents, text, _ = inputs(packed, 1, (64, 64))
    torch.manual_seed(1)
    latents, states = torch.randn_like(latents), torch.randn_like(text.states)
    found = []
    with torch.no_grad():
        for base in (packed, rounded):
            plain = base.unet(latents, torch.tensor([5]), states).sample
            with attached(base.pipeline, [(adapter, 0.7)]):
                found.append(base.unet(latents, torch.tensor([5]), states).sample)
            assert not torch.allclose(plain, found[-1], atol=1e-3)
            assert torch.equal(plain, base.unet(latents, torch.tensor([5]), states).sample)
    assert torch.allclose(*found, rtol=1e-3, atol=1e-4)
    assert found and gradients(packed, lean=False)  # after pictures it can still be trained


@pytest.mark.parametrize("family", ["sd1", "sdxl"])
@pytest.mark.parametrize("kind", KINDS)
def test_the_memory_of_its_weights_is_known_before(folders: dict[str, Path], family: str, kind: Quantization) -> None:
    base = BaseModel.load(folders[family], dtype=torch.bfloat16, device="cpu", quantize=kind)
    plain = BaseModel.load(folders[family], dtype=torch.bfloat16, device="cpu")
    assert storage_bytes(tensors_of(base.unet)) == pytest.approx(quantized_bytes(plain.unet, kind), rel=0.001)
    large = nn.Linear(1280, 5120, device="meta", dtype=torch.float16)
    bits = {"int8": 8.01, "nf4": 4.13}[kind]  # for a value
    assert packed_bytes(large, kind) == pytest.approx(large.weight.numel() * bits / 8, rel=0.001)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_int8_rounds_to_the_nearest_level(dtype: torch.dtype) -> None:
    weight = (torch.randn(6, 320) * torch.tensor([[1.0], [0.02], [1e-3], [30.0], [1e-5], [0.0]])).to(dtype)
    values, scale = packed_and_state(weight, "int8")
    assert values.dtype == torch.int8 and scale.shape == (6, 1) and scale.dtype == dtype
    found = unpacked(values, scale)
    assert found.dtype == dtype and not found[5].any() and values[:4].abs().amax(1).ge(126).all()
    step, size, limits = scale.float(), weight.float().abs(), torch.finfo(dtype)
    of_dtype = size * limits.eps + limits.tiny * limits.eps * (1 + size / step).nan_to_num()  # of scale and product
    assert ((found.float() - weight.float()).abs() <= 0.501 * step + of_dtype).all()
    weight[0, 0] = torch.nan  # a broken base stays visibly broken
    assert not unpacked(*packed_and_state(weight, "int8"))[0].isfinite().any()


@bitsandbytes
def test_int8_has_the_levels_of_bitsandbytes() -> None:
    from bitsandbytes.functional import int8_vectorwise_quant

    weight = torch.randn(64, 320).half()
    theirs, largest, _ = int8_vectorwise_quant(weight)
    values, scale = packed_and_state(weight.float(), "int8")
    assert torch.allclose(scale[:, 0] * 127, largest, rtol=1e-5)
    assert (values.int() - theirs.int()).abs().max() <= 1 and (values == theirs).float().mean() > 0.99


def test_an_int8_base_is_saved_as_a_plain_one(folders: dict[str, Path], tmp_path: Path) -> None:
    from diffusers import UNet2DConditionModel

    base = BaseModel.load(folders["sd1"], dtype=torch.float32, device="cpu", quantize="int8")
    base.unet.save_pretrained(tmp_path)
    found = UNet2DConditionModel.from_pretrained(tmp_path)
    assert not any(map(packing_of, found.modules()))
    latents, text, _ = inputs(base, 1, (64, 64))
    with torch.no_grad():
        results = [one(torch.ones_like(latents), torch.tensor([5]), text.states).sample for one in (base.unet, found)]
    assert torch.equal(*results)


def test_an_int8_layer_keeps_nothing_for_the_gradient(folders: dict[str, Path]) -> None:
    base = BaseModel.load(folders["sd1"], dtype=torch.float32, device="cpu", quantize="int8")
    layer = next(layer for layer in base.unet.modules() if packing_of(layer))
    x = torch.randn(3, 5, layer.in_features, requires_grad=True)
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda tensor: kept.append(tensor) or tensor, lambda tensor: tensor):
        result = layer(x)
    assert not kept
    weight = layer.weight * layer.scale
    assert torch.equal(result, nn.functional.linear(x, weight, layer.bias))
    gradient = torch.randn_like(result)
    assert torch.allclose(torch.autograd.grad(result, x, gradient)[0], gradient @ weight, atol=1e-6)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as PyTorch's own layer
        result = layer(x)
    assert result.dtype == torch.bfloat16 and torch.autograd.grad(result.sum(), x)[0].dtype == torch.float32


@pytest.mark.slow
def test_it_is_planned_and_offered_but_never_taken() -> None:
    config = replace(CONFIG, prior_loss_weight=1.0)  # with class images to draw, for which the whole base is there
    options: dict[str, Any] = {"lora": LORA, "config": config, "gpu": "T4"}
    plain = plan("toybox", **options)
    chosen, offered, packed = plain.chosen, plain.offered, {}
    for kind in ("int8", "nf4"):
        asked = plan("toybox", **options, quantize=kind)
        assert asked.offered is None and asked.chosen is not None and f", {kind})" in str(asked)
        packed[kind] = asked.chosen
    assert chosen is not None and offered is not None
    assert "quantize" not in {name for one in plain.forecasts for name in one.settings}
    assert offered.settings == {"quantize": "int8"} and offered.phases == packed["int8"].phases
    assert packed["int8"].settings == packed["nf4"].settings == {} and "if you ask for it" in str(plain)
    widest = 2 * 1024 * 128  # the largest linear layer, unpacked to fp16
    assert all(one.training["working memory"] - chosen.training["working memory"] == widest for one in packed.values())
    least = min(one.peak for one in plain.forecasts)
    assert packed["nf4"].peak < packed["int8"].peak < least
    tight = plan("toybox", **options, vram_gb=(packed["int8"].peak + least) / 2e9)
    assert tight.chosen is None
    with pytest.raises(DoesNotFit, match='quantize="nf4" .*would need'):  # the smallest, as none fits with its reserve
        _ = tight.config
    with pytest.raises(SettingsError, match="quantize 'int3'"):
        plan("toybox", quantize="int3")  # type: ignore[arg-type]


@pytest.mark.parametrize(("family", "kind", "size"), [
    ("sd1", "int8", 1.45e9), ("sd1", "nf4", 1.32e9), ("sdxl", "int8", 2.9e9), ("sdxl", "nf4", 1.82e9),
])  # fmt: skip
def test_published_models(family: str, kind: Quantization, size: float) -> None:
    assert quantized_bytes(without_weights(family, torch.float16).unet, kind) == pytest.approx(size, rel=0.01)


def test_a_packed_base_is_planned_as_it_is(packed: BaseModel, monkeypatch: pytest.MonkeyPatch) -> None:
    found = plan(packed, lora=LORA, config=CONFIG)
    assert found.dtype == f"float32, {packed.quantized}"
    weights = found.forecasts[0].training["weights"]
    assert weights == pytest.approx(storage_bytes(tensors_of(packed.unet)), rel=0.001)
    monkeypatch.setattr(budget, "free_bytes", lambda device: 0)
    assert budget.available_bytes(packed, torch.device("cpu")) >= weights


def test_runs_and_class_images_know_it(packed: BaseModel, folders: dict[str, Path], photos: Path) -> None:
    plain = BaseModel.load(folders["sd1"], dtype=torch.float32, device="cpu")
    rex = Subject.from_folder(photos, token="sks", class_noun="dog")
    facts = [Job(base, [rex], LORA, settled(CONFIG, base, 3)).facts["base"] for base in (packed, plain)]
    assert facts[0] == facts[1] | {"dtype": f"float32, {packed.quantized}"} and facts[1]["dtype"] == "float32"
    assert len({image_key(base, "dog", "cat", (64, 64), 0) for base in (packed, plain)}) == 2


def test_sums_of_its_weights_are_refused(packed: BaseModel, folders: dict[str, Path]) -> None:
    plain = BaseModel.load(folders["sd1"], dtype=torch.float32, device="cpu")
    adapter = random_adapter(plain)
    remedy = f'load it without quantize="{packed.quantized}"'
    with pytest.raises(BaseModelError, match=f"quantized, and baking needs its weights; {remedy}"):
        baked(packed, [(adapter, 1.0)], dtype=torch.float16)
    for pair in itertools.permutations((packed, plain)):
        with pytest.raises(BaseModelError, match="quantized, and extraction needs"):
            extract(*pair, rank=2)


def test_a_pipeline_that_the_user_has_quantized(packed: BaseModel, folders: dict[str, Path]) -> None:
    """Adapters fit it; it has a fingerprint that is nobody else's, so nothing is said of other weights."""
    own = BaseModel.from_pipeline(packed.pipeline)
    assert len(own.fingerprint) == 64 and own.quantized is None
    adapter = random_adapter(BaseModel.load(folders["sd1"], dtype=torch.float32, device="cpu"), LORA)
    with attached(own, [(adapter, 1.0)]), attached(own.pipeline, [(adapter, 1.0)]):
        pass


def test_rank_is_checked_against_the_layer_and_not_its_bytes(packed: BaseModel) -> None:
    with pytest.raises(SettingsError, match="at most 16"), trainable(packed, replace(LORA, rank=300)):
        pass
    with trainable(packed, replace(LORA, rank=16)):
        pass


def test_what_cannot_be_had_is_refused_by_name(folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(SettingsError, match="quantize 'int3'; needed: 'int8' or 'nf4' or None"):
        BaseModel.load(folders["sd1"], quantize="int3")  # type: ignore[arg-type]
    monkeypatch.setattr(quantization.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingExtraError, match=r"pip install 'lora-booth\[quant\]'"):
        BaseModel.load(folders["sd1"], quantize="nf4")


@pytest.mark.parametrize("kind", KINDS)
def test_a_device_that_cannot_is_refused_by_name(
    folders: dict[str, Path], monkeypatch: pytest.MonkeyPatch, kind: Quantization
) -> None:
    def cannot(weight: torch.Tensor, kind: Quantization) -> Any:
        raise NotImplementedError("no kernel for this device")

    monkeypatch.setattr(quantization, "packed_and_state", cannot)
    with pytest.raises(SettingsError, match=rf'quantize="{kind}" does not work on cpu .*no kernel for this device.*without it'):
        BaseModel.load(folders["sd1"], device="cpu", quantize=kind)
