"""Photos as people have them: sideways, transparent, broken, hostile. All made here with Pillow."""

from __future__ import annotations

import io
import json
import os
import struct
import sys
import threading
import tracemalloc
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageChops, ImageCms, ImageFile, ImageFilter, features

from lora_booth.errors import PhotoError, shown
from lora_booth.photos import finding, opening
from lora_booth.photos.audit import audit_photos
from lora_booth.photos.cropping import Crop, crop_and_resize, crop_box, crop_of, crop_photo, to_tensor
from lora_booth.photos.finding import find_photos
from lora_booth.photos.opening import open_photo, read_picture
from lora_booth.photos.photo import Photo, PhotoSet
from lora_booth.photos.sheet import contact_sheet

REAL_PHOTOS = Path(__file__).parents[2] / "shared" / "data" / "dreambooth"


def picture(seed: int = 0, width: int = 96, height: int = 80) -> Image.Image:
    """A picture without symmetry, RGB."""
    values = np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)
    return Image.fromarray(values)


def one(folder: Path) -> Photo:
    """The only photo of a folder."""
    found = find_photos(folder, minimum=1)
    assert len(found.photos) == 1
    return found.photos[0]


def opened(path: Path) -> np.ndarray:
    """(H, W, 3) uint8 of a photo, alone in its list."""
    return np.asarray(open_photo(find_photos([path], minimum=1).photos[0]))


def reasons(found: PhotoSet) -> dict[str, str]:
    return {skipped.path.name: skipped.reason for skipped in found.skipped}


def reason(path: Path) -> str:
    """Why the file is not used."""
    with pytest.raises(PhotoError) as error:
        find_photos([path], minimum=1)
    return str(error.value)


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """Three good photos."""
    inside = tmp_path / "rex"
    inside.mkdir()
    for index in range(3):
        picture(index).save(inside / f"img{index}.png")
    return inside


# --- the folder -----------------------------------------------------------------------------------------------------


def test_natural_order(tmp_path: Path) -> None:
    for seed, name in enumerate(("img10.png", "img2.png", "IMG1.png", "a.png", "7.png")):
        picture(seed).save(tmp_path / name)
    names = [photo.path.name for photo in find_photos(tmp_path).photos]
    assert names == ["7.png", "a.png", "IMG1.png", "img2.png", "img10.png"]


def test_a_list_keeps_its_order(folder: Path) -> None:
    files = [folder / "img2.png", str(folder / "img0.png")]
    assert [photo.path.name for photo in find_photos(files, minimum=1).photos] == ["img2.png", "img0.png"]
    with pytest.raises(PhotoError, match="gone.png: no such folder or file"):
        find_photos([folder / "gone.png"])


def test_clutter_is_skipped_with_reasons(folder: Path) -> None:
    for name in (".DS_Store", "._img0.png", ".hidden.png", "Thumbs.db", "desktop.ini"):
        (folder / name).write_bytes(b"\0\1\2")
    (folder / ".ipynb_checkpoints").mkdir()
    (folder / "more").mkdir()
    (folder / "empty.png").touch()
    (folder / "text.jpg").write_text("not a picture")
    (folder / "lonely.txt").write_text("a caption")
    (folder / "img0.txt").write_text("a dog")
    found = find_photos(folder)
    assert [photo.path.name for photo in found.photos] == ["img0.png", "img1.png", "img2.png"]
    assert reasons(found) == {
        ".DS_Store": "hidden",
        "._img0.png": "hidden",
        ".hidden.png": "hidden",
        ".ipynb_checkpoints": "hidden",
        "Thumbs.db": "a system file",
        "desktop.ini": "a system file",
        "more": "a folder",
        "empty.png": "empty (0 bytes)",
        "text.jpg": "not a photo, or damaged or truncated; accepted are JPEG, PNG, WEBP, AVIF, HEIC, TIFF, BMP",
        "lonely.txt": "a caption without a photo of that name (photo.txt is for photo.jpg)",
    }


def test_captions_in_capitals_are_read_and_no_caption_is_left_out_silently(folder: Path) -> None:
    (folder / "img0.TXT").write_text("a dog")
    Image.new("L", (96, 80), 255).save(folder / "img1.MASK.PNG", "PNG")
    (folder / "img2.txt").write_text("a cat")
    there = {path.name for path in folder.iterdir()}
    (folder / "img2.TXT").write_text("a cow")
    Image.new("L", (96, 80), 255).save(folder / "img2.mask.jpg", "JPEG")
    others = ["img0.Txt", "img1.jpg.txt", "img9.TXT", "img2.caption", "img2.json", "metadata.jsonl", "captions.CSV"]
    for name in others:
        (folder / name).write_text("a dog")
    found = find_photos(folder)
    assert [photo.caption for photo in found.photos] == ["a dog", None, "a cat"]
    assert [photo.mask is not None for photo in found.photos] == [False, True, False]
    left_out = reasons(found)
    assert left_out.keys() == {path.name for path in folder.iterdir()} - there - {"img0.TXT"}
    assert all(("photo.txt" in reason or "photo.mask.png" in reason) and "photo.jpg" in reason for reason in left_out.values())


