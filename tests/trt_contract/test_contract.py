"""Every call of ours exists in the real API of both releases; the checker itself notices calls that do not."""

from __future__ import annotations

import ast
import textwrap
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import cveff.runtime
from cveff.runtime.errors import CveffError
from cveff.runtime.tensorrt_cache import write_new_plan
from cveff.runtime.tensorrt_plan import Machine
from cveff.runtime.tensorrt_session import TensorRTSession
from cveff.runtime.tensorrt_settings import TensorRT

from .cuda_recorder import CudaRecorder
from .fakes import IMAGE, builder_answers, engine_answers
from .kit import Kit
from .recorder import ContractError, World

RUNTIME = Path(cveff.runtime.__file__).parent

HOLDERS = {
    "tensorrt_build.py": {
        "trt",
        "builder",
        "network",
        "parser",
        "config",
        "cache",
        "profile",
        "images",
        "error",
    },
    "tensorrt_library.py": {"trt"},
    "tensorrt_progress.py": {"trt"},
    "tensorrt_session.py": {
        "trt",
        "engine",
        "runtime",
        "refitter",
        "reader",
        "self._engine",
        "self._runtime",
    },
    "tensorrt_lane.py": {"engine", "self._context"},
    "tensorrt_cache.py": {"trt"},
    "tensorrt_plan.py": set(),
    "tensorrt_settings.py": set(),
}
"""What holds objects of TensorRT's in each of our files."""

# Of release 10 alone, of 11 alone: "Removed Python APIs and Replacements" of release 11's documentation, and the pages
# of both releases' Python API. One code path can use neither.
ONLY_10 = (
    "BuilderFlag.FP16", "BuilderFlag.BF16", "BuilderFlag.INT8", "BuilderFlag.FP8", "BuilderFlag.INT4",
    "BuilderFlag.OBEY_PRECISION_CONSTRAINTS", "BuilderFlag.PREFER_PRECISION_CONSTRAINTS",
    "NetworkDefinitionCreationFlag.EXPLICIT_BATCH", "IBuilderConfig.int8_calibrator", "ICudaEngine.device_memory_size",
    "IBuilderConfig.set_calibration_profile", "Builder.platform_has_fast_fp16",
)  # fmt: skip
ONLY_11 = ("HardwareCompatibilityLevel.SAME_COMPUTE_CAPABILITY", "IBuilderConfig.tiling_optimization_level")
NEITHER = ("BuilderFlag.STRICT_TYPES", "Builder.build_engine", "IBuilderConfig.max_workspace_size")


def has(api: dict[str, Any], member: str) -> bool:
    owner, _, name = member.partition(".")
    described = api["classes"][owner]
    return any(name in described[kind] for kind in ("methods", "properties", "constants"))


def test_what_the_releases_differ_in(kit: Kit) -> None:
    is_10 = kit.api["version"].startswith("10.")
    assert [name for name in ONLY_10 if has(kit.api, name) != is_10] == []
    assert [name for name in ONLY_11 if has(kit.api, name) == is_10] == []
    assert [name for name in NEITHER if has(kit.api, name)] == []


def wrong_calls(world: World) -> dict[str, Callable[[], Any]]:
    trt = world.module
    new = {
        name: world.class_of(name)._new()
        for name in ("Builder", "IBuilderConfig", "ITimingCache", "ParserError")
    }
    config, builder = new["IBuilderConfig"], new["Builder"]

    def misnamed_override() -> None:
        class Logger(trt.ILogger):
            def log(self, level: Any, message: str) -> None: ...

    def missing_override() -> None:
        class Monitor(trt.IProgressMonitor):
            def phase_start(self, phase_name: str, parent_phase: str, num_steps: int) -> None: ...

    return {
        "an 8.x flag": lambda: trt.BuilderFlag.STRICT_TYPES,
        "a removed method": lambda: builder.build_engine(None, config),
        "a removed property": lambda: setattr(config, "max_workspace_size", 1 << 30),
        "a misspelt argument": lambda: config.set_timing_cache(new["ITimingCache"], ignore_missmatch=False),
        "a missing argument": lambda: config.set_timing_cache(new["ITimingCache"]),
        "one argument too many": lambda: builder.create_network(1, 2),
        "a flag of another kind": lambda: config.set_flag(trt.DeviceType.DLA),
        "a plain number for a flag": lambda: config.set_flag(3),
        "a string for a number": lambda: setattr(config, "builder_optimization_level", "3"),
        "a property that cannot be set": lambda: setattr(builder, "num_DLA_cores", 2),
        "a class that is not there": lambda: trt.Bilder,
        "a class that has no constructor": lambda: trt.IBuilderConfig(),
        "an enumeration's name": lambda: world.class_of("ErrorCode").UNSUPPORTED_NODE.name,
        "arguments of other names than TensorRT calls": misnamed_override,
        "a callback that is not there": missing_override,
    }


@pytest.mark.parametrize("case", [
    "an 8.x flag", "a removed method", "a removed property", "a misspelt argument", "a missing argument",
    "one argument too many", "a flag of another kind", "a plain number for a flag", "a string for a number",
    "a property that cannot be set", "a class that is not there", "a class that has no constructor",
    "an enumeration's name", "arguments of other names than TensorRT calls", "a callback that is not there",
])  # fmt: skip
def test_a_wrong_call_is_noticed(world: World, case: str) -> None:
    with pytest.raises(ContractError):
        wrong_calls(world)[case]()


def test_a_flag_of_release_10_is_noticed_on_release_11(world: World) -> None:
    if world.version.startswith("10."):
        assert str(world.module.BuilderFlag.FP16) == "BuilderFlag.FP16"
    else:
        with pytest.raises(ContractError, match=r"TensorRT 11.* has no BuilderFlag\.FP16"):
            world.module.BuilderFlag.FP16


