"""Device profiles: those that come along are valid, a user's own are checked key by key."""

from __future__ import annotations

from pathlib import Path

import pytest

from cveff.errors import TargetError
from cveff.runtime.machine import isa, saturates
from cveff.target import Target, load_target, target_names

GOOD = """
name = "mine"
description = "my box"
candidates = [["onnxruntime", "fp32"]]
"""


@pytest.mark.parametrize("name", target_names())
def test_profiles_that_come_along_load(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.candidates
    assert target.num_threads >= 1


def test_a_users_own_profile(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "threads = 3\nbatch_sizes = [4]\n")
    target = load_target(path)
    assert target == Target("mine", "my box", (("onnxruntime", "fp32"),), threads=3, batch_sizes=(4,))
    assert target.num_threads == 3
    assert load_target(target) is target


@pytest.mark.parametrize(
    "text, words",
    [
        ("name = 'x'\ndescription = 'y'", "candidates is missing"),
        (GOOD + "colour = 1", "colour"),
        (GOOD.replace("onnxruntime", "onyx"), "onyx"),
        (GOOD.replace("fp32", "fp3"), "fp3"),
        (GOOD + "batch_sizes = []", "batch_sizes"),
        (GOOD + "batch_sizes = [0]", "batch_sizes"),
        (GOOD + "threads = -1", "threads is -1"),
        (GOOD + "threads = 'all'", "threads is 'all'"),
        (
            GOOD + "instructions = ['avx2', 'sse9']",
            "instructions: \\['sse9'\\] cannot be used; give a list out of avx2",
        ),
        (GOOD + "instructions = 'avx2'", "instructions: 'avx2' cannot be used"),
        (GOOD + "instructions = true", "instructions: True cannot be used"),
        ("name = ", "not valid TOML"),
    ],
)
def test_a_wrong_profile_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(TargetError, match=words):
        load_target(path)


def test_an_unknown_profile_lists_the_known() -> None:
    with pytest.raises(TargetError, match="edge-cpu, edge-cpu-avx2, server-cpu"):
        load_target("edge-gpu-typo")


def test_instruction_sets_are_those_named_or_this_machines(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "instructions = ['f16c', 'avx2', 'f16c']")
    assert load_target(path).instruction_sets == ("avx2", "f16c")
    path.write_text(GOOD + "instructions = []")
    assert load_target(path).instruction_sets == ()
    path.write_text(GOOD)
    assert load_target(path).instruction_sets == tuple(isa())


def test_one_profile_is_of_a_processor_that_clips() -> None:
    assert saturates(load_target("edge-cpu-avx2").instruction_sets)
    assert load_target("edge-cpu").instructions is None
    assert load_target("server-cpu").instructions is None
