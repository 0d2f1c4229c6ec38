"""Moments: what a peer computes from all rows at once, however they are divided."""

from __future__ import annotations

import pytest
import torch

from cveff.train.stitching.adapter import Adapter
from cveff.train.stitching.layout import Layout
from cveff.train.stitching.moments import Moments


def maps(count: int, x: int, y: int, seed: int = 0) -> tuple[torch.Tensor, torch.Tensor]:
    """Features that are partly related, with means far from 0 and channels of unlike sizes."""
    random = torch.Generator().manual_seed(seed)
    a = torch.randn(count, x, 3, 2, generator=random) * torch.logspace(-2, 2, x)[:, None, None] + 5
    mix = torch.randn(y, x, generator=random)
    b = torch.einsum("yx,nxhw->nyhw", mix, a) + 30 * torch.randn(count, y, 3, 2, generator=random) - 2
    return a, b


def rows(features: torch.Tensor) -> torch.Tensor:
    return features.movedim(1, -1).flatten(0, -2).double()


def of(a: torch.Tensor, b: torch.Tensor, batch: int = 7) -> Moments:
    moments = Moments((a.shape[1], b.shape[1]))
    for x, y in zip(a.split(batch), b.split(batch), strict=True):
        moments.add(x, y)
    return moments


def test_least_squares_is_lstsqs() -> None:
    a, b = maps(40, 6, 9)
    weight, error = of(a, b).least_squares()
    x, y = rows(a), rows(b)
    x, y = x - x.mean(0), y - y.mean(0)
    expected = torch.linalg.lstsq(x, y, driver="gelsd")
    # Both in float64; normal equations square the condition number, which is 1e4 here.
    torch.testing.assert_close(weight, expected.solution.T, rtol=1e-6, atol=1e-8)
    assert error == pytest.approx(float((x @ expected.solution - y).norm() ** 2 / y.norm() ** 2), rel=1e-6)
    assert 0.01 < error < 0.99


def test_least_squares_of_channels_that_repeat_or_are_dead() -> None:
    """Solutions are many, and their answers are one: that of lstsq."""
    a, b = maps(40, 6, 4)
    a = torch.cat([a, a[:, :2] * 2, torch.zeros_like(a[:, :1]), torch.full_like(a[:, :1], 3.0)], 1)
    weight, _ = of(a, b).least_squares()
    x, y = rows(a), rows(b)
    x, y = x - x.mean(0), y - y.mean(0)
    expected = x @ torch.linalg.lstsq(x, y, driver="gelsd").solution
    torch.testing.assert_close(x @ weight.T, expected, rtol=1e-5, atol=1e-5 * float(y.std()))
    assert weight[:, 8:].abs().max() == 0  # what never varies says nothing


def test_an_adapter_answers_the_solution() -> None:
    a, b = maps(40, 6, 9)
    adapter = Adapter(Layout("planes", 6, 3, 2), Layout("planes", 9, 3, 2)).eval()
    moments = of(a, b)
    adapter.fit(moments, None)
    x, y = rows(a), rows(b)
    solution = torch.linalg.lstsq(x - x.mean(0), y - y.mean(0), driver="gelsd").solution
    expected = (x - x.mean(0)) @ solution + y.mean(0)
    # float32 against float64.
    torch.testing.assert_close(rows(adapter(a)), expected, rtol=1e-3, atol=1e-4 * float(y.std()))
    # Training mode takes the batch's own statistics: of all images at once they are those of the solution.
    torch.testing.assert_close(rows(adapter.train()(a)), expected, rtol=1e-3, atol=1e-4 * float(y.std()))


def test_cka_is_that_of_kernels_and_does_not_see_batches() -> None:
    a, b = maps(30, 5, 4)
    x, y = rows(a), rows(b)
    centre = torch.eye(len(x), dtype=torch.float64) - 1 / len(x)
    k, m = centre @ x @ x.T @ centre, centre @ y @ y.T @ centre
    expected = float((k * m).sum() / (k.norm() * m.norm()))  # HSIC over kernels: the definition
    for batch in (1, 7, 30):
        assert of(a, b, batch).cka() == pytest.approx(expected, rel=1e-9)


def test_cka_is_1_for_rotated_features_and_0_for_constant_ones() -> None:
    a, _ = maps(30, 5, 4)
    turn = torch.linalg.qr(torch.randn(5, 5, generator=torch.Generator().manual_seed(1)))[0]
    turned = 3 * torch.einsum("yx,nxhw->nyhw", turn, a) + 1
    assert of(a, turned).cka() == pytest.approx(1, abs=1e-6)  # the rotation is float32
    assert of(a, torch.ones_like(a)).cka() == 0
    assert of(a, torch.randn(a.shape, generator=torch.Generator().manual_seed(2))).cka() < 0.1
