"""What a command imports before it needs it. Times are for benchmarks; modules are exact."""

from __future__ import annotations

import subprocess
import sys

import pytest

HEAVY = ("torch", "torchvision", "timm", "onnx", "onnxruntime", "openvino", "nncf", "sklearn", "matplotlib")


def _imported(code: str, *, blocked: tuple[str, ...] = ()) -> tuple[set[str], int, str]:
    """Heavy top-level modules in a fresh process that ran `code`, its exit code and stderr."""
    program = (
        f"import sys\nfor name in {blocked!r}: sys.modules[name] = None\n"
        f"code = 0\n{code}\n"
        f"print('IMPORTED', *(name for name in {HEAVY!r} if sys.modules.get(name)))\nsys.exit(code)"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=120)
    line = next((line for line in done.stdout.splitlines() if line.startswith("IMPORTED")), "IMPORTED ?")
    return set(line.split()[1:]), done.returncode, done.stderr


def test_importing_cveff_imports_nothing_heavy() -> None:
    assert _imported("import cveff")[0] == set()


def test_importing_the_runtime_imports_no_torch() -> None:
    assert "torch" not in _imported("import cveff; cveff.runtime.open")[0]


@pytest.mark.parametrize(
    "words",
    [
        ["--help"],
        ["--version"],
        ["train", "--help"],
        ["deploy", "--help"],
        ["run", "--help"],
        ["recipe", "init", "--help"],
        ["train"],
        ["fly"],
    ],
    ids=" ".join,
)
def test_help_and_usage_errors_import_nothing_heavy(words: list[str]) -> None:
    found, code, _ = _imported(f"from cveff.cli import main\ncode = main({words!r})")
    assert found == set()
    assert code == (2 if words in (["train"], ["fly"]) else 0)


def test_targets_ask_engines_alone_whether_they_run_here() -> None:
    """ONNX Runtime knows its own providers; of the others it is enough that they are installed."""
    found, code, _ = _imported("from cveff.cli import main\ncode = main(['targets'])")
    assert found == {"onnxruntime"}
    assert code == 0


def test_run_needs_no_torch(tiny_bundle) -> None:
    """`cveff run` works where torch, timm and onnx cannot be imported."""
    import numpy as np
    from PIL import Image

    image = tiny_bundle.parent / "image.png"
    Image.fromarray(np.zeros((64, 64, 3), np.uint8)).save(image)
    _, code, stderr = _imported(
        f"from cveff.cli import main\ncode = main(['run', {str(tiny_bundle)!r}, {str(image)!r}])",
        blocked=("torch", "torchvision", "timm", "onnx", "sklearn"),
    )
    assert code == 0, stderr
