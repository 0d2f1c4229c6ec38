"""Two gloo ranks train as one process does, whatever the strategy; what one wrote the others continue."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import cveff
from cveff.data.share import Share
from cveff.errors import CheckpointError, TrainingError
from cveff.train import Curriculum, Distributed, Train, distributed
from cveff.train import spread as spread_module
from cveff.train.growth import Growth
from cveff.train.objective import CrossEntropy, Objective
from cveff.train.spread import Spread

sys.path.insert(0, str(Path(__file__).parent))
from ranks import CONV, VIT, images, network, stopping, train

ROOT = Path(__file__).parents[2]
# Sums over ranks round differently. After six steps of SGD that is the fifth digit; where a gradient is nearly
# nothing AdamW divides by its size, so there it is a tenth of one step's length of 1e-3.
TOLERANCE = {"conv": {"rtol": 1e-4, "atol": 1e-5}, "vit": {"rtol": 1e-3, "atol": 1e-4}}


def launch(*words: str) -> subprocess.Popen[str]:
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", *words]
    return subprocess.Popen(
        command, env=environment, stderr=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what one process and two ranks trained, see `ranks.py`."""
    folder, data = tmp_path_factory.mktemp("ranks"), images()
    for name, settings, continued in (("conv", CONV, "ddp-from-one"), ("vit", VIT, "fsdp2-from-one")):
        cveff.save(train(name, settings, data, folder / name), folder / f"{name}-saved")
        with stopping():
            train(name, settings, data, folder / continued)
    process = launch(str(Path(__file__).with_name("ranks.py")), str(folder))
    _, errors = process.communicate(timeout=600)
    assert process.returncode == 0, errors[-3000:]
    return folder


def losses(folder: Path) -> list[float]:
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    return [line[name] for line in lines for name in ("train/loss", "val/loss", "seen/samples", "seen/flops")]


def weights(folder: Path) -> dict[str, torch.Tensor]:
    return cveff.load(folder).module.state_dict()


@pytest.mark.parametrize(
    "name",
    ["conv-ddp", "conv-fsdp2", "conv-checkpointed", "vit-ddp", "vit-fsdp2", "ddp-from-one", "fsdp2-from-one"],
)
def test_two_ranks_train_as_one_process(runs: Path, name: str) -> None:
    of = {"ddp-from-one": "conv", "fsdp2-from-one": "vit"}.get(name, name.split("-")[0])
    assert losses(runs / name) == pytest.approx(losses(runs / of), rel=1e-4)
    expected, first, second = (weights(runs / part) for part in (f"{of}-saved", f"{name}-0", f"{name}-1"))
    for key, value in expected.items():
        torch.testing.assert_close(
            first[key], value, **TOLERANCE[of], msg=lambda text, key=key: f"{key}: {text}"
        )
        assert torch.equal(first[key], second[key]), key


def test_without_synchronized_batch_norms_ranks_agree_and_differ_from_one_process(runs: Path) -> None:
    first, second, one = (weights(runs / name) for name in ("conv-apart-0", "conv-apart-1", "conv-saved"))
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert any(not torch.allclose(first[key].float(), one[key].float(), rtol=1e-2) for key in first)


@pytest.mark.parametrize(("name", "of", "settings"), [("fsdp2", "vit", VIT), ("ddp", "conv", CONV)])
def test_one_process_goes_on_where_two_ranks_stopped(runs: Path, name: str, of: str, settings: Train) -> None:
    folder = runs / f"one-from-{name}"
    assert (folder / "state-shards-b").exists() is False and (folder / "state-shards-a").exists() == (
        name == "fsdp2"
    )
    model = train(of, settings, images(), folder, seed=7)
    assert losses(folder) == pytest.approx(losses(runs / of), rel=1e-4)
    for key, value in weights(runs / f"{of}-saved").items():
        torch.testing.assert_close(model.module.state_dict()[key], value, **TOLERANCE[of])


def test_a_state_without_one_of_its_parts_is_refused(runs: Path, tmp_path: Path) -> None:
    shutil.copytree(runs / "vit-fsdp2", tmp_path / "run")
    parts = sorted((tmp_path / "run").glob("state-shards-*/*.safetensors"))
    assert len(parts) == 4  # two states of two ranks
    for part in parts[1::2]:
        part.unlink()
    with pytest.raises(CheckpointError, match="lacks a part of"):
        train("vit", VIT, images(), tmp_path / "run")


