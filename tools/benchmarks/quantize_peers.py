"""Post-training int8 on ONNX Runtime's CPU: cveff against ONNX Runtime's, NNCF's and modelopt's own, on five networks.

Every tool gets the same trained network (the peers as one plain `torch.onnx.export` file of floats) and the same 256
calibration images, and every file runs in the same ONNX Runtime with the same options. EfficientNet-Lite0 has its
ImageNet weights and is judged by its agreement with float32 on held-out crops of photographs, in three splits; a
MobileNetV4, a RepVGG, a ViT and a ConvNeXt are trained on Fashion-MNIST at 64×64 and judged on its 10,000 test images.

Stages, in this order: "accuracy" (trains what is missing, then makes and judges all files), "aware" (RepVGG trained
with its roundings), "emulated" (EfficientNet-Lite0's files on a processor without VNNI, under QEMU's user mode: about
an hour), "times" (needs a quiet machine). A run that was stopped goes on where it was; a tool that failed is tried
again.

python tools/benchmarks/quantize_peers.py --foolbox-wheel foolbox-3.3.4-py3-none-any.whl   # all: some hours
python tools/benchmarks/quantize_peers.py --until emulated                                 # all but times
python tools/benchmarks/quantize_peers.py --only lite0 --until accuracy                    # about 10 minutes
python tools/benchmarks/quantize_peers.py --quick                                          # few images, one epoch
"""

from __future__ import annotations

import argparse
import dataclasses
import shutil
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import common
import emulated
import modelopt_peer
import numpy as np
import peers
import quantize_networks
import torch
from quantize_aware import aware_row
from quantize_networks import LITE0, NETWORKS, QUICK, REPVGG, TRAINED, Amount
from quantize_summary import show, summary
from quantize_tools import NNCF, ONNXRUNTIME, ONNXRUNTIME_CPU, OURS_FILES, OURS_NARROW, TOOLS, Job, make

from cveff.data import Data
from cveff.measure import agreement, compare, predict, top1
from cveff.measure.accuracy import change
from cveff.model import Model

STAGES = ("accuracy", "aware", "emulated", "times")
EMULATED = (OURS_NARROW, ONNXRUNTIME, ONNXRUNTIME_CPU, NNCF)
QUICK_NETWORKS = (LITE0, REPVGG)
BATCH = 50
AS_WRITTEN = 20
"""Images that a file is also computed on without graph optimisations: many times slower."""


@dataclass
class Row:
    """One network, its images, and where its files are.

    Attributes:
        values: its part of the results.
    """

    name: str
    network: str
    seed: int
    model: Model
    data: Data
    folder: Path
    job: Job
    values: dict[str, Any]

    def file(self, tool: str) -> Path:
        """A tool's file, made if it is not there."""
        return make(tool, self.job, self.folder / f"{tool.lower().replace(', ', '-').replace(' ', '_')}.onnx")

    def inputs(self, tool: str, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, C) as the tool's file takes them."""
        return images if tool in OURS_FILES else peers.normalised(images, self.model.spec.input)

    def predictor(self, tool: str | None, threads: int) -> Callable[[np.ndarray], np.ndarray]:
        """A tool's file (None: the float one) in ONNX Runtime, on uint8 images."""
        run = peers.open_onnxruntime(self.job.source if tool is None else self.file(tool), threads)
        return lambda images: run(self.inputs(tool or "", images))

    def images(self) -> np.ndarray:
        """Every image that it is judged on, uint8 (N, H, W, C)."""
        batches = self.data.evaluation.evaluation_batches(self.model.spec.input, BATCH)
        return np.concatenate([images for images, _ in batches])

    def reference(self, threads: int) -> np.ndarray:
        """The float file's logits of them."""
        saved = self.folder / "fp32.npy"
        if not saved.is_file():
            np.save(saved, _logits(self, None, threads)[0])
        return np.load(saved)


