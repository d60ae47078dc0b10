"""Grids and strips: which picture is where, what each is, what an interruption leaves."""

from __future__ import annotations

import io
import itertools
import warnings

import numpy as np
import pipelines
import pytest
from PIL import Image

from lora_booth import cli
from lora_booth.adapters.adapter import Adapter
from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec
from lora_booth.errors import CompositionWarning, SettingsError
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.gallery import RECORD
from lora_booth.pictures.grids import Grid, before_after, grid, grid_steps
from lora_booth.pictures.picture import Picture

pytestmark = pytest.mark.filterwarnings("ignore:the prompt does not name:lora_booth.errors.CompositionWarning")
QUICK = {"steps": 2, "guidance": 2.0, "size": 48}


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline("sd1"), name="tiny")


@pytest.fixture(scope="module")
def rex(base) -> Adapter:
    return pipelines.random_adapter(base, LoraSpec(rank=2), seed=1, size=0.3)


def same(one: Picture, other: Picture) -> bool:
    return np.array_equal(np.asarray(one.image), np.asarray(other.image))


def test_each_cell_is_what_its_row_and_column_say(base, rex):
    made = grid(base, rex, "a dog", weights=(0, 0.5, -1), seeds=(7, 2), **QUICK)
    assert (made.columns, made.rows, made.title) == (("weight 0", "weight 0.5", "weight -1"), ("seed 7", "seed 2"), "a dog")
    for row, seed in enumerate((7, 2)):
        [alone] = Composition(base, []).generate("a dog", seeds=[seed], **QUICK)
        assert same(made.cells[row][0], alone)  # the base, to the bit
        for column, weight in ((1, 0.5), (2, -1.0)):
            [asked] = Composition(base, [(rex, weight)]).generate("a dog", seeds=[seed], **QUICK)
            assert same(made.cells[row][column], asked) and not same(asked, alone)
            assert (made.cells[row][column].seed, made.cells[row][column].adapters[0][1]) == (seed, weight)


def test_weights_are_factors_on_what_each_adapter_has(base, rex):
    with pytest.warns(CompositionWarning):
        made = grid(base, [(rex, 0.8), (rex, -0.2)], "a dog", weights=(0.5,), seeds=(0,), **QUICK)
    assert made.columns == ("weights x 0.5",)
    assert [weight for _, weight in made.pictures[0].adapters] == [0.4, -0.1]
    assert grid(base, (rex, 0.8), "a dog", weights=(0.5,), seeds=(0,), **QUICK).columns == ("weight 0.4",)


def test_an_adapter_clash_is_told_once(base, rex):
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("default")  # once for each place
        grid(base, [rex, rex], "a dog", weights=(0, 1), seeds=(0, 1), **QUICK)
    assert sum("the prompt does not name" in str(w.message) for w in told) == 1
    assert len({str(w.message) for w in told}) == len(told) > 0


def test_several_prompts_are_rows(base, rex):
    made = grid(base, rex, ["a dog", "a cat"], weights=(1,), seeds=(4,), **QUICK)
    assert (made.rows, made.title) == (("a dog", "a cat"), "seed 4")
    assert [p.prompt for p in made.pictures] == ["a dog", "a cat"]
    made = grid(base, rex, ["a dog", "a cat"], weights=(1,), seeds=(4, 5), batch_size=2, **QUICK)
    assert made.rows == ("a dog, seed 4", "a dog, seed 5", "a cat, seed 4", "a cat, seed 5")
    assert [(p.prompt, p.seed) for p in made.pictures] == list(itertools.product(("a dog", "a cat"), (4, 5)))


def test_a_strip_shows_the_same_seeds_without_and_with(base, rex):
    strip = before_after(base, (rex, 0.7), "a dog", seeds=(3, 4), **QUICK)
    assert (strip.rows, strip.columns) == (("without", "with"), ("seed 3", "seed 4"))
    assert [[p.seed for p in row] for row in strip.cells] == [[3, 4], [3, 4]]
    for cell, studio in ((strip.cells[0][1], Composition(base, [])), (strip.cells[1][1], Composition(base, [(rex, 0.7)]))):
        assert same(cell, studio.generate("a dog", seeds=[4], **QUICK)[0])


