"""Quantization-aware training for `quantize_peers.py`: what the file loses, and that it computes what was simulated.

Ours alone: rounded by `Quantize`, then trained with the float32 network as its teacher, then exported.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import common
import numpy as np
import peers

import cveff
from cveff.compress import Distill
from cveff.compress.quantize import Quantize
from cveff.data import Data
from cveff.measure import agreement, predict, top1, torch_predictor
from cveff.measure.accuracy import change
from cveff.model import Model
from cveff.train import Train


def aware_row(
    model: Model,
    data: Data,
    train: Train,
    *,
    images: int,
    seed: int,
    folder: Path,
    threads: int,
    reference: np.ndarray,
) -> dict[str, Any]:
    """Accuracy before and after on the test images, and how many of them file and simulation answer alike.

    Args:
        train: how the rounded network is trained.
        images: to calibrate on.
        folder: where the rounded and the trained network are kept; a training that was stopped goes on.
        reference: (N, classes), the float32 file's logits of the test images.
    """
    progress = common.Lines("quantization-aware")
    step = Quantize(images=images, saturation="ignore")
    rounded = _kept(folder / "rounded", lambda: cveff.apply(model, step, data=data, seed=seed))
    trained = _kept(
        folder / "trained",
        lambda: cveff.apply(
            rounded,
            Distill(train=train),
            data=data,
            seed=seed,
            teacher=model,
            progress=progress,
            folder=folder / "training",
            resume=True,
        ),
    )
    rows: dict[str, Any] = {"train": dataclasses.asdict(train)}
    for name, network in (("post-training", rounded), ("quantization-aware", trained)):
        path = cveff.export(network, folder / f"{name}.onnx")
        batches = list(data.evaluation.evaluation_batches(model.spec.input, 250))
        simulated, targets = predict(torch_predictor(network, threads), batches)
        deployed, _ = predict(peers.open_onnxruntime(path, threads), batches)
        assert targets is not None
        rows[name] = {
            "simulated_accuracy": top1(simulated, targets),
            "accuracy": top1(deployed, targets),
            "points_lost": -100 * change(deployed, reference, targets).difference,
            "same_top1": agreement(simulated, deployed),
            "images": len(targets),
            "largest_difference": float(np.abs(simulated - deployed).max() / np.abs(simulated).max()),
            "bytes": path.stat().st_size,
        }
    return rows


def _kept(saved: Path, make: Any) -> Model:
    """The network in the folder `saved`, made if it is not there."""
    if (saved / "model.json").is_file():
        return cveff.load(saved)
    model: Model = make()
    cveff.save(model, saved)
    return model
