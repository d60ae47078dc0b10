"""Photos in their own shapes: sizes, crops, batches of one size, and trainings that are the same again."""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps
from pipelines import base_of
from torch import Tensor

from lora_booth.adapters.adapter import Adapter
from lora_booth.base.base_model import BaseModel
from lora_booth.base.families import SDXL_SIZES
from lora_booth.config import LoraSpec, TrainingConfig, settled
from lora_booth.errors import SettingsError
from lora_booth.kernels.capture import StepGraph
from lora_booth.photos.audit import audit_photos
from lora_booth.photos.cropping import Crop, crop_box, crop_of, crop_photo, picture_sizes, size_for
from lora_booth.photos.finding import find_photos
from lora_booth.photos.photo import Photo
from lora_booth.planning.counting import count_step
from lora_booth.planning.shapes import without_weights
from lora_booth.runs.one import train
from lora_booth.subject.subject import Subject
from lora_booth.training import training_run
from lora_booth.training.encoding import prepare
from lora_booth.training.latents import Bucket, Inputs, LatentCache, LatentSet, draw, turn
from lora_booth.training.progress import Step

LORA = LoraSpec(rank=2)
CONFIG = TrainingConfig(steps=6, class_images=3, warmup_steps=0, learning_rate=1e-2, shape="buckets")
CAMERAS = [(3000, 3000), (3750, 3000), (4032, 3024), (6000, 4000), (3840, 2160), (2340, 1080), (2400, 1080)]  # phones: to 20:9
TALL, WIDE = (56, 72), (80, 48)
SHAPES: tuple[Any, ...] = ("square", "buckets")


def photo_of(width: int, height: int) -> Photo:
    return Photo(Path("a.jpg"), width, height, None, None, "")


@pytest.fixture(scope="module")
def shapes(photos: Path) -> Subject:
    """Three photos: two tall ones (260 x 300 pixels) and a wide one (260 x 150)."""
    return Subject.from_folder(photos, token="sks", class_noun="dog", crops={"1.jpg": (0, 0, 1, 0.5)})


# --- sizes and crops ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("resolution", [24, 64, 256, 512, 520, 632, 768, 1024])
def test_sizes_have_about_the_area_of_the_square(resolution: int) -> None:
    sizes = picture_sizes(resolution, "buckets")
    multiple = {24: 8, 64: 8, 256: 32}.get(resolution, 64)
    assert sizes[0] == (resolution, resolution)
    assert set(sizes) == {size[::-1] for size in sizes} and len(set(sizes)) == len(sizes) <= 17
    for width, height in sizes[1:]:
        assert width % multiple == height % multiple == 0 and max(width, height) <= 4 * min(width, height)
        assert (0.85 if resolution == 24 else 0.92) * resolution**2 <= width * height <= resolution**2
    assert picture_sizes(resolution, "square") == [(resolution, resolution)]
    assert all(side % 16 == 0 for size in picture_sizes(resolution, "buckets", multiple=16)[1:] for side in size)


def test_sdxls_own_sizes_are_among_them() -> None:
    usual = {size for size in SDXL_SIZES if max(size) < 2 * min(size)}
    assert len(usual) == 7 and usual <= set(picture_sizes(1024, "buckets"))


@pytest.mark.parametrize("resolution", [64, 512, 768, 1024])
@pytest.mark.parametrize("size", [*CAMERAS, *(size[::-1] for size in CAMERAS[1:])])
def test_what_cameras_take_keeps_nine_tenths(size: tuple[int, int], resolution: int) -> None:
    def seen(shape: Any) -> float:
        _, _, width, height = crop_box(*size, size_for(photo_of(*size), picture_sizes(resolution, shape)), None, None)
        return width * height / (size[0] * size[1])

    assert seen("buckets") >= 0.899
    assert seen("square") == pytest.approx(min(size) / max(size))


@pytest.mark.parametrize("size", CAMERAS)
@pytest.mark.parametrize("target", [(512, 512), (448, 576), (640, 384), (832, 1216)])
def test_coordinates_are_those_of_the_photo_resized_to_cover_its_size(size: tuple[int, int], target: tuple[int, int]) -> None:
    scale = max(target[0] / size[0], target[1] / size[1])
    crop = crop_of(*size, target, None, None)
    assert abs(crop.left - (size[0] * scale - target[0]) / 2) <= 1.5  # of rounding
    assert abs(crop.top - (size[1] * scale - target[1]) / 2) <= 1.5
    assert crop.original_size == size[::-1]
    at_the_corner = crop_of(*size, target, None, (0.0, 0.0))
    assert (at_the_corner.left, at_the_corner.top) == (0, 0)


