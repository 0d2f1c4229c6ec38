"""What `LowRank` learns by running the network.

Which layers can be replaced, what reaches them, and how much an error of theirs matters.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from cveff.compress.low_rank_edit import geometry, not_factorisable, replace
from cveff.errors import StepError

MEMORY = 512 << 20
"""Bytes of covariances kept at once; larger networks run over the images several times."""

MIN_SAMPLES = 4096
"""Patches a covariance is made from at least, where the images have them; wide layers take twice their inputs."""

Batches = Callable[[], Iterator[Tensor]]
"""Normalised float images (B, C, H, W), the same ones at every call."""


@dataclass(frozen=True)
class LayerStatistics:
    """What reaches one layer.

    Attributes:
        covariance: (n, n) float64 of centred patches, n = in · height · width of the kernel.
        mean: (n,) float64.
        count: patches seen.
    """

    covariance: Tensor
    mean: Tensor
    count: int


def find_layers(module: nn.Module, example: Tensor) -> tuple[dict[str, tuple[int, ...]], dict[str, str]]:
    """Layers that a chain can stand in for, and why the others cannot be.

    A layer counts where the network calls it exactly once and touches nothing else of it: attention that reads
    `self.qkv.weight` (BEiT, EVA), or a shared layer, is found by trying.

    Args:
        module: in evaluation mode.
        example: (1, C, H, W).

    Returns:
        path -> shape of the layer's input for `example`; path -> reason, a sentence about the layer.
    """
    shapes: dict[str, tuple[int, ...]] = {}
    reasons: dict[str, str] = {}
    calls: dict[str, int] = {}
    candidates: dict[str, nn.Module] = {}
    weights: dict[int, list[str]] = {}
    for path, layer in module.named_modules(remove_duplicate=False):
        weight = getattr(layer, "weight", None)
        if isinstance(weight, Tensor):
            weights.setdefault(id(weight), []).append(path)
        if isinstance(layer, (nn.Linear, nn.Conv2d)):
            reason = not_factorisable(layer) if path else "is the whole network"
            if reason:
                reasons[path] = reason
            else:
                candidates[path] = layer
    for paths in weights.values():
        for path in paths if len(paths) > 1 else ():
            if candidates.pop(path, None) is not None:
                reasons[path] = f"shares its weight with {next(other for other in paths if other != path)}"

    def note(path: str) -> Callable[..., None]:
        def hook(layer: nn.Module, inputs: tuple[Any, ...], output: Tensor) -> None:
            calls[path] = calls.get(path, 0) + 1
            shapes[path] = tuple(inputs[0].shape)

        return hook

    expected = _run(module, example, {path: note(path) for path in candidates})
    for path in list(candidates):
        if calls.get(path, 0) != 1:
            del candidates[path]
            reasons[path] = (
                f"is called {calls[path]} times"
                if path in calls
                else "is never called: the network reads its weight, or does not use it"
            )
    for path in _touched(module, example, expected, candidates):
        reasons[path] = "is read by the network (its weight, bias or size), not only called"
        del candidates[path]
    return {path: shapes[path] for path in candidates}, reasons


def _touched(
    module: nn.Module, example: Tensor, expected: Tensor, candidates: Mapping[str, nn.Module]
) -> list[str]:
    """Layers that cannot be wrapped: a `Sequential` of the layer alone computes the same and has none of its names."""
    if _runs_wrapped(module, example, expected, candidates):
        return []
    # A network repeats few kinds of blocks; halving finds the culprits among many innocent layers.
    paths = list(candidates)
    if len(paths) == 1:
        return paths
    halves = paths[: len(paths) // 2], paths[len(paths) // 2 :]
    return [
        path
        for half in halves
        for path in _touched(module, example, expected, {path: candidates[path] for path in half})
    ]


def _runs_wrapped(
    module: nn.Module, example: Tensor, expected: Tensor, layers: Mapping[str, nn.Module]
) -> bool:
    for path, layer in layers.items():
        replace(module, path, nn.Sequential(layer).train(layer.training))
    try:
        return torch.equal(_run(module, example, {}), expected)
    except (AttributeError, TypeError, NotImplementedError):
        return False
    finally:
        for path, layer in layers.items():
            replace(module, path, layer)


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
            _run(module, images, hooks)
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


def _run(module: nn.Module, images: Tensor, hooks: Mapping[str, Callable[..., None]]) -> Tensor:
    handles = [module.get_submodule(path).register_forward_hook(hook) for path, hook in hooks.items()]
    try:
        with torch.no_grad():
            return cast(Tensor, module(images))
    finally:
        for handle in handles:
            handle.remove()
