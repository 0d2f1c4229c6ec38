"""Who makes an int8 file of a network for `quantize_peers.py`, each from the same images, for the same engine.

Peers get one plain `torch.onnx.export` file of floats and are called as their documentation does; ONNX Runtime and
modelopt also as they are advised for this engine. cveff's file takes uint8 pixels and normalises them inside.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import modelopt_peer
import numpy as np
import peers

import cveff
from cveff.compress.quantize import Quantize
from cveff.data import Data, calibration_images
from cveff.files import atomic_path
from cveff.model import Model

OURS, OURS_NARROW = "cveff", "cveff, for CPUs without VNNI"
ONNXRUNTIME, NNCF, MODELOPT = "ONNX Runtime, default", "NNCF, default", "modelopt, default"
ONNXRUNTIME_CPU, MODELOPT_FP32 = "ONNX Runtime, U8S8 per channel", "modelopt, fp32 beside int8"
OURS_FILES = (OURS, OURS_NARROW)
RIVALS = (ONNXRUNTIME, NNCF, MODELOPT, MODELOPT_FP32)
"""What cveff is held against: every tool's default. modelopt's leaves in fp16 what it does not round to int8, and ONNX
Runtime's optimiser (`WeightBiasQuantization`, 1.31) gets some such files wrong; so its fp32 counts as its default too.
"""


@dataclass(frozen=True)
class Job:
    """What a tool starts from.

    Attributes:
        source: the plain float32 file.
        images: how many to calibrate on, of `data.train`, drawn by `seed`.
        modelopt: the Python that has it.
    """

    model: Model
    data: Data
    source: Path
    images: int
    seed: int
    modelopt: Path

    @property
    def calibration(self) -> np.ndarray:
        """The images, as `source` takes them: (N, C, H, W) float32."""
        assert self.data.train is not None
        spec = self.model.spec.input
        return peers.normalised(calibration_images(self.data.train, spec, self.images, self.seed), spec)


def _ours(job: Job, destination: Path, saturation: str) -> None:
    step = Quantize(images=job.images, saturation=saturation)  # type: ignore[arg-type]
    cveff.export(cveff.apply(job.model, step, data=job.data, seed=job.seed), destination)


TOOLS: dict[str, Callable[[Job, Path], object]] = {
    OURS: lambda job, path: _ours(job, path, "ignore"),
    ONNXRUNTIME: lambda job, path: peers.onnxruntime_int8(job.source, path, job.calibration, arguments=False),
    ONNXRUNTIME_CPU: lambda job, path: peers.onnxruntime_int8(job.source, path, job.calibration),
    NNCF: lambda job, path: peers.nncf_onnx_int8(job.source, path, job.calibration),
    MODELOPT: lambda job, path: modelopt_peer.modelopt_int8(
        job.modelopt, job.source, path, job.calibration, "fp16"
    ),
    MODELOPT_FP32: lambda job, path: modelopt_peer.modelopt_int8(
        job.modelopt, job.source, path, job.calibration, "fp32"
    ),
    OURS_NARROW: lambda job, path: _ours(job, path, "narrow"),
}


def make(tool: str, job: Job, path: Path) -> Path:
    """The tool's int8 file at `path`, made if it is not there.

    Raises:
        Exception: whatever the tool raises.
    """
    if not path.is_file():
        path.parent.mkdir(parents=True, exist_ok=True)
        with atomic_path(path) as temporary:
            TOOLS[tool](job, temporary)
    return path
