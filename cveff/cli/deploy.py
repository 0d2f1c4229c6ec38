"""`cveff deploy`, `cveff export`, `cveff run`: a model becomes a file, a bundle, an answer."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cveff.cli import options
from cveff.cli.check import exit_code, show_findings, to_json
from cveff.cli.options import examples, milliseconds, percent, print_json, print_table, size
from cveff.console import working

if TYPE_CHECKING:
    from cveff.export.deploy import Deployment


class Nms(StrEnum):
    """Where a detector's overlapping boxes are removed."""

    onnx = "onnx"
    none = "none"


class Output(StrEnum):
    """What the file of a segmentation network returns."""

    logits = "logits"
    labels = "labels"


def register(app: typer.Typer) -> None:
    """Add the verbs."""
    app.command(
        epilog=examples(
            "cveff deploy runs/digits --data digits --target edge-cpu --out digits.bundle",
            "cveff deploy mobilenetv4_conv_small --weights FILE --calibration photos/ --max-accuracy-drop 1",
            "cveff deploy mobilenetv4_conv_small --data photos/ --epochs 20 --out photos.bundle",
        )
    )(deploy)
    app.command(
        epilog=examples(
            "cveff export runs/digits --out digits.onnx",
            "cveff export runs/digits --out digits.pt2",
            "cveff quantize runs/digits --precision fp16 --data digits --onnx digits.fp16.onnx",
            "cveff export runs/digits --target jetson-orin --check",
        )
    )(export)
    app.command(
        epilog=examples("cveff run digits.bundle photo.png folder/ --top-k 3"),
        add_help_option=False,
        context_settings={"ignore_unknown_options": True, "allow_extra_args": True},
    )(run)


