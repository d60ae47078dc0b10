"""Masks that are made: by a segmenter of the user's, and by rembg (a stand-in here: its model would be downloaded)."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image
from typer.testing import CliRunner

import lora_booth as lb
from lora_booth.cli.app import app
from lora_booth.errors import MissingExtraError, PhotoError
from lora_booth.photos.cropping import crop_photo
from lora_booth.photos.finding import find_photos
from lora_booth.photos.segmenting import make_masks


def mug(width: int = 420, height: int = 320, at: tuple[int, int] = (200, 160), seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """A round red thing with a stripe in front of a grainy wall, and where it is."""
    rng = np.random.default_rng(seed)
    values = np.full((height, width, 3), (90, 120, 110), dtype=np.float64) + rng.normal(0, 8, (height, width, 3))
    down, right = np.mgrid[:height, :width]
    shape = ((right - at[0]) / 80) ** 2 + ((down - at[1]) / 95) ** 2 < 1
    values[shape] = (205, 60, 40)
    values[shape & (abs(down - at[1]) < 14)] = (240, 220, 60)
    values[shape] += rng.normal(0, 8, (int(shape.sum()), 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)), shape


def same(mask: Image.Image, shape: np.ndarray) -> float:
    """Intersection over union of a mask and the truth."""
    found = np.asarray(mask.resize(shape.shape[::-1])) >= 128
    return float((found & shape).sum() / (found | shape).sum())


def red_parts(image: Image.Image) -> Image.Image | None:
    """A segmenter that knows what the mug is: whatever is redder than the wall. None: nothing is."""
    red, green, blue = (np.asarray(band, dtype=np.int16) for band in image.split())
    found = red - blue > 60
    return Image.fromarray((found * 255).astype(np.uint8)) if found.mean() > 0.01 else None


@pytest.fixture
def rembg(monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """A stand-in with rembg's two functions, whose only model finds what is red."""
    calls = SimpleNamespace(models=[], images=[])

    def remove(data: Image.Image, *, session: str, only_mask: bool) -> Image.Image:
        assert session == "the session" and only_mask
        calls.images.append((data.mode, data.size))
        return red_parts(data) or Image.new("L", data.size)

    def new_session(name: str) -> str:
        calls.models.append(name)
        return "the session"

    monkeypatch.setitem(sys.modules, "onnxruntime", SimpleNamespace())
    monkeypatch.setitem(sys.modules, "rembg", SimpleNamespace(new_session=new_session, remove=remove))
    return calls


# --- rembg ----------------------------------------------------------------------------------------------------------


def test_rembg_makes_the_masks(tmp_path: Path, rembg: SimpleNamespace) -> None:
    for index in range(3):
        mug(seed=index)[0].save(tmp_path / f"{index}.png")
    assert [one.reason for one in lb.make_masks(tmp_path)] == [None] * 3
    assert rembg.models == ["u2net"]  # one session, and not rembg's default model, whose licence is not free
    assert rembg.images == [("RGB", (420, 320))] * 3
    with Image.open(tmp_path / "0.mask.png") as mask:
        assert same(mask, mug()[1]) > 0.95


@pytest.mark.parametrize("missing", ["rembg", "onnxruntime"])  # without onnxruntime, importing rembg ends the program
def test_without_rembg(tmp_path: Path, rembg: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, missing: str) -> None:
    mug()[0].save(tmp_path / "a.png")
    monkeypatch.setitem(sys.modules, missing, None)
    with pytest.raises(MissingExtraError, match=r"^making masks needs an optional package; pip install 'lora-booth\[masks\]'$"):
        make_masks(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]
    Image.fromarray(mug()[1]).save(tmp_path / "a.mask.png")
    assert find_photos(tmp_path, masks="auto", minimum=1).photos[0].mask  # nothing is left to do for it


def test_a_model_that_cannot_be_downloaded(tmp_path: Path, rembg: SimpleNamespace, monkeypatch: pytest.MonkeyPatch) -> None:
    mug()[0].save(tmp_path / "a.png")

    def offline(name: str) -> None:
        raise ConnectionError("Failed to resolve 'github.com'")

    monkeypatch.setattr(sys.modules["rembg"], "new_session", offline)
    with pytest.raises(
        PhotoError, match=r"^rembg's model u2net cannot be .*resolve 'github.com'\); .*or pass a segmenter of your own"
    ):
        make_masks(tmp_path)


def test_it_is_not_imported_before_it_is_needed(tmp_path: Path) -> None:
    mug()[0].save(tmp_path / "a.png")
    code = (
        "import sys; sys.modules['rembg'] = sys.modules['onnxruntime'] = None\n"
        "from lora_booth.photos.finding import find_photos; from lora_booth.photos.segmenting import make_masks\n"
        f"assert find_photos({str(tmp_path)!r}, minimum=1).photos\n"
        f"assert make_masks({str(tmp_path)!r}, segmenter=lambda image: None)[0].reason"
    )
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


# --- masks ----------------------------------------------------------------------------------------------------------


