"""The command line: the whole way with a real tiny pipeline, and one plain line for every mistake a user can make."""

from __future__ import annotations

import ast
import inspect
import json
import math
import os
import re
import runpy
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import fields, replace
from pathlib import Path
from typing import Any

import pipelines
import pytest
import torch
from PIL import Image

import lora_booth
from lora_booth import cli
from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.tools.bake import bake
from lora_booth.adapters.tools.convert import convert
from lora_booth.adapters.tools.extract import extract
from lora_booth.adapters.tools.inspection import difference
from lora_booth.adapters.tools.merge import merge
from lora_booth.adapters.tools.spectrum import resize
from lora_booth.base.base_model import BaseModel
from lora_booth.cli.app import fail
from lora_booth.cli.arguments import base_of, by_file, file_and_weight, parse_seeds, remember
from lora_booth.cli.options import Loading, Placement, Reading, comments, options_of
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import SettingsError, in_command, setting
from lora_booth.pictures.composition import Composition
from lora_booth.serve.limits import Limits
from lora_booth.subject.subject import Subject
from lora_booth.subject.tokens import propose_tokens
from lora_booth.training.lock import locked_file

ROOT = Path(__file__).parent.parent
CALLBACKS: dict[str, Callable[..., None]] = {one.name: one.callback for one in cli.app.registered_commands}
COMMANDS = list(CALLBACKS)
TRAIN = inspect.signature(CALLBACKS["train"]).parameters


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A diffusers folder, as `--base`."""
    return pipelines.save("sd1", tmp_path_factory.mktemp("bases") / "tiny")


@pytest.fixture(scope="module")
def rex(tmp_path_factory, photos, tiny) -> Path:
    """An adapter file that `train` wrote."""
    out = tmp_path_factory.mktemp("adapters") / "rex.safetensors"
    with pytest.raises(SystemExit) as left:
        cli.main(train_words(photos, tiny, out))
    assert left.value.code == 0
    return out


def train_words(photos: Path, tiny: Path, out: Path, *more: str) -> list[str]:
    words = ["train", str(photos), "--token", "sks", "--class-noun", "dog", "--out", str(out), "--base", str(tiny)]
    return [*words, "--steps", "6", "--rank", "2", "--prior-loss-weight", "0", *more]


def same_tensors(a: Path, b: Path) -> bool:
    return Adapter.load(a).digest() == Adapter.load(b).digest()


# --- the whole way -------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_show(call, rex):
    code, out, err = call("show", rex)
    shown = dict(line.split(maxsplit=1) for line in out.splitlines())
    assert (code, err) == (0, "")
    assert (shown["token"], shown["class_noun"], shown["photos"], shown["steps"]) == ("sks", "dog", "3", "6")
    assert shown["base_model"] == "tiny" and shown["family"] == "sd1"
    assert shown["modules"].endswith("rank 2") and "sha256" in shown["tensors"]
    assert shown["alphas"] == "2" and shown["dead"] == "none"
    assert [word for word in shown["norm"].split() if word.isalpha()] == ["down", "mid", "up"]
    count = shown["modules"].partition(",")[0]
    for reader in ("diffusers", "ComfyUI", "A1111", "sd-scripts"):
        assert shown[reader] == f"reads {count} of {count} modules"
    code, more, _ = call("show", rex, "--modules")
    assert code == 0 and more.startswith(out) and len(more.splitlines()) == len(out.splitlines()) + int(count)
    everything = json.loads(call("show", rex, "--json")[1])
    assert everything["card"]["token"] == "sks" and len(everything["modules"]) == int(count)
    assert everything["ranks"] == {"2": int(count)} and everything["readers"]["A1111"]["dropped"] == []


@pytest.mark.slow
def test_convert_there_and_back(call, rex, tmp_path):
    peft, back = tmp_path / "peft.safetensors", tmp_path / "back.safetensors"
    assert call("convert", rex, peft, "--layout", "peft")[:2] == (0, f"wrote {peft}\n")
    assert call("convert", peft, back)[0] == 0
    assert same_tensors(rex, peft) and same_tensors(rex, back)
    assert peft.read_bytes() != back.read_bytes()


@pytest.fixture(scope="module")
def ink(tmp_path_factory, tiny) -> Path:
    """Another adapter for the same base."""
    base = BaseModel.load(tiny, dtype=torch.float32, device="cpu")
    made = pipelines.random_adapter(base, LoraSpec(rank=4), seed=5, size=0.1)
    return made.save(tmp_path_factory.mktemp("adapters") / "ink.safetensors", dtype="fp32")


def figures(out: str) -> dict[str, str]:
    return dict(line.split(maxsplit=1) for line in out.splitlines())


def test_merge(call, rex, ink, tmp_path):
    both = tmp_path / "both.safetensors"
    code, out, err = call("merge", rex, f"{ink}:-0.5", "--out", both, "--dtype", "fp32")
    assert (code, err) == (0, "")
    assert figures(out)["rank"] == "6" and figures(out)["error"] == "0 of the change in total"
    assert figures(out)["wrote"].startswith(f"{both} (")
    wanted = merge([(Adapter.load(rex), 1.0), (Adapter.load(ink), -0.5)])[0]
    assert difference(Adapter.load(both), wanted).relative < 1e-6
    cut = tmp_path / "cut.safetensors"
    words = ("merge", rex, f"{ink}:-0.5", "--method", "svd", "--rank", 3, "--out", cut, "--layout", "peft", "--modules")
    code, out, _ = call(*words)
    report = merge([(Adapter.load(rex), 1.0), (Adapter.load(ink), -0.5)], method="svd", rank=3)[1]
    assert code == 0 and f"error            {report.error:.3g} of the change" in out
    assert len(out.splitlines()) == 3 + len(wanted.modules) and out.count("rank 6 -> 3") == len(wanted.modules)
    assert {f.rank for f in Adapter.load(cut).modules.values()} == {3}


def test_resize(call, ink, tmp_path):
    small = tmp_path / "small.safetensors"
    code, out, err = call("resize", ink, "--rank", 2, "--out", small, "--dtype", "fp32")
    assert (code, err) == (0, "") and figures(out)["rank"] == "2"
    assert {f.rank for f in Adapter.load(small).modules.values()} == {2}
    code, out, _ = call("resize", ink, "--energy", 0.8, "--out", small)
    low, _, high = figures(out)["rank"].partition(" to ")
    assert code == 0 and 1 <= int(low) < int(high) <= 4
    ranks = {f.rank for f in Adapter.load(small).modules.values()}
    assert (min(ranks), max(ranks)) == (int(low), int(high))


@pytest.mark.slow
def test_bake_and_extract(call, ink, tiny, tmp_path):
    tuned, file, again = tmp_path / "tuned", tmp_path / "tuned.safetensors", tmp_path / "again.safetensors"
    code, out, err = call("bake", f"{ink}:0.5", "--base", tiny, "--out", tuned, "--dtype", "fp32")
    assert (code, err) == (0, "") and out.startswith(f"wrote {tuned} (")
    assert call("bake", f"{ink}:0.5", "--base", tiny, "--out", file)[0] == 0
    assert 0.4 < file.stat().st_size / sum(path.stat().st_size for path in tuned.rglob("*.safetensors")) < 0.6
    code, out, err = call("extract", tuned, "--base", tiny, "--rank", 4, "--text-encoder", "--out", again)
    assert (code, err) == (0, "") and figures(out)["rank"] == "4" and "left" not in figures(out)
    found = difference(Adapter.load(again), Adapter.load(ink).scaled(0.5))
    assert found.kind == "same" and not found.only_a and not found.only_b
    one = ("--rank", 4, "--config", tiny, "--out", tmp_path / "third.safetensors")
    assert call("extract", file, "--base", tiny, *one)[0] == 0  # of the file, not of the folder
    assert "--config" in call("extract", tuned, "--base", tiny, *one)[2]


def test_diff(call, rex, ink, tmp_path):
    code, out, err = call("diff", rex, ink)
    assert (code, err) == (0, "") and out.startswith("unrelated: ")
    assert figures(out)["modules"].endswith("in both, 0 only in a, 0 only in b")
    assert out == call("diff", rex, ink, "--modules")[1][: len(out)]
    double = Adapter.load(ink).scaled(2.0).save(tmp_path / "double.safetensors")
    assert call("diff", ink, double)[1].splitlines()[0] == "scaled copy: b is a times 2"
    assert json.loads(call("diff", ink, double, "--json")[1])["kind"] == "scaled copy"
    assert call("diff", ink, ink)[1].startswith("same: ")


@pytest.mark.slow
def test_generate(call, rex, tiny, tmp_path):
    prompt = "a photo of sks dog"
    words = ["--prompt", prompt, "--base", tiny, "--steps", 2, "--size", "48x72", "--out", tmp_path / "new"]
    code, out, err = call("generate", rex, f"{rex}:-0.5", *words, "--seeds", "7,2")
    files = [
        tmp_path / "new" / name for name in ("a_photo_of_sks_dog-000007.png", "a_photo_of_sks_dog-000002.png", "gallery.html")
    ]
    assert (code, out.splitlines()) == (0, [str(file) for file in files])
    *notes, one, two = (line for line in err.splitlines() if not line.startswith("loading "))
    assert (one, two) == ("picture 1/2", "picture 2/2")
    assert notes and all(note.startswith("note: ") for note in notes) and "share the token 'sks'" in notes[0]
    for file in files[:2]:
        with Image.open(file) as picture:
            assert picture.size == (48, 72)
    page = files[2].read_text(encoding="utf-8")
    assert page.count("<figure") == 2 and prompt in page and "sks dog 1, sks dog -0.5" in page


def test_without_a_weight_the_cards_own_is_taken(call, rex, tiny, tmp_path, monkeypatch):
    loaded = Adapter.load(rex)
    half = replace(loaded, card=replace(loaded.card, weight=0.5)).save(tmp_path / "half.safetensors")
    seen = []
    generate = lambda self, *_, **__: seen.append(self.adapters) or sys.exit(0)  # noqa: E731
    monkeypatch.setattr("lora_booth.pictures.composition.Composition.generate", generate)
    assert call("generate", half, f"{half}:0.25", "--prompt", "x", "--base", tiny)[0] == 0
    assert [weight.value for _, weight in seen[0]] == [0.5, 0.25]


def test_share(call, rex, tmp_path):
    facts = ["--title", "Rex", "--author", "me", "--license", "cc-by-4.0", "--consent", "object", "--tags", "dog,photo"]
    code, out, _ = call("share", rex, "--out", tmp_path / "shared", *facts)
    assert (code, out.strip()) == (0, f"wrote {tmp_path / 'shared'}")
    card = Adapter.load(tmp_path / "shared").card  # a folder with one file
    assert (card.title, card.author, card.license, card.consent, card.tags) == ("Rex", "me", "cc-by-4.0", "object", "dog,photo")
    assert "cc-by-4.0" in (tmp_path / "shared" / "README.md").read_text(encoding="utf-8")
    Adapter.load(rex).save(tmp_path / "shared" / "other.safetensors")
    code, _, err = call("show", tmp_path / "shared")
    assert code == 2 and "2 .safetensors files" in err


@pytest.mark.slow
def test_regions_recipes_and_previews(call, rex, tiny, tmp_path):
    loaded = Adapter.load(rex)
    other = replace(loaded.scaled(0.5), card=replace(loaded.card, token="do", class_noun="owl"))
    dog, owl = loaded.save(tmp_path / "dog.safetensors"), other.save(tmp_path / "owl.safetensors")
    words = ["--prompt", "sks dog, do owl", "--base", tiny, "--steps", 4, "--size", "48x56"]
    words += ["--seeds", "3", "--out", tmp_path / "a"]
    places = ["--region", "dog:0,0,0.5,1", "--region", 'owl:0.5,0,1,1:"do owl"', "--preview", tmp_path / "places.png"]
    code, out, err = call("generate", dog, f"{owl}:0.8", *words, *places, "--recipe", tmp_path / "pair.json")
    assert (code, "note" in err) == (0, False)
    assert out.splitlines()[:2] == [str(tmp_path / "places.png"), str(tmp_path / "pair.json")]
    code, out, _ = call("replay", tmp_path / "pair.json", owl, dog, "--base", tiny, "--out", tmp_path / "b")
    assert code == 0
    name = "sks_dog_do_owl-000003.png"
    with Image.open(tmp_path / "a" / name) as one, Image.open(tmp_path / "b" / name) as other:
        assert one.tobytes() == other.tobytes()
    auto = ["--auto-regions", "--preview", tmp_path / "found.png"]
    assert call("generate", dog, owl, *words, *auto)[0] == 0 and (tmp_path / "found.png").is_file()


def test_two_subjects_are_separated_by_default_as_in_python(rex, tiny, tmp_path):
    loaded = Adapter.load(rex)
    owl = replace(loaded, card=replace(loaded.card, token="do", class_noun="owl"))
    files = [str(rex), str(owl.save(tmp_path / "owl.safetensors"))]
    found = Placement().composition(by_file(files), str(tiny), Loading())
    expected = Composition(BaseModel.load(tiny), [(Adapter.load(file), 1.0) for file in files])
    assert found.method == expected.method == "regions" and found.by_default and expected.by_default


@pytest.mark.slow
def test_an_interrupted_training_continues_to_the_same_tensors(call, rex, photos, tiny, tmp_path, monkeypatch):
    out = tmp_path / "again.safetensors"
    words = train_words(photos, tiny, out, "--checkpoint-every", "2")

    def stop(self, step) -> None:
        if step.index == 5:
            raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr("lora_booth.training.progress.Lines.update", stop)
        code, _, err = call(*words)
    assert code == 130
    assert err.splitlines()[-1] == "interrupted; run the same command again to continue"
    assert not out.exists()
    assert max(f.name for f in (tmp_path / "again" / "checkpoints").iterdir()) == "000004"

    done: list[int] = []
    monkeypatch.setattr("lora_booth.training.progress.Lines.update", lambda self, step: done.append(step.index))
    code, said, _ = call(*words)
    assert code == 0 and said.startswith(f"wrote {out} (")
    assert done == [5, 6]
    assert same_tensors(out, rex)


def test_ctrl_c_between_two_updates_is_told_once(call, photos, tiny, tmp_path, monkeypatch):
    def stop(self, step) -> None:
        if step.index == 2:
            signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr("lora_booth.training.progress.Lines.update", stop)
    code, _, err = call(*train_words(photos, tiny, tmp_path / "again.safetensors"))
    assert code == 130 and err.count("interrupted") == 1
    assert err.splitlines()[-1] == "interrupted at step 3 of 6: saved; run the same command again to continue"


@pytest.mark.parametrize("name", ["file/rex.safetensors", "file/a/rex.safetensors"])
def test_a_place_that_cannot_be_written_is_told_before_the_photos_are_read(name, call, tiny, tmp_path):
    (tmp_path / "file").write_text("")
    code, _, err = call(*train_words(tmp_path / "no photos", tiny, tmp_path / name))
    assert code == 2 and f"{name}: cannot be written (Not a directory)" in err and "pass --out" in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


@pytest.mark.parametrize("given, meant", [("a/rex", "a/rex"), ("a/rex.png", "a/rex"), ("rex-v1.5", "rex-v1.5")])
def test_a_name_that_is_no_adapter_file_gets_another(given, meant, call, tiny, tmp_path):
    code, _, err = call(*train_words(tmp_path, tiny, tmp_path / given))
    assert code == 2 and f"pass --out {tmp_path / meant}.safetensors" in err


@pytest.mark.parametrize(
    "words",
    [
        ["generate", "no.safetensors", "--prompt", "x", "--out", "file"],
        ["generate", "no.safetensors", "--prompt", "x", "--out", "file/a"],
        ["generate", "no.safetensors", "--prompt", "x", "--auto-regions", "--preview", "file/a.png"],
        ["generate", "no.safetensors", "--prompt", "x", "--recipe", "file/a.json"],
        ["grid", "no.safetensors", "--prompt", "x", "--out", "file/a.png"],
        ["replay", "no.json", "no.safetensors", "--out", "file"],
        ["evaluate", "no.safetensors", "--photos", "no photos", "--out", "file/a"],
        ["photos", "no photos", "--sheet", "file/a.png"],
        ["demo", "--out", "file"],
    ],
)
def test_no_picture_is_drawn_for_a_place_that_cannot_be_written(words, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Path("file").write_text("")
    code, _, err = call(*words)
    option, place = words[-2:]
    why = "is a file" if place == "file" else "cannot be written (Not a directory)"
    assert code == 2 and f"error: {place}: {why}; pass {option} " in err
    assert [path.name for path in tmp_path.iterdir()] == ["file"]


def test_a_run_beside_its_photos_gets_another_name(call, photos, tiny, tmp_path):
    folder = tmp_path / "rex"
    shutil.copytree(photos, folder)
    before = sorted(path.name for path in folder.iterdir())
    assert call(*train_words(folder, tiny, tmp_path / "rex.safetensors", "--steps", "1"))[0] == 0
    assert sorted(path.name for path in folder.iterdir()) == before
    assert (tmp_path / "rex-run" / "run.json").is_file() and (tmp_path / "rex.safetensors").is_file()
    code, _, err = call(*train_words(folder, tiny, tmp_path / "rex.safetensors", "--run", str(folder)))
    assert code == 2 and "holds the photos; use another folder for the run" in err


def test_one_file_is_not_written_by_two_trainings(call, photos, tiny, tmp_path):
    out = tmp_path / "rex.safetensors"
    with locked_file(out):
        code, _, err = call(*train_words(photos, tiny, out, "--run", str(tmp_path / "other")))
    assert code == 2 and "rex.safetensors: another run is using it" in err and "--out" in err
    assert not (tmp_path / "other").exists() and list(tmp_path.iterdir()) == []


def test_an_adapter_that_cannot_be_written_at_last_is_still_in_the_run(call, photos, tiny, tmp_path, monkeypatch):
    out = tmp_path / "new" / "rex.safetensors"
    monkeypatch.setattr("lora_booth.training.progress.Lines.update", lambda self, step: out.mkdir(parents=True, exist_ok=True))
    code, _, err = call(*train_words(photos, tiny, out, "--steps", "1", "--run", str(tmp_path / "run")))
    assert code == 2 and f"the finished adapter is {tmp_path / 'run' / 'adapter.safetensors'}" in err


def test_another_setting_does_not_continue_the_run(call, rex, photos, tiny):
    code, _, err = call(*train_words(photos, tiny, rex, "--seed", "1"))
    assert code == 2 and "holds a run with other photos, settings" in err


def test_train_tells_what_it_leaves_out(call, photos, tiny, tmp_path):
    folder = tmp_path / "rex"
    folder.mkdir()
    for photo in photos.iterdir():
        (folder / photo.name).write_bytes(photo.read_bytes())
    (folder / "notes.pdf").write_bytes(b"%PDF-1.7")
    words = train_words(folder, tiny, tmp_path / "out.safetensors", "--steps", "1", "--layout", "peft")
    code, _, err = call(*words)
    assert code == 0 and "not used: notes.pdf: not a photo" in err


# --- photos and tokens ---------------------------------------------------------------------------------------------


def test_photos_and_their_contact_sheet(call, photos, tmp_path):
    sheet = tmp_path / "new" / "sheet.png"
    code, out, err = call("photos", photos, "--resolution", 256, "--sheet", sheet)
    lines = out.splitlines()
    assert (code, err) == (0, "")
    assert lines[0].startswith("used     0.jpg  260 x 300")
    assert lines[-2:] == ["3 used, 0 skipped", f"wrote {sheet}"]
    with Image.open(sheet) as opened:
        assert opened.width == 3 * (160 + 8) + 8


def test_a_contact_sheet_never_replaces_a_photo(call, photos, tmp_path):
    for path in photos.iterdir():
        shutil.copy(path, tmp_path)
    before = {path: path.read_bytes() for path in tmp_path.iterdir()}
    (tmp_path / "link.png").symlink_to(tmp_path / "0.jpg")
    for name in ("0.jpg", "link.png"):
        code, _, err = call("photos", tmp_path, "--sheet", tmp_path / name)
        assert code == 2 and "one of the photos" in err
    assert all(path.read_bytes() == content for path, content in before.items())


def test_photos_says_why_one_is_not_used(call, photos, tmp_path):
    (tmp_path / "a.jpg").write_bytes((photos / "0.jpg").read_bytes())
    (tmp_path / "b.jpg").write_bytes((photos / "0.jpg").read_bytes())
    (tmp_path / "c.gif").write_bytes(b"GIF89a")
    code, out, _ = call("photos", tmp_path)
    assert code == 0
    assert "skipped  b.jpg  the same file as a.jpg" in out and "skipped  c.gif  not a photo" in out
    assert out.splitlines()[-2:] == ["judged   at 512 px", "1 used, 2 skipped"]
    assert "small: 260 px, enlarged to 512" in out


def test_tokens_are_proposed(call, tiny, tmp_path):
    folder = tmp_path / "declared"
    shutil.copytree(tiny, folder)
    (folder / "lora_booth.json").write_text('{"rare_tokens": ["sks"]}')
    assert call("token", "--base", folder)[:2] == (0, "sks\n")


def test_tokens_are_checked(call, tiny):
    code, out, _ = call("token", "--base", tiny, "--check", "sks")
    assert code == 0 and out.splitlines()[0] == "sks: 1 piece: sks</w>"
    assert "rifle" in out and "free" not in out  # one voice: what has a drawback is not called free
    code, out, _ = call("token", "--base", "toybox", "--check", "ohwx")
    assert (code, out.splitlines()[-1]) == (0, "free to take a new meaning")
    code, out, _ = call("token", "--base", tiny, "--check", "zebra")
    assert code == 1 and "splits into 5 pieces" in out and "free" not in out


# --- mistakes ------------------------------------------------------------------------------------------------------


MISTAKES = [
    # words, what the line says; {photos}, {tiny}, {rex}, {tmp} are filled in
    ("photos {tmp}/nowhere", "no such folder"),
    ("photos {empty}", "no usable photo"),
    ("photos {photos} --sheet {tmp}/sheet.tiff2", "saved as .png"),
    ("photos {photos} --resolution 0", "--resolution"),
    ("train {tmp}/nowhere --token sks --class-noun dog --out {tmp}/a.safetensors --base {tiny}", "no such folder"),
    ("train {two} --token sks --class-noun dog --out {tmp}/a.safetensors --base {tiny}", "2 usable photos, 3 needed"),
    (
        "train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --base {tiny} --max-photos 2 --min-photos 1",
        "more",
    ),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --base {tmp}/nowhere", "no such folder or file"),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --base {empty}", "no model_index.json"),
    ("train {photos} --token {{token}} --class-noun dog --out {tmp}/a.safetensors --base {tiny}", "without braces"),
    ("train {photos} --token dog --class-noun dog --out {tmp}/a.safetensors --base {tiny}", "the token 'dog' in it"),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.pt --base {tiny}", ".safetensors"),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a --base {tiny}", ".safetensors"),
    ("train {tmp}/nowhere --token sks --class-noun dog --out {tmp}/a.SAFETENSORS --base {tiny}", ".safetensors"),
    ("train {photos} --token sks --class-noun dog --out {folder} --base {tiny}", "is a folder"),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --layout webui", "is not one of 'kohya', 'peft'"),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --rank 0", "rank 0"),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --rank ten", "--rank"),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --learning-rate 3", "--learning-rate 3.0"),
    (
        "train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --prior-loss-weight nan",
        "--prior-loss-weight nan",
    ),
    (
        "train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --attention flash",
        "is not one of 'sdpa', 'xformers'",
    ),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --base {tiny} --resolution 60", "resolution 60"),
    (
        "train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --base {tiny} --prior-loss-weight 0 --rank 300",
        "rank 300",
    ),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --template dog", "lacks {token}"),
    ("train {photos} --token sks --class-noun dog", "--out"),
    ("train --token sks", "folder"),
    ("generate {rex} --prompt x --base {tiny} --seeds 3-", "seeds '3-'"),
    ("generate {rex} --prompt x --base {tiny} --seeds 0-99999999999", "allowed: 1 to 10000"),
    ("generate {rex} --prompt x --base {tiny} --steps 0", "steps 0"),
    ("generate {rex} --prompt x --base {tiny} --size 33", "size 33"),
    ("generate {rex} --prompt x --base {tiny} --guidance -1", "guidance -1.0"),
    ("generate {rex} --prompt x --base {tiny} --batch-size 0", "--batch-size 0"),
    ("generate {rex} --prompt x --base nobody/nothing", "not in the local cache"),
    ("generate {rex}:much --prompt x --base {tiny}", "'much' is not a weight"),
    ("generate {rex}:nan --prompt x --base {tiny}", "'nan' is not a weight"),
    ("generate {tmp}/nothing.safetensors --prompt x", "nothing.safetensors"),
    ("generate {rex} --prompt x --region cat:0,0,1,1", "no adapter 'cat'"),
    ("generate {rex} --prompt x --region rex:0,0,1", "write it like NAME:0,0,0.5,1"),
    ("generate {rex} --prompt x --region rex:0,0,1,1 --auto-regions", "exclude each other"),
    ("generate {rex} --prompt x --preview x.png", "--preview shows regions"),
    ("generate {rex} --prompt x --auto-regions --preview {tmp}/x.tiff", "saved as .png, .jpg or .webp"),
    ("generate {rex} --prompt x --base {tiny} --method regions", "pass --auto-regions, or --region NAME:0,0,0.5,1"),
    ("generate {rex} --prompt x --base {tiny} --method blend", "method 'blend'; needed: "),
    ("replay {tmp}/none.json {rex}", "none.json"),
    ("share {rex}", "either --out FOLDER or --push"),
    ("share {rex} --out {tmp}/s --consent maybe", "consent 'maybe'; needed: "),
    ("share {rex} --push me/rex", "me/rex"),
    ("generate {rex}", "--prompt"),
    ("generate {rex} --prompt x --seed 3", "--seed"),
    ("generate {rex} --prompt x --base {tiny} --steps 1 --seeds 1 --out {file}", "file.txt"),
    ("show {tmp}/nothing.safetensors", "nothing.safetensors"),
    ("show {file}", "file.txt"),
    ("show {photos}/0.jpg", "0.jpg: not a safetensors file; it is a JPEG picture"),
    ("generate {photos}/0.jpg --prompt x", "not a safetensors file; it is a JPEG picture"),
    ("show {broken}", "broken.safetensors"),
    ("convert {rex} {tmp}/b.safetensors --layout webui", "is not one of 'kohya', 'peft'"),
    ("convert {rex} {tmp}/b.ckpt", ".safetensors"),
    ("convert {rex}", "out"),
    ("convert {rex} {tmp}/b.safetensors --dtype int8", "is not one of 'fp16', 'bf16', 'fp32'"),
    ("merge {rex}:much --out {tmp}/a.safetensors", "'much' is not a weight"),
    ("merge {rex} --out {tmp}/a.safetensors --method mean", "method 'mean'; needed: 'sum' or 'svd'"),
    ("merge {rex} --out {tmp}/a.safetensors --rank 3", "rank 3 with method sum"),
    ("merge {rex} --out {tmp}/a.safetensors --method svd --rank 0", "rank 0"),
    ("merge {rex} --out {tmp}/a.pt", ".safetensors"),
    ("merge {rex}", "--out"),
    ("merge {broken} --out {tmp}/a.safetensors", "broken.safetensors"),
    ("resize {rex} --out {tmp}/a.safetensors", "neither a rank nor an energy"),
    ("resize {rex} --out {tmp}/a.safetensors --rank 600", "rank 600"),
    ("resize {rex} --out {tmp}/a.safetensors --energy 2", "energy 2.0"),
    ("resize {rex} --out {tmp}/a.safetensors --rank 1 --layout webui", "is not one of 'kohya', 'peft'"),
    ("bake {rex} --base {tiny} --out {tmp}/a.ckpt", "a.ckpt: a pickle's name"),
    ("bake {rex} --base {tiny} --out {two}", "already exists"),
    ("bake {rex} --base {tiny} --out {tmp}/a.safetensors --dtype int8", "is not one of 'fp16', 'bf16', 'fp32'"),
    ("bake {rex} --base toybox --out {tmp}/a", "in toybox; use --base tiny"),
    ("bake {rex} --base toybox --out {tmp}/a.safetensors", "no single file holds latents of 8 channels"),
    ("extract {tiny} --base {tiny} --out {tmp}/a.safetensors --rank 2", "nothing to extract"),
    ("extract {tiny} --base toybox --out {tmp}/a.safetensors --rank 2", "neither was made from the other"),
    ("extract {tiny} --base {tiny} --out {tmp}/a.safetensors", "neither a rank nor an energy"),
    ("extract {tmp}/nowhere --base {tiny} --out {tmp}/a.safetensors --rank 2", "no such folder or file"),
    ("diff {rex} {file}", "file.txt"),
    ("diff {rex}", "Missing argument 'b'"),
    ("token --base {tiny} --check ''", "token ''"),
    ("token --base {tiny} --count 0", "--count"),
    ("token --base {file}", "file.txt"),
    ("token --base toybx", "did you mean 'toybox'?"),
    ("generate {rex} --prompt x --base Toybox", "did you mean 'toybox'?"),
    ("generate {rex} --prompt x --steps 1000", "steps 1000 is out of range; allowed: 1 to 999"),
    ("generate {rex} --prompt x --device quda", "device quda cannot be used here"),
    ("generate {rex} --prompt x --device cuda:99", "device cuda:99 cannot be used here"),
    ("train {photos} --token sks --class-noun dog --out {tmp}/a.safetensors --resolution 100", "allowed: multiples of 8"),
    ("merge {rex} --out {tmp}/a.safetensors --method ssr", "'ssr'; needed: 'sum' or 'svd'"),
    ("trian {photos}", "trian"),
    ("--colour", "--colour"),
]


@pytest.mark.parametrize(("words", "line"), MISTAKES, ids=[words for words, _ in MISTAKES])
def test_a_mistake_is_told_in_one_line(call, photos, tiny, rex, tmp_path, words, line):
    places = {"photos": photos, "tiny": tiny, "rex": rex, "tmp": tmp_path}
    for name in ("empty", "two", "folder.safetensors"):
        (tmp_path / name).mkdir()
        places[name.partition(".")[0]] = tmp_path / name
    for photo in sorted(photos.iterdir())[:2]:
        (tmp_path / "two" / photo.name).write_bytes(photo.read_bytes())
    for name in ("file.txt", "broken.safetensors"):
        (tmp_path / name).write_bytes(b"nothing of the kind")
        places[name.partition(".")[0]] = tmp_path / name
    filled = [word.format(**places).replace("''", "") for word in words.split()]
    code, out, err = call(*filled)
    assert code == 2
    assert out == ""
    *before, last = err.splitlines()
    assert last.startswith("error: ") and line in last
    assert not [said for said in before if said.startswith("error") or "Traceback" in said]
    if "--steps 1" not in words and "--resolution 60" not in words and "--rank 300" not in words:
        assert not [said for said in before if not said.startswith(("loading ", "the toybox is"))]
    assert not (tmp_path / "a.safetensors").exists()


def test_an_error_is_one_line_whatever_it_holds(capsys):
    with pytest.raises(SystemExit) as left:
        fail("first\nsecond\r\n  third")
    assert left.value.code == 2
    assert capsys.readouterr().err == "error: first second third\n"


# --- parsing -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "seeds"),
    [("0-3", [0, 1, 2, 3]), ("1,5,8", [1, 5, 8]), ("7", [7]), ("4-4", [4]), ("2, 0-2", [2, 0, 1]), ("9,9", [9])],
)
def test_seeds(text, seeds):
    assert parse_seeds(text) == seeds


@pytest.mark.parametrize(
    "text", ["", "a", "1-", "-1", "3-1", "1,,2", "1.5", "0-10000", "0-9999,20000", "1-2-3", "0-" + "9" * 30]
)
def test_bad_seeds(text):
    with pytest.raises(SettingsError, match="seeds"):
        parse_seeds(text)


def test_files_and_weights(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "odd:0.5").write_bytes(b"")
    assert file_and_weight("ink.safetensors:0.6") == (Path("ink.safetensors"), 0.6)
    assert file_and_weight("ink.safetensors:-1") == (Path("ink.safetensors"), -1.0)
    assert file_and_weight("ink.safetensors") == (Path("ink.safetensors"), None)
    assert file_and_weight("odd:0.5") == (Path("odd:0.5"), None)  # a file of that very name
    assert file_and_weight("C:\\ink.safetensors") == (Path("C:\\ink.safetensors"), None)
    assert file_and_weight("C:\\ink.safetensors:0.5") == (Path("C:\\ink.safetensors"), 0.5)


@pytest.mark.parametrize("text", ["ink.safetensors:", "ink.safetensors:a", "ink.safetensors:inf", "ink:nan", ":0.5"])
def test_bad_weights(text):
    with pytest.raises(SettingsError, match="is not a weight"):
        file_and_weight(text)


# --- the same in Python and on the command line --------------------------------------------------------------------------

CARD = {"title", "author", "license", "consent", "tags"}  # facts of a card, which has none of its own
PAIRS: dict[str, tuple[tuple[Callable[..., Any], ...], dict[str, str], set[str]]] = {
    # command: the Python behind it; options of another name; options that only a command has
    "demo": ((), {}, {"out"}),
    "photos": ((Subject.from_folder, Subject.audit), {}, {"folder", "sheet", "auto_masks", "make_masks", "json"}),
    "token": ((BaseModel.load, propose_tokens), {}, {"base", "check"}),
    "train": (
        (LoraSpec, TrainingConfig, BaseModel.load, Subject.from_folder, lora_booth.train, Adapter.save),
        {"min_photos": "minimum", "max_photos": "maximum", "template": "templates"},
        {"folder", "base", "run", "auto_masks", "caption_model", "class_folder", "settings"},
    ),
    "train-many": (
        (LoraSpec, TrainingConfig, BaseModel.load, Subject.from_folder, lora_booth.train_many),
        {"min_photos": "minimum", "max_photos": "maximum", "template": "templates"},
        {"jobs", "base", "ray", "settings"},
    ),
    "cache": ((), {}, {"clear"}),
    "plan": ((LoraSpec, TrainingConfig, lora_booth.plan), {"vram": "vram_gb"}, {"base", "json"}),
    "evaluate": (
        (BaseModel.load, lora_booth.evaluate),
        {"context": "contexts"},
        {"base", "prompt", "prompts", "prompt_set", "token", "class_noun", "json", "out"},
    ),
    "report": ((lora_booth.write_report,), {}, set()),
    "generate": (
        (Composition, Composition.generate, BaseModel.load),
        {},
        {"base", "prompt", "prompts", "prompt_set", "context", "region", "auto_regions", "out", "preview", "recipe"},
    ),
    "inpaint": (
        (Composition, Composition.inpaint, BaseModel.load),
        {},
        {"photo", "mask", "adapters", "prompt", "base", "region", "auto_regions", "out"},
    ),
    "preflight": ((Composition, Composition.preflight, BaseModel.load), {}, {"base", "region", "auto_regions"}),
    "replay": ((BaseModel.load,), {}, {"base", "recipe", "seeds", "out"}),
    "grid": (
        (lora_booth.grid_steps, Composition.generate, BaseModel.load),
        {},
        {"adapters", "base", "prompt", "prompts", "prompt_set", "context", "before_after", "out"},
    ),
    "show": ((), {}, {"adapter", "modules", "json"}),
    "convert": ((convert,), {}, {"adapter"}),
    "share": ((Adapter.save_folder, Adapter.push_to_hub), {}, {"adapter", "out", "push"} | CARD),
    "merge": ((Adapter.save, merge), {}, {"out", "modules"}),
    "resize": ((Adapter.save, resize), {}, {"out", "modules"}),
    "extract": ((Adapter.save, extract, BaseModel.load), {}, {"tuned", "out", "modules"}),
    "bake": ((bake, BaseModel.load), {}, {"base"}),
    "diff": ((), {}, {"a", "b", "modules", "json"}),
    "studio": ((), {}, {"folder", "port", "host", "browser"}),
    "serve": ((Limits, BaseModel.load), {}, {"adapters", "base", "host", "port", "token"}),
}


@pytest.mark.parametrize("command", COMMANDS)
def test_defaults_are_those_of_python(command):
    """An option left out gives what the argument left out gives; each new option is one of the two kinds."""
    functions, renamed, own = PAIRS[command]
    python = [inspect.signature(function).parameters for function in functions]
    options = inspect.signature(CALLBACKS[command]).parameters
    assert own <= set(options)
    for name, option in options.items():
        if name in own or option.default is inspect.Parameter.empty:
            continue
        default = next(found[key].default for found in python if (key := renamed.get(name, name)) in found)
        if option.default is None and isinstance(default, tuple | str):
            continue  # not handed on, so Python's holds
        mine = parse_seeds(option.default) if name in ("seeds", "class_seeds") else option.default
        assert mine == (list(default) if isinstance(default, range | tuple) else default), name


def test_each_argument_of_python_has_an_option():
    hands = {"subject", "on_step", "progress", "lora", "config", "out", "steps"}
    assert set(inspect.signature(lora_booth.train).parameters) - hands - {"base"} <= set(TRAIN)
    assert {field.name for one in (LoraSpec, TrainingConfig) for field in fields(one)} <= set(TRAIN)
    for command in ("train", "generate", "grid", "evaluate", "replay", "preflight", "token"):
        assert set(inspect.signature(BaseModel.load).parameters) - {"source"} <= set(
            inspect.signature(CALLBACKS[command]).parameters
        )


def test_options_left_out_give_the_dataclasses_themselves(photos, monkeypatch, call, tmp_path):
    seen = {}
    monkeypatch.setattr("lora_booth.runs.one.train", lambda base, subject, **given: seen.update(given) or sys.exit(0))
    words = ("train", photos, "--token", "zwx", "--class-noun", "dog", "--out", tmp_path / "a.safetensors")
    assert call(*words)[0] == 0
    assert (seen["lora"], seen["config"]) == (LoraSpec(), TrainingConfig())
    assert (seen["track"], seen["time_limit"], seen["restart"], seen["mirror"]) == ((), None, False, None)
    given = ("--target-modules", "to_q", "--target-modules", "to_v", "--lr-schedule", "constant", "--max-grad-norm", "inf")
    assert call(*words, *given, "--no-lean", "--dropout", "0.1", "--sample-prompt", "a zwx dog")[0] == 0
    assert seen["lora"] == LoraSpec(target_modules=("to_q", "to_v"), dropout=0.1)
    assert seen["config"] == TrainingConfig(
        lr_schedule="constant", max_grad_norm=math.inf, lean=False, sample_prompt=("a zwx dog",)
    )


def test_adapters_are_named_in_the_prompt_as_people_paste_it(call, rex, tiny, tmp_path, monkeypatch):
    """From the arguments, from beside them, and from the current folder."""
    monkeypatch.chdir(tmp_path)
    seen = []
    generate = lambda self, prompt, **_: seen.append((self.adapters, prompt)) or sys.exit(0)  # noqa: E731
    monkeypatch.setattr("lora_booth.pictures.composition.Composition.generate", generate)
    (tmp_path / "other").mkdir()
    dog = Adapter.load(rex)
    file = dog.save(tmp_path / "other" / "rex v1.safetensors")
    replace(dog, card=replace(dog.card, token=None)).save(tmp_path / "other" / "ink.safetensors")
    replace(dog, card=replace(dog.card, weight=0.3)).save(tmp_path / "loose.safetensors")
    cases = [
        ([f"{file}:0.5"], "a dog <lora:ink:0.6>", [0.5, 0.6], "a dog"),
        ([file], "a dog <lora:rex v1:0.7>, at sea", [0.7], "a dog, at sea"),
        ([], "<lora:loose:-1> a dog", [-1.0], "a dog"),
        ([], "a dog <lora:loose>", [0.3], "a dog"),
    ]
    for files, prompt, weights, expected in cases:
        code, _, err = call("generate", *files, "--prompt", prompt, "--base", tiny)
        assert code == 0, err
        adapters, drawn = seen.pop()
        assert [weight.value for _, weight in adapters] == weights and drawn == expected
    for files, prompt, words in (
        ([file], "a dog <lora:none:1>", "<lora:none> names no adapter file ("),
        ([file], "a dog <lora:ink:x>", "'x' is not a weight"),
        ([], "a dog", "no adapter; pass its file, or name it in the prompt"),
    ):
        code, _, err = call("generate", *files, "--prompt", prompt, "--base", tiny)
        assert code == 2 and words in err
    for method, command in (("inpaint", ["inpaint", "photo.png", "mask.png"]), ("preflight", ["preflight"])):
        done = lambda self, *given, **_: seen.append((self.adapters, "a dog" in given)) or sys.exit(0)  # noqa: E731
        monkeypatch.setattr(f"lora_booth.pictures.composition.Composition.{method}", done)
        code, _, err = call(*command, "--prompt", "a dog <lora:loose>", "--base", tiny)
        assert code == 0 and [weight.value for _, weight in seen[-1][0]] == [0.3] and seen.pop()[1], err
    (tmp_path / "two.txt").write_text("a dog <lora:loose>\na cat")
    code, _, err = call("grid", "--prompts", "two.txt", "--base", tiny)
    assert code == 2 and "different <lora:...> tags; draw them one by one" in err


def test_settings_from_a_file(photos, monkeypatch, call, tmp_path):
    seen = {}
    monkeypatch.setattr(
        "lora_booth.runs.one.train", lambda base, subject, **given: seen.update(given, subject=subject) or sys.exit(0)
    )
    file, out = tmp_path / "rex.toml", tmp_path / "a.safetensors"
    facts = {"folder": str(photos), "token": "zwx", "class-noun": "dog", "out": str(out), "steps": 7, "learning_rate": 1e-3}
    facts |= {
        "lean": False,
        "target_modules": ["to_q", "to_v"],
        "sample_prompt": "a zwx dog",
        "sample_size": "48x72",
        "rank": 2,
    }
    file.write_text("\n".join(f"{key} = {json.dumps(value)}" for key, value in facts.items()), encoding="utf-8")
    other = tmp_path / "rex.json"
    other.write_text(json.dumps(facts | {"alpha": None}))
    expected = TrainingConfig(steps=7, learning_rate=1e-3, lean=False, sample_prompt=("a zwx dog",), sample_size="48x72")
    for one in (file, other):
        assert call("train", "--settings", one)[0] == 0
        assert seen["config"] == expected and seen["lora"] == LoraSpec(rank=2, target_modules=("to_q", "to_v"))
        assert (seen["subject"].token, seen["subject"].class_noun) == ("zwx", "dog")
    assert call("train", "--settings", file, "--steps", 9, "--lean", "--token", "sks")[0] == 0  # the command line comes first
    assert seen["config"] == replace(expected, steps=9, lean=True) and seen["subject"].token == "sks"
    assert call("train", "--settings", file, "--init", "first.safetensors")[0] == 0
    assert seen["lora"] == LoraSpec(rank=2, target_modules=("to_q", "to_v")) and seen["init"] == Path("first.safetensors")
    words = ("train", photos, "--token", "zwx", "--class-noun", "dog", "--out", out)
    assert call(*words, "--init", "first.safetensors")[0] == 0 and seen["lora"] is None  # as that adapter has it
    assert call(*words, "--init", "first.safetensors", "--rank", 8)[0] == 0 and seen["lora"] == LoraSpec()
    for content, words in (
        ("stepps = 7", "'stepps' is not a setting of train; did you mean steps?"),
        ("steps = [7, 8]", "steps is [7, 8]; write one value"),
        ("[lora]\nrank = 3", "'lora' is not a setting of train"),
        ("steps 7", "not TOML, or JSON in a file that ends with .json"),
        ("steps = 'x'", "Invalid value for '--steps'"),
    ):
        file.write_text(content)
        code, _, err = call("train", photos, "--token", "zwx", "--class-noun", "dog", "--out", out, "--settings", file)
        assert code == 2 and words in err and len(err.strip().splitlines()) == 1, err
    code, _, err = call("train", "--settings", tmp_path / "none.toml")
    assert code == 2 and "none.toml: cannot be read (No such file" in err


# --- the words of messages -----------------------------------------------------------------------------------------------


def texts(node: ast.AST, *, but: str = "") -> Iterator[str]:
    """The string constants below a node, without those in calls of the function `but`."""
    if isinstance(node, ast.Call) and getattr(node.func, "id", None) == but:
        return
    if isinstance(node, ast.Constant) and isinstance(node.value, str):
        yield node.value
    for child in ast.iter_child_nodes(node):
        yield from texts(child, but=but)


def nodes(kind: type[ast.AST]) -> Iterator[Any]:
    for path in sorted((ROOT / "lora_booth").rglob("*.py")):
        yield from (node for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, kind))


OPTIONS = {f"--{name.replace('_', '-')}" for one in CALLBACKS.values() for name in inspect.signature(one).parameters}


def test_options_that_messages_name_exist():
    named = set()
    for call in nodes(ast.Call):
        if getattr(call.func, "id", None) == "setting":
            option = next((word.value for word in call.keywords if word.arg == "option"), None)
            if option is None and isinstance(call.args[0], ast.Constant):
                named.add(f"--{call.args[0].value.replace('_', '-')}")
            named |= {word for text in texts(option or ast.Constant(0)) for word in re.findall(r"--[a-z-]+", text)}
    for error in nodes(ast.Raise):
        named |= {word for text in texts(error, but="setting") for word in re.findall(r"--[a-z-]+", text)}
    assert len(named) > 20 and named <= OPTIONS


PYTHON_ONLY = (  # mistakes that no command can make
    "is not loaded; pass BaseModel.load(",
    "Subject.from_folder(",
    "mirror and restart need a run folder",
    "writes files into the run folder",
    "only a loaded base can be timed",
    "measure=True with ",
    "find_regions needs",
    "regions cannot be one adapter",
    "save_pretrained",
)


def test_errors_name_settings_by_the_function_for_it():
    """As arguments in Python and as options in a command; never `x=` alone."""
    found = [text for error in nodes(ast.Raise) for text in texts(error, but="setting") if re.search(r"\b[a-z_]+=", text)]
    assert [text for text in found if not any(part in text for part in PYTHON_ONLY)] == []


def test_settings_have_the_words_of_the_reader(call):
    assert (setting("rank", 8), setting("crop", "center"), setting("restart", True)) == (
        "rank=8",
        'crop="center"',
        "restart=True",
    )
    assert setting("minimum", 1, option="--min-photos 1") == "minimum=1"
    within = in_command.set(True)
    assert (setting("lr_schedule", "cosine"), setting("restart", True), setting("config")) == (
        *("--lr-schedule cosine", "--restart", "--config"),
    )
    assert setting("minimum", 1, option="--min-photos 1") == "--min-photos 1"
    in_command.reset(within)
    call("photos", "nowhere")
    assert not in_command.get()


# --- the base ------------------------------------------------------------------------------------------------------------


def test_the_base_is_the_adapters_own(call, rex, tiny, ink, tmp_path, hub, monkeypatch):
    """Without --base: where `train` found it, a Hub id in the cache, or the toybox. Nothing is downloaded for a file."""
    assert Path(base_of([Adapter.load(rex)])).name == tiny.name  # of the last process of the tests that trained on it
    moved = Adapter.load(rex).with_card(base_hash="0" * 64)
    of_hub = moved.with_card(base_model="owner/tiny")
    with pytest.raises(
        SettingsError, match=r"rex.safetensors was made for owner/tiny, which is not .* --base owner/tiny to download"
    ):
        base_of([of_hub])
    hub("owner/tiny", tiny)
    assert base_of([of_hub]) == "owner/tiny"
    assert base_of([moved.with_card(base_model="toybox")]) == "toybox"
    with pytest.raises(SettingsError, match=r"which base\? rex.safetensors was made for tiny; pass --base FOLDER"):
        base_of([moved])
    merged = Adapter.load(rex).with_card(base_hash=None)  # as `merge` writes it for one base in two versions
    assert Path(base_of([merged, Adapter.load(rex)])).name == tiny.name
    with pytest.raises(SettingsError, match="made for tiny and rex.safetensors was made for owner/tiny"):
        base_of([Adapter.load(rex), of_hub.with_card(base_hash="1" * 64)])
    with pytest.raises(SettingsError, match="a base it does not name"):
        base_of([moved.with_card(base_model=None, base_hash=None)])
    remember(BaseModel.load(tiny), str(tmp_path / "gone"))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "toybox").mkdir()  # not the embedded base
    remember(BaseModel.load(tiny), "toybox")
    assert Path(base_of([Adapter.load(rex)])).name == tiny.name
    monkeypatch.setenv("HOME", str(tiny.parent))
    remember(BaseModel.load(tiny), f"~/{tiny.name}")
    assert Path(base_of([Adapter.load(rex)])).name == tiny.name
    code, out, _ = call("preflight", rex, "--prompt", "a sks dog")
    assert code == 0 and out


def test_another_base_is_named_with_the_file_and_the_option(call, rex, folders):
    code, _, err = call("generate", rex, "--prompt", "a sks dog", "--base", folders["sdxl"])
    assert code == 2
    assert "rex.safetensors was made for tiny (Stable Diffusion 1.x); tiny-sdxl is Stable Diffusion XL; use --base tiny" in err


def test_training_on_the_toybox_by_default_says_what_that_is(call, photos, tmp_path, monkeypatch):
    monkeypatch.setattr("lora_booth.runs.one.train", lambda *_, **__: sys.exit(0))
    words = ("train", photos, "--token", "zwx", "--class-noun", "dog", "--out", tmp_path / "a.safetensors")
    assert "the toybox is a tiny model for trials: 64 x 64 pixels" in call(*words)[2]


# --- words that are wrong ------------------------------------------------------------------------------------------------

USAGE = [
    (["trian", "photos"], "No such command 'trian'. Did you mean 'train', 'train-many'? See: lora-booth --help"),
    (["generat"], "No such command 'generat'. Did you mean 'generate'? See: lora-booth --help"),
    (["train", "rex", "--stpes", "4"], "No such option: --stpes. Did you mean --steps? See: lora-booth train --help"),
    (["grid", "--promt", "x"], "No such option: --promt. Did you mean --prompt? See: lora-booth grid --help"),
    (["train", "rex", "--rank", "abc"], "Invalid value 'abc' for '--rank'"),
    (["train", "rex", "--rank=abc"], "Invalid value 'abc' for '--rank'"),
    (["plan", "--photos", "0"], "Invalid value '0' for '--photos'"),
    (["train", "rex"], "Missing option '--token'. See: lora-booth train --help"),
    (["photos", "rex", "--resolution", "99999"], "Invalid value '99999' for '--resolution'"),
]


@pytest.mark.parametrize(("words", "line"), USAGE, ids=[" ".join(words) for words, _ in USAGE])
def test_wrong_words_are_told_plainly(call, words, line):
    code, _, err = call(*words)
    assert code == 2 and err.startswith(f"error: {line}") and "?;" not in err and len(err.splitlines()) == 1


def test_version(call):
    assert call("--version") == (0, f"lora-booth {lora_booth.__version__}\n", "")


@pytest.mark.parametrize(
    ("command", "line"), [("train", "run the same command again to continue"), ("generate", "interrupted\n")]
)
def test_an_interrupt_says_what_it_means_for_the_command(call, rex, photos, monkeypatch, command, line):
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("lora_booth.base.base_model.BaseModel.load", stop)
    words = {
        "train": [photos, "--token", "zwx", "--class-noun", "dog", "--out", "a.safetensors"],
        "generate": [rex, "--prompt", "x"],
    }
    code, _, err = call(command, *words[command], "--base", "toybox")
    assert code == 130 and err.endswith(f"{line}" if command == "generate" else f"{line}\n")
    assert ("again" in err) == (command == "train")


LEGACY = {  # command -> its words, and what it writes; the code page lacks some characters of every path and name
    "photos": ("犬é --sheet 犬.png", "犬.png"),
    "show": ("犬.safetensors", "犬.safetensors"),
    "convert": ("犬.safetensors 猫.safetensors --layout peft", "猫.safetensors"),
    "train": ("犬é --base BASE --token zwx --class-noun dög --steps 1 --out 猫.safetensors", "猫.safetensors"),
    "generate": ("犬.safetensors --base BASE --prompt 犬 --seeds 1 --steps 1 --out 絵", "絵/gallery.html"),
}


@pytest.mark.parametrize("encoding", ["cp1252", "ascii"])
@pytest.mark.parametrize("command", [pytest.param(c, marks=[] if c == "photos" else pytest.mark.slow) for c in LEGACY])
def test_a_legacy_code_page_ends_no_command(command, encoding, photos, rex, tiny, tmp_path):
    shutil.copytree(photos, tmp_path / "犬é")
    Adapter.load(rex).with_card(title="犬 é").save(tmp_path / "犬.safetensors")
    words, made = LEGACY[command]
    done = subprocess.run(
        [sys.executable, "-m", "lora_booth.cli", command, *words.replace("BASE", str(tiny)).split()],
        env=os.environ | {"PYTHONIOENCODING": encoding, "PYTHONPATH": str(ROOT)},
        cwd=tmp_path,
        capture_output=True,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / made).is_file() and b"Error" not in done.stderr
    assert b"\\u" in done.stdout + done.stderr


@pytest.mark.slow
@pytest.mark.parametrize("words", [["generate", "nothing.safetensors", "--prompt", "x"], ["diff", "nothing", "nothing"]])
def test_the_first_line_comes_before_pytorch(words):
    """PyTorch takes seconds to import."""
    code = f"""