def test_stopping_early_keeps_what_is_drawn(base, rex):
    steps = grid_steps(base, rex, "a dog", weights=(0, 1), seeds=(0, 1), **QUICK)
    made = next(itertools.islice(steps, 2, None))
    steps.close()
    assert (len(made.pictures), made.total) == (3, 4)
    assert made.cells[0][1] is not None and made.cells[1][1] is None


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"weights": ()}, "grid of 0 pictures"),
        ({"seeds": range(1000)}, "grid of 4000 pictures"),
        ({"weights": (float("nan"),)}, "weights .*nan"),
        ({"batch_size": 0}, "batch_size 0"),
        ({"steps": 0}, "steps 0"),
    ],
)
def test_errors(base, rex, settings, line):
    with pytest.raises(SettingsError, match=line):
        grid(base, rex, "a dog", **settings)


def test_no_adapter_is_an_error(base):
    with pytest.raises(SettingsError, match="grid without adapters"):
        grid(base, [], "a dog")


# --- the sheet -----------------------------------------------------------------------------------------------------

COLORS = [[(200, 0, 0), (0, 200, 0), (0, 0, 200)], [(200, 200, 0), (0, 200, 200), None]]


def colored(**facts) -> Grid:
    cells = tuple(tuple(None if c is None else Picture(Image.new("RGB", (128, 128), c), "x", 0) for c in row) for row in COLORS)
    return Grid(**{"rows": ("one", "two"), "columns": ("a", "b", "c"), "cells": cells, "title": "title"} | facts)


def test_a_notebook_shows_grids_and_pictures() -> None:
    shown = colored()
    assert repr(shown) == "Grid('title': 5 of 6 pictures)"
    drawn = Image.open(io.BytesIO(shown._repr_png_() or b""))
    assert drawn.tobytes() == shown.sheet().tobytes()
    one = shown.pictures[0]
    assert Image.open(io.BytesIO(one._repr_png_() or b"")).tobytes() == one.image.tobytes()


