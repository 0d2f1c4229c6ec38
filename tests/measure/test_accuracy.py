"""Laws of accuracy, agreement and their intervals."""

from __future__ import annotations

import json

import numpy as np
import pytest

from cveff.errors import CveffError, EngineError
from cveff.measure import (
    agreement,
    change,
    confusion,
    evaluate,
    per_class_accuracy,
    predict,
    top1,
    topk,
    wilson_interval,
)

GENERATOR = np.random.default_rng(0)
LOGITS = GENERATOR.normal(size=(50, 8)).astype(np.float32)
TARGETS = GENERATOR.integers(0, 8, 50)


def one_hot(targets: np.ndarray, classes: int = 8) -> np.ndarray:
    return np.eye(classes, dtype=np.float32)[targets]


def test_perfect_logits_score_one() -> None:
    assert top1(one_hot(TARGETS), TARGETS) == 1.0


def test_top1_is_topk_of_one_and_all_classes_are_always_enough() -> None:
    tied = np.round(LOGITS)  # many equal logits: ties must break alike
    assert topk(tied, TARGETS, 1) == top1(tied, TARGETS)
    assert topk(tied, TARGETS, 8) == 1.0


def test_topk_never_falls_with_k() -> None:
    shares = [topk(LOGITS, TARGETS, k) for k in range(1, 9)]
    assert shares == sorted(shares)


def test_agreement_with_itself_is_one_and_does_not_see_scale() -> None:
    assert agreement(LOGITS, LOGITS) == 1.0
    assert agreement(LOGITS, 3 * LOGITS + 1) == 1.0


def test_agreement_is_symmetric_and_counts() -> None:
    other = LOGITS.copy()
    other[:5] = -other[:5]  # the largest becomes the smallest
    assert agreement(LOGITS, other) == agreement(other, LOGITS) == 0.9


def test_confusion_rows_are_true_classes() -> None:
    matrix = confusion(one_hot(np.array([1, 1, 2]), 3), np.array([0, 1, 1]))
    assert matrix.tolist() == [[0, 1, 0], [0, 1, 1], [0, 0, 0]]
    assert per_class_accuracy(matrix) == (0.0, 0.5, None)


def test_confusion_accounts_for_every_image() -> None:
    matrix = confusion(LOGITS, TARGETS)
    assert matrix.sum() == len(TARGETS)
    assert np.trace(matrix) / matrix.sum() == top1(LOGITS, TARGETS)


@pytest.mark.parametrize(("share", "count"), [(0.0, 10), (1.0, 10), (0.5, 1), (0.93, 10_000)])
def test_wilson_interval_holds_the_share_and_stays_in_range(share: float, count: int) -> None:
    low, high = wilson_interval(share, count)
    assert 0 <= low <= share <= high <= 1


def test_wilson_interval_matches_a_published_value() -> None:
    # Newcombe, Statistics in Medicine 17 (1998), table I: 81 of 263.
    low, high = wilson_interval(81 / 263, 263)
    assert (round(low, 4), round(high, 4)) == (0.2553, 0.3662)


def test_wilson_interval_narrows_with_count() -> None:
    widths = [high - low for low, high in (wilson_interval(0.9, count) for count in (10, 100, 1000))]
    assert widths == sorted(widths, reverse=True)


def test_evaluate_gives_top5_only_past_five_classes() -> None:
    assert evaluate(LOGITS, TARGETS).top5 == topk(LOGITS, TARGETS, 5)
    assert evaluate(LOGITS[:, :5], TARGETS % 5).top5 is None


def test_evaluate_is_json() -> None:
    values = json.loads(json.dumps(evaluate(LOGITS, TARGETS).to_json()))
    assert values["num_images"] == 50
    assert len(values["confusion"]) == 8


def test_change_is_the_difference_of_the_accuracies() -> None:
    other = GENERATOR.normal(size=LOGITS.shape)
    found = change(other, LOGITS, TARGETS)
    assert found.difference == pytest.approx(top1(other, TARGETS) - top1(LOGITS, TARGETS), abs=1e-12)
    assert found.interval[0] <= found.difference <= found.interval[1]


def test_no_change_has_no_width() -> None:
    found = change(LOGITS, LOGITS, TARGETS)
    assert (found.difference, found.gained, found.lost, found.interval) == (0.0, 0, 0, (0.0, 0.0))


def test_predict_keeps_the_order_of_batches() -> None:
    images = np.arange(10, dtype=np.uint8).reshape(10, 1, 1, 1).repeat(3, axis=3)
    batches = [(images[:4], np.arange(4)), (images[4:], np.arange(4, 10))]
    logits, targets = predict(lambda batch: batch[:, 0, 0, :].astype(np.float32), batches)
    assert logits[:, 0].tolist() == list(range(10))
    assert targets is not None
    assert targets.tolist() == list(range(10))
    assert logits.dtype == np.float32


def test_predict_without_targets() -> None:
    _, targets = predict(lambda batch: np.zeros((len(batch), 2)), [(np.zeros((2, 1, 1, 3), np.uint8), None)])
    assert targets is None


def test_predict_names_the_image_that_overflows() -> None:
    images = np.zeros((6, 1, 1, 3), np.uint8)
    images[4] = 255

    def overflow(batch: np.ndarray) -> np.ndarray:
        return np.where(batch[:, 0, 0, :] == 255, np.nan, 1.0)

    with pytest.raises(EngineError, match="logits of image 4 are not finite"):
        predict(overflow, [(images[:3], None), (images[3:], None)])


def test_predict_refuses_wrong_shapes_and_nothing() -> None:
    images = np.zeros((3, 1, 1, 3), np.uint8)
    with pytest.raises(EngineError, match=r"shape \(2, 4\) for 3 images"):
        predict(lambda batch: np.zeros((2, 4)), [(images, None)])
    with pytest.raises(CveffError, match="no images"):
        predict(lambda batch: np.zeros((0, 4)), [])
    with pytest.raises(CveffError, match="some have none"):
        predict(lambda batch: np.zeros((3, 4)), [(images, None), (images, np.zeros(3))])


@pytest.mark.parametrize(
    ("logits", "targets", "message"),
    [
        (LOGITS, TARGETS[:-1], "shape"),
        (LOGITS, np.full(50, 8), "labels are not the model's"),
        (LOGITS, np.full(50, -1), "labels are not the model's"),
        (LOGITS[:0], TARGETS[:0], "N > 0"),
    ],
)
def test_logits_and_targets_must_fit(logits: np.ndarray, targets: np.ndarray, message: str) -> None:
    with pytest.raises(CveffError, match=message):
        top1(logits, targets)


def test_other_bad_arguments() -> None:
    with pytest.raises(CveffError, match="k is 9"):
        topk(LOGITS, TARGETS, 9)
    with pytest.raises(CveffError, match="no interval"):
        wilson_interval(0.5, 0)
    with pytest.raises(CveffError, match="two equal"):
        agreement(LOGITS, LOGITS[:, :4])
