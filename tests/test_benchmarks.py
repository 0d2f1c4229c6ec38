"""The benchmarks' own arithmetic and bookkeeping, and that the committed results say how they were made."""

from __future__ import annotations

import importlib
import json
import sys
from pathlib import Path
from types import ModuleType, SimpleNamespace

import numpy as np
import pytest
import torch

import cveff
from cveff.compress.quant.post_training import PostTraining
from cveff.data.augment import normalize
from cveff.runtime.input_spec import InputSpec
from cveff.runtime.preprocess import preprocess

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "tools" / "benchmarks"
SCRIPTS = (
    "engines",
    "aot_engines",
    "lite0",
    "fashion_mnist",
    "digits",
    "startup",
    "distill",
    "importance",
    "low_rank",
    "sparsity",
    "choices",
    "prune_quality",
    "latency_goals",
    "compress_chain",
    "elastic",
    "latency_table",
    "trt_check",
    "typed_graphs",
    "weight_only",
    "quantize_peers",
    "repairs",
)
HELPERS = (
    "architectures",
    "choices_onnxruntime",
    "choices_openvino",
    "choices_rest",
    "common",
    "dense_models",
    "emulated",
    "latency_table_models",
    "latency_table_slimmed",
    "modelopt_peer",
    "peers",
    "photos",
    "quantize_aware",
    "quantize_networks",
    "quantize_summary",
    "quantize_tools",
    "torch_pruning_peer",
    "trained",
    "weight_only_vit",
    "workshop",
)
RESULTS = sorted((ROOT / "model_zoo" / "results").glob("*.json"))


@pytest.fixture
def benchmark_module(monkeypatch: pytest.MonkeyPatch):
    """Import a script of tools/benchmarks as if it ran there."""
    monkeypatch.syspath_prepend(str(FOLDER))

    def load(name: str) -> ModuleType:
        return importlib.import_module(name)

    yield load
    for name in [*SCRIPTS, *HELPERS]:
        sys.modules.pop(name, None)