def test_a_photo_and_its_mask_are_cut_alike(tmp_path: Path) -> None:
    values = np.random.default_rng(0).integers(0, 256, (640, 448, 3), dtype=np.uint8)
    Image.fromarray(values).save(tmp_path / "a.png")
    mask = np.zeros((640, 448), np.uint8)
    mask[:320] = 255
    Image.fromarray(mask).save(tmp_path / "a.mask.png")
    photo = find_photos(tmp_path, minimum=1, crop="center").photos[0]
    cropped = crop_photo(photo, picture_sizes(512, "buckets"))
    assert cropped.crop == Crop(top=32, left=0, original_size=(640, 448)) and cropped.mask is not None
    assert np.array_equal(np.asarray(cropped.image), values[32:608])
    assert np.array_equal(np.asarray(cropped.mask), mask[32:608])
    assert cropped.kept == pytest.approx(0.9)


@pytest.mark.parametrize("crop", ["smart", "center"])
def test_a_tall_portrait_keeps_the_head_in_its_top_quarter(tmp_path: Path, crop: Any) -> None:
    down, right = np.mgrid[0:640, 0:360]
    values = np.full((640, 360, 3), 140.0) + 12 * np.sin(down / 37 + right / 51)[..., None]
    values[(down - 100) ** 2 + (right - 180) ** 2 < 55**2] = (210, 60, 30)  # from 45 to 155
    values[155:, 120:240] = (60, 70, 120)
    Image.fromarray(values.astype(np.uint8)).save(tmp_path / "a.png")
    photo = find_photos(tmp_path, minimum=1, crop=crop).photos[0]
    top = {shape: crop_box(360, 640, size_for(photo, picture_sizes(512, shape)), None, photo.focus)[1] for shape in SHAPES}
    assert top["buckets"] <= 45 - 20
    assert crop == "smart" or top["square"] > 100  # which is what it is for
    red = np.asarray(crop_photo(photo, picture_sizes(512, "buckets")).image).astype(int)
    seen = (red[..., 0] - red[..., 1] > 100).mean() * 384 * 640 * (360 / 384) ** 2
    assert seen == pytest.approx(np.pi * 55**2, rel=0.05)  # all of it


def test_audit_and_sheet_show_the_crops(shapes: Subject, call: Callable[..., tuple[int, str, str]], photos: Path) -> None:
    audit = shapes.audit(resolution=64, shape="buckets")
    assert [report.size for report in audit.photos] == [TALL, WIDE, TALL]
    assert [report.thumbnail.size for report in audit.photos] == [(124, 160), (160, 96), (124, 160)]
    trained = crop_photo(shapes.photos[1], [WIDE]).image.resize((160, 96), Image.Resampling.LANCZOS)
    assert np.array_equal(np.asarray(audit.sheet())[8 + 32 : 8 + 128, 176 : 176 + 160], np.asarray(trained))
    facts = json.loads(json.dumps(audit.as_dict()))
    assert facts["shape"] == "buckets" and facts["photos"][0]["size"] == list(TALL)
    left, top, right, bottom = facts["photos"][0]["crop"]
    assert (right - left, bottom - top) == crop_box(260, 300, TALL, None, None)[2:]
    assert str(audit).startswith("used     0.jpg  260 x 300  at 56x72")
    assert call("photos", photos, "--resolution", 64, "--shape", "buckets")[1].count("at 56x72") == 3
    with pytest.raises(SettingsError, match="shape 'round'; needed: 'square' or 'buckets'"):
        audit_photos(shapes.photos, shape="round")  # type: ignore[arg-type]
    with pytest.raises(SettingsError, match="shape 5"):
        TrainingConfig(shape=5)  # type: ignore[arg-type]


# --- batches -----------------------------------------------------------------------------------------------------------


