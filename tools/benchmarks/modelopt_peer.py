"""`nvidia-modelopt`'s ONNX post-training quantization and AutoCast, in an environment of its own (other packages)."""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import common
import numpy as np

from cveff.errors import MissingDependencyError

PACKAGE = "nvidia-modelopt[onnx]"
ENVIRONMENT = common.ROOT / ".venv-modelopt"
CHILD = Path(__file__).parent / "modelopt_child.py"


def interpreter(python: Path | None) -> Path:
    """The Python that has modelopt: the one given, or that of an environment made the first time.

    Raises:
        MissingDependencyError: it cannot be installed.
    """
    if python is not None:
        return python
    folder = "Scripts" if sys.platform == "win32" else "bin"
    python = ENVIRONMENT / folder / "python"
    if not (ENVIRONMENT / "complete").is_file():
        venv.create(ENVIRONMENT, with_pip=True, clear=True)
        try:
            _run(python, "-m", "pip", "install", "--quiet", PACKAGE)
        except RuntimeError as error:
            raise MissingDependencyError(
                f"{PACKAGE} cannot be installed in {ENVIRONMENT.name}: {error}"
            ) from error
        (ENVIRONMENT / "complete").touch()
    return python


def versions(python: Path) -> dict[str, str]:
    """Versions of what computes there."""
    return json.loads(_run(python, str(CHILD), "version"))


def modelopt_int8(
    python: Path, source: Path, destination: Path, calibration: np.ndarray, others: str
) -> Path:
    """`modelopt.onnx.quantization.quantize(..., quantize_mode="int8")` with its defaults.

    Args:
        calibration: (N, C, H, W) float32, normalised.
        others: "fp16", modelopt's default, or "fp32": type of what is not rounded to 8 bits.

    Raises:
        RuntimeError: modelopt failed; the last line of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        # It writes intermediate files beside its input.
        copied = Path(folder) / "float.onnx"
        copied.write_bytes(source.read_bytes())
        written, saved = Path(folder) / "int8.onnx", Path(folder) / "calibration.npy"
        np.save(saved, calibration)
        _run(python, str(CHILD), "quantize", str(copied), str(written), str(saved), others)
        destination.write_bytes(written.read_bytes())
    return destination


def autocast(python: Path, source: Path, destination: Path, images: np.ndarray) -> float:
    """`modelopt.onnx.autocast.convert_to_mixed_precision` to float16 with its defaults, inputs and outputs as they are.

    Args:
        images: (N, H, W, C) uint8, what it looks at values on.

    Returns:
        seconds it took.

    Raises:
        RuntimeError: modelopt failed; the last line of what it wrote.
    """
    with tempfile.TemporaryDirectory() as folder:
        saved = Path(folder) / "images.npz"
        np.savez(saved, images=images)
        written = _run(python, str(CHILD), "autocast", str(source), str(destination), str(saved))
    return float(written.strip().splitlines()[-1])


def _run(python: Path, *arguments: str) -> str:
    """Standard output of a command."""
    done = subprocess.run([str(python), *arguments], capture_output=True, text=True, check=False)
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        raise RuntimeError(lines[-1].strip()[:300] if lines else f"exit {done.returncode}")
    return done.stdout
