"""lora-booth serve: a real server and OpenAI's own client. Every picture is the one that its adapters draw alone."""

from __future__ import annotations

import base64
import http.client
import io
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
from PIL import Image
from test_docs import blocks_of

pytest.importorskip("prometheus_client")
openai = pytest.importorskip("openai")

import uvicorn  # noqa: E402

from lora_booth.adapters.adapter import Adapter  # noqa: E402
from lora_booth.base.base_model import BaseModel  # noqa: E402
from lora_booth.base.changes import CLAIMS, claimed  # noqa: E402
from lora_booth.config import LoraSpec  # noqa: E402
from lora_booth.errors import SettingsError  # noqa: E402
from lora_booth.pictures.composition import Composition  # noqa: E402
from lora_booth.pictures.regions import Region  # noqa: E402
from lora_booth.pictures.serving import Request, Serving  # noqa: E402
from lora_booth.serve.app import Api  # noqa: E402
from lora_booth.serve.limits import Limits  # noqa: E402
from lora_booth.serve.shelf import Shelf  # noqa: E402
from lora_booth.studio.server import listening  # noqa: E402

ROOT = Path(__file__).parent.parent
TOKEN = "a-token-of-the-tests"
PROMPT = "sks dog"
NAMES = ("rex", "bob", "ink", "old pen")
PATIENCE = 600  # seconds, for a busy machine


class Caller:
    """Asks a server."""

    def __init__(self, address: str) -> None:
        self.address = address

    def client(self) -> Any:
        return openai.OpenAI(base_url=f"{self.address}/v1", api_key=TOKEN, max_retries=0, timeout=PATIENCE)

    def draw(self, model: str = "rex", prompt: str = PROMPT, seed: int = 0, **more: Any) -> list[np.ndarray]:
        with self.client() as client:
            found = client.images.generate(model=model, prompt=prompt, extra_body={"seed": seed, "steps": 2, **more})
            return [pixels(one.b64_json) for one in found.data]

    def ask(self, path: str, body: Any = None, *, token: str | None = TOKEN, **headers: str) -> tuple[int, Any, Any]:
        """Status, body and headers."""
        content = body if body is None or isinstance(body, bytes) else json.dumps(body).encode()
        given = headers | ({} if token is None else {"Authorization": f"Bearer {token}"})
        request = urllib.request.Request(self.address + path, content, {"Content-Type": "application/json"} | given)
        try:
            with urllib.request.urlopen(request, timeout=PATIENCE) as answer:
                return answer.status, answer.read(), answer.headers
        except urllib.error.HTTPError as error:
            with error:
                return error.code, json.loads(error.read())["error"], error.headers

    def figure(self, name: str) -> float:
        text = self.ask("/metrics")[1].decode()
        return float(re.search(rf"^lora_booth_{re.escape(name)} (\S+)$", text, re.MULTILINE)[1])


class Server(Caller):
    """The app in a thread, on a tiny base."""

    def __init__(self, folder: Path, **limits: Any) -> None:
        self.base = pipelines.base_of("sd1")
        self.api = Api(self.base, folder, token=TOKEN, limits=Limits(**limits))
        place, address = listening("127.0.0.1", 0, print)
        super().__init__(address)
        self.server = uvicorn.Server(uvicorn.Config(self.api.app, log_level="warning"))
        self.thread = threading.Thread(target=self.server.run, kwargs={"sockets": [place]})
        self.thread.start()
        until(lambda: self.server.started)

    def __enter__(self) -> Server:
        return self

    def __exit__(self, *_: object) -> None:
        self.server.should_exit = True
        self.thread.join(PATIENCE)

    def until_drawing(self) -> None:
        """The drawing thread has taken a batch, and waits for the base, which the test has claimed."""
        until(lambda: len(CLAIMS[self.base.shell.unet]) > 1)


def until(true: Callable[[], Any]) -> None:
    end = time.monotonic() + PATIENCE
    while not true():
        assert time.monotonic() < end
        time.sleep(0.01)


def pixels(b64: str) -> np.ndarray:
    with Image.open(io.BytesIO(base64.b64decode(b64))) as image:
        assert "trainedAlgorithmicMedia" in image.info["XML:com.adobe.xmp"]
        return np.asarray(image.convert("RGB")).astype(int)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four adapters of a tiny base, one in a run's folder."""
    base, place = pipelines.base_of("sd1"), tmp_path_factory.mktemp("adapters")
    for seed, name in enumerate(NAMES):
        made = pipelines.random_adapter(base, LoraSpec(rank=2 + seed, text_encoder=seed == 2), seed=seed)
        made = replace(made, card=replace(made.card, weight=0.5 if name == "ink" else 1.0))
        made.save(place / (f"{name}/adapter.safetensors" if name == "bob" else f"{name}.safetensors"))
    (place / "broken.safetensors").write_bytes(b"nothing of the kind")
    (place / "notes.txt").write_text("no adapter")
    return place


