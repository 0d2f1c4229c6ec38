"""WebDataset shards: patterns, samples, classes, damage."""

from __future__ import annotations

import io
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cveff.data import load
from cveff.errors import DataError, ImageError, MissingDependencyError
from cveff.runtime.preprocess import decode

pytest.importorskip("webdataset")


def png(seed: int, size: int = 9) -> bytes:
    buffer = io.BytesIO()
    values = np.random.default_rng(seed).integers(0, 256, (size, size, 3), dtype=np.uint8)
    Image.fromarray(values).save(buffer, "PNG")
    return buffer.getvalue()


def write_tar(path: Path, members: list[tuple[str, bytes]]) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as archive:
        for name, content in members:
            member = tarfile.TarInfo(name)
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    return path


def write_shards(
    folder: Path, stem: str = "shards", num_shards: int = 3, each: int = 10, first: int = 0
) -> str:
    for shard in range(num_shards):
        members = []
        for index in range(each):
            number = first + shard * each + index
            members += [(f"{number:05}.png", png(number)), (f"{number:05}.cls", b"%d" % (number % 2))]
        write_tar(folder / f"{stem}-{shard:03}.tar", members)
    return str(folder / f"{stem}-{{000..{num_shards - 1:03}}}.tar")


@pytest.mark.parametrize("source", ["{000..002}.tar", "*.tar", ""])
def test_patterns_and_folders_give_every_sample_once(tmp_path: Path, source: str) -> None:
    write_shards(tmp_path)
    data = load(str(tmp_path / f"shards-{source}") if source else tmp_path, val_fraction=0.2)
    assert data.train is not None and data.labels == ("0", "1")
    assert (len(data.train), len(data.val)) == (24, 6)
    assert data.report.counts["val"] == {"0": 3, "1": 3}
    seen = sorted(split.image_name(i) for split in (data.train, data.val) for i in range(len(split)))
    assert seen == [f"shards-{n // 10:03}.tar/{n:05}.png" for n in range(30)]


def test_a_sample_is_the_bytes_webdataset_reads(tmp_path: Path) -> None:
    import webdataset

    pattern = write_shards(tmp_path, "train")
    write_shards(tmp_path, "val", first=100)
    data = load(str(tmp_path / "{train,val}-{000..002}.tar"))
    assert data.train is not None and len(data.train) == len(data.val) == 30
    samples = list(webdataset.WebDataset(pattern, shardshuffle=False))
    assert [data.train.source(index) for index in range(30)] == [sample["png"] for sample in samples]
    assert data.train.class_indices().tolist() == [int(sample["cls"]) for sample in samples]
    assert data.train.image(4) == decode(png(4))


def test_split_words_may_stand_anywhere_in_the_name(tmp_path: Path) -> None:
    write_shards(tmp_path, "imagenet-train")
    write_shards(tmp_path, "imagenet-validation", first=100)
    write_shards(tmp_path, "imagenet-test", first=200)
    data = load(tmp_path)
    assert data.train is not None and data.test is not None
    assert [len(split) for split in (data.train, data.val, data.test)] == [30, 30, 30]


def test_classes_may_be_named(tmp_path: Path) -> None:
    members = []
    for index in range(12):
        members += [
            (f"d/{index}.a.png.txt", b"x"),
            (f"d/{index}.png", png(index)),
            (f"d/{index}.cls", b"cat\n"),
        ]
        members += [(f"e/{index}.PNG", png(50 + index)), (f"e/{index}.cls", b"ant")]
    assert load(str(write_tar(tmp_path / "a.tar", members))).labels == ("ant", "cat")
    (tmp_path / "classes.txt").write_text("cat\nant\n")
    assert load(str(tmp_path / "a.tar")).labels == ("cat", "ant")
    (tmp_path / "classes.txt").write_text("cat\nbee\n")
    with pytest.raises(DataError, match="class 'ant', which the class list"):
        load(str(tmp_path / "a.tar"))


