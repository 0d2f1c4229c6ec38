"""`cveff quantize`."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from cveff.cli import options
from cveff.cli.options import examples, percent, print_json, print_table, size
from cveff.console import working

if TYPE_CHECKING:
    from cveff.quantization import Quantization


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "cveff quantize runs/digits",
            "cveff quantize runs/photos --calibration unlabelled/ --weights learned --out photos-int8",
            "cveff quantize runs/photos --precision auto --set max_accuracy_drop=0.5",
            "cveff quantize runs/photos --precision fp16 --onnx photos-fp16.onnx",
            "cveff quantize runs/vit --precision int4-weights --set group_size=32",
        )
    )(quantize)


def quantize(
    checkpoint: Annotated[
        str, typer.Argument(help="A trained model: a run's or a saved model's folder, or a zoo card's name.")
    ],
    precision: Annotated[
        str,
        typer.Option(
            "--precision",
            metavar="PRECISION",
            help="int8 (weights and activations, for CPUs), auto (int8, floats, or both, whichever is the fastest on "
            "the target's engine), int8-weights or int4-weights (large linear layers), fp16, bf16 or fp8 (for GPUs).",
        ),
    ] = "int8",
    data: Annotated[
        str | None,
        typer.Option(
            "--data",
            help="Data set: training images calibrate, the others measure; by default what the run was trained on.",
        ),
    ] = None,
    calibration: Annotated[
        Path | None,
        typer.Option(
            "--calibration",
            help="Folder of unlabelled images to calibrate on; without --data, half of them measure agreement.",
        ),
    ] = None,
    scheme: Annotated[
        str | None,
        typer.Option(
            "--scheme",
            metavar="SCHEME",
            help="Engine that int8 is for: cpu (ONNX Runtime), cpu-signed (Arm), openvino or tensorrt; by default that "
            "of the target.",
        ),
    ] = None,
    method: Annotated[
        str | None,
        typer.Option(
            "--method",
            metavar="METHOD",
            help="Ranges of int8's activations: minmax, moving-average, percentile, mse, entropy, or auto (the best "
            "on held-out images; the default).",
        ),
    ] = None,
    weights: Annotated[
        str | None,
        typer.Option(
            "--weights",
            metavar="ROUNDING",
            help="How weights are rounded: nearest, compensated (GPTQ; the default) or learned (AdaRound; int8 only).",
        ),
    ] = None,
    exclude: Annotated[
        list[str] | None,
        typer.Option(
            "--exclude", metavar="NAME", help="An operator that stays in floats; may be given several times."
        ),
    ] = None,
    images: Annotated[
        int | None, typer.Option("--images", help="Most calibration images; 512 by default.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="KEY=VALUE",
            help="Any other setting of the step, by its key in a recipe; repeatable.",
        ),
    ] = None,
    target: Annotated[
        str, typer.Option("--target", help="Device profile (`cveff targets`) that the scheme follows.")
    ] = "edge-cpu",
    out: Annotated[
        Path | None,
        typer.Option("--out", help="Folder of the quantized model; by default runs/NAME-PRECISION."),
    ] = None,
    onnx: Annotated[
        Path | None, typer.Option("--onnx", help="The exported file; by default model.onnx in --out.")
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace an earlier result in --out and --onnx.")
    ] = False,
    on_bad_image: options.OnBadImageAsTrained = None,
    seed: options.SeedAsTrained = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Round a trained model to fewer bits from a few hundred images, export it, and measure the file.

    Labels are not needed: without them, answers are compared with the float32 network's.
    """
    with working(quiet) as progress:
        from cveff.quantization import quantize_checkpoint, quantize_step
        from cveff.recipe import parse_assignment
        from cveff.target import load_target

        profile = load_target(target)
        given = {
            "precision": precision,
            "scheme": scheme,
            "method": method,
            "weights": weights,
            "exclude": exclude or None,
            "images": images,
            "calibration": None if calibration is None else str(calibration),
            **dict(parse_assignment(text) for text in settings or ()),
        }
        step = quantize_step({key: value for key, value in given.items() if value is not None}, profile)
        made = quantize_checkpoint(
            checkpoint,
            step,
            out=out,
            onnx=onnx,
            data=data,
            on_bad_image=None if on_bad_image is None else on_bad_image.value,
            target=profile,
            overwrite=overwrite,
            seed=seed,
            device=device,
            progress=progress,
        )
        for warning in made.warnings:
            progress.message(f"warning: {warning}")
    if as_json:
        return print_json(made.to_json())
    return show_quantization(made)


def show_quantization(made: Quantization) -> None:
    """The float32 network beside the file, then what it was made from and where it is."""
    figures, found = made.figures, made.calibration
    engine = "ONNX Runtime" if figures.engine == "onnxruntime" else "PyTorch"
    print_table(
        "",
        (f"on {figures.count} images of {figures.split}", "fp32", made.step.precision),
        [
            ("accuracy", percent(figures.float_accuracy), percent(figures.accuracy)),
            ("same answer as fp32", None, percent(figures.agreement)),
            ("error of the logits, of their energy", None, f"{figures.error:.2g}"),
            ("file", size(made.float_bytes), f"{size(made.bytes)} ({made.bytes / made.float_bytes:.0%})"),
            ("computed by", "PyTorch", engine),
        ],
    )
    lines: list[tuple[object, ...]] = [
        ("precision", made.step.precision + (f" for {made.step.scheme}" if found.error is not None else "")),
        ("calibrated on", f"{found.images} images of {found.source}" if found.source else "no images"),
    ]
    if found.left_out:
        lines.append(("left out", f"{found.left_out} images that reach far larger values than the others"))
    if found.method is not None:
        lines.append(("ranges by", found.method))
    if found.error is not None:
        lines.append(("held-out error", f"{found.error:.2g} of the logits' energy"))
    lines += [("model", made.out), ("file", made.onnx)]
    print_table("", ("figure", "value"), lines)