@pytest.fixture(scope="module")
def server(folder: Path) -> Iterator[Server]:
    with Server(folder, max_steps=5) as running:
        yield running


def file_of(folder: Path, name: str) -> Path:
    return folder / (f"{name}/adapter.safetensors" if name == "bob" else f"{name}.safetensors")


def alone(folder: Path, requests: list[Request]) -> list[np.ndarray]:
    """Each drawn by itself, on a base that knows no server."""
    with Serving(pipelines.base_of("sd1")) as live:
        for name in NAMES:
            live.load(name, Adapter.load(file_of(folder, name)))
        drawn = [live.generate([one], steps=2)[0].image for one in requests]
    return [np.asarray(image.convert("RGB")).astype(int) for image in drawn]


# --- pictures --------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_callers_with_different_adapters_share_batches_and_get_their_own_pictures(server: Server, folder: Path) -> None:
    wanted = [
        ("rex", {"rex": 1.0}),
        ("bob:0.5", {"bob": 0.5}),
        ("ink", {"ink": 0.5}),  # the weight of its card
        ("old pen:-1", {"old pen": -1.0}),
        ("rex:0.3+bob", {"rex": 0.3, "bob": 1.0}),
        ("tiny", {}),
    ]
    expected = alone(folder, [Request(PROMPT, adapters, 3) for _, adapters in wanted])
    assert all(np.abs(expected[i] - expected[j]).max() > 2 for i in range(len(wanted)) for j in range(i))
    before = [server.figure(f"batch_pictures_{what}") for what in ("sum", "count")]
    with ThreadPoolExecutor(8) as callers:
        with claimed(server.base.shell.unet):  # one is drawn, the others wait, until this ends
            jobs = [callers.submit(server.draw, wanted[0][0], seed=3)]
            server.until_drawing()
            jobs += [callers.submit(server.draw, model, seed=3) for model, _ in wanted[1:]]
            until(lambda: len(server.api.queue.waiting) == len(wanted) - 1)
        found = [job.result()[0] for job in jobs]
    for one, other in zip(found, expected, strict=True):
        assert np.abs(one - other).max() <= 2  # of 255
    after = [server.figure(f"batch_pictures_{what}") for what in ("sum", "count")]
    assert [b - a for a, b in zip(before, after, strict=True)] == [len(wanted), 2]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore::lora_booth.errors.CompositionWarning")
def test_regions_are_those_of_a_composition(server: Server, folder: Path) -> None:
    rex, bob, ink = (Adapter.load(file_of(folder, name)) for name in ("rex", "bob", "ink"))
    left, right = (0.0, 0.0, 0.5, 1.0), (0.5, 0.0, 1.0, 1.0)
    base = pipelines.base_of("sd1")
    placed = Composition(base, ink, regions=[Region(rex, box=left, weight=0.8), Region(bob, box=right)])
    boxes = {"rex": [0, 0, 0.5, 1], "bob": [0.5, 0, 1, 1]}
    for model, regions, studio in (
        ("rex:0.8+ink+bob", boxes, placed),
        ("rex", "auto", Composition(base, rex, regions="auto")),
    ):
        found = server.draw(model, seed=3, n=2, regions=regions)
        expected = studio.generate(PROMPT, seeds=[3, 4], steps=2)
        for one, other in zip(found, expected, strict=True):
            assert np.abs(one - np.asarray(other.image.convert("RGB")).astype(int)).max() <= 2
    assert (
        np.abs(server.draw("rex:0.8+ink+bob", seed=3)[0] - server.draw("rex:0.8+ink+bob", seed=3, regions=boxes)[0]).max() > 2
    )
    [again] = alone(folder, [Request(PROMPT, {"rex": 1.0}, 3)])  # what was attached for regions has gone
    assert np.abs(server.draw(seed=3)[0] - again).max() <= 2


