"""Fewer tokens on Fashion-MNIST at 64×64: accuracy and time of ToMe, EViT and DynamicViT in the exported file.

A ViT (6 blocks of width 128, 256 patches of 4 pixels) is trained here. Every method reduces it at several strengths,
without training and after a short one taught by the dense network; merging at random and average pooling have ToMe's
tokens. Figures are of the 10,000 test images; times are of the exported files in ONNX Runtime, in turns with the
dense one.

Training takes hours on two cores. Stopped at any moment it goes on where it was.

python tools/benchmarks/token_reduction.py                  # all
python tools/benchmarks/token_reduction.py --until trained  # accuracies, on a machine that need not be quiet
python tools/benchmarks/token_reduction.py --quick          # one epoch on few images: that it works
"""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

import common
import dense_models
import numpy as np
import onnx
import token_rivals
import torch

import cveff
from cveff.compress import Distill
from cveff.data import Data
from cveff.data import load as load_data
from cveff.dynamic import ReduceTokens
from cveff.dynamic.token_edit import reduced_blocks
from cveff.export.bench import bench
from cveff.export.normalize import deployable
from cveff.measure import agreement, predict, top1
from cveff.measure.threads import usable_cores
from cveff.model import Model
from cveff.runtime.engines import open_file
from cveff.state import load_weights

BATCHES = (1, 8, 16)
SPEEDUP, LOSS_TUNED, LOSS_UNTUNED, AGREEMENT = 1.5, 0.5, 1.5, 0.99
FORBIDDEN = {"Loop", "If", "NonZero"}
DENSE = dense_models.Dense(
    "vit_tiny_patch16_224",
    dense_models.adamw(10, 1e-3, "auto"),
    dense_models.adamw(2, 2e-4, "auto"),
    {"patch_size": 4, "depth": 6, "embed_dim": 128, "num_heads": 4},
)
RS = (8, 16, 24, 32, 40)
KEEP_RATES = (0.8, 0.7, 0.6, 0.5)
COLUMNS = (
    "tokens",
    "mean tokens",
    "accuracy %",
    "loss, points",
    "agreement %",
    *(f"×, batch {b}" for b in BATCHES),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=usable_cores())
    parser.add_argument("--rounds", type=int, default=60, help="of timing, in turns")
    parser.add_argument("--models", type=Path, default=common.ROOT / "runs" / "token_reduction")
    parser.add_argument("--until", choices=["trained"], help="stop before times are measured")
    parser.add_argument("--quick", action="store_true", help="one epoch on few images, one strength")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument(
        "--out", type=Path, help="JSON file; by default model_zoo/results/token_reduction.json"
    )
    arguments = parser.parse_args()
    out = arguments.out or common.output("token_reduction.json", arguments.quick)
    settings = {
        "seed": arguments.seed,
        "rs": RS,
        "keep_rates": KEEP_RATES,
        "dense": dataclasses.asdict(DENSE),
    }
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    folder = arguments.models / ("quick" if arguments.quick else "full")
    data = load_data("fashion-mnist", seed=arguments.seed)
    if arguments.quick:
        assert data.train is not None
        data = dataclasses.replace(
            data,
            train=data.train.subset(np.arange(512)),
            val=data.val.subset(np.arange(256)),
            test=None if data.test is None else data.test.subset(np.arange(256)),
        )
    dense = dense_models.dense(
        "tokens", arguments.seed, data, folder, common.Lines("dense"), 1 if arguments.quick else None, DENSE
    )
    rows = results.values.setdefault("rows", {})
    for name in names(arguments.quick):
        if name not in rows:
            model = reduced(name, dense, data, folder, arguments.seed, arguments.quick)
            rows[name] = measured(name, model, data, folder, arguments.threads)
            results.save()
    if arguments.until is None:
        for name in rows:
            if not (folder / f"{slug(name)}.onnx").is_file():
                model = reduced(name, dense, data, folder, arguments.seed, arguments.quick)
                cveff.export(model, folder / f"{slug(name)}.onnx")
        results.values["times"] = timed(list(rows), folder, arguments)
        results.save()
    show(results.values)


