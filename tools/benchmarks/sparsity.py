"""Zeros on the embedded digits: what they cost in accuracy, save in a compressed file, and do to the engine's time.

python tools/benchmarks/sparsity.py
"""

from __future__ import annotations

import argparse
import gzip
import statistics
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import common
import torch
from distill import spread, train_from

import cveff
from cveff.compress import Distill, Sparsify
from cveff.data import load as load_data
from cveff.export.bench import bench
from cveff.pipeline import create_for, evaluate
from cveff.recipe import ModelSettings, read_recipe

RECOVERED = (
    ("2:4", 0.5),
    ("unstructured", 0.5),
    ("unstructured", 0.8),
    ("unstructured", 0.9),
    ("unstructured", 0.95),
)
COLUMNS = ("sparsity", "accuracy %", "±", "gzip of the .onnx, kB", "times as fast", "95%")


def steps(epochs: int) -> dict[str, Sparsify | None]:
    """What is compared, by name; None: the dense model."""
    train = read_recipe("digits").train
    assert train is not None
    train = replace(
        train, epochs=epochs, warmup_epochs=0.0, learning_rate=0.02, label_smoothing=0.0, clip_norm=5.0
    )
    recover = Distill(train=train)
    found: dict[str, Sparsify | None] = {
        "dense": None,
        "2:4, magnitude, no training": Sparsify(),
        "2:4, activation, no training": Sparsify(importance="activation"),
    }
    for pattern, sparsity in RECOVERED:
        name = f"{pattern} {sparsity:.0%}, distilled" if pattern == "unstructured" else "2:4, distilled"
        found[name] = Sparsify(pattern=pattern, sparsity=sparsity, recover=recover)  # type: ignore[arg-type]
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--epochs", type=int, default=10, help="of fine-tuning; the dense model has 30")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--rounds", type=int, default=1000, help="of timing, in turns")
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/sparsity.json")
    arguments = parser.parse_args()
    seeds, epochs = (arguments.seeds[:1], 1) if arguments.quick else (arguments.seeds, arguments.epochs)
    settings = {"epochs": epochs, "threads": arguments.threads, "rounds": arguments.rounds}
    out = arguments.out or common.output("sparsity.json", arguments.quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    found = results.values.setdefault("seeds", {})
    for seed in seeds:
        if str(seed) not in found:
            found[str(seed)] = one_seed(seed, epochs, 1 if arguments.quick else 30, settings)
            results.save()
    results.save()
    common.table(
        f"digits, test split, {len(seeds)} seeds",
        COLUMNS,
        [row(name, [found[str(seed)][name] for seed in seeds]) for name in steps(epochs)],
        note="± is the standard deviation over seeds. Times: ONNX Runtime, batch 1, the first seed, dense = 1.",
    )


def one_seed(
    seed: int, epochs: int, dense_epochs: int, settings: dict[str, int]
) -> dict[str, dict[str, object]]:
    """Figures by name; the files are timed in turns."""
    data = load_data("digits", seed=seed)
    dense = train_from(create_for(ModelSettings(), data, seed=seed), "labels only", dense_epochs, seed)
    values: dict[str, dict[str, object]] = {}
    with TemporaryDirectory() as folder:
        files = {}
        for name, step in steps(epochs).items():
            model = dense if step is None else cveff.apply(dense, step, data=data, seed=seed)
            path = cveff.export(model, Path(folder) / f"{len(files)}.onnx")
            files[name] = path
            content = path.read_bytes()
            values[name] = {
                "accuracy": evaluate(model, data),
                "bytes": len(content),
                "gzip_bytes": len(gzip.compress(content, mtime=0)),
            }
        timed = bench(files, batch=1, threads=settings["threads"], rounds=settings["rounds"], memory=False)
        for figures in timed:
            values[figures.name] |= {
                "median_ms": figures.median_ms,
                "speedup": figures.speedup,
                "speedup_interval": list(figures.speedup_interval),
            }
    return values


def row(name: str, seeds: list[dict[str, object]]) -> tuple[object, ...]:
    accuracy = [100 * values["accuracy"] for values in seeds]  # type: ignore[operator]
    size = statistics.mean(values["gzip_bytes"] for values in seeds) / 1000  # type: ignore[type-var]
    low, high = seeds[0]["speedup_interval"]  # type: ignore[misc]
    return (
        name,
        statistics.mean(accuracy),
        spread(accuracy),
        size,
        seeds[0]["speedup"],
        f"{low:.2f}–{high:.2f}",
    )


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
