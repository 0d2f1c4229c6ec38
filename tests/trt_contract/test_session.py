"""Running a plan: which plan is loaded, and what is asked of TensorRT and CUDA for batches of all sizes and threads."""

from __future__ import annotations

import json
import logging
import sys
import threading
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from cveff.runtime.engines import open_file
from cveff.runtime.errors import EngineError, InputSizeError
from cveff.runtime.tensorrt_lane import MAX_LANES
from cveff.runtime.tensorrt_session import TensorRTSession

from .cuda_recorder import CudaRecorder
from .fakes import IMAGE, builder_answers, engine_answers, expected
from .recorder import World

RNG = np.random.default_rng(0)
IMAGES = RNG.integers(0, 256, (20, *IMAGE), dtype=np.uint8)


@pytest.fixture
def onnx(tmp_path: Path) -> Path:
    path = tmp_path / "model.onnx"
    path.write_bytes(b"never read: the parser is a recorder")
    return path


def open_session(
    world: World, cuda: CudaRecorder, path: Path, batches: tuple[int, int, int] = (1, 2, 4), **options: Any
) -> TensorRTSession:
    world.answers |= builder_answers() | dict(engine_answers(world, cuda, batches))
    given = {} if path.suffix == ".plan" else {"batches": list(batches), **options}
    session = open_file("tensorrt", path, threads=1, options=given)
    assert isinstance(session, TensorRTSession)
    return session


def count(world: World, member: str) -> int:
    return sum(name == member for name, _, _ in world.calls)


