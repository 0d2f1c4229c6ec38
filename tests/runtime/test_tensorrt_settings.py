"""Settings of TensorRT plans: defaults, what is refused, and what a target's file says."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from cveff.errors import EngineError, TargetError
from cveff.runtime.tensorrt_settings import TensorRT, settings_from
from cveff.target import load_target


def test_json_both_ways() -> None:
    settings = TensorRT(version=10, batches=(4, 4, 4), dla=1, refittable=True)
    assert settings_from({**asdict(settings), "batches": [4, 4, 4]}, 10) == settings
    assert settings_from({}, 10) == TensorRT(version=10)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"fp16": True}, "tensorrt has no option 'fp16'; known: batches, dla"),
        ({"version": 8}, "version of tensorrt is 8; give one of 10, 11"),
        ({"batches": [8, 1, 32]}, "batches of tensorrt is .*ascending"),
        ({"batches": [1, 8]}, "three integers"),
        ({"batches": [0, 1, 2]}, "three integers of 1 or more"),
        ({"batches": 8}, "batches of tensorrt is 8"),
        ({"batches": [True, 2, 3]}, "three integers"),
        ({"workspace_mb": -1}, "workspace_mb of tensorrt is -1"),
        ({"workspace_mb": 0.5}, "workspace_mb of tensorrt is 0.5"),
        ({"optimization_level": 6}, "from 0 to 5"),
        ({"refittable": "yes"}, "refittable of tensorrt is 'yes'; give true or false"),
        ({"dla": -1}, "dla of tensorrt is -1"),
        ({"dla": 0}, r"give one size, such as \(8, 8, 8\): the DLA takes no dynamic shapes"),
    ],
)
def test_what_cannot_be(options: dict[str, Any], words: str) -> None:
    with pytest.raises(EngineError, match=words):
        settings_from(options, 11)


def test_a_targets_table(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    text = 'name = "mine"\ndescription = "a GPU"\ncandidates = [["tensorrt", "fp16"]]\n'
    path.write_text(text + "[tensorrt]\nversion = 10\nbatches = [1, 4, 16]\nworkspace_mb = 256\n")
    assert load_target(path).tensorrt == TensorRT(version=10, batches=(1, 4, 16), workspace_mb=256)
    path.write_text(text)
    assert load_target(path).tensorrt == TensorRT()
    for wrong, words in (
        ("tensorrt = 11\n", "is not a table"),
        ("[tensorrt]\nversion = 9\n", "version of tensorrt is 9"),
    ):
        path.write_text(text + wrong)
        with pytest.raises(TargetError, match=rf"mine\.toml.*{words}"):
            load_target(path)
