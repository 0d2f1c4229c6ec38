"""Which images are drawn: a curriculum's pacing, a selection's classes, importance without bias, growing images."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import timm
import torch
from torch.nn import functional as F

import cveff
from cveff.data import Augmentation, Data
from cveff.data import load as load_data
from cveff.errors import CheckpointError, StepError, TrainingError
from cveff.recipe import parse_recipe
from cveff.runtime.input_spec import InputSpec
from cveff.steps import Run
from cveff.train import Train
from cveff.train.curriculum import Curriculum, Pool
from cveff.train.difficulty_pass import measure_difficulty
from cveff.train.feed import Difficulty, Feed
from cveff.train.importance import Importance, ImportanceDraw, weighted
from cveff.train.loop import SUMMARY
from cveff.train.resolution import Resizer, Resolution, shrink
from cveff.train.selection import Selection

SETTINGS = Train(epochs=2, batch_size=32, learning_rate=0.05, precision="fp32", keep="last")
SPEC = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(320)), val=data.val.subset(np.arange(100)))


def tiny(data: Data, seed: int = 0) -> cveff.Model:
    torch.manual_seed(seed)
    return cveff.create("small_resnet_s", labels=data.labels, input=SPEC, widths=[4, 8], depths=[1, 1])


def equal(a: cveff.Model, b: cveff.Model) -> bool:
    second = b.module.state_dict()
    return all(torch.equal(value, second[name]) for name, value in a.module.state_dict().items())


def test_pacing_is_the_papers_formula() -> None:
    settings = Curriculum(start=0.2, until=0.5, beta=0.5)
    assert settings.allowed(0) == 0.2
    assert settings.allowed(0.125) == pytest.approx(0.2 + 0.8 * 0.25**0.5)
    assert settings.allowed(0.5) == settings.allowed(0.9) == 1
    assert Curriculum(start=0.2, until=0.5).allowed(0.25) == pytest.approx(0.6)


@pytest.mark.parametrize("share", [0.0, 0.2, 0.4])
def test_draws_are_even_over_the_images_that_pacing_allows(share: float) -> None:
    """Kolmogorov's test of the drawn difficulties' percentiles against evenness on [0, d]."""
    random = np.random.default_rng(0)
    difficulty, targets = random.exponential(size=2000), random.integers(0, 7, 2000)
    settings = Curriculum(start=0.25, until=0.5)
    pool = Pool(settings, [difficulty], targets)
    drawn = np.concatenate([pool.draw(share, 50, 0, 0, batch) for batch in range(60)])
    place = np.empty(2000)
    place[pool.order] = np.arange(1, 2001) / 2000
    allowed = settings.allowed(share)
    assert place[drawn].max() <= allowed + 7 / 2000  # each class rounds its share
    ordered = np.sort(place[drawn]) / allowed
    distance = np.abs(ordered - np.arange(1, len(drawn) + 1) / len(drawn)).max()
    assert distance < 1.95 / len(drawn) ** 0.5  # the 0.1% point
    # Every class has its share of the pool.
    members = targets[pool.order[: pool.size(share, 50)]]
    np.testing.assert_allclose(
        np.bincount(members) / np.bincount(targets), allowed, atol=1 / np.bincount(targets).min()
    )


def test_by_value_the_threshold_is_a_difficulty() -> None:
    difficulty = np.array([0.0, 1.0, 2.0, 8.0, 10.0])
    pool = Pool(Curriculum(by="value", start=0.25, until=1.0), [difficulty], np.zeros(5, np.int64))
    assert pool.size(0.0, 1) == 3  # up to 2.5
    assert pool.size(0.74, 1) == 4  # up to 8.05
    assert pool.size(1.0, 1) == 5
    assert pool.size(0.0, 4) == 4  # never less than a batch


def test_metrics_are_combined_by_mean_or_all_must_allow() -> None:
    one, two = np.arange(100.0), np.arange(100.0)[::-1].copy()
    targets = np.zeros(100, np.int64)
    strict = Pool(Curriculum(combine="max", start=0.6), [one, two], targets)
    assert set(strict.order[: strict.size(0.0, 1)]) == set(range(40, 60))  # both at most the 60th percentile
    mean = Pool(Curriculum(combine="mean", start=0.6), [one, one], targets)
    assert mean.order.tolist() == list(range(100)) and mean.size(0.0, 1) == 60


def test_a_curriculum_shows_easy_images_first_and_then_all(digits: Data, tmp_path: Path) -> None:
    assert digits.train is not None
    settings = replace(SETTINGS, epochs=4, curriculum=Curriculum(("edges",), start=0.2, until=0.5))
    feed = Feed(tiny(digits), settings, Run(data=digits), digits.train)
    difficulty = measure_difficulty(digits.train, "edges", SPEC)
    per_epoch = [
        list(feed.batches(epoch, 0, lambda step, epoch=epoch: (10 * epoch + step) / 40)) for epoch in range(4)
    ]
    means = [difficulty[np.concatenate(batches)].mean() for batches in per_epoch]
    assert means[0] < means[1] < means[2]
    for batches in per_epoch[2:]:  # ordinary epochs: every image once
        assert sorted(np.concatenate(batches)) == list(range(320))
    assert np.array_equal(per_epoch[0][3], next(feed.batches(0, 3, lambda step: step / 40)))
    trained = cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path)
    assert not equal(trained, cveff.apply(tiny(digits), replace(settings, curriculum=None), data=digits))
    assert list((tmp_path / "difficulty").glob("edges-*.safetensors"))
    assert json.loads((tmp_path / SUMMARY).read_text())["samples"] == 4 * 320


def test_everything_from_the_start_is_no_curriculum(digits: Data) -> None:
    plain = cveff.apply(tiny(digits), SETTINGS, data=digits)
    settings = replace(SETTINGS, curriculum=Curriculum(("jpeg",), start=1.0))
    assert equal(plain, cveff.apply(tiny(digits), settings, data=digits))
    kept = replace(SETTINGS, selection=Selection(keep=1.0, metric="random"))
    assert equal(plain, cveff.apply(tiny(digits), kept, data=digits))


@pytest.mark.parametrize("option", ["curriculum", "importance"])
def test_a_run_that_draws_resumes_to_the_bit(digits: Data, tmp_path: Path, option: str) -> None:
    class KilledError(Exception):
        pass

    class Killing:
        def write(self, step: int, figures: object) -> None:
            if step > 10:
                raise KilledError

        def rewind(self, step: int) -> None:
            pass

    choice = {"curriculum": Curriculum(("loss",), until=1.0), "importance": Importance()}[option]
    settings = replace(SETTINGS, **{option: choice}, difficulty=Difficulty(proxy_epochs=1))
    whole = cveff.apply(tiny(digits), settings, data=digits)
    with pytest.raises(KilledError):
        cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path, log=Killing())
    resumed = cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path, resume=True)
    assert equal(whole, resumed)


def test_a_saved_proxy_says_what_is_difficult(digits: Data, tmp_path: Path) -> None:
    cveff.save(tiny(digits, seed=4), tmp_path / "run" / "model")
    for proxy in (tmp_path / "run", tmp_path / "run" / "model"):
        settings = replace(SETTINGS, selection=Selection(metric="loss"), difficulty=Difficulty(proxy=proxy))
        assert digits.train is not None
        feed = Feed(tiny(digits), settings, Run(data=digits), digits.train)
        loss = measure_difficulty(digits.train, "loss", SPEC, proxy=tiny(digits, seed=4).module)
        assert np.array_equal(
            feed.split.images, digits.train.subset(Selection().chosen(loss, digits.train.targets)).images
        )
    once = cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path / "kept")
    assert equal(
        once, cveff.apply(tiny(digits, seed=9), settings, data=digits, folder=tmp_path / "kept", resume=True)
    )
    torch.manual_seed(0)
    other = cveff.create("small_resnet_s", num_classes=3, input=SPEC, widths=[4], depths=[1])
    cveff.save(other, tmp_path / "other")
    settings = replace(settings, difficulty=Difficulty(proxy=tmp_path / "other"))
    with pytest.raises(StepError, match=r"3 classes.*must have the model's 10"):
        cveff.apply(tiny(digits), settings, data=digits)


@pytest.mark.parametrize("prefer", ["hard", "easy"])
def test_a_selection_keeps_the_extreme_part_of_every_class(prefer: str) -> None:
    random = np.random.default_rng(1)
    difficulty, targets = random.random(500), random.integers(0, 6, 500)
    chosen = Selection(keep=0.4, prefer=prefer).chosen(difficulty, targets)
    assert (np.diff(chosen) > 0).all()
    for name in range(6):
        members = np.flatnonzero(targets == name)
        kept = np.intersect1d(chosen, members)
        assert len(kept) == round(0.4 * len(members))
        rest = np.setdiff1d(members, kept)
        if prefer == "hard":
            assert difficulty[kept].min() >= difficulty[rest].max()
        else:
            assert difficulty[kept].max() <= difficulty[rest].min()
    rare = np.zeros(10, np.int64)
    rare[3] = 1
    assert 3 in Selection(keep=0.1).chosen(np.arange(10.0), rare)
    assert Selection(keep=0.1, balanced=False).chosen(np.arange(10.0), rare).tolist() == [9]


def test_a_selection_is_all_that_training_sees(digits: Data, tmp_path: Path) -> None:
    settings = replace(SETTINGS, selection=Selection(keep=0.5, metric="jpeg"))
    cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path)
    figures = json.loads((tmp_path / SUMMARY).read_text())
    count = sum(round(0.5 * size) for size in np.bincount(digits.train.targets))
    assert figures["steps"] == 2 * (count // 32) and figures["samples"] == 32 * figures["steps"]
    assert figures["epochs"] == figures["samples"] / count


def test_importance_weights_are_unbiased() -> None:
    """The expected weighted gradient is the whole set's, exactly: summed over every image with its probability."""
    torch.manual_seed(0)
    x, targets = torch.randn(40, 6), torch.randint(0, 3, (40,))
    layer = torch.nn.Linear(6, 3)
    draw = ImportanceDraw(Importance(uniform=0.2), np.random.default_rng(0).exponential(size=40))
    assert draw.probabilities.sum() == pytest.approx(1)
    expected = torch.autograd.grad(F.cross_entropy(layer(x), targets, label_smoothing=0.1), layer.weight)[0]
    got = torch.zeros_like(expected)
    for index in range(40):
        weights = draw.weights(np.array([index]))
        soft = weighted(targets[[index]], weights, 3, 0.1)
        loss = F.cross_entropy(layer(x[[index]]), soft, reduction="sum")
        got += draw.probabilities[index] * torch.autograd.grad(loss, layer.weight)[0]
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-6)


