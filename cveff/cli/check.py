"""`cveff check`: would TensorRT build an ONNX file for a target, and what would be slow?"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from cveff.cli import options
from cveff.cli.options import examples, print_json, print_table

if TYPE_CHECKING:
    from cveff.export.trt_check import Finding

FAILED = 2
"""Exit code where something fails."""


def register(app: typer.Typer) -> None:
    """Add the verb."""
    app.command(
        epilog=examples("cveff check model.onnx --target rtx", "cveff check model.onnx --target mine.toml")
    )(check)


def check(
    file: Annotated[Path, typer.Argument(help="An ONNX file, of cveff or of another exporter.")],
    target: Annotated[
        str, typer.Option("--target", help="Device profile with TensorRT (`cveff targets`), or a .toml file.")
    ] = "rtx",
    as_json: options.Json = False,
) -> int:
    """Say what TensorRT would refuse in a file, or run slowly, and what to do. Exits with 2 if something fails."""
    from cveff.export.trt_check import check_target
    from cveff.target import load_target

    found = check_target(file, load_target(target))
    if as_json:
        print_json({"path": str(file), "target": target, "findings": to_json(found)})
    else:
        show_findings(found, file, target)
    return exit_code(found)


def exit_code(found: Sequence[Finding]) -> int:
    """2 where something fails, else 0."""
    return FAILED if any(finding.severity == "fails" for finding in found) else 0


def to_json(found: Sequence[Finding]) -> list[dict[str, Any]]:
    """Findings as plain values."""
    return [asdict(finding) for finding in found]


def show_findings(found: Sequence[Finding], file: Path, target: str) -> None:
    """A line for each rule and reason: nodes that share them are counted, and the first is named."""
    if not found:
        return typer.echo(f"{file}: nothing that TensorRT would refuse or run slowly for {target}")
    nodes: dict[tuple[str, ...], list[str]] = {}
    for item in sorted(found, key=lambda item: item.severity):
        nodes.setdefault((item.severity, item.rule, item.problem, item.hint, item.source), []).append(
            item.node
        )
    return print_table(
        f"{file} for {target}",
        ("severity", "rule", "node", "reason", "remedy", "source"),
        [
            (severity, rule, names[0] + (f" and {len(names) - 1} more" if len(names) > 1 else ""), *rest)
            for (severity, rule, *rest), names in nodes.items()
        ],
    )
