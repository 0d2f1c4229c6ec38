"""A run that breaks says where, and leaves what was good: of numbers that are none, and of a full disk."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch
from safetensors import SafetensorError
from torch import nn

import cveff
from cveff.data import Augmentation, Data
from cveff.data import load as load_data
from cveff.errors import CveffError, TrainingError
from cveff.log import FileLog
from cveff.train import Train
from cveff.train.finite import require_finite
from cveff.train.state import load_state

SETTINGS = Train(epochs=3, batch_size=64, learning_rate=0.05, precision="fp32", augmentation=Augmentation())


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(320)), val=data.val.subset(np.arange(100)))


def tiny(data: Data) -> cveff.Model:
    torch.manual_seed(0)
    return cveff.create(
        "small_resnet_s", labels=data.labels, image_size=8, channels=1, widths=[4, 8], depths=[1, 1]
    )


def test_the_first_bad_step_and_layer_are_named() -> None:
    network = nn.Sequential(nn.Linear(3, 4), nn.ReLU(), nn.Linear(4, 2))
    losses = [torch.tensor(value) for value in (1.0, 2.0, float("nan"), float("nan"))]
    with torch.no_grad():
        network[2].weight[0, 0] = float("inf")
    images = torch.ones(5, 3)
    with pytest.raises(TrainingError, match=r"nan at step 9, first in the output of 2, whose weights"):
        require_finite(losses, network, step=10, learning_rate=0.1, images=images)
    with torch.no_grad():
        network[2].weight[0, 0] = 1.0
    images[0, 0] = float("inf")
    with pytest.raises(TrainingError, match=r"first in the output of 0; lower"):
        require_finite(losses, network, step=10, learning_rate=0.1, images=images)
    assert not network[0]._forward_hooks
    require_finite(losses[:2], network, step=10, learning_rate=0.1, images=images)


class Breaking:
    """A log in whose second line the network breaks."""

    def __init__(self, module: nn.Module) -> None:
        self.module, self.lines = module, 0

    def write(self, step: int, figures: Mapping[str, Any]) -> None:
        self.lines += 1
        if self.lines == 2:
            with torch.no_grad():
                self.module.get_parameter("stages.1.0.conv.weight").fill_(float("nan"))

    def rewind(self, step: int) -> None:
        pass


def test_a_broken_run_keeps_the_last_good_state(digits: Data, tmp_path: Path) -> None:
    from cveff.steps import Run

    model = tiny(digits)
    run = Run(data=digits, folder=tmp_path, log=Breaking(model.module))
    # Every step would be kept, so that a state of the broken network would be found here.
    settings = replace(SETTINGS, checkpoint_minutes=1e-9)
    with pytest.raises(
        TrainingError, match=r"nan at step 11, first in the output of stages\.1\.0\.conv.*good state is"
    ):
        settings(model, run)
    assert load_state(tmp_path / "state.safetensors")["step"] == 10
    saved = cveff.load(tmp_path / "best").module.state_dict()
    assert all(torch.isfinite(value).all() for value in saved.values())


@pytest.mark.parametrize(
    "raised",
    [
        SafetensorError("I/O error: No space left on device (os error 28)"),
        OSError(28, "No space left on device"),
    ],
)
def test_a_full_disk_leaves_the_last_good_state(
    digits: Data, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, raised: Exception
) -> None:
    whole = cveff.apply(tiny(digits), SETTINGS, data=digits)
    save_file, written = safetensors.torch.save_file, []

    def fill(tensors: Any, path: str, metadata: Any = None) -> None:
        Path(path).write_bytes(b"half")
        written.append(path)
        if len(written) > 5 and "state" in path:
            raise raised
        save_file(tensors, path, metadata=metadata)

    monkeypatch.setattr(safetensors.torch, "save_file", fill)
    settings = replace(SETTINGS, checkpoint_minutes=1e-9)
    with pytest.raises(CveffError, match=r"cannot write .*state\.safetensors: .*No space left"):
        cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path)
    assert not [path for path in tmp_path.iterdir() if path.name.startswith(".")]
    monkeypatch.undo()
    assert load_state(tmp_path / "state.safetensors")["step"] >= 4
    resumed = cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path, resume=True)
    for name, value in whole.module.state_dict().items():
        assert torch.equal(value, resumed.module.state_dict()[name]), name


def test_a_log_on_a_full_disk_says_so(tmp_path: Path) -> None:
    full = Path("/dev/full")
    if not full.exists():
        pytest.skip("needs a device that is always full")
    (tmp_path / "metrics.jsonl").symlink_to(full)
    with pytest.raises(CveffError, match=r"cannot write .*metrics\.jsonl: No space left"):
        FileLog(tmp_path).write(1, {"train/loss": 0.5})
