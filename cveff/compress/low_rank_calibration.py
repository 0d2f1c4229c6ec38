"""What calibration images say of a layer: the covariance of what reaches it, and how much its errors matter."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.low_rank_edit import geometry
from cveff.compress.low_rank_layers import run_hooked
from cveff.errors import StepError

MEMORY = 512 << 20
"""Bytes of covariances kept at once; larger networks run over the images several times."""

MIN_SAMPLES = 4096
"""Patches a covariance is made from at least, where the images have them; wide layers take twice their inputs."""

WIDE = 1024
"""Inputs past which a covariance is kept in float32: sums are exact enough, and products several times faster."""

Batches = Callable[[], Iterator[Tensor]]
"""Normalised float images (B, C, H, W), the same ones at every call."""


@dataclass(frozen=True)
class LayerStatistics:
    """What reaches one layer.

    Attributes:
        covariance: (n, n) of centred patches, n = in · height · width of the kernel; float64, or float32 where n is
            above `WIDE`.
        mean: (n,) float64.
        count: patches seen.
    """

    covariance: Tensor
    mean: Tensor
    count: int

    def output_variance(self, layer: nn.Module) -> float:
        """Variance of the layer's output at one position, summed over its channels."""
        weight = cast(Tensor, layer.weight).detach().flatten(1).to(self.covariance.dtype)
        return float(((weight @ self.covariance) * weight).sum())


def collect(
    module: nn.Module, paths: Sequence[str], batches: Batches, num_images: int, seed: int
) -> Iterator[tuple[str, LayerStatistics]]:
    """Covariances of what reaches the layers at `paths`, within `MEMORY`: consume each before asking for the next.

    Positions are drawn at random, the same ones in all images of a batch, so that every layer sees about
    `MIN_SAMPLES` patches or twice its inputs, or all there are.

    Raises:
        StepError: an activation is not finite.
    """
    sizes = {path: _inputs(module.get_submodule(path)) for path in paths}
    for group in _groups(sizes):
        generator = torch.Generator().manual_seed(seed)
        sums = {path: _Sums(module.get_submodule(path), sizes[path], num_images, generator) for path in group}

        def note(path: str, sums: dict[str, _Sums] = sums) -> Callable[..., None]:
            def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
                sums[path].add(inputs[0])

            return hook

        hooks = {path: note(path) for path in group}
        for images in batches():
            run_hooked(module, images, hooks)
        for path in group:
            statistics = sums.pop(path).finish()
            if not statistics.covariance.isfinite().all():
                raise StepError(
                    f"low_rank: what reaches layer {path!r} is not finite on the calibration images; "
                    "check the weights and the images"
                )
            yield path, statistics


def sensitivities(
    module: nn.Module, paths: Sequence[str], batches: Batches, num_images: int, seed: int
) -> dict[str, float]:
    """How much an error of a layer's output costs: the Fisher information of its outputs, without labels.

    With classes drawn from the network's own answer, E(gᵀΔy)²/2 is the divergence of the answers in nats to second
    order. Taking errors of channels and positions as independent and alike leaves E‖g‖² / (2 · channels) a position.

    Returns:
        path -> nats by which one unit of error variance, summed over channels and the same at every position,
        moves the network's answer.
    """
    totals = dict.fromkeys(paths, 0.0)
    generator = torch.Generator().manual_seed(seed)

    def note(path: str) -> Callable[..., None]:
        channels = geometry(module.get_submodule(path))[0].outputs

        def add(gradient: Tensor) -> None:
            totals[path] += float(gradient.double().square().sum()) / (2 * channels * num_images)

        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            output.register_hook(add)

        return hook

    handles = [module.get_submodule(path).register_forward_hook(note(path)) for path in paths]
    seen = 0
    try:
        for batch in batches():
            images = batch[: num_images - seen].requires_grad_()
            seen += len(images)
            with torch.enable_grad():
                logits = module(images).float()
                if not logits.isfinite().all():
                    raise StepError(
                        "low_rank: the network's answers to the calibration images are not finite; check its weights "
                        "and the images"
                    )
                answers = torch.multinomial(logits.detach().softmax(1).cpu(), 1, generator=generator)
                loss = F.cross_entropy(logits, answers[:, 0].to(logits.device), reduction="sum")
                torch.autograd.grad(loss, images)
            if seen >= num_images:
                break
    finally:
        for handle in handles:
            handle.remove()
    return totals


