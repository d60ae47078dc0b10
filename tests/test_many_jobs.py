"""lora-booth train-many: jobs from a file, checked before the first one starts, in a table that says what became of each."""

from __future__ import annotations

import csv
import json
import shutil
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pipelines
import pytest

import lora_booth.runs.one
from lora_booth.adapters.adapter import Adapter

TRAIN = ("--steps", 2, "--rank", 2, "--prior-loss-weight", 0, "--min-photos", 1)


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return pipelines.save("sd1", tmp_path_factory.mktemp("bases") / "tiny")


def job(folder: Path | str, **more: Any) -> dict[str, Any]:
    return {"folder": str(folder), "token": "sks", "class_noun": "dog", **more}


def write(file: Path, *jobs: object) -> Path:
    file.write_text("".join(f"{one if isinstance(one, str) else json.dumps(one)}\n" for one in jobs))
    return file


def table(out: Path) -> dict[str, dict[str, str]]:
    with (out / "jobs.csv").open() as file:
        return {row["name"]: row for row in csv.DictReader(file)}


def states(out: Path) -> dict[str, str]:
    return {name: row["state"] for name, row in table(out).items()}


@pytest.mark.slow
def test_two_subjects_and_a_broken_folder(call: Callable[..., Any], photos: Path, tiny: Path, tmp_path: Path) -> None:
    """The broken one harms no other; the same command does not train again what is done, and takes up what was mended."""
    out = tmp_path / "runs"
    for name in ("bob", "broken"):
        shutil.copytree(photos, tmp_path / name)
    (tmp_path / "bob" / "0.jpg").unlink()
    for photo in (tmp_path / "broken").iterdir():
        photo.write_bytes(b"no picture")
    jobs = write(tmp_path / "jobs.jsonl", job(photos), "", job(tmp_path / "broken"), job(tmp_path / "bob", name="bob 2"))
    words = ("train-many", jobs, "--base", tiny, "--out", out, "--together", 2, *TRAIN, "--mirror", f"file://{tmp_path}/drive")
    code, said, err = call(*words)
    assert {path.parent.name for path in (tmp_path / "drive").glob("*/checkpoints")} == {"rex", "bob 2"}
    assert code == 2 and f"jobs.jsonl:3: {tmp_path / 'broken'}" in err
    assert err.splitlines()[-1].startswith(f"error: 1 of 3 jobs failed; {out / 'jobs.csv'} says why, first broken: ")
    assert said == f"2 of 3 adapters in {out}, one in each folder; {out / 'jobs.csv'} lists all jobs\n"
    assert states(out) == {"rex": "finished", "broken": "failed", "bob 2": "finished"}
    assert "no usable photo" in table(out)["broken"]["error"] and table(out)["rex"]["error"] == ""
    files = {name: out / name / "adapter.safetensors" for name in ("rex", "bob 2")}
    assert {Adapter.load(file).card.photos for file in files.values()} == {2, 3}
    before = {name: file.stat().st_mtime_ns for name, file in files.items()}

    shutil.copy(photos / "1.jpg", tmp_path / "broken" / "0.jpg")
    code, said, err = call(*words)
    assert code == 0 and said.startswith("3 of 3 adapters") and "rex: finished already" in err
    assert set(states(out).values()) == {"finished"}
    assert {name: file.stat().st_mtime_ns for name, file in files.items()} == before


