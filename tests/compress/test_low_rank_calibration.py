"""What layers see, and how much the answers care about their errors."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from cveff.compress import low_rank_calibration as calibration
from cveff.compress.low_rank_calibration import collect, sensitivities


def test_covariances_are_those_of_all_patches() -> None:
    torch.manual_seed(0)
    module = nn.Sequential(
        nn.Conv2d(2, 4, 3, stride=2, padding=1, dilation=1), nn.Flatten(), nn.Linear(64, 3)
    )
    images = torch.randn(6, 2, 8, 8) + 100  # a mean far above the deviation
    found = dict(collect(module.eval(), ["0", "2"], lambda: iter(images.split(4)), 6, 0))
    with torch.no_grad():
        rows = {
            "0": nn.functional.unfold(images.double(), 3, padding=1, stride=2).transpose(1, 2).flatten(0, 1),
            "2": module[0](images).flatten(1).double(),
        }
    for path, patches in rows.items():
        centred = patches - patches.mean(0)
        assert torch.allclose(found[path].mean, patches.mean(0), rtol=1e-5)
        expected = centred.T @ centred / len(patches)
        assert torch.allclose(found[path].covariance, expected, atol=1e-4 * float(expected.max()))
        assert found[path].count == len(patches)


def test_covariances_in_groups_that_fit_in_memory_are_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 8), nn.ReLU(), nn.Linear(8, 4)).eval()
    images = torch.randn(8, 1, 4, 4)
    passes = []

    def batches():
        passes.append(1)
        return iter([images])

    whole = dict(collect(module, ["1", "3"], batches, 8, 0))
    assert len(passes) == 1
    monkeypatch.setattr(calibration, "MEMORY", 1)
    parts = dict(collect(module, ["1", "3"], batches, 8, 0))
    assert len(passes) == 3
    assert all(torch.equal(whole[path].covariance, parts[path].covariance) for path in whole)


def test_sensitivity_predicts_the_divergence_of_the_answers() -> None:
    """White noise of variance v on a layer's output moves the answer by about `sensitivity · v` nats."""
    torch.manual_seed(0)
    module = nn.Sequential(nn.Flatten(), nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 5)).eval()
    images = torch.randn(4000, 1, 4, 4)
    cares = sensitivities(module, ["1", "3"], lambda: iter(images.split(500)), 4000, 0)
    for path, variance in (("1", 0.32), ("3", 0.05)):
        layer = module.get_submodule(path)
        handle = layer.register_forward_hook(
            lambda layer, inputs, output, variance=variance: (
                output + torch.randn_like(output) * (variance / output.shape[1]) ** 0.5
            )
        )
        with torch.no_grad():
            noisy = module(images).log_softmax(1)
            handle.remove()
            clean = module(images).log_softmax(1)
        divergence = float((clean.exp() * (clean - noisy)).sum(1).mean())
        assert cares[path] * variance == pytest.approx(divergence, rel=0.15)
