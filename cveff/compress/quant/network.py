"""`QuantizedGraph`: the edit that rounds a network's tensors, and the network that it makes."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from torch import fx, nn

from cveff.compress.quant.aware import RoundingAware
from cveff.compress.quant.capture import capture, constant, identify, set_parameter
from cveff.compress.quant.fake_quant import FakeQuantize
from cveff.compress.quant.layers import find_layers, input_rounding, weight_rounding
from cveff.compress.quant.placement import Placement, Site, WeightSite
from cveff.compress.quant.round_bias import RoundBias
from cveff.errors import CheckpointError
from cveff.runtime.input_spec import InputSpec
from cveff.target import Scheme
from cveff.train.objective import Objective

ROUNDING = "rounding"
"""The submodule that holds every `FakeQuantize`."""


@dataclass(frozen=True)
class QuantizedGraph:
    """Edit: the network becomes its graph, with batch norms folded and these tensors and weights rounded.

    The steps (scales and zero points) are in the weights' file, under `rounding`.

    Attributes:
        input: `InputSpec` as JSON: what the graph is captured for.
        sites, weights: see `Placement`; as JSON.
        scheme: whose engine the file is written for.
    """

    input: Any
    sites: tuple[Any, ...] = ()
    weights: tuple[Any, ...] = ()
    scheme: Scheme = "cpu"
    kind: ClassVar[str] = "quantize"
    needs_float32: ClassVar[bool] = True
    """bfloat16 is no finer than 8 bits: trained in it, the network would round to other integers than the file."""

    def constrained(self, objective: Objective, module: nn.Module) -> Objective:
        """`objective`, which also learns the steps of `module`."""
        return RoundingAware(objective, module)

    def apply(self, module: nn.Module) -> nn.Module:
        """The rounded graph of `module`, its steps not set.

        Raises:
            StepError: the network cannot be captured.
            CheckpointError: the network has no such operators.
        """
        graph = capture(module, InputSpec.from_json(_mapping(self.input)))
        insert(graph, self.placement)
        return graph

    @classmethod
    def of(cls, spec: InputSpec, placement: Placement) -> QuantizedGraph:
        """The edit that rebuilds a network rounded so."""
        return cls(
            input=spec.to_json(),
            sites=tuple(_json(site) for site in placement.sites),
            weights=tuple(_json(site) for site in placement.weights),
            scheme=placement.scheme,
        )

    @property
    def placement(self) -> Placement:
        """What is rounded."""
        return Placement(
            tuple(Site(**_fields(item)) for item in self.sites),
            tuple(WeightSite(**_fields(item)) for item in self.weights),
            scheme=self.scheme,
        )


@dataclass(frozen=True)
class Roundings:
    """The `FakeQuantize`s of a network by what they round.

    Attributes:
        tensors: by tensor; one that has another's steps is under that other's name only.
        weights: by the operator that reads the weight.
    """

    tensors: Mapping[str, FakeQuantize] = field(default_factory=dict)
    weights: Mapping[str, FakeQuantize] = field(default_factory=dict)


def insert(graph: fx.GraphModule, placement: Placement) -> Roundings:
    """Round `placement`'s tensors and weights in a captured graph, in place; the steps are 1 until they are set.

    Raises:
        CheckpointError: the graph lacks an operator that the placement names.
    """
    nodes = identify(graph)
    graph.add_module(ROUNDING, nn.ModuleDict())
    tensors: dict[str, FakeQuantize] = {}
    weights: dict[str, FakeQuantize] = {}
    paths: dict[str, str] = {}
    for site in placement.sites:
        node = _found(nodes, site.tensor)
        if site.like:
            paths[site.tensor] = paths[site.like]
        else:
            paths[site.tensor] = f"{ROUNDING}.t{len(tensors)}"
            tensors[site.tensor] = FakeQuantize(site.grid)
            graph.add_submodule(paths[site.tensor], tensors[site.tensor])
        users = {_found(nodes, name) for name in site.readers} or set(node.users)
        with graph.graph.inserting_after(node):
            rounded = graph.graph.call_module(paths[site.tensor], (node,))
        rounded.meta = {"val": node.meta.get("val"), "nn_module_stack": node.meta.get("nn_module_stack")}
        for user in users:
            user.replace_input_with(node, rounded)
    for layer in placement.weights:
        node = _found(nodes, layer.reader)
        weight: Any = node.args[1]
        value = constant(graph, weight)
        if value is None:
            raise CheckpointError(
                f"{layer.reader} has no weight of its own; this model was written for another network"
            )
        path = f"{ROUNDING}.w{len(weights)}"
        add_bias(graph, node, layer.axis)
        sizes = () if layer.per_tensor else (value.shape[layer.axis], layer.axis)
        weights[layer.reader] = FakeQuantize(layer.grid, *sizes)
        graph.add_submodule(path, weights[layer.reader])
        with graph.graph.inserting_before(node):
            rounded = graph.graph.call_module(path, (weight,))
        node.replace_input_with(weight, rounded)
    if placement.scheme != "tensorrt":
        _round_biases(graph)
    graph.graph.lint()
    graph.recompile()
    return Roundings(tensors, weights)


def _round_biases(graph: fx.GraphModule) -> None:
    for index, layer in enumerate(find_layers(graph)):
        of_input, of_weight = input_rounding(graph, layer), weight_rounding(graph, layer)
        if of_input is None or of_weight is None:
            continue
        bias: Any = layer.node.args[2]
        path = f"{ROUNDING}.b{index}"
        graph.add_submodule(path, RoundBias(of_input, of_weight))
        with graph.graph.inserting_before(layer.node):
            rounded = graph.graph.call_module(path, (bias,))
        layer.node.args = (*layer.node.args[:2], rounded, *layer.node.args[3:])


def roundings(graph: nn.Module, placement: Placement) -> Roundings:
    """What `insert` returned, found again in a network that was built from its edit."""
    holder = graph.get_submodule(ROUNDING)
    own = [site.tensor for site in placement.sites if not site.like]
    return Roundings(
        {name: holder.get_submodule(f"t{index}") for index, name in enumerate(own)},  # type: ignore[misc]
        {site.reader: holder.get_submodule(f"w{index}") for index, site in enumerate(placement.weights)},  # type: ignore[misc]
    )


def is_quantized(module: nn.Module) -> bool:
    """Whether some tensor of the network is rounded already."""
    return any(isinstance(part, FakeQuantize) for part in module.modules())


def is_cast(module: nn.Module) -> bool:
    """Whether a network computes in float16 or bfloat16 somewhere."""
    return any(value.dtype in (torch.float16, torch.bfloat16) for value in module.state_dict().values())


def add_bias(graph: fx.GraphModule, node: fx.Node, axis: int) -> None:
    """A bias of zeros for a layer without one, in place, so that what rounding does to its mean can be put right.

    Args:
        node: the layer's operator in a captured graph.
        axis: of the output channels of its weight.
    """
    if len(node.args) > 2 and node.args[2] is not None:
        return
    weight: Any = node.args[1]
    value = constant(graph, weight)
    assert value is not None
    owner = str(weight.target).rpartition(".")[0]
    holder = graph.get_submodule(owner)
    name = "bias" if getattr(holder, "bias", None) is None else "added_bias"
    path = f"{owner}.{name}" if owner else name
    set_parameter(graph, path, torch.zeros(value.shape[axis]))
    with graph.graph.inserting_before(node):
        bias = graph.graph.get_attr(path)
    node.args = (*node.args[:2], bias, *node.args[3:])


def _found(nodes: Mapping[str, fx.Node], name: str) -> fx.Node:
    if name not in nodes:
        raise CheckpointError(
            f"the network has no operator {name!r}; this model was written for another network or by another cveff"
        )
    return nodes[name]


def _json(site: Any) -> dict[str, object]:
    values = dataclasses.asdict(site)
    return {key: list(value) if isinstance(value, tuple) else value for key, value in values.items()}


def _mapping(value: Any) -> dict[str, Any]:
    """A mapping that JSON, or the freezing of lists into tuples, has gone over."""
    return dict(value)


def _fields(value: Any) -> dict[str, Any]:
    return {key: tuple(item) if isinstance(item, list) else item for key, item in dict(value).items()}
