"""Calibration images until ranges settle: how many are needed is measured, by doubling them."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cveff.compress.quant.checks import first_not_finite
from cveff.compress.quant.ranges import Watch, drift
from cveff.errors import StepError
from cveff.progress import Progress

SETTLED = 0.02
"""Ranges that move by less of their width when the images are doubled have settled."""
WARN = 0.1
FIRST = 64
"""Images after which settling is looked at for the first time; with fewer in all a warning is given."""
ENOUGH = 100
"""Images that are usually enough."""
PARTS = 8
"""Batches that a handful of images is divided into, so that one half can be compared with the whole."""


@dataclass(frozen=True)
class Seen:
    """What ranges were made from.

    Attributes:
        images: how many.
        moved: the largest change of a range's end, relative to its width, from about half of them to all; None
            where there was one batch only.
        tensor: where that was.
        unmoved: tensors that had one value in every place of every image.
    """

    images: int
    moved: float | None
    tensor: str
    unmoved: tuple[str, ...]

    def warnings(self, given: int) -> list[str]:
        """What a user should know.

        Args:
            given: images in all, those that nothing is calibrated on included.
        """
        found = []
        if given < FIRST or (self.moved or 0.0) > WARN:
            are_few = f"{given} calibration {'image is' if given == 1 else 'images are'} few"
            how = (
                "there is no second half to compare ranges with"
                if self.moved is None
                else f"the range of {self.tensor or 'every tensor'} moved by {100 * self.moved:.0f}% of its width "
                "from the first half of them to all"
            )
            advice = "give 100 to 500" if given < ENOUGH else "give more, or such as differ more"
            found.append(f"warning: {are_few}: {how}; {advice}")
        if self.unmoved:
            names = ", ".join(self.unmoved[:5]) + (", …" if len(self.unmoved) > 5 else "")
            one = len(self.unmoved) == 1
            found.append(
                f"warning: {'1 tensor' if one else f'{len(self.unmoved)} tensors'} never moved on the calibration "
                f"images: {names}; {'its range is' if one else 'their ranges are'} a guess, give images like those "
                "of use"
            )
        return found


def divided(batches: Sequence[Tensor]) -> list[Tensor]:
    """The same images in smaller batches, where there are few."""
    count = sum(map(len, batches))
    if count >= 2 * FIRST:
        return list(batches)
    return list(torch.cat(list(batches)).split(max(1, count // PARTS)))


def watch_until_settled(
    watch: Watch, exact: fx.GraphModule, batches: Sequence[Tensor], progress: Progress
) -> Seen:
    """Let `watch` see images until ranges settle.

    Args:
        exact: the network without roundings, to name the operator where a value is no number.
        batches: images (B, C, H, W), normalised.

    Raises:
        StepError: an operator, which is named, computes NaN or infinity.
    """
    total = sum(map(len, batches))
    images, check, before = 0, min(FIRST, max(1, total // 2)), None
    moved, where = None, ""
    for batch in progress.track(batches, "calibrating", len(batches)):
        _see(watch, exact, batch)
        images += len(batch)
        if images < check and images < total:
            continue
        after = watch.ranges("percentile")
        if before is not None:
            moved, where = drift(before, after)
            if moved < SETTLED:
                break
        before, check = after, 2 * images
    unmoved = tuple(name for name, seen in watch.histograms.items() if seen.low == seen.high)
    return Seen(images, moved, where, unmoved)


def _see(watch: Watch, exact: fx.GraphModule, batch: Tensor) -> None:
    try:
        watch.see([batch])
    except StepError as error:
        name = first_not_finite(exact, batch)
        if name is None:
            raise
        raise not_finite(name) from error


def not_finite(name: str) -> StepError:
    """What to raise where operator `name` overflows."""
    return StepError(
        f"{name} computes NaN or infinity on calibration images in float32; check the images' normalisation and "
        "the weights before it"
    )
