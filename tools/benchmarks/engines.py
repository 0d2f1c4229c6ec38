"""Is `deploy` ever slower than the best of the tools it chooses from? Seven models, batch 1 and 8.

Peers are built by each tool's defaults from a plain `torch.onnx.export` file and are given float images that
are already normalised; a cveff bundle is opened by `cveff.runtime` and takes uint8 images. All of one model are
timed interleaved in one process. "best / cveff" is the smallest, over peers, of the median over rounds of
(peer's time / cveff's time): 0.95 or more passes, above 1 cveff is faster than every peer.

Weights are random (times do not depend on them) with settled batch-norm statistics, so `deploy` runs with
max_accuracy_drop = 100 and unlabelled calibration crops: this table is about speed alone.

python tools/benchmarks/engines.py                # about 25 minutes on 2 quiet cores; continues where it stopped
python tools/benchmarks/engines.py --quick        # one small model, few rounds
"""

from __future__ import annotations

import argparse
import gc
import tempfile
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import numpy as np
import peers
import photos
import torch
from torch import nn

import cveff
from cveff.backbones import Reparameterize, has_branches
from cveff.measure import compare, pinned_threads
from cveff.model import Model
from cveff.runtime.preprocess import preprocess

MODELS = (
    "efficientnet_lite0",
    "resnet50",
    "mobilenetv3_small_100",
    "vit_tiny_patch16_224",
    "convnext_atto",
    "mobilenetv4_conv_small",
    "fastvit_t8",
)
OURS = "cveff deploy"
ORT, ORT_INT8 = "ONNX Runtime fp32", "ONNX Runtime int8"
OPENVINO, OPENVINO_F32, NNCF = "OpenVINO", "OpenVINO f32", "NNCF int8"
PEERS = (ORT, ORT_INT8, OPENVINO, OPENVINO_F32, NNCF)
LIMIT = 0.95
CALIBRATION = 48


@dataclass(frozen=True)
class Timed:
    """A predictor of uint8 batches with the number of threads that is reported."""

    call: Callable[[np.ndarray], np.ndarray]
    threads: int

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Whatever `call` answers."""
        return self.call(images)


def main() -> None:
    arguments = command_line(__doc__, "engines.json", "mobilenetv3_small_100 only, short comparisons")
    settings = {
        "threads": arguments.threads,
        "batches": arguments.batches,
        "calibration_crops": CALIBRATION,
        "weights": "random, batch-norm statistics settled",
        "seconds": arguments.seconds,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    cells = results.values.setdefault("cells", {})
    for name in arguments.models:
        if all(str(batch) in cells.get(name, {}) for batch in arguments.batches):
            continue
        with one_model(name, arguments) as measure:
            for batch in arguments.batches:
                if str(batch) not in cells.get(name, {}):
                    cells.setdefault(name, {})[str(batch)] = measure(batch)
                    results.values["summary"] = summary(cells)
                    results.save()
    results.values["summary"] = summary(cells)
    results.save()
    show(results.values)


@contextmanager
def one_model(name: str, arguments: argparse.Namespace) -> Iterator[Callable[[int], dict[str, Any]]]:
    """Build the peers of one model; yields what measures a batch size."""
    model = settled_model(name)
    spec, threads = model.spec.input, arguments.threads
    images = photos.crops(photos.photographs(), CALIBRATION, spec, seed=0)
    calibration = preprocess(images, spec)
    with tempfile.TemporaryDirectory() as temporary, ExitStack() as stack:
        # Engines' threads are kept to as many cores as they are told to use, on machines with more.
        stack.enter_context(pinned_threads(threads))
        folder = Path(temporary)
        photos.write_folder(images, folder / "images")
        common.console.print(f"{name}: building peers")
        plain = peers.plain_export(model.module, spec, folder / "plain.onnx")
        floats = peers.normalised(calibration, spec)
        int8 = peers.onnxruntime_int8(plain, folder / "int8.onnx", floats)
        opened = {
            ORT: peers.open_onnxruntime(plain, threads),
            ORT_INT8: peers.open_onnxruntime(int8, threads),
            OPENVINO: peers.open_openvino(plain, threads),
            OPENVINO_F32: peers.open_openvino(plain, threads, "f32"),
            NNCF: peers.open_openvino(peers.nncf_int8(plain, floats), threads),
        }

        def measure(batch: int) -> dict[str, Any]:
            common.console.print(f"{name}: deploying for batch {batch}")
            deployment = cveff.deploy(
                model,
                calibration=folder / "images",
                target=target(batch, threads),
                max_accuracy_drop=100,
                num_calibration=CALIBRATION,
                out=folder / f"batch{batch}.bundle",
            )
            with cveff.runtime.open(deployment.path, threads=threads) as engine:
                uint8 = np.ascontiguousarray(np.resize(calibration, (batch, *calibration.shape[1:])))
                cell = times(opened, engine.logits, uint8, peers.normalised(uint8, spec), arguments)
            cell["chosen"] = {key: deployment.chosen[key] for key in ("engine", "precision", "why")}
            show_cell(name, batch, cell)
            return cell

        yield measure
    gc.collect()


def settled_model(name: str, merge: bool = True) -> Model:
    """A model with random weights whose logits depend on the image: batch norms have seen photographs.

    Args:
        merge: merge the branches of a re-parameterisable network.
    """
    torch.manual_seed(0)
    model = cveff.create(name)
    norms = [m for m in model.module.modules() if isinstance(m, nn.modules.batchnorm._BatchNorm)]
    for norm in norms:
        norm.reset_running_stats()
        norm.momentum = None  # a plain average over everything seen
    images = preprocess(photos.crops(photos.photographs(), 32, model.spec.input, seed=1), model.spec.input)
    x = torch.from_numpy(peers.normalised(images, model.spec.input))
    with torch.no_grad():
        model.module.train()
        for start in range(0, len(x) if norms else 0, 16):
            model.module(x[start : start + 16])
    model.module.eval()
    return cveff.apply(model, Reparameterize()) if merge and has_branches(model.module) else model


def target(batch: int, threads: int) -> cveff.Target:
    """The edge-cpu profile's candidates, chosen for one batch size."""
    from cveff.target import load_target

    return cveff.Target(
        name=f"cpu-batch-{batch}",
        description=f"The candidates of edge-cpu; the time of batches of {batch} decides.",
        candidates=load_target("edge-cpu").candidates,
        threads=threads,
        batch_sizes=(batch,),
    )


