"""The studio: what its folder gives away, who may call it, and the whole way at its page."""

from __future__ import annotations

import asyncio
import html
import json
import pickle
import re
import subprocess
import sys
import time
from collections.abc import Iterator
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
import pipelines
import pytest
from hostile_adapters import headers, keys, lycoris, values
from hostile_photos import good_folder, hostile_photos
from PIL import Image
from studio_client import Client, Server

import lora_booth as lb
from lora_booth.adapters.sharing import thumbnail_of
from lora_booth.config import LoraSpec
from lora_booth.errors import AdapterError, PhotoError, SettingsError, SubjectError, TrainingError
from lora_booth.photos.opening import MAX_BYTES
from lora_booth.pictures.gallery import Album
from lora_booth.pictures.picture import Making
from lora_booth.studio import server as server_module
from lora_booth.studio.drawing import BY_STEP, CANVAS, COLORS, mask_of, painting_of, thumbnail
from lora_booth.studio.folder import StudioFolder, square_around
from lora_booth.studio.runs import COUNT, Trainings, last_line, settings_of
from lora_booth.training.checkpoint import RECORD
from lora_booth.training.job import FORMAT

pytest.importorskip("starlette")
from starlette.requests import ClientDisconnect  # noqa: E402
from starlette.testclient import TestClient  # noqa: E402

from lora_booth.studio.access import Gate  # noqa: E402

OUTSIDE = "not to be seen"
ROOT = Path(__file__).parents[1]


@pytest.fixture
def adapter() -> lb.Adapter:
    return pipelines.random_adapter(pipelines.base_of("sd1"), LoraSpec(rank=2))


@pytest.fixture
def folder(tmp_path: Path) -> StudioFolder:
    (tmp_path / "secret.png").write_text(OUTSIDE)
    return StudioFolder(tmp_path / "studio")


# --- the folder --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name", ["", ".", "..", "../secret.png", "a/b", "a\\b", "/etc/passwd", "a\0b", "a\nb", "x" * 300, None]
)
def test_a_name_that_leads_elsewhere_is_none(folder, name):
    for ask in (
        lambda: folder.place("photos", name),
        lambda: folder.place("photos", "rex", name),
        lambda: folder.describe(name, "ohwx", "dog"),
        lambda: folder.add_photos(name, []),
        lambda: Trainings(folder).start(name, "rex", "toybox", {}),
    ):
        with pytest.raises(SettingsError):
            ask()


def test_a_link_is_not_followed(folder, photos):
    (folder.root / "photos" / "out").symlink_to(photos)
    (folder.root / "pictures" / "out.png").symlink_to(folder.root.parent / "secret.png")
    with pytest.raises(SettingsError, match="link"):
        folder.photos("out")
    with pytest.raises(SettingsError, match="link"):
        folder.place("pictures", "out.png")
    with pytest.raises(SettingsError, match="not a name"):
        folder.place("photos", "out", "0.jpg")
    assert folder.names("photos") == [] and folder.names("pictures", ".png") == []


def test_photos_are_checked_before_they_are_copied(folder, photos, tmp_path):
    page, cut = tmp_path / "page.jpg", tmp_path / "cut.jpg"
    page.write_text("<html>")
    cut.write_bytes((photos / "0.jpg").read_bytes()[:3000])
    told = folder.add_photos("rex", [photos / "0.jpg", page, cut, photos / "0.jpg"])
    assert [line.partition(":")[0] for line in told] == ["page.jpg", "cut.jpg", "0.jpg"] and "not a photo" in told[0]
    assert told[2].endswith("there already")
    (tmp_path / "0.jpg").write_bytes((photos / "1.jpg").read_bytes())
    assert folder.add_photos("rex", [tmp_path / "0.jpg"]) == []
    assert sorted(path.name for path in (folder.root / "photos" / "rex").iterdir()) == ["0-2.jpg", "0.jpg"]


def test_a_subject_may_have_more_photos_than_a_training_takes_by_default(folder):
    place = folder.root / "photos" / "rex"
    place.mkdir(parents=True)
    for shade in range(101):
        Image.new("RGB", (64, 64), (shade, 99, 9)).save(place / f"{shade}.png")
    folder.describe("rex", "ohwx", "dog")
    assert len(folder.photos("rex").photos) == len(folder.subject("rex").photos) == 101


