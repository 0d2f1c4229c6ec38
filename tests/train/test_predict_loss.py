"""The power law is found again in losses that follow it, and intervals hold what they promise."""

from __future__ import annotations

import numpy as np
import pytest

from cveff.errors import CveffError
from cveff.train.predict_loss import fit_loss

COMPUTE = np.array([1, 2, 4, 8, 16, 32]) * 1e12


def law(compute: np.ndarray, a: float = 0.3, b: float = 1.2, c: float = 0.35) -> np.ndarray:
    return a + b * (compute / 1e12) ** -c


def test_a_law_without_noise_is_found_exactly() -> None:
    curve = fit_loss(COMPUTE, law(COMPUTE))
    assert (curve.a, curve.c) == (pytest.approx(0.3, rel=1e-4), pytest.approx(0.35, rel=1e-4))
    foretold = curve.predict(1e15)
    truth = float(law(np.array(1e15)))
    assert foretold.loss == pytest.approx(truth, rel=1e-4)
    assert abs(foretold.error(truth)) < 1e-4
    assert foretold.high - foretold.low < 1e-3
    assert foretold.error(2 * truth) == pytest.approx(-0.5, abs=1e-3)


def test_intervals_hold_what_they_promise() -> None:
    random = np.random.default_rng(0)
    larger = 64e12
    held = 0
    for _ in range(60):
        losses = law(COMPUTE) * (1 + 0.01 * random.standard_normal(len(COMPUTE)))
        measured = float(law(np.array(larger))) * (1 + 0.01 * random.standard_normal())
        found = fit_loss(COMPUTE, losses).predict(larger, 0.9)
        assert found.low < found.loss < found.high
        held += found.low <= measured <= found.high
    assert 47 <= held <= 60  # 54 expected; 47 is three deviations of a binomial below


def test_the_unit_of_compute_does_not_matter() -> None:
    losses = law(COMPUTE) * np.array([1.01, 0.99, 1.0, 1.01, 0.99, 1.0])
    first, second = fit_loss(COMPUTE, losses), fit_loss(COMPUTE / 1e12, losses)
    assert first.predict(1e14).loss == pytest.approx(second.predict(1e2).loss, rel=1e-6)


@pytest.mark.parametrize(
    ("compute", "loss", "words"),
    [
        ([1, 2, 3], [3, 2, 1], "four or more"),
        ([1, 1, 2, 2], [3, 3, 2, 2], "four or more"),
        ([1, 2, 3, 4], [3, 2, 1], "one of each"),
        ([1, 2, 3, 4], [3, 2, float("nan"), 1], "diverged"),
        ([0, 2, 3, 4], [3, 2, 2, 1], "positive"),
        ([1, 2, 3, 4], [1, 2, 3, 4], "do not fall"),
    ],
)
def test_runs_that_tell_nothing_are_refused(compute: list[float], loss: list[float], words: str) -> None:
    with pytest.raises(CveffError, match=words):
        fit_loss(compute, loss)


def test_predictions_out_of_range_are_refused() -> None:
    curve = fit_loss(COMPUTE, law(COMPUTE))
    with pytest.raises(CveffError, match="compute is 0"):
        curve.predict(0)
    with pytest.raises(CveffError, match="confidence is 1"):
        curve.predict(1e13, 1.0)