def times(
    opened: dict[str, peers.FloatPredictor],
    ours: Callable[[np.ndarray], np.ndarray],
    uint8: np.ndarray,
    floats: np.ndarray,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Interleaved times of every peer on `floats` and of ours on `uint8`."""
    predictors: dict[str, Timed] = {
        name: Timed(lambda _, predictor=predictor: predictor(floats), arguments.threads)
        for name, predictor in opened.items()
    }
    predictors[OURS] = Timed(ours, arguments.threads)
    # A fixed number of seconds: `precision` 0 never stops early, so every ratio has enough rounds.
    result = compare(
        predictors, uint8, reference=OURS, budget_seconds=arguments.seconds, min_rounds=7, precision=0.0
    )
    ratios = {name: result.ratio(OURS, name) for name in opened}
    closest = min(ratios, key=lambda name: ratios[name].median)
    return {
        "latency_ms": {
            name: {
                "median": item.median_ms,
                "p10": item.p10,
                "p90": item.p90,
                "spread": item.spread,
                "runs": item.runs,
            }
            for name, item in result.items()
        },
        "ratio": {name: ratio.to_json() for name, ratio in ratios.items()},
        "best_peer": closest,
        "best_peer_over_cveff": ratios[closest].median,
        "rounds": result.rounds,
        "load_average": result.load,
        "passes": ratios[closest].median >= LIMIT,
    }


def summary(cells: dict[str, Any]) -> dict[str, Any]:
    """Smallest ratio over all cells, and how many pass."""
    values = [cell for by_batch in cells.values() for cell in by_batch.values()]
    return {
        "cells": len(values),
        "passed": sum(cell["passes"] for cell in values),
        "smallest_ratio": min(cell["best_peer_over_cveff"] for cell in values),
        "limit": LIMIT,
    }


def show_cell(name: str, batch: int, cell: dict[str, Any]) -> None:
    """One line as soon as a cell is measured."""
    common.console.print(
        f"{name} batch {batch}: cveff {cell['latency_ms'][OURS]['median']:.2f} ms "
        f"({cell['chosen']['engine']} {cell['chosen']['precision']}), best peer {cell['best_peer']} "
        f"{cell['latency_ms'][cell['best_peer']]['median']:.2f} ms, ratio {cell['best_peer_over_cveff']:.3f}"
    )


def show(values: dict[str, Any]) -> None:
    """Print the table."""
    rows = []
    for name, by_batch in values["cells"].items():
        for batch, cell in by_batch.items():
            rows.append(
                [
                    f"{name} / {batch}",
                    *(cell["latency_ms"][peer]["median"] for peer in PEERS),
                    cell["latency_ms"][OURS]["median"],
                    f"{cell['chosen']['engine']} {cell['chosen']['precision']}",
                    cell["best_peer_over_cveff"],
                ]
            )
    machine = values["machine"]
    common.table(
        "Milliseconds a call, medians, interleaved",
        ("model / batch", *PEERS, OURS, "it chose", "best / cveff"),
        rows,
        note=f"{machine.get('cpu', '')}, {values['settings']['threads']} threads. Random weights, unlabelled "
        "calibration crops, no accuracy limit: this is about speed alone. OpenVINO's default precision is what it "
        f"picks for the processor (bfloat16 where there is an instruction for it). "
        f"{values['summary']['passed']} of {values['summary']['cells']} at {LIMIT} or more.",
    )


def command_line(about: str | None, results: str, quick: str) -> argparse.Namespace:
    """The command line of a comparison of engines.

    Args:
        about: the script's documentation; `results`: name of its JSON file; `quick`: help of `--quick`.
    """
    parser = argparse.ArgumentParser(description=(about or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=list(MODELS), metavar="NAME", help="timm names")
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--seconds", type=float, default=20.0, help="time of one comparison")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run with the same settings")
    parser.add_argument("--out", type=Path, help=f"JSON file; by default model_zoo/results/{results}")
    given = parser.parse_args()
    if given.quick:
        given.models, given.seconds = ["mobilenetv3_small_100"], 4.0
    given.out = given.out or common.output(results, given.quick)
    return given


if __name__ == "__main__":
    main()