def test_n_pictures_have_seeds_in_a_row(server: Server) -> None:
    first, second = server.draw(seed=7, n=2)
    assert np.abs(server.draw(seed=8)[0] - second).max() <= 2 and np.abs(first - second).max() > 2
    with server.client() as client:
        found = client.images.generate(
            model="rex", prompt=PROMPT, n=1, size="48x64", response_format="b64_json", user="me", extra_body={"steps": 1}
        )
    assert pixels(found.data[0].b64_json).shape == (64, 48, 3) and 0 <= found.data[0].seed < 2**32


def test_models_are_listed(server: Server) -> None:
    with server.client() as client:
        assert [one.id for one in client.models.list()] == ["tiny", "bob", "broken", "ink", "old pen", "rex"]


def test_an_adapter_that_cannot_be_read_harms_no_other_in_its_batch(server: Server) -> None:
    with ThreadPoolExecutor(3) as callers:
        with claimed(server.base.shell.unet):
            first = callers.submit(server.draw, "tiny")
            server.until_drawing()
            both = [callers.submit(server.draw, name) for name in ("rex", "broken")]
            until(lambda: len(server.api.queue.waiting) == 2)
        assert len(first.result()) == len(both[0].result()) == 1
        with pytest.raises(openai.BadRequestError, match="broken.safetensors: not a safetensors file"):
            both[1].result()


@pytest.mark.slow
def test_memory_holds_the_adapters_used_last_and_a_new_file_replaces_a_loaded_one(folder: Path, tmp_path: Path) -> None:
    for name in ("rex", "ink"):
        (tmp_path / f"{name}.safetensors").write_bytes(file_of(folder, name).read_bytes())
    expected = alone(folder, [Request(PROMPT, {name: 0.5}) for name in ("rex", "ink", "bob")])
    with Server(tmp_path, loaded=1) as server:
        for name, picture in zip(("rex", "ink", "rex"), (expected[0], expected[1], expected[0]), strict=True):
            assert np.abs(server.draw(f"{name}:0.5")[0] - picture).max() <= 2
            assert list(server.api.queue.loaded) == [name] and server.figure("loaded_adapters") == 1
        both = server.draw("rex:0.5+ink:0")[0]
        assert np.abs(both - expected[0]).max() <= 2 and server.figure("loaded_adapters") == 2
        (tmp_path / "rex.safetensors").write_bytes(file_of(folder, "bob").read_bytes())
        assert np.abs(server.draw("rex:0.5")[0] - expected[2]).max() <= 2


# --- uploads ---------------------------------------------------------------------------------------------------------


def test_an_adapter_is_sent_checked_and_used(folder: Path, tmp_path: Path) -> None:
    content = file_of(folder, "rex").read_bytes()
    other = pipelines.random_adapter(BaseModel.from_pipeline(pipelines.make_pipeline("sd2"), name="other"))
    with Server(tmp_path) as server, server.client() as client:
        made = client.files.create(file=("my rex.safetensors", content), purpose="user_data")
        assert (made.id, made.bytes) == ("my rex", len(content))
        assert (tmp_path / "my rex.safetensors").read_bytes() == content
        assert [one.id for one in client.models.list()] == ["tiny", "my rex"] and len(server.draw("my rex")) == 1
        wrong = {
            "my rex.safetensors": (content, "an adapter 'my rex' already"),
            "cut.safetensors": (content[:-8], "cut.safetensors: "),
            "text.safetensors": (b"text", "text.safetensors: not a safetensors file"),
            "other.safetensors": (other.save(tmp_path.parent / "other.safetensors").read_bytes(), "other.safetensors was made"),
            "rex.bin": (content, "file name 'rex.bin'; needed: NAME.safetensors"),
            **{
                name: (content, "needed: NAME.safetensors")
                for name in ("../x.safetensors", "/tmp/x.safetensors", ".x.safetensors", "a\\x.safetensors", ".safetensors")
            },
        }
        for name, (given, told) in wrong.items():
            with pytest.raises(openai.BadRequestError) as error:
                client.files.create(file=(name, given), purpose="user_data")
            assert told in str(error.value) and str(tmp_path) not in str(error.value), name
        assert [path.name for path in tmp_path.iterdir()] == ["my rex.safetensors"]
        status, told, _ = server.ask("/v1/files", b"no form", **{"Content-Type": "text/plain"})
        assert status == 400 and "in the field `file`" in told["message"]


def test_of_two_uploads_of_one_name_one_is_kept(folder: Path, tmp_path: Path) -> None:
    shelf, base = Shelf(tmp_path), pipelines.base_of("sd1")
    content, start = file_of(folder, "rex").read_bytes(), threading.Barrier(2)

    def send() -> str:
        start.wait()
        try:
            return shelf.add(base, "new.safetensors", io.BytesIO(content))
        except SettingsError as error:
            return str(error)

    with ThreadPoolExecutor(2) as pool:
        told = sorted(one.result() for one in [pool.submit(send) for _ in range(2)])
    assert told == ["new", "there is an adapter 'new' already; choose another name"]


