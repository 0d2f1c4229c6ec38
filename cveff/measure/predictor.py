"""`Predictor`, the one interface that is measured, and PyTorch modules made into one."""

from __future__ import annotations

from typing import TYPE_CHECKING, Protocol

import numpy as np

from cveff.errors import InputSizeError
from cveff.measure.threads import usable_cores
from cveff.runtime.input_spec import InputSpec

if TYPE_CHECKING:
    from torch import nn

    from cveff.model import Model


class Predictor(Protocol):
    """Anything callable on a batch; an attribute `threads` (int), if it has one, is reported with timings."""

    def __call__(self, images: np.ndarray, /) -> np.ndarray:
        """uint8 (N, H, W, C) -> float32 logits (N, classes)."""
        ...


class TorchPredictor:
    """A PyTorch module as a predictor: eager, evaluation mode, normalisation inside as in the exported graph.

    Attributes:
        threads: intra-op threads every call runs with; the process's own setting is put back after each call.
        engine: "torch".
    """

    engine = "torch"

    def __init__(self, module: nn.Module, spec: InputSpec, threads: int | None = None) -> None:
        import torch

        self.threads = usable_cores() if threads is None else threads
        self._module, self._spec = module.eval(), spec
        like = next((p for p in module.parameters() if p.is_floating_point()), torch.zeros(0))
        self._device, self._dtype = like.device, like.dtype
        shape = (1, spec.channels, 1, 1)
        # The exported graph's two constants: (x / 255 - mean) / std, written as (x - offset) * scale.
        mean, std = (torch.tensor(values, dtype=torch.float64) for values in (spec.mean, spec.std))
        self._offset = (255 * mean).float().view(shape).to(like.device)
        self._scale = (1 / (255 * std)).float().view(shape).to(like.device)

    def __call__(self, images: np.ndarray) -> np.ndarray:
        """uint8 (N, H, W, C) -> float32 logits (N, classes).

        Raises:
            InputSizeError: `images` is not a uint8 batch of the spec's size and channels.
        """
        import torch

        expected = (*self._spec.size, self._spec.channels)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[1:] != expected:
            raise InputSizeError(
                f"batch of shape {images.shape} and dtype {images.dtype}; the model takes uint8 (N, "
                f"{', '.join(map(str, expected))})"
            )
        before = torch.get_num_threads()
        torch.set_num_threads(self.threads)
        try:
            with torch.inference_mode():
                # torch wants to be able to write: read-only arrays are copied, others shared.
                writable = np.require(images, requirements=["C", "W"])
                pixels = torch.from_numpy(writable).to(self._device)
                # Permuted NHWC is channels_last in memory, the layout CPU convolutions like best.
                x = (pixels.permute(0, 3, 1, 2).float() - self._offset) * self._scale  # (N, C, H, W)
                logits: np.ndarray = self._module(x.to(self._dtype)).float().cpu().numpy()
                return logits
        finally:
            torch.set_num_threads(before)

    def close(self) -> None:
        """Nothing to release; there so that every predictor can be closed alike."""


def torch_predictor(model: Model, threads: int | None = None) -> TorchPredictor:
    """`model` as a predictor. Puts its module in evaluation mode.

    Args:
        threads: intra-op threads; by default every core this process may use.
    """
    return TorchPredictor(model.module, model.spec.input, threads)


def module_predictor(module: nn.Module, spec: InputSpec, threads: int | None = None) -> TorchPredictor:
    """A bare module, which takes normalised float (N, C, H, W), as a predictor of uint8 batches."""
    return TorchPredictor(module, spec, threads)
