"""WebDataset shards: tar files with samples `key.jpg` + `key.cls`, named by `shards-{000..009}.tar`.

Patterns and sample keys follow the webdataset library. Instead of reading tars as streams, their members
are indexed once, so that shuffling is global, and batches depend on the seed alone.
"""

from __future__ import annotations

import re
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from cveff.data.checks import check, check_classes, check_labels, keep_readable
from cveff.data.dataset import Data, OnBadImage, Split
from cveff.data.decoding import printable
from cveff.data.disk import ShardSplit
from cveff.data.folder import SPLIT_FOLDERS, split_off_val
from cveff.data.report import BadImage
from cveff.errors import DataError, MissingDependencyError
from cveff.progress import Progress, Silent
from cveff.runtime.preprocess import IMAGE_SUFFIXES

_LABEL_FILES = ("classes.txt", "labels.txt")
_MAX_LABEL_BYTES = 4096


@dataclass
class _Samples:
    """Samples found so far: name inside the shard, place (shard, offset, size), label as written."""

    names: list[str] = field(default_factory=list)
    places: list[tuple[int, int, int]] = field(default_factory=list)
    labels: list[str] = field(default_factory=list)


def is_shard_pattern(source: str) -> bool:
    """Whether `source` names tar files: `x.tar`, `x-{000..009}.tar`, `x-*.tar`."""
    return bool(re.search(r"\.tar(\.\w+)?$|\.tgz$", source)) or (".tar" in source and "{" in source)


def load_shards(
    source: str | Path,
    *,
    seed: int = 0,
    on_bad_image: OnBadImage = "error",
    val_fraction: float = 0.1,
    progress: Progress | None = None,
) -> Data:
    """Load shards; every image is decoded once, to be sure.

    Args:
        source: a folder of tar files, or a pattern. Shards with `train`, `val` (`valid`, `validation`) or
            `test` as a word of their name make those splits; without such words all are one set, from
            which `seed` and `val_fraction` choose the validation images.

    Classes are the numbers or names in the samples' `cls`; numbers are named by the lines of a
    `classes.txt` or `labels.txt` beside the shards.

    Raises:
        DataError: no such shard, a damaged or compressed tar, a sample without image or class.
        ImageError: an image cannot be read, under `on_bad_image="error"`.
        MissingDependencyError: webdataset is not installed.
    """
    shards = _expand(str(source))
    groups = _group(shards)
    found: dict[str, _Samples] = {}
    for name, paths in groups.items():
        tracked = (progress or Silent()).track(enumerate(paths), f"Indexing {name} shards", len(paths))
        samples = found[name] = _Samples()
        for number, path in tracked:
            _index(path, number, samples)
        if not samples.names:
            raise DataError(
                f"{paths[0]}{' …' if len(paths) > 1 else ''}: no samples with an image and a class"
            )
    labels, targets = _classes(shards[0].parent, found)
    check_labels(str(source), labels)
    splits: dict[str, Split] = {}
    digests: dict[str, np.ndarray] = {}
    bad: list[BadImage] = []
    for name, samples in found.items():
        places = np.array(samples.places, np.int64).reshape(-1, 3)
        split = ShardSplit(name, tuple(groups[name]), samples.names, places, targets[name])
        splits[name], digests[name], unreadable = keep_readable(split, (), on_bad_image, progress)
        bad += unreadable
    whole = "all" if "all" in splits else "train"
    if "val" not in splits and whole in splits:
        everything, known = splits.pop(whole), digests.pop(whole)
        check_classes(str(source), everything.class_indices(), labels)
        kept, aside = split_off_val(everything, seed, val_fraction)
        for name, indices in (("train", kept), ("val", aside)):
            splits[name], digests[name] = everything.subset(indices, name), known[indices]
    val = splits.get("val", splits.get("test"))
    assert val is not None
    test = splits.get("test") if "val" in splits else None
    return check(Data(shards[0].parent.resolve().name, labels, splits.get("train"), val, test), digests, bad)


def _expand(source: str) -> list[Path]:
    """The shards a pattern or a folder names.

    Raises:
        DataError: there are none, one is missing, or they are not local uncompressed tars.
    """
    if "://" in source or source.startswith("pipe:"):
        raise DataError(f"{source}: shards are read from local disks; download them and give their path")
    if Path(source).is_dir():
        shards = sorted(Path(source).glob("*.tar"))
        if not shards:
            raise DataError(f"{source} holds no .tar shards")
        return shards
    shards = []
    for name in _expand_braces(source):
        path = Path(name)
        if any(mark in path.name for mark in "*?["):
            shards += sorted(path.parent.glob(path.name))
        else:
            shards.append(path)
    if not shards:
        raise DataError(f"{source} matches no file; check the pattern")
    for path in shards:
        if not path.is_file():
            raise DataError(f"the shard {path} does not exist; check the pattern {source}")
        if path.suffix != ".tar":
            raise DataError(
                f"the shard {path} is compressed; decompress it to .tar, so that it can be read by index"
            )
    return shards


