"""Laws of batches, over images in memory, in files and in shards."""

from __future__ import annotations

import io
import pickle
import subprocess
import sys
import tarfile
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from cveff.data import Augmentation, MemorySplit, Split
from cveff.data import dataset as dataset_module
from cveff.data.disk import FileSplit, ShardSplit
from cveff.errors import DataError, InputSizeError
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.preprocess import preprocess

SPEC = InputSpec((12, 10), 3, crop=0.9)
COUNT = 23
RECIPE = Augmentation("alternating", crop_padding=1, erasing=0.5)


def pictures() -> list[Image.Image]:
    random = np.random.default_rng(0)
    made = []
    for index in range(COUNT):
        height, width = 14 + index % 5, 13 + index % 7
        shape = (height, width) if index % 3 == 0 else (height, width, 3)
        made.append(Image.fromarray(random.integers(0, 256, shape, dtype=np.uint8)))
    return made


def encode(image: Image.Image, index: int) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, "JPEG" if index % 2 else "PNG")
    return buffer.getvalue()


@pytest.fixture(params=["memory", "files", "shards"])
def split(request: pytest.FixtureRequest, tmp_path: Path) -> Split:
    targets = np.arange(COUNT)
    if request.param == "memory":
        images = np.random.default_rng(0).integers(0, 256, (COUNT, 15, 13, 1), dtype=np.uint8)
        return MemorySplit("train", images, targets)
    files = [encode(image, index) for index, image in enumerate(pictures())]
    if request.param == "files":
        for index, content in enumerate(files):
            (tmp_path / f"{index:02}.jpg").write_bytes(content)
        return FileSplit("train", tmp_path, [f"{index:02}.jpg" for index in range(COUNT)], targets)
    places = []
    with tarfile.open(tmp_path / "a.tar", "w") as archive:
        for index, content in enumerate(files):
            member = tarfile.TarInfo(f"{index:02}.jpg")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
    with tarfile.open(tmp_path / "a.tar") as archive:
        places = [(0, member.offset_data, member.size) for member in archive]
    names = [f"{index:02}.jpg" for index in range(COUNT)]
    return ShardSplit("train", (tmp_path / "a.tar",), names, np.array(places), targets)


