"""What OpenCV does: faces for the crop, masks by GrabCut. Pictures are drawn here."""

from __future__ import annotations

import builtins
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image, ImageDraw, ImageFilter
from typer.testing import CliRunner

import lora_booth as lb
from lora_booth.cli.app import app
from lora_booth.errors import PhotoError
from lora_booth.photos import faces, photo
from lora_booth.photos.cropping import focus_of
from lora_booth.photos.faces import face_of
from lora_booth.photos.finding import find_photos
from lora_booth.photos.opencv import load_opencv
from lora_booth.photos.segmenting import grabcut, make_masks
from lora_booth.photos.square import training_square

REAL_PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "dreambooth"


def draw_face(picture: Image.Image, left: int, top: int, side: int) -> None:
    """A face of `side` pixels, as much as a detector of faces asks for."""
    face = picture.crop((left, top, left + side, top + side))
    pen = ImageDraw.Draw(face)

    def oval(x0: float, y0: float, x1: float, y1: float, colour: tuple[int, int, int]) -> None:
        pen.ellipse([v * side / 100 for v in (x0, y0, x1, y1)], fill=colour)

    oval(8, -8, 92, 70, (50, 35, 25))  # hair, skin, hair
    oval(14, 4, 86, 98, (222, 180, 150))
    oval(18, 2, 82, 26, (60, 40, 30))
    for x in (33, 67):  # brows, eyes
        oval(x - 12, 34, x + 12, 40, (70, 45, 35))
        oval(x - 10, 41, x + 10, 50, (120, 80, 60))
        oval(x - 4, 42, x + 4, 50, (30, 20, 20))
    oval(44, 56, 56, 66, (190, 140, 115))  # nose, mouth
    oval(44, 63, 49, 67, (130, 85, 70))
    oval(51, 63, 56, 67, (130, 85, 70))
    oval(35, 74, 65, 83, (150, 70, 65))
    picture.paste(face.filter(ImageFilter.GaussianBlur(side / 60)), (left, top))


def portrait(left: int = 40, side: int = 160, size: tuple[int, int] = (640, 360)) -> Image.Image:
    """A face before a calm wall, and something shrill at the other end that draws the eye."""
    picture = Image.new("RGB", size, (120, 130, 140))
    pen = ImageDraw.Draw(picture)
    shrill = 20 if left > size[0] / 2 else size[0] - 220
    for i in range(10):
        pen.rectangle((shrill, 40 + 26 * i, shrill + 200, 52 + 26 * i), fill=(255, 30, 200) if i % 2 else (20, 255, 40))
    draw_face(picture, left, 60, side)
    return picture


def mug(width: int = 420, height: int = 320, at: tuple[int, int] = (200, 160), seed: int = 0) -> tuple[Image.Image, np.ndarray]:
    """A round red thing with a stripe before a wall with some grain, and where it is."""
    rng = np.random.default_rng(seed)
    values = np.full((height, width, 3), (90, 120, 110), dtype=np.float64) + rng.normal(0, 8, (height, width, 3))
    down, right = np.mgrid[:height, :width]
    shape = ((right - at[0]) / 80) ** 2 + ((down - at[1]) / 95) ** 2 < 1
    values[shape] = (205, 60, 40)
    values[shape & (abs(down - at[1]) < 14)] = (240, 220, 60)
    values[shape] += rng.normal(0, 8, (int(shape.sum()), 3))
    return Image.fromarray(values.clip(0, 255).astype(np.uint8)), shape


# --- OpenCV is optional ---------------------------------------------------------------------------------------------


