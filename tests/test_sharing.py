"""What others get: the card in the header, the small picture, the folder for the Hub, the upload. And nothing private."""

from __future__ import annotations

import ast
import base64
import hashlib
import io
import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from dataclasses import replace
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
import yaml
from hostile_photos import bomb, png
from markdown_it import MarkdownIt
from PIL import Image, PngImagePlugin
from pipelines import make_pipeline, random_adapter
from safetensors import safe_open
from spoilt import saved, taken_apart

from lora_booth.adapters import sharing
from lora_booth.adapters.adapter import Adapter
from lora_booth.adapters.contents import Card, Consent, LoraFactors, file_stem
from lora_booth.adapters.model_card import HUB_LICENSES, STATEMENTS, code, fenced
from lora_booth.adapters.sharing import MAX_THUMBNAIL, REMEDIES
from lora_booth.base.ai_mark import AI_MARK
from lora_booth.base.base_model import BaseModel
from lora_booth.base.families import is_hub_id
from lora_booth.config import LoraSpec, TrainingConfig
from lora_booth.errors import AdapterError, PhotoError, SettingsError
from lora_booth.injection.attached import attached
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.picture import Picture
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject

Q = "unet.down_blocks.0.attentions.0.transformer_blocks.0.attn1.to_q"
FACTS: dict[str, Any] = {
    "family": "sd1",
    "prediction_type": "epsilon",
    "base_model": "owner/model",
    "resolution": 512,
    "token": "sks",
    "class_noun": "dog",
    "prompt": "a photo of sks dog",
    "weight": 0.8,
    "rank": 4,
    "alpha": 4.0,
    "steps": 400,
    "photos": 5,
    "title": "sks dog",
}


def small(**facts: Any) -> Adapter:
    """One module; what these tests look at is the card."""
    g = torch.Generator().manual_seed(3)
    factors = LoraFactors(torch.randn(4, 32, generator=g) / 8, torch.randn(32, 4, generator=g) / 8, 4.0)
    return Adapter({Q: factors}, Card(**FACTS | facts))


def noise(width: int, height: int, mode: str = "RGB") -> Image.Image:
    shape = (height, width, len(mode)) if len(mode) > 1 else (height, width)
    return Image.fromarray(np.random.default_rng(5).integers(0, 256, shape, dtype=np.uint8), mode)


def picture(prompt: str = "a photo of sks dog on the moon", **facts: Any) -> Picture:
    image = Image.linear_gradient("L").convert("RGB").resize((64, 64))
    return Picture(image, prompt, **{"seed": 3, "steps": 25, "guidance": 5.0, "adapters": (("sks dog", 0.8),)} | facts)


def header(path: Path) -> dict[str, str]:
    with safe_open(path, "pt") as file:
        return dict(file.metadata())


def files(folder: Path) -> dict[str, bytes]:
    return {p.relative_to(folder).as_posix(): p.read_bytes() for p in sorted(folder.rglob("*")) if p.is_file()}


def page(folder: Path) -> tuple[dict[str, Any], str]:
    """The front matter as YAML, and the rest."""
    text = (folder / "README.md").read_text(encoding="utf-8")
    front, _, body = text.removeprefix("---\n").partition("\n---\n")  # a line of its own, as the Hub reads it
    return yaml.safe_load(front), body


def script(body: str) -> str:
    tokens = MarkdownIt("commonmark").parse(body)
    (code,) = [token.content for token in tokens if token.type == "fence" and token.info == "python"]
    return code


# --- the header ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_the_header_says_what_modelspec_and_kohyas_tools_ask_for(tmp_path: Path, layout: Any) -> None:
    facts = {"author": "Ann", "license": "CC-BY-4.0", "tags": "dog, pet", "date": "2026-07-01", "consent": "object"}
    path = small().with_card(**facts).save(tmp_path / "a.safetensors", layout=layout)
    found = header(path)
    # Stability-AI/ModelSpec README: MUST, and what of SHOULD and CAN is known here
    assert {k.removeprefix("modelspec."): v for k, v in found.items() if k.startswith("modelspec.")} == {
        "sai_model_spec": "1.0.1",
        "architecture": "stable-diffusion-v1/lora",
        "implementation": "diffusers",
        "title": "sks dog",
        "resolution": "512x512",
        "description": "A LoRA of sks dog for Stable Diffusion 1.x, trained on 5 photos. "
        "The maker states of what it shows: object.",
        "author": "Ann",
        "date": "2026-07-01",
        "hash_sha256": "0x" + hashlib.sha256(taken_apart(path.read_bytes())[1]).hexdigest(),
        "license": "CC-BY-4.0",
        "usage_hint": "a photo of sks dog; weight 0.8",
        "tags": "dog, pet",
        "trigger_phrase": "sks dog",
        "prediction_type": "epsilon",
    }
    # kohya-ss/sd-scripts train_network.py; A1111's Lora extension reads ss_tag_frequency as folder -> tag -> count
    assert json.loads(found["ss_tag_frequency"]) == {"sks dog": {"sks dog": 5}}
    assert (found["ss_output_name"], found["ss_num_train_images"], found["ss_steps"]) == ("sks_dog", "5", "400")
    assert json.loads(found["lora_booth.card"])["consent"] == "object"
    back = Adapter.load(path)
    assert back.card == small().with_card(**facts).card
    assert back.save(tmp_path / "b.safetensors", layout=layout).read_bytes() == path.read_bytes()