@pytest.fixture(params=["in memory", "streamed"])
def storage(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    if request.param == "streamed":
        monkeypatch.setattr(dataset_module, "MEMORY_LIMIT", 0)
    return request.param


def epoch_of(split: Split, augmentation: Augmentation = RECIPE, **options: int) -> list:
    settings = {"num_classes": COUNT, "seed": 3, "epoch": 0, **options}
    return list(split.training_batches(SPEC, 5, augmentation, **settings))


def assert_equal(a: list, b: list) -> None:
    assert len(a) == len(b)
    for (images, targets), (other_images, other_targets) in zip(a, b, strict=True):
        assert torch.equal(images, other_images) and torch.equal(targets, other_targets)


def test_evaluation_batches_are_the_runtime_preprocessing(split: Split, storage: str) -> None:
    batches = list(split.evaluation_batches(SPEC, batch_size=7))
    assert [len(images) for images, _ in batches] == [7, 7, 7, 2]
    expected = preprocess([split.source(index) for index in range(COUNT)], SPEC)
    np.testing.assert_array_equal(np.concatenate([images for images, _ in batches]), expected)
    np.testing.assert_array_equal(np.concatenate([targets for _, targets in batches]), np.arange(COUNT))
    assert expected.dtype == batches[0][0].dtype == np.uint8


def test_limit_gives_the_first_images(split: Split, storage: str) -> None:
    everything = np.concatenate([images for images, _ in split.evaluation_batches(SPEC, 4)])
    limited = np.concatenate([images for images, _ in split.evaluation_batches(SPEC, 4, limit=9)])
    np.testing.assert_array_equal(limited, everything[:9])


@pytest.mark.parametrize("augmentation", [RECIPE, Augmentation("random", min_scale=0.4, mixup=0.2)])
def test_starting_late_gives_the_tail(split: Split, storage: str, augmentation: Augmentation) -> None:
    assert_equal(epoch_of(split, augmentation, start=2), epoch_of(split, augmentation)[2:])
    assert epoch_of(split, augmentation, start=4) == []


def test_an_epoch_shows_every_image_once_but_for_the_last_partial_batch(split: Split, storage: str) -> None:
    batches = epoch_of(split)
    assert len(batches) == split.num_training_batches(5) == 4
    targets = torch.cat([targets for _, targets in batches])
    assert len(set(targets.tolist())) == len(targets) == 20
    images = batches[0][0]
    assert images.shape == (5, 3, 12, 10) and images.dtype == torch.float32
    assert images.is_contiguous(memory_format=torch.channels_last)


def test_same_seed_equal_other_seed_or_epoch_not(split: Split) -> None:
    first = epoch_of(split)
    assert_equal(first, epoch_of(split))
    for other in (epoch_of(split, seed=4), epoch_of(split, epoch=1)):
        assert not torch.equal(first[0][1], other[0][1])


def test_without_augmentation_training_sees_the_evaluation_images(split: Split, storage: str) -> None:
    evaluation = np.concatenate([images for images, _ in split.evaluation_batches(SPEC)])
    mean, std = torch.tensor(SPEC.mean).view(3, 1, 1), torch.tensor(SPEC.std).view(3, 1, 1)
    for images, targets in epoch_of(split, Augmentation()):
        for image, target in zip(images, targets, strict=True):
            pixels = torch.from_numpy(evaluation[int(target)]).permute(2, 0, 1)
            assert torch.equal(image, (pixels / 255 - mean) / std)


def test_alternating_flip_shows_both_sides_in_two_epochs(split: Split) -> None:
    flip = Augmentation("alternating")
    plain = {
        int(t): image
        for images, targets in epoch_of(split, Augmentation(), epoch=0)
        for t, image in zip(targets, images, strict=True)
    }
    for images, targets in epoch_of(split, Augmentation(), epoch=1):
        plain.update({int(t): image for t, image in zip(targets, images, strict=True)})
    flipped: dict[int, list[bool]] = {}
    for epoch in range(4):
        for images, targets in epoch_of(split, flip, epoch=epoch):
            for image, target in zip(images, targets, strict=True):
                known = plain.get(int(target))
                if known is None:
                    continue
                assert torch.equal(image, known) or torch.equal(image, known.flip(2))
                flipped.setdefault(int(target), [None] * 4)[epoch] = torch.equal(image, known.flip(2))  # type: ignore[list-item]
    both = 0
    for sides in flipped.values():
        seen = [(epoch, side) for epoch, side in enumerate(sides) if side is not None]
        assert len({(epoch + side) % 2 for epoch, side in seen}) == 1  # every second epoch the other side
        both += len({side for _, side in seen}) == 2
    assert both > 10


def test_a_set_smaller_than_a_batch_is_one_batch(split: Split) -> None:
    small = split.subset([4, 2, 9])
    assert small.num_training_batches(5) == 1
    ((images, targets),) = epoch_of(small)
    assert sorted(targets.tolist()) == [2, 4, 9] and len(images) == 3


def test_mixup_gives_soft_targets(split: Split) -> None:
    for _, targets in epoch_of(split, Augmentation(mixup=0.2, cutmix=1.0)):
        assert targets.shape == (5, COUNT) and targets.dtype == torch.float32
        torch.testing.assert_close(targets.sum(dim=1), torch.ones(5))


def test_workers_change_nothing(split: Split, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(dataset_module, "MEMORY_LIMIT", 0)
    augmentation = Augmentation("random", min_scale=0.3, erasing=0.3)
    before = torch.get_rng_state()
    assert_equal(
        epoch_of(split, augmentation, num_workers=2, start=1), epoch_of(split, augmentation, start=1)
    )
    assert torch.equal(torch.get_rng_state(), before)  # nothing is drawn from the global stream


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}])
@pytest.mark.parametrize("augmentation", [RECIPE, Augmentation(min_scale=0.5)])
def test_images_smaller_than_the_input_are_refused_by_name(
    split: Split, options: dict[str, int], augmentation: Augmentation
) -> None:
    large = InputSpec((64, 64), 3)
    with pytest.raises(InputSizeError, match=r"(\.jpg|\[\d+\]).* is smaller than the model's 64×64"):
        next(split.training_batches(large, 5, augmentation, num_classes=COUNT, seed=0, epoch=0, **options))
    with pytest.raises(InputSizeError, match="smaller"):
        next(split.evaluation_batches(large))
    allowed = InputSpec((64, 64), 3, enlarge=True)
    assert next(split.evaluation_batches(allowed, 2))[0].shape == (2, 64, 64, 3)


