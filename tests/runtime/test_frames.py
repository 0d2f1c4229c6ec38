"""Frames of a video: what is passed over, what it is told instead, and how the threshold is found."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from cveff.errors import CveffError, ImageError
from cveff.runtime import frames
from cveff.runtime.frames import SimilarFrames, calibrate, compare, difference, natural, thumbnail
from cveff.runtime.run import main
from cveff.runtime.run_frames import check_frames

SIZE = (32, 40)


def scene(name: str, count: int, step: int) -> list[np.ndarray]:
    """A camera that pans `step` pixels a frame over one of scikit-learn's photographs."""
    sample = pytest.importorskip("sklearn.datasets").load_sample_image(name)
    photo = Image.fromarray(sample).resize((160, 108))
    return [np.asarray(photo.crop((step * i, 20, step * i + SIZE[1], 20 + SIZE[0]))) for i in range(count)]


@pytest.fixture(scope="module")
def video() -> list[np.ndarray]:
    """A still, a slow pan, a cut, and a still again."""
    return [*scene("china.jpg", 10, 0), *scene("china.jpg", 40, 1), *scene("flower.jpg", 14, 0)]


@pytest.fixture
def folder(video: list[np.ndarray], tmp_path: Path) -> Path:
    """The video as files whose names sort as numbers only."""
    path = tmp_path / "frames"
    path.mkdir()
    for index, frame in enumerate(video):
        Image.fromarray(frame).save(path / f"frame{index}.png")
    return path


def colour(frame: np.ndarray) -> int:
    """A classifier of sorts: the brightest channel of eight columns."""
    return int(frame.mean(0).reshape(8, -1).sum(1).argmax())


def test_a_frame_is_compared_with_the_last_computed_one(video: list[np.ndarray]) -> None:
    gate = SimilarFrames(2.0)
    computed = [index for index, frame in enumerate(video) if not gate(frame)]
    assert computed[0] == 0 and computed[1] > 10 and 50 in computed and max(computed) == 50
    small = [thumbnail(frame) for frame in video]
    expected = [0]
    for index in range(1, len(video)):
        if difference(small[index], small[expected[-1]]) > 2.0:
            expected.append(index)
    assert computed == expected and len(computed) > 5  # the slow pan adds up
    assert (gate.frames, gate.skipped) == (64, 64 - len(computed))
    assert gate.share_skipped == 1 - len(computed) / 64
    gate.reset()
    assert gate.share_skipped == 0 and not gate(video[-1])


def test_at_zero_only_equal_thumbnails_pass(video: list[np.ndarray]) -> None:
    gate = SimilarFrames(0)
    skipped = [gate(frame) for frame in video]
    assert skipped[1:11] == [True] * 10 and not any(skipped[11:50]) and skipped[51:] == [True] * 13


def test_a_difference_is_in_grey_levels() -> None:
    black, grey = np.zeros((60, 100, 1), np.uint8), np.full((60, 100, 1), 9, np.uint8)
    assert difference(thumbnail(black), thumbnail(grey)) == 9
    assert difference(thumbnail(grey), thumbnail(black)) == 9  # unsigned numbers would wrap
    half = black.copy()
    half[:, :50] = 200
    assert difference(thumbnail(half), thumbnail(black)) == pytest.approx(100, rel=0.01)
    assert thumbnail(np.repeat(grey, 3, 2)).tolist() == thumbnail(grey).tolist()
    assert thumbnail(grey[:4, :4]).shape == (32, 32)  # smaller than a thumbnail


def test_the_threshold_keeps_its_promise_and_is_the_best_that_does(video: list[np.ndarray]) -> None:
    small, answers = [thumbnail(frame) for frame in video], [colour(frame) for frame in video]
    assert len(set(answers)) > 2
    strict, loose = calibrate(small, answers, 1.0), calibrate(small, answers, 0.9)
    assert strict.agreement == 1 and loose.agreement >= 0.9
    assert 0.35 <= strict.skipped <= loose.skipped < 1 and strict.threshold <= loose.threshold
    measured = compare(colour, video, loose.threshold)
    assert (measured.frames, measured.skipped, measured.agreement) == (64, loose.skipped, loose.agreement)
    assert measured.every_ms > 0 and measured.skipping_ms > 0
    everything = calibrate(small, ["same"] * 64)
    assert everything.skipped >= 62 / 64 and everything.agreement == 1
    # Nothing in between does better: a dense sweep finds no other.
    for threshold in np.linspace(0, 60, 241):
        tried = compare(colour, video, float(threshold))
        assert tried.agreement < 0.9 or tried.skipped <= loose.skipped + 3 / 64


