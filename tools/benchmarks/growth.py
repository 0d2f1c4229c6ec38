"""Growth against training from scratch, µP's learning rates over widths, and losses foretold from small runs.

python tools/benchmarks/growth.py
"""

from __future__ import annotations

import argparse
import statistics
from pathlib import Path
from typing import Any

import common
import small_vits
import torch

from cveff.measure.accuracy import predict
from cveff.measure.predictor import torch_predictor
from cveff.model import Model
from cveff.train import Growth
from cveff.train.flops import training_flops
from cveff.train.growth.growing import Growing
from cveff.train.growth.masks import masked_paths
from cveff.train.incubation.task import images_of
from cveff.train.predict_loss import fit_loss

FLOPS_BAR = 0.77
SCHEDULE = ((0.0, 4), (0.35, 8), (0.6, 12))
"""(share of the run, blocks): the run begins with 4 of 12 blocks."""
RATES = (2.5e-4, 5e-4, 1e-3, 2e-3, 4e-3, 8e-3)
BASE, LARGE, HEAD = 32, 128, 16
SMALL = (16, 32, 48, 64, 80)
"""Widths whose losses foretell that of `LARGE`."""


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument(
        "--epochs", type=int, default=24, help="from scratch; the grown run gets operations' worth"
    )
    parser.add_argument("--short", type=int, default=4, help="epochs of the runs over widths and rates")
    parser.add_argument("--images", type=int, default=12_000, help="training images")
    parser.add_argument("--quick", action="store_true", help="500 images, four epochs, one seed, two rates")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/growth.json")
    arguments = parser.parse_args()
    quick = arguments.quick
    seeds, epochs = (arguments.seeds[:1], 4) if quick else (arguments.seeds, arguments.epochs)
    short = 1 if quick else arguments.short
    rates = RATES[2:4] if quick else RATES
    settings = {"epochs": epochs, "short": short, "images": arguments.images}
    out = arguments.out or common.output("growth.json", quick)
    results = common.Results(out, __file__, settings, fresh=arguments.fresh)
    cells = results.values.setdefault("cells", {})

    def measured(key: str, work: Any) -> None:
        if key not in cells:
            cells[key] = work()
            results.save()

    for seed in seeds:
        for name in ("from scratch", "grown"):
            measured(
                f"{name}, seed {seed}",
                lambda name=name, seed=seed: growth_cell(name, seed, epochs, arguments),
            )
    for rule in ("µP", "standard"):
        for width in (BASE, LARGE):
            for rate in rates:
                key = f"{rule}, width {width}, rate {rate:g}"
                measured(
                    key,
                    lambda rule=rule, width=width, rate=rate: width_cell(rule, width, rate, short, arguments),
                )
    best = best_rate(cells, "µP", BASE, rates)
    for width in (*SMALL, LARGE):
        key = f"µP, width {width}, rate {best:g}"
        measured(key, lambda width=width: width_cell("µP", width, best, short, arguments))
    results.values["summary"] = summary(cells, seeds, rates)
    results.save()
    report(cells, seeds, rates, results.values["summary"])


