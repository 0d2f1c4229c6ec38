"""Files appear whole or not at all: write under a temporary name beside the target, then rename."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from cveff.errors import CveffError
from cveff.runtime.errors import first_line
from cveff.runtime.files import atomic_path, umask_mode, writable

if TYPE_CHECKING:
    from torch import Tensor

__all__ = ["atomic_folder", "atomic_path", "write_json", "write_tensors", "write_text"]


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
    with writable(path), umask_mode() as mode:
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


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str] | None = None
) -> None:
    """Write a safetensors file atomically.

    Raises:
        CveffError: the folder cannot be written, or the disk is full; an earlier file is left as it was.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    try:
        with atomic_path(path) as temporary:
            save_file(dict(tensors), str(temporary), metadata=None if metadata is None else dict(metadata))
    except SafetensorError as error:  # what the library makes of a full disk
        raise CveffError(
            f"cannot write {path}: {first_line(error)}; what was there before is left as it was; "
            "free space there"
        ) from error
