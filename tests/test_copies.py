"""Copies of large pictures: made in strips, smaller while they are made."""

from __future__ import annotations

from io import BytesIO
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageCms
from test_photos import swapped_profile

from lora_booth.photos.cropping import crop_and_resize, crop_of, crop_photo
from lora_booth.photos.finding import find_photos
from lora_booth.photos.opening import STRIP, open_photo, row_strips, upright_copy, upright_size

WIDTH, HEIGHT = 203, 2 * STRIP + 53  # neither a multiple of what they are made smaller by, nor of a strip


def noise(bands: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, bands), dtype=np.uint8)


def block_means(values: np.ndarray, side: int) -> np.ndarray:
    """Mean of every side x side block of (H, W, C); those at the right and the bottom are of what is left there."""
    height, width = values.shape[:2]
    return np.array(
        [
            [values[y : y + side, x : x + side].reshape(-1, values.shape[2]).mean(axis=0) for x in range(0, width, side)]
            for y in range(0, height, side)
        ]
    )


@pytest.mark.parametrize("side", [1, 2, 3, 7, STRIP, STRIP + 9])
def test_a_smaller_copy_is_of_block_means(side: int) -> None:
    values = noise(3)
    copy = np.asarray(upright_copy(Image.fromarray(values), smaller=side), dtype=np.float64)
    assert copy.shape == (-(-HEIGHT // side), -(-WIDTH // side), 3)
    assert np.abs(copy - block_means(values.astype(np.float64), side)).max() <= 0.75  # Pillow counts in whole numbers


@pytest.mark.parametrize("mode", ["1", "L", "LA", "P", "RGB", "RGBA", "CMYK", "YCbCr", "I", "I;16", "F"])
def test_strips_change_nothing(mode: str, monkeypatch: pytest.MonkeyPatch) -> None:
    image = Image.fromarray(noise(4), "RGBA")
    if mode in ("I", "I;16", "F"):
        image = Image.fromarray(noise(1)[..., 0].astype({"I": np.int32, "I;16": np.uint16, "F": np.float32}[mode]) * 100)
    else:
        image = image if mode == "RGBA" else image.convert("RGB" if mode in ("CMYK", "YCbCr") else mode).convert(mode)
    for to in ("RGB", "L"):
        in_strips = np.asarray(upright_copy(image, to))
        with monkeypatch.context() as patch:
            patch.setattr("lora_booth.photos.opening.row_strips", lambda image, rows=0: iter([image]))
            assert np.array_equal(np.asarray(upright_copy(image, to)), in_strips), to


def test_hidden_colours_stay_hidden() -> None:
    """A block that is half transparent is half white, whatever colour lies under the transparent half."""
    values = np.zeros((64, 64, 4), dtype=np.uint8)
    values[:, ::2] = (200, 0, 0, 255)
    for hidden in ((0, 0, 0, 0), (0, 255, 0, 0)):
        values[:, 1::2] = hidden
        copy = np.asarray(upright_copy(Image.fromarray(values), smaller=4), dtype=np.int16)
        assert np.abs(copy - (228, 128, 128)).max() <= 2


def test_a_profile_is_kept_to_in_every_strip() -> None:
    """In one whose red is blue and whose blue is red, black and white are where they were and the colours are not."""
    image = Image.fromarray(noise(3))
    plain = np.asarray(image)
    image.info["icc_profile"] = swapped_profile()
    source, srgb = ImageCms.ImageCmsProfile(BytesIO(swapped_profile())), ImageCms.createProfile("sRGB")
    flags = ImageCms.Flags.BLACKPOINTCOMPENSATION
    whole = ImageCms.profileToProfile(image, source, srgb, ImageCms.Intent.RELATIVE_COLORIMETRIC, "RGB", flags=flags)
    assert np.abs(np.asarray(whole).astype(int) - plain).mean() > 30
    assert np.array_equal(np.asarray(upright_copy(image)), np.asarray(whole))
    image.info["icc_profile"] = ImageCms.ImageCmsProfile(ImageCms.createProfile("LAB")).tobytes()  # of other colours
    assert np.array_equal(np.asarray(upright_copy(image)), plain)


@pytest.mark.parametrize("orientation", range(1, 9))
def test_upright_size(orientation: int) -> None:
    data = BytesIO()
    exif = Image.Exif()
    exif[0x0112] = orientation
    Image.fromarray(noise(3)).save(data, "JPEG", exif=exif)
    with Image.open(data) as image:
        assert upright_copy(image).size == upright_size(image) == ((WIDTH, HEIGHT) if orientation < 5 else (HEIGHT, WIDTH))
        width, height = upright_size(image)
        assert upright_copy(image, smaller=4).size == (-(-width // 4), -(-height // 4))


def test_strips_are_the_picture() -> None:
    image = Image.fromarray(noise(3))
    strips = list(row_strips(image, 50))
    assert [strip.height for strip in strips] == [50, 50, 50, HEIGHT - 150]
    assert np.array_equal(np.concatenate([np.asarray(strip) for strip in strips]), noise(3))


# --- photos that are large enough for it ----------------------------------------------------------------------------


def large_scene(width: int = 3001, height: int = 2003) -> Image.Image:
    """Smooth colours, a disc off the middle and a fine pattern in it."""
    y, x = np.mgrid[:height, :width]
    values = np.stack([x * 200 // width + 20, y * 200 // height + 20, (x + y) * 90 // (width + height)], axis=-1)
    disc = (x - 0.62 * width) ** 2 + (y - 0.4 * height) ** 2 < (0.21 * height) ** 2
    values[disc] = np.stack([230 - (x[disc] // 9 % 2) * 90, 60 + (y[disc] // 11 % 2) * 90, 0 * x[disc] + 40], axis=-1)
    return Image.fromarray(values.astype(np.uint8))


@pytest.mark.slow
@pytest.mark.parametrize("crop", [None, (0.11, 0.07, 0.83, 0.93)])
@pytest.mark.parametrize("resolution", [64, 512])
def test_the_square_of_a_large_photo(tmp_path: Path, resolution: int, crop: tuple[float, ...] | None) -> None:
    """It is that of the whole picture, but for the rounding of the square's corner to the smaller copy's pixels."""
    large_scene().save(tmp_path / "a.png")
    photo = find_photos(tmp_path, minimum=1, crops=None if crop is None else {"a.png": crop}).photos[0]
    assert (photo.width, photo.height) == (3001, 2003)
    square = crop_photo(photo, [(resolution, resolution)])
    whole = crop_and_resize(open_photo(photo), (resolution, resolution), photo.crop, focus=photo.focus)
    assert square.crop == crop_of(3001, 2003, (resolution, resolution), photo.crop, photo.focus)
    difference = np.asarray(square.image, dtype=np.float64) - np.asarray(whole, dtype=np.float64)
    assert np.sqrt((difference**2).mean()) < 6
    assert np.abs(difference.mean(axis=(0, 1))).max() < 1


@pytest.mark.slow
def test_a_large_photo_saved_anew(tmp_path: Path) -> None:
    scene = large_scene()
    scene.save(tmp_path / "a.png")
    scene.save(tmp_path / "b.bmp")
    values = np.asarray(scene).copy()
    values[1000:1040, 1500:1540] = 255 - values[1000:1040, 1500:1540]
    Image.fromarray(values).save(tmp_path / "c.png")
    found = find_photos(tmp_path, minimum=1)
    assert [photo.path.name for photo in found.photos] == ["a.png", "c.png"]
    assert [(one.path.name, one.reason) for one in found.skipped] == [("b.bmp", "the same picture as a.png")]
