"""A `Model` as one ONNX file: uint8 NHWC `images` in, float32 `logits` out, any batch size, proven equal to PyTorch.

What models of other tasks return is in `cveff.export.task_outputs`.
"""

from __future__ import annotations

import logging
import tempfile
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import onnx
import torch
from torch import nn

from cveff.errors import EngineError, ExportError
from cveff.export import choices, matmul_nbits, task_outputs, torchlib
from cveff.export.bfloat16 import has_bfloat16, in_float32
from cveff.export.layer_check import compare_layers
from cveff.export.metadata import write_metadata
from cveff.export.normalize import deployable
from cveff.export.qdq import finish, has_rounding, translations
from cveff.export.simplify import fold_scale, measure_floats, simplify
from cveff.export.task_outputs import Answer, Nms, Output
from cveff.export.trt_check import require_tensorrt
from cveff.files import atomic_path
from cveff.model import Model
from cveff.runtime.engines import open_file
from cveff.runtime.errors import first_line
from cveff.runtime.session import Session

_log = logging.getLogger(__name__)

OPSET = 20
BFLOAT16_OPSET = 22
"""The first in which convolutions and pooling take bfloat16."""
TOLERANCE = 1e-4
"""Largest allowed max|onnx - torch| / max|torch| over the logits."""
TOLERANCES = {torch.float16: 1e-2, torch.bfloat16: 5e-2}
"""The same for a network in 16 bits: sums in another order are rounded to other neighbours."""
MAX_BYTES = 2**31 - 2**20
"""protobuf cannot hold more; the graph itself is given one MiB."""


def export(
    model: Model,
    path: str | Path,
    *,
    opset: int | None = None,
    check: bool = True,
    nms: Nms | None = None,
    output: Output | None = None,
) -> Path:
    """Write `model` as an ONNX file.

    The graph has one input `images` (N, H, W, C) uint8 with dynamic N, and one output `logits` (N, classes)
    float32; other tasks have other outputs (docs/tasks.md). `model` is left as it was: a copy is exported, in
    evaluation mode, on the CPU.

    Args:
        path: the file to write, atomically; conventionally `*.onnx`.
        opset: version of the ONNX operator set, 20 by default; a network in bfloat16 gets 22 at least.
        check: run the file with ONNX Runtime at batch 1 and 3 and compare it with PyTorch.
        nms: of a detector: "onnx" (by default) suppresses in the graph, "none" leaves that to whoever runs the file.
        output: of a segmentation network: "logits" (by default) or "labels", one byte a pixel.

    Returns:
        `path`.

    Raises:
        ExportError: the exporter cannot express the network, the result is not valid ONNX (or, for a network rounded
            for TensorRT or in 16 bits, not what that takes), it is larger than 2 GB, or its logits differ from
            PyTorch's by more than `TOLERANCE`.
    """
    return export_answer(model, task_outputs.answer(model, nms, output), path, opset=opset, check=check)


def export_answer(
    model: Model, shipped: Answer, path: str | Path, *, opset: int | None = None, check: bool = True
) -> Path:
    """`export` for what `shipped` returns in place of the model's own answer; arguments and errors as there."""
    path, opset = Path(path), OPSET if opset is None else opset
    _refuse_too_large(model)
    if check:
        shipped = choices.shown(shipped, model.spec.input)
    network = deployable(shipped.network, model.spec.input)
    if torch.bfloat16 in _types(network):
        opset = max(opset, BFLOAT16_OPSET)
    traced = _trace(network, model, opset, (*shipped.names, *shipped.proofs))
    try:
        serialized = _finish(simplify(traced), model, network, shipped, check)
    except ExportError as error:
        # Never ship a graph that simplification broke; never lose one because it could not be simplified.
        serialized = _finish(traced, model, network, shipped, check, unsimplified=str(error))
        _log.warning("%s was exported without simplification: %s", model.spec.architecture, error)
    with atomic_path(path) as temporary:
        temporary.write_bytes(serialized)
    return path


def trace(model: Model, opset: int = OPSET) -> onnx.ModelProto:
    """The graph of a model that answers logits as the exporter writes it, which `serialize` makes a file of.

    Raises:
        ExportError: the exporter cannot express the network, or it is larger than 2 GB.
    """
    _refuse_too_large(model)
    shipped = task_outputs.answer(model)
    return _trace(deployable(shipped.network, model.spec.input), model, opset, shipped.names)


def serialize(traced: onnx.ModelProto, model: Model) -> bytes:
    """The file of a graph that `trace` returned, edited since or not; its answers are compared with nothing.

    Raises:
        ExportError: onnxslim cannot simplify it, or the result is not valid ONNX.
    """
    shipped = task_outputs.answer(model)
    return _finish(simplify(traced), model, shipped.network, shipped, check=False)


