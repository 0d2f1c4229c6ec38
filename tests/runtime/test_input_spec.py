"""`InputSpec` refuses what cannot work and survives JSON."""

from __future__ import annotations

import json
from typing import Any

import pytest

from cveff.errors import CveffError
from cveff.runtime.input_spec import InputSpec


@pytest.mark.parametrize(
    "spec",
    [
        InputSpec((224, 160)),
        InputSpec((28, 28), 1, (0.286,), (0.353,), "bilinear", 1.0, enlarge=True),
        InputSpec((384, 384), mean=(0.5,) * 3, std=(0.5,) * 3, crop=1.0, crop_mode="squash"),
    ],
)
def test_json_there_and_back(spec: InputSpec) -> None:
    assert InputSpec.from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_a_spec_of_an_older_program_has_the_defaults() -> None:
    assert InputSpec.from_json({"size": [8, 8]}) == InputSpec((8, 8))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({}, "input.size is missing"),
        ({"size": 32}, "input.size is 32"),
        ({"size": [32]}, "input.size"),
        ({"size": [0, 32]}, "input.size"),
        ({"size": [32.0, 32]}, "input.size"),
        ({"size": [True, 32]}, "input.size"),
        ({"channels": 4}, "input.channels is 4"),
        ({"channels": True}, "input.channels"),
        ({"mean": [0.5]}, "input.mean has 1 values"),
        ({"mean": 0.5}, "input.mean is 0.5"),
        ({"mean": ["0", "0", "0"]}, "input.mean"),
        ({"std": [0.5, 0.5, 0.0]}, "must be positive"),
        ({"std": [0.5, 0.5, float("nan")]}, "input.std"),
        ({"interpolation": "cubic"}, "input.interpolation is 'cubic'; use one of nearest"),
        ({"crop": 0}, r"input.crop is 0; it must lie in \(0, 1\]"),
        ({"crop": 1.01}, "input.crop"),
        ({"crop": "1"}, "input.crop"),
        ({"crop": None}, "input.crop"),
        ({"enlarge": 1}, "input.enlarge"),
        ({"crop_mode": "stretch"}, "input.crop_mode is 'stretch'"),
        ({"colour": "RGB"}, r"unknown keys \['colour'\]"),
    ],
)
def test_values_that_cannot_work(values: dict[str, Any], words: str) -> None:
    given = values if not values or "size" in values else {"size": [32, 32], **values}
    with pytest.raises(CveffError, match=words):
        InputSpec.from_json(given)
