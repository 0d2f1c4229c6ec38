"""Exit codes and messages: 2 and one line for a user's mistake, 1 and a traceback for ours, 130 after Ctrl-C."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from cveff.cli import main


def _fails(capsys: pytest.CaptureFixture[str], *words: str) -> str:
    """Run a command that must fail with 2, one line on stderr and nothing on stdout; the line."""
    code = main(words)
    out, err = capsys.readouterr()
    errors = [line for line in err.splitlines() if line.startswith("error: ")]
    assert (code, out) == (2, ""), err
    assert len(errors) == 1, err
    assert "Traceback" not in err
    return errors[0]


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["train", "absent.toml"], "no recipe 'absent.toml'"),
        (["train", "digts"], "did you mean 'digits'"),
        (["train", "absent/folder"], "absent/folder"),
        (["train", "digits", "--model", "mobilenetv4_conv_smal"], "mobilenetv4_conv_small"),
        (["train", "digits", "--target", "egde-cpu"], "edge-cpu"),
        (["train", "digits", "--set", "train.epoch=3"], "train.epoch: unknown key; did you mean 'epochs'?"),
        (["train", "digits", "--set", "train.epochs=ten"], "train.epochs: 'ten' is not an integer"),
        (["train", "digits", "--set", "train.epochs"], "KEY=VALUE"),
        (["train", "digits", "--device", "tpux"], "tpux"),
        (["compress", "resnet18"], "neither a saved model nor a zoo card"),
        (["compress", "digits", "--prune", "latency=2"], "give a number between 0 and 1"),
        (["compress", "digits", "--prune", "macs=0.5", "--target", "egde-cpu"], "edge-cpu"),
        (["compress", "digits", "--prune", "macs=0.5", "--data", "absent/"], "absent"),
        (["compress", "digits", "--distill", "--plan"], "nothing is pruned"),
        (["deploy", "mobilenetv4_conv_smal"], "mobilenetv4_conv_small"),
        (["deploy", "mobilenetv4_conv_small"], "give --weights FILE, or --data to train it"),
        (["deploy", "mobilenetv4_conv_small", "--weights", "absent.pth"], "absent.pth does not exist"),
        (["deploy", "small_resnet_s", "--data", "absent"], "absent"),
        (["deploy", "small_resnet_s", "--data", "digits", "--target", "moon"], "moon"),
        (
            ["deploy", "small_resnet_s", "--data", "digits", "--pretrained", "--weights", "a.pth"],
            "pretrained",
        ),
        (["deploy", "small_resnet_s", "--data", "digits", "--labels", "a.txt"], "the names come from --data"),
        (["deploy", ".", "--data", "digits"], "is not a saved model"),
        (["deploy", ".", "--data", "digits", "--epochs", "3"], "remove --epochs"),
        (["export", "resnet18"], "--weights FILE"),
        (["export", "resnet1888"], "did you mean"),
        (["export", "resnet18", "--weights", "absent.safetensors"], "absent.safetensors does not exist"),
        (["bench", "absent.onnx"], "absent.onnx does not exist"),
        (["verify", "absent.bundle", "--data", "digits"], "absent.bundle"),
        (["run", "absent.bundle", "cat.jpg"], "cat.jpg does not exist"),
        (["targets", "show", "moon"], "known: edge-cpu, edge-cpu-avx2, jetson-orin"),
        (["recipe", "check", "absent"], "no recipe 'absent'"),
        (["recipe", "show", "digits", "--set", "seed=-1"], "seed: -1 is negative"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_users_mistake_is_one_line(words, expected, capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert expected in _fails(capsys, *words)
    assert list(tmp_path.iterdir()) == [], "nothing is left behind"


@pytest.mark.parametrize(
    ("words", "expected"),
    [
        (["fly"], "No such command 'fly'"),
        (["train"], "Missing argument"),
        (["train", "digits", "--epochs", "ten"], "--epochs"),
        (["train", "digits", "--epochs", "-1"], "--epochs"),
        (["deploy", "x", "--max-accuracy-drop", "200"], "--max-accuracy-drop"),
        (["deploy", "x", "--on-bad-image", "ignore"], "ignore"),
        (["bench", "x", "--batch", "0"], "--batch"),
        (["--fly"], "--fly"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else None,
)
def test_a_wrong_command_line_says_how_to_call_it(words, expected, capsys) -> None:
    assert main(words) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert expected in err
    assert "--help" in err


def test_pretrained_weights_that_do_not_exist(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    words = ("deploy", "small_resnet_s", "--data", "digits", "--pretrained")
    assert "pretrained weights of small_resnet_s cannot be had" in _fails(capsys, *words)
    assert list(tmp_path.iterdir()) == []


def test_labels_files(capsys, tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    twice = tmp_path / "labels.txt"
    twice.write_text("cat\ndog\ncat\n")
    words = ("export", "resnet18", "--weights", "w.pth", "--labels")
    assert "names cat twice" in _fails(capsys, *words, "labels.txt")
    twice.write_text("\n")
    assert "is empty" in _fails(capsys, *words, "labels.txt")
    assert "cannot be read" in _fails(capsys, *words, "absent.txt")


def test_a_bug_is_called_one(capsys, monkeypatch) -> None:
    import cveff.target

    def broken() -> list[str]:
        raise ZeroDivisionError("inner")

    monkeypatch.setattr(cveff.target, "target_names", broken)
    assert main(["targets"]) == 1
    err = capsys.readouterr().err
    assert "Traceback" in err
    assert "ZeroDivisionError: inner" in err
    assert "this is a bug in cveff" in err


def test_debug_shows_the_traceback_of_a_users_mistake(capsys) -> None:
    assert main(["targets", "show", "moon", "--debug"]) == 2
    assert "Traceback" in capsys.readouterr().err


def test_errors_keep_stdout_clean_under_json(capsys) -> None:
    assert "moon" in _fails(capsys, "targets", "show", "moon", "--json")


def test_a_reader_that_goes_away_is_no_error() -> None:
    code = "import sys; from cveff.cli import main; sys.exit(main(['recipe', 'init', '--out', '-']))"
    with subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, stderr=subprocess.PIPE
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(60) == 141


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_an_interrupted_run_says_130_and_can_go_on(number: signal.Signals, tmp_path: Path) -> None:
    words = ["train", "digits", "--epochs", "200", "--out", str(tmp_path / "run"), "--no-deploy"]
    command = [sys.executable, "-m", "cveff", *words]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}

    def listen() -> None:
        signal.signal(signal.SIGINT, signal.SIG_DFL)  # shells start background jobs with it ignored

    with subprocess.Popen(
        command, stderr=subprocess.PIPE, text=True, env=environment, preexec_fn=listen
    ) as process:
        assert process.stderr is not None
        for line in process.stderr:
            if line.startswith("epoch 1/"):
                break
        process.send_signal(number)
        rest = process.stderr.read()
        assert process.wait(60) == 130
    assert rest.splitlines()[-1] == "interrupted; nothing is half-written"
    left = [path.name for path in (tmp_path / "run").rglob("*")]
    assert not [name for name in left if name.startswith(".")], "no temporary files"
    assert "model" not in left
    assert json.loads((tmp_path / "run" / "recipe.json").read_text())["train"]["epochs"] == 200