def _expand_braces(pattern: str) -> list[str]:
    if "{" not in pattern:
        return [pattern]
    try:
        from webdataset.shardlists import expand_urls
    except ImportError as error:
        raise MissingDependencyError(
            "patterns of shards need the webdataset library: pip install 'cveff[webdataset]'"
        ) from error
    return list(expand_urls(pattern))


def _group(shards: Sequence[Path]) -> dict[str, list[Path]]:
    """Shards by split, train first."""
    groups: dict[str, list[Path]] = {}
    for path in shards:
        words = [
            SPLIT_FOLDERS[word] for word in re.split(r"[^a-z]+", path.stem.lower()) if word in SPLIT_FOLDERS
        ]
        groups.setdefault(words[0] if words else "all", []).append(path)
    if "all" in groups and len(groups) > 1:
        raise DataError(
            f"the shard {groups['all'][0]} belongs to no split, but others do; "
            "name it train, val or test, or leave it out"
        )
    return {name: groups[name] for name in ("all", "train", "val", "test") if name in groups}


def _index(path: Path, number: int, samples: _Samples) -> None:
    """Add one shard's samples: members of one name up to its first dot, side by side as the format asks."""
    try:
        with tarfile.open(path, "r:") as archive:
            key: str | None = None
            group: dict[str, tarfile.TarInfo] = {}
            for member in archive:
                if not member.isreg():
                    continue
                folder, _, base = member.name.rpartition("/")
                stem, dot, extension = base.partition(".")
                if not stem or not dot:
                    continue  # hidden files and names without extension are no part of a sample
                here = f"{folder}/{stem}"
                if here != key:
                    _finish(path, number, archive, group, samples)
                    key, group = here, {}
                if extension.lower() in group:
                    raise DataError(f"{path} has {member.name} twice")
                group[extension.lower()] = member
            _require_end(path, archive.offset)
            _finish(path, number, archive, group, samples)
    except (tarfile.TarError, OSError) as error:
        raise DataError(f"the shard {path} is damaged or no tar file ({error}); write it again") from error


def _require_end(path: Path, offset: int) -> None:
    """tarfile takes a file cut between or inside headers for a shorter archive; a whole one ends in zeros."""
    with path.open("rb") as handle:
        handle.seek(offset)
        if handle.read(tarfile.BLOCKSIZE) != bytes(tarfile.BLOCKSIZE):
            raise tarfile.ReadError(f"no end-of-archive mark at byte {offset}")


def _finish(
    path: Path, number: int, archive: tarfile.TarFile, group: dict[str, tarfile.TarInfo], samples: _Samples
) -> None:
    if not group:
        return
    images = [member for extension, member in group.items() if f".{extension}" in IMAGE_SUFFIXES]
    first = next(iter(group.values())).name
    if "cls" not in group:
        raise DataError(
            f"{path}: the sample of {printable(first)} has no class (a member with the extension .cls)"
        )
    if len(images) != 1:
        raise DataError(f"{path}: the sample of {printable(first)} has {len(images)} images; it needs one")
    member = group["cls"]
    handle = archive.extractfile(member) if member.size <= _MAX_LABEL_BYTES else None
    try:
        label = handle.read().decode("utf-8").strip() if handle is not None else ""
    except UnicodeDecodeError:
        label = ""
    if not label:
        raise DataError(
            f"{path}: {printable(member.name)} holds no class; it must be a number or a name in UTF-8"
        )
    samples.names.append(images[0].name)
    samples.places.append((number, images[0].offset_data, images[0].size))
    samples.labels.append(label)


def _classes(folder: Path, found: dict[str, _Samples]) -> tuple[tuple[str, ...], dict[str, np.ndarray]]:
    """Class names, and targets by split."""
    seen = {label for samples in found.values() for label in samples.labels}
    names = _read_names(folder)
    if all(re.fullmatch(r"\d{1,6}", label) for label in seen):
        last = max(int(label) for label in seen)
        labels = names or tuple(str(number) for number in range(last + 1))
        if last >= len(labels):
            raise DataError(f"a sample has class {last}, but {folder} names only {len(labels)} classes")
        number = {label: int(label) for label in seen}
    else:
        labels = names or tuple(sorted(seen))
        number = {label: index for index, label in enumerate(labels)}
        unknown = sorted(seen - set(labels))
        if unknown:
            raise DataError(f"a sample has class {unknown[0]!r}, which the class list in {folder} lacks")
    targets = {
        name: np.array([number[label] for label in samples.labels], np.int64)
        for name, samples in found.items()
    }
    return labels, targets


def _read_names(folder: Path) -> tuple[str, ...] | None:
    path = next((folder / name for name in _LABEL_FILES if (folder / name).is_file()), None)
    if path is None:
        return None
    try:
        return tuple(line.strip() for line in path.read_text(encoding="utf-8").splitlines() if line.strip())
    except (OSError, UnicodeDecodeError) as error:
        raise DataError(
            f"cannot read {path}: {error}; it must hold one class name a line, in UTF-8"
        ) from error
