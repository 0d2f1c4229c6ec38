"""Building a plan: what is asked of TensorRT for every setting, and what is said when it refuses."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cveff.runtime.errors import EngineError
from cveff.runtime.tensorrt_build import build, parse
from cveff.runtime.tensorrt_library import load_tensorrt, major, make_logger
from cveff.runtime.tensorrt_settings import TensorRT

from .fakes import IMAGE, builder_answers
from .recorder import World


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"never read: the parser is a recorder")
    return path


def settings(world: World, **changes: Any) -> TensorRT:
    return TensorRT(**{"version": int(world.version.split(".")[0]), **changes})


def called(world: World, name: str) -> list[tuple[Any, ...]]:
    return [given for member, given, _ in world.calls if member == name]


def flags(world: World) -> set[str]:
    return {str(flag) for (flag,) in called(world, "IBuilderConfig.set_flag")}


def test_defaults(world: World, onnx: Path) -> None:
    world.answers |= builder_answers()
    plan, timings = build(load_tensorrt(), onnx, settings(world))
    assert (plan, timings) == (b"plan or timings", b"plan or timings")
    flag = world.api["classes"]["NetworkDefinitionCreationFlag"]["constants"]["STRONGLY_TYPED"]["value"]
    assert called(world, "Builder.create_network") == [(1 << flag,)]
    assert called(world, "OnnxParser.parse_from_file") == [(str(onnx),)]
    assert called(world, "IOptimizationProfile.set_shape") == [
        ("images", (1, *IMAGE), (8, *IMAGE), (32, *IMAGE))
    ]
    assert [str(flag) for (flag,) in called(world, "IBuilderConfig.clear_flag")] == ["BuilderFlag.TF32"]
    assert not flags(world)
    assert not called(world, "IBuilderConfig.set_memory_pool_limit")


def test_every_setting(world: World, onnx: Path) -> None:
    world.answers |= builder_answers()
    chosen = settings(
        world, workspace_mb=512, optimization_level=5, version_compatible=True, hardware_compatible=True,
        refittable=True, strip_weights=True, sparse_weights=True, dla=1, batches=(4, 4, 4),
    )  # fmt: skip
    build(load_tensorrt(), onnx, chosen)
    names = ("VERSION_COMPATIBLE", "REFIT", "STRIP_PLAN", "SPARSE_WEIGHTS", "GPU_FALLBACK")
    assert flags(world) == {f"BuilderFlag.{name}" for name in names}
    ((pool, size),) = called(world, "IBuilderConfig.set_memory_pool_limit")
    assert (str(pool), size) == ("MemoryPoolType.WORKSPACE", 512 * 2**20)
    assert called(world, "IBuilderConfig.builder_optimization_level =") == [(5,)]
    ((level,),) = called(world, "IBuilderConfig.hardware_compatibility_level =")
    assert str(level) == "HardwareCompatibilityLevel.AMPERE_PLUS"
    ((device,),) = called(world, "IBuilderConfig.default_device_type =")
    assert str(device) == "DeviceType.DLA"
    assert called(world, "IBuilderConfig.DLA_core =") == [(1,)]


def test_a_file_of_one_batch_size_needs_no_profile(world: World, onnx: Path) -> None:
    world.answers |= builder_answers(batch=4)
    build(load_tensorrt(), onnx, settings(world))
    assert not called(world, "IOptimizationProfile.set_shape")


def test_a_timing_cache_that_does_not_fit_is_begun_anew(world: World, onnx: Path) -> None:
    world.answers |= builder_answers()
    answers = iter([False, True])
    world.answers["IBuilderConfig.set_timing_cache"] = lambda *_: next(answers)
    build(load_tensorrt(), onnx, settings(world), b"of another GPU")
    assert called(world, "IBuilderConfig.create_timing_cache") == [(b"of another GPU",), (b"",)]


def test_every_error_of_the_parser_is_reported(world: World, onnx: Path) -> None:
    code = world.class_of("ErrorCode")
    errors = [
        ("head/TopK", "TopK", "K is 5000", code.UNSUPPORTED_NODE_ATTR),
        ("", "", "no such weights", code.MODEL_DESERIALIZE_FAILED),
    ]

    def get_error(parser: Any, index: int) -> Any:
        error = world.class_of("ParserError")._new()
        object.__setattr__(error, "_index", index)
        return error

    world.answers |= builder_answers() | {
        "OnnxParser.parse_from_file": False,
        "OnnxParser.num_errors": 2,
        "OnnxParser.get_error": get_error,
        "ParserError.node": 7,
    }
    for place, name in enumerate(("node_name", "node_operator", "desc", "code")):
        world.answers[f"ParserError.{name}"] = lambda error, place=place: errors[error._index][place]
    with pytest.raises(EngineError) as caught:
        build(load_tensorrt(), onnx, settings(world))
    words = str(caught.value)
    assert f"TensorRT {world.version} cannot parse {onnx}" in words
    assert "TopK, node head/TopK: K is 5000 (UNSUPPORTED_NODE_ATTR); export without this attribute" in words
    assert "the file, node number 7: no such weights (MODEL_DESERIALIZE_FAILED); is the file whole" in words


@pytest.mark.parametrize(
    ("said", "words"),
    [
        (
            "[virtualMemoryBuffer.cpp] Error Code 2: OutOfMemory (Requested size was 1 bytes.)",
            "out of GPU memory",
        ),
        ("Could not find any implementation for node {Conv_3}", "Conv_3"),
        ("", "TensorRT gave no reason"),
    ],
)
def test_no_plan(world: World, onnx: Path, said: str, words: str) -> None:
    def fail(builder: Any, network: Any, config: Any) -> None:
        logger = called(world, "Builder")[0][0]
        if said:
            logger.log(world.class_of("ILogger").ERROR, said)
        logger.log(world.class_of("ILogger").WARNING, "of no interest")

    world.answers |= builder_answers() | {"Builder.build_serialized_network": fail}
    with pytest.raises(EngineError, match=words):
        build(load_tensorrt(), onnx, settings(world))


def test_a_dla_that_is_not_there(world: World, onnx: Path) -> None:
    world.answers |= builder_answers() | {"Builder.num_DLA_cores": 0}
    with pytest.raises(EngineError, match="DLA core 0 is asked for, this machine has none"):
        build(load_tensorrt(), onnx, settings(world, dla=0, batches=(1, 1, 1)))


def test_a_file_with_other_inputs(world: World, onnx: Path) -> None:
    world.answers |= builder_answers() | {"INetworkDefinition.num_inputs": 2}
    with pytest.raises(EngineError, match="takes 2 inputs"):
        build(load_tensorrt(), onnx, settings(world))
    world.answers |= builder_answers() | {"ITensor.shape": (-1, -1, -1, 3)}
    with pytest.raises(EngineError, match="whose batch size alone is open"):
        build(load_tensorrt(), onnx, settings(world))


def test_a_file_over_two_gigabytes(world: World, tmp_path: Path) -> None:
    path = tmp_path / "huge.onnx"
    with path.open("wb") as handle:
        handle.truncate(2**31 + 1)  # sparse: takes no room
    trt = load_tensorrt()
    with pytest.raises(EngineError, match="external data"):
        parse(trt, world.class_of("INetworkDefinition")._new(), path, make_logger(trt))


def test_settings_for_another_release(world: World, onnx: Path) -> None:
    other = 21 - int(world.version.split(".")[0])
    with pytest.raises(EngineError, match=f"is for TensorRT {other}, this machine has {world.version}"):
        build(load_tensorrt(), onnx, TensorRT(version=other))


def test_releases_that_are_not_supported(world: World) -> None:
    for version in ("8.6.1", "12.0.0"):
        world.version = version
        with pytest.raises(EngineError, match=f"TensorRT {version} is not supported"):
            load_tensorrt()


def _building(world: World, seen: list[bool]) -> Any:
    def build_serialized_network(builder: Any, network: Any, config: Any) -> Any:
        ((monitor,),) = called(world, "IBuilderConfig.progress_monitor =")
        monitor.phase_start("Building", None, 3)
        monitor.phase_start("Timing", "Building", 9)
        for step in range(3):
            seen.append(monitor.step_complete("Timing", step))
            seen.append(monitor.step_complete("Building", step))
            if not seen[-1]:
                return None
        monitor.phase_finish("Timing")
        monitor.phase_finish("Building")
        monitor.phase_start("Writing", None, 1)  # which never finishes
        return world.class_of("IHostMemory")._new()

    return build_serialized_network


def test_progress_shows_the_outermost_phases(world: World, onnx: Path) -> None:
    shown: list[Any] = []

    def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        shown.append((description, total, list(items)))
        return iter(())

    world.answers |= builder_answers() | {"Builder.build_serialized_network": _building(world, [])}
    build(load_tensorrt(), onnx, settings(world), track=track)
    assert shown == [("TensorRT: Building", 3, [0, 1, 2]), ("TensorRT: Writing", 1, [])]


def test_ctrl_c_stops_the_build(world: World, onnx: Path) -> None:
    seen: list[bool] = []

    def track(items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        raise KeyboardInterrupt

    def build_serialized_network(builder: Any, network: Any, config: Any) -> Any:
        ((monitor,),) = called(world, "IBuilderConfig.progress_monitor =")
        monitor.phase_start("Building", None, 10**9)
        for step in range(10**9):
            seen.append(monitor.step_complete("Building", step))
            if not seen[-1]:
                return None
        raise AssertionError("never stopped")

    world.answers |= builder_answers() | {"Builder.build_serialized_network": build_serialized_network}
    with pytest.raises(KeyboardInterrupt):
        build(load_tensorrt(), onnx, settings(world), track=track)
    assert seen[-1] is False


def test_major() -> None:
    class Package:
        __version__ = "11.4.0.106"

    assert major(Package) == 11
