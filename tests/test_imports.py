"""The house's rule: imports run downward, and the runtime knows no torch."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]

# Rooms from the bottom up; a module may import its own level and those below.
LEVELS: list[list[str]] = [
    ["cveff.runtime"],
    ["cveff.errors"],
    ["cveff.files", "cveff.progress", "cveff.schema", "cveff.target", "cveff.kernels"],
    ["cveff.edits", "cveff.log", "cveff.state"],
    ["cveff.backbones.small_resnet", "cveff.backbones", "cveff.tasks"],
    ["cveff.model"],
    ["cveff.kv", "cveff.sparsity"],
    ["cveff.data"],
    ["cveff.measure"],
    ["cveff.steps"],
    ["cveff.backbones.fold", "cveff.backbones.reparameterize"],
    ["cveff.train"],
    ["cveff.compress"],
    ["cveff.dynamic"],
    ["cveff.train.incubation"],
    ["cveff.export"],
    ["cveff.apply"],
    ["cveff.model_zoo"],
    ["cveff.recipe_settings"],
    ["cveff.recipe", "cveff.subject", "cveff.effects", "cveff.train.stitching"],
    ["cveff.recipe_text", "cveff.run_folder", "cveff.origin"],
    ["cveff.pipeline"],
    ["cveff.shortcut", "cveff.compression", "cveff.extraction", "cveff.quantization"],
    ["cveff.console"],
    ["cveff.cli"],
    ["cveff.__main__"],
]
# Names of edits and own architectures are tables of strings or lazy imports at the top of their rooms.
LAZY = {"cveff", "cveff.backbones", "cveff.data", "cveff.export"}


def module_name(path: Path) -> str:
    parts = path.relative_to(ROOT).with_suffix("").parts
    if parts[0] != "cveff":
        parts = ("cveff", *parts)
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


def level(module: str) -> int:
    found = [
        (len(prefix), index)
        for index, prefixes in enumerate(LEVELS)
        for prefix in prefixes
        if module == prefix or module.startswith(prefix + ".")
    ]
    assert found, f"{module} has no level: add its room to LEVELS"
    return max(found)[1]


def imports(path: Path) -> set[str]:
    """cveff modules that `path` imports, those under `if TYPE_CHECKING` and in functions included."""
    name = module_name(path)
    package = name if path.name == "__init__.py" else name.rpartition(".")[0]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            base = node.module or ""
            if node.level:
                above = package.split(".")[: len(package.split(".")) - node.level + 1]
                base = ".".join([*above, base] if base else above)
            found.add(base)
    return {module for module in found if module == "cveff" or module.startswith("cveff.")}


def sources() -> list[Path]:
    rooms = [ROOT / name for name in ("cveff", "export", "kernels", "model_zoo")]
    # pathlib does not follow the symbolic links cveff/export, cveff/kernels and cveff/model_zoo.
    return sorted(
        path
        for room in rooms
        for path in room.rglob("*.py")
        if not path.is_relative_to(ROOT / "cveff" / "export")
    )


@pytest.mark.parametrize("path", sources(), ids=module_name)
def test_imports_run_downward(path: Path) -> None:
    name = module_name(path)
    if name in LAZY:
        return
    upward = {module for module in imports(path) if module != "cveff" and level(module) > level(name)}
    assert not upward, f"{name} imports {sorted(upward)} from above"


def test_levels_name_rooms_that_exist() -> None:
    present = {module_name(path) for path in sources()}
    assert {prefix for level in LEVELS for prefix in level} <= present


@pytest.mark.parametrize(
    "path", sorted((ROOT / "cveff" / "runtime").rglob("*.py")), ids=lambda path: path.name
)
def test_the_runtime_imports_nothing_of_cveff_and_no_torch(path: Path) -> None:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
        if isinstance(node, ast.ImportFrom) and not node.level:
            names = [node.module or ""]
        for name in names:
            assert name.split(".")[0] not in {"torch", "torchvision", "timm", "cveff"}, (
                f"{path.name} imports {name}"
            )
