"""Packages (`.pt2`) that AOTInductor compiled: machine code of one network, for processors like the one it was made on.

The one engine that needs torch, which is imported when a file is opened. What a package holds is read without it.
"""

from __future__ import annotations

import importlib
import json
import threading
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from .errors import EngineError
from .machine import missing_code_flags
from .session import Session, check_options, engine_message

KEY = "cveff"
"""Of the package's metadata: what `read_package` returns, as JSON."""


class AotSession(Session):
    """A `.pt2` package, on the device it was compiled for.

    There are no options: precision and device were decided when it was compiled.
    """

    engine = "aot-inductor"

    def __init__(self, path: Path, threads: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, threads)
        check_options(self.engine, options, {})
        about = read_package(path)
        self._device = about["device"]
        # Machine code with instructions the processor lacks does not fail, it kills the process.
        missing = missing_code_flags(about["code_flags"]) if self._device == "cpu" else []
        if missing:
            raise EngineError(
                f"{path} was compiled for a processor with {', '.join(missing)}, which this one lacks; deploy on this "
                "machine, or use another engine of the bundle"
            )
        try:
            self._torch: Any = importlib.import_module("torch")
            inductor: Any = importlib.import_module("torch._inductor")
        except ImportError as error:
            raise EngineError(
                f"PyTorch is not installed ({error}), which {path.name} runs on; "
                f"pip install torch=={about['torch']}, or use another engine of the bundle"
            ) from error
        if self._device == "cuda" and not self._torch.cuda.is_available():
            raise EngineError(f"{path} was compiled for a GPU, and PyTorch finds none here")
        try:
            self._package: Any = inductor.aoti_load_package(str(path))
        except Exception as error:  # RuntimeError, and whatever the loader of the machine code raises
            raise EngineError(
                f"AOTInductor cannot open {path}, which torch {about['torch']} compiled (this is "
                f"{self._torch.__version__}): {engine_message(error)}"
            ) from error
        self._lock = threading.Lock()  # the number of threads is the process's: one caller at a time
        size, channels = about["input"]["size"], about["input"]["channels"]
        self._describe([("images", [None, *size, channels])], "uint8", [None, about["num_classes"]])

    def _run(self, images: np.ndarray) -> np.ndarray:
        torch = self._torch
        with self._lock:
            if self._package is None:
                raise EngineError(f"{self.path.name} was closed; open it again")
            before = torch.get_num_threads()
            torch.set_num_threads(self.threads)
            try:
                with torch.inference_mode():
                    # torch wants to be able to write: read-only arrays are copied, others shared.
                    pixels = torch.from_numpy(np.require(images, requirements=["C", "W"]))
                    logits: np.ndarray = self._package(pixels.to(self._device)).cpu().numpy()
                    return logits
            except Exception as error:
                raise EngineError(
                    f"AOTInductor failed while running {self.path}: {engine_message(error)}"
                ) from error
            finally:
                torch.set_num_threads(before)

    def _release(self) -> None:
        with self._lock:
            self._package = None


def read_package(path: str | Path) -> dict[str, Any]:
    """What cveff wrote into a package when it compiled it; torch is not needed.

    Returns:
        "architecture", "input" (an `InputSpec` as JSON), "labels", "num_classes", "precision" ("fp32" or "bf16"),
        "device" ("cpu" or "cuda"), "code_flags" (the processor's, `machine.code_flags`), "torch" (its version).

    Raises:
        EngineError: the file is damaged, or was not written by cveff.
    """
    try:
        with zipfile.ZipFile(path) as package:
            # PyTorch's loader crashes on a package without code, or with damaged code.
            if package.testzip() is not None or not any(map(_is_code, package.namelist())):
                raise zipfile.BadZipFile("its machine code is damaged or missing")
            names = [name for name in package.namelist() if name.endswith("_metadata.json")]
            written = [json.loads(package.read(name)) for name in names]
        return next(json.loads(values[KEY]) for values in written if KEY in values)
    except StopIteration:
        raise EngineError(f"{path} was not compiled by cveff, so it does not say what it takes") from None
    except (zipfile.BadZipFile, OSError, ValueError, EOFError) as error:
        raise EngineError(
            f"{path} is no package that can be read ({error}); copy or compile it again"
        ) from error


def _is_code(name: str) -> bool:
    return name.endswith((".so", ".pyd", ".dylib"))
