"""Bad photos and bad files beside them, built by code, each with its expected outcome."""

# ruff: noqa: E501  # one line a case

from __future__ import annotations

import io
import json
import os
import struct
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from PIL import Image, ImageCms
from spoilt import cut_at, flipped

Outcome = Literal["used", "skipped", "refused"]  # refused: a PhotoError for the whole folder, as the file is the user's word
WIDTH, HEIGHT = 96, 80


@dataclass(frozen=True)
class HostilePhoto:
    name: str
    file: str  # which this is about
    build: Callable[[Path], None]  # into a folder with three good photos, good0.png to good2.png
    outcome: Outcome
    says: str = ""  # a part of the reason, of the note or of the error
    shows: Callable[[Image.Image], bool] = lambda image: True  # of a used photo, upright
    large: bool = False  # only benchmarks/hostile_photos.py builds it


def picture(seed: int = 9, width: int = WIDTH, height: int = HEIGHT) -> Image.Image:
    """Noise: sharp, without symmetry, never the same for two seeds."""
    return Image.fromarray(np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8))


def good_folder(folder: Path) -> Path:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(3):
        picture(index).save(folder / f"good{index}.png")
    return folder


def encoded(kind: str, image: Image.Image | None = None, **options: object) -> bytes:
    buffer = io.BytesIO()
    (image or picture()).save(buffer, kind, **options)
    return buffer.getvalue()


def chunk(name: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))


def png(width: int, height: int, rows: bytes, *, depth: int = 8, colour: int = 0, extra: bytes = b"") -> bytes:
    """rows: what is compressed, whether it fits or not"""
    header = chunk(b"IHDR", struct.pack(">IIBBBBB", width, height, depth, colour, 0, 0, 0))
    return b"\x89PNG\r\n\x1a\n" + header + extra + chunk(b"IDAT", zlib.compress(rows)) + chunk(b"IEND", b"")


def with_chunk(extra: bytes) -> bytes:
    """A good PNG with one more chunk after its header."""
    good = encoded("PNG")
    return good[:33] + extra + good[33:]


def bomb(size: int) -> bytes:
    return zlib.compress(bytes(size), 9)


def exif(orientation: int) -> Image.Exif:
    block = Image.Exif()
    block[0x0112] = orientation
    return block


def tiff_with_itself_as_next_page() -> bytes:
    data = bytearray(encoded("TIFF"))
    first = struct.unpack("<I", data[4:8])[0]
    entries = struct.unpack("<H", data[first : first + 2])[0]
    data[first + 2 + 12 * entries :][:4] = b""
    data[first + 2 + 12 * entries : first + 6 + 12 * entries] = struct.pack("<I", first)
    return bytes(data)


def tiff_header(width: int, height: int) -> bytes:
    """Says that it is huge; has nothing."""
    tags = [
        (256, 4, 1, width),
        (257, 4, 1, height),
        (258, 3, 1, 8),
        (259, 3, 1, 1),
        (262, 3, 1, 1),
        (273, 4, 1, 8),
        (278, 4, 1, height),
    ]
    tags += [(279, 4, 1, 100)]
    body = struct.pack("<H", len(tags)) + b"".join(struct.pack("<HHII", *tag) for tag in tags) + struct.pack("<I", 0)
    return b"II*\0" + struct.pack("<I", 8) + body


def bmp_header(width: int, height: int) -> bytes:
    return b"BM" + struct.pack("<IHHI", 100, 0, 0, 54) + struct.pack("<IiiHHIIiiII", 40, width, height, 1, 24, 0, 0, 0, 0, 0, 0)


def webp_header(width: int, height: int) -> bytes:
    extended = (
        b"VP8X" + struct.pack("<I", 10) + bytes(4) + (width - 1).to_bytes(3, "little") + (height - 1).to_bytes(3, "little")
    )
    return b"RIFF" + struct.pack("<I", 4 + len(extended)) + b"WEBP" + extended


def jpeg_of_declared_size(width: int, height: int) -> bytes:
    """A good JPEG whose frame header says another size."""
    data = bytearray(encoded("JPEG"))
    at = data.index(b"\xff\xc0")
    data[at + 5 : at + 9] = struct.pack(">HH", height, width)
    return bytes(data)


