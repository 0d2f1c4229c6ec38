"""The report: one page, nothing from elsewhere, nothing a user wrote taken for markup."""

from __future__ import annotations

import itertools
import re
from collections.abc import Callable
from html.parser import HTMLParser
from typing import Any

import numpy as np
import pytest

from cveff.export.deploy import Deployment
from cveff.export.report import render
from cveff.export.report_plots import Bar, Point, _apart, accuracy_latency, confusion_matrix, layer_bars
from cveff.export.report_sections import MAX_BARS, MAX_MATRIX_CLASSES, Evidence, Sample

EVIL = "<script>alert('x')</script>\"&"
VOID = {"meta", "img", "br", "line", "circle", "rect", "path"}


class Checker(HTMLParser):
    """Tags must nest; every tag and attribute is kept."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.text: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in VOID:
            assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def parsed(page: str) -> Checker:
    checker = Checker()
    checker.feed(page)
    checker.close()
    assert checker.open == []
    return checker


def assert_self_contained(page: str) -> None:
    for tag, attributes in parsed(page).tags:
        assert tag not in ("script", "link", "iframe", "object", "embed", "base")
        for name, value in attributes.items():
            assert not name.startswith("on")
            if name in ("src", "href", "xlink:href", "action", "srcset"):
                assert (value or "").startswith("data:")
    assert not re.search(r"https?://|url\(|@import", page)


@pytest.fixture
def manifest(manifest_maker: Callable[..., dict[str, Any]]) -> dict[str, Any]:
    """A manifest as `deploy` writes it, with a rejected and a failed candidate."""
    made = manifest_maker()
    chosen = made["candidates"][0] | {"rejected": False, "meaning_gap": None}
    rejected = chosen | {
        "precision": "int8",
        "accuracy": 0.4,
        "chosen": False,
        "rejected": True,
        "why": "loses 49",
    }
    rejected["meaning_gap"] = {"agreement": 0.5, "images": 10, "large": True}
    failed = chosen | {"engine": "openvino", "accuracy": None, "agreement": None, "latency_ms": None}
    failed |= {"size_bytes": 0, "chosen": False, "rejected": True, "why": "not installed"}
    made["candidates"] = [chosen, rejected, failed]
    made["metrics"]["selection"] = {
        "split": "val", "count": 100, "reference_accuracy": 0.9, "max_accuracy_drop": 1.0
    }  # fmt: skip
    return made


def test_a_real_report_is_self_contained_and_small(deployment: Deployment) -> None:
    page = (deployment.path / "report.html").read_text(encoding="utf-8")
    assert_self_contained(page)
    assert len(page) < 1_500_000
    text = " ".join(parsed(page).text)
    for expected in (
        "What was tried",
        "Layer by layer",
        "Where it errs",
        "Predictions of the deployed file",
        "Versions",
    ):
        assert expected in text
    accuracy = deployment.manifest["metrics"]["accuracy"]["deployed"]
    assert f"{100 * accuracy:.2f}%" in text
    for entry in deployment.manifest["candidates"]:
        assert entry["why"] in text


def test_strings_of_users_never_become_markup(manifest: dict[str, Any]) -> None:
    manifest["model"]["name"] = manifest["model"]["architecture"] = EVIL
    manifest["labels"] = [EVIL, *manifest["labels"][1:]]
    manifest["candidates"][0]["why"] = manifest["candidates"][2]["engine"] = EVIL
    manifest["recipe"] = {EVIL: EVIL}
    manifest["versions"] = {EVIL: EVIL}
    manifest["engine"]["options"] = {EVIL: EVIL}
    counts = np.ones((5, 5), np.int64)
    sample = Sample(np.zeros((9, 8, 3), np.uint8), EVIL, 0.5, EVIL + "2", EVIL + "3")
    evidence = Evidence(counts, (sample,), (Bar(EVIL, 0.1, EVIL),), EVIL, ((EVIL, EVIL),), (EVIL,))
    page = render(manifest, evidence)
    assert_self_contained(page)
    assert "<script" not in page
    assert page.count("&lt;script&gt;") > 10


def test_dollar_signs_are_text(manifest: dict[str, Any]) -> None:
    manifest["model"]["name"] = "$title ${figures} $"
    assert "$title ${figures} $" in render(manifest)


def test_without_labels_agreement_is_shown(manifest: dict[str, Any]) -> None:
    manifest["metrics"]["accuracy"] = {"reference": None, "deployed": None}
    for entry in manifest["candidates"]:
        entry["accuracy"] = None
    page = render(manifest)
    text = " ".join(parsed(page).text)
    assert "Same answer as PyTorch against milliseconds" in page and "Accuracy against" not in page
    assert "points against PyTorch" not in text


def test_rejected_and_failed_candidates_are_shown_with_their_reason(manifest: dict[str, Any]) -> None:
    page = render(manifest)
    assert 'tr class="rejected"' in page and 'g class="point rejected"' in page
    assert "rejected: loses 49" in page and "on 50.00% of 10 images" in page
    assert "rejected: not installed" in page


def test_confusion_matrix_shows_every_count() -> None:
    counts = np.array([[5, 1, 0], [0, 4, 2], [3, 0, 7]])
    text = parsed(confusion_matrix(counts, ["a", "b", "c"])).text
    for wanted in ("a taken for b: 1 of 6", "c taken for a: 3 of 10", "b taken for b: 4 of 6"):
        assert wanted in text
    assert sorted(int(item) for item in text if item.isdigit()) == [1, 2, 3, 4, 5, 7]


def test_a_class_without_images_has_a_row_of_zeros() -> None:
    parsed(confusion_matrix(np.zeros((2, 2), np.int64), ["a", "b"]))


def test_many_classes_list_the_most_confused_pairs_instead(manifest: dict[str, Any]) -> None:
    classes = MAX_MATRIX_CLASSES + 1
    manifest["labels"] = [f"class {index}" for index in range(classes)]
    counts = np.eye(classes, dtype=np.int64) * 10
    counts[3, 7] = 4
    page = render(manifest, Evidence(confusion=counts))
    assert "Confusion matrix" not in page
    assert "<td>class 3</td><td>class 7</td>" in page and "4 of 14" in page
    perfect = render(manifest, Evidence(confusion=np.eye(classes, dtype=np.int64)))
    assert "No mistakes on these images." in perfect


def test_only_the_largest_layers_are_drawn_in_order(manifest: dict[str, Any]) -> None:
    bars = [Bar(f"layer{index:03}", index / 1000) for index in range(MAX_BARS + 20)]
    page = render(manifest, Evidence(layers=bars, layers_title="int8 against float32"))
    shown = re.findall(r"<title>(layer\d+)", page)
    assert shown == [bar.name for bar in bars[20:]]


@pytest.mark.parametrize("values", [[0.0], [0.0, float("inf")], [1e-12, 0.5], [1.0, 1.0]])
def test_bars_of_any_size_draw(values: list[float]) -> None:
    page = layer_bars([Bar("a", value) for value in values], "bars")
    assert "nan" not in page
    for width in re.findall(r'width="([\d.]+)"', page):
        assert 0 < float(width) < 800


@pytest.mark.parametrize("count", [1, 2, 8])
def test_points_of_any_spread_draw_inside_the_plot(count: int) -> None:
    points = [Point(f"p{index}", 0.01 * 3.0**index, 1 - 0.1 * index, "kept") for index in range(count)]
    page = accuracy_latency(points, "Accuracy", "ms", limit=0.5)
    for x, y in re.findall(r'cx="([-\d.]+)" cy="([-\d.]+)"', page):
        assert 64 <= float(x) <= 590 and 16 <= float(y) <= 352


def test_labels_are_moved_apart_and_keep_their_order() -> None:
    placed = _apart([50, 50, 50, 90], 17, 10, 100)
    assert sorted(placed) == placed and placed[-1] <= 100
    assert all(b - a >= 17 - 1e-9 for a, b in itertools.pairwise(placed))


def test_the_waterfall_tells_every_figure_in_words(manifest: dict[str, Any]) -> None:
    step = {"kind": "start", "accuracy": 0.91, "latency_ms": 4.0, "parameters": 10, "macs": None}
    manifest["steps"] = [step, step | {"kind": "low_rank", "latency_ms": 2.0, "accuracy": None}]
    page = render(manifest)
    assert_self_contained(page)
    labels = [attributes.get("aria-label") or "" for tag, attributes in parsed(page).tags if tag == "svg"]
    (label,) = [label for label in labels if label.startswith("Time and accuracy after each step")]
    assert (
        "dense 4 ms (100% of the first), accuracy 91.00%; low rank 2 ms (50% of the first); shipped" in label
    )
    assert "What each step did" not in render({key: manifest[key] for key in manifest if key != "steps"})
    manifest["steps"] = [step | {"latency_ms": None}]
    assert "Time and accuracy after each step" not in render(manifest), "no bar without a time"


def test_what_a_user_wrote_as_a_step_is_no_markup(manifest: dict[str, Any]) -> None:
    manifest["steps"] = [{"kind": EVIL, "accuracy": 0.5, "latency_ms": 1.0, "parameters": 1}]
    assert_self_contained(render(manifest))
