"""The commands are understood by the tools they name, and say what the target says."""

from __future__ import annotations

import re
import shlex
import subprocess
from dataclasses import replace

import pytest

from cveff.export.trt_commands import build_options, compare_options, script
from cveff.target import TensorRT

IMAGE = (224, 192, 3)
EVERYTHING = TensorRT(
    version=10,
    batches=(4, 4, 4),
    workspace_mb=512,
    optimization_level=5,
    version_compatible=True,
    hardware_compatible=True,
    refittable=True,
    strip_weights=True,
    sparse_weights=True,
    dla=1,
)
OPTIONS = """
    onnx saveEngine loadEngine minShapes optShapes maxShapes shapes memPoolSize builderOptimizationLevel
    versionCompatible hardwareCompatibilityLevel refit stripWeights sparsity useDLACore allowGPUFallback
    skipInference stronglyTyped
"""
"""Options that samples/common/sampleOptions.cpp of NVIDIA/TensorRT reads, of those that we use."""
REMOVED = {"fp16", "bf16", "int8", "fp8", "int4", "best", "calib", "workspace", "explicitBatch", "buildOnly"}
"""Options that TensorRT 10 or 11 took away, by its migration pages."""


def commands(text: str) -> list[list[str]]:
    """The script's commands as the shell splits them."""
    joined = text.replace("\\\n", " ")
    return [shlex.split(line) for line in joined.splitlines() if line.startswith(("trtexec", "polygraphy"))]


@pytest.mark.parametrize("settings", [TensorRT(), EVERYTHING])
def test_trtexec_knows_every_option(settings: TensorRT) -> None:
    used = {
        re.match(r"--(\w+)", word)[1]  # type: ignore[index]
        for command in commands(script(settings, IMAGE, ["model.onnx"]))
        if command[0] == "trtexec"
        for word in command[1:]
    }
    assert used <= set(OPTIONS.split()) and not used & REMOVED


def test_the_build_is_that_of_the_target() -> None:
    assert build_options(TensorRT(), IMAGE, "model.onnx") == [
        "--onnx=model.onnx",
        "--minShapes=images:1x224x192x3",
        "--optShapes=images:8x224x192x3",
        "--maxShapes=images:32x224x192x3",
        "--builderOptimizationLevel=3",
        "--skipInference",
    ]
    assert build_options(EVERYTHING, IMAGE, "my model.onnx") == [
        "--onnx='my model.onnx'",
        "--stronglyTyped",
        *(f"--{kind}Shapes=images:4x224x192x3" for kind in ("min", "opt", "max")),
        "--builderOptimizationLevel=5",
        "--memPoolSize=workspace:512M",
        "--versionCompatible",
        "--hardwareCompatibilityLevel=ampere+",
        "--refit",
        "--stripWeights",
        "--sparsity=enable",
        "--useDLACore=1",
        "--allowGPUFallback",
        "--skipInference",
    ]


@pytest.mark.parametrize("settings", [TensorRT(), EVERYTHING])
def test_polygraphy_parses_its_command(settings: TensorRT) -> None:
    run = pytest.importorskip("polygraphy.tools.run.run")
    words = shlex.split(" ".join(["model.onnx", *compare_options(settings, IMAGE)]))
    values, unknown = run.Run().setup_parser().parse_known_args(words)
    assert unknown == []
    assert values.model_file == "model.onnx" and "images:[0,255]" in values.val_range
    assert values.input_shapes == [f"images:[{settings.batches[1]},224,192,3]"]


def test_a_plan_without_weights_is_not_run() -> None:
    def verbs(settings: TensorRT) -> list[str]:
        return [command[0] for command in commands(script(settings, IMAGE, ["a.onnx", "b.onnx"]))]

    assert verbs(TensorRT()) == ["trtexec", "trtexec", "polygraphy"] * 2
    assert verbs(replace(TensorRT(), strip_weights=True)) == ["trtexec", "polygraphy"] * 2


def test_the_script_is_one_that_a_shell_reads() -> None:
    done = subprocess.run(
        ["sh", "-n"], input=script(EVERYTHING, IMAGE, ["my model.onnx"]), text=True, capture_output=True
    )
    assert done.returncode == 0, done.stderr
