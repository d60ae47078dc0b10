"""Nothing private of a photo leaves the house, and every picture that a model made says so.

Strings are planted wherever a photo, its name, its folder and its caption can carry them; then every output of the whole
path is searched, also what is packed in it: zip, zlib, PNG chunks, base64.
"""

from __future__ import annotations

import base64
import io
import json
import re
import struct
import zipfile
import zlib
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers.pipelines.stable_diffusion.safety_checker import StableDiffusionSafetyChecker
from PIL import Image, ImageCms, PngImagePlugin
from pipelines import make_pipeline, save
from transformers import CLIPConfig

from lora_booth.base.ai_mark import save_picture
from lora_booth.base.base_model import BaseModel
from lora_booth.cache import cache_folder
from lora_booth.config import TrainingConfig
from lora_booth.pictures.composition import Composition
from lora_booth.pictures.gallery import Gallery
from lora_booth.pictures.picture import Picture
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject

MARK = b"trainedAlgorithmicMedia"
GPS_SECONDS = (714_285_713, 1_000_003)  # a fraction that nothing else has
WORDS = [
    *(
        "exifmake",
        "exifcomment",
        "gpsarea",
        "xmpword",
        "jpegcomment",
        "iptccaption",
        "iccname",
        "pngtext",
        "pngitxt",
        "pngztxt",
    ),
    *("filename", "foldername", "captionword", "maskword", "basefolder"),
]
SECRETS = {word: f"Zq7{word}Xv9" for word in WORDS}


def exif_block() -> Image.Exif:
    block = Image.Exif()
    block[0x010F] = SECRETS["exifmake"]
    block.get_ifd(0x8769)[0x9286] = b"ASCII\0\0\0" + SECRETS["exifcomment"].encode()
    gps = block.get_ifd(0x8825)
    gps[1], gps[28] = "N", b"ASCII\0\0\0" + SECRETS["gpsarea"].encode()
    gps[2] = (52.0, 31.0, GPS_SECONDS[0] / GPS_SECONDS[1])
    return block


