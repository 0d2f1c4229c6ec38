"""Low-rank factors on real weights: milliseconds against rank, and the error of whitened against plain factors.

EfficientNet-Lite0 (ImageNet weights, crops of photographs) has 1×1 convolutions and a linear head, the zoo's
Fashion-MNIST network 3×3 convolutions. Factors are fitted on one half of the images; the relative output error is
measured on the other half, which the fit has not seen. Milliseconds are the sum of a chain's blocks from the
device's latency table, batch of 1.

python tools/benchmarks/low_rank.py            # about 10 minutes on 2 cores
python tools/benchmarks/low_rank.py --quick    # about 1 minute
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import common
import numpy as np
import photos
import torch
from torch import Tensor, nn

import cveff
from cveff import model_zoo
from cveff.compress import low_rank_math as factors_of
from cveff.compress.low_rank_calibration import Batches, LayerStatistics, collect
from cveff.compress.low_rank_cost import measured_cost
from cveff.compress.low_rank_edit import METHODS, geometry
from cveff.compress.low_rank_layers import find_layers
from cveff.compress.low_rank_options import Cost, candidate_ranks, chain, macs
from cveff.data.sampling import calibration_indices
from cveff.measure.threads import usable_cores
from cveff.model import Model
from cveff.runtime.preprocess import preprocess

BATCH = 16
MODELS = ("efficientnet-lite0", "fashion-mnist-large")


def main() -> None:
    arguments = _arguments()
    settings = {
        "images": arguments.images,
        "threads": arguments.threads,
        "layers": arguments.layers,
        "seed": arguments.seed,
    }
    results = common.Results(arguments.out, __file__, settings, fresh=arguments.fresh)
    cost = measured_cost("onnxruntime", arguments.threads)
    models = results.values.setdefault("models", {})
    for name in MODELS[:1] if arguments.quick else MODELS:
        if name not in models:
            models[name] = one_model(name, cost, arguments)
            results.values["summary"] = summary(models)
            results.save()
    results.save()
    show(results.values)


def one_model(name: str, cost: Cost, arguments: argparse.Namespace) -> dict[str, Any]:
    """Every rank of the costliest layers of a zoo model."""
    model = model_zoo.load(name)
    module, spec = model.module.eval(), model.spec.input
    seen, unseen = halves(name, model, arguments.images, arguments.seed)
    shapes, _ = find_layers(module, torch.zeros(1, spec.channels, *spec.size))
    times = {
        path: float(cost(chain(geometry(module.get_submodule(path)), shape))[0])
        for path, shape in shapes.items()
    }
    paths = sorted(times, key=lambda path: -times[path])[: arguments.layers]
    held_out = dict(collect(module, paths, unseen, arguments.images, arguments.seed + 1))
    layers = {}
    for path, statistics in collect(module, paths, seen, arguments.images, arguments.seed):
        layers[path] = one_layer(
            module.get_submodule(path), shapes[path], statistics, held_out[path].covariance, cost
        )
        common.console.print(f"{name}: {path}: {layers[path]['milliseconds']:.3f} ms")
    return {"layers": layers, "all_layers_ms": sum(times.values()), "measured_layers": len(paths)}


def one_layer(
    layer: nn.Module, shape: tuple[int, ...], seen: LayerStatistics, unseen: Tensor, cost: Cost
) -> dict[str, Any]:
    """Milliseconds and errors on unseen images of every method and rank that saves operations."""
    weight = cast(Tensor, layer.weight).detach().double()
    weight = weight.reshape(*weight.shape, *[1] * (4 - weight.ndim))
    dense = chain(geometry(layer), shape)
    rows = []
    for method in METHODS:
        ranks = [
            rank
            for rank in candidate_ranks(layer, method)
            if macs(chain(geometry(layer, method, rank), shape)) < macs(dense)
        ]
        for rank in ranks:
            stages = chain(geometry(layer, method, rank), shape)
            plain, whitened = (
                factors_of.relative_error(weight, approximation(weight, method, rank, covariance), unseen)
                for covariance in (None, seen.covariance)
            )
            rows.append(
                {
                    "method": method,
                    "rank": list(rank),
                    "milliseconds": float(sum(cost(stages))),
                    "macs_ratio": macs(stages) / macs(dense),
                    "plain_error": plain,
                    "whitened_error": whitened,
                }
            )
    return {
        "shape": list(weight.shape),
        "input": list(shape),
        "milliseconds": float(cost(dense)[0]),
        "ranks": rows,
    }


def approximation(weight: Tensor, method: str, rank: tuple[int, ...], covariance: Tensor | None) -> Tensor:
    """The kernel that a method's factors of `rank` compute."""
    if method == "svd":
        basis = factors_of.output_basis(weight.flatten(1), covariance)
        return factors_of.compose(factors_of.svd_factors(weight, basis, rank[0]))
    if method == "tucker":
        pair = cast("tuple[int, int]", rank)
        return factors_of.compose(factors_of.tucker_factors(weight, pair, covariance))
    split = factors_of.SpatialSplit(weight, method.removeprefix("spatial-"), rank[0], covariance)
    return factors_of.compose(split.factors(rank[0]))


