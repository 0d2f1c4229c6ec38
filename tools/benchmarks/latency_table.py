"""Do blocks timed alone predict whole networks? Rank correlation and error on held-out models, beside MACs.

Networks of many families are exported and timed interleaved, half the rounds before and half after their blocks are
measured. The scale is fitted on every other network (by time) and judged on those between, then the other way round;
multiply-accumulates, with a scale and a constant fitted in the same way, are judged beside. Then some networks are
slimmed evenly until the table, anchored to the dense one, predicts the time that was asked for; the slimmed network is
built, exported and timed in turns with the dense one: how far is it from what was asked for? Once more, anchored to
that measurement, as a pruning step would do it.

Weights are random: times do not depend on them.

python tools/benchmarks/latency_table.py                # about 35 minutes on 2 quiet cores; continues where it stopped
python tools/benchmarks/latency_table.py --quick        # six small models, one thread, few rounds
python tools/benchmarks/latency_table.py --keep         # leaves table and fit where cveff looks for them
"""

from __future__ import annotations

import argparse
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import Any

import common
import numpy as np
from latency_table_models import MODELS, QUICK, VARIANTS, build
from latency_table_slimmed import GOAL_BAR, GOALS, show_slimmed, slimmed

from cveff.compress.blocks import blocks, macs
from cveff.compress.latency_model import LatencyModel, least_absolute
from cveff.compress.trace import trace
from cveff.errors import CveffError
from cveff.export.onnx import export
from cveff.measure.block import Block
from cveff.measure.block_latency import BlockLatency
from cveff.measure.latency import Clock, Latency, compare
from cveff.measure.threads import pinned_threads
from cveff.runtime.engines import open_file

RANK_BAR = 0.95


