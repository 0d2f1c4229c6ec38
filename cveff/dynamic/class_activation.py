"""Where in an image a classifier sees its class: class activation (Zhou et al., CVPR 2016, equation 2) for any head.

The head is given one position's features in place of all. For a mean and a linear layer these are the paper's maps and
the bias; for the class token's head it asks what a patch's token alone would be called (Vilas et al., NeurIPS 2023,
arXiv:2310.18969, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from cveff.dynamic.exits import num_prefix_tokens
from cveff.errors import StepError

Pair = tuple[int, int]


def class_activation(network: nn.Module, features: Tensor, logits: Tensor, view: Pair) -> Tensor:
    """The found class's logit at every position.

    Args:
        network: has timm's `forward_head`.
        features: its `forward_features` of views; see `positions`.
        logits: (N, classes) of the same views.
        view: (height, width) of a view.

    Returns:
        (N, h, w) float, without a gradient.

    Raises:
        StepError: as `positions`.
    """
    vectors, (height, width) = positions(network, features, view)
    batch, count = features.shape[0], height * width
    flat = vectors.detach().reshape(batch * count, vectors.shape[2])
    if features.ndim == 3:  # as many tokens as the head may pool one of
        alone = flat[:, None].expand(-1, num_prefix_tokens(network) + 1, -1)
    elif features.shape[1] == vectors.shape[2]:
        alone = flat[:, :, None, None]
    else:
        alone = flat[:, None, None]
    with torch.no_grad(), _evaluating(network):
        scores = network.forward_head(alone)  # type: ignore[operator]  # (N·h·w, classes)
    scores = scores.reshape(batch, count, logits.shape[1])
    best = logits.detach().argmax(1)[:, None, None].expand(-1, count, 1)
    return scores.gather(2, best).reshape(batch, height, width)


def positions(network: nn.Module, features: Tensor, view: Pair) -> tuple[Tensor, Pair]:
    """Features as vectors (N, h·w, C), row by row, and their grid (h, w).

    Args:
        features: timm's `forward_features`: a map (N, C, h, w) or (N, h, w, C), or tokens (N, prefix + h·w, C).
        view: (height, width) of a view, which tells tokens' rows from columns.

    Raises:
        StepError: the features are of another form; the message goes on from the network's name.
    """
    width = getattr(network, "num_features", None)
    if not isinstance(features, Tensor) or features.ndim not in (3, 4):
        raise StepError(f"gives neither a map of features nor tokens, but {_shown(features)}")
    batch = features.shape[0]  # by name: `len` would fix the batch of what is exported
    if features.ndim == 3:
        prefix = num_prefix_tokens(network)
        return features[:, prefix:], grid_of(features.shape[1] - prefix, network, view)
    if features.shape[1] == width:
        height, across = features.shape[2:]
        return features.permute(0, 2, 3, 1).reshape(batch, height * across, width), (height, across)
    if features.shape[3] == width:
        height, across = features.shape[1:3]
        return features.reshape(batch, height * across, width), (height, across)
    raise StepError(
        f"gives features of the shape {_shown(features)}, none of whose axes has its {width} channels"
    )


def grid_of(count: int, network: nn.Module, view: Pair) -> Pair:
    """Rows and columns of `count` tokens: the network's own, or those nearest to the view's shape.

    Raises:
        StepError: no grid of so many cells is shaped like the view.
    """
    own = getattr(getattr(network, "patch_embed", None), "grid_size", None)
    if own is not None and own[0] * own[1] == count:
        return int(own[0]), int(own[1])
    ratio = view[0] / view[1]

    def stretch(rows: int) -> float:
        found = rows * rows / count / ratio
        return max(found, 1 / found)

    rows = min((rows for rows in range(1, count + 1) if count % rows == 0), key=stretch, default=0)
    if not rows or stretch(rows) > 1.5:
        raise StepError(f"gives {count} tokens, which are no grid shaped like a view of {view}")
    return rows, count // rows


@contextmanager
def _evaluating(network: nn.Module) -> Iterator[None]:
    """Single positions are no images: batch norms must not count them, and nothing is dropped."""
    training = [module for module in network.modules() if module.training]
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True


def _shown(features: object) -> str:
    return str(tuple(features.shape)) if isinstance(features, Tensor) else f"a {type(features).__name__}"
