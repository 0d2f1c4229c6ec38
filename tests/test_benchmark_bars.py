"""What each benchmark passes by: every bar, and nothing less."""

from __future__ import annotations

import numpy as np
import pytest
import torch


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


def test_early_exit_passes_only_with_every_bar(benchmark_module) -> None:
    subject = benchmark_module("early_exit")
    good = {"full_accuracy": 0.93, "accuracy": 0.927, "share": {"1": 0.55, "8": 0.75}}
    assert subject.verdict(good)["passes"] is True
    for change in ({"accuracy": 0.9269}, {"share": {"1": 0.56, "8": 0.7}}, {"share": {"1": 0.5, "8": 0.76}}):
        found = subject.verdict({**good, **change})
        assert found["passes"] is False and len(found["missed"]) == 1


def test_glancing_passes_only_where_the_plain_network_is_slower_or_worse(benchmark_module) -> None:
    subject = benchmark_module("glance_focus")
    items = [
        {"name": name, "batch": batch, "median_ms": ms, "accuracy": accuracy}
        for batch in (1, 8)
        for name, ms, accuracy in (("plain", 2.0, 0.90), ("activation", 1.5, 0.89), ("learned", 2.5, 0.91))
    ]
    good = {"subjects": items, "points_lost": {"activation": 0.3, "learned": 0.1}}
    assert subject.verdict(good)["passes"] is True
    slow = [{**item, "median_ms": 2.0} if item["name"] == "activation" else item for item in items]
    assert subject.verdict({**good, "subjects": slow})["missed"] == [
        f"activation: the plain network is as fast and as accurate at batch {batch}" for batch in (1, 8)
    ]
    lost = {"activation": 0.3, "learned": 0.31}
    assert subject.verdict({**good, "points_lost": lost})["missed"] == ["learned: 0.31 points lost > 0.3"]


def test_scenes_hold_the_garment_and_pieces_of_others(benchmark_module) -> None:
    subject = benchmark_module("glance_focus")
    garments = np.random.default_rng(0).integers(1, 256, (5, 28, 28, 1), np.uint8)
    found, corners = subject.scenes(garments, side=64, seed=3)
    assert found.shape == (5, 64, 64, 1) and found.dtype == np.uint8
    for scene, garment, (top, left) in zip(found, garments, corners, strict=True):
        assert np.array_equal(scene[top : top + 28, left : left + 28], garment)
        assert (scene > 0).sum() > 28 * 28
    assert np.array_equal(subject.scenes(garments, side=64, seed=3)[0], found)


def test_a_cascade_must_be_on_the_front_and_its_alarm_right(benchmark_module) -> None:
    subject = benchmark_module("cascade")
    items = [("small", 1.0, 0.90), ("large", 3.0, 0.95), ("cascade", 1.5, 0.949)]
    subjects = [{"name": n, "batch": 1, "median_ms": ms, "accuracy": a} for n, ms, a in items]
    streams = {"clean": {"alarms": 0}, "noise": {"alarms": 2}, "digits": {"alarms": 1}}
    assert subject.verdict({"subjects": subjects, "drift": streams})["passes"] is True
    worse = [*subjects[:2], {**subjects[2], "median_ms": 3.1}]
    assert subject.verdict({"subjects": worse, "drift": streams})["missed"] == [
        "large is as fast and as accurate at batch 1"
    ]
    for name, alarms in (("clean", 1), ("noise", 0), ("digits", 0)):
        found = subject.verdict({"subjects": subjects, "drift": {**streams, name: {"alarms": alarms}}})
        assert len(found["missed"]) == 1


def test_a_budget_passes_on_time_accurate_and_better_than_epochs(benchmark_module) -> None:
    budget = benchmark_module("budget")

    def cell(seconds: float, accuracy: float, fixed: float) -> dict:
        consumed = {"epochs": 6.5, "evaluation_share": 0.02}
        return {
            "budget": {"seconds": seconds, "accuracy": accuracy, "consumed": consumed},
            "fixed": {"seconds": 290.0, "accuracy": fixed, "consumed": consumed},
        }

    assert budget.summary("5m", [cell(303, 0.91, 0.90), cell(297, 0.91, 0.90)])["missed"] == []
    assert budget.summary("5m", [cell(300, 0.91, 0.90), cell(307, 0.91, 0.90)])["missed"] == ["on time"]
    assert budget.summary("5m", [cell(293, 0.90, 0.89)])["missed"] == ["on time", "accuracy"]
    assert budget.summary("10m", [cell(600, 0.93, 0.94)])["missed"] == ["better than epochs of the same cost"]