def cells_of(sheet: Image.Image, side: int = 128) -> list[list[tuple[int, ...]]]:
    """Middles of the cells, from the lower right corner."""
    lefts = [sheet.width - (side + 8) * (3 - c) + side // 2 for c in range(3)]
    tops = [sheet.height - (side + 8) * (2 - r) + side // 2 for r in range(2)]
    return [[sheet.getpixel((x, y)) for x in lefts] for y in tops]


def test_the_sheet_shows_every_cell_in_its_place():
    grey = [[c or (232, 232, 232) for c in row] for row in COLORS]
    assert cells_of(colored().sheet()) == grey
    assert cells_of(colored(title="", columns=("word " * 99, "", "\x1b[31m")).sheet()) == grey
    made = colored()
    turned = made.transposed()
    assert (turned.rows, turned.columns) == (("a", "b", "c"), ("one", "two"))
    assert turned.cells[2][1] is None and turned.cells[1][0] is made.cells[0][1]


def test_labels_are_on_the_sheet():
    plain = np.asarray(colored(rows=("", ""), columns=("", "", "")).sheet())
    labelled = np.asarray(colored(columns=("", "", "")).sheet())
    assert plain.shape == labelled.shape
    changed = np.argwhere((plain != labelled).any(-1))
    assert changed.size and changed[:, 1].max() < 150  # left of the pictures


def test_large_grids_stay_within_what_an_image_can_be():
    many = Grid(("r",) * 40, ("c",) * 25, ((Picture(Image.new("RGB", (1024, 1024)), "x", 0),) + (None,) * 24,) * 40)
    sheet = many.sheet()
    assert 60e6 < sheet.width * sheet.height < 120e6


@pytest.mark.parametrize(("name", "kind"), [("g.png", "PNG"), ("g.jpg", "JPEG"), ("g.webp", "WEBP")])
def test_sheets_are_saved_with_the_mark(tmp_path, name, kind):
    path = colored().save(tmp_path / "new" / name)
    with Image.open(path) as sheet:
        assert sheet.format == kind
    assert b"trainedAlgorithmicMedia" in path.read_bytes()
    page = colored().save(tmp_path / "g.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 5 and "<title>title</title>" in page


# --- the commands --------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def files(tmp_path_factory, base, rex) -> tuple[str, str]:
    folder = tmp_path_factory.mktemp("files")
    return str(rex.save(folder / "rex.safetensors")), str(pipelines.save("sd1", folder / "tiny"))


def call(*words: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main([str(word) for word in words])
    return int(left.value.code or 0)


WORDS = ("--steps", 1, "--size", 48)


def test_preflight_of_an_adapter_that_cannot_be_attached_is_an_error(files, tmp_path, capsys):
    stranger = pipelines.random_adapter(BaseModel.from_pipeline(pipelines.make_pipeline("sdxl"), name="large"))
    file = stranger.save(tmp_path / "stranger.safetensors")
    assert call("preflight", file, "--base", files[1], "--prompt", "sks dog") == 2
    told = capsys.readouterr()
    assert "cannot be attached: " in told.out and "recommended" not in told.out
    assert told.err.splitlines()[-1].startswith("error: ") and "was made for large" in told.err


def test_the_command_draws_a_grid(files, tmp_path, capsys):
    adapter, tiny = files
    words = (
        "--prompt",
        "{token} {class_noun} {context}",
        "--context",
        "at sea",
        "--context",
        "on grass",
        "--seeds",
        "5",
        *WORDS,
    )
    assert call("grid", adapter, *words, "--weights", "0,1", "--base", tiny, "--out", tmp_path / "g.html") == 0
    told = capsys.readouterr()
    assert told.out.split() == [str(tmp_path / "g.html")]
    assert told.err.split("\n")[-5:-1] == [f"picture {i}/4" for i in (1, 2, 3, 4)]
    page = (tmp_path / "g.html").read_text(encoding="utf-8")
    assert page.count("<figure") == 4 and "at sea</p>" in page and "{context}" not in page


def test_an_interrupted_grid_leaves_its_pictures(files, tmp_path, capsys, monkeypatch):
    adapter, tiny = files
    calls = itertools.count()
    generate = Composition.generate

    def stop(self, *words, **settings):
        if next(calls) == 3:
            raise KeyboardInterrupt
        return generate(self, *words, **settings)

    monkeypatch.setattr(Composition, "generate", stop)
    words = ("--prompt", "a dog", "--seeds", "0-1", "--before-after", *WORDS, "--base", tiny)
    assert call("grid", adapter, *words, "--out", tmp_path / "g.png") == 130
    with Image.open(tmp_path / "g.png") as sheet:
        sheet.load()
    calls = itertools.count()
    assert call("generate", adapter, *words[:4], *WORDS, "--seeds", "0-9", "--base", tiny, "--out", tmp_path / "p") == 130
    assert sorted(file.name for file in (tmp_path / "p").iterdir()) == [
        *(f"a_dog-{i:06d}.png" for i in range(3)),
        *("gallery.html", RECORD),
    ]
    assert (tmp_path / "p" / "gallery.html").read_text(encoding="utf-8").count("<figure") == 3


def test_generate_draws_the_prompts_of_a_file(files, tmp_path, capsys):
    adapter, tiny = files
    (tmp_path / "prompts.txt").write_text("# two\na photo of {token} {class_noun}\na cat\n")
    words = ("--prompts", tmp_path / "prompts.txt", "--seeds", "3,1", *WORDS, "--base", tiny, "--out", tmp_path / "p")
    assert call("generate", adapter, *words) == 0
    names = [f"{name}-00000{seed}.png" for name in ("a_photo_of_sks_dog", "a_cat") for seed in (3, 1)] + ["gallery.html"]
    told = capsys.readouterr()
    assert told.out.split() == [str(tmp_path / "p" / name) for name in names]
    assert [line for line in told.err.splitlines() if line.startswith("picture")] == [f"picture {i}/4" for i in (1, 2, 3, 4)]
    page = (tmp_path / "p" / "gallery.html").read_text(encoding="utf-8")
    assert "<title>2 prompts</title>" in page and "a cat" in page


@pytest.mark.parametrize(
    ("words", "line"),
    [
        ("grid {rex}", "pass exactly one of --prompt TEXT"),
        ("grid {rex} --prompt x --prompts y.txt", "pass exactly one of --prompt TEXT"),
        ("grid {rex} --prompt x --out g.pdf", "saved as .html, .png"),
        ("grid {rex} --prompt x --weights 0,a", "write them like 0,0.4,0.8,1"),
        ("grid {rex} --prompt x --weights 0,inf", "write them like 0,0.4,0.8,1"),
        ("grid {rex} --prompt x --weights 0 --before-after", "exclude each other"),
        ("generate {rex} --prompts nothing.txt", "nothing.txt: No such file"),
        ("generate {rex} --prompt-set animal", "'animal' is not one of 'object', 'live'"),
        ("generate {rex} --prompt-set live --recipe r.json", "--recipe are for one prompt"),
        ("generate {rex} --prompt {{tokn}}", "{tokn} is unknown"),
    ],
)
def test_a_mistake_is_one_line(files, capsys, words, line):
    assert call(*(word.format(rex=files[0]) for word in words.split())) == 2
    told = capsys.readouterr()
    *before, last = told.err.splitlines()
    assert told.out == "" and line in last and all(said.startswith("loading ") for said in before)
