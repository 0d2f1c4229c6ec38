"""Laws of relative difference and cosine, and finding the layer where a difference starts."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from cveff.errors import CveffError
from cveff.measure import LayerParity, cosine, first_large_difference, largest_rise, relative_difference
from cveff.measure.parity import Comparison

A = np.random.default_rng(0).normal(size=(3, 4, 5)).astype(np.float32)
B = A + np.float32(0.1)


def test_a_thing_equals_itself_exactly() -> None:
    assert relative_difference(A, A) == 0.0
    assert cosine(A, A) == 1.0


@pytest.mark.parametrize("factor", [2.0**-20, 0.5, 1024.0])
def test_relative_difference_does_not_see_a_common_scale(factor: float) -> None:
    # Powers of two scale floats without rounding, so equality is exact.
    assert relative_difference(B * factor, A * factor) == relative_difference(B, A)


def test_relative_difference_is_linear_in_the_error() -> None:
    reference = np.array([4.0, -2.0])
    assert relative_difference(reference + np.array([0, 1]), reference) == 0.25
    assert relative_difference(reference + np.array([0, 3]), reference) == 0.75


def test_relative_difference_is_relative_to_the_second() -> None:
    assert relative_difference(np.array([1.0]), np.array([2.0])) == 0.5
    assert relative_difference(np.array([2.0]), np.array([1.0])) == 1.0


def test_cosine_of_scaled_opposite_and_orthogonal() -> None:
    assert cosine(3 * A, A) == pytest.approx(1)
    assert cosine(-A, A) == pytest.approx(-1)
    assert cosine(np.array([1.0, 0.0]), np.array([0.0, 2.0])) == 0.0


def test_zeros() -> None:
    zeros = np.zeros(3)
    assert (relative_difference(zeros, zeros), cosine(zeros, zeros)) == (0.0, 1.0)
    assert relative_difference(np.ones(3), zeros) == math.inf
    assert relative_difference(zeros, np.ones(3)) == 1.0


@pytest.mark.parametrize("value", [np.nan, np.inf, -np.inf])
def test_what_is_not_finite_never_passes_for_small(value: float) -> None:
    broken = A.copy()
    broken[0, 0, 0] = value
    assert relative_difference(broken, A) == math.inf
    assert relative_difference(A, broken) == math.inf
    assert relative_difference(broken, broken) == 0.0


def test_pieces_add_up_to_the_whole() -> None:
    pieces = Comparison()
    for a, b in zip(A, B, strict=True):
        pieces.add(a, b)
    assert pieces.relative_difference == relative_difference(A, B)
    assert pieces.cosine == pytest.approx(cosine(A, B), abs=1e-12)


def test_integers_are_compared_without_wrapping() -> None:
    assert relative_difference(np.array([0], np.uint8), np.array([255], np.uint8)) == 1.0


def test_shapes_must_match() -> None:
    with pytest.raises(CveffError, match=r"\(3, 4, 5\) and \(4, 5\)"):
        relative_difference(A, A[0])


def layer(name: str, difference: float, angle: float) -> LayerParity:
    return LayerParity(name, "Conv", difference, angle)


def test_first_large_difference_goes_by_order_not_size() -> None:
    layers = [layer("a", 0.01, 1), layer("b", 0.2, 1), layer("c", 0.9, 1)]
    assert first_large_difference(layers, 0.1) is layers[1]
    assert first_large_difference(layers, 1.0) is None
    assert first_large_difference([], 0.0) is None


def test_largest_rise_is_where_the_error_is_made_not_where_it_is_largest() -> None:
    layers = [layer("a", 0, 0.999), layer("b", 0, 0.95), layer("c", 0, 0.97), layer("d", 0, 0.94)]
    assert largest_rise(layers) is layers[1]
    assert largest_rise([]) is None


def test_layer_parity_is_json_even_when_infinite() -> None:
    values = json.loads(json.dumps(layer("a", math.inf, 0.0).to_json(), allow_nan=False))
    assert values == {"name": "a", "op": "Conv", "relative_difference": None, "cosine": 0.0, "module": ""}
