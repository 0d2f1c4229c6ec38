"""What every benchmark shares: the machine and versions, the command, JSON that grows as results come, tables."""

from __future__ import annotations

import importlib.metadata
import json
import os
import shlex
import sys
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from cveff.files import write_json
from cveff.runtime.machine import describe

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "model_zoo" / "results"
PACKAGES = (
    "cveff",
    "torch",
    "timm",
    "numpy",
    "pillow",
    "onnx",
    "onnxscript",
    "onnxruntime",
    "openvino",
    "nncf",
    "scikit-image",
    "scikit-learn",
    "transformers",
    "gguf",
)

console = Console(stderr=False, width=None if sys.stdout.isatty() else 150)


def environment() -> dict[str, Any]:
    """Versions, machine, load and time: what a figure depends on besides the code."""
    versions = {}
    for name in PACKAGES:
        try:
            versions[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:
            continue
    return {
        "versions": versions,
        "machine": describe(),
        "load_average": list(os.getloadavg()),
        "date": time.strftime("%Y-%m-%d %H:%M UTC", time.gmtime()),
    }


def command(script: str) -> str:
    """The command line that is running, as one would type it in the repository; folders outside it are left out."""
    arguments = [Path(word).name if word.startswith("/") else word for word in sys.argv[1:]]
    return shlex.join(["python", str(Path(script).resolve().relative_to(ROOT)), *arguments])


def output(name: str, quick: bool) -> Path:
    """Where a benchmark writes: the committed results, or for a quick run a folder that is not committed."""
    return (ROOT / "runs" / "quick" if quick else RESULTS) / name


class Results:
    """A JSON file that grows: `values` is written after every `save`, and read again by a run that goes on.

    Attributes:
        values: what is in the file; "settings" says what the run was asked, and a file whose settings differ
            is started anew.
    """

    def __init__(self, path: Path, script: str, settings: Mapping[str, Any], fresh: bool = False) -> None:
        self.path = path
        self.values: dict[str, Any] = {}
        if path.is_file() and not fresh:
            self.values = json.loads(path.read_text(encoding="utf-8"))
        if self.values.get("settings") != json.loads(json.dumps(settings)):
            self.values = {}
        self.values = {
            "command": command(script),
            "settings": dict(settings),
            **environment(),
            **_kept(self.values),
        }

    def save(self) -> None:
        """Write the file, atomically."""
        write_json(self.path, self.values)


def _kept(values: Mapping[str, Any]) -> dict[str, Any]:
    """Results of an earlier run, without what describes the run itself."""
    described = {"command", "settings", "versions", "machine", "load_average", "date"}
    return {key: value for key, value in values.items() if key not in described}


def table(title: str, columns: Sequence[str], rows: Sequence[Sequence[object]], note: str = "") -> None:
    """Print a table; the first column is text, the others are numbers."""
    shown = Table(title=title, caption=note or None, caption_justify="left", title_justify="left")
    for index, column in enumerate(columns):
        shown.add_column(column, justify="left" if index == 0 else "right")
    for row in rows:
        shown.add_row(*(_cell(value) for value in row))
    console.print(shown)


def _cell(value: object) -> str:
    if value is None:
        return "—"
    return f"{value:.4g}" if isinstance(value, float) else str(value)


class Lines:
    """A `Progress` that prints its messages, each with the time and what it is about."""

    def __init__(self, subject: str) -> None:
        self._subject = subject

    def track(self, items: Iterable[Any], description: str, total: int | None = None) -> Iterator[Any]:
        """Yield `items`."""
        yield from items

    def message(self, text: str) -> None:
        """Print one line."""
        console.print(f"{time.strftime('%H:%M:%S')} {self._subject}: {text}", highlight=False)