# --- limits ----------------------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_flood_is_answered_with_429_and_what_was_taken_is_drawn(folder: Path) -> None:
    body = {"model": "rex", "prompt": PROMPT, "steps": 1, "seed": 1}
    with Server(folder, queue=3) as server, ThreadPoolExecutor(4) as callers:
        with claimed(server.base.shell.unet):
            jobs = [callers.submit(server.ask, "/v1/images/generations", body)]
            server.until_drawing()
            jobs += [callers.submit(server.ask, "/v1/images/generations", body) for _ in range(3)]
            until(lambda: len(server.api.queue.waiting) == 3)
            for _ in range(5):
                status, error, headers = server.ask("/v1/images/generations", body)
                assert (status, error["code"]) == (429, "rate_limit_exceeded") and int(headers["Retry-After"]) >= 1
            assert "3 pictures are waiting already" in error["message"] and server.figure("waiting_pictures") == 3
        assert [job.result()[0] for job in jobs] == [200] * 4
        assert server.figure('answers_total{status="429"}') == 5


def test_who_waits_too_long_is_told_so(folder: Path) -> None:
    with Server(folder, timeout=0.2) as server:
        with claimed(server.base.shell.unet):
            status, error, headers = server.ask("/v1/images/generations", {"model": "rex", "prompt": PROMPT, "n": 2})
            assert (status, error["type"]) == (504, "server_error") and "within 0.2 seconds" in error["message"]
            assert headers["x-should-retry"] == "false"


def left(server: Server, body: Any) -> http.client.HTTPConnection:
    """A request whose caller may go before the answer."""
    connection = http.client.HTTPConnection(server.address.removeprefix("http://"))
    connection.request("POST", "/v1/images/generations", json.dumps(body), {"Authorization": f"Bearer {TOKEN}"})
    return connection


def test_nothing_is_drawn_for_a_caller_who_has_gone(folder: Path) -> None:
    body = {"model": "rex", "prompt": PROMPT, "steps": 999, "seed": 1}
    with Server(folder, max_steps=999) as server:
        steps: list[int] = []
        server.base.unet.register_forward_hook(lambda *_: steps.append(1))
        drawing = left(server, body | {"n": 2})
        until(lambda: steps)
        staying, going = (left(server, body | {"steps": 2, "n": n}) for n in (1, 3))
        until(lambda: len(server.api.queue.waiting) == 4)
        going.close()
        until(lambda: len(server.api.queue.waiting) == 1)
        drawing.close()
        answer = staying.getresponse()
        assert answer.status == 200 and len(json.loads(answer.read())["data"]) == 1 and len(steps) < 999
        staying.close()
        until(lambda: server.figure('answers_total{status="499"}') == 2)
        assert server.figure("batch_pictures_sum") == 1


def test_a_token_is_needed(server: Server) -> None:
    assert server.ask("/health", token=None)[:2] == (200, b'{"status":"ok"}')
    calls = (("/metrics", None), ("/v1/models", None), ("/v1/files", {}), ("/v1/images/generations", {}), ("/x", None))
    for path, body in calls:
        for token in (None, "", TOKEN[:-1], f"{TOKEN}x", "ü"):
            status, error, _ = server.ask(path, body, token=token and token.encode().decode("latin-1"))
            assert (status, error["code"]) == (401, "invalid_api_key")
    with openai.OpenAI(base_url=f"{server.address}/v1", api_key="wrong") as client, pytest.raises(openai.AuthenticationError):
        client.models.list()


