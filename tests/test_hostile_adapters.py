"""Untrusted files do no harm, and good files are never refused."""

from __future__ import annotations

import hashlib
import os
import signal
import sys
import tracemalloc
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from adapter_judge import Judge
from good_adapters import Good, good_files, loha, lokr, small_files
from hostile_adapters import KD, KU, Hostile, configurations, headers, hostile_files, lycoris, pair, written
from pipelines import make_pipeline
from spoilt import mutants
from torch import Tensor, nn

from lora_booth import errors as E
from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import MAX_RANK
from lora_booth.injection.attached import attached

HANGS = 300  # seconds; a hang, not a measure of speed
MEMORY = 400 * 2**20  # bytes that Python takes meanwhile, for files of up to 5 MB

HOSTILE, GOOD = hostile_files(), good_files()


@contextmanager
def no_hang() -> Iterator[None]:
    if not hasattr(signal, "setitimer"):
        yield
        return

    def stop(*_: object) -> None:
        raise TimeoutError("it hangs")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, HANGS)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def digest(pipeline: Any) -> str:
    """Of every weight and every module of a pipeline."""
    sha = hashlib.sha256()
    for name, part in pipeline.components.items():
        if isinstance(part, nn.Module):
            sha.update(repr([(name, path, type(module)) for path, module in part.named_modules()]).encode())
            for key, value in part.state_dict().items():
                sha.update(key.encode() + value.numpy().tobytes())
    return sha.hexdigest()


@pytest.fixture(scope="module")
def pipeline() -> Any:
    return make_pipeline("sd1")


@pytest.fixture(scope="module")
def untouched(pipeline: Any) -> str:
    return digest(pipeline)


# --- hostile -------------------------------------------------------------------------------------------------------


def test_there_are_enough_of_them() -> None:
    assert len(HOSTILE) >= 80 and len({case.name for case in HOSTILE}) == len(HOSTILE)
    assert len(GOOD) >= 50 and len({case.name for case in GOOD}) == len(GOOD)
    refusals = {error for error in vars(E).values() if isinstance(error, type) and issubclass(error, E.AdapterError)}
    assert {case.error for case in HOSTILE} == refusals  # every way to refuse is taken