def test_importance_draws_by_its_probabilities() -> None:
    draw = ImportanceDraw(Importance(uniform=0.5), np.array([0.0, 1.0, 3.0]))
    np.testing.assert_allclose(draw.probabilities, [1 / 6, 1 / 6 + 1 / 8, 1 / 6 + 3 / 8])
    drawn = draw.draw(30_000, 0, 1, 2)
    counts = np.bincount(drawn, minlength=3) / 30_000
    assert np.abs(counts - draw.probabilities).max() < 5 * (0.25 / 30_000) ** 0.5
    assert draw.weights(np.arange(3)).max() <= 1 / 0.5
    even = ImportanceDraw(Importance(), np.zeros(4))
    assert even.probabilities.tolist() == [0.25] * 4


def test_even_importance_weighs_nothing(digits: Data) -> None:
    targets = torch.tensor([1, 2])
    soft = weighted(targets, torch.ones(2), 4, 0.1)
    logits = torch.randn(2, 4)
    torch.testing.assert_close(
        F.cross_entropy(logits, soft), F.cross_entropy(logits, targets, label_smoothing=0.1)
    )
    settings = replace(SETTINGS, importance=Importance(metric="edges"), accumulation=2)
    trained = cveff.apply(tiny(digits), settings, data=digits)
    assert all(torch.isfinite(value).all() for value in trained.module.state_dict().values())


