"""A network as `torch.export` sees it: one small, stable set of operators for every architecture."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import nn
from torch.export.graph_signature import InputKind

from cveff.compress.regions import inline_regions
from cveff.errors import StepError
from cveff.runtime.errors import first_line
from cveff.runtime.input_spec import InputSpec

_NAMED = (InputKind.PARAMETER, InputKind.BUFFER)


@dataclass(frozen=True)
class Trace:
    """The operators of a network in evaluation mode, on one image; composite operators are not decomposed.

    Attributes:
        program: the exported program; its graph is `program.graph`.
        parameters: placeholder's node name -> path in the module, for floating-point parameters and buffers.
        constants: placeholder's node name -> value, for other tensors: indices, and constants made in the code.
        shapes: node name -> shape of its value, for nodes that are one tensor.
        modules: node name -> path of the innermost module that computed it.
    """

    program: torch.export.ExportedProgram
    parameters: Mapping[str, str]
    constants: Mapping[str, torch.Tensor]
    shapes: Mapping[str, tuple[int, ...]]
    modules: Mapping[str, str]

    @property
    def nodes(self) -> list[torch.fx.Node]:
        """The nodes in the order they run."""
        return list(self.program.graph.nodes)


def trace(module: nn.Module, spec: InputSpec) -> Trace:
    """Export `module`, left as it was, on one image of `spec`'s size.

    Raises:
        StepError: the network cannot be exported.
    """
    training = module.training
    parameter = next(module.parameters(), torch.zeros(0))
    example = torch.zeros(1, spec.channels, *spec.size, device=parameter.device, dtype=parameter.dtype)
    try:
        with warnings.catch_warnings(), torch.no_grad():
            warnings.simplefilter("ignore")
            program = torch.export.export(module.eval(), (example,), strict=False)
    except Exception as error:  # the exporter raises whatever the network's own code does
        raise StepError(f"{type(module).__name__} cannot be exported: {first_line(error)}") from error
    finally:
        module.train(training)
    inline_regions(program.graph_module)
    parameters, constants = {}, {}
    for item in program.graph_signature.input_specs:
        name = item.arg.name
        if item.kind not in (*_NAMED, InputKind.CONSTANT_TENSOR):
            continue
        value = program.constants.get(str(item.target))
        if value is None:
            value = program.state_dict[str(item.target)]
        if item.kind in _NAMED and value.is_floating_point():
            parameters[name] = str(item.target)
        else:
            constants[name] = value.detach()
    shapes, modules = {}, {}
    for node in program.graph.nodes:
        value = node.meta.get("val")
        if isinstance(value, torch.Tensor):
            shapes[node.name] = tuple(int(size) for size in value.shape)
        stack = list((node.meta.get("nn_module_stack") or {}).values())
        # A module that runs again has a mark behind its path.
        modules[node.name] = str(stack[-1][0]).partition("@")[0] if stack else ""
    return Trace(program, parameters, constants, shapes, modules)
