"""Builds a TensorRT plan from an ONNX file, for the GPU of this machine; releases 10 and 11 from one code path.

Networks are strongly typed: precision is what the file's tensors say. In release 11 that is the only kind there is; in
release 10 it has to be asked for. API: the Python API reference of both.
"""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

from .errors import EngineError
from .tensorrt_library import major, make_logger
from .tensorrt_progress import Track, make_monitor, run_monitored, untracked
from .tensorrt_settings import TensorRT

_log = logging.getLogger(__name__)

MAX_FILE_BYTES = 2**31 - 1
"""What one protobuf message can hold."""

_HINTS = {
    "MODEL_DESERIALIZE_FAILED": "is the file whole, and are its external weights beside it?",
    "MEM_ALLOC_FAILED": "close other programs",
    "UNSUPPORTED_GRAPH": "export the model again with cveff, or split the graph",
    "UNSUPPORTED_NODE": "export without this operator, or with another opset",
    "UNSUPPORTED_NODE_ATTR": "export without this attribute of the operator",
    "UNSUPPORTED_NODE_INPUT": "make this input a constant of the file",
    "UNSUPPORTED_NODE_DATATYPE": "cast the operator's input to another type",
    "UNSUPPORTED_NODE_DYNAMIC": "fix the size that is dynamic here",
    "UNSUPPORTED_NODE_SHAPE": "give the operator's input another shape",
    "INVALID_NODE": "is the file valid? onnx.checker.check_model says",
    "INVALID_GRAPH": "is the file valid? onnx.checker.check_model says",
}


def build(
    trt: Any, onnx: Path, settings: TensorRT, timing_cache: bytes = b"", track: Track = untracked
) -> tuple[bytes, bytes]:
    """A plan, and the timing cache with what building it has added.

    Args:
        trt: the package, as `load_tensorrt` returns it.
        onnx: takes one input (N, H, W, C); weights may lie in other files beside it.
        timing_cache: of this GPU and this release; empty, or one that does not fit: begun anew.
        track: where the builder's phases show themselves.

    Raises:
        EngineError: the settings are for another release, the file cannot be parsed (every error with node, operator
            and a hint), there is no DLA, out of GPU memory, or TensorRT gave no plan.
        KeyboardInterrupt: Ctrl-C, once TensorRT has stopped.
    """
    if settings.version != major(trt):
        raise EngineError(
            f"the target is for TensorRT {settings.version}, this machine has {trt.__version__}; install "
            f"'tensorrt=={settings.version}.*', or give a target with version = {major(trt)}"
        )
    logger = make_logger(trt)
    trt.init_libnvinfer_plugins(logger, "")
    builder = trt.Builder(logger)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    # The parser owns the weights that the network refers to: it must live until the plan is built.
    parser = parse(trt, network, onnx, logger)
    config = builder.create_builder_config()
    _set_flags(trt, config, settings)
    if settings.workspace_mb:
        config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, settings.workspace_mb << 20)
    config.builder_optimization_level = settings.optimization_level
    if settings.hardware_compatible:
        config.hardware_compatibility_level = trt.HardwareCompatibilityLevel.AMPERE_PLUS
    if settings.dla is not None:
        _use_dla(trt, builder, config, settings.dla)
    _add_profile(builder, network, config, settings, onnx)
    cache = _attach_timing_cache(config, timing_cache)
    monitor = make_monitor(trt)
    config.progress_monitor = monitor
    plan = run_monitored(lambda: builder.build_serialized_network(network, config), monitor, track)
    del parser
    if plan is None:
        raise EngineError(f"TensorRT {trt.__version__} built no plan of {onnx}: {logger.failure()}")
    return bytes(plan), bytes(cache.serialize())


def parse(trt: Any, network: Any, onnx: Path, logger: Any) -> Any:
    """Read `onnx` into `network`; returns the parser, which must live as long.

    Raises:
        EngineError: lists every error of the parser.
    """
    if onnx.stat().st_size > MAX_FILE_BYTES:
        raise EngineError(
            f"{onnx} has {onnx.stat().st_size} bytes, one ONNX file holds 2 GiB; save its weights as external data"
        )
    parser = trt.OnnxParser(network, logger)
    if not parser.parse_from_file(str(onnx)):
        raise EngineError(parser_message(trt, parser, onnx, logger))
    return parser


def parser_message(trt: Any, parser: Any, onnx: Path, logger: Any) -> str:
    """Every error of a parser: node, operator, reason and a hint."""
    lines = []
    for index in range(parser.num_errors):
        error = parser.get_error(index)
        code = str(error.code()).rpartition(".")[2]  # .name is no name in release 10.7
        node = error.node_name() or f"number {error.node()}"
        hint = _HINTS.get(code)
        lines.append(
            f"{error.node_operator() or 'the file'}, node {node}: {error.desc()} ({code}){f'; {hint}' if hint else ''}"
        )
    found = "; ".join(lines) or logger.failure()
    return f"TensorRT {trt.__version__} cannot parse {onnx}: {found}"


def _set_flags(trt: Any, config: Any, settings: TensorRT) -> None:
    # Left on, float32 would silently be computed with 10 bits of mantissa; who wants less asks for fp16 or bf16.
    config.clear_flag(trt.BuilderFlag.TF32)
    for wanted, flag in (
        (settings.version_compatible, trt.BuilderFlag.VERSION_COMPATIBLE),
        (settings.refittable, trt.BuilderFlag.REFIT),
        (settings.strip_weights, trt.BuilderFlag.STRIP_PLAN),
        (settings.sparse_weights, trt.BuilderFlag.SPARSE_WEIGHTS),
        (settings.dla is not None, trt.BuilderFlag.GPU_FALLBACK),
    ):
        if wanted:
            config.set_flag(flag)


def _use_dla(trt: Any, builder: Any, config: Any, core: int) -> None:
    if core >= builder.num_DLA_cores:
        raise EngineError(
            f"DLA core {core} is asked for, this machine has {builder.num_DLA_cores or 'none'} that TensorRT "
            f"{trt.__version__} can use; leave dla out for the GPU"
        )
    config.default_device_type = trt.DeviceType.DLA
    config.DLA_core = core


def _add_profile(builder: Any, network: Any, config: Any, settings: TensorRT, onnx: Path) -> None:
    """The batch sizes, for a file that leaves its own open."""
    images = network.get_input(0)
    shape = tuple(images.shape)
    if len(shape) != 4 or network.num_inputs != 1 or -1 in shape[1:]:
        raise EngineError(
            f"{onnx} takes {network.num_inputs} inputs, the first of shape {shape}; cveff builds files with one input "
            "(N, H, W, C) whose batch size alone is open, such as cveff.export writes"
        )
    if shape[0] != -1:
        return
    profile = builder.create_optimization_profile()
    least, usual, most = ((batch, *shape[1:]) for batch in settings.batches)
    profile.set_shape(images.name, least, usual, most)
    config.add_optimization_profile(profile)


def _attach_timing_cache(config: Any, content: bytes) -> Any:
    """Times of kernels that were measured before; content of another GPU or release is refused and begun anew.

    Returns:
        the cache, which must live until the plan is built.
    """
    cache = config.create_timing_cache(content)
    if cache is None or not config.set_timing_cache(cache, ignore_mismatch=False):
        _log.warning("the timing cache is of another GPU or release of TensorRT; it is begun anew")
        cache = config.create_timing_cache(b"")
        config.set_timing_cache(cache, ignore_mismatch=False)
    return cache
