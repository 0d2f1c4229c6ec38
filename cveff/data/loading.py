"""`load`: one door to every kind of data set."""

from __future__ import annotations

import difflib
from pathlib import Path
from typing import get_args

from cveff.data.dataset import Data, OnBadImage
from cveff.data.folder import load_folder, load_images
from cveff.data.named import NAMED, find_imagenet
from cveff.data.webdataset import is_shard_pattern, load_shards
from cveff.errors import DataError
from cveff.progress import Progress

__all__ = ["load", "load_images"]


def load(
    source: str | Path | Data,
    *,
    seed: int = 0,
    on_bad_image: OnBadImage = "error",
    val_fraction: float = 0.1,
    progress: Progress | None = None,
) -> Data:
    """Load a data set by name or path, and check it; `Data.report` says what was found.

    Args:
        source: a name (`digits`, `fashion-mnist`, `cifar10`, `cifar100`, `imagenet`); a folder of images
            (`train/ val/ [test/]`, or one folder a class); a folder or a pattern of WebDataset shards
            (`shards-{000..009}.tar`); or a `Data`, which is returned as it is.
        seed: chooses the validation images where the set has no such split.
        on_bad_image: what to do with a file that is not a readable image: "error" names it, "skip" leaves
            it out and lists it in the report.
        val_fraction: share of the training images set aside where the set has no validation split.

    Raises:
        DataError: the set is missing, empty or inconsistent.
        ImageError: a file is no readable image, under "error".
    """
    if isinstance(source, Data):
        return source
    if on_bad_image not in get_args(OnBadImage):
        raise DataError(f"on_bad_image is {on_bad_image!r}; use 'error' or 'skip'")
    if not 0 < val_fraction < 1:
        raise DataError(f"val_fraction is {val_fraction!r}; give a share in (0, 1)")
    if isinstance(seed, bool) or not isinstance(seed, int) or seed < 0:
        raise DataError(f"seed is {seed!r}; give an integer of 0 or more")
    if isinstance(source, str) and source in NAMED:
        return NAMED[source](seed, val_fraction)
    path = find_imagenet() if source == "imagenet" else Path(source)
    if path.is_dir():
        shards = any(path.glob("*.tar")) and not any(child.is_dir() for child in path.iterdir())
        loader = load_shards if shards else load_folder
        return loader(
            path, seed=seed, on_bad_image=on_bad_image, val_fraction=val_fraction, progress=progress
        )
    if is_shard_pattern(str(source)):
        return load_shards(
            str(source), seed=seed, on_bad_image=on_bad_image, val_fraction=val_fraction, progress=progress
        )
    known = [*NAMED, "imagenet"]
    if path.is_file():
        raise DataError(f"{source} is a file; give a folder of images, a pattern of .tar shards, or a name")
    close = difflib.get_close_matches(str(source), known, n=1)
    hint = f"did you mean {close[0]!r}?" if close else f"known names: {', '.join(known)}"
    raise DataError(f"{source} is neither a known data set nor a folder; {hint}")