@pytest.mark.parametrize("name", SCRIPTS)
def test_help_explains_itself(
    name: str, benchmark_module, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", [f"{name}.py", "--help"])
    with pytest.raises(SystemExit) as stop:
        benchmark_module(name).main()
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "--quick" in text and "--out" in text


@pytest.mark.parametrize("path", RESULTS, ids=lambda path: path.name)
def test_committed_results_say_how_they_were_made(path: Path) -> None:
    values = json.loads(path.read_text(encoding="utf-8"))
    assert values["command"].startswith("python tools/")
    assert " /" not in values["command"] and "=/" not in values["command"]  # no path of one machine
    assert "torch" in values["versions"] and "cpu" in values["machine"]
    assert "--quick" not in values["command"]


def test_results_grow_and_go_on_only_with_the_same_settings(
    tmp_path: Path, benchmark_module, monkeypatch: pytest.MonkeyPatch
) -> None:
    common = benchmark_module("common")
    monkeypatch.setattr(sys, "argv", ["x", "--weights", "/somewhere/far/model"])
    script = str(FOLDER / "lite0.py")
    first = common.Results(tmp_path / "r.json", script, {"seeds": [0]})
    assert first.values["command"] == "python tools/benchmarks/lite0.py --weights model"
    first.values["cells"] = {"a": 1}
    first.save()
    assert common.Results(tmp_path / "r.json", script, {"seeds": [0]}).values["cells"] == {"a": 1}
    assert "cells" not in common.Results(tmp_path / "r.json", script, {"seeds": [1]}).values
    assert "cells" not in common.Results(tmp_path / "r.json", script, {"seeds": [0]}, fresh=True).values


def test_no_photograph_is_on_both_sides(benchmark_module) -> None:
    photos = benchmark_module("photos")
    everything = photos.photographs()
    assert len({photo.name for photo in everything}) == len(everything) == 18
    for seed in range(4):
        first, second = photos.split(everything, seed)
        assert {p.scene for p in first}.isdisjoint(p.scene for p in second)
        assert sorted(p.name for p in first + second) == sorted(p.name for p in everything)
        assert abs(len(first) - len(second)) <= 2
    # The stereo pair is one scene.
    assert len({p.scene for p in everything if p.name.startswith("motorcycle")}) == 1


def test_crops_are_the_same_again_and_come_unchanged_through_a_folder(
    tmp_path: Path, benchmark_module
) -> None:
    photos = benchmark_module("photos")
    spec = InputSpec(size=(64, 48), mean=(0.5,) * 3, std=(0.5,) * 3, crop=0.875)
    everything = photos.photographs()
    images = photos.crops(everything, 20, spec, seed=3)
    again = photos.crops(everything, 20, spec, seed=3)
    assert all(np.array_equal(a, b) for a, b in zip(images, again, strict=True))
    assert not np.array_equal(images[0], photos.crops(everything, 1, spec, seed=4)[0])
    folder = photos.write_folder(images, tmp_path / "images")
    paths = sorted(folder.iterdir())
    assert np.array_equal(preprocess(paths, spec), preprocess(images, spec))
    # Cut, not resized: the centre of the crop itself.
    height, width = images[0].shape[:2]
    top, left = round((height - 64) / 2), round((width - 48) / 2)
    assert np.array_equal(preprocess(images[:1], spec)[0], images[0][top : top + 64, left : left + 48])


def test_peers_get_the_pixels_the_bundle_computes(benchmark_module) -> None:
    peers = benchmark_module("peers")
    spec = InputSpec(size=(4, 5), mean=(0.1, 0.2, 0.3), std=(0.5, 0.6, 0.7))
    images = np.random.default_rng(0).integers(0, 256, (2, 4, 5, 3), np.uint8)
    x = peers.normalised(images, spec)
    assert x.shape == (2, 3, 4, 5) and x.dtype == np.float32
    expected = (images[1, 3, 2, 1] / 255 - 0.2) / 0.6
    assert x[1, 1, 3, 2] == pytest.approx(expected, rel=1e-6)


def test_lite0_counts_agreement_over_all_seeds(benchmark_module) -> None:
    lite0 = benchmark_module("lite0")
    reference = np.eye(4, dtype=np.float32)
    half = reference[[0, 1, 3, 2]]
    row = lite0.compare(half, reference)
    assert (row["same"], row["crops"], row["cosine"]) == (2, 4, 0.5)
    assert lite0.compare(reference, reference)["cosine"] == 1
    rows = {name: {"same": 1, "crops": 4, "cosine": 0.5} for name in [*lite0.ONNXRUNTIME, *lite0.NNCF]}
    by_seed = {
        "0": {"rows": rows | {lite0.OURS: {"same": 2, "crops": 4, "cosine": 0.5}}},
        "1": {"rows": rows | {lite0.OURS: {"same": 0, "crops": 4, "cosine": 0.7}}},
    }
    summary = lite0.summary(by_seed)
    assert (summary["agreement"], summary["best_peer_agreement"], summary["crops"]) == (0.25, 0.25, 8)
    assert summary["passes"] is True
    by_seed["1"]["rows"]["NNCF int8, mixed"] = {"same": 2, "crops": 4, "cosine": 0.5}
    assert lite0.summary(by_seed)["passes"] is False
    assert lite0.summary(by_seed)["best_peer"] == "NNCF int8, mixed"


def test_engines_ratio_is_that_of_the_peer_closest_to_winning(
    benchmark_module, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With a clock that the predictors move, the ratio is exact."""
    engines = benchmark_module("engines")
    now = [0.0]
    compare = engines.compare
    monkeypatch.setattr(engines, "compare", lambda *a, **k: compare(*a, **{**k, "clock": lambda: now[0]}))

    def takes(seconds: float):
        def call(_: np.ndarray) -> np.ndarray:
            now[0] += seconds
            return np.zeros((1, 2), np.float32)

        return call

    class Arguments:
        threads, seconds = 1, 1.0

    images = np.zeros((1, 2, 2, 3), np.uint8)
    opened = {"slow": takes(0.04), "quick": takes(0.009)}
    cell = engines.times(opened, takes(0.01), images, images.astype(np.float32), Arguments)
    assert cell["best_peer"] == "quick" and cell["passes"] is False
    assert cell["best_peer_over_cveff"] == pytest.approx(0.9)
    assert cell["latency_ms"][engines.OURS]["median"] == pytest.approx(10)
    summary = engines.summary({"m": {"1": cell, "8": {**cell, "passes": True, "best_peer_over_cveff": 1.5}}})
    assert (summary["cells"], summary["passed"]) == (2, 1)
    assert summary["smallest_ratio"] == pytest.approx(0.9)


def test_fashion_mnist_needs_every_bar(benchmark_module) -> None:
    fashion = benchmark_module("fashion_mnist")
    good = {"parameters": 84154, "int8_accuracy": {"mean": 0.93}, "loss_points": {"largest": 0.3}}
    assert fashion._verdict("small", good) == {"passes": True}
    for change in (
        {"parameters": 100_000},
        {"int8_accuracy": {"mean": 0.9299}},
        {"loss_points": {"largest": 0.31}},
    ):
        assert fashion._verdict("small", {**good, **change}) == {"passes": False}


def test_seeds_are_summed_up_as_mean_and_range(benchmark_module) -> None:
    trained = benchmark_module("trained")
    base = {"images": 10, "parameters": 5, "fp32_accuracy": 0.9, "loss_points": 0.0, "int8_bytes": 7}
    values = trained.summary({"0": {**base, "int8_accuracy": 0.92}, "1": {**base, "int8_accuracy": 0.94}})
    assert values["int8_accuracy"]["mean"] == pytest.approx(0.93)
    assert values["int8_accuracy"]["spread"] == pytest.approx(0.02)
    assert (values["runs"], values["images"], values["int8_bytes"]["largest"]) == (2, 10, 7)


def test_heads_of_a_graph_compute_the_same(tmp_path: Path, benchmark_module) -> None:
    """However normalisation is written, in float32 and in int8: what is compared is time alone."""
    choices = benchmark_module("choices_onnxruntime")
    model = cveff.create("small_resnet_s", num_classes=10, image_size=16, channels=3)
    source = cveff.export(model, tmp_path / "model.onnx")
    images = np.random.default_rng(0).integers(0, 256, (4, 16, 16, 3), np.uint8)
    rounded = PostTraining().quantize(model.module, model.spec.input, [normalize(images, model.spec.input)])
    for path in (source, cveff.export(rounded.of(model), tmp_path / "int8.onnx")):
        logits = [
            choices.open_plain(
                choices.with_head(path, head),
                choices.floats_of(path, images) if head == choices.FLOAT else images,
            )()(images)
            for head in choices.heads(path)
        ]
        assert np.ptp(logits[0]) > 0
        for other in logits[1:]:
            np.testing.assert_allclose(other, logits[0], rtol=1e-5, atol=1e-6)


def test_errors_are_relative_to_what_differs_between_images(benchmark_module) -> None:
    workshop = benchmark_module("workshop")
    expected = np.array([[1.0, 0.0], [-1.0, 0.0]])
    shared = np.array([[100.0, 100.0]])
    assert workshop.centred_cosine(expected, expected + shared) == pytest.approx(1)
    assert workshop.centred_cosine(-expected, expected) == pytest.approx(-1)
    assert workshop.variation_error(0.9 * expected + shared, expected + shared) == pytest.approx(0.1)


def test_weight_only_passes_only_with_every_bar(benchmark_module) -> None:
    subject = benchmark_module("weight_only")
    near = {subject.NEAREST: {"perplexity_ratio": 1.3}}
    ours = {"perplexity_ratio": 1.15, "size_ratio": 0.35}
    assert subject.summary({**near, subject.BARRED: ours})["passes"] is True
    for change in ({"perplexity_ratio": 1.16}, {"size_ratio": 0.36}):
        assert subject.summary({**near, subject.BARRED: {**ours, **change}})["passes"] is False
    better = {subject.NEAREST: {"perplexity_ratio": 1.14}}
    assert subject.summary({**better, subject.BARRED: ours})["passes"] is False
    assert subject.summary({subject.BARRED: ours}) == {}


def test_perplexity_counts_every_token_but_a_windows_first(benchmark_module) -> None:
    subject = benchmark_module("weight_only")

    class Uniform(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))

    found = subject.perplexity(Uniform(), [torch.zeros(5, dtype=torch.long), torch.ones(3, dtype=torch.long)])
    assert found == {"perplexity": pytest.approx(7), "tokens": 6}


def test_elastic_passes_only_with_every_bar(benchmark_module) -> None:
    elastic = benchmark_module("elastic")
    cells = {f"0 {width:g}": {"elastic": 0.90, "alone": 0.904} for width in elastic.WIDTHS}
    cells |= {"0 cost": {"macs": 1.9, "seconds": 2.0}}
    cells |= {"0 evolution": {"held_out": 0.91}, "0 random": {"held_out": 0.90}}
    assert all(bar["passes"] for bar in elastic.bars(cells, [0]).values())
    for cell, change, bar in [
        ("0 0.25", {"elastic": 0.898}, "points_lost"),
        ("0 cost", {"seconds": 2.1}, "cost"),
        ("0 random", {"held_out": 0.91}, "points_gained_by_evolution"),
    ]:
        found = elastic.bars({**cells, cell: cells[cell] | change}, [0])
        assert [name for name, value in found.items() if not value["passes"]] == [bar]
