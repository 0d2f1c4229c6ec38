"""A network cut into pieces that run one after the other: its blocks stay modules, what stands between them is traced.

Tracing is `torch.fx`'s. Members of sequences and children of the network are kept whole, with their weights, modes and
gradients, so that pieces train as the network does.
"""

from __future__ import annotations

import inspect
from collections import Counter
from collections.abc import Sequence
from typing import Any, cast

from torch import Tensor, fx, nn
from torch.nn import functional as F

from cveff.errors import StepError
from cveff.runtime.errors import first_line


class _Blocks(fx.Tracer):
    """Looks into sequences and lists alone."""

    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return not isinstance(m, (nn.Sequential, nn.ModuleList, nn.ModuleDict))


def cut_points(module: nn.Module) -> tuple[str, ...]:
    """Paths of the modules behind which a network can be cut, in the order they run: all that is computed later sees
    the image through their output alone.

    Raises:
        StepError: the network cannot be traced, or takes or gives more than one tensor.
    """
    graph = _graph(module)
    position = {node: index for index, node in enumerate(graph.nodes)}
    calls = Counter(str(node.target) for node in graph.nodes if node.op == "call_module")
    image = next(iter(graph.nodes))
    seeing, reach = {image}, 0
    found = []
    for index, node in enumerate(graph.nodes):
        if not seeing.isdisjoint(node.all_input_nodes):
            seeing.add(node)
        if node not in seeing:
            continue
        if node.op == "call_module" and reach <= index and calls[str(node.target)] == 1:
            found.append(str(node.target))
        reach = max([reach, *(position[user] for user in node.users)])
    return tuple(found)


def pieces(module: nn.Module, cuts: Sequence[str]) -> list[nn.Module]:
    """The `len(cuts) + 1` parts of a network between the image, `cuts` and the logits; they share its weights.

    Args:
        cuts: some of `cut_points(module)`, in their order.

    Raises:
        StepError: as `cut_points`, and for a cut that is none of them or stands before an earlier one.
    """
    known = cut_points(module)
    for cut in cuts:
        if cut not in known:
            raise StepError(
                f"{type(module).__name__} has no stage that ends at {cut!r}; it can be cut behind {', '.join(known)}"
            )
    order = [known.index(cut) for cut in cuts]
    if sorted(set(order)) != order:
        raise StepError(f"cuts {', '.join(cuts)} are not in the order the modules run; sort them")
    graph = _graph(module)
    nodes = {str(node.target): node for node in graph.nodes if node.op == "call_module"}
    ends = [*(nodes[cut] for cut in cuts), _result(graph, module)]
    starts = [next(iter(graph.nodes)), *ends[:-1]]
    return [_between(module, start, end) for start, end in zip(starts, ends, strict=True)]


def _graph(module: nn.Module) -> fx.Graph:
    optional = {
        name: parameter.default
        for name, parameter in list(inspect.signature(module.forward).parameters.items())[1:]
        if parameter.default is not parameter.empty
    }
    modes = [(part, part.training) for part in module.modules()]
    try:
        graph = _Blocks().trace(module.eval(), concrete_args=optional or None)
    except Exception as error:  # the tracer raises whatever the network's own code does
        raise StepError(
            f"{type(module).__name__} cannot be cut into stages: {first_line(error)}; take another network"
        ) from error
    finally:
        for part, training in modes:
            part.training = training
    _result(graph, module)
    return graph


def _result(graph: fx.Graph, module: nn.Module) -> fx.Node:
    result = next(node for node in graph.nodes if node.op == "output").args[0]
    if not isinstance(result, fx.Node):
        raise StepError(
            f"{type(module).__name__} does not return one tensor, so it cannot be cut into stages"
        )
    return result


def _between(module: nn.Module, start: fx.Node, end: fx.Node) -> nn.Module:
    needed, waiting = {start}, [end]
    while waiting:
        node = waiting.pop()
        if node not in needed:
            needed.add(node)
            waiting += node.all_input_nodes
    graph = fx.Graph()
    copies = {start: graph.placeholder("x", Tensor)}
    for node in start.graph.nodes:
        if node in needed and node is not start:
            copies[node] = graph.node_copy(node, copies.__getitem__)
    graph.output(copies[end])
    piece = fx.GraphModule(module, graph, type(module).__name__)
    _keep_dropout(piece)
    return piece


def _keep_dropout(piece: fx.GraphModule) -> None:
    """A functional dropout has the mode of the trace in its arguments; a module has that of the network."""
    for index, node in enumerate(list(piece.graph.nodes)):
        if node.op != "call_function" or node.target is not F.dropout:
            continue
        rate = cast(Any, node.kwargs.get("p", node.args[1] if len(node.args) > 1 else 0.5))
        piece.add_submodule(f"dropout_{index}", nn.Dropout(float(rate)).train(piece.training))
        with piece.graph.inserting_after(node):
            source = cast(Any, node.args[0] if node.args else node.kwargs["input"])
            node.replace_all_uses_with(piece.graph.call_module(f"dropout_{index}", (source,)))
        piece.graph.erase_node(node)
    piece.recompile()
