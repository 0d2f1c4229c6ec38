"""The drift alarm: exact binomial sums, the promised rate of false alarms, and that drift is seen."""

from __future__ import annotations

import math

import numpy as np
import pytest

from cveff.runtime.drift import DriftMonitor, at_least, interval


def test_tails_are_those_of_the_binomial_law() -> None:
    for count, total, share in ((0, 5, 0.3), (3, 5, 0.3), (5, 5, 0.3), (40, 100, 0.25)):
        exact = sum(
            math.comb(total, k) * share**k * (1 - share) ** (total - k) for k in range(count, total + 1)
        )
        assert at_least(count, total, share) == pytest.approx(exact, rel=1e-10)
    assert at_least(1, 10, 0.0) == 0 and at_least(1, 10, 1.0) == 1


def test_the_interval_is_clopper_and_pearsons() -> None:
    # 7 of 20 at 95%: the textbook's (0.1539, 0.5922).
    assert interval(7, 20, 0.05) == pytest.approx((0.15391, 0.59219), abs=1e-5)
    assert interval(0, 20, 0.05)[0] == 0 and interval(20, 20, 0.05)[1] == 1
    assert interval(0, 0, 0.05) == (0, 1)


def test_clean_streams_raise_no_alarm_more_often_than_promised() -> None:
    """200 streams of 10,000, each calibrated on images of its own; the promise is 1 in 100, so 8 would be rarer than
    one in 2,000."""
    random = np.random.default_rng(0)
    shares, alarms = (0.55, 0.25, 0.2), 0
    for _ in range(200):
        monitor = DriftMonitor(random.multinomial(3000, shares).tolist())
        stream = random.choice(3, 10_000, p=shares)
        for start in range(0, len(stream), 700):
            monitor.update(stream[start : start + 700])
        alarms += bool(monitor.alarms)
    assert alarms <= 7


def test_drift_is_seen_in_either_direction_and_at_any_batch_size() -> None:
    random = np.random.default_rng(1)
    for share in (0.3, 0.9):
        stream = (random.random(2048) >= share).astype(np.int64)
        found = []
        for batch in (1, 33, 2048):
            monitor = DriftMonitor([600, 400])
            for start in range(0, len(stream), batch):
                monitor.update(stream[start : start + batch])
            found.append(monitor.alarms)
        assert found[0] == found[1] and sorted(map(str, found[0])) == sorted(map(str, found[2]))
        first = found[0][0]
        assert first.window == 256 and first.position == 256 and first.stage == 0
        assert "were calibrated" in str(first)


def test_two_stages_of_which_none_was_used_have_no_alarm() -> None:
    monitor = DriftMonitor([0, 500])
    monitor.update(np.ones(1024, np.int64))
    assert monitor.alarms == []
    monitor.update(np.zeros(256, np.int64))
    assert monitor.alarms
