"""How long a user waits before anything happens, each in fresh processes: importing, the command's help, a bundle.

"first prediction" counts from the start of the interpreter to the first answer, and its memory is the most the
process ever held. Bars: import 0.3 s without torch, help 0.5 s, first prediction 1.5 s and 250 MB.

python tools/benchmarks/startup.py --bundle runs/demo/model.bundle    # about a minute
"""

from __future__ import annotations

import argparse
import json
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import common
import numpy as np

import cveff
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.manifest import read_manifest

IMPORT = "import cveff, sys, json; print(json.dumps({'torch': 'torch' in sys.modules}))"
FIRST_PREDICTION = """
import json, sys, time
from pathlib import Path
start = time.perf_counter()
import numpy as np
import cveff
engine = cveff.runtime.open(sys.argv[1])
opened = time.perf_counter()
engine(np.load(sys.argv[2], allow_pickle=False))
done = time.perf_counter()
# Not resource.getrusage: its maximum outlives the start of a new program and so counts the parent's memory.
status = Path("/proc/self/status").read_text()
print(json.dumps({
    "open_s": opened - start,
    "first_prediction_s": done - opened,
    "peak_rss_mb": int(status.split("VmHWM:")[1].split()[0]) * 1024 / 1e6,
    "torch": "torch" in sys.modules,
    "engine": engine.name,
}))
"""
BARS = {"import": 0.3, "help": 0.5, "bundle": 1.5}
MAX_RSS_MB = 250


def main() -> None:
    arguments = _arguments()
    results = common.Results(arguments.out, __file__, {"runs": arguments.runs}, fresh=True)
    measured: dict[str, Any] = {}
    measured["import"] = timed([sys.executable, "-c", IMPORT], arguments.runs)
    measured["help"] = timed([sys.executable, "-m", "cveff", "--help"], arguments.runs)
    for bundle in arguments.bundle:
        measured[f"bundle {bundle.name}"] = first_prediction(bundle, arguments.runs)
    if not arguments.bundle:
        with tempfile.TemporaryDirectory() as folder:
            measured["bundle of efficientnet-lite0"] = first_prediction(
                _example(Path(folder)), arguments.runs
            )
    for name, item in measured.items():
        item["passes"] = (
            item["seconds"]["median"] < BARS[name.split()[0]]
            and not item.get("torch", False)
            and item.get("peak_rss_mb", 0) < MAX_RSS_MB
        )
    results.values |= {"measured": measured, "bars": {**BARS, "peak_rss_mb": MAX_RSS_MB}}
    results.save()
    common.table(
        "Fresh processes, wall-clock",
        ("what", "median s", "fastest s", "bar s", "peak MB", "torch imported", ""),
        [
            [
                name,
                item["seconds"]["median"],
                item["seconds"]["min"],
                BARS[name.split()[0]],
                item.get("peak_rss_mb"),
                str(item.get("torch", "—")),
                "PASS" if item["passes"] else "FAIL",
            ]
            for name, item in measured.items()
        ],
    )


def timed(command: list[str], runs: int) -> dict[str, Any]:
    """Wall-clock of whole processes; a first one, which fills the disk cache, is not counted.

    A process that prints a JSON line adds its keys, the median of numbers and the last of others.
    """
    seconds: list[float] = []
    answers: list[dict[str, Any]] = []
    for index in range(runs + 1):
        start = time.perf_counter()
        done = subprocess.run(command, capture_output=True, text=True, check=True, cwd=common.ROOT)
        if index:
            seconds.append(time.perf_counter() - start)
            last = done.stdout.strip().splitlines()[-1]
            answers.append(json.loads(last) if last.startswith("{") else {})
    merged = {
        key: statistics.median(a[key] for a in answers) if isinstance(value, float) else value
        for key, value in answers[-1].items()
    }
    return {
        "seconds": {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)},
        **merged,
    }


def first_prediction(bundle: Path, runs: int) -> dict[str, Any]:
    """From nothing to the first answer on one image."""
    spec = InputSpec.from_json(read_manifest(bundle)["input"])
    with tempfile.TemporaryDirectory() as folder:
        images = Path(folder) / "images.npy"
        generator = np.random.default_rng(0)
        np.save(
            images, generator.integers(0, 256, (1, *spec.size, spec.channels), np.uint8), allow_pickle=False
        )
        return timed([sys.executable, "-c", FIRST_PREDICTION, str(bundle.resolve()), str(images)], runs)


def _example(folder: Path) -> Path:
    """A bundle to open: EfficientNet-Lite0 for edge-cpu."""
    import photos

    from cveff import model_zoo

    model = model_zoo.load("efficientnet-lite0")
    images = photos.write_folder(
        photos.crops(photos.photographs(), 32, model.spec.input, 0), folder / "images"
    )
    return cveff.deploy(
        model, calibration=images, max_accuracy_drop=100, num_calibration=16, out=folder / "lite0.bundle"
    ).path


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--bundle", type=Path, nargs="+", default=[], help="bundles; by default one is made")
    parser.add_argument("--runs", type=int, default=9, help="processes of each kind")
    parser.add_argument("--quick", action="store_true", help="three processes of each kind")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/startup.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.runs = 3
    arguments.out = arguments.out or common.output("startup.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
