"""Streams are taken where they were measured to be faster, and nowhere else."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from cveff.export import openvino_streams
from cveff.export.openvino_streams import with_streams
from cveff.target import Target

PLAIN = {"inference_precision": "f32"}
STREAMS = {**PLAIN, "performance_hint": "throughput", "streams": 2}


def target(batch: int = 4, threads: int = 2) -> Target:
    return Target("t", "", (("openvino", "fp32"),), threads=threads, batch_sizes=(batch, 1))


def outcome(monkeypatch: pytest.MonkeyPatch, high: float) -> list[Any]:
    """Let the comparison end with this upper bound of divided / together; returns what was compared."""
    compared: list[Any] = []

    def compare(predictors: Any, images: Any, **_: Any) -> Any:
        answers = {name: predictor(images) for name, predictor in predictors.items()}
        compared.append((predictors, images.shape, answers))
        return SimpleNamespace(ratio=lambda name, other: SimpleNamespace(high=high, names=(name, other)))

    monkeypatch.setattr(openvino_streams, "compare", compare)
    return compared


def test_streams_are_taken_where_the_whole_interval_is_faster(
    tiny_xml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = outcome(monkeypatch, high=0.99)
    assert with_streams(tiny_xml, PLAIN, target()) == STREAMS
    ((predictors, shape, answers),) = compared
    assert list(predictors) == ["together", "divided"] and shape == (4, 32, 40, 3)
    assert (answers["together"] == answers["divided"]).all()
    outcome(monkeypatch, high=1.01)
    assert with_streams(tiny_xml, PLAIN, target()) == PLAIN


def test_there_are_no_more_streams_than_images(tiny_xml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    outcome(monkeypatch, high=0.5)
    assert with_streams(tiny_xml, PLAIN, target(batch=2, threads=3))["streams"] == 2


@pytest.mark.parametrize("where", [target(batch=1), target(threads=1)])
def test_nothing_is_measured_where_nothing_can_be_divided(
    where: Target, tiny_xml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compared = outcome(monkeypatch, high=0.5)
    assert with_streams(tiny_xml, PLAIN, where) == PLAIN
    assert compared == []


def test_it_measures(tiny_xml: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(openvino_streams, "SECONDS", 0.05)
    assert with_streams(tiny_xml, PLAIN, target()) in (PLAIN, STREAMS)
