"""Gallery: one page that needs nothing else, one sheet that shows every picture."""

from __future__ import annotations

import base64
import io
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from PIL import Image

from lora_booth.composition import Picture
from lora_booth.errors import SettingsError
from lora_booth.gallery import Gallery

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
    pictures = [picture(3, NASTY, adapters=worn, base="base<1>"), picture(1234, "plain words")]
    text = Gallery(pictures, title=f"title {NASTY}").html()
    return text, Page(text)


def test_tags_are_balanced_and_texts_are_escaped(page):
    text, parsed = page
    assert parsed.open == []
    assert not parsed.all("script") and not parsed.all("b")
    assert "<script>" not in text
    assert {tag for tag, _ in parsed.tags} <= {
        *("html", "meta", "title", "style", "h1", "main", "figure", "a", "img", "figcaption", "small")
    }
    assert all(not name.startswith("on") for _, attrs in parsed.tags for name in attrs)


def test_every_picture_has_its_prompt_seed_adapters_and_base_under_it(page):
    _, parsed = page
    assert parsed.text["title"] == [f"title {NASTY}"] == parsed.text["h1"]
    assert [t for t in parsed.text["figcaption"] if t.strip()] == [NASTY, "plain words"]
    assert parsed.text["small"] == ["seed 3 · <b>rex</b> 1, ink & co 0.6 · base<1>", "seed 1234"]
    assert [image["alt"] for image in parsed.all("img")] == [NASTY, "plain words"]
    assert [figure["id"] for figure in parsed.all("figure")] == ["picture-1", "picture-2"]


def test_the_page_needs_nothing_from_outside(page):
    text, parsed = page
    addresses = [attrs[name] for _, attrs in parsed.tags for name in ("src", "href", "srcset", "action") if name in attrs]
    assert addresses and all(address.startswith("data:image/webp;base64,") for address in addresses)
    without_pictures = re.sub(r"data:image/webp;base64,[A-Za-z0-9+/=]+", "", text)
    assert "//" not in without_pictures and "@import" not in text and "url(" not in without_pictures


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


def test_a_long_prompt_does_not_push_the_seed_off_the_sheet(tmp_path):
    def sheet(seed: int) -> np.ndarray:
        one = Picture(Image.new("RGB", (128, 128)), "word " * 200, seed)
        with Image.open(Gallery([one]).save(tmp_path / "s.png")) as made:
            return np.asarray(made)

    assert not np.array_equal(sheet(1), sheet(2))


def test_errors(tmp_path):
    with pytest.raises(SettingsError, match="generate some first"):
        Gallery([])
    with pytest.raises(SettingsError, match=r"\.html, \.png"):
        Gallery([picture()]).save(tmp_path / "new" / "page.pdf")
    assert not (tmp_path / "new").exists()
