"""Threads that others need: waiting until this process's own sleep, and noticing what other programs take."""

from __future__ import annotations

import subprocess
import sys
import time

import pytest

from cveff.measure import threads
from cveff.measure.threads import busy_cores, rest


class Spinning:
    """A process whose threads use `busy` seconds of every second it sleeps, until `seconds` have passed."""

    def __init__(self, seconds: float, busy: float = 1.0) -> None:
        self.now, self.used, self.seconds, self.busy = 0.0, 0.0, seconds, busy

    def sleep(self, seconds: float) -> None:
        self.used += self.busy * max(0.0, min(seconds, self.seconds - self.now))
        self.now += seconds

    def process_time(self) -> float:
        return self.used


def test_rest_waits_until_no_thread_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    spinning = Spinning(0.043)
    monkeypatch.setattr(threads, "time", spinning)
    rest()
    assert 0.043 <= spinning.now < 0.06


def test_rest_is_short_where_nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    idle = Spinning(0.0)
    monkeypatch.setattr(threads, "time", idle)
    rest()
    assert idle.now <= 0.01


def test_rest_does_not_wait_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    endless = Spinning(1e9, busy=2.0)
    monkeypatch.setattr(threads, "time", endless)
    rest()
    assert endless.now == pytest.approx(0.2)


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="only Linux says")
def test_another_program_that_works_is_seen() -> None:
    with subprocess.Popen([sys.executable, "-c", "while True: pass"]) as other:
        time.sleep(0.2)
        try:
            busy = busy_cores()
        finally:
            other.kill()
    # Others may run as well; one core's worth is at least half of one on a crowded machine.
    assert busy is not None
    assert busy > 0.5