def test_subset_is_those_images_in_that_order(split: Split) -> None:
    part = split.subset([7, 3, 3], "some")
    assert part.name == "some" and part.targets is not None and part.targets.tolist() == [7, 3, 3]
    for position, index in enumerate([7, 3, 3]):
        assert part.image(position) == split.image(index)
        assert part.channels == split.channels


def test_a_split_survives_being_sent_to_another_process(split: Split) -> None:
    split.pixels(SPEC)
    copy = pickle.loads(pickle.dumps(split))
    assert_equal(epoch_of(copy), epoch_of(split))


def test_unlabelled_images_score_as_minus_one_and_do_not_train() -> None:
    split = MemorySplit("images", np.zeros((3, 12, 10, 3), np.uint8), None)
    assert next(split.evaluation_batches(SPEC))[1].tolist() == [-1, -1, -1]
    with pytest.raises(DataError, match="'images' has no labels"):
        next(split.training_batches(SPEC, 2, RECIPE, num_classes=2, seed=0, epoch=0))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda split: split.evaluation_batches(SPEC, 0), "batch_size is 0"),
        (lambda split: split.evaluation_batches(SPEC, limit=0), "limit is 0"),
        (
            lambda split: split.training_batches(SPEC, 0, RECIPE, num_classes=9, seed=0, epoch=0),
            "batch_size is 0",
        ),
        (lambda split: split.training_batches(SPEC, 2, RECIPE, num_classes=9, seed=-1, epoch=0), "not -1"),
        (
            lambda split: split.training_batches(
                SPEC, 2, Augmentation(mixup=1.0), num_classes=3, seed=0, epoch=0
            ),
            "has class 22; the model has 3",
        ),
        (
            lambda split: split.training_batches(
                SPEC, 2, Augmentation(min_scale=0.5), num_classes=99, seed=0, epoch=0, num_workers=-1
            ),
            "num_workers is -1",
        ),
        (
            lambda split: iter(
                [split.subset([]).training_batches(SPEC, 2, RECIPE, num_classes=9, seed=0, epoch=0)]
            ),
            "",
        ),
    ],
)
def test_settings_that_cannot_be(split: Split, call, message: str) -> None:
    if not message:
        with pytest.raises(DataError, match="no images to train on"):
            next(next(call(split)))
        return
    with pytest.raises(DataError, match=message):
        next(call(split))


@pytest.mark.parametrize(
    ("images", "targets", "message"),
    [
        (np.zeros((2, 4, 4, 1), np.float32), np.zeros(2, int), "float32"),
        (np.zeros((2, 4, 4), np.uint8), np.zeros(2, int), r"\(2, 4, 4\)"),
        (np.zeros((2, 4, 4, 2), np.uint8), np.zeros(2, int), "C of 1 or 3"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(3, int), "give 2 integers"),
        (np.zeros((2, 4, 4, 1), np.uint8), np.zeros(2), "float64"),
    ],
)
def test_arrays_of_wrong_shape_or_type_are_refused(images, targets, message: str) -> None:
    with pytest.raises(DataError, match=message):
        MemorySplit("train", images, targets)


def test_workers_leave_the_handler_of_ended_children_as_it_was(tmp_path: Path) -> None:
    """torch's own stays behind, and with OpenVINO loaded it crashes the process when any child ends."""
    code = f"""
import signal, numpy as np
from pathlib import Path
from PIL import Image
from cveff.data import Augmentation, load
from cveff.runtime.input_spec import InputSpec
random = np.random.default_rng(0)
for split in ("train", "val"):
    for label in ("a", "b"):
        folder = Path({str(tmp_path)!r}) / split / label
        folder.mkdir(parents=True)
        for index in range(4):
            pixels = random.integers(0, 256, (40, 44 + index, 3), np.uint8)
            Image.fromarray(pixels).save(folder / f"{{index}}.png")
train = load({str(tmp_path)!r}).train
batches = train.training_batches(
    InputSpec((32, 32)), 4, Augmentation(min_scale=0.5), num_classes=2, seed=0, epoch=0, num_workers=1
)
assert len(list(batches)) == 2
assert signal.getsignal(signal.SIGCHLD) == signal.SIG_DFL
"""
    subprocess.run([sys.executable, "-c", code], check=True)
