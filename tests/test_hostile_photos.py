"""Every hostile photo has its expected outcome, and raises no other exception."""

from __future__ import annotations

from pathlib import Path

import pytest
from hostile_photos import HostilePhoto, good_folder, hostile_photos
from PIL import Image

from lora_booth.errors import PhotoError
from lora_booth.photos.audit import audit_photos
from lora_booth.photos.cropping import crop_photo
from lora_booth.photos.finding import find_photos
from lora_booth.photos.opening import open_photo

ALL = hostile_photos()
QUICK = [photo for photo in ALL if not photo.large]


def test_there_are_enough() -> None:
    assert len(QUICK) >= 60
    assert len({photo.name for photo in ALL}) == len(ALL)


@pytest.mark.parametrize("hostile", QUICK, ids=lambda hostile: hostile.name)
def test_outcome(hostile: HostilePhoto, tmp_path: Path) -> None:
    folder = good_folder(tmp_path / "rex")
    try:
        hostile.build(folder)
    except OSError:
        pytest.skip("this file system does not take such a file")
    if hostile.outcome == "refused":
        with pytest.raises(PhotoError) as refused:
            find_photos(folder)
        assert hostile.says in str(refused.value) and str(refused.value).isprintable()
        return
    found = find_photos(folder)
    audit = audit_photos(found.photos, found.skipped, resolution=64)
    skipped = {one.path.name: one.reason for one in found.skipped}
    reports = {report.photo.path.name: report for report in audit.photos}
    assert {f"good{index}.png" for index in range(3)} <= reports.keys()
    assert str(audit.as_dict()).isprintable()
    if hostile.outcome == "skipped":
        assert hostile.file not in reports
        assert hostile.says in skipped[hostile.file] and skipped[hostile.file].isprintable()
        return
    report = reports[hostile.file]
    assert hostile.says in "; ".join(report.notes)
    assert report.photo.name.isprintable()
    image = open_photo(report.photo)
    assert image.mode == "RGB" and image.info == {} and hostile.shows(image)
    square = crop_photo(report.photo, [(64, 64)])
    assert square.image.size == (64, 64) and square.image.info == {}
    assert isinstance(audit.sheet(), Image.Image)
