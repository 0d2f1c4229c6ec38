"""Where integer kernels without VNNI give other answers than the file says, predicted from calibration images.

x86 before VNNI multiplies unsigned activations by signed weights with `vpmaddubsw`: products of two neighbouring inputs are
added in 16 bits and clipped to [-32768, 32767]. Two large products of one sign are enough (255 · 127 · 2 = 64770). ONNX Runtime
packs a convolution's inputs with channels fastest, then columns and rows of the kernel, and a linear layer's in order; so
neighbours are known, and what clipping does to every output channel can be computed exactly from sampled inputs.
Depthwise convolutions have another kernel, which does not clip.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, fx

from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quant.layers import Layer, find_layers, observe, weight_rounding

LIMIT = 32767


@dataclass(frozen=True)
class Saturation:
    """What clipping does to one layer.

    Attributes:
        layer: its operator's name.
        share: (outputs,) of pairs that clip.
        noise: (outputs,) energy of the error that clipping adds over the energy of the output, both after the bias.
    """

    layer: str
    share: Tensor
    noise: Tensor

    @property
    def channels(self) -> int:
        """Output channels whose sums ever clip."""
        return int((self.share > 0).sum())


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
    clipped: dict[str, Tensor] = {}
    pairs: dict[str, int] = {}
    error: dict[str, Tensor] = {}
    energy: dict[str, Tensor] = {}

    def look(layer: Layer, x: Tensor, _: Tensor) -> None:
        rounding = _of_input(graph, layer)
        weights = weight_rounding(graph, layer)
        if rounding is None or rounding.grid.signed:
            return
        assert weights is not None
        rows = _in_order(layer, rounding.integers(layer.rows(x, generator)))
        zero = float(rounding.zero_point.round())
        matrix = layer.matrix(graph)
        scale = weights.scale.double().reshape(*matrix.shape[:2], 1)
        whole = _in_order(layer, (matrix / scale).round().clamp(-127, 127)).float()
        exact, clip, wrong = _clip(rows.float(), whole)
        sums = exact - zero * whole.sum(2, keepdim=True)
        name = layer.name
        clipped[name] = clipped.get(name, 0) + clip
        pairs[name] = pairs.get(name, 0) + rows.shape[1] * ((rows.shape[2] + 1) // 2)
        error[name] = error.get(name, 0) + wrong.square().sum(2).flatten().double()
        energy[name] = energy.get(name, 0) + sums.square().sum(2).flatten().double()

    observe(graph, layers, batches, look)
    return {
        name: Saturation(name, count / pairs[name], error[name] / energy[name].clamp(min=1e-30))
        for name, count in clipped.items()
        if bool((count > 0).any())
    }


def _clip(rows: Tensor, whole: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Exact sums (groups, outputs, samples), how many pairs clip (all outputs,), and what clipping adds to each sum."""
    if rows.shape[2] % 2:
        rows, whole = (torch.nn.functional.pad(item, (0, 1)) for item in (rows, whole))
    exact = whole @ rows.mT
    wrong = torch.zeros_like(exact)
    counts = []
    # One output at a time: all pairs of all outputs and samples at once would not fit.
    first, second = rows[:, :, 0::2], rows[:, :, 1::2]
    for output in range(whole.shape[1]):
        pair = first * whole[:, output, None, 0::2] + second * whole[:, output, None, 1::2]
        over = pair.clamp(-LIMIT - 1, LIMIT) - pair
        wrong[:, output] = over.sum(2)
        counts.append((over != 0).sum((1, 2)))
    return exact, torch.stack(counts, 1).flatten().double(), wrong


def _in_order(layer: Layer, rows: Tensor) -> Tensor:
    """(…, inputs) from channel, row, column to row, column, channel."""
    if layer.kernel is None:
        return rows
    taps = layer.kernel[0] * layer.kernel[1]
    return rows.reshape(*rows.shape[:-1], -1, taps).mT.flatten(-2)


def _is_depthwise(graph: fx.GraphModule, layer: Layer) -> bool:
    return layer.groups > 1 and layer.matrix(graph).shape[1] == 1


def _of_input(graph: fx.GraphModule, layer: Layer) -> FakeQuantize | None:
    node = layer.node.args[0]
    if isinstance(node, fx.Node) and node.op == "call_module":
        found = graph.get_submodule(str(node.target))
        return found if isinstance(found, FakeQuantize) else None
    return None