WRONG: list[tuple[dict[str, Any], int, str]] = [
    ({"prompt": None}, 400, "prompt None; needed: a string"),
    ({"prompt": "x" * 2001}, 400, "prompt of 2001 characters"),
    ({"model": "nobody"}, 404, "no model 'nobody'; GET /v1/models lists them"),
    ({"model": "../rex"}, 404, "no model '../rex'"),
    ({"model": "old pen/../rex"}, 404, "no model"),
    ({"model": "/etc/passwd"}, 404, "no model"),
    ({"model": "rex\0"}, 404, "no model"),
    ({"model": ""}, 404, "no model ''"),
    ({"model": 5}, 400, "model 5; needed: a string"),
    ({"model": "rex:much"}, 400, "weight 'much' of rex"),
    ({"model": "rex:nan"}, 400, "weight 'nan' of rex"),
    ({"model": "rex:101"}, 400, "from -100 to 100"),
    ({"model": "rex+rex"}, 400, "model rex twice"),
    ({"n": 11}, 400, "n 11 is out of range; allowed: 1 to 10"),
    ({"n": 0}, 400, "n 0 is out of range"),
    ({"steps": 6}, 400, "steps 6 is out of range; allowed: 1 to 5"),
    ({"steps": 0}, 400, "steps 0"),
    ({"size": "96x96"}, 400, "size 96 is out of range; allowed: width times height up to 8192"),
    ({"size": "63x64"}, 400, "multiples of 8"),
    ({"size": "large"}, 400, "'large' cannot be read"),
    ({"seed": -1}, 400, "seed -1"),
    ({"seed": 2**63 - 1, "n": 2}, 400, "seed 9223372036854775808"),
    ({"seed": "x"}, 400, "seed 'x'; needed"),
    ({"guidance": "x"}, 400, "guidance 'x'"),
    ({"sampler": "x"}, 400, "sampler"),
    ({"negative_prompt": 5}, 400, "negative_prompt 5"),
    ({"response_format": "url"}, 400, "response_format: only b64_json"),
    ({"regions": []}, 400, '[] is not regions; send "auto", or boxes by model'),
    ({"regions": {"bob": [0, 0, 1, 1]}}, 400, "region of 'bob' is out of range; allowed: the adapters of the model: rex"),
    ({"regions": {"rex": [0, 0, 1]}}, 400, "four shares"),
    ({"regions": {"rex": [0, 0, 0, 1]}}, 400, "0 <= x0 < x1 <= 1"),
    ({"regions": {"rex": [0, 0, "x", 1]}}, 400, "needed: "),
    ({"regions": "auto", "prompt": "a boat"}, 400, "names none of 'sks'"),
    ({"colour": 1}, 400, "'colour' is unknown; known: prompt, "),
]


@pytest.mark.parametrize(("more", "status", "told"), WRONG, ids=[f"{next(iter(one[0].items()))!r:.30}" for one in WRONG])
def test_a_mistake_is_told_in_the_shape_of_openai(more: dict[str, Any], status: int, told: str, server: Server) -> None:
    found, error, _ = server.ask("/v1/images/generations", {"model": "rex", "prompt": PROMPT, **more})
    assert (found, error["type"]) == (status, "invalid_request_error") and told in error["message"], error
    assert error.keys() == {"message", "type", "param", "code"} and "--" not in error["message"]


def test_bodies_that_are_not_what_they_should_be(server: Server) -> None:
    path = "/v1/images/generations"
    for body, status, told in (
        (b"{", 400, "not JSON"),
        (b"[]", 400, "not an object"),
        (b'{"prompt": "a", "prompt": "b"}', 400, "duplicate"),
    ):
        found, error, _ = server.ask(path, body)
        assert found == status and told in error["message"]
    # answered before the content is read: sent in one piece, for the connection may be closed after the answer
    for more, length, status in (("", 2**16 + 1, b"413"), ("Transfer-Encoding: chunked\r\n", 2, b"400|411")):
        head = f"POST {path} HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: {length}\r\n{more}\r\n"
        with socket.create_connection(server.address.removeprefix("http://").split(":"), PATIENCE) as connection:
            connection.sendall(head.encode())
            assert re.match(rb"HTTP/1.1 (" + status + rb")", connection.recv(100))
    assert server.ask("/v1/images/edits", {})[0] == 404 and server.ask(path)[0] == 405


def test_limits_are_checked() -> None:
    for name, value in (("max_steps", 0), ("queue", 0), ("timeout", 0.0), ("loaded", 0), ("queue", "x")):
        with pytest.raises(SettingsError, match=name):
            Limits(**{name: value})


# --- the command -----------------------------------------------------------------------------------------------------


@contextmanager
def running(place: Path, *words: object) -> Iterator[tuple[subprocess.Popen[bytes], Caller]]:
    """`lora-booth serve` in a process of its own, with the adapters in `place/adapters`."""
    paths = os.pathsep.join(filter(None, (str(ROOT), os.environ.get("PYTHONPATH"))))
    command = [sys.executable, "-m", "lora_booth.cli", "serve", "--adapters", "adapters", "--port", "0", *map(str, words)]
    log = place / "log"
    with open(log, "wb") as output:
        environment = os.environ | {"PYTHONPATH": paths, "LORA_BOOTH_TOKEN": TOKEN}
        process = subprocess.Popen(command, cwd=place, stdout=output, stderr=output, env=environment)
    try:
        end = time.monotonic() + PATIENCE
        while "token: " not in log.read_text():
            assert process.poll() is None and time.monotonic() < end, log.read_text()
            time.sleep(0.1)
        yield process, Caller(re.search(r"http://[^/]+", log.read_text())[0])
    finally:
        process.terminate()
        process.wait(PATIENCE)


