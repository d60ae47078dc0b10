"""Weights are read one tensor at a time when they are needed, given back while they are not, and are always the same bits."""

from __future__ import annotations

import ctypes
import json
import os
import random
import shutil
import socket
import subprocess
import sys
import tempfile
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import DiffusionPipeline, StableDiffusionPipeline
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from ldm_naming import checkpoint, save_checkpoint
from pipelines import KINDS, make_pipeline, same_state, state
from safetensors.torch import load_file, save_file
from spoilt import bits, byte, cut, dropped, put_together, spliced, taken_apart
from transformers import CLIPConfig, CLIPImageProcessor

from lora_booth.base.base_model import BaseModel
from lora_booth.base.library_logging import without_bars
from lora_booth.base.weight_files import WeightFile
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import BaseModelError
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training import class_images

ALONE = TrainingConfig(steps=2, prior_loss_weight=0.0, warmup_steps=0)
LORA = LoraSpec(rank=2)


def load(source: Any, dtype: torch.dtype = torch.float32, **options: Any) -> BaseModel:
    return BaseModel.load(source, dtype=dtype, device="cpu", **options)


def read(base: BaseModel) -> set[str]:
    """The components that are in memory, asked without touching them."""
    modules = {name: part for name, part in base.shell.components.items() if isinstance(part, torch.nn.Module)}
    return {name for name, module in modules.items() if not any(p.is_meta for p in module.parameters())}


# --- the same bits as the stock loader's ----------------------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", KINDS)
def test_the_weights_are_those_of_the_stock_loader(kind: str, dtype: torch.dtype, folders: dict[str, Path]) -> None:
    base = load(folders[kind], dtype)
    assert read(base) == set()
    stock = DiffusionPipeline.from_pretrained(folders[kind], dtype=dtype)
    assert same_state(state(base.pipeline), state(stock))
    for name, module in base.pipeline.components.items():
        if isinstance(module, torch.nn.Module):
            own = {n: (b.dtype, b.device) for n, b in module.named_buffers()}
            assert own == {n: (b.dtype, b.device) for n, b in getattr(stock, name).named_buffers()}
            assert not module.training and type(module) is type(getattr(stock, name))


@pytest.mark.slow
@pytest.mark.parametrize("kind", KINDS)
def test_a_single_file_is_read_in_the_same_way(kind: str, folders: dict[str, Path], tmp_path: Path) -> None:
    file = save_checkpoint(make_pipeline(kind), tmp_path / "one.safetensors")
    base = load(file, torch.bfloat16, config=folders[kind])
    assert read(base) == set()
    stock = type(base.shell).from_single_file(str(file), config=str(folders[kind]), torch_dtype=torch.bfloat16)
    assert same_state(state(base.pipeline), state(stock))


def test_names_that_are_not_known_here_are_left_to_the_stock_loader(folders: dict[str, Path], tmp_path: Path) -> None:
    """As in merges that lost a level of their text encoder's names."""
    weights = {k.replace("transformer.text_model.", "transformer."): v for k, v in checkpoint(make_pipeline("sd1")).items()}
    save_file({key: value.contiguous() for key, value in weights.items()}, tmp_path / "one.safetensors")
    try:
        base = load(tmp_path / "one.safetensors", config=folders["sd1"])
    except BaseModelError as error:
        assert "one.safetensors" in str(error)
    else:
        assert same_state(state(base.pipeline), state(make_pipeline("sd1")))


