"""Second moments of two networks' features: how alike they are (linear CKA), and the best linear map between them."""

from __future__ import annotations

import torch
from torch import Tensor


class Moments:
    """Sums over positions of features x (C) and y (D), in float64, from which both figures are exact however the data
    were divided into batches.

    Args:
        channels: C and D.
    """

    def __init__(self, channels: tuple[int, int], device: torch.device | None = None) -> None:
        total = sum(channels)
        self.channels, self.count = channels, 0
        self._sum = torch.zeros(total, dtype=torch.float64, device=device)
        self._products = torch.zeros(total, total, dtype=torch.float64, device=device)

    def add(self, x: Tensor, y: Tensor) -> None:
        """Count in maps (N, C, H, W) and (N, D, H, W) of the same images."""
        rows = torch.cat([x, y], 1).movedim(1, -1).flatten(0, -2).double()  # (N · H · W, C + D)
        self.count += len(rows)
        self._sum += rows.sum(0)
        self._products += rows.T @ rows

    @property
    def is_finite(self) -> bool:
        """Whether no feature was NaN or infinite."""
        return bool(torch.isfinite(self._products).all())

    def means(self) -> tuple[Tensor, Tensor]:
        """Mean of x (C,) and of y (D,)."""
        x, y = (self._sum / self.count).split(self.channels)
        return x, y

    def covariances(self) -> tuple[Tensor, Tensor, Tensor]:
        """Of x (C, C), of x with y (C, D), and of y (D, D)."""
        mean = self._sum / self.count
        full = self._products / self.count - torch.outer(mean, mean)
        first = self.channels[0]
        return full[:first, :first], full[:first, first:], full[first:, first:]

    def cka(self) -> float:
        """Linear centred kernel alignment, 0 to 1: ‖XᵀY‖² / (‖XᵀX‖ ‖YᵀY‖), Frobenius norms of centred features, each
        position an example (Kornblith et al., arXiv:1905.00414, section 3).

        It is 1 for features that differ by a rotation, a scale and a shift; 0 where either is constant.
        """
        xx, xy, yy = self.covariances()
        norms = xx.norm() * yy.norm()
        return float(xy.norm() ** 2 / norms) if float(norms) > 0 else 0.0

    def least_squares(self) -> tuple[Tensor, float]:
        """The map W (D, C) of centred features that minimises ‖W x - y‖², and that minimum as a share of y's variance.

        W = C_yx C_xx⁺, for channels of x scaled to one variance: directions in which these hardly vary (below 1e-10 of
        the most) count as constant, and of several solutions it is the smallest.
        """
        xx, xy, yy = self.covariances()
        # Channels in like units, so that the cut below means the same for a faint channel as for a loud one.
        scale = xx.diagonal().clamp(min=0).sqrt()
        scale = torch.where(scale > scale.max() * 1e-7, scale, torch.inf)
        values, vectors = torch.linalg.eigh(xx / torch.outer(scale, scale))
        inverse = torch.where(values > values[-1].clamp(min=1e-300) * 1e-10, 1 / values, 0)
        weight = ((vectors * inverse) @ (vectors.T @ (xy / scale[:, None]))) / scale[:, None]
        left = yy.diagonal().sum() - (weight * xy).sum()
        total = float(yy.diagonal().sum())
        return weight.T, max(0.0, float(left)) / total if total > 0 else 0.0