@pytest.mark.slow
def test_the_page_of_the_documentation_runs_as_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    base = BaseModel.load("toybox", device="cpu")
    pipelines.random_adapter(base, seed=1, size=0.05).save(tmp_path / "adapters" / "rex.safetensors")
    pipelines.random_adapter(base, seed=2, size=0.05).save(tmp_path / "ink.safetensors")
    with running(tmp_path, "--base", "toybox") as (_, caller):
        page = blocks_of(ROOT / "docs" / "serving.md")
        blocks = [one for one in page if one.language == "python" and "tests/test_serve.py runs it" in (one.not_run or "")]
        code = "\n".join(one.code for one in blocks).replace("http://127.0.0.1:8000", caller.address)
        code = code.replace('"the token"', repr(TOKEN)) + "\nclient.close()"
        monkeypatch.chdir(tmp_path)
        exec(code, {})
        with Image.open(tmp_path / "rex.png") as picture:
            assert picture.size == (64, 64) and "trainedAlgorithmicMedia" in picture.info["XML:com.adobe.xmp"]
        assert (tmp_path / "adapters" / "ink.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.skipif(not hasattr(signal, "SIGKILL"), reason="needs kill -9")
def test_a_kill_loses_only_what_was_in_flight(folder: Path, tmp_path: Path) -> None:
    pipelines.make_pipeline("sd1").save_pretrained(tmp_path / "tiny")
    adapters = tmp_path / "adapters"
    shutil.copytree(folder, adapters)
    new = file_of(folder, "rex").read_bytes()
    words = ("--base", tmp_path / "tiny", "--max-steps", 999)

    def drawn(caller: Caller) -> list[np.ndarray]:
        return caller.draw("ink", n=2, seed=1)

    def models(caller: Caller) -> list[str]:
        return [one["id"] for one in json.loads(caller.ask("/v1/models")[1])["data"]]

    def send(caller: Caller) -> None:
        with caller.client() as client:
            client.files.create(file=("new.safetensors", new), purpose="user_data")

    with running(tmp_path, *words) as (process, caller), ThreadPoolExecutor() as callers:
        before, listed = drawn(caller), models(caller)
        jobs = [callers.submit(caller.draw, "rex", steps=999)]
        until(lambda: caller.figure("loaded_adapters") == 2)  # it is being drawn
        # a file that is there in full is checked, and listed, once the batch is done that is being drawn
        jobs += [callers.submit(caller.draw, "bob", steps=999), callers.submit(send, caller)]
        with socket.create_connection(caller.address.removeprefix("http://").split(":")) as half:
            head = f"POST /v1/files HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {TOKEN}\r\nContent-Length: 100000\r\n"
            half.sendall(f'{head}Content-Type: multipart/form-data; boundary="x"\r\n\r\n--x\r\n'.encode())
            until(lambda: list(adapters.glob(".*.tmp")))
            process.kill()
            process.wait(PATIENCE)
        for job in jobs:
            with pytest.raises(openai.APIConnectionError):
                job.result()
    assert list(adapters.glob(".*.tmp"))
    with running(tmp_path, *words) as (_, caller):
        assert models(caller) == listed == ["tiny", "bob", "broken", "ink", "old pen", "rex"]
        assert np.array_equal(drawn(caller), before)
        send(caller)
        assert set(models(caller)) == {*listed, "new"}
    assert (adapters / "new.safetensors").read_bytes() == new and not list(adapters.glob(".*.tmp"))


def test_mistakes_of_the_command(call: Any, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    for words, told in (
        (("--adapters", tmp_path / "file"), "file: is a file; pass --adapters a folder"),
        (("--adapters", tmp_path, "--token", "short"), "token is out of range; allowed: 16 or more"),
        (("--adapters", tmp_path, "--queue", 0), "queue 0 is out of range"),
        ((), "Missing option '--adapters'"),
    ):
        code, _, err = call("serve", *words, "--base", "toybox")
        assert code == 2 and told in err.splitlines()[-1], err