def test_each_photo_is_drawn_as_often_as_any_other() -> None:
    assert [turn((5,), 3, step) for step in range(12)] == [(0, step) for step in range(12)]
    before: Counter[int] = Counter()
    orders = set()
    for first in range(0, 60, 6):
        turns = [turn((3, 1, 2), 3, step) for step in range(first, first + 6)]
        assert sorted(number for number, _ in turns) == [0, 0, 0, 1, 2, 2]
        orders.add(tuple(number for number, _ in turns))
        for number, earlier in turns:
            assert earlier == before[number]
            before[number] += 1
    assert len(orders) > 5


@pytest.mark.parametrize("batch_size", [1, 2])
def test_a_batch_is_of_one_size(batch_size: int) -> None:
    def numbered(count: int, first: int, height: int, width: int) -> LatentSet:
        mean = torch.arange(first, first + count).float().view(1, count, 1, 1, 1).expand(1, count, 4, height, width)
        return LatentSet(mean, torch.zeros_like(mean), tuple(f"{first + i}" for i in range(count)), None)

    tall = Bucket(numbered(3, 0, 4, 2), numbered(2, 10, 4, 2))
    wide = Bucket(numbered(1, 3, 2, 4), numbered(5, 20, 2, 4))
    cache = LatentCache((tall, wide), 0.5, {})
    seen: Counter[str] = Counter()
    noises = set()
    for step in range(12):  # three times each of four photos, or six times
        batch = draw(cache, seed=1, step=step, batch_size=batch_size)
        numbers = [int(prompt) for prompt in batch.prompts]
        assert numbers == (batch.latents[:, 0, 0, 0] / 0.5).int().tolist() and len(numbers) == 2 * batch_size
        is_wide = numbers[0] == 3
        assert batch.latents.shape[2:] == batch.noise.shape[2:] == ((2, 4) if is_wide else (4, 2))
        assert all(number >= 20 if is_wide else 10 <= number < 12 for number in numbers[batch_size:])
        seen.update(batch.prompts[:batch_size])
        noises.add(batch.noise.sum().item())
    assert set(seen.values()) == {3 * batch_size} and len(seen) == 4 and len(noises) == 12


