"""A run's folder: what it holds, who may use it, how it is continued, stopped and copied."""

from __future__ import annotations

import errno
import io
import json
import math
import os
import shutil
import signal
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from hashlib import sha256
from pathlib import Path
from typing import Any

import pytest
import torch
from faults import CONFIG, LORA, failing_disk, in_process, run_and_tell, subject, tiny, tiny_run, told
from fsspec.implementations.memory import MemoryFileSystem
from PIL import Image
from safetensors.torch import load_file

from lora_booth.adapters.adapter import Adapter
from lora_booth.config import TrainingConfig, settled
from lora_booth.errors import LoraBoothError, SettingsError, TrainingError
from lora_booth.files import Owned
from lora_booth.runs.one import train
from lora_booth.runs.stopping import TIME_UP, Stopping
from lora_booth.training import checkpoint
from lora_booth.training.checkpoint import Checkpoint, checkpoints_in, discard, identity_in, newest, publish, read_back
from lora_booth.training.health import BEFORE, RECENT, Health, RollBack
from lora_booth.training.job import FORMAT
from lora_booth.training.loop import learning_rate
from lora_booth.training.mirror import Mirror
from lora_booth.training.progress import Step
from lora_booth.training.remote import Remote, mirror_at

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


@pytest.fixture(params=["folder", "file", "memory"])
def drive(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    folder = tmp_path / "drive"
    return {"folder": str(folder), "file": folder.as_uri(), "memory": f"memory://{tmp_path.name}/drive"}[request.param]


def copies_in(drive: str) -> list[Any]:
    """The checkpoints there, the newest last."""
    return sorted(checkpoints_in(mirror_at(drive) / "checkpoints"), key=lambda folder: folder.name)  # type: ignore[operator]


# --- what is in it -------------------------------------------------------------------------------------------------------


def test_a_folder_explains_itself(whole: tuple[Path, str], photos: Path) -> None:
    folder, digest = whole
    names = {"adapter.safetensors", "checkpoints", ".lora_booth.lock", ".lora_booth.jsonl", "metrics.jsonl", "run.json"}
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
    assert (folder / ".lora_booth.lock").read_text() == ""
    text = b"".join(path.read_bytes() for path in folder.rglob("*") if path.is_file())
    for private in (str(photos), photos.parent.name, *(path.name for path in photos.iterdir())):
        assert private.encode() not in text


def test_a_checkpoint_holds_the_adapter_so_far(photos: Path, tmp_path: Path) -> None:
    seen: dict[int, Any] = {}
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path, config=QUICK, on_step=lambda s: (seen.setdefault(s.index, s.factors()), at(5, broken)(s)))
    _, folder = sorted((tmp_path / "checkpoints").iterdir())
    assert sorted(path.name for path in folder.iterdir()) == [
        *("adapter.safetensors", "manifest.json", "metrics.jsonl", "run.json", "state.pt"),
    ]
    adapter = Adapter.load(folder / "adapter.safetensors")
    assert adapter.card.steps == 4 and adapter.card.token == "sks"
    assert all(torch.equal(f.up.float(), seen[4][key].up.half().float()) for key, f in adapter.modules.items())
    again = adapter.save(tmp_path / "again.safetensors")
    assert load_file(again).keys() == load_file(folder / "adapter.safetensors").keys()
    tiny().pipeline.load_lora_weights(folder / "adapter.safetensors")  # stock diffusers reads it
    assert record(tmp_path)["status"] == "interrupted by Broken"


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
    with pytest.raises(
        TrainingError, match=r"adapter.safetensors is not a file of this library, or was changed since; move it"
    ):
        call()
    file.unlink()
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
    assert tiny_run(photos, tmp_path, config=QUICK) == digest
    lines, expected = metrics(tmp_path), metrics(folder)
    assert [(line["step"], line["loss"], line["rate"]) for line in lines] == [
        (line["step"], line["loss"], line["rate"]) for line in expected
    ]
    assert all(a["seconds"] <= b["seconds"] for a, b in zip(lines, lines[1:], strict=False))
    assert events(tmp_path) == ["continued at step 2"]


@pytest.mark.slow
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
    with pytest.raises(SettingsError, match="pass out="):
        tiny_run(photos, None, restart=True)


@pytest.mark.slow
def test_settings_that_only_round_differently_are_said(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    """One picture at a time or with gradient checkpointing: the run goes on, and is the same but for rounding."""
    folder, _ = whole
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path, config=QUICK, on_step=at(3, broken))
    saving = replace(QUICK, pictures_at_a_time=1, gradient_checkpointing=True)
    tiny_run(photos, tmp_path, config=saving)
    [said] = events(tmp_path)
    assert said.startswith(
        "continued at step 2, computed differently (pictures_at_a_time None -> 1; gradient_checkpointing False"
    )
    expected = Adapter.load(folder / "adapter.safetensors")
    for key, factors in Adapter.load(tmp_path / "adapter.safetensors").modules.items():
        assert (factors.delta() - expected.modules[key].delta()).norm() <= 0.01 * expected.modules[key].delta().norm()


def flip(file: Path) -> None:
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["state.pt", "adapter.safetensors", "run.json", "manifest.json"])
@pytest.mark.parametrize("which", [("000004",), ("000002",), ("000002", "000004")])
def test_a_flipped_bit_costs_one_checkpoint_and_is_told(
    name: str, which: tuple[str, ...], whole: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path, config=QUICK, on_step=at(5, broken))
    for folder in which:
        flip(tmp_path / "checkpoints" / folder / name)
    seen: list[int] = []
    assert tiny_run(photos, tmp_path, config=QUICK, on_step=lambda s: seen.append(s.index)) == whole[1]
    left = 0 if len(which) == 2 else 6 - int(which[0])
    assert seen == list(range(left + 1, 7))
    said = [f"checkpoint {folder} is damaged: skipped" for folder in which]
    assert sorted(events(tmp_path)) == sorted([*said, *([f"continued at step {left}"] if left else [])])
    assert newest([tmp_path / "checkpoints"]).step == 6  # type: ignore[union-attr]


