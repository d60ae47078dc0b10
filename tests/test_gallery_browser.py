"""The gallery page in a real browser: opened from the disk, clicked, typed in, looked at as a phone does."""

from __future__ import annotations

import io
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from browser import CHROMEDRIVER, CHROMIUM, Browser, chromium
from PIL import Image

from lora_booth.pictures.gallery import Gallery
from lora_booth.pictures.picture import Making, Picture

pytestmark = pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="no chromium and chromedriver here")

HOSTILE = (
    '</script><img src=x onerror="document.title=1">',
    "<script>document.title = 2</script>",
    '" onload="document.title=3" autofocus onfocus="document.title=4',
    "javascript:document.title=5 <svg/onload=document.title=6>",
    "{{ 7 * 7 }} ${document.title=8} <!-- ]]> </title></style></textarea>",
)
COLORS = ((200, 60, 50), (60, 140, 70), (50, 90, 190), (220, 180, 60), (130, 80, 160), (70, 160, 170))


def picture(i: int, prompt: str, name: str, **facts) -> Picture:
    pixels = np.full((96, 96, 3), COLORS[i % 6], np.uint8)
    making = Making(files=(name.split()[0],))
    return Picture(Image.fromarray(pixels), prompt, i, ((name, 0.8),), "toybox", None, 25, 5.0, making, **facts)


@pytest.fixture(scope="module")
def browser() -> Iterator[Browser]:
    with chromium() as opened:
        opened.size(1200, 800)
        opened.devtools("Emulation.setFocusEmulationEnabled", enabled=True)  # the clipboard is for windows in front only
        yield opened


@pytest.fixture(scope="module")
def page(tmp_path_factory) -> Path:
    """Six pictures: rex at three places, brew at three."""
    places = ("in the snow", "on the moon", "underwater")
    made = [picture(i, f"a photo of {name} {where}", name) for name in ("sks dog", "zwx mug") for i, where in enumerate(places)]
    return Gallery(made, title="Rex & co").save(tmp_path_factory.mktemp("page") / "gallery.html")


@pytest.fixture
def opened(browser, page) -> Iterator[Browser]:
    browser.size(1200, 800)
    browser.open(page)
    browser.messages()
    yield browser
    messages = browser.messages()
    assert messages == []  # nothing was refused, nothing failed


SHOWN = "[...document.querySelectorAll('figure')].filter(f => f.offsetParent).length"
PLACE = "document.getElementById('place').textContent"
IS_OPEN = "document.getElementById('view').open"
FOCUSED = "document.activeElement.closest('figure')?.id"


def test_it_opens_without_an_error(browser, page):
    browser.open(page)
    assert browser.run("return document.title") == "Rex & co"
    browser.wait("[...document.querySelectorAll('figure img')].every(i => i.complete && i.naturalWidth === 96)")
    assert browser.run(f"return {SHOWN}") == 6
    assert browser.messages() == []


def test_a_click_shows_a_picture_in_full_and_keys_move_on(opened):
    opened.click("#picture-2 a")
    assert opened.run(f"return {IS_OPEN}") and opened.run(f"return {PLACE}") == "2 of 6"
    opened.wait("document.getElementById('full').naturalWidth === 96")
    assert opened.run("return document.getElementById('view-prompt').textContent") == "a photo of sks dog on the moon"
    facts = opened.run("return document.getElementById('facts').innerText.replace(/\\s+/g, ' ')")
    assert "seed 1" in facts and "adapters sks dog 0.8" in facts and "base toybox" in facts
    opened.press("ArrowRight")
    assert opened.run(f"return {PLACE}") == "3 of 6"
    opened.press("ArrowLeft")
    opened.press("ArrowLeft")
    opened.press("ArrowLeft")
    assert opened.run(f"return {PLACE}") == "6 of 6"  # round and round
    opened.click("#next")
    assert opened.run(f"return {PLACE}") == "1 of 6" and opened.run("return location.hash") == "#picture-1"
    download = opened.run("const a = document.getElementById('download'); return [a.download, a.href.slice(0, 16)]")
    assert download == ["picture-001-seed-0.webp", "data:image/webp;"]
    opened.press("ArrowRight")
    opened.press("Escape")
    opened.wait(f"!{IS_OPEN} && location.hash === ''")
    opened.wait(f"{FOCUSED} === 'picture-2'")  # where one was last


