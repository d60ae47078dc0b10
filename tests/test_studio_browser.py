"""The studio in a real browser: the whole way by clicks, a reload in the middle, a phone, a dark screen."""

from __future__ import annotations

import base64
import io
import json
import time
from collections.abc import Callable, Iterator
from importlib.resources import files
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from browser import CHROMEDRIVER, CHROMIUM, Browser, chromium
from PIL import Image
from studio_client import Server
from test_studio import end_trainings, root_of

import lora_booth as lb

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(not (CHROMIUM and CHROMEDRIVER), reason="no chromium and chromedriver here"),
]
LONG = 120  # seconds: the first click loads PyTorch
TAB = "[...document.querySelectorAll('[role=tab]')].find(one => one.textContent.trim() === '{}')"
LABEL = "[...document.querySelectorAll('[data-testid=block-info]')].find(l => l.offsetParent && l.textContent.trim() === '{}')"
FIELD = f"{LABEL}.closest('.block')"

# of Gradio: rules for its place to drop files and its empty gallery, and what stands in its editor of pictures
OF_GRADIO = {
    "label-content-name-mismatch",
    "aria-prohibited-attr",
    "aria-allowed-attr",
    "<div>select the draw tool to start</div>",
}


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    pytest.importorskip("gradio")
    root = tmp_path_factory.mktemp("browser") / "studio"
    with Server(root) as running:
        yield running
    end_trainings(root)


@pytest.fixture(scope="module")
def page(server) -> Iterator[Browser]:
    with chromium() as browser:
        browser.size(1280, 1000)
        visit(browser, server.address)
        yield browser


def visit(page: Browser, address: str) -> None:
    page.do("POST", "/url", {"url": address})
    page.wait("document.querySelector('#about')?.textContent.includes('pixels')", LONG)


def tab(page: Browser, name: str) -> None:
    page.run(f"{TAB.format(name)}.click()")
    page.wait(f"{TAB.format(name)}.getAttribute('aria-selected') === 'true'")


def fill(page: Browser, label: str, text: str) -> None:
    """Type into the field with this label, and leave it."""
    page.wait(LABEL.format(label), LONG)
    found = f"const one = {FIELD.format(label)}.querySelector('input, textarea')"
    name = page.run(f"{found}; one.id ||= 'f' + Math.random(); one.focus(); return one.id")
    page.press("Control", "a")
    place = page.element(f"[id='{name}']")
    page.do("POST", f"/element/{place}/value", {"text": text})  # in place of what is selected
    if page.run("return document.activeElement.getAttribute('role') === 'combobox'"):
        page.press("Enter")
    page.run("document.activeElement.blur()")


def choose(page: Browser, label: str, name: str) -> None:
    """In a list, which the page may be reading anew when its tab has just been opened."""
    end = time.monotonic() + LONG
    while page.run(f"return {FIELD.format(label)}?.querySelector('input').value") != name:
        assert time.monotonic() < end, f"{label} does not become {name}"
        fill(page, label, name)
        time.sleep(1)


def press(page: Browser, label: str) -> None:
    found = f"[...document.querySelectorAll('button')].find(b => b.offsetParent && b.textContent.trim().startsWith('{label}'))"
    page.wait(found)
    page.run(f"{found}.click()")


def paint(page: Browser, css: str) -> None:
    """Draw a stroke across the middle with the mouse."""
    page.run("document.querySelector(arguments[0]).scrollIntoView({block: 'center'})", css)
    box = page.run(
        "const b = document.querySelector(arguments[0]).getBoundingClientRect(); return [b.x, b.y, b.width, b.height]", css
    )
    x, y = int(box[0] + box[2] / 2), int(box[1] + box[3] / 2)
    moves = [{"type": "pointerMove", "x": x + dx, "y": y, "duration": 100} for dx in (-20, -10, 0, 10, 20)]
    stroke = [moves[0], {"type": "pointerDown", "button": 0}, *moves[1:], {"type": "pointerUp", "button": 0}]
    page.do("POST", "/actions", {"actions": [{"type": "pointer", "id": "mouse", "actions": stroke}]})


def until(done: Callable[[], Any]) -> None:
    end = time.monotonic() + LONG
    while not done():
        assert time.monotonic() < end
        time.sleep(0.1)


def fits(page: Browser) -> bool:
    """Nothing is wider than the window."""
    return page.run("return document.documentElement.scrollWidth <= window.innerWidth")


def severe(page: Browser) -> list[str]:
    """Errors on the console, but for the manifest, which browsers ask for without a cookie."""
    return [line for line in page.messages() if line.startswith("SEVERE") and "manifest" not in line]


