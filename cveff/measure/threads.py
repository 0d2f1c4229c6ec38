"""How many cores a measurement may use, and keeping it to them."""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from cveff.errors import CveffError
from cveff.runtime.machine import usable_cores

__all__ = ["busy_cores", "pinned_threads", "rest", "usable_cores"]

_PAUSE = 0.3
"""Seconds of `busy_cores`: the kernel counts in hundredths."""


_STEP, _LONGEST = 0.005, 0.2


def rest() -> None:
    """Sleep until this process's other threads do, 0.2 s at most.

    Pools spin after a run (ONNX Runtime's for some 40 ms), and one that still spins leaves the next engine a core less,
    for as long as the scheduler takes to notice.
    """
    for _ in range(round(_LONGEST / _STEP)):
        before = time.process_time()
        time.sleep(_STEP)
        if time.process_time() - before < _STEP / 10:
            return


def busy_cores() -> float | None:
    """Cores that work while this process sleeps for a moment: what others take from a measurement.

    Load averages would not tell: they remember this process's own threads for minutes.

    Returns:
        from 0 to the machine's cores; None where the system does not say (macOS, Windows).
    """
    before = _busy_seconds()
    if before is None:
        return None
    start = time.perf_counter()
    time.sleep(_PAUSE)
    after = _busy_seconds()
    assert after is not None
    return max(0.0, after - before) / (time.perf_counter() - start)


def _busy_seconds() -> float | None:
    """Seconds every core together was not idle since the machine started."""
    path = Path("/proc/stat")
    if not path.is_file():
        return None
    fields = [int(field) for field in path.read_text(encoding="ascii").splitlines()[0].split()[1:9]]
    user, nice, system, _, _, interrupt, soft_interrupt, stolen = fields
    ticks = user + nice + system + interrupt + soft_interrupt + stolen
    return ticks / os.sysconf("SC_CLK_TCK")


@contextmanager
def pinned_threads(num_threads: int) -> Iterator[tuple[int, ...]]:
    """Keep this process to `num_threads` cores, and torch to as many threads, until the block ends.

    Whole cores are taken before second hardware threads. Every thread alive now is moved, as are those
    started inside the block; afterwards each gets its cores back, and threads started inside get the
    caller's. Engines
    choose their number of threads when they open a file: open them inside the block with the same number.

    Yields:
        the cores the process is kept to; empty where the system has no such control (macOS, Windows).

    Raises:
        CveffError: `num_threads` is less than 1.
    """
    if num_threads < 1:
        raise CveffError(f"threads is {num_threads}; give 1 or more")
    torch = sys.modules.get("torch")  # not imported for this: without torch there is nothing to set
    torch_threads = torch.get_num_threads() if torch else 0
    before = _affinities()
    cores = _choose(before[_main_thread()], num_threads) if before else ()
    try:
        if torch:
            torch.set_num_threads(num_threads)
        _assign({thread: set(cores) for thread in before})
        yield cores
    finally:
        if before:
            _assign({thread: before.get(thread, before[_main_thread()]) for thread in _thread_ids()})
        if torch:
            torch.set_num_threads(torch_threads)


def _main_thread() -> int:
    return os.getpid()


def _thread_ids() -> list[int]:
    tasks = Path("/proc/self/task")
    return [int(path.name) for path in tasks.iterdir()] if tasks.is_dir() else [_main_thread()]


def _affinities() -> dict[int, set[int]]:
    if not hasattr(os, "sched_getaffinity"):
        return {}
    found = {}
    for thread in _thread_ids():
        try:
            found[thread] = set(os.sched_getaffinity(thread))
        except ProcessLookupError:  # it ended between the listing and now
            continue
    return found


def _assign(affinities: dict[int, set[int]]) -> None:
    for thread, cores in affinities.items():
        try:
            os.sched_setaffinity(thread, cores)
        except ProcessLookupError:
            continue


def _choose(cores: set[int], count: int) -> tuple[int, ...]:
    """`count` of `cores` (all of them if fewer), the first hardware thread of each core before the second."""

    def place(core: int) -> tuple[int, int]:
        siblings = [other for other in _siblings(core) if other in cores] or [core]
        return siblings.index(core), core

    return tuple(sorted(sorted(cores, key=place)[:count]))


def _siblings(core: int) -> list[int]:
    """Hardware threads of the physical core that `core` belongs to, in order; only itself where unknown."""
    path = Path(f"/sys/devices/system/cpu/cpu{core}/topology/thread_siblings_list")
    if not path.is_file():
        return [core]
    siblings: list[int] = []
    for part in path.read_text(encoding="ascii").strip().split(","):  # "0,4" or "0-1"
        first, _, last = part.partition("-")
        siblings.extend(range(int(first), int(last or first) + 1))
    return siblings if core in siblings else [core]
