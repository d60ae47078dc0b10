"""Gallery: one page that needs nothing else, one sheet that shows every picture."""

from __future__ import annotations

import base64
import hashlib
import io
import re
import shlex
import shutil
import subprocess
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pipelines
import pytest
from PIL import Image

from lora_booth import cli
from lora_booth.adapters.adapter import Adapter
from lora_booth.base.base_model import BaseModel
from lora_booth.config import LoraSpec
from lora_booth.errors import SettingsError
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.gallery import RECORD, Album, Gallery, first_free
from lora_booth.pictures.picture import Picture, command_of, python_of
from lora_booth.pictures.regions import Region
from lora_booth.pictures.weights import Weight

NASTY = """<script>alert(1)</script> & "quotes" 'single' </figure>"""
VOID = {"meta", "img", "br", "link", "input", "hr"}


def picture(seed=0, prompt="a photo of sks dog", size=(48, 48), **facts) -> Picture:
    pixels = np.random.default_rng(seed).integers(0, 256, (size[1], size[0], 3), dtype=np.uint8)
    return Picture(Image.fromarray(pixels), prompt, seed, **facts)


class Page(HTMLParser):
    """Tags, text by tag, and whether every tag that opens is closed in order."""

    def __init__(self, text: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: dict[str, list[str]] = {}
        self.feed(text)
        self.close()

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open}"
        self.open.pop()

    def handle_data(self, data):
        if self.open:
            self.text.setdefault(self.open[-1], []).append(data)

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]


@pytest.fixture
def page() -> tuple[str, Page]:
    worn = (("<b>rex</b>", 1.0), ("ink & co", 0.6))
    pictures = [picture(3, NASTY, adapters=worn, base="base<1>", negative_prompt=NASTY), picture(1234, "plain words")]
    text = Gallery(pictures, title=f"title {NASTY}").html()
    return text, Page(text)


def test_tags_are_balanced_and_texts_are_escaped(page):
    text, parsed = page
    assert parsed.open == []
    assert not parsed.all("b") and "alert(1)</script>" not in text
    assert len(parsed.all("script")) == len(parsed.all("style")) == 1
    assert len(parsed.all("figure")) == 2
    assert all(not name.startswith("on") and name != "style" for _, attrs in parsed.tags for name in attrs)


def test_every_picture_has_what_made_it_under_it(page):
    _, parsed = page
    assert parsed.text["title"] == [f"title {NASTY}"] == parsed.text["h1"]
    assert [t for t in parsed.text["p"] if t.strip()][:2] == [NASTY, "plain words"]
    assert parsed.text["small"] == ["seed 3 · <b>rex</b> 1, ink & co 0.6 · base<1>", "seed 1234"]
    facts = dict(zip(parsed.text["dt"], parsed.text["dd"], strict=True))
    assert facts["negative"] == NASTY and facts["adapters"] == "<b>rex</b> 1, ink & co 0.6"
    assert [image["alt"] for image in parsed.all("img")] == [NASTY, "plain words", ""]
    assert [figure["id"] for figure in parsed.all("figure")] == ["picture-1", "picture-2"]
    assert [figure["data-adapters"] for figure in parsed.all("figure")] == ["0 1", ""]
    assert parsed.text["option"] == ["All adapters", "<b>rex</b>", "ink & co"]


