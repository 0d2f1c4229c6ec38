"""What each repair of 8-bit rounding is worth by itself, on the file: five networks, ONNX Runtime's CPU.

The plain file has ranges from the least to the greatest value, weights rounded to the nearest and nothing else; every
other file changes one thing of it, and the last is what `Quantize()` makes. Networks and images are those of
`quantize_peers.py`, which trains what is missing. Images that reach far past the others are left out everywhere.

python tools/benchmarks/repairs.py --foolbox-wheel foolbox-3.3.4-py3-none-any.whl   # half an hour, networks given
python tools/benchmarks/repairs.py --only mobile vit
python tools/benchmarks/repairs.py --quick                                          # few images, one epoch
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from pathlib import Path
from typing import Any

import common
import numpy as np
import peers
import quantize_networks
import torch
from quantize_networks import NETWORKS, QUICK, REPVGG, Amount

import cveff
from cveff.compress.quant.error import relative_error
from cveff.compress.quantize import Quantize
from cveff.data import Data
from cveff.measure import agreement, predict, top1
from cveff.model import Model

PLAIN = "plain"
BASE = Quantize(method="minmax", weights="nearest", equalize=False, correction="none", saturation="ignore")
REPAIRS: dict[str, Quantize] = {
    PLAIN: BASE,
    "ranges by percentile": dataclasses.replace(BASE, method="percentile"),
    "ranges by squared error": dataclasses.replace(BASE, method="mse"),
    "ranges by entropy": dataclasses.replace(BASE, method="entropy"),
    "ranges by moving average": dataclasses.replace(BASE, method="moving-average"),
    "steps of weights by squared error": dataclasses.replace(BASE, weight_method="mse"),
    "channels equalized": dataclasses.replace(BASE, equalize=True),
    "bias correction": dataclasses.replace(BASE, correction="mean"),
    "statistics brought back": dataclasses.replace(BASE, correction="statistics"),
    "errors of weights made up for": dataclasses.replace(BASE, weights="compensated"),
    "rounding learned": dataclasses.replace(BASE, weights="learned"),
    "default": Quantize(saturation="ignore"),
}
BATCH = 50


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    amount = QUICK if arguments.quick else Amount()
    settings = {**dataclasses.asdict(amount), "foolbox": arguments.foolbox_wheel is not None}
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    networks = results.values.setdefault("networks", {})
    for network in arguments.only:
        rows = networks.setdefault(network, {})
        if REPAIRS.keys() <= rows.keys():
            continue
        model, data = quantize_networks.subject(network, 0, arguments.models, amount, arguments.foolbox_wheel)
        folder = arguments.models / "int8" / f"{network}-0-repairs"
        folder.mkdir(parents=True, exist_ok=True)
        reference, targets = _logits(
            cveff.export(model, folder / "fp32.onnx"), model, data, arguments.threads
        )
        for repair, step in REPAIRS.items():
            if repair not in rows:
                step = dataclasses.replace(step, images=amount.calibration)
                rows[repair] = _row(step, model, data, folder, reference, targets, arguments.threads)
                common.console.print(f"{network}: {repair}: {rows[repair]}", highlight=False)
                results.save()
    results.save()
    _show(results.values)


def _row(
    step: Quantize,
    model: Model,
    data: Data,
    folder: Path,
    reference: np.ndarray,
    targets: np.ndarray | None,
    threads: int,
) -> dict[str, Any]:
    """Make one file and compare its answers with the float file's."""
    start = time.monotonic()
    small = cveff.apply(model, step, data=data, seed=0)
    seconds = time.monotonic() - start
    logits = _logits(cveff.export(small, folder / "int8.onnx"), model, data, threads)
    found = {
        "error": relative_error(torch.from_numpy(logits), torch.from_numpy(reference)),
        "agreement": agreement(logits, reference),
        "images": len(logits),
        "seconds": seconds,
    }
    if targets is not None:
        found["points_lost"] = 100 * (top1(reference, targets) - top1(logits, targets))
    return found


def _logits(path: Path, model: Model, data: Data, threads: int) -> np.ndarray:
    batches = data.evaluation.evaluation_batches(model.spec.input, BATCH)
    return predict(peers.open_onnxruntime(path, threads), batches)[0]


def _show(values: dict[str, Any]) -> None:
    for network, rows in values["networks"].items():
        plain = rows[PLAIN]["error"]
        common.table(
            f"{network}: {rows[PLAIN]['images']} images",
            ("file", "error of the logits' energy", "of the plain file's", "same answer", "points lost", "s"),
            [
                [
                    repair,
                    row["error"],
                    f"{100 * row['error'] / plain:.0f}%",
                    f"{100 * row['agreement']:.2f}%",
                    row.get("points_lost"),
                    f"{row['seconds']:.0f}",
                ]
                for repair, row in rows.items()
            ],
        )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NETWORKS, help="networks; by default all")
    parser.add_argument("--foolbox-wheel", type=Path, help="adds the wheel's 20 ImageNet photographs")
    parser.add_argument(
        "--models", type=Path, help="folder of trained networks; by default runs/prune-quality"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--quick", action="store_true", help="one network, few images, one epoch")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/repairs.json")
    arguments = parser.parse_args()
    arguments.only = arguments.only or ([REPVGG] if arguments.quick else NETWORKS)
    arguments.out = arguments.out or common.output("repairs.json", arguments.quick)
    arguments.models = arguments.models or common.ROOT / "runs" / (
        "quick/quantize-peers" if arguments.quick else "prune-quality"
    )
    return arguments


if __name__ == "__main__":
    main()
