"""What a training run consumed: samples, layer tokens, operations, time."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

BACKWARD = 2
"""A layer's backward pass multiplies twice as often as its forward pass: for its weights and for its input."""


@dataclass
class Compute:
    """Totals over a run, resumed parts included.

    Attributes:
        steps: optimizer steps.
        samples: images, each time one was seen.
        tokens: tokens that entered transformer blocks, summed over blocks; 0 where tokens are not dropped.
        flops: floating-point operations of the network's forward and backward passes.
        seconds: wall-clock, from the step's start to its end; under a budget from the budget's start.
        evaluation_seconds: of these, in validations.
    """

    steps: int = 0
    samples: int = 0
    tokens: int = 0
    flops: float = 0.0
    seconds: float = 0.0
    evaluation_seconds: float = 0.0

    def figures(self, images: int) -> dict[str, float]:
        """The totals, and epochs over `images`, for a log or a summary."""
        values: dict[str, Any] = asdict(self)
        if not self.tokens:
            values.pop("tokens")
        share = self.evaluation_seconds / self.seconds if self.seconds else 0.0
        return {**values, "epochs": self.samples / images, "evaluation_share": share}


class _Whole:
    """One total instead of one for each module: those are told apart by hooks on tensors' gradients, which a view that
    was made without gradients has none of."""

    parents = frozenset({"Global"})

    def __enter__(self) -> None:
        pass

    def __exit__(self, *error: object) -> None:
        pass


def forward_flops(module: nn.Module, images: Tensor) -> int:
    """Operations of a forward pass in the module's present mode, two for a multiply-accumulate.

    The module's buffers (statistics of batch norms) and torch's random state are left as they were.

    Args:
        images: (N, C, H, W) float, on the module's device.
    """
    buffers = {name: value.clone() for name, value in module.named_buffers()}
    devices = [images.device] if images.device.type == "cuda" else []
    counter = FlopCounterMode(display=False)
    counter.mod_tracker = _Whole()  # type: ignore[assignment]
    with torch.random.fork_rng(devices), torch.no_grad(), counter:
        module(images)
        for name, value in module.named_buffers():
            value.copy_(buffers[name])
    return int(counter.get_total_flops())


class Meter:
    """Counts what a run consumes, batch by batch.

    Args:
        module: the network that is trained.

    Attributes:
        compute: the totals, without the time.
    """

    def __init__(self, module: nn.Module) -> None:
        self.compute = Compute()
        self._module = module
        self._flops: dict[tuple[int, ...], float] = {}

    def follow(self, module: nn.Module) -> None:
        """Count `module`, which takes the network's place, from here on."""
        self._module = module
        self._flops.clear()

    def count(
        self, images: Tensor, layer_tokens: int, device: torch.device, number: int | None = None
    ) -> None:
        """Add a batch (B, C, H, W) that goes forward and backward; `layer_tokens` of each image, see `Compute`.

        Args:
            number: images of the whole batch, where `images` are a rank's part of it.
        """
        number = len(images) if number is None else number
        # Once for each size and number of tokens: what a step costs depends on nothing else.
        key = (*images.shape[1:], layer_tokens)
        if key not in self._flops:
            few = images[:2].to(device)
            self._flops[key] = (1 + BACKWARD) * forward_flops(self._module, few) / len(few)
        self.compute.samples += number
        self.compute.tokens += layer_tokens * number
        self.compute.flops += self._flops[key] * number