def profile() -> bytes:
    """sRGB with a name of its own."""
    data = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    name = "sRGB built-in".encode("utf-16-be")
    assert name in data
    return data.replace(name, SECRETS["iccname"][: len(name) // 2].ljust(13).encode("utf-16-be"))


def with_iptc(jpeg: bytes) -> bytes:
    caption = SECRETS["iptccaption"].encode()
    record = b"\x1c\x02\x78" + struct.pack(">H", len(caption)) + caption
    block = b"Photoshop 3.0\x008BIM\x04\x04\0\0" + struct.pack(">I", len(record)) + record + b"\0" * (len(record) % 2)
    return jpeg[:2] + b"\xff\xed" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


def plant(folder: Path) -> Path:
    """Three photos with a secret in every place that one can have, captions and a mask."""
    rex = folder / SECRETS["foldername"]
    rex.mkdir(parents=True)
    rng = np.random.default_rng(3)
    images = [Image.fromarray(rng.integers(0, 256, (80, 96, 3), dtype=np.uint8)) for _ in range(3)]
    names = [f"{SECRETS['filename']}{i}" for i in range(3)]
    xmp = f"<x:xmpmeta xmlns:x='adobe:ns:meta/'>{SECRETS['xmpword']}</x:xmpmeta>".encode()
    buffer = io.BytesIO()
    images[0].save(buffer, "JPEG", exif=exif_block(), xmp=xmp, comment=SECRETS["jpegcomment"].encode(), icc_profile=profile())
    (rex / f"{names[0]}.jpg").write_bytes(with_iptc(buffer.getvalue()))
    info = PngImagePlugin.PngInfo()
    info.add_text("Comment", SECRETS["pngtext"])
    info.add_itxt("Title", SECRETS["pngitxt"], zip=True)
    info.add_text("Author", SECRETS["pngztxt"] * 9, zip=True)
    images[1].save(rex / f"{names[1]}.png", pnginfo=info, exif=exif_block(), icc_profile=profile())
    images[2].save(rex / f"{names[2]}.webp", exif=exif_block(), xmp=xmp, icc_profile=profile(), lossless=True)
    (rex / f"{names[0]}.txt").write_text(f"a dog at /home/{SECRETS['captionword']}/Pictures")
    mask, info = Image.new("L", (96, 80), 255), PngImagePlugin.PngInfo()
    info.add_text("Comment", SECRETS["maskword"])
    mask.save(rex / f"{names[0]}.mask.png", pnginfo=info)
    return rex


def unpacked(data: bytes, depth: int = 0) -> Iterator[bytes]:
    """`data` and everything that is packed in it."""
    yield data
    if depth > 4:
        return
    if data[:4] == b"PK\3\4":
        with zipfile.ZipFile(io.BytesIO(data)) as archive:
            for member in archive.infolist():
                yield member.filename.encode()
                yield from unpacked(archive.read(member), depth + 1)
    elif data[:8] == b"\x89PNG\r\n\x1a\n":
        at = 8
        while at + 8 <= len(data):
            size, name = struct.unpack(">I4s", data[at : at + 8])
            body = data[at + 8 : at + 8 + size]
            at += 12 + size
            if name != b"IDAT":  # pixels are pixels
                for start in {0, *(body.find(b"\0", i) + 1 for i in range(min(len(body), 100)) if b"\0" in body[i:])}:
                    for skip in (0, 1, 2, 3, 4):
                        yield from inflated(body[start + skip :], depth)
    else:
        for run in re.findall(rb"[A-Za-z0-9+/_-]{16,}={0,2}", data):
            try:
                yield from unpacked(base64.b64decode(run + b"=" * (-len(run) % 4), altchars=None), depth + 1)
            except ValueError:
                pass


def inflated(body: bytes, depth: int) -> Iterator[bytes]:
    if body[:1] != b"x":
        return
    try:
        yield from unpacked(zlib.decompress(body), depth + 1)
    except zlib.error:
        pass


def secrets_in(data: bytes) -> set[str]:
    found = set()
    for part in unpacked(data):
        lowered = part.lower()
        for word, secret in SECRETS.items():
            forms = (secret.lower(), secret[:13].lower()) if word == "iccname" else (secret.lower(),)
            if any(form.encode(code) in lowered for form in forms for code in ("utf-8", "utf-16-le", "utf-16-be")):
                found.add(word)
        for order in "<>":
            if struct.pack(f"{order}II", *GPS_SECONDS) in part or struct.pack(f"{order}I", GPS_SECONDS[0]) in part:
                found.add("gps seconds")
    return found


def files_of(*places: Path) -> list[Path]:
    return [path for place in places for path in ([place] if place.is_file() else sorted(place.rglob("*"))) if path.is_file()]


@pytest.fixture(scope="module")
def house(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Everything that the whole path writes, and everything that it prints."""
    import contextlib

    root = tmp_path_factory.mktemp("privacy")
    rex = plant(root / "photos")
    base = BaseModel.load(save("sd1", root / SECRETS["basefolder"] / "tiny"))
    out, said = root / "out", io.StringIO()
    with pytest.MonkeyPatch.context() as patch, contextlib.redirect_stdout(said), contextlib.redirect_stderr(said):
        patch.setenv("LORA_BOOTH_CACHE", str(out / "cache"))
        subject = Subject.from_folder(rex, token="sks", class_noun="dog", templates=[f"{{token}} at {SECRETS['captionword']}"])
        config = TrainingConfig(steps=2, class_images=2, sample_every=1, sample_prompt="a photo of sks dog", resolution=64)
        adapter = train(base, subject, config=config, out=out / "run")
        class_pictures = files_of(cache_folder())
    assert class_pictures
    pictures = Composition(base, [adapter]).generate("a photo of sks dog", seeds=[0, 1], steps=2)
    adapter.save(out / "kohya.safetensors", thumbnail=rex / f"{SECRETS['filename']}0.jpg")
    adapter.save(out / "peft.safetensors", layout="peft")
    adapter.save_folder(out / "share", pictures=pictures, thumbnail=rex / f"{SECRETS['filename']}1.png")
    for ending in ("png", "jpg", "webp"):
        pictures[0].save(out / f"picture.{ending}")
        Gallery(pictures).save(out / f"gallery.{ending}")
    Gallery(pictures).save(out / "gallery.html")
    dirty = Image.open(rex / f"{SECRETS['filename']}0.jpg")  # a picture that still carries what its file had
    for ending in ("png", "jpg", "webp"):
        Picture(dirty, "a dog", 0).save(out / f"dirty.{ending}")
    Gallery([Picture(dirty, "a dog", 0)]).save(out / "dirty.html")
    return out, said.getvalue()


def test_the_search_finds_what_is_planted(tmp_path: Path) -> None:
    rex = plant(tmp_path)
    found: set[str] = set()
    for path in files_of(rex):
        found |= secrets_in(path.read_bytes()) | secrets_in(str(path).encode())
    assert found == {*SECRETS, "gps seconds"} - {"basefolder"}
    inside = io.BytesIO()
    with zipfile.ZipFile(inside, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.write(rex / f"{SECRETS['filename']}1.png", "a.png")
    page = b'<img src="data:image/png;base64,' + base64.b64encode(inside.getvalue()) + b'">'
    assert SECRETS["pngztxt"].encode() not in page
    assert {"pngtext", "pngitxt", "pngztxt", "exifmake", "iccname"} <= secrets_in(page)


@pytest.mark.slow
def test_nothing_private_in_any_output(house: tuple[Path, str]) -> None:
    out, said = house
    files = files_of(out)
    assert len(files) >= 20
    assert {"run.json", "gallery.html", "README.md", "kohya.safetensors"} <= {path.name for path in files}
    leaks = {str(path.relative_to(out)): found for path in files if (found := secrets_in(path.read_bytes()))}
    assert leaks == {}
    assert secrets_in("\n".join(str(path.relative_to(out)) for path in files).encode()) == set()
    assert "3 photos" in said and secrets_in(said.encode()) == set()


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError(2, "No such file or directory", "/home/jane/diary"),
        ValueError("cannot use /home/jane/diary/x.log"),
        ValueError("in 'C:\\Users\\jane doe\\diary': \x1b[31mno\nway"),
    ],
)
def test_what_others_say_of_paths_is_not_recorded(error: Exception, photos: Path, tmp_path: Path) -> None:
    """A tracker's error, which is an event of the run, and told as such in its report."""
    from accelerate.tracking import GeneralTracker
    from faults import CONFIG, LORA, subject, tiny

    class Broken(GeneralTracker):
        name, requires_logging_directory, tracker = "broken", False, None

        def store_init_configuration(self, values: dict[str, Any]) -> None:
            raise error

        def log(self, values: dict[str, Any], step: int | None = None, **more: Any) -> None: ...

    config = replace(CONFIG, steps=2)
    train(tiny(), subject(photos), lora=LORA, config=config, out=tmp_path, track=Broken(), progress=False)
    record = (tmp_path / "run.json").read_text()
    [event] = json.loads(record)["events"]
    assert event["what"].startswith("tracker broken is no longer used: ") and event["what"].isprintable()
    for file in files_of(tmp_path):
        assert b"jane" not in file.read_bytes() and b"diary" not in file.read_bytes()


def test_an_adapter_that_cannot_be_written_is_told_without_its_place(photos: Path, tmp_path: Path) -> None:
    from lora_booth.errors import AdapterNonFinite
    from lora_booth.training.run_folder import why

    assert why(AdapterNonFinite("not finite", tmp_path / "jane\n" / "a.safetensors")) == "not finite"
    assert why(PermissionError(13, "Permission denied", "/home/jane")) == "Permission denied"


@pytest.mark.slow
def test_the_card_has_token_and_class_only(house: tuple[Path, str]) -> None:
    from lora_booth.adapters.adapter import Adapter

    card = Adapter.load(house[0] / "kohya.safetensors").card
    assert (card.token, card.class_noun, card.prompt, card.base_model) == ("sks", "dog", "sks dog", "tiny")
    assert card.consent == "not stated"


def pictures_in(path: Path) -> Iterator[bytes]:
    """The bytes of a picture file, or of every picture in a page."""
    data = path.read_bytes()
    if path.suffix == ".html":
        for encoded in re.findall(rb"data:image/(?:png|jpeg|webp);base64,([A-Za-z0-9+/=]+)", data):
            yield base64.b64decode(encoded)
    else:
        yield data


@pytest.mark.parametrize("ending", ["png", "jpg", "webp"])
def test_a_sheet_of_photos_is_not_marked(ending: str, tmp_path: Path) -> None:
    """Nobody generated it. Nothing of a photo's metadata is in it either."""
    image = Image.new("RGB", (32, 32), "red")
    image.info["comment"] = "secret"
    content = save_picture(image, tmp_path / f"a.{ending}", generated=False).read_bytes()
    assert MARK not in content and b"secret" not in content
    assert MARK in save_picture(image, tmp_path / f"a.{ending}").read_bytes()


def test_every_made_picture_is_marked(house: tuple[Path, str]) -> None:
    out, _ = house
    files = [path for path in files_of(out) if path.suffix in (".png", ".jpg", ".webp", ".html")]
    kinds = {path.relative_to(out).parts[0] for path in files}
    assert {"run", "share", "gallery.html", "gallery.png", "picture.jpg", "picture.webp"} <= kinds
    for path in files:
        pictures = list(pictures_in(path))
        assert pictures, path
        photos = re.findall(rb',([A-Za-z0-9+/=]+)" alt="photo ', path.read_bytes())  # in the report
        photos = pictures if "crops" in path.parts else [base64.b64decode(one) for one in photos]  # nobody made these
        assert bool(photos) == (path.name == "report.html" or "crops" in path.parts)
        assert not any(MARK in data for data in photos)
        for data in (one for one in pictures if one not in photos):
            assert MARK in data, f"{path.relative_to(out)} is not marked"
            with Image.open(io.BytesIO(data)) as image:
                image.load()
                assert set(image.info) <= {
                    "xmp",
                    "XML:com.adobe.xmp",
                    "jfif",
                    "jfif_version",
                    "jfif_unit",
                    "jfif_density",
                    *TIMES,
                }


TIMES = ("background", "timestamp", "duration", "loop")  # what Pillow says of any WebP


def test_contact_sheets_of_made_pictures_are_marked_and_photos_are_not(tmp_path: Path) -> None:
    image = Image.new("RGB", (64, 64), "red")
    for ending in ("png", "jpeg", "webp"):
        assert MARK in Gallery([Picture(image, "a dog", 0)] * 3).save(tmp_path / f"a.{ending}").read_bytes()
        assert MARK in save_picture(image, tmp_path / f"b.{ending}").read_bytes()
    subject = Subject.from_folder(plant(tmp_path), token="sks", class_noun="dog")
    sheet = subject.audit(resolution=64).sheet()
    sheet.save(tmp_path / "sheet.png")
    assert MARK not in (tmp_path / "sheet.png").read_bytes()  # these are photos
    assert secrets_in((tmp_path / "sheet.png").read_bytes()) == set()


# --- the safety checker --------------------------------------------------------------------------------------------


def pipeline_with_checker(threshold: float) -> Any:
    """A pipeline whose checker finds fault with every picture (-2) or with none (2)."""
    from diffusers import StableDiffusionPipeline

    vision = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    config = CLIPConfig(vision_config=vision | {"image_size": 32, "patch_size": 16}, projection_dim=8)
    checker = StableDiffusionSafetyChecker(config).eval()
    with torch.no_grad():
        for name in ("concept_embeds_weights", "special_care_embeds_weights"):
            getattr(checker, name).fill_(threshold)
    parts = make_pipeline("sd1").components | {"safety_checker": checker, "feature_extractor": extractor()}
    return StableDiffusionPipeline(**parts, requires_safety_checker=True)


def extractor() -> Any:
    from transformers import CLIPImageProcessor

    return CLIPImageProcessor(size={"shortest_edge": 32}, crop_size={"height": 32, "width": 32})


@pytest.mark.parametrize(("threshold", "black"), [(-2.0, True), (2.0, False)])
def test_the_safety_checker_stays_on(threshold: float, black: bool) -> None:
    pipeline = pipeline_with_checker(threshold)
    checker = pipeline.safety_checker
    base = BaseModel.from_pipeline(pipeline)
    picture = Composition(base).generate("a photo of sks dog", seeds=[0], steps=2, size=64)[0]
    assert bool(np.asarray(picture.image).max() == 0) is black
    assert base.pipeline is pipeline and pipeline.safety_checker is checker


def test_a_folder_keeps_its_safety_checker(tmp_path: Path) -> None:
    pipeline_with_checker(-2.0).save_pretrained(tmp_path / "checked")
    base = BaseModel.load(tmp_path / "checked", dtype=torch.float32, device="cpu")
    assert base.pipeline.safety_checker is not None
    picture = Composition(base).generate("a photo of sks dog", seeds=[0], steps=2, size=64)[0]
    assert np.asarray(picture.image).max() == 0
