"""Does the precision that `deploy` chooses ever cost time or accuracy? Seven models, Fashion-MNIST at 224×224.

The networks have random weights with settled batch norms, and a classifier fitted to their features by ridge
regression, so that rounding can lose accuracy. Each is deployed with a limit of one point; then the bundle is timed
again, in turns with the float32 and int8 files of both engines that kept to the limit on the images the choice was made
on. "fastest / auto" is the smallest, over those, of the median over rounds of (its time / the bundle's): below 1 the
choice was wrong by so much. Accuracy is that of test images that no choice saw.

python tools/benchmarks/auto_precision.py                # about 40 minutes on 2 quiet cores; continues where it stopped
python tools/benchmarks/auto_precision.py --quick        # one small model, few images
"""

from __future__ import annotations

import argparse
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import common
import engines
import numpy as np
import torch
from torch import Tensor, nn

import cveff
import cveff.data
from cveff.backbones import Reparameterize, has_branches
from cveff.compress.samples import samples
from cveff.data import Data
from cveff.data.augment import normalize
from cveff.data.sampling import calibration_images
from cveff.export.build_candidates import build_candidates
from cveff.export.int8 import Int8
from cveff.export.onnx import export
from cveff.measure import compare, pinned_threads
from cveff.measure.accuracy import predict, top1
from cveff.model import Model
from cveff.pipeline import create_for
from cveff.progress import Silent
from cveff.recipe import ModelSettings
from cveff.target import Target, load_target

OURS = "auto"
PLAIN = ("fp32", "int8")
MAX_DROP, SAME = 1.0, 0.97
"""Points that may be lost; a ratio that far under 1 is within what one run differs from the next."""
SIZE, CLASSES, BATCH = 224, 10, 32