@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_photos_and_class_images_are_encoded_by_size(kind: str, shapes: Subject) -> None:
    said: list[str] = []
    cache = prepare(base_of(kind), shapes, lora=LORA, config=CONFIG, say=said.append)
    assert "3 photos at 64 px: 2 at 56x72, 1 at 80x48" in said
    tall, wide = cache.buckets
    assert cache.photos == 3 and cache.rows_per_photo == 2
    for bucket, (width, height), photos, images in ((tall, TALL, 2, 2), (wide, WIDE, 1, 1)):  # class images as photos
        assert bucket.class_images is not None and (len(bucket.photos), len(bucket.class_images)) == (photos, images)
        assert bucket.photos.mean.shape == (1, photos, 4, height // 8, width // 8)
        assert bucket.class_images.mean.shape == (1, images, 4, height // 8, width // 8)
        if kind == "sdxl":
            crop = crop_photo(shapes.photos[0 if bucket is tall else 1], [(width, height)]).crop
            expected = [*crop.original_size, crop.top, crop.left, height, width]
            assert bucket.photos.time_ids is not None and bucket.photos.time_ids[0].tolist() == expected
            assert bucket.class_images.time_ids is not None
            assert bucket.class_images.time_ids.tolist() == [[height, width, 0, 0, height, width]] * images
    assert wide.photos.time_ids is None or wide.photos.time_ids[0, :2].tolist() == [150, 260]


def test_class_images_of_all_sizes_are_drawn_with_the_base_read_once(
    shapes: Subject, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("LORA_BOOTH_CACHE", str(tmp_path))
    base, whole, read, made = base_of("sd1"), BaseModel.all_on_device, [], []
    monkeypatch.setattr(BaseModel, "all_on_device", lambda self: read.append(1) or whole(self))
    prepare(base, shapes, lora=LORA, config=CONFIG, on_progress=lambda what, *done: made.append((what, *done)))
    assert [done for what, *done in made if what == "class images"] == [[0, 3], [1, 3], [2, 3], [3, 3]] and len(read) == 1


def test_class_images_of_your_own_get_the_sizes_of_the_photos(shapes: Subject, tmp_path: Path) -> None:
    base, config = base_of("sd1"), replace(CONFIG, class_images=0)

    def counts(*pictures: Photo) -> list[int]:
        cache = prepare(base, replace(shapes, class_images=pictures), config=config)
        found = [bucket.class_images for bucket in cache.buckets]
        assert not cache.class_text and all(one is not None for one in found)
        heights = [one.mean.shape[-2:] for one in found if one is not None]
        assert heights == [(9, 7), (6, 10)]
        return [len(one) for one in found if one is not None]

    for photo in shapes.photos:
        ImageOps.mirror(Image.open(photo.path)).save(tmp_path / photo.path.name)
    tall, wide, also_tall = find_photos(tmp_path, crops={"1.jpg": (0, 0, 1, 0.5)}).photos
    assert counts(tall, wide, also_tall) == [2, 1]
    assert counts(tall, also_tall) == [2, 2]  # none is wide, so that all are cut for the wide photo


# --- training ----------------------------------------------------------------------------------------------------------


class Interrupted(Exception):
    pass


def interrupt_at_3(step: Step) -> None:
    if step.index == 3:
        raise Interrupted


def distance(one: Adapter, other: Adapter) -> float:
    """Of their changes of the base, relative to the first's."""
    deltas = [[f.up @ f.down for f in adapter.modules.values()] for adapter in (one, other)]
    return float(sum((a - b).norm() for a, b in zip(*deltas, strict=True)) / sum(a.norm() for a in deltas[0]))


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["sd1", "sdxl"])
def test_an_interrupted_run_ends_with_the_same_tensors(kind: str, shapes: Subject, tmp_path: Path) -> None:
    config = replace(CONFIG, gradient_accumulation=2, batch_size=2, flip=True, checkpoint_every=2)
    options: dict[str, Any] = {"lora": LORA, "config": config, "progress": False}
    whole = train(base_of(kind), shapes, **options)
    with pytest.raises(Interrupted):
        train(base_of(kind), shapes, out=tmp_path, on_step=interrupt_at_3, **options)
    assert train(base_of(kind), shapes, out=tmp_path, **options).digest() == whole.digest()
    for path, size in zip(sorted((tmp_path / "crops").iterdir()), (TALL, WIDE, TALL), strict=True):
        with Image.open(path) as crop:
            assert crop.size == size
    page = (tmp_path / "report.html").read_text()
    assert "at 64 px or another shape of about that area" in page and "buckets" in page
    for changes in ({"lean": False}, {"gradient_checkpointing": True}, {"pictures_at_a_time": 1}):
        other = train(base_of(kind), shapes, **options | {"config": replace(config, **changes)})  # type: ignore[arg-type]
        assert distance(whole, other) < 1e-4, changes
    square = train(base_of(kind), shapes, **options | {"config": replace(config, shape="square")})
    assert distance(whole, square) > 1e-3


def test_memory_of_recordings_is_given_back_before_the_ladder_is_climbed(shapes: Subject) -> None:
    base = base_of("sd1")
    said: list[str] = []
    calls: list[Inputs] = []
    config = settled(replace(CONFIG, prior_loss_weight=0.0), base, 3)
    run = training_run.TrainingRun(base, prepare(base, shapes, config=config), LORA, config, say=said.append)
    work = run.backward

    def once_too_large(inputs: Inputs) -> Tensor:
        calls.append(inputs)
        if len(calls) == 1:
            raise torch.OutOfMemoryError("out of memory")
        return work(inputs)

    graph = run.backward = StepGraph(once_too_large, run.lora.flat.gradient, say=said.append)
    graph._begun = {"of squares"}  # another size, recorded before
    assert next(run).index == 1
    assert said == ["out of memory at step 1: continuing without a recording"] and not graph.on and run.levels == {}
    run.close()


@pytest.mark.slow
@pytest.mark.parametrize("checkpointing", [False, True])
def test_no_size_takes_more_than_the_square_for_which_memory_is_planned(checkpointing: bool) -> None:
    base, config = without_weights("toybox", torch.float32), TrainingConfig(gradient_checkpointing=checkpointing)
    square, *others = (count_step(base, LORA, config, 1, size) for size in picture_sizes(64, "buckets"))
    assert len(others) == 8
    for count in others:
        assert 0.9 * square.peak < count.peak <= square.peak
        assert count.flops <= 1.01 * square.flops  # not all of the toybox's halvings are even
