"""Training a rounded network: steps move while they may, weights learn, and the file says what was simulated."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

import cveff
from cveff.compress.distill import Distill
from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quantize import Quantize
from cveff.data import Data, load
from cveff.data.augmentation import Augmentation
from cveff.export.normalize import deployable
from cveff.log import FileLog
from cveff.model import Model
from cveff.pipeline import evaluate
from cveff.runtime.engines import open_file
from cveff.train import Train

ZOO = Path(__file__).parents[3] / "model_zoo" / "weights"
TRAIN = Train(
    epochs=6,  # the last of them with frozen steps from its beginning
    batch_size=64,
    optimizer="adamw",
    learning_rate=1e-3,
    keep="last",
    augmentation=Augmentation(crop_padding=1),
)


@pytest.fixture(scope="module")
def digits() -> Data:
    return load("digits")


@pytest.fixture(scope="module")
def parent() -> Model:
    return cveff.load(ZOO / "digits")


@pytest.fixture(scope="module")
def spoilt(parent: Model, digits: Data) -> Model:
    """Quantized with steps 70 times too wide: about 2 bits."""
    model = cveff.apply(parent, Quantize(images=64, weights="nearest"), data=digits)
    for part in model.module.modules():
        if isinstance(part, FakeQuantize):
            part.scale.mul_(70)
            part.zero_point.copy_((part.zero_point / 70).round())
    return model


@pytest.fixture(scope="module")
def learned(spoilt: Model, parent: Model, digits: Data) -> Model:
    return cveff.apply(spoilt, Distill(train=TRAIN), data=digits, teacher=parent)


def test_training_repairs_what_rounding_broke(
    spoilt: Model, learned: Model, parent: Model, digits: Data
) -> None:
    before, after, exact = (evaluate(model, digits) for model in (spoilt, learned, parent))
    assert before < exact - 0.02, "there is something to repair"
    assert after > before + 0.5 * (exact - before)


def test_steps_were_learned_and_are_steps(spoilt: Model, learned: Model) -> None:
    old, new = spoilt.module.state_dict(), learned.module.state_dict()
    scales = [name for name in new if name.endswith(".scale")]
    assert old.keys() == new.keys(), "nothing is left of the training"
    assert sum(not torch.equal(old[name], new[name]) for name in scales) == len(scales)
    assert all(bool((new[name] > 0).all()) for name in scales)
    assert all(part.moves is None for part in learned.module.modules() if isinstance(part, FakeQuantize))


def test_the_file_is_what_was_simulated(learned: Model, tmp_path: Path) -> None:
    cveff.save(learned, tmp_path / "m")
    again = cveff.load(tmp_path / "m")
    path = cveff.export(again, tmp_path / "int8.onnx")  # compares the file layer by layer
    spec = learned.spec.input
    images = np.random.default_rng(0).integers(0, 256, (256, *spec.size, spec.channels), np.uint8)
    with torch.no_grad():
        expected = deployable(learned.module, spec)(torch.from_numpy(images)).numpy()
        assert np.array_equal(deployable(again.module, spec)(torch.from_numpy(images)).numpy(), expected)
    with open_file("onnxruntime", path, threads=1) as session:
        assert (session(images).argmax(1) == expected.argmax(1)).mean() >= 0.99


def test_a_run_that_was_stopped_ends_the_same(
    spoilt: Model, parent: Model, digits: Data, tmp_path: Path
) -> None:
    step = Distill(train=TRAIN)

    class Stop(Exception):  # noqa: N818
        pass

    class Log(FileLog):
        def write(self, step: int, figures: object) -> None:
            if (
                step == TRAIN.epochs * steps
            ):  # steps are frozen by then; the state is that of the epoch before
                raise Stop
            super().write(step, figures)  # type: ignore[arg-type]

    assert digits.train is not None
    steps = digits.train.num_training_batches(TRAIN.batch_size)
    whole = cveff.apply(spoilt, step, data=digits, teacher=parent)
    with pytest.raises(Stop):
        cveff.apply(spoilt, step, data=digits, teacher=parent, folder=tmp_path, log=Log(tmp_path))
    resumed = cveff.apply(spoilt, step, data=digits, teacher=parent, folder=tmp_path, resume=True)
    first, second = whole.module.state_dict(), resumed.module.state_dict()
    assert all(torch.equal(first[name], second[name]) for name in first)
