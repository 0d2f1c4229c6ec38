"""What was found in images that have not changed since, so that large sets are decoded once, not by every command.

One file for each split in `$XDG_CACHE_HOME/cveff/inspected` (by default `~/.cache/cveff/inspected`). It may
be deleted at any time; a file that is damaged, or written for other versions, is not used.
"""

from __future__ import annotations

import hashlib
import os
from pathlib import Path

import numpy as np
import PIL
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file

from cveff.data.dataset import Split
from cveff.errors import CveffError
from cveff.files import atomic_path

SMALLEST = 2_000
"""Images below which a split is quicker decoded than worth remembering."""

_VERSION = f"1 pillow {PIL.__version__}"


def fingerprints(split: Split) -> np.ndarray | None:
    """(N,) uint64, one for each image's place, size and time of change; None where nothing is remembered.

    A file that cannot be looked at has 0, and is decoded again each time.
    """
    if len(split) < SMALLEST or split.place() is None:
        return None
    return np.array([_fingerprint(split, index) for index in range(len(split))], np.uint64)


def recall(split: Split, known: np.ndarray) -> np.ndarray:
    """Height, width, grey and digest of each image that is remembered, (N, 4) uint64; zeros for the others."""
    found = np.zeros((len(known), 4), np.uint64)
    try:
        stored = load_file(_path(split))
        names, values = stored["fingerprints"], stored["found"]
    except (OSError, SafetensorError, KeyError):
        return found
    if (
        names.dtype != np.uint64
        or values.dtype != np.uint64
        or values.shape != (*names.shape, 4)
        or not len(names)
    ):
        return found
    place = np.minimum(np.searchsorted(names, known), len(names) - 1)
    hit = (names[place] == known) & (known != 0)
    found[hit] = values[place[hit]]
    return found


def remember(split: Split, known: np.ndarray, found: np.ndarray) -> None:
    """Store what was found in readable images; a cache that cannot be written is none."""
    keep = (found[:, 0] > 0) & (known != 0)
    names, first = np.unique(known[keep], return_index=True)
    try:
        with atomic_path(_path(split)) as temporary:
            save_file({"fingerprints": names, "found": found[keep][first]}, temporary)
    except (CveffError, SafetensorError):
        return


def _fingerprint(split: Split, index: int) -> int:
    try:
        stamp = f"{_VERSION} {split.stamp(index)}"
    except OSError:
        return 0
    return int.from_bytes(hashlib.blake2b(stamp.encode(), digest_size=8).digest(), "little")


def _path(split: Split) -> Path:
    """The file for this split: named by its place, so that a changed set replaces its own."""
    name = hashlib.blake2b(f"{split.place()} {split.name}".encode(), digest_size=12).hexdigest()
    base = os.environ.get("XDG_CACHE_HOME")
    return (Path(base) if base else Path.home() / ".cache") / "cveff" / "inspected" / f"{name}.safetensors"
