"""Less work a step while training is young: smaller images, or fewer tokens in the blocks of a vision transformer."""

from __future__ import annotations

from typing import TYPE_CHECKING

import numpy as np
import torch
from torch import Tensor

from cveff.model import Model
from cveff.train.resolution import Resizer, shrink
from cveff.train.token_drop import TokenDropper

if TYPE_CHECKING:
    from cveff.train.train import Train


class Thinning:
    """What `Train.resolution` and `Train.token_drop` do to a network's batches, until `remove`.

    Raises:
        StepError: the network takes no smaller images, or cannot do without tokens.
    """

    def __init__(self, model: Model, settings: Train, device: torch.device) -> None:
        spec, name = model.spec.input, model.spec.architecture
        noise = torch.rand(2, spec.channels, *spec.size, generator=torch.Generator().manual_seed(0))
        noise = noise.to(device, memory_format=torch.channels_last)
        self._drop = settings.token_drop
        self._resizer = settings.resolution and Resizer(settings.resolution, model.module, noise, name)
        self._dropper = settings.token_drop and TokenDropper(model.module, settings.token_drop, noise, name)

    @property
    def layer_tokens(self) -> int:
        """Tokens that the blocks now see of one image, summed over blocks; 0 where none are dropped."""
        return self._dropper.layer_tokens() if self._dropper else 0

    def prepare(self, images: Tensor, share: float) -> Tensor:
        """Set the network up for the share of the run that is over, and make `images` (B, C, H, W) fit it."""
        if self._dropper and self._drop:
            self._dropper.kept = self._drop.kept(share, self._dropper.tokens)
        return shrink(images, self._resizer.size(share)) if self._resizer else images

    def consumed_share(self, total_steps: int) -> np.ndarray | None:
        """What the learning rate follows in place of steps, see `TokenDrop.consumed_share`; None: steps."""
        if not (self._dropper and self._drop and self._drop.layer_token_schedule):
            return None
        return self._drop.consumed_share(total_steps, self._dropper.tokens, self._dropper.blocks)

    def remove(self) -> None:
        """Leave the network as it was."""
        if self._dropper:
            self._dropper.remove()