def _finish(
    proto: onnx.ModelProto,
    model: Model,
    network: nn.Module,
    shipped: Answer,
    check: bool,
    unsimplified: str | None = None,
) -> bytes:
    """Fold the pixels' scale, describe, validate and (with `check`) compare a graph; returns the file's bytes."""
    if has_rounding(proto):
        finish(proto, integer_biases=not _for_tensorrt(model))
    else:
        fold_scale(proto)
    measure_floats(proto)
    write_metadata(proto, model.spec, unsimplified, task_outputs.describe(model))
    try:
        onnx.checker.check_model(proto, full_check=True)
    except (onnx.checker.ValidationError, onnx.shape_inference.InferenceError) as error:
        raise ExportError(
            f"{model.spec.architecture}: the exported graph is not valid ONNX: {first_line(error)}"
        ) from error
    if _for_tensorrt(model) or _types(network) & TOLERANCES.keys():
        require_tensorrt(proto)
    serialized: bytes = proto.SerializeToString(deterministic=True)
    if check and has_rounding(proto):
        _require_layers(proto, network, model)
    elif check:
        runnable = in_float32(proto).SerializeToString() if has_bfloat16(proto) else serialized
        worst = difference(runnable, network, model, shipped)
        tolerance = max(shipped.tolerance, *(TOLERANCES.get(kind, TOLERANCE) for kind in _types(network)))
        if not worst <= tolerance:
            raise ExportError(
                f"{model.spec.architecture}: the ONNX file's {' or '.join(shipped.compared)} differ from PyTorch's "
                f"by {worst:.2e} of the largest, more than {tolerance:.0e}; no file was written"
            )
    return _without_proofs(proto, serialized, model, shipped, check) if shipped.proofs else serialized


def _without_proofs(
    proto: onnx.ModelProto, complete: bytes, model: Model, shipped: Answer, check: bool
) -> bytes:
    """The file without the outputs that were only there to be compared, its answers checked against them."""
    task_outputs.drop_proofs(proto, shipped)
    serialized: bytes = proto.SerializeToString(deterministic=True)
    if check and not shipped.has_choices:
        images = example_images(3, model)
        with _opened(complete, model) as session:
            proofs = session.outputs(images)
        with _opened(serialized, model) as session:
            task_outputs.require_rule(session.outputs(images), proofs, model)
    return serialized


def _require_layers(proto: onnx.ModelProto, network: nn.Module, model: Model) -> None:
    found = compare_layers(proto, network, example_images(3, model))
    if not found.holds:
        raise ExportError(
            f"{model.spec.architecture}: the file's layers are not the simulated ones: {found.equal:.2%} of the "
            f"rounded values are equal, the worst is {found.steps} steps off, the logits {found.last:.1e}; "
            "no file was written"
        )


def _types(network: nn.Module) -> set[torch.dtype]:
    return {value.dtype for value in network.state_dict().values()}


def _for_tensorrt(model: Model) -> bool:
    return any(getattr(edit, "scheme", "") == "tensorrt" for edit in model.spec.edits)


def difference(serialized: bytes, network: nn.Module, model: Model, shipped: Answer | None = None) -> float:
    """How far an ONNX file is from PyTorch, at batch 1 and 3.

    Args:
        serialized: the ONNX file.
        network: takes (N, H, W, C) uint8, as `deployable` returns.
        shipped: what the file returns; by default what `model`'s does.

    Returns:
        max|onnx - torch| / max|torch| over the logits (of other tasks, over the worst output) of the worse batch.

    Raises:
        ExportError: ONNX Runtime cannot run the file, or the logits have another shape or are not finite.
    """
    with _opened(serialized, model) as session:
        return session_difference(session, network, model, shipped)


@contextmanager
def _opened(serialized: bytes, model: Model) -> Iterator[Session]:
    """An ONNX file on ONNX Runtime; its errors are the export's."""
    try:
        with tempfile.TemporaryDirectory(prefix="cveff-export-") as folder:
            path = Path(folder) / "model.onnx"
            path.write_bytes(serialized)
            with open_file("onnxruntime", path, threads=0) as session:
                yield session
    except EngineError as error:
        raise ExportError(
            f"{model.spec.architecture}: ONNX Runtime cannot run the exported file: {first_line(error)}"
        ) from error


