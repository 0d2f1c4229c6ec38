"""`cveff compress`."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cveff.cli import options
from cveff.cli.options import examples, milliseconds, percent, print_json, print_table
from cveff.console import working

if TYPE_CHECKING:
    from cveff.compression import Preview
    from cveff.pipeline import PipelineResult

BARE = ("--prune", "--low-rank", "--sparsify", "--distill", "--quantize")
"""Options that may stand without a value."""
PRECISIONS = ("int8", "int8-weights", "int4-weights", "fp16", "bf16", "fp8", "auto")
"""What --quantize takes without a key (`cveff.compress.quantize.Precision`, which takes seconds to import)."""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples(
            "cveff compress runs/digits",
            "cveff compress runs/digits --prune latency=0.5 --distill --epochs 40 --deploy",
            "cveff compress runs/digits --prune macs=0.4,depth=true --plan",
            "cveff compress runs/digits --prune macs=0.5 --distill --quantize int8",
            "cveff compress model/ --data photos/ --low-rank latency=0.8 --distill method=dist,epochs=30",
        )
    )(compress)


def compress(
    checkpoint: Annotated[
        str, typer.Argument(help="A trained model: a run's or a saved model's folder, or a zoo card's name.")
    ],
    prune: Annotated[
        str | None,
        typer.Option(
            "--prune",
            metavar="[GOAL]",
            help="Take channels and heads out: latency=0.5 (share that is left, measured on the target; also what "
            "--prune alone means), latency_ms=, macs=, parameters=, ratio=, and settings of the step after a comma.",
        ),
    ] = None,
    low_rank: Annotated[
        str | None,
        typer.Option(
            "--low-rank",
            metavar="[GOAL]",
            help="Factorise layers where that is faster: latency=0.8 (also what --low-rank alone means), energy=0.05.",
        ),
    ] = None,
    sparsify: Annotated[
        str | None,
        typer.Option(
            "--sparsify", metavar="[PATTERN]", help="Zeros for smaller files: 2:4, or a share such as 0.7."
        ),
    ] = None,
    distill: Annotated[
        str | None,
        typer.Option(
            "--distill",
            metavar="[SETTINGS]",
            help="Fine-tune at the end with the dense model as the teacher; method=dist,learning_rate=5e-4, ….",
        ),
    ] = None,
    quantize: Annotated[
        str | None,
        typer.Option(
            "--quantize",
            metavar="[SETTINGS]",
            help="Round to int8 (also what --quantize alone means) or another precision, last of all; "
            "int4-weights, precision=int8,weights=learned, ….",
        ),
    ] = None,
    epochs: Annotated[
        int | None,
        typer.Option("--epochs", min=1, help="Length of the fine-tuning, 20 by default; implies --distill."),
    ] = None,
    data: Annotated[
        str | None,
        typer.Option(
            "--data", help="Data set, as for `cveff train`; by default what the run was trained on."
        ),
    ] = None,
    target: Annotated[
        str,
        typer.Option("--target", help="Device profile that latencies are measured for (`cveff targets`)."),
    ] = "edge-cpu",
    out: Annotated[
        Path | None, typer.Option("--out", help="Folder of the run; by default runs/NAME-compressed.")
    ] = None,
    plan: Annotated[
        bool, typer.Option("--plan", help="Show what --prune would cut, and what it may not; change nothing.")
    ] = False,
    deploy: Annotated[
        bool, typer.Option("--deploy", help="Go on to a bundle: int8 where it is faster and accurate.")
    ] = False,
    max_accuracy_drop: Annotated[
        float,
        typer.Option(
            "--max-accuracy-drop",
            min=0,
            max=100,
            help="Points the bundle may lose against the compressed model.",
        ),
    ] = 1.0,
    resume: options.Resume = False,
    overwrite: options.Overwrite = False,
    on_bad_image: options.OnBadImageAsTrained = None,
    seed: options.SeedAsTrained = None,
    device: options.Device = None,
    quiet: options.Quiet = False,
    as_json: options.Json = False,
) -> None:
    """Make a trained model smaller and faster, by default to half its latency, and show what each step did.

    Steps are done in this order: prune, low rank, sparsify, distil, quantize. Without any, --prune latency=0.5
    --distill is done.
    """
    with working(quiet) as progress:
        from cveff.compression import Preview, compression_recipe, default_folder, preview
        from cveff.pipeline import run
        from cveff.recipe import DeploySettings

        recipe = compression_recipe(
            checkpoint,
            prune=prune,
            low_rank=low_rank,
            sparsify=sparsify,
            distill=distill,
            quantize=quantize,
            epochs=epochs,
            data=data,
            on_bad_image=None if on_bad_image is None else on_bad_image.value,
            deploy=DeploySettings(target, max_accuracy_drop),
            seed=seed,
        )
        made: Preview | PipelineResult
        if plan:
            made = preview(recipe, device=device, progress=progress)
        else:
            made = run(
                recipe,
                out=out or default_folder(checkpoint),
                resume=resume,
                overwrite=overwrite,
                bundle=deploy,
                device=device,
                progress=progress,
            )
    if as_json:
        return print_json(made.to_json())
    return show_plan(made) if isinstance(made, Preview) else show_steps(made)


def with_values(words: Sequence[str]) -> list[str]:
    """A command line in which an option that stands without a value has one, as the parser wants it.

    What follows such an option is its value only if it looks like one: not an option, not another argument.
    """
    if not words or words[0] != "compress":
        return list(words)
    found = []
    for index, word in enumerate(words):
        following = words[index + 1] if index + 1 < len(words) else "-"
        has_value = (
            "=" in following
            or following in ("2:4", *PRECISIONS)
            or following[0:1].isdigit()
            or following[0:1] == "."
        )
        is_bare = word in BARE and (following.startswith("-") or not has_value)
        found.append(f"{word}=default" if is_bare else word)
    return found


def show_plan(preview: Preview) -> None:
    """Groups, what is frozen and why, and the figures before and after."""
    values = preview.to_json()
    print_table(
        "would be cut",
        ("group", "units", "left", ""),
        [
            (name, group["units"], group["left"], f"{100 * group['left'] / group['units']:.0f}%")
            for name, group in values["groups"].items()
        ],
    )
    if values["blocks"]:
        print_table("would go whole", ("block",), [(name,) for name in values["blocks"]])
    if values["frozen"]:
        print_table(
            "stays as it is",
            ("group", "units", "why"),
            [(name, group["units"], group["reason"]) for name, group in values["frozen"].items()],
        )
    columns = ("model", "latency", "MACs", "parameters")
    rows = [("dense", preview.before), ("pruned", preview.after)]
    print_table("", columns, [(name, *_costs(figures)) for name, figures in rows])


def show_steps(result: PipelineResult) -> None:
    """What each step did, the shipped file last; then where everything is."""
    rows: list[tuple[object, ...]] = [
        (
            "dense" if effect.kind == "start" else effect.kind.replace("_", " "),
            percent(effect.accuracy),
            *_costs(effect.to_json()),
        )
        for effect in result.effects
    ]
    if result.deployment is not None:
        chosen = result.deployment.chosen
        rows.append(
            (
                f"shipped: {chosen['engine']} {chosen['precision']}",
                percent(chosen["accuracy"]),
                milliseconds(chosen["latency_ms"]),
                None,
                None,
            )
        )
    print_table("", ("step", "accuracy (val)", "latency", "MACs", "parameters"), rows)
    first, last = result.effects[0], result.effects[-1]
    lines: list[tuple[object, ...]] = []
    if first.latency_ms and last.latency_ms:
        lines.append(("speed", f"{first.latency_ms / last.latency_ms:.2f}× the dense model's"))
    lines += [
        (f"accuracy ({result.split})", f"{percent(result.accuracy)} of {result.count} images"),
        ("model", result.model),
    ]
    if result.deployment is not None:
        lines += [("bundle", result.deployment.path), ("report", result.deployment.path / "report.html")]
    print_table("", ("figure", "value"), lines)


def _costs(figures: Any) -> tuple[object, ...]:
    operations = figures.get("macs")
    return (
        milliseconds(figures.get("latency_ms")),
        None if operations is None else f"{operations / 1e6:,.2f} M",
        f"{int(figures['parameters']):,}",
    )
