"""Command lines that do what our TensorRT builder does, by NVIDIA's own tools: trtexec builds, Polygraphy compares.

Options of trtexec: samples/common/sampleOptions.cpp of NVIDIA/TensorRT 10, and the documentation's "Migrating trtexec
Usage from TensorRT 10.x to 11.x"; of Polygraphy: `polygraphy run --help`, 0.53.
"""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from cveff.runtime.input_spec import InputSpec
from cveff.runtime.tensorrt_settings import TensorRT

FILE = "commands.sh"
TOLERANCE = 0.01
"""Largest difference of a logit that Polygraphy accepts, absolute and as a share: what TF32 and float16 round."""


def write_commands(folder: Path, manifest: Mapping[str, Any], names: Sequence[str]) -> None:
    """Write `folder/commands.sh`; nothing where the bundle has no file for TensorRT.

    Args:
        folder: to be made.
        manifest: `input` and `target` are read.
        names: the bundle's files that TensorRT builds from.
    """
    target = manifest.get("target")
    if target is None or not names:
        return
    settings = TensorRT(**{**target["tensorrt"], "batches": tuple(target["tensorrt"]["batches"])})
    spec = InputSpec.from_json(manifest["input"])
    folder.mkdir()
    text = script(settings, (*spec.size, spec.channels), names)
    (folder / FILE).write_text(text, encoding="utf-8")


def script(settings: TensorRT, image: tuple[int, int, int], files: Sequence[str]) -> str:
    """A shell script that builds a plan of each ONNX file, times it and compares it with ONNX Runtime.

    Args:
        image: height, width and channels of the input.
    """
    lines = [
        "#!/bin/sh",
        f"# What cveff does with TensorRT {settings.version}, by NVIDIA's own tools.",
        "# On the device, in the bundle's folder:",
        "#     sh tensorrt/commands.sh [where plans go]",
        "# trtexec comes with TensorRT's Debian, tar and container packages, Polygraphy with pip.",
        "set -eu",
        "plans=${1:-.}",
    ]
    for file in files:
        plan = f'"$plans"/{shlex.quote(Path(file).with_suffix(".plan").name)}'
        usual = f"images:{_times(settings.batches[1], image)}"
        lines += [
            "",
            f"# {file}: build, time at the most usual batch, compare with ONNX Runtime on random pixels.",
            _joined("trtexec", *build_options(settings, image, file), f"--saveEngine={plan}"),
            *(
                # Without its weights a plan cannot run.
                []
                if settings.strip_weights
                else [_joined("trtexec", f"--loadEngine={plan}", f"--shapes={usual}", *_device(settings))]
            ),
            _joined("polygraphy run", shlex.quote(file), *compare_options(settings, image)),
        ]
    return "\n".join(lines) + "\n"


def build_options(settings: TensorRT, image: tuple[int, int, int], file: str) -> list[str]:
    """Options of trtexec that build `file`; its types are the file's: TensorRT 10 has to be told so."""
    shapes = zip(("min", "opt", "max"), settings.batches, strict=True)
    return [
        f"--onnx={shlex.quote(file)}",
        *(["--stronglyTyped"] if settings.version == 10 else []),
        *(f"--{kind}Shapes=images:{_times(batch, image)}" for kind, batch in shapes),
        f"--builderOptimizationLevel={settings.optimization_level}",
        *([f"--memPoolSize=workspace:{settings.workspace_mb}M"] if settings.workspace_mb else []),
        *(["--versionCompatible"] if settings.version_compatible else []),
        *(["--hardwareCompatibilityLevel=ampere+"] if settings.hardware_compatible else []),
        *(["--refit"] if settings.refittable else []),
        *(["--stripWeights"] if settings.strip_weights else []),
        *(["--sparsity=enable"] if settings.sparse_weights else []),
        *_device(settings),
        *(["--allowGPUFallback"] if settings.dla is not None else []),
        "--skipInference",
    ]


def compare_options(settings: TensorRT, image: tuple[int, int, int]) -> list[str]:
    """Options of `polygraphy run` that build the file with the same settings and compare its logits."""
    shapes = zip(("min", "opt", "max"), settings.batches, strict=True)
    return [
        "--trt --onnxrt --strongly-typed",
        *(f"--trt-{kind}-shapes {_listed(batch, image)}" for kind, batch in shapes),
        f"--input-shapes {_listed(settings.batches[1], image)}",
        "--val-range 'images:[0,255]'",
        f"--builder-optimization-level {settings.optimization_level}",
        *([f"--pool-limit workspace:{settings.workspace_mb}M"] if settings.workspace_mb else []),
        *(["--version-compatible"] if settings.version_compatible else []),
        *(["--hardware-compatibility-level ampere_plus"] if settings.hardware_compatible else []),
        *(["--refittable"] if settings.refittable else []),
        *(["--sparse-weights"] if settings.sparse_weights else []),
        *(["--use-dla --allow-gpu-fallback"] if settings.dla is not None else []),
        f"--atol {TOLERANCE} --rtol {TOLERANCE}",
    ]


def _device(settings: TensorRT) -> list[str]:
    return [] if settings.dla is None else [f"--useDLACore={settings.dla}"]


def _times(batch: int, image: tuple[int, int, int]) -> str:
    return "x".join(map(str, (batch, *image)))


def _listed(batch: int, image: tuple[int, int, int]) -> str:
    return f"'images:[{','.join(map(str, (batch, *image)))}]'"  # the shell would look for files of [...]


def _joined(command: str, *options: str) -> str:
    return " \\\n    ".join((command, *options))