def main() -> None:
    arguments = _arguments()
    settings = {
        "threads": arguments.threads,
        "images": {"train": arguments.train, "val": arguments.val, "test": arguments.test},
        "max_accuracy_drop": MAX_DROP,
        "seconds": arguments.seconds,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    models = results.values.setdefault("models", {})
    data = fewer(cveff.data.load("fashion-mnist", seed=0), arguments)
    for name in arguments.models:
        if name not in models:
            models[name] = one_model(name, data, arguments)
            results.values["summary"] = summary(models)
            results.save()
    results.values["summary"] = summary(models)
    results.save()
    show(results.values)


def fewer(data: Data, arguments: argparse.Namespace) -> Data:
    """As many images of each split as were asked for."""
    assert data.train is not None and data.test is not None
    generator = np.random.default_rng(0)
    parts = {
        name: split.subset(np.sort(generator.permutation(len(split))[:count]))
        for name, split, count in (
            ("train", data.train, arguments.train),
            ("val", data.val, arguments.val),
            ("test", data.test, arguments.test),
        )
    }
    return replace(data, train=parts["train"], val=parts["val"], test=parts["test"])


def probed(name: str, data: Data) -> Model:
    """A network with random features, batch norms that have seen images, and a classifier fitted to them."""
    model = create_for(ModelSettings(architecture=name, image_size=SIZE, enlarge=True), data, seed=0)
    assert data.train is not None
    batches = samples(data.train, model.spec.input, len(data.train), batch_size=BATCH)
    network: Any = model.module
    norms = [part for part in network.modules() if isinstance(part, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over everything seen
    with torch.no_grad():
        network.train()
        for images, _ in batches[:4] if norms else ():
            network(images)
        network.eval()
        features = [
            network.forward_head(network.forward_features(images), pre_logits=True) for images, _ in batches
        ]
        targets = torch.cat([targets for _, targets in batches if targets is not None])
        _fit(network.get_classifier(), torch.cat(features), targets)
    return cveff.apply(model, Reparameterize()) if has_branches(network) else model


def _fit(classifier: nn.Linear, features: Tensor, targets: Tensor) -> None:
    """Ridge regression to ±1."""
    x = features.double()
    mean = x.mean(0)
    x = x - mean
    y = 2 * nn.functional.one_hot(targets, CLASSES).double() - 1
    gram = x.T @ x
    gram += torch.eye(len(gram), dtype=gram.dtype) * 0.01 * gram.diagonal().mean()
    weight = torch.linalg.solve(gram, x.T @ (y - y.mean(0))).T
    classifier.weight.copy_(weight)
    classifier.bias.copy_(y.mean(0) - weight @ mean)


def one_model(name: str, data: Data, arguments: argparse.Namespace) -> dict[str, Any]:
    """Deploy, then time and score the bundle beside the plain files."""
    progress = common.Lines(name)
    model = probed(name, data)
    target = Target(
        name="two-cores",
        description="The candidates of edge-cpu for single images.",
        candidates=load_target("edge-cpu").candidates,
        threads=arguments.threads,
        batch_sizes=(1,),
    )
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        start = time.monotonic()
        deployment = cveff.deploy(
            model,
            data=data,
            target=target,
            max_accuracy_drop=MAX_DROP,
            out=folder / "auto.bundle",
            progress=progress,
        )
        seconds = time.monotonic() - start
        found = {
            "seconds": seconds,
            "chosen": {key: deployment.chosen[key] for key in ("engine", "precision", "why")},
            "candidates": [
                {
                    key: entry[key]
                    for key in ("engine", "precision", "accuracy", "latency_ms", "rejected", "why")
                }
                for entry in deployment.manifest["candidates"]
            ],
            **compared(model, deployment, data, target, folder, arguments),
        }
    progress.message(
        f"{found['chosen']}, fastest / auto {found['ratio']:.3f}, {found['drop']:+.2f} points lost"
    )
    return found


def compared(
    model: Model,
    deployment: cveff.Deployment,
    data: Data,
    target: Target,
    folder: Path,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """The bundle against float32 and int8 of both engines, those that kept to the limit."""
    spec = model.spec.input
    assert data.train is not None and data.test is not None
    kept = [
        (entry["engine"], entry["precision"])
        for entry in deployment.manifest["candidates"]
        if entry["precision"] in PLAIN and not entry["rejected"]
    ]
    plain = replace(target, candidates=tuple(kept))
    source = export(model, folder / "model.onnx")
    images = calibration_images(data.train, spec, 256, 0)
    int8 = Int8(model, images, folder, data.val, MAX_DROP)
    with pinned_threads(arguments.threads):
        built = build_candidates(source, plain, int8, folder, Silent())
        with cveff.runtime.open(deployment.path, threads=arguments.threads) as engine:
            calls: dict[str, Any] = {**built.sessions, OURS: engines.Timed(engine.logits, arguments.threads)}
            result = compare(
                calls,
                images[:1],
                reference=OURS,
                budget_seconds=arguments.seconds,
                min_rounds=7,
                precision=0.0,
            )
            batches = [(pixels, None) for pixels, _ in data.test.evaluation_batches(spec, BATCH)]
            accuracy = top1(predict(engine.logits, batches), data.test.class_indices())
        built.close()
    reference = top1(_torch_logits(model, data), data.test.class_indices())
    ratios = {name: result.ratio(OURS, name) for name in built.sessions}
    closest = min(ratios, key=lambda name: ratios[name].median)
    return {
        "latency_ms": {name: item.median_ms for name, item in result.items()},
        "ratios": {name: ratio.to_json() for name, ratio in ratios.items()},
        "fastest": closest,
        "ratio": ratios[closest].median,
        "accuracy": {"fp32": reference, OURS: accuracy},
        "drop": 100 * (reference - accuracy),
        "load_average": result.load,
    }


def _torch_logits(model: Model, data: Data) -> np.ndarray:
    assert data.test is not None
    with torch.no_grad():
        parts = [
            model.module(normalize(pixels, model.spec.input))
            for pixels, _ in data.test.evaluation_batches(model.spec.input, BATCH)
        ]
    return torch.cat(parts).numpy()


def summary(models: dict[str, Any]) -> dict[str, Any]:
    """Smallest ratio, largest loss."""
    return {
        "models": len(models),
        "smallest_ratio": min(found["ratio"] for found in models.values()),
        "largest_drop": max(found["drop"] for found in models.values()),
        "passes": all(found["ratio"] >= SAME for found in models.values()),
    }


def show(values: dict[str, Any]) -> None:
    """Print the table."""
    common.table(
        "What deploy chose, against float32 and int8 of both engines that kept to the limit",
        ("model", "chosen", "ms", "closest", "closest / auto", "fp32", "auto", "points lost", "seconds"),
        [
            [
                name,
                f"{found['chosen']['engine']} {found['chosen']['precision']}",
                found["latency_ms"][OURS],
                found["fastest"],
                f"{found['ratio']:.3f}",
                f"{100 * found['accuracy']['fp32']:.2f}%",
                f"{100 * found['accuracy'][OURS]:.2f}%",
                f"{found['drop']:.2f}",
                f"{found['seconds']:.0f}",
            ]
            for name, found in values["models"].items()
        ],
        note=f"Limit {MAX_DROP:g} point on the images of the choice; accuracy on "
        f"{values['settings']['images']['test']} others. {values['summary']}",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--models", nargs="+", default=list(engines.MODELS), metavar="NAME")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument(
        "--train", type=int, default=1500, help="images for the classifier and for calibration"
    )
    parser.add_argument("--val", type=int, default=500)
    parser.add_argument("--test", type=int, default=1000)
    parser.add_argument("--seconds", type=float, default=20.0, help="time of one comparison")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.seconds = ["mobilenetv3_small_100"], 4.0
        arguments.train, arguments.val, arguments.test = 200, 100, 100
    arguments.out = arguments.out or common.output("auto_precision.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
