"""Masks that nobody drew: a photo's transparency, and a segmenter's; and captions that nobody wrote."""

from __future__ import annotations

import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import lora_booth as lb
from lora_booth.photos.finding import find_photos
from lora_booth.photos.masks import MOST_GREY
from lora_booth.photos.opening import open_photo, read_mask
from lora_booth.photos.photo import Photo

WORDS: dict[str, Any] = {"token": "sks", "class_noun": "dog", "minimum": 1}


def noise(width: int, height: int, seed: int = 0) -> Image.Image:
    small = np.random.default_rng(seed).integers(0, 255, (height // 8, width // 8, 3), dtype=np.uint8)
    return Image.fromarray(small).resize((width, height), Image.Resampling.BICUBIC)


def disc(width: int, height: int, x: int, y: int, radius: int) -> Image.Image:
    down, right = np.mgrid[0:height, 0:width]
    return Image.fromarray((255 * ((right - x) ** 2 + (down - y) ** 2 < radius**2)).astype(np.uint8))


def cut_out(x: int, **options: Any) -> Image.Image:
    picture = noise(240, 160)
    picture.putalpha(disc(240, 160, x, 80, 50))
    return picture


def png_of(image: Image.Image) -> bytes:
    content = io.BytesIO()
    image.save(content, "PNG")
    return content.getvalue()


def only(folder: Path, **options: Any) -> Photo:
    [photo] = find_photos(folder, minimum=1, **options).photos
    return photo


def greys_of(photo: Photo) -> np.ndarray[Any, Any]:
    assert photo.mask is not None
    return np.asarray(read_mask(photo.mask.source, photo.name, sha256=photo.mask.sha256)[0])


# --- transparency --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("mode", ["RGBA", "LA", "P"])
def test_a_cut_out_photo_has_its_mask(mode: str, tmp_path: Path) -> None:
    picture = cut_out(180)
    if mode == "P":
        picture.putalpha(picture.getchannel("A"))
        picture = picture.quantize(200)
    picture.convert(mode).save(tmp_path / "rex.png")
    photo = only(tmp_path)
    expected = np.asarray(Image.open(tmp_path / "rex.png").convert("RGBA"))[..., 3]
    assert (greys_of(photo) == expected).all() and photo.note == "mask: its transparency"
    assert photo.focus is not None and photo.focus[0] > 0.55  # the square is where the subject is
    assert (np.asarray(open_photo(photo))[expected == 0] == 255).all()
    [report] = lb.Subject.from_folder(tmp_path, **WORDS).audit(resolution=64).photos
    assert "mask: its transparency" in report.notes and report.kept == pytest.approx(1.0, abs=0.03)
    noise(240, 160).save(tmp_path / "whole.jpg")
    (tmp_path / "whole.mask.png").write_bytes(png_of(disc(240, 160, 120, 80, 50)))
    audited = lb.Subject.from_folder([tmp_path / "whole.jpg"], **WORDS).audit(resolution=64).photos[0].thumbnail
    corner, centre = np.asarray(audited)[:20, :20], np.asarray(audited)[70:90, 70:90]
    assert corner.min() >= 0.7 * 255 - 1 and centre.min() < 0.7 * 255  # what the mask leaves out is pale
    (tmp_path / "whole.jpg").unlink()
    (tmp_path / "whole.mask.png").unlink()
    disc(240, 160, 60, 80, 30).save(tmp_path / "rex.mask.png")
    assert only(tmp_path).focus[0] < 0.5 and only(tmp_path).note is None  # type: ignore[index]  # a file comes first


def test_a_photo_lies_turned_with_its_mask(tmp_path: Path) -> None:
    picture = cut_out(180)
    exif = Image.Exif()
    exif[0x0112] = 6
    picture.save(tmp_path / "rex.png", exif=exif)
    photo = only(tmp_path)
    assert (photo.width, photo.height) == (160, 240)
    assert (greys_of(photo) == np.rot90(np.asarray(picture)[..., 3], -1)).all()


def test_transparency_that_is_no_mask(tmp_path: Path) -> None:
    """All of it, none of it, and rounded corners."""
    for name, alpha in (("all", 0), ("none", 255)):
        picture = noise(200, 160)
        picture.putalpha(alpha)
        picture.save(tmp_path / f"{name}.png")
        assert only([tmp_path / f"{name}.png"]).mask is None  # type: ignore[arg-type]
    picture = noise(200, 160)
    corners = Image.new("L", (200, 160), 255)
    corners.paste(0, (0, 0, 12, 12))
    picture.putalpha(corners)
    picture.save(tmp_path / "corners.png")
    assert only([tmp_path / "corners.png"]).mask is None  # type: ignore[arg-type]


# --- a segmenter's -------------------------------------------------------------------------------------------------------


def test_a_segmenter_that_is_sure_gives_the_mask(tmp_path: Path) -> None:
    noise(240, 160).save(tmp_path / "a.png")
    noise(240, 160, 1).save(tmp_path / "b.png")
    disc(240, 160, 60, 80, 40).save(tmp_path / "b.mask.png")
    seen: list[tuple[int, int]] = []

    def finds(greys: Image.Image | None) -> Any:
        def segment(picture: Image.Image) -> Image.Image | None:
            seen.append(picture.size)
            return greys

        return segment

    subject = lb.Subject.from_folder(tmp_path, masks=finds(disc(240, 160, 180, 80, 40)), **WORDS)
    assert seen == [(240, 160)] and not (tmp_path / "a.mask.png").exists()  # b has a mask
    photo = subject.photos[0]
    assert photo.note == "mask: by the segmenter" and photo.focus is not None and photo.focus[0] > 0.55
    assert (greys_of(photo) == np.asarray(disc(240, 160, 180, 80, 40))).all()
    soft = np.full((160, 240), 10, np.uint8)
    soft[40:120, 80:160] = 255
    share = soft.copy()
    soft[40:120, 80:139] = 130  # more than half as much grey as white
    assert 59 / 21 > MOST_GREY
    for greys, note in (
        (None, "no mask: the segmenter found no clear subject"),
        (Image.fromarray(soft), "no mask: the segmenter is unsure of the subject"),
        (Image.new("L", (240, 160), 255), "no mask: the segmenter took 100.0% of the photo for the subject"),
        (Image.fromarray(share), "mask: by the segmenter"),
    ):
        [photo] = lb.Subject.from_folder([tmp_path / "a.png"], masks=finds(greys), **WORDS).photos
        assert photo.note == note and (photo.mask is None) == note.startswith("no mask")
    with pytest.raises(lb.LoraBoothError, match="it must have the shape of the segmenter's input"):
        lb.Subject.from_folder([tmp_path / "a.png"], masks=finds(Image.new("L", (10, 90), 255)), **WORDS)
    with pytest.raises(lb.LoraBoothError, match="mask of a.png: the segmenter returned ndarray; needed: a PIL image or None"):
        lb.Subject.from_folder([tmp_path / "a.png"], masks=finds(soft), **WORDS)
    with pytest.raises(lb.LoraBoothError, match="masks 'all'; needed: a mapping or 'auto' or a function"):
        lb.Subject.from_folder([tmp_path / "a.png"], masks="all", **WORDS)


# --- captions ------------------------------------------------------------------------------------------------------------


def test_a_captioner_says_what_nobody_wrote(tmp_path: Path) -> None:
    for number in range(3):
        noise(100, 80, number).save(tmp_path / f"{number}.jpg")
    (tmp_path / "1.txt").write_text("my dog asleep")
    seen: list[tuple[str, tuple[int, int]]] = []

    def caption(picture: Image.Image) -> str:
        seen.append((picture.mode, picture.size))
        return "a dog\non  grass" if len(seen) == 1 else " "

    subject = lb.Subject.from_folder(tmp_path, captioner=caption, **WORDS)
    assert seen == [("RGB", (100, 80))] * 2  # not of the one with a caption
    assert [subject.prompt_for(photo) for photo in subject.photos] == [
        *("a sks dog on grass", "my sks dog asleep", "a photo of sks dog"),
    ]
    for wrong, said in ((5, "int; needed: a string"), ("x" * 3000, "3000 characters")):
        with pytest.raises(lb.LoraBoothError, match=f"caption by the captioner for 0.jpg: {said}"):
            lb.Subject.from_folder(tmp_path, captioner=lambda _: wrong, **WORDS)  # type: ignore[arg-type, return-value]  # noqa: B023


@pytest.mark.slow
def test_a_model_of_transformers_captions(tmp_path: Path) -> None:
    """A tiny BLIP, saved as one on the Hub is."""
    import torch
    from transformers import BertTokenizer, BlipConfig, BlipForConditionalGeneration, BlipProcessor
    from transformers.models.blip.image_processing_pil_blip import BlipImageProcessorPil

    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[DEC]", *"abcdefghijklmnopqrstuvwxyz", "dog", "cat", "grass"]
    (tmp_path / "vocab.txt").write_text("\n".join(words))
    tokenizer = BertTokenizer(str(tmp_path / "vocab.txt"))
    small = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "encoder_hidden_size": 16, "projection_dim": 16, "max_position_embeddings": 64}
    ids = {"bos_token_id": 4, "eos_token_id": 3, "sep_token_id": 3, "pad_token_id": 0}
    vision = {**small, "image_size": 32, "patch_size": 16, "projection_dim": 16}
    torch.manual_seed(0)
    net = BlipForConditionalGeneration(BlipConfig(text_config=text | ids, vision_config=vision, projection_dim=16)).eval()
    processor = BlipProcessor(BlipImageProcessorPil(size={"height": 32, "width": 32}), tokenizer)
    net.save_pretrained(tmp_path / "blip")
    processor.save_pretrained(tmp_path / "blip")
    caption, picture = lb.caption_model(tmp_path / "blip"), noise(100, 80)
    said = caption(picture)
    pixels = processor(images=picture, return_tensors="pt").pixel_values
    expected = net.generate(pixel_values=pixels, max_new_tokens=40, do_sample=False)
    assert said == processor.batch_decode(expected, skip_special_tokens=True)[0] and said.strip()
    with pytest.raises(lb.LoraBoothError, match="nothing: cannot be loaded as a caption model"):
        lb.caption_model(tmp_path / "nothing")
