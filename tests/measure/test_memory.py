"""The memory probe's child: no torch, its errors reach the caller."""

from __future__ import annotations

import signal
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest

import cveff.measure.memory as memory
from cveff.errors import EngineError
from cveff.measure import peak_memory


@pytest.fixture(scope="module")
def measured(graph_file: Callable[..., Path], images: np.ndarray) -> memory.Memory:
    return peak_memory("onnxruntime", graph_file(), images, threads=1)


def test_the_child_imports_the_engine_and_nothing_heavy(measured: memory.Memory) -> None:
    assert {"onnxruntime", "numpy"} <= set(measured.modules)
    assert not {"torch", "timm", "onnx", "scipy", "pandas", "matplotlib", "PIL"} & set(measured.modules)


def test_figures_are_consistent(measured: memory.Memory, images: np.ndarray) -> None:
    assert measured.peak_rss_bytes > measured.baseline_rss_bytes > 1_000_000
    assert measured.open_seconds > 0
    assert measured.first_prediction_seconds > 0
    assert (measured.batch, measured.threads, measured.num_predictions) == (len(images), 1, 3)
    assert "modules" not in measured.to_json()


def test_the_parents_own_memory_is_not_charged_to_the_child(
    graph_file: Callable[..., Path], images: np.ndarray
) -> None:
    ballast = np.ones(400 * 2**20, np.uint8)  # resident in this process, and its peak from now on
    measured = peak_memory("onnxruntime", graph_file(), images, threads=1)
    assert measured.peak_rss_bytes < ballast.nbytes


def test_an_error_in_the_child_is_quoted(tmp_path: Path, images: np.ndarray) -> None:
    with pytest.raises(
        EngineError, match=r"could not open the file and predict: model file .*none.onnx does not"
    ):
        peak_memory("onnxruntime", tmp_path / "none.onnx", images, threads=1)


def test_a_batch_that_does_not_fit_is_quoted(graph_file: Callable[..., Path], images: np.ndarray) -> None:
    with pytest.raises(EngineError, match="the model takes"):
        peak_memory("onnxruntime", graph_file(), images[:, :5], threads=1)


def test_a_child_that_takes_too_long_is_an_error(graph_file: Callable[..., Path], images: np.ndarray) -> None:
    with pytest.raises(EngineError, match=r"longer than 0\.001 s"):
        peak_memory("onnxruntime", graph_file(), images, threads=1, timeout_seconds=0.001)


@pytest.mark.parametrize(
    ("script", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", "killed by signal 9"),
        ("raise SystemExit(3)", "exit status 3"),
        ("raise ValueError('first\\nlast line')", "last line"),
        ("print('chatter')", "no answer"),
    ],
)
def test_every_way_to_die_is_told(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, script: str, message: str, images: np.ndarray
) -> None:
    child = tmp_path / "child_that_dies.py"
    child.write_text(script)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    monkeypatch.setattr(memory, "CHILD", "child_that_dies")
    with pytest.raises(EngineError, match=message):
        peak_memory("onnxruntime", "any.onnx", images, threads=1)


def test_a_handler_of_ended_children_neither_runs_nor_is_lost(
    graph_file: Callable[..., Path], images: np.ndarray
) -> None:
    """torch's, which a DataLoader leaves behind, can crash a process that has loaded OpenVINO."""
    calls: list[int] = []

    def handler(number: int, frame: object) -> None:
        calls.append(number)

    earlier = signal.signal(signal.SIGCHLD, handler)
    try:
        peak_memory("onnxruntime", graph_file(), images, threads=1)
        assert signal.getsignal(signal.SIGCHLD) is handler
        assert not calls
        with pytest.raises(EngineError):
            peak_memory("onnxruntime", "none.onnx", images, threads=1)
        assert signal.getsignal(signal.SIGCHLD) is handler
    finally:
        signal.signal(signal.SIGCHLD, earlier)
