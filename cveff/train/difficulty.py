"""How difficult training images are, one number each: from the picture alone, or from what a proxy network says of it.

| metric | difficulty | source |
|---|---|---|
| `edges` | mean gradient of the brightness | – |
| `jpeg` | bytes of the image as a JPEG: what is left when it is compressed | Cramming's filter, arXiv:2212.14034 |
| `loss` | cross-entropy of the proxy | Data Efficiency, arXiv:2212.03597 |
| `confidence` | 1 - probability of the right class | airbench, arXiv:2404.00498 |
| `margin` | probability of the likeliest wrong class minus that of the right one | – |
| `el2n` | length of the error, ‖p - y‖₂ | Paul et al., arXiv:2107.07075, equation 4 |
| `neighbours` | share of the nearest images, by the proxy's features, that have another label | – |
| `random` | a number drawn for each image: what others are compared with | – |
"""

from __future__ import annotations

import io
from collections.abc import Callable
from typing import Literal, get_args

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.data.augment import normalize
from cveff.data.dataset import Split
from cveff.data.decoding import prepare_many
from cveff.data.randomness import generator
from cveff.errors import StepError, TrainingError
from cveff.runtime.input_spec import InputSpec

Metric = Literal["edges", "jpeg", "loss", "confidence", "margin", "el2n", "neighbours", "random"]
METRICS: tuple[Metric, ...] = get_args(Metric)
BY_PROXY: frozenset[Metric] = frozenset({"loss", "confidence", "margin", "el2n", "neighbours"})
"""Metrics that need a proxy network."""

NEIGHBOURS = 10
MOST_REFERENCES = 20_000
"""Images that neighbours are looked for among; of a larger set, evenly spaced ones."""

_BATCH = 256
_JPEG_QUALITY = 75
_RANDOM = 31


def require_metric(name: str, setting: str) -> Metric:
    """`name` as a metric.

    Raises:
        TrainingError: there is none of this name.
    """
    if name not in METRICS:
        raise TrainingError(f"{setting} is {name!r}, which is no metric; known: {', '.join(METRICS)}")
    return name  # type: ignore[return-value]


