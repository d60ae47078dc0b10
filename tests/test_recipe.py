"""Recipe: the same pictures again, from a file without weights or anything private."""

from __future__ import annotations

import base64
import json
import warnings
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path

import numpy as np
import pipelines
import pytest
from PIL import Image
from spoilt import taken_apart
from test_photos import declared_png

from lora_booth.adapters.adapter import Adapter
from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec
from lora_booth.errors import AdapterBaseMismatch, CompositionWarning, LoraBoothError, SettingsError
from lora_booth.pictures import composition
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.gallery import Gallery
from lora_booth.pictures.picture import Picture
from lora_booth.pictures.recipe import Recipe, file_hash
from lora_booth.pictures.regions import Region
from lora_booth.pictures.weights import Weight

PROMPT = "sks dog, do owl"


@pytest.fixture(scope="module")
def base() -> BaseModel:
    return BaseModel.from_pipeline(pipelines.make_pipeline("sd2"), name="tiny")


@pytest.fixture(scope="module")
def files(base, tmp_path_factory) -> list[Path]:
    folder = tmp_path_factory.mktemp("adapters")
    paths = []
    for seed, token, noun in ((1, "sks", "dog"), (2, "do", "owl")):
        made = pipelines.random_adapter(base, LoraSpec(rank=2), seed=seed)
        paths.append(replace(made, card=replace(made.card, token=token, class_noun=noun)).save(folder / f"{token}.safetensors"))
    return paths


def settings(adapters: list[Adapter]) -> dict[str, dict]:
    rex, bob = adapters
    mask = Image.new("L", (32, 32), 255)
    return {
        "auto": {"adapters": [rex, (bob, 0.7)], "regions": "auto"},
        "default": {"adapters": [rex, bob]},
        "boxes": {"adapters": [(rex, Weight(0.5, blocks={"mid": 0.0}, end=0.5))], "regions": [Region(bob, box=(0, 0, 0.5, 1))]},
        "masks": {"regions": [Region(rex, mask=mask, weight=0.4, prompt="sks"), Region(bob, box=(0.5, 0, 1, 1))], "start": 0.3},
    }


def same(a: list[Picture], b: list[Picture]) -> bool:
    return all(np.array_equal(np.asarray(x.image), np.asarray(y.image)) for x, y in zip(a, b, strict=True))


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lora_booth.errors.CompositionWarning")
@pytest.mark.parametrize("name", ["auto", "default", "boxes", "masks"])
def test_a_recipe_replays_to_the_same_pictures(base, files, tmp_path, name):
    adapters = [Adapter.load(path) for path in files]
    studio = Composition(base, **settings(adapters)[name])
    asked = {"seeds": [3, 4], "steps": 4, "guidance": 2.0, "size": (56, 48), "negative_prompt": "a cat"}
    file = Recipe.of(studio, PROMPT, **asked).save(tmp_path / "recipe.json")
    again = Recipe.load(file).generate(base, [Adapter.load(path) for path in reversed(files)])
    assert same(studio.generate(PROMPT, **asked), again)
    if name == "default":  # a prompt that names none of the subjects is drawn as the sum, and replays as it
        of_nobody = Recipe.of(studio, "a tree", **asked)
        assert same(studio.generate("a tree", **asked), of_nobody.generate(base, adapters))
    assert [p.seed for p in Recipe.load(file).generate(base, adapters, seeds=[7])] == [7]


