"""ImageNet's folders: names for synsets, and the flat validation folder."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cveff.data import load
from cveff.data.imagenet import class_names
from cveff.errors import DataError

TENCH, CRANE, OTHER_CRANE = "n01440764", "n02012849", "n03126707"


def pictures(folder: Path, count: int, stem: str = "x") -> None:
    folder.mkdir(parents=True, exist_ok=True)
    for index in range(count):
        values = np.random.default_rng(abs(hash((str(folder), index)))).integers(
            0, 256, (9, 9, 3), dtype=np.uint8
        )
        Image.fromarray(values).save(folder / f"{stem}_{index}.JPEG")


@pytest.fixture
def root(tmp_path: Path) -> Path:
    root = tmp_path / "imagenet"
    for synset in (TENCH, CRANE, OTHER_CRANE):
        pictures(root / "train" / synset, 3)
    pictures(root / "val", 4, "ILSVRC2012_val")
    return root


def write_solution(root: Path, classes: list[str]) -> None:
    lines = [f"ILSVRC2012_val_{index},{name} 1 2 3 4 " for index, name in enumerate(classes)]
    (root / "LOC_val_solution.csv").write_text("\n".join(["ImageId,PredictionString", *lines]) + "\n")


def test_synsets_become_names_and_equal_names_stay_apart(root: Path) -> None:
    write_solution(root, [CRANE, TENCH, OTHER_CRANE, CRANE])
    assert load(root).labels == ("tench", f"crane ({CRANE})", f"crane ({OTHER_CRANE})")


def test_kaggles_mapping_comes_first(root: Path) -> None:
    write_solution(root, [CRANE, TENCH, OTHER_CRANE, CRANE])
    (root / "LOC_synset_mapping.txt").write_text(
        f"{TENCH} tench, Tinca tinca\n{CRANE} bird, of a kind\n{OTHER_CRANE} machine\n"
    )
    assert load(root).labels == ("tench", "bird", "machine")


def test_other_folder_names_are_kept(tmp_path: Path) -> None:
    assert class_names(tmp_path, ["cat", TENCH]) == ("cat", TENCH)
    assert class_names(tmp_path, ["n99999999", TENCH]) == ("n99999999", "tench")


def test_the_flat_val_takes_its_classes_from_the_solution(
    root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    write_solution(root, [CRANE, TENCH, OTHER_CRANE, CRANE])
    assert load(root).val.class_indices().tolist() == [1, 0, 2, 1]
    monkeypatch.setenv("CVEFF_DATA", str(root.parent))
    assert load("imagenet").val.class_indices().tolist() == [1, 0, 2, 1]


def test_a_solution_that_does_not_fit_is_refused(root: Path) -> None:
    write_solution(root, [CRANE, TENCH, OTHER_CRANE])
    with pytest.raises(DataError, match=r"no line for ILSVRC2012_val_3"):
        load(root)
    write_solution(root, [CRANE, TENCH, OTHER_CRANE, "n00000001"])
    with pytest.raises(DataError, match="n00000001, which has no folder in train"):
        load(root)
    write_solution(root, [CRANE, TENCH, CRANE, CRANE])
    with pytest.raises(DataError, match="has no images"):
        load(root)
