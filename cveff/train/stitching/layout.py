"""How the features between two stages lie in memory, and the same features as (N, C, H, W)."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.features import stage_of
from cveff.dynamic.exits import num_prefix_tokens


class Layout(NamedTuple):
    """What a stage gives; JSON as a list.

    Attributes:
        form: "planes" (N, C, H, W), "channels-last" (N, H, W, C), or "tokens" (N, prefix + H · W, C).
        channels, height, width: C, H and W.
        prefix: tokens before those of the image: class token and registers.
    """

    form: str
    channels: int
    height: int
    width: int
    prefix: int = 0

    @property
    def grid(self) -> tuple[int, int]:
        """(H, W)."""
        return self.height, self.width


def layout_of(feature: Any, module: nn.Module, size: tuple[int, int]) -> Layout | None:
    """How what a module of a network gave for one or more images lies; None for vectors and all else.

    Args:
        module: the network.
        size: of the image.
    """
    stage = stage_of("", feature[:1] if isinstance(feature, Tensor) else feature, size)
    if stage is None:
        return None
    if not stage.is_tokens:
        height, width = feature.shape[1:3] if stage.channels_last else feature.shape[2:]
        return Layout(
            "channels-last" if stage.channels_last else "planes", stage.channels, int(height), int(width)
        )
    # What comes before the class token was added has none.
    for prefix in dict.fromkeys((num_prefix_tokens(module), 0)):
        grid = _grid(stage.positions - prefix, size)
        if grid is not None:
            return Layout("tokens", stage.channels, *grid, prefix)
    return None


def are_same_tokens(source: Layout, target: Layout) -> bool:
    """Whether token i of one is token i of the other, class token and registers too."""
    return source.form == target.form == "tokens" and source[2:] == target[2:]


def as_map(feature: Tensor, layout: Layout, with_prefix: bool = False) -> Tensor:
    """Features as (N, C, H, W); `with_prefix`: of tokens (N, C, prefix + H · W, 1), as they have no grid together."""
    if layout.form == "planes":
        return feature
    if layout.form == "channels-last":
        return feature.permute(0, 3, 1, 2)
    if with_prefix:
        return feature.transpose(1, 2).unsqueeze(3)
    return feature[:, layout.prefix :].transpose(1, 2).unflatten(2, layout.grid)


def from_map(
    features: Tensor, layout: Layout, prefix: Tensor | None = None, with_prefix: bool = False
) -> Tensor:
    """The inverse of `as_map`.

    Args:
        prefix: tokens (P, C) to put before those of the image.
    """
    if layout.form == "planes":
        return features
    if layout.form == "channels-last":
        return features.permute(0, 2, 3, 1)
    if with_prefix:
        return features.squeeze(3).transpose(1, 2)
    tokens = features.flatten(2).transpose(1, 2)
    if prefix is None:
        return tokens
    return torch.cat([prefix.unsqueeze(0).expand(tokens.shape[0], -1, -1), tokens], 1)


def resized(features: Tensor, grid: tuple[int, int]) -> Tensor:
    """(N, C, H, W) at another resolution: means of whole cells where it divides this one, else bilinear."""
    height, width = (int(side) for side in features.shape[2:])
    if (height, width) == grid:
        return features
    if height % grid[0] == 0 and width % grid[1] == 0:
        return F.avg_pool2d(features, (height // grid[0], width // grid[1]))
    return F.interpolate(features, grid, mode="bilinear", align_corners=False)


def _grid(positions: int, size: tuple[int, int]) -> tuple[int, int] | None:
    """Rows and columns of so many patches of one image."""
    height = round((max(positions, 0) * size[0] / size[1]) ** 0.5)
    if height == 0 or positions % height:
        return None
    width = positions // height
    return (height, width) if abs(height * size[1] - width * size[0]) <= max(size) / 2 else None
