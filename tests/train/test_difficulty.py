"""Difficulties: each metric by its definition; a pass resumes, is shared by processes, and knows whose it is."""

from __future__ import annotations

import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import cveff
from cveff.data import MemorySplit
from cveff.data import load as load_data
from cveff.data.augment import normalize
from cveff.errors import CheckpointError, StepError, TrainingError
from cveff.model import Model
from cveff.runtime.input_spec import InputSpec
from cveff.train import difficulty_pass
from cveff.train.difficulty import BY_PROXY, METRICS, Scorer
from cveff.train.difficulty_pass import load_difficulty, measure_difficulty

SPEC = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))


@pytest.fixture(scope="module")
def split() -> MemorySplit:
    train = load_data("digits", seed=0).train
    assert isinstance(train, MemorySplit)
    return train.subset(np.arange(300))


@pytest.fixture(scope="module")
def proxy() -> Model:
    torch.manual_seed(0)
    model = cveff.create("small_resnet_s", num_classes=10, input=SPEC, widths=[4, 8], depths=[1, 1])
    model.module.eval()
    return model


def test_metrics_of_a_proxy_are_what_their_papers_say(split: MemorySplit, proxy: Model) -> None:
    targets = torch.from_numpy(split.class_indices())
    with torch.no_grad():
        logits = proxy.module(normalize(split.images, SPEC))
    shares = logits.softmax(dim=1)
    right = shares.gather(1, targets[:, None])[:, 0]
    wrong = shares.scatter(1, targets[:, None], 0.0).max(dim=1).values
    expected = {
        "loss": F.cross_entropy(logits, targets, reduction="none"),
        "confidence": 1 - right,
        "margin": wrong - right,
        "el2n": (shares - F.one_hot(targets, 10)).norm(dim=1),
    }
    for metric, values in expected.items():
        got = Scorer(metric, split, SPEC, proxy.module)(np.arange(300))
        np.testing.assert_allclose(got, values.numpy(), rtol=1e-4, atol=1e-5, err_msg=metric)


def test_neighbours_disagree_where_labels_are_wrong(split: MemorySplit, proxy: Model) -> None:
    """Against a search by distance, and on labels of which some are spoilt."""
    spoilt = split.class_indices().copy()
    wrong = np.arange(0, 300, 15)
    spoilt[wrong] = (spoilt[wrong] + 5) % 10
    noisy = MemorySplit("train", split.images, spoilt)
    got = Scorer("neighbours", noisy, SPEC, proxy.module)(np.arange(300))
    features: list[torch.Tensor] = []
    handle = proxy.module.fc.register_forward_pre_hook(lambda _, inputs: features.append(inputs[0]))
    with torch.no_grad():
        proxy.module(normalize(noisy.images, SPEC))
    handle.remove()
    rows = F.normalize(features[0], dim=1)
    distance = torch.cdist(rows, rows).fill_diagonal_(9.0)
    nearest = distance.topk(10, largest=False).indices.numpy()
    expected = (spoilt[nearest] != spoilt[:, None]).mean(axis=1)
    assert np.mean(np.isclose(got, expected)) > 0.98  # equal distances may be broken either way
    assert got[wrong].mean() > got.mean() + 0.1


def test_pictures_with_more_edges_and_less_to_compress_are_harder(split: MemorySplit) -> None:
    flat = np.full((8, 8, 1), 90, np.uint8)
    noise = np.random.default_rng(0).integers(0, 256, (8, 8, 1), np.uint8)
    step = flat.copy()
    step[4:] = 190
    pictures = MemorySplit("train", np.stack([flat, step, noise]), np.zeros(3, np.int64))
    for metric in ("edges", "jpeg"):
        values = Scorer(metric, pictures, SPEC)(np.arange(3))
        assert values[0] < values[1] < values[2], metric
    assert Scorer("edges", pictures, SPEC)(np.arange(2)).tolist() == [0.0, 100 * 8 / 64]


