"""Certainties of exits, against arithmetic by hand."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cveff.errors import CveffError
from cveff.runtime.gates import GATES, certainty

LOGITS = np.log(np.array([[0.7, 0.2, 0.1], [1 / 3, 1 / 3, 1 / 3]], np.float64)).astype(np.float32)


def test_each_gate_is_what_it_says() -> None:
    entropy = -sum(p * math.log(p) for p in (0.7, 0.2, 0.1)) / math.log(3)
    assert certainty(LOGITS, "confidence") == pytest.approx([0.7, 1 / 3], abs=1e-6)
    assert certainty(LOGITS, "margin") == pytest.approx([0.5, 0], abs=1e-6)
    assert certainty(LOGITS, "entropy") == pytest.approx([1 - entropy, 0], abs=1e-6)


@pytest.mark.parametrize("gate", GATES)
def test_extremes(gate: str) -> None:
    sure = certainty(np.array([[1e30, -1e30]], np.float32), gate)
    assert sure == 1
    assert certainty(np.ones((2, 1), np.float32), gate).tolist() == [1, 1]
    assert certainty(np.zeros((0, 4), np.float32), gate).shape == (0,)
    for value in (np.nan, np.inf):  # an answer that is no number reaches no threshold
        assert not certainty(np.array([[value, 0, 1]], np.float32), gate)[0] >= -1


def test_an_unknown_gate_is_named() -> None:
    with pytest.raises(CveffError, match="'luck' is unknown; use one of confidence, entropy, margin"):
        certainty(LOGITS, "luck")
