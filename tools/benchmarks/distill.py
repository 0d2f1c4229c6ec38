"""Distillation on the embedded digits: a student a tenth of its teacher's size, with every method and without any.

python tools/benchmarks/distill.py
"""

from __future__ import annotations

import argparse
import statistics
from dataclasses import replace
from pathlib import Path

import common
import torch

import cveff
from cveff.compress import Distill
from cveff.data import load as load_data
from cveff.model import Model
from cveff.pipeline import create_for, evaluate
from cveff.recipe import ModelSettings, read_recipe

STUDENT = {"widths": [6, 10, 14], "depths": [1, 1, 1]}
METHODS = ("labels only", "logits", "dist", "features", "hard", "function-matching")
COLUMNS = ("loss", "accuracy %", "±", "gain, points", "±")


def step(method: str, epochs: int) -> Distill:
    """The method at its defaults, trained as the zoo's recipe for digits trains."""
    train = read_recipe("digits").train
    assert train is not None
    train = replace(train, epochs=epochs, warmup_epochs=min(train.warmup_epochs, epochs), label_smoothing=0.0)
    if method == "labels only":
        return Distill(alpha=0.0, train=train)
    if method == "function-matching":
        mixed = replace(train.augmentation, mixup=1.0)
        return Distill(method=method, train=replace(train, augmentation=mixed, clip_norm=5.0))
    return Distill(method=method, train=replace(train, clip_norm=5.0))


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").split("\n\n")[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2, 3, 4])
    parser.add_argument("--epochs", type=int, default=30)
    parser.add_argument("--quick", action="store_true", help="one epoch, one seed")
    parser.add_argument("--fresh", action="store_true", help="measure again what is in the JSON file")
    parser.add_argument("--out", type=Path, help="JSON file; by default model_zoo/results/distill.json")
    arguments = parser.parse_args()
    seeds, epochs = (arguments.seeds[:1], 1) if arguments.quick else (arguments.seeds, arguments.epochs)
    out = arguments.out or common.output("distill.json", arguments.quick)
    results = common.Results(out, __file__, {"epochs": epochs, "student": STUDENT}, fresh=arguments.fresh)
    found = results.values.setdefault("seeds", {})
    for seed in seeds:
        if str(seed) not in found:
            found[str(seed)] = one_seed(seed, epochs)
            results.save()
    results.save()
    common.table(
        f"digits, test split, {len(seeds)} seeds",
        COLUMNS,
        [row(method, [found[str(seed)] for seed in seeds]) for method in METHODS],
        note="± is the standard deviation over seeds; gains are against labels only, seed by seed.",
    )


def one_seed(seed: int, epochs: int) -> dict[str, float]:
    """Accuracy by method, of students that began with the same weights, and of their teacher."""
    data = load_data("digits", seed=seed)
    teacher = train_from(create_for(ModelSettings(), data, seed=seed), "labels only", epochs, seed)
    student = create_for(ModelSettings(arguments=STUDENT), data, seed=seed)
    values = {"teacher": evaluate(teacher, data), "parameters": student.num_parameters}
    values["teacher_parameters"] = teacher.num_parameters
    for method in METHODS:
        values[method] = evaluate(train_from(student, method, epochs, seed, teacher), data)
    return values


def train_from(model: Model, method: str, epochs: int, seed: int, teacher: Model | None = None) -> Model:
    data = load_data("digits", seed=seed)
    return cveff.apply(model, step(method, epochs), data=data, seed=seed, teacher=teacher)


def row(method: str, seeds: list[dict[str, float]]) -> tuple[object, ...]:
    accuracy = [100 * values[method] for values in seeds]
    gains = [100 * (values[method] - values["labels only"]) for values in seeds]
    return (method, statistics.mean(accuracy), spread(accuracy), statistics.mean(gains), spread(gains))


def spread(values: list[float]) -> float:
    return statistics.stdev(values) if len(values) > 1 else 0.0


if __name__ == "__main__":
    torch.set_num_threads(1)  # tiny networks gain nothing from more, and one thread repeats bit for bit
    main()
