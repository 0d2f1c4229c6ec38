"""`load`: one door to every kind of data set."""

from __future__ import annotations

import difflib
from pathlib import Path

from cveff.data.dataset import Data, OnBadImage
from cveff.data.named import NAMED
from cveff.errors import DataError
from cveff.progress import Progress


def load(
    source: str | Path | Data,
    *,
    seed: int = 0,
    on_bad_image: OnBadImage = "error",
    val_fraction: float = 0.1,
    progress: Progress | None = None,
) -> Data:
    """Load a data set by name or path, and check it.

    Args:
        source: a name (`digits`, `fashion-mnist`), or a `Data`, which is returned as it is.
        seed: chooses the validation images where the set has no such split.
        on_bad_image: what to do with a file that is not a readable image: "error" names it, "skip" leaves
            it out and lists it in `Data.report`.
        val_fraction: share of the training images set aside where the set has no validation split.

    Raises:
        DataError: the set is missing, empty or inconsistent.
    """
    if isinstance(source, Data):
        return source
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction!r}; give a share in (0, 1)")
    if isinstance(source, str) and source in NAMED:
        return NAMED[source](seed, val_fraction)
    close = difflib.get_close_matches(str(source), NAMED, n=1)
    hint = f"; did you mean {close[0]!r}?" if close else f"; known names: {', '.join(NAMED)}"
    raise DataError(f"{source} is neither a known data set nor a folder{hint}")