def comments(count: int) -> bytes:
    """A JPEG with megabytes of comments."""
    good = encoded("JPEG")
    segment = b"\xff\xfe" + struct.pack(">H", 65535) + b"x" * 65533
    return good[:2] + segment * count + good[2:]


def greys(values: np.ndarray) -> Image.Image:
    return Image.fromarray(values)


def ramp(top: float, kind: type = np.float32) -> Image.Image:
    """From 0 on the left to `top` on the right."""
    return greys(np.tile(np.linspace(0, top, WIDTH), (HEIGHT, 1)).astype(kind))


def is_ramp(image: Image.Image) -> bool:
    row = np.asarray(image)[HEIGHT // 2, :, 0].astype(float)
    return bool(np.abs(row - np.linspace(0, 255, WIDTH)).max() < 2)


def white_left(image: Image.Image) -> bool:
    pixels = np.asarray(image)
    return bool((pixels[:, : WIDTH // 2] == 255).all() and not (pixels[:, WIDTH // 2 :] == 255).all())


def half_hidden(mode: str) -> Image.Image:
    """The left half has secret pixels under alpha 0."""
    alpha = np.zeros((HEIGHT, WIDTH), np.uint8)
    alpha[:, WIDTH // 2 :] = 255
    return Image.fromarray(np.dstack([np.asarray(picture()), alpha])).convert(mode)


def half_hidden_palette(folder: Path) -> None:
    image = Image.new("P", (WIDTH, HEIGHT), 0)
    image.putpalette([200, 0, 0, 0, 0, 200])
    image.paste(1, (WIDTH // 2, 0, WIDTH, HEIGHT))
    image.save(folder / "x.png", transparency=0)


def half_hidden_grey16(folder: Path) -> None:
    values = np.full((HEIGHT, WIDTH), 30_000, np.uint16)
    values[:, : WIDTH // 2] = 1234
    greys(values).save(folder / "x.png", transparency=1234)


def barred() -> Image.Image:
    image = Image.new("RGB", (240, 160))
    image.paste(picture(9, 140, 160), (50, 0))
    return image


def shows_the_picture(image: Image.Image) -> bool:
    return np.array_equal(np.asarray(image), np.asarray(picture()))


def is_upright(image: Image.Image) -> bool:
    """Of the picture stored lying down."""
    return np.array_equal(np.asarray(image), np.rot90(np.asarray(picture()), -1))


def link(target: Callable[[Path], Path]) -> Callable[[Path], None]:
    return lambda folder: (folder / "x.png").symlink_to(target(folder))


def outside(folder: Path) -> Path:
    path = folder.parent / "outside.png"
    picture().save(path)
    return path


def sparse(folder: Path) -> None:
    with open(folder / "x.jpg", "wb") as file:
        file.write(encoded("JPEG"))
        file.truncate(600 * 2**20)


def beside(**files: bytes) -> Callable[[Path], None]:
    """x.png with other files beside it; `__` stands for a dot in their names."""

    def build(folder: Path) -> None:
        picture().save(folder / "x.png")
        for name, data in files.items():
            (folder / name.replace("__", ".")).write_bytes(data)

    return build


def masked(mask: bytes) -> Callable[[Path], None]:
    return beside(x__mask__png=mask)


def mask_png(width: int = WIDTH, height: int = HEIGHT, value: int = 255) -> bytes:
    image = Image.new("L", (width, height))
    image.paste(value, (width // 4, height // 4, width // 2, height // 2))
    return encoded("PNG", image)


def animated(kind: str, **options: object) -> bytes:
    return encoded(kind, save_all=True, append_images=[picture(10), picture(11)], **options)


def data(file: str, content: Callable[[], bytes]) -> Callable[[Path], None]:
    return lambda folder: (folder / file).write_bytes(content()) and None


def case(
    name: str,
    file: str,
    content: Callable[[], bytes],
    outcome: Outcome,
    says: str = "",
    shows: Callable[[Image.Image], bool] = lambda image: True,
    large: bool = False,
) -> HostilePhoto:
    """One file with these bytes."""
    return HostilePhoto(name, file, data(file, content), outcome, says, shows, large)


def hostile_photos() -> list[HostilePhoto]:
    cut = "damaged or truncated"
    huge = "more than 50 megapixels"
    cases = [
        # what other programs leave in folders
        case("Finder's notes", ".DS_Store", lambda: b"\0\0\0\1Bud1", "skipped", "hidden"),
        case("Finder's shadow of a photo", "._x.jpg", lambda: b"\0\5\x16\7", "skipped", "hidden"),
        case("Windows' thumbnails", "Thumbs.db", lambda: b"\xd0\xcf\x11\xe0", "skipped", "a system file"),
        case("Windows' folder settings", "desktop.ini", lambda: b"[.ShellClassInfo]", "skipped", "a system file"),
        HostilePhoto("a folder named like a photo", "x.jpg", lambda f: (f / "x.jpg").mkdir(), "skipped", "a folder"),
        HostilePhoto("a notebook's folder", ".ipynb_checkpoints", lambda f: (f / ".ipynb_checkpoints").mkdir(), "skipped", "hidden"),
        # no photos
        case("nothing", "x.png", lambda: b"", "skipped", "empty (0 bytes)"),
        case("one byte", "x.png", lambda: b"\x89", "skipped", "not a photo"),
        case("zeros", "x.jpg", lambda: bytes(5000), "skipped", "not a photo"),
        case("a web page", "x.jpg", lambda: b"<!doctype html><title>403", "skipped", "not a photo"),
        case("SVG", "x.png", lambda: b"<svg xmlns='http://www.w3.org/2000/svg'/>", "skipped", "not a photo"),
        case("PostScript that would run", "x.jpg", lambda: b"%!PS-Adobe-3.0 EPSF-3.0\n(x) (w) file\n", "skipped", "not a photo"),
        case("PDF", "x.jpg", lambda: b"%PDF-1.7\n", "skipped", "not a photo"),
        case("GIF", "x.gif", lambda: encoded("GIF"), "skipped", "not a photo"),
        case("GIF named PNG", "x.png", lambda: encoded("GIF"), "skipped", "not a photo"),
        case("Photoshop", "x.psd", lambda: b"8BPS\0\1" + bytes(20), "skipped", "not a photo"),
        case("icon", "x.ico", lambda: encoded("ICO", picture(9, 64, 64)), "skipped", "not a photo"),
        case("a clip", "x.heic", lambda: b"\0\0\0\x14ftypqt  \0\0\0\0qt  ", "skipped", "not a photo"),
        case("camera raw", "x.nef", lambda: encoded("TIFF"), "skipped", "camera raw"),
        case("no more than HEIC's first bytes", "x.heic", lambda: b"\0\0\0\x18ftypheic\0\0\0\0mif1heic", "skipped"),
        case("no more than AVIF's first bytes", "x.avif", lambda: b"\0\0\0\x18ftypavif\0\0\0\0mif1avif", "skipped"),
        # broken
        *(
            case(f"{kind} cut at {part} %", f"x.{kind.lower()}", lambda k=kind, p=part: cut_at(encoded(k), p), "skipped", cut)
            for kind in ("JPEG", "PNG", "WEBP", "TIFF", "BMP")
            for part in (30, 95)
        ),
        case("PNG with a wrong checksum", "x.png", lambda: flipped(encoded("PNG"), 29), "skipped", cut),
        case("PNG without pixels", "x.png", lambda: png(WIDTH, HEIGHT, b""), "skipped", cut),
        case("PNG of size 0", "x.png", lambda: png(0, 0, b"x"), "skipped", cut),
        case("PNG of 7 bits", "x.png", lambda: png(WIDTH, HEIGHT, bytes(9000), depth=7), "skipped", cut),
        case("TIFF with no tags", "x.tif", lambda: b"II*\0\x08\0\0\0\0\0\0\0\0\0", "skipped", cut),
        case("WebP that is only a header", "x.webp", lambda: webp_header(WIDTH, HEIGHT), "skipped", cut),
        case("TIFF that is its own next page", "x.tif", tiff_with_itself_as_next_page, "used", shows=shows_the_picture),
        case("JPEG with another file behind it", "x.jpg", lambda: encoded("JPEG") + b"PK\3\4" + bytes(5000), "used"),
        case("PNG with another file behind it", "x.png", lambda: encoded("PNG") + b"PK\3\4", "used", shows=shows_the_picture),
        # bombs
        case("81 megapixels in 10 KB", "x.png", lambda: png(9000, 9000, bytes(10_000)), "skipped", huge),
        case("900 megapixels", "x.png", lambda: png(30_000, 30_000, bytes(10_000)), "skipped", huge),
        case("the largest PNG", "x.png", lambda: png(2**31 - 1, 2**31 - 1, bytes(10)), "skipped", huge),
        case("JPEG that says 65,535 x 65,535", "x.jpg", lambda: jpeg_of_declared_size(65_535, 65_535), "skipped", huge),
        case("BMP that says 30,000 x 30,000", "x.bmp", lambda: bmp_header(30_000, 30_000), "skipped", huge),
        case("TIFF that says 100,000 x 100,000", "x.tif", lambda: tiff_header(100_000, 100_000), "skipped", huge),
        case("WebP that says 16,383 x 16,383", "x.webp", lambda: webp_header(16_383, 16_383), "skipped"),
        case("JPEG that says 7,000 x 7,000 and ends", "x.jpg", lambda: jpeg_of_declared_size(7000, 7000), "used", "contrast", large=True),
        case("PNG text that unpacks to 200 MB", "x.png", lambda: with_chunk(chunk(b"zTXt", b"a\0\0" + bomb(2 * 10**8))), "skipped", cut),
        case("PNG profile that unpacks to 200 MB", "x.png", lambda: with_chunk(chunk(b"iCCP", b"a\0\0" + bomb(2 * 10**8))), "skipped", cut),
        case("10 MB of comments", "x.jpg", lambda: comments(160), "used"),
        case("20,000 x 1", "x.png", lambda: png(20_000, 1, bytes(20_001)), "skipped", "the short side needs 64"),
        case("1 x 20,000", "x.png", lambda: png(1, 20_000, bytes(40_000)), "skipped", "the short side needs 64"),
        case("1 x 1", "x.png", lambda: encoded("PNG", picture(9, 1, 1)), "skipped", "the short side needs 64"),
        case("63 pixels", "x.png", lambda: encoded("PNG", picture(9, 63, 80)), "skipped", "the short side needs 64"),
        case("a strip", "x.png", lambda: encoded("PNG", picture(9, 401, 100)), "skipped", "longer than 4:1"),
        HostilePhoto("a file of 600 MB", "x.jpg", sparse, "skipped", "larger than 512 MB"),
        case("49 megapixels in 48 KB", "x.png", lambda: png(7000, 7000, bytes(7001 * 7000)), "used", large=True),
        case("49 megapixels with transparency", "x.png", lambda: png(7000, 7000, bytes(28_001 * 7000), colour=6), "used", large=True),
        case("49 megapixels, CMYK", "x.jpg", lambda: encoded("JPEG", Image.new("CMYK", (7000, 7000))), "used", large=True),
        case("49 megapixels of floats", "x.tif", lambda: encoded("TIFF", Image.new("F", (7000, 7000))), "used", large=True),
        case("48 megapixels lying down", "x.jpg", lambda: large_photo(exif=exif(6)), "used", large=True),
        # pixels that other tools misread
        case("16-bit grey", "x.png", lambda: encoded("PNG", ramp(65_535, np.uint16)), "used", shows=is_ramp),
        case("floats up to 1", "x.tif", lambda: encoded("TIFF", ramp(1.0)), "used", shows=is_ramp),
        case("floats up to 65,535", "x.tif", lambda: encoded("TIFF", ramp(65_535.0)), "used", shows=is_ramp),
        case("32-bit grey", "x.tif", lambda: encoded("TIFF", ramp(2.0**31 - 129, np.int32)), "used", shows=is_ramp),
        case("NaN", "x.tif", lambda: encoded("TIFF", ramp(np.nan)), "skipped", "NaN or infinite"),
        case("infinite", "x.tif", lambda: encoded("TIFF", greys(np.full((HEIGHT, WIDTH), np.inf, np.float32))), "skipped", "NaN"),
        case("negative", "x.tif", lambda: encoded("TIFF", ramp(-1.0)), "skipped", "negative"),
        case("hidden pixels", "x.png", lambda: encoded("PNG", half_hidden("RGBA")), "used", shows=white_left),
        case("hidden greys", "x.png", lambda: encoded("PNG", half_hidden("LA")), "used", shows=white_left),
        HostilePhoto("a hidden colour of a palette", "x.png", half_hidden_palette, "used", shows=white_left),
        HostilePhoto("a hidden 16-bit grey", "x.png", half_hidden_grey16, "used", shows=white_left),
        case("CMYK", "x.jpg", lambda: encoded("JPEG", Image.new("CMYK", (WIDTH, HEIGHT), (0, 255, 255, 0))), "used", shows=is_red),
        case("one bit", "x.png", lambda: encoded("PNG", picture().convert("1")), "used"),
        case("L*a*b*", "x.tif", lambda: encoded("TIFF", Image.new("LAB", (WIDTH, HEIGHT))), "skipped", "colour mode LAB"),
        case("a broken profile", "x.png", lambda: encoded("PNG", icc_profile=b"none"), "used", shows=shows_the_picture),
        case("a profile of another kind", "x.png", lambda: encoded("PNG", picture().convert("L"), icc_profile=srgb()), "used"),
        # orientation
        case("lying down", "x.png", lambda: encoded("PNG", exif=exif(6)), "used", shows=is_upright),
        case("an orientation that is none", "x.png", lambda: encoded("PNG", exif=exif(99)), "used", shows=shows_the_picture),
        case("a broken EXIF block", "x.png", lambda: encoded("PNG", exif=b"Exif\0\0MM\0*\xff\xff\xff\xff"), "used", shows=shows_the_picture),
        case("EXIF that points to itself", "x.png", lambda: encoded("PNG", exif=exif_loop()), "used", shows=shows_the_picture),
        # several pictures in one
        case("moving WebP", "x.webp", lambda: animated("WEBP", lossless=True, exact=True), "used", "first frame", shows_the_picture),
        case("moving PNG", "x.png", lambda: animated("PNG"), "used", "first frame", shows_the_picture),
        case("TIFF of three pages", "x.tif", lambda: animated("TIFF"), "used", "first one", shows_the_picture),
        case("JPEG with a preview", "x.jpg", lambda: encoded("MPO", save_all=True, append_images=[picture(10)]), "used"),
        case("the same file again", "x.png", lambda: encoded("PNG", picture(0)), "skipped", "the same file as good0.png"),
        case("the same pixels again", "x.bmp", lambda: encoded("BMP", picture(0)), "skipped", "the same picture as good0.png"),
        case("black bars", "x.png", lambda: encoded("PNG", barred()), "used", "black bars cut away"),
        # pictures of nothing
        case("all black", "x.png", lambda: encoded("PNG", Image.new("RGB", (WIDTH, HEIGHT))), "used", "too dark"),
        case("all white", "x.png", lambda: encoded("PNG", Image.new("RGB", (WIDTH, HEIGHT), "white")), "used", "contrast"),
        case("all transparent", "x.png", lambda: encoded("PNG", Image.new("RGBA", (WIDTH, HEIGHT))), "used", "contrast"),
        # beside a photo
        HostilePhoto("a caption that is no text", "x.png", beside(x__txt=b"\xff\xfe\xfd"), "refused", "read as UTF-8"),
        HostilePhoto("a caption without end", "x.png", beside(x__txt=b"word " * 1000), "refused", "at most 2000"),
        HostilePhoto("a caption with escape codes", "x.png", beside(x__txt=b"\x1b[2Ja dog\0"), "used"),
        HostilePhoto("nested crops", "x.png", beside(crops__json=b"[" * 100_000), "refused", "crops.json"),
        HostilePhoto("a crop of NaN", "x.png", beside(crops__json=b'{"x.png": [NaN, 0, 1, 1]}'), "refused", "NaN is not a finite number"),
        HostilePhoto("a crop outside", "x.png", beside(crops__json=b'{"x.png": [0, 0, 99999, 1]}'), "refused", "outside"),
        HostilePhoto("a crop of nobody", "x.png", beside(crops__json=json.dumps({"y": [0, 0, 1, 1]}).encode()), "refused", "no such photo"),
        HostilePhoto("a mask lying down", "x.png", masked(mask_png(HEIGHT, WIDTH)), "refused", "shape of the upright photo"),
        HostilePhoto("a mask of another shape", "x.png", masked(mask_png(90, 90)), "refused", "shape of the upright photo"),
        HostilePhoto("a mask with no white", "x.png", masked(mask_png(value=1)), "refused", "no white"),
        HostilePhoto("a broken mask", "x.png", masked(mask_png()[:60]), "refused", cut),
        HostilePhoto("a mask that is no picture", "x.png", masked(b"hello, world"), "refused", "not a photo"),
        HostilePhoto("a mask that is a bomb", "x.png", masked(png(9000, 9000, bytes(10))), "refused", huge),
        HostilePhoto("a small mask", "x.png", masked(mask_png(WIDTH // 2, HEIGHT // 2)), "used"),
        case("a mask without a photo", "y.mask.png", mask_png, "skipped", "a mask without a photo"),
        case("a caption without a photo", "y.txt", lambda: b"a dog", "skipped", "a caption without a photo"),
    ]  # fmt: skip
    if hasattr(os, "mkfifo"):
        links = "a link that leaves the folder"
        cases += [
            HostilePhoto("a pipe", "x.png", lambda folder: os.mkfifo(folder / "x.png"), "skipped", "not a regular file"),
            HostilePhoto("a device", "x.png", link(lambda folder: Path("/dev/zero")), "skipped", links),
            HostilePhoto("a link that leaves", "x.png", link(outside), "skipped", links),
            HostilePhoto("a link to nothing", "x.png", link(lambda folder: folder / "gone"), "skipped", "a broken link"),
            HostilePhoto("a link to itself", "x.png", link(lambda folder: folder / "x.png"), "skipped", "a broken link"),
            HostilePhoto("a link inside", "x.png", link(lambda folder: folder / "good0.png"), "skipped", "the same file"),
            HostilePhoto("a mask that is a link out", "x.mask.png", link_mask, "skipped", links),
            *(
                case(f"a name with {what}", os.fsdecode(name), lambda: encoded("PNG"), "used", shows=shows_the_picture)
                for what, name in (
                    ("a line break", b"x\ny.png"),
                    ("escape codes", b"\x1b[2J\x1b]0;x\x07.png"),
                    ("bytes that are no UTF-8", b"x\xff\xfe.png"),
                    ("a direction mark", "x\u202egnp.png".encode()),
                    ("255 bytes", b"x" * 251 + b".png"),
                    ("a placeholder", b"{token}%s$(id).png"),
                )
            ),
        ]
    return cases


def is_red(image: Image.Image) -> bool:
    red, green, blue = np.asarray(image)[40, 48].tolist()
    return red > 200 and green < 60 and blue < 60


def srgb() -> bytes:
    return ImageCms.ImageCmsProfile(ImageCms.createProfile("sRGB")).tobytes()


def exif_loop() -> bytes:
    """Its EXIF and GPS blocks begin where the first block does."""
    tags = struct.pack(">HHII", 0x8769, 4, 1, 8) + struct.pack(">HHII", 0x8825, 4, 1, 8)
    return b"Exif\0\0MM\0*" + struct.pack(">I", 8) + struct.pack(">H", 2) + tags + struct.pack(">I", 8)


def large_photo(**options: object) -> bytes:
    small = picture(9, 800, 600).resize((8000, 6000), Image.Resampling.BICUBIC)
    return encoded("JPEG", small, quality=90, **options)


def link_mask(folder: Path) -> None:
    picture().save(folder / "x.png")
    (folder.parent / "outside.png").write_bytes(mask_png())
    (folder / "x.mask.png").symlink_to(folder.parent / "outside.png")
