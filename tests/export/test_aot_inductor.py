"""AOTInductor's packages: the same network, opened like any other file, refused where they cannot run."""

from __future__ import annotations

import importlib
import json
import sys
import zipfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

import cveff
from cveff.compress import Quantize
from cveff.data import Data
from cveff.errors import CveffError, EngineError, ExportError, InputSizeError, MissingDependencyError
from cveff.export import aot_inductor
from cveff.export.aot_inductor import compile_package
from cveff.export.bench import bench
from cveff.export.deploy import Deployment, deploy
from cveff.export.normalize import deployable
from cveff.export.onnx import example_images
from cveff.export.verify import verify
from cveff.measure.parity import relative_difference
from cveff.model import Model
from cveff.runtime import machine
from cveff.runtime.aot_session import KEY, read_package
from cveff.runtime.engines import open_file
from cveff.target import Target

pytestmark = pytest.mark.slow  # a C++ compiler runs for ten seconds or more

FOLDER = "model/data/aotinductor/model"
AOT = Target(
    "aot",
    "one thread, for tests",
    (("onnxruntime", "fp32"), ("aot-inductor", "fp32")),
    threads=1,
    batch_sizes=(1, 4),
)


def write_package(path: Path, metadata: dict[str, str]) -> None:
    """An archive that is laid out like AOTInductor's, with code that is none."""
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{FOLDER}/a.wrapper.so", b"no code")
        archive.writestr(f"{FOLDER}/a.wrapper_metadata.json", json.dumps(metadata))


@pytest.fixture(scope="module")
def package(tmp_path_factory: pytest.TempPathFactory, digits_model: Model) -> Path:
    """The trained network, compiled once for all tests of this file."""
    return compile_package(digits_model, tmp_path_factory.mktemp("aot") / "digits.pt2")


@pytest.fixture
def bundle(
    tmp_path: Path,
    package: Path,
    digits_model: Model,
    digits: Data,
    quick_timing: object,
    monkeypatch: pytest.MonkeyPatch,
) -> Deployment:
    """A deployment that chose the package; compiling is a copy of it."""

    def copied(model: Model, path: Path, precision: str) -> Path:
        path.write_bytes(package.read_bytes())
        return path

    monkeypatch.setattr(aot_inductor, "compile_package", copied)
    target = replace(AOT, candidates=AOT.candidates[1:2])
    return deploy(digits_model, data=digits, target=target, max_accuracy_drop=5, out=tmp_path / "b.bundle")


def test_a_package_computes_what_the_module_does(package: Path, digits_model: Model) -> None:
    network = deployable(digits_model.module, digits_model.spec.input)
    with open_file("aot-inductor", package, threads=2) as session:
        assert (session.engine, session.threads, session.size, session.channels) == (
            "aot-inductor",
            2,
            (8, 8),
            1,
        )
        assert (session.batch, session.num_classes) == (None, 10)
        for batch in (1, 2, 7):
            images = example_images(batch, digits_model)
            with torch.inference_mode():
                expected = network(torch.from_numpy(images)).numpy()
            images.flags.writeable = False
            assert relative_difference(session(images), expected) < 1e-5
        assert session(images[:0]).shape == (0, 10)
        with pytest.raises(InputSizeError, match="takes uint8"):
            session(images.astype(np.float32))