def test_images_grow_in_stages(digits: Data, tmp_path: Path) -> None:
    assert Resolution().sizes((224, 224), (1, 1)) == [(112, 112), (149, 149), (187, 187), (224, 224)]
    assert Resolution(start=0.3, stages=3).sizes((224, 192), (16, 16)) == [(64, 64), (144, 128), (224, 192)]
    module = tiny(digits).module
    resizer = Resizer(Resolution(), module, torch.zeros(2, 1, 8, 8), "x")
    assert [resizer.size(share) for share in (0, 0.24, 0.25, 0.6, 0.75, 1.0)] == [
        (4, 4), (4, 4), (5, 5), (7, 7), (8, 8), (8, 8),
    ]  # fmt: skip
    images = torch.rand(2, 1, 8, 8)
    assert shrink(images, (8, 8)) is images
    torch.testing.assert_close(shrink(images, (4, 4)).mean(), images.mean(), rtol=0.05, atol=0)
    cveff.apply(tiny(digits), replace(SETTINGS, resolution=Resolution()), data=digits, folder=tmp_path)
    cveff.apply(tiny(digits), SETTINGS, data=digits, folder=tmp_path / "plain")
    small, full = (
        json.loads((path / SUMMARY).read_text())["flops"] for path in (tmp_path, tmp_path / "plain")
    )
    assert small < 0.75 * full