def test_a_selection_must_equal_all_images_and_beat_chance(benchmark_module) -> None:
    subject = benchmark_module("data_efficiency")
    names = list(subject.cells("samples", 8))

    def found(**accuracy: float) -> dict:
        return {
            f"{name}, seed 0": {
                "accuracy": accuracy.get(name.split(",")[0].replace(" ", "_"), 0.90),
                "proxy_samples": 10,
                "consumed": {
                    "samples": 100 if name == "all images" else 75,
                    "seconds": 11.0,
                    "evaluation_seconds": 1.0,
                },
            }
            for name in names
        }

    good = subject.summary("samples", names, found(el2n=0.93, all_images=0.93), [0])
    assert good["winners"] == ["el2n, 75%", "el2n, 60%"] and good["missed"] == []
    row = good["rows"]["el2n, 75%"]
    assert (row["share"], row["share_with_proxy"], row["speed"]) == (0.75, 0.85, 0.75)
    chance = subject.summary("samples", names, found(el2n=0.93, all_images=0.93, random=0.935), [0])
    assert chance["winners"] == [] and len(chance["missed"]) == 1
    tokens = {
        f"{name}, seed 0": {
            "accuracy": accuracy,
            "proxy_samples": 0,
            "consumed": {"samples": 100, "seconds": seconds, "evaluation_seconds": 0.0},
        }
        for name, accuracy, seconds in zip(
            subject.cells("tokens", 8), (0.9, 0.898, 0.89), (13.0, 10.0, 10.0), strict=True
        )
    }
    verdict = subject.summary("tokens", list(subject.cells("tokens", 8)), tokens, [0])
    assert verdict["missed"] == [] and verdict["rows"]["dropped"]["speed"] == pytest.approx(1.3)


def test_galore_passes_only_with_every_bar(benchmark_module) -> None:
    subject = benchmark_module("galore")
    cells = {"AdamW": {"0": 0.93, "1": 0.92}, subject.OURS: {"0": 0.927, "1": 0.918}}
    good = {
        "memory": {"bytes": {"AdamW": 100, subject.OURS: 40, subject.OURS_8BIT: 15}},
        "time": {"step_over_adamw": {subject.OURS: 1.15}},
        "accuracy": cells,
    }
    found = subject.summary(good)
    assert found["passes"] and found["figures"]["points"] == pytest.approx(0.25)
    worse = {
        "memory": {"bytes": {"AdamW": 100, subject.OURS: 41, subject.OURS_8BIT: 15}},
        "time": {"step_over_adamw": {subject.OURS: 1.16}},
        "accuracy": cells | {subject.OURS: {"0": 0.92, "1": 0.92}},
    }
    for name, value in worse.items():
        assert subject.summary({**good, name: value})["missed"] == ["points" if name == "accuracy" else name]
    unequal = subject.summary({**good, "accuracy": cells | {subject.OURS: {"0": 0.93}}})
    assert unequal["missing"] == ["points"] and not unequal["passes"]


def test_the_caches_bars_are_read_from_rows(benchmark_module) -> None:
    pytest.importorskip("transformers", minversion="5.23")
    row = {"removed": 0.35, "perplexity": 10.05}
    rows = {
        "full": {"removed": 0.0, "perplexity": 10.0},
        "fastgen 0.98": row,
        "h2o at fastgen 0.98": {"removed": 0.35, "perplexity": 11.0},
        "random at fastgen 0.98": {"removed": 0.35, "perplexity": 10.04},
    }
    values = {"quality": {"llama/code": rows}, "attention": {"half": {"ratio": 0.7}}}
    found = benchmark_module("kv_cache").summary(values)
    assert found["llama/code"]["fastgen 0.98"]["passes"]
    assert found["llama/code"]["fastgen 0.98"]["better"] == ["random at fastgen 0.98"]
    assert not found["attention at half"]["passes"]
    row["removed"] = 0.2
    assert not benchmark_module("kv_cache").summary(values)["llama/code"]["fastgen 0.98"]["passes"]


def test_the_gathered_mlp_passes_only_with_every_bar(benchmark_module) -> None:
    subject = benchmark_module("gather_mlp")
    ways = {f"ours, {kept} kept": {"times_as_fast": bar} for kept, bar in subject.BARS.items()}
    assert all(bar["passes"] for bar in subject.summary({subject.BARRED: ways}).values())
    slower = ways | {"ours, 0.25 kept": {"times_as_fast": 2.99}}
    passes = {kept: bar["passes"] for kept, bar in subject.summary({subject.BARRED: slower}).items()}
    assert passes == {"1.0": True, "0.5": True, "0.25": False}
    assert subject.summary({}) == {}