def test_batches_of_every_size(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    with open_session(world, cuda, onnx) as session:
        assert (session.size, session.channels, session.num_classes) == (IMAGE[:2], 3, 2)
        for size in [1, 3, 3, 3, 1, 1, 1, 4, 9, 20, 20, 2, 2, 2, 3, 1, 0]:
            np.testing.assert_array_equal(
                session(IMAGES[-size or 20 :][:size]), expected(IMAGES[-size or 20 :][:size])
            )
        assert cuda.names.count("cudaGraphInstantiate") == MAX_LANES - 1
        assert cuda.names.count("cudaGraphLaunch") > 3
    assert not cuda.memory
    assert not cuda.handles
    with pytest.raises(EngineError, match="was closed; open it again"):
        session(IMAGES[:1])
    session.close()


def test_a_graph_is_recorded_when_a_size_comes_again(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    with open_session(world, cuda, onnx) as session:
        session(IMAGES[:2])
        assert "cudaStreamBeginCapture" not in cuda.names
        session(IMAGES[:2])
        assert cuda.names.count("cudaGraphInstantiate") == 1
        assert "cudaGraphLaunch" not in cuda.names
        executed = count(world, "IExecutionContext.execute_async_v3")
        np.testing.assert_array_equal(session(IMAGES[2:4]), expected(IMAGES[2:4]))
        assert cuda.names.count("cudaGraphLaunch") == 1
        assert count(world, "IExecutionContext.execute_async_v3") == executed
        assert count(world, "ICudaEngine.create_execution_context") == 1
        session(IMAGES[:3])  # the recorded context must stay as it is
        assert count(world, "ICudaEngine.create_execution_context") == 2


def test_a_network_that_cannot_be_recorded_runs_without(
    world: World, cuda: CudaRecorder, onnx: Path, caplog: pytest.LogCaptureFixture
) -> None:
    cuda.fails["cudaGraphInstantiate"] = "cudaErrorNotSupported"
    with caplog.at_level(logging.INFO), open_session(world, cuda, onnx) as session:
        for _ in range(5):
            np.testing.assert_array_equal(session(IMAGES[:3]), expected(IMAGES[:3]))
    assert "a CUDA graph cannot be recorded" in caplog.text
    assert cuda.names.count("cudaGraphInstantiate") == 1
    assert not cuda.memory


def test_threads_run_at_once(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    wrong: list[int] = []
    with open_session(world, cuda, onnx) as session:

        def work(seed: int) -> None:
            rng = np.random.default_rng(seed)
            for _ in range(20):
                images = IMAGES[: rng.integers(1, 12)]
                if not np.array_equal(session(images), expected(images)):
                    wrong.append(seed)

        threads = [threading.Thread(target=work, args=(seed,)) for seed in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert not wrong
    assert not cuda.memory


def test_sizes_outside_the_profile(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    with open_session(world, cuda, onnx, (2, 4, 4)) as session:
        np.testing.assert_array_equal(session(IMAGES[:10]), expected(IMAGES[:10]))
        with pytest.raises(InputSizeError, match=r"leaves a part of 1, model\.onnx takes 2 to 4 a call"):
            session(IMAGES[:9])
        with pytest.raises(InputSizeError, match="the model takes"):
            session(IMAGES[:2, :3])
        with pytest.raises(InputSizeError, match="takes uint8"):
            session(IMAGES[:2].astype(np.float32))


def test_the_first_opening_builds_and_the_next_does_not(
    world: World, cuda: CudaRecorder, onnx: Path, cache_home: Path, caplog: pytest.LogCaptureFixture
) -> None:
    open_session(world, cuda, onnx).close()
    assert (
        "building a plan of model.onnx for NVIDIA H200 (compute capability 9.0) with TensorRT" in caplog.text
    )
    assert "the plan was built in" in caplog.text
    assert (
        len(list(cache_home.glob("*.plan")))
        == len(list(cache_home.glob("timing-NVIDIA-H200-9.0-*.cache")))
        == 1
    )
    assert [path.name for path in onnx.parent.iterdir() if path.suffix != ""] == ["model.onnx"]
    open_session(world, cuda, onnx).close()
    assert count(world, "Builder.build_serialized_network") == 1
    for changed in ("settings", "gpu", "file"):
        if changed == "gpu":
            cuda.gpu = ("NVIDIA L4", 8, 9)
        if changed == "file":
            onnx.write_bytes(b"retrained")
        open_session(world, cuda, onnx, refittable=True).close()
    assert count(world, "Builder.build_serialized_network") == 4


def test_the_known_times_are_given_to_the_next_build(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    open_session(world, cuda, onnx).close()
    open_session(world, cuda, onnx, optimization_level=1).close()
    given = [given for name, given, _ in world.calls if name == "IBuilderConfig.create_timing_cache"]
    assert given == [(b"",), (b"plan or timings",)]


def make_plan(world: World, cuda: CudaRecorder, onnx: Path, **options: Any) -> Path:
    from cveff.export.tensorrt import build_plan
    from cveff.target import TensorRT

    world.answers |= builder_answers() | dict(engine_answers(world, cuda, (1, 2, 4)))
    version = int(world.version.split(".")[0])
    return build_plan(onnx, settings=TensorRT(version=version, batches=(1, 2, 4), **options))


def test_a_plan_beside_the_file_is_loaded(
    world: World, cuda: CudaRecorder, onnx: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(world, cuda, onnx)
    values = json.loads(plan.with_name("model.plan.json").read_text(encoding="utf-8"))
    assert values["gpu"] == "NVIDIA H200"
    assert values["compute_capability"] == [9, 0]
    assert values["tensorrt"] == world.version
    for path in (onnx, plan):
        with open_session(world, cuda, path) as session:
            np.testing.assert_array_equal(session(IMAGES[:3]), expected(IMAGES[:3]))
    assert make_plan(world, cuda, onnx) == plan
    assert count(world, "Builder.build_serialized_network") == 1
    assert not caplog.text


@pytest.mark.parametrize("changed", ["gpu", "release", "platform", "plan", "json", "onnx"])
def test_a_plan_that_does_not_match_is_built_again(
    changed: str, world: World, cuda: CudaRecorder, onnx: Path, caplog: pytest.LogCaptureFixture
) -> None:
    plan = make_plan(world, cuda, onnx)
    info = plan.with_name("model.plan.json")
    values = json.loads(info.read_text(encoding="utf-8"))
    words = {
        "gpu": "it was built for NVIDIA H200 (compute capability 9.0), this is NVIDIA L4 (compute capability 8.9)",
        "release": f"it was built with TensorRT 10.1.0, this is {world.version}",
        "platform": "it was built on win32-AMD64",
        "plan": "is not the plan that model.plan.json describes",
        "json": "is damaged or was not written by cveff",
        "onnx": "it was built from another ONNX file",
    }[changed]
    if changed == "gpu":
        cuda.gpu = ("NVIDIA L4", 8, 9)
    elif changed == "release":
        info.write_text(json.dumps(values | {"tensorrt": "10.1.0"}))
    elif changed == "platform":
        info.write_text(json.dumps(values | {"platform": "win32-AMD64"}))
    elif changed == "plan":
        plan.write_bytes(b"cut")
    elif changed == "json":
        info.write_text("{")
    else:
        onnx.write_bytes(b"retrained")
    with open_session(world, cuda, onnx) as session:
        np.testing.assert_array_equal(session(IMAGES[:3]), expected(IMAGES[:3]))
    assert words in caplog.text
    assert count(world, "Builder.build_serialized_network") == 2


def test_a_plan_without_its_file(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    plan = make_plan(world, cuda, onnx)
    cuda.gpu = ("NVIDIA L4", 8, 9)
    with open_session(world, cuda, plan) as session:  # built from model.onnx
        assert session.num_classes == 2
    onnx.unlink()
    with pytest.raises(EngineError, match=r"built for NVIDIA H200.*put model\.onnx"):
        open_session(world, cuda, plan)
    plan.with_name("model.plan.json").unlink()
    with pytest.raises(EngineError, match=r"has no model\.plan\.json beside it"):
        open_session(world, cuda, plan)
    with pytest.raises(EngineError, match=r"options are for \.onnx files"):
        TensorRTSession(plan, 1, {"refittable": True})


def test_compatible_plans_are_loaded_elsewhere(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    plan = make_plan(world, cuda, onnx, hardware_compatible=True, version_compatible=True)
    info = plan.with_name("model.plan.json")
    values = json.loads(info.read_text(encoding="utf-8"))
    info.write_text(json.dumps(values | {"tensorrt": "10.1.0"}))
    cuda.gpu = ("NVIDIA L4", 8, 9)
    open_session(world, cuda, plan).close()
    assert count(world, "Builder.build_serialized_network") == 1
    allowed = [given for name, given, _ in world.calls if name == "Runtime.engine_host_code_allowed ="]
    assert allowed == [(True,)]
    cuda.gpu = ("Tesla T4", 7, 5)
    open_session(world, cuda, plan).close()
    assert count(world, "Builder.build_serialized_network") == 2


def test_a_plan_without_weights_is_given_those_of_its_file(
    world: World, cuda: CudaRecorder, onnx: Path
) -> None:
    plan = make_plan(world, cuda, onnx, strip_weights=True)
    open_session(world, cuda, plan).close()
    assert [given for name, given, _ in world.calls if name == "OnnxParserRefitter.refit_from_file"] == [
        (str(onnx),)
    ]
    assert count(world, "Refitter.refit_cuda_engine") == 1
    world.answers["Refitter.refit_cuda_engine"] = False
    with pytest.raises(EngineError, match="took no weights"):
        open_session(world, cuda, plan)
    world.answers["OnnxParserRefitter.refit_from_file"] = False
    with pytest.raises(EngineError, match="cannot parse"):
        open_session(world, cuda, plan)
    onnx.unlink()
    with pytest.raises(EngineError, match="the plan holds no weights"):
        open_session(world, cuda, plan)


def test_the_dla_is_chosen(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    open_session(world, cuda, onnx, (2, 2, 2), dla=1).close()
    assert [given for name, given, _ in world.calls if name == "Runtime.DLA_core ="] == [(1,)]


def test_out_of_gpu_memory(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    make_plan(world, cuda, onnx)
    cuda.fails["cudaMalloc"] = "cudaErrorMemoryAllocation"
    with pytest.raises(
        EngineError, match="out of GPU memory: 0 MiB wanted, 1 of 1024 free; close other programs"
    ):
        open_session(world, cuda, onnx)
    cuda.fails.clear()
    assert not cuda.memory
    world.answers["ICudaEngine.create_execution_context"] = None
    with pytest.raises(EngineError, match="made no execution context"):
        TensorRTSession(onnx, 1, {"batches": [1, 2, 4]})
    assert not cuda.handles


def test_failures_while_running(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    with open_session(world, cuda, onnx) as session:
        works = world.answers["IExecutionContext.execute_async_v3"]
        world.answers["IExecutionContext.execute_async_v3"] = False
        with pytest.raises(EngineError, match=r"model\.onnx: TensorRT failed while running"):
            session(IMAGES)
        world.answers["IExecutionContext.execute_async_v3"] = works
        cuda.fails["cudaStreamSynchronize"] = "cudaErrorIllegalAddress"
        with pytest.raises(EngineError, match="CUDA failed: an illegal memory access"):
            session(IMAGES)
        cuda.fails.clear()
        np.testing.assert_array_equal(session(IMAGES), expected(IMAGES))
        world.answers["IExecutionContext.set_input_shape"] = False
        with pytest.raises(EngineError, match=r"refused images of shape \(3, 4, 6, 3\)"):
            session(IMAGES[:3])


def test_engines_of_other_files(world: World, cuda: CudaRecorder, onnx: Path) -> None:
    make_plan(world, cuda, onnx)
    options = {"batches": [1, 2, 4]}
    for member, answer, words in (
        ("ICudaEngine.get_tensor_dtype", world.module.DataType.FLOAT, "one uint8 input"),
        ("ICudaEngine.get_tensor_dtype", world.module.DataType.UINT8, "one float32 output"),
        ("ICudaEngine.get_tensor_shape", (-1, -1, -1, 3), "one float32 output"),
    ):
        world.answers |= dict(engine_answers(world, cuda, (1, 2, 4)))
        world.answers[member] = lambda engine, name, answer=answer: answer
        with pytest.raises(EngineError, match=words):
            TensorRTSession(onnx, 1, options)
    world.answers["Runtime.deserialize_cuda_engine"] = None
    with pytest.raises(EngineError, match=r"cannot load the plan of .*model\.onnx"):
        TensorRTSession(onnx, 1, options)


def test_no_gpu(world: World, cuda: CudaRecorder, onnx: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    cuda.fails["cudaGetDeviceCount"] = "cudaErrorInsufficientDriver"
    with pytest.raises(
        EngineError, match=r"no NVIDIA GPU can be used here.*install its driver, or choose another"
    ):
        open_session(world, cuda, onnx)
    monkeypatch.setitem(sys.modules, "cuda.bindings.runtime", None)
    with pytest.raises(
        EngineError, match=r"cuda-python is not installed.*pip install cuda-python\. Every other engine"
    ):
        open_session(world, cuda, onnx)
