"""A bundle is complete, hashed, valid by its published schema, and appears whole or not at all."""

from __future__ import annotations

import errno
import json
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jsonschema
import numpy as np
import pytest

import cveff.runtime
from cveff.errors import BundleError, CveffError, EngineError
from cveff.export.bundle import requirements, schema, validate, write_bundle
from cveff.runtime.input_spec import CROP_MODES, INTERPOLATIONS, InputSpec
from cveff.runtime.manifest import SCHEMA_VERSION, read_manifest, sha256

Maker = Callable[..., dict[str, Any]]


def leftovers(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_what_a_bundle_holds(tiny_bundle: Path, tiny_onnx: Path) -> None:
    present = {path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()}
    runtime = {f"runtime/{path.name}" for path in Path(cveff.runtime.__file__).parent.glob("*.py")}
    assert present == runtime | {
        *(
            "manifest.json",
            "model.onnx",
            "model.xml",
            "model.bin",
            "run.py",
            "requirements.txt",
            "report.html",
        ),
        *("triton/tiny_net/config.pbtxt", "triton/tiny_net/labels.txt", "triton/tiny_net/1/model.onnx"),
    }
    assert (tiny_bundle / "model.onnx").read_bytes() == tiny_onnx.read_bytes()
    assert (tiny_bundle / "report.html").read_text() == "<p>figures</p>"
    for path in runtime:
        assert (tiny_bundle / path).read_bytes() == (
            Path(cveff.runtime.__file__).parents[1] / path
        ).read_bytes()


def test_the_manifest_describes_every_file(tiny_bundle: Path, manifest_maker: Maker) -> None:
    manifest = read_manifest(tiny_bundle)
    assert manifest["schema_version"] == SCHEMA_VERSION
    for entry in manifest["files"]:
        path = tiny_bundle / entry["path"]
        assert (entry["sha256"], entry["bytes"]) == (sha256(path), path.stat().st_size)
    given = manifest_maker()
    assert {key: manifest[key] for key in given if key != "alternatives"} == {
        key: value for key, value in given.items() if key != "alternatives"
    }


def test_a_copied_bundle_is_the_same_bundle(tiny_bundle: Path, tmp_path: Path) -> None:
    shutil.copytree(tiny_bundle, tmp_path / "copy")
    shutil.make_archive(str(tmp_path / "packed"), "zip", tiny_bundle)
    shutil.unpack_archive(str(tmp_path / "packed.zip"), tmp_path / "unpacked")
    images = np.random.default_rng(0).integers(0, 256, (2, 32, 40, 3), dtype=np.uint8)
    rows = []
    for folder in (tiny_bundle, tmp_path / "copy", tmp_path / "unpacked"):
        with cveff.runtime.open(folder) as engine:
            rows.append(engine(images))
    np.testing.assert_array_equal(rows[0], rows[1])
    np.testing.assert_array_equal(rows[0], rows[2])


def test_writing_twice_gives_the_same_files(tmp_path: Path, tiny_onnx: Path, manifest_maker: Maker) -> None:
    paths = [
        write_bundle(
            tmp_path / name, manifest=manifest_maker(), files={"model.onnx": tiny_onnx}, report_html="x"
        )
        for name in ("a", "b")
    ]
    assert read_manifest(paths[0])["files"] == read_manifest(paths[1])["files"]


def test_schema_is_a_valid_draft_2020_12_schema_and_knows_every_input_field() -> None:
    jsonschema.Draft202012Validator.check_schema(schema())
    assert schema()["properties"]["schema_version"] == {"const": SCHEMA_VERSION}
    fields = schema()["$defs"]["input"]["properties"]
    assert set(fields) == set(InputSpec.__dataclass_fields__)
    assert fields["interpolation"]["enum"] == list(INTERPOLATIONS)
    assert fields["crop_mode"]["enum"] == list(CROP_MODES)


@pytest.mark.parametrize("key", sorted(schema()["required"]))
def test_schema_and_runtime_require_the_same_keys(tiny_bundle: Path, key: str) -> None:
    manifest = json.loads((tiny_bundle / "manifest.json").read_text())
    validate(manifest)
    del manifest[key]
    with pytest.raises(BundleError, match=key):
        validate(manifest)
    (tiny_bundle / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(BundleError, match=key):
        read_manifest(tiny_bundle)


def deep(path: str, value: Any) -> Callable[[dict[str, Any]], None]:
    def change(manifest: dict[str, Any]) -> None:
        *parents, last = path.split(".")
        target: Any = manifest
        for name in parents:
            target = target[int(name) if name.isdigit() else name]
        target[last] = value

    return change


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        ("metrics.accuracy.deployed", 89.0, "metrics.accuracy.deployed"),
        ("metrics.agreement", -0.1, "metrics.agreement"),
        ("metrics.latency_ms.batch", 0, "metrics.latency_ms.batch"),
        ("metrics.latency_ms", {}, "metrics.latency_ms"),
        ("engine.name", "tensorflow", "engine.name"),
        ("engine.options", {"inference_precision": "int4"}, "inference_precision"),
        ("input.crop", 0, "input.crop"),
        ("labels", [], "labels"),
        ("task", "poetry", "task"),
        ("candidates.0.chosen", False, "candidates"),
        ("machine", {}, "machine"),
        ("model.name", "", "model.name"),
        ("metrics.peak_rss_bytes", "90 MB", "peak_rss_bytes"),
        ("metrics.accuracy.deployed", float("nan"), "a value JSON does not have"),
        ("recipe", {"path": Path("x")}, "a value JSON does not have"),
    ],
)
def test_a_manifest_that_does_not_fit_is_refused_by_key(
    tmp_path: Path, tiny_onnx: Path, manifest_maker: Maker, path: str, value: Any, words: str
) -> None:
    manifest = manifest_maker()
    deep(path, value)(manifest)
    with pytest.raises(BundleError, match=words):
        write_bundle(tmp_path / "b", manifest=manifest, files={"model.onnx": tiny_onnx}, report_html="")
    assert leftovers(tmp_path) == []


