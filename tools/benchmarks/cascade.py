"""A cascade of the zoo's two Fashion-MNIST models: accuracy and time against each alone, and the drift alarm.

Bars: neither model alone is both faster and more accurate than the cascade; 10,000 clean test images raise no alarm,
noise and another data set do.

python tools/benchmarks/cascade.py
python tools/benchmarks/cascade.py --quick      # few images: that it works, not what it reaches
"""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

import common
import numpy as np

import cveff
from cveff.data import Data
from cveff.data import load as load_data
from cveff.dynamic import Goal
from cveff.export.bench import bench
from cveff.export.cascade import cascade
from cveff.runtime.preprocess import preprocess
from cveff.subject import open_model

ZOO = {"small": "fashion-mnist-small", "large": "fashion-mnist-large"}
BATCH = 32


def main() -> None:
    arguments = _arguments()
    settings = {
        "threads": arguments.threads,
        "accuracy_drop": arguments.accuracy_drop,
        "images": arguments.images,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    data = load_data("fashion-mnist", seed=0)
    bundles = build(data, arguments)
    if "subjects" not in results.values:
        found = bench(bundles, batch=(1, 8), threads=arguments.threads, data=data, memory=False)
        results.values["subjects"] = [figures.to_json() for figures in found]
        results.save()
    if "drift" not in results.values:
        results.values["drift"] = drift(bundles["cascade"], data, arguments.images)
        results.save()
    results.values |= verdict(results.values)
    results.save()
    common.table(
        "Fashion-MNIST, test images; times are means over streams of real images, in turns",
        ("bundle", "batch", "accuracy %", "ms", "times as fast as the first"),
        [
            (item["name"], item["batch"], 100 * item["accuracy"], item["median_ms"], item["speedup"])
            for item in results.values["subjects"]
        ],
    )
    common.table(
        "Drift alarm",
        ("stream", "images", "alarms", "first at", "left first %"),
        [
            (name, item["images"], item["alarms"], item["first_at"], 100 * item["left_first"])
            for name, item in results.values["drift"].items()
        ],
        note="PASS" if results.values["passes"] else "; ".join(results.values["missed"]),
    )


def build(data: Data, arguments: argparse.Namespace) -> dict[str, Path]:
    """Both models' bundles and the cascade of them, kept between runs."""
    target = cveff.Target(
        name="cascade",
        description="float32 on CPU engines",
        candidates=(("onnxruntime", "fp32"), ("openvino", "fp32")),
        threads=arguments.threads,
        batch_sizes=(1, 8),
    )
    found = {name: arguments.models / f"{name}.bundle" for name in (*ZOO, "cascade")}
    for name, card in ZOO.items():
        if not found[name].exists():
            cveff.deploy(
                open_model(card), data=data, target=target, out=found[name], progress=common.Lines(name)
            )
    if not found["cascade"].exists():
        cascade(
            [found["small"], found["large"]],
            data=data,
            out=found["cascade"],
            exits=Goal(accuracy_drop=arguments.accuracy_drop),
            threads=arguments.threads,
            progress=common.Lines("cascade"),
        )
    return found


def drift(bundle: Path, data: Data, count: int) -> dict[str, dict[str, Any]]:
    """The alarm on test images as they are, with noise, and on handwritten digits in their place."""
    random = np.random.default_rng(0)
    with cveff.runtime.open(bundle) as engine:
        spec = engine.spec
        split = data.evaluation.subset(range(min(count, len(data.evaluation))))
        clean = np.concatenate([images for images, _ in split.evaluation_batches(spec)])
        noisy = (clean + random.normal(0, 60, clean.shape)).clip(0, 255).round().astype(np.uint8)
        other = load_data("digits").train
        assert other is not None
        digits = preprocess([other.source(index) for index in range(len(other))], spec, resize=True)
        return {
            name: _stream(engine, images)
            for name, images in (("clean", clean), ("noise", noisy), ("digits", digits))
        }


def _stream(engine: Any, images: np.ndarray) -> dict[str, Any]:
    engine.cascade.reset()
    for start in range(0, len(images), BATCH):
        engine.probabilities(images[start : start + BATCH])
    alarms = engine.cascade.alarms
    return {
        "images": len(images),
        "alarms": len(alarms),
        "first_at": alarms[0].position if alarms else None,
        "left_first": engine.cascade.statistics()[0].share,
    }


def verdict(values: dict[str, Any]) -> dict[str, Any]:
    """Whether the cascade is on the front and the alarm is right, and what is not."""
    missed = []
    for batch in sorted({item["batch"] for item in values["subjects"]}):
        items = {item["name"]: item for item in values["subjects"] if item["batch"] == batch}
        ours = items.pop("cascade")
        for name, item in items.items():
            if item["median_ms"] <= ours["median_ms"] and item["accuracy"] >= ours["accuracy"]:
                missed.append(f"{name} is as fast and as accurate at batch {batch}")
    if values["drift"]["clean"]["alarms"]:
        missed.append("clean images raised an alarm")
    missed += [
        f"{name} raised no alarm" for name in ("noise", "digits") if not values["drift"][name]["alarms"]
    ]
    return {"missed": missed, "passes": not missed}


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--accuracy-drop", type=float, default=0.2, help="points, of the large model's")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--images", type=int, default=10_000, help="of the drift alarm's streams")
    parser.add_argument("--models", type=Path, help="folder of bundles; by default runs/cascade")
    parser.add_argument("--quick", action="store_true", help="streams of 1,024 images")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/cascade.json")
    arguments = parser.parse_args()
    arguments.images = 1024 if arguments.quick else arguments.images
    runs = common.ROOT / "runs" / ("quick" if arguments.quick else "") / "cascade"
    arguments.models = arguments.models or runs
    arguments.out = arguments.out or common.output("cascade.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
