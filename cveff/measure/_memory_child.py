"""The fresh process of `cveff.measure.memory`: reads a request on stdin, writes one line of JSON to stdout.

Imports nothing but numpy and the engine: every module more would be charged to the engine.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np

from cveff.runtime.engines import open_file
from cveff.runtime.session import Session


def main() -> None:
    """Answer one request; errors leave as tracebacks, whose last line the parent quotes."""
    request: dict[str, Any] = json.loads(sys.stdin.read())
    images = np.load(request["images"], allow_pickle=False)
    baseline = peak_rss_bytes()
    start = time.perf_counter()
    session = _open_stages(request) if "stages" in request else _open_file(request)
    opened = time.perf_counter()
    session(images)
    first = time.perf_counter()
    for _ in range(request["num_predictions"] - 1):
        session(images)
    answer = {
        "peak_rss_bytes": peak_rss_bytes(),
        "baseline_rss_bytes": baseline,
        "open_seconds": opened - start,
        "first_prediction_seconds": first - opened,
        "batch": len(images),
        "threads": session.threads,
        "num_predictions": request["num_predictions"],
        "modules": sorted({name.partition(".")[0] for name in sys.modules}),
    }
    sys.stdout.write("\n" + json.dumps(answer) + "\n")
    sys.stdout.flush()
    session.close()


def _open_file(request: dict[str, Any]) -> Session:
    return open_file(
        request["engine"], Path(request["path"]), threads=request["threads"], options=request["options"]
    )


def _open_stages(request: dict[str, Any]) -> Session:
    from cveff.runtime.cascade import Cascade
    from cveff.runtime.input_spec import InputSpec
    from cveff.runtime.stages import parse_stages

    stages = parse_stages(request["stages"], "stages")
    spec = InputSpec.from_json(request["input"])
    cascade = Cascade(Path(request["folder"]), stages, spec, request["labels"], threads=request["threads"])
    cascade.thresholds = [float("inf")] * (len(stages.stages) - 1)  # the most that an image can need
    return cascade


def peak_rss_bytes() -> int:
    """The most memory this process has held resident.

    On Linux from VmHWM: `ru_maxrss` survives exec, so it would report the parent's peak where that was
        larger.
    """
    status = Path("/proc/self/status")
    if status.is_file():
        for line in status.read_text(encoding="ascii").splitlines():
            if line.startswith("VmHWM:"):
                return int(line.split()[1]) * 1024
    import resource

    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


if __name__ == "__main__":
    main()