def test_wrong_calls_of_cuda_are_noticed(cuda: CudaRecorder) -> None:
    with pytest.raises(AssertionError, match="has no cudaMallocPinned"):
        cuda.cudaMallocPinned(1)
    with pytest.raises(TypeError, match="missing a required argument"):
        cuda.cudaMemcpyAsync(0, 0, 4, cuda.cudaMemcpyKind.cudaMemcpyHostToDevice)
    with pytest.raises(AttributeError):
        cuda.cudaMemcpyKind.cudaMemcpyHostToGpu


def use_everything(world: World, cuda: CudaRecorder, folder: Path) -> None:
    """Each way through the builder and the session, failures included."""
    onnx = folder / "model.onnx"
    onnx.write_bytes(b"never read")
    version = int(world.version.split(".")[0])
    batches = (2, 2, 2)
    world.answers |= builder_answers() | dict(engine_answers(world, cuda, batches))
    flags = ("version_compatible", "hardware_compatible", "refittable", "strip_weights", "sparse_weights")
    options = {"batches": batches, "workspace_mb": 1, "dla": 0, **dict.fromkeys(flags, True)}
    with TensorRTSession(onnx, 1, options) as session:
        for _ in range(3):
            session(np.zeros((4, *IMAGE), np.uint8))
    machine = Machine(cuda_gpu(), world.version)
    for member, answer in (("OnnxParser.parse_from_file", False), ("Builder.build_serialized_network", None)):
        world.answers |= {member: answer, "OnnxParser.num_errors": 1}
        with pytest.raises(CveffError):
            write_new_plan(world.module, onnx, folder / "out.plan", machine, TensorRT(version=version))
        world.answers |= builder_answers()
    for call, error in (("cudaMalloc", "MemoryAllocation"), ("cudaStreamSynchronize", "IllegalAddress")):
        cuda.fails = {call: f"cudaError{error}"}
        with pytest.raises(CveffError), TensorRTSession(onnx, 1, options) as session:
            session(np.zeros((2, *IMAGE), np.uint8))
    cuda.fails = {}


def cuda_gpu() -> Any:
    from cveff.runtime.cuda import Cuda

    return Cuda().gpu()


def test_every_access_in_our_files_was_checked(world: World, cuda: CudaRecorder, tmp_path: Path) -> None:
    """Both ways: nothing that the code says went unseen, and nothing was seen that the code's names do not tell."""
    assert {path.name for path in RUNTIME.glob("tensorrt_*.py")} == set(HOLDERS)
    use_everything(world, cuda, tmp_path)
    for name, holders in HOLDERS.items():
        path = RUNTIME / name
        said = accesses(ast.parse(path.read_text(encoding="utf-8")), holders)
        assert said == {member for file, member in world.used if Path(file) == path}, name
        unnamed = unlisted_holders(ast.parse(path.read_text(encoding="utf-8")), holders)
        assert not unnamed, f"{name}: {unnamed} hold objects of TensorRT's; list them in HOLDERS"
    path = RUNTIME / "cuda.py"
    said = accesses(ast.parse(path.read_text(encoding="utf-8")), {"self._cudart"})
    enumerations = {member for member in said if not hasattr(cuda._real, member)}
    members = {
        name
        for kind in ("cudaMemcpyKind", "cudaStreamCaptureMode")
        for name in dir(getattr(cuda._real, kind))
    }
    assert enumerations <= members
    assert said - enumerations == {member for file, member in cuda.used if Path(file) == path}


def accesses(tree: ast.AST, holders: set[str]) -> set[str]:
    """Attributes of what `holders` hold, and of what those return."""
    return {
        node.attr
        for node in ast.walk(tree)
        if isinstance(node, ast.Attribute) and not node.attr.startswith("__") and root(node.value) in holders
    }


def root(node: ast.AST) -> str:
    """What a chain of attributes, calls and subscripts begins with: `trt`, `self._context`."""
    while isinstance(node, (ast.Attribute, ast.Call, ast.Subscript)):
        if isinstance(node, ast.Attribute) and node.attr.startswith("__"):
            return ""  # a string, as `trt.__version__` is
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name) and node.value.id == "self":
            return f"self.{node.attr}"
        node = node.func if isinstance(node, ast.Call) else node.value
    return node.id if isinstance(node, ast.Name) else ""


def unlisted_holders(tree: ast.AST, holders: set[str]) -> set[str]:
    """Names that a new object of TensorRT's is given to: made by a class, or by a method that makes or gets one."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Assign) and isinstance(node.value, ast.Call) and root(node.value) in holders:
            made = node.value.func
            makes = isinstance(made, ast.Attribute) and (
                made.attr[0].isupper() or made.attr.startswith("create_")
            )
            found |= {root(target) or ast.unparse(target) for target in node.targets if makes}
    return found - holders


def test_what_tensorrt_calls_can_be_made_with_the_real_classes(kit: Kit) -> None:
    code = """
        import tensorrt_bindings as trt
        from cveff.runtime.tensorrt_library import make_logger
        from cveff.runtime.tensorrt_progress import make_monitor

        logger, monitor = make_logger(trt), make_monitor(trt)
        logger.log(trt.ILogger.ERROR, "no room")
        monitor.phase_start("Building", None, 2)
        trt.init_libnvinfer_plugins(logger, "")
        print(logger.failure(), monitor.step_complete("Building", 0), str(trt.ErrorCode.INVALID_NODE))
    """
    assert (
        kit.python("-c", textwrap.dedent(code)).splitlines()[0].strip()
        == "no room True ErrorCode.INVALID_NODE"
    )
