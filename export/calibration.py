"""Checks on calibration images for a file."""

from __future__ import annotations

import numpy as np
import onnx

from cveff.errors import ExportError
from cveff.export.graph import image_shape


def check_calibration(images: np.ndarray, proto: onnx.ModelProto) -> None:
    """Refuse calibration images that the graph could not take.

    Raises:
        ExportError: not uint8, not (N, H, W, C) of the graph's size, or none at all.
    """
    if not isinstance(images, np.ndarray) or images.dtype != np.uint8 or images.ndim != 4:
        what = (
            f"an array {images.shape} of {images.dtype}"
            if isinstance(images, np.ndarray)
            else type(images).__name__
        )
        raise ExportError(f"calibration images are {what}; give a numpy array (N, H, W, C) of uint8")
    if len(images) == 0:
        raise ExportError("there are no calibration images; give at least one, better 100 to 500")
    shape = image_shape(proto)
    if images.shape[1:] != shape:
        raise ExportError(
            f"calibration images are {'×'.join(map(str, images.shape[1:]))} (H×W×C), the model takes "
            f"{'×'.join(map(str, shape))}; pass them through cveff.runtime.preprocess first"
        )