def test_half_a_cache_passes_at_its_share_of_the_time(benchmark_module) -> None:
    subject = benchmark_module("decode_attention")
    ways = {"ours, 1.0 kept": {"ms": 2.0}, "ours, 0.5 kept": {"ms": 1.3}}
    assert subject.summary({subject.BARRED: {subject.CONTEXT: ways}})["passes"] is True
    slower = ways | {"ours, 0.5 kept": {"ms": 1.31}}
    assert subject.summary({subject.BARRED: {subject.CONTEXT: slower}})["passes"] is False
    assert subject.summary({}) == {}
    cache = [torch.randn(2, 4, 100, 8)]
    keys, _, offsets, lengths = subject.ragged(cache, cache, 0.5)
    assert int(lengths.sum()) == 400 and len(keys[0]) == 400 and offsets.tolist()[-1] == 400
    assert torch.equal(keys[0][: int(lengths[0])], cache[0][0, 0, : int(lengths[0])])


def test_the_predictor_passes_only_before_hot_and_random_neurons(benchmark_module) -> None:
    subject = benchmark_module("contextual_sparsity")
    rows = {
        f"{name} 0.5": {"recall": recall, "perplexity": perplexity}
        for name, recall, perplexity in (("predictor", 0.7, 20.0), ("hot", 0.6, 25.0), ("random", 0.5, 90.0))
    }
    assert subject.summary(rows)["0.5"]["passes"] is True and list(subject.summary(rows)) == ["0.5"]
    for change in ({"recall": 0.6}, {"perplexity": 25.0}):
        worse = rows | {"predictor 0.5": {**rows["predictor 0.5"], **change}}
        assert subject.summary(worse)["0.5"]["passes"] is False


def test_incubation_passes_only_with_every_bar(benchmark_module) -> None:
    subject = benchmark_module("incubation")
    base = {
        "accuracy": 0.9,
        "flops": 1e15,
        "seconds": 100.0,
        "critical_path_seconds": 100.0,
        "resumed": False,
    }
    ours = {**base, "critical_path_seconds": 45.0, "frozen": True}

    def judged(**changes: object) -> dict:
        return subject.summary({"incubated, seed 0": {**ours, **changes}, "end to end, seed 0": base}, [0])

    assert judged()["passes"] and judged()["critical_path_ratio"] == pytest.approx(0.45)
    for change in ({"accuracy": 0.89}, {"flops": 1.1e15}, {"critical_path_seconds": 51.0}, {"frozen": False}):
        assert judged(**change)["passes"] is False
    assert "resumed" in subject.missed(judged(resumed=True))[0]


def test_assembling_must_beat_random_adapters_and_the_weakest_parent(benchmark_module) -> None:
    subject = benchmark_module("assemble")

    def judged(tuned: float) -> dict:
        accuracy = {"small_resnet_m": 0.9, "resnet18": 0.92, "vit": 0.85, "random, tuned": 0.88}
        rows = {
            name: {"accuracy": value, "parameters": 5, "epochs": 3}
            for name, value in {**accuracy, "least-squares, tuned": tuned}.items()
        }
        return subject.summary([{"rows": rows}, {"rows": rows}])

    assert judged(0.91)["passes"] and judged(0.91)["over_best_parent"] == pytest.approx(-0.01)
    assert "random adapters end 2.00 points" in subject.missed(judged(0.86))[0]
    assert "3.00 points less accurate than its weakest" in subject.missed(judged(0.82))[1]


def test_ranks_must_follow_one_processs_losses(benchmark_module) -> None:
    subject = benchmark_module("distributed")
    runs = {"net, one process": {"losses": [[2.0, 1.0]]}, "net, ddp": {"losses": [[2.0, 1.005]]}}
    assert subject.missed(runs) == []
    runs["net, fsdp2"] = {"losses": [[2.05, 1.0]]}
    assert subject.missed(runs) == ["net, fsdp2: a loss differs by 2.50%, the bar is 1%"]


def test_growth_passes_only_with_every_bar(benchmark_module) -> None:
    subject = benchmark_module("growth")
    rates = (1e-3, 2e-3)
    cells = {
        f"{rule}, width {width}, rate {rate:g}": {
            "loss": 1e7 / width / 1e6 + (rate != best),
            "flops": 1e12 * width,
        }
        for rule, best in (("µP", 1e-3), ("standard", 2e-3))
        for width in (*subject.SMALL, subject.LARGE)
        for rate in rates
    }
    cells["from scratch, seed 0"] = {"accuracy": 0.9, "flops": 1e15}
    grown = {"accuracy": 0.9, "flops": 0.7e15, "masks_left": 0, "same_spec": True}

    def judged(**changes: object) -> dict:
        return subject.summary({**cells, "grown, seed 0": {**grown, **changes}}, [0], rates)

    assert judged()["passes"] and judged()["transfers"]
    assert judged()["foretold_error"] == pytest.approx(0, abs=1e-3)
    for change in ({"accuracy": 0.89}, {"flops": 0.78e15}, {"masks_left": 1}, {"same_spec": False}):
        assert judged(**change)["passes"] is False
    cells[f"µP, width {subject.LARGE}, rate 0.002"]["loss"] = 0.0
    assert judged()["passes"] is False


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