def halves(name: str, model: Model, count: int, seed: int) -> tuple[Batches, Batches]:
    """Images to fit on and images to measure on; photographs are split by scene."""
    spec = model.spec.input
    if name.startswith("efficientnet"):
        first, second = photos.split(photos.photographs(), seed)
        pixels = [
            preprocess(photos.crops(part, count, spec, seed + index), spec)
            for index, part in enumerate((first, second))
        ]
    else:
        data = cveff.data.load(name.rsplit("-", 1)[0])
        assert data.train is not None
        pixels = []
        for split in (data.train, data.evaluation):
            chosen = split.subset(calibration_indices(split, count, seed))
            pixels.append(np.concatenate([images for images, _ in chosen.evaluation_batches(spec)]))
    mean, std = (torch.tensor(values).view(1, -1, 1, 1) for values in (spec.mean, spec.std))

    def batches(images: np.ndarray) -> Batches:
        def walk() -> Iterator[Tensor]:
            for start in range(0, len(images), BATCH):
                part = torch.tensor(images[start : start + BATCH]).permute(0, 3, 1, 2).float()
                yield (part / 255 - mean) / std

        return walk

    return batches(pixels[0]), batches(pixels[1])


def summary(models: dict[str, Any]) -> dict[str, Any]:
    """Over all layers and ranks: how much less whitened factors lose, and how many ranks are faster as measured."""
    rows = [
        (layer, row)
        for model in models.values()
        for layer in model["layers"].values()
        for row in layer["ranks"]
    ]
    ratios = [row["whitened_error"] / row["plain_error"] for _, row in rows if row["plain_error"] > 1e-6]
    faster = [row["milliseconds"] <= 0.95 * layer["milliseconds"] for layer, row in rows]
    return {
        "ranks": len(rows),
        "whitened_over_plain_error": {
            "median": float(np.median(ratios)),
            "p10": float(np.quantile(ratios, 0.1)),
            "p90": float(np.quantile(ratios, 0.9)),
        },
        "whitened_is_better": float(np.mean([ratio < 1 for ratio in ratios])),
        "fewer_macs_and_5_percent_faster": float(np.mean(faster)),
    }


def show(values: dict[str, Any]) -> None:
    for name, model in values["models"].items():
        rows = []
        for path, layer in model["layers"].items():
            fast = [row for row in layer["ranks"] if row["milliseconds"] <= 0.95 * layer["milliseconds"]]
            best = min(fast, key=lambda row: row["whitened_error"], default=None)
            cells: list[object] = [path, "×".join(map(str, layer["shape"])), layer["milliseconds"]]
            if best is None:
                rows.append([*cells, None, None, None, None])
                continue
            label = f"{best['method']} {'×'.join(map(str, best['rank']))}"
            rows.append(
                [*cells, label, best["milliseconds"], 100 * best["plain_error"], 100 * best["whitened_error"]]
            )
        columns = ("layer", "weight", "ms", "least error, 5% faster", "ms", "plain %", "whitened %")
        common.table(name, columns, rows, note="Errors on images that the fit has not seen.")
    found = values["summary"]
    ratio = found["whitened_over_plain_error"]
    common.console.print(
        f"{found['ranks']} ranks: whitened error over plain, median {ratio['median']:.2f} "
        f"(p10 {ratio['p10']:.2f}, p90 {ratio['p90']:.2f}); better in {found['whitened_is_better']:.0%}; "
        f"{found['fewer_macs_and_5_percent_faster']:.0%} of ranks with fewer MACs are 5% faster as measured"
    )


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--images", type=int, help="to fit on, and as many to measure on; by default 256")
    parser.add_argument("--layers", type=int, help="costliest layers of each model; by default 12")
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--quick", action="store_true", help="two layers of one model, 32 images")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/low_rank.json")
    arguments = parser.parse_args()
    arguments.images = arguments.images or (32 if arguments.quick else 256)
    arguments.layers = arguments.layers or (2 if arguments.quick else 12)
    arguments.out = arguments.out or common.output("low_rank.json", arguments.quick)
    return arguments


if __name__ == "__main__":
    main()
