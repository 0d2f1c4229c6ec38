"""Finding image files under a folder, by rules a user can foresee (docs/data.md lists them)."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path

from cveff.data.decoding import printable
from cveff.data.report import BadImage
from cveff.errors import DataError
from cveff.runtime.preprocess import IMAGE_SUFFIXES

_LITTER = frozenset({"thumbs.db", "desktop.ini", "__macosx"})
_NOTES = ("readme", "license", "licence")


def is_ignored(name: str) -> bool:
    """Hidden files, what file managers leave behind, and README or LICENSE files."""
    lower = name.lower()
    return lower.startswith(".") or lower in _LITTER or lower.split(".")[0] in _NOTES


def is_image_name(name: str) -> bool:
    """Whether a file's suffix is that of an image."""
    return Path(name).suffix.lower() in IMAGE_SUFFIXES


def subfolders(folder: Path) -> list[str]:
    """Names of the folders in `folder` (symbolic links followed), sorted; ignored names left out.

    Raises:
        DataError: the folder cannot be listed.
    """
    return sorted((entry.name for entry in _entries(folder) if _is_folder(entry)), key=os.fsencode)


def files_in(folder: Path) -> list[str]:
    """Names of what is not a folder in `folder`, sorted; ignored names left out."""
    return sorted((entry.name for entry in _entries(folder) if not _is_folder(entry)), key=os.fsencode)


def find_images(root: Path, folder: str) -> tuple[list[str], list[BadImage]]:
    """Image files anywhere under `root / folder`, links followed.

    Returns:
        paths relative to `root`, in an order that depends on the names alone; and the files that by
        suffix or kind are no images.

    Raises:
        DataError: a folder cannot be listed, or a symbolic link leads back to a folder above it.
    """
    names: list[str] = []
    bad: list[BadImage] = []
    for name in _files_below(root, folder, ()):
        path = root / name
        shown = printable(name)
        if not path.exists():
            bad.append(BadImage(shown, f"{printable(str(path))} is a broken symbolic link"))
        elif not path.is_file():
            bad.append(BadImage(shown, f"{printable(str(path))} is neither a file nor a folder"))
        elif not is_image_name(name):
            bad.append(BadImage(shown, f"{printable(str(path))} has no image's file name extension"))
        elif not os.access(path, os.R_OK):
            bad.append(BadImage(shown, f"{printable(str(path))} may not be read (permission denied)"))
        else:
            names.append(name)
    return names, bad


def _files_below(root: Path, folder: str, above: tuple[tuple[int, int], ...]) -> Iterator[str]:
    path = root / folder
    identity = path.stat()
    key = (identity.st_dev, identity.st_ino)
    if key in above:
        raise DataError(
            f"{printable(str(path))} is a symbolic link back to a folder above it; remove the link"
        )
    for name in files_in(path):
        yield os.path.join(folder, name)  # noqa: PTH118  (a plain string: there may be millions)
    for name in subfolders(path):
        yield from _files_below(root, os.path.join(folder, name), (*above, key))  # noqa: PTH118


def _entries(folder: Path) -> list[os.DirEntry[str]]:
    try:
        with os.scandir(folder) as entries:
            return [entry for entry in entries if not is_ignored(entry.name)]
    except OSError as error:
        raise DataError(
            f"cannot list the folder {printable(str(folder))}: {error.strerror or error}"
        ) from error


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a symbolic link that leads to itself: shown later as a broken one
        return False