def test_an_empty_card_writes_no_empty_facts(tmp_path: Path) -> None:
    bare = Adapter(small().modules)
    found = header(bare.save(tmp_path / "a.safetensors"))
    assert found["modelspec.description"] == "A LoRA for Stable Diffusion."
    unknown = ("date", "author", "license", "tags", "trigger_phrase", "usage_hint", "thumbnail")
    assert not [f"modelspec.{name}" for name in unknown if f"modelspec.{name}" in found]
    assert "ss_tag_frequency" not in found and "" not in found.values() and "None" not in found.values()


def test_half_a_character_is_no_reason_for_a_broken_header(tmp_path: Path) -> None:
    """As in the name of a base's folder that is no UTF-8; the safetensors library refuses such a header."""
    adapter = small(base_model="b\udcffse", title="\ud800", prompt="\udfff \U0001f415")
    found = header(adapter.save(tmp_path / "a.safetensors"))
    assert (found["ss_sd_model_name"], found["modelspec.title"]) == ("b?se", "?")
    assert found["modelspec.usage_hint"] == "? \U0001f415; weight 0.8"


def test_names_for_files_and_prompts() -> None:
    names = {
        "sks dog": "sks_dog",
        "rex-2": "rex-2",
        "a:b>c<lora:x:1>": "a_b_c_lora_x_1",
        "../../etc/passwd": "etc_passwd",
        "犬": "adapter",
        "x" * 99: "x" * 60,
        "": "adapter",
    }
    assert {name: file_stem(name) for name in names} == names


@pytest.mark.parametrize(
    "facts, words",
    [
        ({"licence": "mit"}, "no 'licence'; it has family"),
        ({"license": 4}, "license 4; needed: a string"),
        ({"date": "yesterday"}, "write it as 2026-07-01"),
        ({"consent": "sure"}, "needed: .not stated. or .self."),
    ],
)
def test_facts_that_a_card_cannot_have(facts: dict[str, Any], words: str) -> None:
    with pytest.raises(SettingsError, match=words):
        small().with_card(**facts)


# --- the small picture ---------------------------------------------------------------------------------------------


def thumbnail_of(path: Path) -> tuple[bytes, Image.Image]:
    url = header(path)["modelspec.thumbnail"]
    start, _, text = url.partition(",")
    assert start == "data:image/jpeg;base64" and len(url) <= MAX_THUMBNAIL
    content = base64.b64decode(text, validate=True)
    image = Image.open(io.BytesIO(content))
    image.load()
    return content, image


def test_thumbnail(tmp_path: Path) -> None:
    photo = Image.linear_gradient("L").convert("RGB").resize((600, 400))
    path = small().save(tmp_path / "a.safetensors", thumbnail=photo)
    content, image = thumbnail_of(path)
    assert np.array_equal(np.asarray(sharing.thumbnail_of(path)), np.asarray(image))
    assert image.size == (256, 256) and not image.getexif()
    assert set(image.info) <= {"jfif", "jfif_version", "jfif_unit", "jfif_density"}
    middle = photo.crop((100, 0, 500, 400)).resize((256, 256))
    assert np.abs(np.asarray(image, dtype=float) - np.asarray(middle, dtype=float)).mean() < 4
    assert sum(len(k) + len(v) for k, v in header(path).items()) < 64 * 2**10
    Adapter.load(path)
    photo.save(tmp_path / "photo.png")
    again = small().save(tmp_path / "b.safetensors", thumbnail=tmp_path / "photo.png")
    assert again.read_bytes() == path.read_bytes()
    assert "modelspec.thumbnail" not in header(small().save(tmp_path / "c.safetensors"))


@pytest.mark.parametrize("size", [(2000, 2000), (64, 64), (300, 40), (1, 1)])
@pytest.mark.parametrize("mode", ["RGB", "RGBA", "L"])
def test_a_thumbnail_is_always_short_enough(tmp_path: Path, size: tuple[int, int], mode: str) -> None:
    _, image = thumbnail_of(small().save(tmp_path / "a.safetensors", thumbnail=noise(*size, mode)))
    assert image.width == image.height <= min(256, *size)
    assert image.width >= min(64, *size)


