"""ONNX Runtime as it computes on an x86 processor without VNNI, emulated by QEMU's user mode.

`-cpu Haswell` has AVX2 and nothing newer, so ONNX Runtime takes the kernels that add products in 16 bits and clip. What
it computes there is bit for bit what such a processor computes; how long it takes says nothing.
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import onnxruntime

from cveff.errors import MissingDependencyError
from cveff.files import atomic_path
from cveff.runtime.manifest import sha256

EMULATOR = "qemu-x86_64"
CPU = "Haswell"
CHUNK = 25
CHILD = Path(__file__).parent / "emulated_child.py"


def missing() -> str | None:
    """Why nothing can be emulated here, or None."""
    if shutil.which(EMULATOR) is None:
        return f"{EMULATOR} is not installed (Debian: apt-get install qemu-user)"
    return None


def emulated_logits(path: Path, inputs: np.ndarray, folder: Path, jobs: int = 1) -> np.ndarray:
    """What the file answers there, one image at a time on one thread.

    Args:
        path: an ONNX file.
        inputs: (N, …) as the file takes them.
        folder: where finished chunks are kept; a run that was stopped takes them up if the file is the same.
        jobs: chunks computed at a time.

    Returns:
        (N, classes) float32.

    Raises:
        MissingDependencyError: there is no emulator.
        RuntimeError: ONNX Runtime failed there.
    """
    reason = missing()
    if reason is not None:
        raise MissingDependencyError(reason)
    kept = folder / f"{CPU.lower()}-{sha256(path)[:12]}-{len(inputs)}"
    kept.mkdir(parents=True, exist_ok=True)
    np.save(kept / "inputs.npy", inputs)
    starts = range(0, len(inputs), CHUNK)
    with ThreadPoolExecutor(jobs) as pool:
        parts = list(pool.map(lambda first: _chunk(path, kept, first, len(inputs)), starts))
    (kept / "inputs.npy").unlink()
    return np.concatenate(parts)


def _chunk(path: Path, kept: Path, first: int, count: int) -> np.ndarray:
    saved = kept / f"{first}.npy"
    if not saved.is_file():
        with atomic_path(saved) as temporary:
            written = temporary.with_suffix(".part.npy")
            last = min(first + CHUNK, count)
            try:
                _run([str(path), str(kept / "inputs.npy"), str(written), str(first), str(last)])
                temporary.write_bytes(written.read_bytes())
            finally:
                written.unlink(missing_ok=True)
    return np.load(saved)


def _run(arguments: list[str]) -> None:
    # An environment's python is a link that the emulated program could not follow to its packages.
    python = str(Path(sys.executable).resolve())
    packages = str(Path(onnxruntime.__file__).parents[1])
    done = subprocess.run(
        [EMULATOR, "-cpu", CPU, python, str(CHILD), *arguments],
        capture_output=True,
        text=True,
        check=False,
        env={**os.environ, "PYTHONPATH": packages, "OMP_NUM_THREADS": "1"},
    )
    if done.returncode:
        lines = [line for line in done.stderr.splitlines() if line.strip() and "TCG doesn't" not in line]
        raise RuntimeError(lines[-1][:300] if lines else f"exit {done.returncode}")
