"""`cveff/runtime` imports the standard library, numpy, Pillow and an engine, and is cheap to import."""

from __future__ import annotations

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import cveff.runtime

FOLDER = Path(cveff.runtime.__file__).parent
FILES = sorted(FOLDER.rglob("*.py"))
ALLOWED = {"numpy", "PIL", "onnxruntime", "openvino", *sys.stdlib_module_names}


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_only_relative_imports_and_the_allowed_packages(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and node.level:
            assert node.level == 1, f"line {node.lineno} reaches out of the folder"
        elif isinstance(node, (ast.Import, ast.ImportFrom)):
            names = (
                [node.module or ""]
                if isinstance(node, ast.ImportFrom)
                else [item.name for item in node.names]
            )
            assert {name.partition(".")[0] for name in names} <= ALLOWED, f"line {node.lineno}: {names}"


def test_engines_are_imported_on_use_only() -> None:
    """A bundle with one engine must work where the other is not installed."""
    for path in FILES:
        for node in ast.parse(path.read_text(encoding="utf-8")).body:
            if isinstance(node, (ast.Import, ast.ImportFrom)):
                assert not {"onnxruntime", "openvino"} & {item.name for item in node.names}, path.name


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("cveff.runtime", "{'torch', 'numpy', 'PIL', 'onnxruntime', 'openvino'}"),
        ("cveff.errors", "{'torch', 'numpy', 'PIL'}"),
        ("cveff.runtime.engine", "{'torch', 'torchvision', 'timm', 'onnxruntime', 'openvino'}"),
        ("cveff.runtime.run", "{'torch', 'torchvision', 'timm', 'onnxruntime', 'openvino'}"),
    ],
)
def test_imports_bring_nothing_heavy(module: str, forbidden: str) -> None:
    code = f"import sys, {module}; print(*({forbidden} & set(sys.modules)))"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert result.stdout.strip() == ""