def test_it_works_by_keyboard_alone(opened):
    opened.run("document.querySelector('#picture-1 a').focus()")
    opened.press("ArrowRight")
    opened.press("ArrowRight")
    assert opened.run(f"return {FOCUSED}") == "picture-3"
    ring = opened.run("const s = getComputedStyle(document.activeElement); return [s.outlineStyle, parseFloat(s.outlineWidth)]")
    assert ring[0] == "solid" and ring[1] >= 2
    opened.press("Enter")
    assert opened.run(f"return {IS_OPEN}") and opened.run(f"return {PLACE}") == "3 of 6"
    for _ in range(12):  # Tab stays in the dialog (and passes the browser's own bar)
        opened.press("Tab")
        assert opened.run("return document.activeElement === document.body || !!document.activeElement.closest('#view')")
    opened.press("Escape")


def test_the_back_button_closes_the_full_view_and_an_address_opens_it(opened, page):
    opened.click("#picture-4 a")
    opened.press("ArrowRight")
    opened.run("history.back()")
    opened.wait(f"!{IS_OPEN}")
    opened.open(page, "#picture-5")
    assert opened.run(f"return {IS_OPEN}") and opened.run(f"return {PLACE}") == "5 of 6"
    opened.click("#close")
    opened.wait(f"!{IS_OPEN} && location.hash === ''")


def test_the_filter_hides(opened):
    opened.write("#words", "MOON dog")
    assert opened.run(f"return {SHOWN}") == 1
    assert opened.run("return document.getElementById('count').textContent") == "1 of 6 pictures"
    opened.write("#words", "underwater")
    opened.click("#adapter option[value='1']")
    assert opened.run(f"return {SHOWN}") == 1
    opened.click("figure:not([hidden]) a")
    assert opened.run(f"return {PLACE}") == "1 of 1" and opened.run("return document.getElementById('next').hidden")
    opened.press("ArrowRight")
    assert opened.run("return location.hash") == "#picture-6"
    opened.press("Escape")
    opened.write("#words", "nothing of the kind")
    assert opened.run(f"return {SHOWN}") == 0 and opened.run("return !!document.getElementById('none').offsetParent")
    opened.click("#reset")
    assert opened.run(f"return {SHOWN}") == 6 and opened.run("return document.getElementById('adapter').value") == ""


@pytest.mark.parametrize(
    ("what", "text"),
    [
        ("prompt", "a photo of zwx mug in the snow"),
        ("seed", "0"),
        (
            "command",
            'lora-booth generate zwx.safetensors:0.8 --base toybox --prompt "a photo of zwx mug in the snow" '
            "--seeds 0 --steps 25 --guidance 5 --size 96",
        ),
    ],
)
def test_what_is_copied_can_be_pasted(opened, what, text):
    opened.click("#picture-4 a")
    opened.click(f"[data-copy={what}]")
    opened.wait("document.getElementById('said').textContent.startsWith('Copied')")
    opened.press("Escape")
    opened.wait("!document.querySelector('dialog').open")
    for _ in range(10):  # closing gives the focus back to the picture a moment later, which may take it from the field
        opened.run("const field = document.getElementById('words'); field.focus(); field.select()")
        opened.press("Control", "v")
        time.sleep(0.1)
        if opened.run("return document.getElementById('words').value") == text:
            break
    assert opened.run("return document.getElementById('words').value") == text


def test_without_a_clipboard_the_text_is_shown_to_be_selected(opened):
    opened.run("Object.defineProperty(navigator, 'clipboard', { value: undefined })")
    opened.click("#picture-1 a")
    opened.click("[data-copy=python]")
    opened.wait("!document.getElementById('shown').hidden")
    chosen = opened.run("const t = document.activeElement; return t.value.slice(t.selectionStart, t.selectionEnd)")
    assert chosen.startswith("import lora_booth as lb\n") and "seeds=[0]" in chosen
    opened.press("Escape")


def test_hostile_texts_stay_texts(browser, tmp_path):
    made = [picture(i, prompt, f"{prompt} {i}") for i, prompt in enumerate(HOSTILE)]
    browser.open(Gallery(made, title=HOSTILE[0]).save(tmp_path / "hostile.html"))
    for i, prompt in enumerate(HOSTILE, 1):
        assert browser.run(f"return document.querySelector('#picture-{i} .prompt').textContent") == prompt
        browser.click(f"#picture-{i} a")
        assert browser.run("return document.getElementById('view-prompt').textContent") == prompt
        browser.press("Escape")
        browser.wait("location.hash === ''")
    assert browser.run("return document.title") == HOSTILE[0]
    assert browser.run("return document.querySelectorAll('svg, figure script, [onerror], [onload], [onfocus]').length") == 0
    assert browser.messages() == []