def test_the_whole_way(page, server, photos: Path, tmp_path: Path):
    severe(page)
    fill(page, "Subject", "rex")
    fill(page, "What it is", "dog")
    fill(page, "Token", "zwx")  # while the words before it are still being read
    page.wait("document.querySelector('#verdict').textContent.includes('zwx is free')", LONG)
    files = "\n".join(map(str, sorted(photos.iterdir())))
    page.do("POST", f"/element/{page.element('#drop input[type=file]')}/value", {"text": files})
    page.wait("document.querySelector('#audit').textContent.includes('3 photos at 64 pixels')", LONG)
    assert page.run("return document.querySelectorAll('#squares img').length") == 3

    press(page, "Crop, mask and caption of this photo")
    page.wait("document.querySelector('#canvas canvas')?.offsetParent", LONG)
    kept = root_of(server) / "photos" / "rex"
    press(page, "Use as the mask")
    page.wait("document.body.textContent.includes('nothing is painted')", LONG)
    paint(page, "#canvas canvas")
    press(page, "Use as the mask")
    page.wait("!document.querySelector('#canvas .generating')", LONG)
    until(lambda: list(kept.glob("*.mask.png")))
    with Image.open(next(kept.glob("*.mask.png"))) as mask:
        white = np.asarray(mask.convert("L")) > 127
    assert 0.01 < white.mean() < 0.5 and white[white.shape[0] // 2, white.shape[1] // 2]
    press(page, "Crop to what is painted")
    until(lambda: (kept / "crops.json").is_file())
    [(left, top, right, bottom)] = json.loads((kept / "crops.json").read_text()).values()
    assert 0 <= left < 0.5 < right <= 1 and 0 <= top < 0.5 < bottom <= 1

    tab(page, "Train")
    page.wait(f"{FIELD.format('Subject')}.querySelector('input').value === 'rex'")
    page.click("#choice input[value=quick]")
    press(page, "Everything else")
    page.wait("document.body.textContent.includes('Default: 8 (enough for one subject')")
    fill(page, "steps", "4000")
    press(page, "Start training")  # not where it is: the fields above are still unfolding
    page.wait("document.querySelector('#status [data-alive]')", LONG)
    visit(page, server.origin)  # a reload in the middle of it, without the token: the browser has it
    severe(page)  # requests that the reload cut off
    tab(page, "Train")
    page.wait("document.querySelector('#status [data-alive=\"1\"]')", LONG)
    server.kill()
    server.start()  # the training has gone on
    visit(page, server.origin)
    tab(page, "Train")
    page.wait("document.querySelector('#status [data-alive=\"1\"]')?.textContent.includes('step')", LONG)
    press(page, "Stop")
    page.wait("document.querySelector('#status [data-alive=\"0\"]')", LONG)
    assert "stopped at step" in page.run("return document.querySelector('#status').textContent")
    severe(page)  # requests that the kill cut off

    tab(page, "Adapters")
    saved = max((root_of(server) / "runs" / "rex" / "checkpoints").glob("*/adapter.safetensors"))
    rex = lb.Adapter.load(saved)
    rex.with_card(token="zwx", class_noun="dog").save(tmp_path / "one.safetensors")
    rex.scaled(0.9).with_card(token="ohwx", class_noun="mug").save(tmp_path / "two.safetensors")
    sent = "\n".join(str(tmp_path / f"{name}.safetensors") for name in ("one", "two"))
    page.do("POST", f"/element/{page.element('#drop-adapter input[type=file]')}/value", {"text": sent})
    page.wait("document.querySelector('#card').textContent.includes('ComfyUI')", LONG)
    tab(page, "Play")
    choose(page, "First adapter", "one")
    page.wait("document.querySelector('#prompt textarea').value === 'a photo of zwx dog'", LONG)
    choose(page, "Second adapter", "two")
    page.wait("document.querySelector('#prompt textarea').value === 'a photo of zwx dog and ohwx mug'", LONG)
    press(page, "Draw")
    page.wait("document.querySelectorAll('#pictures img').length", LONG)
    page.wait("[...document.querySelectorAll('#pictures img')].every(i => i.complete && i.naturalWidth === 64)")
    assert severe(page) == []

    page.click("#play input[value=painted], input[value=painted]")
    page.wait("document.querySelector('#easel canvas')?.offsetParent", LONG)
    sent = len(list((root_of(server) / ".page").rglob("*.png")))
    press(page, "Paint on the picture")
    until(lambda: len(list((root_of(server) / ".page").rglob("*.png"))) >= sent + 2)  # the picture, and its places
    page.wait("document.querySelector('#easel canvas')?.offsetParent", LONG)
    time.sleep(3)  # it is drawn, which nothing tells
    paint(page, "#easel canvas")
    drawn = len(list((root_of(server) / "pictures").glob("*.json")))
    press(page, "Draw")
    until(lambda: len(list((root_of(server) / "pictures").glob("*.json"))) > drawn)
    newest = max((root_of(server) / "pictures").glob("*.json"), key=lambda path: path.stat().st_mtime)
    first, second = (region["mask"] for region in json.loads(newest.read_text())["composition"]["regions"])
    with Image.open(io.BytesIO(base64.b64decode(first))) as mask:
        white = np.asarray(mask.convert("L")) > 127
    assert white[white.shape[0] // 2, white.shape[1] // 2] and first != second
    assert severe(page) == []
    assert "Traceback" not in (said := server.log.read_text()), said


def test_answers_have_a_way_as_long_as_the_page_is_open(page, server):
    """A request that has ended is listed by the browser: none of them is the stream."""
    visit(page, server.origin)
    tab(page, "Play")
    time.sleep(3)  # all that the page asked at first is answered
    ended = page.run("return performance.getEntriesByType('resource').map(one => new URL(one.name).pathname)")
    assert any(path.endswith("/queue/join") for path in ended)
    assert not any(path.endswith("/queue/data") for path in ended)


@pytest.mark.parametrize("width", [390, 1280])
@pytest.mark.parametrize("theme", ["light", "dark"])
def test_it_fits_a_phone_and_a_dark_screen(page, server, width, theme):
    page.size(width, 844, phone=width < 500)
    page.theme(theme)
    visit(page, server.origin)
    for name in ("Train", "Play", "Adapters", "Photos"):
        tab(page, name)
        assert fits(page), name
    shade = page.run("return getComputedStyle(document.body).backgroundColor.match(/\\d+/g).slice(0, 3).map(Number)")
    assert (sum(shade) < 200) == (theme == "dark")


def test_a_mistake_is_one_line_in_the_page(page, server):
    page.size(1280, 1000)
    visit(page, server.origin)
    tab(page, "Play")
    said = "document.body.textContent.includes('no prompt; write what to draw')"
    press(page, "Draw")
    page.wait(said, LONG)
    assert not page.run("return document.body.textContent.includes('Traceback')")


def test_the_keyboard_alone_reaches_everything(page, server):
    """From the top by Tab: to the tabs, by an arrow to Play, then a prompt, and Draw."""
    page.size(1280, 1000)
    visit(page, server.origin)
    walk(page, "one.getAttribute('role') === 'tab'")
    for _ in range(2):
        page.press("ArrowRight")
    if page.run(f"return {TAB.format('Play')}.getAttribute('aria-selected') !== 'true'"):
        walk(page, f"one === {TAB.format('Play')}")
        page.press("Enter")
    page.wait(f"{TAB.format('Play')}.getAttribute('aria-selected') === 'true'")
    walk(page, "one.closest('#prompt')")
    page.press("a")
    walk(page, "one.id === 'draw'")
    assert page.run(
        "return getComputedStyle(document.activeElement).outlineStyle !== 'none' || "
        "getComputedStyle(document.activeElement).boxShadow !== 'none'"
    )
    page.press("Enter")
    page.wait("document.querySelector('#pictures img')", LONG)


def walk(page: Browser, wanted: str, most: int = 60) -> None:
    """Press Tab until the element in focus is this one."""
    for _ in range(most):
        page.press("Tab")
        if page.run(f"const one = document.activeElement; return Boolean({wanted})"):
            return
    raise AssertionError(f"Tab never comes to {wanted}")


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_axe_finds_nothing_serious(page, server, theme):
    page.size(1280, 1000)
    page.theme(theme)
    visit(page, server.origin)
    page.run((files("axe_core_python") / "axe.min.js").read_text(encoding="utf-8"))
    for name in ("Photos", "Train", "Play", "Adapters"):
        tab(page, name)
        page.run("document.querySelectorAll('button.label-wrap:not(.open)').forEach(b => b.offsetParent && b.click())")
        each = "found.violations.flatMap(one => one.nodes.map(node => [one.impact, one.id, node.html]))"
        found = page.do("POST", "/execute/async", {"script": f"axe.run().then(found => arguments[0]({each}))", "args": []})
        assert not [one for one in found if one[0] in ("serious", "critical") and not OF_GRADIO & set(one)], name
