"""The gap between an int8 file and the engine that runs it, with a kernel that saturates made by hand."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

import cveff
from cveff.compress import Quantize
from cveff.data import Data
from cveff.export.candidates import Candidate
from cveff.export.kernel_gap import gap_warnings, has_kernels, with_kernel_gap
from cveff.model import Model
from cveff.runtime.engines import open_file


@pytest.fixture(scope="module")
def int8(tmp_path_factory: pytest.TempPathFactory, digits_model: Model, digits: Data) -> Candidate:
    folder: Path = tmp_path_factory.mktemp("int8")
    rounded = cveff.apply(digits_model, Quantize(images=32), data=digits)
    path = cveff.export(rounded, folder / "model.int8.onnx")
    return Candidate("onnxruntime", "int8", file=path.name, path=path)


@pytest.fixture(scope="module")
def images(digits_model: Model, digits: Data) -> np.ndarray:
    return next(digits.val.evaluation_batches(digits_model.spec.input, 48))[0]


def test_an_engine_that_computes_the_file_as_written_has_no_gap(int8: Candidate, images: np.ndarray) -> None:
    assert int8.path is not None
    with open_file("onnxruntime", int8.path, threads=1, options={"graph_optimizations": False}) as session:
        gap = with_kernel_gap(int8, images, session(images)).meaning_gap
    assert gap is not None
    assert gap["agreement"] == 1.0 and gap["relative_difference"] < 1e-5
    assert gap["images"] == 48 and gap["large"] is False


def test_answers_of_a_ruined_kernel_are_a_large_gap(int8: Candidate, images: np.ndarray) -> None:
    assert int8.path is not None
    with open_file("onnxruntime", int8.path, threads=1) as session:
        ruined = with_kernel_gap(int8, images, np.minimum(session(images), 0.0)[:, ::-1].copy())
    gap = ruined.meaning_gap
    assert gap is not None and gap["large"] is True and gap["agreement"] < 0.9
    (warning,) = gap_warnings([ruined])
    assert "integer kernels saturate" in warning and "of 48 images" in warning
    assert gap_warnings([int8]) == ()


def test_only_onnx_runtime_int8_has_such_kernels() -> None:
    assert has_kernels(Candidate("onnxruntime", "int8"))
    assert has_kernels(Candidate("onnxruntime", "int8-mixed"))
    assert not has_kernels(Candidate("onnxruntime", "fp32"))
    assert not has_kernels(Candidate("openvino", "int8"))
    assert not has_kernels(Candidate("onnxruntime", "int8", error="could not be built"))
