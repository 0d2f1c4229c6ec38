"""The ranks chosen are the best there are for the time they save."""

from __future__ import annotations

import itertools

import numpy as np

from cveff.compress.low_rank_choice import choose, saved
from cveff.compress.low_rank_options import LayerOptions, Option


def options(dense: float, *pairs: tuple[float, float]) -> LayerOptions:
    return LayerOptions(dense, tuple(Option("svd", (8,), time, loss, loss) for time, loss in pairs))


def test_the_choice_is_the_best_of_all_combinations() -> None:
    """Within what the relaxation can lose, against every combination tried out."""
    generator = np.random.default_rng(0)
    for _ in range(20):
        layers = {}
        for name in "abcd":
            times, losses = np.sort(generator.uniform(0.1, 0.9, 4)), np.sort(generator.uniform(0, 1, 4))[::-1]
            layers[name] = options(1.0, *zip(times.tolist(), losses.tolist(), strict=True))
        for saving in (0.3, 1.0, 1.7):
            chosen = choose(layers, saving)
            every = itertools.product(*([None, *layer.options] for layer in layers.values()))
            best = min(
                (
                    sum(option.loss for option in pick if option)
                    for pick in every
                    if sum(1.0 - option.milliseconds for option in pick if option) >= saving
                ),
                default=None,
            )
            assert (chosen is None) == (best is None)
            if chosen is not None:
                assert saved(layers, chosen) >= saving - 1e-6
                assert sum(option.loss for option in chosen.values()) <= best + 0.35


def test_the_choice_leaves_out_what_buys_nothing() -> None:
    layers = {"cheap": options(1.0, (0.5, 0.01)), "dear": options(1.0, (0.5, 5.0)), "none": options(1.0)}
    assert list(choose(layers, 0.4)) == ["cheap"]
    assert sorted(choose(layers, 0.9)) == ["cheap", "dear"]
    assert choose(layers, 1.1) is None
    assert choose(layers, 0.0) == {}