def growth_cell(name: str, seed: int, epochs: int, arguments: Any) -> dict[str, Any]:
    """A 12-block ViT, trained whole or grown, within `FLOPS_BAR` of the operations."""
    data = small_vits.images(arguments.quick, arguments.images, seed)
    model = small_vits.vit(data, seed)
    assert data.train is not None
    one = training_flops(model.module, model.spec.input)
    train = small_vits.training(epochs)
    flops = one * images_of(train, data)
    if name == "grown":
        mask_steps = max(1, data.train.num_training_batches(train.batch_size) // 4)
        grow = tuple(Growth(at=at, depth=depth, mask_steps=mask_steps) for at, depth in SCHEDULE)

        def cost(count: int) -> float:
            steps = count * data.train.num_training_batches(train.batch_size)  # type: ignore[union-attr]
            return Growing(model, grow, steps, seed).flops(train.batch_size)

        allowed = max(
            (count for count in range(1, 2 * epochs) if cost(count) <= FLOPS_BAR * flops), default=1
        )
        train, flops = small_vits.training(allowed, grow=grow), cost(allowed)
    folder = (
        small_vits.RUNS / f"growth{'-quick' if arguments.quick else ''}" / f"{name.replace(' ', '-')}-{seed}"
    )
    made = small_vits.trained(model, train, data, seed, folder)
    return {
        "accuracy": small_vits.accuracy(made, data),
        "flops": flops,
        "epochs": train.epochs,
        "masks_left": len(list(masked_paths(made.module))),
        "same_spec": made.spec == model.spec,
    }


def width_cell(rule: str, width: int, rate: float, epochs: int, arguments: Any) -> dict[str, Any]:
    """A 4-block ViT of some width at some learning rate: its loss on the validation split and its cost."""
    data = small_vits.images(arguments.quick, arguments.images)
    model = small_vits.vit(data, 0, width, width // HEAD, depth=4)
    train = small_vits.training(
        epochs, learning_rate=rate, keep="last", mup_base_width=BASE if rule == "µP" else None
    )
    flops = training_flops(model.module, model.spec.input) * images_of(train, data)
    name = f"{'mup' if rule == 'µP' else 'standard'}-{width}-{rate:g}"
    folder = small_vits.RUNS / f"growth{'-quick' if arguments.quick else ''}" / name
    made = small_vits.trained(model, train, data, 0, folder)
    return {"loss": loss(made, data), "flops": flops}


def loss(model: Model, data: Any) -> float:
    """Mean cross-entropy on the validation split."""
    logits, targets = predict(torch_predictor(model), data.val.evaluation_batches(model.spec.input, 250))
    return float(torch.nn.functional.cross_entropy(torch.from_numpy(logits), torch.from_numpy(targets)))


def best_rate(cells: dict[str, Any], rule: str, width: int, rates: tuple[float, ...]) -> float:
    """The learning rate of the lowest loss."""
    return min(rates, key=lambda rate: cells[f"{rule}, width {width}, rate {rate:g}"]["loss"])


def summary(cells: dict[str, Any], seeds: list[int], rates: tuple[float, ...]) -> dict[str, Any]:
    """The bars: accuracy for operations, the transferred rate, the foretold loss."""
    grown, scratch = ([cells[f"{name}, seed {seed}"] for seed in seeds] for name in ("grown", "from scratch"))
    best = {
        f"{rule}, width {width}": best_rate(cells, rule, width, rates)
        for rule in ("µP", "standard")
        for width in (BASE, LARGE)
    }
    rate = best[f"µP, width {BASE}"]
    small = [cells[f"µP, width {width}, rate {rate:g}"] for width in SMALL]
    large = cells[f"µP, width {LARGE}, rate {rate:g}"]
    curve = fit_loss([item["flops"] for item in small], [item["loss"] for item in small])
    foretold = curve.predict(large["flops"])
    figures = {
        "accuracy_difference": statistics.mean(
            a["accuracy"] - b["accuracy"] for a, b in zip(grown, scratch, strict=True)
        ),
        "flops_ratio": max(a["flops"] / b["flops"] for a, b in zip(grown, scratch, strict=True)),
        "plain": all(item["masks_left"] == 0 and item["same_spec"] for item in grown),
        "best_rates": best,
        "transfers": best[f"µP, width {BASE}"] == best[f"µP, width {LARGE}"],
        "foretold_loss": foretold.loss,
        "foretold_interval": [foretold.low, foretold.high],
        "measured_loss": large["loss"],
        "foretold_error": foretold.error(large["loss"]),
    }
    return {**figures, "passes": not missed(figures)}


def missed(figures: dict[str, Any]) -> list[str]:
    """A line for each bar that is not met."""
    lines = []
    if figures["accuracy_difference"] < 0:
        lines.append(f"missed: grown is {-100 * figures['accuracy_difference']:.2f} points less accurate")
    if figures["flops_ratio"] > FLOPS_BAR:
        lines.append(f"missed: growth cost {figures['flops_ratio']:.3f} of the operations, bar {FLOPS_BAR}")
    if not figures["plain"]:
        lines.append("missed: the grown network is not the plain one")
    if not figures["transfers"]:
        lines.append("missed: the best rate under µP is another one at four times the width")
    return lines


def report(
    cells: dict[str, Any], seeds: list[int], rates: tuple[float, ...], figures: dict[str, Any]
) -> None:
    rows = []
    for name in ("from scratch", "grown"):
        found = [cells[f"{name}, seed {seed}"] for seed in seeds]
        accuracy = 100 * statistics.mean(item["accuracy"] for item in found)
        rows.append((name, accuracy, found[0]["epochs"], found[0]["flops"] / 1e15))
    common.table(
        "12-block ViT on Fashion-MNIST, test split", ("training", "accuracy %", "epochs", "PFLOP"), rows
    )
    common.table(
        "Validation loss by learning rate",
        ("width", *(f"{rate:g}" for rate in rates)),
        [
            (f"{rule}, {width}", *(cells[f"{rule}, width {width}, rate {rate:g}"]["loss"] for rate in rates))
            for rule in ("µP", "standard")
            for width in (BASE, LARGE)
        ],
    )
    low, high = figures["foretold_interval"]
    common.console.print(
        f"loss at width {LARGE}: foretold {figures['foretold_loss']:.4f} ({low:.4f} to {high:.4f}), measured "
        f"{figures['measured_loss']:.4f}, error {100 * figures['foretold_error']:.1f}%"
    )
    for line in missed(figures):
        common.console.print(line)


if __name__ == "__main__":
    torch.set_num_threads(1)
    main()
