"""Which importance keeps most accuracy, before any training: criteria, scopes and repairs on the zoo's trained models.

python tools/benchmarks/importance.py
"""

from __future__ import annotations

import argparse
import copy
from pathlib import Path
from typing import Any, get_args

import common
import numpy as np
import torch

import cveff
from cveff.compress.analysis import analyze
from cveff.compress.batch_norm import recalibrate_batch_norm
from cveff.compress.compensate import compensate
from cveff.compress.importance import Criterion, score
from cveff.compress.samples import samples
from cveff.compress.scopes import Scope, select
from cveff.data import load
from cveff.model import Model

MODELS = {"digits": "digits", "fashion-mnist-small": "fashion-mnist"}
SHARES = (0.25, 0.5, 0.75)
REPAIRS = ("nothing", "batch norms", "compensation, batch norms")
ROUND_TO = 1
"""These models have 16 to 96 channels a layer: multiples of 8 would leave little to tell criteria apart."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    parser.add_argument(
        "--seeds", type=int, nargs="+", default=[0, 1, 2], help="draws of the calibration images"
    )
    parser.add_argument("--images", type=int, default=256, help="calibration images")
    parser.add_argument("--test-images", type=int, default=1000, help="test images at most")
    parser.add_argument("--quick", action="store_true", help="the digits, one seed, 64 images")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/importance.json")
    arguments = parser.parse_args()
    if arguments.quick:
        arguments.models, arguments.seeds, arguments.images = ["digits"], [0], 64
    settings = {name: getattr(arguments, name) for name in ("seeds", "images", "test_images")}
    out = arguments.out or common.output("importance.json", arguments.quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    found = results.values.setdefault("models", {})
    for name in arguments.models:
        if name not in found:
            found[name] = one_model(name, arguments.seeds, arguments.images, arguments.test_images)
            results.save()
        show(name, found[name])
    results.save()


def one_model(name: str, seeds: list[int], num_images: int, num_test: int) -> dict[str, Any]:
    """Accuracy on test images by criterion, share removed, repair and scope, one number a seed."""
    model = cveff.load(common.ROOT / "model_zoo" / "weights" / name)
    data = load(MODELS[name])
    assert data.train is not None
    spec = model.spec.input
    test = samples(data.evaluation, spec, num_test, batch_size=256)
    analysis = analyze(model.module, spec)
    rows: dict[str, dict[str, list[float]]] = {}
    for seed in seeds:
        images = samples(data.train, spec, num_images, seed=seed)
        for criterion in get_args(Criterion):
            scores = score(model.module, analysis.groups, criterion, batches=images, seed=seed)
            for share in SHARES:
                for scope in get_args(Scope):
                    keep = select(
                        analysis.groups, scores, scope, share, module=model.module, round_to=ROUND_TO
                    )
                    repairs = REPAIRS if scope == "local" else REPAIRS[-1:]
                    for repair in repairs:
                        cut = pruned(model, analysis, keep, images, repair)
                        cell = rows.setdefault(f"{criterion}/{scope}/{share:g}", {})
                        cell.setdefault(repair, []).append(accuracy(cut, test))
    return {
        "groups": {group.name: group.size for group in analysis.groups},
        "test_images": sum(len(batch) for batch, _ in test),
        "dense": accuracy(model.module, test),
        "accuracy": rows,
    }


def pruned(
    model: Model, analysis: Any, keep: dict[str, np.ndarray], images: Any, repair: str
) -> torch.nn.Module:
    """The small network, repaired."""
    module = copy.deepcopy(model.module)
    if repair.startswith("compensation"):
        found = compensate(module, analysis.groups, keep, images, trace=analysis.trace)
        module.load_state_dict({**module.state_dict(), **found.state})
    module = analysis.edit(keep, module).apply(module).eval()
    if repair != "nothing":
        recalibrate_batch_norm(module, images)
    return module


def accuracy(module: torch.nn.Module, batches: Any) -> float:
    """Top-1, 0 to 1."""
    with torch.inference_mode():
        hits = [(module(images).argmax(1) == targets) for images, targets in batches]
    return float(torch.cat(hits).float().mean())


def show(name: str, values: dict[str, Any]) -> None:
    """Print mean accuracies in percent."""
    rows = []
    for criterion in get_args(Criterion):
        for share in SHARES:
            local = values["accuracy"][f"{criterion}/local/{share:g}"]
            cells = [100 * float(np.mean(local[repair])) for repair in REPAIRS]
            for scope in ("global", "isomorphic"):
                cell = values["accuracy"][f"{criterion}/{scope}/{share:g}"]
                cells.append(100 * float(np.mean(cell[REPAIRS[-1]])))
            rows.append((f"{criterion}, {share:.0%} removed", *cells))
    common.table(
        f"{name}: accuracy in % without training, dense {100 * values['dense']:.1f}",
        ("", "no repair", "batch norms", "compensated", "global, compensated", "isomorphic, compensated"),
        rows,
        note=f"Mean over draws of calibration images; {values['test_images']} test images.",
    )


if __name__ == "__main__":
    main()
