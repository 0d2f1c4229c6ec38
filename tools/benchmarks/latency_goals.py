"""How close `Prune(latency=…)` lands: exported file's measured latency against the goal, architectures × goals.

Weights are random and importance is by magnitude: this is about time alone. The final figure is a fresh measurement,
dense and pruned files interleaved, not the one the search ended on.

python tools/benchmarks/latency_goals.py            # 6 architectures × 2 goals, about 20 minutes
python tools/benchmarks/latency_goals.py --quick    # one architecture, one goal
"""

from __future__ import annotations

import argparse
import time
from pathlib import Path
from typing import Any

import common
import torch

import cveff
from cveff.compress import Prune
from cveff.errors import StepError
from cveff.export.timer import EngineTimer
from cveff.target import load_target

ARCHITECTURES = (
    "mobilenetv4_conv_small",
    "efficientnet_lite0",
    "resnet18",
    "repvit_m1",
    "convnext_atto",
    "vit_tiny_patch16_224",
)
GOALS = (0.7, 0.5)
TOLERANCE = 0.07
SHARE_OF_PAIRS = 0.9


def main() -> None:
    arguments = _arguments()
    results = common.Results(arguments.out, __file__, {"engine": arguments.engine}, fresh=arguments.fresh)
    pairs = results.values.setdefault("pairs", {})
    for name in arguments.only:
        for goal in arguments.goals:
            key = f"{name} {goal:g}"
            if key not in pairs:
                pairs[key] = _one(name, goal, arguments.engine)
                results.save()
    met = [pair for pair in pairs.values() if pair.get("error") is not None and pair["error"] <= TOLERANCE]
    results.values["summary"] = {
        "pairs": len(pairs),
        "met": len(met),
        "passes": len(met) >= SHARE_OF_PAIRS * len(pairs),
    }
    results.save()
    common.table(
        f"Latency goals on {arguments.engine}, float32, batch 1",
        ("pair", "goal", "measured", "off by", "MACs left", "seconds"),
        [
            [
                key,
                f"{pair['goal']:.2f}",
                f"{pair['share']:.3f}" if "share" in pair else pair["message"],
                f"{100 * pair['error']:+.1f}%" if pair.get("error") is not None else "-",
                f"{pair.get('macs', 0):.2f}",
                f"{pair['seconds']:.0f}",
            ]
            for key, pair in pairs.items()
        ],
        note=f"{len(met)} of {len(pairs)} no more than 7% above or below the goal.",
    )


def _one(name: str, goal: float, engine: str) -> dict[str, Any]:
    torch.manual_seed(0)
    model = cveff.create(name, 10)
    target = load_target("edge-cpu")
    prune = Prune(latency=goal, importance="magnitude", sensitivity=False, compensate=False)
    start = time.monotonic()
    figures: dict[str, Any] = {"goal": goal}
    try:
        with EngineTimer(target, engine) as timer:
            small = cveff.apply(
                model, prune, target=target, timer=timer, progress=common.Lines(f"{name} {goal:g}")
            )
    except StepError as error:
        return {**figures, "error": None, "message": str(error), "seconds": time.monotonic() - start}
    figures["seconds"] = time.monotonic() - start
    with EngineTimer(target, engine, seconds=15) as timer:
        found = timer.compare({"dense": model, "small": small})
    share = 1 / found["small"].speedup.median
    return {
        **figures,
        "share": share,
        "error": abs(share / goal - 1),
        "dense_ms": found["dense"].median_ms,
        "small_ms": found["small"].median_ms,
        "spread": found["small"].speedup.spread,
        "macs": _macs(small) / _macs(model),
        "parameters": small.num_parameters / model.num_parameters,
    }


def _macs(model: cveff.Model) -> int:
    from cveff.compress.blocks import macs
    from cveff.compress.trace import trace

    return macs(trace(model.module, model.spec.input))


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--only", nargs="+", default=list(ARCHITECTURES))
    parser.add_argument("--goals", nargs="+", type=float, default=list(GOALS))
    parser.add_argument("--engine", default="onnxruntime")
    parser.add_argument("--quick", action="store_true")
    parser.add_argument("--fresh", action="store_true")
    parser.add_argument("--out", type=Path)
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.only, arguments.goals = ["mobilenetv4_conv_small"], [0.5]
    arguments.out = arguments.out or common.output("latency_goals.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
