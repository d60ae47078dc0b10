"""A headless Chromium through the WebDriver protocol, with nothing but urllib."""

from __future__ import annotations

import base64
import json
import shutil
import socket
import subprocess
import tempfile
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

CHROMIUM = shutil.which("chromium") or shutil.which("google-chrome") or shutil.which("chromium-browser")
CHROMEDRIVER = shutil.which("chromedriver")
FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)
ELEMENT = "element-6066-11e4-a52e-4f735466cecf"  # the protocol's name for a reference to an element
KEYS = {"Enter": "\ue007", "Escape": "\ue00c", "ArrowLeft": "\ue012", "ArrowRight": "\ue014", "Control": "\ue009"}
KEYS |= {"Tab": "\ue004", "Home": "\ue011", "Backspace": "\ue003"}


class Browser:
    """One window. `run` and `element` take JavaScript and CSS."""

    def __init__(self, address: str, profile: Path) -> None:
        self.address = address
        options = {"binary": CHROMIUM, "args": [*FLAGS, f"--user-data-dir={profile}"]}
        wanted = {"browserName": "chrome", "goog:chromeOptions": options, "goog:loggingPrefs": {"browser": "WARNING"}}
        made = self._ask("POST", "/session", {"capabilities": {"alwaysMatch": wanted}})
        self.session = f"/session/{made['sessionId']}"

    def _ask(self, method: str, path: str, body: Any = None) -> Any:
        content = None if body is None else json.dumps(body).encode()
        request = urllib.request.Request(self.address + path, content, {"Content-Type": "application/json"}, method=method)
        no_proxy = urllib.request.build_opener(urllib.request.ProxyHandler({}))
        try:
            with no_proxy.open(request, timeout=120) as answer:
                return json.load(answer)["value"]
        except urllib.error.HTTPError as error:
            with error:
                raise AssertionError(f"{path}: {json.load(error)['value']['message']}") from None

    def do(self, method: str, path: str, body: Any = None) -> Any:
        return self._ask(method, self.session + path, body)

    def open(self, page: Path, anchor: str = "") -> None:
        self.do("POST", "/url", {"url": "about:blank"})  # else another anchor would not load the page again
        self.do("POST", "/url", {"url": page.as_uri() + anchor})
        self.wait("location.href !== 'about:blank' && document.readyState === 'complete'", 60)  # the driver may answer before

    def run(self, script: str, *arguments: Any) -> Any:
        return self.do("POST", "/execute/sync", {"script": script, "args": list(arguments)})

    def devtools(self, command: str, **parameters: Any) -> Any:
        return self.do("POST", "/goog/cdp/execute", {"cmd": command, "params": parameters})

    def element(self, css: str) -> str:
        return self.do("POST", "/element", {"using": "css selector", "value": css})[ELEMENT]

    def click(self, css: str) -> None:
        self.do("POST", f"/element/{self.element(css)}/click", {})

    def write(self, css: str, text: str) -> None:
        self.do("POST", f"/element/{self.element(css)}/clear", {})
        self.do("POST", f"/element/{self.element(css)}/value", {"text": text})

    def press(self, *keys: str) -> None:
        """Keys one inside the other: press("Control", "v")."""
        names = [KEYS.get(key, key) for key in keys]
        actions = [{"type": "keyDown", "value": n} for n in names] + [{"type": "keyUp", "value": n} for n in names[::-1]]
        self.do("POST", "/actions", {"actions": [{"type": "key", "id": "keys", "actions": actions}]})

    def messages(self) -> list[str]:
        """Warnings and errors on the console since the last call."""
        return [f"{entry['level']}: {entry['message']}" for entry in self.do("POST", "/se/log", {"type": "browser"})]

    def wait(self, script: str, seconds: float = 10) -> Any:
        """Until `return script` is true."""
        end = time.monotonic() + seconds
        while not (found := self.run(f"return {script}")):
            assert time.monotonic() < end, f"never true: {script}"
            time.sleep(0.02)
        return found

    def size(self, width: int, height: int, *, scale: float = 1, phone: bool = False) -> None:
        metrics = {"width": width, "height": height, "deviceScaleFactor": scale, "mobile": phone}
        self.devtools("Emulation.setDeviceMetricsOverride", **metrics)
        self.devtools("Emulation.setTouchEmulationEnabled", enabled=phone)

    def theme(self, name: str) -> None:
        """light or dark"""
        self.devtools("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": name}])

    def screenshot(self) -> bytes:
        """PNG of the window."""
        return base64.b64decode(self.do("GET", "/screenshot"))


@contextmanager
def chromium() -> Iterator[Browser]:
    assert CHROMIUM and CHROMEDRIVER
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as folder:
        quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
        driver = subprocess.Popen([CHROMEDRIVER, f"--port={port}"], **quiet)  # type: ignore[call-overload]
        address, browser = f"http://127.0.0.1:{port}", None
        try:
            wait_for(port)
            browser = Browser(address, Path(folder) / "profile")
            yield browser
        finally:
            try:
                if browser is not None:
                    browser.do("DELETE", "")
            finally:
                driver.terminate()
                driver.wait(20)


def wait_for(port: int, seconds: float = 30) -> None:
    end = time.monotonic() + seconds
    while True:
        try:
            socket.create_connection(("127.0.0.1", port), 1).close()
            return
        except OSError:
            assert time.monotonic() < end, "chromedriver does not answer"
            time.sleep(0.05)
