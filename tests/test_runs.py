"""A run's folder: what it holds, who may use it, how it is continued, stopped and copied."""

from __future__ import annotations

import json
import math
import os
import shutil
import signal
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import CONFIG, LORA, in_process, run_and_tell, subject, tiny, tiny_run, told
from safetensors.torch import load_file

from lora_booth.adapters import Adapter
from lora_booth.checkpoint import newest, publish, read_back
from lora_booth.errors import SettingsError, TrainingError
from lora_booth.progress import Step
from lora_booth.training import train
from lora_booth.training.health import BEFORE, RECENT, Health, RollBack

QUICK = replace(CONFIG, steps=6, checkpoint_every=2)


class Broken(Exception):
    pass


def at(index: int, what: Callable[[], Any]) -> Callable[[Step], None]:
    def on_step(step: Step) -> None:
        if step.index == index:
            what()

    return on_step


def broken() -> None:
    raise Broken


def record(folder: Path) -> dict[str, Any]:
    found: dict[str, Any] = json.loads((folder / "run.json").read_text())
    return found


def events(folder: Path) -> list[str]:
    return [event["what"] for event in record(folder)["events"]]


def metrics(folder: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def whole(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """A finished run: its folder and its adapter's digest."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    return folder, tiny_run(photos, folder, config=QUICK)


# --- what is in it -------------------------------------------------------------------------------------------------------


def test_a_folder_explains_itself(whole: tuple[Path, str], photos: Path) -> None:
    folder, digest = whole
    names = {"adapter.safetensors", "checkpoints", "lock", "metrics.jsonl", "run.json"}
    assert names <= {path.name for path in folder.iterdir()}
    kept = record(folder)
    assert (kept["status"], kept["step"], kept["steps"]) == ("finished", 6, 6)
    assert kept["facts"]["base"] == {"name": "tiny", "fingerprint": tiny().fingerprint, "dtype": "float32"}
    assert kept["facts"]["lora"]["rank"] == 2 and kept["facts"]["config"]["seed"] == 0
    assert kept["surroundings"]["torch"] == torch.__version__ and kept["surroundings"]["threads"] == 1
    assert {"preparing", "training", "saving"} <= set(kept["seconds"]) and kept["adapter"]["digest"] == digest
    shas = [photo["sha256"] for photo in kept["facts"]["subjects"][0]["photos"]]
    assert shas == [photo.sha256 for photo in subject(photos).photos]
    lines = metrics(folder)
    assert [line["step"] for line in lines] == [1, 2, 3, 4, 5, 6] and all(math.isfinite(line["loss"]) for line in lines)
    assert (folder / "lock").read_text() == ""
    text = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for private in (str(photos), photos.parent.name, *(path.name for path in photos.iterdir())):
        assert private.encode() not in text


def test_a_checkpoint_holds_the_adapter_so_far(photos: Path, tmp_path: Path) -> None:
    seen: dict[int, Any] = {}
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path, config=QUICK, on_step=lambda s: (seen.setdefault(s.index, s.factors()), at(5, broken)(s)))
    [folder] = (tmp_path / "checkpoints").iterdir()
    assert sorted(path.name for path in folder.iterdir()) == [
        *("adapter.safetensors", "manifest.json", "metrics.jsonl", "run.json", "state.pt"),
    ]
    adapter = Adapter.load(folder / "adapter.safetensors")
    assert adapter.card.steps == 4 and adapter.card.token == "sks"
    assert all(torch.equal(f.up.float(), seen[4][key].up.half().float()) for key, f in adapter.modules.items())
    again = adapter.save(tmp_path / "again.safetensors")
    assert load_file(again).keys() == load_file(folder / "adapter.safetensors").keys()
    tiny().pipeline.load_lora_weights(folder / "adapter.safetensors")  # stock diffusers reads it
    assert record(tmp_path)["status"] == "broken off by Broken"


# --- the same call again -------------------------------------------------------------------------------------------------


def test_a_finished_run_is_read_and_not_trained(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    folder, digest = whole
    shutil.copytree(folder, tmp_path / "run")

    def call() -> Adapter:
        run = {"out": tmp_path / "run", "on_step": lambda _: broken()}
        return train(tiny(), subject(photos), lora=LORA, config=QUICK, progress=False, **run)  # type: ignore[arg-type]

    assert call().digest() == digest
    file = tmp_path / "run" / "adapter.safetensors"
    good = file.read_bytes()
    file.write_bytes(good[:-1])
    assert call().digest() == digest and file.read_bytes() == good  # written anew from the checkpoint
    shutil.rmtree(tmp_path / "run" / "checkpoints")
    assert call().modules.keys() == Adapter.load(file).modules.keys()  # the file alone will do
    file.unlink()
    with pytest.raises(Broken):  # without both it begins anew
        call()


def test_a_run_goes_on_where_it_stopped_and_its_metrics_too(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    folder, digest = whole
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path, config=QUICK, on_step=at(3, broken))
    assert [line["step"] for line in metrics(tmp_path)] == [1, 2]
    with open(tmp_path / "metrics.jsonl", "a") as file:
        file.write('{"step": 3, "lo')  # as a crash may leave it
    assert tiny_run(photos, tmp_path, config=QUICK) == digest
    lines, expected = metrics(tmp_path), metrics(folder)
    assert [(line["step"], line["loss"], line["rate"]) for line in lines] == [
        (line["step"], line["loss"], line["rate"]) for line in expected
    ]
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(lines, lines[1:], strict=False))
    assert events(tmp_path) == ["continued at step 2"]


def test_other_settings_are_named_and_restart_forgets_the_run(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    folder, digest = whole
    shutil.copytree(folder, tmp_path / "run")
    (tmp_path / "run" / "mine.txt").write_text("a user's own")
    other = replace(QUICK, seed=1, steps=4)
    with pytest.raises(TrainingError, match=r"step 6\): .*steps 6 -> 4; .*seed 0 -> 1; use another folder, or .*restart=True"):
        tiny_run(photos, tmp_path / "run", config=other)
    few = replace(subject(photos), photos=subject(photos).photos[:2])
    with pytest.raises(TrainingError, match="photos 3 -> 2"):
        train(tiny(), few, lora=LORA, config=QUICK, out=tmp_path / "run", progress=False)
    renamed = replace(subject(photos), token="ohwx")
    with pytest.raises(TrainingError, match="token sks -> ohwx"):
        train(tiny(), renamed, lora=LORA, config=QUICK, out=tmp_path / "run", progress=False)
    assert tiny_run(photos, tmp_path / "run", config=other, restart=True) == tiny_run(photos, None, config=other)
    assert [line["step"] for line in metrics(tmp_path / "run")] == [1, 2, 3, 4]
    assert (tmp_path / "run" / "mine.txt").exists() and events(tmp_path / "run") == []
    with pytest.raises(SettingsError, match="give out="):
        tiny_run(photos, None, restart=True)


def test_settings_that_only_round_differently_are_said(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    """One picture at a time or with gradient checkpointing: the run goes on, and is the same but for rounding."""
    folder, _ = whole
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path, config=QUICK, on_step=at(3, broken))
    saving = replace(QUICK, pictures_at_a_time=1, gradient_checkpointing=True)
    tiny_run(photos, tmp_path, config=saving)
    [said] = events(tmp_path)
    assert said.startswith(
        "continued at step 2, computed otherwise (pictures_at_a_time None -> 1; gradient_checkpointing False"
    )
    expected = Adapter.load(folder / "adapter.safetensors")
    for key, factors in Adapter.load(tmp_path / "adapter.safetensors").modules.items():
        assert (factors.delta() - expected.modules[key].delta()).norm() <= 0.01 * expected.modules[key].delta().norm()


# --- one folder, one run -------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(TrainingError, match=rf"another run is at work in it \(process {os.getpid()} on \S+\)"):
            tiny_run(photos, tmp_path, config=QUICK)

    tiny_run(photos, tmp_path, config=QUICK, on_step=at(3, second))


def test_the_lock_goes_with_its_process(photos: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    slow = {"config": replace(QUICK, steps=10_000, checkpoint_every=5)}
    first = in_process(run_and_tell, photos, tmp_path / "run", report, slow)
    wait_for(lambda: len(told(report)) >= 12, first)
    with pytest.raises(TrainingError, match=f"process {first.pid} on"):
        tiny_run(photos, tmp_path / "run", **slow)
    first.kill()
    first.join()
    last = told(report)[-1]
    found = newest([tmp_path / "run" / "checkpoints"])
    assert found is not None and last - 5 <= found.step <= last + 1  # at most the save interval is lost
    seen: list[int] = []
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path / "run", **slow, on_step=lambda s: (seen.append(s.index), broken()))
    assert seen == [found.step + 1]


def wait_for(ready: Callable[[], bool], process: Any) -> None:
    ends = time.monotonic() + 120
    while not ready():
        assert process.is_alive() and time.monotonic() < ends
        time.sleep(0.02)


# --- stopping ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "left"), [("SIGINT", KeyboardInterrupt), ("SIGTERM", SystemExit), ("SIGHUP", SystemExit)])
def test_a_signal_saves_at_the_step_boundary(
    name: str, left: type[BaseException], whole: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    if not hasattr(signal, name):
        pytest.skip(f"no {name} here")
    number = getattr(signal, name)
    before = signal.getsignal(number)
    if number != signal.SIGINT:
        signal.signal(number, signal.SIG_DFL)
    seen: list[int] = []
    with pytest.raises(left) as stopped:
        on_step = at(3, lambda: os.kill(os.getpid(), number))
        tiny_run(photos, tmp_path, config=QUICK, on_step=lambda s: (seen.append(s.index), on_step(s)))
    if left is SystemExit:
        assert stopped.value.code == 128 + number
        assert signal.getsignal(number) == signal.SIG_DFL  # put back
    signal.signal(number, before)
    words = "interrupted" if number == signal.SIGINT else f"told to end ({name})"
    assert events(tmp_path) == [f"{words} at step 4 of 6: saved; the same call continues"]
    assert seen == [1, 2, 3, 4] and record(tmp_path)["status"] == words
    assert tiny_run(photos, tmp_path, config=QUICK) == whole[1]


def test_a_second_signal_acts_at_once(photos: Path, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        tiny_run(photos, tmp_path, config=QUICK, on_step=at(3, twice))
    assert record(tmp_path)["status"] == "broken off by KeyboardInterrupt"
    with pytest.raises(KeyboardInterrupt):  # without a folder there is nothing to save, and the first one acts
        tiny_run(photos, None, config=QUICK, on_step=at(3, lambda: signal.raise_signal(signal.SIGINT)))


def test_a_time_limit_ends_with_a_usable_adapter(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    early = train(tiny(), subject(photos), lora=LORA, config=QUICK, out=out, progress=False, time_limit=1e-6)
    assert early.card.steps == 1 and any(f.up.any() for f in early.modules.values())
    assert events(out) == ["time is up at step 1 of 6: saved; the same call continues"]
    assert not (out / "adapter.safetensors").exists()  # that is the finished one
    assert Adapter.load(out / "checkpoints" / "000001" / "adapter.safetensors").card.steps == 1
    assert tiny_run(photos, out, config=QUICK, time_limit=60) == whole[1]
    without = train(tiny(), subject(photos), lora=LORA, config=QUICK, progress=False, time_limit=1e-6)
    assert without.digest() == early.digest()
    with pytest.raises(SettingsError, match="time_limit 0"):
        tiny_run(photos, None, time_limit=0)


# --- the mirror ----------------------------------------------------------------------------------------------------------


def test_a_lost_folder_goes_on_from_the_mirror(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    run, drive = tmp_path / "run", tmp_path / "drive"
    with pytest.raises(KeyboardInterrupt):
        tiny_run(photos, run, config=QUICK, mirror=drive, on_step=at(3, lambda: signal.raise_signal(signal.SIGINT)))
    assert "safe at step 4: copied to the mirror and read back" in events(run)
    assert [folder.name for folder in (drive / "checkpoints").iterdir()] == ["000004"]
    shutil.rmtree(run)
    seen: list[int] = []
    assert tiny_run(photos, run, config=QUICK, mirror=drive, on_step=lambda s: seen.append(s.index)) == whole[1]
    assert seen == [5, 6] and [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    assert "interrupted at step 4 of 6: saved; the same call continues" not in events(run)  # that came after the copy
    shutil.rmtree(run)
    assert tiny_run(photos, run, config=QUICK, mirror=drive, on_step=lambda s: broken()) == whole[1]  # finished there too


def test_a_mirror_that_fails_stops_nothing(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert tiny_run(photos, tmp_path / "run", config=QUICK, mirror=tmp_path / "file") == whole[1]
    assert events(tmp_path / "run")[-1] == "the mirror has no copy of step 6: Not a directory"


# --- the losses' own words -----------------------------------------------------------------------------------------------


def dreambooth_like(count: int, seed: int = 0) -> list[float]:
    """Losses that differ a hundredfold, as those of single timesteps do."""
    generator = torch.Generator().manual_seed(seed)
    return (10 ** (2 * torch.rand(count, generator=generator) - 2)).tolist()


def test_ordinary_losses_are_no_spike() -> None:
    for seed in range(20):
        health = Health()
        assert health.judge(dreambooth_like(1500, seed), step=1500, rate=1e-4) == []


def test_a_spike_goes_back_once_and_is_then_told() -> None:
    health, losses = Health(), dreambooth_like(200)
    assert health.judge(losses, step=200, rate=1e-4) == [] and health.well
    high = [loss * 100 for loss in dreambooth_like(2 * RECENT, 1)]
    with pytest.raises(RollBack, match=r"the loss is \d+ times what it was, at step 2\d\d: the learning rate is halved"):
        health.judge(high, step=200 + len(high), rate=1e-4)
    assert not Health.from_state(Health(losses=losses[-BEFORE:] + high[:8]).state()).well  # no state to go back to
    again = Health.from_state(Health(losses=losses[-BEFORE - RECENT :]).state(), after=health)
    assert again.rate_share == 0.5
    [said] = again.judge(high, step=200 + len(high), rate=1e-4)
    assert said.startswith("the loss is ") and again.rate_share == 0.5


def test_a_kill_while_old_checkpoints_go_leaves_no_half_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by 200 kills: a folder under a checkpoint's name was half removed."""
    files = {"state.pt": b"x" * 100, "adapter.safetensors": b"y" * 100}
    first = publish(tmp_path, 5, 1, files)

    def killed(folder: Path, **_: Any) -> None:
        if Path(folder).exists():  # not the temporary one of another time
            next(Path(folder).iterdir()).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 10, 2, files)
    assert not first.folder.exists()
    names = [folder for folder in tmp_path.iterdir() if not folder.name.startswith(".")]
    assert [read_back(folder) is not None for folder in names] == [True]
    monkeypatch.undo()
    publish(tmp_path, 15, 3, files)
    assert [folder.name for folder in tmp_path.iterdir()] == ["000015"]  # the litter is gone too
