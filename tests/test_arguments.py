"""Wrong arguments of the public names: each ends in one LoraBoothError that names what is wrong."""

from __future__ import annotations

import re
from collections.abc import Generator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any

import pipelines
import pytest
from PIL import Image

import lora_booth as lb

PROMPT = "a photo of sks dog"
# what is passed where the table of wrong arguments says nothing; a name in <> is that of a fixture
GOOD: dict[str, dict[str, Any]] = {
    "Adapter.load": {},
    "Card": {},
    "difference": {"a": "<adapter>", "b": "<adapter>"},
    "merge": {"adapters": "<adapter>"},
    "resize": {"adapter": "<adapter>", "rank": 1},
    "bake": {"base": "<base>", "adapters": "<adapter>", "out": "<out>"},
    "BaseModel.load": {"source": "toybox"},
    "BaseModel.from_pipeline": {},
    "Composition": {"base": "<base>", "adapters": "<adapter>"},
    "Composition.generate": {"self": "<studio>", "prompt": PROMPT, "steps": 1},
    "Composition.find_regions": {"self": "<auto>", "prompt": PROMPT},
    "Composition.inpaint": {"self": "<studio>", "photo": "<image>", "mask": "<image>", "prompt": PROMPT, "steps": 1},
    "Composition.preflight": {"self": "<studio>"},
    "Picture.save": {"self": "<picture>"},
    "Recipe.load": {},
    "Region": {"adapter": "<adapter>", "box": (0, 0, 1, 1)},
    "Request": {"prompt": PROMPT},
    "Serving": {"base": "<base>"},
    "Serving.load": {"self": "<live>", "name": "sks", "adapter": "<adapter>"},
    "Serving.use": {"self": "<live>", "weights": {}},
    "Serving.generate": {"self": "<live>", "requests": "<requests>", "steps": 1},
    "Weight": {},
    "preview": {"regions": "<regions>"},
    "LoraSpec": {},
    "TrainingConfig": {},
    "evaluate": {"base": "<base>", "adapters": "<adapter>", "photos": "<photos>", "steps": 1},
    "extract": {"tuned": "<base>", "base": "<base>", "rank": 2},
    "Gallery": {"pictures": "<pictures>"},
    "before_after": {"base": "<base>", "adapters": "<adapter>", "prompt": PROMPT, "steps": 1},
    "grid": {"base": "<base>", "adapters": "<adapter>", "prompt": PROMPT, "steps": 1},
    "grid_steps": {"base": "<base>", "adapters": "<adapter>", "prompt": PROMPT, "steps": 1},
    "attached": {"base": "<base>", "adapters": "<adapter>"},
    "caption_model": {"model": "<out>"},
    "make_masks": {"folder": "<photos>", "segmenter": lambda picture: None},
    "fill_prompts": {"prompts": ["a {token}"], "token": "sks"},
    "read_prompts": {},
    "write_report": {},
    "Subject.from_folder": {"folder": "<photos>", "token": "sks", "class_noun": "dog"},
    "check_token": {"token": "sks", "tokenizer": "<tokenizer>"},
    "propose_tokens": {"tokenizer": "<tokenizer>"},
    "plan": {"base": "<base>"},
    "prepare": {"base": "<base>", "subject": "<rex>"},
    "train": {"base": "<base>", "subject": "<rex>", "progress": False},
    "train_many": {"base": "<base>", "subjects": "<subjects>", "progress": False},
    "training_steps": {"base": "<base>", "cache": None},
}
MADE_BY_OTHERS = {"__version__", "LoraBoothError", "PROMPT_SETS", "Grid", "Photo", "Step", "LoraFactors"}
# (public name, argument, wrong values, what the message names; None: the argument)
WRONG: list[tuple[str, str, list[Any], str | None]] = [
    ("Adapter.load", "path", [5, None, ["a"]], None),
    ("Card", "token", [5, ["a"]], None),
    ("Card", "weight", ["x", None], None),
    ("difference", "a", [5, None, "x", ["x"]], None),
    ("difference", "b", [5, None, "x", ["x"]], None),
    ("merge", "adapters", [5, None, ["x"], [None]], "adapter|x: "),
    ("merge", "method", [5, None, ["sum"]], None),
    ("resize", "adapter", [5, None, "x", ["x"]], None),
    ("resize", "rank", ["x", [2], 2.5], None),
    ("bake", "base", [5, None, ["x"]], "U-Net"),
    ("bake", "adapters", [5, None, [5]], "adapter"),
    ("bake", "out", [5, None, ["a"]], None),
    ("bake", "dtype", [5, None, ["fp16"]], None),
    ("BaseModel.load", "source", [5, None, ["a"]], None),
    ("BaseModel.load", "dtype", ["float16", 5], None),
    ("BaseModel.load", "vae", [5, ["x"]], None),
    ("BaseModel.load", "device", [5.5, ["cpu"], "x"], None),
    ("BaseModel.from_pipeline", "pipeline", [5, None, "x", ["a"]], "U-Net|x"),
    ("Composition", "base", [5, None, ["x"]], "U-Net"),
    ("Composition", "adapters", [5, None, [None]], "adapter"),
    ("Composition", "method", [5, ["sum"], 0], None),
    ("Composition", "regions", [5, "x", ["x"], [None]], None),
    ("Composition", "start", ["x", [0.1]], None),
    ("Composition.generate", "prompt", [5, None, [PROMPT]], None),
    ("Composition.generate", "seeds", [None, "x", ["x"], [0.5]], None),
    ("Composition.generate", "steps", ["x", None, [2]], None),
    ("Composition.inpaint", "photo", [5, None, ["x"]], None),
    ("Composition.inpaint", "mask", [5, None, ["x"]], None),
    ("Composition.inpaint", "prompt", [5, None, [PROMPT]], None),
    ("Composition.preflight", "steps", ["x", None], None),
    ("Composition.preflight", "prompt", [5, None], None),
    ("Picture.save", "path", [5, None, ["a.png"]], None),
    ("Recipe.load", "path", [5, None, ["a"]], None),
    ("Composition.find_regions", "seed", ["x", None, -1, [1, 2]], None),
    ("Composition.find_regions", "steps", ["x", None, 0], None),
    ("Region", "adapter", [5, None, "x"], None),
    ("Region", "box", [5, "x", ["a"] * 4], None),
    ("Request", "prompt", [5, None, [PROMPT]], None),
    ("Request", "adapters", [5, None, "x", ["sks"], {"sks": "x"}, {"sks": None}], None),
    ("Request", "seed", ["x", None, [0]], None),
    ("Request", "seed", [-1], "seed -1"),
    ("Request", "negative_prompt", [5, ["x"]], None),
    ("Serving", "base", [5, None, "x", ["x"]], "U-Net|pipeline"),
    ("Serving.load", "name", [5, None, ["sks"]], None),
    ("Serving.load", "adapter", [5, None, ["sks"]], None),
    ("Serving.use", "weights", [5, None, "x", ["sks"]], None),
    ("Serving.generate", "requests", [5, None, "x", ["x"]], None),
    ("Serving.generate", "steps", ["x", None, 0], None),
    ("Serving.generate", "guidance", ["x", None], None),
    ("Serving.generate", "size", ["x", 12], None),
    ("Weight", "value", ["x", None, [1]], "weight"),
    ("Weight", "blocks", [5, None, "x", ["down"]], None),
    ("preview", "regions", [5, None, "x", ["x"]], None),
    ("preview", "picture", [5, "x", ["x"]], None),
    ("preview", "side", ["x", None, 0], None),
    ("LoraSpec", "rank", ["x", None, [4]], None),
    ("TrainingConfig", "steps", ["x", [4]], None),
    ("evaluate", "base", [5, None, ["x"]], "base"),
    ("evaluate", "adapters", [5, None, ["x"], [5]], None),
    ("evaluate", "photos", [5, None, ["x", "y"]], None),
    ("evaluate", "prompts", [5, None, [5]], None),
    ("evaluate", "contexts", [5, [5]], None),
    ("evaluate", "seeds", [None, "x", ["x"]], None),
    ("evaluate", "class_seeds", [None, "x", ["x"]], "seeds"),
    ("evaluate", "steps", ["x", None, [2]], None),
    ("evaluate", "guidance", [None, "x"], None),
    ("evaluate", "size", ["x", 12], None),
    ("evaluate", "dino", [5, None], None),
    ("evaluate", "batch_size", ["x", 0], None),
    ("extract", "tuned", [5, None, "x", ["x"]], None),
    ("extract", "base", [5, None, "x", ["x"]], None),
    ("extract", "rank", ["x", [2]], None),
    ("Gallery", "pictures", [5, None, "x", ["x"]], None),
    ("Gallery", "title", [5, None], None),
    *(
        (name, *wrong)
        for name in ("grid", "grid_steps", "before_after")
        for wrong in [
            ("base", [5, None, ["x"]], "U-Net"),
            ("adapters", [5, None, [5]], "adapter"),
            ("prompt", [5, None, [5]], None),
            ("seeds", [None, "x", ["x"]], None),
            ("batch_size", ["x", None, 0], None),
            ("steps", ["x", None], None),
        ]
    ),
    ("grid", "weights", [None, "x", ["x"]], None),
    ("attached", "base", [5, None, ["x"]], "U-Net"),
    ("attached", "adapters", [5, None, [5]], "adapter"),
    ("caption_model", "model", [5, None, ["x"], "x"], "model|x: "),
    ("caption_model", "device", [5], None),
    ("make_masks", "folder", [5, None, [5]], "photos"),
    ("make_masks", "segmenter", [5, "x"], None),
    ("fill_prompts", "prompts", [5, None, [5]], None),
    ("fill_prompts", "token", [5, ["x"]], None),
    ("fill_prompts", "class_noun", [5, ["x"]], None),
    ("fill_prompts", "contexts", [5, None, [5]], None),
    ("read_prompts", "path", [5, None, ["a"]], None),
    ("write_report", "run", [5, None, ["a"]], None),
    ("Subject.from_folder", "folder", [5, None, [5]], "photos"),
    ("Subject.from_folder", "token", [5, None, ["a"]], None),
    ("Subject.from_folder", "class_noun", [5, None, ["a"]], None),
    ("Subject.from_folder", "class_images", [5, [5]], "photos"),
    ("Subject.from_folder", "masks", [5, "x"], None),
    ("Subject.from_folder", "captioner", [5, "x"], None),
    ("check_token", "token", [5, None, ["a"]], None),
    ("check_token", "tokenizer", [5, None, "x"], None),
    *((name, "encode", [5, "x"], None) for name in ("check_token", "propose_tokens")),
    ("check_token", "prompt", [5, ["x"]], None),
    ("check_token", "class_noun", [5, None, ["x"]], None),
    ("propose_tokens", "tokenizer", [5, None, "x"], None),
    ("propose_tokens", "count", ["x", None, -1], None),
    ("plan", "base", [5, None, ["x"]], "base"),
    ("plan", "lora", [5, "x"], None),
    ("plan", "config", [5, "x"], None),
    ("plan", "vram_gb", ["x", [8]], "vram"),
    ("plan", "gpu", [5, "x", ["T4"]], "GPU|gpu"),
    ("plan", "dtype", ["float16", 5], None),
    ("plan", "photos", ["x", None, [5]], None),
    ("prepare", "base", [5, None, "x", ["x"]], None),
    ("prepare", "subject", [5, None, "x", ["x"]], None),
    ("prepare", "lora", [5, "x"], None),
    ("prepare", "config", [5, "x"], None),
    ("train", "base", [5, None, ["x"]], None),
    ("train", "subject", [5, None, "x", ["x"]], None),
    ("train", "lora", [5, "x"], None),
    ("train", "config", [5, "x"], None),
    ("train", "init", [5, ["x"], "x"], "init|x: "),
    ("train", "out", [5, ["x"]], None),
    ("train", "mirror", [5, ["x"], "nothing://x"], "mirror|nothing://x"),
    ("train", "time_limit", ["x", [5]], None),
    ("train", "track", [5, "x", ["x"]], "track"),
    ("train_many", "base", [5, None, ["x"]], None),
    ("train_many", "subjects", [5, None, "x", {}, {"x": 5}, {5: "<rex>"}], "subject|name 5"),
    ("train_many", "lora", [5, "x"], None),
    ("train_many", "init", [5, ["x"], "x"], "init|x: "),
    ("train_many", "out", [5, ["x"]], None),
    ("train_many", "mirror", [5, ["x"], "nothing://x"], "mirror|nothing://x"),
    ("train_many", "together", ["x", [5], 0], None),
    ("train_many", "engine", ["dask", 5], None),
    ("train_many", "time_limit", ["x", [5]], None),
    ("training_steps", "base", [5, None, "x"], None),
    ("training_steps", "cache", [5, None, "x"], None),
]
CALLS = [(name, argument, value, told or argument) for name, argument, values, told in WRONG for value in values]


