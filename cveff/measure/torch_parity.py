"""Parity module by module between a PyTorch network and its ONNX file: which module first differs."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from cveff.measure._onnx_graph import Exposed, Graph
from cveff.measure.onnx_parity import compare_runs
from cveff.measure.parity import LayerParity
from cveff.measure.predictor import torch_predictor
from cveff.measure.threads import usable_cores

if TYPE_CHECKING:
    from torch import nn

    from cveff.model import Model


def module_parity(
    model: Model, onnx_file: str | Path, images: np.ndarray, *, threads: int | None = None
) -> list[LayerParity]:
    """Compare the output of every module that the file names, in the order of the graph, and the logits.

    The file must say which module each node came from (node metadata "module", or what torch's exporter
    writes); of a file that does not, only the logits are compared. Modules that run more than once, or
    whose output the exporter fused away, are left out; of nested modules with the same output, the
    innermost is named.

    Args:
        images: uint8 (N, H, W, C) of the model's input size.
        threads: of both; by default every core.

    Returns:
        layers whose `name` and `module` are the module's path, `op` its class, PyTorch being the reference.

    Raises:
        EngineError: the file cannot be opened or run.
        InputSizeError: `images` does not fit the model.
    """
    threads = threads or usable_cores()
    graph = Graph(onnx_file)
    predictor = torch_predictor(model, threads)
    tensors = _module_outputs(graph, model.module)
    found = Exposed(graph, tensors, graph_optimizations=False, threads=threads)
    with _recorded(model.module) as recorded:
        predictor(images[:1])
        example = dict(recorded)
    values = found.run(images[:1], [name for name in tensors if name in found.available])
    tensors = {
        tensor: module
        for tensor, module in tensors.items()
        if module in example and tensor in values and values[tensor].shape == example[module].shape
    }
    output = graph.outputs[0]

    def run_torch(chunk: np.ndarray) -> Mapping[str, np.ndarray]:
        with _recorded(model.module) as recorded:
            logits = predictor(chunk)
        return {**{tensor: recorded[module] for tensor, module in tensors.items()}, output: logits}

    names = list(dict.fromkeys([*tensors, output]))
    layers = compare_runs(graph, names, run_torch, lambda chunk: found.run(chunk, names), images)
    classes = {name: type(module).__name__ for name, module in model.module.named_modules()}
    return [
        replace(layer, name=tensors[layer.name], module=tensors[layer.name], op=classes[tensors[layer.name]])
        if layer.name in tensors
        else layer
        for layer in layers
    ]


def _module_outputs(graph: Graph, network: nn.Module) -> dict[str, str]:
    """Tensor -> path of the innermost module of `network` whose only output it is."""
    names = {name for name, _ in network.named_modules() if name}
    prefix = _prefix(graph, names)
    outputs: dict[str, str] = {}
    for name in sorted(names, key=lambda name: name.count("."), reverse=True):
        path = prefix + name
        inside = {tensor for tensor, module in graph.modules.items() if (module + ".").startswith(path + ".")}
        leaving = [
            tensor for tensor in graph.activations if tensor in inside and _leaves(graph, tensor, inside)
        ]
        if len(leaving) == 1:
            outputs.setdefault(leaving[0], name)
    return outputs


def _leaves(graph: Graph, tensor: str, inside: set[str]) -> bool:
    consumers = graph.consumers.get(tensor, [])
    return tensor in graph.outputs or any(
        output not in inside for node in consumers for output in node.output
    )


def _prefix(graph: Graph, names: set[str]) -> str:
    """What the exporter's wrapper puts before the network's own module names."""
    paths = set(graph.modules.values())
    candidates = ["", *sorted({path.split(".")[0] + "." for path in paths if path})]
    return max(candidates, key=lambda prefix: sum(prefix + name in paths for name in names))


@contextmanager
def _recorded(network: nn.Module) -> Iterator[dict[str, np.ndarray]]:
    """Module path -> its output as float32, for modules that ran exactly once and returned one tensor."""
    import torch

    recorded: dict[str, np.ndarray] = {}
    calls: dict[str, int] = {}

    def keep(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            calls[name] = calls.get(name, 0) + 1
            if isinstance(output, torch.Tensor) and calls[name] == 1:
                # A copy: a later in-place activation would overwrite the output.
                recorded[name] = output.detach().float().cpu().numpy().copy()
            else:
                recorded.pop(name, None)

        return hook

    handles = [module.register_forward_hook(keep(name)) for name, module in network.named_modules() if name]
    try:
        yield recorded
    finally:
        for handle in handles:
            handle.remove()
