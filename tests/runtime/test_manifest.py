"""A bundle is trusted only after its manifest and every file of it were checked."""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

import cveff.runtime
from cveff.errors import BundleError
from cveff.runtime.manifest import SCHEMA_VERSION, check_path, model_files, read_manifest, verify_files

KEYS = [
    *("schema_version", "model", "task", "input", "labels", "engine", "alternatives", "files"),
    *("metrics", "candidates", "recipe", "versions", "machine"),
]


def edit(bundle: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest in place, as somebody with an editor would."""
    path = bundle / "manifest.json"
    manifest = json.loads(path.read_text())
    change(manifest)
    path.write_text(json.dumps(manifest))


def refused(bundle: Path, words: str, **options: Any) -> None:
    with pytest.raises(BundleError, match=words):
        cveff.runtime.open(bundle, **options)


def test_a_bundle_as_written_is_accepted(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    verify_files(tiny_bundle, manifest)
    listed = {entry["path"] for entry in manifest["files"]}
    present = {path.relative_to(tiny_bundle).as_posix() for path in tiny_bundle.rglob("*") if path.is_file()}
    assert present - listed == {"manifest.json"}


def test_every_file_is_guarded_by_its_hash(tiny_bundle: Path) -> None:
    """Change one bit of any file, its size unchanged, and the bundle is refused by that file's name."""
    for entry in read_manifest(tiny_bundle)["files"]:
        path = tiny_bundle / entry["path"]
        data = path.read_bytes()
        path.unlink()  # one name of a hard-linked pair must not change the other
        path.write_bytes(data[:-1] + bytes([data[-1] ^ 1]))
        refused(tiny_bundle, f"{path.name} does not match its SHA-256")
        path.write_bytes(data + b" ")
        refused(tiny_bundle, f"{path.name} has {len(data) + 1} bytes")
        path.unlink()
        refused(tiny_bundle, f"{path.name} is missing")
        path.write_bytes(data)
    cveff.runtime.open(tiny_bundle).close()


def test_without_verification_sizes_and_presence_still_count(tiny_bundle: Path) -> None:
    report = tiny_bundle / "report.html"
    report.write_text(report.read_text().swapcase())
    refused(tiny_bundle, "SHA-256")
    cveff.runtime.open(tiny_bundle, verify=False).close()
    report.unlink()
    refused(tiny_bundle, "missing", verify=False)


def test_files_that_are_not_listed_do_no_harm(tiny_bundle: Path) -> None:
    (tiny_bundle / "notes.txt").write_text("mine")
    cveff.runtime.open(tiny_bundle).close()


def test_a_newer_schema_is_refused_before_anything_else(tiny_bundle: Path) -> None:
    newer = {"schema_version": SCHEMA_VERSION + 1, "all": "different"}
    (tiny_bundle / "manifest.json").write_text(json.dumps(newer))
    refused(
        tiny_bundle,
        f"schema version {SCHEMA_VERSION + 1}, this program reads up to {SCHEMA_VERSION}; upgrade",
    )


@pytest.mark.parametrize("version", [0, -1, "1", 1.0, None, True])
def test_a_strange_schema_version(tiny_bundle: Path, version: Any) -> None:
    edit(tiny_bundle, lambda manifest: manifest.update(schema_version=version))
    refused(tiny_bundle, "schema_version")


@pytest.mark.parametrize("key", KEYS)
def test_a_missing_or_wrong_key_is_named(tiny_bundle: Path, key: str) -> None:
    edit(tiny_bundle, lambda manifest: manifest.pop(key))
    refused(tiny_bundle, f"lacks the key '{key}'")
    edit(tiny_bundle, lambda manifest: manifest.update({key: 7.5}))
    refused(tiny_bundle, f"{key} is 7.5")


@pytest.mark.parametrize("key", ["name", "file", "threads", "options"])
def test_a_missing_key_of_an_engine_is_named(tiny_bundle: Path, key: str) -> None:
    edit(tiny_bundle, lambda manifest: manifest["alternatives"][0].pop(key))
    refused(tiny_bundle, rf"alternatives\[0\] lacks the key '{key}'")
    edit(tiny_bundle, lambda manifest: manifest["engine"].pop(key))
    refused(tiny_bundle, f"engine lacks the key '{key}'")


@pytest.mark.parametrize("key", ["path", "sha256", "bytes"])
def test_a_missing_key_of_a_file_is_named(tiny_bundle: Path, key: str) -> None:
    edit(tiny_bundle, lambda manifest: manifest["files"][1].pop(key))
    refused(tiny_bundle, rf"files\[1\] lacks the key '{key}'")


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"labels": []}, "labels must be"),
        ({"labels": ["a", 3]}, "labels must be"),
        ({"labels": ["a", "b"]}, "5 classes, but the manifest has 2 labels"),
        ({"task": "poetry"}, "task is 'poetry'"),
        ({"task": "detection"}, "suppression is None"),
        ({"input": {}}, "input.size is missing"),
        ({"input": {"size": [32]}}, "input.size is"),
        ({"input": {"size": [32, 40], "colour": 1}}, "unknown keys"),
        ({"input": {"size": [32, 40], "mean": ["a", "b", "c"]}}, "input.mean is"),
        ({"input": {"size": "32x40"}}, "input.size is"),
        ({"input": {"size": [40, 32]}}, "do not belong together"),
        ({"input": {"size": [32, 40], "channels": 1, "mean": [0.5], "std": [0.5]}}, "do not belong together"),
        ({"alternatives": [None]}, r"alternatives\[0\] is None"),
        ({"files": ["model.onnx"]}, r"files\[0\] is 'model.onnx'"),
        ({"files": []}, "files does not list 'model.onnx'"),
        ({"instructions": "avx2"}, "instructions is 'avx2'; it must be a list"),
        ({"instructions": ["avx2", 2]}, "it must be a list of strings"),
    ],
)
def test_values_that_do_not_fit(tiny_bundle: Path, values: dict[str, Any], words: str) -> None:
    edit(tiny_bundle, lambda manifest: manifest.update(values))
    refused(tiny_bundle, words)