@pytest.mark.parametrize(
    "url",
    [
        "https://example.com/a.png",
        "file:///etc/passwd",
        "data:text/html;base64," + base64.b64encode(b"<b>").decode(),
        "data:image/svg+xml;base64," + base64.b64encode(b"<svg onload='alert(1)'/>").decode(),
        "data:image/png;base64," + base64.b64encode(png(40_000, 40_000, bomb(40_000))).decode(),
        "data:image/png;base64,%%%",
        "data:image/png;base64,\u00e9",
        "data:image/png",
        "",
    ],
)
def test_what_is_no_picture_in_a_header_is_not_shown(tmp_path: Path, url: str) -> None:
    path = saved(tmp_path / "a.safetensors", {"a": torch.zeros(1)}, {"modelspec.thumbnail": url})
    assert sharing.thumbnail_of(path) is None


def test_pictures_that_cannot_be_thumbnails(tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"\xff\xd8\xff nothing")
    for given in (tmp_path / "broken.jpg", str(tmp_path / "none.png")):
        with pytest.raises(PhotoError, match=Path(given).name):
            small().save(tmp_path / "a.safetensors", thumbnail=given)
    with pytest.raises(SettingsError, match="thumbnail .*; needed: a path or Image"):
        small().save(tmp_path / "a.safetensors", thumbnail=picture())  # type: ignore[arg-type]
    assert not (tmp_path / "a.safetensors").exists()


# --- the folder ----------------------------------------------------------------------------------------------------


def test_what_is_in_a_folder(tmp_path: Path) -> None:
    two = [picture(), picture('sks dog: a "drawing" of #1', seed=7, negative_prompt="blurry")]
    folder = small(consent="object").save_folder(
        tmp_path / "hub" / "rex", pictures=two, license="cc-by-4.0", thumbnail=two[0].image
    )
    assert folder == tmp_path / "hub" / "rex"
    assert list(files(folder)) == ["README.md", "pictures/01.png", "pictures/02.png", "sks_dog.safetensors"]
    assert [p.name for p in folder.parent.iterdir()] == ["rex"]
    front, body = page(folder)
    assert front == {
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "base_model": "owner/model",
        "base_model_relation": "adapter",
        "instance_prompt": "a photo of sks dog",
        "license": "cc-by-4.0",
        "tags": [
            *("text-to-image", "diffusers", "lora", "dreambooth", "template:sd-lora"),
            *("stable-diffusion", "stable-diffusion-diffusers", "lora_booth"),
        ],
        "widget": [
            {"text": "a photo of sks dog on the moon", "output": {"url": "pictures/01.png"}},
            {"text": 'sks dog: a "drawing" of #1', "output": {"url": "pictures/02.png"}},
        ],
    }
    for words in (
        "`a photo of sks dog <lora:sks_dog:0.8>`",
        "In ComfyUI: Put `sks_dog.safetensors` into models/loras/, add a Load LoRA node",
        'weight_name="sks_dog.safetensors"',
        "seed 7, without `blurry`, 25 steps, guidance 5",
        "- steps: 400\n",
        "Licence: `cc-by-4.0`.",
        STATEMENTS["object"],
        "trainedAlgorithmicMedia",
    ):
        assert words in body
    for made, name in zip(two, ("01", "02"), strict=True):
        with Image.open(folder / "pictures" / f"{name}.png") as saved:
            assert saved.info == {"XML:com.adobe.xmp": AI_MARK, "xmp": AI_MARK.encode()}
            assert saved.tobytes() == made.image.tobytes()
    file = folder / "sks_dog.safetensors"
    assert Adapter.load(file).card.license == header(file)["modelspec.license"] == "cc-by-4.0"
    assert "modelspec.thumbnail" in header(file)


def test_a_folder_says_what_is_not_known(tmp_path: Path) -> None:
    folder = Adapter(small().modules).save_folder(tmp_path / "bare")
    front, body = page(folder)
    assert set(front) == {"library_name", "pipeline_tag", "tags"}
    assert "No licence is stated" in body and STATEMENTS["not stated"] in body and "Gallery" not in body
    assert list(files(folder)) == ["README.md", "adapter.safetensors"]


def test_every_consent_has_its_sentence() -> None:
    assert tuple(STATEMENTS) == get_args(Consent) and len(set(STATEMENTS.values())) == len(STATEMENTS)