def test_a_changed_photo_is_named(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    shutil.copytree(whole[0], tmp_path / "run")
    shutil.copytree(photos, tmp_path / "photos")
    picture = next((tmp_path / "photos").iterdir())
    with Image.open(picture) as image:
        image.rotate(180).save(picture)
    with pytest.raises(TrainingError, match=r"step 6\): 1 of 3 photos were replaced or edited; use another folder"):
        tiny_run(tmp_path / "photos", tmp_path / "run", config=QUICK)


@pytest.mark.slow
def test_a_moved_or_copied_folder_goes_on(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    """Copied while its run is at work, as a backup would."""
    run, copy, moved = tmp_path / "run", tmp_path / "copy", tmp_path / "elsewhere" / "moved"

    def back_up() -> None:
        shutil.copytree(run, copy)
        seen: list[int] = []
        assert tiny_run(photos, copy, config=QUICK, on_step=lambda s: seen.append(s.index)) == whole[1]
        assert seen == [5, 6]

    with pytest.raises(Broken):
        tiny_run(photos, run, config=QUICK, on_step=lambda s: (at(4, back_up)(s), at(5, broken)(s)))
    moved.parent.mkdir()
    run.rename(moved)
    assert tiny_run(photos, moved, config=QUICK) == whole[1]
    assert tiny_run(photos, moved.parent / ".." / "copy", config=QUICK, on_step=lambda s: broken()) == whole[1]


@pytest.mark.slow
def test_another_number_of_threads_is_said(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path, config=QUICK, on_step=at(3, broken))
    base = tiny()
    torch.set_num_threads(2)
    try:
        adapter = train(base, subject(photos), lora=LORA, config=QUICK, out=tmp_path, progress=False)
    finally:
        torch.set_num_threads(1)
    [said] = events(tmp_path)
    assert said.startswith("continued at step 2, computed differently (threads 1 -> 2")
    expected = Adapter.load(whole[0] / "adapter.safetensors")
    for key, factors in adapter.modules.items():
        assert (factors.delta() - expected.modules[key].delta()).norm() <= 0.01 * expected.modules[key].delta().norm()


@pytest.mark.slow
def test_a_restart_removes_only_what_a_run_has_made(photos: Path, tmp_path: Path) -> None:
    config, run = replace(QUICK, sample_every=4, sample_prompt="a dog", steps=4), tmp_path / "run"
    tiny_run(photos, run, config=config)
    there = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    mine = [run / name for name in ("samples/mine.png", "checkpoints/notes.txt", "crops/mine.webp", "mine.safetensors")]
    for file in mine:
        file.write_text("a user's own")
    other = run / "checkpoints" / "000500"  # of another program
    other.mkdir()
    with pytest.raises(Broken):
        tiny_run(photos, run, config=config, restart=True, on_step=at(1, broken))
    left = {path.relative_to(run) for path in run.rglob("*") if path.is_file()}
    assert all(file.exists() for file in mine)
    ours = {".lora_booth.lock", ".lora_booth.jsonl", "run.json", "metrics.jsonl", "samples", "crops", "report.html"}
    assert {path.parts[0] for path in there & left} == ours
    assert not list(run.glob("checkpoints/[0-9]*/state.pt")) and not (run / "adapter.safetensors").exists()


def test_a_crop_is_never_written_through_a_link(tmp_path: Path, photos: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    (mine / "0000.webp").write_bytes(b"mine")
    (tmp_path / "run" / "crops").mkdir(parents=True)
    (tmp_path / "run" / "crops" / "0000.webp").symlink_to(mine / "0000.webp")
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "crops").symlink_to(mine)
    for name in ("run", "other"):
        tiny_run(photos, tmp_path / name, config=replace(CONFIG, steps=1))
    assert [path.read_bytes() for path in mine.iterdir()] == [b"mine"]
    assert (tmp_path / "run" / "crops" / "0000.webp").is_symlink() and (tmp_path / "run" / "crops" / "0001.webp").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("name", ["a\nb", "a\x1b[31mb", "a\u202eb", "a'b\"c"])
def test_a_strange_name_is_a_name_and_is_shown_escaped(
    name: str, whole: tuple[Path, str], photos: Path, tmp_path: Path
) -> None:
    assert tiny_run(photos, tmp_path / name, config=QUICK) == whole[1]
    with pytest.raises(TrainingError, match="seed 0 -> 1") as other:
        tiny_run(photos, tmp_path / name, config=replace(QUICK, seed=1))
    (tmp_path / name / "file").write_text("")
    with pytest.raises(TrainingError, match="Not a directory") as file:
        tiny_run(photos, tmp_path / name / "file", config=QUICK)
    for error in (other, file):
        assert str(error.value).isprintable() and str(error.value).startswith(str(tmp_path))


def test_a_folder_that_cannot_be_had_is_one_plain_error(photos: Path, tmp_path: Path) -> None:
    with failing_disk(tmp_path / "run", 1, times=10**6, error=errno.EROFS):
        with pytest.raises(TrainingError, match=r"run: cannot be written \(Read-only file system\); use another folder"):
            tiny_run(photos, tmp_path / "run", config=QUICK)
    with pytest.raises(SettingsError, match="out .*null byte"):
        tiny_run(photos, tmp_path / "a\0b", config=QUICK)


def test_a_tilde_is_the_home_folder(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.setenv("USERPROFILE", str(tmp_path / "home"))
    train(tiny(), subject(photos), lora=LORA, config=QUICK, out="~/run", mirror="~/drive", progress=False)
    assert sorted(path.name for path in (tmp_path / "home").iterdir()) == ["drive", "run"]
    assert not (tmp_path / "~").exists()


@pytest.mark.slow
@pytest.mark.parametrize("text", ["", "[]", "\xff", '{"identity": 1, "events": null}'])
def test_a_record_that_is_gone_is_written_anew(text: str, whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path, config=QUICK, on_step=at(3, broken))
    (tmp_path / "run.json").write_text(text, encoding="latin-1")
    with pytest.raises(TrainingError, match="run.json is not a file of this library, or was changed since"):
        tiny_run(photos, tmp_path, config=QUICK)
    (tmp_path / "run.json").unlink()
    assert tiny_run(photos, tmp_path, config=QUICK) == whole[1] and events(tmp_path) == ["continued at step 2"]
    (tmp_path / "run.json").unlink()
    assert tiny_run(photos, tmp_path, config=QUICK) == whole[1] and record(tmp_path)["status"] == "finished"


BASES: list[Any] = [[], {"fingerprint": 1}, {"fingerprint": "0", "dtype": 1, "name": "?"}]
FORGED: list[Any] = [[], "x", None, {"format": FORMAT}, *({"format": FORMAT, "base": base} for base in BASES)]


@pytest.mark.parametrize("facts", [{}, {"base": {}}, {"base": {"fingerprint": "0", "dtype": 1, "name": "?"}}, *FORGED])
def test_a_finished_run_of_another_version_is_refused(facts: Any, photos: Path, tmp_path: Path) -> None:
    Owned(tmp_path).write("run.json", json.dumps({"status": "finished", "facts": facts}).encode())
    with pytest.raises(
        TrainingError, match=r"holds a run with other .*\(step 0\): made by another version; use another folder"
    ):
        tiny_run(photos, tmp_path, config=QUICK)


@pytest.mark.slow
def test_more_steps_continue_a_run(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    """A finished one too, and its copies: on the schedule of the longer run, which is said."""
    run, drive = tmp_path / "run", tmp_path / "drive"
    tiny_run(photos, run, config=QUICK, mirror=drive)
    more = replace(QUICK, steps=8)
    with pytest.raises(TrainingError, match=r"\(step 6\): steps 6 -> 4; use another folder"):
        tiny_run(photos, run, config=replace(QUICK, steps=4))
    with pytest.raises(TrainingError, match="steps 6 -> 8; seed 0 -> 1"):
        tiny_run(photos, run, config=replace(more, seed=1))
    seen: dict[int, float] = {}
    digest = tiny_run(photos, run, config=more, mirror=drive, on_step=lambda s: seen.update({s.index: s.learning_rate}))
    config = settled(more, tiny(), 3)
    assert seen == {7: learning_rate(config, 6), 8: learning_rate(config, 7)}
    said = events(run)
    assert f"steps 6 -> 8: the learning rate is {seen[7]:.1e} now, as in a run of 8 steps" in said
    assert said[-1] == "safe at step 8: copied to the mirror and read back"
    assert (record(run)["status"], record(run)["step"], record(run)["steps"]) == ("finished", 8, 8)
    assert [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6, 7, 8]
    assert Adapter.load(run / "adapter.safetensors").card.steps == 8 and digest != whole[1]
    assert tiny_run(photos, run, config=more, on_step=lambda _: broken()) == digest  # and that is a finished run


def test_what_follows_from_another_setting_is_not_named(photos: Path, tmp_path: Path) -> None:
    settings = TrainingConfig(steps=40, checkpoint_every=1)
    with pytest.raises(Broken):
        tiny_run(photos, tmp_path, config=replace(settings, prior_loss_weight=0.0), on_step=at(2, broken))
    few = replace(subject(photos), photos=subject(photos).photos[:2])
    with pytest.raises(TrainingError) as error:
        train(tiny(), few, lora=LORA, config=replace(settings, steps=20, prior_loss_weight=0.0), out=tmp_path, progress=False)
    assert ": steps 40 -> 20; photos 3 -> 2; use another folder" in str(error.value)  # nor warmup_steps, nor class_images


# --- only what is ours ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("restart", [False, True])
@pytest.mark.parametrize("name", ["run.json", "metrics.jsonl", "adapter.safetensors", "checkpoints"])
def test_a_folder_with_files_of_the_same_names_is_not_taken_over(
    name: str, restart: bool, photos: Path, tmp_path: Path
) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    for folder in (run, outside):
        folder.mkdir()
    (outside / "theirs").write_bytes(b"theirs")
    if name == "checkpoints":
        (run / name).symlink_to(outside)
    else:
        (run / name).write_bytes(b"theirs")
    with pytest.raises(TrainingError, match=f"run: {name} is .*; move it away, or use another folder"):
        tiny_run(photos, run, config=QUICK, restart=restart)
    assert [path.name for path in outside.iterdir()] == ["theirs"]
    assert name == "checkpoints" or (run / name).read_bytes() == b"theirs"
    if name != "checkpoints":
        (run / name).rename(outside / name)
        (run / name).symlink_to(outside / name)
        with pytest.raises(TrainingError, match=f"run: {name} is "):
            tiny_run(photos, run, config=QUICK, restart=restart)
        assert (outside / name).read_bytes() == b"theirs"


THEIRS = (
    *("lock", "lock.txt", ".notes.tmp", ".0123456789abcdef.tmp", "scores.json", "report.html", "samples/000100.png"),
    *("samples/samples.jsonl", "crops/0000.webp", "checkpoints/20240131/model.bin", "checkpoints/20240131/manifest.json"),
    *("checkpoints/000002/state.pt", "checkpoints/.000002.1.tmp/state.pt", "logs/1"),
)


@pytest.mark.slow
def test_files_of_others_stay(photos: Path, tmp_path: Path) -> None:
    """With the names that ours have; in a run, its continuation and its restart."""
    run, config = tmp_path / "run", replace(QUICK, steps=2, checkpoint_every=1, sample_every=1, sample_prompt="a dog")
    for name in THEIRS:
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(b'{"step": 1, "number": 1}')
    with pytest.raises(Broken):
        tiny_run(photos, run, config=config, on_step=at(2, broken))
    tiny_run(photos, run, config=config)
    (run / "checkpoints" / "000002.1" / "notes.txt").write_text("mine")  # beside our files
    tiny_run(photos, run, config=replace(config, seed=1), restart=True)
    assert all((run / name).read_bytes() == b'{"step": 1, "number": 1}' for name in THEIRS)
    assert [path.name for path in (run / "checkpoints" / "000002.1").iterdir()] == ["notes.txt"]
    assert "no samples of step 1: samples/samples.jsonl is not a file of this library" in events(run)


@pytest.mark.slow
def test_links_are_not_followed(photos: Path, tmp_path: Path) -> None:
    run, outside = tmp_path / "run", tmp_path / "outside"
    outside.mkdir()
    run.mkdir()
    for name in ("samples", "crops", "report.html", "scores.json", ".lora_booth.lock.txt"):
        (run / name).symlink_to(outside / name if "." in name else outside)
    for restart in (False, True):
        tiny_run(photos, run, config=replace(QUICK, steps=1, sample_every=1, sample_prompt="a dog"), restart=restart)
    assert list(outside.iterdir()) == []
    (tmp_path / "other").mkdir()
    (tmp_path / "other" / ".lora_booth.lock").symlink_to(outside / "lock")
    with pytest.raises(TrainingError, match="cannot be written .*is a link"):
        tiny_run(photos, tmp_path / "other", config=QUICK)
    assert list(outside.iterdir()) == []
    (tmp_path / "linked").symlink_to(tmp_path / "real")
    (tmp_path / "real").mkdir()
    tiny_run(photos, tmp_path / "linked", config=replace(QUICK, steps=1))  # where the user wants it
    assert (tmp_path / "real" / "adapter.safetensors").is_file()


def test_copies_of_another_run_stay(photos: Path, drive: str, tmp_path: Path) -> None:
    config = replace(QUICK, steps=1)
    tiny_run(photos, tmp_path / "one", config=config, mirror=drive)
    copies = [read_back(copy) for copy in copies_in(drive)]
    with pytest.raises(TrainingError, match="drive: holds a run with other .*seed 0 -> 1"):
        tiny_run(photos, tmp_path / "two", config=replace(config, seed=1), mirror=drive, restart=True)
    assert [read_back(copy) for copy in copies_in(drive)] == copies and None not in copies
    tiny_run(photos, tmp_path / "one", config=replace(config, seed=1), mirror=drive, restart=True)
    assert [identity_in(copy) for copy in copies_in(drive)] == [record(tmp_path / "one")["identity"]]


def test_a_run_is_not_put_among_its_photos_nor_mirrored_into_itself(photos: Path, tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="rex: holds the photos; use another folder for the run"):
        tiny_run(photos, photos.parent / "." / photos.name, config=QUICK)
    (tmp_path / "link").symlink_to(tmp_path)
    for mirror in (tmp_path, tmp_path / "link", f"{tmp_path}/x/..", tmp_path.as_uri()):
        with pytest.raises(SettingsError, match="is the run folder itself; pass a folder on other storage as mirror"):
            tiny_run(photos, tmp_path, config=QUICK, mirror=mirror)
    assert [path.name for path in tmp_path.iterdir()] == ["link"]


# --- checkpoints that somebody changed -----------------------------------------------------------------------------------


def tampered(folder: Path, **contents: bytes | None) -> None:
    """Replace files of a checkpoint (their names without the ending), and correct the manifest."""
    manifest = json.loads((folder / "manifest.json").read_bytes())
    for stem, content in contents.items():
        [name] = [path.name for path in folder.iterdir() if path.stem == stem]
        if content is None:
            (folder / name).unlink()
            del manifest["sha256"][name]
        else:
            (folder / name).write_bytes(content)
            manifest["sha256"][name] = sha256(content).hexdigest()
    (folder / "manifest.json").write_text(json.dumps(manifest))


@pytest.fixture(scope="module")
def halfway(photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("halfway")
    with pytest.raises(Broken):
        tiny_run(photos, folder, config=replace(QUICK, checkpoint_every=4), on_step=at(5, broken))
    return folder


Change = Callable[[dict[str, Any]], Any]
FIRST = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q.down"


@pytest.mark.parametrize(
    "change",
    [
        lambda state: [],
        lambda state: state.clear(),
        lambda state: state.pop("lora"),
        lambda state: state.update(lora=None),
        lambda state: state["lora"].popitem(),
        lambda state: state["lora"].update({FIRST: torch.zeros(1)}),
        lambda state: state["lora"].update({FIRST: state["lora"][FIRST] * math.nan}),
        lambda state: state["lora"].update({FIRST: "x"}),
        lambda state: state.update(step=3),
        lambda state: state.update(step="x"),
        lambda state: state.update(step=10**12),
        lambda state: state.update(optimizer={}),
        lambda state: state["optimizer"]["state"][0].update(exp_avg=torch.zeros(3)),
        lambda state: state["optimizer"].update(state=[1]),
        lambda state: state.update(health={"bad": 1}),
        lambda state: state["health"].update(losses=["x"]),
        lambda state: state["health"].update(rollbacks={}),
        lambda state: state.update(levels=5),
        lambda state: state.update(levels={"gradient_checkpointing": "yes"}),
        lambda state: state.update(good=5),
        lambda state: state.update(smoothed=torch.zeros(2)),
        lambda state: state.update(unread="x"),
    ],
)
def test_a_tampered_state_is_one_plain_error(change: Change, halfway: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(halfway, tmp_path / "run")
    [folder] = (tmp_path / "run" / "checkpoints").iterdir()
    state = torch.load(folder / "state.pt", weights_only=True)
    changed = change(state)
    content = io.BytesIO()
    torch.save(changed if isinstance(changed, list) else state, content)
    tampered(folder, state=content.getvalue())
    with pytest.raises(LoraBoothError, match="not a checkpoint of this run|does not fit this run|needed: ") as error:
        tiny_run(photos, tmp_path / "run", config=QUICK)
    assert str(error.value).isprintable()
    seen: list[int] = []
    tiny_run(photos, tmp_path / "run", config=replace(QUICK, steps=1), restart=True, on_step=lambda s: seen.append(s.index))
    assert seen == [1]


@pytest.mark.parametrize(
    ("contents", "said"),
    [
        ({"state": b""}, "not a checkpoint of this run"),
        ({"state": b"PK\x03\x04"}, "not a checkpoint of this run"),
        ({"run": b"\xff"}, "made by another version"),
        ({"run": b"[]"}, "made by another version"),
        ({"run": b'{"events": 5}'}, "made by another version"),
        ({"run": b"[" * 100_000}, "made by another version"),
        ({"run": None}, "made by another version"),
        ({"metrics": b"\xff\n{"}, None),
        ({"metrics": b'{"seconds": "x"}\n'}, None),
        ({"metrics": b'{"seconds": 1e999}\n5\n'}, None),
        ({"metrics": None}, None),
        ({"adapter": b"x"}, None),
        ({"state": None}, None),
        ({"manifest": b'{"step": -1, "number": 1, "sha256": {}}'}, None),
        ({"manifest": b'{"step": 4, "number": 1e400, "sha256": {}}'}, None),
        ({"manifest": b'{"step": 4, "number": 1, "sha256": {"../../adapter.safetensors": "0"}}'}, None),
        ({"manifest": b"[]"}, None),
    ],
)
def test_other_tampered_files_cost_no_more_than_their_checkpoint(
    contents: dict[str, bytes | None], said: str | None, halfway: Path, photos: Path, tmp_path: Path
) -> None:
    shutil.copytree(halfway, tmp_path / "run")
    [folder] = (tmp_path / "run" / "checkpoints").iterdir()
    if manifest := contents.get("manifest"):
        (folder / "manifest.json").write_bytes(manifest)
    else:
        tampered(folder, **contents)
    if said is None:
        tiny_run(photos, tmp_path / "run", config=QUICK)
        assert record(tmp_path / "run")["status"] == "finished"
    else:
        with pytest.raises(TrainingError, match=said):
            tiny_run(photos, tmp_path / "run", config=QUICK)


def test_a_checkpoint_of_pipes_and_links_is_not_read(halfway: Path, photos: Path, tmp_path: Path) -> None:
    shutil.copytree(halfway, tmp_path / "run")
    [folder] = (tmp_path / "run" / "checkpoints").iterdir()
    (folder / "state.pt").rename(tmp_path / "state.pt")
    (folder / "state.pt").symlink_to(tmp_path / "state.pt")
    tiny_run(photos, tmp_path / "run", config=QUICK)
    assert "checkpoint 000004 is damaged: skipped" in events(tmp_path / "run") and (tmp_path / "state.pt").is_file()


# --- one folder, one run -------------------------------------------------------------------------------------------------


def test_a_second_run_in_the_same_folder_is_refused(photos: Path, tmp_path: Path) -> None:
    def second() -> None:
        with pytest.raises(TrainingError, match=rf"another run is using it \(process {os.getpid()} on \S+\)"):
            tiny_run(photos, tmp_path, config=QUICK)

    tiny_run(photos, tmp_path, config=QUICK, on_step=at(3, second))


@pytest.mark.slow
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


@pytest.mark.slow
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
    words = "interrupted" if number == signal.SIGINT else f"stopped by {name}"
    assert events(tmp_path) == [f"{words} at step 4 of 6: saved; run the same call again to continue"]
    assert seen == [1, 2, 3, 4] and record(tmp_path)["status"] == words
    assert tiny_run(photos, tmp_path, config=QUICK) == whole[1]


def test_a_second_signal_acts_at_once(photos: Path, tmp_path: Path) -> None:
    def twice() -> None:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        raise AssertionError("not reached")

    with pytest.raises(KeyboardInterrupt):
        tiny_run(photos, tmp_path, config=QUICK, on_step=at(3, twice))
    assert record(tmp_path)["status"] == "interrupted by KeyboardInterrupt"
    with pytest.raises(KeyboardInterrupt):  # without a folder there is nothing to save, and the first one acts
        tiny_run(photos, None, config=QUICK, on_step=at(3, lambda: signal.raise_signal(signal.SIGINT)))


@pytest.mark.slow
def test_a_second_sigterm_leaves_with_its_code(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    """While it saves: what it was writing is gone, what was there is whole."""
    before = signal.signal(signal.SIGTERM, signal.SIG_DFL)
    try:
        with pytest.raises(SystemExit) as left, pytest.MonkeyPatch.context() as patch:

            def slow(path: Path, content: bytes) -> None:
                if (tmp_path / "checkpoints" / "000002").exists():
                    signal.raise_signal(signal.SIGTERM)
                written(path, content)

            written = checkpoint.write_synced
            patch.setattr(checkpoint, "write_synced", slow)
            tiny_run(photos, tmp_path, config=QUICK)
    finally:
        signal.signal(signal.SIGTERM, before)
    assert left.value.code == 143 and record(tmp_path)["status"] == "interrupted by SystemExit"
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["000002"] and (
        tmp_path / ".lora_booth.lock"
    ).read_text() == ""
    assert tiny_run(photos, tmp_path, config=QUICK) == whole[1]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("part", "said"),
    [
        ("vae.encoder", []),  # preparation: nothing to save yet, it leaves at once
        ("unet", []),  # class images
        ("vae.decoder", ["interrupted at step 3 of 4: saved; run the same call again to continue"]),  # samples, of step 2
    ],
)
def test_ctrl_c_at_any_time_loses_nothing(part: str, said: list[str], photos: Path, tmp_path: Path) -> None:
    sampling = {"sample_every": 2, "sample_prompt": "a dog"} if said else {}
    prior = {"prior_loss_weight": 1.0, "class_images": 2} if part == "unet" else {}
    config: TrainingConfig = replace(QUICK, steps=4, **sampling, **prior)  # type: ignore[arg-type]
    base, passes = tiny(), []

    def interrupt(*_: Any) -> None:
        passes.append(1)
        if len(passes) == (2 if said else 1):  # the first samples are those of step 0
            signal.raise_signal(signal.SIGINT)

    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("LORA_BOOTH_CACHE", str(tmp_path / "cache"))  # where nothing is encoded yet
        handle = of(base.pipeline, part).register_forward_hook(interrupt)
        with pytest.raises(KeyboardInterrupt):
            train(base, subject(photos), lora=LORA, config=config, out=tmp_path / "run", progress=False)
        handle.remove()
        assert (events(tmp_path / "run") if said else []) == said
        assert (tmp_path / "run" / ".lora_booth.lock").read_text() == "" and (tmp_path / "run" / "run.json").exists() == bool(
            said
        )
        assert tiny_run(photos, tmp_path / "run", config=config) == tiny_run(photos, None, config=config)


def of(pipeline: Any, part: str) -> Any:
    for name in part.split("."):
        pipeline = getattr(pipeline, name)
    return pipeline


def test_the_time_for_the_mirror_counts_too() -> None:
    stopping = Stopping(began=time.monotonic(), time_limit=10)
    assert stopping.asked() == stopping.asked(copying=200.0) == 0
    assert stopping.asked(copying=301.0) == TIME_UP


@pytest.mark.slow
def test_a_time_limit_ends_with_a_usable_adapter(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "run"
    early = train(tiny(), subject(photos), lora=LORA, config=QUICK, out=out, progress=False, time_limit=1e-6)
    assert early.card.steps == 1 and any(f.up.any() for f in early.modules.values())
    assert events(out) == ["time is up at step 1 of 6: saved; run the same call again to continue"]
    assert not (out / "adapter.safetensors").exists()  # that is the finished one
    assert Adapter.load(out / "checkpoints" / "000001" / "adapter.safetensors").card.steps == 1
    assert tiny_run(photos, out, config=QUICK, time_limit=60) == whole[1]
    without = train(tiny(), subject(photos), lora=LORA, config=QUICK, progress=False, time_limit=1e-6)
    assert without.digest() == early.digest()
    with pytest.raises(SettingsError, match="time_limit 0"):
        tiny_run(photos, None, time_limit=0)


# --- the mirror ----------------------------------------------------------------------------------------------------------


def test_a_lost_folder_goes_on_from_the_mirror(whole: tuple[Path, str], photos: Path, drive: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tiny_run(photos, run, config=QUICK, mirror=drive, on_step=at(3, lambda: signal.raise_signal(signal.SIGINT)))
    assert "safe at step 4: copied to the mirror and read back" in events(run)
    assert [folder.name for folder in copies_in(drive)] == ["000002", "000004"]
    shutil.rmtree(run)
    seen: list[int] = []
    assert tiny_run(photos, run, config=QUICK, mirror=drive, on_step=lambda s: seen.append(s.index)) == whole[1]
    assert seen == [5, 6] and [line["step"] for line in metrics(run)] == [1, 2, 3, 4, 5, 6]
    # that came after the copy
    assert "interrupted at step 4 of 6: saved; run the same call again to continue" not in events(run)
    shutil.rmtree(run)
    assert tiny_run(photos, run, config=QUICK, mirror=drive, on_step=lambda s: broken()) == whole[1]  # finished there too


def test_a_damaged_copy_is_skipped(whole: tuple[Path, str], photos: Path, drive: str, tmp_path: Path) -> None:
    run = tmp_path / "run"
    with pytest.raises(KeyboardInterrupt):
        tiny_run(photos, run, config=QUICK, mirror=drive, on_step=at(3, lambda: signal.raise_signal(signal.SIGINT)))
    (copies_in(drive)[-1] / "state.pt").write_bytes(b"half of it")
    shutil.rmtree(run)
    assert tiny_run(photos, run, config=QUICK, mirror=drive) == whole[1]
    assert {"checkpoint 000004 in the mirror is damaged: skipped", "continued at step 2"} <= set(events(run))
    assert read_back(copies_in(drive)[-1]).step == 6  # type: ignore[union-attr]


def test_a_mirror_that_failed_at_the_end_gets_the_last_checkpoint_later(
    whole: tuple[Path, str], photos: Path, drive: str, tmp_path: Path
) -> None:
    run, how = tmp_path / "run", {"config": QUICK, "mirror": drive, "on_step": lambda step: broken()}
    shutil.copytree(whole[0], run)
    assert tiny_run(photos, run, **how) == whole[1] and [copy.name for copy in copies_in(drive)] == ["000006"]
    assert record(run) == record(whole[0])
    shutil.rmtree(run)
    assert tiny_run(photos, run, **how) == whole[1]


def test_a_url_must_be_one_that_can_be_used(photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "s3fs", None)
    for url, reason in (("s3://bucket/rex", "Install s3fs to access S3"), ("nothing://rex", "Protocol not known: nothing")):
        with pytest.raises(SettingsError, match=rf"{url}: cannot be used \({reason}\); install that package, or pass mirror"):
            tiny_run(photos, tmp_path / "run", config=QUICK, mirror=url)


def test_a_bucket_that_fails_stops_nothing(
    whole: tuple[Path, str], photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever its package raises; and what was written before is no checkpoint, and in nobody's way."""
    stock, drive = MemoryFileSystem.pipe_file, f"memory://{tmp_path.name}"

    def failing(storage: Any, path: str, *content: Any, **more: Any) -> None:
        if path.endswith("000004/manifest.json"):
            raise RuntimeError("no credentials")
        if path.endswith("000006/state.pt"):
            raise PermissionError(errno.EACCES, "Access Denied", path)
        stock(storage, path, *content, **more)

    with monkeypatch.context() as patch:
        patch.setattr(MemoryFileSystem, "pipe_file", failing)
        assert tiny_run(photos, tmp_path / "run", config=QUICK, mirror=drive) == whole[1]
    said = [line for line in events(tmp_path / "run") if "mirror" in line]
    assert said[-1] == "the mirror has no copy of step 6: Access Denied"
    # whether step 4 was copied, or skipped since step 2 still was, is a matter of time
    assert set(said[1:-1]) <= {"the mirror has no copy of step 4: RuntimeError"}
    assert [copy.name for copy in copies_in(drive)] == ["000002"]
    shutil.rmtree(tmp_path / "run")
    assert tiny_run(photos, tmp_path / "run", config=QUICK, mirror=drive) == whole[1]
    assert "continued at step 2" in events(tmp_path / "run")
    assert copies_in(drive)[-1].name == "000006"


def test_a_killed_copy_to_a_bucket_is_written_again(tmp_path: Path) -> None:
    mirror = Mirror(Remote(f"memory://{tmp_path.name}"))
    one, two = checkpoints_of(tmp_path / "run", "a", 2, 4)
    for name in ("000002", "000004"):  # without a manifest
        (mirror.folder / name).mkdir()
        (mirror.folder / name / "state.pt").write_bytes(b"half of it")
    assert newest([mirror.folder]) is None
    assert [told_by(mirror, each)[:15] for each in (one, two)] == ["safe at step 2:", "safe at step 4:"]
    assert sorted(folder.name for folder in mirror.folder.iterdir()) == ["000002", "000004"]
    assert all(read_back(folder) for folder in mirror.folder.iterdir())


def test_a_checkpoint_whose_manifest_went_meanwhile_is_removed(tmp_path: Path) -> None:
    checkpoints_of(tmp_path, "a", 2, 4)
    [(old, manifest), _] = sorted(checkpoints_in(tmp_path).items())
    (old / "manifest.json").unlink()  # by another process, or a storage that does not answer
    discard(old, manifest)
    assert [path.name for path in tmp_path.iterdir()] == ["000004"]


@pytest.mark.parametrize("scheme", ["", "file://"])
def test_a_mirror_that_fails_stops_nothing(whole: tuple[Path, str], photos: Path, scheme: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("not a folder")
    assert tiny_run(photos, tmp_path / "run", config=QUICK, mirror=f"{scheme}{tmp_path / 'file'}") == whole[1]
    assert events(tmp_path / "run")[-1] == "the mirror has no copy of step 6: Not a directory"


def checkpoints_of(parent: Path, identity: str, *steps: int) -> list[Checkpoint]:
    files = {"state.pt": b"x" * 100, "run.json": json.dumps({"identity": identity}).encode()}
    return [publish(parent, step, number, files) for number, step in enumerate(steps, 1)]


def told_by(mirror: Mirror, checkpoint: Checkpoint) -> str:
    mirror.copy(checkpoint)
    mirror.finish()
    [line] = mirror.news
    mirror.news = []
    return line


def test_a_drive_that_goes_and_comes_back(tmp_path: Path) -> None:
    """While it is away nothing is written into the empty place, where it would be called safe and be in the way."""
    drive, away = tmp_path / "mount" / "drive", tmp_path / "away"
    mirror = Mirror(drive / "checkpoints")
    one, two, three = checkpoints_of(tmp_path / "run", "a", 2, 4, 6)
    assert told_by(mirror, one) == "safe at step 2: copied to the mirror and read back"
    drive.rename(away)
    assert told_by(mirror, two) == "the mirror has no copy of step 4: No such file or directory"
    assert list((tmp_path / "mount").iterdir()) == []
    away.rename(drive)
    assert told_by(mirror, three).startswith("safe at step 6") and mirror.seconds > 0
    assert sorted(folder.name for folder in (drive / "checkpoints").iterdir()) == ["000002", "000006"]


def test_two_runs_with_one_mirror(photos: Path, tmp_path: Path) -> None:
    """They do not remove each other's copies, whoever came first."""
    drive = tmp_path / "drive"
    [one], [two] = checkpoints_of(tmp_path / "one", "a", 2), checkpoints_of(tmp_path / "two", "b", 2)
    mine, other = Mirror(drive / "checkpoints"), Mirror(drive / "checkpoints")
    assert told_by(mine, one).startswith("safe at step 2")
    assert told_by(other, two) == "the mirror has no copy of step 2: it holds checkpoints of another run"
    assert [read_back(folder).record() for folder in (drive / "checkpoints").iterdir()] == [{"identity": "a"}]  # type: ignore[union-attr]
    shutil.rmtree(drive)
    tiny_run(photos, tmp_path / "run", config=QUICK, mirror=drive)
    with pytest.raises(TrainingError, match=r"drive: holds a run with other .*seed 0 -> 1"):
        tiny_run(photos, tmp_path / "another", config=replace(QUICK, seed=1), mirror=drive)


def test_a_full_drive_stops_nothing(whole: tuple[Path, str], photos: Path, tmp_path: Path) -> None:
    with failing_disk(tmp_path / "drive", 1, times=10**6):
        assert tiny_run(photos, tmp_path / "run", config=QUICK, mirror=tmp_path / "drive") == whole[1]
    said = events(tmp_path / "run")
    assert said[-1] == "the mirror has no copy of step 6: No space left on device" and not [s for s in said if "safe" in s]
    assert record(tmp_path / "run")["status"] == "finished"


def test_a_drive_that_gives_back_other_bytes_is_found_out(
    photos: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def lossy(path: Path, content: bytes) -> None:
        written(path, bytes(len(content)) if "drive" in path.parts and path.name == "state.pt" else content)

    written = checkpoint.write_synced
    monkeypatch.setattr(checkpoint, "write_synced", lossy)
    tiny_run(photos, tmp_path / "run", config=QUICK, mirror=tmp_path / "drive")
    said = [line for line in events(tmp_path / "run") if "mirror" in line]
    assert said[-1] == "the mirror has no copy of step 6: state.pt was read back with other bytes"
    assert list((tmp_path / "drive" / "checkpoints").iterdir()) == []


# --- the losses' own words -----------------------------------------------------------------------------------------------


def dreambooth_like(count: int, seed: int = 0) -> list[float]:
    """Losses that differ a hundredfold, as those of single timesteps do."""
    generator = torch.Generator().manual_seed(seed)
    return (10 ** (2 * torch.rand(count, generator=generator) - 2)).tolist()


def test_ordinary_losses_are_no_spike() -> None:
    for seed in range(20):
        health = Health()
        assert list(health.judge(dreambooth_like(1500, seed), step=1500, rate=1e-4)) == []


def test_a_spike_goes_back_once_and_is_then_told() -> None:
    health, losses = Health(), dreambooth_like(200)
    assert list(health.judge(losses, step=200, rate=1e-4)) == [] and health.well
    high = [loss * 100 for loss in dreambooth_like(2 * RECENT, 1)]
    with pytest.raises(RollBack, match=r"the loss is \d+ times what it was, at step 2\d\d: the learning rate is halved"):
        list(health.judge(high, step=200 + len(high), rate=1e-4))
    assert not Health.from_state(Health(losses=losses[-BEFORE:] + high[:8]).state()).well  # no state to go back to
    again = Health.from_state(Health(losses=losses[-BEFORE - RECENT :]).state(), after=health)
    assert again.rate_share == 0.5
    [said] = again.judge(high, step=200 + len(high), rate=1e-4)
    assert said.startswith("the loss is ") and again.rate_share == 0.5


def test_single_updates_without_a_loss_are_told_ever_more_rarely() -> None:
    """On a GPU many losses are looked at together: what came before a rollback is told too."""
    health, told = Health(), []
    for step in range(1, 2001, 2):
        told += list(health.judge([math.nan, 1.0], step=step + 1, rate=1e-4))
    assert len(told) == 10 and health.skipped == 1000 and health.rollbacks["not finite"] == 0
    assert told[0].endswith("at step 1: the update is skipped") and told[-1].endswith(
        "at step 1023: the update is skipped (512 so far)"
    )
    judged = Health().judge([1.0, math.nan, math.nan, math.nan, 1.0], step=20, rate=1e-4)
    assert next(judged).endswith("at step 17: the update is skipped")
    assert next(judged).endswith("at step 18: the update is skipped (2 so far)")
    with pytest.raises(RollBack, match="3 times in a row, at step 19"):
        next(judged)


def test_a_kill_while_old_checkpoints_go_leaves_no_half_of_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Found by 200 kills: a folder under a checkpoint's name was half removed."""
    files = {"state.pt": b"x" * 100, "adapter.safetensors": b"y" * 100}
    first = publish(tmp_path, 5, 1, files)
    publish(tmp_path, 10, 2, files)

    def killed(folder: Path, **_: Any) -> None:
        if Path(folder).exists():  # not the temporary one of another time
            next(Path(folder).iterdir()).unlink()
            raise KeyboardInterrupt

    monkeypatch.setattr(shutil, "rmtree", killed)
    with pytest.raises(KeyboardInterrupt):
        publish(tmp_path, 15, 3, files)
    assert not first.folder.exists()
    names = [folder for folder in tmp_path.iterdir() if not folder.name.startswith(".")]
    assert [read_back(folder) is not None for folder in names] == [True, True]
    monkeypatch.undo()
    monkeypatch.setattr("lora_booth.files.is_running", lambda process: False)  # it was killed
    publish(tmp_path, 20, 4, files)
    assert sorted(folder.name for folder in tmp_path.iterdir()) == ["000015", "000020"]  # the litter is gone too


@pytest.mark.skipif(not hasattr(os, "O_DIRECTORY"), reason="Windows syncs folders by itself")
def test_everything_is_on_the_disk_before_it_gets_its_name(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What a power cut would keep: the order of syncs and renames."""
    happened: list[tuple[str, Any]] = []
    sync, rename = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda d: (happened.append(("sync", os.fstat(d).st_ino)), sync(d))[1])

    def renamed(old: Any, new: Any) -> None:
        files = [*Path(old).rglob("*"), Path(old)]
        happened.append(("rename", (Path(new).name, [path.stat().st_ino for path in files])))
        rename(old, new)

    monkeypatch.setattr(os, "replace", renamed)
    parent = tmp_path / "run" / "checkpoints"
    for number in (1, 2, 3):
        happened.clear()
        publish(parent, number, number, {"state.pt": b"x", "adapter.safetensors": b"y"})
        syncs = [i for i, (what, _) in enumerate(happened) if what == "sync"]
        final, *aside = [i for i, (what, _) in enumerate(happened) if what == "rename"]
        name, written = happened[final][1]
        assert name == f"00000{number}" and len(written) == 4  # two files, their manifest and the folder
        assert set(written) <= {happened[i][1] for i in syncs if i < final}
        assert happened[final + 1] == ("sync", parent.stat().st_ino)
        assert len(aside) == (number == 3)  # the oldest goes last
        if number == 1:
            assert {happened[i][1] for i in syncs} >= {tmp_path.stat().st_ino, parent.parent.stat().st_ino}
