"""Shows how far a TensorRT build is, and stops it on Ctrl-C.

TensorRT builds on a thread of its own and calls its progress monitor; the caller's thread waits for those calls, so
that Ctrl-C reaches it at once and never a callback of TensorRT, which may not raise.
"""

from __future__ import annotations

import queue
import threading
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field
from typing import Any, TypeVar

T = TypeVar("T")

Track = Callable[[Iterable[Any], str, int | None], Iterator[Any]]
"""Follows a loop: items, what to call it, how many; `cveff.progress.Progress.track` is one."""


def untracked(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
    """Shows nothing."""
    yield from items


@dataclass
class Phase:
    """A phase of the build that belongs to no other: its name, number of steps, and the steps as they complete."""

    name: str
    num_steps: int
    _steps: queue.SimpleQueue[int | None] = field(default_factory=queue.SimpleQueue)

    def complete(self, step: int | None) -> None:
        """Step number `step` is done; None: the phase is."""
        self._steps.put(step)

    def steps(self) -> Iterator[int]:
        """The steps, each when it is done."""
        while (step := self._steps.get()) is not None:
            yield step


def make_monitor(trt: Any) -> Any:
    """A `trt.IProgressMonitor`: `phases()` yields each `Phase` when it starts, `stop()` ends the build."""

    class Monitor(trt.IProgressMonitor):
        def __init__(self) -> None:
            trt.IProgressMonitor.__init__(self)
            self._stopped = threading.Event()
            self._phases: queue.SimpleQueue[Phase | None] = queue.SimpleQueue()
            self._open: dict[str, Phase] = {}
            self._lock = threading.Lock()  # TensorRT calls from several threads

        def phase_start(self, phase_name: str, parent_phase: str | None, num_steps: int) -> None:
            if parent_phase:
                return
            phase = Phase(phase_name, num_steps)
            with self._lock:
                self._open[phase_name] = phase
            self._phases.put(phase)

        def step_complete(self, phase_name: str, step: int) -> bool:
            with self._lock:
                phase = self._open.get(phase_name)
            if phase is not None:
                phase.complete(step)
            return not self._stopped.is_set()

        def phase_finish(self, phase_name: str) -> None:
            with self._lock:
                phase = self._open.pop(phase_name, None)
            if phase is not None:
                phase.complete(None)

        def phases(self) -> Iterator[Phase]:
            while (phase := self._phases.get()) is not None:
                yield phase

        def stop(self) -> None:
            self._stopped.set()

        def close(self) -> None:
            """No phase will come any more, nor a step of those that are open."""
            with self._lock:
                for phase in self._open.values():
                    phase.complete(None)
            self._phases.put(None)

    return Monitor()


def run_monitored(work: Callable[[], T], monitor: Any, track: Track) -> T:
    """`work()` on a thread of its own, its phases shown by `track`.

    Raises:
        KeyboardInterrupt: Ctrl-C; TensorRT was told to stop, and has.
    """
    outcome: list[T] = []
    failure: list[BaseException] = []

    def run() -> None:
        try:
            outcome.append(work())
        except BaseException as error:  # noqa: BLE001  (raised again on the caller's thread)
            failure.append(error)
        finally:
            monitor.close()

    thread = threading.Thread(target=run, name="tensorrt-build")
    thread.start()
    try:
        for phase in monitor.phases():
            for _ in track(phase.steps(), f"TensorRT: {phase.name}", phase.num_steps):
                pass
    finally:
        monitor.stop()
        thread.join()
    if failure:
        raise failure[0]
    return outcome[0]
