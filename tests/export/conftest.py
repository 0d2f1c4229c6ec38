"""A tiny network trained on digits for two seconds, and one real deployment of it, shared by the room's tests."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

import cveff
from cveff.data import Data
from cveff.export import measure_candidates
from cveff.export.deploy import Deployment, deploy
from cveff.model import Model
from cveff.target import Target

TINY_TARGET = Target(
    name="tiny",
    description="one thread, for tests",
    candidates=(
        ("onnxruntime", "fp32"),
        ("onnxruntime", "int8"),
        ("openvino", "fp32"),
        ("openvino", "int8"),
    ),
    threads=1,
    batch_sizes=(1, 4),
)


@pytest.fixture(scope="session")
def digits() -> Data:
    """The embedded data set."""
    from cveff.data import load

    return load("digits")


@pytest.fixture(scope="session")
def digits_model(digits: Data) -> Model:
    """small_resnet_s after a few steps: far better than chance, and wrong now and then."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model = cveff.create("small_resnet_s", labels=digits.labels, image_size=8, channels=1)
    assert digits.train is not None and digits.train.targets is not None
    pixels = digits.train.pixels(model.spec.input)
    assert pixels is not None
    images = (torch.from_numpy(pixels.copy()).permute(0, 3, 1, 2).float() / 255 - 0.5) / 0.5
    targets = torch.from_numpy(digits.train.targets)
    optimizer = torch.optim.AdamW(model.module.parameters(), lr=3e-3)
    model.module.train()
    for step in range(40):
        batch = torch.arange(64) * 17 % len(images) if step == 0 else torch.randint(len(images), (64,))
        loss = torch.nn.functional.cross_entropy(model.module(images[batch]), targets[batch])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    model.module.eval()
    torch.set_num_threads(threads)
    return model


@pytest.fixture(scope="session")
def tiny_target() -> Target:
    """Four candidates, one thread."""
    return TINY_TARGET


@pytest.fixture(scope="session")
def quick_timing() -> object:
    """Short comparisons: tests do not assert times."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(measure_candidates, "DECIDING_SECONDS", 0.2)
        patch.setattr(measure_candidates, "OTHER_SECONDS", 0.1)
        yield None


@pytest.fixture(scope="session")
def deployment(
    tmp_path_factory: pytest.TempPathFactory, digits_model: Model, digits: Data, quick_timing: object
) -> Deployment:
    """The network, deployed with labels."""
    pytest.importorskip("openvino")
    out: Path = tmp_path_factory.mktemp("deployed") / "digits.bundle"
    return deploy(
        digits_model, data=digits, target=TINY_TARGET, out=out, num_calibration=64, max_accuracy_drop=5
    )
