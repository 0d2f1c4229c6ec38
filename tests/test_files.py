"""Files and folders appear whole or not at all."""

from __future__ import annotations

import errno
import stat
from pathlib import Path

import pytest

from cveff.errors import CveffError
from cveff.files import atomic_folder, atomic_path, write_json, write_text


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_a_file_appears_when_the_block_ends(tmp_path: Path) -> None:
    with atomic_path(tmp_path / "deep" / "a.txt") as temporary:
        temporary.write_text("new")
        assert not (tmp_path / "deep" / "a.txt").exists()
    assert (tmp_path / "deep" / "a.txt").read_text() == "new"
    assert names(tmp_path / "deep") == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt()])
def test_a_failed_block_keeps_the_old_file_and_leaves_nothing(tmp_path: Path, failure: BaseException) -> None:
    write_text(tmp_path / "a.txt", "old")
    with pytest.raises(type(failure)):
        with atomic_path(tmp_path / "a.txt") as temporary:
            temporary.write_text("half")
            raise failure
    assert (tmp_path / "a.txt").read_text() == "old"
    assert names(tmp_path) == ["a.txt"]


@pytest.mark.parametrize("failure", [ValueError("x"), KeyboardInterrupt()])
def test_a_failed_block_keeps_the_old_folder(tmp_path: Path, failure: BaseException) -> None:
    with atomic_folder(tmp_path / "f") as temporary:
        (temporary / "a").write_text("old")
    with pytest.raises(type(failure)):
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / "b").write_text("half")
            raise failure
    assert names(tmp_path) == ["f"]
    assert names(tmp_path / "f") == ["a"]


def test_a_folder_is_replaced_whole(tmp_path: Path) -> None:
    for name in ("a", "b"):
        with atomic_folder(tmp_path / "f") as temporary:
            (temporary / name).write_text(name)
    assert names(tmp_path / "f") == ["b"]


def test_a_folder_does_not_replace_a_file(tmp_path: Path) -> None:
    (tmp_path / "f").write_text("precious")
    with pytest.raises(CveffError, match="existing file"):
        with atomic_folder(tmp_path / "f"):
            pass
    assert (tmp_path / "f").read_text() == "precious"


def test_a_full_disk_is_one_clear_error(tmp_path: Path) -> None:
    with pytest.raises(CveffError, match="No space left on device; nothing was left half-written"):
        with atomic_path(tmp_path / "a"):
            raise OSError(errno.ENOSPC, "No space left on device")
    assert names(tmp_path) == []


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CveffError, match="cannot write"):
        write_json(tmp_path / "file" / "below.json", {})


def test_new_files_have_ordinary_permissions(tmp_path: Path) -> None:
    (tmp_path / "plain").write_text("")
    write_text(tmp_path / "atomic", "")
    with atomic_folder(tmp_path / "folder"):
        pass
    (tmp_path / "plain_folder").mkdir()
    mode = {path.name: stat.S_IMODE(path.stat().st_mode) for path in tmp_path.iterdir()}
    assert mode["atomic"] == mode["plain"]
    assert mode["folder"] == mode["plain_folder"]
