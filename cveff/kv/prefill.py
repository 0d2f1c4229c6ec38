"""A batch's prompt, sequence by sequence and without padding."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cveff.errors import CacheError
from cveff.kv.prompt import CHUNK, Prompt


def prompts(
    queries: Tensor,
    keys: Tensor,
    values: Tensor,
    sees: Tensor | None,
    tags: Tensor,
    scale: float,
    layer: int,
    num_layers: int,
) -> Iterator[Prompt]:
    """The sequences of a batch in one layer.

    Args:
        queries: (B, H · g, n, D). keys: (B, H, n, D). values: (B, H, n, E).
        sees: (B, n, n) bool, which tokens a query (row) sees; None for causal. Padding sees not even itself.
        tags: (B, n) uint8.
        scale: factor of the products.
        layer: index among the `num_layers` layers that are compressed.

    Raises:
        CacheError: a sequence is nothing but padding.
    """
    heads = keys.shape[1]
    for row in range(keys.shape[0]):
        mask: Tensor | None = None
        real: Tensor | slice = slice(None)
        if sees is not None:
            found = sees[row].diagonal().nonzero()[:, 0]
            if not len(found):
                raise CacheError(f"sequence {row} of the batch is nothing but padding; leave it out")
            first, last = int(found[0]), int(found[-1]) + 1
            # A slice is a view; picking tokens, where padding stands among them, is a copy.
            real = slice(first, last) if last - first == len(found) else found
            mask = sees[row, real][:, real]
        yield Prompt(
            queries=queries[row][:, real].unflatten(0, (heads, -1)),
            keys=keys[row][:, real],
            values=values[row][:, real],
            scale=scale,
            mask=None if mask is None or _is_causal(mask) else mask,
            tags=tags[row, real],
            layer=layer,
            num_layers=num_layers,
            row=row,
        )


def _is_causal(mask: Tensor) -> bool:
    """Whether a (n, n) bool mask is the lower triangle, read a chunk of rows at a time."""
    columns = torch.arange(mask.shape[1], device=mask.device)
    return all(
        torch.equal(mask[first : first + CHUNK], columns <= columns[first : first + CHUNK, None])
        for first in range(0, mask.shape[0], CHUNK)
    )