def main() -> None:
    arguments = _arguments()
    settings = {
        "models": arguments.models,
        "rounds": arguments.rounds,
        "goals": list(GOALS),
        "engine": arguments.engine,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    cells = results.values.setdefault("threads", {})
    with tempfile.TemporaryDirectory() as temporary:
        files, networks, operations = prepared(arguments.models, Path(temporary))
        for threads in arguments.threads:
            cell = cells.setdefault(str(threads), {})
            table = BlockLatency(
                arguments.engine, threads, None if arguments.keep else Path(temporary) / "tables"
            )
            if "predictions" not in cell:
                if table.path.is_file():
                    # An older table may hold times of a busier machine.
                    table.path.unlink()
                    table = BlockLatency(arguments.engine, threads, table.path.parent)
                cell |= whole_models(files, networks, operations, table, arguments)
                results.save()
            show_predictions(threads, cell)
            if "slimmed" not in cell:
                model = LatencyModel(table, **cell["fit"])
                cell["slimmed"] = slimmed(arguments.models, model, arguments.seconds, _clock(arguments))
                for key in ("", "_corrected"):
                    error = f"{key[1:]}_error".lstrip("_")
                    cell[f"goals_met{key}"] = sum(abs(item[error]) <= GOAL_BAR for item in cell["slimmed"])
                results.save()
            show_slimmed(threads, cell)


def prepared(
    names: Sequence[str], folder: Path
) -> tuple[dict[str, Path], dict[str, list[Block]], dict[str, int]]:
    """Exported file, blocks and MACs of each model."""
    files, networks, operations = {}, {}, {}
    for name in names:
        common.console.print(f"{name}: exporting")
        model = build(name)
        files[name] = export(model, folder / f"{name.replace(' ', '-')}.onnx", check=False)
        traced = trace(model.module, model.spec.input)
        networks[name], operations[name] = blocks(traced), macs(traced)
    return files, networks, operations


def whole_models(
    files: Mapping[str, Path],
    networks: Mapping[str, list[Block]],
    operations: Mapping[str, int],
    table: BlockLatency,
    arguments: argparse.Namespace,
) -> dict[str, Any]:
    """Measured and predicted time of every model, and how the halves predict each other."""
    before = measured(files, table, arguments)
    every = list(dict.fromkeys(block for network in networks.values() for block in network))
    common.console.print(f"{table.threads} threads: measuring {len(every)} blocks")
    table.milliseconds(every)
    after = measured(files, table, arguments)
    times = {name: float(np.sqrt(before[name].median_ms * after[name].median_ms)) for name in files}
    names = sorted(files, key=lambda name: times[name])
    actual = np.array([times[name] for name in names])
    work = np.array([[operations[name] / 1e9, 1.0] for name in names])
    predicted, by_macs = np.zeros(len(names)), np.zeros(len(names))
    fits, halves = [], []
    for parity in (0, 1):
        fitted = np.arange(parity, len(names), 2)
        held_out = np.arange(1 - parity, len(names), 2)
        model = LatencyModel.fit(table, [networks[names[index]] for index in fitted], actual[fitted])
        predicted[held_out] = [
            model.predict_blocks(networks[names[index]], interpolate=False) for index in held_out
        ]
        by_macs[held_out] = work[held_out] @ least_absolute(work[fitted] / actual[fitted, None])
        fits.append({"scale": model.scale, "per_block": model.per_block})
        halves.append(
            {
                "blocks": quality(predicted[held_out], actual[held_out]),
                "macs": quality(by_macs[held_out], actual[held_out]),
            }
        )
    whole = LatencyModel.fit(table, [networks[name] for name in names], actual)
    if arguments.keep:
        common.console.print(f"table and fit are kept in {whole.save().parent}")
    drift = [after[name].median_ms / before[name].median_ms for name in names]
    return {
        "predictions": {
            name: {
                "milliseconds": actual[index],
                "before": before[name].median_ms,
                "after": after[name].median_ms,
                "spread": after[name].spread,
                "predicted": predicted[index],
                "by_macs": by_macs[index],
                "gmacs": work[index, 0],
                "blocks": len(networks[name]),
            }
            for index, name in enumerate(names)
        },
        "held_out": halves,
        "fits": fits,
        "fit": {"scale": whole.scale, "per_block": whole.per_block, "num_models": whole.num_models},
        "drift": {"median": float(np.median(drift)), "low": min(drift), "high": max(drift)},
        "blocks_measured": len(every),
    }


def measured(
    files: Mapping[str, Path], table: BlockLatency, arguments: argparse.Namespace
) -> Mapping[str, Latency]:
    """Times of all files, interleaved."""
    common.console.print(f"{table.threads} threads: timing {len(files)} models")
    options = {"inference_precision": "f32"} if table.engine == "openvino" else {}
    with ExitStack() as stack:
        stack.enter_context(pinned_threads(table.threads))
        sessions = {
            name: stack.enter_context(open_file(table.engine, path, threads=table.threads, options=options))
            for name, path in files.items()
        }
        calls = {name: _on_own_images(session) for name, session in sessions.items()}
        rounds = arguments.rounds
        return compare(
            calls,
            np.zeros((1, 1), np.uint8),
            min_rounds=rounds,
            max_rounds=rounds,
            budget_seconds=1e9,
            clock=_clock(arguments),
        )


def _on_own_images(session: Any) -> Any:
    images = np.random.default_rng(0).integers(0, 256, (1, *session.size, session.channels), dtype=np.uint8)
    return lambda _: session(images)


def _clock(arguments: argparse.Namespace) -> Clock:
    return time.thread_time if arguments.cpu_time else time.perf_counter


def quality(predicted: np.ndarray, actual: np.ndarray) -> dict[str, float]:
    """Spearman's rank correlation; mean and largest absolute relative error."""
    ranks = [np.argsort(np.argsort(values)) for values in (predicted, actual)]
    errors = np.abs(predicted / actual - 1)
    return {
        "spearman": float(np.corrcoef(*ranks)[0, 1]),
        "mean_error": float(errors.mean()),
        "max_error": float(errors.max()),
    }


def show_predictions(threads: int, cell: Mapping[str, Any]) -> None:
    """Print what was predicted of models that the fit had not seen."""
    rows = [
        [
            name,
            item["gmacs"],
            item["milliseconds"],
            item["predicted"],
            100 * (item["predicted"] / item["milliseconds"] - 1),
            item["by_macs"],
            100 * (item["by_macs"] / item["milliseconds"] - 1),
        ]
        for name, item in cell["predictions"].items()
    ]
    columns = ("model", "GMAC", "measured ms", "blocks ms", "error %", "MACs ms", "error %")
    drift = cell["drift"]
    common.table(
        f"Held-out predictions, {threads} thread{'s' * (threads > 1)}",
        columns,
        rows,
        note=f"Second measurement / first: {drift['median']:.3f}, from {drift['low']:.3f} to {drift['high']:.3f}.",
    )
    quality_rows = []
    for index, half in enumerate(cell["held_out"]):
        for kind in ("blocks", "macs"):
            found = half[kind]
            errors = [100 * found["mean_error"], 100 * found["max_error"]]
            quality_rows.append([f"{kind}, half {index + 1}", found["spearman"], *errors])
    common.table(
        f"On held-out models (bar: rank correlation {RANK_BAR})",
        ("predictor", "Spearman", "mean error %", "largest error %"),
        quality_rows,
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", default=[*MODELS, *VARIANTS], metavar="NAME")
    parser.add_argument("--threads", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--engine", default="onnxruntime", help="onnxruntime or openvino")
    parser.add_argument(
        "--rounds", type=int, default=12, help="of each of the two measurements of whole models"
    )
    parser.add_argument("--seconds", type=float, default=8.0, help="time of one comparison of slimmed models")
    parser.add_argument("--keep", action="store_true", help="leave table and fit in cveff's cache folder")
    parser.add_argument(
        "--cpu-time",
        action="store_true",
        help="processor time instead of wall time: one thread on a busy machine",
    )
    parser.add_argument("--quick", action="store_true", help="six small models, one thread, few rounds")
    parser.add_argument("--fresh", action="store_true", help="forget an earlier run with the same settings")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/latency_table.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.threads, arguments.rounds, arguments.seconds = list(QUICK), [1], 4, 2.0
    if arguments.cpu_time and arguments.threads != [1]:
        raise CveffError("--cpu-time counts the calling thread only; give it with --threads 1")
    if len(arguments.models) < 4:
        raise CveffError(
            f"{len(arguments.models)} models cannot be fitted on one half and judged on the other; give 4"
        )
    arguments.out = arguments.out or common.output("latency_table.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
