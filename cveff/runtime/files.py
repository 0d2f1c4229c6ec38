"""A file appears whole or not at all: written under a temporary name beside the target, then renamed."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from .errors import CveffError


@contextmanager
def atomic_path(path: str | Path) -> Iterator[Path]:
    """A temporary file name beside `path`, renamed to it when the block ends well and removed when it does not.

    Raises:
        CveffError: the folder cannot be written or the disk is full.
    """
    path = Path(path)
    with writable(path), umask_mode() as mode:
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
def writable(path: Path) -> Iterator[None]:
    """Errors of the system inside the block become one that names `path`.

    Raises:
        CveffError: says what the system said.
    """
    try:
        yield
    except OSError as error:
        raise CveffError(
            f"cannot write {path}: {error.strerror or error}; nothing was left half-written"
        ) from error


@contextmanager
def umask_mode() -> Iterator[int]:
    """The process's mask of permissions for new files."""
    mode = os.umask(0)
    os.umask(mode)
    yield mode


def _sync(path: Path) -> None:
    with path.open("rb") as handle:
        os.fsync(handle.fileno())
