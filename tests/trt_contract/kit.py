"""Gets the real Python bindings of a TensorRT release: from the package index, with stub libraries made by gcc."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RELEASES = {
    "10.7": ("tensorrt-cu12-bindings==10.7.0", 10),  # the last release 10 that knows Jetson's DLA
    "11.4": ("tensorrt-cu13-bindings==11.4.0.106", 11),
}
LIBRARIES = ("nvinfer", "nvinfer_plugin", "nvonnxparser")
HERE = Path(__file__).parent


class KitError(Exception):
    """The bindings cannot be had here."""


@dataclass(frozen=True)
class Kit:
    """Bindings in a folder: `site` with the package `tensorrt_bindings`, the libraries it loads, `api.json`."""

    folder: Path

    @property
    def api(self) -> dict[str, Any]:
        """What `dump_api` printed."""
        values: dict[str, Any] = json.loads((self.folder / "api.json").read_text(encoding="utf-8"))
        return values

    def python(self, *arguments: str) -> str:
        """What a Python process that can import the bindings prints.

        Raises:
            KitError: it failed.
        """
        paths = os.pathsep.join([str(self.folder / "site"), *filter(None, [os.environ.get("PYTHONPATH")])])
        environment = {**os.environ, "LD_LIBRARY_PATH": str(self.folder), "PYTHONPATH": paths}
        return _run([sys.executable, *arguments], "Python failed", environment)


def get_kit(release: str, cache: Path) -> Kit:
    """The kit of `RELEASES[release]`, kept in `cache`.

    Raises:
        KitError: says what is missing.
    """
    requirement, major = RELEASES[release]
    kept = cache / f"{requirement}-{sys.implementation.cache_tag}"
    if (kept / "api.json").is_file():
        return Kit(kept)
    compiler = shutil.which("gcc") or shutil.which("cc")
    if compiler is None:
        raise KitError("no C compiler (gcc) for the stub libraries")
    with tempfile.TemporaryDirectory(dir=cache) as work:
        new = Path(work) / "kit"
        pip = [sys.executable, "-m", "pip", "install", "--quiet", "--no-deps", "--target", str(new / "site")]
        _run([*pip, requirement], f"{requirement} cannot be installed")
        for library in LIBRARIES:
            name = f"lib{library}.so.{major}"
            command = [compiler, "-shared", "-fPIC", f"-Wl,-soname,{name}", "-o", str(new / name)]
            _run([*command, str(HERE / "stub.c")], "the stub libraries cannot be compiled")
        (new / "api.json").write_text(Kit(new).python(str(HERE / "dump_api.py")), encoding="utf-8")
        if not kept.exists():  # another test process may have been faster
            new.rename(kept)
    return Kit(kept)


def _run(command: list[str], what: str, environment: dict[str, str] | None = None) -> str:
    result = subprocess.run(command, capture_output=True, text=True, env=environment, check=False)
    if result.returncode:
        lines = result.stderr.strip().splitlines()
        raise KitError(f"{what}: {lines[-1] if lines else f'exit code {result.returncode}'}")
    return result.stdout