def names(quick: bool) -> list[str]:
    """What is compared: "dense", or a method, its strength, and whether it is tuned."""
    strengths = [f"tome r={r}" for r in RS] + [
        f"{method} {rate}" for method in ("evit", "dynamicvit") for rate in KEEP_RATES
    ]
    rivals = [f"{rival} r={r}" for r in RS for rival in ("random", "pooling")]
    if quick:
        strengths, rivals = ["tome r=24", "evit 0.6", "dynamicvit 0.6"], ["random r=24", "pooling r=24"]
    untuned = [name for name in [*strengths, *rivals] if not name.startswith("dynamicvit")]
    return ["dense", *untuned, *(f"{name}, tuned" for name in [*strengths, *rivals])]


def reduced(name: str, dense: Model, data: Data, folder: Path, seed: int, quick: bool) -> Model:
    """The network of that name; one that was trained is loaded."""
    if name == "dense":
        return dense
    method, strength = name.removesuffix(", tuned").split(" ")
    is_rival, is_tuned = method in ("random", "pooling"), name.endswith("tuned")
    train = dataclasses.replace(DENSE.recover, epochs=1, warmup_epochs=0.25) if quick else DENSE.recover
    if method == "dynamicvit" and not quick:  # predictors begin with nothing
        train = dataclasses.replace(train, epochs=2 * train.epochs)
    tune = Distill(alpha=1 / 3, temperature=1.0, train=train)
    if method in ("tome", "random", "pooling"):
        step = ReduceTokens(r=int(strength.removeprefix("r=")))
    else:
        step = ReduceTokens(
            method, keep_rate=float(strength), recover=tune if method == "dynamicvit" else None
        )  # type: ignore[arg-type]
    kept = folder / slug(name)
    if is_rival:
        rule = token_rivals.RandomMerging if method == "random" else token_rivals.AveragePooling
        model = token_rivals.merged_by(rule, dense, step)
        if is_tuned and (kept / "model.json").is_file():
            load_weights(model.module, kept / "weights.safetensors", name)
            return model
    elif (kept / "model.json").is_file():
        return cveff.load(kept)
    else:
        model = cveff.apply(
            dense,
            step,
            data=data,
            seed=seed,
            progress=common.Lines(name),
            folder=folder / f"{slug(name)}-training",
            resume=True,
        )
    if is_tuned and method != "dynamicvit":
        model = cveff.apply(
            model,
            tune,
            data=data,
            seed=seed,
            teacher=dense,
            progress=common.Lines(name),
            folder=folder / f"{slug(name)}-training",
            resume=True,
        )
    if is_tuned:
        cveff.save(model, kept)
    return model


def measured(name: str, model: Model, data: Data, folder: Path, threads: int) -> dict[str, Any]:
    """Accuracy of the file on the test images, how often it answers as PyTorch does, and what is in its graph."""
    path = cveff.export(model, folder / f"{slug(name)}.onnx")
    spec, split = model.spec.input, data.evaluation
    with open_file("onnxruntime", path, threads=threads) as session:
        logits, targets = predict(session, split.evaluation_batches(spec, 250))
    network = deployable(model.module, spec)

    def in_torch(images: np.ndarray) -> np.ndarray:
        with torch.inference_mode():
            return network(torch.from_numpy(images)).numpy()

    expected, _ = predict(in_torch, split.evaluation_batches(spec, 250))
    assert targets is not None
    kinds = {node.op_type for node in onnx.load(path).graph.node}
    counts = tokens(model)
    return {
        "images": len(targets),
        "accuracy": top1(logits, targets),
        "agreement_with_torch": agreement(logits, expected),
        "tokens": counts,
        "mean_tokens": float(np.mean(counts)),
        "forbidden_operators": sorted(kinds & FORBIDDEN),
    }