@pytest.mark.slow
def test_an_interrupt_is_in_the_table_and_the_same_command_goes_on(
    call: Callable[..., Any], photos: Path, tiny: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "runs"
    jobs = write(tmp_path / "jobs.jsonl", *(job(photos, name=name) for name in ("a", "b", "c")))
    words = ("train-many", jobs, "--base", tiny, "--out", out, "--together", 2, *TRAIN, "--steps", 4)
    asked, seen = lora_booth.runs.stopping.Stopping.asked, []

    def asked_until(stopping: Any, *, copying: float) -> int:
        seen.append(states(out))
        if len(seen) == 3:
            signal.raise_signal(signal.SIGINT)
        return asked(stopping, copying=copying)

    with monkeypatch.context() as patch:
        patch.setattr(lora_booth.runs.stopping.Stopping, "asked", asked_until)
        code, _, err = call(*words)
    assert code == 130 and "run the same command again to continue" in err and "error" not in err
    assert seen[0] == {"a": "training", "b": "training", "c": "waiting"}
    assert states(out) == {"a": "stopped", "b": "stopped", "c": "waiting"}
    assert call(*words)[0] == 0 and set(states(out).values()) == {"finished"}
    assert [Adapter.load(out / name / "adapter.safetensors").card.steps for name in "abc"] == [4] * 3


GOOD = '{"folder": "PHOTOS", "token": "sks", "class_noun": "dog"}'


@pytest.mark.parametrize(
    ("line", "told"),
    [
        ("{", "not JSON ("),
        ("[]", "[] is not a job; write "),
        (GOOD.replace('"token": "sks", ', ""), "is not a job; write "),
        (GOOD.replace("}", ', "steps": 4}'), "is not a job; write "),
        (GOOD.replace("PHOTOS", "PHOTOS/none"), "none: no such folder"),
        (GOOD.replace('"PHOTOS"', "5"), "folder 5; needed: a path"),
        (GOOD.replace("sks", "{token}"), "without braces"),
        (GOOD.replace('"sks"', "5"), "token 5; needed: a string"),
        (GOOD.replace('"dog"', '"a dog"'), "pass 'dog'"),
        (GOOD, "name 'rex' is taken"),
        (GOOD.replace("}", ', "name": "Rex"}'), "in case only"),
        (GOOD.replace("}", ', "name": "../rex"}'), "name '../rex'"),
        (GOOD.replace("}", ', "name": "jobs.csv"}'), "name 'jobs.csv' is taken"),
        (GOOD.replace("}", ', "name": 5}'), "name 5; needed"),
    ],
)
def test_a_mistake_is_told_with_its_line_before_anything_starts(
    line: str, told: str, call: Callable[..., Any], photos: Path, tmp_path: Path
) -> None:
    jobs = write(tmp_path / "jobs.jsonl", GOOD.replace("PHOTOS", str(photos)), line.replace("PHOTOS", str(photos)))
    code, out, err = call("train-many", jobs, "--out", tmp_path / "runs")
    last = err.splitlines()[-1]
    assert code == 2 and not out and last.startswith(f"error: {jobs}:2: ") and told in last, err
    assert not (tmp_path / "runs").exists()


def test_a_run_is_not_in_the_folder_of_its_photos(call: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    """And what to do instead is said without an option that this command does not have."""
    shutil.copytree(photos, tmp_path / "photos" / "rex")
    jobs = write(tmp_path / "jobs.jsonl", job(tmp_path / "photos" / "rex"))
    code, _, err = call("train-many", jobs, "--out", tmp_path / "photos")
    assert code == 2 and err.splitlines()[-1].endswith("rex: holds the photos; use another folder for the run")


def test_files_that_are_in_the_way(call: Callable[..., Any], photos: Path, tmp_path: Path) -> None:
    jobs = write(tmp_path / "jobs.jsonl", job(photos))
    (tmp_path / "jobs.csv").write_text("dog,owner\n")
    for words, told in (
        ((tmp_path / "none.jsonl",), "none.jsonl: cannot be read (No such file"),
        ((write(tmp_path / "empty.jsonl", ""),), "empty.jsonl: no jobs"),
        ((jobs, "--out", jobs), "is a file; pass --out a folder"),
        ((jobs, "--out", tmp_path), "jobs.csv: not a table of jobs"),
    ):
        code, _, err = call("train-many", *words, *(() if "--out" in words else ("--out", tmp_path / "runs")))
        assert code == 2 and told in err.splitlines()[-1], err
    assert (tmp_path / "jobs.csv").read_text() == "dog,owner\n"