def test_the_page_needs_nothing_from_outside_and_may_ask_for_nothing(page):
    text, parsed = page
    addresses = [attrs[name] for _, attrs in parsed.tags for name in ("src", "href", "srcset", "action") if attrs.get(name)]
    assert addresses and all(address.startswith("data:image/webp;base64,") for address in addresses)
    without_pictures = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", text)
    assert not re.search(r"(?<!:)//[a-z]|://", without_pictures) and "@import" not in text and "url(" not in without_pictures
    [policy] = [m["content"] for m in parsed.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policy.startswith("default-src 'none'; img-src data:; ") and "unsafe" not in policy
    for tag in ("style", "script"):  # nothing but these very texts may run
        digest = base64.b64encode(hashlib.sha256("".join(parsed.text[tag]).encode()).digest()).decode()
        assert f"{tag}-src 'sha256-{digest}'" in policy


def test_a_half_character_does_not_stop_the_page(tmp_path):
    path = Gallery([picture(1, "odd \ud800 name")]).save(tmp_path / "page.html")
    assert "odd ? name" in path.read_text(encoding="utf-8")


# --- how to draw a picture again -----------------------------------------------------------------------------------

PROMPTS = (
    "a photo of sks dog",
    'it\'s a "dog"',
    "$(touch pwned) `touch pwned` ; touch pwned & touch pwned",
    "'; touch pwned; '",
    "ends with \\",
    "a dog; touch pwned & touch pwned | 'touch' pwned > pwned # (pwned), {pwned} ^ ~ *",
    "-x --help !! %PATH% \u201cquoted\u201d ' ",
)


@pytest.mark.skipif(shutil.which("bash") is None, reason="no bash here")
@pytest.mark.parametrize("prompt", PROMPTS)
def test_a_pasted_command_says_the_prompt_to_the_shell_exactly(tmp_path, prompt):
    made = picture(3, prompt, adapters=(("rex", 0.8),), base="toybox", steps=25, guidance=5.0)
    command = command_of(made)
    # what the quotes of bash, cmd and PowerShell treat differently is left to Python
    assert (command is None) == any(character in prompt for character in '"$`\\!%“”„')
    if command is None:
        names: dict = {}
        exec(python_of(made).splitlines()[-1].replace("[picture] = studio.generate(", "told = dict(prompt=", 1), names)
        assert names["told"]["prompt"] == prompt
        return
    told = subprocess.run(
        ["bash", "-c", f"lora-booth() {{ printf '%s\\0' \"$@\"; }}\n{command}"], cwd=tmp_path, capture_output=True, text=True
    )
    words = told.stdout.split("\0")[:-1]
    assert words[:2] == ["generate", "rex.safetensors:0.8"] and words[words.index("--prompt") + 1] == prompt
    assert not list(tmp_path.iterdir())


def test_a_prompt_with_keys_in_it_gives_no_command_but_python():
    hostile = picture(3, "dog\x1b[201~\x03\nrm -rf ~ \u202e", adapters=(("rex", 1.0),), base="toybox", steps=2)
    assert command_of(hostile) is None
    python = python_of(hostile)
    assert "\x1b" not in python and "\u202e" not in python and "\\x1b[201~\\x03" in python
    assert python_of(picture(1)) is None  # nobody knows what made it


@pytest.fixture(scope="module")
def studio_files(tmp_path_factory) -> tuple[Path, BaseModel]:
    """A folder with two adapter files, which is the current one while a command or lines of Python are run."""
    folder = tmp_path_factory.mktemp("again")
    base = BaseModel.load(pipelines.save("sd1", folder / "tiny"))
    for seed, (name, noun) in enumerate({"rex": "do", "owl": "dog"}.items()):
        made = pipelines.random_adapter(base, LoraSpec(rank=2), seed=seed, size=0.3)
        card = replace(made.card, token=name, class_noun=noun, title=None)
        replace(made, card=card).save(folder / f"my {name}.safetensors")
    return folder, base


def compositions(dog: Adapter, owl: Adapter) -> dict[str, dict]:
    return {
        "sum": {"adapters": [(dog, 0.7), (owl, -0.25)], "method": "sum"},
        "auto": {"adapters": [(dog, 0.5), owl], "regions": "auto"},
        "places": {
            "adapters": [(dog, 0.5)],
            "regions": [Region(owl, box=(0, 0, 0.5, 1), prompt="a do, big")],
        },
    }


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lora_booth.errors.CompositionWarning")  # the sum blends them, as it says
@pytest.mark.parametrize("name", ["sum", "auto", "places"])
def test_command_and_python_draw_the_picture_again(studio_files, monkeypatch, capsys, name):
    folder, base = studio_files
    monkeypatch.chdir(folder)
    dog, owl = (Adapter.load(folder / f"my {name}.safetensors") for name in ("rex", "owl"))
    studio = Composition(base, **compositions(dog, owl)[name])
    asked = {"seeds": [5], "steps": 6, "guidance": 2.5, "size": (40, 72), "sampler": "Euler a", "negative_prompt": "no owl"}
    [original] = studio.generate("a photo of rex do", **asked)
    names: dict = {}
    exec(python_of(original), names)
    assert np.array_equal(np.asarray(names["picture"].image), np.asarray(original.image))
    with pytest.raises(SystemExit) as left:
        cli.main([*shlex.split(command_of(original))[1:], "--out", f"out-{name}"])
    assert left.value.code == 0
    with Image.open(folder / f"out-{name}" / "a_photo_of_rex_do-000005.png") as again:
        assert np.array_equal(np.asarray(again), np.asarray(original.image))


def test_what_only_a_recipe_can_say_is_said(studio_files):
    folder, base = studio_files
    dog = Adapter.load(folder / "my rex.safetensors")
    for studio, words in (
        (Composition(base, [(dog, Weight(1, end=0.5))]), "weights by block or step"),
        (Composition(base, regions=[Region(dog, mask=Image.new("L", (8, 8), 255))]), "a mask"),
    ):
        [made] = studio.generate("rex do", steps=2, size=48)
        assert command_of(made) is None and python_of(made) is None
        assert f"made with {words}, which only a recipe records" in Gallery([made]).html()


# --- the pictures themselves ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", [(64, 64), (128, 96)])
def test_a_small_picture_is_in_the_page_exactly(size):
    original = picture(5, size=size)
    source = Page(Gallery([original]).html()).all("img")[0]["src"]
    assert source == Page(Gallery([original]).html()).all("a")[0]["href"]
    content = base64.b64decode(source.partition(",")[2], validate=True)
    with Image.open(io.BytesIO(content)) as decoded:
        assert decoded.format == "WEBP"
        assert np.array_equal(np.asarray(decoded.convert("RGB")), np.asarray(original.image))
    assert b"trainedAlgorithmicMedia" in content  # each picture that is saved from the page bears the mark


def test_a_large_picture_keeps_its_size():
    source = Page(Gallery([picture(size=(256, 192))]).html()).all("img")[0]["src"]
    with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as decoded:
        assert decoded.size == (256, 192)


def test_a_large_picture_has_a_small_thumbnail_and_is_there_in_full():
    parsed = Page(Gallery([picture(size=(1024, 512))]).html())
    sizes = []
    for source in (parsed.all("img")[0]["src"], parsed.all("a")[0]["href"]):
        with Image.open(io.BytesIO(base64.b64decode(source.partition(",")[2]))) as decoded:
            sizes.append(decoded.size)
    assert sizes == [(384, 192), (1024, 512)]
    assert (parsed.all("img")[0]["width"], parsed.all("img")[0]["height"]) == ("384", "192")
    assert parsed.all("img")[0]["loading"] == "lazy" and parsed.all("a")[0]["download"] == "picture-001-seed-0.webp"


def test_equal_pictures_give_equal_pages():
    assert Gallery([picture(1), picture(2)]).html() == Gallery([picture(1), picture(2)]).html()


@pytest.mark.parametrize("name", ["page.html", "page.HTM"])
def test_save_writes_the_page(tmp_path, name):
    gallery = Gallery([picture(1, "ein Hund, größer als “Rex”")])
    path = gallery.save(tmp_path / "new" / name)
    assert path.read_text(encoding="utf-8") == gallery.html()


@pytest.mark.parametrize(("name", "kind"), [("s.png", "PNG"), ("s.jpg", "JPEG"), ("s.webp", "WEBP")])
def test_save_writes_a_sheet(tmp_path, name, kind):
    path = Gallery([picture(i) for i in range(5)]).save(str(tmp_path / "new" / name))
    with Image.open(path) as sheet:
        assert sheet.format == kind
        assert sheet.width == 4 * (128 + 8) + 8  # four columns of at least 128 pixels, with gaps of 8
        assert sheet.height > 2 * 128
    assert b"trainedAlgorithmicMedia" in path.read_bytes()


def test_the_sheet_shows_every_picture_in_order(tmp_path):
    colors = [(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)]
    pictures = [Picture(Image.new("RGB", (160, 160), color), "x", i) for i, color in enumerate(colors)]
    with Image.open(Gallery(pictures).sheet(tmp_path / "s.png", columns=3)) as sheet:
        cell = (sheet.height - 8) // 2
        centres = [(8 + i % 3 * (160 + 8) + 80, 8 + i // 3 * cell + 80) for i in range(5)]
        assert [sheet.getpixel(centre) for centre in centres] == colors
        assert sheet.width == 3 * (160 + 8) + 8


@pytest.mark.slow
def test_a_long_prompt_does_not_push_the_seed_off_the_sheet(tmp_path):
    def sheet(seed: int) -> np.ndarray:
        one = Picture(Image.new("RGB", (128, 128)), "word " * 200, seed)
        with Image.open(Gallery([one]).save(tmp_path / "s.png")) as made:
            return np.asarray(made)

    assert not np.array_equal(sheet(1), sheet(2))


def test_errors(tmp_path):
    with pytest.raises(SettingsError, match="pass at least one"):
        Gallery([])
    with pytest.raises(SettingsError, match=r"\.html, \.png"):
        Gallery([picture()]).save(tmp_path / "new" / "page.pdf")
    assert not (tmp_path / "new").exists()


# --- a folder that grows -----------------------------------------------------------------------------------------------


def shown_in(page: Path) -> list[str]:
    """The prompt and seed of every picture of a page, in order."""
    text = page.read_text(encoding="utf-8")
    return [f"{a} {b}" for a, b in re.findall(r'<p class="prompt">(.*?)</p>\s*<small>(.*?)</small>', text)]


def test_nothing_in_an_album_is_overwritten(tmp_path):
    dogs, owl = [picture(0, "a dog"), picture(1, "a dog")], picture(0, "an owl", adapters=(("Rex", 0.5),))
    first, second = Album(tmp_path).save(dogs), Album(tmp_path).save([owl])
    assert [file.name for file in (*first, *second)] == ["a_dog-000000.png", "a_dog-000001.png", "an_owl-000000.png"]
    page = Album(tmp_path).gallery()
    assert page == tmp_path / "gallery.html"
    assert shown_in(page) == ["an owl seed 0 · Rex 0.5", "a dog seed 0", "a dog seed 1"]
    other = Picture(picture(7).image, "a dog", 0, steps=9)  # the same prompt and seed, drawn otherwise
    assert [file.name for file in Album(tmp_path).save([other, dogs[1]])] == ["a_dog-000000-2.png", "a_dog-000001.png"]
    assert shown_in(Album(tmp_path).gallery()) == ["a dog seed 0", "a dog seed 0", "a dog seed 1", "an owl seed 0 · Rex 0.5"]
    for file, made in zip(first, dogs, strict=True):
        with Image.open(file) as kept:
            assert kept.tobytes() == made.image.tobytes()


def test_an_album_keeps_what_others_put_into_its_folder(tmp_path):
    (tmp_path / "gallery.html").write_text("mine")
    (tmp_path / "a_dog-000000.png").write_bytes(b"mine")
    (tmp_path / "secret.txt").write_text("mine")
    (tmp_path / "a_dog-000001.png").symlink_to(tmp_path / "secret.txt")
    album = Album(tmp_path)
    names = [file.name for file in (*album.save([picture(0, "a dog"), picture(1, "a dog")]), album.gallery())]
    assert names == ["a_dog-000000-2.png", "a_dog-000001-2.png", "gallery-2.html"]
    assert Album(tmp_path).gallery().name == "gallery-2.html"
    assert first_free(tmp_path / "gallery-2.html").name == "gallery-2-2.html"
    assert first_free(tmp_path / "grid.png").name == "grid.png"
    for name in ("gallery.html", "a_dog-000000.png", "secret.txt"):
        assert (tmp_path / name).read_text() == "mine"


def test_what_another_process_adds_meanwhile_stays(tmp_path, monkeypatch):
    from lora_booth.pictures import gallery

    encode, other = gallery.picture_bytes, [picture(5, "an owl")]

    def encoded(image):
        if other:
            Album(tmp_path).save([other.pop()])
        return encode(image)

    monkeypatch.setattr(gallery, "picture_bytes", encoded)
    Album(tmp_path).save([picture(0, "a dog"), picture(1, "a dog")])
    assert shown_in(Album(tmp_path).gallery()) == ["a dog seed 0", "a dog seed 1", "an owl seed 5"]


def test_a_record_is_never_written_through_a_link(tmp_path):
    (tmp_path / "theirs.txt").write_text("mine\n")
    (tmp_path / "album").mkdir()
    (tmp_path / "album" / RECORD).symlink_to(tmp_path / "theirs.txt")
    with pytest.raises(OSError, match="is a link"):
        Album(tmp_path / "album").save([picture(0, "a dog")])
    assert (tmp_path / "theirs.txt").read_text() == "mine\n"


@pytest.mark.parametrize(
    "line",
    [
        *("{", "[]", "{}", '{"page": "../x.html"}', '{"file": 5}', '{"file": "gone.png", "facts": [], "adapters": []}'),
        '{"file": "../outside.png", "prompt": "x", "seed": 1, "base": "", "used": "", "command": "", "python": "", '
        '"facts": [["a"]], "adapters": []}',
        '{"file": "/etc/passwd", "facts": 3, "adapters": null}',
    ],
)
def test_a_damaged_record_shows_what_is_left(tmp_path, line):
    folder = tmp_path / "album"
    picture(3).save(tmp_path / "outside.png")
    Album(folder).save([picture(0, "a dog")])
    with (folder / RECORD).open("a") as record:
        record.write(line + "\n")
    album = Album(folder)
    album.save([picture(1, NASTY)])
    assert len(shown_in(album.gallery())) == 2 and NASTY not in album.page.read_text(encoding="utf-8")
