"""The benchmarks' own arithmetic and bookkeeping, and that the committed results say how they were made."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace

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
    "early_exit",
    "glance_focus",
    "cascade",
    "choices",
    "prune_quality",
    "latency_goals",
    "compress_chain",
    "elastic",
    "latency_table",
    "trt_check",
    "typed_graphs",
    "autocast",
    "weight_only",
    "quantize_peers",
    "repairs",
    "budget",
    "data_efficiency",
    "galore",
    "kv_cache",
    "kv_cache_peer",
    "gather_mlp",
    "decode_attention",
    "contextual_sparsity",
    "token_reduction",
    "incubation",
    "assemble",
    "growth",
    "distributed",
)
RESULTS = sorted((ROOT / "model_zoo" / "results").glob("*.json"))


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


def test_perplexity_counts_every_token_but_a_windows_first(benchmark_module) -> None:
    subject = benchmark_module("weight_only")

    class Uniform(torch.nn.Module):
        def forward(self, input_ids: torch.Tensor, use_cache: bool) -> SimpleNamespace:
            return SimpleNamespace(logits=torch.zeros(*input_ids.shape, 7))

    found = subject.perplexity(Uniform(), [torch.zeros(5, dtype=torch.long), torch.ones(3, dtype=torch.long)])
    assert found == {"perplexity": pytest.approx(7), "tokens": 6}


def test_a_view_counts_with_all_the_memory_it_holds(benchmark_module) -> None:
    subject = benchmark_module("galore")
    parameter = torch.nn.Parameter(torch.zeros(4, 4))
    optimizer = torch.optim.SGD([parameter])
    whole = torch.zeros(100)
    optimizer.state[parameter] = {
        "a": whole[:2],
        "b": whole[50:],
        "projector": SimpleNamespace(m=torch.zeros(3)),
    }
    assert subject.state_bytes(optimizer) == 412


@pytest.mark.parametrize("name", ["full", "h2o 0.5", "snapkv 0.25, 4 bits"])
def test_cache_bytes_are_the_formula(name: str, benchmark_module) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    found = benchmark_module("kv_cache_parts").measure_memory(name, 256, 2)
    assert found["live_nbytes"] == found["formula"] <= found["nbytes"]
    assert found["full_nbytes"] == 2 * 272 * 8 * 8 * 2 * 64 * 4


def test_attention_is_timed_in_turns(benchmark_module) -> None:
    found = benchmark_module("kv_cache_parts").attention_times(128, rounds=2)
    assert found["full"]["ratio"] == 1
    assert set(found) == {"full", "half", "quarter", "half, FastGen's local and frequent"}


def test_weights_are_rotated_over_more_than_the_caches(benchmark_module) -> None:
    subject = benchmark_module("kernel_timing")
    for size in (1e3, 5e6, 64e6, 1e9):
        assert subject.copies(size) * size > subject.ROTATED and subject.copies(size) >= 2
    calls: list[tuple[str, int]] = []
    ways = {name: lambda copy, name=name: calls.append((name, copy)) for name in ("a", "b")}
    found = subject.in_turns(ways, "a", 7, 3)
    assert found["a"]["times_as_fast"] == 1 and len(calls) == 2 * 3 * 8
