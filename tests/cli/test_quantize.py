"""`cveff quantize`: a folder, a file and a table; every wrong word is one line and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cveff
from cveff import model_zoo
from cveff.cli import main
from cveff.compress.quant.network import is_cast, is_quantized
from cveff.data import load
from cveff.runtime.engines import open_file

QUICK = ("--images", "64", "--weights", "nearest", "--method", "minmax")


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """Digits as files without labels."""
    folder = tmp_path / "photos"
    folder.mkdir()
    images, _ = next(iter(load("digits").val.evaluation_batches(model_zoo.load("digits").spec.input, 60)))
    for index, image in enumerate(images):
        Image.fromarray(image[:, :, 0]).save(folder / f"{index}.png")
    return folder


def _json(capsys: pytest.CaptureFixture[str], *words: str) -> dict[str, Any]:
    assert main(["quantize", *words, "--quiet", "--json"]) == 0
    return dict(json.loads(capsys.readouterr().out))


def test_a_zoo_card_becomes_a_smaller_file_that_answers_the_same(capsys: pytest.CaptureFixture[str]) -> None:
    made = _json(capsys, "digits", *QUICK)
    assert (made["out"], made["onnx"]) == ("runs/digits-int8", "runs/digits-int8/model.onnx")
    figures, found = made["figures"], made["calibration"]
    assert (figures["split"], figures["count"], figures["engine"]) == ("test", 359, "onnxruntime")
    assert figures["accuracy"] >= figures["float_accuracy"] - 0.01
    assert figures["agreement"] >= 0.98 and figures["simulated"] >= 0.98 and 0 < figures["error"] < 0.05
    assert (found["source"], found["method"], found["images"]) == ("train", "minmax", 48)
    assert 0 < found["error"] < 0.05
    assert made["bytes"] == Path(made["onnx"]).stat().st_size < 0.4 * made["float_bytes"]
    assert is_quantized(cveff.load(made["out"]).module)
    assert json.loads((Path(made["out"]) / "quantize.json").read_text()) == made
    with open_file("onnxruntime", made["onnx"], threads=1) as session:
        data = load("digits")
        images, targets = next(
            iter(data.evaluation.evaluation_batches(model_zoo.load("digits").spec.input, 359))
        )
        assert (session(images).argmax(1) == targets).mean() == figures["accuracy"]
    assert main(["quantize", "digits", *QUICK, "--quiet"]) == 2
    assert "holds an earlier result; --overwrite replaces it" in capsys.readouterr().err
    again = _json(capsys, "digits", *QUICK, "--overwrite")
    assert again == made, "the same seed gives the same file"


def test_the_table_says_what_was_done(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["quantize", "digits", *QUICK, "--out", "small"]) == 0
    out, err = capsys.readouterr()
    for expected in (
        "on 359 images of test", "fp32", "int8", "accuracy", "same answer as fp32", "ONNX Runtime", "int8 for cpu",
        "48 images of train", "minmax", "held-out error", "small/model.onnx",
    ):  # fmt: skip
        assert expected in out
    assert "calibrating" in err and "exporting" in err


def test_a_folder_without_labels_is_enough(capsys: pytest.CaptureFixture[str], photos: Path) -> None:
    """For a model that does not know what it was trained on: half calibrates, half measures agreement."""
    cveff.save(model_zoo.load("digits"), "plain")
    made = _json(
        capsys, "plain", *QUICK, "--calibration", str(photos), "--out", "small", "--onnx", "files/a.onnx"
    )
    figures = made["figures"]
    assert (made["calibration"]["source"], figures["split"], figures["count"]) == (
        "calibration",
        "held-out",
        30,
    )
    assert figures["accuracy"] is None and figures["float_accuracy"] is None
    assert figures["agreement"] >= 0.9
    assert any("Only 30 images were measured: one image is 3.3 points" in line for line in made["warnings"])
    assert Path("files/a.onnx").is_file() and not Path("small/model.onnx").exists()
    assert made["settings"]["calibration"] == str(photos)
    both = _json(capsys, "plain", *QUICK, "--calibration", str(photos), "--data", "digits", "--out", "both")
    assert both["calibration"]["source"] == "images" and both["figures"]["count"] == 359


@pytest.mark.parametrize(
    ("precision", "most"),
    [("fp16", 0.65), ("bf16", 0.65), ("fp8", 0.4)],
)
def test_other_precisions(
    capsys: pytest.CaptureFixture[str], precision: str, most: float, opens_float8: bool
) -> None:
    engine = "onnxruntime" if precision == "fp16" or (precision == "fp8" and opens_float8) else "torch"
    made = _json(capsys, "digits", "--precision", precision, "--images", "32")
    figures = made["figures"]
    assert figures["engine"] == engine
    assert (figures["simulated"] is None) == (engine == "torch")
    assert any("PyTorch's figures are given" in line for line in made["warnings"]) == (engine == "torch")
    assert figures["agreement"] >= 0.97 and made["bytes"] < most * made["float_bytes"]
    assert is_cast(cveff.load(f"runs/digits-{precision}").module) == (precision != "fp8")


def test_weights_alone(capsys: pytest.CaptureFixture[str]) -> None:
    arguments = {
        "image_size": 8,
        "patch_size": 4,
        "embed_dim": 128,
        "depth": 1,
        "num_heads": 2,
        "channels": 1,
    }
    cveff.save(cveff.create("vit_tiny_patch16_224", num_classes=10, **arguments), "vit")
    made = _json(
        capsys,
        "vit",
        "--data",
        "digits",
        "--precision",
        "int4-weights",
        "--set",
        "group_size=32",
        "--images",
        "32",
    )
    assert made["settings"]["group_size"] == 32 and made["calibration"]["images"] == 32
    assert made["calibration"]["method"] is None and made["bytes"] < 0.4 * made["float_bytes"]
    assert made["figures"]["simulated"] >= 0.99


def test_the_scheme_follows_the_target(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    (tmp_path / "intel.toml").write_text(
        'name = "intel"\ndescription = ""\ncandidates = [["onnxruntime", "fp32"], ["openvino", "int8"]]\n'
    )
    made = _json(capsys, "digits", *QUICK, "--target", "intel.toml")
    assert made["settings"]["scheme"] == "openvino"
    made = _json(capsys, "digits", *QUICK, "--target", "intel.toml", "--scheme", "cpu", "--overwrite")
    assert made["settings"]["scheme"] == "cpu"


def _fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    before = sorted(Path().rglob("*"))
    assert main(["quantize", *words, "--quiet"]) == 2
    out, err = capsys.readouterr()
    (line,) = err.splitlines()
    assert out == "" and sorted(Path().rglob("*")) == before, "nothing is left behind"
    return line


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["resnet18"], "neither a saved model nor a zoo card"),
        (["digits", "--precision", "int7"], "precision: 'int7' is unknown; did you mean 'int8'"),
        (["digits", "--scheme", "npu"], "scheme: 'npu' is unknown"),
        (["digits", "--method", "guess"], "method: 'guess' is unknown"),
        (["digits", "--weights", "random"], "weights: 'random' is unknown"),
        (["digits", "--images", "0"], "quantize.images is 0; give 1 or more"),
        (["digits", "--set", "equalise=true"], "equalise: unknown key; did you mean 'equalize'"),
        (["digits", "--precision", "fp16", "--method", "mse"], "method has no effect on fp16; remove it"),
        (["digits", "--precision", "int4-weights", "--weights", "learned"], "weights is 'learned'"),
        (["digits", "--target", "moon"], "no target profile 'moon'"),
        (["digits", "--calibration", "absent"], "absent is not a folder"),
        (["digits", "--calibration", "empty"], "empty holds no images; give a folder of images"),
        (["digits", "--data", "absent"], "absent"),
        (["plain"], "does not record the images it was trained on; give --data, or --calibration"),
        (["digits", "--out", "taken"], "holds files that `cveff quantize` did not write"),
        (["plain", "--data", "digits", "--out", "plain"], "plain holds plain itself"),
        (["digits", "--onnx", "model.bin"], "give one that ends in .onnx"),
        (["digits", "--onnx", "there.onnx"], "there.onnx exists; --overwrite replaces it"),
        (["digits", "--calibration", "large"], "3×3"),
        (
            ["digits", "--exclude", "fc", *QUICK],
            "'fc' is no operator of this network; did you mean 'fc:linear:0'",
        ),
        (["digits", "--precision", "int8-weights"], "none of the 1 linear layers can be quantized"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_users_mistake_is_one_line(words: list[str], expected: str, capsys, tmp_path: Path) -> None:
    cveff.save(model_zoo.load("digits"), tmp_path / "plain")
    (tmp_path / "empty").mkdir()
    (tmp_path / "taken").mkdir()
    (tmp_path / "taken" / "notes.txt").write_text("mine")
    (tmp_path / "there.onnx").write_text("")
    (tmp_path / "large").mkdir()
    for index in range(4):
        Image.fromarray(np.zeros((3, 3), np.uint8)).save(tmp_path / "large" / f"{index}.png")
    assert expected in _fails(capsys, *words)


def test_a_quantized_model_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    _json(capsys, "digits", *QUICK, "--out", "small")
    assert "is quantized already; start from the float model" in _fails(
        capsys, "small", "--data", "digits", "--out", "again"
    )