class Scorer:
    """One metric, ready to be asked about any images of a split.

    Args:
        metric: which.
        split: labelled images.
        spec: how a network takes them; picture metrics look at the same pixels.
        proxy: the network that metrics of `BY_PROXY` ask, on the CPU or a GPU.
        seed: of "random".

    Raises:
        StepError: the metric needs a proxy, or features that this one does not give.
        DataError: the split has no labels.
    """

    def __init__(
        self, metric: Metric, split: Split, spec: InputSpec, proxy: nn.Module | None = None, seed: int = 0
    ) -> None:
        if metric in BY_PROXY and proxy is None:
            raise StepError(f"difficulty metric {metric!r} asks a proxy network; give one")
        self.metric, self.split, self.spec, self.seed = metric, split, spec, seed
        self._targets = split.class_indices()
        self._proxy = None if proxy is None else proxy.eval()
        self._references: tuple[Tensor, np.ndarray] | None = None

    def __call__(self, indices: np.ndarray) -> np.ndarray:
        """Difficulty of the images at `indices`, (len(indices),) float32; higher is harder.

        Raises:
            ImageError: a file is no longer readable.
        """
        if self.metric == "random":
            drawn = generator(_RANDOM, self.seed).random(len(self.split), dtype=np.float32)
            return drawn[indices]  # type: ignore[no-any-return]
        if self.metric == "neighbours":
            return self._disagreement(indices)
        parts = []
        for begin in range(0, len(indices), _BATCH):
            some = indices[begin : begin + _BATCH]
            images = prepare_many(self.split, some, self.spec)
            parts.append(
                _of_logits(self.metric, self._logits(images), self._targets[some])
                if self.metric in BY_PROXY
                else _PICTURE[self.metric](images)
            )
        return np.concatenate(parts).astype(np.float32)

    def _logits(self, images: np.ndarray) -> np.ndarray:
        assert self._proxy is not None
        device = next((value.device for value in self._proxy.parameters()), torch.device("cpu"))
        with torch.inference_mode():
            logits: np.ndarray = self._proxy(normalize(images, self.spec).to(device)).float().cpu().numpy()
        return logits

    def _features(self, indices: np.ndarray) -> Tensor:
        """Rows of length 1, (len(indices), D) float32: what the proxy's classifier is given."""
        assert self._proxy is not None
        classifier = getattr(self._proxy, "get_classifier", lambda: None)()
        if not isinstance(classifier, nn.Module) or isinstance(classifier, nn.Identity):
            raise StepError(
                f"difficulty metric 'neighbours' needs the input of the proxy's classifier, which "
                f"{type(self._proxy).__name__} does not tell; use another proxy or another metric"
            )
        given: list[Tensor] = []
        handle = classifier.register_forward_pre_hook(
            lambda _, inputs: given.append(inputs[0].flatten(1).float().cpu())
        )
        try:
            for begin in range(0, len(indices), _BATCH):
                self._logits(prepare_many(self.split, indices[begin : begin + _BATCH], self.spec))
        finally:
            handle.remove()
        return F.normalize(torch.cat(given), dim=1)

    def _disagreement(self, indices: np.ndarray) -> np.ndarray:
        if self._references is None:
            count = min(MOST_REFERENCES, len(self.split))
            chosen = np.linspace(0, len(self.split) - 1, count).astype(np.int64)
            self._references = (self._features(chosen), chosen)
        features, chosen = self._references
        if len(chosen) < 2:
            raise StepError("difficulty metric 'neighbours' needs two images or more")
        near = min(NEIGHBOURS, len(chosen) - 1)
        shares = []
        for begin in range(0, len(indices), _BATCH):
            some = indices[begin : begin + _BATCH]
            likeness = self._features(some) @ features.T  # (B, references)
            likeness[torch.from_numpy(some[:, None] == chosen)] = -2.0  # an image is no neighbour of itself
            nearest = chosen[likeness.topk(near, dim=1).indices.numpy()]
            shares.append((self._targets[nearest] != self._targets[some][:, None]).mean(axis=1))
        return np.concatenate(shares).astype(np.float32)


def _of_logits(metric: Metric, logits: np.ndarray, targets: np.ndarray) -> np.ndarray:
    """(B, classes) float32 and (B,) int64 to (B,)."""
    shifted = logits.astype(np.float64) - logits.max(axis=1, keepdims=True)
    logs = shifted - np.log(np.exp(shifted).sum(axis=1, keepdims=True))
    rows, probabilities = np.arange(len(targets)), np.exp(logs)
    right = probabilities[rows, targets]
    if metric == "loss":
        return -logs[rows, targets]  # type: ignore[no-any-return]
    if metric == "confidence":
        return 1 - right  # type: ignore[no-any-return]
    probabilities[rows, targets] -= 1
    if metric == "el2n":
        return np.linalg.norm(probabilities, axis=1)  # type: ignore[no-any-return]
    probabilities[rows, targets] = -np.inf  # of one class alone there is no wrong one
    return np.maximum(probabilities.max(axis=1), 0) - right  # type: ignore[no-any-return]


def _edges(images: np.ndarray) -> np.ndarray:
    """Mean absolute difference between neighbouring pixels, (B,)."""
    grey = images.astype(np.float32).mean(axis=3)  # (B, H, W)
    count = max(1, grey[0].size)
    down, across = np.abs(np.diff(grey, axis=1)), np.abs(np.diff(grey, axis=2))
    return (down.sum(axis=(1, 2)) + across.sum(axis=(1, 2))) / count  # type: ignore[no-any-return]


def _jpeg(images: np.ndarray) -> np.ndarray:
    """Bytes of each image as a JPEG, (B,)."""
    sizes = []
    for image in images:
        buffer = io.BytesIO()
        Image.fromarray(image[:, :, 0] if image.shape[2] == 1 else image).save(
            buffer, "JPEG", quality=_JPEG_QUALITY
        )
        sizes.append(buffer.tell())
    return np.array(sizes)


_PICTURE: dict[Metric, Callable[[np.ndarray], np.ndarray]] = {"edges": _edges, "jpeg": _jpeg}
