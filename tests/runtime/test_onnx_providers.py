"""ONNX Runtime's providers: what a session is told, and that it never becomes the CPU's unnoticed."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any, ClassVar

import numpy as np
import onnxruntime
import pytest

from cveff.errors import EngineError
from cveff.runtime.engines import open_file
from cveff.runtime.onnx_binding import MAX_SIZES, BoundCalls
from cveff.runtime.onnx_providers import PROVIDERS

CPU = "CPUExecutionProvider"
IMAGES = np.random.default_rng(0).integers(0, 256, (6, 32, 40, 3), dtype=np.uint8)


class Recorder:
    """ONNX Runtime's session on the CPU, under the names of the providers that were asked for."""

    calls: ClassVar[list[tuple[Any, list[Any]]]] = []
    starts: tuple[str, ...] | None = None
    elsewhere: tuple[tuple[str, str], ...] = ()

    def __init__(
        self, path: str, sess_options: Any, providers: list[Any], disabled_optimizers: list[str]
    ) -> None:
        type(self).calls.append((sess_options, providers))
        self._session = _SESSION(path, sess_options=sess_options, providers=[CPU])
        self.fallback = True

    def get_providers(self) -> list[str]:
        asked = [item if isinstance(item, str) else item[0] for item in self.calls[-1][1]]
        return asked if self.starts is None else list(self.starts)

    def disable_fallback(self) -> None:
        self.fallback = False

    def get_provider_graph_assignment_info(self) -> list[Any]:
        return [
            SimpleNamespace(ep_name=name, get_nodes=lambda kind=kind: [SimpleNamespace(op_type=kind)])
            for name, kind in self.elsewhere
        ]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._session, name)


_SESSION = onnxruntime.InferenceSession


@pytest.fixture
def recorder(monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Recorder]]:
    """As on a machine with every provider, whose tensors are the CPU's."""
    available = [provider.name for provider in PROVIDERS.values()] + [CPU]
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: available)
    monkeypatch.setattr(onnxruntime, "InferenceSession", Recorder)
    create = onnxruntime.OrtValue.ortvalue_from_shape_and_type
    monkeypatch.setattr(
        onnxruntime.OrtValue,
        "ortvalue_from_shape_and_type",
        lambda shape, kind, device, number: create(shape, kind, "cpu", 0),
    )
    monkeypatch.setattr(Recorder, "calls", [])
    yield Recorder


@pytest.mark.parametrize("engine", list(PROVIDERS))
def test_a_missing_provider_names_the_wheel_that_has_it(engine: str, tiny_onnx: Path) -> None:
    wheel, name = PROVIDERS[engine].wheel, PROVIDERS[engine].name
    with pytest.raises(EngineError, match=f"has no {name} .*pip install {wheel}"):
        open_file(engine, tiny_onnx, threads=1)


@pytest.mark.parametrize(
    ("engine", "options", "providers"),
    [
        (
            "onnxruntime-cuda",
            {"device_id": 1, "use_tf32": False, "gpu_mem_limit": 2**30},
            [
                (
                    "CUDAExecutionProvider",
                    {
                        "cudnn_conv_algo_search": "HEURISTIC",
                        "device_id": "1",
                        "use_tf32": "False",
                        "gpu_mem_limit": "1073741824",
                    },
                ),
                CPU,
            ],
        ),
        (
            "onnxruntime-tensorrt",
            {"device_id": 1, "trt_engine_cache_enable": True, "trt_engine_cache_path": "cache"},
            [
                (
                    "TensorrtExecutionProvider",
                    {"device_id": "1", "trt_engine_cache_enable": "True", "trt_engine_cache_path": "cache"},
                ),
                ("CUDAExecutionProvider", {"device_id": "1"}),
                CPU,
            ],
        ),
        (
            "onnxruntime-coreml",
            {"RequireStaticInputShapes": True},
            [("CoreMLExecutionProvider", {"ModelFormat": "MLProgram", "RequireStaticInputShapes": "1"}), CPU],
        ),
        (
            "onnxruntime-qnn",
            {"backend_type": "htp", "enable_htp_fp16_precision": False},
            [("QNNExecutionProvider", {"backend_type": "htp", "enable_htp_fp16_precision": "0"}), CPU],
        ),
    ],
)
def test_what_a_session_is_given(
    engine: str,
    options: dict[str, Any],
    providers: list[Any],
    tiny_onnx: Path,
    recorder: type[Recorder],
) -> None:
    with open_file(engine, tiny_onnx, threads=3, options=options) as session:
        assert session.engine == engine and session.notes == ()
        settings, given = recorder.calls[0]
        assert given == providers
        assert settings.intra_op_num_threads == 3
        assert not session._session.fallback  # type: ignore[attr-defined]
        expected = open_file("onnxruntime", tiny_onnx, threads=1)(IMAGES)
        np.testing.assert_allclose(session(IMAGES), expected, rtol=1e-6)


