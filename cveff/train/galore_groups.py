"""Which weights of a network GaLore projects, as parameter groups."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import nn

from cveff.errors import TrainingError
from cveff.train.layers import hidden_layers

_ATTENTION = ("in_proj_weight", "q_proj_weight", "k_proj_weight", "v_proj_weight")


def galore_groups(module: nn.Module, rank: float | int = 0.25, **settings: Any) -> list[dict[str, Any]]:
    """Parameter groups of a ViT, ConvNeXt, CNN or any other network, for `GaLoreAdamW` or `GaLoreSGD`.

    Projected are the weights of linear layers, attention and ungrouped convolutions; not the first layer (the
    embedding), the classifier, embeddings, norms, biases, grouped convolutions (whose rows belong to different inputs)
    and matrices whose short side is under twice the rank.

    Args:
        rank: a number of vectors, or below 1 a share of each matrix's short side (rounded down, at least 1).
        settings: further keys of the projected groups, such as `update_proj_gap`, `scale`, `proj_type`.

    Returns:
        One group a rank, then the other weights, then those with fewer than two dimensions, with `weight_decay` 0.
        Each holds "param_names", which errors use. Frozen parameters are left out.

    Raises:
        TrainingError: `rank` is not positive, or no weight can be projected.
    """
    check_rank(rank)
    ranks = {name: _rank(weight, rank) for name, weight in _matrices(module)}
    groups: dict[int, list[tuple[str, nn.Parameter]]] = {}
    matrices: list[tuple[str, nn.Parameter]] = []
    vectors: list[tuple[str, nn.Parameter]] = []
    for name, parameter in module.named_parameters():
        if not parameter.requires_grad:
            continue
        if ranks.get(name):
            groups.setdefault(ranks[name], []).append((name, parameter))
        else:
            (matrices if parameter.ndim > 1 else vectors).append((name, parameter))
    if not groups:
        raise TrainingError(
            f"{type(module).__name__} has no trainable weight to project at rank {rank:g}; lower the rank, or use adamw"
        )
    found = [_group(members) | {"rank": width} | settings for width, members in sorted(groups.items())]
    if matrices:
        found.append(_group(matrices))
    if vectors:
        found.append(_group(vectors) | {"weight_decay": 0.0})
    return found


def check_rank(rank: float | int) -> None:
    """
    Raises:
        TrainingError: `rank` is neither a whole number from 1 nor a share between 0 and 1.
    """
    if isinstance(rank, bool) or not rank > 0 or (rank > 1 and rank != int(rank)):
        raise TrainingError(f"galore.rank is {rank!r}; give a whole number, or a share between 0 and 1")


def _matrices(module: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    """Names and weights of hidden linear layers, attention and convolutions, each once."""
    seen: set[int] = set()
    for path, layer in hidden_layers(module):
        for name in _ATTENTION if isinstance(layer, nn.MultiheadAttention) else ("weight",):
            weight = layer._parameters.get(name)
            if weight is not None and id(weight) not in seen:
                seen.add(id(weight))
                yield f"{path}.{name}", weight


def _rank(weight: nn.Parameter, rank: float | int) -> int:
    """The rank for a weight; 0: not projected."""
    short = min(weight.shape[0], weight.numel() // max(1, weight.shape[0]))
    width = max(1, int(rank * short)) if rank < 1 else int(rank)
    return width if short >= 2 * width else 0


def _group(members: list[tuple[str, nn.Parameter]]) -> dict[str, Any]:
    return {
        "params": [parameter for _, parameter in members],
        "param_names": [name for name, _ in members],
    }
