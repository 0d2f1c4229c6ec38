"""Pruning to half the latency: accuracy of cveff's Prune against torch-pruning's, on Fashion-MNIST at 64×64.

Three networks trained here, three seeds. Every tool brings the exported float32 file to half the dense file's time on
ONNX Runtime: cveff by channels and whole blocks (`depth=True`: deep layers of a few pixels take their time however few
channels they have), torch-pruning, which has no blocks, by bisecting its ratio against the same measurement. Then
everyone trains for the same number of epochs with the same optimizer: cveff taught by the dense network, as is its
default, torch-pruning with labels, as it is documented. `--explain` adds the peer with our distillation and ours with
labels, so that what pruning brings is told from what the teacher brings. Choices are made on 5,000 images of the
training set; figures are of the 10,000 test images.

Training, whose time nobody measures, runs in two processes of one thread each; pruning measures times, alone. Seeds
are done one after the other, each to its end. On two cores a seed takes one to three hours.

python tools/benchmarks/prune_quality.py                        # all; stopped at any moment it goes on where it was
python tools/benchmarks/prune_quality.py --only mobile --seeds 0
python tools/benchmarks/prune_quality.py --explain              # which part of it is the teacher's
python tools/benchmarks/prune_quality.py --until pruned         # what needs a quiet machine, and no more
python tools/benchmarks/prune_quality.py --quick                # one epoch of everything: that it works
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import time
from collections.abc import Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import common
import dense_models
import torch
import torch_pruning_peer

import cveff
import cveff.data
from cveff.compress import Distill, Prune
from cveff.export.timer import EngineTimer
from cveff.measure.threads import usable_cores
from cveff.pipeline import evaluate
from cveff.target import load_target

LATENCY = 0.5
TIMINGS = 5
MARGIN_POINTS, MAX_DROP_POINTS = 0.2, 0.5
OURS = "cveff"
PEERS = {f"torch-pruning {criterion}": criterion for criterion in torch_pruning_peer.CRITERIA}


@dataclass(frozen=True)
class Recovery:
    """One training after pruning: which network and seed, who pruned, and who teaches."""

    network: str
    seed: int
    pruner: str
    kind: str

    @property
    def row(self) -> str:
        """The network's row in the results."""
        return f"{self.network}-{self.seed}"

    @property
    def key(self) -> str:
        """The figures' name in that row."""
        return f"{self.pruner}, {self.kind}"


def main() -> None:
    arguments = _arguments()
    results = common.Results(
        arguments.out,
        __file__,
        {"latency": LATENCY, "depth": True, "epochs": arguments.epochs},
        fresh=arguments.fresh,
    )
    rows = results.values.setdefault("rows", {})
    times = results.values.setdefault("times", {})
    for seed in arguments.seeds:
        names = [(name, seed) for name in arguments.only if f"{name}-{seed}" not in times]
        with _pool(arguments) as pool:
            for done in [pool.submit(_dense, *name, arguments.models, arguments.epochs) for name in names]:
                done.result()
        if arguments.until != "dense":
            _prune_all(names, rows, arguments, results)
        if arguments.until is None:
            kinds = [(OURS, "distilled"), *((peer, "labels") for peer in PEERS)]
            _train([Recovery(*name, *kind) for name in names for kind in kinds], rows, arguments, results)
            _time_all(names, rows, arguments, results)
    if arguments.explain:
        _explain(rows, arguments, results)
    results.values["summary"] = _summary(rows, times)
    results.save()
    _print(results.values)


