"""BaseModel: recognised from the model itself, loaded from everywhere, and equal to the stock pipeline in all it computes."""

from __future__ import annotations

import gc
import json
import shutil
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import cpu_offload
from diffusers import (
    AutoencoderKL,
    AutoencoderTiny,
    DDIMScheduler,
    EDMDPMSolverMultistepScheduler,
    EDMEulerScheduler,
    FlowMatchEulerDiscreteScheduler,
    LatentConsistencyModelPipeline,
    StableDiffusionImg2ImgPipeline,
    StableDiffusionXLImg2ImgPipeline,
    UNet2DConditionModel,
    UniPCMultistepScheduler,
)
from ldm_naming import checkpoint, save_checkpoint
from pipelines import KINDS, make_pipeline, random_adapter, same_state, save, state, tokenizer
from safetensors.torch import save_file
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTextModelWithProjection

from lora_booth.base import base_model, single_file
from lora_booth.base.base_model import BaseModel, default_device, default_dtype, without_collections
from lora_booth.base.diffusers_folder import SUCCESSORS
from lora_booth.base.families import is_hub_id
from lora_booth.config import LoraSpec
from lora_booth.errors import BaseModelError, SettingsError, reason_of
from lora_booth.injection.trainable import trainable

FAMILY = {"sd1": "sd1", "sd2": "sd2", "sd2-v": "sd2", "sd2-zsnr": "sd2", "sdxl": "sdxl"}
PREDICTION = {"sd1": "epsilon", "sd2": "epsilon", "sd2-v": "v_prediction", "sd2-zsnr": "v_prediction", "sdxl": "epsilon"}
ORIGINAL = ("sd1", "sd2-v", "sdxl")  # one for each naming of original checkpoints
PROMPTS = ["a photo of sks dog", "a dog"]