def test_a_killed_rank_ends_the_job_by_name_and_the_command_resumes(tmp_path: Path) -> None:
    out = tmp_path / "run"
    command = [
        "-m",
        "cveff",
        "train",
        "digits",
        "--epochs",
        "4",
        "--no-deploy",
        "--out",
        str(out),
        "--resume",
    ]
    tiny = "model.arguments={widths=[4, 8], depths=[1, 1]}"
    for setting in (tiny, "train.checkpoint_minutes=0.002", 'train.distributed.strategy="fsdp2"'):
        command += ["--set", setting]
    process = launch(*command)
    state = out / "train" / "0-train" / "state.safetensors"
    end = time.monotonic() + 300
    while not state.exists() and process.poll() is None and time.monotonic() < end:
        time.sleep(0.02)
    if process.poll() is None:
        os.kill(pid_of(process.pid, rank=1), signal.SIGKILL)
    _, errors = process.communicate(timeout=300)
    assert process.returncode != 0 and "error: rank 1 of 2 no longer answers" in errors, errors[-3000:]
    assert not (out / "model").exists()

    process = launch(*command, "--json")
    printed, errors = process.communicate(timeout=300)
    assert process.returncode == 0, errors[-3000:]
    assert "resumed at step" in errors
    result = json.loads(printed)
    assert result["accuracy"] > 0.5  # chance is 0.1
    steps = [json.loads(line)["step"] for line in (state.parent / "metrics.jsonl").read_text().splitlines()]
    assert steps == sorted(set(steps)) and len(steps) == 4
    assert cveff.load(out / "model").num_parameters == result["num_parameters"]
    assert sorted(path.name for path in out.iterdir()) == ["model", "phases", "recipe.json", "train"]


def pid_of(launcher: int, rank: int) -> int:
    """The process that `launcher` started as `rank`."""
    for entry in Path("/proc").iterdir():
        if not entry.name.isdigit():
            continue
        try:
            parent = int((entry / "stat").read_text().rpartition(")")[2].split()[1])
            if parent == launcher and f"\0RANK={rank}\0" in (entry / "environ").read_text():
                return int(entry.name)
        except (OSError, UnicodeDecodeError):
            continue
    raise AssertionError(f"no process of rank {rank}")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (Train(budget="1m"), "train.budget is for one process"),
        (Train(grow=(Growth(at=0.0, depth=1), Growth(at=0.5, depth=2))), "train.grow is for one process"),
        (Train(curriculum=Curriculum(metrics=("edges",))), "from a file, not by measuring 'edges'"),
        (Train(optimizer="muon", distributed=Distributed("fsdp2")), "optimizer = 'muon' needs whole weights"),
        (Train(precision="fp16", distributed=Distributed("fsdp2")), "'fp16' needs whole weights"),
        (Train(mup_base_width=8, distributed=Distributed("fsdp2")), "mup_base_width needs whole weights"),
    ],
)
def test_settings_that_several_ranks_cannot_follow(
    settings: Train, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    cpu = torch.device("cpu")
    Spread(settings, CrossEntropy(), cpu)  # one process can
    monkeypatch.setattr(spread_module, "group", lambda: Share(0, 2))
    with pytest.raises(TrainingError, match=message):
        Spread(settings, CrossEntropy(), cpu)


def test_batches_too_small_for_the_ranks_and_objectives_that_look_inside(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    class Inside(CrossEntropy):
        pass

    cpu, objective = torch.device("cpu"), Inside()
    monkeypatch.setattr(spread_module, "group", lambda: Share(0, 4))
    with pytest.raises(TrainingError, match="Inside looks into the network"):
        Spread(Train(distributed=Distributed("fsdp2")), objective, cpu)
    several: Objective = CrossEntropy()
    Spread(replace(VIT, batch_size=32), several, cpu).require_images(32)
    with pytest.raises(TrainingError, match="a batch of 6 images leaves 0 to one of 4 ranks"):
        Spread(VIT, several, cpu).require_images(6)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [({"strategy": "zero"}, "strategy is 'zero'"), ({"timeout_minutes": 0}, "timeout_minutes is 0")],
)
def test_settings_out_of_range(arguments: dict[str, object], message: str) -> None:
    with pytest.raises(TrainingError, match=message):
        Distributed(**arguments)  # type: ignore[arg-type]


def test_a_torn_environment_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    for rank, world in (("2", "2"), ("one", "2")):
        monkeypatch.setenv("RANK", rank)
        monkeypatch.setenv("WORLD_SIZE", world)
        with pytest.raises(TrainingError, match="start with torchrun"):
            distributed.launched()


def test_who_is_gone_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(distributed, "_ROLL_CALL_SECONDS", 0.2)
    monkeypatch.setattr(distributed, "_is_about_others", lambda error: isinstance(error, ConnectionError))
    store, lost, ours = torch.distributed.HashStore(), ConnectionError("closed by peer"), ValueError("ours")
    distributed._raise_for_lost(ours, store, Share(1, 3))  # its own error is left as it is
    with pytest.raises(
        TrainingError, match=r"rank 2 of 3 no longer answers; rank 1 stopped: ours; rank 0 stops too"
    ):
        distributed._raise_for_lost(lost, store, Share(0, 3))


def test_a_rank_that_never_comes_is_named() -> None:
    with pytest.raises(TrainingError, match="rank 1 of 2 did not come within 0 s"):
        distributed._wait_for_all(torch.distributed.HashStore(), Share(0, 2), 0.1)


def test_one_process_needs_no_group() -> None:
    with distributed.joined(torch.device("cpu")) as share:
        assert share == Share(0, 1) and not torch.distributed.is_initialized()
    assert network("vit", images()).num_parameters > 0