@pytest.mark.parametrize("content", ["", "{", "[]", "null", '"text"', "{'a': 1}", "[" * 100_000])
def test_a_damaged_manifest(tiny_bundle: Path, content: str) -> None:
    (tiny_bundle / "manifest.json").write_text(content)
    refused(tiny_bundle, "damaged")


def test_a_manifest_of_bytes_that_are_no_text(tiny_bundle: Path) -> None:
    (tiny_bundle / "manifest.json").write_bytes(b"\xff\xfe\x00garbage")
    refused(tiny_bundle, "not valid JSON")


@pytest.mark.parametrize(
    "path",
    [
        "../model.onnx",
        "a/../../b",
        "/etc/passwd",
        "..",
        ".",
        "",
        "a//b",
        "a/./b",
        "C:/a",
        "a\\..\\b",
        "a\x00b",
        7,
        None,
    ],
)
def test_paths_that_leave_the_folder_are_refused(tiny_bundle: Path, path: Any) -> None:
    with pytest.raises(BundleError):
        check_path(path)

    def listed(manifest: dict[str, Any]) -> None:
        manifest["files"][0]["path"] = path

    edit(tiny_bundle, listed)
    with pytest.raises(BundleError, match=r"refused|not a file name|path is"):
        cveff.runtime.open(tiny_bundle, verify=False)


def test_an_engine_file_outside_the_list_is_never_opened(tiny_bundle: Path, tiny_onnx: Path) -> None:
    (tiny_bundle / "other.onnx").write_bytes(tiny_onnx.read_bytes())
    edit(tiny_bundle, lambda manifest: manifest["engine"].update(file="other.onnx"))
    refused(tiny_bundle, "does not list 'other.onnx'")
    edit(tiny_bundle, lambda manifest: manifest["engine"].update(file=str(tiny_onnx)))
    refused(tiny_bundle, "does not list")


def test_an_openvino_file_needs_its_weights_in_the_list(tiny_bundle: Path) -> None:
    def drop(manifest: dict[str, Any]) -> None:
        manifest["files"] = [entry for entry in manifest["files"] if entry["path"] != "model.bin"]

    edit(tiny_bundle, drop)
    refused(tiny_bundle, "does not list 'model.bin'")


def test_a_link_that_leads_out_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    inside, outside = tiny_bundle / "report.html", tmp_path / "outside.html"
    outside.write_bytes(inside.read_bytes())
    inside.unlink()
    inside.symlink_to(outside)
    refused(tiny_bundle, "leads out of the bundle")
    refused(tiny_bundle, "leads out of the bundle", verify=False)
    inside.unlink()
    (tiny_bundle / "kept.html").write_bytes(outside.read_bytes())
    inside.symlink_to("kept.html")
    cveff.runtime.open(tiny_bundle).close()


def test_a_linked_folder_that_leads_out_is_refused(tiny_bundle: Path, tmp_path: Path) -> None:
    (tiny_bundle / "runtime").rename(tmp_path / "elsewhere")
    (tiny_bundle / "runtime").symlink_to(tmp_path / "elsewhere")
    refused(tiny_bundle, "leads out of the bundle")


def test_something_that_is_no_regular_file_is_refused(tiny_bundle: Path) -> None:
    (tiny_bundle / "report.html").unlink()
    os.mkfifo(tiny_bundle / "report.html")
    refused(tiny_bundle, "missing")


def test_not_a_bundle(tmp_path: Path, tiny_onnx: Path) -> None:
    refused(tmp_path / "none", "is not a folder")
    refused(tiny_onnx, "does not say what it is")
    refused(tmp_path, "it has no manifest.json")


def test_a_linked_bundle_opens(tiny_bundle: Path, tmp_path: Path) -> None:
    (tmp_path / "link").symlink_to(tiny_bundle)
    cveff.runtime.open(tmp_path / "link").close()


def test_a_manifest_from_before_instructions_were_recorded_is_read(tiny_bundle: Path) -> None:
    manifest = read_manifest(tiny_bundle)
    assert "instructions" not in manifest
    assert all(file.saturation is None and not file.is_guarded for file in model_files(manifest))


@pytest.mark.parametrize(("severe", "is_guarded"), [(0, True), (3, False)])
def test_what_was_done_against_sums_that_clip(tiny_bundle: Path, severe: int, is_guarded: bool) -> None:
    saturation = {"guard": "narrow", "severe": severe, "key of tomorrow": None}
    edit(tiny_bundle, lambda manifest: manifest["engine"].update(saturation=saturation))
    chosen, other = model_files(read_manifest(tiny_bundle))
    assert (chosen.saturation, chosen.is_guarded) == (saturation, is_guarded)
    assert other.saturation is None


@pytest.mark.parametrize(
    ("saturation", "words"),
    [
        ("narrow", "engine: saturation is 'narrow'; it must be an object"),
        ({"guard": "narrow"}, "engine.saturation lacks the key 'severe'"),
        ({"severe": "none"}, "severe is 'none'; it must be an integer"),
    ],
)
def test_a_damaged_record_of_it_is_refused(tiny_bundle: Path, saturation: Any, words: str) -> None:
    edit(tiny_bundle, lambda manifest: manifest["engine"].update(saturation=saturation))
    refused(tiny_bundle, words)
