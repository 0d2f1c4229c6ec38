"""`run.py` of a bundle, as a user runs it, and `main` as `cveff run` calls it."""

from __future__ import annotations

import importlib.util
import json
import os
import shutil
import stat
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import cveff.runtime
from cveff.runtime import run
from cveff.runtime.run import main


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    """A folder with images in two levels, and things that are none."""
    folder = tmp_path / "photos"
    (folder / "more").mkdir(parents=True)
    rng = np.random.default_rng(0)
    for index, name in enumerate(("a.png", "b.JPG", "more/c.webp", "more/d.png")):
        pixels = rng.integers(0, 256, (45 + index, 60 - index, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(folder / name)
    (folder / "notes.txt").write_text("no image")
    (folder / ".hidden.png").write_text("no image")
    return folder


def script(bundle: Path, *arguments: object, **options: Any) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, str(bundle / "run.py"), *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60, **options)


def listing(folder: Path) -> dict[str, bytes]:
    return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def test_a_folder_from_any_directory_leaves_the_bundle_as_it_was(
    tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    before = listing(tiny_bundle)
    for path in (tiny_bundle, *tiny_bundle.rglob("*")):
        path.chmod(path.stat().st_mode & ~(stat.S_IWUSR | stat.S_IWGRP | stat.S_IWOTH))
    result = script(tiny_bundle, photos, "--json", cwd="/")
    assert (result.returncode, result.stderr) == (0, "")
    document = json.loads(result.stdout)
    assert [Path(item["path"]).name for item in document["images"]] == ["a.png", "b.JPG", "c.webp", "d.png"]
    assert (document["engine"], document["threads"], document["errors"]) == ("onnxruntime", 1, [])
    assert listing(tiny_bundle) == before


def test_another_package_of_that_name_does_not_get_in_the_way(
    tiny_bundle: Path, photos: Path, tmp_path: Path
) -> None:
    (tmp_path / "other" / "runtime").mkdir(parents=True)
    (tmp_path / "other" / "runtime" / "__init__.py").write_text("raise SystemExit('the wrong package')")
    for settings in ({"PYTHONPATH": str(tmp_path / "other")}, {"PYTHONSAFEPATH": "1"}):
        result = script(tiny_bundle, photos / "a.png", env={**os.environ, **settings}, cwd=tmp_path / "other")
        assert (result.returncode, result.stderr) == (0, "")


def test_the_answers_are_the_engines(tiny_bundle: Path, photos: Path) -> None:
    document = json.loads(script(tiny_bundle, photos, "--json", "--batch-size", 3).stdout)
    with cveff.runtime.open(tiny_bundle) as engine:
        for item in document["images"]:
            row = engine(engine.preprocess(item["path"]))[0]
            assert [prediction["index"] for prediction in item["predictions"]] == np.argsort(-row).tolist()
            for prediction in item["predictions"]:
                assert prediction["label"] == engine.labels[prediction["index"]]
                assert prediction["probability"] == pytest.approx(float(row[prediction["index"]]), rel=1e-5)


def test_without_torch_torchvision_timm_or_cveff(tiny_bundle: Path, photos: Path, tmp_path: Path) -> None:
    """A copy of the bundle alone, with everything else but numpy, Pillow and the engines blocked."""
    shutil.copytree(tiny_bundle, tmp_path / "alone")
    blocker = (
        "import runpy, sys\n"
        "class Blocker:\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.partition('.')[0] in {'torch', 'torchvision', 'timm', 'cveff', 'onnx', 'scipy'}:\n"
        "            raise ImportError('blocked: ' + name)\n"
        "sys.meta_path.insert(0, Blocker())\n"
        "sys.path[0] = sys.argv[1].rpartition('/')[0]\n"
        "sys.argv = sys.argv[1:]\n"
        "runpy.run_path(sys.argv[0], run_name='__main__')\n"
    )
    for engine in ("onnxruntime", "openvino"):
        command = [
            sys.executable,
            "-c",
            blocker,
            str(tmp_path / "alone" / "run.py"),
            str(photos),
            "--engine",
            engine,
        ]
        result = subprocess.run(command, capture_output=True, text=True, check=False, cwd="/", timeout=60)
        assert (result.returncode, result.stderr) == (0, ""), result.stderr
        assert len(result.stdout.splitlines()) == 4


@pytest.mark.parametrize("engine", ["onnxruntime", "openvino"])
def test_opening_and_predicting_fit_in_250_megabytes(tiny_bundle: Path, photos: Path, engine: str) -> None:
    """The interpreter, numpy, Pillow and the engine; a model adds its own weights."""
    code = (
        "import resource, subprocess, sys; subprocess.run(sys.argv[1:], check=True, stdout=subprocess.DEVNULL); "
        "print(resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)"
    )
    command = [sys.executable, str(tiny_bundle / "run.py"), str(photos), "--engine", engine]
    result = subprocess.run(
        [sys.executable, "-c", code, *command], capture_output=True, text=True, check=True
    )
    assert int(result.stdout) < 250 * 1024  # KiB


def test_a_bad_image_does_not_stop_the_others(tiny_bundle: Path, photos: Path) -> None:
    (photos / "b.JPG").write_bytes(b"damaged")
    Image.new("RGB", (4, 4)).save(photos / "more" / "small.png")
    result = script(tiny_bundle, photos)
    assert result.returncode == 2
    assert [Path(line.split()[0]).name for line in result.stdout.splitlines()] == ["a.png", "c.webp", "d.png"]
    assert "b.JPG is not an image" in result.stderr
    assert "small.png 4×4 is smaller than the model's 40×32 input" in result.stderr
    assert "2 of 5 images could not be read" in result.stderr
    assert "Traceback" not in result.stderr
    document = json.loads(script(tiny_bundle, photos, "--json", "--resize").stdout)
    assert [Path(item["path"]).name for item in document["errors"]] == ["b.JPG"]
    assert len(document["images"]) == 4


def test_every_image_bad(tiny_bundle: Path, photos: Path) -> None:
    result = script(tiny_bundle, photos / "notes.txt", "--json")
    assert result.returncode == 2
    assert json.loads(result.stdout)["images"] == []


@pytest.mark.skipif(importlib.util.find_spec("tensorrt") is not None, reason="TensorRT is installed")
def test_tensorrt_says_what_it_needs(tiny_bundle: Path, photos: Path) -> None:
    result = script(tiny_bundle, photos, "--engine", "tensorrt")
    assert result.returncode == 2
    assert "TensorRT is not installed" in result.stderr
    assert "pip install tensorrt cuda-python" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["none.png"], "none.png does not exist"),
        ([], "the following arguments are required"),
        (["PHOTO", "--engine", "caffe"], "ships no file for engine 'caffe'; it has onnxruntime:fp32"),
        (["PHOTO", "--threads", "0"], "'0' is not a positive integer"),
        (["PHOTO", "--top-k", "-1"], "'-1' is not a positive integer"),
        (["PHOTO", "--batch-size", "x"], "'x' is not a positive integer"),
        (["PHOTO", "--speed", "9"], "unrecognized arguments"),
        (["EMPTY"], "holds no images"),
    ],
)
def test_wrong_arguments(
    tiny_bundle: Path,
    photos: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    arguments: list[str],
    words: str,
) -> None:
    (tmp_path / "empty").mkdir()
    places = {"PHOTO": str(photos / "a.png"), "EMPTY": str(tmp_path / "empty")}
    assert main([places.get(word, word) for word in arguments], bundle=tiny_bundle) == 2
    output = capsys.readouterr()
    assert output.out == ""
    assert words in output.err


