"""Detectors as predictors: detections in one array, whichever of network, file and numpy suppresses."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import nn

from cveff.measure.predictor import TorchPredictor
from cveff.model import Model
from cveff.runtime.detections import Detections, Suppression, suppress, unpad
from cveff.runtime.session import Session
from cveff.tasks.suppress import Suppressed


class FileDetector:
    """A file as a predictor: uint8 (N, H, W, C) -> (N, D, 6) float32 of box, score and label; -1 labels no detection.

    Args:
        session: the file, opened.
        suppression: what is done to its boxes and scores where it does not suppress by itself.
    """

    def __init__(self, session: Session, suppression: Suppression) -> None:
        self.threads, self.size, self.channels = session.threads, session.size, session.channels
        self._session, self._suppression = session, suppression

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """Errors as `Session`."""
        outputs = self._session.outputs(images)
        boxes, scores = outputs["boxes"], outputs["scores"]
        if "labels" in outputs:
            return _packed(boxes, scores, outputs["labels"])
        packed = np.zeros((len(boxes), self._suppression.max_detections, 6), np.float32)
        packed[..., 5] = -1
        for row, image in zip(packed, zip(boxes, scores, strict=True), strict=True):
            found = suppress(*image, self._suppression)
            row[: len(found["scores"])] = _packed(*(found[key] for key in ("boxes", "scores", "labels")))
        return packed

    def close(self) -> None:
        """Free the engine's memory."""
        self._session.close()


def torch_detector(model: Model, threads: int | None = None) -> TorchPredictor:
    """The same of a model in PyTorch, which suppresses by torchvision's operator."""
    network: Any = model.module
    return TorchPredictor(_Packed(Suppressed(network, network.suppression)), model.spec.input, threads)


def unpacked(packed: np.ndarray) -> list[Detections]:
    """(N, D, 6) -> the detections of each image."""
    return [unpad(image[:, :4], image[:, 4], image[:, 5].astype(np.int64)) for image in packed]


def _packed(boxes: np.ndarray, scores: np.ndarray, labels: np.ndarray) -> np.ndarray:
    parts = (boxes, scores[..., None], labels[..., None].astype(np.float32))
    result: np.ndarray = np.concatenate(parts, -1)
    return result


class _Packed(nn.Module):
    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        boxes, scores, labels = self.network(x)[:3]
        return torch.cat((boxes, scores[..., None], labels[..., None].float()), -1)