@pytest.mark.parametrize(
    ("engine", "options", "words"),
    [
        ("onnxruntime-cuda", {"arena": 1}, "onnxruntime-cuda has no option 'arena'; known: .*device_id"),
        ("onnxruntime-cuda", {"device_id": -1}, "device_id .* is -1; give an integer from 0 to 63"),
        ("onnxruntime-cuda", {"device_id": True}, "device_id .* is True; give an integer"),
        ("onnxruntime-cuda", {"use_tf32": 1}, r"use_tf32 .* is 1; use one of \[True, False\]"),
        ("onnxruntime-cuda", {"cudnn_conv_algo_search": "FAST"}, "'FAST'; use one of .*HEURISTIC"),
        ("onnxruntime-tensorrt", {"trt_engine_cache_path": 3}, "trt_engine_cache_path .* is 3; give text"),
        ("onnxruntime-qnn", {"backend_type": "npu"}, "'npu'; use one of"),
        ("onnxruntime", {"device_id": 0}, "onnxruntime has no option 'device_id'"),
    ],
)
def test_options_that_do_not_fit(engine: str, options: dict[str, Any], words: str, tiny_onnx: Path) -> None:
    with pytest.raises(EngineError, match=words):
        open_file(engine, tiny_onnx, threads=1, options=options)


def test_a_provider_that_did_not_start_is_an_error_not_the_cpu(
    tiny_onnx: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(recorder, "starts", (CPU,))
    with pytest.raises(EngineError, match=r"could not start CUDAExecutionProvider.*would have used the CPU"):
        open_file("onnxruntime-cuda", tiny_onnx, threads=1)


def test_nodes_that_stay_on_the_cpu_are_noted(
    tiny_onnx: Path, recorder: type[Recorder], monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = ((CPU, "Resize"), ("QNNExecutionProvider", "Conv"), (CPU, "Cast"), (CPU, "Resize"))
    monkeypatch.setattr(recorder, "elsewhere", parts)
    with open_file("onnxruntime-qnn", tiny_onnx, threads=1) as session:
        assert session.notes == ("3 nodes of model.onnx are not on QNNExecutionProvider: Cast, Resize",)


def test_nodes_are_told_apart_by_onnx_runtime_itself(tiny_onnx: Path) -> None:
    """The recorder above stands for this: every node of a session on the CPU alone is the CPU's."""
    from cveff.runtime.onnx_session import _ASSIGNMENT, _elsewhere

    settings = onnxruntime.SessionOptions()
    settings.add_session_config_entry(_ASSIGNMENT, "1")
    session = onnxruntime.InferenceSession(str(tiny_onnx), settings, providers=[CPU])
    assert _elsewhere(session, CPU) == []
    assert "Conv" in _elsewhere(session, "CUDAExecutionProvider")


def test_a_batch_can_be_fixed_for_providers_that_take_no_open_dimension(
    tmp_path: Path, recorder: type[Recorder], onnx_maker: Callable[..., Path]
) -> None:
    path = onnx_maker(tmp_path / "open.onnx", batch="batch")
    with open_file("onnxruntime-qnn", path, threads=1, options={"batch": 4}) as session:
        assert session.batch == 4
        assert session(IMAGES[:4]).shape == (4, 5)
    other = onnx_maker(tmp_path / "other.onnx", batch="N")
    with pytest.raises(EngineError, match="no open dimension called 'batch'"):
        open_file("onnxruntime-qnn", other, threads=1, options={"batch": 4})


def test_bound_calls_answer_as_plain_ones_and_keep_few_buffers(tiny_onnx: Path) -> None:
    session = onnxruntime.InferenceSession(str(tiny_onnx), providers=[CPU])
    calls = BoundCalls(onnxruntime, session, "images", "logits", 5, "cpu")
    first = calls(IMAGES[:3])
    kept = first.copy()
    for size in (3, 1, 6, 2, 3, 5, 4):
        np.testing.assert_array_equal(
            calls(IMAGES[:size]), session.run(None, {"images": IMAGES[:size]})[0], strict=True
        )
        assert len(calls._bound) <= MAX_SIZES
    np.testing.assert_array_equal(first, kept)  # the next call did not write into it
    assert [shape[0] for shape in calls._bound] == [2, 3, 5, 4]
    buffers = calls._bound[IMAGES[:4].shape]
    calls(IMAGES[2:6])
    assert calls._bound[IMAGES[:4].shape] is buffers
