"""A run's folder: whose it is, what may be continued in it, and what a killed run left half-written."""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cveff.apply import needs_timer
from cveff.errors import CheckpointError, RecipeError, StepError
from cveff.files import write_json
from cveff.recipe import Recipe, parse_recipe

RECORD = "recipe.json"


def check_folder(out: Path, recipe: Recipe, resume: bool, overwrite: bool) -> None:
    """Refuse a folder that holds anything but this run, before work is spent on it.

    Raises:
        RecipeError: it holds another run, or something that is no run.
        CheckpointError: its record is damaged.
    """
    record = out / RECORD
    if out.exists() and not out.is_dir():
        raise RecipeError(f"{out} is an existing file; give another folder to --out")
    if not record.is_file():
        if out.is_dir() and any(not path.name.startswith(".") for path in out.iterdir()):
            raise RecipeError(f"{out} holds files that no run of cveff left; give another folder to --out")
    elif resume and not overwrite:
        _check_same_recipe(record, recipe)
    elif not overwrite:
        raise RecipeError(f"{out} holds an earlier run; --resume continues it, --overwrite replaces it")


@contextmanager
def open_folder(out: Path, recipe: Recipe, overwrite: bool) -> Iterator[None]:
    """Begin or continue in `out`, without an earlier run and without what a killed one had begun to write.

    A step that refuses before any phase is done takes the folder away again: there is nothing to resume, and the
    corrected command should not find another recipe's run.
    """
    if overwrite and out.is_dir():
        shutil.rmtree(out)
    for leftover in (*out.glob(".*.*"), *(out / "phases").glob(".*.*")):  # see `cveff.files`
        shutil.rmtree(leftover) if leftover.is_dir() else leftover.unlink()
    is_new = not (out / RECORD).exists()
    write_json(out / RECORD, recipe.to_json())
    try:
        yield
    except StepError:
        if is_new and not (out / "phases").exists():
            shutil.rmtree(out)
        raise


def _check_same_recipe(record: Path, recipe: Recipe) -> None:
    earlier, now = (_flat(item.to_json()) for item in (parse_recipe(read_json(record), str(record)), recipe))
    # A step that measures milliseconds made its choices for the target; nothing else depends on [deploy].
    matters = {"deploy.target"} if any(map(needs_timer, recipe.steps)) else set()
    changed = [
        f"{key} was {earlier.get(key)!r}, is {now.get(key)!r}"
        for key in sorted(earlier.keys() | now.keys())
        if (not key.startswith("deploy.") or key in matters) and earlier.get(key) != now.get(key)
    ]
    if changed:
        raise RecipeError(
            f"{record.parent} holds a run of another recipe ({'; '.join(changed[:3])}{'; …' if changed[3:] else ''}); "
            "resume it with its own recipe, or give another folder to --out"
        )


def _flat(value: Any, path: str = "") -> dict[str, Any]:
    if isinstance(value, Mapping):
        return {
            key: inner for name, item in value.items() for key, inner in _flat(item, f"{path}{name}.").items()
        }
    if isinstance(value, list) and value and isinstance(value[0], Mapping):
        return _flat({f"[{index}]": item for index, item in enumerate(value)}, path)
    return {path.removesuffix("."): value}


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object; empty where there is no such file.

    Raises:
        CheckpointError: the file is damaged.
    """
    if not path.is_file():
        return {}
    try:
        return dict(json.loads(path.read_text(encoding="utf-8")))
    except (ValueError, TypeError) as error:
        raise CheckpointError(f"{path} is damaged ({error}); --overwrite begins again") from error
