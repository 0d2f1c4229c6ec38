"""Weight-only rows of two ViTs, as ONNX files in ONNX Runtime: one of common size, and one trained on Fashion-MNIST.

The first has random weights: what its file weighs, and that it computes what PyTorch does. The second is the benchmark
"prune_quality"'s (6 layers of width 128, 64×64): accuracy on the 10,000 test images, measured on the files.
"""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import common
import dense_models
import torch

import cveff
from cveff.compress.quantize import Quantize
from cveff.data import Data
from cveff.export.normalize import deployable
from cveff.export.onnx import difference
from cveff.measure import agreement, predict, size_bytes, top1
from cveff.model import Model
from cveff.runtime.engines import open_file

LARGE = "vit_small_patch16_224"
ROWS = {
    "fp32": None,
    "int8, group 64, nearest": Quantize(precision="int8-weights", weights="nearest"),
    "int4, group 64, nearest": Quantize(precision="int4-weights", weights="nearest"),
    "int4, group 64, compensated": Quantize(precision="int4-weights"),
}


def random_rows(data: Data, threads: int) -> dict[str, Any]:
    """Bytes, and the largest difference from PyTorch, of a common ViT; weights are rounded to the nearest."""
    torch.manual_seed(0)
    model = cveff.create(LARGE, num_classes=1000)
    names = [name for name, step in ROWS.items() if step is None or step.weights == "nearest"]
    rows, _ = _rows(model, names, data, None, threads)
    return {"architecture": LARGE, "weights": "random weights", "rows": rows}


def trained_rows(data: Data, folder: Path, threads: int, epochs: int | None) -> dict[str, Any]:
    """The same and the accuracy of a trained one, from `folder` if it is there."""
    model = dense_models.dense("vit", 0, data, folder, common.Lines("vit"), epochs)
    rows, images = _rows(model, list(ROWS), data, data, threads)
    return {
        "architecture": model.spec.architecture,
        "arguments": dict(model.spec.arguments),
        "weights": f"trained on Fashion-MNIST, {images} test images",
        "rows": rows,
    }


def _rows(
    model: Model, names: list[str], data: Data, judge: Data | None, threads: int
) -> tuple[dict[str, Any], int]:
    rows: dict[str, Any] = {}
    reference, images = None, 0
    with tempfile.TemporaryDirectory() as folder:
        for name in names:
            step = ROWS[name]
            changed = model if step is None else cveff.apply(model, step, data=data, seed=0)
            path = cveff.export(changed, Path(folder) / "model.onnx", check=False)
            size = size_bytes(path)
            network = deployable(changed.module, changed.spec.input)
            rows[name] = {
                "bytes": size,
                "size_ratio": size / rows.get("fp32", {"bytes": size})["bytes"],
                "difference_from_torch": difference(path.read_bytes(), network, changed),
            }
            if judge is None:
                continue
            with open_file("onnxruntime", path, threads=threads) as session:
                batches = judge.evaluation.evaluation_batches(model.spec.input, 250)
                logits, targets = predict(session, batches)
            assert targets is not None
            reference, images = logits if reference is None else reference, len(targets)
            rows[name] |= {
                "accuracy": top1(logits, targets),
                "agreement_with_fp32": agreement(logits, reference),
            }
    return rows, images