def test_unlabelled_data_and_a_recipe(tmp_path: Path, tiny_onnx: Path, manifest_maker: Maker) -> None:
    manifest = manifest_maker(recipe={"model": {"name": "x"}})
    manifest["metrics"]["accuracy"] = {"reference": None, "deployed": None}
    manifest["candidates"][0]["accuracy"] = None
    path = write_bundle(tmp_path / "b", manifest=manifest, files={"model.onnx": tiny_onnx}, report_html="")
    assert read_manifest(path)["recipe"] == {"model": {"name": "x"}}


@pytest.mark.parametrize(
    ("files", "words"),
    [
        ({}, "names model.onnx, which is not among the files"),
        ({"model.onnx": Path("none.onnx")}, "none.onnx, to be model.onnx in the bundle, does not exist"),
        ({"run.py": Path(__file__)}, "'run.py' is a name the bundle uses itself"),
        ({"runtime/x.py": Path(__file__)}, "a name the bundle uses itself"),
        ({"manifest.json": Path(__file__)}, "a name the bundle uses itself"),
        ({"../model.onnx": Path(__file__)}, "refused"),
        ({"/model.onnx": Path(__file__)}, "refused"),
    ],
)
def test_files_that_do_not_fit(
    tmp_path: Path, manifest_maker: Maker, files: dict[str, Path], words: str
) -> None:
    with pytest.raises(BundleError, match=words):
        write_bundle(tmp_path / "b", manifest=manifest_maker(), files=files, report_html="")
    assert leftovers(tmp_path) == []


def test_an_openvino_model_needs_its_weights(tmp_path: Path, tiny_xml: Path, manifest_maker: Maker) -> None:
    engine = {"name": "openvino", "file": "model.xml", "threads": 1, "options": {}}
    with pytest.raises(BundleError, match=r"names model\.bin"):
        write_bundle(
            tmp_path / "b",
            manifest=manifest_maker(engine=engine),
            files={"model.xml": tiny_xml},
            report_html="",
        )


def test_an_older_bundle_is_replaced_and_anything_else_is_not(
    tiny_bundle: Path, tmp_path: Path, tiny_onnx: Path, manifest_maker: Maker
) -> None:
    def write(out: Path) -> None:
        write_bundle(out, manifest=manifest_maker(), files={"model.onnx": tiny_onnx}, report_html="new")

    write(tiny_bundle)
    assert (tiny_bundle / "report.html").read_text() == "new"
    assert not (tiny_bundle / "model.xml").exists()
    (tmp_path / "thesis").mkdir()
    write(tmp_path / "thesis")  # empty: nothing is lost
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "letter.txt").write_text("keep me")
    with pytest.raises(BundleError, match="would be replaced"):
        write(tmp_path / "home")
    (tmp_path / "file").write_text("keep me")
    with pytest.raises(CveffError, match="existing file"):
        write(tmp_path / "file")
    assert leftovers(tmp_path) == ["file", "home", "my.bundle", "thesis"]
    assert leftovers(tmp_path / "home") == ["letter.txt"]


