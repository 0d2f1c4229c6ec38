"""ImageNet's layouts: folders named by synset, and Kaggle's flat `val/` with its solution file."""

from __future__ import annotations

import csv
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

import numpy as np

from cveff.errors import DataError

_SYNSET = re.compile(r"n\d{8}")
_MAPPING = "LOC_synset_mapping.txt"
_SOLUTION = "LOC_val_solution.csv"


def class_names(root: Path, classes: Sequence[str]) -> tuple[str, ...]:
    """Names people read for folders named by synset (n01440764 → "tench"); other names are kept.

    They come from Kaggle's `LOC_synset_mapping.txt` in the folder or up to three above it, else from timm.
    The order stays the synsets', which is the order of the logits of published weights. Two synsets of one
    name ("crane") are told apart by the synset.
    """
    if not all(_SYNSET.fullmatch(name) for name in classes):
        return tuple(classes)
    described = _read_mapping(root) or _timm_names(classes)
    names = [described.get(synset, synset) for synset in classes]
    repeated = {name for name, count in Counter(names).items() if count > 1}
    return tuple(
        f"{name} ({synset})" if name in repeated else name
        for name, synset in zip(names, classes, strict=True)
    )


def flat_targets(root: Path, folder: Path, names: Sequence[str], classes: Sequence[str]) -> np.ndarray:
    """Classes of the images of a split without class folders, from Kaggle's `LOC_val_solution.csv`.

    Args:
        names: file names in `folder`.
        classes: the training split's, whose order gives the targets.

    Returns:
        (len(names),) int64.

    Raises:
        DataError: there is no solution file, or it lacks an image or names an unknown class.
    """
    path = _nearby(root, _SOLUTION)
    if path is None:
        raise DataError(
            f"{folder} has {len(names)} images but no class folders; put each class's images in a folder "
            f"of its own, or, for ImageNet from Kaggle, keep {_SOLUTION} in {root} (the devkit's "
            "ILSVRC2012_validation_ground_truth.txt is not read)"
        )
    with path.open(newline="", encoding="utf-8") as handle:
        rows = {row[0]: row[1].split(" ", 1)[0] for row in csv.reader(handle) if len(row) >= 2}
    number = {name: index for index, name in enumerate(classes)}
    targets = []
    for name in names:
        synset = rows.get(Path(name).stem)
        if synset is None:
            raise DataError(f"{path} has no line for {name}; get the file that belongs to {folder}")
        if synset not in number:
            raise DataError(f"{path} gives {name} the class {synset}, which has no folder in train")
        targets.append(number[synset])
    return np.array(targets, np.int64)


def _read_mapping(root: Path) -> dict[str, str]:
    path = _nearby(root, _MAPPING)
    if path is None:
        return {}
    lines = path.read_text(encoding="utf-8").splitlines()
    pairs = (line.split(" ", 1) for line in lines if " " in line)
    return {synset: names.split(",")[0].strip() for synset, names in pairs}


def _timm_names(classes: Sequence[str]) -> dict[str, str]:
    from timm.data import ImageNetInfo

    # 22k: the whole of ImageNet, so that subsets such as Imagenette or ImageNet-100 are named too.
    info = ImageNetInfo("imagenet-22k")
    known = set(info.label_names())
    return {
        synset: info.label_name_to_description(synset, detailed=False).split(",")[0].strip()
        for synset in classes
        if synset in known
    }


def _nearby(root: Path, name: str) -> Path | None:
    here = root.resolve()
    return next((folder / name for folder in [here, *here.parents][:4] if (folder / name).is_file()), None)