def test_vits_need_dynamic_sizes() -> None:
    arguments = {
        "img_size": 32,
        "patch_size": 8,
        "embed_dim": 24,
        "depth": 2,
        "num_heads": 2,
        "num_classes": 5,
    }
    images = torch.zeros(2, 3, 32, 32)
    fixed = timm.create_model("vit_tiny_patch16_224", **arguments)
    with pytest.raises(StepError, match=r"vit_tiny.*does not take images of 16×16.*dynamic_img_size"):
        Resizer(Resolution(), fixed, images, "vit_tiny")
    dynamic = timm.create_model("vit_tiny_patch16_224", dynamic_img_size=True, **arguments)
    assert Resizer(Resolution(), dynamic, images, "vit_tiny").sizes == [
        (16, 16),
        (24, 24),
        (24, 24),
        (32, 32),
    ]
    with pytest.raises(StepError, match=r"mixer.*does not take"):
        Resizer(Resolution(), timm.create_model("mixer_s32_224"), torch.zeros(2, 3, 224, 224), "mixer")


@pytest.mark.parametrize(
    ("settings", "change", "words"),
    [
        (Curriculum, {"start": 1.2}, r"curriculum\.start is 1\.2"),
        (Curriculum, {"until": 1.5}, r"curriculum\.until is 1\.5"),
        (Curriculum, {"start": 0.0}, r"curriculum\.start"),
        (Curriculum, {"beta": 0.0}, r"curriculum\.beta"),
        (Curriculum, {"by": "rank"}, r"curriculum\.by"),
        (Curriculum, {"combine": "sum"}, r"curriculum\.combine"),
        (Curriculum, {"metrics": ()}, r"curriculum\.metrics is empty"),
        (Curriculum, {"metrics": ("beauty",)}, r"'beauty', which is no metric"),
        (Selection, {"keep": 0.0}, r"selection\.keep"),
        (Selection, {"metric": "beauty"}, r"selection\.metric.*no metric"),
        (Selection, {"prefer": "both"}, r"selection\.prefer"),
        (Importance, {"uniform": 0.0}, r"importance\.uniform"),
        (Importance, {"metric": "beauty"}, r"importance\.metric"),
        (Resolution, {"start": 1.5}, r"resolution\.start"),
        (Resolution, {"stages": 1}, r"resolution\.stages"),
        (Difficulty, {"processes": 0}, r"difficulty\.processes"),
    ],
)
def test_settings_out_of_range(settings: type, change: dict, words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        settings(**change)


def test_settings_that_contradict_each_other(digits: Data) -> None:
    with pytest.raises(TrainingError, match=r"train\.curriculum and train\.importance"):
        Train(curriculum=Curriculum(), importance=Importance())
    with pytest.raises(TrainingError, match="turn mixup and cutmix off"):
        Train(importance=Importance(), augmentation=Augmentation(mixup=0.2))
    from cveff.compress import Distill

    with pytest.raises(StepError, match="steps with another loss"):
        step = Distill(alpha=0.0, train=replace(SETTINGS, importance=Importance()))
        cveff.apply(tiny(digits), step, data=digits)


def test_a_stored_metric_of_other_images_is_refused(digits: Data, tmp_path: Path) -> None:
    assert digits.train is not None
    measure_difficulty(digits.val, "edges", SPEC, folder=tmp_path)
    path = next(tmp_path.glob("*.safetensors"))
    settings = replace(SETTINGS, curriculum=Curriculum((str(path),)))
    with pytest.raises(CheckpointError, match="another data set"):
        cveff.apply(tiny(digits), settings, data=digits)
    measure_difficulty(digits.train, "edges", SPEC, folder=tmp_path / "own")
    path = next((tmp_path / "own").glob("*.safetensors"))
    named = cveff.apply(tiny(digits), replace(SETTINGS, curriculum=Curriculum(("edges",))), data=digits)
    assert equal(
        named, cveff.apply(tiny(digits), replace(SETTINGS, curriculum=Curriculum((str(path),))), data=digits)
    )


def test_recipes_name_them() -> None:
    recipe = parse_recipe(
        {
            "data": {"source": "digits"},
            "train": {
                "curriculum": {"metrics": ["loss", "edges"], "beta": 0.5},
                "selection": {"keep": 0.6},
                "difficulty": {"proxy_epochs": 1},
                "resolution": {"start": 0.7},
            },
        }
    )
    assert recipe.train == Train(
        curriculum=Curriculum(metrics=("loss", "edges"), beta=0.5),
        selection=Selection(keep=0.6),
        difficulty=Difficulty(proxy_epochs=1),
        resolution=Resolution(start=0.7),
    )
    assert parse_recipe(recipe.to_json()) == recipe