@pytest.mark.parametrize("error", [errno.ENOSPC, errno.EROFS, errno.EACCES, errno.EDQUOT])
@pytest.mark.parametrize("place", ["copy", "write", "last"])
def test_a_write_that_fails_leaves_the_old_bundle_and_nothing_else(
    tiny_bundle: Path,
    tmp_path: Path,
    tiny_onnx: Path,
    manifest_maker: Maker,
    monkeypatch: pytest.MonkeyPatch,
    error: int,
    place: str,
) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(error, os.strerror(error))

    before = (tiny_bundle / "manifest.json").read_bytes()
    if place == "copy":
        monkeypatch.setattr("cveff.export.bundle.shutil.copyfile", fail)
    elif place == "write":
        monkeypatch.setattr(Path, "write_text", fail)
    else:
        monkeypatch.setattr("cveff.export.bundle.verify_files", fail)
    with pytest.raises(CveffError, match="nothing was left half-written"):
        write_bundle(tiny_bundle, manifest=manifest_maker(), files={"model.onnx": tiny_onnx}, report_html="")
    assert leftovers(tmp_path) == ["my.bundle"]
    assert (tiny_bundle / "manifest.json").read_bytes() == before
    cveff.runtime.open(tiny_bundle).close()


def test_a_disk_that_is_really_too_small(tmp_path: Path, tiny_onnx: Path, manifest_maker: Maker) -> None:
    """The system refuses to let a file grow, in the middle of copying a model of a megabyte."""
    big = tmp_path / "big.bin"
    big.write_bytes(bytes(1_000_000))
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (100_000, before[1]))
    try:
        with pytest.raises(CveffError, match="nothing was left half-written"):
            write_bundle(
                tmp_path / "b",
                manifest=manifest_maker(),
                files={"model.onnx": tiny_onnx, "model.onnx.data": big},
                report_html="",
            )
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert leftovers(tmp_path) == ["big.bin"]


def test_ctrl_c_leaves_nothing(
    tmp_path: Path, tiny_onnx: Path, manifest_maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stop(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("cveff.export.bundle.write_triton", stop)
    with pytest.raises(KeyboardInterrupt):
        write_bundle(
            tmp_path / "b", manifest=manifest_maker(), files={"model.onnx": tiny_onnx}, report_html=""
        )
    assert leftovers(tmp_path) == []


def test_requirements_pin_what_is_installed_and_comment_the_rest(tiny_bundle: Path) -> None:
    from importlib.metadata import version

    lines = (tiny_bundle / "requirements.txt").read_text().splitlines()
    needed = [line for line in lines if not line.startswith("#")]
    assert needed == [
        f"numpy=={version('numpy')}",
        f"pillow=={version('pillow')}",
        f"onnxruntime=={version('onnxruntime').partition('+')[0]}",
    ]
    assert any(line.startswith("# openvino==") for line in lines)


def test_an_engine_that_is_not_installed_has_no_version(
    manifest_maker: Maker, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("cveff.export.bundle._DISTRIBUTIONS", {"onnxruntime": ("no-such-engine",)})
    with pytest.raises(EngineError, match="pip install no-such-engine"):
        requirements(manifest_maker())


def test_labels_with_line_breaks_keep_a_line_each(
    tmp_path: Path, tiny_onnx: Path, manifest_maker: Maker
) -> None:
    labels = ["a\nb", "c\r\nd", "e", "f\u2028g", "h"]
    bundle = write_bundle(
        tmp_path / "b",
        manifest=manifest_maker(labels=labels),
        files={"model.onnx": tiny_onnx},
        report_html="",
    )
    assert len((bundle / "triton/tiny_net/labels.txt").read_text().splitlines()) == 5
    assert cveff.runtime.open(bundle).labels == tuple(labels)


def test_a_bundle_opens_by_its_own_copy_of_the_runtime(tiny_bundle: Path) -> None:
    code = "import runtime; print(runtime.open('.').labels[0], runtime.__file__)"
    result = subprocess.run(
        [sys.executable, "-B", "-c", code], cwd=tiny_bundle, capture_output=True, text=True, check=True
    )
    assert result.stdout.split()[0] == "cat"
    assert Path(result.stdout.split()[1]).is_relative_to(tiny_bundle)
