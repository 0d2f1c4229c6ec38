"""Image folders: layouts, classes, and everything that can be wrong with them."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cveff.data import load, load_images
from cveff.errors import DataError, ImageError
from cveff.runtime.preprocess import decode


def picture(path: Path, seed: int = 0, size: tuple[int, int] = (9, 8), mode: str = "RGB") -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    shape = (*size, 3) if mode == "RGB" else size
    Image.fromarray(np.random.default_rng(seed).integers(0, 256, shape, dtype=np.uint8)).save(path)
    return path


def tree(root: Path, classes: dict[str, int], first: int = 0) -> Path:
    for name, count in classes.items():
        for index in range(count):
            first += 1
            picture(root / name / f"{index}.png", first)
    return root


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    tree(tmp_path / "set" / "train", {"cat": 4, "dog": 3}, 0)
    tree(tmp_path / "set" / "val", {"cat": 2, "dog": 2}, 100)
    return tmp_path / "set"


def names_of(split) -> list[str]:
    return [split.image_name(index) for index in range(len(split))]


@pytest.mark.parametrize("val", ["val", "valid", "validation", "Val"])
def test_splits_and_classes_are_the_folders(tmp_path: Path, val: str) -> None:
    tree(tmp_path / "train", {"dog": 3, "cat": 4}, 0)
    tree(tmp_path / val, {"dog": 2, "cat": 1}, 50)
    tree(tmp_path / "test", {"dog": 1, "cat": 2}, 90)
    data = load(tmp_path)
    assert data.labels == ("cat", "dog") and data.name == tmp_path.name
    assert data.train is not None and data.test is not None and data.evaluation is data.test
    assert data.train.targets is not None and data.train.targets.tolist() == [0] * 4 + [1] * 3
    assert names_of(data.val) == [f"{val}/cat/0.png", f"{val}/dog/0.png", f"{val}/dog/1.png"]
    assert data.report.counts == {
        "train": {"cat": 4, "dog": 3},
        "val": {"cat": 1, "dog": 2},
        "test": {"cat": 2, "dog": 1},
    }
    assert data.train.native_size == (9, 8) and data.train.channels == 3
    assert data.train.image(0) == decode(tmp_path / "train" / "cat" / "0.png")


def test_one_tree_is_split_by_seed_within_classes(tmp_path: Path) -> None:
    tree(tmp_path, {"a": 20, "b": 10, "c": 30})
    data = load(tmp_path, seed=1, val_fraction=0.2)
    assert data.train is not None and data.test is None and data.evaluation is data.val
    assert data.report.counts["val"] == {"a": 4, "b": 2, "c": 6}
    assert sorted(names_of(data.train) + names_of(data.val)) == sorted(
        f"{name}/{index}.png" for name, count in (("a", 20), ("b", 10), ("c", 30)) for index in range(count)
    )
    assert names_of(load(tmp_path, seed=1, val_fraction=0.2).val) == names_of(data.val)
    assert names_of(load(tmp_path, seed=2, val_fraction=0.2).val) != names_of(data.val)


def test_train_alone_gives_val_from_itself_and_val_alone_has_no_train(folder: Path) -> None:
    (folder / "val").rename(folder / "elsewhere")
    data = load(folder, val_fraction=0.3)
    assert data.train is not None and len(data.train) + len(data.val) == 7
    assert any("elsewhere" in warning for warning in data.report.warnings)
    (folder / "train").rename(folder / "train_gone")
    (folder / "elsewhere").rename(folder / "val")
    data = load(folder)
    assert data.train is None and len(data.val) == 4


def test_a_class_may_be_called_train(tmp_path: Path) -> None:
    data = load(tree(tmp_path, {"bus": 5, "train": 5}))
    assert data.labels == ("bus", "train")


def test_images_in_deeper_folders_belong_to_the_class(folder: Path) -> None:
    picture(folder / "train" / "cat" / "tabby" / "x" / "1.PNG", 77)
    data = load(folder)
    assert data.train is not None and "train/cat/tabby/x/1.PNG" in names_of(data.train)


@pytest.mark.parametrize(
    ("modes", "channels"),
    [(["L", "L"], 1), (["L", "RGB"], 3), (["I;16", "L"], 1), (["1", "L"], 1), (["P"], 3)],
)
def test_channels_are_one_only_when_all_are_grey(tmp_path: Path, modes: list[str], channels: int) -> None:
    for name in ("a", "b"):
        for index, mode in enumerate(modes * 4):
            path = tmp_path / name / f"{index}.png"
            picture(path, index, mode="L")
            if mode == "I;16":
                Image.fromarray(np.full((9, 8), 40_000, np.uint16)).save(path)
            elif mode != "L":
                Image.open(path).convert(mode).save(path)
    assert load(tmp_path).val.channels == channels


def test_native_size_is_known_only_when_shared(folder: Path) -> None:
    picture(folder / "val" / "cat" / "other.png", 5, size=(9, 20))
    data = load(folder)
    assert data.val.native_size is None and data.train is not None and data.train.native_size == (9, 8)


# What is wrong with the tree


def remove_all(folder: Path) -> None:
    for path in folder.iterdir():
        path.unlink()


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (
            lambda root: (root / "train" / "owl").mkdir(),
            r"classes of train and val differ \(only in train: owl\)",
        ),
        (lambda root: tree(root / "val", {"owl": 1, "elk": 1}), "only in val: elk, owl"),
        (lambda root: remove_all(root / "train" / "dog"), r"train: class 'dog' has no images"),
        (lambda root: remove_all(root / "val" / "dog"), r"val: class 'dog' has no images"),
        (lambda root: tree(root / "valid", {"cat": 1, "dog": 1}), r"both val/ and valid/"),
    ],
)
def test_classes_that_do_not_fit(folder: Path, spoil: Callable[[Path], object], message: str) -> None:
    spoil(folder)
    with pytest.raises(DataError, match=message):
        load(folder)


def test_one_class_is_refused(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="only one class, 'cat'"):
        load(tree(tmp_path, {"cat": 4}))


def test_no_images_and_no_class_folders(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="no images"):
        load(tmp_path)
    picture(tmp_path / "a.png")
    with pytest.raises(DataError, match="no class folders"):
        load(tmp_path)


def test_splits_without_class_folders(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "a.png")
    picture(tmp_path / "val" / "b.png")
    with pytest.raises(DataError, match=r"train has no class folders"):
        load(tmp_path)


def test_a_flat_val_says_what_is_missing(folder: Path) -> None:
    for name in ("cat", "dog"):
        remove_all(folder / "val" / name)
        (folder / "val" / name).rmdir()
    picture(folder / "val" / "x.png")
    with pytest.raises(DataError, match=r"val has 1 images but no class folders.*LOC_val_solution.csv"):
        load(folder)


def test_two_images_cannot_be_split(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="2 images are too few"):
        load(tree(tmp_path, {"a": 1, "b": 1}))


def test_unknown_names_have_a_hint(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="did you mean 'fashion-mnist'"):
        load("fashion_mnist")
    with pytest.raises(DataError, match="known names: digits"):
        load(tmp_path / "nowhere")
    with pytest.raises(DataError, match="is a file"):
        load(picture(tmp_path / "a.png"))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"val_fraction": 0.0}, "val_fraction is 0.0"),
        ({"val_fraction": 1.0}, "val_fraction is 1.0"),
        ({"seed": -1}, "seed is -1"),
        ({"seed": True}, "seed is True"),
        ({"on_bad_image": "ignore"}, "on_bad_image is 'ignore'"),
    ],
)
def test_options_out_of_range(options: dict, message: str) -> None:
    with pytest.raises(DataError, match=message):
        load("digits", **options)


# Files that are no readable images


def truncated(path: Path) -> None:
    picture(path, 3, size=(64, 64))
    path.write_bytes(path.read_bytes()[:2000])


def bomb(path: Path) -> None:
    Image.new("1", (20_000, 20_000)).save(path)


BAD_FILES: dict[str, tuple[str, Callable[[Path], object], str]] = {
    "corrupt": ("x.png", lambda path: path.write_bytes(b"\x89PNG\r\n\x1a\n" + bytes(50)), "x.png"),
    "truncated": ("x.png", truncated, "corrupt or truncated"),
    "truncated jpeg": ("x.jpg", truncated, "corrupt or truncated"),
    "empty": ("x.jpg", lambda path: path.write_bytes(b""), "is empty"),
    "text as jpeg": ("x.jpg", lambda path: path.write_text("hello"), "not an image"),
    "bomb": ("x.png", bomb, "too large to decode safely"),
    "other file": ("x.pdf", lambda path: path.write_text("hello"), "has no image's file name extension"),
    "no extension": ("x", lambda path: path.write_text("hello"), "has no image's file name extension"),
    "notes beside images": ("x.txt", lambda path: path.write_text("hello"), "no image's file name extension"),
    "broken link": ("x.png", lambda path: path.symlink_to("nowhere"), "is a broken symbolic link"),
    "link to itself": ("x.png", lambda path: path.symlink_to("x.png"), "is a broken symbolic link"),
    "pipe": ("x.png", lambda path: os.mkfifo(path), "is neither a file nor a folder"),
    "name that is no UTF-8": (os.fsdecode(b"x\xff.png"), lambda path: path.write_bytes(b""), r"x\\udcff.png"),
}


@pytest.mark.parametrize("kind", BAD_FILES)
def test_bad_files_are_named_or_skipped_and_counted(folder: Path, kind: str) -> None:
    name, make, reason = BAD_FILES[kind]
    make(folder / "train" / "cat" / name)
    with pytest.raises(ImageError, match=reason) as info:
        load(folder)
    assert "1 file is no readable image: " in str(info.value) and "train/cat/x" in str(info.value)
    assert "on_bad_image='skip'" in str(info.value)
    data = load(folder, on_bad_image="skip")
    assert data.train is not None and len(data.train) == 7
    ((bad,),) = [data.report.bad_images]
    assert bad.name.startswith("train/cat/x")
    assert data.report.to_json()["num_bad_images"] == 1
    assert any("1 file was left out" in warning for warning in data.report.warnings)
    str(data.report.to_json()).encode("utf-8")  # can be stored


def test_many_bad_files_are_counted_and_five_named(folder: Path) -> None:
    for index in range(8):
        (folder / "val" / "dog" / f"bad{index}.png").write_bytes(b"")
    with pytest.raises(ImageError, match=r"8 files are no readable image: .*bad4.png is empty.*; and 3 more"):
        load(folder)


def test_a_class_of_bad_files_alone_is_empty(folder: Path) -> None:
    for path in (folder / "train" / "dog").iterdir():
        path.write_bytes(b"")
    with pytest.raises(DataError, match="class 'dog' has no images"):
        load(folder, on_bad_image="skip")


def test_hidden_files_and_what_systems_leave_are_ignored(folder: Path) -> None:
    for name in (".DS_Store", "._0.png", "Thumbs.db", "desktop.ini", "README.md", "LICENSE", "README"):
        (folder / "train" / "cat" / name).write_text("x")
    (folder / "train" / ".ipynb_checkpoints").mkdir()
    (folder / "train" / "__MACOSX").mkdir()
    (folder / "dataset.csv").write_text("x")
    (folder / "train" / "labels.json").write_text("x")
    data = load(folder)
    assert data.report.bad_images == () and data.labels == ("cat", "dog")


def test_an_image_outside_every_class_is_bad(folder: Path) -> None:
    picture(folder / "train" / "lost.png")
    with pytest.raises(ImageError, match=r"train/lost.png lies outside every class folder"):
        load(folder)
    assert len(load(folder, on_bad_image="skip").report.bad_images) == 1


def test_links_to_folders_are_followed_but_not_in_circles(folder: Path, tmp_path: Path) -> None:
    tree(tmp_path / "more", {"x": 2}, 300)
    (folder / "train" / "cat" / "more").symlink_to(tmp_path / "more")
    data = load(folder)
    assert data.train is not None and len(data.train) == 9
    (folder / "train" / "cat" / "again").symlink_to(folder / "train")
    with pytest.raises(DataError, match=r"cat/again.* is a symbolic link back to a folder above it"):
        load(folder)


def test_unreadable_files_and_folders_are_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if os.geteuid() == 0:
        real = os.access
        monkeypatch.setattr(os, "access", lambda path, mode: "0.png" not in str(path) and real(path, mode))
    else:
        (folder / "train" / "cat" / "0.png").chmod(0)
    with pytest.raises(ImageError, match=r"cat/0.png may not be read \(permission denied\)"):
        load(folder)


def test_a_folder_that_cannot_be_listed_is_named(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    real = os.scandir

    def refuse(path):
        if str(path).endswith("dog"):
            raise PermissionError(13, "Permission denied")
        return real(path)

    monkeypatch.setattr(os, "scandir", refuse)
    with pytest.raises(DataError, match=r"cannot list the folder .*dog: Permission denied"):
        load(folder)


def test_a_class_name_that_is_no_utf8_is_refused(folder: Path) -> None:
    for split in ("train", "val"):
        picture(folder / split / os.fsdecode(b"b\xffd") / "0.png")
    with pytest.raises(DataError, match=r"b\\udcffd has a name that is no UTF-8"):
        load(folder)


# Images without labels


def test_load_images_reads_every_image_below_a_folder(tmp_path: Path) -> None:
    picture(tmp_path / "b.png", 1)
    picture(tmp_path / "deep" / "er" / "a.jpg", 2)
    split = load_images(tmp_path)
    assert names_of(split) == ["b.png", "deep/er/a.jpg"] and split.targets is None


def test_load_images_refuses_what_is_not_there(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="is not a folder"):
        load_images(tmp_path / "nowhere")
    with pytest.raises(DataError, match="holds no images"):
        load_images(tmp_path)
    (tmp_path / "a.pdf").write_text("x")
    with pytest.raises(DataError, match=r"only files such as a.pdf"):
        load_images(tmp_path)
    picture(tmp_path / "b.png")
    with pytest.raises(ImageError, match=r"a.pdf has no image's"):
        load_images(tmp_path)
    assert len(load_images(tmp_path, "skip")) == 1
    (tmp_path / "b.png").write_bytes(b"")
    with pytest.raises(DataError, match="no readable image"):
        load_images(tmp_path, "skip")
