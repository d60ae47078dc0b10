"""The studio's server in a process of its own, and a client that calls its page as a browser does, with nothing but urllib."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
import time
import urllib.error
import urllib.request
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parent.parent
PATIENCE = 600  # seconds, for a busy machine: the first call loads PyTorch
MAIN = "from lora_booth.cli import main; main()"


class Server:
    """`lora-booth studio`. Close it like a file; `kill` is a power cut."""

    def __init__(self, root: Path, port: int = 0) -> None:
        self.root, self.port = root, port
        self.log = Path(tempfile.mkstemp(suffix=".log")[1])
        self.start()

    def start(self) -> None:
        paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
        command = [sys.executable, "-c", MAIN, "studio", str(self.root), f"--port={self.port}", "--no-browser"]
        with open(self.log, "wb") as log:
            self.process = subprocess.Popen(command, stdout=log, stderr=log, env=os.environ | {"PYTHONPATH": paths})
        end = time.monotonic() + PATIENCE
        while " http://" not in self.log.read_text():
            assert self.process.poll() is None and time.monotonic() < end, self.log.read_text()
            time.sleep(0.1)
        self.address = next(word for word in self.log.read_text().split() if word.startswith("http://"))
        self.origin, _, self.token = self.address.partition("/?token=")
        self.port = int(self.origin.rpartition(":")[2])

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.process.terminate()
        self.process.wait(30)
        self.log.unlink()

    def kill(self) -> None:
        self.process.kill()
        self.process.wait(30)

    def ask(self, path: str, body: Any = None, *, token: str | None = None, method: str | None = None, **headers: str) -> Any:
        """Status, body."""
        cookie = {"Cookie": f"lora_booth_studio_{self.port}={self.token if token is None else token}"}
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = {"Content-Type": "application/json"} | cookie | headers
        request = urllib.request.Request(self.origin + path, content, given, method=method)
        try:
            with opener().open(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read()
        except urllib.error.HTTPError as error:
            with error:
                return error.code, error.read()


class Client:
    """One open page: what its fields hold, by label or id, and the events that its buttons cause."""

    def __init__(self, server: Server) -> None:
        self.server, self.session = server, os.urandom(6).hex()
        self.config = json.loads(server.ask("/config")[1])
        self.values = {one["id"]: one["props"].get("value") for one in self.config["components"]}
        self.props = {one["id"]: one["props"] for one in self.config["components"]}
        self.places: dict[str, int] = {}
        for one in reversed(self.config["components"]):  # of two with one label, the first counts
            for key in ("label", "value", "elem_id"):
                if isinstance(name := one["props"].get(key), str):
                    self.places[f"#{name}" if key == "elem_id" else name] = one["id"]
            if one["type"] == "timer":
                self.places["#timer"] = one["id"]
        self.notes: list[str] = []  # of this call

    def value(self, name: str) -> Any:
        return self.values[self.places[name]]

    def write(self, **fields: Any) -> None:
        """By label, with _ for a space."""
        for name, value in fields.items():
            self.values[self.places[name.replace("_", " ")]] = value

    def upload(self, *files: Path) -> list[dict[str, Any]]:
        mark = "----studio"
        parts = [
            f'--{mark}\r\nContent-Disposition: form-data; name="files"; filename="{file.name}"\r\n\r\n'.encode()
            + file.read_bytes()
            for file in files
        ]
        body = b"\r\n".join([*parts, f"--{mark}--\r\n".encode()])
        status, answer = self.server.ask(
            "/gradio_api/upload", body, **{"Content-Type": f"multipart/form-data; boundary={mark}"}
        )
        assert status == 200, answer
        return [
            {"path": path, "orig_name": file.name, "meta": {"_type": "gradio.FileData"}}
            for path, file in zip(json.loads(answer), files, strict=True)
        ]

    def do(self, name: str, event: str = "click", data: Any = None) -> dict[str, Any]:
        """Cause an event and put what it answers into the fields. Raises RuntimeError with the text of an error."""
        target = [self.places[name], event]
        fn = next(one for one in self.config["dependencies"] if target in [list(t) for t in one["targets"]])
        inputs = [self.values[i] for i in fn["inputs"]]
        call = {"data": inputs, "fn_index": fn["id"], "session_hash": self.session, "event_data": data, "trigger_id": target[0]}
        status, answer = self.server.ask("/gradio_api/queue/join", call)
        if status != 200:
            raise RuntimeError(f"{status} {answer.decode()}")
        self.notes = []
        for value, place in zip(self._answer(), fn["outputs"], strict=False):
            self._set(place, value)
        return self.values

    def _answer(self) -> list[Any]:
        cookie = f"lora_booth_studio_{self.server.port}={self.server.token}"
        address = f"{self.server.origin}/gradio_api/queue/data?session_hash={self.session}"
        with opener().open(urllib.request.Request(address, headers={"Cookie": cookie}), timeout=PATIENCE) as stream:
            for line in stream:
                if not line.startswith(b"data: "):
                    continue
                message = json.loads(line[6:])
                if message["msg"] == "log":
                    self.notes.append(message["log"])
                if message["msg"] == "process_completed":
                    if not message["success"]:
                        raise RuntimeError(message["output"]["error"])
                    return message["output"]["data"]
        raise AssertionError("no answer")

    def _set(self, place: int, value: Any) -> None:
        if isinstance(value, dict) and value.get("__type__") == "update":
            self.props[place] |= value
            if "value" in value:
                self.values[place] = value["value"]
        else:
            self.values[place] = value


def opener() -> urllib.request.OpenerDirector:
    class Stay(urllib.request.HTTPRedirectHandler):
        def redirect_request(self, *_: Any) -> None:
            return None

    return urllib.request.build_opener(urllib.request.ProxyHandler({}), Stay)