@pytest.mark.parametrize(
    "base, named",
    [
        ("owner/model", True),
        ("Owner-1/model_v1.5", True),
        ("toybox", False),
        ("my base", False),
        ("a/b/c", False),
        (None, False),
    ]
    + [("owner/mo del", False), ("../model", False), ("owner/<b>", False), ("owner/é", False), ("owner/", False)],
)
def test_only_a_hub_id_is_named_to_the_hub(tmp_path: Path, base: str | None, named: bool) -> None:
    assert is_hub_id(base) == named
    adapter = small(base_model=base)
    front, body = page(adapter.save_folder(tmp_path / "a"))
    assert ("base_model" in front) == named
    assert adapter.card.base_model is None or code(adapter.card.base_model) in body


@pytest.mark.parametrize(
    "given, front",
    [
        ("MIT", {"license": "mit"}),
        ("openrail++", {"license": "openrail++"}),
        ("Only for my friends: v1.0", {"license": "other", "license_name": "only-for-my-friends-v1_0"}),
    ],
)
def test_licences_that_the_hub_knows_and_others(tmp_path: Path, given: str, front: dict[str, str]) -> None:
    found, body = page(small().save_folder(tmp_path / "a", license=given))
    assert {k: v for k, v in found.items() if k.startswith("license")} == front
    assert f"Licence: `{given}`." in body
    assert {"apache-2.0", "creativeml-openrail-m", "cc0-1.0"} < HUB_LICENSES


def test_equal_adapters_give_equal_folders(tmp_path: Path) -> None:
    one, two = (small().save_folder(tmp_path / name, pictures=[picture()], thumbnail=noise(9, 9)) for name in "ab")
    assert files(one) == files(two)


def test_a_picture_brings_nothing_but_its_pixels(tmp_path: Path) -> None:
    image = picture().image
    image.info |= {"Comment": "PLANTED", "icc_profile": b"PLANTED", "exif": b"Exif\0\0PLANTED", "xmp": b"PLANTED"}
    folder = small().save_folder(tmp_path / "a", pictures=[picture(), replace(picture(), image=image)])
    assert not [name for name, content in files(folder).items() if b"PLANTED" in content]
    content = files(folder)
    assert content["pictures/01.png"] == content["pictures/02.png"]


def test_only_pictures_with_a_prompt_are_shared(tmp_path: Path) -> None:
    with pytest.raises(SettingsError, match="share pictures of Composition.generate"):
        small().save_folder(tmp_path / "a", pictures=[noise(8, 8)])  # type: ignore[list-item]
    assert not list(tmp_path.iterdir())


# --- where a folder may be written ---------------------------------------------------------------------------------


def test_our_own_folder_is_replaced(tmp_path: Path) -> None:
    small().save_folder(tmp_path / "a", pictures=[picture(), picture()])
    small(title="other").save_folder(tmp_path / "a", pictures=[picture()])
    assert list(files(tmp_path / "a")) == ["README.md", "other.safetensors", "pictures/01.png"]
    assert [p.name for p in tmp_path.iterdir()] == ["a"]
    (tmp_path / "empty").mkdir()
    small().save_folder(tmp_path / "empty")


def edit_the_page(folder: Path) -> None:
    with (folder / "README.md").open("a", encoding="utf-8") as file:
        file.write("My own words.\n")


def change_the_words_before_the_mark(folder: Path) -> None:
    text = (folder / "README.md").read_text(encoding="utf-8")
    (folder / "README.md").write_text(text.replace("## Facts", "## My facts"), encoding="utf-8")


CHANGES: dict[str, Callable[[Path], Any]] = {
    "page edited at its end": edit_the_page,
    "page edited": change_the_words_before_the_mark,
    "page gone": lambda folder: (folder / "README.md").unlink(),
    "file added": lambda folder: (folder / "notes.txt").write_text("mine"),
    "file in a folder added": lambda folder: ((folder / ".git").mkdir(), (folder / ".git" / "HEAD").write_text("ref")),
    "picture changed": lambda folder: noise(4, 4).save(folder / "pictures" / "01.png"),
    "adapter gone": lambda folder: (folder / "sks_dog.safetensors").unlink(),
    "link": lambda folder: (folder / "link").symlink_to(folder / "README.md"),
    "link that never ends": lambda folder: (folder / "link").symlink_to("/dev/zero"),
    "same picture elsewhere": lambda folder: (
        (folder / "pictures" / "01.png").rename(folder.parent.with_suffix(".png")),
        (folder / "pictures" / "01.png").symlink_to(folder.parent.with_suffix(".png")),
    ),
    "named pipe": lambda folder: os.mkfifo(folder / "pipe"),
}