def test_numbers_are_named_by_a_list(tmp_path: Path) -> None:
    source = write_shards(tmp_path)
    (tmp_path / "labels.txt").write_text("cat\ndog\n")
    assert load(source).labels == ("cat", "dog")
    (tmp_path / "labels.txt").write_text("cat\n")
    with pytest.raises(DataError, match=r"has class 1, but .* names only 1"):
        load(source)
    (tmp_path / "labels.txt").write_text("cat\ndog\nowl\n")
    with pytest.raises(DataError, match="class 'owl' has no images"):
        load(source)


GOOD = [("1.png", png(1)), ("1.cls", b"0"), ("2.png", png(2)), ("2.cls", b"1")]


@pytest.mark.parametrize(
    ("members", "message"),
    [
        ([], "no samples"),
        ([("readme.txt", b"x"), ("readme.cls", b"1")], "has 0 images"),
        ([("1.png", png(1))], r"sample of 1.png has no class"),
        ([("1.png", png(1)), ("1.jpg", png(2)), ("1.cls", b"0")], "has 2 images"),
        ([("1.png", png(1)), ("1.png", png(2)), ("1.cls", b"0")], "1.png twice"),
        ([("1.png", png(1)), ("1.cls", b"")], "1.cls holds no class"),
        ([("1.png", png(1)), ("1.cls", b"\xff\xfe")], "1.cls holds no class"),
        ([("1.png", png(1)), ("1.cls", b"7" * 5000)], "1.cls holds no class"),
        (GOOD[:2], "only one class, '0'"),
        ([*GOOD[:2], ("2.png", png(2)), ("2.cls", b"5")], "classes '1', '2', '3', '4' have no images"),
    ],
)
def test_samples_that_are_no_samples(tmp_path: Path, members: list[tuple[str, bytes]], message: str) -> None:
    with pytest.raises(DataError, match=message):
        load(str(write_tar(tmp_path / "a.tar", members)))


def test_bad_images_are_named_or_skipped(tmp_path: Path) -> None:
    write_shards(tmp_path)
    write_tar(tmp_path / "shards-003.tar", [("x.png", png(1)[:60]), ("x.cls", b"0")])
    with pytest.raises(ImageError, match=r"shards-003.tar/x.png"):
        load(tmp_path)
    data = load(tmp_path, on_bad_image="skip")
    assert [bad.name for bad in data.report.bad_images] == ["shards-003.tar/x.png"]
    assert data.train is not None and len(data.train) + len(data.val) == 30


def test_damaged_and_compressed_shards(tmp_path: Path) -> None:
    source = write_shards(tmp_path)
    path = tmp_path / "shards-001.tar"
    whole = path.read_bytes()
    # In a header, in an image, between two members, and where only the end-of-archive mark is gone.
    for length in (1500, 700, 1024, 20 * 1024):
        path.write_bytes(whole[:length])
        with pytest.raises(DataError, match=r"shards-001.tar is damaged"):
            load(source)
    path.write_bytes(b"hello" * 400)
    with pytest.raises(DataError, match=r"shards-001.tar is damaged"):
        load(source)
    path.unlink()
    with pytest.raises(DataError, match=r"shards-001.tar does not exist"):
        load(source)
    (tmp_path / "b.tar.gz").write_bytes(b"")
    with pytest.raises(DataError, match=r"b.tar.gz is compressed"):
        load(str(tmp_path / "b.tar.gz"))


def test_sources_that_are_no_shards(tmp_path: Path) -> None:
    with pytest.raises(DataError, match="matches no file"):
        load(str(tmp_path / "none-*.tar"))
    with pytest.raises(DataError, match="download them"):
        load("https://example.org/shards-{000..009}.tar")
    write_shards(tmp_path, "train")
    write_shards(tmp_path, "more")
    with pytest.raises(DataError, match=r"more-000.tar belongs to no split"):
        load(tmp_path)


def test_without_the_library_a_pattern_says_what_to_install(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source = write_shards(tmp_path)
    monkeypatch.setitem(sys.modules, "webdataset.shardlists", None)
    with pytest.raises(MissingDependencyError, match=r"cveff\[webdataset\]"):
        load(source)
    assert load(tmp_path).num_classes == 2  # a folder needs no pattern
