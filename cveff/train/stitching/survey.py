"""What is known of networks before they are joined: where they can be cut, what stages cost, how alike they are."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import accumulate, pairwise

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.flop_counter import FlopCounterMode

from cveff.compress.samples import evaluation
from cveff.data.augment import normalize
from cveff.errors import StepError
from cveff.model import Model
from cveff.train.stitching.adapter import Adapter
from cveff.train.stitching.choose import Parent
from cveff.train.stitching.layout import Layout, layout_of
from cveff.train.stitching.moments import Moments
from cveff.train.stitching.pieces import cut_points, pieces


@dataclass(frozen=True)
class Staged:
    """A network and its stages.

    Attributes:
        model: the network, whose weights the stages share.
        stages: in the order they run.
        parent: what choosing knows of it.
    """

    model: Model
    stages: tuple[nn.Module, ...]
    parent: Parent

    def features(self, images: np.ndarray, device: torch.device) -> list[Tensor]:
        """What each stage but the last gives for uint8 images (N, H, W, C)."""
        x = normalize(images, self.model.spec.input).to(device)
        found = []
        for stage in self.stages[:-1]:
            x = stage(x)
            found.append(x.clone())  # the next stage may compute in place
        return found


def staged(model: Model, count: int, cuts: Sequence[str] = ()) -> Staged:
    """A network as `count` stages, between which all that is computed later sees the image through one tensor.

    Args:
        cuts: paths of the modules that the stages but the last end with; by default at even shares of
            the multiply-accumulate operations, as nearly as can be.

    Raises:
        StepError: the network cannot be traced or is computed otherwise than traced, has fewer stages, or none that end
            at `cuts`.
    """
    module, name = model.module, model.spec.architecture
    points = cut_points(module)
    for cut in cuts:
        if cut not in points:
            raise StepError(
                f"assemble.cuts: {name} has no stage that ends at {cut!r}; it can end at {_list(points)}"
            )
    layouts, macs = _run(model, points)
    usable = [index for index, layout in enumerate(layouts) if layout is not None]
    for cut in cuts:
        if points.index(cut) not in usable:
            raise StepError(
                f"assemble.cuts: {name} gives neither a map of features nor tokens of a grid behind {cut!r}; it can be "
                f"joined behind {_list([points[index] for index in usable])}"
            )
    chosen = [points.index(cut) for cut in cuts] or _evenly(name, count, usable, list(accumulate(macs)))
    ends = tuple(points[index] for index in chosen)
    stages = tuple(pieces(module, ends))
    bounds = [0, *(index + 1 for index in chosen), len(macs)]
    parent = Parent(
        cuts=ends,
        layouts=tuple(layout for index in chosen if (layout := layouts[index]) is not None),
        parameters=tuple(sum(item.numel() for item in stage.parameters()) for stage in stages),
        macs=tuple(sum(macs[first:last]) for first, last in pairwise(bounds)),
    )
    return Staged(model, stages, parent)


@torch.no_grad()
def similarity(
    networks: Sequence[Staged], batches: Iterable[np.ndarray], device: torch.device
) -> list[list[list[float]]]:
    """Linear CKA by cut, network in front and network behind, of features as an adapter would bring them together.

    Args:
        batches: uint8 (N, H, W, C).

    Raises:
        StepError: a network's features are not finite.
    """
    count, cuts = len(networks), range(len(networks[0].parent.cuts))
    pairs = [(front, back) for front in range(count) for back in range(count) if front != back]
    adapters: dict[tuple[int, int, int], Adapter] = {}
    moments: dict[tuple[int, int, int], Moments] = {}
    for cut in cuts:
        for front, back in pairs:
            source, target = (networks[index].parent.layouts[cut] for index in (front, back))
            adapters[cut, front, back] = Adapter(source, target)
            moments[cut, front, back] = Moments((source.channels, target.channels), device)
    for images in batches:
        features = [network.features(images, device) for network in networks]
        for (cut, front, back), adapter in adapters.items():
            moments[cut, front, back].add(
                adapter.incoming(features[front][cut]), adapter.expected(features[back][cut])
            )
    for (cut, front, _), item in moments.items():
        if not item.is_finite:
            raise StepError(
                f"{networks[front].model.spec.architecture} and another give NaN or infinity at stage {cut + 1}; train "
                "them anew"
            )
    return [
        [
            [1.0 if front == back else moments[cut, front, back].cka() for back in range(count)]
            for front in range(count)
        ]
        for cut in cuts
    ]


def _run(model: Model, points: Sequence[str]) -> tuple[list[Layout | None], list[int]]:
    """What lies behind each point, and the operations of each piece; that the pieces compute what the network does."""
    module, spec = model.module, model.spec.input
    like = next(module.parameters())
    shape = (2, spec.channels, *spec.size)
    images = torch.randn(shape, generator=torch.Generator().manual_seed(0)).to(like)
    layouts: list[Layout | None] = []
    macs = []
    with torch.no_grad(), evaluation(module):
        x = images
        for piece in pieces(module, points):
            with FlopCounterMode(display=False) as counter:
                x = piece(x)
            macs.append(counter.get_total_flops() // 2 // len(images))
            layouts.append(layout_of(x, module, spec.size))
        if not torch.allclose(x, module(images), rtol=0, atol=0, equal_nan=True):
            raise StepError(
                f"{model.spec.architecture} computes something else in pieces than whole, so it cannot be cut into "
                "stages; take another network"
            )
    return layouts[:-1], macs


def _evenly(name: str, count: int, usable: Sequence[int], done: Sequence[int]) -> list[int]:
    """Of points with as many operations before them the last, those nearest to even shares."""
    total = done[-1]
    last = {done[index]: index for index in usable if 0 < done[index] < total}
    points = list(last.items())
    if len(points) < count - 1:
        raise StepError(
            f"{name} has {len(points) + 1} stages that can be joined, not {count}; lower assemble.stages"
        )
    chosen: list[int] = []
    first = 0
    for stage in range(1, count):
        left = points[first : len(points) - (count - 1 - stage)]
        nearest = min(range(len(left)), key=lambda index: abs(left[index][0] - total * stage / count))
        chosen.append(left[nearest][1])
        first += nearest + 1
    return chosen


def _list(paths: Sequence[str]) -> str:
    return ", ".join(paths) or "none"
