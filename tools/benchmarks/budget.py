"""Fashion-MNIST by the clock: whether a budget ends on time, what it reaches, and what epochs of the same cost reach.

Each cell is one `cveff train fashion-mnist-5m` of its own, timed from outside, from the process's start to its end.

python tools/benchmarks/budget.py                       # 5m and 10m, each with as many whole epochs as it bought
python tools/benchmarks/budget.py --budgets 5m --seeds 0 1 2
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import common

from cveff.train.budget import parse_duration

RECIPE = "fashion-mnist-5m"
ACCURACY = {"5m": 0.905, "10m": 0.92}
MAX_MISS = 0.02
COLUMNS = (
    "budget",
    "seconds",
    "off by %",
    "epochs",
    "evaluation %",
    "accuracy %",
    "epochs, fixed",
    "seconds",
    "%",
    "",
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--budgets", nargs="+", default=list(ACCURACY))
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    parser.add_argument("--quick", action="store_true", help="a minute on the digits: that it works")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/budget.json")
    arguments = parser.parse_args()
    recipe, budgets = ("digits", ["60s"]) if arguments.quick else (RECIPE, arguments.budgets)
    out = arguments.out or common.output("budget.json", arguments.quick)
    settings = {"recipe": recipe, "threads": arguments.threads}
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    cells = results.values.setdefault("cells", {})
    for budget in budgets:
        for seed in arguments.seeds:
            cell = cells.setdefault(f"{budget}, seed {seed}", {})
            if "budget" not in cell:
                cell["budget"] = one_run(recipe, seed, arguments.threads, "--budget", budget)
                results.save()
            if "fixed" not in cell:
                epochs = max(1, int(cell["budget"]["consumed"]["epochs"]))
                cell["fixed"] = one_run(recipe, seed, arguments.threads, "--epochs", str(epochs))
                results.save()
    results.values["summary"] = {
        budget: summary(budget, [cells[f"{budget}, seed {seed}"] for seed in arguments.seeds])
        for budget in budgets
    }
    results.save()
    common.table(
        f"{recipe}, {arguments.threads} threads, {len(arguments.seeds)} seeds",
        COLUMNS,
        [row(budget, values) for budget, values in results.values["summary"].items()],
        note="Accuracy on the test split. Fixed: the same recipe with as many whole epochs as the budget bought, "
        "validated after each. Seconds are those of the whole command.",
    )


def one_run(recipe: str, seed: int, threads: int, *options: str) -> dict[str, Any]:
    """The command's JSON and its wall-clock."""
    folder = common.ROOT / "runs" / "budget" / "-".join([recipe, *options, str(seed)])
    command = [
        *(sys.executable, "-m", "cveff", "train", recipe, *options, "--seed", str(seed)),
        *("--no-deploy", "--overwrite", "--quiet", "--json", "--out", str(folder)),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    load, started = os.getloadavg()[0], time.monotonic()
    done = subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True, env=environment)
    seconds = time.monotonic() - started
    found = json.loads(done.stdout)
    kept = {key: found[key] for key in ("accuracy", "split", "count", "num_parameters", "consumed")}
    return {"seconds": seconds, "load_average_before": load, **kept}


def summary(budget: str, cells: list[dict[str, Any]]) -> dict[str, Any]:
    """Means over seeds, and whether every bar is met."""
    allowed, runs, fixed = parse_duration(budget), [c["budget"] for c in cells], [c["fixed"] for c in cells]
    misses = [run["seconds"] / allowed - 1 for run in runs]
    accuracy = statistics.mean(run["accuracy"] for run in runs)
    by_epochs = statistics.mean(run["accuracy"] for run in fixed)
    bar = ACCURACY.get(budget, 0.0)
    return {
        "seconds": statistics.mean(run["seconds"] for run in runs),
        "largest_miss": max(misses, key=abs),
        "epochs": statistics.mean(run["consumed"]["epochs"] for run in runs),
        "evaluation_share": statistics.mean(run["consumed"]["evaluation_share"] for run in runs),
        "accuracy": accuracy,
        "fixed_epochs": statistics.mean(run["consumed"]["epochs"] for run in fixed),
        "fixed_seconds": statistics.mean(run["seconds"] for run in fixed),
        "fixed_accuracy": by_epochs,
        "bar": {"accuracy": bar, "largest_miss": MAX_MISS},
        "missed": [
            *(["on time"] if max(map(abs, misses)) > MAX_MISS else []),
            *(["accuracy"] if accuracy < bar else []),
            *(["better than epochs of the same cost"] if accuracy < by_epochs else []),
        ],
    }


def row(budget: str, values: dict[str, Any]) -> tuple[object, ...]:
    return (
        budget,
        values["seconds"],
        100 * values["largest_miss"],
        values["epochs"],
        100 * values["evaluation_share"],
        100 * values["accuracy"],
        values["fixed_epochs"],
        values["fixed_seconds"],
        100 * values["fixed_accuracy"],
        f"MISSED: {', '.join(values['missed'])}" if values["missed"] else "PASS",
    )


if __name__ == "__main__":
    main()