def test_make_masks(tmp_path: Path) -> None:
    (first, shape), (second, _), (third, _) = mug(), mug(at=(230, 150), seed=1), mug(at=(210, 170), seed=2)
    first.save(tmp_path / "a.jpg", quality=95)
    second.save(tmp_path / "b.png")
    third.save(tmp_path / "c.png")
    third.save(tmp_path / "c.bmp")
    Image.new("RGB", (300, 200), "green").save(tmp_path / "d.png")
    Image.effect_noise((300, 200), 60).save(tmp_path / "c2.png")
    own = Image.new("L", second.size)
    own.paste(255, (10, 10, 100, 100))
    own.save(tmp_path / "b.mask.png")
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    said: list[str] = []
    made = {one.photo.path.name: one for one in make_masks(tmp_path, segmenter=red_parts, say=said.append)}
    assert {name: one.reason for name, one in made.items()} == {
        "a.jpg": None,
        "b.png": "has a mask already",
        "c.bmp": None,  # its copy, c.png, is not used
        "c2.png": "the segmenter found no clear subject",
        "d.png": "the segmenter found no clear subject",
    }
    assert sorted(said) == [
        "a.jpg: wrote a.mask.png",
        "b.png: has a mask already",
        "c.bmp: wrote c.mask.png",
        "c2.png: the segmenter found no clear subject",
        "d.png: the segmenter found no clear subject",
    ]
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after.pop(name) for name in before} == before and set(after) == {"a.mask.png", "c.mask.png"}
    with Image.open(tmp_path / "a.mask.png") as written:
        assert written.mode == "L" and written.size == first.size and written.info == {}
        assert same(written, shape) > 0.95
    found = find_photos(tmp_path)
    assert [one.mask is not None for one in found.photos] == [True, True, False, True, False]
    square = crop_photo(found.photos[0], [(256, 256)])
    assert square.mask is not None and np.asarray(square.mask).mean() / 255 == pytest.approx(shape.sum() / 320**2, abs=0.02)
    assert [one.reason for one in make_masks(tmp_path, segmenter=red_parts)].count("has a mask already") == 3


def test_a_mask_lies_where_the_crop_does(tmp_path: Path) -> None:
    """A photo between black bars, turned by its EXIF tag: the mask is of the upright photo, black on the bars."""
    picture, shape = mug()
    framed = Image.new("RGB", (picture.width, picture.height + 120))
    framed.paste(picture, (0, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    framed.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert make_masks(tmp_path, segmenter=red_parts)[0].reason is None
    with Image.open(tmp_path / "a.mask.png") as mask:
        assert mask.size == framed.size
        values = np.asarray(mask)
        assert values[:58].max() == values[-58:].max() == 0
        assert same(mask, np.pad(shape, ((60, 60), (0, 0)))) > 0.95


def test_a_large_photo_gets_a_smaller_mask(tmp_path: Path) -> None:
    picture, shape = mug()
    picture.resize((2520, 1920)).save(tmp_path / "a.jpg")
    make_masks(tmp_path, segmenter=red_parts)
    with Image.open(tmp_path / "a.mask.png") as mask:
        assert mask.size == (1024, 780) and same(mask, shape) > 0.95
    assert find_photos(tmp_path, minimum=1).photos[0].mask is not None


def test_photos_that_would_share_a_mask(tmp_path: Path) -> None:
    mug()[0].save(tmp_path / "a.png")
    mug(at=(150, 150))[0].save(tmp_path / "a.jpg")
    reasons = [one.reason for one in make_masks(tmp_path, segmenter=red_parts)]
    assert reasons == ["another photo would have the same mask, a.mask.png; rename one"] * 2


def test_a_segmenter_of_the_user(tmp_path: Path) -> None:
    for index in range(3):
        mug(seed=index)[0].save(tmp_path / f"{index}.png")
    seen: list[Image.Image] = []

    def segment(image: Image.Image) -> Image.Image | None:
        seen.append(image)
        mask = Image.new("RGBA", (21, 16))  # small, transparent around the subject
        mask.paste((255, 255, 255, 255), (5, 3, 15, 12))
        return mask if len(seen) == 1 else None if len(seen) == 2 else Image.new("L", image.size, 255)

    made = lb.make_masks(tmp_path, segmenter=segment)
    assert [one.reason for one in made] == [
        None,
        "the segmenter found no clear subject",
        "the segmenter took 100.0% of the photo for the subject",
    ]
    assert [(image.mode, image.size) for image in seen] == [("RGB", (420, 320))] * 3
    with Image.open(tmp_path / "0.mask.png") as mask:
        assert mask.size == (420, 320) and mask.getpixel((200, 150)) == 255 and mask.getpixel((20, 20)) == 0
    with pytest.raises(PhotoError, match=r"^mask of 1\.png: 50x50 px for 420x320; it must have the shape"):
        make_masks(tmp_path, segmenter=lambda image: Image.new("L", (50, 50), 255))


def test_a_folder_that_cannot_be_written(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mug()[0].save(tmp_path / "a.png")

    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("lora_booth.files.os.replace", full)
    with pytest.raises(PhotoError, match=r"a\.mask\.png: cannot be written \(No space left on device\)"):
        make_masks(tmp_path, segmenter=red_parts)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_command(tmp_path: Path, rembg: SimpleNamespace) -> None:
    for index in range(3):
        mug(at=(180 + 20 * index, 160), seed=index)[0].save(tmp_path / f"{index}.png")
    (tmp_path / "1.mask.png").write_bytes(b"")  # the user's, and broken
    result = CliRunner().invoke(app, ["photos", str(tmp_path), "--make-masks"])
    assert isinstance(result.exception, PhotoError) and "mask 1.mask.png" in str(result.exception)
    assert (tmp_path / "1.mask.png").read_bytes() == b""
    (tmp_path / "1.mask.png").unlink()
    result = CliRunner().invoke(app, ["photos", str(tmp_path), "--make-masks"])
    assert result.exit_code == 0, result.output
    assert [line for line in result.output.splitlines() if line.startswith("mask")] == [
        f"mask     {index}.png: wrote {index}.mask.png" for index in range(3)
    ]
    assert "3 used, 0 skipped" in result.output