def test_threads_are_the_session_s_and_the_process_keeps_its_own(
    package: Path, digits_model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked: list[int] = []
    given = torch.set_num_threads
    before = torch.get_num_threads()
    with open_file("aot-inductor", package, threads=before + 1) as session:
        monkeypatch.setattr(torch, "set_num_threads", lambda count: (asked.append(count), given(count)))
        session(example_images(1, digits_model))
    assert asked == [before + 1, before]
    assert torch.get_num_threads() == before


def test_a_package_says_what_it_is_without_torch(package: Path, digits_model: Model) -> None:
    about = read_package(package)
    assert about["input"] == digits_model.spec.input.to_json()
    assert about["labels"] == list(digits_model.spec.labels)
    assert (about["precision"], about["device"]) == ("fp32", "cpu")
    assert about["code_flags"] == machine.code_flags()


def test_a_processor_without_its_instructions_is_refused(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    own = machine.code_flags()
    assert own and machine.missing_code_flags(own) == []
    monkeypatch.setattr(machine, "code_flags", lambda: own[1:])
    with pytest.raises(EngineError, match=f"compiled for a processor with {own[0]}, which this one lacks"):
        open_file("aot-inductor", package, threads=1)


def test_a_package_needs_torch_and_says_which(package: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(EngineError, match=r"PyTorch is not installed.*pip install torch==\d"):
        open_file("aot-inductor", package, threads=1)


def test_damaged_and_foreign_packages(package: Path, tmp_path: Path) -> None:
    (tmp_path / "cut.pt2").write_bytes(package.read_bytes()[:1000])
    (tmp_path / "empty.pt2").touch()
    for name in ("cut.pt2", "empty.pt2"):
        with pytest.raises(EngineError, match=f"{name} is no package that can be read"):
            open_file("aot-inductor", tmp_path / name, threads=1)
    write_package(tmp_path / "foreign.pt2", {})
    with pytest.raises(EngineError, match="was not compiled by cveff"):
        open_file("aot-inductor", tmp_path / "foreign.pt2", threads=1)
    with zipfile.ZipFile(tmp_path / "hollow.pt2", "w") as hollow:
        hollow.writestr(f"{FOLDER}/a.wrapper_metadata.json", "{}")
    with pytest.raises(EngineError, match="machine code is damaged or missing"):
        open_file("aot-inductor", tmp_path / "hollow.pt2", threads=1)
    changed = bytearray(package.read_bytes())
    changed[len(changed) // 2] ^= 1
    (tmp_path / "changed.pt2").write_bytes(changed)
    with pytest.raises(EngineError, match=r"changed\.pt2 is no package that can be read"):
        open_file("aot-inductor", tmp_path / "changed.pt2", threads=1)


def test_what_the_loader_says_is_repeated_with_both_versions(
    package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(path: str) -> None:
        raise RuntimeError("undefined symbol: aoti_torch_new")

    monkeypatch.setattr(importlib.import_module("torch._inductor"), "aoti_load_package", refuse)
    version = torch.__version__.partition("+")[0]
    with pytest.raises(
        EngineError, match=f"which torch {version} compiled .this is {version}.*aoti_torch_new"
    ):
        open_file("aot-inductor", package, threads=1)


def test_a_closed_session_says_so(package: Path, digits_model: Model) -> None:
    session = open_file("aot-inductor", package, threads=1)
    session.close()
    session.close()
    with pytest.raises(EngineError, match="was closed"):
        session(example_images(1, digits_model))


def test_it_is_deployed_verified_and_benched_like_any_file(
    bundle: Deployment, package: Path, digits_model: Model, digits: Data
) -> None:
    assert bundle.chosen["engine"] == "aot-inductor"
    entry = bundle.manifest["engine"]
    assert (entry["file"], entry["precision"]) == ("model.fp32.pt2", "fp32")
    assert [item["name"] for item in bundle.manifest["alternatives"]] == ["onnxruntime"]
    wanted = (bundle.path / "requirements.txt").read_text()
    assert f"\ntorch=={torch.__version__.partition('+')[0]}\n" in wanted
    assert "# onnxruntime==" in wanted
    assert "AOTInductor" in (bundle.path / "report.html").read_text()
    served = next((bundle.path / "triton").glob("*/config.pbtxt")).read_text()
    assert 'backend: "onnxruntime"' in served
    checked = verify(bundle.path, data=digits)
    assert checked.problems == () and checked.precision == "fp32"
    assert verify(package, against=digits_model).problems == ()
    figures = bench([bundle.path, package], batch=2, threads=1, rounds=3)
    assert [item.engine for item in figures] == ["aot-inductor", "aot-inductor"]
    assert all(item.peak_rss_bytes is not None for item in figures)


def test_what_cannot_be_compiled_is_a_candidate_with_its_reason(
    tmp_path: Path,
    digits_model: Model,
    digits: Data,
    quick_timing: object,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    builder = importlib.import_module("torch._inductor.cpp_builder")

    def missing() -> str:
        raise RuntimeError("No working C++ compiler found")

    monkeypatch.setattr(builder, "get_cpp_compiler", missing)
    made = deploy(
        digits_model,
        data=digits,
        target=AOT,
        max_accuracy_drop=5,
        num_calibration=8,
        out=tmp_path / "b.bundle",
    )
    whys = {entry["precision"]: entry["why"] for entry in made.manifest["candidates"][1:]}
    assert "needs a C++ compiler, and there is none; install g++" in whys["fp32"]
    assert made.chosen["engine"] == "onnxruntime"


def test_a_package_for_another_processor_is_not_built(
    tmp_path: Path, digits_model: Model, digits: Data, quick_timing: object
) -> None:
    target = replace(AOT, instructions=("avx2",))
    made = deploy(digits_model, data=digits, target=target, max_accuracy_drop=5, out=tmp_path / "b.bundle")
    assert "compiles for the processor it runs on" in made.manifest["candidates"][1]["why"]


@pytest.mark.parametrize(
    ("settings", "name", "error", "words"),
    [
        ({}, "model.onnx", ExportError, r"must end in \.pt2"),
        ({"precision": "int8"}, "m.pt2", ExportError, "precision 'int8' is unknown; use one of fp32, bf16"),
        ({"device": "tpu"}, "m.pt2", ExportError, "device 'tpu' is unknown; use one of cpu, cuda"),
    ],
)
def test_settings_that_do_not_fit(
    settings: dict[str, Any],
    name: str,
    error: type[CveffError],
    words: str,
    tmp_path: Path,
    digits_model: Model,
) -> None:
    with pytest.raises(error, match=words):
        compile_package(digits_model, tmp_path / name, **settings)
    assert list(tmp_path.iterdir()) == []


def test_the_name_of_the_file_says_what_is_exported(
    tmp_path: Path, digits_model: Model, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def copied(model: Model, path: Path, check: bool) -> Path:
        assert not check
        return path

    monkeypatch.setattr(aot_inductor, "compile_package", copied)
    assert cveff.export(digits_model, tmp_path / "m.pt2", check=False) == tmp_path / "m.pt2"
    with pytest.raises(ExportError, match="opset is of ONNX files"):
        cveff.export(digits_model, tmp_path / "m.pt2", opset=20)


def test_a_gpu_that_is_not_there(
    tmp_path: Path, digits_model: Model, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(MissingDependencyError, match="finds no GPU"):
        compile_package(digits_model, tmp_path / "m.pt2", device="cuda")
    write_package(tmp_path / "gpu.pt2", {KEY: json.dumps({**read_package(package), "device": "cuda"})})
    with pytest.raises(EngineError, match="compiled for a GPU, and PyTorch finds none"):
        open_file("aot-inductor", tmp_path / "gpu.pt2", threads=1)


def test_models_in_16_bits_and_compilers_that_fail(
    tmp_path: Path, digits_model: Model, digits: Data, monkeypatch: pytest.MonkeyPatch
) -> None:
    half = cveff.apply(digits_model, Quantize(precision="fp16"), data=digits)
    with pytest.raises(ExportError, match="quantized or in 16 bits already"):
        compile_package(half, tmp_path / "m.pt2")

    def fail(*_: object, **__: object) -> None:
        raise RuntimeError("g++: internal error")

    monkeypatch.setattr(importlib.import_module("torch._inductor"), "aoti_compile_and_package", fail)
    with pytest.raises(
        ExportError, match=r"cannot be compiled by AOTInductor: RuntimeError: g\+\+: internal"
    ):
        compile_package(digits_model, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_a_package_that_answers_otherwise_is_not_written(
    tmp_path: Path, digits_model: Model, package: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    other = cveff.create("small_resnet_s", labels=digits_model.spec.labels, image_size=8, channels=1)

    def copied(network: Any, model: Model, path: Path, *_: object) -> None:
        path.write_bytes(package.read_bytes())

    monkeypatch.setattr(aot_inductor, "_compile", copied)
    with pytest.raises(ExportError, match="logits differ from PyTorch's by"):
        compile_package(other, tmp_path / "m.pt2")
    assert list(tmp_path.iterdir()) == []


def test_bfloat16_is_compiled_from_the_model_s_half(
    tmp_path: Path, digits_model: Model, digits: Data
) -> None:
    path = compile_package(digits_model, tmp_path / "m.pt2", precision="bf16")
    assert read_package(path)["precision"] == "bf16"
    images, _ = next(digits.val.evaluation_batches(digits_model.spec.input, 64))
    with open_file("aot-inductor", path, threads=1) as session:
        logits = session(images)
    with torch.inference_mode():
        exact = deployable(digits_model.module, digits_model.spec.input)(torch.from_numpy(images)).numpy()
    assert 1e-6 < relative_difference(logits, exact) < 5e-2  # rounded, and not to something else
    assert (logits.argmax(1) == exact.argmax(1)).mean() > 0.95
