"""TensorRT plans, built on the machine that runs them; no torch.

The work is done in `cveff.runtime`, because a bundle builds its plan on the device, without cveff.
"""

from __future__ import annotations

from pathlib import Path

from cveff.errors import EngineError, ExportError
from cveff.progress import Progress, Silent
from cveff.runtime.cuda import Cuda
from cveff.runtime.tensorrt_cache import write_new_plan
from cveff.runtime.tensorrt_library import load_tensorrt
from cveff.runtime.tensorrt_plan import Machine, onnx_hash, read_info
from cveff.runtime.tensorrt_settings import TensorRT, check_settings


def build_plan(
    onnx: str | Path,
    out: str | Path | None = None,
    settings: TensorRT | None = None,
    *,
    progress: Progress | None = None,
) -> Path:
    """Build the TensorRT plan of an ONNX file for the first GPU that this process sees.

        build_plan("model.fp16.onnx")  # writes model.fp16.plan and model.fp16.plan.json

    A plan that is there already is kept if it was built from the same file with the same settings for this machine.

    Args:
        onnx: takes one input (N, H, W, C), such as `cveff.export` writes; its tensors' types are the precision.
        out: the plan, `*.plan`; by default beside the file under its name, where the runtime looks for it.
        settings: by default `TensorRT()`.
        progress: shows the builder's phases.

    Returns:
        the plan's path.

    Raises:
        ExportError: no such file, or names that do not end in `.onnx` and `.plan`.
        EngineError: TensorRT, cuda-python or a GPU is missing; a setting is wrong or for another release; the file
            cannot be parsed; out of GPU memory; TensorRT gave no plan.
        CveffError: the plan cannot be written.
    """
    onnx = Path(onnx)
    plan = onnx.with_suffix(".plan") if out is None else Path(out)
    if onnx.suffix != ".onnx" or not onnx.is_file():
        raise ExportError(f"{onnx} is not an ONNX file; give one that cveff.export has written")
    if plan.suffix != ".plan":
        raise ExportError(f"{plan} is to be a plan; give a name that ends in .plan")
    progress = progress or Silent()
    settings = check_settings(settings or TensorRT())
    trt = load_tensorrt()
    machine = Machine(Cuda().gpu(), trt.__version__)
    if reason := _why_anew(plan, onnx, machine, settings):
        progress.message(f"building {plan.name} for {machine}{reason}")
        info = write_new_plan(trt, onnx, plan, machine, settings, progress.track)
        progress.message(f"{plan.name} was built in {info.build_seconds:.0f} s")
    return plan


def _why_anew(plan: Path, onnx: Path, machine: Machine, settings: TensorRT) -> str:
    """Nothing where `plan` can stay as it is, else the end of a sentence on why it is built."""
    if not plan.is_file():
        return " for the first time"
    try:
        reason = read_info(plan).mismatch(machine, onnx_hash(onnx), settings)
    except EngineError as error:
        reason = str(error)
    return reason and f": {reason}"
