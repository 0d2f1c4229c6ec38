"""`cveff elastic`: what there is, one of it in a folder; every wrong word is one line and leaves nothing behind."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

import cveff
from cveff.cli import main
from cveff.dynamic import Elastic
from cveff.train import Train


@pytest.fixture(scope="module")
def elastic(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A network of one epoch, saved."""
    torch.manual_seed(0)
    model = cveff.create("small_resnet_s", num_classes=10, image_size=8, channels=1)
    train = Train(epochs=1, batch_size=256, keep="last", warmup_epochs=0.0)
    step = Elastic(widths=(0.5,), resolutions=(6,), num_random=0, vary="network", train=train)
    path = tmp_path_factory.mktemp("elastic") / "net"
    cveff.save(cveff.apply(model, step, data="digits"), path)
    return path


@pytest.fixture(autouse=True)
def elsewhere(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)


def test_what_there_is(elastic: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["elastic", "show", str(elastic)]) == 0
    shown = capsys.readouterr().out
    assert "1, 0.5" in shown and "8, 6" in shown and "one value for all" in shown
    assert main(["elastic", "show", str(elastic), "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["kind"] == "elastic"


def test_a_sub_net_by_its_settings(elastic: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    words = ["elastic", "extract", str(elastic), "--data", "digits", "--width", "0.5", "--resolution", "6"]
    words += ["--images", "64", "--out", "small", "--quiet"]
    assert main([*words, "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert made["subnet"]["size"] == [6, 6] and made["parameters"] < 0.3 * made["elastic_parameters"]
    assert json.loads((tmp_path / "small" / "subnet.json").read_text()) == made
    assert cveff.load(tmp_path / "small" / "model").num_parameters == made["parameters"]
    assert main(words) == 2 and "--overwrite replaces it" in capsys.readouterr().err
    assert main([*words, "--overwrite"]) == 0
    assert "6×6" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("words", "message"),
    [
        ([], "got none"),
        (["--width", "0.6"], "width 0.6 was not trained"),
        (["--width", "0.5", "--latency-ms", "3"], "give one or the other"),
        (["--latency-ms", "3", "--population", "1"], "population is 1"),
        (["--latency-ms", "3", "--target", "toaster"], "toaster"),
    ],
)
def test_wrong_words_leave_nothing(
    elastic: Path, tmp_path: Path, words: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    given = ["elastic", "extract", str(elastic), "--data", "digits", "--out", "small", "--quiet", *words]
    assert main(given) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "small").exists()


def test_a_model_that_is_not_elastic(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    cveff.save(cveff.create("small_resnet_s", num_classes=10, image_size=8, channels=1), tmp_path / "plain")
    assert main(["elastic", "show", "plain"]) == 2
    assert "is not elastic: apply Elastic to it first" in capsys.readouterr().err
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "thesis.txt").write_text("all of it")
    assert main(["elastic", "extract", "plain", "--width", "0.5", "--out", "full"]) == 2
    assert "did not write" in capsys.readouterr().err