@pytest.fixture(scope="module")
def things(photos: Path, rex: lb.Subject, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    base = pipelines.base_of("sd1")
    adapter = pipelines.random_adapter(base).with_card(token="sks", class_noun="dog")
    picture = lb.Picture(Image.new("RGB", (16, 16)), PROMPT, 0)
    things = {"base": base, "adapter": adapter, "picture": picture, "pictures": [picture], "photos": photos, "rex": rex}
    things |= {"image": Image.new("RGB", (64, 64), "white"), "subjects": {"x": rex}}
    things |= {"regions": [lb.Region(adapter, box=(0, 0, 1, 1))], "requests": [lb.Request(PROMPT)], "tokenizer": base.tokenizer}
    return things | {
        "out": tmp_path_factory.mktemp("out") / "baked",
        "studio": lb.Composition(base, adapter, method="sum"),
        "auto": lb.Composition(base, adapter, regions="auto"),
        "live": lb.Serving(base),
    }


@pytest.mark.parametrize(("name", "argument", "value", "told"), CALLS, ids=[f"{c[0]}-{c[1]}-{c[2]!r:.20}" for c in CALLS])
def test_a_wrong_argument_is_named(name, argument, value, told, things, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    asked = GOOD[name] | {argument: value}
    given = {key: things[one[1:-1]] if isinstance(one, str) and one.startswith("<") else one for key, one in asked.items()}
    owner, _, method = name.partition(".")
    call = getattr(given.pop("self", None) or getattr(lb, owner), method) if method else getattr(lb, owner)
    with pytest.raises(lb.LoraBoothError) as error:
        made = call(**given)
        if isinstance(made, Generator):
            next(made)
        if isinstance(made, AbstractContextManager) and name == "attached":
            made.__enter__()
    message = str(error.value)
    assert re.search(told, message) and "\n" not in message, message
    assert not list(tmp_path.iterdir())


def test_every_public_name_is_called():
    tried = {name.partition(".")[0] for name, *_ in WRONG}
    assert tried | MADE_BY_OTHERS == set(lb.__all__)