def test_it_records_what_read_the_prompt(base, files, tmp_path, monkeypatch):
    pytest.importorskip("compel")
    adapters = [Adapter.load(files[0])]
    studio, asked = Composition(base, adapters), {"steps": 1, "seeds": [1]}

    def recipe(prompt: str, **more) -> Recipe:
        return Recipe.load(Recipe.of(studio, prompt, **asked, **more).save(tmp_path / "recipe.json"))

    def told(written: Recipe) -> str:
        with warnings.catch_warnings(record=True) as noted:
            warnings.simplefilter("always", CompositionWarning)
            written.studio(base, adapters)
        return "; ".join(str(one.message) for one in noted)

    with_compel = [recipe("sks dog, (do:1.5)"), recipe("sks dog", negative_prompt="(do:1.5)")]
    assert told(with_compel[0]) == told(with_compel[1]) == told(recipe("sks dog")) == ""
    [picture] = with_compel[0].generate(base, adapters)
    assert picture.making.compel == version("compel")
    assert f"compel {version('compel')}" in Gallery([picture]).html()
    older = replace(with_compel[0], versions={"compel": "1.0"})
    assert f"read by compel 1.0, here by compel {version('compel')}, so" in told(older)
    assert told(replace(older, versions={"compel": "\x1b[2J"})).isprintable()
    monkeypatch.setattr(composition, "compel_version", lambda: None)
    remedy = f"pip install compel=={version('compel')}"
    for written in with_compel:
        assert told(written).endswith(f"here by the text encoders alone, so the pictures may differ; {remedy}")
    alone = recipe("sks dog, (do:1.5)")
    assert told(alone) == told(recipe("sks dog")) == ""
    monkeypatch.undo()
    assert told(alone).endswith("so the pictures may differ; pip uninstall compel")


def test_adapters_are_known_by_the_hash_that_their_files_show(base, files):
    adapter = Adapter.load(files[0])
    header, _ = taken_apart(files[0].read_bytes())
    assert file_hash(adapter) == header["__metadata__"]["sshs_model_hash"]
    made = pipelines.random_adapter(base, LoraSpec(rank=2), seed=1)
    assert file_hash(made) == file_hash(adapter)  # before it was saved, and whatever its card says


def test_what_is_missing_is_named(base, files, tmp_path):
    adapters = [Adapter.load(path) for path in files]
    recipe = Recipe.of(Composition(base, adapters), PROMPT)
    with pytest.raises(SettingsError, match=r"needs do \(hash"):
        recipe.generate(base, adapters[:1])
    other = BaseModel.from_pipeline(pipelines.make_pipeline("sd1"))
    with pytest.raises(AdapterBaseMismatch, match="made with tiny"):
        recipe.generate(other, adapters)
    (tmp_path / "run.json").write_text('{"status": "finished"}')
    with pytest.raises(SettingsError, match=r"run\.json: not a recipe; pass a file that"):
        Recipe.load(tmp_path / "run.json")
    for content in ("{}", "[]", "no", '{"format": 99}', '{"format": 1, "base": "x"}'):
        (tmp_path / "bad.json").write_text(content)
        with pytest.raises(SettingsError, match=r"bad\.json"):
            Recipe.load(tmp_path / "bad.json")


def test_a_recipe_takes_what_generate_takes(base, files, tmp_path):
    studio = Composition(base, [Adapter.load(files[0])])
    for seeds, written in ((5, [5]), (np.arange(2), [0, 1]), (range(2), [0, 1])):
        path = Recipe.of(studio, PROMPT, seeds=seeds, size="64x32").save(tmp_path / "r.json")
        asked = json.loads(path.read_text())["pictures"]
        assert Recipe.load(path) == Recipe.of(studio, PROMPT, seeds=seeds, size="64x32")
        assert asked == {"prompt": PROMPT, "seeds": written, "size": [64, 32]}
    with pytest.raises(SettingsError, match="cannot ask for on_image"):
        Recipe.of(studio, PROMPT, on_image=print)


def test_a_recipe_cannot_ask_for_what_generate_does_not_have(base, files, tmp_path):
    path = Recipe.of(Composition(base, [Adapter.load(files[0])]), PROMPT, steps=2).save(tmp_path / "r.json")
    written = json.loads(path.read_text())
    for pictures in (
        {"on_image": "print"},
        {"steps": "2"},
        {"steps": True},
        {"seeds": ["1"]},
        {"prompt": None},
        {"size": 8.5},
        {"size": "x"},
    ):
        path.write_text(json.dumps(written | {"pictures": written["pictures"] | pictures}))
        with pytest.raises(SettingsError, match=rf"r\.json: .*({next(iter(pictures))}|whole numbers)"):
            Recipe.load(path)