def test_without_opencv(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mug()[0].save(tmp_path / "a.png")
    faces._cascade.cache_clear()
    monkeypatch.setitem(sys.modules, "cv2", None)
    with pytest.raises(PhotoError, match=r"""^crop="face" needs OpenCV 4; pip install 'lora-booth\[vision\]'$"""):
        find_photos(tmp_path, minimum=1, crop="face")
    with pytest.raises(PhotoError, match=r"^making masks needs OpenCV 4; pip install 'lora-booth\[vision\]'$"):
        make_masks(tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["a.png"]
    assert find_photos(tmp_path, minimum=1, crop="smart").photos
    monkeypatch.setitem(sys.modules, "cv2", SimpleNamespace(__version__="5.0.0", grabCut=None))
    with pytest.raises(PhotoError, match=r"OpenCV 4.*\(version 5\.0\.0 is installed\)$"):
        load_opencv("this")


def test_it_is_not_imported_before_it_is_asked_for(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    mug()[0].save(tmp_path / "a.png")
    real = builtins.__import__

    def no_cv2(name: str, *rest: object, **more: object) -> object:
        assert not name.startswith("cv2")
        return real(name, *rest, **more)  # type: ignore[arg-type]

    monkeypatch.setattr(builtins, "__import__", no_cv2)
    assert find_photos(tmp_path, minimum=1).photos


# --- faces ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("left", [10, 230, 460])
@pytest.mark.parametrize("scale", [1, 3])
def test_a_face_is_found(left: int, scale: int) -> None:
    picture = portrait(left).resize((640 * scale, 360 * scale), Image.Resampling.BICUBIC)
    face = face_of(picture)
    assert face is not None
    middle = (face[0] + face[2]) / 2 * 640, (face[1] + face[3]) / 2 * 360
    assert middle == pytest.approx((left + 80, 60 + 85), abs=25)
    assert 70 < (face[2] - face[0]) * 640 < 190


def test_a_face_is_looked_for_inside_the_crop() -> None:
    picture = portrait(40)
    draw_face(picture, 420, 140, 180)
    assert face_of(picture) is not None and face_of(picture)[0] > 0.6  # type: ignore[index]  # the larger one
    left_half = face_of(picture, (0.0, 0.0, 0.5, 1.0))
    assert left_half is not None and (left_half[0] + left_half[2]) / 2 * 640 == pytest.approx(120, abs=25)
    assert face_of(mug()[0]) is None


@pytest.mark.parametrize("tall", [False, True])
@pytest.mark.parametrize("left", [40, 440])
def test_the_face_crop_keeps_the_face(tmp_path: Path, left: int, tall: bool) -> None:
    """Where the smart one prefers something shrill."""
    if tall:
        picture = Image.new("RGB", (360, 640), (120, 130, 140))
        pen = ImageDraw.Draw(picture)
        for i in range(10):
            pen.rectangle(
                (40 + 26 * i, 640 - left - 180, 52 + 26 * i, 640 - left), fill=(255, 30, 200) if i % 2 else (20, 255, 40)
            )
        draw_face(picture, 100, left, 160)
    else:
        picture = portrait(left)
    picture.save(tmp_path / "a.png")

    def kept(crop: str) -> float:
        found = find_photos(tmp_path, minimum=1, crop=crop).photos[0]  # type: ignore[arg-type]
        x, y, side = photo.square_box(found.width, found.height, found.crop, found.focus)
        low = y if tall else x
        return max(0, min(low + side, left + 160) - max(low, left)) / 160

    assert kept("face") == 1
    assert kept("smart") < 1


def test_the_face_crop_without_a_face_is_the_smart_one(tmp_path: Path) -> None:
    mug(at=(90, 160))[0].save(tmp_path / "a.png")
    smart, face = (find_photos(tmp_path, minimum=1, crop=crop).photos[0] for crop in ("smart", "face"))
    assert face.focus == smart.focus is not None
    assert (smart.note, face.note) == (None, "no face found")


def test_masks_and_own_crops_come_before_faces(tmp_path: Path) -> None:
    portrait(40).save(tmp_path / "a.png")
    mask = Image.new("L", (640, 360))
    mask.paste(255, (420, 40, 620, 300))
    masked = find_photos(tmp_path, minimum=1, crop="face", masks={"a.png": mask}).photos[0]
    assert masked.focus is not None and masked.focus[0] > 0.6
    own = find_photos(tmp_path, minimum=1, crop="face", crops={"a.png": (0.5, 0.0, 1.0, 1.0)}).photos[0]
    assert own.focus is None and own.crop == (0.5, 0.0, 1.0, 1.0)


def test_a_face_that_is_larger_than_the_square_is_cut_on_both_sides() -> None:
    plain = Image.new("RGB", (400, 100), "grey")
    focus = focus_of(plain, None, None, (0.3, 0.0, 0.7, 1.0))  # 160 of 400 pixels wide, 100 high
    assert focus is not None and focus[0] == pytest.approx(0.5, abs=0.02)
    assert focus_of(plain, None, None, (0.0, 0.1, 0.1, 0.5)) == pytest.approx((0.125, 0.5), abs=0.02)


# --- masks ----------------------------------------------------------------------------------------------------------


def same(mask: Image.Image, shape: np.ndarray) -> float:
    """Intersection over union of a mask and the truth."""
    found = np.asarray(mask.resize(shape.shape[::-1])) >= 128
    return float((found & shape).sum() / (found | shape).sum())


def test_grabcut_finds_the_shape() -> None:
    picture, shape = mug()
    mask = grabcut(picture)
    assert mask is not None and mask.mode == "L" and mask.size == picture.size
    assert same(mask, shape) > 0.95
    assert mask.tobytes() == grabcut(picture).tobytes()  # type: ignore[union-attr]  # the same every time


@pytest.mark.parametrize("kind", ["noise", "one colour", "two halves"])
def test_grabcut_makes_no_guess(kind: str) -> None:
    values = np.random.default_rng(0).integers(0, 256, (200, 240, 3), dtype=np.uint8)
    if kind == "one colour":
        values[:] = 99
    if kind == "two halves":
        values[:, :120] = 30
        values[:, 120:] = 200
    assert grabcut(Image.fromarray(values)) is None


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
    made = {one.photo.path.name: one for one in make_masks(tmp_path, say=said.append)}
    assert {name: one.reason for name, one in made.items()} == {
        "a.jpg": None,
        "b.png": "has a mask already",
        "c.bmp": None,  # its copy, c.png, is not used
        "c2.png": "not sure enough what the subject is",
        "d.png": "not sure enough what the subject is",
    }
    assert sorted(said) == [
        "a.jpg: wrote a.mask.png",
        "b.png: has a mask already",
        "c.bmp: wrote c.mask.png",
        "c2.png: not sure enough what the subject is",
        "d.png: not sure enough what the subject is",
    ]
    after = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {name: after.pop(name) for name in before} == before and set(after) == {"a.mask.png", "c.mask.png"}
    with Image.open(tmp_path / "a.mask.png") as written:
        assert written.mode == "L" and written.size == first.size and written.info == {}
        assert same(written, shape) > 0.95
    found = find_photos(tmp_path)
    assert [one.mask is not None for one in found.photos] == [True, True, False, True, False]
    square = training_square(found.photos[0], 256)
    assert square.mask is not None and np.asarray(square.mask).mean() / 255 == pytest.approx(shape.sum() / 320**2, abs=0.02)
    assert [one.reason for one in make_masks(tmp_path)].count("has a mask already") == 3


def test_a_mask_lies_where_the_crop_does(tmp_path: Path) -> None:
    """A photo between black bars, turned by its EXIF tag: the mask is of the upright photo, black on the bars."""
    picture, shape = mug()
    framed = Image.new("RGB", (picture.width, picture.height + 120))
    framed.paste(picture, (0, 60))
    exif = Image.Exif()
    exif[0x0112] = 6
    framed.transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.jpg", quality=95, exif=exif)
    assert make_masks(tmp_path)[0].reason is None
    with Image.open(tmp_path / "a.mask.png") as mask:
        assert mask.size == framed.size
        values = np.asarray(mask)
        assert values[:58].max() == values[-58:].max() == 0
        assert same(mask, np.pad(shape, ((60, 60), (0, 0)))) > 0.95


def test_a_large_photo_gets_a_smaller_mask(tmp_path: Path) -> None:
    picture, shape = mug()
    picture.resize((2520, 1920)).save(tmp_path / "a.jpg")
    make_masks(tmp_path)
    with Image.open(tmp_path / "a.mask.png") as mask:
        assert mask.size == (1024, 780) and same(mask, shape) > 0.95
    assert find_photos(tmp_path, minimum=1).photos[0].mask is not None


def test_photos_that_would_share_a_mask(tmp_path: Path) -> None:
    mug()[0].save(tmp_path / "a.png")
    mug(at=(150, 150))[0].save(tmp_path / "a.jpg")
    reasons = [one.reason for one in make_masks(tmp_path)]
    assert reasons == ["another photo would have the same mask, a.mask.png; rename one"] * 2


def test_a_segmenter_of_the_user(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cv2", None)  # none is needed
    for index in range(3):
        mug(seed=index)[0].save(tmp_path / f"{index}.png")
    seen: list[Image.Image] = []

    def segment(image: Image.Image) -> Image.Image | None:
        seen.append(image)
        mask = Image.new("RGBA", (21, 16))  # small, transparent around the subject
        mask.paste((255, 255, 255, 255), (5, 3, 15, 12))
        return mask if len(seen) == 1 else None if len(seen) == 2 else Image.new("L", image.size, 255)

    made = lb.make_masks(tmp_path, segmenter=segment)
    assert [one.reason for one in made] == [None, "not sure enough what the subject is", "100.0% of it would be the subject"]
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
        make_masks(tmp_path)
    assert [path.name for path in tmp_path.iterdir()] == ["a.png"]


def test_command(tmp_path: Path) -> None:
    for index in range(3):
        mug(at=(180 + 20 * index, 160), seed=index)[0].save(tmp_path / f"{index}.png")
    (tmp_path / "1.mask.png").write_bytes(b"")  # somebody's, and broken
    result = CliRunner().invoke(app, ["photos", str(tmp_path), "--make-masks"])
    assert isinstance(result.exception, PhotoError) and "mask 1.mask.png" in str(result.exception)
    assert (tmp_path / "1.mask.png").read_bytes() == b""
    (tmp_path / "1.mask.png").unlink()
    result = CliRunner().invoke(app, ["photos", str(tmp_path), "--make-masks", "--crop", "face"])
    assert result.exit_code == 0, result.output
    assert [line for line in result.output.splitlines() if line.startswith("mask")] == [
        f"mask     {index}.png: wrote {index}.mask.png" for index in range(3)
    ]
    assert "3 used, 0 skipped" in result.output


def test_masks_of_real_photos() -> None:
    if not REAL_PHOTOS.is_dir():
        pytest.skip("needs the DreamBooth photos")
    for name in ("fancy_boot/03.jpg", "robot_toy/03.jpg"):
        with Image.open(REAL_PHOTOS / name) as image:
            mask = grabcut(image.convert("RGB"))
        assert mask is not None and 0.1 < np.asarray(mask).mean() / 255 < 0.35
