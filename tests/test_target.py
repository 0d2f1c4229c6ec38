"""Device profiles: those that come along are valid, a user's own are checked key by key."""

from __future__ import annotations

from dataclasses import fields
from pathlib import Path

import pytest

from cveff import target as module
from cveff.errors import TargetError
from cveff.runtime.machine import ISA_FLAGS, isa, saturates
from cveff.target import PRECISIONS, Target, TensorRT, load_target, obstacles, target_names

GOOD = """
name = "mine"
description = "my box"
candidates = [["onnxruntime", "fp32"]]
"""
GPU = GOOD.replace("onnxruntime", "tensorrt")


@pytest.mark.parametrize("name", target_names())
def test_profiles_that_come_along_load(name: str) -> None:
    target = load_target(name)
    assert target.name == name
    assert target.candidates
    assert target.num_threads >= 1
    assert ("onnxruntime", "fp32") in target.candidates, "what every device can fall back to is measured too"


def test_profiles_of_every_kind_of_device_come_along() -> None:
    assert {"edge-cpu", "server-cpu", "raspberry-pi", "jetson-orin", "rtx", "server-gpu"} <= set(
        target_names()
    )
    assert load_target("jetson-orin").tensorrt.version == 10
    assert load_target("server-gpu").tensorrt == TensorRT(batches=(1, 32, 128), optimization_level=4)
    assert load_target("jetson-orin-dla").tensorrt.dla == 0
    assert load_target("raspberry-pi").instructions == ("asimd", "asimdhp", "asimddp")


