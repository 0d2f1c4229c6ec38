"""Where integer kernels without VNNI give other answers than the file says, predicted from calibration images.

x86 before VNNI multiplies unsigned activations by signed weights with `vpmaddubsw`: products of two neighbouring
inputs are added in 16 bits and clipped to [-32768, 32767]. Two large products of one sign are enough (255 · 127 · 2 =
64770). ONNX Runtime packs a convolution's inputs with channels fastest, then columns and rows of the kernel, and a
linear layer's in order; so neighbours are known, and what clipping does to every output channel can be computed
exactly from sampled inputs. Depthwise convolutions have another kernel, which does not clip.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cveff.compress.quant.layers import Layer, find_layers, input_rounding, observe, weight_rounding

LIMIT = 32767


@dataclass(frozen=True)
class Saturation:
    """What clipping does to one layer, by output channel.

    Attributes:
        layer: its operator's name.
        share: (outputs,) of pairs that clip.
        noise: (outputs,) mean energy of the error that clipping adds, in steps of the integer sums.
        rounding: (outputs,) the same of rounding the weights: what clipping is to be compared with.
        signal: (outputs,) mean energy of the sums themselves.
        excess: (outputs,) how many times too large the largest pair could be, from the largest input seen at each
        place.
    """

    layer: str
    share: Tensor
    noise: Tensor
    rounding: Tensor
    signal: Tensor
    excess: Tensor

    @property
    def channels(self) -> int:
        """Output channels whose sums clip somewhere."""
        return int((self.share > 0).sum())

    @property
    def costs(self) -> Tensor:
        """(outputs,) bool: clipping adds more than steps `excess` times as wide would."""
        return (self.excess > 1) & (self.noise > (self.excess.square() - 1) * self.rounding)

    @property
    def severe(self) -> Tensor:
        """(outputs,) bool: clipping adds more than steps twice as wide would, with which nothing can clip."""
        return self.noise > 3 * self.rounding


@torch.no_grad()
def predict_saturation(
    graph: fx.GraphModule, batches: Sequence[Tensor], *, seed: int = 0
) -> dict[str, Saturation]:
    """Every layer that runs on integers and whose sums clip somewhere on these images.

    Args:
        graph: captured, with roundings whose steps are set; inputs are rounded without sign.
        batches: images (B, C, H, W), normalised.
        seed: of the output positions that are looked at.
    """
    layers = [
        layer
        for layer in find_layers(graph)
        if weight_rounding(graph, layer) is not None and not _is_depthwise(graph, layer)
    ]
    generator = torch.Generator().manual_seed(seed)
    sums: dict[str, dict[str, Tensor]] = {}
    peaks: dict[str, Tensor] = {}
    samples: dict[str, int] = {}

    def look(layer: Layer, x: Tensor, _: Tensor) -> None:
        rounding = input_rounding(graph, layer)
        if rounding is None or rounding.grid.signed:
            return
        rows = _in_order(layer, rounding.integers(layer.rows(x, generator)))
        whole = _integers(graph, layer)
        zero = float(rounding.zero_point.round())
        exact, clipped, wrong = _clip(rows.float(), whole)
        found = {
            "pairs": clipped,
            "noise": wrong.square().sum(2).flatten().double(),
            "signal": (exact - zero * whole.sum(2, keepdim=True)).square().sum(2).flatten().double(),
            # A weight's rounding error is spread evenly over one step: 1/12 of a step squared.
            "rounding": ((rows - zero).square().sum((1, 2)) / 12).repeat_interleave(whole.shape[1]).double(),
        }
        before = sums.get(layer.name)
        sums[layer.name] = {key: value + before[key] for key, value in found.items()} if before else found
        peak = rows.amax(1)
        peaks[layer.name] = torch.maximum(peak, peaks[layer.name]) if before else peak
        samples[layer.name] = samples.get(layer.name, 0) + rows.shape[1]

    observe(graph, layers, batches, look)
    return {
        layer.name: _saturation(
            layer.name, sums[layer.name], peaks[layer.name], _integers(graph, layer), samples[layer.name]
        )
        for layer in layers
        if layer.name in sums and bool((sums[layer.name]["pairs"] > 0).any())
    }


@torch.no_grad()
def narrow(graph: fx.GraphModule, found: Mapping[str, Saturation]) -> dict[str, int]:
    """Give wider steps to the weights of the channels where clipping costs more than that does, in place.

    Weights are to be rounded afterwards.

    Args:
        graph: what `found` was predicted for.

    Returns:
        layer -> how many of its channels were narrowed, of those with any.
    """
    narrowed = {}
    for layer in find_layers(graph):
        rounding = weight_rounding(graph, layer)
        if layer.name not in found or rounding is None:
            continue
        saturation = found[layer.name]
        if chosen := int(saturation.costs.sum()):
            factor = torch.where(saturation.costs, saturation.excess, 1.0)
            rounding.set_steps(rounding.scale * factor.to(rounding.scale.dtype), rounding.zero_point)
            narrowed[layer.name] = chosen
    return narrowed


def _saturation(
    name: str, sums: Mapping[str, Tensor], peaks: Tensor, whole: Tensor, samples: int
) -> Saturation:
    first, second = _pairs(peaks[:, None])
    up, down = (_pairs(part) for part in (whole.clamp(min=0), (-whole).clamp(min=0)))
    largest = torch.maximum(*(first * part[0] + second * part[1] for part in (up, down))).amax(2).flatten()
    num_pairs = samples * first.shape[2]
    return Saturation(
        name,
        share=sums["pairs"] / num_pairs,
        noise=sums["noise"] / samples,
        rounding=sums["rounding"] / samples,
        signal=sums["signal"] / samples,
        # Rounding may take each weight of a pair up by half a step.
        excess=(largest.double() + 255) / LIMIT,
    )


def _integers(graph: fx.GraphModule, layer: Layer) -> Tensor:
    """(groups, outputs, inputs) float: a layer's weights as integers, in the kernel's order."""
    rounding = weight_rounding(graph, layer)
    assert rounding is not None
    matrix = layer.matrix(graph)
    scale = rounding.scale.double().reshape(*matrix.shape[:2], 1)
    whole = (matrix / scale).round().clamp(rounding.grid.low, rounding.grid.high)
    return _in_order(layer, whole).float()


def _pairs(values: Tensor) -> tuple[Tensor, Tensor]:
    """(…, inputs) -> the first and the second of each pair of neighbours."""
    if values.shape[-1] % 2:
        values = torch.nn.functional.pad(values, (0, 1))
    return values[..., 0::2], values[..., 1::2]


def _clip(rows: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact sums (groups, outputs, samples), how many pairs clip (all outputs,), and what clipping adds to each sum."""
    exact = whole @ rows.mT
    wrong = torch.zeros_like(exact)
    first, second = _pairs(rows)
    up, down = _pairs(whole)
    counts = torch.zeros(whole.shape[0], whole.shape[1], dtype=torch.float64)
    peak = [part.amax(1, keepdim=True) for part in (first, second)]
    possible = (
        torch.maximum(
            peak[0] * up.clamp(min=0) + peak[1] * down.clamp(min=0),
            peak[0] * (-up).clamp(min=0) + peak[1] * (-down).clamp(min=0),
        )
        > LIMIT
    )
    # One output at a time, and of it the pairs that can clip: all at once would not fit in memory.
    for group, output in possible.any(2).nonzero().tolist():
        chosen = possible[group, output]
        pair = (
            first[group][:, chosen] * up[group, output, chosen]
            + second[group][:, chosen] * down[group, output, chosen]
        )
        over = pair.clamp(-LIMIT - 1, LIMIT) - pair
        wrong[group, output] = over.sum(1)
        counts[group, output] = (over != 0).sum()
    return exact, counts.flatten(), wrong


def _in_order(layer: Layer, rows: Tensor) -> Tensor:
    """(…, inputs) from channel, row, column to row, column, channel."""
    if layer.kernel is None:
        return rows
    taps = layer.kernel[0] * layer.kernel[1]
    return rows.reshape(*rows.shape[:-1], -1, taps).mT.flatten(-2)


def _is_depthwise(graph: fx.GraphModule, layer: Layer) -> bool:
    return layer.groups > 1 and layer.matrix(graph).shape[1] == 1
