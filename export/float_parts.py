"""Files of one rounded network with this or that part of it in floats, all from one export.

They differ in pairs of QuantizeLinear and DequantizeLinear alone. So the network is traced once, with a pair of its own
between every tensor and every operator that reads it rounded in any of the files; a file is that graph without the
pairs it has not, those of one tensor made one again. The files are for timing: weights are as they were before they
were chosen for rounding, and answers those of no network.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Collection, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import helper, numpy_helper
from torch import fx, nn

from cveff.compress.quant.capture import identify
from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quant.network import ROUNDING, add_bias
from cveff.compress.quant.placement import Placement
from cveff.compress.quant.post_training import Quantized
from cveff.export.onnx import serialize, trace
from cveff.files import atomic_path
from cveff.model import Model

_OUTPUT = "output"
"""Reads what the network returns; operators' names have colons."""
_SCALE = re.compile(rf"\b{ROUNDING}\.(\w+)\.scale$")
_MARK = 2.0**-20
"""Scales are told apart by so small a share: equal ones, and what they round, would be made one by the exporter."""


@dataclass(frozen=True)
class _Pair:
    """A QuantizeLinear and its DequantizeLinear.

    Attributes:
        tensor: what is rounded; "" of a weight.
        reader: the operator that reads it.
        scale: the step that it has in the files.
    """

    tensor: str
    reader: str
    scale: np.ndarray


class FloatParts:
    """One traced graph, and the files that are cut from it.

    Args:
        model: in floats, that `found` was made from.
        found: rounded throughout.
        placements: what is rounded in each file: tensors and weights that are rounded in `found`.

    Raises:
        ExportError: the network cannot be traced.
    """

    def __init__(self, model: Model, found: Quantized, placements: Collection[Placement]) -> None:
        self._found, self._placements = found, placements
        self._users = {name: tuple(names) for name, names in _users(found.exact).items()}
        self._pairs: dict[str, _Pair] = {}
        self._model = Model(found.of(model).spec, self._inserted())
        self._traced = trace(self._model)

    def write(self, placement: Placement, path: Path) -> Path:
        """Write the file of one of the placements, atomically.

        Raises:
            ExportError: onnxslim cannot simplify it, or it is not valid ONNX.
        """
        proto = onnx.ModelProto()
        proto.CopyFrom(self._traced)
        kept = {("", site.reader) for site in placement.weights} | set(self._edges(placement))
        _cut(proto, self._pairs, kept)
        with atomic_path(path) as temporary:
            temporary.write_bytes(serialize(proto, self._model))
        return path

    def _edges(self, placement: Placement) -> list[tuple[str, str]]:
        return [
            (site.tensor, reader)
            for site in placement.sites
            for reader in site.readers or self._users[site.tensor]
        ]

    def _inserted(self) -> nn.Module:
        found = self._found
        graph = copy.deepcopy(found.exact)
        nodes = identify(graph)
        nodes[_OUTPUT] = next(iter(graph.graph.find_nodes(op="output")))
        graph.add_module(ROUNDING, nn.ModuleDict())
        sites = {site.tensor: site for site in found.placement.sites}
        every = (found.placement, *self._placements)
        for tensor, reader in dict.fromkeys(edge for item in every for edge in self._edges(item)):
            steps = found.roundings.tensors[sites[tensor].like or tensor]
            self._between(graph, nodes[tensor], nodes[reader], steps, _Pair(tensor, reader, _numbers(steps)))
        for layer in found.placement.weights:
            node, steps = nodes[layer.reader], found.roundings.weights[layer.reader]
            add_bias(graph, node, layer.axis)
            weight: Any = node.args[1]
            self._between(graph, weight, node, steps, _Pair("", layer.reader, _numbers(steps)))
        graph.graph.lint()
        graph.recompile()
        return graph

    def _between(
        self, graph: fx.GraphModule, node: fx.Node, reader: fx.Node, steps: FakeQuantize, pair: _Pair
    ) -> None:
        marked = copy.deepcopy(steps)
        marked.set_steps(steps.scale * (1 + _MARK * (1 + len(self._pairs))), steps.zero_point)
        name = f"p{len(self._pairs)}"
        self._pairs[name] = pair
        graph.add_submodule(f"{ROUNDING}.{name}", marked)
        with graph.graph.inserting_before(reader):
            rounded = graph.graph.call_module(f"{ROUNDING}.{name}", (node,))
        rounded.meta = {"val": node.meta.get("val"), "nn_module_stack": node.meta.get("nn_module_stack")}
        reader.replace_input_with(node, rounded)


def _cut(proto: onnx.ModelProto, pairs: Mapping[str, _Pair], kept: Collection[tuple[str, str]]) -> None:
    """Leave the pairs of `kept`, (tensor, reader) each, and one for all readers of a tensor; in place."""
    graph = proto.graph
    constants = {item.name: item for item in graph.initializer}
    read_by = {node.input[0]: node for node in graph.node if node.op_type == "DequantizeLinear"}
    instead: dict[str, str] = {}
    first: dict[str, str] = {}
    for node in [node for node in graph.node if node.op_type == "QuantizeLinear"]:
        named = _SCALE.search(node.input[1])
        if named is None:
            continue
        pair, back = pairs[named[1]], read_by[node.output[0]]
        scale = constants[node.input[1]]
        scale.CopyFrom(numpy_helper.from_array(pair.scale, scale.name))
        if (pair.tensor, pair.reader) not in kept:
            instead[back.output[0]] = node.input[0]
        elif pair.tensor in first:
            instead[back.output[0]] = first[pair.tensor]
        else:
            if pair.tensor:
                first[pair.tensor] = back.output[0]
            continue
        graph.node.remove(node)
        graph.node.remove(back)
    for node in graph.node:
        for index, name in enumerate(node.input):
            node.input[index] = _end(instead, name)
    for output in graph.output:
        if output.name in instead:
            graph.node.append(helper.make_node("Identity", [_end(instead, output.name)], [output.name]))


def _end(instead: Mapping[str, str], name: str) -> str:
    while name in instead:
        name = instead[name]
    return name


def _users(graph: fx.GraphModule) -> dict[str, list[str]]:
    names = {node: name for name, node in identify(graph).items()}
    return {name: [names.get(user, _OUTPUT) for user in node.users] for node, name in names.items()}


def _numbers(steps: FakeQuantize) -> np.ndarray:
    return steps.scale.detach().numpy()