@pytest.mark.parametrize("metric", METRICS)
def test_every_metric_is_finite_and_the_same_in_any_parts(
    split: MemorySplit, proxy: Model, metric: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(difficulty_pass, "PART", 77)
    values = measure_difficulty(split, metric, SPEC, proxy=proxy.module, folder=tmp_path)
    assert values.shape == (300,) and values.dtype == np.float32 and np.isfinite(values).all()
    assert len(np.unique(values)) > 5
    monkeypatch.setattr(difficulty_pass, "PART", 2048)
    whole = measure_difficulty(split, metric, SPEC, proxy=proxy.module)
    # Batches of other sizes sum in another order; a neighbour may change places with an equal one.
    np.testing.assert_allclose(values, whole, rtol=1e-4, atol=0.11 if metric == "neighbours" else 1e-5)
    assert [path.suffix for path in tmp_path.iterdir()] == [".safetensors"]


def test_two_processes_measure_what_one_does(
    split: MemorySplit, proxy: Model, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(difficulty_pass, "PART", 100)
    one = measure_difficulty(split, "el2n", SPEC, proxy=proxy.module)
    two = measure_difficulty(split, "el2n", SPEC, proxy=proxy.module, folder=tmp_path, processes=2)
    assert np.array_equal(one, two)


def test_a_killed_pass_goes_on_where_it_was(
    split: MemorySplit, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    score = Scorer.__call__
    monkeypatch.setattr(difficulty_pass, "PART", 20)
    child = os.fork()
    if child == 0:
        # Slowly, so that there is time to kill it.
        monkeypatch.setattr(
            Scorer, "__call__", lambda self, indices: (time.sleep(0.2), score(self, indices))[1]
        )
        measure_difficulty(split, "jpeg", SPEC, folder=tmp_path)
        os._exit(0)
    while len(list(tmp_path.glob("*.parts/0*"))) < 3:
        time.sleep(0.01)
    os.kill(child, signal.SIGKILL)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == -signal.SIGKILL
    done = sorted(tmp_path.glob("*.parts/0*"))
    assert 3 <= len(done) < 15
    measured: list[int] = []
    monkeypatch.setattr(
        Scorer, "__call__", lambda self, indices: (measured.append(int(indices[0])), score(self, indices))[1]
    )
    values = measure_difficulty(split, "jpeg", SPEC, folder=tmp_path)
    assert sorted(measured) == [
        begin for begin in range(0, 300, 20) if f"{begin:09d}" not in {path.stem[:9] for path in done}
    ]
    assert np.array_equal(values, score(Scorer("jpeg", split, SPEC), np.arange(300)))
    measured.clear()
    assert np.array_equal(measure_difficulty(split, "jpeg", SPEC, folder=tmp_path), values)
    assert not measured  # read, not measured again


def stored(split: MemorySplit, folder: Path, metric: str = "edges") -> Path:
    measure_difficulty(split, metric, SPEC, folder=folder)
    return next(folder.glob("*.safetensors"))


def test_a_stored_metric_is_of_its_data_set_alone(split: MemorySplit, tmp_path: Path) -> None:
    path = stored(split, tmp_path)
    assert np.array_equal(load_difficulty(path, split), measure_difficulty(split, "edges", SPEC))
    others = [split.subset(np.arange(299)), split.subset(np.arange(300)[::-1])]
    relabelled = split.class_indices().copy()
    relabelled[7] = (relabelled[7] + 1) % 10
    repainted = split.images.copy()
    repainted[7, 0, 0] ^= 1
    others += [MemorySplit("train", split.images, relabelled), MemorySplit("train", repainted, split.targets)]
    for other in others:
        with pytest.raises(CheckpointError, match="edges of another data set"):
            load_difficulty(path, other)
        measure_difficulty(other, "edges", SPEC, folder=tmp_path)
    assert len(list(tmp_path.glob("*.safetensors"))) == 5  # each has a key of its own


def test_a_file_under_anothers_name_is_refused(split: MemorySplit, tmp_path: Path) -> None:
    path = stored(split, tmp_path / "a")
    other = stored(split, tmp_path / "b", "jpeg")
    path.write_bytes(other.read_bytes())
    with pytest.raises(CheckpointError, match=r"another metric"):
        measure_difficulty(split, "edges", SPEC, folder=tmp_path / "a")


@pytest.mark.parametrize("cut", [10, 400])
def test_a_damaged_file_is_refused(split: MemorySplit, tmp_path: Path, cut: int) -> None:
    path = stored(split, tmp_path)
    path.write_bytes(path.read_bytes()[:-cut])
    for read in (
        lambda: measure_difficulty(split, "edges", SPEC, folder=tmp_path),
        lambda: load_difficulty(path, split),
    ):
        with pytest.raises(CheckpointError, match="damaged"):
            read()
    with pytest.raises(CheckpointError, match="missing"):
        load_difficulty(tmp_path / "none.safetensors", split)


def test_another_proxy_or_input_is_another_metric(split: MemorySplit, proxy: Model, tmp_path: Path) -> None:
    measure_difficulty(split, "loss", SPEC, proxy=proxy.module, folder=tmp_path)
    torch.manual_seed(1)
    other = cveff.create("small_resnet_s", num_classes=10, input=SPEC, widths=[4, 8], depths=[1, 1])
    measure_difficulty(split, "loss", SPEC, proxy=other.module, folder=tmp_path)
    measure_difficulty(split, "loss", replace(SPEC, mean=(0.0,)), proxy=proxy.module, folder=tmp_path)
    assert len(list(tmp_path.glob("loss-*.safetensors"))) == 3


def test_bad_input(split: MemorySplit, proxy: Model, tmp_path: Path) -> None:
    with pytest.raises(TrainingError, match="'hardness', which is no metric; known: edges"):
        measure_difficulty(split, "hardness", SPEC)
    for metric in BY_PROXY:
        with pytest.raises(StepError, match="asks a proxy network"):
            measure_difficulty(split, metric, SPEC)
    with pytest.raises(StepError, match="processes is 0"):
        measure_difficulty(split, "edges", SPEC, processes=0)
    headless = torch.nn.Sequential(torch.nn.Flatten(), torch.nn.Linear(64, 10))
    with pytest.raises(StepError, match="input of the proxy's classifier"):
        measure_difficulty(split, "neighbours", SPEC, proxy=headless)
