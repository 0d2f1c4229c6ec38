"""`Adapter`: what joins a stage of one network to the next stage of another."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from cveff.train.stitching.layout import Layout, are_same_tokens, as_map, from_map, resized
from cveff.train.stitching.moments import Moments


class Adapter(nn.Module):
    """Resize, a 1 × 1 convolution (of tokens: a linear layer), batch norm.

    The norm stands behind the convolution, where engines fold it: a deployed adapter costs one convolution. Class token
    and registers go through the same layer where both networks have the same tokens; else they are learned constants.

    Args:
        source: of the features that come in.
        target: of those that the next stage expects.
    """

    def __init__(self, source: Layout, target: Layout) -> None:
        super().__init__()
        self.source, self.target = source, target
        self.with_prefix = are_same_tokens(source, target)
        self.conv = nn.Conv2d(source.channels, target.channels, 1, bias=False)
        self.norm = nn.BatchNorm2d(target.channels)
        self.prefix: nn.Parameter | None = None
        if target.prefix and not self.with_prefix:
            self.prefix = nn.Parameter(torch.randn(target.prefix, target.channels) * 0.02)

    def forward(self, x: Tensor) -> Tensor:
        """Features of `source`'s layout -> features of `target`'s."""
        made = self.norm(self.conv(self.incoming(x)))
        return from_map(made, self.target, self.prefix, self.with_prefix)

    def incoming(self, x: Tensor) -> Tensor:
        """What the convolution sees of the stage before: (N, C, H, W) at the target's resolution."""
        features = as_map(x, self.source, self.with_prefix)
        return features if self.with_prefix else resized(features, self.target.grid)

    def expected(self, y: Tensor) -> Tensor:
        """What the norm is to give for features `y` that the next stage knows: (N, D, H, W)."""
        return as_map(y, self.target, self.with_prefix)

    @torch.no_grad()
    def fit(self, moments: Moments, prefix: Tensor | None) -> float:
        """Take the least-squares solution, exactly in evaluation mode and nearly so in training mode.

        Args:
            moments: of `incoming` and `expected`.
            prefix: mean of the tokens (P, D) before the image's, where they are constants.

        Returns:
            The share of the expected features' variance that no linear map explains.
        """
        weight, error = moments.least_squares()
        (mean_x, mean_y), (xx, _, _) = moments.means(), moments.covariances()
        variance = ((weight @ xx) * weight).sum(1).clamp(min=0)
        self.conv.weight.copy_(weight[:, :, None, None])
        assert self.norm.running_mean is not None and self.norm.running_var is not None
        self.norm.running_mean.copy_(weight @ mean_x)
        self.norm.running_var.copy_(variance)
        self.norm.weight.copy_((variance + self.norm.eps).sqrt())
        self.norm.bias.copy_(mean_y)
        if self.prefix is not None and prefix is not None:
            self.prefix.copy_(prefix)
        return error