def test_escape_codes_of_a_recipe_stay_out_of_messages(base, files, tmp_path):
    adapters = [Adapter.load(path) for path in files]
    path = Recipe.of(Composition(base, adapters, regions="auto"), PROMPT, steps=2).save(tmp_path / "r.json")
    written, bad = json.loads(path.read_text()), "\x1b[2J\n\u202e"
    entry = written["adapters"][0]
    for change in (
        {"pictures": {bad: 1}},
        {"pictures": written["pictures"] | {"steps": bad}},
        {"composition": written["composition"] | {"method": bad}},
        {"composition": written["composition"] | {bad: 1}},
        {"composition": written["composition"] | {"background": [bad]}},
        {"adapters": [entry | {"name": bad, "hash": bad}]},
        {"adapters": [entry | {"weight": entry["weight"] | {"blocks": {bad: 1}}}]},
        {"adapters": [entry | {"weight": {bad: 1}}]},
        {"base": bad, "base_hash": bad},
        {bad: 1},
        {"format": bad},
    ):
        path.write_text(json.dumps(written | change))
        with pytest.raises(LoraBoothError) as told:
            Recipe.load(path).generate(base, adapters)
        assert str(told.value).isprintable(), change


def test_nothing_of_a_masks_file_is_in_it(base, files, tmp_path):
    mask = Image.new("L", (32, 32), 255)
    mask.info["comment"] = "secret-comment"
    exif = mask.getexif()
    exif[0x010E] = "secret-description"
    mask.save(tmp_path / "secret-name.png", exif=exif)
    with Image.open(tmp_path / "secret-name.png") as opened:
        regions = [Region(Adapter.load(files[0]), mask=opened)]
        text = Recipe.of(Composition(base, regions=regions), PROMPT).save(tmp_path / "recipe.json").read_text()
    assert "secret" not in text and str(tmp_path) not in text
    [entry] = json.loads(text)["composition"]["regions"]
    assert b"secret" not in base64.b64decode(entry["mask"])
    for mask in (declared_png(9000, 9000), b"%!PS-Adobe-3.0", b"\x89PNG\r\n\x1a\n"):
        written = json.loads(text)
        written["composition"]["regions"][0]["mask"] = base64.b64encode(mask).decode()
        (tmp_path / "hostile.json").write_text(json.dumps(written))
        with pytest.raises(LoraBoothError, match="megapixels|PostScript|damaged"):
            Recipe.load(tmp_path / "hostile.json").studio(base, [Adapter.load(files[0])])


# a recipe as the version before this one wrote it, but for the hashes
WRITTEN = """{
 "format": 1, "base": "tiny", "base_hash": "BASE",
 "adapters": [{"name": "sks", "hash": "SKS", "weight": {"value": 0.5, "blocks": {"mid": 0.0}, "start": 0.0, "end": 0.5}}],
 "composition": {"method": "regions", "regions": [{"name": "do", "hash": "DO", "prompt": null, "feather": 0.04,
  "box": [0, 0, 0.5, 1], "weight": null}], "start": 0.0, "background": null},
 "pictures": {"prompt": "sks dog, do owl", "seeds": [3], "steps": 4, "guidance": 2.0},
 "versions": {"lora_booth": "0.1.0", "torch": "2.9.0", "diffusers": "0.35.0"}
}"""


def test_a_recipe_that_was_written_before(base, files, tmp_path):
    adapters = [Adapter.load(path) for path in files]
    text = WRITTEN.replace("BASE", base.fingerprint)
    for word, adapter in zip(("SKS", "DO"), adapters, strict=True):
        text = text.replace(f'"hash": "{word}"', f'"hash": "{file_hash(adapter)}"')
    (tmp_path / "old.json").write_text(text)
    rex, bob = adapters
    weight = Weight(0.5, blocks={"mid": 0.0}, end=0.5)
    studio = Composition(base, [(rex, weight)], regions=[Region(bob, box=(0, 0, 0.5, 1))])
    asked = {"seeds": [3], "steps": 4, "guidance": 2.0}
    assert same(Recipe.load(tmp_path / "old.json").generate(base, adapters), studio.generate(PROMPT, **asked))
    written = json.loads(Recipe.of(studio, PROMPT, **asked).save(tmp_path / "new.json").read_text())
    assert written | {"versions": {}} == json.loads(text) | {"versions": {}}
