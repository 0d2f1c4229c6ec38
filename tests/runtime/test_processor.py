"""What is said of a processor that is not the one a bundle was made for or measured on."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from cveff.runtime import machine
from cveff.runtime.manifest import ModelFile
from cveff.runtime.processor import processor_notes
from cveff.runtime.run import main

AVX2 = ["avx2", "fma", "f16c"]
VNNI = [*AVX2, "avx512f", "avx512bw", "avx512_vnni"]
ARM = ["asimd", "asimddp"]
INT8 = ModelFile("onnxruntime", "model.int8.onnx", 1, precision="int8")
GUARDED = ModelFile("onnxruntime", "model.int8.onnx", 1, precision="int8", saturation={"severe": 0})
SUFFERS = ModelFile("onnxruntime", "model.int8.onnx", 1, precision="int8", saturation={"severe": 2})
OPENVINO = ModelFile("openvino", "model.int8.xml", 1, precision="int8-asymmetric")
FLOATS = ModelFile("onnxruntime", "model.onnx", 1, precision="fp32")


@pytest.fixture
def notes(
    monkeypatch: pytest.MonkeyPatch, manifest_maker: Callable[..., dict[str, Any]]
) -> Callable[..., list[str]]:
    """The notes of a bundle measured on a processor, on a device with others' instruction sets."""

    def make(file: ModelFile, measured: list[str], device: list[str], **values: Any) -> list[str]:
        monkeypatch.setattr(machine, "isa", lambda: device)
        return processor_notes(
            manifest_maker(machine={"cpu": "x", "cores": 1, "isa": measured}, **values), file
        )

    return make


@pytest.mark.parametrize("file", [INT8, SUFFERS, OPENVINO])
def test_an_int8_file_that_was_not_made_for_kernels_that_clip(
    notes: Callable[..., list[str]], file: ModelFile
) -> None:
    answers, times = notes(file, VNNI, AVX2)
    assert f"may clip sums, which {file.file} was not made for" in answers
    assert "run `cveff verify`" in answers and "edge-cpu-avx2" in answers and "--engine" not in answers
    assert "lacks avx512f, avx512bw, avx512_vnni, which the bundle was measured with: times" in times


@pytest.mark.parametrize(
    ("file", "measured", "device"),
    [
        (GUARDED, VNNI, AVX2),  # narrowed
        (FLOATS, VNNI, AVX2),
        (INT8, VNNI, ARM),
    ],
)
def test_elsewhere_only_times_differ(
    notes: Callable[..., list[str]], file: ModelFile, measured: list[str], device: list[str]
) -> None:
    (times,) = notes(file, measured, device)
    assert "times will differ" in times and "answers" not in times


@pytest.mark.parametrize(
    ("file", "measured", "device"),
    [
        (INT8, VNNI, VNNI),
        (INT8, AVX2, AVX2),  # its accuracy was measured on kernels that clip
        (INT8, AVX2, VNNI),
        (INT8, VNNI, []),  # a system that does not tell
    ],
)
def test_nothing_is_said_where_nothing_is_lacking(
    notes: Callable[..., list[str]], file: ModelFile, measured: list[str], device: list[str]
) -> None:
    assert notes(file, measured, device) == []


def test_what_the_bundle_was_made_for_comes_before_what_it_was_measured_with(
    notes: Callable[..., list[str]],
) -> None:
    (times,) = notes(FLOATS, VNNI, ["avx2"], instructions=AVX2)
    assert times.startswith("this processor lacks fma, f16c, which the bundle was made for")
    (times,) = notes(FLOATS, VNNI, AVX2, instructions=AVX2)
    assert "which the bundle was measured with" in times
    assert notes(FLOATS, AVX2, VNNI, instructions=AVX2) == []


def test_a_float_file_in_the_bundle_is_offered(notes: Callable[..., list[str]]) -> None:
    floats = {"name": "onnxruntime", "precision": "fp32", "file": "model.onnx", "threads": 1, "options": {}}
    answers = notes(INT8, VNNI, AVX2, alternatives=[floats])[0]
    assert answers.endswith("--engine onnxruntime:fp32 computes in floats")


def test_run_warns_on_stderr(
    tiny_bundle: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    manifest["engine"]["precision"] = "int8"
    manifest["machine"]["isa"] = manifest["instructions"] = VNNI
    (tiny_bundle / "manifest.json").write_text(json.dumps(manifest))
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(tmp_path / "a.png")
    monkeypatch.setattr(machine, "isa", lambda: AVX2)
    assert main([str(tmp_path / "a.png")], bundle=tiny_bundle) == 0
    output = capsys.readouterr()
    lines = output.err.splitlines()
    assert [line.partition(":")[0] for line in lines] == ["warning", "warning"]
    assert "clip" in lines[0] and "made for: times" in lines[1] and "warning" not in output.out
    assert main([str(tmp_path / "a.png"), "--engine", "openvino"], bundle=tiny_bundle) == 0
    assert "clip" not in capsys.readouterr().err, "the float file that runs is not concerned"