@pytest.mark.parametrize("kind", ["JPEG", "PNG", "WEBP", "TIFF", "BMP"])
def test_truncated(folder: Path, kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)  # as other programs set it
    whole = folder.parent / "whole"
    picture(9).save(whole, kind)
    for part in (20, 60, 95):  # percent
        (folder / f"cut{part}").write_bytes(whole.read_bytes()[: whole.stat().st_size * part // 100])
    found = find_photos(folder)
    assert len(found.photos) == 3
    assert all("damaged or truncated" in text for text in reasons(found).values())
    assert len(found.skipped) == 3
    assert ImageFile.LOAD_TRUNCATED_IMAGES is True


def test_mutated_files_never_crash(folder: Path) -> None:
    rng = np.random.default_rng(0)
    for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP"):
        whole = folder.parent / "whole"
        picture(9, 70, 66).save(whole, kind)
        for index in range(12):
            data = bytearray(whole.read_bytes())
            for place in rng.integers(0, min(len(data), 300), 4):
                data[place] = rng.integers(0, 256)
            (folder / f"{kind}{index}").write_bytes(data)
    found = find_photos(folder)
    assert len(found.photos) + len(found.skipped) == 3 + 60
    for photo in found.photos:
        open_photo(photo)


def test_other_formats_never_reach_their_decoders(folder: Path) -> None:
    (folder / "eps.jpg").write_bytes(b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 100 100\n")
    picture(5).save(folder / "gif.png", "GIF")
    (folder / "live.heic").write_bytes(b"\0\0\0\x14ftypqt  \0\0\0\0qt  ")
    picture(6).save(folder / "raw.nef", "TIFF")
    (folder / "paper.jpg").write_bytes(b"%PDF-1.7\n")
    found = reasons(find_photos(folder))
    assert found.pop("raw.nef") == "camera raw; export it as JPEG or PNG"
    assert len(found) == 4 and all(text.startswith("not a photo, ") for text in found.values())


def test_content_decides_not_the_name(tmp_path: Path) -> None:
    picture().save(tmp_path / "really_png.jpg", "PNG")
    assert np.array_equal(np.asarray(open_photo(one(tmp_path))), np.asarray(picture()))


@pytest.mark.skipif(not hasattr(os, "mkfifo"), reason="no FIFOs here")
def test_fifo_and_links(folder: Path) -> None:
    os.mkfifo(folder / "pipe.jpg")
    picture(7).save(folder.parent / "outside.png")
    (folder / "out.png").symlink_to(folder.parent / "outside.png")
    (folder / "device.png").symlink_to("/dev/zero")
    (folder / "broken.png").symlink_to(folder / "gone.png")
    (folder / "loop.png").symlink_to(folder / "loop.png")
    (folder / "target.png").symlink_to(folder / "img0.png")  # stays inside, so it is read: the same photo again
    found = find_photos(folder)
    assert reasons(found) == {
        "pipe.jpg": "not a regular file",
        "out.png": "a link that leaves the folder",
        "device.png": "a link that leaves the folder",
        "broken.png": "a broken link",
        "loop.png": "a broken link",
        "target.png": "the same file as img0.png",
    }
    linked = folder.parent / "linked"
    linked.symlink_to(folder)  # a link to the whole folder is the user's own choice
    assert len(find_photos(linked).photos) == 3


def test_duplicates(folder: Path) -> None:
    (folder / "z_copy.png").write_bytes((folder / "img1.png").read_bytes())
    picture(2).save(folder / "z_again.bmp")  # other bytes, same pixels
    assert reasons(find_photos(folder)) == {
        "z_copy.png": "the same file as img1.png",
        "z_again.bmp": "the same picture as img2.png",
    }


def test_too_few(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    (tmp_path / "b.jpg").write_text("no")
    (tmp_path / "c.heic").write_bytes(b"\0\0\0\x18ftypheic\0\0\0\0mif1heic")
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(sys.modules, "pillow_heif", None)  # as if it were not installed
        with pytest.raises(PhotoError) as error:
            find_photos(tmp_path)
    message = str(error.value)
    assert message == (
        f"{tmp_path}: 1 usable photo, 3 needed; skipped: "
        "c.heic: HEIC needs an optional package; pip install 'lora-booth[heic]'; "
        "b.jpg: not a photo, or damaged or truncated; accepted are JPEG, PNG, WEBP, AVIF, HEIC, TIFF, BMP; "
        "add photos (JPEG, PNG, WEBP, AVIF, HEIC, TIFF, BMP), or pass minimum=1"
    )
    assert len(find_photos(tmp_path, minimum=1).photos) == 1


def test_the_message_stays_short(tmp_path: Path) -> None:
    for index in range(50):
        (tmp_path / f"{index}.jpg").touch()
    with pytest.raises(PhotoError, match=r"no usable photo, 3 needed; skipped: 0.jpg, 1.jpg and 48 more: empty"):
        find_photos(tmp_path)


def test_missing_folder(tmp_path: Path) -> None:
    with pytest.raises(PhotoError, match="gone: no such folder"):
        find_photos(tmp_path / "gone")
    with pytest.raises(PhotoError, match="empty"):
        find_photos("")
    with pytest.raises(PhotoError, match="no usable photo"):
        find_photos(tmp_path)
    with pytest.raises(PhotoError, match="minimum <= maximum"):
        find_photos(tmp_path, minimum=0)


def test_too_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for index in range(6):
        picture(index).save(tmp_path / f"{index}.bmp")
    for index in range(20):
        (tmp_path / f"{index}.md").write_text("notes do not count")
    assert len(find_photos(tmp_path, maximum=6).photos) == 6
    monkeypatch.setattr(finding, "_check", lambda *_: pytest.fail("decoded before asking"))
    with pytest.raises(PhotoError, match=r"more than 5 photos; .*maximum=N"):
        find_photos(tmp_path, maximum=5)


def test_names_are_shown_escaped(tmp_path: Path) -> None:
    assert shown("a\nb\x1b[31m\u202egnp.jpg é 犬") == "a\\nb\\x1b[31m\\u202egnp.jpg é 犬"
    assert shown(os.fsdecode(b"\xff.jpg")) in ("\\xff.jpg", "ÿ.jpg")
    for name in (b"line\nbreak.jpg", b"\x1b[2Jclear.jpg", b"\xff\xfe.jpg"):
        try:
            (tmp_path / os.fsdecode(name)).touch()
        except OSError:
            pytest.skip("this file system does not take such names")
    message = reason(tmp_path / "line\nbreak.jpg")
    with pytest.raises(PhotoError) as error:
        find_photos(tmp_path)
    assert message.isprintable()
    assert str(error.value).isprintable()


# --- limits ---------------------------------------------------------------------------------------------------------


def declared_png(width: int, height: int) -> bytes:
    """A small PNG that says it is huge."""

    def chunk(name: bytes, data: bytes) -> bytes:
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 0, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(10_000))) + chunk(b"IEND", b"")


@pytest.mark.parametrize("size", [(9000, 9000), (30_000, 30_000), (60_000, 900)])
def test_huge_pictures_are_refused_before_decoding(folder: Path, size: tuple[int, int]) -> None:
    (folder / "huge.png").write_bytes(declared_png(*size))
    tracemalloc.start()
    text = reasons(find_photos(folder))["huge.png"]
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert "more than 50 megapixels" in text
    assert peak < 20 * 2**20


def not_a_picture(kind: str, folder: Path) -> Path:
    path = folder / "x.png"
    if kind == "pipe":
        os.mkfifo(path)
    elif kind == "link":
        (folder.parent / "out.png").write_bytes(picture_bytes())
        path.symlink_to(folder.parent / "out.png")
    elif kind == "loop":
        path.symlink_to(path)
    elif kind == "folder":
        path.mkdir()
    elif kind == "NUL":
        return folder / "x\0.png"
    elif kind != "gone":
        made = {"bomb": declared_png(9000, 9000), "PostScript": b"%!PS-Adobe-3.0", "empty": b"", "cut": picture_bytes()[:200]}
        path.write_bytes(made[kind])
    return path


def picture_bytes(kind: str = "PNG") -> bytes:
    content = io.BytesIO()
    picture().save(content, kind)
    return content.getvalue()


@pytest.mark.parametrize("kind", ["pipe", "link", "loop", "folder", "NUL", "gone", "bomb", "PostScript", "empty", "cut"])
def test_one_door_for_pictures(kind: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    folder.mkdir()
    path = not_a_picture(kind, folder)
    with pytest.raises(PhotoError) as error:
        read_picture(path, inside=folder)
    assert str(error.value).isprintable()
    if path.is_file() and kind != "link":
        with pytest.raises(PhotoError, match="^the picture: "):
            read_picture(path.read_bytes())
    assert np.array_equal(read_picture(picture_bytes(), inside=folder), picture())
    assert read_picture(picture_bytes(), mode="L").mode == "L"


def test_pictures_in_memory_pass_the_same_door(tmp_path: Path) -> None:
    assert np.array_equal(read_picture(picture()), picture())
    with pytest.raises(PhotoError, match="more than 50 megapixels"):
        read_picture(Image.new("1", (9000, 9000)))
    with pytest.raises(PhotoError, match="damaged"):  # opened lazily
        read_picture(Image.open(io.BytesIO(picture_bytes("JPEG")[:-200])))


def test_shape_limits(tmp_path: Path) -> None:
    Image.new("RGB", (400, 100)).save(tmp_path / "four_to_one.png")
    Image.new("RGB", (401, 100)).save(tmp_path / "longer.png")
    Image.new("RGB", (100, 63)).save(tmp_path / "small.png")
    found = find_photos(tmp_path, minimum=1)
    assert [photo.path.name for photo in found.photos] == ["four_to_one.png"]
    assert reasons(found) == {
        "longer.png": "401x100 px is longer than 4:1",
        "small.png": "100x63 px; the short side needs 64",
    }


def test_note_for_enlarged_photos(tmp_path: Path) -> None:
    picture(0, 300, 400).save(tmp_path / "a.png")
    photo = one(tmp_path)
    assert "small: 300 px, enlarged to 512" in audit_photos([photo], resolution=512).photos[0].notes
    assert not any("enlarged" in note for note in audit_photos([photo], resolution=300).photos[0].notes)


# --- opening --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["PNG", "TIFF", "WEBP"])
@pytest.mark.parametrize("orientation", range(1, 9))
def test_exif_orientation(tmp_path: Path, orientation: int, kind: str) -> None:
    upright = np.asarray(picture())
    # By the EXIF standard: where row 0 and column 0 of the stored picture are in the upright one.
    stored = {
        1: upright,  # top, left
        2: upright[:, ::-1],  # top, right
        3: upright[::-1, ::-1],  # bottom, right
        4: upright[::-1],  # bottom, left
        5: upright.transpose(1, 0, 2),  # left, top
        6: upright.transpose(1, 0, 2)[::-1],  # right, top: stored turned 90 degrees counterclockwise
        7: upright[::-1, ::-1].transpose(1, 0, 2),  # right, bottom
        8: upright.transpose(1, 0, 2)[:, ::-1],  # left, bottom
    }[orientation]
    if orientation == 6:  # row 0 is the right side, read from the top
        assert np.array_equal(stored[0], upright[:, -1])
    if orientation == 8:  # row 0 is the left side, read from the bottom
        assert np.array_equal(stored[0], upright[::-1, 0])
    exif = Image.Exif()
    exif[0x0112] = orientation
    options = {"lossless": True, "exact": True} if kind == "WEBP" else {}
    Image.fromarray(np.ascontiguousarray(stored)).save(tmp_path / "a", kind, exif=exif, **options)
    photo = one(tmp_path)
    assert (photo.width, photo.height) == (96, 80)
    assert np.array_equal(np.asarray(open_photo(photo)), upright)


def test_16_bit_grey(tmp_path: Path) -> None:
    ramp = np.tile(np.linspace(0, 65535, 96).astype(np.uint16), (80, 1))
    Image.fromarray(ramp).save(tmp_path / "a.png")
    pixels = opened(tmp_path / "a.png")
    assert np.abs(pixels[..., 0] - ramp / 257.0).max() <= 0.5
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


@pytest.mark.parametrize("top", [1.0, 255.0, 65535.0, 1e6])
def test_float_and_int32_greys_are_scaled(tmp_path: Path, top: float) -> None:
    ramp = np.tile(np.linspace(0, top, 96, dtype=np.float32), (80, 1))
    Image.fromarray(ramp).save(tmp_path / "float.tiff")
    assert np.abs(opened(tmp_path / "float.tiff")[..., 0] - ramp * 255 / top).max() <= 0.51
    if top > 1:
        Image.fromarray(ramp.astype(np.int32)).save(tmp_path / "int.tiff")
        assert np.abs(opened(tmp_path / "int.tiff")[..., 0] - ramp * 255 / top).max() <= 1.51


def test_impossible_floats_are_refused(tmp_path: Path) -> None:
    for name, value in (("nan", np.nan), ("inf", np.inf), ("negative", -1.0)):
        Image.fromarray(np.full((80, 96), value, np.float32)).save(tmp_path / f"{name}.tiff")
    assert "NaN or infinite" in reason(tmp_path / "nan.tiff")
    assert "NaN or infinite" in reason(tmp_path / "inf.tiff")
    assert "negative" in reason(tmp_path / "negative.tiff")


def test_transparency_becomes_white(tmp_path: Path) -> None:
    alpha = np.zeros((80, 96), np.uint8)
    alpha[:, 48:] = 255
    rgba = np.dstack([np.asarray(picture()), alpha])
    Image.fromarray(rgba).save(tmp_path / "rgba.png")
    pixels = opened(tmp_path / "rgba.png")
    assert (pixels[:, :48] == 255).all()
    assert np.array_equal(pixels[:, 48:], rgba[:, 48:, :3])

    Image.fromarray(rgba).convert("LA").save(tmp_path / "la.png")
    pixels = opened(tmp_path / "la.png")
    assert (pixels[:, :48] == 255).all()
    assert np.array_equal(pixels[:, 48:, 0], np.asarray(picture().convert("L"))[:, 48:])

    half = Image.new("RGBA", (96, 80), (0, 0, 0, 128))
    half.save(tmp_path / "half.webp", lossless=True)
    assert np.abs(opened(tmp_path / "half.webp").astype(int) - 127).max() <= 1

    palette = Image.new("P", (96, 80), 0)
    palette.putpalette([200, 0, 0, 0, 0, 200])
    palette.paste(1, (48, 0, 96, 80))
    palette.save(tmp_path / "p.png", transparency=0)
    pixels = opened(tmp_path / "p.png")
    assert (pixels[:, :48] == 255).all()
    assert (pixels[:, 48:] == (0, 0, 200)).all()

    grey = np.full((80, 96), 30_000, np.uint16)
    grey[:, :48] = 1234
    Image.fromarray(grey).save(tmp_path / "hole.png", transparency=1234)
    pixels = opened(tmp_path / "hole.png")
    assert (pixels[:, 48:] == round(30_000 / 257)).all()
    assert (pixels[:, :48] == 255).all()


def test_other_modes(tmp_path: Path) -> None:
    Image.new("CMYK", (96, 80), (0, 255, 255, 0)).save(tmp_path / "cmyk.jpg")
    red = opened(tmp_path / "cmyk.jpg")[40, 48]
    assert red[0] > 200 and red[1] < 60 and red[2] < 60
    Image.new("1", (96, 80), 1).save(tmp_path / "bits.png")
    assert (opened(tmp_path / "bits.png") == 255).all()
    Image.new("L", (96, 80), 77).save(tmp_path / "grey.png")
    assert (opened(tmp_path / "grey.png") == 77).all()
    plain = Image.new("P", (96, 80), 1)
    plain.putpalette([0, 0, 0, 10, 20, 30])
    plain.save(tmp_path / "p.png")
    assert (opened(tmp_path / "p.png") == (10, 20, 30)).all()
    Image.new("LAB", (96, 80)).save(tmp_path / "lab.tiff")
    assert "colour mode LAB" in reason(tmp_path / "lab.tiff")


def swapped_profile() -> bytes:
    """An sRGB profile whose red and blue primaries changed places: what it does cannot be overlooked."""
    data = bytearray(ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes())
    for index in range(struct.unpack(">I", data[128:132])[0]):
        at = 132 + 12 * index
        if data[at : at + 4] in (b"rXYZ", b"bXYZ"):
            data[at : at + 4] = b"bXYZ" if data[at : at + 4] == b"rXYZ" else b"rXYZ"
    return bytes(data)


def test_colour_profile(tmp_path: Path) -> None:
    red = Image.new("RGB", (96, 80), (255, 0, 0))
    red.save(tmp_path / "swapped.png", icc_profile=swapped_profile())
    assert np.abs(opened(tmp_path / "swapped.png").astype(int) - (0, 0, 255)).max() <= 2

    rgba = red.copy()
    rgba.putalpha(0)
    rgba.save(tmp_path / "clear.png", icc_profile=swapped_profile())
    assert (opened(tmp_path / "clear.png") == 255).all()

    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    picture().save(tmp_path / "srgb.png", icc_profile=srgb)
    assert np.abs(opened(tmp_path / "srgb.png").astype(int) - np.asarray(picture())).max() <= 1

    for name, profile in (("broken", b"no profile"), ("short", srgb[:200])):
        picture().save(tmp_path / f"{name}.png", icc_profile=profile)
        assert np.array_equal(opened(tmp_path / f"{name}.png"), np.asarray(picture()))
    picture().convert("L").save(tmp_path / "grey.png", icc_profile=swapped_profile())  # of another kind of colour
    assert np.array_equal(opened(tmp_path / "grey.png")[..., 1], np.asarray(picture().convert("L")))


def test_nothing_private_survives(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x010F] = "Private Camera"
    exif.get_ifd(0x8825)[1] = "N"
    exif.get_ifd(0x8825)[2] = (52.0, 31.0, 12.0)
    srgb = ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()
    xmp = b"<x:xmpmeta xmlns:x='adobe:ns:meta/'>Private Place</x:xmpmeta>"
    picture().save(tmp_path / "a.jpg", exif=exif, comment=b"Private Comment", icc_profile=srgb, xmp=xmp)
    assert b"Private" in (tmp_path / "a.jpg").read_bytes()
    clean = open_photo(one(tmp_path))
    assert clean.info == {}
    assert not clean.getexif()
    square = crop_and_resize(clean, (64, 64))
    for image in (clean, square, contact_sheet([clean])):
        for kind in ("JPEG", "PNG", "WEBP", "TIFF"):
            image.save(tmp_path / "out", kind)
            data = (tmp_path / "out").read_bytes()
            assert b"Private" not in data and b"ICC" not in data and b"iCCP" not in data
            with Image.open(tmp_path / "out") as saved:
                assert 0x8825 not in saved.getexif()


def test_broken_exif_does_not_cost_the_photo(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff broken")
    assert np.array_equal(np.asarray(open_photo(one(tmp_path))), np.asarray(picture()))


def test_animated(tmp_path: Path) -> None:
    frames = [picture(seed) for seed in range(3)]
    frames[0].save(tmp_path / "a.webp", save_all=True, append_images=frames[1:], lossless=True, exact=True)
    frames[1].save(tmp_path / "b.png", save_all=True, append_images=frames[2:])
    frames[2].save(tmp_path / "c.tiff", save_all=True, append_images=frames[:1])
    frames[0].save(tmp_path / "d.gif", save_all=True, append_images=frames[1:])
    found = find_photos(tmp_path)
    notes = [photo.note for photo in found.photos]
    assert notes == ["animated: first frame only"] * 2 + ["several pages: first one only"]
    for photo, frame in zip(found.photos, frames, strict=True):
        assert np.array_equal(np.asarray(open_photo(photo)), np.asarray(frame))
    assert reasons(found)["d.gif"].startswith("not a photo, ")


def test_camera_jpeg_with_a_preview_inside(tmp_path: Path) -> None:
    picture(0).save(tmp_path / "a.jpg", "MPO", save_all=True, append_images=[picture(1)])
    photo = one(tmp_path)
    assert photo.note is None
    assert open_photo(photo).size == (96, 80)


@pytest.mark.skipif(not features.check("avif"), reason="Pillow without AVIF")
def test_avif(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (96, 80), (10, 100, 200)).save(tmp_path / "a.avif", exif=exif)
    photo = one(tmp_path)
    assert (photo.width, photo.height) == (80, 96)


def test_heic(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.register_heif_opener()
    left_blue = Image.new("RGB", (128, 96), (200, 100, 10))
    left_blue.paste((10, 100, 200), (0, 0, 64, 96))
    exif = Image.Exif()
    exif[0x0112] = 6
    left_blue.save(tmp_path / "a.heic", exif=exif.tobytes(), quality=95)
    photo = one(tmp_path)
    assert (photo.width, photo.height, photo.note) == (96, 128, None)
    pixels = np.asarray(open_photo(photo)).astype(int)  # turned clockwise once: what was left is above
    assert np.abs(pixels[10, 48] - (10, 100, 200)).max() < 12
    assert np.abs(pixels[118, 48] - (200, 100, 10)).max() < 12


def test_a_photo_that_changed_is_not_opened(tmp_path: Path) -> None:
    picture().save(tmp_path / "a.png")
    photo = one(tmp_path)
    picture(1).save(tmp_path / "a.png")
    with pytest.raises(PhotoError, match="changed since it was checked"):
        open_photo(photo)
    (tmp_path / "a.png").unlink()
    with pytest.raises(PhotoError, match="no such file"):
        open_photo(photo)


# --- captions and crops ---------------------------------------------------------------------------------------------


def test_captions(folder: Path) -> None:
    (folder / "img0.txt").write_bytes("\ufeffa dog\non  grass\x1b\n".encode())
    (folder / "img1.txt").write_text("  \n")
    assert [photo.caption for photo in find_photos(folder).photos] == ["a dog on grass", None, None]
    (folder / "img2.txt").write_bytes(b"\xff\xfe\xfd")
    with pytest.raises(PhotoError, match=r"img2.txt: cannot be read as UTF-8 text .*; save it as UTF-8"):
        find_photos(folder)
    (folder / "img2.txt").write_text("word " * 1000)
    with pytest.raises(PhotoError, match="at most 2000"):
        find_photos(folder)


def test_crops_of_the_user(folder: Path) -> None:
    (folder / "crops.json").write_text(json.dumps({"img0.png": [0, 0, 80, 80], "img1.png": [0, 0, 1, 1]}))
    found = find_photos(folder, crops={"img1.png": (0.0, 0.0, 0.75, 1.0)})
    assert found.skipped == ()
    assert [photo.crop for photo in found.photos] == [(0, 0, 80 / 96, 1), (0, 0, 0.75, 1), None]
    square = crop_photo(found.photos[0], [(80, 80)])
    assert np.array_equal(np.asarray(square.image), np.asarray(picture(0))[:, :80])
    assert square.crop == Crop(top=0, left=0, original_size=(80, 80))


def test_a_crop_is_of_the_upright_photo_and_can_save_a_panorama(tmp_path: Path) -> None:
    wide = picture(0, 640, 80)
    exif = Image.Exif()
    exif[0x0112] = 6
    wide.save(tmp_path / "a.png", exif=exif)
    assert "longer than 4:1" in reason(tmp_path / "a.png")
    photo = find_photos(tmp_path, minimum=1, crops={"a.png": (0, 560, 80, 640)}).photos[0]
    assert (photo.width, photo.height) == (80, 640)
    square = crop_and_resize(open_photo(photo), (80, 80), photo.crop)
    assert np.array_equal(np.asarray(square), np.rot90(np.asarray(wide), -1)[560:])


@pytest.mark.parametrize(
    "region",
    [
        [0, 0, 1],
        [0, 0, 97, 80],
        [-0.1, 0, 1, 1],
        [0.5, 0, 0.5, 1],
        [0.6, 0, 0.5, 1],
        ["a", 0, 1, 1],
        [float("nan"), 0, 1, 1],
        [True, 0, 1, 1],
        "0011",
        None,
        [0, 0, 0.1, 0.1],  # too small to learn from
    ],
)
def test_bad_crops(folder: Path, region: object) -> None:
    (folder / "crops.json").write_text(json.dumps({"img0.png": region}))
    if region is None:  # no crop at all
        assert find_photos(folder).photos[0].crop is None
        return
    with pytest.raises(PhotoError, match=r"^crop of img0.png: |crops.json: not JSON \(NaN"):
        find_photos(folder)


@pytest.mark.parametrize("text", ["", "[]", "{", "[" * 100_000, '{"gone.png": [0,0,1,1]}'])
def test_bad_crop_files(folder: Path, text: str) -> None:
    (folder / "crops.json").write_text(text)
    with pytest.raises(PhotoError):
        find_photos(folder)


# --- which square -----------------------------------------------------------------------------------------------------


def scene(width: int, height: int, middle: tuple[int, int], radius: int = 45, seed: int = 0, grey: int = 140) -> Image.Image:
    """One striped disc before a calm background."""
    rng = np.random.default_rng(seed)
    down, right = np.mgrid[0:height, 0:width]
    values = np.full((height, width, 3), float(grey)) + 12 * np.sin(down / 37 + right / 51)[..., None]
    disc = (down - middle[1]) ** 2 + (right - middle[0]) ** 2 < radius**2
    values[disc] = (210, 60, 30)
    values[disc & (right % 8 < 4)] = (30, 60, 200)
    return Image.fromarray((values + rng.normal(0, 5, values.shape)).clip(0, 255).astype(np.uint8))


@pytest.mark.parametrize("middle", [60, 110, 200, 310, 340])
@pytest.mark.parametrize("tall", [False, True])
def test_the_smart_square_keeps_the_subject(tmp_path: Path, middle: int, tall: bool) -> None:
    image = scene(400, 200, (middle, 100))
    image = image.transpose(Image.Transpose.TRANSPOSE) if tall else image
    image.save(tmp_path / "a.png")
    photo = one(tmp_path)
    square = crop_photo(photo, [(200, 200)])
    left, top = square.crop.left, square.crop.top
    assert (left == 0) if tall else (top == 0)
    start = top if tall else left
    assert start <= max(0, middle - 45) + 6 and start + 200 >= min(400, middle + 45) - 6
    box = (0, start, 200, start + 200) if tall else (start, 0, start + 200, 200)
    assert np.array_equal(np.asarray(square.image), np.asarray(image.crop(box)))  # the crop says where it lies
    assert square.crop.original_size == image.size[::-1]
    plain = find_photos([tmp_path / "a.png"], minimum=1, crop="center").photos[0]
    in_the_middle = Crop(*((100, 0) if tall else (0, 100)), image.size[::-1])
    assert plain.focus is None and crop_photo(plain, [(200, 200)]).crop == in_the_middle


def test_a_crop_of_the_user_wins(tmp_path: Path) -> None:
    image = scene(400, 200, (60, 100))
    image.save(tmp_path / "a.png")
    photo = find_photos(tmp_path, minimum=1, crops={"a.png": (200, 0, 400, 100)}).photos[0]
    assert photo.focus is None
    assert np.array_equal(np.asarray(crop_photo(photo, [(100, 100)]).image), np.asarray(image.crop((250, 0, 350, 100))))


def test_a_square_photo_and_an_empty_one_are_cut_in_the_middle(tmp_path: Path) -> None:
    scene(200, 200, (50, 50)).save(tmp_path / "a.png")
    Image.new("RGB", (400, 200)).save(tmp_path / "b.png")
    Image.new("RGB", (200, 400), (9, 99, 199)).save(tmp_path / "c.png")
    assert [photo.focus for photo in find_photos(tmp_path).photos] == [None] * 3


def test_an_unknown_crop_is_a_mistake(folder: Path) -> None:
    with pytest.raises(PhotoError, match="crop 'middle' is unknown; allowed: smart, center"):
        find_photos(folder, crop="middle")  # type: ignore[arg-type]
    with pytest.raises(PhotoError, match=r"crop 'face' is unknown.*faces.*crops\.json or masks"):
        find_photos(folder, crop="face")  # type: ignore[arg-type]


@pytest.mark.parametrize("level", [0, 9])
def test_black_bars_are_cut_away(tmp_path: Path, level: int) -> None:
    inner = scene(300, 200, (150, 100))
    wide, tall = Image.new("RGB", (300, 320), (level,) * 3), Image.new("RGB", (420, 200), (level,) * 3)
    wide.paste(inner, (0, 60))
    tall.paste(inner, (60, 0))
    wide.save(tmp_path / "a.png")
    tall.save(tmp_path / "b.jpg", quality=80)
    for photo in find_photos(tmp_path, minimum=2).photos:
        assert photo.note == "black bars cut away" and photo.crop is not None
        square = np.asarray(crop_photo(photo, [(200, 200)]).image.convert("L"))
        assert square[:2].mean() > 60 and square[-2:].mean() > 60 and square[:, :2].mean() > 60 and square[:, -2:].mean() > 60
        assert square.shape == (200, 200)
    assert all(photo.crop is None for photo in find_photos(tmp_path, minimum=2, crop="center").photos)


def test_a_dark_scene_has_no_bars(tmp_path: Path) -> None:
    lamp = Image.new("RGB", (320, 200), (4, 4, 4))
    lamp.paste(scene(80, 120, (40, 60)), (120, 40))  # an object before black
    lamp.save(tmp_path / "a.png")
    one_side = Image.new("RGB", (320, 200), (4, 4, 4))
    one_side.paste(scene(200, 200, (100, 100)), (0, 0))
    one_side.save(tmp_path / "b.png")
    Image.new("RGB", (320, 200)).save(tmp_path / "c.png")
    assert [photo.crop for photo in find_photos(tmp_path).photos] == [None] * 3


# --- masks ------------------------------------------------------------------------------------------------------------


def disc_mask(width: int, height: int, middle: tuple[int, int], radius: int = 45) -> Image.Image:
    down, right = np.mgrid[0:height, 0:width]
    inside = (down - middle[1]) ** 2 + (right - middle[0]) ** 2 < radius**2
    return Image.fromarray((inside * 255).astype(np.uint8))


def test_a_mask_beside_a_photo(tmp_path: Path) -> None:
    scene(400, 200, (60, 100)).save(tmp_path / "a.jpg")
    disc_mask(400, 200, (320, 100)).save(tmp_path / "a.mask.png")  # elsewhere, so that it is seen who decides
    found = find_photos(tmp_path, minimum=1)
    assert [photo.path.name for photo in found.photos] == ["a.jpg"] and found.skipped == ()
    square = crop_photo(found.photos[0], [(100, 100)])
    assert square.crop.left > 60  # the mask's place, not that of what is salient
    assert square.mask is not None and square.mask.size == (100, 100) and square.mask.mode == "L"
    left = crop_box(400, 200, (100, 100), None, found.photos[0].focus)[0]
    exact = np.asarray(disc_mask(400, 200, (320, 100)))[:, left : left + 200].reshape(100, 2, 100, 2).mean(axis=(1, 3))
    assert np.abs(np.asarray(square.mask) - exact).max() <= 1
    listed = find_photos(sorted(tmp_path.iterdir()), minimum=1)  # as a list of files
    assert listed.photos == found.photos and listed.skipped == ()


def test_a_mask_in_code_comes_first(folder: Path, tmp_path: Path) -> None:
    Image.new("L", (96, 80), 255).save(folder / "img0.mask.png")
    half = Image.new("L", (96, 80))
    half.paste(255, (0, 0, 48, 80))
    half.save(tmp_path / "half.png")
    crops = {name: (0, 0, 80, 80) for name in ("img0.png", "img1.png")}
    masks: dict[str, Image.Image | str | Path] = {"img0.png": half, "img1.png": str(tmp_path / "half.png")}
    photos = find_photos(folder, crops=crops, masks=masks).photos
    for photo in photos[:2]:
        mask = np.asarray(crop_photo(photo, [(80, 80)]).mask)
        assert (mask[:, :48] == 255).all() and (mask[:, 48:] == 0).all()
    assert photos[2].mask is None and crop_photo(photos[2], [(80, 80)]).mask is None
    assert find_photos(folder, masks=masks, crops=crops).photos == photos
    other = find_photos(folder, masks={**masks, "img0.png": Image.new("L", (96, 80), 200)}, crops=crops).photos
    assert other[0] != photos[0]  # another mask is another photo
    with pytest.raises(PhotoError, match="a mask for 'gone.png', but there is no such photo"):
        find_photos(folder, masks={"gone.png": half})
    with pytest.raises(PhotoError, match="a value of type list; pass a file or a PIL image"):
        find_photos(folder, masks={"img0.png": [1]})  # type: ignore[dict-item]
    with pytest.raises(PhotoError, match="no such file"):
        find_photos(folder, masks={"img0.png": "a\0b.png"})


def test_masks_are_of_the_upright_photo(tmp_path: Path) -> None:
    exif = Image.Exif()
    exif[0x0112] = 6
    picture(0, 96, 160).transpose(Image.Transpose.ROTATE_90).save(tmp_path / "a.png", exif=exif)
    disc_mask(96, 160, (48, 130), 20).save(tmp_path / "a.mask.png")
    photo = one(tmp_path)
    assert (photo.width, photo.height) == (96, 160)
    mask = np.asarray(crop_photo(photo, [(96, 96)]).mask)
    assert mask.max() == 255 and mask.mean() / 255 == pytest.approx(np.pi * 20**2 / 96**2, abs=0.01)  # the whole disc is kept
    turned = disc_mask(96, 160, (48, 130), 20).transpose(Image.Transpose.ROTATE_90)
    turned.save(tmp_path / "a.mask.png", exif=exif)  # a mask may have an orientation of its own
    assert np.array_equal(np.asarray(crop_photo(one(tmp_path), [(96, 96)]).mask), mask)


def test_kinds_of_masks(tmp_path: Path) -> None:
    picture(0, 96, 96).save(tmp_path / "a.png")
    grey = disc_mask(96, 96, (48, 48), 30)
    clear = Image.merge("LA", (Image.new("L", (96, 96), 255), grey))  # white where it is opaque
    deep = Image.fromarray(np.asarray(grey).astype(np.uint16) * 257)
    for mask in (grey, grey.convert("1"), grey.convert("RGB"), clear, clear.convert("RGBA"), deep):
        mask.save(tmp_path / "a.mask.png")
        assert np.array_equal(np.asarray(crop_photo(one(tmp_path), [(96, 96)]).mask), np.asarray(grey)), mask.mode


def test_a_mask_that_changed_is_not_used(tmp_path: Path) -> None:
    picture(0, 96, 96).save(tmp_path / "a.png")
    disc_mask(96, 96, (48, 48), 30).save(tmp_path / "a.mask.png")
    photo = one(tmp_path)
    disc_mask(96, 96, (48, 48), 20).save(tmp_path / "a.mask.png")
    with pytest.raises(PhotoError, match="mask a.png: it changed since it was checked"):
        crop_photo(photo, [(64, 64)])


def test_a_mask_outside_the_crop_is_a_mistake(tmp_path: Path) -> None:
    picture(0, 200, 100).save(tmp_path / "a.png")
    disc_mask(200, 100, (30, 50), 20).save(tmp_path / "a.mask.png")
    with pytest.raises(PhotoError, match="no white inside the photo's crop"):
        find_photos(tmp_path, minimum=1, crops={"a.png": (100, 0, 200, 100)})


# --- the audit --------------------------------------------------------------------------------------------------------


def different_scenes(folder: Path, count: int = 5) -> Path:
    """One subject in places that have nothing in common."""
    folder.mkdir(parents=True, exist_ok=True)
    rng = np.random.default_rng(7)
    for index in range(count):
        down, right = np.mgrid[0:300, 0:300]
        values = rng.uniform(40, 200, 3) + 40 * np.sin(down / rng.uniform(9, 60) + right / rng.uniform(9, 60))[..., None]
        middle = rng.uniform(110, 190, 2)
        disc = (down - middle[0]) ** 2 + (right - middle[1]) ** 2 < 70**2
        values[disc] = (230, 160, 40)
        values[disc & (right % 12 < 4)] = (30, 20, 60)
        Image.fromarray((values + rng.normal(0, 6, values.shape)).clip(0, 255).astype(np.uint8)).save(folder / f"{index}.png")
    return folder


def notes_of(path: Path, resolution: int = 256) -> tuple[str, ...]:
    return audit_photos(find_photos([path], minimum=1).photos, resolution=resolution).photos[0].notes


def test_good_photos_get_no_advice(tmp_path: Path) -> None:
    found = find_photos(different_scenes(tmp_path))
    audit = audit_photos(found.photos, found.skipped, resolution=256)
    assert audit.advice == () and audit.near_duplicates == () and audit.alike_backgrounds == ()
    assert [report.notes for report in audit.photos] == [()] * 5


@pytest.mark.parametrize(
    ("note", "spoil"),
    [
        ("blurred", lambda image: image.filter(ImageFilter.GaussianBlur(4))),
        ("too dark", lambda image: image.point(lambda value: value // 6)),
        (
            "too bright",
            lambda image: ImageChops.lighter(image, Image.new("RGB", (300, 300), "white").crop((0, -150, 300, 150))),
        ),
        ("hardly any contrast", lambda image: image.point(lambda value: 200 + value // 20)),
        ("small: 120 px, enlarged to 256", lambda image: image.resize((120, 120))),
    ],
)
def test_what_is_wrong_with_a_photo(tmp_path: Path, note: str, spoil: Callable[[Image.Image], Image.Image]) -> None:
    path = different_scenes(tmp_path, 1) / "0.png"
    spoil(Image.open(path)).save(path)
    assert notes_of(path)[0] == note


def test_a_white_studio_is_not_too_bright(tmp_path: Path) -> None:
    image = Image.new("RGB", (300, 300), "white")
    image.paste(scene(150, 150, (75, 75), 60), (75, 75))
    image.save(tmp_path / "a.png")
    assert notes_of(tmp_path / "a.png") == ()
    image.point(lambda value: min(255, value * 3)).save(tmp_path / "b.png")  # the subject is spoilt, not only the wall white
    assert "too bright" in notes_of(tmp_path / "b.png")


def test_bright_colours_lose_a_channel_first(tmp_path: Path) -> None:
    """Yellow cloth turned (255, 255, 140) by too much light is spoilt; a drawing in pure red and blue is not."""
    for name, colour in (("cloth", (255, 255, 140)), ("red", (255, 0, 0)), ("blue", (0, 0, 255)), ("orange", (255, 120, 0))):
        image = scene(300, 300, (150, 80), 60)
        image.paste(colour, (0, 160, 300, 300))
        image.save(tmp_path / f"{name}.png")
        assert ("too bright" in notes_of(tmp_path / f"{name}.png")) == (name == "cloth"), name


def test_small_and_cut_subjects(tmp_path: Path) -> None:
    scene(300, 300, (150, 150), 20).save(tmp_path / "a.png")  # 1.4 % of it
    disc_mask(300, 300, (150, 150), 20).save(tmp_path / "a.mask.png")
    scene(300, 300, (150, 150), 20, seed=1, grey=160).save(tmp_path / "b.png")  # without a mask, nobody can say
    scene(400, 200, (60, 100), 50, seed=2, grey=180).save(tmp_path / "c.png")
    disc_mask(400, 200, (60, 100), 50).save(tmp_path / "c.mask.png")
    found = find_photos(tmp_path, crop="center")
    reports = audit_photos(found.photos, resolution=200).photos
    assert [report.notes for report in reports] == [("the subject is small",), (), ("the crop cuts the subject",)]
    shares = [report.measures.subject for report in reports]
    assert shares[0] is not None and shares[0] < 0.05 and shares[1] is None and shares[2] is not None
    assert reports[2].kept == pytest.approx(0.05, abs=0.04)
    smart = audit_photos(find_photos(tmp_path).photos, resolution=200).photos[2]
    assert smart.notes == () and smart.kept == 1.0
    assert smart.measures.subject == pytest.approx(np.pi * 50**2 / 200**2, abs=0.01)  # of the mask: exact


def test_threads_that_decode_leave_what_is_set_for_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One inside the other's context, and left after it."""
    scene(300, 300, (150, 150), 70).save(tmp_path / "a.png")
    monkeypatch.setattr(ImageFile, "LOAD_TRUNCATED_IMAGES", True)
    before, inside, entered, done = list(warnings.filters), threading.Event(), threading.Event(), threading.Event()

    def other() -> None:
        inside.wait()
        with opening.opened(tmp_path / "a.png"):
            entered.set()
            done.wait()

    thread = threading.Thread(target=other)
    thread.start()
    with opening.opened(tmp_path / "a.png"):
        inside.set()
        both_inside = entered.wait(0.3)
    done.set()
    thread.join()
    assert not both_inside and ImageFile.LOAD_TRUNCATED_IMAGES and warnings.filters == before


def test_tiny_resolutions_are_measured_too(tmp_path: Path) -> None:
    scene(300, 300, (150, 150), 70).save(tmp_path / "a.png")
    [report] = audit_photos(find_photos(tmp_path, minimum=1).photos, resolution=8).photos
    assert np.isfinite(report.measures.sharpness)


def test_near_duplicates_are_found(tmp_path: Path) -> None:
    different_scenes(tmp_path)
    image = Image.open(tmp_path / "1.png")
    image.save(tmp_path / "again.jpg", quality=40)
    image.transpose(Image.Transpose.FLIP_LEFT_RIGHT).point(lambda value: min(255, value + 15)).save(tmp_path / "mirror.png")
    image.resize((150, 150)).save(tmp_path / "small.webp")
    audit = audit_photos(find_photos(tmp_path).photos, resolution=256)
    assert audit.near_duplicates == (("1.png", "again.jpg", "mirror.png", "small.webp"),)
    assert audit.advice[0] == "4 photos are nearly the same: 1.png, again.jpg, mirror.png, small.webp; keep the best one"


def test_one_background_is_told(tmp_path: Path) -> None:
    for index, middle in enumerate([(100, 120), (160, 150), (200, 180), (150, 220), (130, 90)]):
        scene(300, 300, middle, 60, seed=index).save(tmp_path / f"{index}.png")
    audit = audit_photos(find_photos(tmp_path).photos, resolution=256)
    assert audit.alike_backgrounds == tuple(f"{index}.png" for index in range(5))
    assert any(line.startswith("all photos have much the same background: 0.png, ") for line in audit.advice)


def test_advice_on_the_number_and_on_copies(folder: Path) -> None:
    (folder / "copy.png").write_bytes((folder / "img0.png").read_bytes())
    found = find_photos(folder)
    advice = audit_photos(found.photos, found.skipped, resolution=64).advice
    assert "3 different photos are few; 5 to 30 teach a subject better" in advice
    assert advice[-1] == "copies are not used: img0.png"
    with pytest.raises(PhotoError, match="no photos"):
        audit_photos([])
    with pytest.raises(PhotoError, match="resolution 2"):
        audit_photos(found.photos, resolution=2)


def test_the_sheet_shows_the_training_pictures(tmp_path: Path) -> None:
    scene(400, 200, (60, 100)).save(tmp_path / "a.png")
    audit = audit_photos(find_photos(tmp_path, minimum=1).photos, resolution=160)
    trained = crop_photo(audit.photos[0].photo, [(160, 160)]).image
    assert np.array_equal(np.asarray(audit.sheet())[8:168, 8:168], np.asarray(trained))


def test_facts_are_json_without_folders(tmp_path: Path) -> None:
    (tmp_path / "secret place").mkdir()
    different_scenes(tmp_path / "secret place", 3)
    text = json.dumps(audit_photos(find_photos(tmp_path / "secret place").photos).as_dict())
    assert "secret place" not in text
    assert json.loads(text)["photos"][1]["crop"] == [0, 0, 300, 300]


@pytest.mark.slow
@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="the DreamBooth photos are not here")
def test_real_photos_raise_no_false_alarms() -> None:
    told = []
    for subject in ("cat2", "teapot"):  # with black bars, and the darkest and brightest; the benchmark has all
        found = find_photos(REAL_PHOTOS / subject)
        audit = audit_photos(found.photos, found.skipped)
        assert audit.advice == ()
        told += [f"{subject} {r.photo.path.stem}: {note}" for r in audit.photos for note in r.notes]
    assert told == [f"cat2 {stem}: black bars cut away" for stem in ("00", "01", "04")]


# --- training squares -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("factor", [2, 3, 4, 8])
def test_shrinking_is_the_average_of_the_area(factor: int) -> None:
    """Against the exact mean of each block, on a picture with detail no finer than a block."""
    y, x = np.mgrid[0 : 32 * factor, 0 : 32 * factor] / factor
    smooth = 127 + 60 * np.sin(x / 4) + 60 * np.cos(y / 5)
    large = np.repeat(np.rint(smooth).astype(np.uint8)[..., None], 3, axis=2)
    square = crop_and_resize(Image.fromarray(large), (32, 32))
    means = large.reshape(32, factor, 32, factor, 3).mean(axis=(1, 3))
    assert np.abs(np.asarray(square) - means)[1:-1, 1:-1].max() < 1.6


def test_fine_patterns_fade() -> None:
    """A one-pixel chessboard is grey from afar; picking single pixels would give black, white or stripes."""
    board = (np.indices((520, 520)).sum(0) % 2 * 255).astype(np.uint8)
    for resolution in (64, 130, 200):
        square = crop_and_resize(Image.fromarray(board).convert("RGB"), (resolution, resolution))
        assert np.abs(np.asarray(square)[2:-2, 2:-2] - 127.5).max() < 6


def test_right_size_is_untouched() -> None:
    square = crop_and_resize(picture(0, 80, 80), (80, 80))
    assert np.array_equal(np.asarray(square), np.asarray(picture(0, 80, 80)))
    assert crop_of(80, 80, (80, 80), None, None) == Crop(0, 0, (80, 80))


def test_no_bleeding_from_outside_the_square() -> None:
    framed = Image.new("RGB", (300, 100), (255, 0, 0))
    framed.paste((0, 0, 255), (100, 0, 200, 100))
    for resolution in (25, 64, 512):
        square = crop_and_resize(framed, (resolution, resolution))
        assert square.size == (resolution, resolution)
        assert (np.asarray(square) == (0, 0, 255)).all()


@pytest.mark.parametrize("size", [(1000, 800), (800, 1000), (781, 780), (3024, 4032), (300, 299), (1024, 1024), (333, 1300)])
@pytest.mark.parametrize("resolution", [64, 512, 1024])
def test_sdxl_coordinates(size: tuple[int, int], resolution: int) -> None:
    """As train_dreambooth_lora_sdxl.py with --center_crop: Resize(short side), then y1, x1 of the centre crop."""
    width, height = size
    crop = crop_of(width, height, (resolution, resolution), None, None)
    if width <= height:  # torchvision's Resize truncates the long side
        new_width, new_height = resolution, int(resolution * height / width)
    else:
        new_width, new_height = int(resolution * width / height), resolution
    assert crop.top == max(0, int(round((new_height - resolution) / 2.0)))
    assert crop.left == max(0, int(round((new_width - resolution) / 2.0)))
    assert crop.original_size == (height, width)


def test_tensor_range() -> None:
    image = picture(1)
    pixels = to_tensor(image)
    assert tuple(pixels.shape) == (1, 3, 80, 96)
    assert str(pixels.dtype) == "torch.float32"
    assert pixels.min() == -1 and pixels.max() == 1
    assert pixels[0, 2, 3, 4] == pytest.approx(image.getpixel((4, 3))[2] / 127.5 - 1)


@pytest.mark.slow
def test_contact_sheet() -> None:
    images = [picture(seed, 100, 50) for seed in range(7)]
    sheet = contact_sheet(images, labels=["a label that is far too long for a narrow tile " * 5] * 7, columns=3, side=60)
    assert sheet.mode == "RGB"
    assert sheet.width == 3 * 68 + 8
    bare = contact_sheet(images, columns=3, side=60)
    assert bare.size == (3 * 68 + 8, 3 * 68 + 8)
    assert contact_sheet([Image.new("RGB", (60, 60), (1, 2, 3))], side=60).getpixel((8, 8)) == (1, 2, 3)
    with pytest.raises(PhotoError, match="no pictures"):
        contact_sheet([])


@pytest.mark.skipif(not REAL_PHOTOS.is_dir(), reason="the DreamBooth photos are not here")
def test_real_photos() -> None:
    found = find_photos(REAL_PHOTOS / "dog")
    assert len(found.photos) == 5 and found.skipped == ()
    square = crop_and_resize(open_photo(found.photos[0]), (64, 64))
    assert square.size == (64, 64)
