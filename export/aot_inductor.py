"""A `Model` as a `.pt2` package: machine code that AOTInductor compiles for this processor, or for a GPU.

What is compiled is the network that `cveff.export.onnx` exports: uint8 NHWC in, logits out, any batch size.
"""

from __future__ import annotations

import importlib
import json
import logging
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Literal, get_args

import torch
from torch import nn

from cveff.compress.quant.half import to_half
from cveff.compress.quant.network import is_cast, is_quantized
from cveff.data.augment import normalize
from cveff.errors import ExportError, MissingDependencyError
from cveff.export.normalize import deployable
from cveff.export.onnx import TOLERANCE, TOLERANCES, example_images, quiet_exporter, session_difference
from cveff.files import atomic_path
from cveff.model import Model
from cveff.runtime.aot_session import KEY
from cveff.runtime.engines import open_file
from cveff.runtime.errors import first_line
from cveff.runtime.machine import code_flags

Device = Literal["cpu", "cuda"]
Precision = Literal["fp32", "bf16"]

_SETTINGS = {
    # Weights become constants: batch norms are folded, and oneDNN gets them in the layout its kernels want.
    "freezing": True,
    # Else the number of threads of this process is written into the code.
    "cpp.dynamic_threads": True,
}


def compile_package(
    model: Model,
    path: str | Path,
    *,
    precision: Precision = "fp32",
    device: Device = "cpu",
    check: bool = True,
) -> Path:
    """Compile `model` with AOTInductor.

    It takes from half a minute to some minutes and a C++ compiler. The package runs on processors that have every
    instruction set this one has (`AotSession` refuses others), or on GPUs like this one.

    Args:
        path: the `.pt2` to write, atomically.
        precision: "bf16" computes in bfloat16 what `cveff.compress.quant.half` does not keep in float32.
        device: "cuda" compiles for the GPU of this machine.
        check: run the package at batch 1 and 3 and compare it with PyTorch on the CPU.

    Returns:
        `path`.

    Raises:
        MissingDependencyError: there is no C++ compiler, or no GPU to compile for.
        ExportError: unknown precision or device, `path` does not end in .pt2, the model is quantized or already in 16
            bits, it cannot be compiled, or its logits differ from PyTorch's by more than `cveff.export.onnx` allows.
        StepError: the network cannot be captured for bfloat16.
    """
    path, name = Path(path), model.spec.architecture
    _check_settings(path, precision, device)
    if is_quantized(model.module) or is_cast(model.module):
        raise ExportError(
            f"{name} is quantized or in 16 bits already; AOTInductor compiles the float32 model"
        )
    _require_compiler(device)
    module = model.module if precision == "fp32" else _in_bfloat16(model)
    network = deployable(module, model.spec.input)
    with tempfile.TemporaryDirectory(prefix="cveff-aot-") as folder:
        written = Path(folder) / "model.pt2"
        try:
            _compile(network, model, written, precision, device)
        except Exception as error:
            raise ExportError(
                f"{name} cannot be compiled by AOTInductor: {type(error).__name__}: {first_line(error)}"
            ) from error
        if check:
            _require_equal(written, network, model, precision)
        with atomic_path(path) as temporary:
            temporary.write_bytes(written.read_bytes())
    return path


def _check_settings(path: Path, precision: str, device: str) -> None:
    if path.suffix != ".pt2":
        raise ExportError(f"{path} must end in .pt2, as AOTInductor's packages do")
    for value, kind, what in ((precision, Precision, "precision"), (device, Device, "device")):
        if value not in get_args(kind):
            raise ExportError(f"{what} {value!r} is unknown; use one of {', '.join(get_args(kind))}")


def _require_compiler(device: Device) -> None:
    if device == "cuda" and not torch.cuda.is_available():
        raise MissingDependencyError("PyTorch finds no GPU here; AOTInductor compiles for the one it runs on")
    builder: Any = importlib.import_module("torch._inductor.cpp_builder")
    try:
        builder.get_cpp_compiler()
    except RuntimeError as error:  # InvalidCxxCompiler
        raise MissingDependencyError(
            "AOTInductor needs a C++ compiler, and there is none; install g++ (apt-get install g++), or name yours in "
            "the environment variable CXX"
        ) from error


def _in_bfloat16(model: Model) -> nn.Module:
    # bfloat16 has float32's range, so which images decide the types makes no difference.
    images = normalize(example_images(2, model), model.spec.input)
    return to_half(model.module, model.spec.input, [images], "bf16").graph


def _compile(network: nn.Module, model: Model, path: Path, precision: Precision, device: Device) -> None:
    inductor: Any = importlib.import_module("torch._inductor")
    example = torch.from_numpy(example_images(2, model)).to(device)
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    spec = model.spec
    about = {
        "architecture": spec.architecture,
        "input": spec.input.to_json(),
        "labels": list(spec.labels),
        "num_classes": len(spec.labels),
        "precision": precision,
        "device": device,
        "code_flags": code_flags(),
        "torch": torch.__version__.partition("+")[0],
    }
    settings = {**_SETTINGS, "aot_inductor.metadata": {KEY: json.dumps(about)}}
    with quiet_exporter(), _quiet_compiler(), torch.inference_mode(False), torch.no_grad():
        program = torch.export.export(network.to(device), (example,), dynamic_shapes=dynamic, strict=False)
        inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=settings)
    network.cpu()


def _require_equal(path: Path, network: nn.Module, model: Model, precision: Precision) -> None:
    with open_file("aot-inductor", path, threads=0) as session:
        worst = session_difference(session, network, model)
    tolerance = TOLERANCE if precision == "fp32" else TOLERANCES[torch.bfloat16]
    if not worst <= tolerance:
        raise ExportError(
            f"{model.spec.architecture}: the compiled package's logits differ from PyTorch's by {worst:.2e} of the "
            f"largest logit, more than {tolerance:.0e}; no file was written"
        )


@contextmanager
def _quiet_compiler() -> Iterator[None]:
    """Silence what the compiler logs of itself, such as a CUDA compiler without a GPU; its errors still raise."""
    loggers = [logging.getLogger(name) for name in ("torch._inductor", "torch.utils.cpp_extension")]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
