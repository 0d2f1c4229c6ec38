"""Laws of distillation: nothing at alpha 0, no loss for a copy, no trace of adapters, the same bits after a kill."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cveff
from cveff.compress import Distill
from cveff.compress.distill import CACHE_FILE
from cveff.compress.features import stages
from cveff.compress.teacher import Teacher
from cveff.data import Augmentation, Data
from cveff.data import load as load_data
from cveff.errors import CheckpointError, StepError
from cveff.log import FileLog
from cveff.model import Model
from cveff.recipe import parse_recipe
from cveff.runtime.input_spec import InputSpec
from cveff.steps import Run
from cveff.train import Train

INPUT = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))
TRAIN = Train(
    epochs=2,
    batch_size=64,
    learning_rate=0.05,
    precision="fp32",
    warmup_epochs=0,
    keep="last",
    augmentation=Augmentation(flip="alternating"),
)
MIXED = replace(TRAIN, augmentation=Augmentation(mixup=1.0))
ALL = [
    Distill(method="logits", train=TRAIN),
    Distill(method="dist", train=TRAIN),
    Distill(method="features", train=TRAIN),
    Distill(method="hard", train=TRAIN),
    Distill(method="function-matching", train=MIXED),
]


def by_method(step: Distill) -> str:
    return step.method


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(256)), val=data.val.subset(np.arange(100)))


def tiny(data: Data, seed: int = 0, widths: tuple[int, int] = (4, 8), **spec: object) -> Model:
    torch.manual_seed(seed)
    return cveff.create(
        "small_resnet_s",
        labels=data.labels,
        input=replace(INPUT, **spec),
        widths=list(widths),
        depths=[1, 1],
    )


@pytest.fixture(scope="module")
def teacher(digits: Data) -> Model:
    settings = replace(TRAIN, epochs=10, learning_rate=0.1, batch_size=32, augmentation=Augmentation())
    return cveff.apply(tiny(digits, seed=1, widths=(8, 12)), settings, data=digits)


def equal(a: Model, b: Model) -> bool:
    first, second = a.module.state_dict(), b.module.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def images(count: int = 16, spec: InputSpec = INPUT) -> torch.Tensor:
    return torch.randn(count, spec.channels, *spec.size, generator=torch.Generator().manual_seed(3))


def test_alpha_zero_is_plain_training_to_the_bit(digits: Data) -> None:
    plain = cveff.apply(tiny(digits), TRAIN, data=digits)
    assert equal(plain, cveff.apply(tiny(digits), Distill(alpha=0.0, train=TRAIN), data=digits))


@pytest.mark.parametrize("step", ALL, ids=by_method)
def test_every_method_changes_the_weights_and_leaves_no_trace(
    digits: Data, teacher: Model, tmp_path: Path, step: Distill
) -> None:
    before = {name: value.clone() for name, value in teacher.module.state_dict().items()}
    plain = cveff.apply(tiny(digits), step.train, data=digits)
    model = cveff.apply(tiny(digits), step, data=digits, teacher=teacher, folder=tmp_path)
    assert not equal(plain, model)
    assert model.spec == tiny(digits).spec
    assert model.module.state_dict().keys() == tiny(digits).module.state_dict().keys()
    assert equal(model, cveff.load(tmp_path / "last"))
    assert all(torch.equal(value, before[name]) for name, value in teacher.module.state_dict().items())


@pytest.mark.parametrize("step", [step for step in ALL if step.method != "hard"], ids=by_method)
def test_a_copy_of_the_teacher_has_no_imitation_loss(digits: Data, teacher: Model, step: Distill) -> None:
    objective = replace(step, alpha=1.0).objective(teacher, Run(data=digits, teacher=teacher))
    loss = objective.loss(teacher.module.eval(), images(), torch.zeros(16, dtype=torch.int64))
    assert loss.item() == pytest.approx(0, abs=1e-3)


def test_the_loss_is_the_weighted_sum(digits: Data, teacher: Model) -> None:
    student, targets = tiny(digits), torch.arange(16) % 10

    def loss(alpha: float, method: str = "hard") -> float:
        step = Distill(method=method, alpha=alpha, train=TRAIN)
        objective = step.objective(student, Run(data=digits, teacher=teacher))
        return objective.loss(student.module.eval(), images(), targets).item()

    for method in ("logits", "dist", "hard", "features"):
        assert loss(0.3, method) == pytest.approx(0.7 * loss(0.0) + 0.3 * loss(1.0, method), rel=1e-5)


def test_imitation_alone_teaches(digits: Data, teacher: Model) -> None:
    def accuracy(model: Model) -> float:
        from cveff.train.evaluate import evaluate

        return evaluate(model.module, digits.val, model.spec.input)["accuracy"]

    # Imitation alone: what the student knows about digits, it has from the teacher.
    step = Distill(
        alpha=1.0,
        train=replace(
            TRAIN, epochs=12, batch_size=32, learning_rate=0.1, clip_norm=5.0, augmentation=Augmentation()
        ),
    )
    student = cveff.apply(tiny(digits), step, data=digits, teacher=teacher)
    assert accuracy(student) > 0.7 > 0.3 > accuracy(tiny(digits))


@pytest.mark.parametrize(
    "step",
    [
        Distill(method="features", train=replace(TRAIN, ema=0.9)),
        Distill(train=TRAIN, cache_teacher=True),
        Distill(train=replace(TRAIN, accumulation=2)),
    ],
    ids=["features", "cached", "accumulated"],
)
def test_resuming_is_bit_identical(digits: Data, teacher: Model, tmp_path: Path, step: Distill) -> None:
    whole = cveff.apply(tiny(digits), step, data=digits, teacher=teacher)

    class KilledError(Exception):
        pass

    class KillingLog(FileLog):
        def write(self, step: int, figures: object) -> None:
            if step > 4:  # in the second epoch's end, before its state is kept
                raise KilledError
            super().write(step, figures)

    with pytest.raises(KilledError):
        cveff.apply(
            tiny(digits), step, data=digits, teacher=teacher, folder=tmp_path, log=KillingLog(tmp_path)
        )
    resumed = cveff.apply(
        tiny(digits, seed=5), step, data=digits, teacher=teacher, folder=tmp_path, resume=True
    )
    assert equal(whole, resumed)


def test_resuming_with_another_teacher_is_refused(digits: Data, teacher: Model, tmp_path: Path) -> None:
    step = Distill(train=TRAIN)
    cveff.apply(tiny(digits), step, data=digits, teacher=teacher, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"objective\.teacher"):
        cveff.apply(tiny(digits), step, data=digits, teacher=tiny(digits), folder=tmp_path, resume=True)


def test_cached_logits_are_the_computed_ones(digits: Data, teacher: Model, tmp_path: Path) -> None:
    settings = replace(TRAIN, epochs=1)
    plain = cveff.apply(tiny(digits), Distill(train=settings), data=digits, teacher=teacher)
    for _ in range(2):  # filling the cache, and reading it
        cached = cveff.apply(
            tiny(digits),
            Distill(train=settings, cache_teacher=True),
            data=digits,
            teacher=teacher,
            folder=tmp_path,
        )
        assert equal(plain, cached)
    assert (tmp_path / CACHE_FILE).stat().st_size == 16 + 256 * (16 + 4 * 10)


def test_the_teacher_sees_the_same_pixels(digits: Data) -> None:
    pixels = torch.rand(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    other = tiny(digits, mean=(0.1,), std=(0.7,))
    seen = Teacher(other, INPUT, torch.device("cpu")).view((pixels - 0.3) / 0.35)
    torch.testing.assert_close(seen, (pixels - 0.1) / 0.7)
    same = images()
    assert Teacher(tiny(digits), INPUT, torch.device("cpu")).view(same) is same


def test_a_teacher_of_larger_colour_images_teaches(digits: Data) -> None:
    large = tiny(digits, size=(12, 12), channels=3, mean=(0.4, 0.3, 0.2), std=(0.2, 0.3, 0.4))
    seen = Teacher(large, INPUT, torch.device("cpu")).view(images())
    assert seen.shape == (16, 3, 12, 12)
    torch.testing.assert_close(seen[:, 0] * 0.2 + 0.4, seen[:, 2] * 0.4 + 0.2)  # one grey in every channel
    step = Distill(train=replace(TRAIN, epochs=1))
    assert not equal(tiny(digits), cveff.apply(tiny(digits), step, data=digits, teacher=large))


def test_a_saved_model_and_a_timm_model_teach(digits: Data, teacher: Model, tmp_path: Path) -> None:
    cveff.save(teacher, tmp_path / "teacher")
    by_path = Distill(teacher=str(tmp_path / "teacher"), train=TRAIN)
    given = cveff.apply(tiny(digits), Distill(train=TRAIN), data=digits, teacher=teacher)
    assert equal(given, cveff.apply(tiny(digits), by_path, data=digits))

    external = cveff.create("test_resnet", labels=digits.labels, channels=1)
    torch.save(external.module.state_dict(), tmp_path / "weights.pth")
    by_name = Distill(teacher="test_resnet", teacher_weights=tmp_path / "weights.pth", train=TRAIN)
    assert not equal(given, cveff.apply(tiny(digits), by_name, data=digits))


@pytest.mark.parametrize("architecture", ["small_resnet_s", "test_vit", "test_convnext"])
def test_stages_are_the_last_layers_of_each_resolution(architecture: str) -> None:
    model = cveff.create(architecture, num_classes=3, image_size=64)
    found = stages(model.module.eval(), (64, 64), 3)
    assert len({stage.positions for stage in found}) == len(found) >= 1
    for stage in found:
        part = model.module.get_submodule(stage.path)
        outputs: list[torch.Tensor] = []
        hook = part.register_forward_hook(lambda _, __, output, outputs=outputs: outputs.append(output))
        model.module(torch.zeros(2, 3, 64, 64))
        hook.remove()
        assert stage.tokens(outputs[0]).shape == (2, stage.positions, stage.channels)


def test_stages_are_outputs_of_blocks() -> None:
    model = cveff.create("mobilenetv4_conv_small", num_classes=3, image_size=64)
    found = {stage.positions: stage.path for stage in stages(model.module, (64, 64), 3)}
    assert found == {1024: "bn1", 256: "blocks.0", 64: "blocks.1", 16: "blocks.2", 4: "blocks"}


def test_teachers_that_do_not_fit_are_refused(digits: Data, teacher: Model) -> None:
    step = Distill(train=TRAIN)
    with pytest.raises(StepError, match="no teacher"):
        step(tiny(digits), cveff.Run(data=digits))  # apply would give the model itself
    with pytest.raises(StepError, match="has 7 classes and the student 10"):
        cveff.apply(tiny(digits), step, data=digits, teacher=cveff.create("test_resnet", num_classes=7))
    named = replace(digits, labels=tuple("abcdefghij"))
    swapped = replace(digits, labels=tuple("bacdefghij"))
    with pytest.raises(StepError, match="2 differ: class 0 is 'b' to the teacher and 'a' to the student"):
        cveff.apply(tiny(named), step, data=named, teacher=tiny(swapped))
    colour = tiny(digits, channels=3, mean=(0.5,) * 3, std=(0.5,) * 3)
    with pytest.raises(StepError, match="sees colour"):
        cveff.apply(colour, step, data=digits, teacher=teacher)
    vit = cveff.create("test_vit", labels=digits.labels)
    with pytest.raises(StepError, match="no layer of the student"):
        cveff.apply(tiny(digits), Distill(method="features", train=TRAIN), data=digits, teacher=vit)


@pytest.mark.parametrize(
    "settings, words",
    [
        ({"method": "soft"}, "method is 'soft'; give one of logits"),
        ({"alpha": 1.5}, "alpha is 1.5"),
        ({"temperature": 0.0}, "temperature is 0.0"),
        ({"teacher": ""}, "teacher is empty"),
        ({"teacher_weights": Path("w.pth")}, "needs distill.teacher"),
        ({"method": "function-matching", "alpha": 0.5, "train": MIXED}, "uses no labels"),
        ({"method": "function-matching", "train": TRAIN}, "mixup is 0"),
        ({"method": "features", "cache_teacher": True}, "uses none"),
        ({"cache_teacher": True, "train": MIXED}, "no image comes back"),
    ],
)
def test_settings_that_make_no_sense_are_refused_at_construction(settings: dict, words: str) -> None:
    with pytest.raises(StepError, match=words):
        Distill(**settings)


def test_a_recipe_distils() -> None:
    values = {
        "data": {"source": "digits"},
        "train": {},
        "steps": [
            {
                "kind": "distill",
                "method": "dist",
                "temperature": 2.0,
                "train": {"epochs": 3, "warmup_epochs": 0.0},
            }
        ],
    }
    recipe = parse_recipe(values)
    # What the table leaves out is as `Distill` has it, not as `Train` has it.
    train = replace(Distill().train, epochs=3, warmup_epochs=0.0)
    assert recipe.steps == (Distill(method="dist", temperature=2.0, train=train),)
    assert parse_recipe(recipe.to_json()) == recipe
