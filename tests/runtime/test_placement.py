"""Boxes and masks go back to where `fit` took the pixels from, in every crop mode."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from cveff.runtime.input_spec import InputSpec
from cveff.runtime.placement import UNSEEN, place
from cveff.runtime.preprocess import fit


@pytest.mark.parametrize("crop_mode", ["center", "squash", "border"])
@pytest.mark.parametrize("size", [(120, 200), (200, 120), (160, 160), (97, 133)])
def test_a_square_is_found_where_it_was(crop_mode: str, size: tuple[int, int]) -> None:
    height, width = size
    pixels = np.zeros((height, width, 3), np.uint8)
    top, left, side = height // 2 - 16, width // 2 - 16, 32
    pixels[top : top + side, left : left + side] = 255
    spec = InputSpec((64, 96), interpolation="nearest", enlarge=True, crop_mode=crop_mode, mean=(0.0,) * 3)
    seen = fit(Image.fromarray(pixels), spec)[..., 0] > 127
    rows, columns = np.nonzero(seen)
    box = np.array([[columns.min(), rows.min(), columns.max() + 1, rows.max() + 1]], np.float32)
    placement = place(height, width, spec)
    (found,) = placement.boxes(box)
    pixel = max(1 / scale for scale in placement.scale)  # of the model's, in the photograph
    assert np.abs(found - (left, top, left + side, top + side)).max() <= pixel + 1
    mask = placement.mask(seen.astype(np.uint8))
    assert mask.shape == size
    inside = np.zeros(size, bool)
    inside[top : top + side, left : left + side] = True
    wrong = (mask != UNSEEN) & ((mask == 1) != inside)
    assert wrong.sum() <= 4 * side * (pixel + 1)


def test_what_a_crop_leaves_out_is_unseen() -> None:
    spec = InputSpec((32, 32), crop_mode="center")
    mask = place(32, 64, spec).mask(np.ones((32, 32), np.uint8))
    assert (mask[:, 16:48] == 1).all() and (mask[:, :16] == UNSEEN).all() and (mask[:, 48:] == UNSEEN).all()


def test_boxes_are_clipped_to_the_photograph() -> None:
    spec = InputSpec((64, 64), crop_mode="border")
    (box,) = place(50, 100, spec).boxes(np.array([[-5, 0, 70, 64]], np.float32))
    assert list(box) == [0, 0, 100, 50]
