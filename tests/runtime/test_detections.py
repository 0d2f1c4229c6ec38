"""numpy's suppression is torchvision's, on ties, touching, empty and degenerate boxes too."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torchvision.ops import batched_nms

from cveff.errors import CveffError
from cveff.measure.detections import agreement
from cveff.runtime.detections import Suppression, iou, suppress, unpad

RULE = Suppression(0.0, 0.5, 10_000, 10_000, "level", (1,))


@st.composite
def candidates(draw: Any) -> tuple[np.ndarray, np.ndarray, np.ndarray, float]:
    """Boxes on a coarse grid, so that overlaps equal the threshold and boxes are empty, and scores with ties."""
    count = draw(st.integers(0, 60))
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    corner = rng.integers(0, 12, (count, 2))
    sides = rng.integers(0, 7, (count, 2))
    boxes = np.concatenate((corner, corner + sides), 1).astype(np.float32) / 4
    scores = rng.integers(1, 20, count).astype(np.float32) / 20
    return boxes, scores, rng.integers(0, 4, count), draw(st.sampled_from((0.0, 0.25, 0.5, 0.55, 1.0)))


@given(candidates())
@settings(max_examples=200, deadline=None)
def test_kept_boxes_are_those_of_batched_nms(drawn: tuple[np.ndarray, np.ndarray, np.ndarray, float]) -> None:
    boxes, scores, labels, threshold = drawn
    kept = batched_nms(*map(torch.from_numpy, (boxes, scores, labels)), threshold).numpy()
    one_hot = np.where(labels[:, None] == np.arange(4), scores[:, None], 0).astype(np.float32)
    if not len(boxes):
        return
    rule = replace(RULE, iou_threshold=threshold, levels=(len(boxes),))
    found = suppress(boxes, one_hot, rule)
    assert np.array_equal(found["scores"], scores[kept])
    # Equal scores come in the order of the boxes here and there.
    assert np.array_equal(found["boxes"], boxes[kept])
    assert np.array_equal(found["labels"], labels[kept])


def test_nothing_above_the_threshold_is_no_detection() -> None:
    boxes, scores = np.zeros((3, 4), np.float32), np.full((3, 2), 0.2, np.float32)
    for group_by in ("class", "level"):
        found = suppress(boxes, scores, Suppression(0.2, 0.5, 5, 5, group_by, (2, 1)))
        assert found["boxes"].shape == (0, 4) and found["labels"].dtype == np.int64


def test_candidates_are_counted_by_class_or_by_level() -> None:
    boxes = np.array([[10 * i, 0, 10 * i + 5, 5] for i in range(4)], np.float32)
    scores = np.array([[0.9, 0.1], [0.8, 0.7], [0.6, 0.5], [0.4, 0.3]], np.float32)
    rule = Suppression(0.05, 0.5, 2, 10, "class", (2, 2))
    by_class = suppress(boxes, scores, rule)
    assert [float(score) for score in by_class["scores"]] == pytest.approx([0.9, 0.8, 0.7, 0.5])
    by_level = suppress(boxes, scores, replace(rule, group_by="level"))
    assert [float(score) for score in by_level["scores"]] == pytest.approx([0.9, 0.8, 0.6, 0.5])
    background = suppress(boxes, scores, replace(rule, first_class=1))
    assert set(background["labels"]) == {1}
    assert len(suppress(boxes, scores, replace(rule, max_detections=1))["scores"]) == 1


def test_two_points_do_not_suppress_each_other() -> None:
    point = np.array([[3, 3, 3, 3]] * 2, np.float32)
    assert np.isnan(iou(point[0], point)).all()
    rule = replace(RULE, levels=(2,))
    assert len(suppress(point, np.full((2, 1), 0.5, np.float32), rule)["scores"]) == 2


def test_rows_without_a_detection_go() -> None:
    found = unpad(np.ones((3, 4)), np.array([0.9, 0.0, 0.0]), np.array([2, -1, -1]))
    assert found["boxes"].shape == (1, 4) and list(found["labels"]) == [2]


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"score_threshold": 1.5}, "score_threshold is 1.5"),
        ({"iou_threshold": "half"}, "iou_threshold is 'half'"),
        ({"max_candidates": 0}, "max_candidates is 0"),
        ({"group_by": "image"}, "group_by is 'image'"),
        ({"levels": ()}, "levels is"),
        ({"first_class": -1}, "first_class is -1"),
    ],
)
def test_settings_that_cannot_work_are_refused(changes: dict[str, Any], words: str) -> None:
    with pytest.raises(CveffError, match=words):
        replace(RULE, **changes)


def test_settings_survive_json_and_damage_is_said() -> None:
    assert Suppression.from_json(RULE.to_json()) == RULE
    for damaged in (None, {}, {**RULE.to_json(), "levels": 3}, {**RULE.to_json(), "colour": 1}):
        with pytest.raises(CveffError, match="it must hold"):
            Suppression.from_json(damaged)


def test_arrays_that_do_not_fit_are_refused() -> None:
    with pytest.raises(CveffError, match="do not fit each other and 1 anchors"):
        suppress(np.zeros((2, 4), np.float32), np.zeros((2, 3), np.float32), RULE)


def test_agreement_counts_each_detection_once() -> None:
    box = np.array([[0, 0, 10, 10]], np.float32)
    one = {"boxes": box, "scores": np.array([0.5], np.float32), "labels": np.array([1])}
    two = {key: np.concatenate((value, value)) for key, value in one.items()}
    assert agreement([one], [one]).share == 1
    assert agreement([one], [two]).share == 0.5
    assert agreement([two], [one]).share == 0.5
    assert agreement([one], [{**one, "labels": np.array([2])}]).share == 0
    assert agreement([one], [{**one, "boxes": box + 1}]).share == 0
    assert agreement([one], [{**one, "scores": np.array([0.51], np.float32)}]).share == 0
    nothing = {key: value[:0] for key, value in one.items()}
    assert agreement([nothing], [nothing]).share == 1 and agreement([nothing], [one]).share == 0
