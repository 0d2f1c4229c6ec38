"""Train a zoo recipe, deploy it as int8, measure the deployed file: shared by the Fashion-MNIST and digits benchmarks.

Choices (epoch, int8 candidate) are made on the validation split; figures are of the evaluation split alone.
"""

from __future__ import annotations

import dataclasses
import os
from pathlib import Path
from typing import Any

import common
import numpy as np

import cveff
from cveff.console import working
from cveff.data import Data
from cveff.data import load as load_data
from cveff.measure import compare, predict, size_bytes, top1, torch_predictor
from cveff.measure.accuracy import change
from cveff.model import Model
from cveff.pipeline import run as run_pipeline
from cveff.recipe import Recipe, read_recipe
from cveff.runtime.engines import open_file

ZOO_WEIGHTS = common.ROOT / "model_zoo" / "weights"


def target(threads: int) -> cveff.Target:
    """int8 on the engines of edge-cpu: the figure is of an int8 file, whatever would be faster."""
    return cveff.Target(
        name="int8-only",
        description="Whatever int8 file a CPU engine runs best; nothing else is allowed.",
        candidates=(("onnxruntime", "int8"), ("openvino", "int8")),
        threads=threads,
        batch_sizes=(1, 8),
    )


def one_run(
    recipe_name: str, seed: int, folder: Path, *, threads: int, seconds: float, epochs: int | None = None
) -> tuple[Model, dict[str, Any]]:
    """Train (or take up a finished `folder / "model"`), deploy, measure.

    Args:
        folder: where the run keeps its state; a run that was stopped goes on.
        epochs: fewer than the recipe's, for a quick look.
    """
    overrides = {} if epochs is None else {"train.epochs": epochs, "train.warmup_epochs": 0.0}
    recipe = dataclasses.replace(read_recipe(recipe_name, overrides), seed=seed)
    model, trained_here = _trained(recipe, folder)
    data = load_data(recipe.data.source, seed=seed)
    assert recipe.deploy is not None
    with working() as progress:
        deployment = cveff.deploy(
            model,
            data=data,
            target=target(threads),
            max_accuracy_drop=100 if epochs is not None else recipe.deploy.max_accuracy_drop,
            out=folder / "int8.bundle",
            seed=seed,
            recipe=recipe.to_json(),
            progress=progress,
        )
    found = measure(model, deployment.path, data, threads, seconds)
    found["chosen"] = {key: deployment.chosen[key] for key in ("engine", "precision", "why")}
    found["trained_by_this_command"] = trained_here
    found["recipe"] = recipe.to_json()
    return model, found


def measure(model: Model, bundle: Path, data: Data, threads: int, seconds: float) -> dict[str, Any]:
    """Accuracy of the deployed file and of the float32 module on every image, and their times."""
    spec, split = model.spec.input, data.evaluation
    reference, targets = predict(torch_predictor(model, threads), split.evaluation_batches(spec, 250))
    with cveff.runtime.open(bundle, threads=threads) as engine:
        logits, _ = predict(engine.logits, split.evaluation_batches(spec, 250))
        assert targets is not None
        loss = change(logits, reference, targets)
        float_file = open_file("onnxruntime", bundle / "model.onnx", threads=threads)
        # Engines answer through a plain function, so the int8 file's engine reports its threads by itself.
        rivals = {
            "int8": _Threaded(engine.logits, threads),
            "onnxruntime fp32": float_file,
            "torch": torch_predictor(model, threads),
        }
        latency = {}
        for batch in (1, 8):
            images = next(iter(split.evaluation_batches(spec, batch)))[0]
            result = compare(rivals, images, reference="onnxruntime fp32", budget_seconds=seconds)
            latency[str(batch)] = {
                name: {
                    "median_ms": item.median_ms,
                    "spread": item.spread,
                    "speedup_over_fp32": item.speedup.to_json(),
                }
                for name, item in result.items()
            } | {"load_average": result.load}
        float_file.close()
    manifest_file = engine.manifest["engine"]["file"]
    return {
        "split": split.name,
        "images": len(targets),
        "parameters": model.num_parameters,
        "int8_accuracy": top1(logits, targets),
        "fp32_accuracy": top1(reference, targets),
        "loss_points": -100 * loss.difference,
        "loss_interval_points": [-100 * loss.interval[1], -100 * loss.interval[0]],
        "int8_bytes": size_bytes(bundle / manifest_file),
        "fp32_bytes": size_bytes(bundle / "model.onnx"),
        "latency": latency,
    }


class _Threaded:
    """A bound method with the number of threads that `compare` reports."""

    def __init__(self, call: Any, threads: int) -> None:
        self.call, self.threads = call, threads

    def __call__(self, images: np.ndarray) -> np.ndarray:
        answer: np.ndarray = self.call(images)
        return answer


def summary(seeds: dict[str, Any]) -> dict[str, Any]:
    """Mean and spread (largest minus smallest) over seeds."""
    runs = list(seeds.values())

    def over(key: str) -> dict[str, float]:
        values = [float(item[key]) for item in runs]
        return {
            "mean": float(np.mean(values)),
            "spread": max(values) - min(values),
            "smallest": min(values),
            "largest": max(values),
        }

    return {
        "seeds": seeds,
        "runs": len(runs),
        "images": runs[0]["images"],
        "parameters": runs[0]["parameters"],
        "int8_accuracy": over("int8_accuracy"),
        "fp32_accuracy": over("fp32_accuracy"),
        "loss_points": over("loss_points"),
        "int8_bytes": over("int8_bytes"),
    }


def row(name: str, values: dict[str, Any]) -> list[object]:
    """A line of the table; latency is that of the first seed."""
    first = next(iter(values["seeds"].values()))
    single = first["latency"]["1"]
    return [
        name,
        values["parameters"],
        values["runs"],
        f"{100 * values['int8_accuracy']['mean']:.2f} ± {50 * values['int8_accuracy']['spread']:.2f}",
        f"{100 * values['fp32_accuracy']['mean']:.2f}",
        f"{values['loss_points']['mean']:+.2f} (≤ {values['loss_points']['largest']:+.2f})",
        f"{first['int8_bytes'] / 1000:.0f} kB",
        f"{single['int8']['median_ms']:.3f}",
        f"{single['onnxruntime fp32']['median_ms']:.3f}",
        first["chosen"]["engine"],
    ]


COLUMNS = (
    "model",
    "parameters",
    "seeds",
    "int8 accuracy %, ± half the range",
    "fp32 %",
    "loss, points (largest)",
    "int8 file",
    "int8 ms",
    "fp32 ms",
    "engine",
)


def publish(model: Model, name: str) -> None:
    """Put a trained model in the zoo; then `python tools/update_cards.py` writes its hash and figures."""
    cveff.save(model, ZOO_WEIGHTS / name)


def _trained(recipe: Recipe, folder: Path) -> tuple[Model, bool]:
    if (folder / "model" / "model.json").is_file():
        return cveff.load(folder / "model"), (folder / "recipe.json").is_file()
    # The recipe's own deployment is left out: its target may choose float32.
    with working() as progress:
        result = run_pipeline(
            dataclasses.replace(recipe, deploy=None), out=folder, resume=True, progress=progress
        )
    return cveff.load(result.model), True


def default_threads() -> int:
    """Every core this process may use."""
    return len(os.sched_getaffinity(0))
