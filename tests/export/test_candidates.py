"""The rule that picks a candidate, on hand-made measurements."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest

from cveff.errors import TargetError
from cveff.export.candidates import Candidate, Limits, choose, is_tied, latency_json, rejection
from cveff.measure.latency import Latency, paired_ratio

LIMITS = Limits(max_accuracy_drop=1.0, reference_accuracy=0.95)


def timing(middle: float, spread: float = 0.01, rounds: int = 30) -> Latency:
    times = tuple(middle * (1 + spread * ((7 * i) % rounds / rounds - 0.5)) for i in range(rounds))
    return Latency(
        median_ms=middle,
        p10=min(times),
        p90=max(times),
        min_ms=min(times),
        spread=spread,
        throughput=1000 / middle,
        runs=len(times),
        threads=2,
        batch=1,
        rounds_ms=times,
        speedup=paired_ratio(times, times),
    )


def candidate(
    engine: str, precision: str, milliseconds: float = 1.0, accuracy: float | None = 0.95, **values: object
) -> Candidate:
    made = Candidate(
        engine,
        precision,
        accuracy=accuracy,
        agreement=0.99,
        timings={1: timing(milliseconds)},
        size_bytes=100,
    )
    return replace(made, **values)  # type: ignore[arg-type]


def chosen(candidates: tuple[Candidate, ...]) -> Candidate:
    (winner,) = [c for c in candidates if c.chosen]
    return winner


def test_fastest_within_the_limit_wins() -> None:
    decided = choose(
        [
            candidate("onnxruntime", "fp32", 2.0),
            candidate("onnxruntime", "int8", 0.5, accuracy=0.90),
            candidate("openvino", "int8", 1.0, accuracy=0.945),
        ],
        LIMITS,
        batch=1,
    )
    assert chosen(decided).name == "openvino int8"
    assert [c.rejected for c in decided] == [False, True, False]
    assert "2.00× the chosen's time" in decided[0].why
    assert "loses 5.00 points" in decided[1].why and "limit is 1" in decided[1].why
    assert "-0.50 points" in decided[2].why


def test_a_drop_of_exactly_the_limit_is_kept() -> None:
    # 0.95 - 0.94 is not 0.01 in binary floating point.
    assert rejection(candidate("onnxruntime", "int8", accuracy=0.94), LIMITS) == ""
    assert rejection(candidate("onnxruntime", "int8", accuracy=0.9399), LIMITS) != ""


def test_order_of_the_list_does_not_change_the_choice() -> None:
    candidates = [
        candidate("onnxruntime", "fp32", 2.0),
        candidate("openvino", "fp32", 1.5),
        candidate("openvino", "int8", 1.0),
    ]
    assert chosen(choose(candidates, LIMITS, 1)) == chosen(choose(candidates[::-1], LIMITS, 1))


def test_a_tie_goes_to_the_more_accurate_then_to_the_smaller() -> None:
    fast = candidate("onnxruntime", "int8", 1.000, accuracy=0.945)
    accurate = candidate("onnxruntime", "fp32", 1.002, accuracy=0.950)
    decided = choose([fast, accurate], LIMITS, 1)
    assert chosen(decided).name == "onnxruntime fp32"
    assert "within noise, and more accurate" in decided[1].why
    assert "less accurate" in decided[0].why
    small = replace(accurate, engine="openvino", size_bytes=50)
    assert chosen(choose([accurate, small], LIMITS, 1)).name == "openvino fp32"


def test_clearly_slower_is_no_tie_however_noisy() -> None:
    fast, slow = candidate("a", "fp32"), candidate("b", "fp32", 1.2, accuracy=0.96)
    noisy = replace(slow, timings={1: timing(1.2, spread=1.5)})
    assert not is_tied(noisy, fast, 1)
    assert chosen(choose([fast, noisy], LIMITS, 1)) == replace(
        fast, chosen=True, why=chosen(choose([fast, noisy], LIMITS, 1)).why
    )


def test_failed_builds_do_not_stop_the_choice() -> None:
    broken = Candidate("openvino", "int8", error="not installed: pip install 'cveff[openvino]'")
    decided = choose([broken, candidate("onnxruntime", "fp32")], LIMITS, 1)
    assert chosen(decided).name == "onnxruntime fp32"
    assert decided[0].rejected and "pip install" in decided[0].why
    assert "the only one within the limits" in decided[1].why


def test_none_left_lists_every_candidate_and_why() -> None:
    with pytest.raises(TargetError) as caught:
        choose(
            [
                candidate("onnxruntime", "int8", accuracy=0.5),
                Candidate("openvino", "fp32", error="cannot open"),
            ],
            LIMITS,
            1,
        )
    message = str(caught.value)
    assert "onnxruntime int8: loses 45.00 points" in message
    assert "openvino fp32: cannot open" in message
    assert "max_accuracy_drop" in message
    with pytest.raises(TargetError, match="no candidates"):
        choose([], LIMITS, 1)


def test_without_labels_disagreement_is_limited() -> None:
    limits = Limits(max_accuracy_drop=2.0)
    good = candidate("onnxruntime", "int8", 1.0, accuracy=None, agreement=0.98)
    bad = candidate("openvino", "int8", 0.5, accuracy=None, agreement=0.97)
    decided = choose([good, bad], limits, 1)
    assert chosen(decided).name == "onnxruntime int8"
    assert "disagrees with the original on 3.00% of the images" in decided[1].why


def test_memory_limit() -> None:
    limits = replace(LIMITS, memory_mb=100)
    big = candidate("openvino", "int8", 0.5, peak_rss_bytes=101 * 2**20)
    small = candidate("onnxruntime", "fp32", 1.0, peak_rss_bytes=100 * 2**20)
    decided = choose([big, small], limits, 1)
    assert chosen(decided).name == "onnxruntime fp32"
    assert "101 MiB" in decided[0].why


def test_answers_that_are_not_finite_are_rejected() -> None:
    decided = choose(
        [candidate("a", "fp32", 0.1, relative_difference=float("nan")), candidate("b", "fp32")], LIMITS, 1
    )
    assert chosen(decided).name == "b fp32"
    assert "not finite" in decided[0].why


def test_unmeasured_accuracy_does_not_ship() -> None:
    assert "not measured" in rejection(candidate("a", "fp32", accuracy=None), LIMITS)
    assert "not measured" in rejection(candidate("a", "fp32", accuracy=None, agreement=None), Limits(1.0))


def test_a_saturating_kernel_is_called_that() -> None:
    gap = {"large": True, "agreement": 0.6, "images": 100}
    assert "integer kernels saturate" in rejection(
        candidate("onnxruntime", "int8", accuracy=0.5, meaning_gap=gap), LIMITS
    )


def test_latencies_in_the_manifest_are_plain_json() -> None:
    values = latency_json(timing(2.0))
    assert json.loads(json.dumps(values)) == values
    assert values["images_per_second"] == 500 and values["rounds"] == 30
