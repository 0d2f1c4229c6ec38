"""TensorRT plans on an NVIDIA GPU; an ONNX file is built into one when it is first opened on a machine."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from .cuda import Cuda
from .errors import EngineError, InputSizeError
from .session import Session
from .tensorrt_build import parser_message
from .tensorrt_cache import plan_of
from .tensorrt_lane import Lane, Lanes, Tensors
from .tensorrt_library import load_tensorrt, major, make_logger
from .tensorrt_plan import Machine, onnx_hash, read_info, read_plan
from .tensorrt_settings import TensorRT, settings_from


class TensorRTSession(Session):
    """A `.plan` written by cveff, or an `.onnx` file, on the first GPU that this process sees.

    Calls from several threads run at once. A batch of more images than the plan takes runs in parts.

    Options: of an `.onnx` file, the settings of `TensorRT` that differ from its defaults. A plan has its own.

    Raises:
        EngineError: TensorRT, cuda-python or a GPU is missing; the file cannot be built; the plan is for another
            machine and its ONNX file is not beside it; out of GPU memory.
    """

    engine = "tensorrt"

    def __init__(self, path: Path, threads: int, options: Mapping[str, Any] | None = None) -> None:
        super().__init__(path, threads)
        trt, cuda = load_tensorrt(), Cuda()
        machine = Machine(cuda.gpu(), trt.__version__)
        self._logger = make_logger(trt)
        if path.suffix == ".plan":
            if options:
                raise EngineError(
                    f"{path.name} was built with settings of its own; options are for .onnx files"
                )
            content, settings = _given_plan(trt, path, machine)
        else:
            settings = settings_from(options or {}, major(trt))
            content = plan_of(trt, path, machine, settings)
        self._cuda, self._runtime, self._engine = cuda, *self._load(trt, content, settings)
        self._tensors = self._inspect(trt, self._engine)
        self._lanes = Lanes(self._lane)

    def _load(self, trt: Any, content: bytes, settings: TensorRT) -> tuple[Any, Any]:
        """TensorRT's runtime, which must live as long as the engine, and the engine."""
        trt.init_libnvinfer_plugins(self._logger, "")
        runtime = trt.Runtime(self._logger)
        # A version-compatible plan brings the code that runs it; its hash was compared.
        runtime.engine_host_code_allowed = settings.version_compatible
        if settings.dla is not None:
            runtime.DLA_core = settings.dla
        engine = runtime.deserialize_cuda_engine(content)
        if engine is None:
            raise EngineError(f"TensorRT cannot load the plan of {self.path}: {self._logger.failure()}")
        if settings.strip_weights:
            _refit(trt, engine, self.path.with_suffix(".onnx"), self._logger)
        return runtime, engine

    def _inspect(self, trt: Any, engine: Any) -> Tensors:
        names = [engine.get_tensor_name(index) for index in range(engine.num_io_tensors)]
        inputs = [name for name in names if engine.get_tensor_mode(name) == trt.TensorIOMode.INPUT]
        outputs = [name for name in names if name not in inputs]
        output = "logits" if "logits" in outputs else outputs[0]
        shapes = {name: [_dimension(size) for size in engine.get_tensor_shape(name)] for name in names}
        dtype = engine.get_tensor_dtype(inputs[0]) if inputs else None
        self._describe(
            [(name, shapes[name]) for name in inputs],
            "uint8" if dtype == trt.DataType.UINT8 else str(dtype),
            shapes[output],
        )
        classes, size, channels = self.num_classes, self.size, self.channels
        if (
            len(outputs) != 1
            or engine.get_tensor_dtype(output) != trt.DataType.FLOAT
            or classes is None
            or size is None
            or channels is None
        ):
            raise EngineError(
                f"{self.path} gives {', '.join(f'{name} {shapes[name]}' for name in outputs)}; cveff runs files with "
                "one float32 output (N, classes) and images of a fixed size, such as cveff.export writes"
            )
        least, _, most = engine.get_tensor_profile_shape(inputs[0], 0)
        self._least = least[0]
        return Tensors(inputs[0], output, (*size, channels), classes, most[0])

    def _run(self, images: np.ndarray) -> np.ndarray:
        logits = np.empty((len(images), self._tensors.classes), np.float32)
        running: deque[tuple[Lane, slice, bool]] = deque()
        try:
            for part in self._parts(len(images)):
                size = part.stop - part.start
                # While the GPU runs one part, the next is copied to it: lanes are taken as long as one is idle.
                while (lane := self._lanes.take(size, wait=not running)) is None:
                    self._collect(running, logits)
                running.append((lane, part, lane.has_seen(size)))
                lane.submit(images[part])
            while running:
                self._collect(running, logits)
        except EngineError as error:
            raise EngineError(f"{self.path.name}: {error}") from error
        finally:
            for lane, _, _ in running:  # only after a failure
                self._lanes.discard(lane)
        return logits

    def _collect(self, running: deque[tuple[Lane, slice, bool]], logits: np.ndarray) -> None:
        lane, part, comes_again = running[0]
        size = part.stop - part.start
        logits[part] = lane.collect(size)
        running.popleft()
        self._lanes.give_back(lane, size, comes_again=comes_again)

    def _parts(self, batch: int) -> Iterator[slice]:
        """Slices of at most the images a call that the plan takes.

        Raises:
            InputSizeError: one would have fewer than the plan takes.
        """
        rest = batch % self._tensors.most
        if 0 < rest < self._least:
            raise InputSizeError(
                f"a batch of {batch} images leaves a part of {rest}, {self.path.name} takes {self._least} to "
                f"{self._tensors.most} a call; give other batches, or build it with other ones"
            )
        for start in range(0, batch, self._tensors.most):
            yield slice(start, min(start + self._tensors.most, batch))

    def _lane(self) -> Lane:
        return Lane(self._cuda, self._engine, self._tensors, self._logger.failure)

    def _release(self) -> None:
        self._lanes.close()
        self._engine = self._runtime = None


def _given_plan(trt: Any, plan: Path, machine: Machine) -> tuple[bytes, TensorRT]:
    """A plan if it fits this machine and the ONNX file beside it, else one that is built from that file."""
    info, onnx = read_info(plan), plan.with_suffix(".onnx")
    reason = info.mismatch(machine, onnx_hash(onnx) if onnx.is_file() else None, info.settings)
    if not reason:
        return read_plan(plan, info), info.settings
    if not onnx.is_file():
        raise EngineError(
            f"{plan} cannot be loaded: {reason}; put {onnx.name}, which it was built from, beside it, and it is built "
            "again"
        )
    settings = replace(info.settings, version=major(trt))
    return plan_of(trt, onnx, machine, settings), settings


def _refit(trt: Any, engine: Any, onnx: Path, logger: Any) -> None:
    """Give the engine of a plan without weights those of its ONNX file."""
    if not onnx.is_file():
        raise EngineError(f"the plan holds no weights; put {onnx.name}, which it was built from, beside it")
    refitter = trt.Refitter(engine, logger)
    reader = trt.OnnxParserRefitter(refitter, logger)
    if not reader.refit_from_file(str(onnx)):
        raise EngineError(parser_message(trt, reader, onnx, logger))
    if not refitter.refit_cuda_engine():
        raise EngineError(f"TensorRT took no weights from {onnx}: {logger.failure()}")


def _dimension(size: int) -> int | None:
    return None if size == -1 else size