@pytest.mark.slow
def test_shards_variants_and_old_names(folders: dict[str, Path], tmp_path: Path) -> None:
    sharded = tmp_path / "sharded"
    make_pipeline("sd1").save_pretrained(sharded, max_shard_size="40KB")
    assert len(list((sharded / "unet").glob("*.safetensors"))) > 1
    index = sharded / "unet" / "diffusion_pytorch_model.safetensors.index.json"
    edited(index, metadata={"total_size": 5 * 10**9})  # as of SDXL
    base = load(sharded)
    assert read(base) == set() and same_state(state(base.pipeline), state(make_pipeline("sd1")))

    half = tmp_path / "half"
    make_pipeline("sd1").to(torch.float16).save_pretrained(half, variant="fp16")
    stock = state(DiffusionPipeline.from_pretrained(half, variant="fp16", dtype=torch.float32))
    for options in ({"variant": "fp16"}, {}):  # the only one there is
        base = load(half, **options)
        assert read(base) == set() and same_state(state(base.pipeline), stock)
    with pytest.raises(BaseModelError, match="half"):
        load(half, variant="bf16")
    unet = half / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.ema.safetensors"))
    with pytest.raises(BaseModelError, match="only variants .ema, fp16.; pass variant"):
        load(half)
    shutil.copy(unet, unet.with_name("diffusion_pytorch_model.safetensors"))
    assert same_state(state(load(half).pipeline), stock)

    old = tmp_path / "old"  # how the VAE of the published SD 1.5 is written
    shutil.copytree(folders["sd1"], old)
    file = old / "vae" / "diffusion_pytorch_model.safetensors"
    weights = load_file(file)
    for new, name in (("to_q.", "query."), ("to_k.", "key."), ("to_v.", "value."), ("to_out.0.", "proj_attn.")):
        weights = {key.replace(new, name): value for key, value in weights.items()}
    save_file(weights, file)
    assert any(".proj_attn." in key for key in weights)
    base = load(old)
    assert read(base) == set() and same_state(state(base.pipeline), state(make_pipeline("sd1")))