def test_crop_mask_and_caption_are_those_of_the_photo(folder, photos):
    folder.add_photos("rex", sorted(photos.iterdir()))
    one = folder.photo("rex", "1.jpg")
    painted = Image.new("L", (one.width // 2, one.height // 2))
    painted.paste(255, (20, 30, 90, 80))
    region = square_around(painted)
    x0, y0, x1, y1 = (edge * side for edge, side in zip(region, (one.width, one.height) * 2, strict=True))
    assert x1 - x0 == pytest.approx(y1 - y0) == pytest.approx(1.15 * 140)  # a square, a little larger than the paint
    assert x0 < 40 < 180 < x1 and y0 < 60 < 160 < y1
    folder.set_crop(one, region)
    folder.set_mask(one, painted)
    folder.set_caption(one, " on a  sofa\n")
    changed = folder.photo("rex", "1.jpg")
    assert changed.crop == pytest.approx(region) and changed.mask is not None and changed.caption == "on a sofa"
    with pytest.raises(PhotoError, match="short side needs 64"):
        folder.set_crop(one, (0, 0, 0.1, 0.1))
    assert folder.photo("rex", "1.jpg").crop == pytest.approx(region)  # the one before
    folder.set_crop(changed, (0, 0, 1, 0.9))
    outside = Image.new("L", painted.size)
    outside.paste(255, (0, int(0.95 * outside.height), 90, outside.height))
    with pytest.raises(PhotoError, match="no white inside the photo's crop"):
        folder.set_mask(changed, outside)
    assert folder.photo("rex", "1.jpg").mask == changed.mask  # the one before
    folder.remove_photo(changed)
    assert sorted(path.name for path in (folder.root / "photos" / "rex").iterdir()) == ["0.jpg", "2.jpg", "crops.json"]
    assert len(folder.photos("rex").photos) == 2


@pytest.mark.parametrize("size", [(96, 64), (300, 500), (64, 64)])
def test_what_is_painted_over_is_what_is_read(size):
    left, top = Image.new("L", size), Image.new("L", (24, 24))
    left.paste(255, (0, 0, size[0] // 3, size[1]))
    top.paste(255, (14, 0, 24, 8))  # of another size than the picture, as regions are
    painted = painting_of(Image.new("RGB", size, "green"), [left, top])
    assert painted["background"].size == painted["layers"][0].size == (CANVAS, CANVAS)
    for color, mask in zip(COLORS, (left, top), strict=True):
        read = np.asarray(mask_of(painted, color).resize(size)) > 127
        assert (read == (np.asarray(mask.resize(size)) > 127)).mean() > 0.97
    assert painting_of(Image.new("RGB", size), [])["layers"] == []  # nothing is painted yet
    with pytest.raises(SettingsError, match="in blue"):
        mask_of(painting_of(Image.new("RGB", size), [left]), COLORS[1])


def test_the_shelf_shows_the_file_s_picture_else_one_that_was_drawn(folder, adapter):
    blue, red = (Image.new("RGB", (64, 64), color) for color in ("#00f", "#f00"))
    for name in ("rex", "brew"):
        adapter.save(folder.adapter_file(name))
    assert thumbnail(folder, "rex") is None
    alone, both = (Making(files=files) for files in (("rex",), ("rex", "brew")))
    pictures = [lb.Picture(blue, "one", 0, making=alone), lb.Picture(red, "two", 1, making=both)]
    Album(folder.place("pictures")).save(pictures)
    assert thumbnail(folder, "rex").getpixel((9, 9)) == (0, 0, 255)  # not the newer one, of both
    assert thumbnail(folder, "brew").getpixel((9, 9)) == (255, 0, 0)
    adapter.save(folder.adapter_file("rex"), thumbnail=Image.new("RGB", (64, 64), "#0f0"))
    assert thumbnail(folder, "rex").getpixel((9, 9))[1] > 250


def test_an_adapter_is_checked_before_it_is_copied(folder, tmp_path):
    for name, content in (("a.bin", pickle.dumps(1)), ("b.safetensors", b"\0" * 40), ("c.safetensors", b"\xff" * 16)):
        (tmp_path / name).write_bytes(content)
        with pytest.raises((AdapterError, SettingsError)):
            folder.add_adapter(tmp_path / name)
    assert folder.names("adapters", ".safetensors") == []
    for name in (None, "rex", "../secret"):
        with pytest.raises(SettingsError, match="no such adapter"):
            folder.remove_adapter(name)


def test_bases_are_those_of_this_machine(folder, folders, hub, tmp_path):
    hub("somebody/tiny", folders["sd1"])
    (folder.root / "bases" / "mine").symlink_to(folders["sd2"])
    (folder.root / "bases" / "notes").mkdir()
    assert list(folder.bases()) == ["toybox", "mine", "somebody/tiny"]
    folder.choose_base("mine")
    assert folder.base == "mine" and StudioFolder(folder.root).base == "mine"
    with pytest.raises(SettingsError, match="no such base"):
        folder.choose_base("stabilityai/sdxl")


def test_the_choices_of_a_training():
    assert settings_of("standard", 5, {}) == {}
    assert settings_of("quick", 5, {}) == {"steps": 125, "class_images": 0}
    assert settings_of("careful", 5, {"rank": 16}) == {"steps": 750, "sample_every": 93, "rank": 16}
    assert settings_of("quick", 5, {"steps": 40, "class_images": 2}) == {"steps": 40, "class_images": 2}


def test_the_last_line_of_a_log(tmp_path):
    log = tmp_path / "log"
    assert last_line(log) == "starting"
    log.write_bytes(b"a\n" * 9000 + b"step 20/400  loss 0.1  0:05 left\n\n")
    assert last_line(log) == "step 20/400  loss 0.1  0:05 left" and COUNT.search(last_line(log)).groups() == ("20", "400")
    log.write_bytes(b"\x1b[31m\xff" + b"x" * 9000)
    assert len(last_line(log)) == 500 and last_line(log).isprintable()


# --- the gate ----------------------------------------------------------------------------------------------------------


def through(gate: Gate, path: str, *, method: str = "GET", cookie: str = "", query: str = "", body: bytes = b"") -> int:
    """The status of a request; 200 comes from the app behind the gate."""
    statuses = []

    async def receive() -> dict[str, Any]:
        return {"type": "http.request", "body": body, "more_body": False}

    async def send(message: dict[str, Any]) -> None:
        statuses.append(message.get("status"))

    headers = [(b"cookie", f"a=b; lora_booth_studio_7860={cookie}".encode())] if cookie else []
    scope = {"type": "http", "path": path, "method": method, "query_string": query.encode(), "headers": headers}
    asyncio.run(gate(scope | {"server": ("127.0.0.1", 7860)}, receive, send))
    return statuses[0]


async def behind(scope: Any, receive: Any, send: Any) -> None:
    await receive()
    await send({"type": "http.response.start", "status": 200, "headers": []})


@pytest.fixture
def gate(tmp_path: Path) -> Gate:
    (tmp_path / "uploads").mkdir()
    return Gate(behind, token="right", uploads=tmp_path / "uploads")


def test_every_call_needs_the_token(gate):
    for path in ("/", "/config", "/gradio_api/file=a", "/gradio_api/upload", "/assets/x.js", "/nothing", "/manifest.json"):
        for method in ("GET", "POST", "HEAD", "OPTIONS", "PUT", "DELETE"):
            assert through(gate, path, method=method) == through(gate, path, method=method, cookie="wrong") == 401
    assert through(gate, "/", query="token=wrong") == through(gate, "/config", query="token=right") == 401
    assert through(gate, "/", query="token=right") == 303
    assert through(gate, "/", cookie="right") == through(gate, "/config", cookie="right") == 200


def test_only_the_site_of_a_space_shows_it_in_a_frame(gate, tmp_path):
    there = Gate(behind, token="right", uploads=tmp_path, frame="https://huggingface.co")
    for one, ancestors, site in (
        (gate, "frame-ancestors 'none'", "; HttpOnly; SameSite=Strict"),
        (there, "frame-ancestors https://huggingface.co", "; HttpOnly; SameSite=None; Secure; Partitioned"),
    ):
        client = TestClient(one, base_url="https://a.hf.space", follow_redirects=False)
        answer = client.get("/?token=right")
        assert answer.headers["content-security-policy"].endswith(ancestors)
        assert answer.headers["set-cookie"].startswith("lora_booth_studio_None=right; Max-Age=31536000; Path=/")
        assert answer.headers["set-cookie"].endswith(site)
        assert client.get("/").status_code == 200  # by the cookie


def test_in_a_space_its_page_is_the_address(monkeypatch, tmp_path):
    monkeypatch.setattr(server_module, "app_of", lambda root: (None, "right"))
    monkeypatch.setattr(server_module, "run", lambda _, place: place.close())
    for owner, begins in (("", "http://0.0.0.0:"), ("me/pets", "https://huggingface.co/spaces/me/pets?token=right")):
        monkeypatch.setenv("SPACE_ID", owner)
        said: list[str] = []
        server_module.serve(tmp_path, host="0.0.0.0", port=0, browser=False, say=said.append)
        assert any(begins in line for line in said) and any("not encrypted" in line for line in said) == (not owner)


@pytest.mark.parametrize(
    "path",
    [
        *("/gradio_api/proxy=https://x.hf.space/a", "/gradio_api/file=https://example.com/a", "/gradio_api/file=HTTP://a/b"),
        *(
            "/monitoring/summary",
            "/login",
            "/logout",
            "/docs",
            "/openapi.json",
            "/gradio_api/openapi.json",
            "/gradio_api/token",
        ),
        *(
            "/gradio_api/run/predict",
            "/gradio_api/api/x",
            "/gradio_api/call/x",
            "/gradio_api/call/v2/x",
            "/gradio_api/deep_link",
        ),
        *("/gradio_api/vibe-edit", "/gradio_api/run-history/buckets", "/gradio_api/custom_component/a/client/b/c", "/pwa_icon"),
        *("/gradio_api/stream/x", "/gradio_api/process_recording", "/gradio_api/dev/reload", "/gradio_api/file/a"),
    ],
)
def test_routes_that_the_page_does_not_use_are_closed(gate, path):
    assert through(gate, path, cookie="right") == through(gate, path, method="POST", cookie="right") == 404


def test_a_call_names_no_file_but_an_upload(gate, tmp_path):
    inside = gate.uploads / "a.png"
    inside.write_bytes(b"")
    (gate.uploads / "link").symlink_to("/etc/passwd")
    outside = ["/etc/passwd", f"{gate.uploads}/../a", "a.png", "https://example.com/a.png", str(gate.uploads / "link"), 5]
    for path, status in [(str(inside), 200), (None, 200), *((one, 403) for one in outside)]:
        body = json.dumps({"data": [[{"image": {"path": path, "meta": {}}}]]}).encode()
        assert through(gate, "/gradio_api/queue/join", method="POST", cookie="right", body=body) == status
    for body in (b"{", b"[" * 100_000):
        assert through(gate, "/gradio_api/queue/join", method="POST", cookie="right", body=body) == 403


def test_a_page_that_is_closed_during_an_upload_is_no_error(tmp_path):
    async def app(scope: Any, receive: Any, send: Any) -> None:
        raise ClientDisconnect

    with pytest.raises(IndexError):  # no answer, and nothing else
        through(Gate(app, token="right", uploads=tmp_path), "/gradio_api/upload", method="POST", cookie="right")


# --- the server --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def server(tmp_path_factory) -> Iterator[Server]:
    pytest.importorskip("gradio")
    root = tmp_path_factory.mktemp("place") / "studio"
    (root.parent / "secret.png").write_text(OUTSIDE)
    with Server(root) as running:
        yield running
    end_trainings(root)


def end_trainings(root: Path) -> None:
    """Those that a failed test left."""
    for process in Trainings(StudioFolder(root)).training().values():
        process.kill()


def root_of(server: Server) -> Path:
    return Path(server.log.read_text().split("the studio of ")[1].split(": http")[0])


def refused(client: Client, name: str, event: str = "click") -> str:
    with pytest.raises(RuntimeError) as told:
        client.do(name, event)
    assert "Traceback" not in str(told.value) and "should not happen" not in str(told.value)
    return str(told.value)


@pytest.mark.slow
def test_nothing_outside_the_folder_is_served(server):
    root = root_of(server)
    (root / "photos" / "out.png").symlink_to(root.parent / "secret.png")
    for path in (
        root.parent / "secret.png",
        root / ".." / "secret.png",
        root / "photos" / "out.png",
        "/etc/passwd",
        root / ".token",
    ):
        status, body = server.ask(f"/gradio_api/file={path}")
        assert status == 403 and OUTSIDE not in body.decode() and server.token not in body.decode()
    (root / "photos" / "out.png").unlink()
    assert server.ask("/config", token="")[0] == 401 and oct((root / ".token").stat().st_mode)[-3:] == "600"


def test_the_settings_of_a_training_say_why_their_defaults_are_so():
    pytest.importorskip("gradio")
    from lora_booth.studio.train_tab import ADVANCED, reasons

    assert set(ADVANCED) - set(reasons()) == {"sample_every", "seed"}  # of no table
    assert reasons()["rank"].startswith(f"Default: {LoraSpec().rank} (enough for one subject: on the toybox,")
    assert not set("`[]|") & set("".join(reasons().values()))


@pytest.mark.slow
def test_the_page_asks_nothing_of_other_machines(server):
    status, page = server.ask("/")
    style = server.ask("/theme.css")[1].decode()
    loaded = re.findall(r"""(?:src|href)=["']([^"']+)|url\(([^)]+)\)""", page.decode() + style)
    assert status == 200 and not [one for pair in loaded for one in pair if re.match(r"[\"']?(https?:)?//", one)]
    assert '"analytics_enabled":false' in page.decode().replace(" ", "").lower()


AT_ONCE = """
import sys, threading, time

class Slow:
    def find_spec(self, name, path=None, target=None):
        if name == "diffusers.utils" and not inside.is_set():  # diffusers is half imported
            inside.set()
            time.sleep(0.5)

inside, done = threading.Event(), []
sys.meta_path.insert(0, Slow())
from lora_booth.base.base_model import BaseModel
from lora_booth.studio.events import plain

def load():
    BaseModel.load("toybox")

def describe():
    from diffusers import DiffusionPipeline

def call(wait, handler):
    wait()
    handler()
    done.append(True)

calls = [(lambda: None, load), (inside.wait, {second})]
threads = [threading.Thread(target=call, args=one) for one in calls]
[thread.start() for thread in threads]
[thread.join() for thread in threads]
print(len(done))
"""


@pytest.mark.slow
@pytest.mark.parametrize("second", ["load", "plain(describe)"], ids=["another thread loads", "a handler of the page"])
def test_while_one_thread_imports_diffusers_others_wait(second):
    code = AT_ONCE.replace("{second}", second)
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT, timeout=300)
    assert done.stdout == "2\n", done.stderr


@pytest.mark.slow
def test_hostile_words_end_in_one_line(server, tmp_path):
    client, root = Client(server), root_of(server)
    before = sorted(root.rglob("*"))
    for name in ("../../x", "/etc", "a/b", "<script>", "con\0"):
        client.write(Subject=name, What_it_is="dog", Token="ohwx")
        assert "needed: letters" in refused(client, "Token", "blur")
        client.write(Adapter=name)
        assert re.search("not a name|no such adapter", refused(client, "Adapter", "change"))
    page = tmp_path / "page.safetensors"
    page.write_bytes(b"<html>" * 9)
    client.write(**{"Drop .safetensors files here": client.upload(page)})
    assert "page.safetensors" in refused(client, "Drop .safetensors files here", "upload")
    assert "not a name" in refused(client, "Remove")  # no picture is chosen
    assert "no run is chosen" in refused(client, "Go on")
    client.write(Subject="rex", **{"Drop 3 to 30 photos here": client.upload(page)})
    client.do("Drop 3 to 30 photos here", "upload")
    assert "not a photo" in client.notes[0]
    assert [path for path in sorted(root.rglob("*")) if ".page" not in path.parts and path not in before] == [
        root / "photos" / "rex"
    ]
    client.write(**{"Drop 3 to 30 photos here": [{"path": "/etc/passwd", "meta": {"_type": "gradio.FileData"}}]})
    assert refused(client, "Drop 3 to 30 photos here", "upload").startswith("403")


@pytest.mark.slow
def test_hostile_files_do_what_they_do_in_the_library(server, tmp_path):
    client, root = Client(server), root_of(server)
    shelf, drop = "Drop .safetensors files here", "Drop 3 to 30 photos here"
    before = sorted((root / "adapters").iterdir())
    for number, hostile in enumerate([*headers(), *values(), *keys(), *lycoris()]):
        (tmp_path / str(number)).mkdir()
        path = hostile.build(tmp_path / str(number))
        try:
            lb.Adapter.load(path)  # a file may be for another base
        except AdapterError:
            client.write(**{shelf: client.upload(path)})
            said = html.unescape(refused(client, shelf, "upload"))
            assert said.isprintable() and hostile.says in said, hostile.name
    assert sorted((root / "adapters").iterdir()) == before

    sent = []
    for number, photo in enumerate(hostile_photos()):
        if not photo.large and photo.file.isprintable() and photo.file.isascii():
            photo.build(made := good_folder(tmp_path / f"photos-{number}"))
            file = made / photo.file
            if file.is_file() and not file.is_symlink() and file.stat().st_size < MAX_BYTES:
                sent.append(file)
    client.write(Subject="hostile", **{drop: client.upload(*sent)})
    client.do(drop, "upload")
    assert len(sent) > 60 and len(client.notes) > 20 and all(note.isprintable() for note in client.notes)
    found = StudioFolder(root).photos("hostile")
    assert len(client.value("#squares")) == len(found.photos) > 10
    assert client.value("#audit").count('class="advice"') >= len(found.skipped)


@pytest.mark.slow
def test_the_whole_way(server, photos, tmp_path):
    """From photos to a picture of two subjects, with a stop, a killed server and a second browser in between."""
    client, root = Client(server), root_of(server)
    drop = "Drop 3 to 30 photos here"
    client.write(**{drop: client.upload(*sorted(photos.iterdir()))})
    client.do(drop, "upload")
    assert "Give the subject a name above" in client.value("#audit")
    client.write(Subject="rex", What_it_is="dog")
    client.do("Subject", "change")  # which takes the photos that wait
    assert client.value(drop) is None
    assert "3 photos at 64 pixels" in client.value("#audit") and len(client.value("#squares")) == 3
    if find_spec("rembg") is None:
        assert "lora-booth[masks]" in refused(client, "Make masks for all photos (rembg; downloads its model once)")
    client.write(**{"Photo to change": "0.jpg", "Caption": "on a sofa"})
    client.do("Caption", "blur")
    assert StudioFolder(root).photo("rex", "0.jpg").caption == "on a sofa"
    client.do("Token", "blur")
    facts = json.loads((root / "photos" / "rex.json").read_text())
    token = facts["token"]
    assert facts == {"token": token, "class_noun": "dog"} and f"{token} is free" in client.value("#verdict")

    client.do("Train", "select")
    client.write(How="quick", steps=4000, sample_every=2)
    client.do("Which bases fit?")
    assert re.search(r"toybox: \S+ GB of \S+, 4000 steps at 64 px<", client.value("#forecast"))
    client.do("Does it fit, and how long?")
    assert re.search(r"4000 steps at 64 px, about \d+ min", client.value("#forecast"))
    client.write(rank=0)
    message = refused(client, "Start training")
    assert "allowed: a whole number" in message and "--" not in message  # a page has no options
    client.write(rank=None)
    (root / "photos" / "max").mkdir()
    StudioFolder(root).describe("max", token, "cat")
    assert "another subject has the token" in refused(client, "Start training")
    (root / "photos" / "max").rmdir()
    client.do("Start training")
    assert client.value("Run") == "rex"
    wait(client, lambda status: "step 2: " in status or client.value("#samples"))
    assert "rex is training" in refused(client, "Go on")
    other = Client(server)  # a second browser
    other.do("Train", "select")
    other.do("Run", "change")
    assert 'data-alive="1"' in other.value("#status")

    server.kill()
    with Server(root, server.port) as again:  # the training has gone on
        assert again.token == server.token
        client.do("#timer", "tick")  # the page that was open all the time
        assert 'data-alive="1"' in client.value("#status")
        client.do("Stop")
        stopped = wait(client, lambda status: 'data-alive="0"' in status)
        step = int(re.search(r"stopped at step (\d+) of 4000", stopped)[1])
        assert step > 0 and list((root / "runs" / "rex" / "checkpoints").iterdir())
        note = root / "runs" / "rex.json"
        settings = json.loads(note.read_text())
        note.write_text(json.dumps(settings | {"steps": step + 3}))  # make it short, as the command line would
        client.do("Go on")
        assert "finished" in wait(client, lambda status: 'data-finished="1"' in status)
        assert (root / "adapters" / "rex.safetensors").is_file() and client.value("#samples")["path"]

        brew = lb.Adapter.load(root / "adapters" / "rex.safetensors").scaled(0.9)  # a recipe tells adapters by their tensors
        brew.with_card(token="zwx", class_noun="mug").save(tmp_path / "brew.safetensors")
        shelf = "Drop .safetensors files here"
        client.write(**{shelf: client.upload(tmp_path / "brew.safetensors")})
        client.do(shelf, "upload")
        assert [one["caption"] for one in client.value("#shelf")] == ["brew", "rex"]
        client.do("Adapter", "change")
        assert client.value("Adapter") == "brew" and "zwx" in client.value("#card") and "ComfyUI" in client.value("#card")

        client.do("Play", "select")
        client.write(**{"First adapter": "rex", "Second adapter": "brew", "Denoising steps": 2, "Pictures": 1})
        client.do("First adapter", "input")
        assert client.value("Prompt") == f"a photo of {token} dog and zwx mug"
        for place in ("found", "side by side", "painted"):
            client.write(**{"Where two subjects go": place, "First seed": len(client.value("#pictures") or [])})
            if place == "painted":
                client.write(**{"#easel": None})
                assert "nothing is painted" in refused(client, "Draw")
                [layer] = client.upload(painted(tmp_path / "layer.png"))
                client.write(**{"#easel": {"background": None, "layers": [layer], "composite": None}})
            client.do("Draw")
            if place == "found":
                client.do("#picture", "change")
                client.do("#trace")
                [found] = client.value("#easel")["layers"]
                assert Image.open(found["path"]).getbbox()
        files = sorted(path.name for path in (root / "pictures").glob("*.png"))
        assert len(files) == len(client.value("#pictures")) == 3
        kept = (root / "pictures" / client.value("#picture")).read_bytes()
        client.do("#picture", "change")
        assert f"a photo of {token} dog and zwx mug" in client.value("#how")
        assert f"{token} dog, zwx mug" in client.value("#words")
        client.do("Redraw")
        assert sorted(path.name for path in (root / "pictures").glob("*.png")) == files  # the same to the byte
        assert (root / "pictures" / client.value("#picture")).read_bytes() == kept

        client.do("Draw the comparison")
        client.write(**{"Second adapter": "none", "What to compare": BY_STEP})
        client.do("Draw the comparison")
        assert len(list((root / "pictures").glob("grid*.png"))) == 2
        client.do("#page")
        assert (root / "pictures" / "gallery.html").stat().st_size > 5000

        for button, made in (("Convert", "brew-peft"), ("Resize", "brew-rank4")):
            client.write(Adapter="brew")
            client.do(button)
            assert client.value("Adapter") == "brew" and (root / "adapters" / f"{made}.safetensors").is_file()
        client.write(**{"Adapter": "brew", "Other adapter": "rex"})
        client.do("Merge with it")
        assert client.value("Adapter") == "brew" and (root / "adapters" / "brew-rex.safetensors").is_file()
        client.write(Adapter="brew")
        client.do("Make a folder for the Hub")
        [sent] = (root / "shared" / "brew").glob("*.safetensors")
        assert (root / "shared" / "brew" / "README.md").is_file() and thumbnail_of(sent) is not None  # of a picture above
        client.write(Adapter="brew-rank4")
        assert "'Yes' first" in html.unescape(refused(client, "Delete"))
        client.write(**{"Yes, delete this adapter": True})
        client.do("Delete")
        assert not (root / "adapters" / "brew-rank4.safetensors").exists()
        client.write(**{"First adapter": "brew-rank4", "Second adapter": "brew"})
        client.do("Play", "select")
        assert (client.value("First adapter"), client.value("Second adapter")) == ("none", "brew")
        assert "'Yes' first" in html.unescape(refused(client, "Start anew"))
        StudioFolder(root).describe("rex", "sks", "dog")
        yes = "Yes, discard what this run has"
        client.write(**{yes: True})
        client.do("Start anew")
        assert json.loads(note.read_text())["token"] == "sks" and client.value(yes) is False  # what it is called now
        assert 'data-alive="1"' in wait(client, lambda status: "step 1 " in status or 'data-alive="1"' in status)
        client.do("Stop")
        wait(client, lambda status: 'data-alive="0"' in status)
        client.write(**{yes: True})
        client.do("Remove the run")
        client.write(**{"Photo to change": "2.jpg"})
        client.do("Remove the photo")
        assert len(StudioFolder(root).photos("rex").photos) == 2 and client.value("Photo to change") is None  # not the next one
        assert not (root / "runs" / "rex").exists() and (root / "adapters" / "rex.safetensors").is_file()
        assert "Traceback" not in again.log.read_text()


def wait(client: Client, done: Any, seconds: float = 300) -> str:
    """Look at the run until its status is so."""
    end = time.monotonic() + seconds
    while True:
        client.do("#timer", "tick")
        status = str(client.value("#status"))
        if done(status):
            return status
        assert time.monotonic() < end and "error" not in status, status
        time.sleep(0.5)


def painted(file: Path) -> Path:
    """Orange to the left and blue to the right, on nothing."""
    pixels = np.zeros((64, 64, 4), np.uint8)
    pixels[10:50, 4:26] = (0xE4, 0x57, 0x2E, 255)
    pixels[10:50, 36:60] = (0x2E, 0x86, 0xAB, 255)
    Image.fromarray(pixels).save(file)
    return file


# --- a training's process ----------------------------------------------------------------------------------------------


@pytest.mark.slow
def test_a_training_that_fails_says_why_in_one_line(folder, photos):
    folder.add_photos("my rex", sorted(photos.iterdir()))
    with pytest.raises(SubjectError, match="more than a noun"):
        folder.describe("my rex", "ohwx", "a dog")
    folder.describe("my rex", "ohwx", "dog")
    trainings = Trainings(folder)
    trainings.start("my rex", "my rex", str(folder.root / "bases" / "gone"), {"steps": 1})
    with pytest.raises(TrainingError, match="rex is training"):
        trainings.start("rex-2", "my rex", "toybox", {})
    end = time.monotonic() + 300
    while "my rex" in trainings.training():
        assert time.monotonic() < end
        time.sleep(0.2)
    state = trainings.state("my rex")
    assert not state.alive and state.line.startswith("error: ") and "no such folder or file" in state.line
    with pytest.raises(SettingsError, match="there is a run 'my rex'"):
        trainings.start("my rex", "my rex", "toybox", {})
    folder.adapter_file("friend").write_bytes(b"of somebody else")
    with pytest.raises(SettingsError, match="there is an adapter 'friend'"):
        trainings.start("friend", "my rex", "toybox", {})
    (folder.root / "runs" / "my rex.json").write_text('["rm", "-rf"]')  # nothing but settings of a training is obeyed
    trainings.again("my rex")
    while "my rex" in trainings.training():
        assert time.monotonic() < end
        time.sleep(0.2)
    assert "not a table of settings" in trainings.state("my rex").line
    for name in ("gone", "../rex"):
        with pytest.raises(SettingsError, match="no such run"):
            trainings.again(name)
    trainings.remove("my rex")
    assert trainings.names() == []


@pytest.mark.parametrize(
    ("status", "failed", "line"),
    [
        ("finished", False, "finished: 3 steps"),
        ("stopped by SIGTERM", False, "stopped at step 3 of 9"),
        ("interrupted by KeyboardInterrupt", False, "stopped at step 3 of 9"),
        ("interrupted by OutOfMemoryError", True, "The log ends with: torch.OutOfMemoryError: CUDA"),
        ("stopped by an error", True, "The log ends with: torch.OutOfMemoryError: CUDA"),
        ("running", True, "The log ends with: torch.OutOfMemoryError: CUDA"),
    ],
)
def test_a_run_that_ended_by_itself_does_not_look_stopped(folder, status, failed, line):
    runs = folder.root / "runs"
    (runs / "rex").mkdir()
    (runs / "rex.json").write_text("{}")
    (runs / "rex.log").write_text("step 3/9\ntorch.OutOfMemoryError: CUDA\n")
    (runs / "rex" / RECORD).write_text(json.dumps({"format": FORMAT, "status": status, "step": 3, "steps": 9}))
    state = Trainings(folder).state("rex")
    assert (state.alive, state.failed, state.finished) == (False, failed, status == "finished") and line in state.line
    (runs / "rex" / RECORD).unlink()
    state = Trainings(folder).state("rex")
    assert state.failed and "ended early" in state.line
    (runs / "rex.log").write_text("")
    state = Trainings(folder).state("rex")  # in another browser, before the process is there
    assert not state.failed and state.line == "starting"


def test_a_new_name_is_neither_a_run_s_nor_an_adapter_s(folder, adapter):
    (folder.root / "runs" / "rex.json").write_text("{}")
    file = adapter.save(folder.root.parent / "rex.safetensors")
    assert [folder.add_adapter(file), folder.add_adapter(file)] == ["rex-2", "rex-3"]
    assert folder.free_name("rex") == "rex-4" and folder.free_name("brew") == "brew"