def _pool(arguments: argparse.Namespace) -> ProcessPoolExecutor:
    """Processes for work whose time nobody measures."""
    threads = max(1, usable_cores() // arguments.jobs)
    return ProcessPoolExecutor(
        arguments.jobs, multiprocessing.get_context("spawn"), torch.set_num_threads, (threads,)
    )


def _dense(network: str, seed: int, folder: Path, epochs: int | None) -> None:
    data = cveff.data.load("fashion-mnist", seed=0)
    dense_models.dense(network, seed, data, folder, common.Lines(f"{network}-{seed}"), epochs)


def _prune_all(
    names: Sequence[tuple[str, int]],
    rows: dict[str, Any],
    arguments: argparse.Namespace,
    results: common.Results,
) -> None:
    """Prune with every tool, one after the other: times are measured here, so nothing else may run."""
    data = cveff.data.load("fashion-mnist", seed=0)
    target = load_target("edge-cpu")
    for network, seed in names:
        row = rows.setdefault(f"{network}-{seed}", {})
        progress = common.Lines(f"{network}-{seed}")
        model = cveff.load(arguments.models / f"{network}-{seed}")
        if "dense" not in row:
            row["dense"] = {"accuracy": evaluate(model, data), "parameters": model.num_parameters}
            results.save()
        for pruner in (OURS, *PEERS):
            if pruner in row:
                continue
            figures: dict[str, Any] = {}
            start = time.monotonic()
            with EngineTimer(target, "onnxruntime") as timer:
                if pruner == OURS:
                    step = Prune(latency=LATENCY, depth=True)
                    small = cveff.apply(
                        model, step, data=data, seed=seed, timer=timer, target=target, progress=progress
                    )
                    cveff.save(small, _pruned_folder(arguments.models, network, seed))
                else:
                    figures["ratio"], small = torch_pruning_peer.to_latency(
                        model, PEERS[pruner], data, timer, seed, LATENCY, progress
                    )
                figures["seconds"] = time.monotonic() - start
                times = timer.milliseconds({"dense": model, "small": small})
            row[pruner] = {
                **figures,
                "accuracy": evaluate(small, data),
                "latency": times["small"] / times["dense"],
                "dense_ms": times["dense"],
                "parameters": small.num_parameters,
            }
            progress.message(f"{pruner}: {row[pruner]}")
            results.save()


def _explain(rows: dict[str, Any], arguments: argparse.Namespace, results: common.Results) -> None:
    """Tell what pruning brings from what the teacher brings: the peer with our distillation, ours without it."""
    names = [(name, seed) for seed in arguments.seeds for name in arguments.only]
    # The teacher is worth as much to the peer: its better criterion, by the images choices are made on.
    better = [max(PEERS, key=lambda peer: rows[f"{n}-{s}"][f"{peer}, labels"]["val"]) for n, s in names]
    tasks = [Recovery(*name, peer, "distilled") for name, peer in zip(names, better, strict=True)]
    _train([*tasks, *(Recovery(*name, OURS, "labels") for name in names)], rows, arguments, results)


def _train(
    tasks: Sequence[Recovery], rows: dict[str, Any], arguments: argparse.Namespace, results: common.Results
) -> None:
    with _pool(arguments) as pool:
        running = {
            pool.submit(_recover, task, rows[task.row][task.pruner], arguments.models, arguments.epochs): task
            for task in tasks
            if task.key not in rows[task.row]
        }
        for done in as_completed(running):
            task = running[done]
            rows[task.row][task.key] = done.result()
            common.Lines(task.row).message(f"{task.key}: {rows[task.row][task.key]}")
            results.save()


def _recover(task: Recovery, pruned: dict[str, Any], folder: Path, epochs: int | None) -> dict[str, Any]:
    """Train one pruned network; stopped, it goes on where it was."""
    data = cveff.data.load("fashion-mnist", seed=0)
    dense = cveff.load(folder / task.row)
    if task.pruner == OURS:
        small = cveff.load(_pruned_folder(folder, task.network, task.seed))
    else:
        small = torch_pruning_peer.prune(dense, PEERS[task.pruner], pruned["ratio"], data, task.seed)
    if small.num_parameters != pruned["parameters"]:
        raise SystemExit(
            f"{task.row}, {task.pruner}: {small.num_parameters} parameters, but {pruned['parameters']} were timed; "
            "start anew with --fresh"
        )
    train = dense_models.MODELS[task.network].recover
    if epochs:
        train = replace(train, epochs=epochs, warmup_epochs=0.0)
    step = (
        Distill(train=train)
        if task.kind == "distilled"
        else Distill(alpha=0.0, train=replace(train, label_smoothing=0.1))
    )
    recovered = cveff.apply(
        small,
        step,
        data=data,
        seed=task.seed,
        teacher=dense,
        progress=common.Lines(f"{task.row} {task.key}"),
        folder=folder / f"{task.row}-{task.key.replace(', ', '-').replace(' ', '-')}-training",
        resume=True,
    )
    return {
        "accuracy": evaluate(recovered, data),
        "val": evaluate(recovered, replace(data, test=None)),
        "latency": pruned["latency"],
        "parameters": recovered.num_parameters,
    }


def _time_all(
    names: Sequence[tuple[str, int]],
    rows: dict[str, Any],
    arguments: argparse.Namespace,
    results: common.Results,
) -> None:
    """Time every network's pruned files in turns with its dense one once more: one measurement for all of them."""
    data = cveff.data.load("fashion-mnist", seed=0)
    times = results.values["times"]
    for network, seed in names:
        name = f"{network}-{seed}"
        dense = cveff.load(arguments.models / name)
        models = {"dense": dense, OURS: cveff.load(_pruned_folder(arguments.models, network, seed))}
        for peer, criterion in PEERS.items():
            models[peer] = torch_pruning_peer.prune(dense, criterion, rows[name][peer]["ratio"], data, seed)
        shares: dict[str, list[float]] = {tool: [] for tool in models}
        with EngineTimer(load_target("edge-cpu"), "onnxruntime") as timer:
            for _ in range(TIMINGS):
                found = timer.milliseconds(models)
                for tool in models:
                    shares[tool].append(found[tool] / found["dense"])
        times[name] = {
            tool: {"latency": statistics.median(values), "least": min(values), "most": max(values)}
            for tool, values in shares.items()
        } | {"dense_ms": found["dense"]}
        common.Lines(name).message(f"times: {times[name]}")
        results.save()


def _pruned_folder(folder: Path, network: str, seed: int) -> Path:
    return folder / f"{network}-{seed}-pruned"


def _summary(rows: dict[str, Any], times: dict[str, Any]) -> dict[str, Any]:
    """Differences in points, by network and in all; the best of torch-pruning's criteria in each row."""
    found: dict[str, Any] = {}
    networks: dict[str, list[dict[str, Any]]] = {}
    timed: dict[str, list[float]] = {}
    for key, row in times.items():
        timed.setdefault(key.rpartition("-")[0], []).append(row[OURS]["latency"])
    for key, row in rows.items():
        if f"{OURS}, distilled" in row and all(f"{peer}, labels" in row for peer in PEERS):
            networks.setdefault(key.rpartition("-")[0], []).append(row)
    for network, done in networks.items():
        found[network] = {
            "seeds": len(done),
            "drop": _points([row["dense"]["accuracy"] - row["cveff, distilled"]["accuracy"] for row in done]),
            "gain": _points([row["cveff, distilled"]["accuracy"] - _best(row, "labels") for row in done]),
            "latency": statistics.mean(timed[network]) if network in timed else None,
        }
        for kind in ("distilled", "labels"):
            both = [row for row in done if f"{OURS}, {kind}" in row and _best(row, kind)]
            if both:
                gains = [row[f"{OURS}, {kind}"]["accuracy"] - _best(row, kind) for row in both]
                found[network][f"gain_both_{kind}"] = _points(gains)
    if found:
        for key in ("drop", "gain"):
            found[f"mean_{key}"] = statistics.mean(found[network][key] for network in networks)
        found["passes"] = found["mean_gain"] >= MARGIN_POINTS and all(
            found[network]["drop"] <= MAX_DROP_POINTS for network in networks
        )
    return found


def _best(row: dict[str, Any], kind: str) -> float:
    found = (row.get(f"{peer}, {kind}") for peer in PEERS)
    return max((values["accuracy"] for values in found if values is not None), default=0.0)


def _points(shares: list[float]) -> float:
    return 100 * statistics.mean(shares)


def _print(values: dict[str, Any]) -> None:
    rows = [
        [
            key,
            name,
            f"{100 * item['accuracy']:.2f}%",
            f"{item.get('latency', 1):.3f}",
            f"{item['parameters']:,}",
        ]
        for key, row in values["rows"].items()
        for name, item in row.items()
    ]
    common.table(
        "Half the latency on ONNX Runtime, Fashion-MNIST at 64×64",
        ("network", "method", "test", "latency", "parameters"),
        rows,
        note=f"{values['summary']}",
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument(
        "--only", nargs="+", choices=list(dense_models.MODELS), default=list(dense_models.MODELS)
    )
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--jobs", type=int, default=2, help="trainings at a time")
    parser.add_argument("--explain", action="store_true", help="also train each tool the other's way")
    parser.add_argument("--until", choices=("dense", "pruned"), help="stop after this stage")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--models", type=Path)
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    arguments.epochs = 1 if arguments.quick else None
    arguments.models = arguments.models or common.ROOT / "runs" / (
        "quick/prune-quality" if arguments.quick else "prune-quality"
    )
    arguments.out = arguments.out or common.output("prune_quality.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