def test_the_page_may_reach_nothing_outside_and_run_nothing_new(browser, page):
    browser.open(page)
    browser.messages()
    browser.run(
        "const i = new Image(); i.src = 'http://127.0.0.1:9/x.png'; document.body.append(i);"
        "const s = document.createElement('script'); s.textContent = 'document.title = 9'; document.body.append(s);"
    )
    assert browser.run("return document.title") == "Rex & co"
    refused = browser.messages()
    assert sum("Content Security Policy" in line for line in refused) == 2 == len(refused)


def test_without_javascript_it_is_the_pictures_and_what_made_them(browser, page):
    browser.devtools("Emulation.setScriptExecutionDisabled", value=True)
    try:
        browser.open(page)
        texts = [
            browser.do("GET", f"/element/{browser.element(css)}/text") for css in ("#picture-2 .prompt", "#picture-2 summary")
        ]
        assert texts == ["a photo of sks dog on the moon", "How it was made"]
        browser.click("#picture-2 summary")
        command = browser.do("GET", f"/element/{browser.element('#picture-2 pre[data-text=command]')}/text")
        assert command.startswith("lora-booth generate sks.safetensors:0.8 ")
    finally:
        browser.devtools("Emulation.setScriptExecutionDisabled", value=False)


def seen(browser: Browser) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(browser.screenshot())).convert("RGB"))


def test_on_a_phone_nothing_is_wider_than_the_screen_and_a_swipe_moves_on(browser, page):
    browser.size(360, 740, scale=2, phone=True)
    browser.open(page)
    widths = "return [document.documentElement.scrollWidth, innerWidth]"
    assert browser.run(widths) == [360, 360]
    assert seen(browser).shape == (1480, 720, 3)
    browser.click("#picture-1 a")
    assert browser.run(widths) == [360, 360]
    browser.wait("document.getElementById('full').naturalWidth === 96")
    browser.wait("document.getElementById('full').getBoundingClientRect().height > 300")
    middle = seen(browser)[300, 360]
    assert np.abs(middle.astype(int) - COLORS[0]).max() < 12  # the picture is there to see
    for way, place in ((-150, "2 of 6"), (-150, "3 of 6"), (150, "2 of 6")):
        browser.devtools("Input.dispatchTouchEvent", type="touchStart", touchPoints=[{"x": 180, "y": 200}])
        browser.devtools("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": 180 + way / 2, "y": 202}])
        browser.devtools("Input.dispatchTouchEvent", type="touchMove", touchPoints=[{"x": 180 + way, "y": 205}])
        browser.devtools("Input.dispatchTouchEvent", type="touchEnd", touchPoints=[])
        browser.wait(f"{PLACE} === '{place}'")
    buttons = "[...document.querySelectorAll('#view button:not([hidden]), #view .actions a')]"
    sizes = f"return {buttons}.map(b => b.getBoundingClientRect().height)"
    assert min(browser.run(sizes)) >= 36  # CSS pixels; a finger's tip


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_text_stands_out_in_both_themes(browser, page, theme):
    browser.size(1200, 800)
    browser.theme(theme)
    browser.open(page)
    pairs = browser.run(
        "const c = (e, p) => getComputedStyle(e)[p].match(/\\d+/g).slice(0, 3).map(Number);"
        "const paper = c(document.body, 'backgroundColor');"
        "return ['h1', '.prompt', 'small', '#count'].map(s => [c(document.querySelector(s), 'color'), paper])"
    )
    for ink, paper in pairs:
        assert contrast(ink, paper) >= 4.5
    assert (seen(browser).mean() < 110) == (theme == "dark")


def contrast(a: list[int], b: list[int]) -> float:
    """WCAG 2's ratio of two sRGB colours, 1 to 21."""

    def luminance(color: list[int]) -> float:
        linear = [v / 12.92 if v <= 0.04045 else ((v + 0.055) / 1.055) ** 2.4 for v in (c / 255 for c in color)]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(a), luminance(b)))
    return (light + 0.05) / (dark + 0.05)


def test_five_hundred_pictures_stay_quick_to_look_through(browser, tmp_path):
    """Pictures out of sight are neither decoded nor laid out."""
    browser.theme("light")
    made = [picture(i, f"a photo of sks dog, {i}", "sks dog") for i in range(500)]
    browser.open(Gallery(made, title="many").save(tmp_path / "many.html"))
    assert browser.run("return document.querySelectorAll('figure').length") == 500
    assert browser.run("return getComputedStyle(document.querySelector('figure')).contentVisibility") == "auto"
    assert all(
        browser.run("return [...document.querySelectorAll('figure img')].map(i => i.loading + i.decoding === 'lazyasync')")
    )
    browser.write("#words", "499")
    assert browser.run(f"return {SHOWN}") == 1
