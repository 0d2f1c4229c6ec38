"""Cuts tried on copies of a network: do they run, and do they compute what the dense network computes without them."""

from __future__ import annotations

import copy
import itertools
from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import nn

from cveff.compress.caches import caches
from cveff.compress.groups import Analysis
from cveff.compress.oracle import zeroed
from cveff.compress.own_calls import merged
from cveff.errors import CheckpointError
from cveff.measure.parity import relative_difference
from cveff.runtime.errors import first_line

TOLERANCE = 1e-4
"""Largest accepted max|pruned - zeroed| / max|zeroed| of the logits in float32."""

QUIET = 0.5
"""Gain of a matrix below which it is scaled up for the proof."""

Keep = Mapping[str, np.ndarray]


@dataclass(frozen=True)
class Trial:
    """What became of a cut: `reason` is empty where it holds, `module` the path of the code that refused it."""

    reason: str = ""
    module: str = ""


class Proof:
    """Tries cuts on a network, and learns what its code needs to take them.

    Args:
        module: the network, whose weights must all matter to its output (`awakened`).
        images: (N, C, H, W) float; the first is used while learning, all of them for the verdict.

    Attributes:
        analysis: grows by what is learned: calls to correct, attributes to leave alone.
    """

    def __init__(self, module: nn.Module, analysis: Analysis, images: torch.Tensor) -> None:
        self.module, self.analysis, self.images = module, analysis, images

    def run(self, keep: Keep) -> Trial:
        """Cut, and correct calls that name wrong sizes, until the network runs as it is."""
        assert self.analysis.own_calls is not None
        while True:
            try:
                small = self._cut(self.analysis, keep)
            except CheckpointError as error:
                return Trial(f"it cannot be cut: {error}")
            output, found = self.analysis.own_calls.watch(
                small, self.images[:1], self.analysis.shapes(dict(keep))
            )
            if isinstance(output, Exception):
                reason = f"the network does not run without it: {first_line(output)[:200]}"
                return Trial(reason, _failing_module(small, output))
            known = self.analysis.flexible
            if merged(known, found) == known:
                return Trial()
            self.analysis = replace(self.analysis, flexible=merged(known, found))

    def repair(self, keep: Keep) -> None:
        """Learn from what fails which attributes only happen to hold the size of something that shrinks."""
        while failing := self.run(keep).module:
            before = self.analysis
            held = sorted(before.edit(dict(keep), self.module).attributes.get(failing, {}))
            for names in itertools.chain.from_iterable(
                itertools.combinations(held, count) for count in (1, 2)
            ):
                self.analysis = replace(
                    before, unrelated=before.unrelated | {(failing, name) for name in names}
                )
                if self.run(keep).module != failing:
                    break
            else:
                self.analysis = before
                return

    def verdict(self, keep: Keep) -> Trial:
        """Whether the network without what `keep` leaves out computes what the law says."""
        trial = self.run(keep)
        if trial.reason:
            return trial
        try:
            difference = check(self.module, self.analysis, keep, self.images)
        except Exception as error:  # noqa: BLE001 - whatever the network's own code raises on more images
            reason = f"the network does not run without it on {len(self.images)} images"
            return Trial(f"{reason}: {first_line(error)[:200]}")
        if not difference <= TOLERANCE:
            return Trial(f"without it the network differs from the dense one by {difference:.1e}")
        return Trial()

    def failing(self, keep: Keep) -> dict[str, Trial]:
        """Names of groups whose cut does not hold; halved until single groups are found."""
        failing: dict[str, Trial] = {}
        pending: list[list[str]] = [list(keep)]
        last = Trial()
        while pending:
            names = pending.pop()
            trial = self.verdict({name: keep[name] for name in names})
            if not trial.reason:
                continue
            last = trial
            if len(names) == 1:
                failing[names[0]] = trial
            else:
                middle = len(names) // 2
                pending += [names[:middle], names[middle:]]
        if last.reason and not failing:
            # Each half holds alone but not together: give up the later half rather than guess.
            return dict.fromkeys(list(keep)[len(keep) // 2 :], replace(last, module=""))
        return failing

    def _cut(self, analysis: Analysis, keep: Keep) -> nn.Module:
        return analysis.edit(dict(keep), self.module).apply(light_copy(self.module)).eval()


def check(module: nn.Module, analysis: Analysis, keep: Keep, images: torch.Tensor) -> float:
    """Relative difference between the pruned network and the dense one with those channels at zero.

    Args:
        module: the dense network; left as it was. Its weights need not be those that were analysed.
        keep: group name -> bool (size,).
        images: (N, C, H, W) float, normalised.

    Returns:
        max|pruned - zeroed| / max|zeroed| over the logits; infinite where one of them is not finite.
    """
    small = analysis.edit(dict(keep), module).apply(light_copy(module)).eval()
    with torch.no_grad():
        logits = small(images)
        expected = zeroed(analysis, keep, images, module)
    if not (logits.isfinite().all() and expected.isfinite().all()):
        return float("inf")
    return relative_difference(logits.cpu().numpy(), expected.cpu().numpy())


def light_copy(module: nn.Module) -> nn.Module:
    """A copy that shares parameters and buffers: enough for edits, which replace tensors and never write to them."""
    tensors = [*module.parameters(), *module.buffers()]
    # Cached tensors may hang on a graph of gradients, which cannot be copied, and are soon out of date.
    empty: dict[int, object] = {id(cache): {} for cache in caches(module)}
    return copy.deepcopy(module, {**empty, **{id(tensor): tensor for tensor in tensors}})


@torch.no_grad()
def awakened(module: nn.Module, seed: int) -> nn.Module:
    """A copy, in evaluation mode, in which every weight matters to the output, so that a wrong cut shows.

    Fresh networks have branches behind zeros or 1e-6 (layer scale, the last norm of a block), statistics of 0 and 1,
    and matrices too small to be heard beside a bias: such vectors, and all that is constant, get random values, and
    matrices are scaled to a gain of 1.
    """
    generator = torch.Generator().manual_seed(seed)
    result = light_copy(module).eval()
    awake: dict[int, torch.Tensor] = {}  # parameters that modules share stay shared
    for inner in result.modules():
        for name, parameter in inner.named_parameters(recurse=False):
            if id(parameter) not in awake:
                value = _awake(parameter, generator)
                awake[id(parameter)] = nn.Parameter(value, parameter.requires_grad)
            inner._parameters[name] = awake[id(parameter)]  # type: ignore[assignment]
        for name in ("running_mean", "running_var"):  # other buffers are made by the code: indices, masks
            buffer = inner._buffers.get(name)
            if buffer is not None:
                noise = torch.rand(buffer.shape, generator=generator).to(buffer) - 0.5
                inner._buffers[name] = buffer * (1 + noise) + (noise if name == "running_mean" else 0)
    return result


def _awake(tensor: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    if not tensor.is_floating_point() or not tensor.numel():
        return tensor.detach()
    is_matrix = tensor.numel() > max(tensor.shape, default=1)
    is_constant = bool((tensor == tensor.flatten()[0]).all())
    if is_constant or (not is_matrix and tensor.abs().max().item() < 0.1):
        return tensor + torch.rand(tensor.shape, generator=generator).to(tensor) - 0.5
    if is_matrix:
        gain = float(tensor.square().sum() / tensor.shape[0]) ** 0.5
        return tensor / gain if gain < QUIET else tensor.detach()
    return tensor.detach()


def _failing_module(small: nn.Module, error: BaseException) -> str:
    """Path of the innermost module whose code does not take the new sizes."""
    names = {id(inner): name for name, inner in small.named_modules()}
    found, frames = "", error.__traceback__
    while frames is not None:
        inner = names.get(id(frames.tb_frame.f_locals.get("self")))
        # torch's own layers only take what they are given: the code that calls them is at fault.
        if inner and not type(small.get_submodule(inner)).__module__.startswith("torch.nn"):
            found = inner
        frames = frames.tb_next
    return found
