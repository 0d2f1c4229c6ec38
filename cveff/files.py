"""Files appear whole or not at all: write under a temporary name beside the target, then rename."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from cveff.errors import CveffError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary file name beside `path`, renamed to it when the block ends well and removed when it does not.

    Raises:
        CveffError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    with _writable(path), _umask_mode() as mode:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
        os.close(handle)
        temporary = Path(name)
        try:
            yield temporary
            temporary.chmod(0o666 & ~mode)
            _sync(temporary)
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)


@contextmanager
def atomic_folder(path: str | Path) -> Iterator[Path]:
    """A temporary folder beside `path` that takes its place when the block ends well.

    Raises:
        CveffError: the folder cannot be written, the disk is full, or `path` is an existing file.
    """
    path = Path(path)
    if path.exists() and not path.is_dir():
        raise CveffError(
            f"{path} is an existing file; give a folder that does not exist yet, or remove the file"
        )
    with _writable(path), _umask_mode() as mode:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{path.name}.", dir=path.parent))
        temporary.chmod(0o777 & ~mode)
        retired = temporary.with_name(temporary.name + ".old")
        try:
            yield temporary
            if path.exists():
                path.rename(retired)
            temporary.rename(path)
        finally:
            if retired.exists() and not path.exists():
                retired.rename(path)
            shutil.rmtree(temporary, ignore_errors=True)
            shutil.rmtree(retired, ignore_errors=True)


def write_text(path: str | Path, text: str) -> None:
    """Write UTF-8 text atomically."""
    with atomic_path(path) as temporary:
        temporary.write_text(text, encoding="utf-8")


def write_json(path: str | Path, value: Any) -> None:
    """Write indented JSON atomically."""
    write_text(path, json.dumps(value, indent=2, ensure_ascii=False) + "\n")


@contextmanager
def _writable(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise CveffError(
            f"cannot write {path}: {error.strerror or error}; nothing was left half-written"
        ) from error


@contextmanager
def _umask_mode() -> Iterator[int]:
    mode = os.umask(0)
    os.umask(mode)
    yield mode


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
