"""Fashion-MNIST: accuracy of the deployed int8 file on the 10,000 test images, against its float32 module.

Trains the zoo's recipes (stopped at any moment it goes on where it was), deploys with a target that allows int8
only, and measures the file in the bundle. Best published under 100,000 parameters: 92.5% (the data set's README).

python tools/benchmarks/fashion_mnist.py                           # small with seeds 0 1 2, large with seed 0
python tools/benchmarks/fashion_mnist.py --only small --seeds 0    # one run
python tools/benchmarks/fashion_mnist.py --quick                   # one epoch: that it works, not what it reaches
"""

from __future__ import annotations

import argparse
from pathlib import Path

import common
import trained

RECIPES = {"small": "fashion-mnist", "large": "fashion-mnist-large"}
BARS = {"small": (100_000, 0.93), "large": (800_000, 0.945)}
MAX_LOSS_POINTS = 0.3


def main() -> None:
    arguments = _arguments()
    settings = {"threads": arguments.threads, "seconds": arguments.seconds, "epochs": arguments.epochs}
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    models = results.values.setdefault("models", {})
    for size in arguments.only:
        seeds = arguments.seeds or ([0, 1, 2] if size == "small" else [0])
        for seed in seeds:
            done = models.get(size, {}).get("seeds", {})
            if str(seed) in done:
                continue
            folder = arguments.models / f"{size}-{seed}"
            common.console.print(f"{size}, seed {seed}: {folder.name}")
            model, found = trained.one_run(
                RECIPES[size],
                seed,
                folder,
                threads=arguments.threads,
                seconds=arguments.seconds,
                epochs=arguments.epochs,
            )
            models[size] = trained.summary({**done, str(seed): found}) | _bars(size)
            results.save()
            if arguments.publish and seed == seeds[0]:
                trained.publish(model, f"fashion-mnist-{size}")
    for size, values in models.items():
        models[size] = values | _verdict(size, values)
    results.save()
    common.table(
        f"Fashion-MNIST, deployed int8 file, {next(iter(models.values()))['images']:,} test images",
        (*trained.COLUMNS, "bar"),
        [
            [*trained.row(size, values), "PASS" if values["passes"] else "FAIL"]
            for size, values in models.items()
        ],
        note="Choices were made on 5,000 images split off the training set. fp32 is the PyTorch module; its time is "
        "that of the same network as a float32 file on ONNX Runtime, batch 1. Best published under 100,000 "
        "parameters: 92.5%.",
    )


def _bars(size: str) -> dict[str, object]:
    limit, accuracy = BARS[size]
    return {"bar": {"parameters_under": limit, "accuracy": accuracy, "max_loss_points": MAX_LOSS_POINTS}}


def _verdict(size: str, values: dict[str, dict[str, float]]) -> dict[str, bool]:
    """The mean over seeds must reach the bar, and no seed may lose more than the limit."""
    limit, accuracy = BARS[size]
    return {
        "passes": values["parameters"] < limit  # type: ignore[operator]
        and values["int8_accuracy"]["mean"] >= accuracy
        and values["loss_points"]["largest"] <= MAX_LOSS_POINTS
    }


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument(
        "--only", nargs="+", choices=list(RECIPES), default=list(RECIPES), help="which models"
    )
    parser.add_argument("--seeds", type=int, nargs="+", help="by default 0 1 2 for small, 0 for large")
    parser.add_argument(
        "--models", type=Path, help="folder of runs, SIZE-SEED; by default runs/fashion-mnist"
    )
    parser.add_argument("--publish", action="store_true", help="put the first seed's model in the zoo")
    parser.add_argument("--threads", type=int, default=trained.default_threads())
    parser.add_argument("--seconds", type=float, default=8.0, help="time of one latency comparison")
    parser.add_argument("--quick", action="store_true", help="one epoch of the small model")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/fashion_mnist.json")
    arguments = parser.parse_args()
    arguments.epochs = 1 if arguments.quick else None
    if arguments.quick:
        arguments.only, arguments.seeds, arguments.seconds = ["small"], [0], 1.0
    runs = common.ROOT / "runs" / ("quick" if arguments.quick else "") / "fashion-mnist"
    arguments.models = arguments.models or runs
    arguments.out = arguments.out or common.output("fashion_mnist.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
