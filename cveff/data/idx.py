"""Reader of the IDX format, in which MNIST and its descendants come (plain or gzip)."""

from __future__ import annotations

import gzip
import zlib
from pathlib import Path

import numpy as np

from cveff.errors import DataError

_MAX_BYTES = 1 << 32


def read_idx(path: str | Path, ndim: int) -> np.ndarray:
    """Read an IDX file of unsigned bytes.

    Args:
        path: the file; gzip is recognised by its first bytes.
        ndim: number of axes expected: 1 for labels, 3 for images (N, H, W).

    Returns:
        uint8 array of the shape in the file's header.

    Raises:
        DataError: the file is missing, damaged, truncated, or not IDX of that many axes.
    """
    path = Path(path)
    try:
        with path.open("rb") as handle:
            zipped = handle.read(2) == b"\x1f\x8b"
        with gzip.open(path, "rb") if zipped else path.open("rb") as handle:
            header = handle.read(4 + 4 * ndim)
            if len(header) < 4 + 4 * ndim or header[:2] != b"\0\0" or header[2] != 8 or header[3] != ndim:
                raise DataError(f"{path} is not an IDX file of unsigned bytes with {ndim} axes; get it again")
            shape = tuple(int(size) for size in np.frombuffer(header, ">u4", offset=4))
            size = int(np.prod(shape, dtype=object))
            if size > _MAX_BYTES:
                raise DataError(
                    f"{path} declares {size} bytes; that is no data set of this kind; get it again"
                )
            body = handle.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}; get it again") from error
    if len(body) != size:
        found = f"only {len(body)}" if len(body) < size else "more"
        raise DataError(f"{path} should hold {size} bytes of shape {shape} but holds {found}; get it again")
    return np.frombuffer(body, np.uint8).reshape(shape)
