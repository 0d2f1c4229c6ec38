"""The whole chain on the device: prune + low-rank + distil + int8, against the dense float32 file on ONNX Runtime.

On the mobile CNN and the ViT of `dense_models.py`. The last figures are of the deployed bundle: its own engine and
file, on the 10,000 test images, timed interleaved with the dense file.

python tools/benchmarks/compress_chain.py
python tools/benchmarks/compress_chain.py --only vit --prune 0.25   # where 8 bits buy nothing, more has to go before
python tools/benchmarks/compress_chain.py --quick    # one epoch of everything: that it works
"""

from __future__ import annotations

import argparse
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import dense_models
import torch

import cveff
import cveff.data
from cveff.compress import Distill, LowRank, Prune
from cveff.data import Data
from cveff.errors import StepError
from cveff.export.timer import EngineTimer
from cveff.model import Model
from cveff.pipeline import evaluate
from cveff.target import load_target

NAMES = ("mobile", "vit")
SPEEDUP, MAX_DROP_POINTS = 4.0, 1.0
PRUNE, LOW_RANK = 0.4, 0.85
"""Goals of the first two steps, as shares of the latency before them."""


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    results = common.Results(
        arguments.out,
        __file__,
        {"depth": True, "low_rank": LOW_RANK, "epochs": arguments.epochs},
        arguments.fresh,
    )
    data = cveff.data.load("fashion-mnist", seed=0)
    networks = results.values.setdefault("networks", {})
    for name in arguments.only:
        key = f"{name}, pruned to {arguments.prune:g}"
        if "bundle" not in networks.get(key, {}):
            networks[key] = _chain(name, data, arguments)
            results.save()
    common.table(
        "Prune + low-rank + distil + int8, Fashion-MNIST at 64×64, batch 1",
        ("network", "step", "test accuracy", "float32 file, share of dense", "parameters"),
        [
            [
                name,
                step,
                f"{100 * values['accuracy']:.2f}%",
                f"{values['share']:.3f}",
                f"{values['parameters']:,}",
            ]
            for name, network in networks.items()
            for step, values in network["steps"].items()
        ]
        + [
            [
                name,
                f"bundle ({network['bundle']['engine']} {network['bundle']['precision']})",
                f"{100 * network['bundle']['accuracy']:.2f}%",
                f"{1 / network['bundle']['speedup']:.3f}",
                "PASS" if network["passes"] else "FAIL",
            ]
            for name, network in networks.items()
        ],
        note=f"Bar: {SPEEDUP:g} times as fast as the dense float32 file, at most {MAX_DROP_POINTS:g} point lost.",
    )


def _chain(name: str, data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    settings = dense_models.MODELS[name]
    recover = settings.recover
    if arguments.epochs:
        recover = replace(recover, epochs=1, warmup_epochs=0.0)
    between = replace(recover, epochs=max(1, recover.epochs // 4))
    progress = common.Lines(name)
    folder = arguments.models / f"{name}-0-chain-{arguments.prune:g}"
    dense = dense_models.dense(name, 0, data, arguments.models, progress, arguments.epochs)
    steps = {
        "prune": Prune(latency=arguments.prune, depth=True, recover=Distill(train=between)),
        "low-rank": LowRank(latency=LOW_RANK),
        "distil": Distill(train=recover),
    }
    target = load_target("edge-cpu")
    models = {"dense": dense}
    model = dense
    with EngineTimer(target, "onnxruntime") as timer:
        for kind, step in steps.items():
            saved = folder / kind
            start = time.monotonic()
            if (saved / "model.json").is_file():
                model = cveff.load(saved)
            else:
                model = _apply(model, step, kind, data, target, timer, dense, progress, folder)
                cveff.save(model, saved)
            progress.message(f"{kind}: {time.monotonic() - start:.0f} s")
            models[kind] = model
        times = timer.milliseconds(models)
        figures: dict[str, Any] = {
            "steps": {
                kind: {
                    "accuracy": evaluate(item, data),
                    "share": times[kind] / times["dense"],
                    "ms": times[kind],
                    "parameters": item.num_parameters,
                }
                for kind, item in models.items()
            }
        }
    deployment = cveff.deploy(
        model, data=data, target=target, max_accuracy_drop=0.5, out=folder / "model.bundle", progress=progress
    )
    file = cveff.export(dense, folder / "dense.onnx")
    found = cveff.bench({"dense": file, "bundle": deployment.path}, data=data, batch=1)
    bundle = found[-1]
    lost = 100 * (figures["steps"]["dense"]["accuracy"] - bundle.accuracy)
    figures["bundle"] = {**bundle.to_json(), "lost_points": lost}
    figures["passes"] = bundle.speedup >= SPEEDUP and lost <= MAX_DROP_POINTS
    return figures


def _apply(
    model: Model,
    step: Any,
    kind: str,
    data: Data,
    target: Any,
    timer: EngineTimer,
    dense: Model,
    progress: common.Lines,
    folder: Path,
) -> Model:
    """One step; a low-rank step that cannot reach its goal leaves the model as it is, and says so."""
    try:
        return cveff.apply(
            model,
            step,
            data=data,
            target=target,
            timer=timer,
            teacher=dense,
            progress=progress,
            folder=folder / f"{kind}-training",
            resume=True,
        )
    except StepError as error:
        if kind != "low-rank":
            raise
        progress.message(f"low-rank left out: {error}")
        return model


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NAMES, default=list(NAMES))
    parser.add_argument(
        "--prune", type=float, default=PRUNE, help="share of the dense file's time, of (0, 1)"
    )
    parser.add_argument("--threads", type=int, default=torch.get_num_threads())
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.epochs = 1 if arguments.quick else None
    runs = common.ROOT / "runs"
    arguments.models = arguments.models or runs / (
        "quick/prune-quality" if arguments.quick else "prune-quality"
    )
    arguments.out = arguments.out or common.output("compress_chain.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