def test_what_cannot_be_calibrated_is_said(video: list[np.ndarray]) -> None:
    small = [thumbnail(video[0])] * 4
    with pytest.raises(CveffError, match=r"at threshold 0 already 50.0% of answers agree, less than 99.0%"):
        calibrate(small, [0, 1, 0, 1])
    with pytest.raises(CveffError, match="4 frames and 3 answers"):
        calibrate(small, [0, 1, 0])
    with pytest.raises(CveffError, match="0 frames and 0 answers"):
        calibrate([], [])
    with pytest.raises(CveffError, match="agreement is 99"):
        calibrate(small, [0] * 4, 99)
    with pytest.raises(CveffError, match="no frames to compare"):
        compare(colour, [], 1.0)
    for wrong in (-1.0, float("nan"), float("inf")):
        with pytest.raises(CveffError, match="give grey levels"):
            SimilarFrames(wrong)
    for bad in (video[0][:, :, 0], video[0].astype(np.float32), np.zeros((4, 4, 4), np.uint8)):
        with pytest.raises(ImageError, match="a frame is"):
            thumbnail(bad)


def test_frames_sort_as_numbers() -> None:
    names = ["v2/f1.png", "v10/f1.png", "v2/f10.png", "v2/f9.png", "1.png", "a.png"]
    ordered = sorted(map(Path, names), key=natural)
    assert [str(path) for path in ordered] == [
        "1.png",
        "a.png",
        "v2/f1.png",
        "v2/f9.png",
        "v2/f10.png",
        "v10/f1.png",
    ]


@pytest.mark.parametrize("batch", [1, 3, 8])
def test_skipped_frames_get_the_answer_of_the_last_computed_one(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str], batch: int
) -> None:
    def images(*options: str) -> list[dict[str, object]]:
        assert main([str(tiny_bundle), str(folder), "--json", *options]) == 0
        found: dict[str, list[dict[str, object]]] = json.loads(capsys.readouterr().out)
        return found["images"]

    every = {str(item["path"]): item for item in images("--batch-size", str(batch))}
    skipping = images("--skip-similar", "2", "--batch-size", str(batch))
    assert [Path(str(item["path"])).name for item in skipping] == [f"frame{i}.png" for i in range(64)]
    sources = [str(item.get("answer_of", item["path"])) for item in skipping]
    assert 5 < len(set(sources)) < 50
    for item, source in zip(skipping, sources, strict=True):
        assert item["predictions"] == every[source]["predictions"]
        assert "answer_of" not in every[source]


def test_the_command_line_counts_and_goes_on_past_bad_frames(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (folder / "frame3.png").write_bytes(b"damaged")
    assert main([str(tiny_bundle), str(folder), "--skip-similar", "2"]) == 2
    out, err = capsys.readouterr()
    lines = out.splitlines()
    assert len(lines) == 63 and "(as before)" in lines[1] and "(as before)" not in lines[0]
    assert f"{out.count('(as before)')} of 63 frames took over the answer" in err
    assert main([str(tiny_bundle), str(folder), "--skip-similar", "2", "--json"]) == 2
    document = json.loads(capsys.readouterr().out)
    assert document["similar"] == {"levels": 2.0, "frames": 63, "skipped": out.count("(as before)")}


def test_the_command_line_calibrates_on_one_half_and_measures_on_the_other(
    tiny_bundle: Path, folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main([str(tiny_bundle), str(folder), "--calibrate-similar", "0.9", "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["chosen"]["frames"] == found["measured"]["frames"] == 32
    assert found["chosen"]["agreement"] >= 0.9 and found["chosen"]["skipped"] >= 10 / 32
    assert main([str(tiny_bundle), str(folder), "--calibrate-similar", "0.9"]) == 0
    line = capsys.readouterr().out
    assert (
        line.startswith(f"--skip-similar {found['chosen']['threshold']:g}: on 32 frames")
        and "ms a frame" in line
    )
    assert main([str(tiny_bundle), str(folder / "frame1.png"), "--calibrate-similar", "1"]) == 2
    assert "give two or more" in capsys.readouterr().err


@pytest.mark.parametrize("arguments", [["--skip-similar", "256"], ["--calibrate-similar", "2"]])
def test_options_out_of_range(tiny_bundle: Path, folder: Path, arguments: list[str]) -> None:
    assert main([str(tiny_bundle), str(folder), *arguments]) == 2


def test_boxes_and_masks_are_not_reused() -> None:
    class Detector:
        task, path = "detection", "boxes.bundle"

    with pytest.raises(CveffError, match=r"boxes\.bundle is a detection model"):
        check_frames(Detector())  # type: ignore[arg-type]


def test_thumbnails_are_small_whatever_the_frame(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(frames, "THUMBNAIL", 8)
    assert thumbnail(np.zeros((5, 700, 3), np.uint8)).shape == (8, 8)