def session_difference(
    session: Session, network: nn.Module, model: Model, shipped: Answer | None = None
) -> float:
    """How far an open file is from PyTorch, at batch 1 and 3; arguments, result and errors as `difference`."""
    name, worst = model.spec.architecture, 0.0
    shipped = shipped or task_outputs.answer(model)
    for batch in (1, 3):
        images = example_images(batch, model)
        found = session.outputs(images)
        with torch.inference_mode(), choices.as_in(found, network):
            values = network(torch.from_numpy(images))
        values = values if isinstance(values, tuple) else (values,)
        names = (*shipped.names, *shipped.proofs)
        expected = {key: value.numpy() for key, value in zip(names, values, strict=True)}
        for key in shipped.compared:
            if not np.isfinite(expected[key]).all():
                raise ExportError(f"{name}: PyTorch's {key} are not finite (nan or inf); check its weights")
        worst = max(worst, task_outputs.worst_difference(found, expected, shipped.compared, name))
    return worst


def example_images(count: int, model: Model, seed: int = 0) -> np.ndarray:
    """Smooth random pictures with some noise, (count, H, W, C) uint8: natural images' statistics, roughly."""
    generator = np.random.default_rng(seed)
    (height, width), channels = model.spec.input.size, model.spec.input.channels
    coarse = generator.uniform(0, 255, (count, channels, 6, 6)).astype(np.float32)
    smooth = nn.functional.interpolate(torch.from_numpy(coarse), (height, width), mode="bicubic").numpy()
    noisy = smooth + generator.normal(0, 12, smooth.shape)
    return np.ascontiguousarray(noisy.clip(0, 255).round().astype(np.uint8).transpose(0, 2, 3, 1))


def _trace(network: nn.Module, model: Model, opset: int, output_names: Sequence[str]) -> onnx.ModelProto:
    example = torch.from_numpy(example_images(2, model))
    dynamic = ({0: torch.export.Dim("batch", min=1)},)
    try:
        with torchlib.read_once(), quiet_exporter(), torch.inference_mode(False), torch.no_grad():
            traced = torch.export.export(network, (example,), dynamic_shapes=dynamic, strict=False)
            _pool_by_mean(traced)
            program = torch.onnx.export(
                traced,
                (),
                dynamo=True,
                input_names=["images"],
                output_names=list(output_names),
                dynamic_shapes=dynamic,
                opset_version=opset,
                custom_translation_table=translations()
                | matmul_nbits.translations()
                | task_outputs.translations(),
                verbose=False,
            )
    except Exception as error:
        cause = _root(error)
        where = _failing_module(cause, network) or _failing_module(error, network)
        raise ExportError(
            f"{model.spec.architecture} cannot be exported to ONNX: {type(cause).__name__}"
            f"{f' in {where}' if where else ''}: {first_line(cause)}"
        ) from error
    if program is None:
        raise ExportError(
            f"{model.spec.architecture} cannot be exported to ONNX: the exporter returned nothing"
        )
    return program.model_proto


def _pool_by_mean(traced: torch.export.ExportedProgram) -> None:
    """Global average pooling as a mean, in place: on channels-last strides PyTorch decomposes it to a strided
    view, which becomes a gather by computed index in ONNX."""
    for node in traced.graph.nodes:
        if node.target is torch.ops.aten.adaptive_avg_pool2d.default and all(
            side == 1 for side in node.args[1]
        ):
            node.target, node.args = torch.ops.aten.mean.dim, (node.args[0], [-2, -1], True)
    traced.graph_module.recompile()


def _refuse_too_large(model: Model) -> None:
    size = sum(tensor.numel() * 4 for tensor in model.module.state_dict().values())
    if size > MAX_BYTES:
        raise ExportError(
            f"{model.spec.architecture} has {size / 2**30:.2f} GiB of weights; one ONNX file holds at most 2 GiB. "
            "Use a smaller model"
        )


def _root(error: BaseException) -> BaseException:
    """The first error of a chain: the exporter wraps what went wrong in advice about itself."""
    while error.__cause__ is not None:
        error = error.__cause__
    return error


def _failing_module(error: BaseException, network: nn.Module) -> str | None:
    """Name of the innermost module of `network` that was running when `error` was raised."""
    names = {id(module): name for name, module in network.named_modules()}
    found, frames = None, error.__traceback__
    while frames is not None:
        name = names.get(id(frames.tb_frame.f_locals.get("self")))
        found, frames = name or found, frames.tb_next
    return found.removeprefix("network.") if found else None


@contextmanager
def quiet_exporter() -> Iterator[None]:
    """Silence the exporter's warnings and log lines; its errors still raise."""
    loggers = [
        logging.getLogger(name)
        for name in ("torch.onnx", "torch.export", "torch.fx", "onnxscript", "onnx_ir")
    ]
    levels = [logger.level for logger in loggers]
    try:
        for logger in loggers:
            logger.setLevel(logging.ERROR)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
