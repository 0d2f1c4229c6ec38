"""Plans that were built on this machine, and the times its kernels took: `$XDG_CACHE_HOME/cveff/tensorrt` (by default
`~/.cache/cveff/tensorrt`). Everything there may be deleted at any time; it is built again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import time
from dataclasses import asdict
from pathlib import Path
from typing import Any

from .errors import EngineError
from .files import atomic_path
from .tensorrt_build import build
from .tensorrt_plan import Machine, PlanInfo, onnx_hash, read_info, read_plan, write_plan
from .tensorrt_progress import Track, untracked
from .tensorrt_settings import TensorRT

_log = logging.getLogger(__name__)


def cache_folder() -> Path:
    """Where plans and timing caches are kept."""
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cveff" / "tensorrt"


def write_new_plan(
    trt: Any, onnx: Path, plan: Path, machine: Machine, settings: TensorRT, track: Track = untracked
) -> PlanInfo:
    """Build the plan of an ONNX file, with this machine's timing cache.

    Raises:
        EngineError: see `build`.
        CveffError: the plan or the timing cache cannot be written.
    """
    digest = onnx_hash(onnx)
    timings = _timing_cache(machine)
    known = timings.read_bytes() if timings.is_file() else b""
    start = time.perf_counter()
    content, learned = build(trt, onnx, settings, known, track)
    seconds = time.perf_counter() - start
    if learned != known:
        with atomic_path(timings) as temporary:
            temporary.write_bytes(learned)
    info = PlanInfo(digest, machine, settings, seconds, hashlib.sha256(content).hexdigest())
    write_plan(plan, content, info)
    return info


def plan_of(trt: Any, onnx: Path, machine: Machine, settings: TensorRT) -> bytes:
    """The plan of an ONNX file for this machine: `NAME.plan` beside it, else one of the cache, else a new one there.

    A plan that does not match the machine, the file or the settings is not loaded, and the log says why. Building
    takes from seconds to many minutes: the log says that it begins, and how long it took.

    Raises:
        EngineError: see `build`.
    """
    digest = onnx_hash(onnx)
    cached = _cached_plan(digest, machine, settings)
    for plan in (onnx.with_suffix(".plan"), cached):
        if plan.is_file():
            try:
                info = read_info(plan)
                reason = info.mismatch(machine, digest, settings)
                if not reason:
                    return read_plan(plan, info)
            except EngineError as error:
                reason = str(error)
            _log.warning("%s is not loaded: %s", plan, reason)
    _log.warning("building a plan of %s for %s; this is done once, and can take minutes", onnx.name, machine)
    info = write_new_plan(trt, onnx, cached, machine, settings)
    _log.warning("the plan was built in %.0f s and is kept as %s", info.build_seconds, cached)
    return read_plan(cached, info)


def _cached_plan(digest: str, machine: Machine, settings: TensorRT) -> Path:
    what = [digest, str(machine), machine.platform, asdict(settings)]
    key = hashlib.sha256(json.dumps(what).encode()).hexdigest()[:32]
    return cache_folder() / f"{key}.plan"


def _timing_cache(machine: Machine) -> Path:
    what = f"{machine.gpu.name} {'.'.join(map(str, machine.gpu.compute_capability))} {machine.tensorrt}"
    return cache_folder() / f"timing-{re.sub(r'[^A-Za-z0-9.]+', '-', what)}.cache"