def test_a_tampered_bundle_is_one_line_and_code_two(tiny_bundle: Path, photos: Path) -> None:
    (tiny_bundle / "report.html").write_text("changed by somebody")
    result = script(tiny_bundle, photos)
    assert (result.returncode, result.stdout) == (2, "")
    assert len(result.stderr.splitlines()) == 1
    assert "report.html" in result.stderr
    (tiny_bundle / "report.html").write_text("<p>FIGURES</p>")
    assert script(tiny_bundle, photos).returncode == 2
    assert script(tiny_bundle, photos, "--no-verify").returncode == 0


def test_help_has_an_example(tiny_bundle: Path) -> None:
    result = script(tiny_bundle, "--help")
    assert result.returncode == 0
    assert "python run.py cat.jpg photos/" in result.stdout


def test_main_takes_the_bundle_first(
    tiny_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_bundle), str(photos / "a.png"), "--top-k", "2"]) == 0
    assert capsys.readouterr().out.count("%") == 2
    assert main([str(photos), str(photos / "a.png")]) == 2
    assert "is not a bundle" in capsys.readouterr().err


def test_top_k_past_the_classes_lists_them_all(
    tiny_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(photos / "a.png"), "--top-k", "99"], bundle=tiny_bundle) == 0
    assert capsys.readouterr().out.count("%") == 5


def test_a_processor_without_the_measured_instructions_is_warned(
    tiny_bundle: Path, photos: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    manifest["machine"]["isa"] = ["avx2", "amx_of_tomorrow"]
    (tiny_bundle / "manifest.json").write_text(json.dumps(manifest))
    monkeypatch.setattr("cveff.runtime.machine.isa", lambda: ["avx2"])
    assert main([str(photos / "a.png")], bundle=tiny_bundle) == 0
    output = capsys.readouterr()
    assert "warning: this processor lacks amx_of_tomorrow" in output.err
    assert "warning" not in output.out


def test_ctrl_c_is_quiet(tiny_bundle: Path, photos: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(run, "open_bundle", stop)
    assert main([str(photos)], bundle=tiny_bundle) == 130


def test_a_reader_that_goes_away_is_no_error(tiny_bundle: Path, photos: Path) -> None:
    command = f"{sys.executable} {tiny_bundle / 'run.py'} {photos} --json | true"
    result = subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=False, timeout=60)
    assert "Traceback" not in result.stderr
    assert "Exception" not in result.stderr


def test_labels_in_any_alphabet_print_on_any_terminal(
    tmp_path: Path, photos: Path, tiny_onnx: Path, manifest_maker: Callable[..., dict[str, Any]]
) -> None:
    from cveff.export.bundle import write_bundle

    labels = ["猫", "Größe", "a\nb", "e", "🐟"]
    bundle = write_bundle(
        tmp_path / "b",
        manifest=manifest_maker(labels=labels),
        files={"model.onnx": tiny_onnx},
        report_html="",
    )
    for options in ([], ["--json"]):
        result = script(
            bundle, photos / "a.png", *options, env={**os.environ, "PYTHONIOENCODING": "ascii", "LC_ALL": "C"}
        )
        assert (result.returncode, result.stderr) == (0, "")