@pytest.mark.parametrize("case", HOSTILE, ids=lambda case: ascii(case.name)[1:-1])
def test_hostile(case: Hostile, pipeline: Any, untouched: str, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    with no_hang(), pytest.raises(E.AdapterError) as caught, attached(pipeline, [(Adapter.load(path), 1.0)]):
        raise AssertionError("attached")
    message = str(caught.value)
    assert type(caught.value) is case.error, message
    assert message.isprintable() and case.says in message and len(message) < 6000
    assert len(message) - len(str(path)) < 500 or case.error is E.AdapterBaseMismatch
    assert digest(pipeline) == untouched
    assert not (tmp_path / "ran").exists()  # what the pickles would leave


@pytest.mark.parametrize("case", [*headers(), *lycoris(), *configurations()], ids=lambda case: ascii(case.name)[1:-1])
def test_hostile_files_take_little_memory(case: Hostile, tmp_path: Path) -> None:
    path = case.build(tmp_path)
    tracemalloc.start()
    try:
        Adapter.load(path)
    except E.AdapterError:
        pass
    finally:
        peak = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
    assert peak < MEMORY


@pytest.mark.parametrize("change", ["shrinks", "grows", "vanishes", "becomes a pickle"])
def test_a_file_that_changes_while_it_is_read(change: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from lora_booth.adapters import reading

    factors = pair(8, 4096, 4096)  # more than a buffer holds
    path = written(tmp_path, dict(zip((KD, KU), factors, strict=True)))
    size, parse = path.stat().st_size, reading.read_header

    def changed(*given: Any) -> Any:
        header = parse(*given)
        if change == "shrinks":
            os.truncate(path, size - 100)
        elif change == "grows":
            with path.open("ab") as file:
                file.write(b"x" * 10_000)
        elif change == "vanishes":
            path.unlink()
        else:
            path.with_name("other").write_bytes(b"\x80\x04.")
            os.replace(path.with_name("other"), path)
        return header

    monkeypatch.setattr(reading, "read_header", changed)
    if change == "shrinks":
        with pytest.raises(E.AdapterFormatError, match="shorter"):
            Adapter.load(path)
    else:  # what was checked is what was read
        assert torch.equal(next(iter(Adapter.load(path).modules.values())).down, factors[0])


def test_nothing_of_a_file_reaches_a_regular_expression(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    import re

    written_files = [(case, case.write(tmp_path / str(i))) for i, case in enumerate(GOOD) if not (tmp_path / str(i)).mkdir()]

    def refuse(*_: object, **__: object) -> None:
        raise AssertionError("a regular expression")

    with monkeypatch.context() as patch:
        for name in ("compile", "match", "search", "fullmatch", "sub", "split", "findall", "finditer"):
            patch.setattr(re, name, refuse)
        loaded = [Adapter.load(path) for _, (path, _) in written_files]
    assert len(loaded) == len(GOOD)


# --- good ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOOD, ids=lambda case: case.name)
def test_good(case: Good, tmp_path: Path) -> None:
    path, meant = case.write(tmp_path)
    adapter = Adapter.load(path)
    assert adapter.modules.keys() == meant.keys()
    for module, change in meant.items():
        factors = adapter.modules[module]
        assert factors.rank <= min(MAX_RANK, change.shape[0], change[0].numel())
        found = factors.delta()
        assert found.numel() == change.numel() and found.shape[:2] == change.shape[:2], module
        error = (found.double().reshape(change.shape) - change).abs().max()
        assert error <= 2e-6 * change.abs().max(), module
    assert all(str(value).isprintable() for value in vars(adapter.card).values()) and adapter.name.isprintable()


def test_files_of_another_shape_of_projection_fit() -> None:
    """sd-scripts trains SD 2.x with 1x1 convolutions where diffusers has linear layers, and some tools do the reverse."""
    from dataclasses import replace

    for kind in ("sd1", "sd2"):
        pipe = make_pipeline(kind)
        module = "unet.down_blocks.0.attentions.0.proj_in"
        width = pipe.unet.get_submodule(module[5:]).weight.shape[0]
        factors = written_factors(width)
        flat = replace(factors, down=factors.down.flatten(1), up=factors.up.flatten(1))
        outputs = []
        for given in (factors, flat):
            with attached(pipe, [(Adapter({module: given}), 0.5)]), torch.no_grad():
                layer = pipe.unet.get_submodule(module[5:])
                x = torch.ones(1, 3, width) if kind == "sd2" else torch.ones(1, width, 3, 1)
                outputs.append(layer(x))
        plain = layer.base_layer(x) if hasattr(layer, "base_layer") else layer(x)
        assert torch.equal(*outputs) and not torch.equal(outputs[0], plain)


def written_factors(width: int) -> Any:
    from lora_booth.adapters.contents import LoraFactors

    down, up = pair(4, width, width)
    return LoraFactors(down[:, :, None, None], up[:, :, None, None], 4.0)


# --- LoHa and LoKr: PEFT computes the same -------------------------------------------------------------------------

LINEAR, CONV = "down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q", "down_blocks.0.resnets.0.conv1"


class Two(nn.Module):
    """A linear layer and a convolution under their names in a U-Net."""

    def __init__(self) -> None:
        super().__init__()
        for path, layer in ((LINEAR, nn.Linear(24, 36)), (CONV, nn.Conv2d(8, 24, 3))):
            owner: nn.Module = self
            *above, last = path.split(".")
            for name in above:
                if name not in owner._modules:
                    owner.add_module(name, nn.Module())
                owner = owner._modules[name]  # type: ignore[assignment]
            owner.add_module(last, layer)

    def forward(self, x: Tensor) -> Tensor:
        return x


@pytest.mark.filterwarnings("ignore")  # PEFT's own
@pytest.mark.parametrize("effective", [False, True], ids=["flat", "tucker"])
@pytest.mark.parametrize("rank", [1, 3, 8])
@pytest.mark.parametrize("kind", ["loha", "lokr", "lokr both"])
def test_peft_computes_the_same(kind: str, rank: int, effective: bool, tmp_path: Path) -> None:
    from peft import LoHaConfig, LoKrConfig, get_peft_model

    common = {"r": rank, "alpha": 5, "target_modules": [LINEAR, CONV], "use_effective_conv2d": effective}
    if kind == "loha":
        config: Any = LoHaConfig(**common, init_weights=False, alpha_pattern={"to_q": 3})
    else:
        config = LoKrConfig(**common, init_weights=False, decompose_both=kind == "lokr both", rank_pattern={"to_q": 2})
    torch.manual_seed(0)
    model = get_peft_model(Two(), config)
    model.save_pretrained(tmp_path)
    adapter = Adapter.load(tmp_path)
    assert adapter.modules.keys() == {f"unet.{LINEAR}", f"unet.{CONV}"}
    for path in (LINEAR, CONV):
        expected = model.base_model.model.get_submodule(path).get_delta_weight("default").detach()
        found = adapter.modules[f"unet.{path}"].delta()
        assert found.shape == expected.shape
        assert (found - expected).abs().max() < 3e-6 * expected.abs().max(), path


def test_low_ranks_stay_low() -> None:
    """LoKr of factor 8 and rank 2 has rank 16, LoHa of rank 4 has 16: no more is stored."""
    from lora_booth.adapters.lycoris import as_lora

    for made, rank in ((lokr((640, 640), 8, rank1=None, rank2=2), 16), (loha((640, 640), 4), 16)):
        down, up, _ = as_lora("unet.x.to_q", made[0])
        assert down.shape == (rank, 640) and up.shape == (640, rank)
        assert torch.linalg.matrix_rank(made[1]) == rank


# --- mutants -------------------------------------------------------------------------------------------------------


def test_mutants(tmp_path: Path) -> None:
    """300 of the 10,000 of benchmarks/adapter_mutants.py: loaded within the limits, or refused by name."""
    judge = Judge(tmp_path / "mutant.safetensors")
    with no_hang():
        for mutant in mutants(small_files(tmp_path), count=300, seed=1):
            judge.load(mutant)
    assert not judge.faults and judge.loaded and sum(judge.refused.values()) > 100
    assert judge.loaded + sum(judge.refused.values()) == 300 and len(judge.refused) >= 5


@pytest.mark.skipif(sys.platform == "win32", reason="atheris and its stand-in are run elsewhere")
def test_the_fuzz_target_runs_on_its_corpus() -> None:
    from fuzz import fuzz_adapter_header as target

    assert target.run_without_atheris(300) >= 300 + len(list(target.CORPUS.iterdir()))
