"""The operators' table is read once, and exports are what they were."""

from __future__ import annotations

from contextlib import nullcontext
from pathlib import Path

import pytest

import cveff
from cveff.export import torchlib
from cveff.export.torchlib import ONNXRegistry, read_once


def test_the_table_is_read_once_and_no_export_changes_it() -> None:
    with read_once():
        first, second = (ONNXRegistry.from_torchlib(opset_version=20) for _ in range(2))
    assert first.functions.keys() == second.functions.keys()
    target, found = next(iter(first.functions.items()))
    assert second.functions[target] == found
    assert second.functions[target] is not found
    found.clear()
    with read_once():
        assert ONNXRegistry.from_torchlib(opset_version=20).functions[target]
    assert ONNXRegistry.from_torchlib(opset_version=20) is not first  # and outside, as PyTorch does


def test_a_file_is_the_same_with_and_without(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = cveff.create("small_resnet_s", num_classes=3, image_size=16)
    mine = cveff.export(model, tmp_path / "mine.onnx").read_bytes()
    monkeypatch.setattr(torchlib, "read_once", nullcontext)
    assert cveff.export(model, tmp_path / "theirs.onnx").read_bytes() == mine