def deploy(
    model: Annotated[
        str, typer.Argument(help="A saved model or run, a zoo card's name, or an architecture's name.")
    ],
    data: options.OptionalData = None,
    calibration: Annotated[
        Path | None, typer.Option("--calibration", help="Folder of unlabelled images for int8.")
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="Device profile (`cveff targets`), or a .toml file.")
    ] = "edge-cpu",
    max_accuracy_drop: Annotated[
        float,
        typer.Option(
            "--max-accuracy-drop", min=0, max=100, help="Points of accuracy the shipped file may lose."
        ),
    ] = 1.0,
    out: Annotated[
        Path | None, typer.Option("--out", help="The bundle's folder; by default MODEL.bundle.")
    ] = None,
    num_calibration: Annotated[
        int, typer.Option("--num-calibration", min=1, help="Images int8 is calibrated on.")
    ] = 256,
    weights: options.Weights = None,
    labels: options.Labels = None,
    image_size: options.ImageSize = None,
    channels: options.ChannelsOption = None,
    pretrained: Annotated[
        bool, typer.Option("--pretrained", help="Start training from timm's weights (needs a network).")
    ] = False,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=0, help="Train this long first; by default only without weights."),
    ] = None,
    run_folder: Annotated[
        Path | None, typer.Option("--run", help="Where training keeps its state; by default runs/MODEL.")
    ] = None,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    on_bad_image: options.OnBadImage = options.BadImage.error,
    seed: options.Seed = 0,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Build every candidate of a target, measure them, and ship the fastest that keeps its accuracy.

    An architecture without weights is trained on --data first.
    """
    with working(quiet) as progress:
        from cveff.recipe import DataSettings, DeploySettings, ModelSettings
        from cveff.shortcut import deploy_subject

        deployment = deploy_subject(
            model,
            DeploySettings(target, max_accuracy_drop, calibration, num_calibration, out),
            data=None if data is None else DataSettings(data, on_bad_image.value),
            start=ModelSettings(
                weights=weights,
                image_size=image_size,
                channels=options.number(channels),
                pretrained=pretrained,
            ),
            labels=labels,
            epochs=epochs,
            run_folder=run_folder,
            resume=resume,
            overwrite=overwrite,
            seed=seed,
            progress=progress,
        )
    if as_json:
        return print_json(deployment.to_json())
    return show_deployment(deployment)


def export(
    model: Annotated[
        str, typer.Argument(help="A saved model or run, a zoo card's name, or an architecture's name.")
    ],
    out: Annotated[
        Path | None,
        typer.Option(
            "--out", help="The file: .onnx, or .pt2 to compile it with AOTInductor; by default MODEL.onnx."
        ),
    ] = None,
    opset: Annotated[int | None, typer.Option("--opset", min=18, help="ONNX operator set.")] = None,
    target: Annotated[
        str | None,
        typer.Option("--target", help="Device profile with TensorRT that the file is for, or a .toml file."),
    ] = None,
    check: Annotated[
        bool,
        typer.Option(
            "--check/--no-check",
            help="Compare the file with PyTorch and, with --target, say what TensorRT would refuse or run slowly.",
        ),
    ] = True,
    nms: Annotated[
        Nms | None, typer.Option("--nms", help="Of a detector: suppress in the file (onnx), or outside.")
    ] = None,
    output: Annotated[
        Output | None,
        typer.Option("--output", help="Of a segmentation network: logits, or labels of one byte a pixel."),
    ] = None,
    weights: options.Weights = None,
    labels: options.Labels = None,
    image_size: options.ImageSize = None,
    channels: options.ChannelsOption = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> int:
    """Export to a checked ONNX file that takes uint8 images; normalisation is inside.

    In float32; `cveff quantize` writes files in fp16, bf16 and fewer bits. With --target, exits with 2 if TensorRT
    would refuse the file; it is written all the same.
    """
    with working(quiet) as progress:
        import cveff
        from cveff.export.trt_check import check_target, tensorrt_of
        from cveff.subject import open_model, read_labels
        from cveff.target import load_target

        profile = None if target is None else load_target(target)
        if profile is not None:
            tensorrt_of(profile)  # said before the work, not after
        opened = open_model(
            model,
            weights=weights,
            labels=None if labels is None else read_labels(labels),
            image_size=image_size,
            channels=options.number(channels),
        )
        progress.message(f"exporting {opened.spec.architecture}")
        path = cveff.export(
            opened,
            out or Path(f"{Path(model).name}.onnx"),
            opset=opset,
            check=check,
            nms=None if nms is None else nms.value,
            output=None if output is None else output.value,
        )
        found = check_target(path, profile) if check and profile is not None else []
    if as_json:
        made = {"path": str(path), "bytes": path.stat().st_size, "input": opened.spec.input.to_json()}
        print_json(made if profile is None else {**made, "target": profile.name, "findings": to_json(found)})
        return exit_code(found)
    print_table("", ("file", "size"), [(path, size(path.stat().st_size))])
    if profile is not None and check:
        show_findings(found, path, profile.name)
    return exit_code(found)


def run(context: typer.Context) -> int:
    """Run a bundle or an exported file on images. Imports no torch; the bundle's run.py takes the same options."""
    from cveff.runtime.run import main

    return main(context.args)


def show_deployment(deployment: Deployment) -> None:
    """The candidates, the figures and where the report is, for people."""
    manifest = deployment.manifest
    batch = manifest["metrics"]["latency_ms"]["batch"]
    print_table(
        "candidates",
        ("engine", "precision", "accuracy", "agreement", f"latency (batch {batch})", "size", "chosen", "why"),
        [
            (
                entry["engine"],
                entry["precision"],
                percent(entry.get("accuracy")),
                percent(entry.get("agreement")),
                milliseconds(entry.get("latency_ms")),
                size(entry.get("size_bytes")),
                "yes" if entry["chosen"] else "",
                entry["why"],
            )
            for entry in manifest["candidates"]
        ],
    )
    metrics = manifest["metrics"]
    print_table(
        "",
        ("figure", "PyTorch", "shipped"),
        [
            ("accuracy", percent(metrics["accuracy"]["reference"]), percent(metrics["accuracy"]["deployed"])),
            (
                f"latency (batch {batch})",
                milliseconds(metrics["latency_ms"]["reference_median"]),
                milliseconds(metrics["latency_ms"]["median"]),
            ),
            ("bundle", None, deployment.path),
            ("report", None, deployment.path / "report.html"),
        ],
    )
