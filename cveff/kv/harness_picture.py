"""A picture of what every head keeps: layers × heads."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cveff.errors import CacheError
from cveff.runtime.files import atomic_path


def kept_shares(cache: Any) -> tuple[list[int], list[list[float]]]:
    """Layers' indices in the model, and the share each key-value head keeps, a list a layer, mean over the batch.

    Raises:
        CacheError: the cache has seen nothing.
    """
    kept = cache.kept()
    if not kept:
        raise CacheError("the cache is empty; generate something first")
    shares = []
    for index, rows in kept.items():
        seen = cache.compressed[index].kv.seen
        columns = zip(
            *([length / n for length in row] for row, n in zip(rows, seen, strict=True)), strict=True
        )
        shares.append([sum(column) / len(seen) for column in columns])
    return list(kept), shares


def heat_map(cache: Any, path: str | Path, title: str = "") -> None:
    """Draw the share of tokens that every head keeps; the file's ending (.svg, .png, .pdf) says the format.

    Args:
        cache: a compressed cache after generating.
        path: file to write.
        title: above the picture; by default the policy.

    Raises:
        CacheError: the cache is empty.
    """
    from matplotlib.figure import Figure

    layers, shares = kept_shares(cache)
    path = Path(path)
    figure = Figure(figsize=(2.5 + 0.35 * len(shares[0]), 1.5 + 0.3 * len(layers)), layout="constrained")
    axes = figure.subplots()
    image = axes.imshow(shares, vmin=0, vmax=1, aspect="auto", cmap="viridis")
    axes.set(xlabel="key-value head", ylabel="layer", title=title or type(cache.policy).__name__)
    axes.set_xticks(range(len(shares[0])))
    axes.set_yticks(range(len(layers)), [str(layer) for layer in layers])
    figure.colorbar(image, label="tokens kept")
    with atomic_path(path) as temporary:
        figure.savefig(temporary, format=path.suffix.removeprefix(".") or "svg")