def tokens(model: Model) -> list[int]:
    """Patch tokens in each block."""
    count = model.module.patch_embed.num_patches
    blocks = reduced_blocks(model.module)
    return list(blocks.counts(count)) if blocks is not None else [count] * len(model.module.blocks)


def timed(rows: list[str], folder: Path, arguments: argparse.Namespace) -> dict[str, Any]:
    """Times of the files that differ in more than weights, in turns, by batch size and name."""
    timed = [name for name in rows if name == "dense" or name.endswith("tuned")]
    timed = [name for name in timed if not name.startswith(("random", "pooling"))]
    files = {name: folder / f"{slug(name)}.onnx" for name in timed}
    found: dict[str, Any] = {}
    for batch in BATCHES:
        rounds = 3 if arguments.quick else arguments.rounds
        figures = bench(files, batch=batch, threads=arguments.threads, rounds=rounds, memory=False)
        found[str(batch)] = {
            item.name: {
                "median_ms": item.median_ms,
                "speedup": item.speedup,
                "speedup_interval": list(item.speedup_interval),
            }
            for item in figures
        }
    return {**found, "threads": arguments.threads}


def show(values: dict[str, Any]) -> None:
    """The table, and which bars are missed."""
    rows, times = values["rows"], values.get("times", {})
    dense = rows["dense"]["accuracy"]

    def speedup(name: str, batch: int) -> float | None:
        named = times.get(str(batch), {})
        found = named.get(name) or named.get(f"{name}, tuned")  # the same graph
        return None if found is None else found["speedup"]

    common.table(
        f"Fashion-MNIST, {rows['dense']['images']} test images",
        COLUMNS,
        [
            (
                name,
                row["mean_tokens"],
                100 * row["accuracy"],
                100 * (dense - row["accuracy"]),
                100 * row["agreement_with_torch"],
                *(speedup(name, batch) for batch in BATCHES),
            )
            for name, row in rows.items()
        ],
        note="Times: ONNX Runtime, dense = 1.",
    )
    for line in missed(rows, speedup(f"tome r={RS[0]}, tuned", 8) is not None, speedup):
        common.console.print(f"missed: {line}", highlight=False)


def missed(rows: dict[str, Any], is_timed: bool, speedup: Any) -> list[str]:
    """What falls short of what is promised."""
    found, dense = [], rows["dense"]["accuracy"]
    for name, row in rows.items():
        if row["agreement_with_torch"] < AGREEMENT:
            found.append(
                f"{name}: the file answers as PyTorch does for {row['agreement_with_torch']:.2%} of images"
            )
        if row["forbidden_operators"]:
            found.append(f"{name}: its graph has {', '.join(row['forbidden_operators'])}")
        if name.startswith("tome"):
            for rival in ("random", "pooling"):
                other = rows.get(name.replace("tome", rival))
                if other is not None and other["accuracy"] >= row["accuracy"]:
                    found.append(f"{name}: {rival} at equal tokens is as accurate")
    if is_timed:
        for suffix, limit in (("", LOSS_UNTUNED), (", tuned", LOSS_TUNED)):
            fast = [
                name for name in rows if name.startswith("tome") and name.endswith("tuned") == bool(suffix)
            ]
            fast = [name for name in fast if (speedup(name, 8) or 0) >= SPEEDUP]
            losses = [100 * (dense - rows[name]["accuracy"]) for name in fast]
            if not losses or min(losses) > limit:
                found.append(
                    f"no ToMe{suffix or ' without tuning'} is {SPEEDUP} times as fast within {limit} points"
                )
    return found


def slug(name: str) -> str:
    """A file's name."""
    return name.replace(", ", "-").replace(" ", "-").replace("=", "")


if __name__ == "__main__":
    main()