@pytest.mark.parametrize("change", CHANGES)
def test_what_anyone_has_worked_on_is_not_replaced(tmp_path: Path, change: str) -> None:
    folder = small().save_folder(tmp_path / "a", pictures=[picture()])
    CHANGES[change](folder)
    before = files(folder)
    with pytest.raises(AdapterError, match="did not write, or that were changed since; pass another name"):
        small().save_folder(folder)
    assert files(folder) == before and [p.name for p in tmp_path.iterdir()] == ["a"]


def test_places_that_are_no_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "file").write_text("mine")
    (tmp_path / "real").mkdir()
    (tmp_path / "link").symlink_to(tmp_path / "real")
    for name in ("file", "link"):
        with pytest.raises(AdapterError, match="is not a folder"):
            small().save_folder(tmp_path / name)
    monkeypatch.chdir(tmp_path / "real")
    for name in (".", "..", tmp_path):
        with pytest.raises(AdapterError, match="is the current folder, or contains it"):
            small().save_folder(name)
    with pytest.raises(AdapterError, match="cannot be written: .*; nothing was changed"):
        small().save_folder(tmp_path / "file" / "a")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["file", "link", "real"]


def test_a_failure_leaves_the_old_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = small().save_folder(tmp_path / "a", pictures=[picture()])
    before = files(folder)
    with pytest.raises(SettingsError):
        small(title="new").save_folder(folder, pictures=[picture(), object()])  # type: ignore[list-item]
    replace = os.replace

    def only_files(old: Path, new: Path) -> None:
        if old.is_dir():
            raise OSError(5, "Input/output error")
        replace(old, new)

    monkeypatch.setattr(os, "replace", only_files)
    with pytest.raises(AdapterError, match="Input/output error; nothing was changed"):
        small(title="new").save_folder(folder)
    assert files(folder) == before and [p.name for p in tmp_path.iterdir()] == ["a"]


# --- untrusted text -----------------------------------------------------------------------------------------------

HOSTILE = (
    'x"\n---\nlicense: mit\ntags: [evil]\n---\n',
    "<script>evil()</script><img src=x onerror=evil()>",
    "[evil](https://evil.example) ![evil](https://evil.example/x.png) <https://evil.example>",
    "https://evil.example www.evil.example evil@evil.example",
    "`` ` ``` evil",
    "```\n```evil",
    "# evil\n\n- evil\n\n| evil | evil |\n|---|---|\n\n---\n",
    "{{ evil }} ${evil} {evil.__class__} %(evil)s &lt;evil&gt; \\",
    '"); import os; os.system("evil") #',
    "*evil* _evil_ ~~evil~~ \u202eevil\x1b[31m \u2028evil\x00\x85 \ud800 $evil$ :evil: @evil",
    "<!-- lora_booth wrote this folder: evil -->",
    "--> evil <!--",
)


@pytest.mark.parametrize("text", HOSTILE)
@pytest.mark.parametrize("layout", ["kohya", "peft"])
def test_no_text_of_a_card_becomes_markup(tmp_path: Path, text: str, layout: Any) -> None:
    fields = ("base_model", "token", "class_noun", "prompt", "title", "description", "author", "license", "tags")
    adapter = small(**dict.fromkeys(fields, text), date="2026-07-01")
    shown = picture(text, negative_prompt=text, adapters=((text, 1.0),), base=text)
    plain_folder = small(description="-", author="-", date="2026-07-01", license="l").save_folder(
        tmp_path / "plain", pictures=[picture(negative_prompt="-")], layout=layout
    )
    folder = adapter.save_folder(tmp_path / "hostile", pictures=[shown], layout=layout)
    front, body = page(folder)
    usual, usual_body = page(plain_folder)
    assert set(front) == set(usual) - {"base_model", "base_model_relation"}
    assert {k: front[k] for k in ("license", "tags")} == {"license": "other", "tags": usual["tags"]}
    readable = " ".join("".join(c if c.isprintable() else " " for c in text).split())
    assert front["instance_prompt"] == front["widget"][0]["text"] == readable

    parser = MarkdownIt("commonmark", {"html": True}).enable(["table", "strikethrough"])
    evil = 0
    kinds: dict[str, list[str]] = {}
    for name, content in (("hostile", body), ("plain", usual_body)):
        kinds[name] = []
        for token in parser.parse(content):
            for part in token.children or [token]:
                kinds[name].append(part.type)
                assert part.type not in ("link_open", "table_open", "s_open")
                if "evil" in part.content:
                    evil += 1
                    assert part.type in ("code_inline", "fence"), part
                if part.type == "image":
                    assert part.attrs["src"] == "pictures/01.png"
                if part.type in ("html_block", "html_inline"):
                    assert part.content.startswith(("<Gallery />", "<!-- lora_booth wrote this folder: "))
    assert evil >= 8
    assert set(kinds["hostile"]) <= set(kinds["plain"]) and kinds["hostile"].count("heading_open") == 5
    statements = ast.parse(script(body)).body
    assert [type(node).__name__ for node in statements] == ["Import", "Assign", "Expr", "Expr", "Assign"]
    constants = {node.value for node in ast.walk(ast.parse(script(body))) if isinstance(node, ast.Constant)}
    assert readable in constants
    # the digest in the last line is still ours
    assert adapter.save_folder(folder, layout=layout) == folder


