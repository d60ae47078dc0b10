"""Where a picture shows what its prompt names: masks from made-up attention."""

from __future__ import annotations

import torch

from lora_booth.kernels.attention_maps import GROWTH, connected, subject_masks

SIDE = 32


def blob(y: float, x: float, radius: float, height: float = 1.0) -> torch.Tensor:
    """Attention to an object at (y, x). (SIDE, SIDE)"""
    rows, columns = torch.meshgrid(torch.arange(SIDE), torch.arange(SIDE), indexing="ij")
    return height * torch.exp(-((rows - y) ** 2 + (columns - x) ** 2) / (2 * radius**2))


def test_masks_are_disjoint_and_where_each_noun_is():
    faint = 0.05 * blob(16, 8, 4) + 0.001  # twenty times fainter than the other, and nevertheless there
    loud = blob(16, 24, 4) + 0.9 * blob(16, 8, 4) + 0.3
    masks = subject_masks(torch.stack([faint, loud])[:, None])
    assert masks.shape == (2, 1, SIDE, SIDE) and set(masks.unique().tolist()) == {0.0, 1.0}
    assert masks.sum(0).max() == 1 and masks.sum(0).min() == 0  # disjoint, with a background
    assert masks[0, 0, 16, 8] == 1 and masks[1, 0, 16, 24] == 1
    assert not masks[:, 0, 0].any() and masks[0, 0, :, 20:].sum() == 0 and masks[1, 0, :, :12].sum() == 0


def test_a_mask_is_one_piece_with_room_around_it():
    maps = torch.stack([blob(16, 8, 3) + 0.7 * blob(4, 28, 2), blob(26, 26, 3)])[:, None]
    masks = subject_masks(maps)
    assert masks[0, 0, 16, 8] == 1 and masks[0, 0, 4, 28] == 0  # the island is not the dog's
    rows = masks[0, 0].any(1).nonzero()
    object_rows = (maps[0, 0, :, 8] > 0.4).sum()
    assert int(rows.max() - rows.min()) + 1 >= object_rows + 2 * (round(GROWTH * SIDE) - 1)


def test_each_picture_has_masks_of_its_own():
    maps = torch.stack([blob(18, 7, 3), blob(14, 23, 4)])[:, None]
    masks = subject_masks(torch.cat([maps, maps.flip(-1)], 1))
    assert torch.equal(masks[:, :1], subject_masks(maps)) and torch.equal(masks[:, 1:], subject_masks(maps.flip(-1)))


def test_no_subject_is_left_without_a_mask():
    same = blob(16, 16, 4)
    flat = torch.ones(SIDE, SIDE)
    for maps in ((same, same), (same, flat), (flat, flat), (same, same * 0)):
        masks = subject_masks(torch.stack(maps)[:, None])
        assert masks.sum(0).max() == 1 and masks.sum((2, 3)).min() > 0


def test_what_is_connected():
    allowed = torch.tensor([[1, 1, 0, 1], [0, 0, 0, 1], [1, 0, 0, 1]])
    assert connected(allowed, 0).tolist() == [[1, 1, 0, 0], [0, 0, 0, 0], [0, 0, 0, 0]]
    assert connected(allowed, 3).sum() == 3 and connected(allowed, 5).sum() == 4  # the peak joins what it touches