def main() -> None:
    arguments = _arguments()
    torch.set_num_threads(arguments.threads)
    amount = QUICK if arguments.quick else Amount()
    settings = {
        **dataclasses.asdict(amount),
        "threads": arguments.threads,
        "foolbox": arguments.foolbox_wheel is not None,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    python = modelopt_peer.interpreter(arguments.modelopt_python)
    results.values["modelopt_versions"] = modelopt_peer.versions(python)
    last = STAGES.index(arguments.until)
    for stage, work in zip(STAGES[: last + 1], (accuracy, aware, emulate, times), strict=False):
        if arguments.stage in (None, stage):
            for name in _row_names(arguments):
                work(_row(name, amount, python, results, arguments), results, arguments)
    results.values["summary"] = summary(results.values)
    results.save()
    show(results.values)


def _row_names(arguments: argparse.Namespace) -> list[str]:
    seeds = {network: arguments.splits if network == LITE0 else arguments.seeds for network in arguments.only}
    return [f"{network}-{seed}" for network in arguments.only for seed in seeds[network]]


def _row(
    name: str, amount: Amount, python: Path, results: common.Results, arguments: argparse.Namespace
) -> Row:
    network, seed = name.rsplit("-", 1)
    model, data = quantize_networks.subject(
        network, int(seed), arguments.models, amount, arguments.foolbox_wheel
    )
    wheel = "-foolbox" if network == LITE0 and arguments.foolbox_wheel else ""
    folder = arguments.models / "int8" / f"{name}{wheel}-{amount.calibration}"
    folder.mkdir(parents=True, exist_ok=True)
    values = results.values.setdefault("rows", {}).setdefault(name, {"files": {}})
    if arguments.fresh and not values["files"]:
        shutil.rmtree(folder)
        folder.mkdir()
    source = folder / "fp32.onnx"
    if not source.is_file():
        peers.plain_export(model.module, model.spec.input, source)
    job = Job(model, data, source, amount.calibration, int(seed), python)
    return Row(name, network, int(seed), model, data, folder, job, values)


def accuracy(row: Row, results: common.Results, arguments: argparse.Namespace) -> None:
    """Make every tool's file, and judge those that the results do not have."""
    row.values["fp32"] = {"bytes": row.job.source.stat().st_size, "parameters": row.model.num_parameters}
    targets = row.data.evaluation.targets
    reference = row.reference(arguments.threads)
    if targets is not None:
        row.values["fp32"]["accuracy"] = top1(reference, targets)
    for tool in TOOLS:
        if "as_written_cosine" in row.values["files"].get(tool, {}):
            continue
        found: dict[str, Any]
        try:
            logits, _ = _logits(row, tool, arguments.threads)
            found = {**judge(logits, reference, targets), "bytes": row.file(tool).stat().st_size}
            found["as_written_cosine"] = as_written_cosine(row, tool, reference, arguments.threads)
        except Exception as error:  # noqa: BLE001 - a tool that fails is a result
            found = {"error": f"{type(error).__name__}: {error}"[:300]}
        row.values["files"][tool] = found
        common.console.print(f"{row.name}: {tool}: {found}", highlight=False)
        results.save()


def aware(row: Row, results: common.Results, arguments: argparse.Namespace) -> None:
    """Train the RepVGG with its roundings."""
    if row.network != REPVGG or "aware" in row.values:
        return
    settings = TRAINED[row.network].recover
    epochs = results.values["settings"]["epochs"]
    row.values["aware"] = aware_row(
        row.model,
        row.data,
        settings if epochs is None else dataclasses.replace(settings, epochs=epochs, warmup_epochs=0.0),
        images=row.job.images,
        seed=row.seed,
        folder=row.folder / "aware",
        threads=arguments.threads,
        reference=row.reference(arguments.threads),
    )
    results.save()


def emulate(row: Row, results: common.Results, arguments: argparse.Namespace) -> None:
    """Answers of EfficientNet-Lite0's files on a processor without VNNI."""
    if row.network != LITE0:
        return
    reason = emulated.missing()
    if reason is not None:
        row.values["emulated"] = {"not measured": reason}
        results.save()
        return
    done = row.values.setdefault("emulated", {})
    done.pop("not measured", None)
    done["cpu"] = f"{emulated.EMULATOR} -cpu {emulated.CPU}"
    files = done.setdefault("files", {})
    images, reference = row.images(), row.reference(arguments.threads)
    for tool in EMULATED:
        if "agreement" in files.get(tool, {}):
            continue
        try:
            inputs = row.inputs(tool, images)
            logits = emulated.emulated_logits(row.file(tool), inputs, row.folder / "emulated", arguments.jobs)
            files[tool] = judge(logits, reference, None)
        except Exception as error:  # noqa: BLE001 - a tool that fails is a result
            files[tool] = {"error": f"{type(error).__name__}: {error}"[:300]}
        common.console.print(f"{row.name}, emulated: {tool}: {files[tool]}", highlight=False)
        results.save()


def times(row: Row, results: common.Results, arguments: argparse.Namespace) -> None:
    """Every file's time over the float file's, at batch 1; normalisation is inside ours alone."""
    if "times" in row.values or (row.network == LITE0 and row.seed != arguments.splits[0]):
        return
    image = row.images()[:1]
    predictors: dict[str, Callable[[np.ndarray], np.ndarray]] = {}
    for tool in (None, *(tool for tool, found in row.values["files"].items() if "error" not in found)):
        run = peers.open_onnxruntime(row.job.source if tool is None else row.file(tool), arguments.threads)
        predictors[tool or "fp32"] = _on(run, row.inputs(tool or "", image))
    found = compare(predictors, image, reference="fp32", budget_seconds=arguments.seconds, min_rounds=15)
    row.values["times"] = {
        name: {"ms": item.median_ms, "over_fp32": 1 / item.speedup.median, "spread": item.speedup.spread}
        for name, item in found.items()
    } | {"load_average": found.load, "rounds": found.rounds}
    results.save()


def as_written_cosine(row: Row, tool: str, reference: np.ndarray, threads: int) -> float:
    """What a file means, before the engine's optimiser and integer kernels: cosine with the float file's logits."""
    images = row.images()[:AS_WRITTEN]
    meant = peers.open_onnxruntime(row.file(tool), threads, as_written=True)(row.inputs(tool, images))
    return float(judge(meant, reference[: len(images)], None)["cosine"])


def judge(logits: np.ndarray, reference: np.ndarray, targets: np.ndarray | None) -> dict[str, Any]:
    """A file's logits (N, classes) against the float file's, and against the labels where there are any."""
    norms = np.linalg.norm(logits, axis=1) * np.linalg.norm(reference, axis=1)
    found: dict[str, Any] = {
        "agreement": agreement(logits, reference),
        "cosine": float(((logits * reference).sum(1) / norms).mean()),
        "images": len(logits),
    }
    if targets is not None:
        moved = change(logits, reference, targets)
        found |= {
            "accuracy": top1(logits, targets),
            "points_lost": 100 * (top1(reference, targets) - top1(logits, targets)),
            "points_lost_interval": [-100 * moved.interval[1], -100 * moved.interval[0]],
        }
    return found


def _logits(row: Row, tool: str | None, threads: int) -> tuple[np.ndarray, np.ndarray | None]:
    batches = row.data.evaluation.evaluation_batches(row.model.spec.input, BATCH)
    return predict(row.predictor(tool, threads), batches)


def _on(run: peers.FloatPredictor, inputs: np.ndarray) -> Callable[[np.ndarray], np.ndarray]:
    """What is timed: the file alone, on inputs that were prepared before."""
    return lambda _: run(inputs)


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", choices=NETWORKS, help="networks; by default all")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0], help="of trained networks")
    parser.add_argument("--splits", type=int, nargs="+", default=[0, 1, 2], help="of the photographs")
    parser.add_argument("--until", choices=STAGES, default=STAGES[-1], help="the last stage")
    parser.add_argument("--stage", choices=STAGES, help="one stage alone")
    parser.add_argument(
        "--modelopt-python",
        type=Path,
        help="the Python of an environment with nvidia-modelopt[onnx]; by default .venv-modelopt is made",
    )
    parser.add_argument("--foolbox-wheel", type=Path, help="adds the wheel's 20 ImageNet photographs")
    parser.add_argument(
        "--models", type=Path, help="folder of trained networks and files; by default runs/prune-quality"
    )
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("--jobs", type=int, default=1, help="emulated processes at a time")
    parser.add_argument("--seconds", type=float, default=60.0, help="of timing, a network")
    parser.add_argument("--quick", action="store_true", help="two networks, few images, one epoch")
    parser.add_argument("--fresh", action="store_true", help="make the files and measure them again")
    parser.add_argument(
        "--out", type=Path, help="JSON file; by default model_zoo/results/quantize_peers.json"
    )
    arguments = parser.parse_args()
    arguments.only = arguments.only or (QUICK_NETWORKS if arguments.quick else NETWORKS)
    if arguments.quick:
        arguments.splits, arguments.seconds = arguments.splits[:1], 3.0
    arguments.out = arguments.out or common.output("quantize_peers.json", arguments.quick)
    arguments.models = arguments.models or common.ROOT / "runs" / (
        "quick/quantize-peers" if arguments.quick else "prune-quality"
    )
    return arguments


if __name__ == "__main__":
    main()