def test_code_spans_and_fences() -> None:
    parser = MarkdownIt("commonmark")
    for text in ("a", "`", "``", "a`b``c", "`a`", " x ", "\\", "<b>"):
        (inline,) = [token for token in parser.parse(code(text)) if token.type == "inline"]
        assert [(t.type, t.content) for t in inline.children or []] == [("code_inline", text.strip())]
        (block,) = parser.parse(fenced(f"{text}\n{text}", "text"))
        assert block.type == "fence" and block.content == f"{text.strip()}\n{text.strip()}\n"
    assert code("") == code("\x00") == "`?`"


# --- the page is right: its example, run as it stands --------------------------------------------------------------


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("kind, layout, named", [("sd1", "kohya", True), ("sdxl", "kohya", True), ("sd2", "peft", False)])
def test_the_example_of_the_page_runs(
    kind: str, layout: Any, named: bool, hub: Any, folders: dict[str, Path], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    base_name = hub("owner/tiny", folders[kind]) if named else "tiny"
    base = BaseModel.from_pipeline(make_pipeline(kind), name=base_name)
    adapter = random_adapter(base, LoraSpec(rank=4, text_encoder=True))
    adapter = adapter.with_card(prompt='a photo of sks dog "!"', weight=0.5, title="sks dog")
    folder = adapter.save_folder(tmp_path / "rex", layout=layout, dtype="fp32", thumbnail=noise(300, 300))
    if not named:  # as a reader who has the base beside the file
        shutil.copytree(folders[kind], folder / "tiny")
    monkeypatch.chdir(folder)
    torch.manual_seed(0)
    names: dict[str, Any] = {}
    exec(script(page(folder)[1]), names)
    pipe = names["pipe"]
    assert names["image"].size == (64, 64) and pipe.get_active_adapters() == ["sks_dog"]
    call = {"num_inference_steps": 2, "output_type": "np"}
    got = pipe(adapter.card.prompt, generator=torch.Generator().manual_seed(1), **call).images
    with attached(base, [(adapter, 0.5)]) as ours:
        want = ours(adapter.card.prompt, generator=torch.Generator().manual_seed(1), **call).images
    plain = base.pipeline(adapter.card.prompt, generator=torch.Generator().manual_seed(1), **call).images
    # where the page loads the base by lora_booth it has half precision
    assert np.abs(got - want).mean() < (1e-4 if named else 0.1 * np.abs(got - plain).mean()) < np.abs(got - plain).mean()


# --- the Hub -------------------------------------------------------------------------------------------------------


class Hub(ThreadingHTTPServer):
    """The endpoints that create_repo and upload_folder of huggingface_hub call, with what they were sent."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.refuse: dict[str, tuple[int, dict[str, Any]]] = {}  # a part of the path -> status and answer
        self.asked: list[tuple[str, str | None]] = []  # path, authorization
        self.repos: dict[str, dict[str, Any]] = {}
        self.files: dict[str, bytes] = {}
        self.sent = b""

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_address[1]}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers["content-length"]))
        self.server.sent += body + str(self.headers).encode()
        self.server.asked.append((self.path, self.headers["authorization"]))
        for part, answer in self.server.refuse.items():
            if part in self.path:
                return self.answer(*answer)
        if self.path == "/api/repos/create":
            asked = json.loads(body)
            name = f"{asked['organization'] or 'ann'}/{asked['name']}"
            status = 409 if name in self.server.repos else 200
            self.server.repos.setdefault(name, asked)
            self.answer(status, {"url": f"{self.server.url}/{name}"})
        elif self.path == "/api/validate-yaml":
            front = json.loads(body)["content"].removeprefix("---\n").partition("\n---\n")[0]
            assert isinstance(yaml.safe_load(front)["tags"], list)
            self.answer(200, {"errors": [], "warnings": []})
        elif self.path.endswith("/preupload/main"):
            given = json.loads(body)["files"]
            self.answer(200, {"files": [{"path": f["path"], "uploadMode": "regular", "shouldIgnore": False} for f in given]})
        elif self.path.endswith("/commit/main"):
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    assert line["value"]["encoding"] == "base64"
                    self.server.files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            name = self.path.removeprefix("/api/models/").removesuffix("/commit/main")
            self.answer(200, {"commitUrl": f"{self.server.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40})
        else:
            self.answer(500, {"error": f"no such endpoint: {self.path}"})

    def do_GET(self) -> None:
        self.answer(404, {"error": "Repository not found"})

    def answer(self, status: int, content: dict[str, Any]) -> None:
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("content-type", "application/json")
        self.send_header("content-length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    def log_message(self, *_: Any) -> None:
        pass


@pytest.fixture
def online(monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """huggingface_hub as it is, its Hub on this machine."""
    from huggingface_hub import constants

    for name in ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "HTTP_PROXY", "http_proxy", "ALL_PROXY", "all_proxy"):
        monkeypatch.delenv(name, raising=False)
    with Hub() as server:
        thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.05})
        thread.start()
        monkeypatch.setattr(constants, "ENDPOINT", server.url)
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
        yield server
        server.shutdown()
        thread.join()


def test_push_to_hub(online: Hub, tmp_path: Path) -> None:
    options: dict[str, Any] = {"pictures": [picture()], "license": "mit", "thumbnail": picture().image}
    url = small().push_to_hub("rex", token="hf_secret", private=True, **options)
    assert type(url) is str and url == f"{online.url}/ann/rex"
    assert online.repos["ann/rex"].get("visibility", online.repos["ann/rex"].get("private")) in ("private", True)
    assert {auth for _, auth in online.asked} == {"Bearer hf_secret"}
    local = files(small().save_folder(tmp_path / "a", **options))
    assert online.files.keys() == local.keys()
    assert {k: v for k, v in online.files.items() if k != "README.md"} == {k: v for k, v in local.items() if k != "README.md"}
    # the page names the repository, where the folder's own says "."
    lines = [
        (a, b) for a, b in zip(*(f["README.md"].decode().splitlines() for f in (online.files, local)), strict=True) if a != b
    ]
    assert lines[0][0] == lines[0][1].replace('"."', '"ann/rex"') and "load_lora_weights" in lines[0][0]
    assert len(lines) == 2 and "lora_booth wrote this folder" in lines[1][0]
    assert str(tmp_path).encode() not in online.sent and b"/tmp" not in online.sent
    # again, as another owner and to a repository that is there
    assert small().push_to_hub("pack/rex", token="hf_secret") == f"{online.url}/pack/rex"
    assert small().push_to_hub("pack/rex", token="hf_secret") == f"{online.url}/pack/rex"


@pytest.mark.parametrize(
    "part, status, answer, words",
    [
        ("create", 401, {"error": "Invalid username or password."}, REMEDIES[401]),
        ("create", 403, {"error": "You don't have the rights"}, REMEDIES[403]),
        ("commit", 403, {"error": "Forbidden"}, REMEDIES[403]),
        ("preupload", 404, {"error": "Repository not found"}, REMEDIES[404]),
        ("create", 500, {"error": "oops"}, "the Hub answered 500"),
        ("yaml", 400, {"errors": [{"message": '"license" must be one of'}], "warnings": []}, '"license" must be one of'),
    ],
)
def test_refusals_of_the_hub(online: Hub, part: str, status: int, answer: dict[str, Any], words: str) -> None:
    online.refuse[part] = (status, answer)
    with pytest.raises(AdapterError) as caught:
        small().push_to_hub("ann/rex", token="hf_secret")
    assert words in str(caught.value) and "\n" not in str(caught.value) and str(caught.value).startswith("ann/rex: ")
    assert "hf_secret" not in str(caught.value) and not online.files


def test_a_hub_that_cannot_be_asked(online: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    from huggingface_hub import constants

    with pytest.raises(AdapterError, match="not logged in .* `hf auth login` or set HF_TOKEN"):
        small().push_to_hub("ann/rex")
    for name in ("ann/rex/a", "ann/r ex", "-ann/rex"):
        with pytest.raises(AdapterError, match="not the name of a repository .*; write it as user/name"):
            small().push_to_hub(name, token="hf_secret")
    with pytest.raises(SettingsError, match="share pictures of Composition.generate"):
        small().push_to_hub("ann/rex", token="hf_secret", pictures=[noise(8, 8)])  # type: ignore[list-item]
    assert not online.asked  # nothing was made on the Hub
    monkeypatch.setattr(constants, "ENDPOINT", "http://127.0.0.1:9")
    with pytest.raises(AdapterError, match=r"the Hub cannot be reached \(.*\); check the connection"):
        small().push_to_hub("ann/rex", token="hf_secret")
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(AdapterError, match="HF_HUB_OFFLINE"):
        small().push_to_hub("ann/rex", token="hf_secret")


# --- nothing private -----------------------------------------------------------------------------------------------

PLACES = ("folder", "name", "caption", "camera", "gps", "exifcomment", "jpegcomment", "xmp", "icc", "pngtext", "user", "run")
PLANTED = {place: f"Zq{place}Private" for place in PLACES}


def private_photos(folder: Path, source: Path) -> Path:
    """The photos with a planted text in every place that a photo has for one."""
    folder.mkdir(parents=True)
    for number, photo in enumerate(sorted(source.iterdir())):
        exif = Image.Exif()
        exif[0x010F] = PLANTED["camera"]
        exif.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + PLANTED["exifcomment"].encode()
        exif.get_ifd(0x8825)[0x001C] = b"ASCII\0\0\0" + PLANTED["gps"].encode()  # GPSAreaInformation
        exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
        xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{PLANTED['xmp']}</x:xmpmeta>".encode()
        text = PngImagePlugin.PngInfo()
        text.add_text("Comment", PLANTED["pngtext"])
        icc = icc_profile(PLANTED["icc"])
        path = folder / f"{PLANTED['name']}{number}"
        with Image.open(photo) as image:
            if number == 0:
                image.save(path.with_suffix(".png"), pnginfo=text, exif=exif, icc_profile=icc)
            else:
                image.save(
                    path.with_suffix(".jpg"), exif=exif, comment=PLANTED["jpegcomment"].encode(), xmp=xmp, icc_profile=icc
                )
        path.with_suffix(".txt").write_text(f"sks dog with {PLANTED['caption']}")
    return folder


def icc_profile(description: str) -> bytes:
    from PIL import ImageCms

    content = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    at = content.find("sRGB".encode("utf-16-be"))
    words = description.encode("utf-16-be")
    return content[:at] + words[: len(content) - at] + content[at + len(words) :]


def everything_in(path: Path) -> bytes:
    """A file's bytes and name, with what is packed inside: header pictures, compressed chunks, EXIF."""
    content = path.read_bytes()
    parts = [str(path.name).encode(), content]
    if path.suffix == ".safetensors" and "modelspec.thumbnail" in header(path):
        parts.append(thumbnail_of(path)[0])
    if path.suffix in (".png", ".jpg"):
        with Image.open(path) as image:
            image.load()
            parts.append(repr(image.info).encode())
            parts += [bytes(v) for v in image.info.values() if isinstance(v, bytes)]
            parts.append(repr({tag: dict(image.getexif().get_ifd(tag)) for tag in (0x8769, 0x8825)}).encode())
    return b"\n".join(parts)


def places_in(content: bytes) -> set[str]:
    spelt = {place: [text.encode(e) for e in ("utf-8", "utf-16-le", "utf-16-be")] for place, text in PLANTED.items()}
    return {place for place, forms in spelt.items() if any(form.lower() in content.lower() for form in forms)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore:.*captions:UserWarning")
def test_nothing_private_is_in_any_output(photos: Path, folders: dict[str, Path], tmp_path: Path) -> None:
    home = tmp_path / PLANTED["user"]
    source = private_photos(home / PLANTED["folder"], photos)
    planted = b"".join(everything_in(p) for p in source.iterdir()) + str(source).encode()
    assert places_in(planted) == set(PLACES) - {"run"}  # the search finds them where they are
    shutil.copytree(folders["sd1"], home / "tiny")
    base = BaseModel.load(home / "tiny", dtype=torch.float32, device="cpu")
    subject = Subject.from_folder(source, token="sks", class_noun="dog")
    assert len(subject.photos) == 3 and all(photo.caption for photo in subject.photos)
    config = TrainingConfig(steps=2, class_images=2, warmup_steps=0)
    adapter = train(base, subject, lora=LoraSpec(rank=2), config=config, progress=False, out=home / PLANTED["run"])
    pictures = Composition(base, [(adapter, 1.0)]).generate("a photo of sks dog", steps=2)
    # the first photo as the user's own choice of a thumbnail: its pixels, and nothing of the rest
    chosen = subject.photos[1].path
    out = tmp_path / "out"
    adapter.save(out / "kohya.safetensors", thumbnail=chosen)
    adapter.save(out / "peft.safetensors", layout="peft", thumbnail=chosen)
    adapter.save_folder(out / "folder", pictures=pictures, thumbnail=chosen)
    Adapter.load(out / "kohya.safetensors").save(out / "again.safetensors")
    found = {p.relative_to(out).as_posix(): places_in(everything_in(p)) for p in out.rglob("*") if p.is_file()}
    assert len(found) == 6 and not any(found.values()), found
    assert not any(str(tmp_path).encode() in p.read_bytes() for p in out.rglob("*") if p.is_file())
    for path in out.rglob("*.png"):
        with Image.open(path) as image:
            assert not image.getexif()