class _Sums:
    """Running first and second moments of the patches that reach a layer."""

    def __init__(self, layer: nn.Module, size: int, num_images: int, generator: torch.Generator) -> None:
        self._layer, self._generator = layer, generator
        self._positions = -(-max(MIN_SAMPLES, 2 * size) // num_images)
        self._shift: Tensor | None = None
        self._count = 0
        self._first = self._second = torch.zeros(0)

    def add(self, inputs: Tensor) -> None:
        """Take the patches of one batch."""
        patches = (
            self._patches(inputs) if isinstance(self._layer, nn.Conv2d) else self._rows(inputs)
        ).float()
        if self._shift is None:
            # Sums around the first batch's mean: means far above the deviation would drown it in float32.
            self._shift = patches.mean(0)
            size = len(self._shift)
            self._first = torch.zeros(size, dtype=torch.float64, device=patches.device)
            self._second = torch.zeros(size, size, dtype=torch.float64, device=patches.device)
        patches = patches - self._shift
        self._first += patches.double().sum(0)
        self._second += patches.T @ patches
        self._count += len(patches)

    def finish(self) -> LayerStatistics:
        """The moments of all patches."""
        assert self._shift is not None
        mean = self._first / self._count
        covariance = self._second.div_(self._count).sub_(torch.outer(mean, mean))
        if len(mean) > WIDE:
            covariance = covariance.float()
        return LayerStatistics(covariance, mean + self._shift.double(), self._count)

    def _rows(self, inputs: Tensor) -> Tensor:
        """(B, …, in) -> (samples, in)."""
        rows = inputs.detach().reshape(len(inputs), -1, inputs.shape[-1])
        return rows[:, self._choose(rows.shape[1]).to(rows.device)].flatten(0, 1)

    def _patches(self, inputs: Tensor) -> Tensor:
        """(B, in, H, W) -> (samples, in · height · width), at random output positions."""
        (whole,) = geometry(self._layer)
        padded = F.pad(
            inputs.detach(), (whole.padding[1], whole.padding[1], whole.padding[0], whole.padding[0])
        )
        reach = [(k - 1) * d for k, d in zip(whole.kernel, whole.dilation, strict=True)]
        height, width = (
            (padded.shape[2 + axis] - reach[axis] - 1) // whole.stride[axis] + 1 for axis in (0, 1)
        )
        chosen = self._choose(height * width)
        top, left = (chosen // width) * whole.stride[0], (chosen % width) * whole.stride[1]
        rows = top[:, None] + torch.arange(whole.kernel[0]) * whole.dilation[0]  # (P, height)
        columns = left[:, None] + torch.arange(whole.kernel[1]) * whole.dilation[1]  # (P, width)
        device = padded.device
        found = padded[:, :, rows[:, :, None].to(device), columns[:, None, :].to(device)]  # (B, in, P, h, w)
        return found.transpose(1, 2).flatten(2).flatten(0, 1)

    def _choose(self, available: int) -> Tensor:
        if available <= self._positions:
            return torch.arange(available)
        return torch.randperm(available, generator=self._generator)[: self._positions]


def _inputs(layer: nn.Module) -> int:
    (whole,) = geometry(layer)
    return whole.inputs * whole.kernel[0] * whole.kernel[1]


def _groups(sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Paths whose covariances together fit in `MEMORY`; at least one a group."""
    group: list[str] = []
    taken = 0
    for path, size in sizes.items():
        needed = 8 * size * size
        if group and taken + needed > MEMORY:
            yield group
            group, taken = [], 0
        group.append(path)
        taken += needed
    if group:
        yield group