import sys
from lora_booth.cli import main
class Seen:
    def write(self, text):
        if text.strip():
            print(text.strip(), "torch" in sys.modules)
    def flush(self): ...
sys.stderr = Seen()
main({words})
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert done.stdout.startswith("loading PyTorch False"), done.stderr


# --- help ----------------------------------------------------------------------------------------------------------


def test_help(call):
    for words in ([], ["--help"], ["-h"]):
        code, out, err = call(*words)
        assert (code, err) == (0, "")
        assert all(command in out for command in COMMANDS)


@pytest.fixture(scope="module")
def make_cli() -> dict:
    return runpy.run_path(str(ROOT / "docs" / "make_cli.py"))


@pytest.mark.parametrize("command", COMMANDS)
def test_help_of_a_command_says_what_the_documentation_says(call, make_cli, command):
    code, out, err = call(command, "--help")
    assert (code, err) == (0, "")
    words = " ".join(out.split())
    told = make_cli["page"]().partition(f"\n## {command}\n")[2].partition("\n## ")[0]
    assert told
    options = [part for part in told.replace("`", " ").split() if part.startswith("--") and part != "---"]
    assert options
    for option in options:
        assert option in words
    for row in told.splitlines():
        if row.startswith("| `"):
            meaning = row.split(" | ")[1].rstrip("| ").strip()
            assert meaning  # every option is explained
            assert meaning in words or meaning in words.replace("- ", "-")


def test_every_setting_has_a_comment_beside_it():
    for group in (LoraSpec, TrainingConfig):
        assert comments(group).keys() == {one.name for one in fields(group)}


def test_without_its_source_a_program_has_no_explanations_and_works(monkeypatch):
    def frozen(thing):
        raise OSError("could not get source code")

    monkeypatch.setattr("inspect.getsource", frozen)
    comments.cache_clear()
    assert [one.name for one in options_of(Reading)][:2] == ["config", "prediction_type"]
    assert comments(Reading) == {}
    comments.cache_clear()


def test_the_documented_command_line_is_up_to_date(make_cli):
    written = (ROOT / "docs" / "cli.md").read_text(encoding="utf-8")
    assert written == make_cli["page"](), "run: python docs/make_cli.py"
    assert [line.removeprefix("## ") for line in written.splitlines() if line.startswith("## ")] == COMMANDS
