"""Laws of the loop: deterministic, resumable to the bit after SIGKILL, accumulation equals the whole batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

import cveff
from cveff.data import Augmentation, Data, MemorySplit
from cveff.data import load as load_data
from cveff.errors import CheckpointError, StepError, TrainingError
from cveff.log import FileLog
from cveff.model import Model
from cveff.runtime.input_spec import InputSpec
from cveff.train import Train
from cveff.train.state import load_state, save_state

TINY = {"widths": [4, 8], "depths": [1, 1]}
SETTINGS = Train(
    epochs=3,
    batch_size=64,
    learning_rate=0.05,
    ema=0.9,
    precision="fp32",
    augmentation=Augmentation(flip="alternating", crop_padding=1, erasing=0.5),
)


@pytest.fixture(scope="module")
def digits() -> Data:
    data = load_data("digits", seed=0)
    assert data.train is not None
    return replace(data, train=data.train.subset(np.arange(320)), val=data.val.subset(np.arange(100)))


def tiny(data: Data, seed: int = 0, **arguments: object) -> Model:
    torch.manual_seed(seed)
    spec = InputSpec(size=(8, 8), channels=1, mean=(0.3,), std=(0.35,))
    return cveff.create("small_resnet_s", labels=data.labels, input=spec, **{**TINY, **arguments})


def equal(a: Model, b: Model) -> bool:
    first, second = a.module.state_dict(), b.module.state_dict()
    return first.keys() == second.keys() and all(torch.equal(first[name], second[name]) for name in first)


def test_same_seed_gives_the_same_weights_and_another_seed_does_not(digits: Data) -> None:
    runs = [cveff.apply(tiny(digits), SETTINGS, data=digits, seed=seed) for seed in (0, 0, 1)]
    assert equal(runs[0], runs[1])
    assert not equal(runs[0], runs[2])


def test_training_learns_digits(digits: Data, tmp_path: Path) -> None:
    from cveff.train.evaluate import evaluate

    settings = replace(SETTINGS, epochs=12, batch_size=32, learning_rate=0.1, augmentation=Augmentation())
    with FileLog(tmp_path) as log:
        model = cveff.apply(tiny(digits), settings, data=digits, log=log)
    figures = evaluate(model.module, digits.val, model.spec.input)
    assert figures["accuracy"] > 0.8  # chance is 0.1
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [line["epoch"] for line in lines] == list(range(1, 13))
    assert max(line["val/accuracy"] for line in lines) == figures["accuracy"]


@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "muon", "galore"])
def test_resuming_between_epochs_is_bit_identical(digits: Data, tmp_path: Path, optimizer: str) -> None:
    settings = replace(SETTINGS, optimizer=optimizer, learning_rate=None, keep="last")
    whole = cveff.apply(tiny(digits, drop_rate=0.2), settings, data=digits)

    class KilledError(Exception):
        pass

    class KillingLog(FileLog):
        def write(self, step: int, figures: object) -> None:
            if step > 9:  # in the second epoch's end, before its state is kept
                raise KilledError
            super().write(step, figures)

    with pytest.raises(KilledError):
        cveff.apply(
            tiny(digits, drop_rate=0.2), settings, data=digits, log=KillingLog(tmp_path), folder=tmp_path
        )
    resumed = cveff.apply(
        tiny(digits, seed=5, drop_rate=0.2),
        settings,
        data=digits,
        folder=tmp_path,
        resume=True,
        log=FileLog(tmp_path),
    )
    assert equal(whole, resumed)
    steps = [json.loads(line)["step"] for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) == [5, 10, 15]


SCRIPT = """
import sys, torch
torch.set_num_threads(1)
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
sys.path.insert(0, {tests!r})
import test_loop as t
import cveff
data = t.load_data("digits", seed=0)
folder = Path(sys.argv[1])
settings = replace(t.SETTINGS, epochs=12, checkpoint_minutes=1e-9)
model = cveff.apply(t.tiny(data), settings, data=data, folder=folder, resume=True)
cveff.save(model, folder / "final")
"""


def test_killed_at_any_instant_and_resumed_ends_with_the_same_weights(tmp_path: Path) -> None:
    script = tmp_path / "script.py"
    script.write_text(SCRIPT.format(tests=str(Path(__file__).parent)))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(Path(cveff.__file__).parents[1])}

    def start(folder: Path) -> subprocess.Popen[bytes]:
        return subprocess.Popen([sys.executable, str(script), str(folder)], env=environment)

    assert start(tmp_path / "whole").wait() == 0
    broken = tmp_path / "broken"
    for kill in range(2):
        process = start(broken)
        state = broken / "state.safetensors"
        before = state.stat().st_mtime_ns if state.exists() else 0
        # Wait for new states to appear, then let chance decide where in a step or a write the signal falls.
        while process.poll() is None and (not state.exists() or state.stat().st_mtime_ns == before):
            time.sleep(0.005)
        time.sleep(0.05 + 0.07 * kill)
        process.send_signal(signal.SIGKILL)
        process.wait()
        assert not (broken / "final").exists(), "the run ended before it could be killed"
    assert start(broken).wait() == 0
    assert equal(cveff.load(tmp_path / "whole" / "final"), cveff.load(broken / "final"))


def test_accumulation_equals_the_whole_batch(digits: Data) -> None:
    class NoNorm(torch.nn.Module):  # batch norm sees the parts, so the law holds without it
        def __init__(self) -> None:
            super().__init__()
            self.flatten, self.fc = torch.nn.Flatten(), torch.nn.Linear(64, 10)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.fc(self.flatten(x))

    def run(accumulation: int) -> torch.Tensor:
        torch.manual_seed(0)
        model = Model(tiny(digits).spec, NoNorm())
        settings = replace(SETTINGS, accumulation=accumulation, ema=0.0, epochs=1)
        return cveff.apply(model, settings, data=digits).module.fc.weight

    # Sums in another order: float32 rounding only.
    torch.testing.assert_close(run(4), run(1), rtol=1e-4, atol=1e-6)


def test_best_weights_are_those_of_the_best_epoch(digits: Data, tmp_path: Path) -> None:
    from cveff.train.evaluate import evaluate

    settings = replace(SETTINGS, epochs=4, learning_rate=0.2)
    model = cveff.apply(tiny(digits), settings, data=digits, folder=tmp_path, log=FileLog(tmp_path))
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    figures = evaluate(model.module, digits.val, model.spec.input)
    assert figures["accuracy"] == max(line["val/accuracy"] for line in lines)
    assert equal(model, cveff.load(tmp_path / "best"))
    assert (tmp_path / "last" / "model.json").is_file()


def test_early_stop_ends_after_patience(digits: Data, tmp_path: Path) -> None:
    # A vanishing learning rate cannot improve after the first validation.
    settings = replace(SETTINGS, epochs=30, learning_rate=1e-12, ema=0.0, patience=2, warmup_epochs=0)
    cveff.apply(tiny(digits), settings, data=digits, log=FileLog(tmp_path))
    epochs = (tmp_path / "metrics.jsonl").read_text().count("\n")
    assert 3 <= epochs <= 12


def test_resuming_a_finished_run_returns_its_weights(digits: Data, tmp_path: Path) -> None:
    first = cveff.apply(tiny(digits), SETTINGS, data=digits, folder=tmp_path)
    again = cveff.apply(tiny(digits, seed=3), SETTINGS, data=digits, folder=tmp_path, resume=True)
    assert equal(first, again)


def test_resuming_with_other_settings_is_refused(digits: Data, tmp_path: Path) -> None:
    cveff.apply(tiny(digits), SETTINGS, data=digits, folder=tmp_path)
    with pytest.raises(CheckpointError, match=r"train\.epochs: 3 then, 4 now"):
        cveff.apply(tiny(digits), replace(SETTINGS, epochs=4), data=digits, folder=tmp_path, resume=True)


@pytest.mark.parametrize(
    ("given", "words"), [({}, None), ({"clip_norm": 1.0}, "train.clip_norm: 0.0 then, 1.0 now")]
)
def test_a_state_of_a_release_without_a_setting_had_its_default(
    digits: Data, tmp_path: Path, given: dict[str, float], words: str | None
) -> None:
    short = replace(SETTINGS, epochs=1)
    first = cveff.apply(tiny(digits), short, data=digits, folder=tmp_path)
    state = load_state(tmp_path / "state.safetensors")
    del state["settings"]["train"]["clip_norm"], state["settings"]["train"]["difficulty"]
    save_state(tmp_path / "state.safetensors", state)
    with pytest.raises(CheckpointError, match=words) if words else nullcontext():
        again = cveff.apply(
            tiny(digits, seed=3), replace(short, **given), data=digits, folder=tmp_path, resume=True
        )
        assert equal(first, again)


def test_a_damaged_state_is_refused(digits: Data, tmp_path: Path) -> None:
    cveff.apply(tiny(digits), replace(SETTINGS, epochs=1), data=digits, folder=tmp_path)
    state = tmp_path / "state.safetensors"
    state.write_bytes(state.read_bytes()[:-100])
    with pytest.raises(CheckpointError, match="damaged"):
        cveff.apply(tiny(digits), replace(SETTINGS, epochs=1), data=digits, folder=tmp_path, resume=True)


def test_a_loss_that_is_not_finite_stops_the_run(digits: Data) -> None:
    settings = replace(SETTINGS, learning_rate=1e20, warmup_epochs=0)
    with pytest.raises(TrainingError, match=r"lower train\.learning_rate"):
        cveff.apply(tiny(digits), settings, data=digits)


def test_training_needs_data_and_enough_logits(digits: Data) -> None:
    with pytest.raises(StepError, match="Train needs data"):
        cveff.apply(tiny(digits), SETTINGS)
    small = cveff.create("small_resnet_s", num_classes=3, image_size=8, channels=1)
    with pytest.raises(StepError, match="10 classes and the model 3 logits"):
        cveff.apply(small, SETTINGS, data=digits)


def test_mixup_trains_with_soft_targets(digits: Data) -> None:
    plain = replace(SETTINGS, epochs=1, augmentation=Augmentation())
    mixed = replace(plain, augmentation=Augmentation(mixup=0.4, cutmix=1.0))
    runs = [cveff.apply(tiny(digits), settings, data=digits) for settings in (plain, mixed)]
    assert not equal(*runs)
    assert all(torch.isfinite(value).all() for value in runs[1].module.state_dict().values())


def test_bf16_and_clipping_run_and_differ_from_fp32(digits: Data) -> None:
    plain = cveff.apply(tiny(digits), replace(SETTINGS, epochs=1), data=digits)
    for change in ({"precision": "bf16"}, {"clip_norm": 0.01}):
        assert not equal(plain, cveff.apply(tiny(digits), replace(SETTINGS, epochs=1, **change), data=digits))


def test_memory_split_is_what_digits_are(digits: Data) -> None:
    assert isinstance(digits.train, MemorySplit)


@pytest.mark.parametrize(
    "change, words",
    [
        ({"epochs": -1}, "epochs is -1"),
        ({"batch_size": 1}, "batch norm"),
        ({"accumulation": 3}, "does not divide"),
        ({"optimizer": "adam"}, "sgd, adamw, muon or galore"),
        ({"learning_rate": 0.0}, "positive"),
        ({"ema": 1.0}, "decay"),
        ({"label_smoothing": 1.0}, r"\[0, 1\)"),
        ({"precision": "int8"}, "fp32, bf16"),
        ({"schedule": "step"}, "schedule"),
        ({"warmup_epochs": 9.0}, "longer than train.epochs"),
    ],
)
def test_settings_out_of_range_are_refused_at_construction(change: dict, words: str) -> None:
    with pytest.raises(TrainingError, match=words):
        replace(SETTINGS, **change)


def test_fp16_needs_a_gpu(digits: Data) -> None:
    with pytest.raises(TrainingError, match="the device is the CPU"):
        cveff.apply(tiny(digits), replace(SETTINGS, precision="fp16"), data=digits, device="cpu")
