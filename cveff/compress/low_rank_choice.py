"""The choice among layers' options: the least loss that saves enough milliseconds."""

from __future__ import annotations

from collections.abc import Mapping

from cveff.compress.low_rank_options import LayerOptions, Option


def saved(layers: Mapping[str, LayerOptions], chosen: Mapping[str, Option]) -> float:
    """Milliseconds that the chosen options save together, by the table."""
    return sum(layers[path].milliseconds - option.milliseconds for path, option in chosen.items())


def choose(layers: Mapping[str, LayerOptions], saving: float) -> dict[str, Option] | None:
    """The options with the smallest total loss whose layers together save `saving` milliseconds.

    A knapsack by Lagrangian bisection: at a price of λ a millisecond every layer decides alone; λ rises until the
    saving is met. What is saved beyond it is then given back where it spares most loss.

    Returns:
        path -> option; layers that stay as they are have none. None where even the fastest options save less.
    """
    open_layers = {path: layer for path, layer in layers.items() if layer.options}

    def decide(price: float) -> dict[str, Option]:
        chosen = {}
        for path, layer in open_layers.items():
            best = min(layer.options, key=lambda option: option.loss + price * option.milliseconds)
            if best.loss + price * best.milliseconds < price * layer.milliseconds:
                chosen[path] = best
        return chosen

    fastest = {path: layer.options[0] for path, layer in open_layers.items()}
    if saving <= 0:
        return {}
    if saved(layers, fastest) < saving * (1 - 1e-9):
        return None
    low, high, chosen = 0.0, 1.0, fastest
    for _ in range(200):
        if saved(layers, decide(high)) >= saving * (1 - 1e-9):
            break
        low, high = high, high * 4
    for _ in range(60):
        price = (low + high) / 2
        found = decide(price)
        if saved(layers, found) >= saving * (1 - 1e-9):
            high, chosen = price, found
        else:
            low = price
    return _give_back(open_layers, chosen, saved(layers, chosen) - saving)


def _give_back(
    layers: Mapping[str, LayerOptions], chosen: dict[str, Option], slack: float
) -> dict[str, Option]:
    """Take slower options with less loss while `slack` milliseconds allow it, the best bargain first."""
    chosen = dict(chosen)
    while True:
        bargains = [
            ((now.loss - loss) / time, path, option, time)
            for path, now in chosen.items()
            for option, loss, milliseconds in [
                *((option, option.loss, option.milliseconds) for option in layers[path].options),
                (None, 0.0, layers[path].milliseconds),
            ]
            if loss < now.loss and 0 < (time := milliseconds - now.milliseconds) <= slack
        ]
        if not bargains:
            return chosen
        _, path, option, time = max(bargains, key=lambda item: item[0])
        slack -= time
        if option is None:
            del chosen[path]
        else:
            chosen[path] = option