def test_garbage_is_not_looked_for_while_loading_but_again_afterwards(
    folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    looked: list[bool] = []
    stock = base_model.load_folder
    monkeypatch.setattr(base_model, "load_folder", lambda *a, **k: looked.append(gc.isenabled()) or stock(*a, **k))  # type: ignore[func-returns-value]
    assert gc.isenabled()
    BaseModel.load(folders["sd1"], device="cpu")
    assert looked == [False] and gc.isenabled()
    with pytest.raises(BaseModelError):
        BaseModel.load(tmp_path / "none.safetensors")
    assert gc.isenabled()
    with without_collections():
        assert not gc.isenabled()
        with without_collections():
            pass
        assert not gc.isenabled()
    assert gc.isenabled()


# --- recognised and loaded -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_recognised_from_the_model(kind: str) -> None:
    base = BaseModel.from_pipeline(make_pipeline(kind), name="tiny")
    assert (base.family.name, base.prediction_type, base.name) == (FAMILY[kind], PREDICTION[kind], "tiny")
    assert (base.resolution, base.pixels_per_latent) == (64, 8)
    assert list(base.text_encoders) == list(base.family.text_encoders)
    assert base.alphas_cumprod.shape == (1000,)
    assert (base.alphas_cumprod[-1] == 0) == (kind == "sd2-zsnr")


@pytest.mark.parametrize("kind", KINDS)
def test_folder(kind: str, folders: dict[str, Path]) -> None:
    base = BaseModel.load(folders[kind], dtype=torch.float32, device="cpu")
    assert (base.family.name, base.prediction_type, base.name) == (FAMILY[kind], PREDICTION[kind], f"tiny-{kind}")
    assert same_state(state(base.pipeline), state(make_pipeline(kind)))
    assert not any(module.training for module in base.components.values())


@pytest.mark.parametrize("kind", KINDS)
def test_hub_id_with_the_hub_switched_off(kind: str, folders: dict[str, Path], hub: Callable[[str, Path], str]) -> None:
    base = BaseModel.load(hub(f"some-one/tiny.{kind}", folders[kind]), dtype=torch.float32, device="cpu")
    assert (base.family.name, base.name) == (FAMILY[kind], f"some-one/tiny.{kind}")
    assert same_state(state(base.pipeline), state(make_pipeline(kind)))


@pytest.mark.parametrize("kind", KINDS)
def test_single_file_with_a_config_folder(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file = save_checkpoint(make_pipeline(kind), tmp_path / "dreamy.safetensors")
    base = BaseModel.load(file, dtype=torch.float32, device="cpu", config=folders[kind])
    assert (base.family.name, base.prediction_type, base.name) == (FAMILY[kind], PREDICTION[kind], "dreamy")
    assert same_state(state(base.pipeline), state(make_pipeline(kind)))
    assert not any(module.training for module in base.components.values())
    stock = make_pipeline(kind)
    same = BaseModel.from_pipeline(stock)
    torch.testing.assert_close(base.encode_text(PROMPTS).states, same.encode_text(PROMPTS).states)
    assert base.fingerprint == same.fingerprint


@pytest.fixture
def tiny_configs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The tiny pipelines' configurations in place of the built-in ones, without weights and tokenizers as these."""
    for kind in ORIGINAL:
        folder = save(kind, tmp_path / "configs" / FAMILY[kind])
        for part in (*folder.glob("tokenizer*"), *folder.glob("*/*.safetensors")):
            shutil.rmtree(part) if part.is_dir() else part.unlink()
    monkeypatch.setattr(single_file, "CONFIGS", tmp_path / "configs")


@pytest.mark.slow
@pytest.mark.parametrize("kind", ORIGINAL)
def test_single_file_with_the_built_in_config(
    kind: str, tiny_configs: None, tmp_path: Path, hub: Callable[[str, Path], str]
) -> None:
    words = tokenizer()
    words.save_pretrained(tmp_path / "clip")
    hub("openai/clip-vit-large-patch14", tmp_path / "clip")
    file = save_checkpoint(make_pipeline(kind), tmp_path / "dreamy.safetensors")
    base = BaseModel.load(file, dtype=torch.float32, device="cpu")
    assert (base.family.name, base.prediction_type) == (FAMILY[kind], PREDICTION[kind])
    assert same_state(state(base.pipeline), state(make_pipeline(kind)))
    if kind == "sd1":
        assert base.tokenizer.pad_token == "<|endoftext|>"
    else:
        assert getattr(base.pipeline, "tokenizer_2", base.tokenizer).pad_token == "!"


# what a checkpoint says of itself -> the prediction type, and whether the terminal SNR is zero
STATED: dict[str, tuple[str, dict[str, str], tuple[str, ...], tuple[str, bool]]] = {
    "nothing": ("sd1", {}, (), ("epsilon", False)),
    "velocity": ("sdxl", {}, ("v_pred",), ("v_prediction", False)),
    "zero terminal SNR": ("sdxl", {}, ("v_pred", "ztsnr"), ("v_prediction", True)),
    "the same of SD 1.x": ("sd1", {}, ("v_pred", "ztsnr"), ("v_prediction", True)),
    "noise and zero SNR": ("sd1", {}, ("ztsnr",), ("epsilon", True)),
    "a key before metadata": ("sdxl", {"modelspec.prediction_type": "epsilon"}, ("v_pred",), ("v_prediction", False)),
    "metadata": ("sd2-v", {"modelspec.prediction_type": "v"}, (), ("v_prediction", False)),
    "another spelling": ("sd2-v", {"modelspec.prediction_type": "V-Prediction"}, (), ("v_prediction", False)),
    "noise": ("sd2-v", {"modelspec.prediction_type": "epsilon"}, (), ("epsilon", False)),
    "an architecture": ("sd2-v", {"modelspec.architecture": "stable-diffusion-v2-512"}, (), ("epsilon", False)),
}


@pytest.mark.slow
@pytest.mark.parametrize("case", STATED)
def test_what_a_checkpoint_says_of_itself(
    case: str, tiny_configs: None, tmp_path: Path, hub: Callable[[str, Path], str]
) -> None:
    kind, metadata, keys, expected = STATED[case]
    tokenizer().save_pretrained(tmp_path / "clip")
    hub("openai/clip-vit-large-patch14", tmp_path / "clip")
    weights = {name: value.contiguous() for name, value in checkpoint(make_pipeline(kind)).items()}
    save_file(weights | {key: torch.empty(0) for key in keys}, tmp_path / "one.safetensors", metadata)
    base = BaseModel.load(tmp_path / "one.safetensors", dtype=torch.float32, device="cpu")
    assert (base.prediction_type, bool(base.alphas_cumprod[-1] == 0)) == expected
    other = BaseModel.load(tmp_path / "one.safetensors", dtype=torch.float32, device="cpu", prediction_type="epsilon")
    assert other.prediction_type == "epsilon"


@pytest.mark.parametrize(
    ("metadata", "key", "expected"),
    [
        ({}, "edm_mean", "EDM"),
        ({}, "edm_std", "EDM"),
        ({}, "edm_vpred.sigma_max", "EDM"),
        ({"modelspec.prediction_type": "rectified_flow"}, "other", "its prediction type is 'rectified_flow'"),
    ],
)
def test_checkpoints_for_another_loss(
    metadata: dict[str, str], key: str, expected: str, folders: dict[str, Path], tmp_path: Path
) -> None:
    weights = {name: value.contiguous() for name, value in checkpoint(make_pipeline("sdxl")).items()}
    save_file(weights | {key: torch.ones(4)}, tmp_path / "one.safetensors", metadata)
    assert expected in refused(tmp_path / "one.safetensors", config=folders["sdxl"], dtype=torch.float32, device="cpu")


@pytest.mark.slow
def test_sd2_without_metadata_is_tried(tiny_configs: None, tmp_path: Path, hub: Callable[[str, Path], str]) -> None:
    """Its last layer is fitted to repeat the noise, as an epsilon model does, or to answer what is not noise."""
    tokenizer().save_pretrained(tmp_path / "clip")
    hub("openai/clip-vit-large-patch14", tmp_path / "clip")
    for expected in ("epsilon", "v_prediction"):
        pipeline = make_pipeline("sd2-v")
        noise = torch.randn(8, 4, 32, 32, generator=torch.Generator().manual_seed(1))
        seen: list[torch.Tensor] = []
        hook = pipeline.unet.conv_out.register_forward_pre_hook(lambda _, given, seen=seen: seen.append(given[0]))
        with torch.no_grad():
            pipeline.unet(noise, 999, torch.zeros(8, 77, 16))
            hook.remove()
            patches = torch.nn.functional.unfold(seen[0], 3, padding=1).transpose(1, 2).flatten(0, 1)
            wanted = noise if expected == "epsilon" else torch.randn(noise.shape, generator=torch.Generator().manual_seed(2))
            fitted = torch.linalg.lstsq(patches, wanted.flatten(2).transpose(1, 2).flatten(0, 1)).solution
            pipeline.unet.conv_out.weight.copy_(fitted.T.view_as(pipeline.unet.conv_out.weight))
            pipeline.unet.conv_out.bias.zero_()
        weights = {k: v.contiguous() for k, v in checkpoint(pipeline).items()}
        save_file(weights, tmp_path / f"{expected}.safetensors")
        assert (
            BaseModel.load(tmp_path / f"{expected}.safetensors", dtype=torch.float32, device="cpu").prediction_type == expected
        )


@pytest.mark.slow
def test_another_vae(folders: dict[str, Path], tmp_path: Path) -> None:
    """From a pipeline's folder, its own folder and a single file; for a checkpoint without one, and in place of another."""
    options: dict[str, Any] = {"dtype": torch.float32, "device": "cpu"}
    weights = {name: value.contiguous() for name, value in checkpoint(make_pipeline("sd1")).items()}
    vae = {name: value for name, value in weights.items() if name.startswith("first_stage_model.")}
    save_file({name: value for name, value in weights.items() if name not in vae}, tmp_path / "one.safetensors")
    save_file({name.removeprefix("first_stage_model."): value for name, value in vae.items()}, tmp_path / "vae.safetensors")
    message = refused(tmp_path / "one.safetensors", config=folders["sd1"], **options)
    assert "has no vae; pass vae" in message
    for source in (folders["sd1"], folders["sd1"] / "vae", tmp_path / "vae.safetensors"):
        base = BaseModel.load(tmp_path / "one.safetensors", config=folders["sd1"], vae=source, **options)
        assert same_state(state(base.pipeline), state(make_pipeline("sd1")))
    other = make_pipeline("sd1")
    torch.nn.init.ones_(other.vae.decoder.conv_out.bias)
    other.vae.save_pretrained(tmp_path / "other")
    assert same_state(state(BaseModel.load(folders["sd1"], vae=tmp_path / "other", **options).pipeline), state(other))
    assert "no such folder" in refused(folders["sd1"], vae=tmp_path / "nowhere", **options)
    assert "cannot be loaded" in refused(folders["sd1"], vae=folders["sd1"] / "unet", **options)


def test_prediction_type_of_a_folder(folders: dict[str, Path]) -> None:
    base = BaseModel.load(folders["sdxl"], device="cpu", prediction_type="v_prediction")
    assert base.prediction_type == "v_prediction" and BaseModel.load(folders["sdxl"], device="cpu").prediction_type == "epsilon"
    with pytest.raises(BaseModelError, match="prediction type 'vpred' is unknown; allowed: epsilon, v_prediction"):
        BaseModel.load(folders["sdxl"], device="cpu", prediction_type="vpred")


@pytest.mark.parametrize(
    ("names", "variant"),
    [
        (
            ["unet/config.json", "unet/diffusion_pytorch_model.fp16.safetensors", "vae/diffusion_pytorch_model.safetensors"],
            "fp16",
        ),
        (["unet/diffusion_pytorch_model.safetensors.index.fp16.json", "unet/model-00001-of-00002.fp16.safetensors"], "fp16"),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.safetensors"], None),
        (["unet/diffusion_pytorch_model.fp16.safetensors", "unet/diffusion_pytorch_model.bf16.safetensors"], None),
        ([], None),
    ],
)
def test_a_repository_with_one_variant_needs_no_variant(
    names: list[str], variant: str | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The Hub's list of files and its download are replaced: both need a network."""
    half = tmp_path / "half"
    make_pipeline("sd1").save_pretrained(half, variant="fp16")
    asked = []

    def download(source: str, **how: Any) -> str:
        asked.append(how.get("variant"))
        if how.get("variant") is None:
            shutil.copytree(half, tmp_path / "bare", ignore=shutil.ignore_patterns("*.fp16.*"))
        return str(half if how.get("variant") else tmp_path / "bare")

    monkeypatch.setattr("huggingface_hub.HfApi.list_repo_files", lambda *_, **__: names)
    monkeypatch.setattr("diffusers.DiffusionPipeline.download", download)
    monkeypatch.setattr("lora_booth.base.diffusers_folder.from_hub", lambda source, name, revision: half / name)
    if variant is None:
        with pytest.raises(BaseModelError, match="some-one/half"):
            BaseModel.load("some-one/half", device="cpu")
    else:
        base = BaseModel.load("some-one/half", device="cpu", dtype=torch.float32)
        assert asked == [None, variant] and same_state(state(base.pipeline), state(make_pipeline("sd1")))


@pytest.mark.slow
def test_prediction_type_of_a_single_file(tiny_configs: None, folders: dict[str, Path], tmp_path: Path) -> None:
    pipeline = make_pipeline("sd2")
    plain = save_checkpoint(pipeline, tmp_path / "plain.safetensors")
    told = save_checkpoint(pipeline, tmp_path / "told.safetensors", {"modelspec.prediction_type": "epsilon"})
    options: dict[str, Any] = {"config": folders["sd2-v"], "dtype": torch.float32, "device": "cpu"}
    assert BaseModel.load(plain, **options).prediction_type == "v_prediction"
    assert BaseModel.load(told, **options).prediction_type == "epsilon"
    assert BaseModel.load(plain, prediction_type="epsilon", **options).prediction_type == "epsilon"
    assert BaseModel.load(told, prediction_type="v_prediction", **options).prediction_type == "v_prediction"


@pytest.mark.parametrize(
    ("family", "part", "count"),
    [
        ("sd1", "unet", 859_520_964),
        ("sd2", "unet", 865_910_724),
        ("sdxl", "unet", 2_567_463_684),
        ("sd1", "vae", 83_653_863),
        ("sd2", "vae", 83_653_863),
        ("sdxl", "vae", 83_653_863),
        ("sd1", "text_encoder", 123_060_480),
        ("sd2", "text_encoder", 340_387_840),
        ("sdxl", "text_encoder", 123_060_480),
        ("sdxl", "text_encoder_2", 694_659_840),
    ],
)
def test_built_in_configs_are_those_of_the_published_models(family: str, part: str, count: int) -> None:
    config = json.loads((single_file.CONFIGS / family / part / "config.json").read_text())
    with torch.device("meta"):
        if part == "unet":
            model = UNet2DConditionModel.from_config(config)
        elif part == "vae":
            model = AutoencoderKL.from_config(config)
        else:
            cls = CLIPTextModel if part == "text_encoder" else CLIPTextModelWithProjection
            model = cls(CLIPTextConfig(**config))
    assert sum(parameter.numel() for parameter in model.parameters()) == count


# --- what it computes is what the stock pipeline computes ----------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_text_conditions(kind: str) -> None:
    pipeline = make_pipeline(kind)
    text = BaseModel.from_pipeline(pipeline).encode_text(PROMPTS)
    stock = pipeline.encode_prompt(PROMPTS, device="cpu", num_images_per_prompt=1, do_classifier_free_guidance=True)
    torch.testing.assert_close(text.states, stock[0])
    assert text.states.shape == (2, 16, pipeline.unet.config.cross_attention_dim)
    ids = pipeline.tokenizer(PROMPTS, padding="max_length", truncation=True, return_tensors="pt").input_ids
    if kind == "sdxl":
        assert text.pooled is not None and text.pooled.shape == (2, 24)
        torch.testing.assert_close(text.pooled, stock[2])
        hidden = pipeline.text_encoder(ids, output_hidden_states=True).hidden_states[-2]
        torch.testing.assert_close(text.states[..., :16], hidden)
    else:
        assert text.pooled is None
        torch.testing.assert_close(text.states, pipeline.text_encoder(ids)[0])


def test_text_conditions_carry_gradients_only_when_enabled() -> None:
    base = BaseModel.from_pipeline(make_pipeline("sdxl"))
    assert base.encode_text(["a dog"]).states.requires_grad
    with torch.no_grad():
        assert not base.encode_text(["a dog"]).states.requires_grad


def test_time_ids() -> None:
    pipeline = make_pipeline("sdxl")
    base = BaseModel.from_pipeline(pipeline)
    stock = pipeline._get_add_time_ids((300, 260), (12, 7), (64, 48), torch.float32, text_encoder_projection_dim=24)
    ids = base.time_ids((300, 260), (12, 7), (64, 48))
    assert ids is not None and ids.shape == (6,) and torch.equal(ids[None], stock)
    assert BaseModel.from_pipeline(make_pipeline("sd1")).time_ids((300, 260), (12, 7), (64, 48)) is None


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_latents(kind: str) -> None:
    pipeline = make_pipeline(kind)
    base = BaseModel.from_pipeline(pipeline)
    pixels = torch.rand(2, 3, 64, 64) * 2 - 1
    mean, std = base.encode_images(pixels)
    assert mean.shape == std.shape == (2, 4, 8, 8) and not mean.requires_grad
    posterior = pipeline.vae.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    stock = posterior.sample(generator=torch.Generator().manual_seed(3))
    ours = mean + std * torch.randn(mean.shape, generator=torch.Generator().manual_seed(3))
    assert torch.allclose(ours, stock, atol=1e-6)
    assert base.scaling_factor == pipeline.vae.config.scaling_factor


# --- precision, device, fingerprint --------------------------------------------------------------------------------


def test_dtype_and_device(folders: dict[str, Path]) -> None:
    assert BaseModel.load(folders["sd1"]).dtype == default_dtype(default_device())
    base = BaseModel.load(folders["sd1"], dtype=torch.bfloat16, device="cpu")
    assert base.device.type == "cpu"
    assert {p.dtype for part in (*base.components.values(), base.vae) for p in part.parameters()} == {torch.bfloat16}
    assert default_dtype(torch.device("mps")) == torch.float32


def test_fp16_vae_that_overflows_computes_in_fp32() -> None:
    pixels = torch.rand(1, 3, 64, 64) * 2 - 1
    base = BaseModel.from_pipeline(make_pipeline("sdxl").to(torch.float16))
    exact = AutoencoderKL.from_config(base.vae.config).eval()
    exact.load_state_dict({key: value.float() for key, value in base.vae.state_dict().items()})
    before = state(base.pipeline)
    mean, std = base.encode_images(pixels)
    posterior = exact.encode(pixels).latent_dist
    torch.testing.assert_close(mean, posterior.mean)
    torch.testing.assert_close(std, posterior.std)
    assert base.vae.dtype == torch.float16 and same_state(state(base.pipeline), before)


def test_fingerprint(folders: dict[str, Path]) -> None:
    dtypes = (torch.float32, torch.bfloat16, torch.float16)
    prints = {BaseModel.load(folders["sd1"], dtype=dtype, device="cpu").fingerprint for dtype in dtypes}
    assert len(prints) == 1
    others = {kind: BaseModel.from_pipeline(make_pipeline(kind)).fingerprint for kind in ("sd1", "sd2", "sdxl")}
    assert prints == {others["sd1"]} and len(set(others.values())) == 3
    other = make_pipeline("sd1")
    with torch.no_grad():
        other.unet.conv_in.weight.neg_()
    assert BaseModel.from_pipeline(other).fingerprint not in prints
    with trainable(BaseModel.from_pipeline(other), LoraSpec(rank=2)):  # with PEFT's layers in it
        during = BaseModel.from_pipeline(other).fingerprint
    assert during == BaseModel.from_pipeline(other).fingerprint


# --- a user's mistakes ---------------------------------------------------------------------------------------------


def test_an_argument_without_effect_is_a_mistake(folders: dict[str, Path], tmp_path: Path) -> None:
    (tmp_path / "one.safetensors").write_bytes(b"")
    for source, argument in (
        (folders["sd1"], {"config": folders["sd1"]}),
        (tmp_path / "one.safetensors", {"variant": "fp16"}),
        (tmp_path / "one.safetensors", {"revision": "main"}),
    ):
        with pytest.raises(SettingsError, match=f"{next(iter(argument))}=.* has no effect on a"):
            BaseModel.load(source, device="cpu", **argument)


def refused(*args: Any, **options: Any) -> str:
    """The message: one line, and a BaseModelError."""
    with pytest.raises(BaseModelError) as caught:
        BaseModel.load(*args, **options)
    message = str(caught.value)
    assert "\n" not in message and len(message) < 600
    return message


def test_missing_sources(tmp_path: Path) -> None:
    assert "no such folder or file" in refused(tmp_path / "nothing here")
    assert "no such folder or file" in refused("nothing")
    assert "not in the local cache" in refused("some-one/never-downloaded")
    assert "bad..name" in refused("some--one/bad..name")
    (tmp_path / "empty").mkdir()
    assert "model_index.json" in refused(tmp_path / "empty")


@pytest.fixture
def answering(monkeypatch: pytest.MonkeyPatch) -> Iterator[Callable[[int, str], None]]:
    """A Hub on this machine, which answers everything with a status and an error code."""
    from huggingface_hub import constants, file_download

    answer = (404, "")

    class Handler(BaseHTTPRequestHandler):
        def do_HEAD(self) -> None:
            self.send_response(answer[0])
            self.send_header("X-Error-Code", answer[1])
            self.end_headers()

        do_GET = do_HEAD

        def log_message(self, *_: Any) -> None:
            pass

    def set_answer(status: int, code: str) -> None:
        nonlocal answer
        answer = (status, code)

    with HTTPServer(("127.0.0.1", 0), Handler) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        address = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.setattr(constants, "ENDPOINT", address)
        template = address + "/{repo_id}/resolve/{revision}/{filename}"
        for module in (constants, file_download):  # each has its own
            monkeypatch.setattr(module, "HUGGINGFACE_CO_URL_TEMPLATE", template, raising=False)
        yield set_answer
        server.shutdown()


@pytest.mark.parametrize(
    ("status", "code", "expected"),
    [
        (404, "RepoNotFound", "the Hub has no such model; check the name"),
        (403, "GatedRepo", "accept its licence on https://huggingface.co/some-one/dreamy"),
        (404, "EntryNotFound", "no model_index.json, so it is not a diffusers model"),
        (404, "RevisionNotFound", "Revision Not Found"),
    ],
)
def test_answers_of_the_hub(status: int, code: str, expected: str, answering: Callable[[int, str], None]) -> None:
    answering(status, code)
    message = refused("some-one/dreamy")
    assert message.startswith("some-one/dreamy: ") and expected in message


def test_models_that_have_left_the_hub(answering: Callable[[int, str], None], monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    answering(404, "RepoNotFound")
    for gone in ("runwayml/stable-diffusion-v1-5", "stabilityai/stable-diffusion-2-1"):
        assert SUCCESSORS[gone] in refused(gone)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    assert SUCCESSORS["runwayml/stable-diffusion-v1-5"] in refused("runwayml/stable-diffusion-v1-5")
    assert "cannot be reached; check the name, or load it once while online" in refused("some-one/dreamy")


def test_the_reason_of_an_error_is_its_sentence_not_its_heading() -> None:
    error = RuntimeError("\x1b[1mError(s) in loading:\x1b[0m\n\tsize mismatch for conv_in.weight\x07\n")
    assert reason_of(error) == "Error(s) in loading: size mismatch for conv_in.weight\\x07"
    assert reason_of(OSError()) == "OSError" and len(reason_of(OSError("x" * 999))) == 300


def test_hub_ids() -> None:
    assert is_hub_id("stable-diffusion-v1-5/stable-diffusion-v1-5") and is_hub_id("a/b.c_d")
    assert not any(map(is_hub_id, ("a", "a/b/c", "./a", "../a", "/a", "~/a", "a/", "C:\\a", "a/b c")))


def test_incomplete_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    wordless = tmp_path / "wordless"
    shutil.copytree(folders["sd1"], wordless, ignore=shutil.ignore_patterns("tokenizer.json", "vocab.json", "merges.txt"))
    assert "tokenizer" in refused(wordless)
    folder = tmp_path / "torn"
    shutil.copytree(folders["sd1"], folder)
    (folder / "unet" / "diffusion_pytorch_model.safetensors").unlink()
    assert "complete" in refused(folder)
    (folder / "model_index.json").write_text("{torn")
    assert "JSON" in refused(folder)
    (folder / "model_index.json").write_text("[]")
    refused(folder)


@pytest.mark.parametrize("cls", ["FluxPipeline", "StableDiffusion3Pipeline", "StableDiffusionInpaintPipeline", "EvilPipeline"])
def test_other_pipelines(cls: str, tmp_path: Path) -> None:
    (tmp_path / "model_index.json").write_text(json.dumps({"_class_name": cls}))
    message = refused(tmp_path)
    assert cls in message and "Stable Diffusion XL" in message


def unlike(kind: str, **changes: Any) -> Any:
    pipeline = make_pipeline(kind)
    config = {key: value for key, value in pipeline.unet.config.items() if not key.startswith("_")}
    pipeline.unet = UNet2DConditionModel.from_config({**config, **changes})
    return pipeline


def scheduled(**changes: Any) -> Any:
    pipeline = make_pipeline("sd2")
    pipeline.scheduler = DDIMScheduler.from_config(pipeline.scheduler.config, **changes)
    return pipeline


def with_part(name: str, part: Any, kind: str = "sd1") -> Any:
    pipeline = make_pipeline(kind)
    setattr(pipeline, name, part)
    return pipeline


def configured(name: str, **changes: Any) -> Any:
    """With other values in one module's configuration."""
    pipeline = make_pipeline("sd1")
    getattr(pipeline, name).register_to_config(**changes)
    return pipeline


def endless() -> Any:
    pipeline = make_pipeline("sd1")
    pipeline.tokenizer.model_max_length = 10**9
    return pipeline


def more_words() -> Any:
    pipeline = make_pipeline("sd1")
    pipeline.tokenizer.add_tokens(["<rex>"])
    return pipeline


def compiled() -> Any:
    pipeline = make_pipeline("sd1")
    pipeline.unet = torch.compile(pipeline.unet, backend="eager")
    return pipeline


def offloaded() -> Any:
    pipeline = make_pipeline("sd1")
    cpu_offload(pipeline.unet, execution_device=torch.device("cpu"))
    return pipeline


CANNOT_BE_TRAINED: dict[str, tuple[str, Callable[[], Any]]] = {
    "inpainting": ("inpainting", lambda: unlike("sd1", in_channels=9)),
    "learnt variance": ("gives 8", lambda: unlike("sd1", out_channels=8)),
    "refiner": ("refiner", lambda: with_part("text_encoder", None, "sdxl")),
    "no text encoder": ("no text_encoder", lambda: with_part("text_encoder", None)),
    "no tokenizer": ("no tokenizer", lambda: with_part("tokenizer", None)),
    "no VAE": ("no vae", lambda: with_part("vae", None)),
    "no U-Net": ("no U-Net", lambda: with_part("unet", None)),
    "another width": ("different models", lambda: unlike("sd1", cross_attention_dim=24)),
    "another pooled width": (
        "24 pooled values, the U-Net takes 8",
        lambda: unlike("sdxl", projection_class_embeddings_input_dim=56),
    ),
    "LCM": ("LCM", lambda: unlike("sd1", time_cond_proj_dim=8)),
    "classes": ("class_embed_type", lambda: unlike("sd1", class_embed_type="timestep")),
    "image to image": ("from_pipe", lambda: StableDiffusionImg2ImgPipeline.from_pipe(make_pipeline("sd1"))),
    "SDXL image to image": ("from_pipe", lambda: StableDiffusionXLImg2ImgPipeline.from_pipe(make_pipeline("sdxl"))),
    "LCM pipeline": ("from_pipe", lambda: LatentConsistencyModelPipeline.from_pipe(make_pipeline("sd1"))),
    "tiny VAE": ("AutoencoderTiny", lambda: with_part("vae", AutoencoderTiny())),
    "means of latents": ("latents_mean", lambda: configured("vae", latents_mean=[0.1] * 4, latents_std=[2.0] * 4)),
    "shifted latents": ("shift_factor", lambda: configured("vae", shift_factor=0.1)),
    "no scaling": ("scaling_factor is 0", lambda: configured("vae", scaling_factor=0)),
    "no size": ("sample_size is None", lambda: configured("unet", sample_size=None)),
    "EDM": ("EDMEulerScheduler", lambda: with_part("scheduler", EDMEulerScheduler())),
    "EDM solver": ("EDMDPMSolver", lambda: with_part("scheduler", EDMDPMSolverMultistepScheduler(), "sdxl")),
    "flow matching": ("FlowMatch", lambda: with_part("scheduler", FlowMatchEulerDiscreteScheduler(), "sdxl")),
    "flow sigmas": ("flow matching", lambda: with_part("scheduler", UniPCMultistepScheduler(use_flow_sigmas=True))),
    "sample": ("'sample'", lambda: scheduled(prediction_type="sample")),
    "few timesteps": ("50 timesteps", lambda: scheduled(num_train_timesteps=50)),
    "betas of nothing": ("not a noise schedule", lambda: scheduled(beta_end=1e6)),
    "endless prompts": ("gives 1e.09 tokens", endless),
    "unknown words": ("the text encoder knows", more_words),
    "offloaded": ("its unet is offloaded", offloaded),
    "compiled": ("its unet is compiled", compiled),
}


@pytest.mark.parametrize("case", CANNOT_BE_TRAINED)
def test_models_that_cannot_be_trained(case: str) -> None:
    expected, make = CANNOT_BE_TRAINED[case]
    with pytest.raises(BaseModelError, match=expected):
        BaseModel.from_pipeline(make())


def test_single_files_that_are_no_base(folders: dict[str, Path], tmp_path: Path) -> None:
    for ending in ("ckpt", "pt", "bin"):
        (tmp_path / f"evil.{ending}").write_bytes(b"\x80\x02")
        assert "pickle" in refused(tmp_path / f"evil.{ending}")
    (tmp_path / "torn.safetensors").write_bytes(b"\x00" * 20)
    assert "not a safetensors file" in refused(tmp_path / "torn.safetensors")
    base = BaseModel.from_pipeline(make_pipeline("sd1"))
    assert "adapter" in refused(random_adapter(base).save(tmp_path / "rex.safetensors"))
    assert "adapter" in refused(random_adapter(base).save(tmp_path / "rex2.safetensors", layout="peft"))
    save_file({"a": torch.zeros(2)}, tmp_path / "other.safetensors")
    assert "not a checkpoint" in refused(tmp_path / "other.safetensors")
    alone = {k: v.contiguous() for k, v in checkpoint(make_pipeline("sd1")).items() if k.startswith("model.")}
    save_file(alone, tmp_path / "alone.safetensors")
    assert "has a U-Net, but no text encoder" in refused(tmp_path / "alone.safetensors")
    nine = checkpoint(unlike("sd1", in_channels=9))
    save_file({key: value.contiguous() for key, value in nine.items()}, tmp_path / "inpainting.safetensors")
    assert "inpainting" in refused(tmp_path / "inpainting.safetensors", config=folders["sd1"])


def test_single_file_and_the_wrong_config(folders: dict[str, Path], tmp_path: Path) -> None:
    file = save_checkpoint(make_pipeline("sd1"), tmp_path / "one.safetensors")
    for config in (folders["sdxl"], folders["sd2"], tmp_path / "nowhere"):
        refused(file, config=config, dtype=torch.float32, device="cpu")


def test_torn_single_file(folders: dict[str, Path], tmp_path: Path) -> None:
    weights = {k: v.contiguous() for k, v in checkpoint(make_pipeline("sd1")).items() if "output_blocks.1." not in k}
    save_file(weights, tmp_path / "part.safetensors")
    message = refused(tmp_path / "part.safetensors", config=folders["sd1"], dtype=torch.float32, device="cpu")
    assert "part.safetensors" in message


@pytest.mark.parametrize("kind", ORIGINAL)
def test_no_tokenizer_is_one_plain_error(kind: str, tiny_configs: None, tmp_path: Path) -> None:
    file = save_checkpoint(make_pipeline(kind), tmp_path / "dreamy.safetensors")
    message = refused(file, dtype=torch.float32, device="cpu")
    assert "tokenizer" in message and "load a diffusers folder" in message and "hf download" in message


# --- what a folder declares, and what is taken for a base ----------------------------------------------------------


def test_rare_tokens_are_declared_in_the_folder(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "toybox"  # a name that says nothing
    shutil.copytree(folders["sd1"], folder)
    assert BaseModel.load(folder, device="cpu").rare_tokens == ()
    (folder / "lora_booth.json").write_text('{"rare_tokens": ["sks", "zwx"]}')
    assert BaseModel.load(folder, device="cpu").rare_tokens == ("sks", "zwx")
    for wrong in ("[]", "{}", "no json", '{"rare_tokens": "sks"}', '{"rare_tokens": [1]}'):
        (folder / "lora_booth.json").write_text(wrong)
        with pytest.raises(
            BaseModelError, match=r"lora_booth.json.*(a list of words|cannot be read as JSON|not a JSON object)"
        ):
            BaseModel.load(folder, device="cpu")


def test_a_base_or_a_pipeline() -> None:
    pipeline = make_pipeline("sd1")
    base = BaseModel.of(pipeline, name="mine")
    assert base.name == "mine" and base.pipeline is pipeline and BaseModel.of(base, name="other") is base
    with pytest.raises(BaseModelError, match=r"'models/x' is not loaded; pass BaseModel.load\('models/x'\)"):
        BaseModel.of("models/x")
    with pytest.raises(BaseModelError, match="Linear has no U-Net of Stable Diffusion 1.x"):
        BaseModel.of(torch.nn.Linear(1, 1))