def test_a_users_own_profile(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(GOOD + "threads = 3\nbatch_sizes = [4]\nchannel_multiple = 4\n")
    target = load_target(path)
    assert target == Target(
        "mine", "my box", (("onnxruntime", "fp32"),), threads=3, batch_sizes=(4,), channel_multiple=4
    )
    assert target.num_threads == 3
    assert load_target(target) is target
    path.write_text(
        GPU + "batch_sizes = [2]\n[tensorrt]\nversion = 10\nbatches = [2, 2, 2]\ndla = 1\nrefittable = true"
    )
    found = load_target(path).tensorrt
    assert found == TensorRT(version=10, batches=(2, 2, 2), dla=1, refittable=True)


@pytest.mark.parametrize(
    "text, words",
    [
        ("name = 'x'\ndescription = 'y'", "candidates: is missing"),
        (GOOD + "colour = 1", "colour: unknown key; known: name"),
        (GOOD + "thread = 1", "did you mean 'threads'"),
        (
            GOOD.replace("onnxruntime", "onyx"),
            "candidates: 'onyx' cannot be used; give an engine out of onnxruntime",
        ),
        (
            GOOD.replace("fp32", "fp3"),
            r"candidates: \['onnxruntime', 'fp3'\] cannot .* precision out of fp32",
        ),
        (GPU.replace("fp32", "int8-mixed"), "fp32, fp16, bf16, int8, fp8 to tensorrt"),
        (GOOD.replace('"fp32"', "32"), r"candidates\[0\]\[1\]: 32 is not a string"),
        ("name = 'x'\ndescription = 'y'\ncandidates = []", r"candidates: \[\] cannot be used"),
        (GOOD + "batch_sizes = []", r"batch_sizes: \[\] cannot be used; give positive integers"),
        (GOOD + "batch_sizes = [0]", r"batch_sizes: \[0\] cannot be used"),
        (GOOD + "threads = -1", "threads: -1 cannot be used; give an integer of 0 or more"),
        (GOOD + "threads = 'all'", "threads: 'all' is not an integer"),
        (GOOD + "memory_mb = -5", "memory_mb: -5 cannot be used"),
        (GOOD + "channel_multiple = 0", "channel_multiple: 0 cannot be used"),
        (GOOD + "scheme = 'zzz'", "scheme: 'zzz' is unknown; known: cpu, cpu-signed, openvino, tensorrt"),
        (
            GOOD + "instructions = ['avx2', 'sse9']",
            r"instructions: \['sse9'\] cannot be used; give names out of avx2",
        ),
        (GOOD + "instructions = 'avx2'", "instructions: 'avx2' is not an array"),
        (GOOD + "instructions = true", "instructions: true is not an array"),
        (GPU + "[tensorrt]\nversion = 8", "option version of tensorrt is 8; give one of 10, 11"),
        (
            GPU + "[tensorrt]\nbatches = [8, 1, 32]",
            r"option batches of tensorrt is \(8, 1, 32\); give three integers",
        ),
        (GPU + "[tensorrt]\nbatches = [1, 8]", "tensorrt.batches"),
        (GPU + "batch_sizes = [64]", r"batch_sizes: \[64\] cannot be used; give sizes from 1 to 32"),
        (GPU + "[tensorrt]\nworkspace_mb = -1", "option workspace_mb of tensorrt is -1"),
        (
            GPU + "[tensorrt]\noptimization_level = 6",
            "option optimization_level of tensorrt is 6; give an integer from 0 to 5",
        ),
        (GPU + "[tensorrt]\ndla = -1", "option dla of tensorrt is -1"),
        (GPU + "[tensorrt]\ndla = 0", "the DLA takes no dynamic shapes"),
        (GPU + "[tensorrt]\nrefittable = 1", "tensorrt.refittable: 1 is not true or false"),
        (GPU + "[tensorrt]\nfp16 = true", "tensorrt.fp16: unknown key"),
        (GPU + "tensorrt = 11", "tensorrt: 11 is not a table"),
        ("name = ", "not valid TOML"),
    ],
)
def test_a_wrong_profile_says_what_is_wrong(tmp_path: Path, text: str, words: str) -> None:
    path = tmp_path / "mine.toml"
    path.write_text(text)
    with pytest.raises(TargetError, match=rf"mine\.toml: {words}|mine\.toml: .*{words}"):
        load_target(path)


def test_bytes_that_are_no_text_are_refused(tmp_path: Path) -> None:
    path = tmp_path / "mine.toml"
    path.write_bytes(b"\xff\xfe\x00")
    with pytest.raises(TargetError, match="not valid TOML"):
        load_target(path)


def test_an_unknown_profile_lists_the_known() -> None:
    with pytest.raises(TargetError, match="edge-cpu, edge-cpu-avx2, jetson-orin"):
        load_target("edge-gpu-typo")


def test_targets_made_in_python_are_checked_as_well() -> None:
    with pytest.raises(TargetError, match="candidates: 'onyx'"):
        Target("x", "", (("onyx", "fp32"),))


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
    assert not saturates(load_target("raspberry-pi").instruction_sets)
    assert load_target("edge-cpu").instructions is None
    assert load_target("server-cpu").instructions is None


def test_the_scheme_is_the_targets_or_its_first_int8_engines() -> None:
    def scheme(*engines: str) -> str:
        return Target("x", "", tuple((engine, "int8") for engine in engines)).int8_scheme

    assert [scheme("onnxruntime", "openvino"), scheme("openvino"), scheme("tensorrt")] == [
        "cpu",
        "openvino",
        "tensorrt",
    ]
    assert Target("x", "", (("openvino", "fp32"),)).int8_scheme == "cpu"
    assert load_target("raspberry-pi").int8_scheme == "cpu-signed"


def test_obstacles_name_engines_and_instructions(monkeypatch: pytest.MonkeyPatch) -> None:
    own = isa() or ["avx2"]
    other = next(flag for flag in ISA_FLAGS if flag not in own)
    monkeypatch.setattr(module, "available_engines", lambda: ("onnxruntime",))
    monkeypatch.setattr("cveff.runtime.machine.isa", lambda: own)
    target = Target("x", "", (("onnxruntime", "fp32"), ("tensorrt", "fp16")), instructions=(other,))
    assert obstacles(target) == ("does not run tensorrt", f"has no {other}")
    assert obstacles(Target("x", "", (("onnxruntime", "fp32"),))) == ()


def test_the_page_names_every_profile_engine_and_key() -> None:
    page = (Path(__file__).parents[1] / "docs" / "targets.md").read_text(encoding="utf-8")
    keys = [item.name for kind in (Target, TensorRT) for item in fields(kind) if item.name != "tensorrt"]
    missing = [name for name in (*target_names(), *PRECISIONS, *keys) if f"`{name}`" not in page]
    assert not missing


def test_every_engine_has_float32() -> None:
    assert all(names[0] == "fp32" for names in PRECISIONS.values())