def test_a_pickle_is_left_to_the_stock_loader(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "pickled"
    shutil.copytree(folders["sd1"], folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    torch.save(load_file(file), file.with_suffix(".bin"))
    file.unlink()
    base = load(folder, torch.bfloat16)
    assert read(base) == {"vae"}
    assert same_state(state(base.pipeline), state(make_pipeline("sd1").to(torch.bfloat16)))


@pytest.mark.slow
def test_a_safety_checker_is_not_read_for_training(rex: Subject, tmp_path: Path) -> None:
    tiny = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(projection_dim=16, vision_config={**tiny, "image_size": 32, "patch_size": 16}, text_config=tiny)
    stock = make_pipeline("sd1")
    parts = {name: part for name, part in stock.components.items() if name != "safety_checker"}
    parts |= {"safety_checker": StableDiffusionSafetyChecker(config).eval(), "feature_extractor": CLIPImageProcessor()}
    whole = StableDiffusionPipeline(**parts)
    whole.save_pretrained(tmp_path / "safe")
    base = load(tmp_path / "safe")
    train(base, rex, lora=LORA, config=ALONE, progress=False)
    assert read(base) == {"unet"}
    assert same_state(state(base.pipeline), state(whole))


@pytest.mark.slow
def test_the_fingerprint_needs_no_weights_in_memory(folders: dict[str, Path]) -> None:
    for kind in ("sd1", "sdxl"):
        base = load(folders[kind], torch.bfloat16)
        assert base.fingerprint == BaseModel.from_pipeline(make_pipeline(kind)).fingerprint
        assert read(base) == set() and (base.dtype, base.device.type) == (torch.bfloat16, "cpu")


# --- what is read when ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_training_holds_the_unet_alone(
    rex: Subject, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_BOOTH_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr(class_images, "CLASS_IMAGE_STEPS", 2)
    kind, config = "sd1", TrainingConfig(steps=2, class_images=1, warmup_steps=0, sample_every=2)
    held = []
    base = load(folders[kind])
    options: dict[str, Any] = {"lora": LORA, "config": config, "progress": False}
    first = train(base, rex, on_step=lambda _: held.append(read(base)), out=tmp_path / "a", **options)
    assert held == [{"unet"}] * 2 and read(base) == {"unet"}
    assert list((tmp_path / "a" / "samples").glob("*2*.png"))  # for which all was read, and given back
    assert same_state(state(base.pipeline), state(make_pipeline(kind)))

    whole = load(folders[kind])
    assert whole.pipeline is whole.shell  # somebody has it now: nothing is given back
    other = train(whole, rex, on_step=lambda _: held.append(read(whole)), **options)
    assert held[2:] == [{"unet", "vae", *whole.text_encoders}] * 2
    assert other.digest() == first.digest()
    assert same_state(state(whole.pipeline), state(make_pipeline(kind)))


def test_with_a_text_encoder_lora_the_text_encoder_stays(rex: Subject, folders: dict[str, Path]) -> None:
    base = load(folders["sd1"])
    held = []
    train(
        base,
        rex,
        lora=LoraSpec(rank=2, text_encoder=True),
        config=ALONE,
        on_step=lambda _: held.append(read(base)),
        progress=False,
    )
    assert all({"unet", "text_encoder"} <= each for each in held)
    assert same_state(state(base.pipeline), state(make_pipeline("sd1")))


def test_one_module_does_not_bring_the_others(folders: dict[str, Path]) -> None:
    base = load(folders["sdxl"])
    assert (
        base.resolution == 64 and base.scaling_factor and base.prediction_type and base.tokenizer and len(base.structure) == 3
    )
    assert read(base) == set()
    base.encode_images(torch.zeros(1, 3, 64, 64))
    assert read(base) == {"vae"}
    base.encode_text(["a dog"])
    assert read(base) == {"vae", "text_encoder", "text_encoder_2"}
    assert base.unet is base.components["unet"] and "unet" in read(base)
    with pytest.raises(KeyError):
        base.components["vae"]


# --- files that change or go ----------------------------------------------------------------------------------------


def test_a_folder_that_is_deleted_or_replaced_is_still_read_as_it_was(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "gone"
    shutil.copytree(folders["sd1"], folder)
    base = load(folder)
    shutil.rmtree(folder)
    assert same_state(state(base.pipeline), state(make_pipeline("sd1")))


def test_a_file_that_is_written_over_is_told(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "changed"
    shutil.copytree(folders["sd1"], folder)
    base = load(folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    with open(file, "r+b") as handle:
        handle.seek(-8, 2)
        handle.write(b"\0" * 8)
        handle.truncate(file.stat().st_size - 4)
    with pytest.raises(BaseModelError, match="changed while in use"):
        _ = base.vae


@pytest.mark.parametrize("spoil", ["cut", "long", "header", "no json", "dtype", "overlap"])
def test_a_damaged_file_is_one_plain_error(spoil: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(folders["sd1"], folder)
    file = folder / "vae" / "diffusion_pytorch_model.safetensors"
    content = file.read_bytes()
    header, data = taken_apart(content)
    if spoil == "dtype":
        header["encoder.conv_in.bias"]["dtype"] = "F77"
    if spoil == "overlap":
        header["encoder.conv_in.bias"]["data_offsets"][1] += 4
    damaged = {
        "cut": content[:-10],
        "long": content + b"more",
        "header": put_together(header, data, length=2**40),
        "no json": put_together(b"x" * 1000, data),
    }.get(spoil, put_together(header, data))
    file.write_bytes(damaged)
    with pytest.raises(BaseModelError) as caught:
        _ = load(folder).vae
    assert "\n" not in str(caught.value) and "complete" in str(caught.value)


@pytest.mark.parametrize("component", ["unet", "vae", "text_encoder"])
def test_a_missing_tensor_is_named(component: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(folders["sd1"], folder)
    (file,) = (folder / component).glob("*.safetensors")
    weights = load_file(file)
    missing = sorted(weights)[3]
    del weights[missing]
    save_file(weights, file)
    with pytest.raises(BaseModelError, match=rf"{component}: not complete, {missing.removeprefix('text_model.')} is missing"):
        load(folder)


# --- folders from strangers -----------------------------------------------------------------------------------------


def edited(file: Path, **changes: Any) -> None:
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def pipe(path: Path) -> None:
    path.unlink()
    os.mkfifo(path)


def open_socket(path: Path) -> None:
    path.unlink()
    with socket.socket(socket.AF_UNIX) as one:
        with tempfile.TemporaryDirectory() as short:  # the path of a socket has at most 108 characters
            one.bind(f"{short}/socket")
            os.rename(f"{short}/socket", path)


def moved_out(path: Path) -> None:
    target = path.parents[2] / path.name
    path.rename(target)
    path.symlink_to(target)


class Code:
    def __reduce__(self) -> Any:
        return print, ("code of a pickle",)


def pickled(path: Path, content: Any) -> None:
    torch.save(content, path.with_name("pytorch_model.bin"))
    path.unlink()


UNET, TEXT = "unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"
UNTRUSTED: dict[str, tuple[str, Callable[[Path], object]]] = {
    "a pipe for weights": ("not a regular file", lambda f: pipe(f / UNET)),
    "a pipe for words": ("not a regular file", lambda f: pipe(f / "tokenizer" / "tokenizer.json")),
    "a pipe for a configuration": ("not a regular file", lambda f: pipe(f / "vae" / "config.json")),
    "a socket": ("not a regular file", lambda f: open_socket(f / TEXT)),
    "a link": ("leads out of its folder", lambda f: moved_out(f / UNET)),
    "a linked configuration": ("leads out of its folder", lambda f: moved_out(f / "scheduler" / "scheduler_config.json")),
    "a linked folder": ("leads out of its folder", lambda f: moved_out(f / "vae")),
    "a link to itself": ("unet", lambda f: [(f / UNET).unlink(), (f / UNET).symlink_to(f / UNET)]),
    "a shard elsewhere": (
        "leads out of its folder",
        lambda f: [
            (f / UNET).rename(f / "other.safetensors"),
            (f / (UNET + ".index.json")).write_text('{"weight_map": {"conv_in.weight": "../other.safetensors"}}'),
        ],
    ),
    "no shards": (
        "cannot be loaded",
        lambda f: [(f / UNET).unlink(), (f / (UNET + ".index.json")).write_text('{"weight_map": [3]}')],
    ),
    "a pickle with code": ("a pickle that could run code", lambda f: pickled(f / TEXT, {"a": Code()})),
    "endless words": ("1e.09 tokens", lambda f: edited(f / "tokenizer" / "tokenizer_config.json", model_max_length=10**9)),
    "no padding": ("tokenizer has no pad_token", lambda f: edited(f / "tokenizer" / "tokenizer_config.json", pad_token=None)),
    "many text layers": ("layers by its conf", lambda f: edited(f / "text_encoder" / "config.json", num_hidden_layers=10**6)),
    "many resnets": ("layers by its configuration", lambda f: edited(f / "unet" / "config.json", layers_per_block=10**6)),
    "many transformers": (
        "layers by its configuration",
        lambda f: edited(f / "unet" / "config.json", transformer_layers_per_block=10**6),
    ),
    "many layers of a VAE": (
        "layers by its configuration",
        lambda f: edited(f / "vae" / "config.json", layers_per_block=10**5),
    ),
    "a huge position": ("is absurd", lambda f: edited(f / "text_encoder" / "config.json", max_position_embeddings=10**10)),
    "a huge width": ("is absurd", lambda f: edited(f / "unet" / "config.json", block_out_channels=[2**40, 32])),
    "endless timesteps": (
        "is absurd",
        lambda f: edited(f / "scheduler" / "scheduler_config.json", num_train_timesteps=10**10),
    ),
    "another width": ("by its configuration", lambda f: edited(f / "text_encoder" / "config.json", intermediate_size=48)),
    "a deep configuration": ("nested too deeply", lambda f: (f / "vae" / "config.json").write_text("[" * 10**5 + "]" * 10**5)),
    "a huge vocabulary": ("larger than", lambda f: os.truncate(f / "tokenizer" / "tokenizer.json", 2**40)),
    "another library": ("not a part of a pipeline", lambda f: edited(f / "model_index.json", scheduler=["os", "system"])),
    "a part elsewhere": ("not a part", lambda f: edited(f / "model_index.json", **{"../x": ["diffusers", "AutoencoderKL"]})),
}


@pytest.mark.parametrize("case", UNTRUSTED)
def test_an_untrusted_folder_is_one_plain_error(
    case: str, folders: dict[str, Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = tmp_path / "base"
    shutil.copytree(folders["sd1"], folder)
    expected, spoil = UNTRUSTED[case]
    spoil(folder)
    with pytest.raises(BaseModelError, match=expected) as caught:
        load(folder)
    assert "\n" not in str(caught.value) and "weights_only" not in str(caught.value)
    assert "code of a pickle" not in capsys.readouterr().out


@pytest.mark.parametrize("case", ["another library", "a part elsewhere"])
def test_so_is_an_untrusted_configuration_of_a_single_file(case: str, folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(folders["sd1"], folder)
    expected, spoil = UNTRUSTED[case]
    spoil(folder)
    with pytest.raises(BaseModelError, match=expected):
        load(save_checkpoint(make_pipeline("sd1"), tmp_path / "one.safetensors"), config=folder)


def test_links_within_a_folder_and_to_the_hubs_blobs(folders: dict[str, Path], tmp_path: Path) -> None:
    snapshot = tmp_path / "models--a--b" / "snapshots" / "main"
    shutil.copytree(folders["sd1"], snapshot)
    blobs = tmp_path / "models--a--b" / "blobs"
    blobs.mkdir()
    for path in [path for path in snapshot.glob("*/*") if path.is_file()]:
        target = blobs / path.relative_to(snapshot).as_posix().replace("/", "-")
        path.rename(target)
        path.symlink_to(target)
    assert same_state(state(load(snapshot).pipeline), state(make_pipeline("sd1")))


@pytest.mark.slow
def test_changed_configurations_are_read_or_refused(folders: dict[str, Path], tmp_path: Path) -> None:
    folder = tmp_path / "base"
    shutil.copytree(folders["sdxl"], folder)
    files = sorted(path for path in folder.rglob("*.json") if "vocab" not in path.name and path.name != "tokenizer.json")
    odd = (0, -1, 1.5, 2**40, 10**400, 1e300, None, True, "x", [], {}, [[]], [0], 10**6)
    outcomes = Counter[str]()
    for i in range(60):
        rng = random.Random(i)
        file = rng.choice(files)
        good = file.read_bytes()
        if i % 2:
            file.write_bytes(rng.choice((bits, byte, cut, spliced, dropped))(good, rng))
        else:
            values = json.loads(good)
            edited(file, **{rng.choice(list(values)): rng.choice(odd)})
        try:
            base = load(folder)
            assert base.resolution > 0 and base.alphas_cumprod.isfinite().all()
            outcomes["read"] += 1
        except BaseModelError as error:
            assert "\n" not in str(error)
            outcomes["refused"] += 1
        file.write_bytes(good)
    assert min(outcomes.values()) > 5


# --- memory ---------------------------------------------------------------------------------------------------------

PEAK = """
import sys
import torch
from pathlib import Path
from lora_booth.base.weight_files import WeightFile

def high():
    return int(Path("/proc/self/status").read_text().split("VmHWM:")[1].split()[0]) * 1024

places = WeightFile(Path({file!r})).places
torch.zeros(2**24, dtype=torch.bfloat16).float().bfloat16()  # its code is loaded
Path("/proc/self/clear_refs").write_text("5")
before = high()
kept = [place.read(torch.bfloat16, torch.device("cpu")) for place in places.values()]
print(high() - before, sum(t.nbytes for t in kept))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux tells it")
def test_reading_half_precision_from_a_full_file_takes_little_more_than_the_result(tmp_path: Path) -> None:
    tensors = {f"t{i}": torch.full((4096, 4096), float(i)) for i in range(4)}  # 256 MiB in float32
    save_file(tensors, tmp_path / "big.safetensors")
    code = PEAK.format(file=str(tmp_path / "big.safetensors"))
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    more, result = map(int, done.stdout.split())
    assert result == 128 * 2**20
    assert result <= more < result + 64 * 2**20  # a mapped file would bring all its 256 MiB


GAPS = """
import torch
from pathlib import Path
from lora_booth.base.weight_files import return_always

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

torch.ones(2**22)  # 16 MiB; having freed it, glibc puts whatever is smaller into its heap
if {always}:
    return_always()
large, small = [], []
for _ in range(40):
    large.append(torch.ones(2**20))  # 4 MiB
    small.append(torch.ones(2**14))  # 64 KiB, so that the next large one is not its neighbour
before = resident()
large.clear()
print(before - resident())
"""


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux" or not hasattr(ctypes.CDLL(None), "mallopt"), reason="of glibc")
def test_large_tensors_leave_no_gaps_where_memory_is_scarce() -> None:
    returned = []
    for always in (False, True):
        code = GAPS.format(always=always)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
        assert done.returncode == 0, done.stderr
        returned.append(int(done.stdout))
    assert returned[0] < 40 * 2**20 and returned[1] > 150 * 2**20  # of 160 MiB


RESIDENT = """
import sys
from pathlib import Path
import torch
from torch import nn
from lora_booth.base.weight_files import LazyModule, WeightFile

def resident():
    return int(Path("/proc/self/status").read_text().split("VmRSS:")[1].split()[0]) * 1024

sizes = {sizes!r}

def part():
    model = nn.ModuleList([nn.Linear(size, size, device="meta") for size in sizes]).to(torch.bfloat16)
    return LazyModule(model, WeightFile(Path({file!r})).places, torch.bfloat16, torch.device("cpu"))

torch.zeros(2**24, dtype=torch.bfloat16).float().bfloat16()  # its code is loaded
vae, unet = part(), part()
before = resident()
vae.fill()
unet.fill()
both = resident() - before
vae.drop()
print(both, resident() - before, sum(t.nbytes for t in unet.module.parameters()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not Path("/proc/self/clear_refs").exists(), reason="counts memory as Linux tells it")
def test_a_module_takes_its_own_size_and_gives_it_back(tmp_path: Path) -> None:
    sizes = [(320, 2560, 640, 1280)[i % 4] for i in range(48)]
    tensors = {f"{i}.weight": torch.ones(size, size) for i, size in enumerate(sizes)}
    save_file(tensors | {f"{i}.bias": torch.ones(size) for i, size in enumerate(sizes)}, tmp_path / "m.safetensors")
    code = RESIDENT.format(file=str(tmp_path / "m.safetensors"), sizes=sizes)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(__file__).parents[1])
    assert done.returncode == 0, done.stderr
    both, one, result = map(int, done.stdout.split())
    assert 2 * result <= both < 2 * result + 24 * 2**20  # no more than the room for pieces
    assert one < result + 24 * 2**20


def test_transposed_and_partial_places(tmp_path: Path) -> None:
    from dataclasses import replace

    value = torch.arange(24.0).view(6, 4)
    save_file({"a": value, "n": torch.arange(3)}, tmp_path / "a.safetensors")
    places = WeightFile(tmp_path / "a.safetensors").places
    cpu = torch.device("cpu")
    assert torch.equal(replace(places["a"], transposed=True).read(torch.float32, cpu), value.T)
    assert [places["a"].third(i).read(torch.float32, cpu).tolist() for i in range(3)] == value.view(3, 2, 4).tolist()
    assert places["n"].read(torch.bfloat16, cpu).dtype == torch.int64
    assert places["a"].start_of(5).tolist() == [0, 1, 2, 3, 4]


@pytest.mark.parametrize("downloads", [True, False])
def test_bars_come_back_and_those_of_downloads_stay(downloads: bool) -> None:
    from diffusers.utils import logging as of_diffusers
    from huggingface_hub.utils.tqdm import are_progress_bars_disabled, disable_progress_bars, enable_progress_bars
    from transformers.utils import logging as of_transformers

    def now() -> tuple[bool, bool, bool]:
        others = of_diffusers.is_progress_bar_enabled(), of_transformers.is_progress_bar_enabled()
        return not are_progress_bars_disabled(), *others

    try:
        if not downloads:
            disable_progress_bars()
        before = now()
        with pytest.raises(KeyboardInterrupt), without_bars():
            assert now() == (downloads, False, False)
            raise KeyboardInterrupt
        assert now() == before == (downloads, True, True)
    finally:
        enable_progress_bars()
