"""Channels get back the mean, or mean and deviation, that they have in floats; the integers stay what they are."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, fx, nn

from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quant.layers import find_layers, observe, parameter, weight_rounding
from cveff.compress.quant.post_training import PostTraining, Quantized
from cveff.compress.quant.reestimate import MOST, Correction
from cveff.runtime.input_spec import InputSpec

SPEC = InputSpec(size=(12, 12), channels=3, mean=(0.0,) * 3, std=(1.0,) * 3)


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(3, 16, 3, padding=1),
        nn.SiLU(),
        nn.Conv2d(16, 16, 3, padding=1, groups=16, bias=False),
        nn.Conv2d(16, 8, 1),
        nn.ReLU(),
        nn.Flatten(),
        nn.Linear(8 * 144, 6),
    ).eval()


def images(seed: int = 0) -> list[Tensor]:
    return list(torch.rand(96, 3, 12, 12, generator=torch.Generator().manual_seed(seed)).split(32))


def quantized(correction: Correction | str) -> Quantized:
    work = PostTraining(method="minmax", weights="nearest", equalize=False, correction=correction)  # type: ignore[arg-type]
    return work.quantize(network(), SPEC, images())


def statistics(graph: fx.GraphModule, batches: list[Tensor]) -> dict[str, tuple[Tensor, Tensor]]:
    found: dict[str, tuple[Tensor, Tensor]] = {}

    def look(layer: object, _: Tensor, y: Tensor) -> None:
        rows = (y if y.ndim == 4 else y[..., None, None]).movedim(1, 0).flatten(1)
        found[layer.name] = (rows.mean(1), rows.std(1, correction=0))  # type: ignore[attr-defined]

    observe(graph, find_layers(graph), [torch.cat(batches)], look)
    return found


def gaps(found: Quantized) -> tuple[float, float]:
    """The largest differences of means and of deviations to the float network, over all layers and channels."""
    seen = [torch.cat(images())[:72]]  # the last quarter chooses
    ours, exact = statistics(found.graph, seen), statistics(found.exact, seen)
    mean = max(float((ours[name][0] - exact[name][0]).abs().max()) for name in exact)
    deviation = max(float((ours[name][1] / exact[name][1] - 1).abs().max()) for name in exact)
    return mean, deviation


def test_means_and_deviations_come_back() -> None:
    none, mean, both = (gaps(quantized(correction)) for correction in ("none", "mean", "statistics"))
    # Not exactly: a bias is kept in steps of its layer's sums, and what that moves is rounded otherwise further on.
    assert mean[0] < 0.05 * none[0]
    assert both[0] < 0.05 * none[0]
    assert both[1] < 0.3 * none[1]
    assert mean[1] == pytest.approx(none[1], rel=0.5)


def test_integers_stay_what_they_are() -> None:
    plain, found = quantized("none"), quantized("statistics")
    changed = 0
    for before, after in zip(find_layers(plain.graph), find_layers(found.graph), strict=True):
        first, second = weight_rounding(plain.graph, before), weight_rounding(found.graph, after)
        assert isinstance(first, FakeQuantize) and isinstance(second, FakeQuantize)
        weights = parameter(plain.graph, before.weight), parameter(found.graph, after.weight)
        assert torch.equal(first.integers(weights[0]), second.integers(weights[1]))
        ratio = second.scale / first.scale
        assert bool((ratio <= MOST * 1.0001).all() and (ratio >= 0.9999 / MOST).all())
        changed += int((ratio != 1).sum())
    assert changed > 0


def test_auto_takes_what_changes_the_logits_least() -> None:
    errors = {correction: quantized(correction).error for correction in ("none", "mean", "statistics")}
    found = quantized("auto")
    assert found.error == min(errors.values())
    assert errors[found.correction] == found.error


def test_what_another_quantizer_gets_is_not_corrected() -> None:
    plain, found = quantized("none"), quantized("statistics")
    corrected = {name: value.clone() for name, value in found.graph.state_dict().items()}
    expected = plain.graph.state_dict()
    with found.uncorrected() as graph:
        assert all(torch.equal(value, expected[name]) for name, value in graph.state_dict().items())
    assert all(torch.equal(value, corrected[name]) for name, value in found.graph.state_dict().items())
    with plain.uncorrected() as graph:
        assert all(torch.equal(value, expected[name]) for name, value in graph.state_dict().items())
