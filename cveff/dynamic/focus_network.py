"""A network that glances at the whole image, then looks at parts of it (Glance and Focus, Wang et al., NeurIPS 2020).

One network sees the image made small, and then crops of the same size at full resolution. Where to look is where the
glance's classifier is most active for the class it found, which needs no training, or where a small layer expects the
network to be right, which learns what the paper's policy is rewarded for (arXiv:2010.05300, section 3).
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn

from cveff.dynamic.class_activation import Pair, class_activation, positions
from cveff.dynamic.exits import NetworkWithExits
from cveff.dynamic.token_state import Choice


class Look(NamedTuple):
    """One crop of every image.

    Attributes:
        corner: top and left in pixels, (N, 2) int64.
        logits: of the crop alone, (N, classes).
        interest: what made it be chosen, (N,): the class's logit, or what the policy says.
    """

    corner: Tensor
    logits: Tensor
    interest: Tensor


class Policy(nn.Module):
    """How sure of the right class the network will be in a crop around a position: the logit of that probability.

    Args:
        width: channels of a position's features.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layers = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, width), nn.GELU(), nn.Linear(width, 1)
        )

    def forward(self, vectors: Tensor) -> Tensor:
        """vectors: (N, positions, C) -> (N, positions)."""
        return cast(Tensor, self.layers(vectors))[..., 0]


class FocusNetwork(NetworkWithExits):
    """Exits are the glance and each crop; an exit's logits are the mean of those of all views up to it.

    Args:
        network: (N, C, h, w) -> (N, classes) for views of size `view`; has `forward_features` and `forward_head`.
        size: (height, width) of the images.
        view: (height, width) of the glance and the crops, no larger than `size`.
        num_crops: 1 or more.
        learns: whether a layer of its own says where to look, and not class activation.
    """

    shrink_rows: Tensor
    shrink_columns: Tensor

    def __init__(
        self, network: nn.Module, size: Pair, view: Pair, num_crops: int, learns: bool = False
    ) -> None:
        super().__init__(network, ("glance", *(f"crop {index}" for index in range(1, num_crops))))
        self.size, self.view, self.num_crops = size, view, num_crops
        self.peak = Choice()
        self.policy = Policy(cast(int, network.num_features)) if learns else None
        self._looks: list[Look] | None = None
        self.register_buffer("shrink_rows", area_weights(size[0], view[0]), persistent=False)
        self.register_buffer("shrink_columns", area_weights(size[1], view[1]), persistent=False)

    def answers(self, images: Tensor) -> tuple[Tensor, ...]:
        """Logits (N, classes) after the glance and after each crop."""
        glance, looks = self.views(images)
        found, total = [glance], glance
        for index, look in enumerate(looks):
            total = total + look.logits
            found.append(total / (index + 2))
        return tuple(found)

    def views(self, images: Tensor) -> tuple[Tensor, list[Look]]:
        """The glance's logits (N, classes), and what each crop is and gives."""
        small = self.shrink_rows @ images @ self.shrink_columns.transpose(0, 1)
        features = self.network.forward_features(small)  # type: ignore[operator]
        glance = self.network.forward_head(features)  # type: ignore[operator]
        if self.policy is None:
            interest = class_activation(self.network, features, glance, self.view)
        else:
            vectors, grid = positions(self.network, features, self.view)
            interest = self.policy(vectors.detach()).reshape(images.shape[0], *grid)
        looks: list[Look] = []
        left = interest.detach()
        for _ in range(self.num_crops):
            peak, corner, left = self._next(left)
            logits = self.network(cropped(images, corner, self.view))
            looks.append(Look(corner, logits, interest.flatten(1).gather(1, peak)[:, 0]))
        if self._looks is not None:
            self._looks[:] = looks
        return glance, looks

    @contextmanager
    def looking(self) -> Iterator[list[Look]]:
        """Within the block a call also leaves its crops in this list."""
        looks: list[Look] = []
        self._looks = looks
        try:
            yield looks
        finally:
            self._looks = None

    def _next(self, interest: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The most interesting position, the crop around it, and the map without positions whose crops are nearly it.

        Args:
            interest: (N, h, w).

        Returns:
            (N, 1) int64; top and left in pixels (N, 2) int64; (N, h, w).
        """
        height, width = interest.shape[1:]
        rows, columns = self._corners(0, height, interest.device), self._corners(1, width, interest.device)
        peak = interest.flatten(1).argmax(1, keepdim=True)
        if self.policy is not None and self.training:
            peak = explored(peak, height * width)
        peak = self.peak(peak)
        index = peak[:, 0]
        corner = torch.stack(
            [rows.index_select(0, index // width), columns.index_select(0, index % width)], 1
        )
        is_near = (4 * (rows - corner[:, :1]).abs() <= self.view[0])[:, :, None]  # (N, h, 1)
        is_near = is_near & (4 * (columns - corner[:, 1:]).abs() <= self.view[1])[:, None, :]
        # Finite: where crops cover everything, the next looks at the first place again rather than at none.
        return peak, corner, interest.masked_fill(is_near, torch.finfo(interest.dtype).min)

    def _corners(self, axis: int, count: int, device: torch.device) -> Tensor:
        """Where the crop around each of `count` positions along an axis begins, within the image: (count,) int64."""
        middles = (2 * torch.arange(count, device=device) + 1) * self.size[axis] // (2 * count)
        return (middles - self.view[axis] // 2).clamp(0, self.size[axis] - self.view[axis])


def explored(peak: Tensor, count: int) -> Tensor:
    """Half of the choices (N, 1) replaced by any of `count` positions: what is never looked at is never learned."""
    anywhere = torch.randint(count, peak.shape, device=peak.device)
    return torch.where(torch.rand(peak.shape, device=peak.device) < 0.5, anywhere, peak)


def cropped(images: Tensor, corner: Tensor, view: Pair) -> Tensor:
    """(N, C, H, W) -> (N, C, *view), each image at its own `corner` (N, 2): top and left in pixels."""
    batch, channels, height, width = images.shape
    rows = corner[:, :1] + torch.arange(view[0], device=images.device)  # (N, h)
    columns = corner[:, 1:] + torch.arange(view[1], device=images.device)  # (N, w)
    places = (rows[:, :, None] * width + columns[:, None, :]).reshape(batch, 1, view[0] * view[1])
    pixels = images.reshape(batch, channels, height * width)
    return pixels.gather(2, places.expand(-1, channels, -1)).reshape(batch, channels, *view)


def area_weights(size: int, small: int) -> Tensor:
    """(small, size) float: a row averages the pixels that one of the smaller image covers, borders by their share."""
    edges = torch.arange(small + 1, dtype=torch.float64) * size / small
    pixel = torch.arange(size, dtype=torch.float64)
    covered = torch.minimum(edges[1:, None], pixel + 1) - torch.maximum(edges[:-1, None], pixel)
    return (covered.clamp(min=0) * small / size).float()
