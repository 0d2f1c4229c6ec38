"""What every precision refuses before it rounds anything: images that do not fit, values that are no numbers, names."""

from __future__ import annotations

import difflib
from collections.abc import Collection, Sequence
from typing import Any

import torch
from torch import Tensor, fx

from cveff.compress.quant.capture import identify
from cveff.errors import StepError
from cveff.runtime.input_spec import InputSpec


def check_images(batches: Sequence[Tensor], spec: InputSpec) -> list[Tensor]:
    """The batches that hold an image.

    Args:
        batches: images (B, C, H, W) float, normalised.

    Raises:
        StepError: there is no image, or one is not of the network's size, not float, or holds NaN or infinity.
    """
    found = [images for images in batches if len(images)]
    if not found:
        raise StepError("there are no calibration images; give at least one, better 100 to 500")
    expected = (spec.channels, *spec.size)
    count = 0
    for images in found:
        if images.ndim != 4 or tuple(images.shape[1:]) != expected:
            raise StepError(
                f"a batch of calibration images is {_times(images.shape)}, the network takes "
                f"N×{_times(expected)} (channels, height, width); give images through cveff.runtime.preprocess"
            )
        if not images.is_floating_point():
            raise StepError(f"calibration images are {images.dtype}; normalise them (cveff.data.augment)")
        finite = torch.isfinite(images).flatten(1).all(1)
        if not bool(finite.all()):
            raise StepError(
                f"calibration image {count + int(finite.logical_not().nonzero()[0])} holds NaN or infinity; "
                "check the images' normalisation"
            )
        count += len(images)
    return found


def check_parameters(graph: fx.GraphModule) -> None:
    """
    Raises:
        StepError: a parameter or buffer, which is named, holds NaN or infinity.
    """
    for path, value in [*graph.named_parameters(), *graph.named_buffers()]:
        if value.is_floating_point() and not bool(torch.isfinite(value).all()):
            raise StepError(f"parameter {path} holds NaN or infinity; train or load the model again")


def check_excluded(graph: fx.GraphModule, exclude: Collection[str]) -> None:
    """
    Raises:
        StepError: `exclude` names something that is no operator of a captured graph; what comes close is named.
    """
    known = [name for name, node in identify(graph).items() if node.op == "call_function"]
    unknown = sorted(set(exclude) - set(known))
    if not unknown:
        return
    layers = [name for name in known if name.startswith(f"{unknown[0]}:")]
    close = layers or difflib.get_close_matches(unknown[0], known, n=3, cutoff=0.4)
    hint = f"did you mean {' or '.join(map(repr, close[:3]))}?" if close else f"one is {known[0]!r}"
    raise StepError(f"{unknown[0]!r} is no operator of this network; {hint}")


@torch.no_grad()
def first_not_finite(graph: fx.GraphModule, images: Tensor) -> str | None:
    """The first operator, by `identify`'s names, that computes NaN or infinity from images (B, C, H, W)."""
    search = _Search(graph)
    search.run(images)
    return search.found


class _Search(fx.Interpreter):
    def __init__(self, graph: fx.GraphModule) -> None:
        super().__init__(graph)
        self._names = {node: name for name, node in identify(graph).items()}
        self.found: str | None = None

    def run_node(self, n: fx.Node) -> Any:
        result = super().run_node(n)
        is_value = n in self._names and isinstance(result, Tensor) and result.is_floating_point()
        if is_value and self.found is None and not bool(torch.isfinite(result).all()):
            self.found = self._names[n]
        return result


def _times(shape: Sequence[int]) -> str:
    return "×".join(map(str, shape))
