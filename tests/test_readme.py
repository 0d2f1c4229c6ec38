"""Every command and program of the README runs as it stands there (trainings for few epochs, of a small network)."""

from __future__ import annotations

import importlib
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image

import cveff

ROOT = Path(__file__).parents[1]
README = (ROOT / "README.md").read_text(encoding="utf-8")

# Commands that CI runs by themselves, and benchmarks whose --quick form tests/test_benchmarks.py runs.
ELSEWHERE = ("make ", "python tools/benchmarks/")
LARGE, SMALL = "mobilenetv4_conv_small", "test_efficientnet"
"""What the README trains, and what is trained here instead."""
FEW = """
name = "few"
description = "Two engines, one image at a time."
candidates = [["onnxruntime", "fp32"], ["onnxruntime", "int8"], ["openvino", "fp32"]]
batch_sizes = [1]
"""
"""A target of few candidates: that of digits has them all."""


def console_commands() -> list[str]:
    blocks = re.findall(r"```console\n(.*?)```", README, re.DOTALL)
    lines = [line.split("  #")[0].strip() for block in blocks for line in block.splitlines()]
    return [line for line in lines if line and not line.startswith(ELSEWHERE)]


def programs() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README, re.DOTALL)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What the README's reader has: two classes of photographs, unlabelled ones, trained weights."""
    folder = tmp_path_factory.mktemp("readme")
    random = np.random.default_rng(0)
    for split, count in (("train", 6), ("val", 4)):
        for label, colour in (("cat", 60), ("dog", 180)):
            (folder / "photos" / split / label).mkdir(parents=True)
            for index in range(count):
                image(random, colour).save(folder / "photos" / split / label / f"{index}.jpg")
    (folder / "unlabelled").mkdir()
    for index in range(12):
        image(random, 20 * index).save(folder / "unlabelled" / f"{index}.png")
    image(random, 90).save(folder / "photo.png")
    model = cveff.create(SMALL, num_classes=2)
    torch.save(model.module.state_dict(), folder / "weights.pth")
    (folder / "few.toml").write_text(FEW, encoding="utf-8")
    (folder / "tools").symlink_to(ROOT / "tools")
    return folder


def image(random: np.random.Generator, colour: int) -> Image.Image:
    noise = random.integers(0, 70, (240, 260, 3))
    return Image.fromarray(np.clip(noise + colour, 0, 255).astype(np.uint8))


def run(command: list[str], folder: Path) -> subprocess.CompletedProcess[str]:
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"}
    return subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)


@pytest.mark.slow
def test_every_console_command_runs(folder: Path) -> None:
    commands = console_commands()
    assert len(commands) >= 8
    for line in commands:
        command = shlex.split(line)
        if LARGE in command and "--weights" not in line:
            command += (
                ["--epochs", "1", "--max-accuracy-drop", "100"] if "deploy.py" in line else ["--epochs", "1"]
            )
        if LARGE in command:
            at = command.index("--target") if "--target" in command else len(command)
            command[at : at + 2] = ["--target", "few.toml"]
        if "--deploy" in command or "--budget" in command:
            command += ["--target", "few.toml"]
        if line.startswith("cveff train digits --out"):  # `make demo` trains it to its end
            command += ["--epochs", "5", "--set", "deploy.max_accuracy_drop=100"]
        if line.startswith("cveff compress"):
            command += ["--epochs", "1", "--max-accuracy-drop", "100"]
        if "--weights" in line:
            command += ["--max-accuracy-drop", "100"]  # random weights: any rounding changes an answer
        done = run([SMALL if word == LARGE else word for word in command], folder)
        assert done.returncode == 0, f"{line}\n{done.stdout[-2000:]}\n{done.stderr[-2000:]}"
    assert (folder / "my.bundle" / "report.html").is_file()


@pytest.mark.slow
@pytest.mark.parametrize("number", range(len(programs())))
def test_every_program_runs(number: int, folder: Path) -> None:
    done = run([sys.executable, "-c", programs()[number]], folder)
    assert done.returncode == 0, done.stderr[-2000:]


def test_links_lead_somewhere() -> None:
    for target in re.findall(r"\]\((?!https?:)([^)#]+)", README):
        assert (ROOT / target).exists(), f"README links to {target}, which is not there"


def test_tables_of_readme_and_docs_are_those_of_the_committed_results() -> None:
    done = run([sys.executable, str(ROOT / "tools" / "readme_tables.py"), "--check"], ROOT)
    assert done.returncode == 0, done.stderr


@pytest.fixture
def tables(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(ROOT / "tools"))
    yield importlib.import_module("readme_tables")
    for name in ("readme_tables", "choices_tables", "compression_tables", "decoder_tables"):
        sys.modules.pop(name, None)


def test_every_table_stands_on_some_page(tables: ModuleType) -> None:
    pages = "".join(page.read_text(encoding="utf-8") for page in tables.PAGES)
    assert set(re.findall(r"<!-- table:(\w+) -->", pages)) == set(tables.TABLES)


def test_a_block_is_filled_and_a_broken_one_refused(
    tables: ModuleType, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "TABLES", {"one": ("startup", lambda values: "new\n")})
    text = "a\n<!-- table:one -->\nold\n<!-- /table -->\nb"
    assert tables.filled(text, "page.md") == text.replace("old", "new")
    with pytest.raises(SystemExit, match=r"page.md asks for table:two; there are one"):
        tables.filled(text.replace("one", "two"), "page.md")
    with pytest.raises(SystemExit, match="without <!-- /table -->"):
        tables.filled("<!-- table:one -->\nold\n" + text, "page.md")
